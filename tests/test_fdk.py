"""FDK: a uniform object has its attenuation, whatever the orbit; weights count every ray once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from napari_recon.physics.fdk_filter import fdk_weights, filter_projections, ramp
from napari_recon.physics.projectors import TorchProjector, torch_any
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction import fdk as fdk_module
from napari_recon.reconstruction.fdk import FDK
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

MU = 0.03  # 1/mm
CENTER, AXES = np.array([1.0, -2.0, 0.6]), np.array([8.0, 7.0, 5.0])  # mm
GRID = Grid((24, 48, 48), 0.5)
FULL = np.arange(0, 360, 3.0)
RANDOM = np.random.default_rng(0)


def cone(angles: np.ndarray, offset: float = 0.0) -> Geometry:
    return Geometry.cone(angles, (36, 72), 1.25, 66, 199, axis_offset=offset)


def parallel(angles: np.ndarray, offset: float = 0.0) -> Geometry:
    return Geometry.parallel(angles, (36, 72), 0.42, axis_offset=offset)


def fan(angles: np.ndarray) -> Geometry:
    return Geometry.cone(angles, (1, 72), 1.25, 66, 199)


def wobble() -> Geometry:
    vectors = cone(FULL).vectors.copy()
    vectors += RANDOM.normal(size=vectors.shape) * ([0.05] * 6 + [1e-3] * 6)
    return Geometry(vectors, (36, 72))


ORBITS = {
    "circle": cone(FULL),
    "circle backwards": cone(100 - FULL),
    "uneven": cone(np.sort(FULL + RANDOM.uniform(-1.3, 1.3, len(FULL)))),
    "in any order": cone(RANDOM.permutation(FULL)),
    "end measured twice": cone(np.linspace(0, 360, 121)),
    "one and a half turns": cone(np.arange(0, 540, 3.0)),
    "two turns": cone(np.arange(0, 720, 4.0)),
    "short": cone(np.arange(0, 215, 2.0)),
    "short backwards": cone(30 - np.arange(0, 215, 2.0)),
    "short uneven": cone(np.sort(RANDOM.uniform(0, 230, 150))),
    "short, long": cone(np.arange(50, 350, 2.0)),
    "detector left": cone(FULL, 18),
    "detector right": cone(FULL, -18),
    "axis a little off": cone(FULL, 1.7),
    "wobble": wobble(),
    "fan": fan(FULL),
    "fan short": fan(np.arange(0, 215, 2.0)),
    "parallel": parallel(FULL / 2),
    "parallel, end measured twice": parallel(np.linspace(0, 180, 121)),
    "parallel, more than half a turn": parallel(np.arange(0, 220, 2.0)),
    "parallel, full turn": parallel(FULL),
    "parallel, detector off-centre": parallel(FULL, 20),
}


def ellipsoid(geometry: Geometry) -> Tensor:
    """Exact line integrals (1, 1, rows, views, columns) of the uniform ellipsoid; a disc-like one for a single row."""
    rows, columns = geometry.detector_shape
    r, c = np.arange(rows)[:, None, None, None] - (rows - 1) / 2, np.arange(columns)[:, None] - (columns - 1) / 2
    pixel = geometry.detector_center[:, None] + r * geometry.v[:, None] + c * geometry.u[:, None]
    ray = (
        pixel - geometry.source[:, None]
        if geometry.kind == "cone"
        else np.broadcast_to(geometry.source[:, None], pixel.shape)
    )
    ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    p, q = (pixel - CENTER) / AXES, ray / AXES
    a, b, g = np.sum(q * q, -1), np.sum(p * q, -1), np.sum(p * p, -1) - 1
    return torch.from_numpy(MU * 2 * np.sqrt(np.maximum(b * b - a * g, 0)) / a).float()[None, None]


def inside_and_outside(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.meshgrid(
        *(t + grid.voxel_size * np.arange(n) for t, n in zip(grid.translate, grid.shape, strict=True)), indexing="ij"
    )
    radius = np.sqrt(sum(((q - c) / a) ** 2 for q, c, a in zip((x, y, z), CENTER, AXES, strict=True)))
    return radius < 0.7, (radius > 1.3) & (np.hypot(x, y) < 11)


def grid_for(geometry: Geometry) -> Grid:
    return Grid((1, 48, 48), 0.5) if geometry.is_fan else GRID


@pytest.mark.parametrize("geometry", ORBITS.values(), ids=ORBITS.keys())
def test_a_uniform_object_has_its_attenuation(geometry: Geometry) -> None:
    grid = grid_for(geometry)
    x = FDK()(ellipsoid(geometry), XRayTransform(geometry, grid, device="cpu"))[0, 0].numpy()
    inside, outside = inside_and_outside(grid)
    assert x[inside].mean() == pytest.approx(MU, rel=0.01)
    assert x[inside].std() < 0.02 * MU
    assert abs(x[outside].mean()) < 0.02 * MU


@pytest.mark.parametrize("geometry", ORBITS.values(), ids=ORBITS.keys())
def test_every_ray_counts_once(geometry: Geometry) -> None:
    """Over its orbit a ray at a given side of the axis is met half a turn's worth, with those measured backwards."""
    weights = fdk_weights(geometry)
    assert weights.shape == (geometry.views, geometry.detector_shape[1])
    assert (weights >= 0).all()
    total = weights.sum(axis=0)
    offset = geometry.axis_offset.mean()
    columns = np.arange(len(total))
    mirrored = 2 * ((len(total) - 1) / 2 + offset) - columns  # the column that sees the same rays backwards
    both = (total + np.interp(mirrored, columns, total, left=0, right=0)) / 2
    seen = (mirrored >= 0) & (mirrored <= columns[-1])
    np.testing.assert_allclose(both[seen], np.pi, rtol=0.01)
    np.testing.assert_allclose(total[~seen], total[~seen].mean() if (~seen).any() else 0, rtol=1e-6)


