"""Multi-coil MRI: the operator, its patches, coil maps, and H in its place."""

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.models import Reconstructor

from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.physics import mri
from napari_recon.physics.coil_maps import estimate_coil_maps, normalized_maps
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, fit_normal_operator
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.tv import tv_patch_solver
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import KSpaceScan, to_image
from napari_recon.scans.recording import KSpaceRecording
from napari_recon.scans.sampling import sampling_mask

SHAPES = [((9, 12, 10), 2), ((9, 12, 10), 0), ((8, 11, 7), None), ((1, 12, 13), None)]


def make_physics(shape, sampled_along, coils=3):
    """Random maps and samples; along one axis (if any) every line is sampled wholly or not at all."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape, generator=generator) < 0.4).float()
    if sampled_along is not None:
        mask = mask.narrow(sampled_along, 0, 1).expand(shape).contiguous()
    mask[tuple(n // 2 for n in shape)] = 1
    maps = torch.randn(coils, *shape, dtype=torch.complex64, generator=generator)
    return MultiCoilMRI(mask, maps, device="cpu")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def head():
    return simulate_mri("head", 3, 24, 2, coils=4, calibration=12, snr=100)


@pytest.fixture(scope="module")
def physics(head):
    return MultiCoilMRI.from_scan(head.scan, device="cpu")


# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "along"), SHAPES)
def test_it_is_deepinvs_operator(shape, along):
    ours = make_physics(shape, along)
    theirs = dinv.physics.MultiCoilMRI(
        mask=ours.mask[:, :1], coil_maps=ours.coil_maps, img_size=(2, *shape), three_d=True
    )
    x, y = noise(2, 2, *shape), noise(2, 2, 3, *shape)
    assert torch.allclose(ours.A(x), theirs.A(x), atol=1e-5)
    assert torch.allclose(ours.A_adjoint(y), theirs.A_adjoint(y), atol=1e-5)


@pytest.mark.parametrize(("shape", "along"), SHAPES)
def test_the_adjoint_is_the_transpose(shape, along):
    physics = make_physics(shape, along)
    x, y = noise(2, 2, *shape), noise(2, 2, 3, *shape)
    ax, aty = physics.A(x), physics.A_adjoint(y)
    assert abs(float((ax * y).sum() - (x * aty).sum())) < 1e-5 * float(ax.norm() * y.norm())


@pytest.mark.parametrize(("shape", "along"), SHAPES)
def test_the_normal_operator_needs_no_kspace(shape, along):
    physics = make_physics(shape, along)
    x = noise(2, 2, *shape)
    exact = physics.A_adjoint(physics.A(x))
    assert (physics.A_adjoint_A(x) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize(("shape", "along"), SHAPES)
def test_other_devices_compute_the_same(shape, along, monkeypatch):
    physics = make_physics(shape, along)
    part = physics.restrict(tuple(slice(0, max(1, n // 2)) for n in shape))
    x, y, patch = noise(1, 2, *shape), noise(1, 2, 3, *shape), noise(1, *part.img_size)

    def everything():
        return physics.A(x), physics.A_adjoint(y), physics.A_adjoint_A(x), part.A_adjoint_A(patch)

    with_scipy = everything()
    monkeypatch.setattr(mri, "_SCIPY", False)
    monkeypatch.setattr(mri, "BATCH", {"cpu": 1 << 26})
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(with_scipy, everything(), strict=True))


def test_gradients_pass_through_it_and_through_its_patches():
    physics = make_physics((6, 8, 7), 2)
    y, x = noise(1, 2, 3, 6, 8, 7, seed=2), noise(1, 2, 6, 8, 7).requires_grad_()
    (0.5 * (physics.A(x) - y).square().sum()).backward()
    assert torch.allclose(x.grad, physics.A_adjoint(physics.A(x) - y), atol=1e-4)
    for part in (physics, physics.restrict((slice(1, 5), slice(0, 6), slice(2, 6)))):
        v = noise(1, *part.img_size).requires_grad_()
        (0.5 * (part.A_adjoint_A(v) * v).sum()).backward()
        assert torch.allclose(v.grad, part.A_adjoint_A(v), atol=1e-4)


def test_no_eigenvalue_is_larger_than_sqnorm():
    physics = make_physics((8, 9, 7), None)
    x = noise(1, 2, 8, 9, 7)
    for _ in range(40):
        x = physics.A_adjoint_A(x / x.norm())
    assert float(x.norm()) <= physics.sqnorm * (1 + 1e-5)


def test_normalised_maps_make_a_norm_of_one(physics):
    assert physics.sqnorm == pytest.approx(1, abs=1e-4)


def test_fully_sampled_kspace_gives_the_volume_back(head):
    full = MultiCoilMRI(np.ones_like(head.scan.mask), head.scan.coil_maps, head.scan.grid, device="cpu")
    x = noise(1, 2, *head.scan.mask.shape)
    assert torch.allclose(full.A_adjoint(full.A(x)), x, atol=1e-5)


def test_another_mask_replaces_all_that_was_kept():
    physics = make_physics((6, 8, 7), 2)
    box, x = (slice(0, 4), slice(2, 6), slice(1, 5)), noise(1, 2, 4, 4, 4)
    physics.restrict(box).A_adjoint_A(x)
    norm = physics.sqnorm
    physics.update(mask=torch.ones(6, 8, 7), coil_maps=2 * physics.coil_maps)
    inside = physics.coil_maps[:, :, 0:4, 2:6, 1:5].abs().square().sum(1)
    assert torch.allclose(physics.restrict(box).A_adjoint_A(x), inside * x, atol=1e-4)
    assert physics.sqnorm == pytest.approx(4 * norm)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MultiCoilMRI(torch.ones(4, 4, 4), torch.ones(2, 4, 4, 5) + 0j, device="cpu"), "coil maps"),
        (lambda: MultiCoilMRI(torch.zeros(4, 4, 4), torch.ones(2, 4, 4, 4) + 0j, device="cpu"), "no sample"),
        (
            lambda: MultiCoilMRI(torch.ones(4, 4, 4), torch.ones(2, 4, 4, 4) + 0j, Grid((4, 4, 5), 1.0), device="cpu"),
            "grid",
        ),
        (lambda: make_physics((6, 8, 7), 2).A(torch.ones(1, 2, 6, 8, 8)), "volumes"),
        (lambda: make_physics((6, 8, 7), 2).A_adjoint(torch.ones(1, 2, 4, 6, 8, 7)), "measurements"),
        (lambda: make_physics((6, 8, 7), 2).restrict((slice(0, 9), slice(0, 4), slice(0, 4))), "box"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(make, says):
    with pytest.raises(ScanError, match=says):
        make()


# -- patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "along"), SHAPES)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 1.0])
def test_a_patch_is_the_crop_of_the_whole(shape, along, part):
    physics = make_physics(shape, along)
    edges = [max(1, round(part * n)) for n in shape]
    box = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(shape, edges, strict=True))
    patch = noise(2, 2, *edges)
    amid_zeros = torch.zeros(2, 2, *shape)
    amid_zeros[(..., *box)] = patch
    exact = physics.A_adjoint(physics.A(amid_zeros))[(..., *box)]
    restricted = physics.restrict(box)
    assert (restricted.A_adjoint_A(patch) - exact).norm() < 1e-5 * exact.norm()
    assert torch.allclose(restricted.A(patch), physics.A(amid_zeros), atol=1e-6)
    assert torch.allclose(restricted.A_adjoint(restricted.A(patch)), exact, atol=1e-4)


class Gradient(Reconstructor):
    """One step down the patch's gradient."""

    def forward(self, y, physics, **kwargs):
        return physics.context - (physics.A(physics.context) - y)


