"""How far a volume is from a reference: on one grid, in a region, with a range of values that is told.

Volumes are (D, H, W). A mask says which voxels count: (D, H, W), or (H, W) and (1, H, W) for the same in every slice;
None counts all. All is done slice by slice, or in slabs, so that volumes of 512³ need no copies of themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid

Similarity = Literal["2d", "3d"]
"""Neighbourhoods of SSIM: in slices, the mean of which is the usual figure, or along all three axes."""

_WINDOW = 11
"""Edge in voxels of SSIM's Gaussian window of sigma 1.5."""

_SLAB = 2**20
"""Voxels that a thread compares at a time in 3D, beside their margin."""

_THREADS = min(4, os.cpu_count() or 1)
"""How many do."""


class PlacedVolume(Protocol):
    """A volume and where its voxels are: what a file was read to, or a layer."""

    @property
    def data(self) -> NDArray[np.float32]:
        """(D, H, W)."""
        ...

    @property
    def voxel_size(self) -> float | None:
        """Edge of a voxel in mm; None where it is not known, and then ``grid`` means nothing but its shape.

        Of one whose voxels are no cubes it is None too, and an attribute ``scale`` holds their edges.
        """
        ...

    @property
    def grid(self) -> Grid:
        """Where the voxels are."""
        ...


@dataclass(frozen=True)
class Region:
    """Where is measured.

    Attributes
    ----------
    name
        As tables show it.
    mask
        (D, H, W), or (1, H, W): the same in every slice.
    uniform
        Whether it is meant to be of one value, so that what varies in it is noise or an artefact.
    """

    name: str
    mask: NDArray[np.bool_]
    uniform: bool = True


# -- regions -------------------------------------------------------------------------------------------------------


def field_of_view(grid: Grid, radius: float | None = None) -> NDArray[np.bool_]:
    """(H, W): which columns of voxels lie within ``radius`` mm of the axis; half the volume's width if None."""
    _, h, w = grid.shape
    _, y0, x0 = grid.translate
    y, x = y0 + grid.scale[1] * np.arange(h), x0 + grid.scale[2] * np.arange(w)
    if radius is None:
        radius = min(grid.extent[1:]) / 2
    inside = y[:, None] ** 2 + x[None, :] ** 2 <= radius**2
    return inside if inside.any() else np.ones((h, w), bool)


def field_of_view_region(grid: Grid, radius: float | None = None) -> Region:
    """The region of :func:`field_of_view`."""
    return Region("field of view", field_of_view(grid, radius)[None], uniform=False)


def box_region(grid: Grid, low_mm: Sequence[float], high_mm: Sequence[float], name: str = "box") -> Region:
    """The voxels whose centres lie in a box.

    Parameters
    ----------
    grid
        Of the volumes.
    low_mm, high_mm
        Opposite corners (z, y, x) in mm, in either order.
    name
        Of the region.

    Raises
    ------
    ScanError
        If no voxel's centre lies in the box.
    """
    inside = []
    for n, start, step, one, other in zip(grid.shape, grid.translate, grid.scale, low_mm, high_mm, strict=True):
        place = start + step * np.arange(n)
        slack = 1e-6 * step  # corners are often given as centres of voxels, which rounding must not lose
        inside.append((place >= min(one, other) - slack) & (place <= max(one, other) + slack))
    z, y, x = inside
    mask = z[:, None, None] & y[:, None] & x
    if not mask.any():
        ends = [(t, t + (n - 1) * s) for t, n, s in zip(grid.translate, grid.shape, grid.scale, strict=True)]
        reach = ", ".join(f"{axis} from {a:.4g} to {b:.4g}" for axis, (a, b) in zip("zyx", ends, strict=True))
        raise ScanError(f"No voxel lies in the box: its corners (z, y, x) are in mm, and the volume has {reach}.")
    return Region(name, mask)