def test_an_arc_below_half_a_turn_is_given_as_it_is() -> None:
    weights = fdk_weights(cone(np.arange(0, 100, 2.0)))
    np.testing.assert_allclose(weights[1:-1], np.deg2rad(2.0))
    assert fdk_weights(parallel(np.arange(0, 100, 2.0))).sum(axis=0).max() < np.deg2rad(100)


@pytest.mark.parametrize("name", ["circle", "wobble", "short", "detector left", "fan", "parallel"])
def test_torch_and_numba_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = ORBITS[name]
    physics, y = XRayTransform(geometry, grid_for(geometry), device="cpu"), ellipsoid(geometry)
    ours = FDK()(y, physics)
    monkeypatch.setattr(fdk_module, "projector_for", TorchProjector)
    monkeypatch.setitem(torch_any.BATCH_BYTES, "cpu", 3_000_000)
    other = FDK()(y, physics)
    # At the field of view's edge the kernels may differ in what lies a rounding error beyond the detector.
    inside, outside = inside_and_outside(physics.grid)
    place = torch.from_numpy(inside | outside)
    assert torch.linalg.vector_norm((ours - other)[0, 0, place]) < 1e-4 * torch.linalg.vector_norm(ours[0, 0, place])


@pytest.mark.parametrize("name", ["circle", "wobble", "detector left", "parallel"])
def test_slabs_and_batches_make_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    physics, y = XRayTransform(ORBITS[name], GRID, device="cpu"), ellipsoid(ORBITS[name])
    at_once = list(FDK().stream(y, physics))
    assert [update.box for update in at_once] == [physics.grid.full_box]
    monkeypatch.setitem(fdk_module.STEP, "cpu", GRID.voxels * 120 // 5)
    monkeypatch.setattr(fdk_module, "BATCH_BYTES", 300_000)
    volume = torch.full_like(at_once[0].values, torch.nan)
    for update in FDK().stream(y, physics):
        volume[(..., *update.box)] = update.values
        assert (update.next_box is None) == (update.step == update.total)
    assert update.total >= 5
    torch.testing.assert_close(volume, at_once[0].values, rtol=1e-4, atol=1e-5 * MU)
    torch.testing.assert_close(FDK()(y, physics), at_once[0].values, rtol=1e-4, atol=1e-5 * MU)


def test_a_region_of_interest_is_a_crop() -> None:
    physics, y = XRayTransform(ORBITS["wobble"], GRID, device="cpu"), ellipsoid(ORBITS["wobble"])
    box = (slice(4, 13), slice(10, 31), slice(7, 20))
    torch.testing.assert_close(
        FDK()(y, physics.restrict(box)), FDK()(y, physics)[(..., *box)], rtol=1e-4, atol=1e-5 * MU
    )


def test_a_normalised_operator_gives_the_same_volume() -> None:
    plain = XRayTransform(ORBITS["circle"], GRID, device="cpu")
    unit = XRayTransform(ORBITS["circle"], GRID, device="cpu", normalize=True)
    y = ellipsoid(ORBITS["circle"])
    torch.testing.assert_close(FDK()(y / unit.operator_norm, unit), FDK()(y, plain), rtol=1e-4, atol=1e-5 * MU)


def test_deepinvs_astra_physics_is_taken() -> None:
    from test_xray import stand_in_for_astra

    ours = XRayTransform(ORBITS["wobble"], GRID, device="cpu")
    astra = stand_in_for_astra(ORBITS["wobble"], GRID, normalize=True, operator_norm=torch.tensor(5.0))
    y = ellipsoid(ORBITS["wobble"])
    torch.testing.assert_close(FDK()(y / 5, astra), FDK()(y, ours), rtol=1e-4, atol=1e-5 * MU)  # type: ignore[arg-type]


def test_batch_and_channels_are_looped_over() -> None:
    geometry = ORBITS["fan"]
    physics, y = XRayTransform(geometry, grid_for(geometry), device="cpu"), ellipsoid(geometry)
    many = FDK()(torch.cat([y, 2 * y]).repeat(1, 3, 1, 1, 1), physics)
    assert many.shape == (2, 3, 1, 48, 48)
    torch.testing.assert_close(many[1, 2], 2 * FDK()(y, physics)[0, 0])


def test_windows_smooth_more_and_more_and_keep_the_mean() -> None:
    geometry = ORBITS["fan"]
    physics = XRayTransform(geometry, grid_for(geometry), device="cpu")
    y = ellipsoid(geometry)
    noisy = y + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    inside, _ = inside_and_outside(physics.grid)
    found = [FDK(w)(noisy, physics)[0, 0].numpy()[inside] for w in ("ram-lak", "shepp-logan", "cosine", "hann")]
    assert all(a.std() > b.std() for a, b in pairwise(found))
    assert all(x.mean() == pytest.approx(MU, rel=0.02) for x in found)


def test_the_ramp_follows_its_frequency() -> None:
    transfer = ramp(4096)
    f = np.arange(2049) / 4096
    np.testing.assert_allclose(transfer, f, atol=1e-4)
    assert transfer[0] > 0  # as the sampled kernel has it, so that the mean is right


def test_filtering_keeps_the_shape_and_is_linear() -> None:
    geometry = ORBITS["detector left"]
    y = ellipsoid(geometry)
    q = filter_projections(y, geometry)
    assert q.shape == y.shape
    torch.testing.assert_close(filter_projections(3 * y, geometry), 3 * q)


def test_bad_input_is_told_in_a_sentence() -> None:
    physics = XRayTransform(ORBITS["circle"], GRID, device="cpu")
    with pytest.raises(ScanError, match=r"projections .* shape"):
        FDK()(torch.zeros(1, 1, 120, 36, 72), physics)
    along_z = Geometry([[0, 0, -60, 0, 0, 40, 1, 0, 0, 0, 1, 0]], (4, 4))
    with pytest.raises(ScanError, match="looks along the rotation axis"):
        fdk_weights(along_z)
    with pytest.raises(ScanError, match="Unknown filter window 'hamster'"):
        FDK("hamster")(ellipsoid(ORBITS["circle"]), physics)  # type: ignore[arg-type]
