"""Total variation: the prior with a fast proximal operator, and least squares with it over the whole volume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import deepinv as dinv
import numpy as np
import torch
from deepinv.physics import LinearPhysics
from numba import njit, prange
from torch import Tensor

from napari_recon.physics.projectors import FAST, kernel_lock
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.reconstruction.start import (
    Start,
    brightness,
    data_gradient,
    data_square,
    data_volume,
    is_mri,
    is_xray,
    operator_sqnorm,
    start_volume,
)
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError

WEIGHT_PER_VIEW = 0.04
"""Relative weight of TV per view and voxel across, with ramp-filtered residuals..."""

LARGEST_WEIGHT = 0.01
"""... as long as views are missing; from a quarter as many views as voxels on, the weight stays."""

WEIGHT_OF_MRI = 2e-3
"""Relative weight of TV where k-space is 5 to 10 times undersampled."""


class TVPrior(dinv.optim.Prior):
    r"""Isotropic total variation, optionally of non-negative volumes, with a proximal operator made for iterating.

    .. math:: g(x) = \sum_i \|(\nabla x)_i\|_2 \quad (+ \infty \text{ where } x < 0)

    with forward differences and no difference across the border, over the spatial axes of (B, C, D, H, W) or
    (B, C, H, W); batch and channels are separate volumes. The proximal operator

    .. math:: \operatorname{prox}_{\gamma g}(v) = \arg\min_x \tfrac12 \|x - v\|^2 + \gamma\, g(x)

    is computed on the dual by the fast gradient projection of Beck and Teboulle (IEEE Trans. Image Process. 18(11),
    2009), restarted where the momentum points uphill. The dual is kept from call to call: inside a proximal gradient
    method ten inner iterations do then. On the CPU two fused, threaded kernels make an iteration; elsewhere, and where
    a gradient is wanted, the same is written in torch.

    Parameters
    ----------
    iterations
        At most so many inner iterations a call.
    tolerance
        Stop when the volume changes by less than this part of its norm in an iteration.
    nonnegative
        Whether values below zero are forbidden.
    """

    def __init__(self, iterations: int = 10, tolerance: float = 1e-5, nonnegative: bool = False) -> None:
        super().__init__()
        self.explicit_prior = True
        self.iterations, self.tolerance, self.nonnegative = int(iterations), float(tolerance), bool(nonnegative)
        self._dual: Tensor | None = None
        self._last: Tensor | None = None

    def reset(self) -> None:
        """Forget the dual: what comes next has nothing to do with what was before (another patch, say)."""
        self._dual = self._last = None

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The total variation of each volume of the batch, (B,)."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and not (x.requires_grad and torch.is_grad_enabled()):
            volumes = x.detach().contiguous().flatten(0, 1).numpy()
            volumes = volumes.reshape(len(volumes), *[1] * (5 - x.ndim), *x.shape[2:])
            with kernel_lock:
                found = [float(_total_variation(volume)) for volume in volumes]
            return torch.tensor(found, dtype=x.dtype).reshape(x.shape[:2]).sum(1)
        return differences(x).square().sum(0).sqrt().flatten(1).sum(1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A subgradient: zero is chosen where the differences vanish."""
        difference = differences(x)
        length = difference.square().sum(0).sqrt()
        return divergence_adjoint(difference / torch.where(length > 0, length, 1.0))

    def prox(self, x: Tensor, *args: Any, gamma: float | Tensor = 1.0, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """argmin_u ½‖u − x‖² + gamma g(u), of x's shape; gamma a number, or one for each volume of the batch (B,)."""
        if x.ndim not in (4, 5):
            raise ScanError(f"Total variation needs (B, C, D, H, W) or (B, C, H, W); got {tuple(x.shape)}.")
        weights = torch.as_tensor(gamma, dtype=x.dtype, device=x.device).flatten().expand(x.shape[0])
        if not bool((weights > 0).all()):
            if bool((weights < 0).any()):
                raise ScanError(f"The weight of total variation must not be negative, but is {float(weights.min())}.")
            if not bool((weights > 0).any()):
                return x.clamp(min=0) if self.nonnegative else x
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            return self._prox_torch(x, weights, None)[0]
        dual = self._warm_dual(x, weights)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            out, dual = self._prox_numba(x, weights, dual)
        else:
            out, dual = self._prox_torch(x, weights, dual)
        self._dual, self._last = dual, weights.clone()
        return out

    def _warm_dual(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """The last call's dual p (axes, *x.shape), |p| <= gamma, rescaled to the new gamma."""
        dual, last = self._dual, self._last
        if (
            dual is None
            or last is None
            or dual.shape[1:] != x.shape
            or dual.dtype != x.dtype
            or dual.device != x.device
        ):
            return None
        if not torch.equal(last, weights):
            ratio = torch.where(last > 0, weights / last.clamp(min=1e-30), torch.zeros_like(last))
            dual = dual * ratio.reshape(-1, *[1] * (x.ndim - 1))
        return dual

    def _prox_numba(self, x: Tensor, weights: Tensor, dual: Tensor | None) -> tuple[Tensor, Tensor]:
        axes, shape = x.ndim - 2, x.shape
        volumes = x.detach().contiguous().numpy().reshape(shape[0] * shape[1], *([1] if axes == 2 else []), *shape[2:])
        out = np.empty_like(volumes)
        if dual is not None and axes == 3:
            p = dual.contiguous().numpy().reshape(3, *volumes.shape)  # it goes on in its own memory
        else:
            p = np.zeros((3, *volumes.shape), np.float32)
            if dual is not None:
                p[3 - axes :] = dual.numpy().reshape(axes, *volumes.shape)
        q, p_old = np.empty_like(p[:, 0]), None
        lipschitz = 4 * sum(n > 1 for n in shape[2:]) or 4
        lower = np.float32(0 if self.nonnegative else -3e38)  # no infinity: kernels are compiled without it
        for k in range(len(volumes)):
            weight = np.float32(weights[k // shape[1]])
            v, u, dual_k = volumes[k], out[k], p[:, k]
            q[:] = dual_k
            t, p_old = 1.0, dual_k
            for iteration in range(self.iterations):
                t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
                momentum = (t - 1) / t_next
                with kernel_lock:
                    change, size = _primal(v, q, lower, u, iteration > 0)
                    uphill = _dual_step(u, q, p_old, np.float32(1 / lipschitz), weight, np.float32(momentum))
                t = t_next
                if uphill > 0:  # adaptive restart (O'Donoghue and Candès 2015)
                    t = 1.0
                if iteration and change <= self.tolerance**2 * size:
                    break
            with kernel_lock:
                _primal(v, p_old, lower, u, False)
        return torch.from_numpy(out).reshape(shape), torch.from_numpy(p[3 - axes :]).reshape(axes, *shape)

    def _prox_torch(self, x: Tensor, weights: Tensor, dual: Tensor | None) -> tuple[Tensor, Tensor]:
        axes = x.ndim - 2
        weights = weights.reshape(-1, *[1] * (x.ndim - 1))
        lipschitz = 4 * sum(n > 1 for n in x.shape[2:]) or 4
        p = x.new_zeros((axes, *x.shape)) if dual is None else dual
        # Every volume (batch and channel) restarts and stops by itself: its company does not change it.
        inside = tuple(range(2, x.ndim))
        q, t = p, x.new_ones((*x.shape[:2], *[1] * axes))
        going, all_going = torch.ones_like(t, dtype=torch.bool), True

        def primal(d: Tensor) -> Tensor:
            u = x - divergence_adjoint(d)
            return u.clamp(min=0) if self.nonnegative else u

        u = x
        for iteration in range(self.iterations):
            before, u = u, primal(q)
            step = q + differences(u) / lipschitz
            length = step.square().sum(0)
            # max(|p|, gamma) without the infinite slope of the root at 0, for autograd
            scale = weights / torch.where(length > weights**2, length, weights**2 + 1e-37).sqrt()
            p_next = step * scale
            t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
            change = p_next - p
            q_next = p_next + (t - 1) / t_next * change
            uphill = ((q - p_next) * change).detach().sum(0).sum(inside, keepdim=True) > 0
            t = torch.where(uphill, 1.0, t_next)
            q, p = (q_next, p_next) if all_going else (torch.where(going, q_next, q), torch.where(going, p_next, p))
            if iteration:
                moved, size = ((v.detach().square().sum(inside, keepdim=True)) for v in (u - before, u))
                going = going & (moved > self.tolerance**2 * size)
                still = int(going.sum())
                if not still:
                    break
                all_going = still == going.numel()
        return primal(p), p


def differences(x: Tensor) -> Tensor:
    """Forward differences along the spatial axes, 0 at the far border: (axes, *x.shape)."""
    return torch.stack(
        [torch.nn.functional.pad(x.diff(dim=axis), [0, 0] * (x.ndim - 1 - axis) + [0, 1]) for axis in range(2, x.ndim)]
    )


def divergence_adjoint(p: Tensor) -> Tensor:
    """The transpose of :func:`differences`."""
    out = torch.zeros_like(p[0])
    for axis, part in enumerate(p, 2):
        inner = part.narrow(axis, 0, part.shape[axis] - 1)
        pad = [0, 0] * (part.ndim - 1 - axis)
        out = out - torch.nn.functional.pad(inner, [*pad, 0, 1]) + torch.nn.functional.pad(inner, [*pad, 1, 0])
    return out


@njit(parallel=True, **FAST)
def _total_variation(x: Any) -> Any:
    depth, height, width = x.shape
    total: Any = 0.0
    for task in prange(depth * height):
        k, j = task // height, task % height
        here, above, beyond = x[k, j], x[min(k + 1, depth - 1), j], x[k, min(j + 1, height - 1)]
        row = np.float32(0)
        for i in range(width):
            value = here[i]
            right = here[i + 1] if i < width - 1 else value
            dz, dy, dx = above[i] - value, beyond[i] - value, right - value
            row += np.sqrt(dz * dz + dy * dy + dx * dx)
        total += row
    return total


@njit(parallel=True, **FAST)
def _primal(v: Any, q: Any, lower: Any, u: Any, compare: bool) -> Any:
    """Set u = max(v - Dᵀq, lower); returns the squared norms of its change (if ``compare``) and of itself."""
    depth, height, width = v.shape
    change: Any = 0.0
    size: Any = 0.0
    for task in prange(depth * height):
        k, j = task // height, task % height
        source, target = v[k, j], u[k, j]
        qz, qy, qx = q[0, k, j], q[1, k, j], q[2, k, j]
        # Before the first row there is nothing; reading the row itself, times 0, keeps the loop free of branches.
        bz, by = q[0, max(k - 1, 0), j], q[1, k, max(j - 1, 0)]
        fz, fy = np.float32(k > 0), np.float32(j > 0)
        moved, total = np.float32(0), np.float32(0)
        for i in range(width):
            left = qx[i - 1] if i > 0 else np.float32(0)
            value = source[i] + (qz[i] - fz * bz[i]) + (qy[i] - fy * by[i]) + (qx[i] - left)
            value = value if value > lower else lower
            if compare:
                d = value - target[i]
                moved += d * d
            total += value * value
            target[i] = value
        change += moved
        size += total
    return change, size


@njit(parallel=True, **FAST)
def _dual_step(u: Any, q: Any, p: Any, step: Any, weight: Any, momentum: Any) -> Any:
    """p+ = q + step D u, projected onto |p| <= weight; q = p+ + momentum (p+ - p). Returns <q - p+, p+ - p> before."""
    depth, height, width = u.shape
    uphill: Any = 0.0
    square = weight * weight
    for task in prange(depth * height):
        k, j = task // height, task % height
        here, above, beyond = u[k, j], u[min(k + 1, depth - 1), j], u[k, min(j + 1, height - 1)]
        qz, qy, qx = q[0, k, j], q[1, k, j], q[2, k, j]
        pz, py, px = p[0, k, j], p[1, k, j], p[2, k, j]
        total = np.float32(0)
        for i in range(width):
            value = here[i]
            right = here[i + 1] if i < width - 1 else value
            z = qz[i] + step * (above[i] - value)
            y = qy[i] + step * (beyond[i] - value)
            x = qx[i] + step * (right - value)
            length = z * z + y * y + x * x
            scale = weight / np.sqrt(length) if length > square else np.float32(1)
            z *= scale
            y *= scale
            x *= scale
            dz, dy, dx = z - pz[i], y - py[i], x - px[i]
            total += (qz[i] - z) * dz + (qy[i] - y) * dy + (qx[i] - x) * dx
            pz[i], py[i], px[i] = z, y, x
            qz[i], qy[i], qx[i] = z + momentum * dz, y + momentum * dy, x + momentum * dx
        uphill += total
    return uphill


# ---------------------------------------------------------------------------------------------------------------


def tv_threshold(regularization: float, reference: Tensor) -> float:
    """The proximal threshold of a gradient step of length 1/‖A‖², in the volume's unit.

    ``regularization`` is relative, so that the same number suits any scan: the objective is ½‖Ax − y‖² + weight · TV(x)
    with weight = regularization · ‖A‖² · b, where b is the brightness of ``reference`` (the FDK volume), its 99.9th
    percentile. A step 1/‖A‖² then shrinks differences by regularization · b, which is what this returns.
    """
    if regularization < 0:
        raise ScanError(f"The regularisation is {regularization}; it must be 0 or more.")
    return float(regularization) * brightness(reference)


def tv_patch_solver(
    physics: LinearPhysics,
    reference: Tensor,
    iterations: int = 20,
    regularization: float = 1e-3,
    nonnegative: bool = True,
    inner: int = 5,
) -> dinv.optim.FISTA:
    """The FISTA of deepinv for the objective of :class:`TV`, to reconstruct patches with.

    Parameters
    ----------
    physics
        Of the whole volume: its ‖A‖² bounds that of every patch.
    reference
        The FDK volume, or any start, (B, C, D, H, W): its brightness gives ``regularization`` its unit.
    iterations
        Steps a patch.
    regularization, nonnegative, inner
        As in :class:`TV`.
    """
    sqnorm = operator_sqnorm(physics, tuple(reference.shape[1:]), reference.device)
    return dinv.optim.FISTA(
        data_fidelity=dinv.optim.L2(),
        prior=TVPrior(inner, nonnegative=nonnegative),
        lambda_reg=tv_threshold(regularization, reference) * sqnorm,
        stepsize=1 / sqnorm,
        max_iter=iterations,
        early_stop=False,
    )


class TV(StreamingReconstructor):
    """Least squares with total variation over the whole volume, by accelerated proximal gradient.

    Minimises ½‖Ax − y‖² + weight · TV(x), x >= 0, by FISTA (Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009) with
    adaptive restart (O'Donoghue and Candès, Found. Comput. Math. 15, 2015) and step 1/‖A‖². One A and one Aᵀ an
    iteration.

    Parameters
    ----------
    iterations
        Gradient steps.
    regularization
        Relative weight, see :func:`tv_threshold`: 0.0003 keeps detail, 0.003 is smooth.
    nonnegative
        Whether attenuation below zero is forbidden.
    init
        Where to start: "fdk", "zeros", a volume (B, C, D, H, W), or a function of (y, physics); see
        :func:`napari_recon.reconstruction.start.start_volume`.
    inner
        Iterations of the proximal operator, which is warm-started.

    Notes
    -----
    Figures of every update: ``residual`` ‖Ax − y‖/‖y‖ and ``objective``, both of the volume of that update.
    """

    def __init__(
        self,
        iterations: int = 50,
        regularization: float = 1e-3,
        nonnegative: bool = True,
        init: Start = "fdk",
        inner: int = 10,
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise ScanError(f"TV needs at least one iteration, not {iterations}.")
        if regularization < 0:
            raise ScanError(f"The regularisation is {regularization}; it must be 0 or more.")
        self.iterations, self.regularization = int(iterations), float(regularization)
        self.nonnegative, self.init, self.inner = bool(nonnegative), init, int(inner)

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        init: Start | None = None,
        reference: Tensor | None = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield the start, then the volume after each iteration.

        Parameters
        ----------
        y, physics, init
            Measurements, their physics, and a start that overrides the constructor's.
        reference
            The volume whose brightness gives ``regularization`` its unit; None takes FDK, whatever the start, since the
            start must not change the answer (for other physics Aᵀy / ‖A‖²).
        """
        start = self.init if init is None else init
        x = start_volume(start, y, physics)
        sqnorm = operator_sqnorm(physics, tuple(x.shape[1:]), x.device)
        if reference is None:
            same = isinstance(start, str) and start == "fdk" and is_xray(physics)
            reference = x if same else data_volume(y, physics, sqnorm)
        threshold = tv_threshold(self.regularization, reference)
        del reference, start, init  # or they would be held throughout
        if self.nonnegative:
            x.clamp_(min=0)
        step = 1 / sqnorm
        weight = threshold / step
        prior = TVPrior(self.inner, nonnegative=self.nonnegative)
        box = whole(x)
        size = math.sqrt(data_square(physics, None, y))

        def figures(square: float, x: Tensor) -> dict[str, float]:
            return {
                "residual": math.sqrt(square) / size if size else 0.0,
                "objective": 0.5 * square + weight * float(prior.fn(x).sum()),
            }

        # What is held beside y are volumes only, ten at most, in the proximal operator: no A x of any iterate.
        gradient, square = data_gradient(physics, x, y)
        yield Update(box, x, 0, self.iterations, figures(square, x), box)
        z, t = x.clone(), 1.0
        for iteration in range(1, self.iterations + 1):
            x_next = prior.prox(gradient.mul_(-step).add_(z), gamma=threshold)
            del gradient
            change = x.neg_().add_(x_next)  # in the memory of the volume before
            if float(torch.vdot(z.sub_(x_next).flatten(), change.flatten())) > 0:
                t = 1.0
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            momentum = (t - 1) / t_next
            torch.add(x_next, change, alpha=momentum, out=z)
            if iteration < self.iterations:
                gradient, at_z = data_gradient(physics, z, y)
                slope = float(torch.vdot(gradient.flatten(), change.flatten()))
                square = _square_before(at_z, slope, square, momentum)
            else:
                square = data_square(physics, x_next, y)
            x, t = x_next, t_next
            del change, x_next
            yield Update(
                box, x, iteration, self.iterations, figures(square, x), box if iteration < self.iterations else None
            )


def _square_before(at_z: float, slope: float, last: float, momentum: float) -> float:
    """‖Ax − y‖² of an iterate x, from what is known at the point z = x + m d beyond it, d being x less the last one.

    With r the residual at z, those of x and of the last iterate are r − m A d and r − (1 + m) A d. Their squares
    differ in ⟨r, Ad⟩, which is the gradient's ``slope`` ⟨Aᵀr, d⟩, and in ‖Ad‖², which the ``last`` square tells. So no
    A of x is needed, and an error of the last square goes on by a quarter at most.
    """
    beyond = 1 + momentum
    curvature = max(0.0, last - at_z + 2 * beyond * slope) / beyond**2
    return max(0.0, at_z - 2 * momentum * slope + momentum**2 * curvature)


class PreconditionedTV(StreamingReconstructor):
    """Total variation in a few steps: ½‖F^½(Ax − y)‖² + weight · TV(x), x >= 0, the residual being ramp-filtered.

    The objective is not that of :class:`TV`, in which low frequencies weigh more, but its steps converge several times
    faster, and where they end is about as good (docs/benchmarks.md). For physics without a ramp it is TV, of MRI with
    the real and imaginary parts each on its own, of either sign.

    Parameters
    ----------
    iterations
        Gradient steps.
    regularization
        Relative weight, see :func:`tv_threshold`; None takes :data:`WEIGHT_PER_VIEW` times the views per voxel across
        the volume: the more of it is measured, the more noise there is to damp, and the less is missing; of MRI
        :data:`WEIGHT_OF_MRI`. 0 leaves least squares.
    """

    def __init__(self, iterations: int = 40, regularization: float | None = None) -> None:
        super().__init__()
        self.iterations, self.regularization = int(iterations), regularization

    @classmethod
    def of(cls, start: str) -> PreconditionedTV:
        """What the starts "tv" and "least-squares" (twelve steps: more fit the noise) stand for."""
        return cls() if start == "tv" else cls(12, 0.0)

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        ramp: RampFiltered | None = None,
        reference: Tensor | None = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield FDK as the start, then the volume after each iteration.

        Parameters
        ----------
        y, physics
            Measurements and their physics; of a RampFiltered physics its own ``measurement(y)``, whose adjoint is then
            the start.
        ramp
            RampFiltered(physics), where it is there already: it costs some products to make.
        reference
            As for :class:`TV`; None takes the start.
        """
        start = physics.A_adjoint(y) if isinstance(physics, RampFiltered) else start_volume(None, y, physics)
        if is_xray(physics):
            physics = ramp or RampFiltered(physics)
        weight = self.regularization
        if weight is None:
            weight = WEIGHT_OF_MRI if is_mri(physics) else 1e-3
            if isinstance(physics, RampFiltered):
                across = max(physics.grid.shape[1:])
                weight = min(WEIGHT_PER_VIEW * physics.geometry.views / across, LARGEST_WEIGHT)
        method = TV(self.iterations, weight, nonnegative=not is_mri(physics))
        if reference is None:  # something as bright, or the start would be held throughout
            reference = start.new_full((1,) * start.ndim, brightness(start))
        held = [start]
        del start
        yield from method.stream(y, physics, init=lambda *_: held.pop(), reference=reference)
