"""How far a volume is from a reference, with data range and field of view; and how noisy the data are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.volumes import Volume
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    from napari_recon.scans.grid import Grid
    from napari_recon.scans.kspace import KSpaceScan

_NORMAL_MAD = 0.6745
"""Median absolute deviation of a normal distribution of standard deviation 1."""


def compare_volumes(
    volume: NDArray[np.float32],
    reference: NDArray[np.float32],
    field_of_view: NDArray[np.bool_] | None = None,
    data_range: float | None = None,
) -> dict[str, float]:
    """PSNR, SSIM and normalised error of a volume.

    Parameters
    ----------
    volume, reference
        (D, H, W), of the same unit and on the same grid.
    field_of_view
        (H, W) of bool: the columns of voxels that count; None counts all.
    data_range
        What PSNR and SSIM take as the range of values; None takes the reference's, inside the field of view.

    Returns
    -------
    dict
        ``psnr`` in dB; ``ssim``, of Wang 2004 (Gaussian weights, sigma 1.5), the mean over slices in z; ``nrmse``,
        ||volume - reference|| / ||reference||; ``data_range``.
    """
    from skimage.metrics import structural_similarity

    if volume.shape != reference.shape:
        raise ScanError(f"A volume of {volume.shape} voxels and a reference of {reference.shape} cannot be compared.")
    mask = np.ones(volume.shape[1:], bool) if field_of_view is None else field_of_view
    low, high = np.inf, -np.inf
    for plane in reference:  # slice by slice: no further volumes in memory
        low, high = min(low, float(plane[mask].min())), max(high, float(plane[mask].max()))
    reach = float(data_range) if data_range is not None else high - low
    if not reach > 0:
        raise ScanError("The reference is constant, so PSNR and SSIM have no range of values: give another reference.")
    error = power = similarity = 0.0
    for plane, truth in zip(volume, reference, strict=True):
        error += float(np.sum((plane[mask] - truth[mask]).astype(np.float64) ** 2))
        power += float(np.sum(truth[mask].astype(np.float64) ** 2))
        if min(plane.shape) >= 11:
            _, local = structural_similarity(
                truth, plane, data_range=reach, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
            )
            similarity += float(local[mask].mean())
        else:
            similarity = np.nan
    mean = error / (mask.sum() * len(volume))
    return {
        "psnr": float(10 * np.log10(reach**2 / mean)) if mean > 0 else np.inf,
        "ssim": similarity / len(volume),
        "nrmse": float(np.sqrt(error / power)) if power > 0 else np.inf,
        "data_range": reach,
    }


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


def field_of_view(grid: Grid, radius: float | None = None) -> NDArray[np.bool_]:
    """(H, W): which columns of voxels lie within ``radius`` mm of the axis; half the volume's width if None."""
    _, h, w = grid.shape
    _, y0, x0 = grid.translate
    y, x = y0 + grid.scale[1] * np.arange(h), x0 + grid.scale[2] * np.arange(w)
    if radius is None:
        radius = min(grid.extent[1:]) / 2
    inside = y[:, None] ** 2 + x[None, :] ** 2 <= radius**2
    return inside if inside.any() else np.ones((h, w), bool)


def on_grid(volume: Volume, grid: Grid) -> NDArray[np.float32]:
    """The volume's values at the voxels of ``grid`` (D, H, W), by trilinear interpolation; zero outside.

    A volume whose file tells no voxel size is taken to be on the grid, if it has its shape.
    """
    if volume.data.shape == grid.shape and (
        volume.voxel_size is None
        or (
            np.isclose(volume.voxel_size, grid.voxel_size, rtol=1e-4)
            and np.allclose(volume.center, grid.center, atol=1e-3 * grid.voxel_size)
        )
    ):
        return volume.data
    if volume.voxel_size is None:
        raise ScanError(
            f"The volume of {volume.data.shape} voxels has no voxel size in its file, so it cannot be compared with "
            f"one of {grid.shape}: write its voxel size in mm, or reconstruct on its shape."
        )
    from scipy.ndimage import affine_transform

    step = grid.voxel_size / volume.voxel_size
    offset = [(a - b) / volume.voxel_size for a, b in zip(grid.translate, volume.grid.translate, strict=True)]
    beyond = "nearest" if 1 in volume.data.shape else "constant"  # a single slice (fan beam) has no neighbours
    return affine_transform(volume.data, [step] * 3, offset, grid.shape, np.float32, order=1, mode=beyond)
