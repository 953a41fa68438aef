"""SIRT: simultaneous iterative reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from napari_recon.reconstruction.start import Start, data_residual, start_volume
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError


class SIRT(StreamingReconstructor):
    """Weighted least squares by x ← x + C Aᵀ R (y − A x), with R and C one over A's row and column sums.

    Converges for any A with non-negative entries (Gregor and Benson, IEEE Trans. Med. Imaging 27, 2008), smoothest
    parts first, so that stopping early regularises.

    Parameters
    ----------
    iterations
        One A and one Aᵀ each.
    nonnegative
        Set values below zero to zero after every step.
    init
        Where to start: "zeros" as is the custom, "fdk", a volume (B, C, D, H, W), or a function of (y, physics).

    Notes
    -----
    Figures of every update: ``residual`` ‖Ax − y‖/‖y‖ of the volume of that update.
    """

    def __init__(self, iterations: int = 50, nonnegative: bool = True, init: Start = "zeros") -> None:
        super().__init__()
        if iterations < 1:
            raise ScanError(f"SIRT needs at least one iteration, not {iterations}.")
        self.iterations, self.nonnegative, self.init = int(iterations), bool(nonnegative), init

    @torch.no_grad()
    def stream(self, y: Tensor, physics: LinearPhysics, init: Start | None = None, **options: Any) -> Iterator[Update]:
        """Yield the start, then the volume after each iteration (in place)."""
        x = start_volume(self.init if init is None else init, y, physics)
        if self.nonnegative:
            x.clamp_(min=0)
        rows = _inverse(physics.A(torch.ones_like(x)))
        columns = _inverse(physics.A_adjoint(torch.ones_like(y)))
        ax = physics.A(x)
        box = whole(x)
        yield Update(box, x, 0, self.iterations, {"residual": data_residual(ax, y)}, box)
        for iteration in range(1, self.iterations + 1):
            x += physics.A_adjoint((y - ax).mul_(rows)).mul_(columns)
            if self.nonnegative:
                x.clamp_(min=0)
            ax = physics.A(x)
            following = box if iteration < self.iterations else None
            yield Update(box, x, iteration, self.iterations, {"residual": data_residual(ax, y)}, following)


def _inverse(sums: Tensor) -> Tensor:
    """1 / sums, and 0 where (next to) nothing was summed: rays beside the volume, voxels that no ray meets."""
    sums = sums.abs()
    return torch.where(sums > 1e-6 * sums.max(), 1 / sums, 0.0)
