"""XRayTransform: the integrals are right, the adjoint is the transpose, parts equal the whole."""

from __future__ import annotations

import copy
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import deepinv as dinv
import numpy as np
import pytest
import torch
from torch import Tensor

from napari_recon.physics.projectors import NumbaProjector, Rays, TorchProjector, numba_cpu, torch_any
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform, as_xray_transform
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

ANGLES = np.arange(0, 360, 20.0)
DETECTOR = (14, 18)


def circle() -> Geometry:
    return Geometry.cone(ANGLES, DETECTOR, 0.8, 60, 100, axis_offset=1.3)


def wobble() -> Geometry:
    g = circle()
    return Geometry(g.vectors + np.random.default_rng(0).normal(scale=0.02, size=g.vectors.shape), DETECTOR)


def rows_down() -> Geometry:
    vectors = circle().vectors.copy()
    vectors[:, 9:] *= -1
    return Geometry(vectors, DETECTOR)


def helix() -> Geometry:
    vectors = Geometry.cone(2 * ANGLES, DETECTOR, 0.8, 60, 100).vectors.copy()
    vectors[:, [2, 5]] += np.linspace(-1, 1, len(vectors))[:, None]
    return Geometry(vectors, DETECTOR)


def parallel() -> Geometry:
    return Geometry.parallel(ANGLES / 2, DETECTOR, 0.6)


def parallel_oblique() -> Geometry:
    vectors = parallel().vectors.copy()
    vectors[:, 2] += 0.3
    return Geometry(vectors, DETECTOR, "parallel")


def laminography() -> Geometry:
    s, c = np.sin(np.deg2rad(ANGLES)), np.cos(np.deg2rad(ANGLES))
    zero = np.zeros_like(s)
    ray, center = np.stack([0.5 * c, 0.5 * s, zero + 0.86], 1), np.zeros((len(s), 3))
    u, v = np.stack([-s, c, zero], 1), np.stack([-0.86 * c, -0.86 * s, zero + 0.5], 1)
    return Geometry(np.hstack([ray, center, 0.6 * u, 0.6 * v]), DETECTOR, "parallel")


def fan() -> Geometry:
    return Geometry.cone(ANGLES, (1, 18), 0.8, 60, 100)


GEOMETRIES = [circle, wobble, rows_down, helix, parallel, parallel_oblique, laminography, fan]


def grid_for(geometry: Geometry) -> Grid:
    return Grid((1, 13, 12), 0.55, (0.3, -0.2, 0)) if geometry.is_fan else Grid((9, 13, 12), 0.55, (0.3, -0.2, 0.1))


