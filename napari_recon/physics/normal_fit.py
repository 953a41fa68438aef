"""Fitting the normal operator: m and λ from what AᵀA does to random volumes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from deepinv.physics import LinearPhysics
from deepinv.physics.mri import MRIMixin
from torch import Tensor

from napari_recon.physics.normal_operator import (
    MODULATIONS,
    NormalOperator,
    fft_shape,
    forward_transform,
    inverse_transform,
)
from napari_recon.scans.errors import ScanError

Distribution = Literal["mixed", "white", "image", "residual"]


@dataclass(frozen=True)
class FitUpdate:
    """One step of a fit.

    Attributes
    ----------
    stage
        What was done: "point spread", "probes", "fitting" or "done".
    step, total
        The step just done, from 1, and how many there will be at most.
    operator
        The operator so far; None before there is one.
    figures
        In the stage "fitting": ``loss`` (relative error on the probes), ``held_out`` (on fresh volumes of their
        kind), ``image`` (on an image-like one), ``seconds``. When done also the errors.
    """

    stage: str
    step: int
    total: int
    operator: NormalOperator | None = None
    figures: dict[str, float] = field(default_factory=dict)


def fit_normal_operator(
    physics: LinearPhysics, img_size: Sequence[int] | None = None, **options: Any
) -> NormalOperator:
    """Fit m and λ so that H ≈ AᵀA; the last word of :func:`stream_normal_operator_fit`, whose options it takes.

    Parameters
    ----------
    physics
        Any deepinv LinearPhysics on volumes (B, C, D, H, W) or images (B, C, H, W).
    img_size
        (C, *spatial) or (*spatial); by default ``physics.img_size``.
    **options
        terms, symmetric, probes, iterations, distribution, seed, ...

    Returns
    -------
    NormalOperator
        With ``history`` and ``errors`` filled in.
    """
    operator = None
    for update in stream_normal_operator_fit(physics, img_size, **options):
        operator = update.operator
    assert operator is not None
    return operator


def stream_normal_operator_fit(
    physics: LinearPhysics,
    img_size: Sequence[int] | None = None,
    *,
    terms: int = 1,
    symmetric: bool = True,
    probes: int = 8,
    iterations: int = 4,
    positions: int = 5,
    distribution: Distribution = "mixed",
    held_out: int = 1,
    support: int | None = None,
    mask_step: int = 1,
    complex_image: bool | None = None,
    real_filter: bool | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Iterator[FitUpdate]:
    """Fit m and λ by alternating least squares on random volumes, one :class:`FitUpdate` a step.

    Minimises the mean of ‖AᵀA x − H x‖² / ‖AᵀA x‖² over random volumes x. The kernel starts from the mean of
    point-spread functions at a few positions, the mask from the diagonal of AᵀA that the probes themselves tell
    (Hutchinson's estimator). Then, in turn, the kernel takes two conjugate-gradient steps with exact line search, on
    the residuals, preconditioned by how often each offset occurs under the mask; and the mask two damped least-squares
    updates. Symmetries of the scan (mirror images, a quarter turn) are found by trying them, and then every probe
    counts for all of its mirror images.

    Parameters
    ----------
    physics, img_size
        As for :func:`fit_normal_operator`.
    terms
        Kernels: 1 as in the paper; 3 lets the kernel vary with |z| and x² + y² (in 2D with y² and x²), at three
        times the cost of applying H.
    symmetric
        diag(m) C diag(m)^* (the default), or the paper's diag(m) C.
    probes
        Random volumes. One costs one A and one Aᵀ, and three volumes of memory.
    iterations
        Rounds of kernel and mask; ends earlier when the held-out errors stop falling.
    positions
        Point-spread functions for the start, one A and one Aᵀ each.
    distribution
        "white" (random signs, as in the paper), "image" (1/f spectrum), "residual" (rough, on half-size patches), or
        "mixed": white and image in turn. On white noise alone the lowest frequencies, few among many but where AᵀA is
        largest, are fitted worst.
    held_out
        Volumes for the held-out error.
    support
        Largest offset of the kernel in voxels; None keeps all.
    mask_step
        Resolution of the mask: it is linear between points so many voxels apart.
    complex_image
        Whether the 2 channels are a complex volume; None asks the physics (deepinv's MRI).
    real_filter
        Whether λ is real, that is, C symmetric; None: with ``symmetric``.
    seed
        Of the random volumes.
    device
        Where the operator lives; by default where the physics computes.

    Raises
    ------
    ScanError
        If the physics does not tell its volume's size and ``img_size`` is missing, or an option is out of range.
    """
    if complex_image is None:
        complex_image = isinstance(physics, MRIMixin)
    size = img_size
    if size is None:
        # deepinv's MultiCoilMRI says (320, 320) where it is not told; its coil maps (B, coils, *spatial) know.
        maps = getattr(physics, "coil_maps", None)
        size = (2, *maps.shape[2:]) if isinstance(maps, Tensor) else getattr(physics, "img_size", None)
    if size is None:
        raise ScanError("The physics does not say how large its volumes are; pass img_size=(C, D, H, W).")
    channels, shape = _split_size(size, physics, complex_image)
    if terms not in MODULATIONS[len(shape)]:
        raise ScanError(f"A normal operator in {len(shape)}D has {sorted(MODULATIONS[len(shape)])} terms, not {terms}.")
    if distribution not in get_args(Distribution):
        raise ScanError(
            f"The distribution {distribution!r} is unknown: use one of {', '.join(get_args(Distribution))}."
        )
    if probes < 1 or iterations < 0 or positions < 1 or held_out < 1 or mask_step < 1:
        raise ScanError(
            "A fit needs at least one probe, one position, one held-out volume, a mask step of at least one voxel, and "
            "no negative iterations."
        )
    if device is None:
        device = _device_of(physics)
    fit = _Fit(physics, channels, shape, complex_image, symmetric, terms, support, torch.device(device), seed)
    fit.real_filter = symmetric if real_filter is None else real_filter
    fit.mask_step = mask_step
    settings = {
        "terms": terms,
        "symmetric": symmetric,
        "real_filter": fit.real_filter,
        "probes": probes,
        "iterations": iterations,
        "positions": positions,
        "distribution": distribution,
        "held_out": held_out,
        "support": support,
        "mask_step": mask_step,
        "seed": seed,
    }
    started = time.perf_counter()
    total = positions + probes + held_out + 1 + iterations + 1
    step = 0
    for _ in fit.point_spread(positions):
        step += 1
        yield FitUpdate("point spread", step, total)
    for _ in fit.draw(probes, held_out, distribution):
        step += 1
        yield FitUpdate("probes", step, total)
    fit.start_mask()
    history: list[dict[str, float]] = []

    def row(iteration: int) -> dict[str, float]:
        figures = fit.figures() | {"iteration": float(iteration), "seconds": time.perf_counter() - started}
        history.append(figures)
        return figures

    def score(figures: dict[str, float]) -> float:
        return math.sqrt(figures["held_out"] * figures["image"])

    figures = row(0)
    best, lowest = fit.operator(settings), score(figures)
    yield FitUpdate("fitting", step, total, best, figures)
    for iteration in range(1, iterations + 1):
        fit.kernel_steps(2)
        fit.mask_steps(2)
        fit.kernel_steps(1)
        figures = row(iteration)
        step += 1
        gain = 1 - score(figures) / lowest
        if gain > 0:
            best, lowest = fit.operator(settings), score(figures)
        yield FitUpdate("fitting", step, total, best, figures)
        if gain < 5e-3:
            break
    best.history = history
    best.errors = fit.errors(best)
    yield FitUpdate("done", total, total, best, figures | best.errors)


class _Fit:
    """The state of a fit: kernels, mask, probes. Volumes are (K, 1, *shape), complex where the image is."""

    def __init__(
        self,
        physics: LinearPhysics,
        channels: int,
        shape: tuple[int, ...],
        complex_image: bool,
        symmetric: bool,
        terms: int,
        support: int | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self.physics, self.channels, self.shape, self.complex = physics, channels, shape, complex_image
        self.symmetric, self.terms, self.support, self.device = symmetric, terms, support, device
        self.real_filter, self.mask_step = symmetric, 1
        self.lengths, self.axes = fft_shape(shape), tuple(range(-len(shape), 0))
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = torch.ones(shape, device=device)
        self.kernel = torch.zeros((terms, *self.lengths), device=device)
        if complex_image:
            self.kernel, self.mask = self.kernel.to(torch.complex64), self.mask.to(torch.complex64)
        self.mirrors: list[tuple[int, ...]] = []  # flipped axes
        self.diagonal: Tensor | None = None
        self.quarter_turn = False
        self.smooth = True  # whether the mask changes slowly
        self.modulations = [w[0, 0] for w in self._as_operator(self.mask, self._spectrum(self.kernel)).modulations()]

    # -- the exact operator ---------------------------------------------------------------------------------------

    def exact(self, x: Tensor) -> Tensor:
        """AᵀA x for one volume (1, 1, *shape)."""
        if self.complex:
            pair = torch.view_as_real(x[:, 0]).movedim(-1, 1).contiguous()
            return torch.view_as_complex(self.physics.A_adjoint_A(pair).movedim(1, -1).contiguous()).unsqueeze(1)
        if self.channels > 1:  # physics that act alike on every channel
            x = x.expand(-1, self.channels, *self.shape).contiguous()
        return self.physics.A_adjoint_A(x)[:, :1]

    # -- start ----------------------------------------------------------------------------------------------------

    def point_spread(self, positions: int) -> Iterator[None]:
        """The kernel as a mean of point-spread functions, at the centre and at random places around it."""
        for index in range(positions):
            if index == 0:
                at = [n // 2 for n in self.shape]
            else:
                at = [
                    int(torch.randint(n // 4, max(n // 4 + 1, n - n // 4), (1,), generator=self.generator))
                    for n in self.shape
                ]
            x = torch.zeros((1, 1, *self.shape), dtype=self.mask.dtype, device=self.device)
            x[(0, 0, *at)] = 1
            spread = self.exact(x)[0, 0]
            padded = self.kernel.new_zeros(self.lengths)
            padded[tuple(slice(0, n) for n in self.shape)] = spread
            self.kernel[0] += torch.roll(padded, [-a for a in at], self.axes) / positions
            yield
        if not bool(self.kernel[0].flatten()[0].real > 0):  # AᵀA vanishes at every position, as in inpainting's hole
            self.kernel[0].flatten()[0] = 1
        self.kernel = self._projected(self.kernel)

    def draw(self, probes: int, held_out: int, distribution: Distribution) -> Iterator[None]:
        """Pairs (x, AᵀA x); and which mirror images of the scan are the scan."""
        pairs = []
        for index in range(probes + held_out + 1):
            # The last one is always like an image: on white noise alone a fit can gain where images lose.
            kind: Distribution = "image" if index == probes + held_out else distribution
            x = self._random(kind).to(self.device)
            pairs.append((x, self.exact(x)))
            if index == 0:
                self._find_symmetries(*pairs[0])
            yield
        self.x = torch.cat([x for x, _ in pairs[:probes]])
        self.nx = torch.cat([nx for _, nx in pairs[:probes]])
        self.held_x = torch.cat([x for x, _ in pairs[probes:]])
        self.held_nx = torch.cat([nx for _, nx in pairs[probes:]])
        self.weights = 1 / self.nx.abs().square().flatten(1).sum(1)
        self.distribution = distribution
        first, second = self._diagonal(slice(0, None, 2)), self._diagonal(slice(1, None, 2))
        self.smooth = probes < 2 or not _rough(first, second)
        if distribution == "white" or not self.smooth:
            self.diagonal = self._diagonal(slice(None))
        self.kernel = self._projected(self.kernel)

    def _diagonal(self, chosen: slice) -> Tensor:
        """The diagonal of AᵀA as some probes tell it (*shape): Hutchinson's estimator, exact where AᵀA is diagonal."""
        x, nx = self.x[chosen], self.nx[chosen]
        return (nx * x.conj()).real.sum((0, 1)) / x.abs().square().sum((0, 1)).clamp(min=1e-12)

    def _find_symmetries(self, x: Tensor, nx: Tensor) -> None:
        """Keep the reflections R with AᵀA R x = R AᵀA x, to a tenth; the scan is then the same seen in that mirror."""

        def alike(image: Any) -> bool:
            return bool((self.exact(image(x)) - image(nx)).norm() < 0.1 * nx.norm())

        single = [a for a, n in zip(self.axes, self.shape, strict=True) if n > 1 and alike(lambda v, a=a: v.flip(a))]
        self.mirrors = [()]
        for axis in single:
            self.mirrors += [(*m, axis) for m in self.mirrors]
        if self.shape[-1] == self.shape[-2]:
            self.quarter_turn = alike(lambda v: v.transpose(-1, -2))

    def _over_symmetries(self, x: Tensor, wrapped: bool = False) -> Tensor:
        """The mean over the scan's mirror images; ``wrapped`` for kernels, whose offset 0 is at index 0."""
        for axis in (m[0] for m in self.mirrors if len(m) == 1):
            image = x.flip(axis)
            x = (x + (image.roll(1, axis) if wrapped else image)) / 2
        if self.quarter_turn:
            x = (x + x.transpose(-1, -2)) / 2
        return x

    def _random(self, distribution: Distribution) -> Tensor:
        def noise() -> Tensor:
            return torch.randn((1, 1, *self.shape), generator=self.generator)

        if distribution == "mixed":
            return (self._random("white") + self._random("image")) / math.sqrt(2)
        if distribution == "white":
            signs = torch.randint(0, 2, (2, 1, 1, *self.shape), generator=self.generator, dtype=torch.float32) * 2 - 1
            return torch.complex(signs[0], signs[1]) / math.sqrt(2) if self.complex else signs[0]
        x = torch.complex(noise(), noise()) if self.complex else noise()
        grids = [torch.fft.fftfreq(n) for n in self.shape]
        squared = torch.zeros(self.shape)
        for axis, f in enumerate(grids):
            spread = [1] * len(self.shape)
            spread[axis] = -1
            squared = squared + (f**2).reshape(spread)
        lowest = 1 / max(self.shape)
        amplitude = squared.clamp(min=lowest**2).sqrt() ** (-1.0 if distribution == "image" else -0.5)
        x = torch.fft.ifftn(torch.fft.fftn(x, dim=self.axes) * amplitude, dim=self.axes)
        x = x if self.complex else x.real
        if distribution == "residual":
            box = []
            for n in self.shape:
                half = max(1, n // 2)
                start = int(torch.randint(0, n - half + 1, (1,), generator=self.generator))
                box.append(slice(start, start + half))
            window = torch.zeros(self.shape)
            window[tuple(box)] = 1
            x = (x - x.mean()) * window
        return (x / x.abs().square().mean().sqrt()).contiguous()

    def start_mask(self) -> None:
        """Start from m = sqrt(diag(AᵀA) / C₀(0)), the diagonal from the probes, smoothed; and u = C(m x) of them."""
        if self.diagonal is not None:
            centre = self.kernel[0].flatten()[0].real.clamp(min=1e-30)
            ratio = (self._coarse(self._over_symmetries(self.diagonal)) / centre).clamp(min=1e-3)
            self.cells = (ratio.sqrt() if self.symmetric else ratio).to(self.mask.dtype)
        else:
            self.cells = self._coarse(self.mask)
        self.mask = self._fine(self.cells)
        self._refresh()

    # -- alternating least squares --------------------------------------------------------------------------------

    def _masked(self, x: Tensor) -> Tensor:
        return self.mask.conj() * x if self.symmetric else x

    def _refresh(self) -> None:
        operator = self._as_operator(self.mask, self._spectrum(self.kernel))
        self.u = torch.cat([operator.convolve(self._masked(x)) for x in self.x.split(1)])

    def kernel_steps(self, steps: int) -> None:
        """Preconditioned conjugate gradients on the kernels, with exact line search."""
        precondition = self._preconditioner()
        last_step = last_gradient = direction = torch.empty(0)
        for index in range(steps):
            gradient = self._kernel_gradient()
            step = self._projected(precondition(gradient))
            if index:  # Polak-Ribière, never negative
                beta = _inner(step, gradient - last_gradient) / max(_inner(last_step, last_gradient), 1e-30)
                direction = step + max(0.0, beta) * direction
            else:
                direction = step
            last_step, last_gradient = step, gradient
            moved = self._as_operator(self.mask, self._spectrum(direction))
            numerator = denominator = 0.0
            changes = []
            for k, x in enumerate(self.x.split(1)):
                du = moved.convolve(self._masked(x))
                dh = self.mask * du
                residual = self.nx[k : k + 1] - self.mask * self.u[k : k + 1]
                weight = float(self.weights[k])
                numerator += weight * _inner(dh, residual)
                denominator += weight * _inner(dh, dh)
                changes.append(du)
            if denominator <= 0:
                return
            length = numerator / denominator
            self.kernel += length * direction
            for k, du in enumerate(changes):
                self.u[k : k + 1] += length * du

    def _kernel_gradient(self) -> Tensor:
        """Minus the gradient by every C_k, as wrapped kernels: correlations of x' = m x with m (AᵀA x − H x)."""
        spectra: list[Any] = [0.0] * self.terms
        for k, x in enumerate(self.x.split(1)):
            masked = self._masked(x)
            residual = self.mask.conj() * (self.nx[k : k + 1] - self.mask * self.u[k : k + 1]) * self.weights[k]
            fx = self._transform(masked)
            fr = self._transform(residual)
            for i, w in enumerate(self.modulations, 1):
                spectra[i] += self._correlated(fx, self._transform(0.5 * w * residual))
                spectra[i] += self._correlated(self._transform(0.5 * w * masked), fr)
            spectra[0] += self._correlated(fx, fr)
        return torch.stack([self._kernel_of(s) for s in spectra])

    def _transform(self, x: Tensor) -> Tensor:
        """The padded spectrum of one volume (1, 1, *shape), without its leading axes."""
        return forward_transform(x, self.lengths, self.complex)[0, 0]

    def _correlated(self, a: Tensor, b: Tensor) -> Tensor:
        """conj(a) b, or only its real part where λ is real."""
        if not self.real_filter:
            return a.conj() * b
        return torch.addcmul(a.real * b.real, a.imag, b.imag)

    def _preconditioner(self) -> Any:
        """An approximate inverse of the kernels' Hessian.

        For white volumes it is diagonal over offsets: how much mass under the mask each offset sees. For others it is
        rather diagonal over frequencies: their power spectrum.
        """
        weight = float(self.weights.sum())
        if self.distribution != "white":
            power = torch.zeros(())
            for x in self.x.split(1):
                power = power + self._transform(self._masked(x)).abs().square()
            power = (power + 1e-3 * power.mean()) * (weight / len(self.x))
            return lambda g: torch.stack(
                [self._kernel_of(forward_transform(c, self.lengths, self.complex) / power) for c in g]
            )
        m2 = self.mask.abs().square()
        in2 = m2 if self.symmetric else torch.ones_like(m2)

        def correlation(a: Tensor, b: Tensor) -> Tensor:
            fa = forward_transform(a[None, None], self.lengths, False)[0, 0]
            fb = fa if b is a else forward_transform(b[None, None], self.lengths, False)[0, 0]
            return inverse_transform((fa.conj() * fb)[None, None].real.to(fa.dtype), self.lengths, self.lengths, False)[
                0, 0
            ]

        counts = [correlation(in2, m2)]
        for w in self.modulations:
            same = correlation(w * in2, w * m2)
            crossed = (correlation(w * w * in2, m2) + correlation(in2, w * w * m2)) / 2
            counts.append((same + crossed) / 2)
        scale = torch.stack([1 / (c.clamp(min=0) + 1e-5 * c.max()) for c in counts]) / weight
        return lambda gradient: gradient * scale

    def mask_steps(self, steps: int) -> None:
        """Damped least-squares updates of the mask, voxel by voxel over all probes and mirror images."""
        for _ in range(steps):
            weights = self.weights.reshape(-1, *[1] * (self.x.ndim - 1))
            top = (weights * self.nx * self.u.conj()).sum((0, 1))
            bottom = (weights * self.u.abs().square()).sum((0, 1))
            top, bottom = self._over_symmetries(top), self._over_symmetries(bottom)
            top, bottom = self._coarse(top), self._coarse(bottom)
            ridge = 0.05 * bottom.mean()
            estimate = (top + ridge * self.cells) / (bottom + ridge)
            self.cells = (self.cells + estimate) / 2 if self.symmetric else estimate
            self.mask = self._fine(self.cells)
            self._refresh()

    def _coarse(self, x: Tensor) -> Tensor:
        """What of a volume (*shape) the mask can follow: smoothed, or the means over cells of ``mask_step`` voxels."""
        if self.mask_step > 1:
            return _pooled(x, self.mask_step)
        return _smooth(x) if self.smooth else x

    def _fine(self, cells: Tensor) -> Tensor:
        """The mask of its cells: linear between their middles."""
        return cells if self.mask_step == 1 else _interpolated(cells, self.shape, self.mask_step)

    # -- read off -------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """Relative errors on the probes (``loss``), on held-out volumes of their kind, and on an image-like one."""
        loss = ((self.nx - self.mask * self.u).abs().square().flatten(1).sum(1) * self.weights).mean().sqrt()
        operator = self._as_operator(self.mask, self._spectrum(self.kernel))
        errors = []
        for x, nx in zip(self.held_x.split(1), self.held_nx.split(1), strict=True):
            h = self.mask * operator.convolve(self._masked(x))
            errors.append(float((nx - h).norm() / nx.norm()))
        image = errors.pop()
        return {"loss": float(loss), "held_out": math.sqrt(sum(e * e for e in errors) / len(errors)), "image": image}

    def operator(self, settings: dict[str, Any]) -> NormalOperator:
        """The operator now; the mask's mean over the central half is 1, and λ carries AᵀA's unit."""
        centre = tuple(slice(n // 4, max(n // 4 + 1, n - n // 4)) for n in self.shape)
        scale = self.mask[centre].abs().mean().clamp(min=1e-30)
        factor = scale**2 if self.symmetric else scale
        spectrum = self._spectrum(self.kernel) * factor
        operator = self._as_operator((self.mask / scale).clone(), spectrum)
        operator.settings = settings
        return operator

    def errors(self, operator: NormalOperator) -> dict[str, float]:
        """Relative errors on fresh volumes: white noise, image-like, and residual-like on a half-size patch.

        The last is measured on the patch alone, which is what a partitioned data step meets.
        """
        found = {}
        for name in ("white", "image", "residual"):
            x = self._random(name).to(self.device)  # type: ignore[arg-type]
            nx = self.exact(x)
            masked = operator.spatial_mask.conj() * x if self.symmetric else x
            h = operator.spatial_mask * operator.convolve(masked)
            within = (x != 0) if name == "residual" else torch.ones_like(x, dtype=torch.bool)
            found[name] = float((nx - h)[within].norm() / nx[within].norm().clamp(min=1e-30))
        return found

    def _as_operator(self, mask: Tensor, spectrum: Tensor) -> NormalOperator:
        return NormalOperator(mask, spectrum if self.terms > 1 else spectrum[0], self.symmetric)

    def _spectrum(self, kernel: Tensor) -> Tensor:
        """λ of wrapped kernels (terms, *lengths)."""
        s = torch.stack([forward_transform(c, self.lengths, self.complex) for c in kernel])
        return s.real.contiguous() if self.real_filter else s

    def _kernel_of(self, spectrum: Tensor) -> Tensor:
        """The wrapped kernel of a spectrum, real or not."""
        if self.real_filter:
            spectrum = spectrum.real
        return inverse_transform(spectrum.to(torch.complex64), self.lengths, self.lengths, self.complex)

    def _projected(self, kernel: Tensor) -> Tensor:
        """Kernels made to fit: symmetric where λ is real, like the scan's mirror images, within the support."""
        if self.real_filter:
            reflected = kernel.flip(self.axes).roll([1] * len(self.axes), self.axes)
            kernel = (kernel + reflected.conj()) / 2
        if self.mirrors:
            kernel = self._over_symmetries(kernel, wrapped=True)
        for axis, n, length in zip(self.axes, self.shape, self.lengths, strict=True):
            reach = n - 1 if self.support is None else min(self.support, n - 1)
            if length > 2 * reach + 1:
                kernel = kernel.clone()
                kernel.narrow(axis, reach + 1, length - 2 * reach - 1).zero_()
        return kernel


def _split_size(size: Sequence[int], physics: LinearPhysics, complex_image: bool) -> tuple[int, tuple[int, ...]]:
    """(channels, spatial shape) of (C, D, H, W), (C, H, W) or (D, H, W); the physics tells three numbers apart."""
    size = tuple(int(n) for n in size)
    own = getattr(physics, "img_size", None)
    own = tuple(int(n) for n in own) if own is not None else None
    if complex_image and len(size) in (2, 3) and size[0] != 2:
        return 2, size
    if len(size) == 4:
        return size[0], size[1:]
    if len(size) == 3 and (own is None or len(own) != 4):
        return size[0], size[1:]  # deepinv's (C, H, W)
    if len(size) == 3 and own is not None:
        return own[0], size
    if len(size) == 2:
        return 1, size
    raise ScanError(f"img_size {size} must be (C, D, H, W), (D, H, W) or, for images, (C, H, W).")


def _device_of(physics: LinearPhysics) -> torch.device:
    for tensor in [*physics.buffers(), *physics.parameters()]:
        return tensor.device
    return torch.device("cpu")


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.vdot(a.flatten(), b.flatten()).real)


def _rough(first: Tensor, second: Tensor) -> bool:
    """Whether the diagonal of AᵀA, estimated twice, changes from voxel to voxel, as inpainting's does.

    Both estimates then agree on what smoothing takes away; on their noise they do not.
    """
    first, second = first - _smooth(first), second - _smooth(second)
    return _inner(first, second) > 0.5 * float(first.norm() * second.norm())


def _smooth(x: Tensor) -> Tensor:
    """The mean over each voxel's 3 x 3 x 3 neighbours (those that exist): the mask changes slowly."""
    if x.is_complex():
        return torch.complex(_smooth(x.real), _smooth(x.imag))
    pool = {2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[x.ndim]
    width = tuple(3 if n > 2 else 1 for n in x.shape)  # a fan beam's volume is one slice
    return pool(x[None, None], width, stride=1, padding=tuple(n // 2 for n in width), count_include_pad=False)[0, 0]


def _pooled(x: Tensor, step: int) -> Tensor:
    """Means over cells of ``step`` voxels an axis; the last ones may be smaller."""
    if x.is_complex():
        return torch.complex(_pooled(x.real, step), _pooled(x.imag, step))
    pool = {2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[x.ndim]
    width = tuple(min(step, n) for n in x.shape)
    return pool(x[None, None], width, ceil_mode=True, count_include_pad=False)[0, 0]


def _interpolated(cells: Tensor, shape: Sequence[int], step: int) -> Tensor:
    """A volume of ``shape`` that is linear between the middles of cells of ``step`` voxels."""
    if cells.is_complex():
        return torch.complex(_interpolated(cells.real, shape, step), _interpolated(cells.imag, shape, step))
    width = tuple(min(step, n) for n in shape)
    mode = "trilinear" if cells.ndim == 3 else "bilinear"
    whole = tuple(c * w for c, w in zip(cells.shape, width, strict=True))
    fine = torch.nn.functional.interpolate(cells[None, None], size=whole, mode=mode, align_corners=False)[0, 0]
    return fine[tuple(slice(0, n) for n in shape)].contiguous()