def label_regions(labels: NDArray[np.integer]) -> list[Region]:
    """A region for each label, "label 1" and so on; 0 is none.

    Parameters
    ----------
    labels
        (D, H, W), whole numbers.

    Raises
    ------
    ScanError
        If nothing is labelled, or the values are no whole numbers.
    """
    found = np.unique(labels)
    if not np.array_equal(found, np.round(found)):
        raise ScanError("The labels are no whole numbers, so they are no labels: give a volume of 0, 1, 2, ...")
    if not found.any():
        raise ScanError("Nothing is labelled: all labels are 0, which stands for no region.")
    if len(found) > 256:
        raise ScanError(f"There are {len(found)} labels, which are too many regions for a table: give 256 at most.")
    return [Region(f"label {int(label)}", np.asarray(labels == label)) for label in found if label != 0]


# -- one grid ------------------------------------------------------------------------------------------------------


def is_on_grid(volume: PlacedVolume, grid: Grid) -> bool:
    """Whether a volume's voxels are those of ``grid``; where its voxel size is not known, the shape decides."""
    if volume.data.shape != grid.shape:
        return False
    if not _is_placed(volume):
        return True
    same = np.allclose(volume.grid.scale, grid.scale, rtol=1e-4)
    return bool(same and np.allclose(volume.grid.center, grid.center, atol=1e-3 * grid.voxel_size))


def on_grid(volume: PlacedVolume, grid: Grid, order: Literal[0, 1] = 1) -> NDArray[np.float32]:
    """The volume's values at the voxels of ``grid``.

    Parameters
    ----------
    volume
        One whose file tells no voxel size is taken to be on the grid, if it has its shape.
    grid
        Where values are wanted.
    order
        1 interpolates trilinearly; 0 takes the nearest voxel's, as labels need.

    Returns
    -------
    (D, H, W), zero outside of the volume; its own data where it is on the grid, see :func:`is_on_grid`.

    Raises
    ------
    ScanError
        If the volume has another shape and no voxel size.
    """
    if is_on_grid(volume, grid):
        return volume.data
    if not _is_placed(volume):
        raise ScanError(
            f"The volume of {volume.data.shape} voxels has no voxel size in its file, so it cannot be compared with "
            f"one of {grid.shape}: write its voxel size in mm, or reconstruct on its shape."
        )
    from scipy.ndimage import affine_transform

    own = volume.grid
    steps = [wanted / edge for wanted, edge in zip(grid.scale, own.scale, strict=True)]
    offset = [(a - b) / edge for a, b, edge in zip(grid.translate, own.translate, own.scale, strict=True)]
    beyond = "nearest" if 1 in volume.data.shape else "constant"  # a single slice (fan beam) has no neighbours
    return affine_transform(volume.data, steps, offset, grid.shape, volume.data.dtype, order=order, mode=beyond)


def fit_scale(
    volume: NDArray[np.float32], reference: NDArray[np.float32], mask: NDArray[np.bool_] | None = None
) -> tuple[float, float]:
    """Scale and offset that bring a volume nearest to a reference, by least squares: for units that differ.

    Parameters
    ----------
    volume, reference
        (D, H, W), on the same grid.
    mask
        Which voxels count.

    Returns
    -------
    (scale, offset): ``scale * volume + offset`` is in the reference's unit.

    Raises
    ------
    ScanError
        If the volume is constant where it counts.
    """
    inside = as_mask(mask, reference.shape)
    _expect_one_shape(volume, reference)
    count = 0.0
    moments = np.zeros((2, 2))
    # About a value of each, since squares of values that differ by little lose their digits.
    centre = [float(_first(values, inside)) for values in (volume, reference)]
    total = np.zeros(2)
    for z, (plane, truth) in enumerate(zip(volume, reference, strict=True)):
        chosen = inside[min(z, len(inside) - 1)]
        both = np.stack([plane[chosen], truth[chosen]]).astype(np.float64) - np.array(centre)[:, None]
        moments += both @ both.T
        total += both.sum(axis=1)
        count += both.shape[1]
    covariance = moments / count - np.outer(total, total) / count**2
    if not covariance[0, 0] > 1e-14 * moments[0, 0] / count:
        raise ScanError("The volume is constant, so that no scale brings it to the reference: check what it holds.")
    scale = covariance[0, 1] / covariance[0, 0]
    mean = total / count + centre
    return float(scale), float(mean[1] - scale * mean[0])


# -- measures ------------------------------------------------------------------------------------------------------


