"""Where iterations start, and the two scales that relate them to the data: the norm of A and the brightness of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepinv.optim.linear import conjugate_gradient
from deepinv.physics import LinearPhysics, Physics
from deepinv.utils.mixins import MRIMixin
from torch import Tensor

from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    from napari_recon.physics.ramp_filtered import RampFiltered
    from napari_recon.physics.xray import XRayTransform

Start = str | Tensor | Callable[[Tensor, Physics], Tensor]


def start_volume(start: Start | None, y: Tensor, physics: LinearPhysics) -> Tensor:
    """The volume (B, C, *spatial) to start from; always one of its own, free to be changed in place.

    Parameters
    ----------
    start
        "fdk" (or None) is FDK for X-rays; for any other physics ten conjugate-gradient steps on the normal equations,
        few enough to leave the noise out. "tv" and "least-squares": that, and then some ramp-filtered steps with or
        without total variation (:class:`napari_recon.reconstruction.tv.PreconditionedTV`). "zero-filled": Aᵀy / ‖A‖².
        "sense": CG-SENSE (:class:`napari_recon.reconstruction.sense.CGSense`).
        "zeros"; a volume; or a function of (y, physics).
    """
    if isinstance(start, Tensor):
        return start.detach().clone()
    if callable(start):
        return start(y, physics).detach().clone()
    if start == "zeros":
        return torch.zeros_like(physics.A_adjoint(y))
    if start == "zero-filled":
        return physics.A_adjoint(y) / operator_sqnorm(physics)
    if start == "sense":
        from napari_recon.reconstruction.sense import CGSense

        return CGSense()(y, physics)
    if start in ("tv", "least-squares"):
        from napari_recon.reconstruction.tv import PreconditionedTV

        return PreconditionedTV.of(start)(y, physics)
    if start not in (None, "fdk"):
        raise ScanError(
            f"The start {start!r} is unknown: use 'fdk', 'zero-filled', 'sense', 'tv', 'least-squares', 'zeros', a "
            "volume, or a function of (y, physics)."
        )
    if is_xray(physics):
        from napari_recon.reconstruction.fdk import FDK

        return FDK()(y, physics)
    return conjugate_gradient(physics.A_adjoint_A, physics.A_adjoint(y), max_iter=10, tol=1e-3)


def data_volume(y: Tensor, physics: LinearPhysics, sqnorm: float) -> Tensor:
    """What the data say at once: FDK for X-rays, Aᵀy / ‖A‖² (``sqnorm``) for any other physics.

    Its brightness gives relative weights their unit, which must not depend on where an iteration starts.
    """
    return start_volume("fdk", y, physics) if is_xray(physics) else physics.A_adjoint(y) / sqnorm


def is_xray(physics: Physics) -> bool:
    """Whether FDK applies: our X-ray transform or deepinv's TomographyWithAstra."""
    from napari_recon.physics.xray import XRayTransform

    return isinstance(physics, XRayTransform) or hasattr(physics, "projection_geometry")


def is_mri(physics: Physics) -> bool:
    """Whether volumes are complex, as two channels: our MultiCoilMRI or one of deepinv's."""
    return isinstance(physics, MRIMixin)


def data_gradient(physics: LinearPhysics, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Aᵀ(Ax − y) and ‖Ax − y‖²; of projections a batch of views at a time, so that A x is never held.

    Parameters
    ----------
    physics, y
        Of a RampFiltered physics y may be the projections as they are, which takes far less memory, or its
        ``measurement(y)``.
    x
        (B, C, *spatial).
    """
    if (batched := _by_batches(physics, y)) is not None:
        return batched.gradient(x, y)
    residual = residual_of(physics, x, y)
    square = float(torch.linalg.vector_norm(residual)) ** 2
    return physics.A_adjoint(residual), square


def data_square(physics: LinearPhysics, x: Tensor | None, y: Tensor) -> float:
    """‖Ax − y‖², or ‖y‖² where x is None; see :func:`data_gradient`."""
    if (batched := _by_batches(physics, y)) is not None:
        return batched.squared_residual(x, y)
    return float(torch.linalg.vector_norm(y if x is None else residual_of(physics, x, y))) ** 2


def residual_of(physics: LinearPhysics, x: Tensor, y: Tensor) -> Tensor:
    """A x - y, in the memory of A x unless that is x's own, as an identity's is."""
    ax = physics.A(x)
    return ax - y if ax.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else ax.sub_(y)


def _by_batches(physics: LinearPhysics, y: Tensor) -> XRayTransform | RampFiltered | None:
    """The physics, if it takes these projections a batch of views at a time."""
    from napari_recon.physics.ramp_filtered import RampFiltered
    from napari_recon.physics.xray import XRayTransform

    if not isinstance(physics, XRayTransform | RampFiltered):
        return None
    xray = physics.physics if isinstance(physics, RampFiltered) else physics
    return physics if tuple(y.shape[2:]) == xray.measurement_shape else None


def data_residual(ax: Tensor, y: Tensor) -> float:
    """‖Ax − y‖ / ‖y‖; 0 where there is no y to speak of."""
    size = float(torch.linalg.vector_norm(y))
    return float(torch.linalg.vector_norm(ax - y)) / size if size else 0.0


def operator_sqnorm(physics: LinearPhysics, img_size: tuple[int, ...] | None = None, device: Any = None) -> float:
    """‖A‖² with a percent to spare: what the physics knows (``sqnorm``), else by power iteration.

    Parameters
    ----------
    physics, img_size, device
        ``img_size`` (C, *spatial) and ``device`` of the volumes, where the physics does not tell.
    """
    known = getattr(physics, "sqnorm", None)
    if known is not None:
        return float(known() if callable(known) else known)
    size = img_size or getattr(physics, "img_size", None)
    if size is None:
        raise ScanError("The physics does not say how large its volumes are, so that ‖A‖² cannot be estimated.")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((1, *size), generator=generator).to(device or "cpu")
    value = 0.0
    with torch.no_grad():
        for _ in range(50):
            x = physics.A_adjoint_A(x / x.norm().clamp_min(1e-30))
            previous, value = value, float(x.norm())
            if abs(value - previous) < 1e-3 * value:
                break
    return 1.01 * value


def brightness(x: Tensor) -> float:
    """The 99.9th percentile of a volume's magnitude (of at most about a million of its voxels).

    Two channels (B, 2, *spatial) are the parts of a complex volume, and have one magnitude.
    """
    x = x.detach()
    values = (torch.linalg.vector_norm(x, dim=1) if x.ndim > 3 and x.shape[1] == 2 else x.abs()).flatten()
    values = values[:: max(1, values.numel() // 1_000_000)]
    return float(torch.quantile(values.float(), 0.999))
