"""The same projectors in plain torch, for any of its devices.

Joseph's bilinear interpolation of a slice is torch's ``grid_sample`` with zero padding and aligned corners; its exact
transpose is that operation's own derivative with respect to the image. Slower than kernels written for a device, but
the same numbers, and there wherever torch is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.physics.projectors.rays import Rays

# Bytes of sampling positions that are held at a time.
BATCH_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}

# (main axis, a, b) as axes of (x, y, z)
_ORDER = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}


class TorchProjector:
    """Forward projection, exact adjoint and FDK's back projection with torch.

    Parameters
    ----------
    rays
        The geometry and the grid.
    device
        Where the tensors are.
    """

    def __init__(self, rays: Rays, device: torch.device) -> None:
        self.rays = rays
        self.device = torch.device(device)
        self.batch_bytes = BATCH_BYTES.get(self.device.type, BATCH_BYTES["cpu"])

    def forward(self, volume: Tensor) -> Tensor:
        """Line integrals (rows, views, columns) of a volume (D, H, W), float32."""
        rows, columns = self.rays.geometry.detector_shape
        out = torch.zeros(rows, self.rays.geometry.views, columns, device=self.device)
        for axis, views in self._groups():
            slices = volume.permute(_permutation(axis))
            for batch, (r0, r1, c0, c1) in self._batches(views):
                sums = torch.zeros(1, len(batch) * (r1 - r0), c1 - c0, device=self.device)
                for part, places, _ in self._places(axis, batch, (r0, r1, c0, c1)):
                    sums += _sample(slices[part, None].contiguous(), places).sum(dim=0)
                sums = sums.view(len(batch), r1 - r0, c1 - c0) * self._lengths(axis, batch, (r0, r1, c0, c1))
                out[r0:r1, self._index(batch), c0:c1] = sums.transpose(0, 1)
        return out

    def adjoint(self, projections: Tensor, out: Tensor | None = None) -> Tensor:
        """The transpose of :meth:`forward`: (rows, views, columns) -> (D, H, W), float32; added to ``out`` if given."""
        out = torch.zeros(self.rays.grid.shape, device=self.device) if out is None else out
        for axis, views in self._groups():
            slices = out.permute(_permutation(axis))
            for batch, (r0, r1, c0, c1) in self._batches(views):
                sums = projections[r0:r1, self._index(batch), c0:c1].transpose(0, 1)
                sums = sums * self._lengths(axis, batch, (r0, r1, c0, c1))
                self._spread(slices, axis, batch, (r0, r1, c0, c1), sums)
        return out

    def normal(self, volume: Tensor) -> Tensor:
        """Adjoint of forward, without ever holding the projections: only those rays of a few views at a time."""
        out = torch.zeros(self.rays.grid.shape, device=self.device)
        for axis, views in self._groups():
            slices = volume.permute(_permutation(axis))
            target = out.permute(_permutation(axis))
            for batch, window in self._batches(views):
                r0, r1, c0, c1 = window
                sums = torch.zeros(1, len(batch) * (r1 - r0), c1 - c0, device=self.device)
                for part, places, _ in self._places(axis, batch, window):
                    sums += _sample(slices[part, None].contiguous(), places).sum(dim=0)
                sums = sums.view(len(batch), r1 - r0, c1 - c0) * self._lengths(axis, batch, window) ** 2
                self._spread(target, axis, batch, window, sums)
        return out

    def filtered_buffer(self, views: int, rows: int) -> tuple[Tensor, Tensor]:
        """Where filtered projections of some views and rows are to be put for :meth:`backproject`."""
        buffer = torch.empty(views, rows, self.rays.geometry.detector_shape[1], device=self.device)
        return buffer, buffer.transpose(0, 1)

    def backproject(self, buffer: Tensor, first_view: int, first_row: int, out: Tensor) -> None:
        """Add to ``out`` (D, H, W) the sum over views of W^-2 times the sample where each voxel is seen (FDK)."""
        views, rows, columns = buffer.shape
        d, h, w = self.rays.grid.shape
        matrices = self.rays.homography[first_view : first_view + views].copy()
        matrices[:, 1] -= first_row * matrices[:, 2]
        table = torch.from_numpy(matrices)
        i, j, k = (torch.arange(n, device=self.device, dtype=torch.float32) for n in (w, h, d))
        per_view = max(1, self.batch_bytes // (16 * h * w))  # slices of one view
        step_views = max(1, per_view // d)
        step_slices = min(d, per_view)
        for n in range(0, views, step_views):
            m = table[n : n + step_views].to(device=self.device, dtype=torch.float32)[..., None, None, None]
            for k0 in range(0, d, step_slices):
                kk = k[k0 : k0 + step_slices, None, None]
                u, v, depth = (
                    m[:, q, 0] * i + m[:, q, 1] * j[:, None] + m[:, q, 2] * kk + m[:, q, 3] for q in range(3)
                )
                inverse = 1 / depth
                places = torch.stack([u * inverse, v * inverse], dim=-1).view(len(m), -1, w, 2)
                seen = _sample(buffer[n : n + step_views, None], _normalised(places, (rows, columns)))
                out[k0 : k0 + step_slices] += (seen.view(len(m), -1, h, w) * inverse**2).sum(dim=0)

    # -- the rays of a batch of views -----------------------------------------------------------------------------

    def _groups(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        hit = self.rays.window[:, 1] > self.rays.window[:, 0]
        for axis in range(3):
            views = np.flatnonzero(hit & (self.rays.axis == axis))
            if len(views):
                yield axis, views

    def _batches(self, views: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], tuple[int, int, int, int]]]:
        """Views together with a window of detector pixels that holds theirs all."""
        rows, columns = self.rays.geometry.detector_shape
        size = max(1, self.batch_bytes // (64 * rows * columns))  # the coefficients are float64
        for n in range(0, len(views), size):
            batch = views[n : n + size]
            w = self.rays.window[batch]
            yield batch, (int(w[:, 0].min()), int(w[:, 1].max()), int(w[:, 2].min()), int(w[:, 3].max()))

    def _coefficients(self, axis: int, batch: NDArray[np.int64], window: tuple[int, int, int, int]) -> list[Tensor]:
        """(n, rows, columns) each, float64: origin (main, a, b) and direction (main, a, b) of every ray."""
        r0, r1, c0, c1 = window
        table = torch.from_numpy(self.rays.table[batch][:, :, list(_ORDER[axis])]).to(self.device)[..., None, None]
        r = torch.arange(r0, r1, device=self.device, dtype=torch.float64)[:, None]
        c = torch.arange(c0, c1, device=self.device, dtype=torch.float64)
        return [table[:, p, q] + c * table[:, p + 1, q] + r * table[:, p + 2, q] for p in (0, 3) for q in range(3)]

    def _places(
        self, axis: int, batch: NDArray[np.int64], window: tuple[int, int, int, int]
    ) -> Iterator[tuple[slice, Tensor, tuple[int, int]]]:
        """Some slices at a time: which, where the rays cross them (for grid_sample), and the slices' shape."""
        om, oa, ob, dm, da, db = self._coefficients(axis, batch, window)
        slope_a, slope_b = da / dm, db / dm
        start_a, start_b = ((o - om * slope).float() for o, slope in ((oa, slope_a), (ob, slope_b)))
        slope_a, slope_b = slope_a.float(), slope_b.float()
        count, height, width = (self.rays.grid.shape[q] for q in _permutation(axis))
        step = max(1, self.batch_bytes // (8 * start_a.numel()))
        for s in range(0, count, step):
            n = torch.arange(s, min(s + step, count), device=self.device, dtype=torch.float32)[:, None, None, None]
            places = torch.stack([start_b + n * slope_b, start_a + n * slope_a], dim=-1)
            places = places.view(len(n), -1, places.shape[3], 2)
            yield slice(s, s + len(n)), _normalised(places, (height, width)), (height, width)

    def _lengths(self, axis: int, batch: NDArray[np.int64], window: tuple[int, int, int, int]) -> Tensor:
        """(n, rows, columns): the length of every ray between two slices, mm."""
        *_, dm, da, db = self._coefficients(axis, batch, window)
        return ((dm**2 + da**2 + db**2).sqrt() / dm.abs() * self.rays.grid.voxel_size).float()

    def _spread(
        self, slices: Tensor, axis: int, batch: NDArray[np.int64], window: tuple[int, int, int, int], sums: Tensor
    ) -> None:
        sums = sums.reshape(1, 1, -1, sums.shape[2])
        for part, places, shape in self._places(axis, batch, window):
            slices[part] += _sample_transposed(sums.expand(len(places), -1, -1, -1), places, shape)[:, 0]

    def _index(self, batch: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(batch).to(self.device)


def _permutation(axis: int) -> tuple[int, int, int]:
    s, a, b = (2 - q for q in _ORDER[axis])
    return s, a, b


def _normalised(places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pixel positions (..., 2) as (x, y) -> grid_sample's [-1, 1].

    grid_sample has no place for a single pixel along an axis with aligned corners, so that images are given a zero
    border by :func:`_sample`, and positions shift by one.
    """
    height, width = shape
    scale = torch.tensor([2 / (width + 1), 2 / (height + 1)], device=places.device)
    return places.add_(1).mul_(scale).sub_(1)


def _sample(images: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples (N, 1, rows, columns) of images (N, 1, h, w), zero outside."""
    return F.grid_sample(F.pad(images, (1, 1, 1, 1)), places, mode="bilinear", padding_mode="zeros", align_corners=True)


def _sample_transposed(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The transpose of :func:`_sample`: (N, 1, rows, columns) -> (N, 1, h, w)."""
    height, width = shape
    like = torch.zeros(1, device=values.device).expand(len(values), 1, height + 2, width + 2)
    images, _ = torch.ops.aten.grid_sampler_2d_backward(values.contiguous(), like, places, 0, 0, True, [True, False])
    return images[:, :, 1:-1, 1:-1]
