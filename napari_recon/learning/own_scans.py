"""Scans of one's own to train on: a folder of them, with reference volumes beside them or without.

Every scan is a sub-folder or a file that :func:`napari_recon.open_scan` reads. Its reference is the volume that its
reader knows (``truth.tif`` of a simulated scan), else ``reference.tif`` or ``reference.npy`` in its folder; beside a
scan that is one file, ``NAME.h5`` say, ``NAME.reference.tif`` or ``.npy``. A reference is attenuation in 1/mm and fills
the volume that the scan suggests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from napari_recon.physics.fdk_filter import ramp
from napari_recon.physics.xray import XRayTransform
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.scan import Scan, ScanOptions, open_scan

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics

SCAN_FILES = (".toml", ".h5", ".hdf5", ".hdf", ".nxs", ".mat")
VOLUME_FILES = (".tif", ".tiff", ".npy")

_UNEXPLAINED = 0.8
"""Part of the projections that a reference may leave unexplained; one in another unit or orientation leaves more."""


@dataclass(frozen=True)
class OwnScan:
    """A scan that was opened, and its reference where it has one."""

    scan: Scan
    reference: Path | None

    def read(self, views: int | None, device: torch.device) -> tuple[Tensor | None, Tensor, XRayTransform]:
        """Some of the views, evenly spaced, with what they are to become.

        Parameters
        ----------
        views
            How many; None takes all.
        device
            Where the tensors are to lie.

        Returns
        -------
        truth
            The reference (1, 1, D, H, W), float32 in 1/mm, or None.
        y, physics
            (1, 1, rows, views, columns) and its X-ray transform.

        Raises
        ------
        ScanError
            If there are fewer views, something cannot be read, or the reference does not belong to the scan.
        """
        scan = self.scan if views is None else self.scan.with_options(views=views)
        grid = scan.default_grid()
        truth = None
        if self.reference is not None:
            volume = read_volume(self.reference)
            grid, volume = _on_the_scans_grid(volume, grid)
            truth = torch.from_numpy(volume)[None, None].to(device)
        physics = XRayTransform(scan.geometry, grid, device=device)
        y = scan.measurements(device)
        if truth is not None:
            with torch.no_grad():
                left = float(torch.linalg.vector_norm(physics.A(truth) - y) / torch.linalg.vector_norm(y))
            if not left < _UNEXPLAINED:
                raise ScanError(
                    f"The reference {self.reference} leaves {100 * left:.0f} % of its scan's projections unexplained: "
                    "give attenuation in 1/mm, as (z, y, x), on the volume that the scan suggests."
                )
        return truth, y, physics


def find_scans(folder: Path, binning: int, with_reference: bool) -> list[OwnScan]:
    """The scans of a folder in the order of their names; no frames are read.

    Raises
    ------
    ScanError
        If the folder cannot be read or holds fewer than two scans, one of them cannot be opened, or a reference is
        missing.
    """
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise ScanError(f"The folder {folder} cannot be read ({error.strerror}): check the path.") from None
    paths = [p for p in entries if p.is_dir() or p.suffix.lower() in SCAN_FILES]
    if len(paths) < 2:
        raise ScanError(
            f"{folder} holds {len(paths)} scans (sub-folders or files); training needs at least two, since the last "
            "ones validate."
        )
    found = []
    for path in paths:
        scan = open_scan(path, ScanOptions(binning=binning))
        reference = _reference(path, scan) if with_reference else None
        if with_reference and reference is None:
            where = "reference.tif in it" if path.is_dir() else f"{path.stem}.reference.tif beside it"
            raise ScanError(
                f"The scan {path} has no reference: put {where} (or .npy), or train with supervision = 'splitting'."
            )
        found.append(OwnScan(scan, reference))
    return found


def _reference(path: Path, scan: Scan) -> Path | None:
    if scan.truth is not None and scan.truth.exists():
        return scan.truth
    stem = path / "reference" if path.is_dir() else path.with_name(path.stem + ".reference")
    places = (stem.with_name(stem.name + suffix) for suffix in VOLUME_FILES)
    return next((place for place in places if place.is_file()), None)


def read_volume(path: Path) -> NDArray[np.float32]:
    """A volume (D, H, W), float32, from a .npy or TIFF file or a folder of TIFF slices.

    Raises
    ------
    ScanError
        If it cannot be read, is no volume, or holds NaN, infinity or nothing above zero.
    """
    try:
        if path.is_dir():
            raw = np.stack([tifffile.imread(f) for f in sorted(path.glob("*.tif*"))])
        else:
            raw = np.load(path, allow_pickle=False) if path.suffix == ".npy" else tifffile.imread(path)
    except Exception as error:  # tifffile and numpy raise whatever they stumble on
        raise ScanError(f"The volume {path} cannot be read ({error}): replace it, or take it out.") from None
    volume = np.asarray(raw)
    while volume.ndim > 3 and len(volume) == 1:
        volume = volume[0]
    if volume.ndim == 2:
        volume = volume[None]
    if volume.dtype.kind not in "fiu" or volume.ndim != 3:
        raise ScanError(f"{path} is no volume of attenuation (shape {raw.shape}): replace it, or take it out.")
    volume = np.ascontiguousarray(volume, np.float32)
    if not np.isfinite(volume).all() or not (volume > 0).any():
        raise ScanError(f"{path} is no volume of attenuation (NaN, or nothing above zero): replace it, or take it out.")
    return volume


def _on_the_scans_grid(volume: NDArray[np.float32], grid: Grid) -> tuple[Grid, NDArray[np.float32]]:
    """A reference and its grid: averaged over blocks where the scan is binned, else at its own resolution."""
    d, h, w = grid.shape
    k = volume.shape[1] // h
    if k > 1 and volume.shape == (k * d, k * h, k * w):
        return grid, volume.reshape(d, k, h, k, w, k).mean((1, 3, 5), dtype=np.float32)
    if volume.shape != grid.shape:
        d, h, w = volume.shape
        grid = grid.resampled((d, h, w))
    return grid, volume


# -- splitting -----------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """A scan without some of its views, and those views: what is reconstructed from the one should explain the other.

    Noise is independent from view to view, so that a network cannot learn to reproduce it, and streaks of the views
    that it sees are wrong in those that it does not (Noise2Inverse, Hendriksen et al. 2020; SSDU, Yaman et al. 2020).

    deepinv's SplittingLoss has these semantics, but zeroes views by an inpainting mask after the whole A: FDK's angular
    weights and the ramp's cut-off, which depend on how many views there are, would be those of the whole scan, and
    every step would project all views. Here the split scan is a scan.

    What is left unexplained is filtered by |ω|^½ along the detector's rows: without, the low frequencies, of which a
    projection holds most, are all that a short training learns (error on noisy blobs of 16³ voxels: .76 untrained, .64
    after 60 steps without the ramp, .48 with it).

    Attributes
    ----------
    start, scale
        (1, 1, D, H, W) from the views that are seen, and its brightness.
    physics, back, norm
        Of data steps for the views that are seen: N = AᵀA or AᵀFA, its right-hand side over its norm, and the norm.
    left_out, y
        The X-ray transform of the views that are not, and what they measured.
    error
        Mean square of what the start leaves unexplained.

    Raises
    ------
    ScanError
        If the views that are left out show nothing.
    """

    start: Tensor
    scale: float
    physics: LinearPhysics
    back: Tensor
    norm: float
    left_out: XRayTransform
    y: Tensor
    error: float = field(init=False)

    def __post_init__(self) -> None:
        length = next_fast_len(2 * self.y.shape[4], real=True)
        self._length = length + length % 2
        root = np.sqrt(np.maximum(ramp(self._length), 0))
        self._root = torch.from_numpy(root / root.max()).to(self.y)
        with torch.no_grad():
            self.error = float(self.residual(self.start).square().mean())
        if not self.error > 0:
            raise ScanError("Views of a scan show nothing, so that nothing can be learned from them: take it out.")

    def gradient(self, x: Tensor) -> Tensor:
        """The direction of a data step, differentiable."""
        return self.physics.A_adjoint_A(x) / self.norm - self.back

    def residual(self, x: Tensor) -> Tensor:
        """What a volume leaves unexplained of the views that are left out, ramp-filtered; differentiable."""
        return self._filter(self.left_out.A(x) - self.y)

    def psnr(self, x: Tensor) -> float:
        """How well a volume explains the views that are left out, ramp-filtered, in dB."""
        with torch.no_grad():
            error = float(self.residual(x).square().mean())
            return 10 * math.log10(float(self._filter(self.y).square().max()) / max(error, 1e-30))

    def _filter(self, projections: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(projections, n=self._length) * self._root, n=self._length)


def split_views(count: int, parts: int, seed: Sequence[int]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Views that are seen and those that are left out, so that every view is left out once.

    Each part takes a view at random of every ``parts`` neighbours: what is seen stays spread over the circle.

    Raises
    ------
    ScanError
        If there are too few views.
    """
    if count < 2 * parts:
        raise ScanError(
            f"A scan of {count} views cannot be split in {parts} parts of two views or more: lower data.splits, or use "
            "more views."
        )
    rng = np.random.default_rng(list(seed))
    part = np.concatenate([rng.permutation(parts) for _ in range(-(-count // parts))])[:count]
    for k in range(parts):
        yield np.flatnonzero(part != k), np.flatnonzero(part == k)
