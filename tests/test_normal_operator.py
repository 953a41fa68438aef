"""The normal operator: what it is on volumes and patches, how it is fitted, and as a physics."""

import deepinv as dinv
import numpy as np
import pytest
import torch

from napari_recon.physics.normal import (
    DiagCirculantWrapper,
    DiagonalCirculantWrapper,
    NormalOperator,
    NormalPhysics,
    fft_shape,
    fit_normal_operator,
    stream_normal_operator_fit,
)
from napari_recon.physics.xray import XRayTransform
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

N = 20


def cone(views=24, shape=(N, N, N), voxel=1.0):
    geometry = Geometry.cone(np.arange(views) * 360 / views, (30, 30), 2.5, 66.0, 199.0)
    return XRayTransform(geometry, Grid(shape, voxel), device="cpu")


@pytest.fixture(scope="module")
def physics():
    return cone()


@pytest.fixture(scope="module")
def fitted(physics):
    return fit_normal_operator(physics, probes=6, iterations=2)


def random_operator(shape, terms=1, symmetric=True, values="real", seed=0):
    """A mask and a kernel without any structure but the required."""
    generator = torch.Generator().manual_seed(seed)
    lengths = fft_shape(shape)
    mask = 0.5 + torch.rand(shape, generator=generator)
    full = values == "complex"
    if full:
        mask = torch.complex(mask, torch.randn(shape, generator=generator))
    spectrum = lengths if full else (*lengths[:-1], lengths[-1] // 2 + 1)
    kernel = torch.zeros((terms, *lengths))
    inside = (slice(None), *(slice(0, 2 * n - 1) for n in shape))
    kernel[inside] = torch.randn((terms, *(2 * n - 1 for n in shape)), generator=generator)
    axes = tuple(range(1, len(shape) + 1))
    kernel = torch.roll(kernel, [1 - n for n in shape], axes)
    if values != "asymmetric":
        kernel = (kernel + kernel.flip(axes).roll([1] * len(shape), axes)) / 2
    filters = torch.fft.fftn(kernel, dim=axes) if full else torch.fft.rfftn(kernel, dim=axes)
    filters = filters if values == "asymmetric" else filters.real.contiguous()
    assert filters.shape[1:] == spectrum
    return NormalOperator(mask, filters if terms > 1 else filters[0], symmetric)


KINDS = {
    "paper": {"symmetric": False},
    "symmetric": {},
    "terms": {"terms": 3},
    "asymmetric": {"symmetric": False, "values": "asymmetric"},
    "complex": {"values": "complex"},
    "complex-terms": {"values": "complex", "terms": 3},
}


def volumes(operator, batch=2, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 2 if operator.is_complex else 1, *operator.shape), generator=generator, dtype=dtype)


def inner(a, b):
    return float((a.double() * b.double()).sum())


# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 8, 9), (12, 10)])
def test_adjoint_is_the_transpose(kind, shape):
    h = random_operator(shape, **KINDS[kind])
    x, y = volumes(h), volumes(h, seed=2)
    scale = h.apply(x).norm() * y.norm()
    assert abs(inner(h.apply(x), y) - inner(x, h.adjoint(y))) < 1e-5 * scale


@pytest.mark.parametrize("kind", ["symmetric", "terms", "complex"])
def test_symmetric_form_with_a_real_filter_is_its_own_adjoint(kind):
    h = random_operator((7, 8, 9), **KINDS[kind])
    x = volumes(h)
    assert (h.apply(x) - h.adjoint(x)).norm() < 1e-5 * h.apply(x).norm()


def test_convolution_is_linear_not_circular():
    shape = (5, 6, 7)
    h = random_operator(shape, symmetric=False)
    x, kernel = volumes(h, 1), h.kernel()
    padded = torch.nn.functional.pad(x, [m for n in reversed(shape) for m in (n - 1, n - 1)])
    expected = h.spatial_mask * torch.nn.functional.conv3d(padded, kernel.flip((0, 1, 2))[None, None])
    assert (h.apply(x) - expected).norm() < 1e-5 * expected.norm()


