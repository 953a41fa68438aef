"""From detector counts to line integrals: dark and flat, binning, -log, air."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_recon.scans.errors import ScanError

#: A pixel is dead when its flat, less its dark, is below this part of the detector's median.
DEAD = 0.01


def bin_pixels(frames: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """Sum ``factor`` x ``factor`` pixels into one; what is left over at the high end is cropped.

    Parameters
    ----------
    frames
        (..., rows, columns). A single row (fan beam) is binned along the columns only, as
        :meth:`Geometry.binned` does.

    Returns
    -------
    (..., rows // factor, columns // factor), float32.
    """
    rows, columns = frames.shape[-2:]
    fv, fu = (1 if rows == 1 else factor), factor
    frames = frames[..., : rows // fv * fv, : columns // fu * fu]
    out = np.zeros((*frames.shape[:-2], rows // fv, columns // fu), np.float32)
    for i in range(fv):  # adding strided views is several times faster than a sum over blocks' axes
        for j in range(fu):
            out += frames[..., i::fv, j::fu]
    return out


class FlatField:
    """Turns raw counts into line integrals: -log((p - dark) / (flat - dark)), after binning the counts.

    Counts are binned before the logarithm, since it is photons that add up. Dead pixels (a flat no brighter than its
    dark) take no part; where a whole bin is dead it takes its nearest neighbour's value. A transmission below half a
    count is set to half a count, so that -log stays finite, and counted.

    Parameters
    ----------
    flat, dark
        (rows, columns) means; None for a flat of one and a dark of zero (transmission data).
    detector_shape
        (rows, columns).
    binning
        Pixels along each edge that become one.

    Attributes
    ----------
    dead
        (rows, columns), bool: dead pixels of the unbinned detector.
    guarded
        How many values were raised to half a count so far.

    Raises
    ------
    ScanError
        If no pixel of the flat is brighter than the dark.
    """

    def __init__(
        self,
        flat: NDArray[np.float32] | None,
        dark: NDArray[np.float32] | None,
        detector_shape: tuple[int, int],
        binning: int = 1,
    ) -> None:
        self._dark = np.zeros(detector_shape, np.float32) if dark is None else dark
        gain = np.ones(detector_shape, np.float32) if flat is None else flat - self._dark
        finite = np.isfinite(gain)
        typical = np.median(gain[finite & (gain > 0)]) if (finite & (gain > 0)).any() else 0.0
        if not typical > 0:
            raise ScanError(
                "The flats are nowhere brighter than the darks, so there is no beam to divide by: check that flats and "
                "darks are not swapped or empty."
            )
        with np.errstate(invalid="ignore"):
            self.dead = ~(finite & (gain > DEAD * typical))
        self._alive = None if not self.dead.any() else ~self.dead
        self._dark = np.where(self.dead, 0, self._dark).astype(np.float32)
        self._binning = binning
        gain = bin_pixels(np.where(self.dead, 0, gain), binning)
        empty = gain <= 0
        self._scale = (1 / np.where(empty, 1, gain)).astype(np.float32)
        # Half a count where there are counts; floats around one are transmission already.
        self._floor = np.maximum(np.where(typical > 10, 0.5, 1e-5) * self._scale, 1e-7).astype(np.float32)
        self._nearest = None
        if empty.any():
            self._nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
        self.guarded = 0

    def transmission(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        """(views, rows, columns) raw counts to transmission on the binned detector, not yet guarded."""
        counts = frames.astype(np.float32)
        counts -= self._dark
        if self._alive is not None:
            counts *= self._alive
        if self._binning > 1:
            counts = bin_pixels(counts, self._binning)
        counts *= self._scale
        return counts

    def line_integrals(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        """(views, rows, columns) raw counts to line integrals on the binned detector."""
        t = self.transmission(frames)
        if self._nearest is not None:
            t = t[:, self._nearest[0], self._nearest[1]]
        low = t < self._floor
        self.guarded += int(np.count_nonzero(low))
        np.maximum(t, self._floor, out=t)
        np.log(t, out=t)
        return np.negative(t, out=t)


def bin_line_integrals(frames: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """Bin data whose -log was taken already: the transmissions are averaged, since it is photons that add up."""
    values = frames.astype(np.float32)
    if factor == 1:
        return values
    rows = values.shape[-2]
    pixels = factor if rows == 1 else factor * factor
    binned = bin_pixels(np.exp(-values), factor) / np.float32(pixels)
    return -np.log(np.maximum(binned, np.finfo(np.float32).tiny))


def border_width(columns: int) -> int:
    """How many columns at each side of the detector are looked at for air."""
    return max(1, round(columns * 0.03))


def border_medians(line_integrals: NDArray[np.float32]) -> NDArray[np.float32]:
    """(views, 2): median line integral of the columns at the low and at the high side of the detector.

    The median over all rows, so that a holder or a few bad pixels do not matter.
    """
    width = border_width(line_integrals.shape[-1])
    sides = (line_integrals[..., :width], line_integrals[..., -width:])
    return np.stack([np.median(s, axis=(1, 2)) for s in sides], axis=1).astype(np.float32)


def air_level(line_integrals: NDArray[np.float32], agree: float = 0.05) -> NDArray[np.float32]:
    """(views,): line integral of the air beside the object.

    The mean of both sides where they agree, else the lower one: whatever stands in the beam (object, holder, a
    truncated or offset detector's inner side) can only raise it.
    """
    sides = border_medians(line_integrals)
    return np.where(np.abs(sides[:, 0] - sides[:, 1]) <= agree, sides.mean(axis=1), sides.min(axis=1))
