"""Preconditioned ADMM: the answer of TV in fewer projections, from any start, and settings that change meanwhile."""

import deepinv as dinv
import numpy as np
import pytest
import torch

from napari_recon.physics.normal import fit_normal_operator
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction import padmm
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.padmm import PADMM, _Split, cosine_by_fourier, cosine_transform
from napari_recon.reconstruction.tv import TV, TVPrior, differences, divergence_adjoint
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid


class Counted(XRayTransform):
    """Tells how often it was used."""

    used = 0

    def A(self, x, **kwargs):
        self.used += 1
        return super().A(x, **kwargs)

    def A_adjoint(self, y, **kwargs):
        self.used += 1
        return super().A_adjoint(y, **kwargs)


def boxes(shape):
    x = torch.zeros(1, 1, *shape)
    x[..., shape[-2] // 4 : -shape[-2] // 4, shape[-1] // 3 : -3] = 0.02
    x[..., shape[-2] // 2 : -shape[-2] // 4, shape[-1] // 2 : -5] = 0.05
    return x


def cone(n=16, views=12, depth=None, kind=Counted):
    grid = Grid((depth or n, n, n), 1.0)
    rows = 1 if depth == 1 else 4 * n
    angles = np.arange(views) * 360 / views
    return kind(Geometry.cone(angles, (rows, 4 * n), 1.5, 60.0, 180.0), grid, device="cpu")


@pytest.fixture(scope="module")
def scan():
    physics = cone()
    truth = boxes((16, 16, 16))
    y = physics.A(truth)
    y += 0.01 * y.max() * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    best = PADMM(150)(y, physics)
    return physics, truth, y, best


def last(method, y, physics, **options):
    *_, update = method.stream(y, physics, **options)
    return update


def distance(x, best):
    return float((x - best).norm() / best.norm())


def test_the_start_does_not_change_the_answer_which_is_that_of_tv(scan):
    physics, truth, y, best = scan
    aim = last(TV(600), y, physics).figures["objective"]
    for start in ("zeros", "fdk", truth, 2 * truth, best):
        found = last(PADMM(40), y, physics, init=start)
        assert found.figures["objective"] < aim * (1 + 1e-4)
        assert distance(found.values, best) < 0.02
    for start in ("zeros", truth):
        assert last(TV(200), y, physics, init=start).figures["objective"] < aim * (1 + 1e-3)


@pytest.mark.parametrize("preconditioner", ["scalar", "diagonal", "circulant", "operator"])
def test_every_preconditioner_leads_to_the_same(scan, preconditioner):
    physics, _, y, best = scan
    operator = fit_normal_operator(physics, probes=2, iterations=1, positions=2, seed=0)
    inner = 6 if preconditioner in ("scalar", "diagonal") else None  # a single step is right too, but slow
    found = last(PADMM(120, preconditioner=preconditioner, inner=inner), y, physics, operator=operator)
    assert distance(found.values, best) < 0.01
    assert found.figures["primal"] < 0.01


def test_it_needs_fewer_projections_than_tv_and_than_the_linearised_admm(scan):
    physics, _, y, best = scan

    def steps(method):
        far = [u.step for u in method.stream(y, physics, init="zeros") if distance(u.values, best) > 0.02]
        return max(far) + 1

    ours = steps(PADMM(40))
    assert ours < 0.5 * steps(TV(200))
    assert ours < 0.2 * steps(PADMM(200, preconditioner="scalar"))


def test_from_the_answer_it_stays_there_and_a_nearer_start_takes_less(scan):
    physics, truth, y, best = scan
    for update in PADMM(5).stream(y, physics, init=best):
        assert distance(update.values, best) < 0.02
    near = best + 0.05 * (truth - best)
    after = [distance(last(PADMM(3), y, physics, init=start).values, best) for start in (near, "fdk", "zeros")]
    assert after == sorted(after)


def test_figures_are_what_they_say(scan):
    physics, _, y, _ = scan
    physics.used = 0
    method = PADMM(4, 2e-3)
    for update in method.stream(y, physics):
        used = physics.used
        x = update.values
        residual = physics.A(x) - y
        weight = 2e-3 * physics.sqnorm * float(np.quantile(FDK()(y, physics).abs(), 0.999))
        objective = 0.5 * float(residual.square().sum()) + weight * float(TVPrior().fn(x))
        assert update.figures["residual"] == pytest.approx(float(residual.norm() / y.norm()), rel=1e-4)
        assert update.figures["objective"] == pytest.approx(objective, rel=1e-3)
        # FDK back projects by a kernel of its own: the half pair that is not seen here.
        assert update.figures["pairs"] == (used + 1) / 2
        physics.used = used
        assert bool((x >= 0).all())


def test_it_ends_where_its_residuals_are_small(scan):
    physics, _, y, best = scan
    found = last(PADMM(200, tolerance=3e-3), y, physics)
    assert found.step < 200
    assert found.next_box is None
    assert distance(found.values, best) < 0.03
    steps = [u.step for u in PADMM(6).stream(y, physics)]
    assert steps == list(range(7))


def test_adaptive_penalties_repair_a_bad_one(scan):
    physics, _, y, best = scan
    fixed = distance(last(PADMM(30, rho=30.0), y, physics).values, best)
    assert distance(last(PADMM(30, rho=30.0, adaptive=True), y, physics).values, best) < 0.5 * fixed


class Told:
    """Says something at one step, and nothing before and after."""

    def __init__(self, at, **settings):
        self.at, self.settings, self.asked = at, settings, 0

    def __call__(self):
        self.asked += 1
        return self.settings if self.asked == self.at else {}


@pytest.mark.parametrize(
    "change",
    [{"rho": 0.02}, {"rho": 0.5}, {"preconditioner": "diagonal"}, {"preconditioner": "scalar"}],
    ids=lambda change: str(*change.values()),
)
def test_changes_meanwhile_keep_the_volume(scan, change):
    physics, _, y, best = scan
    volumes = [u.values.clone() for u in PADMM(18, init="zeros").stream(y, physics, settings=Told(16, **change))]
    far = [distance(v, best) for v in volumes]
    assert far[15] < 0.02
    assert max(far[16:]) < 0.03


def test_another_weight_leads_to_its_own_answer(scan):
    physics, _, y, _ = scan
    aim = last(PADMM(80, 1e-2), y, physics)
    found = last(PADMM(120, 1e-3), y, physics, settings=Told(20, regularization=1e-2))
    assert found.figures["objective"] == pytest.approx(aim.figures["objective"], rel=1e-4)
    assert distance(found.values, aim.values) < 0.01


def test_iterations_and_the_start_can_change(scan):
    physics, _, y, best = scan
    updates = list(PADMM(10).stream(y, physics, settings=Told(3, iterations=4)))
    assert [u.total for u in updates] == [10, 10, 10, 4, 4]
    assert last(PADMM(3), y, physics, settings=Told(4, iterations=6)).step == 6
    # The same start said again is no new one.
    always = {"init": best}
    steps = list(PADMM(6, init="zeros").stream(y, physics, settings=lambda: always))
    assert distance(steps[-1].values, best) < 0.02


def test_weights_leave_bad_measurements_out_and_only_their_ratios_count(scan):
    physics, truth, y, _ = scan
    broken, weights = y.clone(), torch.ones_like(y)
    broken[:, :, :, 3] += 1
    weights[:, :, :, 3] = 0
    plain = distance(PADMM(40)(broken, physics), truth)
    weighted = PADMM(40, weights=weights)(broken, physics, init="zeros")
    assert distance(weighted, truth) < 0.5 * plain
    again = PADMM(40, weights=1000 * weights)(broken, physics, init="zeros")
    assert distance(again, weighted) < 1e-3


def test_a_fan_beam_slice():
    physics = cone(24, 18, depth=1)
    truth = boxes((1, 24, 24))
    y = physics.A(truth)
    aim = last(TV(500), y, physics).figures["objective"]
    assert last(PADMM(40), y, physics).figures["objective"] < aim * (1 + 1e-3)


@pytest.mark.parametrize("shape", [(24, 20), (8, 12, 10)])
def test_complex_volumes_of_mri(shape):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 1, *shape, generator=generator) < 0.5).float()
    mask[..., shape[-1] // 2 - 3 : shape[-1] // 2 + 3] = 1
    physics = dinv.physics.MRI(mask=mask, img_size=(2, *shape), three_d=len(shape) == 3)
    truth = torch.cat([boxes(shape), -0.5 * boxes(shape)], 1)
    y = physics.A(truth) + 1e-3 * torch.randn(physics.A(truth).shape, generator=generator)
    zero_filled = physics.A_adjoint(y)
    updates = list(PADMM(40, 1e-2).stream(y, physics))
    objectives = [u.figures["objective"] for u in updates]
    found = updates[-1].values
    assert found.shape == truth.shape
    assert distance(found, truth) < 0.5 * distance(zero_filled, truth)
    assert bool((found[:, 1] < 0).any())
    assert objectives[-1] == pytest.approx(min(objectives), rel=1e-3)
    other = last(PADMM(60, 1e-2, init="zeros"), y, physics)
    assert other.figures["objective"] == pytest.approx(objectives[-1], rel=1e-3)


def test_blur_in_two_dimensions_and_a_real_volume_below_zero():
    blur = dinv.physics.Blur(filter=dinv.physics.blur.gaussian_blur(sigma=1.0), padding="circular", device="cpu")
    truth = boxes((24, 20)) - 0.02
    y = blur.A(truth)
    found = PADMM(40, 1e-4, nonnegative=False)(y, blur, init="zeros")
    assert distance(found, truth) < 0.6 * distance(blur.A_adjoint(y), truth)
    assert float(found.min()) < -0.01


@pytest.mark.parametrize("shape", [(1, 1, 5, 6, 7), (2, 2, 4, 5, 6), (1, 1, 1, 9, 8), (1, 2, 9, 8)])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_both_roads_lead_to_the_same(shape, nonnegative):
    generator = torch.Generator().manual_seed(1)
    x, w, v = (torch.randn(shape, generator=generator) for _ in range(3))
    fused, plain = (_Split(t, 0.3, 2.0, nonnegative) for t in (x, x.double()))
    for split, dtype in ((fused, torch.float32), (plain, torch.float64)):
        for step in (w, v, w):
            split.update(step.to(dtype))
    pulled = [split.pull(u, torch.empty_like(u)).float() for split, u in ((fused, v), (plain, v.double()))]
    assert torch.allclose(*pulled, atol=1e-5)
    assert fused.residuals(w) == pytest.approx(plain.residuals(w.double()), rel=1e-4)
    assert torch.allclose(TVPrior().fn(x).double(), TVPrior().fn(x.double()), rtol=1e-5)
    for split in (fused, plain):
        split.rescale(0.5, 1.0, x, nonnegative)
    assert torch.allclose(fused.q, plain.q.float(), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 7, 6, 5), (1, 2, 9, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_slabs_of_any_thickness_are_the_whole(shape, dtype, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    found = []
    for slab, scratch in ((10**9, None), (1, None), (100, tmp_path)):
        monkeypatch.setattr(padmm, "SLAB", slab)
        split = _Split(x, 0.3, 2.0, dtype.is_floating_point, scratch)
        split.save()
        split.update(w)
        split.restore()
        split.update(w)
        split.rescale(0.5, 1.0, x, dtype.is_floating_point)
        split.update(x)
        found.append((split.q, split.t, split.pull(w, torch.empty_like(w)), split.residuals(w)))
    for q, t, pulled, residuals in found[1:]:
        assert torch.allclose(q, found[0][0], atol=1e-5)
        assert torch.allclose(t, found[0][1], atol=1e-5)
        assert torch.allclose(pulled, found[0][2], atol=1e-5)
        assert residuals == pytest.approx(found[0][3], rel=1e-5)


@pytest.mark.parametrize("preconditioner", ["circulant", "diagonal"])
def test_in_slabs_and_files_the_answer_is_the_same_and_nothing_is_left(scan, preconditioner, tmp_path, monkeypatch):
    physics, _, y, _ = scan
    method = PADMM(6, preconditioner=preconditioner, inner=4)
    settings = [Told(4, regularization=5e-3) for _ in range(3)]
    kept = last(method, y, physics, settings=settings[0])
    filed = PADMM(6, preconditioner=preconditioner, inner=4, scratch=tmp_path)
    updates = []
    for update in filed.stream(y, physics, settings=settings[1]):
        assert not list(tmp_path.iterdir())  # a process that is killed leaves nothing
        updates.append(update)
    assert torch.equal(updates[-1].values, kept.values)
    assert updates[-1].figures == kept.figures
    monkeypatch.setattr(padmm, "SLAB", 3 * 16**2)
    assert distance(last(filed, y, physics, settings=settings[2]).values, kept.values) < 1e-5


def test_a_disk_without_room_is_told_in_a_sentence(scan, tmp_path, monkeypatch):
    physics, _, y, _ = scan

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(padmm.np, "memmap", full)
    with pytest.raises(ScanError, match="No space left"):
        PADMM(1, scratch=tmp_path)(y, physics)


def test_the_cosine_transform_diagonalises_the_differences():
    x = torch.randn(1, 1, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    s = cosine_transform(x)
    assert torch.allclose(cosine_transform(s, inverse=True), x, atol=1e-5)
    assert torch.allclose(cosine_by_fourier(x), s, atol=1e-5)
    assert torch.allclose(cosine_by_fourier(s, inverse=True), x, atol=1e-5)
    eigenvalues = sum(
        (2 - 2 * torch.cos(torch.pi * torch.arange(n) / n)).reshape(-1, *[1] * (2 - axis))
        for axis, n in enumerate((5, 6, 7))
    )
    smoothed = divergence_adjoint(differences(x))
    assert torch.allclose(cosine_transform(smoothed), eigenvalues * s, atol=1e-4)


def test_bad_input_is_told_in_a_sentence(scan):
    physics, _, y, _ = scan
    for wrong, says in (
        ({"iterations": 0}, "iteration"),
        ({"regularization": -1.0}, "regularisation"),
        ({"rho": 0.0}, "rho"),
        ({"preconditioner": "jacobi"}, "jacobi"),
        ({"inner": 0}, "inner"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"scratch": "/no/such/folder"}, "folder"),
    ):
        with pytest.raises(ScanError, match=says):
            PADMM(**wrong)
    for weights, says in ((torch.ones(3), "shape"), (-torch.ones_like(y), "negative"), (0 * y, "all 0")):
        with pytest.raises(ScanError, match=says):
            PADMM(weights=weights)(y, physics)
    with pytest.raises(ScanError, match="normal operator"):
        PADMM(preconditioner="operator")(y, physics)
    with pytest.raises(ScanError, match="rho"):
        PADMM(3)(y, physics, settings=lambda: {"rho": -1})
