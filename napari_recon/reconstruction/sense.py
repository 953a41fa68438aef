"""Classical reconstructions of multi-coil MRI: zero-filled, and CG-SENSE.

References
----------
K. P. Pruessmann et al., Advances in sensitivity encoding with arbitrary k-space trajectories, Magn. Reson. Med. 46,
2001.
P. B. Roemer et al., The NMR phased array, Magn. Reson. Med. 16, 1990.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from napari_recon.reconstruction.start import is_mri, operator_sqnorm
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError

Combination = Literal["adjoint", "root-sum-of-squares"]


class ZeroFilled(StreamingReconstructor):
    """What was not sampled taken as zero: MRI's counterpart of FDK, at once and with folded edges.

    Parameters
    ----------
    combination
        How coils become one volume. "adjoint": Aᵀy / ‖A‖², complex, by the coil maps. "root-sum-of-squares": magnitudes
        without any maps; the imaginary part is 0.
    """

    def __init__(self, combination: Combination = "adjoint") -> None:
        super().__init__()
        if combination not in get_args(Combination):
            raise ScanError(f"Coils cannot be combined by {combination!r}: use {', '.join(get_args(Combination))}.")
        self.combination: Combination = combination

    @torch.no_grad()
    def stream(self, y: Tensor, physics: LinearPhysics, **options: Any) -> Iterator[Update]:
        """Yield the volume (B, 2, D, H, W)."""
        _expect_mri(physics, "ZeroFilled")
        if self.combination == "adjoint":
            x = physics.A_adjoint(y) / operator_sqnorm(physics)
        else:
            magnitude = physics.A_adjoint(y, rss=True)
            x = torch.cat([magnitude, torch.zeros_like(magnitude)], 1)
        yield Update(whole(x), x, 0, 0)


class CGSense(StreamingReconstructor):
    """SENSE by conjugate gradients: (AᵀA + λ) x = Aᵀy from x = 0, stopped early.

    The first steps find what many samples agree on, the later ones what few do, noise included: how many are taken
    regularises. A step is a product with AᵀA, which needs no k-space.

    Parameters
    ----------
    iterations
        Steps.
    regularization
        λ, in units of ‖A‖².
    tolerance
        End where the residual of the normal equations is down to so much of Aᵀy.

    Notes
    -----
    Figures of every update: ``residual`` ‖Ax − y‖/‖y‖, from the recurrences at no cost; ``normal_residual``.
    """

    def __init__(self, iterations: int = 8, regularization: float = 0.0, tolerance: float = 1e-4) -> None:
        super().__init__()
        if int(iterations) < 1:
            raise ScanError(f"CG-SENSE needs at least one iteration, not {iterations}.")
        if not 0 <= regularization < math.inf:
            raise ScanError(f"The regularisation is {regularization}; it must be 0 or more.")
        if not 0 <= tolerance < 1:
            raise ScanError(f"The tolerance of CG-SENSE is {tolerance}; it must be 0 or more, and below 1.")
        self.iterations, self.regularization = int(iterations), float(regularization)
        self.tolerance = float(tolerance)

    @torch.no_grad()
    def stream(self, y: Tensor, physics: LinearPhysics, **options: Any) -> Iterator[Update]:
        """Yield zeros, then the volume (B, 2, D, H, W) after each step (in place)."""
        _expect_mri(physics, "CGSense")
        back = physics.A_adjoint(y)
        weight = self.regularization * operator_sqnorm(physics)
        x, residual, direction = torch.zeros_like(back), back.clone(), back.clone()
        energy, first = float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2, _inner(back, back)
        square, box = first, whole(x)
        yield Update(box, x, 0, self.iterations, {"residual": 1.0, "normal_residual": 1.0}, box)
        for iteration in range(1, self.iterations + 1):
            image = physics.A_adjoint_A(direction)
            if weight:
                image.add_(direction, alpha=weight)
            curvature = _inner(direction, image)
            if not curvature > 0:
                return
            x.add_(direction, alpha=square / curvature)
            residual.sub_(image, alpha=square / curvature)
            before, square = square, _inner(residual, residual)
            direction.mul_(square / before).add_(residual)
            # ‖Ax − y‖² = ‖y‖² − 2⟨x, Aᵀy⟩ + ⟨x, AᵀAx⟩, and AᵀAx = Aᵀy − r − λx.
            explained = _inner(x, back) + _inner(x, residual) + weight * _inner(x, x)
            figures = {
                "residual": math.sqrt(max(energy - explained, 0.0) / energy),
                "normal_residual": math.sqrt(square / first),
            }
            done = iteration == self.iterations or figures["normal_residual"] <= self.tolerance
            yield Update(box, x, iteration, self.iterations, figures, None if done else box)
            if done:
                return


def _inner(a: Tensor, b: Tensor) -> float:
    # In double precision: what is left of ‖y‖² is a small difference.
    return float(torch.dot(a.flatten().double(), b.flatten().double()))


def _expect_mri(physics: LinearPhysics, method: str) -> None:
    if not is_mri(physics):
        raise ScanError(f"{method} is for multi-coil MRI, not for {type(physics).__name__}: use another method.")