def as_mask(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask as (D, H, W) or (1, H, W).

    Raises
    ------
    ScanError
        If it is of another shape than the volume, or empty.
    """
    if mask is None:
        return np.ones((1, *shape[1:]), bool)
    whole = mask[None] if mask.ndim == 2 else mask
    if whole.shape[1:] != shape[1:] or len(whole) not in (1, shape[0]):
        raise ScanError(f"A region of {mask.shape} voxels is none of a volume of {shape}: bring it onto the same grid.")
    if not whole.any():
        raise ScanError("The region holds no voxel, so nothing can be measured in it: choose a larger one.")
    return whole


def value_range(volume: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """The least and the largest value where ``mask`` is; NaN is passed over."""
    inside = as_mask(mask, volume.shape)
    low, high = np.inf, -np.inf
    for z, plane in enumerate(volume):
        values = plane[inside[min(z, len(inside) - 1)]]
        if values.size:
            low, high = min(low, float(np.fmin.reduce(values))), max(high, float(np.fmax.reduce(values)))
    return low, high


def reference_range(reference: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> float:
    """What PSNR and SSIM take as the range of values where none is given: the reference's, where ``mask`` is.

    Raises
    ------
    ScanError
        If it is constant there.
    """
    low, high = value_range(reference, mask)
    if not high - low > 0:
        raise ScanError("The reference is constant, so PSNR and SSIM have no range of values: give another reference.")
    return high - low


def compare_volumes(
    volume: NDArray[np.float32],
    reference: NDArray[np.float32],
    mask: NDArray[np.bool_] | None = None,
    data_range: float | None = None,
    ssim: Sequence[Similarity] = ("2d",),
) -> dict[str, float]:
    """PSNR, SSIM and normalised error of a volume.

    SSIM is that of Wang et al. 2004 (IEEE Trans. Image Process. 13:600): Gaussian weights of sigma 1.5, population
    covariance; scikit-image computes it. Without a mask the figures are scikit-image's own, whose mean is over voxels
    with a window of 11 voxels inside the slice (the volume); with one they are the mean of its map where the mask is.

    Parameters
    ----------
    volume, reference
        (D, H, W), of the same unit and on the same grid.
    mask
        Which voxels count: (H, W), (1, H, W) or (D, H, W); None counts all. Windows of SSIM reach beyond it.
    data_range
        What PSNR and SSIM take as the range of values; None takes the reference's, inside the mask.
    ssim
        Which are told, "2d", "3d" or both.

    Returns
    -------
    dict
        ``psnr`` in dB, infinite for equal volumes; ``ssim``, the mean over slices in z, and ``ssim_3d`` as asked for,
        NaN for volumes thinner than a window; ``nrmse``, ||volume - reference|| / ||reference||; ``data_range``.

    Raises
    ------
    ScanError
        If shapes differ, nothing is in the mask, or the reference is constant there and no range is given.
    """
    return compare_in_regions(volume, reference, [mask], data_range, ssim)[0]


def compare_in_regions(
    volume: NDArray[np.float32],
    reference: NDArray[np.float32],
    masks: Sequence[NDArray[np.bool_] | None],
    data_range: float | None = None,
    ssim: Sequence[Similarity] = ("2d",),
) -> list[dict[str, float]]:
    """What :func:`compare_volumes` tells, for several regions at the cost of one.

    Parameters
    ----------
    volume, reference, ssim
        As there.
    masks
        Of the regions.
    data_range
        Of all of them; None takes the reference's inside the first mask, so that regions have one measure.
    """
    _expect_one_shape(volume, reference)
    regions = [as_mask(mask, volume.shape) for mask in masks]
    if data_range is not None:
        reach = float(data_range)
        if not (np.isfinite(reach) and reach > 0):
            raise ScanError(f"The data range {reach} must be a positive number.")
    else:
        reach = reference_range(reference, regions[0])
    masks = [None if mask is None else region for mask, region in zip(masks, regions, strict=True)]
    sums = [_Sums() for _ in regions]
    for z, (plane, truth) in enumerate(zip(volume, reference, strict=True)):
        difference = (plane - truth).astype(np.float64) ** 2
        for region, total in zip(regions, sums, strict=True):
            chosen = region[min(z, len(region) - 1)]
            total.error += float(difference[chosen].sum())
            total.power += float(np.sum(truth[chosen].astype(np.float64) ** 2))
            total.count += int(chosen.sum())
    means = {"2d": [np.nan] * len(regions), "3d": [np.nan] * len(regions)}
    for kind in ssim:
        means[kind] = _similarity(volume, reference, masks, reach, kind)
    told = []
    for number, total in enumerate(sums):
        mean = total.error / total.count
        figures = {"psnr": float(10 * np.log10(reach**2 / mean)) if mean > 0 else np.inf}
        if np.isnan(mean):
            figures["psnr"] = np.nan
        figures |= {"ssim": means["2d"][number]} if "2d" in ssim else {}
        figures |= {"ssim_3d": means["3d"][number]} if "3d" in ssim else {}
        figures["nrmse"] = float(np.sqrt(total.error / total.power)) if total.power > 0 else np.inf
        figures["data_range"] = reach
        told.append(figures)
    return told


@dataclass
class _Sums:
    """What is summed over a region's voxels."""

    error: float = 0.0
    power: float = 0.0
    count: int = 0


def _similarity(
    volume: NDArray[np.float32],
    reference: NDArray[np.float32],
    regions: Sequence[NDArray[np.bool_] | None],
    reach: float,
    kind: Similarity,
) -> list[float]:
    """The mean SSIM of each region; None is the whole volume, less where windows reach beyond it."""
    from skimage.metrics import structural_similarity

    depth, height, width = volume.shape
    if min(volume.shape if kind == "3d" else volume.shape[1:]) < _WINDOW:
        return [np.nan] * len(regions)
    margin = _WINDOW // 2
    inner = np.zeros((1, height, width), bool)
    inner[:, margin : height - margin, margin : width - margin] = True
    masks = [inner if region is None else region for region in regions]
    aside = margin if kind == "3d" else 0
    bounds = [(aside, depth - aside) if region is None else (0, depth) for region in regions]
    step = max(1, _SLAB // (height * width)) if kind == "3d" else 1

    def sums(first: int) -> list[tuple[float, int]]:
        """Of a slab, or a slice: each region's sum and how many voxels it is of."""
        last = min(first + step, depth)
        spans = [(max(first, low), min(last, high)) for low, high in bounds]
        inside = [
            mask[a:b] if len(mask) > 1 else mask[: max(0, b - a)] for mask, (a, b) in zip(masks, spans, strict=True)
        ]
        if not any(mask.any() for mask in inside):
            return [(0.0, 0)] * len(inside)
        if kind == "3d":
            begin = min(max(0, first - margin), depth - _WINDOW)
            slab = slice(begin, max(min(depth, last + margin), begin + _WINDOW))
            pair = reference[slab], volume[slab]
        else:
            begin, pair = first, (reference[first], volume[first])
        _, local = structural_similarity(
            *pair, data_range=reach, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        local = local.reshape(-1, height, width)
        found = []
        for mask, (a, b) in zip(inside, spans, strict=True):
            part = local[a - begin : b - begin] if a < b else local[:0]
            values = part[np.broadcast_to(mask, part.shape)]
            found.append((float(values.sum(dtype=np.float64)), values.size))
        return found

    with ThreadPoolExecutor(_THREADS) as pool:  # the filters let go of the interpreter
        found = np.array(list(pool.map(sums, range(0, depth, step))), np.float64)
    totals, counts = found.sum(axis=0).T
    return [float(total / count) if count else np.nan for total, count in zip(totals, counts, strict=True)]


def _expect_one_shape(volume: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
    if volume.shape != reference.shape:
        raise ScanError(f"A volume of {volume.shape} voxels and a reference of {reference.shape} cannot be compared.")


def _is_placed(volume: PlacedVolume) -> bool:
    """Whether it is known how large a volume's voxels are."""
    return volume.voxel_size is not None or getattr(volume, "scale", None) is not None


def _first(values: NDArray[np.float32], inside: NDArray[np.bool_]) -> np.float32:
    z, y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return values[z, y, x]