@pytest.fixture(params=GEOMETRIES, ids=lambda make: make.__name__)
def physics(request: pytest.FixtureRequest) -> XRayTransform:
    geometry = request.param()
    return XRayTransform(geometry, grid_for(geometry), device="cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


# -- the operator -----------------------------------------------------------------------------------------------------


def test_adjoint_is_the_transpose(physics: XRayTransform) -> None:
    x, y = noise(1, *physics.img_size), noise(1, 1, *physics.measurement_shape, seed=1)
    ax, aty = physics.A(x), physics.A_adjoint(y)
    assert (ax.shape, aty.shape, ax.dtype) == (y.shape, x.shape, torch.float32)
    left, right = (ax.double() * y).sum(), (x * aty.double()).sum()
    assert abs(left - right) < 1e-6 * torch.linalg.vector_norm(ax) * torch.linalg.vector_norm(y)


def test_deepinv_finds_it_adjoint() -> None:
    physics = XRayTransform(wobble(), grid_for(wobble()), device="cpu")
    assert float(physics.adjointness_test(num_samples=4)) < 1e-5


@pytest.mark.parametrize("make", [circle, wobble, parallel, parallel_oblique, laminography], ids=lambda m: m.__name__)
def test_integrals_of_smooth_blobs_are_exact(make) -> None:  # type: ignore[no-untyped-def]
    geometry = make()
    fine = Geometry(geometry.vectors * ([1] * 6 + [0.25] * 6), (56, 72), geometry.kind)  # 4 x 4 finer pixels
    grid = Grid((128, 128, 128), 0.1)
    axes = [t + grid.voxel_size * np.arange(n) for t, n in zip(grid.translate, grid.shape, strict=True)]
    volume, exact = np.zeros(grid.shape), np.zeros((fine.views, 56, 72))
    r, c = np.arange(56)[:, None, None] - 27.5, np.arange(72)[:, None] - 35.5
    for value, center, width in [(1.0, (0.4, -0.5, 0.3), 1.5), (-0.6, (-1, 1, -0.8), 1.2)]:
        z, y, x = (np.exp(-((a - q) ** 2) / (2 * width**2)) for a, q in zip(axes, center[::-1], strict=True))
        volume += value * z[:, None, None] * y[:, None] * x
        for n in range(fine.views):
            pixel = fine.detector_center[n] + r * fine.v[n] + c * fine.u[n]
            ray = pixel - fine.source[n] if fine.kind == "cone" else np.broadcast_to(fine.source[n], pixel.shape)
            ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
            to = np.array(center) - pixel
            square = np.sum(to**2, axis=-1) - np.sum(ray * to, axis=-1) ** 2
            exact[n] += value * np.sqrt(2 * np.pi) * width * np.exp(-square / (2 * width**2))
    physics = XRayTransform(fine, grid, device="cpu")
    ours = physics.A(torch.from_numpy(volume)[None, None])[0, 0].transpose(0, 1)
    assert relative(ours, torch.from_numpy(exact)) < 1e-3


def test_rays_straight_through_a_box_measure_it() -> None:
    physics = XRayTransform(Geometry.parallel([0, 90], (6, 8), 0.5), Grid((6, 8, 8), 0.5), device="cpu")
    y = physics.A(torch.full((1, 1, 6, 8, 8), 0.03))
    torch.testing.assert_close(y, torch.full_like(y, 0.03 * 8 * 0.5))


def test_batch_and_channels_are_looped_over() -> None:
    physics = XRayTransform(circle(), grid_for(circle()), device="cpu")
    x = noise(2, 3, *physics.grid.shape)
    y = physics.A(x)
    assert y.shape == (2, 3, *physics.measurement_shape)
    torch.testing.assert_close(y[1, 2], physics.A(x[1:, 2:])[0, 0])
    torch.testing.assert_close(physics.A_adjoint(y)[0, 1], physics.A_adjoint(y[:1, 1:2])[0, 0])


def test_other_layouts_and_types_give_the_same() -> None:
    physics = XRayTransform(circle(), grid_for(circle()), device="cpu")
    x = noise(1, 1, *physics.grid.shape)
    turned = x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not turned.is_contiguous()
    torch.testing.assert_close(physics.A(turned), physics.A(x))
    torch.testing.assert_close(physics.A(x.double()), physics.A(x))


def test_gradients_flow_through_both_directions(physics: XRayTransform) -> None:
    x = noise(1, *physics.img_size).requires_grad_()
    y = noise(1, 1, *physics.measurement_shape, seed=1).requires_grad_()
    loss = 0.5 * (physics.A(x) - y).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, physics.A_adjoint(physics.A(x) - y))
    (twice,) = torch.autograd.grad((grad * x.detach()).sum(), x)
    torch.testing.assert_close(twice, physics.A_adjoint_A(x), rtol=1e-4, atol=1e-3)
    (back,) = torch.autograd.grad((physics.A_adjoint(y) * x.detach()).sum(), y)
    torch.testing.assert_close(back, physics.A(x), rtol=1e-4, atol=1e-4)


# -- a batch of views at a time ----------------------------------------------------------------------------------------


def of_half_norm(physics: XRayTransform) -> XRayTransform:
    return XRayTransform(physics.geometry, physics.grid, device="cpu", normalize=2.0)


