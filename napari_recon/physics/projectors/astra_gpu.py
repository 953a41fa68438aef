"""ASTRA's projectors on an NVIDIA GPU, for where Triton is not: Windows, or no compiler. The extra ``astra``.

The pair is that of van Aarle et al. (Opt. Express 24(22), 2016): rays are followed on the way there and voxels on the
way back, with textures' interpolation, so that the adjoint is one up to percents only, unlike that of all other
projectors here. Data steps converge with it all the same, to a stationary point of slightly other equations.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_recon.physics.projectors.rays import Rays
from napari_recon.physics.projectors.torch_any import TorchProjector
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

FORWARD, ADJOINT = 0.02, 0.1
"""How far ASTRA may be from the exact pair, relative, to be used."""


class AstraProjector(TorchProjector):
    """Forward and back projection by ASTRA 2.5's kernels, in torch's memory; FDK's back projection is torch's.

    Parameters
    ----------
    rays
        The geometry and the grid.
    device
        A CUDA device.
    """

    def __init__(self, rays: Rays, device: torch.device) -> None:
        super().__init__(rays, device)
        import astra

        geometry, grid = rays.geometry, rays.grid
        kind = "cone_vec" if geometry.kind == "cone" else "parallel3d_vec"
        half = np.array(grid.extent[::-1]) / 2  # x, y, z
        low, high = np.array(grid.center) - half, np.array(grid.center) + half
        bounds = [float(end[i]) for i in range(3) for end in (low, high)]
        depth, height, width = grid.shape
        self._id: int = astra.create_projector(
            "cuda3d",
            astra.create_proj_geom(kind, *geometry.detector_shape, geometry.vectors),
            astra.create_vol_geom(height, width, depth, *bounds),
        )
        weakref.finalize(self, astra.projector3d.delete, self._id)

    def forward(self, volume: Tensor) -> Tensor:
        """Line integrals (rows, views, columns) of a volume (D, H, W), float32."""
        rows, columns = self.rays.geometry.detector_shape
        out = torch.zeros(rows, self.rays.geometry.views, columns, device=self.device)
        self._direct().direct_FP3D(self._id, volume.contiguous(), out)
        return out

    def adjoint(self, projections: Tensor, out: Tensor | None = None) -> Tensor:
        """Nearly the transpose of :meth:`forward`: (rows, views, columns) -> (D, H, W); added to ``out`` if given."""
        found = torch.zeros(self.rays.grid.shape, device=self.device)
        self._direct().direct_BP3D(self._id, found, projections.contiguous())
        return found if out is None else out.add_(found)

    def normal(self, volume: Tensor) -> Tensor:
        """Adjoint of forward, by way of all projections."""
        return self.adjoint(self.forward(volume))

    def _direct(self) -> Any:
        """ASTRA's calls on memory that is given to it, once torch has finished with that."""
        import astra
        import astra.experimental

        if self.device.type == "cuda":
            astra.set_gpu_index(self.device.index or 0)
            torch.cuda.synchronize(self.device)
        return astra.experimental


def try_out(device: torch.device) -> None:
    """Compare ASTRA's pair with the exact one on a small scan; raises a RuntimeError where they disagree."""
    geometry = Geometry.cone(np.arange(0.0, 360.0, 45.0), (12, 14), 1.5, 60.0, 90.0)
    rays = Rays(geometry, Grid((8, 10, 12), 1.0, (0.5, -1.0, 0.3)))
    exact, theirs = TorchProjector(rays, device), AstraProjector(rays, device)
    z, y, x = (torch.linspace(-1, 1, n, device=device) for n in rays.grid.shape)
    volume = torch.exp(-2 * ((z[:, None, None] - 0.2) ** 2 + (y[:, None] + 0.1) ** 2 + (x - 0.3) ** 2))
    projections = exact.forward(volume)
    back = exact.adjoint(projections)
    for what, found, expected, allowed in (
        ("forward", theirs.forward(volume), projections, FORWARD),
        ("back", theirs.adjoint(projections), back, ADJOINT),
    ):
        error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        if not error <= allowed:
            raise RuntimeError(f"its {what} projection of a test scan is off by {100 * error:.0f} %")
