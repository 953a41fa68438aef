"""How noisy the data are, told from them alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from napari_recon.scans.kspace import KSpaceScan

_NORMAL_MAD = 0.6745
"""Median absolute deviation of a normal distribution of standard deviation 1."""


def noise_level(projections: NDArray[np.float32]) -> float:
    """The noise of projections: its standard deviation, the root mean square over pixels, told from them alone.

    High differences along rows and columns leave next to nothing of what is smooth, and edges are few: their median
    absolute deviation is that of the noise (Donoho 1995; Immerkær 1996). That is told for sixteen ranges of values.
    The lowest four, air where there is some, give the noise where no structure is; from there it grows as the others
    say (a line through the logarithms that minds no outliers, Theil 1950), but by no more than that of photons does,
    whose variance is proportional to exp(y): more than that is structure as fine as a pixel. Noise that neighbouring
    pixels share (a scintillator's blur) is underestimated.

    Parameters
    ----------
    projections
        (views, rows, columns), line integrals; 32 views at most are looked at.

    Returns
    -------
    In the projections' unit; NaN where a view has fewer than five columns.
    """
    from scipy.stats import theilslopes

    views, rows, columns = projections.shape
    if columns < 5:
        return np.nan
    few = projections[np.unique(np.linspace(0, views - 1, min(views, 32)).round().astype(int))].astype(np.float32)
    if rows >= 3:
        rough, value, gain = np.diff(np.diff(few, 2, axis=2), 2, axis=1), few[:, 1:-1, 1:-1], 36.0
    else:
        rough, value, gain = np.diff(few, 4, axis=2), few[:, :, 2:-2], 70.0
    order = np.argsort(value, axis=None, kind="stable")
    groups = [group for group in np.array_split(order, 16) if len(group)]
    variances = [(np.median(np.abs(rough.flat[group])) / _NORMAL_MAD) ** 2 / gain for group in groups]
    values = [float(np.median(value.flat[group])) for group in groups]
    known = np.array(variances) > 0
    if not known.any():
        return 0.0
    logarithms, centres = np.log(np.array(variances)[known]), np.array(values)[known]
    slope = float(np.clip(theilslopes(logarithms, centres)[0], 0, 1)) if np.ptp(centres) > 0 else 0.0
    level = np.median((logarithms - slope * centres)[:4])
    return float(np.sqrt(np.exp(level) * np.mean(np.exp(slope * few, dtype=np.float64))))


def kspace_noise(scan: KSpaceScan) -> NDArray[np.float64]:
    """The noise of each coil of k-space: its standard deviation √E|n|², which is √2 times that of either part.

    A noise scan tells it: 1 where k-space was prewhitened with it. Else it is told from the outermost twentieth of the
    sampled sites (a hundred at least), where least of the object is: the magnitudes of complex white noise have the
    median √(ln 2) times that. Objects whose finest detail is above the noise make it come out too large (synthetic
    heads of 48³ with a mean signal of 10, 30 and 100 times the noise of a part: 1.02, 1.08 and 1.6 times), filters that
    damped those sites too small.

    Parameters
    ----------
    scan
        Its samples are read.

    Returns
    -------
    (coils,), in k-space's unit; 0 for a coil that is silent there.
    """
    if scan.noise is not None:
        matrix = scan.coil_matrix
        noise = scan.noise if matrix is None else matrix @ scan.noise
        return np.sqrt(np.mean(np.abs(noise) ** 2, axis=1, dtype=np.float64))
    shape = scan.mask.shape
    places = np.meshgrid(*((np.arange(n) - n // 2) / n for n in shape), indexing="ij", sparse=True)
    distance = np.broadcast_to(sum(place**2 for place in places), shape)[scan.mask]
    count = min(len(distance), max(100, len(distance) // 20))
    outermost = np.argpartition(distance, len(distance) - count)[-count:]
    return np.array([np.median(np.abs(coil[scan.mask][outermost])) for coil in scan.kspace]) / math.sqrt(math.log(2))