def test_the_gradient_by_batches_is_that_of_the_whole(physics: XRayTransform, tmp_path: Path) -> None:
    x, y = noise(2, *physics.img_size), noise(2, 1, *physics.measurement_shape, seed=1)
    mapped = np.memmap(tmp_path / "y", np.float32, "w+", shape=tuple(y.shape))
    mapped[:] = y.numpy()
    for each in (physics, of_half_norm(physics)):
        residual = each.A(x) - y
        for size in (1, 5 * 4 * residual[0, 0, :, 0].numel(), 1 << 30):
            each.batch_bytes = size  # a view, five of a kernel, all
            gradient, square = each.gradient(x, torch.from_numpy(mapped))
            assert relative(gradient, each.A_adjoint(residual)) < 3e-6
            assert square == pytest.approx(float(residual.double().square().sum()), rel=1e-5)
            assert each.squared_residual(x, y) == pytest.approx(square, rel=1e-6)
            assert each.squared_residual(None, y) == pytest.approx(float(y.double().square().sum()), rel=1e-5)


def test_the_ramp_filtered_gradient_by_batches_is_that_of_the_whole(physics: XRayTransform) -> None:
    ramp = RampFiltered(of_half_norm(physics))
    x, y = noise(1, *physics.img_size), noise(1, 1, *physics.measurement_shape, seed=1)
    residual = ramp.A(x) - ramp.measurement(y)
    for size in (1, 1 << 30):
        ramp.physics.batch_bytes = size
        gradient, square = ramp.gradient(x, y)
        assert relative(gradient, ramp.A_adjoint(residual)) < 1e-5
        assert square == pytest.approx(float(residual.double().square().sum()), rel=1e-4)
        assert relative(ramp.A_adjoint_A(x), ramp.A_adjoint(ramp.A(x))) < 1e-5
    inside = x.requires_grad_()
    ramp.A_adjoint_A(inside).mul(gradient).sum().backward()
    assert relative(inside.grad, ramp.A_adjoint_A(gradient)) < 1e-5


def test_the_adjoint_adds_to_what_is_there(physics: XRayTransform) -> None:
    y, there = noise(*physics.measurement_shape), noise(*physics.grid.shape, seed=1)
    for projector in (NumbaProjector(physics.rays), TorchProjector(physics.rays, torch.device("cpu"))):
        expected = there + projector.adjoint(y)
        out = there.clone()
        assert projector.adjoint(y, out=out) is out
        assert relative(out, expected) < 2e-6


