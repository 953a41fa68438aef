"""Coil sensitivities from the densely sampled centre of k-space (the calibration region)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import middle, to_image

Method = Literal["espirit", "low-resolution"]
Complex = NDArray[np.complex64]

KERNEL = 5
"""Edge of ESPIRiT's k-space kernel."""

ESPIRIT_WIDTH = 12
"""Calibration samples along an axis from which ESPIRiT is worth it."""

COARSE = 32
"""Maps are computed on about so many voxels along an axis, and interpolated: they are smooth."""

CALIBRATION = 20
"""More samples than these along an axis tell ESPIRiT little more, but cost much."""


def estimate_coil_maps(kspace: NDArray[Any], calibration: Sequence[int], method: Method | None = None) -> Complex:
    """Coil maps from undersampled k-space.

    Parameters
    ----------
    kspace
        (coils, D, H, W), complex, with DC at index n // 2 of every axis.
    calibration
        Extent (z, y, x) of the centre of k-space in which every sample was taken.
    method
        "espirit": the eigenvectors of ESPIRiT (sigpy's), found on a coarse grid and interpolated. "low-resolution": the
        calibration region's images over the root of their sum of squares, which is immediate and works from a few
        samples on, but blurs maps at edges of the object. None takes the first where the region has 12 samples along
        every axis (an axis of fewer that is sampled throughout is worked on slice by slice), else the second.

    Returns
    -------
    (coils, D, H, W), complex64, whose squares sum to one at every voxel. Their common phase is arbitrary, but smooth:
    ESPIRiT's is that of the combination of coils with the most signal.

    Raises
    ------
    ScanError
        If the calibration region is too small, or empty.

    References
    ----------
    M. Uecker et al., ESPIRiT: an eigenvalue approach to autocalibrating parallel MRI, Magn. Reson. Med. 71, 2014.
    """
    if method is not None and method not in get_args(Method):
        raise ScanError(f"There is no way {method!r} to estimate coil maps: use {', '.join(get_args(Method))}.")
    kspace = np.asarray(kspace, np.complex64)
    shape = kspace.shape[1:]
    width = [min(int(c), n) for c, n in zip(calibration, shape, strict=True)]
    if any(c < min(4, n) for c, n in zip(width, shape, strict=True)):
        raise ScanError(
            f"The fully sampled centre of k-space measures {tuple(width)} samples, too few to estimate coil maps from: "
            "give coil maps."
        )
    if not np.any(kspace[(slice(None), *_middle(shape, width))]):
        raise ScanError("The centre of k-space is empty, so that coil maps cannot be estimated: check the file.")
    # Slices are separate where there are too few of them for a kernel across.
    sliced = width[0] == shape[0] < ESPIRIT_WIDTH
    if method is None:
        method = "espirit" if min(width[1:] if sliced else width) >= ESPIRIT_WIDTH else "low-resolution"
    if method == "low-resolution":
        return _low_resolution(kspace, width)
    # Coils are first combined into virtual ones, the strongest first: sigpy gives maps the phase of the first coil.
    center = kspace[(slice(None), *_middle(shape, width))].reshape(len(kspace), -1)
    _, vectors = np.linalg.eigh(center @ center.conj().T)
    vectors = vectors[:, ::-1]
    coarse = [min(n, COARSE) for n in shape]
    if sliced:
        coarse[0] = shape[0]
    small = kspace[(slice(None), *_middle(shape, coarse))]
    small = np.tensordot(vectors.conj().T, small, 1)
    if sliced:
        slices = to_image(small, (1,))
        found = np.stack([_espirit(slices[:, z], min(width[1:])) for z in range(shape[0])], 1)
    else:
        found = _espirit(small, min(width))
    maps = np.tensordot(vectors, found, 1)
    for axis, (n, m) in enumerate(zip(shape, coarse, strict=True), start=1):
        if m < n:
            maps = np.moveaxis(np.tensordot(_interpolation(n, m), maps, (1, axis)), 0, axis)
    return normalized_maps(maps)


def normalized_maps(maps: NDArray[Any]) -> Complex:
    """Coil maps (coils, D, H, W) over the root of their sum of squares; zero where (next to) no coil sees anything."""
    total = np.sqrt((np.abs(maps) ** 2).sum(0))
    seen = total > 1e-3 * total.max()
    out: Complex = np.where(seen, maps / np.where(seen, total, 1), 0).astype(np.complex64)
    return out


def _espirit(kspace: Complex, width: int) -> Complex:
    from sigpy.mri.app import EspiritCalib

    calibration = min(width, CALIBRATION, min(kspace.shape[1:]))
    found: Complex = EspiritCalib(
        np.ascontiguousarray(kspace), calib_width=calibration, kernel_width=KERNEL, crop=0.0, show_pbar=False
    ).run()
    return np.nan_to_num(found)


def _low_resolution(kspace: Complex, width: Sequence[int]) -> Complex:
    low = np.zeros_like(kspace)
    at = (slice(None), *_middle(kspace.shape[1:], width))
    low[at] = kspace[at]
    for axis, (n, c) in enumerate(zip(kspace.shape[1:], width, strict=True), start=1):
        if n > 1:
            window = np.zeros(n)
            window[middle(n, c)] = np.sin(np.pi * (np.arange(c) + 0.5) / c) ** 2
            low *= window.reshape(-1, *[1] * (3 - axis)).astype(np.float32)
    return normalized_maps(to_image(low))


def _middle(shape: Sequence[int], width: Sequence[int]) -> tuple[slice, ...]:
    """``width`` samples about index n // 2 of every axis."""
    return tuple(middle(n, c) for n, c in zip(shape, width, strict=True))


def _interpolation(n: int, m: int) -> NDArray[np.float32]:
    """(n, m): cubic interpolation on a circle, from m voxels to n that have the same centre, index n // 2."""
    places = (np.arange(n) - n // 2) * (m / n) + m // 2
    columns = [ndimage.map_coordinates(unit, [places], order=3, mode="grid-wrap") for unit in np.eye(m)]
    return np.stack(columns, 1).astype(np.float32)
