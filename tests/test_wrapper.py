"""H in place of AᵀA under deepinv's algorithms: the same answers where it is exact, close ones where it is fitted."""

import deepinv as dinv
import numpy as np
import pytest
import torch
from torch.nn.functional import pad

import napari_recon as nr
from napari_recon import sample_data
from napari_recon.physics.normal import (
    DiagCirculantWrapper,
    NormalOperator,
    NormalPhysics,
    fft_shape,
    fit_normal_operator,
)
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.tv import TVPrior

SHAPES = {"2D": (8, 7), "3D": (5, 6, 4)}


class MaskedBlur(dinv.physics.LinearPhysics):
    """A x = h * (m x), the whole convolution: AᵀA is m C m exactly, C the convolution with h's autocorrelation."""

    def __init__(self, mask, kernel):
        super().__init__(img_size=(1, *mask.shape), max_iter=300, tol=1e-7, solver="CG")
        self.mask, self.kernel = mask, kernel
        self.convolve = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[mask.ndim]

    def A(self, x, **kwargs):
        around = [k - 1 for k in reversed(self.kernel.shape) for _ in range(2)]
        return self.convolve(pad(self.mask * x, around), self.kernel[None, None])

    def A_adjoint(self, y, **kwargs):
        flipped = self.kernel.flip(tuple(range(self.kernel.ndim)))
        return self.mask * self.convolve(y, flipped[None, None])

    def filter(self):
        """The spectrum of C."""
        lengths = fft_shape(self.mask.shape)
        return torch.fft.rfftn(self.kernel, s=lengths, dim=tuple(range(-len(lengths), 0))).abs() ** 2