def test_a_gradient_needs_the_memory_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.cone(np.arange(0, 360, 3.0), (96, 96), 0.4, 60, 100)
    ramp = RampFiltered(XRayTransform(geometry, Grid((24, 24, 24), 0.8), device="cpu"))
    x, y = torch.ones(1, *ramp.img_size), torch.ones(1, 1, *ramp.physics.measurement_shape)
    ramp.physics.batch_bytes = y.nbytes // 12
    largest = 0
    forward = NumbaProjector.forward

    def watched(self: NumbaProjector, volume: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        out = forward(self, volume)
        largest = max(largest, out.nbytes)
        return out

    monkeypatch.setattr(NumbaProjector, "forward", watched)
    ramp.gradient(x, y)
    ramp.A_adjoint_A(x)
    assert largest <= y.nbytes // 12


def test_memory_that_runs_out_at_a_single_view_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    physics = XRayTransform(circle(), grid_for(circle()), device="cpu")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NumbaProjector, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        physics.gradient(noise(1, *physics.img_size), noise(1, 1, *physics.measurement_shape))


# -- its parts --------------------------------------------------------------------------------------------------------


def test_a_patch_equals_the_crop_of_the_whole(physics: XRayTransform) -> None:
    depth = physics.grid.shape[0]
    box = (slice(0, 1) if depth == 1 else slice(2, 7), slice(3, 9), slice(5, 12))
    patch = noise(1, 1, box[0].stop - box[0].start, 6, 7)
    amid = torch.zeros(1, *physics.img_size)
    amid[(..., *box)] = patch
    y = noise(1, 1, *physics.measurement_shape, seed=1)
    part = physics.restrict(box)
    assert relative(part.A(patch), physics.A(amid)) < 2e-6
    assert relative(part.A_adjoint(y), physics.A_adjoint(y)[(..., *box)]) < 2e-6
    assert relative(part.A_adjoint_A(patch), physics.A_adjoint_A(amid)[(..., *box)]) < 2e-6


def test_the_normal_operator_is_both_in_one(physics: XRayTransform) -> None:
    x = noise(1, *physics.img_size)
    assert relative(physics.A_adjoint_A(x), physics.A_adjoint(physics.A(x))) < 2e-6


def test_a_patch_needs_the_memory_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.cone(np.arange(0, 360, 6.0), (96, 96), 0.4, 60, 100)
    physics = XRayTransform(geometry, Grid((64, 64, 64), 0.3), device="cpu")
    part = physics.restrict((slice(8, 16), slice(30, 38), slice(40, 48)))
    x = torch.ones(1, *part.img_size)
    part.A_adjoint_A(x)  # compiled before it is measured
    tracemalloc.start()
    part.A_adjoint_A(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * np.prod(physics.measurement_shape) / 15


def test_views_can_be_taken_in_small_batches(physics: XRayTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noise(*physics.grid.shape), noise(*physics.measurement_shape, seed=1)
    projector = NumbaProjector(physics.rays)
    whole = projector.forward(x), projector.adjoint(y), projector.normal(x)
    monkeypatch.setattr(numba_cpu, "BATCH_BYTES", 1)
    for a, b in zip((projector.forward(x), projector.adjoint(y), projector.normal(x)), whole, strict=True):
        assert relative(a, b) < 2e-6


def test_a_subset_of_views_is_part_of_the_measurement(physics: XRayTransform) -> None:
    x = noise(1, *physics.img_size)
    torch.testing.assert_close(physics.subset([1, 5, 6]).A(x), physics.A(x)[..., [1, 5, 6], :])


# -- the other kernels ------------------------------------------------------------------------------------------------


def test_torch_and_numba_agree(physics: XRayTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_any.BATCH_BYTES, "cpu", 20_000)  # several batches of views and of slices
    x, y = noise(*physics.grid.shape), noise(*physics.measurement_shape, seed=1)
    ours, other = NumbaProjector(physics.rays), TorchProjector(physics.rays, torch.device("cpu"))
    assert relative(other.forward(x), ours.forward(x)) < 1e-5
    assert relative(other.adjoint(y), ours.adjoint(y)) < 1e-5
    assert relative(other.normal(x), ours.normal(x)) < 1e-5
    left, right = (other.forward(x).double() * y).sum(), (x * other.adjoint(y).double()).sum()
    assert abs(left - right) < 1e-6 * torch.linalg.vector_norm(other.forward(x)) * torch.linalg.vector_norm(y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree(physics: XRayTransform) -> None:
    x, y = noise(1, *physics.img_size), noise(1, 1, *physics.measurement_shape, seed=1)
    assert relative(physics.A(x.cuda()).cpu(), physics.A(x)) < 1e-4
    assert relative(physics.A_adjoint(y.cuda()).cpu(), physics.A_adjoint(y)) < 1e-4


def test_threads_may_project_at_once() -> None:
    physics = XRayTransform(circle(), grid_for(circle()), device="cpu")
    x = noise(1, *physics.img_size)
    expected, results = physics.A(x), []
    threads = [threading.Thread(target=lambda: results.append(physics.A(x))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(expected, r) for r in results)


# -- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [circle, parallel, laminography, fan], ids=lambda m: m.__name__)
def test_sqnorm_is_a_hair_above_the_largest_eigenvalue(make) -> None:  # type: ignore[no-untyped-def]
    geometry = make()
    grid = Grid((1 if geometry.is_fan else 5, 8, 7), 0.8)
    physics = XRayTransform(geometry, grid, device="cpu")
    columns = physics.A_adjoint_A(torch.eye(grid.voxels).view(-1, 1, *grid.shape))
    largest = float(torch.linalg.eigvalsh(columns.reshape(grid.voxels, -1).double())[-1])
    assert largest < physics.sqnorm < 1.03 * largest


def test_sqnorm_from_coarse_grids_is_safe() -> None:
    physics = XRayTransform(
        Geometry.cone(np.arange(0, 360, 8.0), (40, 72), 0.8, 60, 100), Grid((40, 68, 72), 0.5), "cpu"
    )
    x = torch.ones(1, *physics.img_size)
    for _ in range(30):
        x = physics.A_adjoint_A(x / torch.linalg.vector_norm(x))
    largest = float(torch.linalg.vector_norm(x))
    assert largest < physics.sqnorm < 1.03 * largest


def test_normalised_has_unit_norm() -> None:
    plain = XRayTransform(circle(), grid_for(circle()), device="cpu")
    unit = XRayTransform(circle(), grid_for(circle()), device="cpu", normalize=True)
    x = noise(1, *plain.img_size)
    torch.testing.assert_close(unit.A(x) * unit.operator_norm, plain.A(x))
    torch.testing.assert_close(unit.A_adjoint_A(x) * unit.operator_norm**2, plain.A_adjoint_A(x))
    assert float(unit.compute_sqnorm(x, tol=1e-6, max_iter=500, verbose=False)) == pytest.approx(1, abs=0.03)
    assert unit.sqnorm == pytest.approx(1, abs=0.03)
    part = unit.restrict((slice(0, 4),) * 3)
    assert float(part.operator_norm) == float(unit.operator_norm)


# -- as a deepinv physics ---------------------------------------------------------------------------------------------


def test_deepinv_inverts_it() -> None:
    physics = XRayTransform(Geometry.parallel(np.arange(0, 180, 6.0), (4, 14), 0.5), Grid((4, 8, 8), 0.5), device="cpu")
    x = torch.rand(1, *physics.img_size)
    y = physics.A(x)
    assert relative(physics.A(physics.A_dagger(y, max_iter=60, tol=1e-6)), y) < 1e-2
    fidelity = dinv.optim.L2()
    torch.testing.assert_close(fidelity.grad(x, 2 * y, physics), -physics.A_adjoint(y), rtol=1e-4, atol=1e-4)


def test_it_can_be_copied_and_moved() -> None:
    physics = copy.deepcopy(XRayTransform(circle(), grid_for(circle()), device="cpu")).to("cpu")
    assert physics.A(torch.ones(1, *physics.img_size)).shape[2:] == physics.measurement_shape


def test_from_scan_takes_geometry_and_grid_from_it() -> None:
    geometry = circle()
    scan = SimpleNamespace(geometry=geometry, default_grid=geometry.default_grid)
    physics = XRayTransform.from_scan(scan, shape=(6, 10, 10), device="cpu")  # type: ignore[arg-type]
    assert physics.geometry is geometry
    assert physics.grid == geometry.default_grid((6, 10, 10))
    text = repr(physics)
    assert "18 views" in text
    assert "6 x 10 x 10" in text


def stand_in_for_astra(geometry: Geometry, grid: Grid, **changes: object) -> SimpleNamespace:
    """What :func:`as_xray_transform` reads of deepinv's TomographyWithAstra, which needs ASTRA and CUDA."""
    rows, columns = geometry.detector_shape
    low = np.array(grid.center) - np.array(grid.extent[::-1]) / 2
    high = np.array(grid.center) + np.array(grid.extent[::-1]) / 2
    option = {f"Window{m}{q}": float(e[i]) for m, e in (("Min", low), ("Max", high)) for i, q in enumerate("XYZ")}
    volume = {
        "GridSliceCount": grid.shape[0],
        "GridRowCount": grid.shape[1],
        "GridColCount": grid.shape[2],
        "option": option,
    }
    projection = {
        "type": "cone_vec" if geometry.kind == "cone" else "parallel3d_vec",
        "DetectorRowCount": rows,
        "DetectorColCount": columns,
        "Vectors": geometry.vectors,
    }
    return SimpleNamespace(**{"object_geometry": volume, "projection_geometry": projection, "is_2d": False} | changes)


@pytest.mark.parametrize("make", [wobble, parallel_oblique], ids=lambda m: m.__name__)
def test_deepinvs_astra_physics_becomes_ours(make) -> None:  # type: ignore[no-untyped-def]
    geometry, grid = make(), Grid((5, 6, 7), 0.5, (1, -2, 0.5))
    ours = as_xray_transform(stand_in_for_astra(geometry, grid, normalize=True, operator_norm=torch.tensor(3.0)))  # type: ignore
    assert ours.geometry == geometry
    assert ours.grid.shape == grid.shape
    np.testing.assert_allclose(ours.grid.center, grid.center)
    x = noise(1, *ours.img_size)
    torch.testing.assert_close(3 * ours.A(x), XRayTransform(geometry, grid, "cpu").A(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cone", "parallel3d"])
def test_astras_angles_are_ours(kind: str) -> None:
    angles = np.deg2rad([0, 30, 100.0])
    projection = {
        "type": kind,
        "DetectorRowCount": 14,
        "DetectorColCount": 18,
        "DetectorSpacingX": 0.8,
        "DetectorSpacingY": 0.7,
        "ProjectionAngles": angles,
        "DistanceOriginSource": 60.0,
        "DistanceOriginDetector": 40.0,
    }
    physics = stand_in_for_astra(circle(), grid_for(circle()), projection_geometry=projection)
    got = as_xray_transform(physics).geometry  # type: ignore[arg-type]
    # as astra.geom_2vec
    for n, a in enumerate(angles):
        ray = np.array([np.sin(a), -np.cos(a), 0])
        np.testing.assert_allclose(got.u[n], 0.8 * np.array([np.cos(a), np.sin(a), 0]), atol=1e-12)
        np.testing.assert_allclose(got.v[n], [0, 0, 0.7], atol=1e-12)
        if kind == "cone":
            np.testing.assert_allclose(got.source[n], 60 * ray, atol=1e-12)
            np.testing.assert_allclose(got.detector_center[n], -40 * ray, atol=1e-12)
        else:
            np.testing.assert_allclose(np.cross(got.source[n], ray), 0, atol=1e-12)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_in_a_sentence() -> None:
    physics = XRayTransform(circle(), grid_for(circle()), device="cpu")
    with pytest.raises(ScanError, match=r"volumes .* shape \(9, 13, 12\)"):
        physics.A(torch.zeros(9, 13, 12))
    with pytest.raises(ScanError, match=r"projections .* shape"):
        physics.A_adjoint(torch.zeros(1, 1, 18, 14, 18))
    with pytest.raises(ScanError, match="source of view 0 is not outside the volume"):
        XRayTransform(circle(), Grid((9, 400, 400), 0.55), device="cpu")
    with pytest.raises(ScanError, match="too wide"):
        XRayTransform(Geometry.cone([0, 45], (4, 900), 0.8, 60, 100), Grid((4, 4, 4), 0.5), device="cpu")
    with pytest.raises(ScanError, match="Unknown device"):
        XRayTransform(circle(), grid_for(circle()), device="quantum")
    with pytest.raises(ScanError, match="not an X-ray transform"):
        as_xray_transform(dinv.physics.Denoising())
    with pytest.raises(ScanError, match="two-dimensional"):
        as_xray_transform(stand_in_for_astra(circle(), grid_for(circle()), is_2d=True))  # type: ignore[arg-type]
    flat = stand_in_for_astra(circle(), grid_for(circle()))
    flat.object_geometry["option"]["WindowMaxZ"] *= 2
    with pytest.raises(ScanError, match="must be cubes"):
        as_xray_transform(flat)  # type: ignore[arg-type]


def test_rays_that_miss_give_nothing() -> None:
    physics = XRayTransform(circle(), Grid((4, 4, 4), 0.5, (0, 0, 30.0)), device="cpu")
    assert not physics.A(torch.ones(1, *physics.img_size)).any()
    assert not physics.A_adjoint(torch.ones(1, 1, *physics.measurement_shape)).any()
    assert (Rays(physics.geometry, physics.grid).window == 0).all()
    with pytest.raises(ScanError, match="No ray"):
        XRayTransform(physics.geometry, physics.grid, device="cpu", normalize=True)
