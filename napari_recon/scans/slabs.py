"""A part of a reconstruction along z: the slices that are asked for, the rays that see them, and what these meet.

Every ray that sees the slices is used. Either every voxel that such a ray meets is unknown, so that a part is an
ordinary problem of its own: a smaller grid, fewer detector rows, any method. Or what lies beyond a margin is held at
what is known of it, and its projections are taken off the measurements: in wide cones far less is unknown then. What
comes out at a part's ends is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

MARGIN = 16
"""Slices on either side of those asked for whose rays are used too: what regularisation and networks see of them."""
CLIMB = 0.8
"""Where the rest is held, the margin over how far rays climb along the volume's radius, see docs/benchmarks.md."""
FLAT = 0.1
"""How far an orbit may rise, as a part of the volume's height, or parallel rays, and still be taken for a circle."""


@dataclass(frozen=True)
class Slab:
    """Slices of a grid, and what reconstructing them takes.

    Attributes
    ----------
    core
        The slices that are asked for, along z of the whole grid.
    extended
        The slices that are reconstructed: all that a used ray meets, or the core and a margin.
    rows
        The detector rows that are used: all that see the core and a margin about it, in any view.
    """

    core: slice
    extended: slice
    rows: slice

    @property
    def inside(self) -> slice:
        """Where the core lies in what is reconstructed."""
        return slice(self.core.start - self.extended.start, self.core.stop - self.extended.start)

    def grid(self, whole: Grid) -> Grid:
        """The grid of what is reconstructed."""
        return whole.crop((self.extended, *whole.full_box[1:]))

    def core_grid(self, whole: Grid) -> Grid:
        """The grid of the slices that are asked for."""
        return whole.crop((self.core, *whole.full_box[1:]))


def slab_of(geometry: Geometry, grid: Grid, core: slice, margin: int = MARGIN, beyond: int | None = None) -> Slab:
    """What it takes to reconstruct some slices.

    Parameters
    ----------
    geometry
        Of the whole detector.
    grid
        The whole volume's.
    core
        The slices, [start, stop) along z.
    margin
        How many slices about them are seen by all their rays too.
    beyond
        How many slices about them are reconstructed with them, the rest being held at what is known of it; None takes
        all that rays meet.

    Raises
    ------
    ScanError
        If they are none of the grid's, or no detector row sees them.
    """
    depth = grid.shape[0]
    start, stop = int(core.start), int(core.stop)
    if not 0 <= start < stop <= depth:
        raise ScanError(
            f"The volume has slices 0 to {depth - 1}, and those from {start} up to (not with) {stop} were asked for: "
            "choose some of them."
        )
    rows = rows_seeing(geometry, grid, max(0, start - margin), min(depth, stop + margin))
    if rows is None:
        raise ScanError(
            f"No row of the detector sees the slices {start} to {stop - 1}: choose others, or a volume that the scan "
            "covers."
        )
    low, high = slices_met(geometry, grid, rows)
    if beyond is not None:
        low, high = max(low, start - beyond), min(high, stop + beyond)
    return Slab(slice(start, stop), slice(min(low, start), max(high, stop)), rows)


def held_margin(geometry: Geometry, grid: Grid) -> int | None:
    """How many slices about a core are reconstructed with it where what lies beyond is held at its FDK.

    What FDK has wrong there is blamed on what lies between first: the steeper rays are, the more slices that takes.
    None where the orbit is no circle about z, as a helix or laminography, so that FDK is none to hold anything at.
    """
    if not _is_circular(geometry, grid):
        return None
    rows = rows_seeing(geometry, grid, 0, grid.shape[0])
    if rows is None:
        return MARGIN
    ends = np.array([rows.start, rows.stop - 1]) - (geometry.detector_shape[0] - 1) / 2
    if geometry.kind == "cone":
        ways = geometry.detector_center - geometry.source + ends[:, None, None] * geometry.v  # (2, views, 3)
    else:
        ways = geometry.source[None]
    slope = float((np.abs(ways[..., 2]) / np.linalg.norm(ways[..., :2], axis=-1).clip(1e-6)).max())
    climb = slope * max(grid.shape[1] * grid.scale[1], grid.shape[2] * grid.scale[2]) / 2 / grid.scale[0]
    return max(MARGIN, min(grid.shape[0], int(np.ceil(CLIMB * climb))))


