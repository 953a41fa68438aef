"""FDK, and filtered back projection for parallel beam."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from deepinv.physics import Physics
from torch import Tensor

from napari_recon.physics.fdk_filter import FDKFilter, Window
from napari_recon.physics.projectors import Rays, projector_for
from napari_recon.physics.xray import XRayTransform, as_xray_transform
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Box, Grid

# Voxels times views in one step: about a second on a laptop, so that a long FDK shows progress and can be stopped.
STEP = {"cpu": 1_500_000_000, "cuda": 100_000_000_000}

# Bytes of filtered projections that are held at a time.
BATCH_BYTES = 64 << 20


class FDK(StreamingReconstructor):
    """The textbook analytic reconstruction: weight, ramp filter, distance-weighted back projection.

    Cone and fan beam (Feldkamp 1984), parallel beam (filtered back projection). Weights follow from the geometry:
    Parker's for short scans, Wang's for a detector off-centre, uneven and repeated angles (see
    :func:`napari_recon.physics.fdk_filter.fdk_weights`). Orbits are circles about z, or nearly; on a helix each voxel
    lacks the views that do not see it. Not differentiable.

    Parameters
    ----------
    window
        Low-pass window of the ramp: "ram-lak" (none), "shepp-logan", "cosine" or "hann".

    Examples
    --------
    ``x = FDK()(y, physics)`` with y (B, C, rows, views, columns) and an XRayTransform or deepinv's TomographyWithAstra.
    """

    def __init__(self, window: Window = "ram-lak") -> None:
        super().__init__()
        self.window: Window = window

    @torch.no_grad()
    def stream(self, y: Tensor, physics: Physics, **options: Any) -> Iterator[Update]:
        """Yield the volume, in 1/mm: at once, or where that takes long, slab by slab along z after an empty start.

        Raises
        ------
        ScanError
            If y does not fit the physics, or the window is unknown.
        """
        xray = as_xray_transform(physics)
        if y.ndim != 5 or tuple(y.shape[2:]) != xray.measurement_shape:
            raise ScanError(
                f"The projections given to FDK have the shape {tuple(y.shape)}; with this physics it needs (B, C, "
                f"rows, views, columns) with the last three {xray.measurement_shape}."
            )
        volume = torch.zeros(*y.shape[:2], *xray.grid.shape, dtype=torch.float32, device=y.device)
        fdk_filter = FDKFilter(xray.geometry, self.window)
        slabs = _slabs(xray.grid, xray.geometry.views, y.device)
        if len(slabs) > 1:
            yield Update(whole(volume), volume, 0, len(slabs), next_box=slabs[0])
        for step, box in enumerate(slabs, start=1):
            values = volume[(..., *box)]
            self._reconstruct(values, y, xray, xray.grid.crop(box), fdk_filter)
            following = slabs[step] if step < len(slabs) else None
            yield Update(box, values, step, len(slabs), next_box=following)

    @staticmethod
    def _reconstruct(out: Tensor, y: Tensor, xray: XRayTransform, grid: Grid, fdk_filter: FDKFilter) -> None:
        """Add the reconstruction on ``grid`` to ``out`` (B, C, d, H, W), filtering only rows in the grid's shadow."""
        rays = Rays(fdk_filter.detector, grid)
        window = rays.window[rays.window[:, 1] > rays.window[:, 0]]
        if len(window) == 0:
            return
        rows, columns = fdk_filter.detector.detector_shape
        shadow = slice(max(0, int(window[:, 0].min()) - 1), min(rows, int(window[:, 1].max()) + 1))
        projector = projector_for(rays, y.device)
        height = shadow.stop - shadow.start
        count = min(xray.geometry.views, max(1, int(BATCH_BYTES // (4 * height * columns))))
        for b in range(y.shape[0]):
            for c in range(y.shape[1]):
                for n in range(0, xray.geometry.views, count):
                    views = slice(n, min(n + count, xray.geometry.views))
                    buffer, inside = projector.filtered_buffer(views.stop - n, height)
                    fdk_filter(y[b, c], shadow, views, out=inside)
                    projector.backproject(buffer, n, shadow.start, out[b, c])
        if xray.normalize:
            out *= xray.operator_norm.to(out.device)


def _slabs(grid: Grid, views: int, device: torch.device) -> list[Box]:
    d, h, w = grid.shape
    count = min(d, math.ceil(grid.voxels * views / STEP.get(device.type, STEP["cpu"])))
    edges = [round(i * d / count) for i in range(count + 1)]
    return [(slice(a, b), slice(0, h), slice(0, w)) for a, b in pairwise(edges)]
