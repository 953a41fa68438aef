"""Where the voxels of a volume are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from napari_recon.scans.errors import ScanError

Box = tuple[slice, slice, slice]
"""A box of voxels, (z, y, x) slices with plain start and stop."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of cubic voxels.

    Voxel (k, j, i) of a volume (D, H, W) lies at ``center + ((i, j, k) - ((W, H, D) - 1) / 2) * voxel_size``: an index
    grows with its coordinate on every axis, as in ASTRA's 3D.

    Parameters
    ----------
    shape
        Voxels along (z, y, x).
    voxel_size
        Edge of a voxel in mm.
    center
        World position (x, y, z) of the volume's centre in mm; the rotation axis is the z axis.
    """

    shape: tuple[int, int, int]
    voxel_size: float
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ScanError(
                f"The volume's shape {tuple(self.shape)} must be three whole numbers (D, H, W) of at least 1."
            )
        if not (math.isfinite(self.voxel_size) and self.voxel_size > 0):
            raise ScanError(f"The voxel size {self.voxel_size} must be a positive number of millimetres.")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "voxel_size", float(self.voxel_size))
        object.__setattr__(self, "center", tuple(float(c) for c in self.center))

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def extent(self) -> tuple[float, float, float]:
        """Edge lengths (z, y, x) in mm."""
        d, h, w = self.shape
        return d * self.voxel_size, h * self.voxel_size, w * self.voxel_size

    @property
    def translate(self) -> tuple[float, float, float]:
        """World position (z, y, x) of voxel (0, 0, 0) in mm: a napari layer's ``translate``."""
        z, y, x = (c - (n - 1) / 2 * self.voxel_size for c, n in zip(self.center[::-1], self.shape, strict=True))
        return z, y, x

    @property
    def full_box(self) -> Box:
        """The box that is the whole volume."""
        d, h, w = self.shape
        return slice(0, d), slice(0, h), slice(0, w)

    def crop(self, box: Box) -> Grid:
        """The grid of the voxels in ``box``, at their places in the world."""
        for s, n in zip(box, self.shape, strict=True):
            if not 0 <= s.start < s.stop <= n:
                raise ScanError(f"The box {box} does not lie inside the volume of {self.shape} voxels.")
        starts, shape = [s.start for s in box], tuple(s.stop - s.start for s in box)
        z, y, x = (
            t + (s + (n - 1) / 2) * self.voxel_size for t, s, n in zip(self.translate, starts, shape, strict=True)
        )
        return Grid((shape[0], shape[1], shape[2]), self.voxel_size, (x, y, z))

    def resampled(self, shape: tuple[int, int, int] | None = None, voxel_size: float | None = None) -> Grid:
        """The same region with another number of voxels, another voxel size, or both (then about the same centre)."""
        if shape is None and voxel_size is None:
            return self
        if shape is None:
            assert voxel_size is not None
            d, h, w = (max(1, round(e / voxel_size)) for e in self.extent)
            return replace(self, shape=(d, h, w), voxel_size=voxel_size)
        if voxel_size is None:
            # One slice stands for one slice (fan beam): only axes with more than one voxel carry the extent.
            pairs = [(e, n) for e, n, m in zip(self.extent, shape, self.shape, strict=True) if m > 1 or n > 1]
            voxel_size = max((e / n for e, n in pairs), default=self.voxel_size)
        return replace(self, shape=shape, voxel_size=voxel_size)
