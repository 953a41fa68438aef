"""Where k-space is sampled: patterns to simulate with or to undersample by, and the calibration centre of a mask."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError


def sampling_mask(
    shape: tuple[int, int, int],
    acceleration: float,
    kind: Literal["poisson", "gaussian"] = "poisson",
    calibration: int = 24,
    seed: int = 0,
    *,
    readout: int | None = 2,
    measured: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """A random pattern over the phase-encoded directions, with a fully sampled centre; whole readout lines.

    "poisson" is a Poisson disc: no two lines are closer than a radius that grows with the distance from the centre, as
    far as the acceleration asks for. "gaussian" draws lines with a density that falls from the centre.

    Parameters
    ----------
    shape
        (D, H, W).
    acceleration
        Lines over lines kept, at least 1; met to the line.
    calibration
        Edge of the fully sampled centre along both directions. It is made smaller where it would take more than half
        of the lines, so that a pattern is left.
    seed
        Of the pattern.
    readout
        The axis that is sampled wholly. None, for one slice (D = 1) whose samples are single sites.
    measured
        (D, H, W): sites that may be sampled, constant along the readout. All, by default.

    Returns
    -------
    (D, H, W), bool.

    Raises
    ------
    ScanError
        If the acceleration is below one, or fewer lines than it asks for were measured.
    """
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise ScanError(f"The acceleration {acceleration} must be a number of at least 1.")
    if readout is None:
        readout = 0 if shape[0] == 1 else 2
    rows, columns = (n for axis, n in enumerate(shape) if axis != readout)
    allowed: NDArray[np.bool_] = np.ones((rows, columns), bool)
    if measured is not None:
        np.any(measured, axis=readout, out=allowed)
    wanted = max(1, round(rows * columns / acceleration))
    if (have := int(np.count_nonzero(allowed))) < wanted:
        raise ScanError(
            f"{have} of {rows * columns} lines were measured, fewer than an acceleration of {acceleration:g} keeps: "
            f"ask for more than {rows * columns / have:.3g}."
        )
    centre = allowed & _centre((rows, columns), calibration, wanted // 2)
    rng = np.random.default_rng(seed)
    pattern = (_poisson if kind == "poisson" else _gaussian)(allowed, centre, wanted, rng)
    return np.ascontiguousarray(np.broadcast_to(np.expand_dims(pattern, readout), shape))


def calibration_size(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """(D, H, W): the box around the middle in which every site is sampled, grown along all axes alike.

    An axis stops growing where its next plane has a hole. Zeros where the middle itself is not sampled.
    """
    middle = [n // 2 for n in mask.shape]
    if not mask[tuple(middle)]:
        return 0, 0, 0
    box = [[m, m + 1] for m in middle]
    growing = [axis for axis in range(3) if mask.shape[axis] > 1]
    while growing:
        for axis in tuple(growing):
            (start, stop), n = box[axis], mask.shape[axis]
            # Sizes run 1, 2, 3, ... with the middle at size // 2: the low end grows first.
            low = start > 0 and middle[axis] - start <= stop - 1 - middle[axis]
            low = low or (stop == n and start > 0)
            plane = start - 1 if low else stop
            index = [slice(*edges) for edges in box]
            index[axis] = slice(plane, plane + 1)
            if stop - start == n or not mask[tuple(index)].all():
                growing.remove(axis)
            elif low:
                box[axis][0] = plane
            else:
                box[axis][1] = plane + 1
    d, h, w = (stop - start for start, stop in box)
    return d, h, w


def _centre(shape: tuple[int, int], calibration: int, most: int) -> NDArray[np.bool_]:
    size = [min(calibration, n) for n in shape]
    while math.prod(size) > max(1, most):
        size[int(np.argmax(size))] -= 1
    centre = np.zeros(shape, bool)
    rows, columns = (slice(n // 2 - s // 2, n // 2 - s // 2 + s) for n, s in zip(shape, size, strict=True))
    centre[rows, columns] = True
    return centre


def _distance(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Distance from the middle, one at the edge of either axis."""
    y, x = ((np.arange(n) - n // 2) / max(1, n // 2) for n in shape)
    return np.hypot(y[:, None], x[None, :])


def _gaussian(
    allowed: NDArray[np.bool_], centre: NDArray[np.bool_], wanted: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Lines drawn without replacement, with a Gaussian density of a third of the half width."""
    # Exponential races: the first arrivals, at rates w, are a weighted draw without replacement. In logarithms, since
    # the rates in the corners are tiny.
    rate = -0.5 * (_distance(allowed.shape) / (1 / 3)) ** 2  # type: ignore[arg-type]
    arrival = np.log(rng.exponential(size=allowed.shape)) - rate
    arrival[~allowed] = np.inf
    arrival[centre] = -np.inf
    pattern = np.zeros(allowed.size, bool)
    pattern[np.argsort(arrival, axis=None, kind="stable")[:wanted]] = True
    return pattern.reshape(allowed.shape)


def _poisson(
    allowed: NDArray[np.bool_], centre: NDArray[np.bool_], wanted: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Sites in random order, each kept if no kept one is too near; the radius 1 + slope · distance is searched for."""
    order = rng.permutation(np.flatnonzero(allowed & ~centre)).tolist()
    distance = _distance(allowed.shape)  # type: ignore[arg-type]
    low, high = 0.0, 2 * math.sqrt(allowed.size / wanted)
    best = order  # a slope of zero keeps them all
    for _ in range(14):
        slope = (low + high) / 2
        kept = _discs(order, centre, 1 + slope * distance)
        if len(kept) + np.count_nonzero(centre) < wanted:
            high = slope
        else:
            low, best = slope, kept
    # A few too many are left: the last ones found stand in the last gaps.
    pattern = centre.ravel().copy()
    pattern[best[: wanted - int(np.count_nonzero(centre))]] = True
    return pattern.reshape(allowed.shape)


def _discs(order: list[int], centre: NDArray[np.bool_], radius: NDArray[np.float64]) -> list[int]:
    """Flat indices of the sites that are kept, in order; every kept site blocks the sites nearer than its radius."""
    rows, columns = centre.shape
    reach = math.ceil(float(radius.max()))
    blocked = np.zeros((rows + 2 * reach, columns + 2 * reach), bool)  # a margin, so that discs need no clipping
    square = np.ceil(radius**2).astype(int)  # distances on a grid are roots of whole numbers
    stamps: dict[int, NDArray[np.bool_]] = {}

    def block(row: int, column: int) -> None:
        limit = int(square[row, column])
        if (stamp := stamps.get(limit)) is None:
            r = math.isqrt(max(0, limit - 1))
            offsets = np.arange(-r, r + 1) ** 2
            stamp = stamps[limit] = offsets[:, None] + offsets[None, :] < limit
        r = len(stamp) // 2
        blocked[row + reach - r : row + reach + r + 1, column + reach - r : column + reach + r + 1] |= stamp

    for row, column in np.argwhere(centre):
        block(int(row), int(column))
    kept = []
    for site in order:
        row, column = divmod(site, columns)
        if not blocked[row + reach, column + reach]:
            kept.append(site)
            block(row, column)
    return kept