def test_terms_vary_the_kernel_with_position():
    """Column j of H is m_i m_j (c0 + sum over terms of (w_i + w_j)/2 c_k)(i - j): written out densely."""
    shape = (4, 5, 3)
    h = random_operator(shape, terms=3)
    kernels, weights = h.kernel(), [w.expand(1, 1, *shape)[0, 0] for w in h.modulations()]
    assert all(abs(float(w.mean())) < 0.5 for w in weights)
    at = (1, 4, 0)
    x = torch.zeros(1, 1, *shape)
    x[(0, 0, *at)] = 1
    crop = tuple(slice(n - 1 - a, 2 * n - 1 - a) for n, a in zip(shape, at, strict=True))
    column = kernels[0][crop] + sum(0.5 * (w + w[at]) * c[crop] for w, c in zip(weights, kernels[1:], strict=True))
    expected = h.spatial_mask * h.spatial_mask[at] * column
    assert (h.apply(x)[0, 0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_other_devices_compute_the_same(kind, monkeypatch):
    h = random_operator((7, 1, 9), **KINDS[kind])
    x = volumes(h)
    expected = h.apply(x)
    monkeypatch.setattr("napari_recon.physics.normal_operator._SCIPY", False)
    assert torch.allclose(h.apply(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_backward_is_the_adjoint():
    h = random_operator((6, 5, 4), symmetric=False)
    x = volumes(h).requires_grad_()
    v = volumes(h, seed=3)
    (h.apply(x) * v).sum().backward()
    assert torch.allclose(x.grad, h.adjoint(v), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((11, 12, 13), (slice(2, 7), slice(0, 6), slice(9, 13))),
        ((11, 12, 13), (slice(0, 11), slice(3, 4), slice(0, 13))),
        ((16, 15), (slice(4, 11), slice(8, 15))),
        ((1, 16, 15), (slice(0, 1), slice(4, 11), slice(8, 15))),
    ],
)
def test_patch_equals_cropping_the_whole(kind, shape, box):
    h = random_operator(shape, **KINDS[kind])
    patch = h.patch(box)
    x = volumes(patch, batch=1)
    amid_zeros = torch.zeros(1, x.shape[1], *shape)
    amid_zeros[(..., *box)] = x
    for whole, part in ((h.apply, patch.apply), (h.adjoint, patch.adjoint)):
        expected = whole(amid_zeros)[(..., *box)]
        assert (part(x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["symmetric", "terms", "complex"])
def test_batch_of_patches_equals_each(kind):
    h = random_operator((12, 13, 14), **KINDS[kind])
    boxes = [tuple(slice(a, a + 6) for a in corner) for corner in [(0, 0, 0), (3, 7, 8), (6, 1, 4)]]
    batch = h.patches(boxes)
    x = volumes(h.patch(boxes[0]), batch=3)
    expected = torch.cat([h.patch(box).apply(x[i : i + 1]) for i, box in enumerate(boxes)])
    assert torch.allclose(batch.apply(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_filters_are_computed_once_for_each_patch_shape_and_have_its_size():
    large, small = random_operator((30, 30, 30)), random_operator((14, 14, 14))
    boxes = [tuple(slice(a, a + 7) for a in corner) for corner in [(0, 0, 0), (3, 7, 1)]]
    first, second = (large.patch(box) for box in boxes)
    assert first.fourier_filter is second.fourier_filter
    assert first.fourier_filter.shape == small.patch(boxes[0]).fourier_filter.shape


def test_what_does_not_belong_together_is_one_sentence():
    h = random_operator((7, 8, 9))
    with pytest.raises(ScanError, match="does not belong"):
        NormalOperator(h.spatial_mask[:-1], h.fourier_filter)
    with pytest.raises(ScanError, match="full spectrum"):
        NormalOperator(h.spatial_mask.to(torch.complex64), h.fourier_filter)
    with pytest.raises(ScanError, match="stands for volumes"):
        h.apply(torch.zeros(1, 1, 7, 8, 8))
    with pytest.raises(ScanError, match="does not lie inside"):
        h.patch((slice(0, 8), slice(0, 8), slice(0, 9)))


# -- the fit -------------------------------------------------------------------------------------------------------


def ball(shape=(N, N, N), radius=0.6):
    axes = [np.linspace(-1, 1, n, dtype=np.float32) if n > 1 else np.zeros(1, np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(((x - 0.1) ** 2 + (y + 0.2) ** 2 + z**2 < radius**2).astype(np.float32))[None, None]


def test_fit_improves_on_the_computed_start(physics):
    stream = stream_normal_operator_fit(physics, probes=6, iterations=2, distribution="white")
    updates = [u for u in stream if u.stage == "fitting"]
    first, last = updates[0].figures, updates[-1].figures
    assert last["held_out"] < first["held_out"]
    assert last["image"] < first["image"]
    assert last["loss"] < last["held_out"]
    image = ball()
    assert updates[-1].operator.relative_error(physics, image) < updates[0].operator.relative_error(physics, image)


def test_fit_is_good_and_says_how_good(physics, fitted):
    assert fitted.relative_error(physics, ball()) < 0.1
    assert set(fitted.errors) == {"white", "image", "residual"}
    assert fitted.settings["terms"] == 1
    generator = torch.Generator().manual_seed(5)
    white = torch.randn(1, 1, N, N, N, generator=generator)
    assert abs(fitted.relative_error(physics, white) - fitted.errors["white"]) < 0.15
    assert [row["iteration"] for row in fitted.history] == list(range(len(fitted.history)))


def test_several_terms_beat_one(physics, fitted):
    several = fit_normal_operator(physics, probes=6, iterations=2, terms=3)
    assert several.errors["white"] < fitted.errors["white"]
    assert several.fourier_filter.shape == (3, *fitted.fourier_filter.shape)


@pytest.mark.parametrize("distribution", ["image", "residual"])
def test_distributions_fit_what_they_are_of(physics, distribution):
    updates = [
        u
        for u in stream_normal_operator_fit(physics, probes=4, iterations=2, distribution=distribution)
        if u.stage == "fitting"
    ]
    assert updates[-1].figures["loss"] < updates[0].figures["loss"]


def test_mask_of_lower_resolution_is_piecewise_linear_and_fits_nearly_as_well(physics, fitted):
    coarse = fit_normal_operator(physics, probes=6, iterations=2, mask_step=5)
    middles = coarse.spatial_mask[2::5, 2::5, 2::5]
    again = torch.nn.functional.interpolate(middles[None, None], (N, N, N), mode="trilinear")[0, 0]
    assert (coarse.spatial_mask - again).norm() < 1e-4 * again.norm()
    assert coarse.errors["white"] < 1.2 * fitted.errors["white"]


def test_paper_form_fits_too(physics):
    h = fit_normal_operator(physics, probes=6, iterations=2, symmetric=False)
    assert h.relative_error(physics, ball()) < 0.15


def test_same_seed_same_operator(physics):
    a, b = (fit_normal_operator(physics, probes=2, iterations=1, positions=2, seed=3) for _ in range(2))
    assert torch.equal(a.spatial_mask, b.spatial_mask)
    assert torch.equal(a.fourier_filter, b.fourier_filter)


def test_short_scan_has_no_false_symmetries():
    """A limited arc is not its own mirror image; the fit must not pretend."""
    geometry = Geometry.parallel(np.linspace(10, 100, 24), (16, 24), 1.0)
    physics = XRayTransform(geometry, Grid((8, 16, 16), 1.0), device="cpu")
    h = fit_normal_operator(physics, probes=8, iterations=2)
    x = ball((8, 16, 16))
    assert h.relative_error(physics, x) < 0.2
    kernel = h.kernel()
    assert (kernel - kernel.flip(-1)).norm() > 0.2 * kernel.norm()
    assert (kernel - kernel.flip((0, 1, 2))).norm() < 1e-4 * kernel.norm()


def test_kernel_support_is_kept_to(physics):
    h = fit_normal_operator(physics, probes=2, iterations=1, positions=1, support=4)
    kernel = h.kernel()
    near = torch.zeros_like(kernel, dtype=torch.bool)
    near[(slice(N - 5, N + 4),) * 3] = True
    assert kernel[~near].abs().max() < 1e-5 * kernel.abs().max()


def test_a_blur_in_2d_is_nearly_exact():
    physics = dinv.physics.Blur(dinv.physics.blur.gaussian_blur(1.0), padding="valid")
    h = fit_normal_operator(physics, (1, 24, 28), probes=16, iterations=3)
    x = ball((1, 24, 28))[:, :, 0]
    assert h.relative_error(physics, x) < 0.1


@pytest.mark.parametrize("three_d", [False, True])
def test_mri_has_complex_volumes(three_d):
    shape = (6, 16, 16) if three_d else (20, 16)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape[-2:], generator=generator) < 0.5).float()
    mask[shape[-2] // 2 - 3 : shape[-2] // 2 + 3] = 1
    axes = [torch.linspace(-1, 1, n) for n in shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    coil = torch.polar(torch.exp(-(grid[-1] ** 2)), grid[-2])
    physics = dinv.physics.MultiCoilMRI(
        mask=mask.expand(shape), coil_maps=coil[None, None], img_size=shape, three_d=three_d
    )
    h = fit_normal_operator(physics, shape, probes=24, iterations=4)
    assert h.is_complex
    x = torch.randn(1, 2, *shape, generator=generator)
    assert h.relative_error(physics, x) < 0.45
    smooth = torch.stack([ball((1, *shape) if not three_d else shape)[0, 0].reshape(shape)] * 2)[None]
    assert h.relative_error(physics, smooth) < 0.25


def test_fit_without_a_size_is_one_sentence():
    physics = dinv.physics.Blur(dinv.physics.blur.gaussian_blur(1.0), padding="valid")
    with pytest.raises(ScanError, match="img_size"):
        fit_normal_operator(physics)
    with pytest.raises(ScanError, match="terms"):
        fit_normal_operator(physics, (1, 16, 16), terms=7)
    with pytest.raises(ScanError, match="distribution"):
        fit_normal_operator(physics, (1, 16, 16), distribution="blue")


# -- kept ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path, physics, fitted):
    path = tmp_path / "operator.safetensors"
    fitted.save(path, physics)
    again = NormalOperator.load(path, cone())
    assert torch.equal(again.fourier_filter, fitted.fourier_filter)
    assert torch.equal(again.spatial_mask, fitted.spatial_mask)
    assert (again.symmetric, again.history, again.errors) == (fitted.symmetric, fitted.history, fitted.errors)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"views": 23}, "number of views"),
        ({"voxel": 0.9}, "voxel size"),
        ({"shape": (N, N, N - 1)}, "shape"),
    ],
)
def test_operator_of_another_scan_is_refused_with_the_reason(tmp_path, physics, fitted, other, reason):
    path = tmp_path / "operator.safetensors"
    fitted.save(path, physics)
    with pytest.raises(ScanError, match=reason):
        NormalOperator.load(path, cone(**other))


def test_files_that_are_no_operators(tmp_path, fitted):
    path = tmp_path / "operator.safetensors"
    with pytest.raises(ScanError, match="does not exist"):
        NormalOperator.load(path)
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ScanError, match="cannot be read"):
        NormalOperator.load(path)
    with pytest.raises(ScanError, match="could not be written"):
        fitted.save(tmp_path / "missing" / "operator.safetensors")


# -- as a physics --------------------------------------------------------------------------------------------------


def dense_physics(seed=0, n=4):
    """A small, well-conditioned symmetric N on (1, 1, n, n, n), as a NormalPhysics, and its matrix."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n**3, n**3, generator=generator)
    matrix = q @ q.T / n**3 + 0.1 * torch.eye(n**3)
    return NormalPhysics(lambda x: (x.flatten(1) @ matrix).reshape(x.shape), (1, n, n, n)), matrix


def test_gradient_of_the_l2_fidelity_is_hx_minus_b(physics, fitted):
    wrapper = DiagCirculantWrapper(physics=physics, img_size=(N, N, N), scaling=0.5, operator=fitted)
    y = physics.A(ball())
    b = wrapper.backproject(y)
    x = volumes(fitted, 1)
    expected = 0.5 * fitted.apply(x) - 0.5 * physics.A_adjoint(y)
    found = dinv.optim.L2().grad(x, b, wrapper)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(wrapper.A_vjp(x, wrapper.A(x) - b), found)
    assert DiagonalCirculantWrapper is DiagCirculantWrapper


def test_prox_and_pseudo_inverse_solve_with_the_normal_operator():
    physics, matrix = dense_physics()
    generator = torch.Generator().manual_seed(1)
    b, z = torch.randn(2, 1, 1, 4, 4, 4, generator=generator)
    gamma = 0.7
    x = dinv.optim.L2().prox(z, b, physics, gamma=gamma)
    expected = torch.linalg.solve(gamma * matrix + torch.eye(64), (z + gamma * b).flatten())
    assert torch.allclose(x.flatten(), expected, atol=1e-3)
    solved = physics.A_dagger(b, max_iter=200, tol=1e-6)
    assert torch.allclose(physics.A(solved), b, atol=1e-3)


ALGORITHMS = {
    "PGD": {"stepsize": 0.3},
    "FISTA": {"stepsize": 0.3},
    "GD": {"stepsize": 0.3},
    "ADMM": {"stepsize": 1.0},
    "DRS": {"stepsize": 1.0},
    "HQS": {"stepsize": 1e3},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_with_an_l2_fidelity_solve_the_normal_equations(name):
    physics, matrix = dense_physics()
    b = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    algorithm = getattr(dinv.optim, name)(
        data_fidelity=dinv.optim.L2(), prior=dinv.optim.ZeroPrior(), max_iter=300, early_stop=False, **ALGORITHMS[name]
    )
    x = algorithm(b, physics)
    expected = torch.linalg.solve(matrix, b.flatten())
    assert (x.flatten() - expected).norm() < 0.02 * expected.norm()


def test_normal_operator_is_applied_once_for_cost_and_gradient():
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x

    physics = NormalPhysics(double, (1, 2, 2, 2))
    b, x = torch.ones(2, 1, 1, 2, 2, 2)
    fidelity = dinv.optim.L2()
    fidelity(x, b, physics)
    assert torch.equal(fidelity.grad(x, b, physics), 2 * x - b)
    assert len(calls) == 1
    x += 1  # written to: the kept answer is stale
    assert torch.equal(physics.A(x), 2 * x)
    physics.A(x).zero_()
    assert torch.equal(physics.A(x), 2 * x)
    assert torch.equal(physics.A(x.clone()), 2 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (dinv.physics.Blur(dinv.physics.blur.gaussian_blur(1.0), padding="valid"), (1, 24, 24)),
        lambda: (dinv.physics.Tomography(angles=40, img_width=24, circle=False, normalize=True), (1, 24, 24)),
    ],
    ids=["blur", "tomography"],
)
def test_stands_in_for_deepinv_physics(make):
    physics, size = make()
    h = fit_normal_operator(physics, size, probes=16, iterations=3)
    x = ball((1, *size[1:]))[:, :, 0]
    wrapper = DiagCirculantWrapper(physics=physics, img_size=size, operator=h)
    pgd = dinv.optim.PGD(data_fidelity=dinv.optim.L2(), stepsize=0.9 / h.sqnorm(), max_iter=10, early_stop=False)
    with torch.no_grad():
        y = physics.A(x)
        exact, approximate = pgd(y, physics), pgd(wrapper.backproject(y), wrapper)
    assert (exact - approximate).norm() < 0.2 * exact.norm()


def test_wrapper_takes_its_operator_in_every_way(physics, fitted):
    x = volumes(fitted, 1)
    expected = fitted.apply(x)
    pair = {"fourier_filter": fitted.fourier_filter, "spatial_mask": fitted.spatial_mask}
    late = DiagCirculantWrapper(physics=physics, img_size=(1, N, N, N))
    with pytest.raises(ScanError, match="no λ and m yet"):
        late.A(x)
    assert torch.equal(late.A(x, **pair), expected)
    late.set_operator(fitted)
    assert torch.equal(late.A(x), expected)
    assert torch.equal(DiagCirculantWrapper(physics=physics, **pair).A(x), expected)
    with pytest.raises(ScanError, match="needs both"):
        DiagCirculantWrapper(physics=physics, spatial_mask=fitted.spatial_mask)
    with pytest.raises(ScanError, match="fit it for this volume"):
        DiagCirculantWrapper(physics=physics, img_size=(N, N, N + 1), operator=fitted)


def test_projections_in_place_of_b_are_named(physics, fitted):
    wrapper = DiagCirculantWrapper(physics=physics, img_size=(N, N, N), operator=fitted)
    with pytest.raises(ScanError, match="backproject"):
        dinv.optim.L2().grad(volumes(fitted, 1), physics.A(ball()), wrapper)