def _is_circular(geometry: Geometry, grid: Grid) -> bool:
    """Whether FDK suits the orbit: a circle about z, nearly, at the height of the volume."""
    if geometry.kind == "parallel":
        direction = geometry.source
        return bool((np.abs(direction[:, 2]) <= FLAT * np.linalg.norm(direction, axis=1)).all())
    height, middle = grid.extent[0], grid.center[2]
    z = geometry.source[:, 2]
    rises = float(np.ptp(z)) > FLAT * height + 2 * grid.scale[0]
    return not rises and bool(abs(float(np.median(z)) - middle) <= height)


def slabs_of(
    geometry: Geometry, grid: Grid, thickness: int, margin: int = MARGIN, beyond: int | None = None
) -> list[Slab]:
    """The whole grid in slabs of ``thickness`` slices, the last one with what is left; see :func:`slab_of`."""
    if thickness < 1:
        raise ScanError(f"A slab of {thickness} slices is none: choose 1 at least.")
    depth = grid.shape[0]
    cores = [slice(k, min(k + thickness, depth)) for k in range(0, depth, thickness)]
    return [slab_of(geometry, grid, core, margin, beyond) for core in cores]


def rows_seeing(geometry: Geometry, grid: Grid, start: int, stop: int) -> slice | None:
    """The detector rows whose rays, in any view, meet the slices [start, stop) of a grid; None where there are none.

    With one more on either side, which FDK interpolates with.
    """
    rows = geometry.detector_shape[0]
    x, y = _footprint(grid)
    # Interpolation reaches one voxel beyond the outermost centres.
    z = grid.translate[0] + grid.scale[0] * np.array([start - 1.0, stop])
    corners = np.array([(i, j, k) for i in x for j in y for k in z])  # (8, 3)
    across, along = _row_planes(geometry)
    if geometry.kind == "cone":
        away = corners[None] - geometry.source[:, None]
        depth = np.einsum("nci,ni->nc", away, along)
        if (depth <= 0).any():  # beside a source: any row may see it
            return slice(0, rows)
        place = np.einsum("nci,ni->nc", away, across) / depth
    else:
        place = np.einsum("nci,ni->nc", corners[None] - geometry.detector_center[:, None], across)
    place += (rows - 1) / 2
    low = np.maximum(np.floor(place.min(axis=1)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(place.max(axis=1)).astype(int) + 2, rows)
    seen = high > low
    return slice(int(low[seen].min()), int(high[seen].max())) if seen.any() else None


def slices_met(geometry: Geometry, grid: Grid, rows: slice) -> tuple[int, int]:
    """The slices of a grid, [start, stop), that rays of these rows may meet in any view; none where stop <= start."""
    depth = grid.shape[0]
    across, along = _row_planes(geometry)
    x, y = _footprint(grid)
    corners = np.array([(i, j) for i in x for j in y])  # (4, 2)
    heights, signs = [], []
    for row in (rows.start, rows.stop - 1):
        b = row - (geometry.detector_shape[0] - 1) / 2
        # The rays of a row of a view lie in a plane: where it is in the corners, no ray between them is beyond.
        if geometry.kind == "cone":
            normal, base, offset = across - b * along, geometry.source, 0.0
        else:
            normal, base, offset = across, geometry.detector_center, b
        flat = np.abs(normal[:, 2]) < 1e-6 * np.linalg.norm(normal, axis=1)
        if flat.any():  # a row that runs along z meets all slices
            return 0, depth
        away = corners[None] - base[:, None, :2]
        fall = np.einsum("nci,ni->nc", away, normal[:, :2])
        heights.append(base[:, None, 2] + (offset - fall) / normal[:, None, 2])
        signs.append(normal[:, 2] > 0)
    if (signs[0] != signs[1]).any():  # a row in between runs along z
        return 0, depth
    index = (np.array(heights) - grid.translate[0]) / grid.scale[0]
    return max(0, int(np.floor(index.min()))), min(depth, int(np.ceil(index.max())) + 1)


def _footprint(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and largest x and y that interpolation between the voxels reaches, in mm."""
    _, height, width = grid.shape
    x = grid.translate[2] + grid.scale[2] * np.array([-1.0, width])
    y = grid.translate[1] + grid.scale[1] * np.array([-1.0, height])
    return x, y


def _row_planes(geometry: Geometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(views, 3) each: a point at w from the source is seen ``w @ across / (w @ along)`` rows from the centre.

    Of a parallel beam, a point at w from the detector's centre is seen ``w @ across`` rows from it.
    """
    third = geometry.detector_center - geometry.source if geometry.kind == "cone" else geometry.source
    inverse = np.linalg.inv(np.stack([geometry.u, geometry.v, third], axis=2))
    return inverse[:, 1], inverse[:, 2]
