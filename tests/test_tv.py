"""Total variation: its proximal operator, and the reconstruction with it."""

import time

import deepinv as dinv
import numpy as np
import pytest
import torch

from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.tv import TV, PreconditionedTV, TVPrior, tv_patch_solver, tv_threshold
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid


def noisy(shape, seed=0):
    """Boxes with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(shape)
    x[..., shape[-2] // 4 : shape[-2] // 2, shape[-1] // 3 :] = 1
    return x + 0.2 * torch.randn(shape, generator=generator)


def objective(x, v, gamma):
    return 0.5 * (x - v).square().flatten(1).sum(1) + gamma * TVPrior().fn(x)


SHAPES = [(1, 1, 8, 10, 7), (2, 2, 5, 6, 7), (1, 2, 12, 11), (1, 1, 1, 12, 11)]


@pytest.mark.parametrize("shape", SHAPES)
def test_total_variation_is_deepinvs(shape):
    x = noisy(shape)
    assert torch.allclose(TVPrior().fn(x), dinv.optim.TVPrior().fn(x), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_prox_agrees_with_deepinv_at_convergence(shape):
    v = noisy(shape)
    ours = TVPrior(1500, 1e-8).prox(v, gamma=0.15)
    theirs = dinv.optim.TVPrior(def_crit=1e-7, n_it_max=600).prox(v, gamma=0.15)
    assert (ours - theirs).norm() < 3e-3 * theirs.norm()
    assert bool((objective(ours, v, 0.15) <= objective(theirs, v, 0.15) * (1 + 1e-5)).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_both_roads_lead_to_the_same(shape, nonnegative):
    v = noisy(shape)
    fused = TVPrior(800, 1e-7, nonnegative).prox(v, gamma=0.15)
    plain = TVPrior(800, 1e-7, nonnegative).prox(v.double(), gamma=0.15)
    assert (fused - plain).norm() < 3e-4 * plain.norm()
    assert not nonnegative or bool((fused >= 0).all())


def test_prox_is_optimal_among_nonnegative_volumes():
    v = noisy((1, 1, 8, 9, 10)) - 0.3
    x = TVPrior(3000, 1e-8, nonnegative=True).prox(v, gamma=0.1)
    best = objective(x, v, 0.1)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-2, 1e-1):
        other = (x + scale * torch.randn(x.shape, generator=generator)).clamp(min=0)
        assert objective(other, v, 0.1) > best


def test_prox_of_a_flat_volume_and_of_a_zero_weight_is_itself():
    flat = torch.full((1, 1, 5, 6, 7), 0.3)
    assert torch.allclose(TVPrior().prox(flat, gamma=2.0), flat)
    v = noisy((1, 1, 5, 6, 7))
    assert torch.equal(TVPrior().prox(v, gamma=0.0), v)
    assert torch.equal(TVPrior(nonnegative=True).prox(v, gamma=0.0), v.clamp(min=0))


def test_strong_prox_gives_the_mean():
    v = noisy((1, 1, 8, 8, 8))
    x = TVPrior(3000, 1e-9).prox(v, gamma=50.0)
    assert torch.allclose(x, v.mean().expand_as(v), atol=1e-3)


def test_each_volume_of_a_batch_has_its_own_weight():
    v = noisy((2, 1, 6, 7, 8))
    gamma = torch.tensor([0.05, 0.3])
    together = TVPrior(500, 1e-8).prox(v, gamma=gamma)
    for k in range(2):
        alone = TVPrior(500, 1e-8).prox(v[k : k + 1], gamma=float(gamma[k]))
        assert torch.allclose(together[k : k + 1], alone, atol=1e-4)


def test_dual_is_kept_between_calls():
    v = noisy((1, 1, 16, 16, 16))
    converged = TVPrior(3000, 1e-9).prox(v, gamma=0.2)
    prior = TVPrior(8, 0.0)
    errors = [float((prior.prox(v, gamma=0.2) - converged).norm()) for _ in range(6)]
    assert errors[-1] < 0.5 * errors[0]
    prior.reset()
    assert float((prior.prox(v, gamma=0.2) - converged).norm()) == pytest.approx(errors[0], rel=1e-3)


def test_gradient_passes_through():
    v = noisy((1, 1, 4, 5, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TVPrior(15, 0.0).prox(x, gamma=0.1), (v,), eps=1e-6, atol=1e-4)


@pytest.mark.slow
def test_much_faster_than_deepinv():
    v = noisy((1, 1, 40, 40, 40))
    ours, theirs = TVPrior(40, 0.0), dinv.optim.TVPrior(def_crit=0.0, n_it_max=40)
    seconds = []
    for prior in (ours, theirs):
        prior.prox(v, gamma=0.1)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            prior.prox(v, gamma=0.1)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    assert seconds[1] > 4 * seconds[0]


def test_bad_weights_are_one_sentence():
    with pytest.raises(ScanError, match="negative"):
        TVPrior().prox(noisy((1, 1, 4, 4)), gamma=-1.0)
    with pytest.raises(ScanError, match="needs"):
        TVPrior().prox(torch.zeros(4, 4), gamma=1.0)
    for wrong in ({"iterations": 0}, {"regularization": -1.0}):
        with pytest.raises(ScanError):
            TV(**wrong)


# -- the reconstruction --------------------------------------------------------------------------------------------

N = 24


@pytest.fixture(scope="module")
def scan():
    geometry = Geometry.cone(np.arange(20) * 18.0, (36, 36), 2.5, 66.0, 199.0)
    physics = XRayTransform(geometry, Grid((N, N, N), 1.0), device="cpu")
    truth = torch.zeros(1, 1, N, N, N)
    truth[..., 6:18, 5:19, 7:16] = 0.05
    truth[..., 9:14, 8:12, 9:14] = 0.08
    generator = torch.Generator().manual_seed(0)
    y = physics.A(truth)
    return physics, y + 0.02 * y.max() * torch.randn(y.shape, generator=generator), truth


def test_tv_streams_and_improves(scan):
    physics, y, truth = scan
    method = TV(iterations=15, regularization=3e-3)
    updates = [(u.step, u.total, dict(u.figures), u.next_box) for u in method.stream(y, physics)]
    assert [u[0] for u in updates] == list(range(16))
    assert updates[-1][3] is None
    assert updates[-1][2]["objective"] < updates[1][2]["objective"] < updates[0][2]["objective"]
    x, x_fdk = method(y, physics), FDK()(y, physics)
    assert (x - truth).norm() < 0.6 * (x_fdk - truth).norm()
    assert bool((x >= 0).all())
    assert updates[-1][2]["residual"] == pytest.approx(float((physics.A(x) - y).norm() / y.norm()), rel=1e-4)


@pytest.mark.parametrize("filtered", [False, True])
def test_the_figures_are_of_every_volume_though_it_is_never_projected(scan, filtered):
    physics, y, _ = scan
    ramp = RampFiltered(physics)
    measured, measure = (ramp.measurement(y), ramp.A) if filtered else (y, physics.A)
    method = PreconditionedTV(14) if filtered else TV(14, regularization=1e-4)
    for update in method.stream(y, physics):
        residual = float((measure(update.values) - measured).norm() / measured.norm())
        assert update.figures["residual"] == pytest.approx(residual, rel=1e-4)


def test_filtered_projections_are_the_same_as_those_that_are_filtered_on_the_way(scan):
    physics, y, _ = scan
    ramp, x_fdk = RampFiltered(physics), FDK()(y, physics)
    found = TV(8, init=x_fdk)(y, ramp, reference=x_fdk)
    expected = TV(8, init=x_fdk)(ramp.measurement(y), ramp, reference=x_fdk)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_more_regularisation_less_variation(scan):
    physics, y, _ = scan
    weak, strong = (TV(10, regularization=r)(y, physics) for r in (1e-4, 1e-2))
    assert TVPrior().fn(strong) < TVPrior().fn(weak)


def test_regularisation_does_not_depend_on_units(scan):
    """Another unit of length or of attenuation must not need another number."""
    physics, y, _ = scan
    x = TV(5)(y, physics)
    assert torch.allclose(TV(5)(100 * y, physics), 100 * x, rtol=1e-3, atol=1e-3 * float(100 * x.max()))
    geometry = Geometry(physics.geometry.vectors * 10, physics.geometry.detector_shape, "cone")
    centimetres = XRayTransform(geometry, Grid((N, N, N), 10.0), device="cpu")
    assert torch.allclose(TV(5)(y, centimetres), x / 10, rtol=1e-3, atol=1e-4 * float(x.max()))


def test_solver_of_patches_reaches_the_same_objective(scan):
    physics, y, _ = scan
    x_fdk = FDK()(y, physics)
    weight = tv_threshold(1e-3, x_fdk) * physics.sqnorm

    def value(x):
        return float(0.5 * (physics.A(x) - y).square().sum() + weight * TVPrior().fn(x).sum())

    found = tv_patch_solver(physics, x_fdk, iterations=40, regularization=1e-3)(y, physics, init=(x_fdk, x_fdk))
    assert value(found) == pytest.approx(value(TV(40)(y, physics)), rel=2e-2)


def test_tv_takes_any_linear_physics():
    physics = dinv.physics.Tomography(angles=30, img_width=24, circle=False, normalize=True)
    truth = torch.zeros(1, 1, 24, 24)
    truth[..., 8:16, 6:18] = 1
    with torch.no_grad():
        y = physics.A(truth)
        updates = [u.figures["residual"] for u in TV(15, init="zeros").stream(y, physics)]
    assert updates[-1] < 0.2 * updates[0]
