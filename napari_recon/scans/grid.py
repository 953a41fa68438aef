"""Where the voxels of a volume are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from napari_recon.scans.errors import ScanError

Box = tuple[slice, slice, slice]
"""A box of voxels, (z, y, x) slices with plain start and stop."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxels: cubes for X-rays, boxes for MRI.

    Voxel (k, j, i) of a volume (D, H, W) lies at ``center + ((i, j, k) - ((W, H, D) - 1) / 2) * scale[::-1]``: an index
    grows with its coordinate on every axis, as in ASTRA's 3D.

    Parameters
    ----------
    shape
        Voxels along (z, y, x).
    voxel_size
        Edge of a voxel in mm; of one that is no cube, the edge that ``aspect`` is relative to.
    center
        World position (x, y, z) of the volume's centre in mm; the rotation axis is the z axis.
    aspect
        Edges (z, y, x) of a voxel in units of ``voxel_size``; a cube's are all one.
    """

    shape: tuple[int, int, int]
    voxel_size: float
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    aspect: tuple[float, float, float] = (1.0, 1.0, 1.0)

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
        if not all(math.isfinite(a) and a > 0 for a in self.aspect):
            raise ScanError(f"A voxel's edges {self.aspect} must be positive numbers.")
        object.__setattr__(self, "aspect", tuple(float(a) for a in self.aspect))

    @property
    def scale(self) -> tuple[float, float, float]:
        """Edges (z, y, x) of a voxel in mm: a napari layer's ``scale``."""
        z, y, x = (self.voxel_size * a for a in self.aspect)
        return z, y, x

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def extent(self) -> tuple[float, float, float]:
        """Edge lengths (z, y, x) in mm."""
        z, y, x = (n * s for n, s in zip(self.shape, self.scale, strict=True))
        return z, y, x

    @property
    def translate(self) -> tuple[float, float, float]:
        """World position (z, y, x) of voxel (0, 0, 0) in mm: a napari layer's ``translate``."""
        z, y, x = (c - (n - 1) / 2 * s for c, n, s in zip(self.center[::-1], self.shape, self.scale, strict=True))
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
            t + (s + (n - 1) / 2) * edge
            for t, s, n, edge in zip(self.translate, starts, shape, self.scale, strict=True)
        )
        return replace(self, shape=(shape[0], shape[1], shape[2]), center=(x, y, z))

    def resampled(self, shape: tuple[int, int, int] | None = None, voxel_size: float | None = None) -> Grid:
        """The same region with another number of voxels, another voxel size, or both (then about the same centre)."""
        if shape is None and voxel_size is None:
            return self
        if shape is None:
            assert voxel_size is not None
            d, h, w = (max(1, round(e / (voxel_size * a))) for e, a in zip(self.extent, self.aspect, strict=True))
            return replace(self, shape=(d, h, w), voxel_size=voxel_size)
        if voxel_size is None:
            # One slice stands for one slice (fan beam): only axes with more than one voxel carry the extent.
            axes = zip(self.extent, shape, self.shape, self.aspect, strict=True)
            voxel_size = max((e / (n * a) for e, n, m, a in axes if m > 1 or n > 1), default=self.voxel_size)
        return replace(self, shape=shape, voxel_size=voxel_size)
