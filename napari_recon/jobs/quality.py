"""How far a volume is from a reference: figures with their data range and their field of view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.volumes import Volume
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    from napari_recon.scans.grid import Grid


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


def field_of_view(grid: Grid, radius: float | None = None) -> NDArray[np.bool_]:
    """(H, W): which columns of voxels lie within ``radius`` mm of the axis; half the volume's width if None."""
    _, h, w = grid.shape
    _, y0, x0 = grid.translate
    y, x = y0 + grid.voxel_size * np.arange(h), x0 + grid.voxel_size * np.arange(w)
    if radius is None:
        radius = min(h, w) * grid.voxel_size / 2
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
