"""Measures at a place: along a line, between two regions, within one, and over values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_recon.measures.comparison import as_mask, value_range
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid

_PER_VOXEL = 4
"""Values of a profile a voxel."""

_REVERSAL = 0.15
"""How much of its rise an edge may take back, as noise does, before it counts as ended."""

_NORMAL_MAD = 0.6745
"""Median absolute deviation of a normal distribution of standard deviation 1."""

_CLEAR = 6.0
"""By how many times the noise a step must rise to be an edge; neighbours in noise alone differ by less."""

_SHALLOW = 5.0
"""Voxels from its edge to its middle that a slice of a region must have for its cupping to be told."""


@dataclass(frozen=True)
class LineProfile:
    """Values along a line.

    Attributes
    ----------
    position
        (n,) mm from the start.
    value
        (n,), by trilinear interpolation.
    edge_width
        From 10 to 90 % of the largest edge, in mm; NaN if there is none.
    edge_position
        Where that edge is half way, in mm from the start; NaN likewise.
    """

    position: NDArray[np.float64]
    value: NDArray[np.float64]
    edge_width: float
    edge_position: float


def line_profile(
    volume: NDArray[np.float32], grid: Grid, start_mm: Sequence[float], end_mm: Sequence[float]
) -> LineProfile:
    """Values along a line, and the 10-90 % width of its largest edge.

    The edge's two levels are the medians of what lies to either side of it, up to where the values turn back, so that
    noise and other edges count for little.

    Parameters
    ----------
    volume
        (D, H, W).
    grid
        Of it.
    start_mm, end_mm
        (z, y, x) in the world; beyond the volume its border's values go on.

    Raises
    ------
    ScanError
        If the two are one point.
    """
    from scipy.ndimage import map_coordinates

    start, end = (np.asarray(point, float) for point in (start_mm, end_mm))
    length = float(np.linalg.norm(end - start))
    if not (math.isfinite(length) and length > 0):
        raise ScanError("A line needs two different ends: draw a longer one.")
    count = max(2, math.ceil(length / min(grid.scale) * _PER_VOXEL) + 1)
    share = np.linspace(0, 1, count)
    places = start[:, None] + (end - start)[:, None] * share
    indices = (places - np.array(grid.translate)[:, None]) / np.array(grid.scale)[:, None]
    # Only the box about the line is read: volumes may be large.
    low = np.clip(np.floor(indices.min(axis=1)).astype(int), 0, np.array(volume.shape) - 1)
    high = np.clip(np.ceil(indices.max(axis=1)).astype(int) + 1, low + 1, volume.shape)
    part = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    value = map_coordinates(part, indices - low[:, None], np.float64, order=1, mode="nearest")
    position = share * length
    width, middle = _edge(position, value)
    return LineProfile(position, value, width, middle)


def _edge(position: NDArray[np.float64], value: NDArray[np.float64]) -> tuple[float, float]:
    """Width and position of the largest edge of a profile, or NaN twice."""
    none = math.nan, math.nan
    if not np.isfinite(value).all() or np.ptp(value) <= 1e-12 * np.abs(value).max():
        return none
    # The steepest place at the scale of a voxel, and the way up to either side of it.
    slope = value[_PER_VOXEL:] - value[:-_PER_VOXEL] if len(value) > 2 * _PER_VOXEL else np.diff(value)
    steepest = int(np.argmax(np.abs(slope))) + (len(value) - len(slope)) // 2
    rising = value if slope[np.argmax(np.abs(slope))] > 0 else -value
    first = steepest - _way(-rising[steepest::-1])
    last = steepest + _way(rising[steepest:])
    stretch = rising[first : last + 1]
    low, high = float(stretch.min()), float(stretch.max())
    at = [_reached(stretch, low + share * (high - low), steepest - first) for share in (0.1, 0.9)]
    if at[0] is None or at[1] is None:
        return none
    # Now the levels proper: the medians of what lies beyond.
    before, after = stretch[: math.floor(at[0]) + 1], stretch[math.ceil(at[1]) :]
    low, high = float(np.median(before)), float(np.median(after))
    if high - low <= _CLEAR * _roughness(value):
        return none
    found = [_reached(stretch, low + share * (high - low), steepest - first) for share in (0.1, 0.5, 0.9)]
    if None in found:
        return none
    ten, half, ninety = (float(place) for place in found if place is not None)
    step = position[1] - position[0]
    return float(abs(ninety - ten) * step), float(position[0] + (first + half) * step)


def _roughness(value: NDArray[np.float64]) -> float:
    """The noise of a profile, by the median of second differences of values that share no voxel."""
    far = 2 * _PER_VOXEL
    if len(value) <= 4 * far:
        return 0.0
    bends = value[2 * far :] - 2 * value[far:-far] + value[: -2 * far]
    return float(np.median(np.abs(bends))) / _NORMAL_MAD / math.sqrt(6)


def _way(values: NDArray[np.float64]) -> int:
    """How many steps values go on rising, before they take back too much of their rise; to the largest of them."""
    top, highest = 0, values[0]
    for number, value in enumerate(values):
        if value >= highest:
            top, highest = number, value
        elif highest - value > _REVERSAL * (highest - values[0]) and highest > values[0]:
            # Of a level with noise all that lies on it counts, up to where it is left.
            return number - 1
    return len(values) - 1 if top else 0


def _reached(stretch: NDArray[np.float64], level: float, near: int) -> float | None:
    """Where a rising stretch crosses a level, nearest to an index, between its values; None where it does not."""
    crossings = np.flatnonzero((stretch[:-1] < level) & (stretch[1:] >= level))
    if not len(crossings):
        return None
    i = int(crossings[np.argmin(np.abs(crossings + 0.5 - near))])
    return i + float((level - stretch[i]) / (stretch[i + 1] - stretch[i]))


def contrast_to_noise(volume: NDArray[np.float32], first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Contrast-to-noise ratio of two regions, |μ₁ - μ₂| / √((σ₁² + σ₂²) / 2); infinite where there is no noise.

    Parameters
    ----------
    volume
        (D, H, W).
    first, second
        Masks of the two, each uniform: (H, W), (1, H, W) or (D, H, W).

    Raises
    ------
    ScanError
        If a region is empty or of another shape.
    """
    (mean, variance), (other, its) = moments(volume, first), moments(volume, second)
    contrast, noise = abs(mean - other), math.sqrt((variance + its) / 2)
    if noise == 0:
        return math.inf if contrast > 0 else 0.0
    return contrast / noise


