"""Where source and detector were in every view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid


@dataclass(frozen=True, eq=False)
class Geometry:
    """An acquisition as one row of 12 numbers a view, in mm, as ASTRA's ``cone_vec`` and ``parallel3d_vec``.

    World coordinates are right-handed with the rotation axis along z. The columns are, as (x, y, z) each: the source's
    position (cone) or the direction in which the rays travel (parallel); the detector's centre; u, the step from one
    column to the next; v, the step from one row to the next. ``|u|`` and ``|v|`` are the pixel pitch. Fan beam is cone
    beam with a single row. Every view may differ: wobble, offsets, tilts, helical and short scans are only other
    vectors.

    Parameters
    ----------
    vectors
        (views, 12), float64, mm.
    detector_shape
        (rows, columns).
    kind
        ``"cone"`` or ``"parallel"``.

    Raises
    ------
    ScanError
        If the array has another number of columns, is not finite, or a detector is degenerate.
    """

    vectors: NDArray[np.float64]
    detector_shape: tuple[int, int]
    kind: Literal["cone", "parallel"] = "cone"

    def __post_init__(self) -> None:
        vectors = np.array(self.vectors, dtype=np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != 12:
            raise ScanError(
                f"The geometry has shape {vectors.shape}; it needs one row of 12 numbers a view "
                "(source, detector centre, u and v, each x y z in mm)."
            )
        if len(vectors) == 0:
            raise ScanError("The geometry holds no views; it needs at least one row of 12 numbers.")
        if not np.isfinite(vectors).all():
            raise ScanError(
                f"The geometry's row {int(np.argwhere(~np.isfinite(vectors))[0, 0])} holds NaN or infinity."
            )
        if self.kind not in ("cone", "parallel"):
            raise ScanError(f"The geometry's kind is {self.kind!r}; it must be 'cone' or 'parallel'.")
        area = np.linalg.norm(np.cross(vectors[:, 6:9], vectors[:, 9:12]), axis=1)
        if (area <= 0).any():
            raise ScanError(f"In view {int(np.argmin(area))} of the geometry, u and v do not span a detector plane.")
        vectors.setflags(write=False)
        rows, columns = (int(n) for n in self.detector_shape)
        if rows < 1 or columns < 1:
            raise ScanError(f"The detector's shape {self.detector_shape} must be (rows, columns) of at least 1.")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "detector_shape", (rows, columns))

    # -- made from what a person knows ---------------------------------------------------------------------------

    @classmethod
    def cone(
        cls,
        angles: ArrayLike,
        detector_shape: tuple[int, int],
        pixel_size: float | tuple[float, float],
        source_object: float,
        source_detector: float,
        axis_offset: float = 0.0,
    ) -> Geometry:
        """A circular cone-beam scan (fan beam if the detector has one row).

        Parameters
        ----------
        angles
            Angle of every view in degrees. At 0 the source is at (0, -source_object, 0) and u points along +x, as
            ASTRA's ``cone``; it turns counter-clockwise seen from +z.
        detector_shape
            (rows, columns).
        pixel_size
            Detector pitch in mm: one number, or (row pitch, column pitch).
        source_object, source_detector
            Distances in mm.
        axis_offset
            By how many columns the rotation axis is seen to the right (towards larger columns) of the detector's
            centre.
        """
        if not 0 < source_object < source_detector:
            raise ScanError(
                f"The source-object distance ({source_object} mm) must be positive and smaller than the "
                f"source-detector distance ({source_detector} mm)."
            )
        s, c, zero, pitch_v, pitch_u = _turn(angles, pixel_size)
        source = np.stack([s, -c, zero], 1) * source_object
        detector = np.stack([-s, c, zero], 1) * (source_detector - source_object)
        u, v = np.stack([c, s, zero], 1) * pitch_u, np.stack([zero, zero, zero + 1], 1) * pitch_v
        return cls(np.hstack([source, detector, u, v]), detector_shape, "cone").with_axis_offset(axis_offset)

    @classmethod
    def parallel(
        cls,
        angles: ArrayLike,
        detector_shape: tuple[int, int],
        pixel_size: float | tuple[float, float],
        axis_offset: float = 0.0,
    ) -> Geometry:
        """A parallel-beam scan; parameters and directions as in :meth:`cone`."""
        s, c, zero, pitch_v, pitch_u = _turn(angles, pixel_size)
        ray, detector = np.stack([-s, c, zero], 1), np.stack([zero, zero, zero], 1)
        u, v = np.stack([c, s, zero], 1) * pitch_u, np.stack([zero, zero, zero + 1], 1) * pitch_v
        return cls(np.hstack([ray, detector, u, v]), detector_shape, "parallel").with_axis_offset(axis_offset)

    # -- read ----------------------------------------------------------------------------------------------------

    @property
    def views(self) -> int:
        """Number of views."""
        return len(self.vectors)

    @property
    def source(self) -> NDArray[np.float64]:
        """(views, 3): the source's position (cone) or the direction of the rays (parallel)."""
        return self.vectors[:, 0:3]

    @property
    def detector_center(self) -> NDArray[np.float64]:
        """(views, 3): the detector's centre in mm."""
        return self.vectors[:, 3:6]

    @property
    def u(self) -> NDArray[np.float64]:
        """(views, 3): the step from a column to the next in mm."""
        return self.vectors[:, 6:9]

    @property
    def v(self) -> NDArray[np.float64]:
        """(views, 3): the step from a row to the next in mm."""
        return self.vectors[:, 9:12]

    @property
    def is_fan(self) -> bool:
        """Whether this is a fan-beam scan: cone beam with one detector row."""
        return self.kind == "cone" and self.detector_shape[0] == 1

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Mean detector pitch (rows, columns) in mm."""
        return float(np.linalg.norm(self.v, axis=1).mean()), float(np.linalg.norm(self.u, axis=1).mean())

    @property
    def normal(self) -> NDArray[np.float64]:
        """(views, 3): unit normal of the detector, pointing away from the source."""
        n = np.cross(self.u, self.v)
        n /= np.linalg.norm(n, axis=1, keepdims=True)
        along = self.detector_center - self.source if self.kind == "cone" else self.source
        return n * np.where(np.sum(n * along, axis=1, keepdims=True) < 0, -1.0, 1.0)

    @property
    def source_object(self) -> NDArray[np.float64]:
        """(views,): distance from the source to the world's origin along the detector's normal, mm; inf if parallel."""
        if self.kind == "parallel":
            return np.full(self.views, np.inf)
        return -np.sum(self.normal * self.source, axis=1)

    @property
    def source_detector(self) -> NDArray[np.float64]:
        """(views,): distance from the source to the detector's plane in mm; inf if parallel."""
        if self.kind == "parallel":
            return np.full(self.views, np.inf)
        return np.sum(self.normal * (self.detector_center - self.source), axis=1)

    @property
    def magnification(self) -> float:
        """Mean magnification at the rotation axis (1 for parallel beam)."""
        if self.kind == "parallel":
            return 1.0
        return float(np.mean(self.source_detector / self.source_object))

    @property
    def angles(self) -> NDArray[np.float64]:
        """(views,): the views' angles about z in degrees, unwrapped; 0 when the central ray travels along +y."""
        along = self.detector_center - self.source if self.kind == "cone" else self.source
        if self.kind == "cone":  # from the source, not the (possibly offset) detector centre
            along = -self.source
        return np.rad2deg(np.unwrap(np.arctan2(-along[:, 0], along[:, 1])))

    @property
    def axis_offset(self) -> NDArray[np.float64]:
        """(views,): where the world's z axis is seen, in columns to the right of the detector's centre."""
        w = self.detector_center
        if self.kind == "cone":
            n = self.normal
            ray = -self.source  # through the origin
            hit = self.source + ray * (self.source_detector / np.sum(ray * n, axis=1))[:, None]
        else:
            n = self.normal
            hit = self.source * (np.sum(w * n, axis=1) / np.sum(self.source * n, axis=1))[:, None]
        return np.sum((hit - w) * self.u, axis=1) / np.sum(self.u**2, axis=1)

    @property
    def field_of_view_radius(self) -> float:
        """Radius in mm of the cylinder about z that the scan sees (from one side at least, with an offset detector)."""
        columns = self.detector_shape[1]
        half = (columns - 1) / 2 + np.abs(np.mean(self.axis_offset))
        pitch = self.pixel_size[1]
        if self.kind == "parallel":
            return float(half * pitch)
        fan = math.atan(half * pitch / float(np.mean(self.source_detector)))
        return float(np.mean(self.source_object) * math.sin(fan))

    def default_grid(self, shape: tuple[int, int, int] | None = None, voxel_size: float | None = None) -> Grid:
        """A grid that covers what the scan sees, with voxels the size of a pixel at the rotation axis.

        Parameters
        ----------
        shape
            (D, H, W); the voxel size then follows, unless it is given too.
        voxel_size
            mm; the shape then follows.
        """
        rows, _ = self.detector_shape
        pitch_v, pitch_u = (p / self.magnification for p in self.pixel_size)
        across = max(1, math.ceil(2 * self.field_of_view_radius / pitch_u))
        depth = 1 if rows == 1 else max(1, round(rows * pitch_v / pitch_u))
        return Grid((depth, across, across), pitch_u).resampled(shape, voxel_size)

    def __repr__(self) -> str:
        rows, columns = self.detector_shape
        kind = "fan" if self.is_fan else self.kind
        pitch_v, pitch_u = self.pixel_size
        distances = ""
        if self.kind == "cone":
            distances = (
                f", source-object {np.mean(self.source_object):.4g} mm"
                f", source-detector {np.mean(self.source_detector):.4g} mm"
            )
        arc = abs(self.angles[-1] - self.angles[0])
        return (
            f"Geometry({kind} beam, {self.views} views over {arc:.4g} degrees, detector {rows} x {columns} of "
            f"{pitch_v:.4g} x {pitch_u:.4g} mm{distances})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return (
            self.kind == other.kind
            and self.detector_shape == other.detector_shape
            and np.array_equal(self.vectors, other.vectors)
        )

    __hash__ = None  # type: ignore[assignment]

    # -- changed -------------------------------------------------------------------------------------------------

    def select(self, views: Sequence[int] | NDArray[np.integer] | slice) -> Geometry:
        """The geometry of some of the views."""
        return Geometry(self.vectors[views], self.detector_shape, self.kind)

    def binned(self, factor: int) -> Geometry:
        """The geometry after ``factor`` x ``factor`` pixels became one; rows and columns left over are cropped.

        The centre moves by half the cropped pixels, since the crop is taken from the high end. A single row (fan
        beam) stays as it is.
        """
        rows, columns = self.detector_shape
        fv, fu = (1 if rows == 1 else factor), factor
        if columns // fu < 1 or rows // fv < 1:
            raise ScanError(
                f"Binning by {factor} leaves nothing of a detector of {rows} x {columns} pixels; bin by less."
            )
        vectors = self.vectors.copy()
        vectors[:, 3:6] -= self.u * ((columns % fu) / 2) + self.v * ((rows % fv) / 2)
        vectors[:, 6:9] *= fu
        vectors[:, 9:12] *= fv
        return Geometry(vectors, (rows // fv, columns // fu), self.kind)

    def with_rows(self, rows: slice) -> Geometry:
        """The geometry of some of the detector's rows, [start, stop)."""
        have, columns = self.detector_shape
        if not 0 <= rows.start < rows.stop <= have:
            raise ScanError(f"The detector has rows 0 to {have - 1}, not {rows.start} to {rows.stop - 1}.")
        vectors = self.vectors.copy()
        vectors[:, 3:6] += self.v * ((rows.start + rows.stop - have) / 2)
        return Geometry(vectors, (rows.stop - rows.start, columns), self.kind)

    def with_axis_offset(self, columns: float) -> Geometry:
        """The geometry with the detector moved so that the axis is seen ``columns`` further to the right."""
        vectors = self.vectors.copy()
        vectors[:, 3:6] -= columns * self.u
        return Geometry(vectors, self.detector_shape, self.kind)


def _turn(angles: ArrayLike, pixel_size: float | tuple[float, float]) -> tuple[NDArray, NDArray, NDArray, float, float]:
    angle = np.deg2rad(np.atleast_1d(np.asarray(angles, dtype=np.float64)))
    pitch_v, pitch_u = (pixel_size, pixel_size) if isinstance(pixel_size, (int, float)) else pixel_size
    if not (pitch_u > 0 and pitch_v > 0):
        raise ScanError(f"The pixel size {pixel_size} must be positive, in mm.")
    return np.sin(angle), np.cos(angle), np.zeros_like(angle), float(pitch_v), float(pitch_u)
