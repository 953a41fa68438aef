"""Phantoms: exact line integrals, and scans that are simulated from them."""

import numpy as np
import pytest
import tifffile

from napari_recon.learning.phantoms import KINDS, Blobs, Ellipsoids, make_phantom
from napari_recon.learning.simulate import circular_cone, simulate
from napari_recon.scans import Geometry, Grid, ScanError, open_scan

EYE = np.eye(3)[None]


def turned(seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q


def some_ellipsoids(replace: bool) -> Ellipsoids:
    rng = np.random.default_rng(3)
    rotations = np.stack([turned(k) for k in range(8)])
    return Ellipsoids(
        rng.uniform(-5, 5, (8, 3)), rng.uniform(1, 5, (8, 3)), rotations, rng.uniform(0, 0.05, 8), replace
    )


GEOMETRIES = {
    "cone": Geometry.cone([0, 37, 200], (14, 19), 3.0, 66, 199, axis_offset=1.3),
    "parallel": Geometry.parallel([0, 37, 200], (14, 19), 1.1, axis_offset=-0.7),
}


def along_rays(phantom: Ellipsoids, geometry: Geometry, step: float = 0.002) -> np.ndarray:
    """The same integrals, by brute force: sums over points along a few rays, with the definition of the object."""
    rows, columns = geometry.detector_shape
    out = np.zeros((geometry.views, rows, columns))
    for view in range(geometry.views):
        ray, center, u, v = geometry.vectors[view].reshape(4, 3)
        for row in range(0, rows, 4):
            for column in range(0, columns, 3):
                p = center + u * (column - (columns - 1) / 2) + v * (row - (rows - 1) / 2)
                start = ray if geometry.kind == "cone" else p
                d = p - ray if geometry.kind == "cone" else ray
                d = d / np.linalg.norm(d)
                middle = -float(start @ d)
                t = middle + np.arange(-20, 20, step)
                points = start + t[:, None] * d
                value = np.zeros(len(t))
                for c, a, r, x in zip(phantom.centers, phantom.axes, phantom.rotations, phantom.values, strict=True):
                    inside = (((points - c) @ r.T / a) ** 2).sum(1) <= 1
                    value = np.where(inside, x, value) if phantom.replace else value + x * inside
                out[view, row, column] = value.sum() * step
    return out


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_line_integrals_are_those_of_the_definition(kind, replace):
    phantom, geometry = some_ellipsoids(replace), GEOMETRIES[kind]
    expected = along_rays(phantom, geometry)[:, ::4, ::3]
    np.testing.assert_allclose(phantom.project(geometry)[:, ::4, ::3], expected, atol=5e-4)
    assert expected.max() > 0.1


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_a_centred_ball_shows_its_diameter(kind):
    ball = Ellipsoids([[0, 0, 0]], [[6, 6, 6]], EYE, [0.03])
    columns = 15
    geometry = {
        "cone": Geometry.cone(np.arange(0, 360, 45), (15, columns), 0.5, 66, 199),
        "parallel": Geometry.parallel(np.arange(0, 180, 45), (15, columns), 0.5),
    }[kind]
    np.testing.assert_allclose(ball.project(geometry)[:, 7, 7], 0.03 * 12, rtol=1e-6)


def test_rays_end_at_source_and_detector():
    inside = Ellipsoids([[0, -10, 0]], [[3, 3, 3]], EYE, [0.1])  # the source stands in its middle
    geometry = Geometry.cone([0], (1, 1), 1.0, 10, 20)
    assert inside.project(geometry)[0, 0, 0] == pytest.approx(0.3)
    beyond = Ellipsoids([[0, 30, 0]], [[3, 3, 3]], EYE, [0.1])
    assert beyond.project(geometry)[0, 0, 0] == 0


def test_adding_is_linear():
    phantom = some_ellipsoids(replace=False)
    parts = [
        Ellipsoids(phantom.centers[s], phantom.axes[s], phantom.rotations[s], phantom.values[s])
        for s in (slice(0, 3), slice(3, 8))
    ]
    grid, geometry = Grid((9, 10, 11), 1.3), GEOMETRIES["cone"]
    np.testing.assert_allclose(phantom.project(geometry), sum(p.project(geometry) for p in parts), atol=1e-6)
    np.testing.assert_allclose(phantom.volume(grid), sum(p.volume(grid) for p in parts), atol=1e-6)


def test_volume_holds_the_mass_of_an_ellipsoid():
    axes = np.array([3.0, 5.0, 4.0])
    body = Ellipsoids([[0.4, -0.3, 0.2]], [axes], turned(5)[None], [0.02])
    grid = Grid((40, 40, 40), 0.35)
    mass = body.volume(grid, supersampling=4).sum(dtype=np.float64) * grid.voxel_size**3
    assert mass == pytest.approx(0.02 * 4 / 3 * np.pi * axes.prod(), rel=2e-3)


def test_volume_and_projections_are_of_the_same_object():
    # Parallel rays along y through voxel centres: sums over the volume approach the exact integrals.
    phantom, n, voxel = some_ellipsoids(replace=True), 48, 0.42
    volume = phantom.volume(Grid((n, n, n), voxel))
    projection = phantom.project(Geometry.parallel([0], (n, n), voxel))[0]
    summed = volume.sum(axis=1) * voxel
    assert np.abs(summed - projection).mean() < 0.01 * projection.max()
    assert np.corrcoef(summed.ravel(), projection.ravel())[0, 1] > 0.999


def test_later_ellipsoids_replace_earlier_ones():
    shell = Ellipsoids([[0, 0, 0]] * 2, [[5, 5, 5], [4, 4, 4]], np.repeat(EYE, 2, 0), [0.05, 0.0], replace=True)
    middle = shell.project(Geometry.parallel([0], (1, 1), 1.0))[0, 0, 0]
    assert middle == pytest.approx(2 * 0.05)
    assert shell.volume(Grid((1, 1, 1), 0.5))[0, 0, 0] == 0


def test_blobs_integrate_to_their_closed_form():
    blob = Blobs(np.array([[1.0, -2.0, 0.5]]), np.array([1.5]), np.array([0.04]))
    geometry = Geometry.parallel(np.arange(0, 180, 20), (61, 61), 0.3)
    total = blob.project(geometry).sum(axis=(1, 2)) * 0.3**2  # every view holds the whole mass
    np.testing.assert_allclose(total, 0.04 * (2 * np.pi) ** 1.5 * 1.5**3, rtol=1e-3)
    grid = Grid((60, 60, 60), 0.3)
    assert blob.volume(grid).sum() * 0.3**3 == pytest.approx(total[0], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_covers_the_object_and_sees_air_at_both_sides(kind):
    phantom = make_phantom(kind, seed=2)
    geometry, grid = circular_cone(phantom, 32, 8)
    p = phantom.project(geometry)
    assert p.max() > 0.1
    border = np.concatenate([p[:, :, 0], p[:, :, -1]], axis=1)
    assert border.max() < 0.01 * p.max()
    assert max(p[:, 0].max(), p[:, -1].max()) < 0.01 * p.max()
    volume = phantom.volume(grid)
    assert volume.min() >= -1e-6
    assert 0.02 < volume.max() < 0.2
    assert grid.shape == (32, 32, 32)


def test_every_seed_is_another_nut():
    grid = Grid((24, 24, 24), 34 / 24)
    a, again, b = (make_phantom("walnut", seed).volume(grid) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 0.01


def test_simulated_scan_reads_back_as_the_exact_integrals(tmp_path):
    folder = simulate("walnut", tmp_path / "nut", size=24, views=12, seed=4, photons=None)
    scan = open_scan(folder)
    exact = make_phantom("walnut", 4).project(scan.geometry)
    assert scan.shape[0] == 12
    assert np.abs(scan.projections() - exact).max() < 1e-3  # what whole counts leave
    assert scan.checks() == [] or all("views are few" in s for s in scan.checks())
    truth = tifffile.imread(scan.truth)
    grid = scan.default_grid()
    assert truth.shape == grid.shape == (24, 24, 24)
    np.testing.assert_allclose(truth, make_phantom("walnut", 4).volume(grid), atol=1e-6)


def test_noise_is_that_of_the_photons(tmp_path):
    scan = open_scan(simulate("blobs", tmp_path / "s", size=24, views=16, photons=5000))
    exact = make_phantom("blobs", 0).project(scan.geometry)
    middle = np.s_[:, 4:-4, 8:-8]
    expected = np.sqrt(np.exp(exact[middle]) / 5000)  # d(-log t) = dt / t
    noise = (scan.projections() - exact)[middle] / expected
    assert 0.9 < noise.std() < 1.15
    assert abs(noise.mean()) < 0.1


def test_the_same_seed_writes_the_same_scan(tmp_path):
    a, b = (open_scan(simulate("walnut", tmp_path / n, size=16, views=4)) for n in "ab")
    np.testing.assert_array_equal(a.frames[:], b.frames[:])


def test_simulate_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ScanError, match="not an empty folder"):
        simulate("walnut", tmp_path / "full", size=16, views=4)
    with pytest.raises(ScanError, match="shepp-logan"):
        simulate("teapot", tmp_path / "new", size=16, views=4)
    with pytest.raises(ScanError, match="views"):
        simulate("walnut", tmp_path / "new", size=16, views=0)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", full_disk)
    with pytest.raises(ScanError, match="No space left"):
        simulate("walnut", tmp_path / "new", size=16, views=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_ellipsoids_must_agree():
    with pytest.raises(ScanError, match="centers"):
        Ellipsoids([[0, 0]], [[1, 1, 1]], EYE, [1.0])
    with pytest.raises(ScanError, match="positive"):
        Ellipsoids([[0, 0, 0]], [[1, 0, 1]], EYE, [1.0])
