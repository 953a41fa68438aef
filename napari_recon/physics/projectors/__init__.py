"""The kernels, by device: every projector does forward, adjoint, normal and FDK's back projection of one volume."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from napari_recon.physics.projectors.numba_cpu import FAST, NumbaProjector, kernel_lock
from napari_recon.physics.projectors.rays import Rays
from napari_recon.physics.projectors.torch_any import TorchProjector
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

__all__ = ["FAST", "NumbaProjector", "Projector", "Rays", "TorchProjector", "kernel_lock", "projector_for", "warm_up"]


class Projector(Protocol):
    """What kernels for a device offer; tensors are float32 on that device, one volume at a time."""

    rays: Rays

    def forward(self, volume: Tensor) -> Tensor:
        """(D, H, W) -> (rows, views, columns)."""

    def adjoint(self, projections: Tensor, out: Tensor | None = None) -> Tensor:
        """(rows, views, columns) -> (D, H, W), exactly the transpose of forward; added to ``out`` if given."""

    def normal(self, volume: Tensor) -> Tensor:
        """adjoint(forward(volume)) with memory for a batch of views."""

    def filtered_buffer(self, views: int, rows: int) -> tuple[Any, Tensor]:
        """A buffer for back projection and its inside as (rows, views, columns)."""

    def backproject(self, buffer: Any, first_view: int, first_row: int, out: Tensor) -> None:
        """Add FDK's weighted back projection of a filled buffer to ``out`` (D, H, W)."""


def projector_for(rays: Rays, device: torch.device) -> Projector:
    """The kernels for a device: numba on the CPU, Triton on GPUs for which it can compile, else ASTRA or torch.

    ASTRA serves where it is installed and agrees with the exact projectors on a small scan. With the environment
    variable ``NAPARI_RECON_PROJECTOR`` "astra" is asked before Triton, or "torch" alone.
    """
    if device.type == "cpu":
        return NumbaProjector(rays)
    wanted = os.environ.get("NAPARI_RECON_PROJECTOR")
    if device.type == "cuda" and wanted != "torch":
        for name in ("astra", "triton") if wanted == "astra" else ("triton", "astra"):
            if name == "triton" and _triton_works(device):
                from napari_recon.physics.projectors.triton_gpu import TritonProjector

                return TritonProjector(rays, device)
            if name == "astra" and _astra_works(device):
                from napari_recon.physics.projectors.astra_gpu import AstraProjector

                return AstraProjector(rays, device)
    return TorchProjector(rays, device)


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton can be imported, and a kernel be compiled and run; told once where it is there but fails."""
    if importlib.util.find_spec("triton") is None:  # Windows, macOS
        return False
    try:
        from napari_recon.physics.projectors.triton_gpu import try_out

        try_out(device)
    except Exception as error:  # of the compilers, the driver or Triton itself
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        warnings.warn(
            f"Triton cannot compile kernels for {device} here ({reason[0]}): PyTorch's projector is used, which is "
            "several times slower; a C compiler and Python's header files are what is mostly missing.",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _astra_works(device: torch.device) -> bool:
    """Whether ASTRA is installed and computes what it should; told once where it is there but does not."""
    if importlib.util.find_spec("astra") is None:
        return False
    try:
        from napari_recon.physics.projectors.astra_gpu import try_out

        try_out(device)
    except Exception as error:  # of the driver, or ASTRA itself
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        warnings.warn(
            f"ASTRA cannot be used on {device} ({reason[0]}): PyTorch's projector is used, which is slower.",
            stacklevel=2,
        )
        return False
    return True


def warm_up() -> None:
    """Compile the CPU kernels, or load them from numba's cache, so that no person waits for it later (seconds)."""
    angles = np.arange(0.0, 360.0, 30.0)
    straight = Geometry.cone(angles, (4, 5), 1.0, 20.0, 30.0)
    tilted = straight.vectors.copy()
    tilted[:, 8] += 0.01
    for geometry in (straight, Geometry(tilted, (4, 5), "cone")):
        projector = NumbaProjector(Rays(geometry, Grid((4, 4, 4), 1.0)))
        volume = torch.ones(4, 4, 4)
        projector.adjoint(projector.forward(volume))
        projector.normal(volume)
        buffer, _ = projector.filtered_buffer(geometry.views, 4)
        projector.backproject(buffer, 0, 0, volume)
