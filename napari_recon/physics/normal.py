"""The normal operator as a physics: what deepinv's algorithms need to work with H in place of AᵀA.

The operator itself is in :mod:`~napari_recon.physics.normal_operator`, its fit in
:mod:`~napari_recon.physics.normal_fit`; their public names are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_recon.physics.devices import resolve_device
from napari_recon.physics.normal_fit import Distribution, FitUpdate, fit_normal_operator, stream_normal_operator_fit
from napari_recon.physics.normal_operator import NormalOperator, describe_physics, fft_shape
from napari_recon.scans.errors import ScanError

__all__ = [
    "DiagCirculantWrapper",
    "DiagonalCirculantWrapper",
    "Distribution",
    "FitUpdate",
    "NormalOperator",
    "NormalPhysics",
    "describe_physics",
    "fft_shape",
    "fit_normal_operator",
    "stream_normal_operator_fit",
]


class NormalPhysics(LinearPhysics):
    """A physics that stands for the normal equations: its A is a normal operator N, its adjoint the identity.

    With b = Aᵀy as its measurement, the gradient of deepinv's L2 fidelity, A_adjoint(A(x) − b), is N x − b: that of
    ½‖Ax − y‖², without the projections. The fidelity's proximal operator and the pseudo-inverse solve with N likewise,
    so that algorithms which take the fidelity's gradient or proximal operator (GD, PGD, FISTA, HQS, DRS, ADMM, unfolded
    or not) work unchanged. The *value* of the L2 fidelity, ½‖N x − b‖², is not that of the data term: what relies on
    it (backtracking, the cost criterion of early stopping) is off.

    The optimisers of deepinv evaluate their cost at every iterate, and then the gradient there: N x of the last x is
    kept, so that the second costs nothing.

    Parameters
    ----------
    normal
        N on volumes (B, C, *spatial), sample by sample.
    img_size
        (C, *spatial).
    context
        A volume (B, C, *spatial) near the solution, from which the pseudo-inverse starts; None starts at zero.
    transpose
        Nᵀ, where N is not symmetric.
    max_iter, tol
        Of the conjugate gradients in the proximal operator: at most so many steps, and to this residual relative to
        the right-hand side.
    """

    def __init__(
        self,
        normal: Callable[[Tensor], Tensor] | None = None,
        img_size: tuple[int, ...] | None = None,
        context: Tensor | None = None,
        device: str | torch.device = "cpu",
        transpose: Callable[[Tensor], Tensor] | None = None,
        max_iter: int = 30,
        tol: float = 1e-4,
    ) -> None:
        super().__init__(img_size=img_size, device=device, max_iter=max_iter, tol=tol)
        self.normal, self.transpose = normal, transpose
        self.context = context
        self._kept: tuple[Any, ...] | None = None

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """N x."""
        assert self.normal is not None
        return self._once(x, self.normal)

    def _once(self, x: Tensor, normal: Callable[[Tensor], Tensor]) -> Tensor:
        """normal(x), or the last answer if it was asked for just this and neither has been written to since."""
        if (torch.is_grad_enabled() and x.requires_grad) or x.is_inference():
            return normal(x)
        if self._kept is not None:
            asked, version, by, answer, answer_version = self._kept
            if asked is x and version == x._version and by == normal and answer_version == answer._version:
                return answer
        self._kept = None  # the old one is freed before the new one is made
        answer = normal(x)
        if not answer.requires_grad:
            self._kept = (x, x._version, normal, answer, answer._version)
        return answer

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The measurement b is Aᵀy already: nothing is done to it."""
        return y

    def prox_l2(  # type: ignore[override]
        self,
        z: Tensor | float | None,
        y: Tensor,
        gamma: float | Tensor,
        max_iter: int | None = None,
        tol: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """argmin_x γ (½⟨x, N x⟩ − ⟨x, b⟩) + ½‖x − z‖²: conjugate gradients on γ N + 1.

        Differentiable in z, y and γ at the cost of one more solution, whatever the number of steps: none of them is
        kept.
        """
        if not isinstance(z, Tensor):
            z = torch.full_like(y, 0.0 if z is None else float(z))
        if isinstance(gamma, Tensor) and gamma.ndim:
            gamma = gamma.reshape(-1, *[1] * (y.ndim - 1))
        weight = gamma.detach() if isinstance(gamma, Tensor) else gamma
        steps, enough = self.max_iter if max_iter is None else max_iter, self.tol if tol is None else tol
        normal, transpose = self._normal_and_transpose(**kwargs)

        def shifted(x: Tensor) -> Tensor:
            return weight * normal(x) + x

        shifted_transpose = (lambda x: weight * transpose(x) + x) if transpose is not None else None
        target = z + gamma * y
        with torch.no_grad():
            x = _conjugate_gradient(shifted, target, z, steps, enough, shifted_transpose)
        if not target.requires_grad:
            return x

        def solve_transposed(v: Tensor) -> Tensor:
            return _conjugate_gradient(
                shifted_transpose or shifted, v, None, steps, enough, shifted if shifted_transpose is not None else None
            )

        return _Implicit.apply(target - gamma * normal(x) - x, x, solve_transposed)

    def A_dagger(self, y: Tensor, max_iter: int = 10, tol: float = 1e-4, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """An x with N x ≈ b: a few conjugate-gradient steps from the context; more would fit the noise."""
        normal, transpose = self._normal_and_transpose(**kwargs)
        return _conjugate_gradient(normal, y, self.context, max_iter, tol, transpose)

    def _normal_and_transpose(
        self, **kwargs: Any
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """N, and Nᵀ where it is another."""
        return self.A, self.transpose


def _conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    start: Tensor | None,
    max_iter: int,
    tol: float,
    transpose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Solve N x = b by conjugate gradients, each sample of the batch for itself; on NᵀN if ``transpose`` is given.

    A sample rests when its residual is down to ``tol`` times its right-hand side, so that what it comes to does not
    depend on its company; and where a direction has no positive curvature, since H is not quite positive definite and
    to go on along it would go astray.
    """
    if transpose is not None:
        forward, backward = normal, transpose
        normal, b = (lambda x: backward(forward(x))), backward(b)
    axes = tuple(range(1, b.ndim))

    def squared(v: Tensor) -> Tensor:
        return v.square().sum(axes, keepdim=True)

    x = torch.zeros_like(b) if start is None else start
    residual = b if start is None else b - normal(x)
    direction = residual
    square, enough = squared(residual), tol**2 * squared(b)
    going = square > enough
    for _ in range(max_iter):
        if not bool(going.any()):
            break
        image = normal(direction)
        curvature = (direction * image).sum(axes, keepdim=True)
        going = going & (curvature > 0)
        length = torch.where(going, square, 0.0) / torch.where(going, curvature, 1.0)
        x = x + length * direction
        residual = residual - length * image
        before, square = square, squared(residual)
        going = going & (square > enough)
        direction = residual + torch.where(going, square, 0.0) / torch.where(going, before, 1.0) * direction
    return x


class _Implicit(torch.autograd.Function):
    """The solution x of M x = c, given with its residual c − M x: its backward is a solution with Mᵀ."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, solve_transposed: Any) -> Tensor:  # type: ignore[override]
        ctx.solve_transposed = solve_transposed
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.solve_transposed(grads[0]), None, None


class DiagCirculantWrapper(NormalPhysics):
    """H in place of AᵀA as a deepinv physics: ``A(x) = scaling · H x``, whose measurement is ``backproject(y)``.

    Parameters
    ----------
    physics
        What H stands for; gives ``backproject``, and PartitionedReconstructor its exact gradient.
    img_size
        (C, D, H, W) or (D, H, W), which operators are then held to; by default what the physics says, which is not
        (deepinv's MultiCoilMRI says 320 x 320 unless it is told).
    scaling
        Of the data term, for instance 1/‖A‖² so that a step of 1 is safe.
    device
        Where m and λ live; by default where the physics computes.
    operator
        From :func:`fit_normal_operator`; or its two tensors:
    fourier_filter, spatial_mask
        λ and m, in the form that ``symmetric`` says. All of them may be set later, by :meth:`set_operator`, or passed
        with each call of a reconstructor or of :meth:`A`.
    max_iter, tol
        As in :class:`NormalPhysics`; a PartitionedReconstructor takes them over for its patches.
    """

    operator: NormalOperator | None = None

    def __init__(
        self,
        physics: LinearPhysics | None = None,
        img_size: Sequence[int] | None = None,
        scaling: float = 1.0,
        device: str | torch.device | None = None,
        operator: NormalOperator | None = None,
        fourier_filter: Tensor | None = None,
        spatial_mask: Tensor | None = None,
        symmetric: bool = True,
        max_iter: int = 30,
        tol: float = 1e-4,
    ) -> None:
        size = img_size if img_size is not None else getattr(physics, "img_size", None)
        if device is None:
            device = physics._device_holder.device if physics is not None else "cpu"
        super().__init__(
            img_size=tuple(int(n) for n in size) if size is not None else None,
            device=resolve_device(device),
            max_iter=max_iter,
            tol=tol,
        )
        self._required = tuple(int(n) for n in img_size) if img_size is not None else None
        self.physics = physics
        self.scaling, self.symmetric = float(scaling), bool(symmetric)
        if operator is not None or fourier_filter is not None or spatial_mask is not None:
            self.set_operator(operator, fourier_filter=fourier_filter, spatial_mask=spatial_mask)

    def set_operator(
        self,
        operator: NormalOperator | None = None,
        *,
        fourier_filter: Tensor | None = None,
        spatial_mask: Tensor | None = None,
    ) -> None:
        """Set H, whole or as its two tensors.

        Raises
        ------
        ScanError
            If one of the tensors is missing, or they do not belong to ``img_size``.
        """
        self.operator = self._resolve(operator, fourier_filter, spatial_mask)

    @property
    def fourier_filter(self) -> Tensor | None:
        """The filter λ."""
        return None if self.operator is None else self.operator.fourier_filter

    @property
    def spatial_mask(self) -> Tensor | None:
        """The mask m."""
        return None if self.operator is None else self.operator.spatial_mask

    def resolve(
        self,
        operator: NormalOperator | None = None,
        fourier_filter: Tensor | None = None,
        spatial_mask: Tensor | None = None,
    ) -> NormalOperator:
        """The operator that is meant: what is passed, else what was set; a :class:`ScanError` if there is neither."""
        if operator is None and fourier_filter is None and spatial_mask is None:
            if self.operator is None:
                raise ScanError(
                    "This DiagCirculantWrapper has no λ and m yet; pass fourier_filter and spatial_mask (from "
                    "fit_normal_operator), or set them by set_operator."
                )
            return self.operator
        return self._resolve(operator, fourier_filter, spatial_mask)

    def _resolve(
        self, operator: NormalOperator | None, fourier_filter: Tensor | None, spatial_mask: Tensor | None
    ) -> NormalOperator:
        if operator is None:
            own = self.operator
            fourier_filter = own.fourier_filter if fourier_filter is None and own is not None else fourier_filter
            spatial_mask = own.spatial_mask if spatial_mask is None and own is not None else spatial_mask
            if fourier_filter is None or spatial_mask is None:
                raise ScanError("The normal operator needs both fourier_filter (λ) and spatial_mask (m); pass the two.")
            if own is not None and fourier_filter is own.fourier_filter and spatial_mask is own.spatial_mask:
                return own  # with the patch filters that it keeps
            operator = NormalOperator(spatial_mask, fourier_filter, self.symmetric)
        if self._required is not None and self._required[-operator.dims :] != operator.shape:
            raise ScanError(
                f"The normal operator is for volumes of {operator.shape} voxels, the wrapper for "
                f"{self._required[-operator.dims :]}; fit it for this volume."
            )
        return operator.to(self._device_holder.device)

    def A(
        self,
        x: Tensor,
        fourier_filter: Tensor | None = None,
        spatial_mask: Tensor | None = None,
        operator: NormalOperator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """H x, times scaling."""
        h = self.resolve(operator, fourier_filter, spatial_mask)
        return self._once(x, h.apply) * self.scaling

    def _normal_and_transpose(
        self, **kwargs: Any
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        h = self.resolve(**{k: kwargs.get(k) for k in ("operator", "fourier_filter", "spatial_mask")})
        transpose = None if is_self_adjoint(h) else (lambda x: h.adjoint(x) * self.scaling)
        return (lambda x: h.apply(x) * self.scaling), transpose

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The measurement itself, which must be ``backproject(projections)``.

        Raises
        ------
        ScanError
            If it has not a volume's shape: projections, most likely.
        """
        shape = self.operator.shape if self.operator is not None else self._required
        if shape is not None and tuple(y.shape[2:]) != tuple(shape[-(y.ndim - 2) :]):
            raise ScanError(
                f"DiagCirculantWrapper measures volumes, but was given {tuple(y.shape)}; pass wrapper.backproject(y) "
                "in place of the projections y (PartitionedReconstructor takes y itself)."
            )
        return y

    def backproject(self, y: Tensor) -> Tensor:
        """The measurement b = scaling · Aᵀy that belongs to this physics."""
        if self.physics is None:
            raise ScanError("This DiagCirculantWrapper was made without a physics, so that it cannot back-project.")
        return self.physics.A_adjoint(y) * self.scaling

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> DiagCirculantWrapper:
        super()._apply(fn, *args, **kwargs)
        if self.operator is not None:  # follows the module from device to device
            self.operator = self.operator.to(self._device_holder.device)
        return self


def is_self_adjoint(h: NormalOperator) -> bool:
    """Whether H^* = H: a mask on both sides of a symmetric kernel. The paper's m C is not."""
    return h.symmetric and not h.fourier_filter.is_complex()


DiagonalCirculantWrapper = DiagCirculantWrapper
"""The same class under its long name."""
