"""SIRT: what it is known for."""

import itertools

import deepinv as dinv
import numpy as np
import pytest
import torch

from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.sirt import SIRT
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid


@pytest.fixture(scope="module")
def scan():
    geometry = Geometry.cone(np.arange(20) * 18.0, (24, 24), 2.5, 66.0, 199.0)
    physics = XRayTransform(geometry, Grid((16, 16, 16), 1.0), device="cpu")
    truth = torch.zeros(1, 1, 16, 16, 16)
    truth[..., 4:12, 3:13, 5:11] = 0.05
    return physics, physics.A(truth), truth


def test_residual_falls_at_every_step(scan):
    physics, y, _ = scan
    updates = [(u.step, u.total, u.figures["residual"]) for u in SIRT(20, nonnegative=False).stream(y, physics)]
    assert [u[0] for u in updates] == list(range(21))
    assert updates[0][2] == pytest.approx(1.0)
    assert all(b[2] < a[2] for a, b in itertools.pairwise(updates))


def test_figures_are_of_the_volume_that_comes_with_them(scan):
    physics, y, _ = scan
    for update in SIRT(3).stream(y, physics):
        residual = float((physics.A(update.values) - y).norm() / y.norm())
        assert update.figures["residual"] == pytest.approx(residual, rel=1e-4)


def test_truth_stays_where_it_is(scan):
    physics, y, truth = scan
    x = SIRT(5, init=truth)(y, physics)
    assert torch.allclose(x, truth, atol=1e-5)


def test_step_never_overshoots_a_uniform_volume(scan):
    """From zeros, one step on the data of a constant gives that constant wherever rays pass."""
    physics, _, _ = scan
    constant = torch.full((1, 1, 16, 16, 16), 0.02)
    x = SIRT(1)(physics.A(constant), physics)
    seen = physics.A_adjoint(torch.ones(1, 1, *physics.measurement_shape)) > 0
    assert torch.allclose(x[seen], constant[seen], rtol=1e-3)


def test_nonnegative(scan):
    physics, y, _ = scan
    noisy = y + 0.05 * y.max() * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    assert bool((SIRT(10)(noisy, physics) >= 0).all())
    assert bool((SIRT(10, nonnegative=False)(noisy, physics) < 0).any())


def test_any_linear_physics():
    physics = dinv.physics.Tomography(angles=30, img_width=20, circle=False, normalize=False)
    truth = torch.zeros(1, 1, 20, 20)
    truth[..., 6:14, 5:15] = 1
    with torch.no_grad():
        x = SIRT(40)(physics.A(truth), physics)
    assert (x - truth).norm() < 0.5 * truth.norm()


def test_no_iterations_is_one_sentence():
    with pytest.raises(ScanError, match="at least one"):
        SIRT(0)
