"""Zero-filled, CG-SENSE and total variation of multi-coil MRI; unrolled networks on it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from napari_recon.learning.networks import make_network
from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.sense import CGSense, ZeroFilled
from napari_recon.reconstruction.start import brightness, start_volume
from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import to_kspace
from napari_recon.scans.sampling import sampling_mask


def channels(volume):
    return torch.view_as_real(torch.from_numpy(volume)).movedim(-1, 0)[None].contiguous()


def magnitude(x):
    return torch.linalg.vector_norm(x, dim=1)


@pytest.fixture(scope="module")
def simulated():
    return simulate_mri("head", 5, 24, 3, snr=40)


@pytest.fixture(scope="module")
def physics(simulated):
    return MultiCoilMRI.from_scan(simulated.scan, device="cpu")


@pytest.fixture(scope="module")
def y(simulated):
    return simulated.scan.measurements()


# -- at once -------------------------------------------------------------------------------------------------------


def test_full_sampling_needs_no_more_than_a_transform():
    simulated = simulate_mri("ellipsoids", 0, 16, 1, coils=4, snr=None)
    physics, y = MultiCoilMRI.from_scan(simulated.scan, device="cpu"), simulated.scan.measurements()
    truth = channels(simulated.truth)
    assert torch.allclose(ZeroFilled()(y, physics), truth, atol=1e-5)
    combined = ZeroFilled("root-sum-of-squares")(y, physics)
    assert torch.allclose(magnitude(combined), magnitude(truth), atol=1e-5)


def test_the_start_is_zero_filled_on_request(y, physics):
    assert torch.allclose(start_volume("zero-filled", y, physics), ZeroFilled()(y, physics))


# -- CG-SENSE ------------------------------------------------------------------------------------------------------


def test_cg_sense_unfolds(simulated, y, physics):
    truth = channels(simulated.truth)
    error = (CGSense(8)(y, physics) - truth).norm()
    assert error < 0.7 * (ZeroFilled()(y, physics) - truth).norm()


def test_its_residual_is_the_residual_and_falls(y, physics):
    told = []
    for update in CGSense(6).stream(y, physics):
        told.append(update.figures["residual"])
        measured = float((physics.A(update.values) - y).norm() / y.norm())
        assert told[-1] == pytest.approx(measured, rel=0.01, abs=1e-3)
    assert len(told) == 7
    assert all(after < before for before, after in pairwise(told))


def test_it_solves_the_regularised_equations(y, physics):
    x = CGSense(200, regularization=0.1, tolerance=1e-6)(y, physics)
    left = physics.A_adjoint_A(x) + 0.1 * physics.sqnorm * x - physics.A_adjoint(y)
    assert left.norm() < 1e-4 * physics.A_adjoint(y).norm()
    assert x.norm() < CGSense(20)(y, physics).norm()


def test_it_ends_where_the_tolerance_is_met(y, physics):
    *_, last = CGSense(500, regularization=0.5, tolerance=1e-3).stream(y, physics)
    assert last.step < 100
    assert last.figures["normal_residual"] <= 1e-3


@pytest.mark.parametrize("method", [CGSense(), ZeroFilled()])
def test_x_rays_are_refused(method):
    xray = XRayTransform(Geometry.parallel([0, 45, 90], (4, 6), 1.0), Grid((4, 6, 6), 1.0), device="cpu")
    with pytest.raises(ScanError, match="multi-coil MRI"):
        method(torch.zeros(1, 1, 4, 3, 6), xray)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"regularization": -1.0}, {"tolerance": 1.0}])
def test_settings_out_of_range(options):
    with pytest.raises(ScanError):
        CGSense(**options)


# -- compressed sensing --------------------------------------------------------------------------------------------


def test_total_variation_beats_cg_sense_where_samples_are_few():
    simulated = simulate_mri("head", 2, 48, 1, snr=None)
    at = 30
    truth, maps = simulated.truth[at : at + 1], simulated.scan.coil_maps[:, at : at + 1]
    mask = sampling_mask(truth.shape, 6, calibration=12, readout=None)
    rng = np.random.default_rng(0)
    kspace = to_kspace(maps * truth)
    kspace = mask * (kspace + 0.01 * (rng.normal(size=kspace.shape) + 1j * rng.normal(size=kspace.shape)))
    y, physics = channels(kspace.astype(np.complex64)), MultiCoilMRI(mask, maps, device="cpu")
    wanted = channels(truth)
    best = min(float((update.values - wanted).norm()) for update in CGSense(20).stream(y, physics))
    found = PADMM(20, 1e-3)(y, physics)
    assert float((found - wanted).norm()) < 0.9 * best


# -- learned -------------------------------------------------------------------------------------------------------


def test_brightness_does_not_depend_on_the_phase(simulated):
    x = channels(simulated.truth)
    turned = channels((simulated.truth * np.exp(0.7j)).astype(np.complex64))
    assert brightness(x) == pytest.approx(brightness(turned), rel=1e-4)
    assert brightness(x) == pytest.approx(float(torch.quantile(magnitude(x).flatten(), 0.999)), rel=1e-4)


def test_an_unrolled_network_without_effect_is_gradient_descent(y, physics):
    whole = UnrolledPGD(nn.Identity(), 4, step="gradient", step_size=1.0, init="zero-filled")(y, physics)
    by_patches = UnrolledPGD(nn.Identity(), 4, step="gradient", step_size=1.0, init="zero-filled", patch_size=10)(
        y, physics
    )
    x = start_volume("zero-filled", y, physics)
    for _ in range(4):
        x = x - physics.A_adjoint(physics.A(x) - y) / physics.sqnorm
    assert torch.allclose(whole, x, atol=1e-5 * float(x.abs().max()))
    assert torch.allclose(by_patches, x, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("second_pass", [False, True])
def test_learned_methods_take_complex_volumes_of_any_unit(y, physics, second_pass):
    torch.manual_seed(0)
    network = make_network("light", channels=2, width=4, scales=2)
    options = {"patch_size": 12, "passes": 2} if second_pass else {}
    for method in (
        UnrolledPGD(network, 2, step="gradient", step_size=1.0, **options).eval(),
        PostProcessing(network, patch_size=12 if second_pass else None).eval(),
    ):
        x = method(y, physics)
        assert x.shape == (1, 2, 24, 24, 24)
        assert torch.allclose(method(100 * y, physics), 100 * x, rtol=1e-3, atol=1e-2 * float(x.abs().max()))