def test_the_patches_gradient_is_that_of_the_whole(physics, head):
    y, start = head.scan.measurements(), noise(1, 2, 24, 24, 24)
    found = PartitionedReconstructor(Gradient(), patch_size=10, init=start, global_steps=0)(y, physics)
    expected = start - physics.A_adjoint(physics.A(start) - y)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_patches_reconstruct_what_the_samples_leave_open(physics, head):
    y, truth = head.scan.measurements(), torch.view_as_real(torch.from_numpy(head.truth)).movedim(-1, 0)[None]
    zero_filled = physics.A_adjoint(y)
    solver = tv_patch_solver(physics, zero_filled, 10, 1e-3, nonnegative=False)
    for h in (physics, DiagCirculantWrapper(physics, operator=fit_normal_operator(physics, probes=4, iterations=2))):
        x = PartitionedReconstructor(solver, patch_size=12, init=zero_filled)(y, h)
        assert (x - truth).norm() < 0.6 * (zero_filled - truth).norm()


# -- H -------------------------------------------------------------------------------------------------------------


def test_h_is_complex_and_close(physics):
    h = fit_normal_operator(physics, probes=6, iterations=3)
    assert h.spatial_mask.is_complex()
    assert h.is_complex
    assert h.errors["image"] < 0.35
    assert h.errors["residual"] < 0.35


