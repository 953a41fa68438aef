"""A geometry as the kernels see it: rays in voxel units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

# A detector counts as aligned with z if no pixel is displaced by more than this fraction of a pixel when its tilt is
# ignored: less than what float32 coordinates resolve.
ALIGNED_TOLERANCE = 1e-4

# A ray that runs within this sine of the slices across its view's main axis cannot be stepped along that axis.
STEEPEST_RAY = 0.02


@dataclass(frozen=True, eq=False)
class Rays:
    """The rays of a geometry through a grid, in voxel indices.

    The ray of pixel (row r, column c) of view n runs through ``o + c o_u + r o_v`` along ``d + c d_u + r d_v``, the six
    vectors being ``table[n]`` in (x, y, z) order. For cone beam o is the source (o_u = o_v = 0); for parallel beam d is
    constant.

    Parameters
    ----------
    geometry, grid
        Where the rays and the voxels are. The main axis of a view, along which Joseph's method steps, depends on the
        geometry alone, so that the rays through a crop of the grid weigh its voxels exactly as in the whole.

    Raises
    ------
    ScanError
        If the source lies among the voxels, or the beam is too wide to step along one axis.
    """

    geometry: Geometry
    grid: Grid

    def __post_init__(self) -> None:
        self._check()

    @cached_property
    def table(self) -> NDArray[np.float64]:
        """(views, 6, 3): o, o_u, o_v, d, d_u, d_v in voxel indices, (x, y, z)."""
        g, size = self.geometry, self.grid.voxel_size
        rows, columns = g.detector_shape
        first = g.detector_center - g.u * ((columns - 1) / 2) - g.v * ((rows - 1) / 2)
        # world -> voxel index: (w - centre) / size + (n - 1) / 2
        zero = (np.array(self.grid.shape[::-1]) - 1) / 2 - np.array(self.grid.center) / size
        still = np.zeros_like(first)
        if g.kind == "cone":
            source = g.source / size
            parts = [source + zero, still, still, first / size - source, g.u / size, g.v / size]
        else:
            direction = g.source / np.linalg.norm(g.source, axis=1, keepdims=True)
            parts = [first / size + zero, g.u / size, g.v / size, direction, still, still]
        return np.stack(parts, axis=1)

    @cached_property
    def axis(self) -> NDArray[np.int64]:
        """(views,): the axis along which the central ray advances most, 0 for x, 1 for y, 2 for z."""
        g = self.geometry
        along = g.detector_center - g.source if g.kind == "cone" else g.source
        return np.abs(along).argmax(axis=1)

    @cached_property
    def aligned(self) -> NDArray[np.bool_]:
        """(views,): whether u lies in the plane z = 0, v along z and the main axis is not z."""
        g = self.geometry
        rows, columns = g.detector_shape
        tilt_u = np.abs(g.u[:, 2]) * (columns - 1) / np.linalg.norm(g.u, axis=1)
        tilt_v = np.linalg.norm(g.v[:, :2], axis=1) * (rows - 1) / np.linalg.norm(g.v, axis=1)
        upright = np.abs(g.v[:, 2]) > 0.5 * np.linalg.norm(g.v, axis=1)  # a single row may have any v
        return (tilt_u <= ALIGNED_TOLERANCE) & (tilt_v <= ALIGNED_TOLERANCE) & upright & (self.axis != 2)

    @cached_property
    def homography(self) -> NDArray[np.float64]:
        """(views, 3, 4): voxel index (i, j, k, 1) -> (c W, r W, W).

        (c, r) is the column and row where the ray through that point meets the detector. For cone beam W is its depth
        over that of the detector; for parallel beam W = 1.
        """
        g, size = self.geometry, self.grid.voxel_size
        rows, columns = g.detector_shape
        first = g.detector_center - g.u * ((columns - 1) / 2) - g.v * ((rows - 1) / 2)
        origin = np.array(self.grid.center) - (np.array(self.grid.shape[::-1]) - 1) / 2 * size
        base = g.source if g.kind == "cone" else first
        third = first - g.source if g.kind == "cone" else g.source
        inverse = np.linalg.inv(np.stack([g.u, g.v, third], axis=2))
        matrix = np.concatenate([inverse * size, inverse @ (origin - base)[:, :, None]], axis=2)
        if g.kind == "parallel":
            matrix[:, 2] = (0, 0, 0, 1)
        return matrix

    @cached_property
    def window(self) -> NDArray[np.int64]:
        """(views, 4): first row, last row + 1, first column, last column + 1 of the rays that can meet a voxel."""
        rows, columns = self.geometry.detector_shape
        d, h, w = self.grid.shape
        # Interpolation reaches one voxel beyond the outermost centres.
        corners = np.array([(i, j, k, 1.0) for i in (-1, w) for j in (-1, h) for k in (-1, d)])
        projected = self.homography @ corners.T  # (views, 3, 8)
        depth = projected[:, 2]
        behind = (depth <= 1e-9).any(axis=1)
        place = projected[:, :2] / np.where(depth > 1e-9, depth, 1.0)[:, None]
        slack = 1e-2  # against rounding, in pixels
        low = np.ceil(place.min(axis=2) - slack)
        high = np.floor(place.max(axis=2) + slack) + 1
        low[behind], high[behind] = 0, np.inf
        c0, c1 = np.clip(low[:, 0], 0, columns), np.clip(high[:, 0], 0, columns)
        r0, r1 = np.clip(low[:, 1], 0, rows), np.clip(high[:, 1], 0, rows)
        empty = (c1 <= c0) | (r1 <= r0)
        window = np.stack([r0, r1, c0, c1], axis=1).astype(np.int64)
        window[empty] = 0
        return window

    @cached_property
    def groups(self) -> list[tuple[int, bool, NDArray[np.int64]]]:
        """(main axis, aligned, views) for the views that meet the grid and share a kernel and a memory order."""
        hit = self.window[:, 1] > self.window[:, 0]
        found = []
        for axis in range(3):
            for aligned in (False, True):
                views = np.flatnonzero(hit & (self.axis == axis) & (self.aligned == aligned))
                if len(views):
                    found.append((axis, aligned, views))
        return found

    def _check(self) -> None:
        table, axis = self.table, self.axis
        views = np.arange(len(table))
        rows, columns = self.geometry.detector_shape
        corners = [(c, r) for c in (0, columns - 1) for r in (0, rows - 1)]
        directions = np.stack([table[:, 3] + c * table[:, 4] + r * table[:, 5] for c, r in corners], axis=1)
        slope = directions[views, :, axis] / np.linalg.norm(directions, axis=2)
        steep = (np.abs(slope).min(axis=1) < STEEPEST_RAY) | (slope.min(axis=1) * slope.max(axis=1) < 0)
        if steep.any():
            raise ScanError(
                f"The beam of view {int(np.argmax(steep))} is too wide: its rays at the detector's edges run across "
                "those at its centre; check the distances and the pixel size, or crop the detector."
            )
        if self.geometry.kind == "cone":
            depth = table[views, 0, axis]
            inside = (depth > -1) & (depth < np.array(self.grid.shape[::-1])[axis])
            if inside.any():
                raise ScanError(
                    f"The source of view {int(np.argmax(inside))} is not outside the volume; check the source-object "
                    "distance, or reconstruct a smaller volume."
                )
        if np.linalg.cond(np.stack([self.geometry.u, self.geometry.v, directions[:, 0]], axis=2)).max() > 1e12:
            raise ScanError("In the geometry some rays run along the detector's plane; check its u and v vectors.")