def moments(volume: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """Mean and variance of the values where ``mask`` is."""
    inside = as_mask(mask, volume.shape)
    count, mean, deviation = 0, 0.0, 0.0
    for z, plane in enumerate(volume):  # Chan et al. 1979: stable, and no copy of the volume
        values = plane[inside[min(z, len(inside) - 1)]].astype(np.float64)
        if not values.size:
            continue
        own = float(values.mean())
        total = count + values.size
        deviation += float(np.sum((values - own) ** 2)) + (own - mean) ** 2 * count * values.size / total
        mean += (own - mean) * values.size / total
        count = total
    return mean, deviation / count


def cupping(volume: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Cupping of a uniform object, (μ_edge - μ_centre) / μ_edge: what beam hardening and scatter do to it.

    The edge is the outer fifth of the way to the middle of each slice, less the two voxels that are blurred with what
    lies outside; the centre is the inner fifth (after Hunter & McDavid 2012,
    Dentomaxillofac. Radiol. 41:217).

    Parameters
    ----------
    volume
        (D, H, W).
    mask
        The whole object, (H, W), (1, H, W) or (D, H, W).

    Returns
    -------
    0.1 where the centre is a tenth too dark; negative where it is too bright; NaN where the object is thinner than ten
    voxels, or its edge has the value 0.
    """
    from scipy.ndimage import distance_transform_edt

    inside = as_mask(mask, volume.shape)
    sums, counts = np.zeros(2), np.zeros(2)
    zones: tuple[NDArray[np.bool_], ...] | None = None
    for z, plane in enumerate(volume):
        if zones is None or len(inside) > 1:
            depth = distance_transform_edt(np.pad(inside[z], 1))[1:-1, 1:-1]  # beyond the volume is outside
            deepest = float(depth.max())
            zones = None
            if deepest >= _SHALLOW:
                edge = (depth > 2) & (depth <= max(0.2 * deepest, 3))
                zones = edge, depth >= 0.8 * deepest
        if zones is None:
            if len(inside) == 1:
                break
            continue
        for zone, chosen in enumerate(zones):
            sums[zone] += float(plane[chosen].sum(dtype=np.float64))
            counts[zone] += int(chosen.sum())
    if not counts.all():
        return math.nan
    edge_mean, centre_mean = sums / counts
    return float((edge_mean - centre_mean) / edge_mean) if edge_mean != 0 else math.nan


def histogram(
    volumes: Sequence[NDArray[np.float32]], mask: NDArray[np.bool_] | None = None, bins: int = 256
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How often values occur in volumes, in bins that they share.

    Parameters
    ----------
    volumes
        Each (D, H, W), of one shape.
    mask
        Which voxels count; None counts all.
    bins
        Between the least and the largest value of all.

    Returns
    -------
    Edges (bins + 1,) and counts (volumes, bins).
    """
    if not volumes:
        raise ScanError("A histogram needs at least one volume.")
    inside = as_mask(mask, volumes[0].shape)
    ranges = [value_range(volume, inside) for volume in volumes]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ScanError("A volume holds NaN or infinity, so that its values have no histogram.")
    edges = np.histogram_bin_edges(np.array([low, high]), bins)
    counts = np.zeros((len(volumes), bins), np.int64)
    for number, volume in enumerate(volumes):
        for z, plane in enumerate(volume):
            counts[number] += np.histogram(plane[inside[min(z, len(inside) - 1)]], edges)[0]
    return edges, counts