def test_an_operator_file_belongs_to_its_samples_and_maps(physics, head, tmp_path):
    h = fit_normal_operator(physics, probes=1, iterations=0, positions=1)
    h.save(tmp_path / "h.safetensors", physics)
    again = NormalOperator.load(tmp_path / "h.safetensors", physics)
    x = noise(1, 2, 24, 24, 24)
    assert torch.equal(h.apply(x), again.apply(x))
    others = sampling_mask(head.scan.mask.shape, 2, seed=9)
    with pytest.raises(ScanError, match="sampling mask differs;"):
        NormalOperator.load(tmp_path / "h.safetensors", MultiCoilMRI(others, head.scan.coil_maps, device="cpu"))
    with pytest.raises(ScanError, match="coil maps differs;"):
        NormalOperator.load(
            tmp_path / "h.safetensors", MultiCoilMRI(head.scan.mask, head.scan.coil_maps.conj(), device="cpu")
        )


# -- coil maps -----------------------------------------------------------------------------------------------------


def alignment(found, true):
    """Per voxel |⟨found, true⟩|: 1 where maps agree but for a phase that all coils share."""
    return np.abs((found.conj() * true).sum(0))


@pytest.fixture(scope="module")
def espirit(head):
    return estimate_coil_maps(head.scan.kspace, head.scan.calibration)


def test_espirit_finds_the_coil_maps(head, espirit):
    inside = np.abs(head.truth) > 0.1 * np.abs(head.truth).max()
    assert alignment(espirit, head.scan.coil_maps)[inside].mean() > 0.99
    total = np.sqrt((np.abs(espirit) ** 2).sum(0))
    assert np.allclose(total, 1, atol=1e-4)


def test_the_volume_is_that_of_the_known_maps_but_for_a_phase(head, physics, espirit):
    y = head.scan.measurements()
    found = MultiCoilMRI(head.scan.mask, espirit, device="cpu").A_adjoint(y)
    known = physics.A_adjoint(y)
    difference = torch.linalg.vector_norm(found, dim=1) - torch.linalg.vector_norm(known, dim=1)
    assert difference.norm() < 0.05 * known.norm()


def test_maps_from_few_samples_are_coarse_but_there(head):
    found = estimate_coil_maps(head.scan.kspace, (6, 6, 24))
    inside = np.abs(head.truth) > 0.1 * np.abs(head.truth).max()
    assert alignment(found, head.scan.coil_maps)[inside].mean() > 0.95


def test_few_slices_are_mapped_one_by_one(head):
    images = to_image(head.scan.kspace, (1,))[:, 9:14]
    kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(images, axes=1), axis=1, norm="ortho"), axes=1)
    found = estimate_coil_maps(kspace, (5, 12, 24), "espirit")
    inside = np.abs(head.truth[9:14]) > 0.1 * np.abs(head.truth).max()
    assert found.shape == kspace.shape
    assert alignment(found, head.scan.coil_maps[:, 9:14])[inside].mean() > 0.98


@pytest.mark.parametrize(
    ("calibration", "method", "says"), [((2, 2, 24), None, "give coil maps"), ((12, 12, 24), "walsh", "no way")]
)
def test_maps_that_cannot_be_estimated(head, calibration, method, says):
    with pytest.raises(ScanError, match=says):
        estimate_coil_maps(head.scan.kspace, calibration, method)


# -- from a scan ---------------------------------------------------------------------------------------------------


def recorded(head, maps):
    recording = KSpaceRecording(
        "test",
        "head",
        "head.npy",
        head.scan.kspace.shape,
        lambda: head.scan.kspace,
        voxel_size=(2.0, 1.0, 1.5),
        read_coil_maps=None if maps is None else lambda: maps,
    )
    return KSpaceScan("head.npy", recording)


def test_a_scan_brings_its_samples_its_grid_and_its_maps(head, espirit):
    physics = MultiCoilMRI.from_scan(recorded(head, 7 * head.scan.coil_maps), device="cpu")
    assert physics.grid.scale == (2.0, 1.0, 1.5)
    assert torch.equal(physics.mask[0, 0].bool(), torch.from_numpy(head.scan.mask))
    assert torch.allclose(physics.coil_maps[0], torch.from_numpy(normalized_maps(head.scan.coil_maps)), atol=1e-5)
    estimated = MultiCoilMRI.from_scan(recorded(head, None), device="cpu")
    assert torch.allclose(estimated.coil_maps[0], torch.from_numpy(espirit), atol=1e-4)
