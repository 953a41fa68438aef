"""What looks wrong in a scan, said in sentences before a reconstruction is spent on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_recon.scans.corrections import FlatField, air_level, border_width
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    from napari_recon.scans.scan import Scan

#: Views and pixels that are looked at, at most: enough for what goes wrong, quick on a large scan.
LOOKED_AT, PIXELS = 64, 16_000_000


def look(scan: Scan) -> list[str]:
    """Sentences about what looks wrong; an empty list where nothing does.

    Reads up to 64 evenly spaced views (fewer of a large detector). Bad data is told here, not raised.
    """
    try:
        return _look(scan)
    except ScanError as error:
        return [str(error)]


def _look(scan: Scan) -> list[str]:
    correction = scan.correction()
    views = scan.geometry.views
    count = min(views, LOOKED_AT, max(8, PIXELS // math.prod(scan.geometry.detector_shape)))
    index = np.arange(count) * views // count
    as_measured = scan.with_options(air_normalisation=False)
    said: list[str] = []
    values = np.empty((len(index), *scan.geometry.detector_shape), np.float32)
    saturated = 0
    for k, view in enumerate(index):
        raw = scan.frames[int(view)][None]
        if (fault := scan.frame_fault(raw)) is not None:
            return [f"Frame {int(scan.view_indices[view])} {fault[1]}"]
        if raw.dtype.kind in "ui":
            saturated += int(np.count_nonzero(raw == np.iinfo(raw.dtype).max))
        values[k] = as_measured.correct(raw, correction)[0]

    where = f"in the {len(index)} views looked at" if len(index) < views else f"in {views} views"
    if correction is not None:
        said += _detector(scan, correction, where)
    if saturated > 1e-4 * values.size:
        said.append(
            f"Saturated: {_count(saturated, 'pixel')} {where}; line integrals there are wrong, so shorten the "
            "exposure next time."
        )
    said += _air_and_edges(scan, values)
    said += _axis(scan, index, values)
    said += _views(scan)
    return said


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'s' if n != 1 else ''}"


def _detector(scan: Scan, correction: FlatField, where: str) -> list[str]:
    said = []
    if (dead := int(np.count_nonzero(correction.dead))) > 0:
        said.append(f"Dead in the flats: {_count(dead, 'detector pixel')}; the nearest neighbour's value stands in.")
    if scan.recording.values == "counts" and scan.dark is None:
        said.append("There are no darks, so the detector's offset is taken as zero: line integrals come out too low.")
    if scan.flat is not None and scan.dark is not None and scan.dark.size > 100:
        level = float(np.median(scan.flat - scan.dark))
        hot = int(np.count_nonzero(scan.dark > np.median(scan.dark) + 0.1 * level))
        if hot:
            said.append(f"Hot in the darks: {_count(hot, 'detector pixel')}; expect rings around the axis.")
    if correction.guarded:
        said.append(
            f"No counts are left above the dark in {_count(correction.guarded, 'pixel')} {where}, which were set "
            "to half a count: the object is too dense there, or the darks are too bright."
        )
    return said


def _air_and_edges(scan: Scan, values: NDArray[np.float32]) -> list[str]:
    """Air that is not zero, and an object that leaves the detector."""
    said = []
    peak = float(np.percentile(values, 99.5))
    width, columns = border_width(values.shape[2]), values.shape[2]
    blocks = [values[..., :width], values[..., -width:]]
    offset = float(np.mean(scan.geometry.axis_offset))
    if abs(offset) > 0.1 * columns:  # an offset detector cuts the object on one side on purpose
        blocks = [blocks[1 if offset < 0 else 0]]
    air = float(np.median(air_level(values)))
    # The least that is seen at the border, in any row or any view (medians, so that noise does not count): if most of
    # a view's border lies well above it, what stands there is not air.
    by_row = [np.median(b, axis=(0, 2)) for b in blocks]
    by_view = [np.median(b, axis=(1, 2)) for b in blocks]
    least = min(float(np.percentile(p, 5)) for p in (*by_row, *by_view))
    inside = np.max(by_view, axis=0) - least > 0.1 * max(peak - least, 0.0) + 0.05
    if np.mean(inside) > 0.1:
        said.append(
            f"The object reaches the detector's edge in {round(100 * float(np.mean(inside)))} % of the views: the rim "
            "of the volume will be bright, and its values there are not to be trusted."
        )
    elif abs(air) > max(0.02, 0.02 * peak) and not scan.air_normalisation:
        said.append(
            f"The air beside the object has a line integral of {air:.2f} instead of 0 (the beam was "
            f"{math.exp(-air):.2f} of the flats'): switch air normalisation on."
        )
    return said


def _axis(scan: Scan, index: NDArray[np.intp], values: NDArray[np.float32]) -> list[str]:
    """Parallel beam: a view and its opposite, mirrored, must agree about where the axis is."""
    geometry = scan.geometry
    if geometry.kind != "parallel" or geometry.views < 3 or geometry.detector_shape[1] < 8:
        return []
    if (found := opposite_views_axis(scan)) is None:
        return []
    used = float(np.mean(geometry.axis_offset))
    if abs(found - used) <= max(1.0, 0.005 * geometry.detector_shape[1]):
        return []
    b, (_, columns) = scan.options.binning, scan.recording.geometry.detector_shape
    # In unbinned pixels; binning crops at the high end, which moves the centre.
    crop = (columns % b) / 2
    return [
        f"Views half a turn apart place the rotation axis {found * b - crop:.1f} pixels from the detector's centre, "
        f"not {used * b - crop:.1f}: set the axis offset to {found * b - crop:.1f}."
    ]


def opposite_views_axis(scan: Scan) -> float | None:
    """Where two parallel-beam views half a turn apart see the axis, in (binned) columns right of the centre.

    The line integrals p(θ, s) and p(θ + 180°, -s) are equal, so the shift between one and the other mirrored is twice
    the offset. None where the arc holds no such pair within two angular steps, or where nothing is seen.
    """
    angles = scan.geometry.angles
    step = abs(angles[-1] - angles[0]) / max(1, len(angles) - 1)
    away = np.abs(np.abs(angles - angles[0]) - 180)
    other = int(np.argmin(away))
    if away[other] > 2 * step:
        return None
    correction = scan.correction()
    a, b = (scan.correct(scan.frames[v][None], correction)[0] for v in (0, other))
    b = b[:, ::-1]
    a, b = (_edges(p) for p in (a, b))
    columns = a.shape[1]
    n = 2 * columns
    spectrum = np.fft.rfft(a, n) * np.conj(np.fft.rfft(b, n))
    correlation = np.fft.irfft(spectrum, n).sum(axis=0)
    if not correlation.max() > 0.3 * math.sqrt(float((a**2).sum()) * float((b**2).sum())):
        return None  # the two views do not look alike at all
    k = int(np.argmax(correlation))
    left, top, right = correlation[k - 1], correlation[k], correlation[(k + 1) % n]
    curve = left - 2 * top + right
    shift = k + (0.5 * (left - right) / curve if curve < 0 else 0.0)
    shift = shift - n if shift > columns else shift
    return float(shift) / 2


def _edges(p: NDArray[np.float32]) -> NDArray[Any]:
    """Band-pass along the columns: neither an air offset nor noise should draw the match."""
    p = ndimage.median_filter(p, size=(min(3, p.shape[0]), 3))
    return ndimage.gaussian_filter1d(p.astype(np.float64), 1.0, axis=1, order=1, mode="nearest")


def _views(scan: Scan) -> list[str]:
    geometry, said = scan.geometry, []
    columns = geometry.detector_shape[1]
    angles = geometry.angles
    step = abs(angles[-1] - angles[0]) / max(1, geometry.views - 1)
    arc = abs(angles[-1] - angles[0]) + step
    fan = 0.0
    if geometry.kind == "cone":
        fan = 2 * math.degrees(
            math.atan(columns / 2 * geometry.pixel_size[1] / float(np.mean(geometry.source_detector)))
        )
    # Crowther et al. 1970: a view per half turn for every pi/2 columns.
    full = math.ceil(math.pi / 2 * columns * max(1.0, arc / 180))
    if geometry.views < full / 4:
        said.append(
            f"{geometry.views} views are few for {columns} columns (about {full} sample them fully): FDK will show "
            "streaks; TV or a learned method, or binning, will do better."
        )
    if arc < 179:
        said.append(
            f"The views cover {arc:.4g} degrees, less than half a turn: expect edges along some directions to be lost."
        )
    elif fan and arc < 180 + fan - 1:
        said.append(
            f"The views cover {arc:.4g} degrees; a fan of {fan:.3g} degrees needs {180 + fan:.4g} to see every point "
            "from all sides."
        )
    return said