def masked_blur(shape=SHAPES["3D"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.rand((3,) * len(shape), generator=generator)
    return MaskedBlur(0.5 + torch.rand(shape, generator=generator), kernel / kernel.sum())


def exact_wrapper(physics, **options):
    """The wrapper of a MaskedBlur, with nothing approximated."""
    options = {"max_iter": 300, "tol": 1e-7} | options
    return DiagCirculantWrapper(physics, operator=NormalOperator(physics.mask, physics.filter()), **options)


def dense(apply, shape):
    """The matrix of a linear map on volumes."""
    n = int(np.prod(shape))
    return apply(torch.eye(n).reshape(n, 1, *shape)).reshape(n, n).T.double()


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.fixture(params=SHAPES)
def blur(request):
    return masked_blur(SHAPES[request.param])


def test_the_exact_wrapper_is_exact(blur):
    x = noise(2, 1, *blur.mask.shape)
    wrapper = exact_wrapper(blur)
    assert blur.adjointness_test(x) < 1e-4
    assert close(wrapper.A(x), blur.A_adjoint_A(x), 1e-5)


# -- fixed points --------------------------------------------------------------------------------------------------

ALGORITHMS = {"GD": 0.4, "PGD": 0.5, "FISTA": 0.5, "ADMM": 2.0, "DRS": 2.0, "HQS": 2.0}  # and their steps
GRADIENT = ("GD", "PGD", "FISTA")


def algorithm(name, prior=None, weight=0.2, iterations=400, **options):
    return getattr(dinv.optim, name)(
        data_fidelity=dinv.optim.L2(),
        prior=prior or dinv.optim.Tikhonov(),
        lambda_reg=weight,
        stepsize=ALGORITHMS[name],
        max_iter=iterations,
        **options,
    )


@pytest.mark.parametrize("form", ["symmetric", "paper"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_fixed_point_is_the_minimiser(blur, name, form):
    """Of ½⟨x, Hx⟩ − ⟨x, b⟩ + ½ w ‖x‖² by a matrix; for HQS, of the same with the data term's Moreau envelope."""
    weight, shape = 0.2, blur.mask.shape
    b = blur.A_adjoint(blur.A(noise(1, 1, *shape)))
    plain = MaskedBlur(torch.ones(shape), blur.kernel)
    if form == "symmetric":
        wrapper, n = exact_wrapper(blur), dense(blur.A_adjoint_A, shape)
    else:  # m C, not symmetric
        wrapper = DiagCirculantWrapper(
            blur,
            fourier_filter=plain.filter(),
            spatial_mask=blur.mask,
            symmetric=False,
            max_iter=100,
            tol=1e-5,
        )
        n = blur.mask.flatten().double()[:, None] * dense(plain.A_adjoint_A, shape)
    found = algorithm(name, weight=weight, iterations=400 if name in GRADIENT else 60)(b, wrapper)
    eye, gamma = torch.eye(len(n)), ALGORITHMS[name]
    right = b.flatten().double()
    if name == "HQS":
        expected = torch.linalg.solve((1 + gamma * weight) * (gamma * n + eye) - eye, gamma * right)
    else:
        expected = torch.linalg.solve(n + weight * eye, right)
    assert close(found.flatten().double(), expected, 1e-3)


@pytest.mark.parametrize("prior", ["sparse", "total variation"])
@pytest.mark.parametrize("name", ["PGD", "FISTA", "ADMM", "DRS", "HQS"])
def test_every_iterate_is_that_with_the_exact_physics(blur, name, prior):
    y = blur.A(noise(2, 1, *blur.mask.shape))
    wrapper = exact_wrapper(blur)
    for iterations in (1, 7):
        found, expected = (
            algorithm(name, dinv.optim.L1Prior() if prior == "sparse" else TVPrior(), 0.02, iterations)(
                measured, meant, init=(start, torch.zeros_like(start))
            )
            for measured, meant in [(wrapper.backproject(y), wrapper), (y, blur)]
            for start in [blur.A_adjoint(y)]
        )
        assert close(found, expected)


def test_minimiser_with_l1_satisfies_its_optimality_condition(blur):
    wrapper, weight = exact_wrapper(blur), 0.05
    b = wrapper.backproject(blur.A(noise(1, 1, *blur.mask.shape)))
    for name in ("PGD", "FISTA", "ADMM"):
        x = algorithm(name, dinv.optim.L1Prior(), weight, 600 if name in GRADIENT else 150)(b, wrapper)
        slope = wrapper.A(x) - b
        zero = x == 0
        assert bool(zero.any())
        assert bool((slope[zero].abs() <= weight * 1.01).all())
        assert torch.allclose(slope[~zero], -weight * x[~zero].sign(), atol=0.02 * weight)


def test_scaling_scales_the_data_term(blur):
    """With scaling 1/‖A‖² a step of one is safe, and the weight is relative: the minimiser is the same."""
    y = blur.A(noise(1, 1, *blur.mask.shape))
    norm = float(blur.compute_sqnorm(noise(1, 1, *blur.mask.shape), verbose=False))
    scaled = exact_wrapper(blur, scaling=1 / norm)
    found = dinv.optim.PGD(dinv.optim.L2(), dinv.optim.Tikhonov(), lambda_reg=0.1 / norm, stepsize=1.0, max_iter=300)(
        scaled.backproject(y), scaled
    )
    whole = exact_wrapper(blur)
    assert close(found, algorithm("PGD", weight=0.1)(whole.backproject(y), whole), 1e-3)
    assert float(scaled.compute_sqnorm(noise(1, 1, *blur.mask.shape), verbose=False)) == pytest.approx(1, rel=1e-2)


# -- the proximal operator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["symmetric", "paper"])
def test_gradients_of_the_proximal_operator_are_the_solutions(form):
    """By z, b and the step, against a dense solution that torch differentiates itself."""
    blur = masked_blur((4, 5))
    wrapper = DiagCirculantWrapper(
        blur,
        fourier_filter=blur.filter(),
        spatial_mask=blur.mask,
        symmetric=form == "symmetric",
        max_iter=500,
        tol=1e-7,
    )
    n = dense(wrapper.operator.apply, (4, 5)).float()
    z, b = noise(2, 1, 4, 5), noise(2, 1, 4, 5, seed=2)
    weights = noise(2, 20, seed=3)

    def gradients(solve):
        inputs = [z.clone().requires_grad_(), b.clone().requires_grad_(), torch.tensor([0.7, 3.0], requires_grad=True)]
        x = solve(*inputs).reshape(2, 20)
        (weights * x).sum().backward()
        return [x.detach(), *(i.grad for i in inputs)]

    def by_matrix(z, b, gamma):
        gamma = gamma[:, None, None]
        return torch.linalg.solve(gamma * n + torch.eye(20), (z + gamma.reshape(2, 1, 1, 1) * b).reshape(2, 20, 1))

    found = gradients(lambda z, b, gamma: dinv.optim.L2().prox(z, b, wrapper, gamma=gamma))
    for a, e in zip(found, gradients(by_matrix), strict=True):
        assert close(a, e, 1e-3)


def test_a_sample_is_solved_the_same_in_any_company():
    """Conjugate gradients stop for each sample by itself: an easy one does not go on because a hard one does."""
    blur = masked_blur()
    wrapper = exact_wrapper(blur)
    easy, hard = torch.ones(1, 1, *blur.mask.shape), noise(1, 1, *blur.mask.shape)
    for solve in (lambda b: wrapper.prox_l2(b, b, 50.0, tol=0.1), lambda b: wrapper.A_dagger(b, 50, tol=0.3)):
        together = solve(torch.cat([easy, hard]))
        assert close(together, torch.cat([solve(easy), solve(hard)]), 1e-5)


def test_directions_without_curvature_are_left_alone():
    """H is not quite positive definite; where it is not, conjugate gradients would divide by nothing."""
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    physics = NormalPhysics(lambda x: signs * x, (1, 2, 2))
    for b in (torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])):
        x = physics.A_dagger(b.reshape(1, 1, 2, 2), max_iter=50)
        assert bool(x.isfinite().all())
        assert x.abs().max() < 10


# -- unfolded networks ---------------------------------------------------------------------------------------------


class Smoothing(torch.nn.Module):
    """A denoiser of a few weights, as a network has."""

    def __init__(self, axes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (1, 1, *(3,) * axes)
        self.kernel = torch.nn.Parameter(0.05 * torch.randn(shape, generator=generator))
        self.convolve = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[axes]

    def forward(self, x, sigma=None, **kwargs):
        return x + torch.tanh(self.convolve(x, self.kernel, padding=1))


def unfolded(name, axes):
    prior = dinv.optim.RED if name == "GD" else dinv.optim.PnP
    return getattr(dinv.optim, name)(
        data_fidelity=dinv.optim.L2(),
        prior=prior(denoiser=Smoothing(axes)),
        stepsize=[0.5, 0.4, 0.6],
        g_param=0.1,
        lambda_reg=0.1,
        max_iter=3,
        unfold=True,
        trainable_params=["stepsize", "lambda"] if name == "GD" else ["stepsize"],
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unfolded_networks_learn_as_with_the_exact_physics(blur, name):
    y = blur.A(noise(2, 1, *blur.mask.shape))
    truth = noise(2, 1, *blur.mask.shape, seed=2)
    wrapper = exact_wrapper(blur)

    def learnt(measured, meant):
        network = unfolded(name, blur.mask.ndim)
        x = network(measured, meant)
        (x - truth).square().sum().backward()
        gradients = {key: value.grad for key, value in network.named_parameters() if value.requires_grad}
        return {"x": x.detach(), **gradients}

    expected, found = learnt(y, blur), learnt(wrapper.backproject(y), wrapper)
    assert {key for key, value in expected.items() if value is not None} >= {"x"}
    assert expected.keys() == found.keys()
    assert sum(value is not None for value in found.values()) >= 4  # the iterate, steps, weights
    for key, value in expected.items():
        if value is None:
            assert found[key] is None
        else:
            assert close(found[key], value, 1e-3), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unfolded_networks_solve_patches(name):
    """With H exact, patches with H and patches by the projections are the same."""
    physics = masked_blur((10, 9, 8))
    y = physics.A(noise(1, 1, 10, 9, 8))
    recon = PartitionedReconstructor(unfolded(name, 3), patch_size=6, global_steps=2)
    with torch.no_grad():
        assert close(recon(y, exact_wrapper(physics)), recon(y, physics))


# -- physics of deepinv's own --------------------------------------------------------------------------------------


def gaussian(axes):
    k = torch.exp(-torch.arange(-2.0, 3).square() / 2)
    kernel = k[:, None] * k.square()
    kernel = kernel if axes == 2 else k[:, None, None] * kernel
    return (kernel / kernel.sum())[None, None]


def multi_coil_mri(shape, three_d):
    lines = (torch.rand(shape[-2:], generator=torch.Generator().manual_seed(0)) < 0.5).float()
    lines[shape[-2] // 2 - 3 : shape[-2] // 2 + 3] = 1
    *_, y, x = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    coils = [
        torch.polar(torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 2), y * a + x * b) for a in (-1, 1) for b in (-1, 1)
    ]
    return dinv.physics.MultiCoilMRI(lines.expand(shape), torch.stack(coils)[None], three_d=three_d)


DEEPINV = {
    "blur": lambda: (dinv.physics.Blur(gaussian(2), padding="valid"), (1, 24, 22)),
    "colour blur": lambda: (dinv.physics.Blur(gaussian(2), padding="reflect"), (3, 24, 22)),
    "3D blur": lambda: (dinv.physics.Blur(gaussian(3), padding="valid"), (1, 12, 14, 16)),
    "circular blur": lambda: (dinv.physics.BlurFFT((1, 24, 22), gaussian(2)), (1, 24, 22)),
    "tomography": lambda: (dinv.physics.Tomography(30, img_width=24, circle=False, normalize=True), (1, 24, 24)),
    "MRI": lambda: (multi_coil_mri((22, 20), False), (2, 22, 20)),
    "3D MRI": lambda: (multi_coil_mri((8, 16, 14), True), (2, 8, 16, 14)),
    "denoising": lambda: (dinv.physics.Denoising(), (1, 12, 14, 16)),
}


def two_balls(size):
    """What an image is like: flat parts and edges."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size[1:]], indexing="ij")
    large, small = (sum((a - c) ** 2 for a in axes) < r for c, r in [(0.1, 0.45), (-0.2, 0.1)])
    return (large + 0.5 * small).expand(1, *size).clone()


@pytest.fixture(scope="module", params=DEEPINV)
def fitted(request):
    physics, size = DEEPINV[request.param]()
    return physics, two_balls(size), fit_normal_operator(physics, size, probes=12, iterations=3)


def error_of_identity(physics, x):
    """The relative error of the best multiple of the identity in place of AᵀA, on x."""
    nx = physics.A_adjoint_A(x)
    return float((nx - (nx * x).sum() / x.square().sum() * x).norm() / nx.norm())


def test_fit_beats_the_identity_by_far_on_an_image(fitted):
    physics, x, h = fitted
    assert h.relative_error(physics, x) < 0.5 * error_of_identity(physics, x) + 1e-3


@pytest.mark.parametrize("holes", ["single pixels", "corner", "middle"])
@pytest.mark.parametrize("shape", [(20, 20), (12, 16, 18)])
def test_inpainting_is_a_mask_alone(shape, holes):
    mask = torch.ones(1, *shape)
    if holes == "single pixels":
        mask = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    else:
        start = 2 if holes == "corner" else 4
        mask[(..., *(slice(start, start + n // 2) for n in shape))] = 0
    physics = dinv.physics.Inpainting(tuple(mask.shape), mask)
    h = fit_normal_operator(physics, tuple(mask.shape), probes=12, iterations=3)
    assert h.relative_error(physics, two_balls(mask.shape)) < 0.05


def total_variation(name, h, iterations):
    step = (1 if name in GRADIENT else 5) / h.sqnorm()
    return getattr(dinv.optim, name)(
        dinv.optim.L2(), TVPrior(), lambda_reg=1e-3 * h.sqnorm(), stepsize=step, max_iter=iterations
    )


@pytest.mark.parametrize("name", ["PGD", "FISTA", "ADMM", "HQS"])
def test_algorithms_with_a_fit_come_closer_to_those_with_the_physics(fitted, name):
    """Closer than with a multiple of the identity in place of AᵀA."""
    physics, truth, h = fitted
    wrapper = DiagCirculantWrapper(physics, truth.shape[1:], operator=h)
    with torch.no_grad():
        y = physics.A(truth)
        b = wrapper.backproject(y)
        strength = float((physics.A_adjoint_A(truth) * truth).sum() / truth.square().sum())
        identity = NormalPhysics(lambda x: strength * x, tuple(truth.shape[1:]))
        solve = total_variation(name, h, 4)
        found, simpler, expected = solve(b, wrapper), solve(b, identity), solve(y, physics)
    assert (found - expected).norm() < 0.85 * (simpler - expected).norm() + 0.01 * truth.norm()


@pytest.mark.parametrize("name", ["PGD", "ADMM", "HQS"])
def test_patches_reduce_the_data_term(fitted, name):
    """Of deepinv's physics, which do not all say how large their volumes are; with H about as with the physics."""
    physics, truth, h = fitted
    recon = PartitionedReconstructor(total_variation(name, h, 6), patch_size=12, init="zeros", global_steps=0)
    with torch.no_grad():
        y = physics.A(truth)
        approximate, exact = ([u.figures for u in recon.stream(y, physics, operator=o)] for o in (h, None))
    for figures in (approximate, exact):
        assert figures[-1]["residual"] < 0.8 * figures[0]["residual"]
        assert all(f["data_term"] < 0 for f in figures[1:])
    for a, e in zip(approximate[1:], exact[1:], strict=True):
        assert a["data_term"] == pytest.approx(e["data_term"], rel=0.15)


def test_measurements_that_are_the_volume_are_left_alone():
    """Of an identity, A x is x itself: what is shown must not become the residual."""
    y = noise(1, 1, 10, 12, 14)
    pgd = algorithm("PGD", dinv.optim.ZeroPrior(), iterations=20)
    with torch.no_grad():
        found = PartitionedReconstructor(pgd, patch_size=8, init="zeros", global_steps=0)(y, dinv.physics.Denoising())
    assert close(found, y, 1e-3)


# -- as the design has it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 3])
def test_the_public_names_run_as_they_stand(terms):
    path, shape, voxel_size, device = sample_data.path(), (17, 18, 16), 2.0, "cpu"
    scan = nr.open_scan(path, views=30)
    physics = nr.XRayTransform.from_scan(scan, shape=shape, voxel_size=voxel_size, device=device)
    y = scan.measurements(device)
    x_fdk = nr.FDK()(y, physics)
    normal = nr.fit_normal_operator(physics, terms=terms)
    assert normal.fourier_filter.ndim == (3 if terms == 1 else 4)
    assert normal.history
    assert normal.errors
    base = dinv.optim.PGD(
        data_fidelity=dinv.optim.L2(), prior=nr.TVPrior(), lambda_reg=0.0, stepsize=1 / physics.sqnorm, max_iter=6
    )
    img_size = physics.img_size
    wrapped = nr.DiagCirculantWrapper(physics=physics, img_size=img_size, scaling=1.0, device=device)
    recon = nr.PartitionedReconstructor(base_reconstructor=base, img_size=img_size, patch_size=10, stride=5)
    exact = recon(y, physics)
    x_hat = recon(y, wrapped, fourier_filter=normal.fourier_filter, spatial_mask=normal.spatial_mask)
    for update in recon.stream(y, physics):
        shown = update.figures
    assert update.next_box is None
    assert shown["residual"] < 1

    def residual(x):
        return float((physics.A(x) - y).norm() / y.norm())

    assert residual(x_hat) < residual(x_fdk)
    assert residual(exact) < residual(x_fdk)
    assert torch.equal(x_hat, recon(y, wrapped, operator=normal))  # the two tensors say all of it
    assert nr.DiagonalCirculantWrapper is nr.DiagCirculantWrapper
