"""Multi-coil MRI in three dimensions: coil sensitivities, a Fourier transform, and the samples that were taken.

    (A x)_c = P F S_c x,        AᵀA = Σ_c S_c* K S_c,       K = F⁻¹ P F

K is a circular convolution, and what it does on a patch depends only on its kernel at offsets that the patch holds: a
patch's normal operator is exact at the cost of the patch (:meth:`MultiCoilMRI.restrict`). Along an axis that is sampled
throughout (the readout) the kernel has no extent, and nothing is transformed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import deepinv
import numpy as np
import scipy.fft
import torch
from deepinv.physics import LinearPhysics
from deepinv.utils.mixins import MRIMixin
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.physics.coil_maps import estimate_coil_maps, normalized_maps
from napari_recon.physics.devices import resolve_device
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Box, Grid

if TYPE_CHECKING:
    from napari_recon.scans.kspace import KSpaceScan

# Complex numbers that are transformed at a time: all coils of a patch on a GPU, a coil or a few on a CPU.
BATCH = {"cpu": 1 << 20, "cuda": 1 << 26}

AXES = (-3, -2, -1)

# Whether scipy transforms what is on the CPU; the tests switch it off to see the other devices' road.
_SCIPY = True


class MultiCoilMRI(deepinv.physics.MultiCoilMRI):
    """Cartesian k-space of complex volumes seen by several coils; deepinv's operator, coil by coil.

    Volumes are (B, 2, D, H, W), real and imaginary parts; measurements (B, 2, coils, D, H, W), zero where nothing was
    sampled; transforms are centred and orthonormal. Memory beyond input and output is that of one coil, and all
    directions are differentiable any number of times.

    Parameters
    ----------
    mask
        (D, H, W), 1 (or a weight) where k-space is sampled and 0 elsewhere.
    coil_maps
        (coils, D, H, W), complex sensitivities, taken as they are.
    grid
        Where the voxels are; by default of 1 mm.
    device
        "auto", "cpu" or "cuda".

    Attributes
    ----------
    img_size
        (2, D, H, W).
    grid
        Where the voxels are.

    Raises
    ------
    ScanError
        If shapes do not agree, nothing is sampled, or the device is not there.

    Examples
    --------
    >>> maps = torch.full((4, 8, 8, 8), 0.5, dtype=torch.complex64)
    >>> physics = MultiCoilMRI(torch.ones(8, 8, 8), maps, device="cpu")
    >>> physics.A(torch.ones(1, 2, 8, 8, 8)).shape
    torch.Size([1, 2, 4, 8, 8, 8])
    """

    _sqnorm: float | None = None

    def __init__(
        self,
        mask: Tensor | NDArray[Any],
        coil_maps: Tensor | NDArray[Any],
        grid: Grid | None = None,
        device: str | torch.device = "auto",
        **kwargs: Any,
    ) -> None:
        sampled, maps = _tensor(mask, np.float32), _tensor(coil_maps, np.complex64)
        if sampled.ndim != 3 or maps.ndim != 4 or maps.shape[1:] != sampled.shape:
            raise ScanError(
                f"The sampling mask is of shape {tuple(sampled.shape)} and the coil maps of {tuple(maps.shape)}; they "
                "must be (D, H, W) and (coils, D, H, W)."
            )
        if not bool(sampled.any()):
            raise ScanError("The sampling mask has no sample: check it.")
        d, h, w = sampled.shape
        where = Grid((d, h, w), 1.0) if grid is None else grid
        if where.shape != (d, h, w):
            raise ScanError(f"The grid is of {where.shape} voxels, the sampling mask of {(d, h, w)}.")
        size, found = (2, d, h, w), resolve_device(device)
        super().__init__(sampled, maps, img_size=size, three_d=True, device=found, **kwargs)
        self.grid = where
        self._kernels: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def from_scan(
        cls,
        scan: KSpaceScan,
        device: str | torch.device = "auto",
        coil_maps: Tensor | NDArray[Any] | None = None,
        **kwargs: Any,
    ) -> MultiCoilMRI:
        """The operator of a scan, with coil maps that are given, else the scan's own, else estimated.

        However they come, maps are normalised so that their squares sum to one: the volume is then what all coils see
        together, as in the root of the sum of squares, and ‖A‖ is at most 1.

        Raises
        ------
        ScanError
            If maps have to be estimated, and the centre of k-space is not sampled densely enough.
        """
        maps = scan.coil_maps if coil_maps is None else coil_maps
        if maps is None:
            maps = estimate_coil_maps(scan.kspace, scan.calibration)
        maps = maps.numpy(force=True) if isinstance(maps, Tensor) else np.asarray(maps)
        return cls(scan.mask, normalized_maps(maps), scan.grid, device, **kwargs)

    # -- the operator ---------------------------------------------------------------------------------------------

    def A(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, coil_maps: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Volumes (B, 2, D, H, W) to k-space (B, 2, coils, D, H, W)."""
        self._updated(mask, coil_maps, **kwargs)
        self._expect(x, self.img_size, "volumes", "(B, 2, D, H, W)")
        return _Forward.apply(x.float(), self)

    def A_adjoint(  # type: ignore[override]
        self, y: Tensor, mask: Tensor | None = None, coil_maps: Tensor | None = None, rss: bool = False, **kwargs: Any
    ) -> Tensor:
        """The transpose of :meth:`A`; or, with ``rss``, the root of the coils' sum of squares, (B, 1, D, H, W)."""
        kwargs.pop("crop", None)  # deepinv's, of fastMRI's slices
        self._updated(mask, coil_maps, **kwargs)
        shape = (2, self.coil_maps.shape[1], *self.img_size[1:])
        self._expect(y, shape, "measurements", "(B, 2, coils, D, H, W)")
        if rss:
            with torch.no_grad():
                return self._root_sum_of_squares(y.float())
        return _Adjoint.apply(y.float(), self)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A_adjoint(A(x)) without k-space: a convolution between coil maps, along the undersampled axes only."""
        self._updated(**kwargs)
        self._expect(x, self.img_size, "volumes", "(B, 2, D, H, W)")
        shape = tuple(self.img_size[1:])
        return _Normal.apply(x.float(), self.coil_maps, self._response(shape), shape)

    @property
    def sqnorm(self) -> float:
        """The largest sum of squared coil maps: no eigenvalue of AᵀA is larger. 1 / sqnorm is a safe gradient step."""
        if self._sqnorm is None:
            weight = float(self.mask.square().max())
            self._sqnorm = weight * float(self.coil_maps.abs().square().sum(1).max())
        return self._sqnorm

    @property
    def acceleration(self) -> float:
        """Sites of k-space over samples."""
        sampled = self.mask[0, 0]
        return sampled.numel() / int((sampled != 0).sum())

    def update_parameters(self, mask: Tensor | None = None, coil_maps: Tensor | None = None, **kwargs: Any) -> None:
        """Another mask or other coil maps, as deepinv has it."""
        super().update_parameters(mask=mask, coil_maps=coil_maps, **kwargs)
        if mask is not None or coil_maps is not None:
            self._sqnorm, self._kernels = None, {}

    # -- parts of it ----------------------------------------------------------------------------------------------

    def restrict(self, box: Box) -> _Restricted:
        """The same measurements of the voxels of ``box`` only.

        ``restrict(box).A_adjoint_A(patch)`` equals A_adjoint_A of the patch amid zeros, cropped, to rounding, at the
        cost of the patch; its ``A`` and ``A_adjoint`` cost those of the whole volume.
        """
        shape = tuple(self.img_size[1:])
        if len(box) != 3 or any(not 0 <= s.start < s.stop <= n for s, n in zip(box, shape, strict=True)):
            raise ScanError(f"The box {box} does not lie inside the volume of {shape} voxels.")
        return _Restricted(self, box)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _updated(self, mask: Tensor | None = None, coil_maps: Tensor | None = None, **kwargs: Any) -> None:
        if mask is not None or coil_maps is not None or kwargs:
            self.update_parameters(mask=mask, coil_maps=coil_maps, **kwargs)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> MultiCoilMRI:
        super()._apply(fn, *args, **kwargs)
        self._kernels = {}  # made anew where the module has moved to
        return self

    def _expect(self, tensor: Tensor, shape: Sequence[int], what: str, axes: str) -> None:
        if tuple(tensor.shape[1:]) != tuple(shape):
            raise ScanError(
                f"The {what} given to the MRI operator have the shape {tuple(tensor.shape)}; it needs {axes} with "
                f"{tuple(shape)} after the first."
            )

    def _forward(self, x: Tensor) -> Tensor:
        volume = _as_complex(x)
        y = torch.empty(len(x), 2, *self.coil_maps.shape[1:], dtype=torch.float32, device=x.device)
        for coil, maps in enumerate(self.coil_maps.unbind(1)):
            y[:, :, coil] = _as_channels(_centred(maps * volume))
        return y.mul_(self.mask[:, :, None])

    def _adjoint(self, y: Tensor) -> Tensor:
        out = torch.zeros((), dtype=torch.complex64, device=y.device)
        for coil, maps in enumerate(self.coil_maps.unbind(1)):
            out = out + maps.conj() * _centred(_as_complex(self.mask * y[:, :, coil]), inverse=True)
        return _as_channels(out)

    def _root_sum_of_squares(self, y: Tensor) -> Tensor:
        total = torch.zeros((), device=y.device)
        for coil in range(y.shape[2]):
            total = total + _centred(_as_complex(self.mask * y[:, :, coil]), inverse=True).abs().square()
        return total.sqrt().unsqueeze(1)

    def _response(self, patch: tuple[int, ...]) -> Tensor:
        """What multiplies the spectrum of a padded patch (B, *lengths), of length 1 where nothing is transformed."""
        if patch not in self._kernels:
            response = self.mask[:, 0].square()
            for axis in AXES:
                if bool((response == response.narrow(axis, 0, 1)).all()):
                    response = response.narrow(axis, 0, 1)
            axes = [axis for axis in AXES if response.shape[axis] > 1]
            response = torch.fft.ifftshift(response, dim=axes) if axes else response
            if any(patch[axis] < self.img_size[axis] for axis in axes):
                kernel = torch.fft.ifftn(response, dim=axes)
                for axis in axes:
                    kernel = _cropped(kernel, axis, patch[axis])
                response = torch.fft.fftn(kernel, dim=axes).real
            self._kernels[patch] = response.contiguous()
        return self._kernels[patch]

    def __repr__(self) -> str:
        d, h, w = self.img_size[1:]
        size = " x ".join(f"{v:.4g}" for v in self.grid.scale)
        return (
            f"MultiCoilMRI({self.coil_maps.shape[1]} coils, volume {d} x {h} x {w} of {size} mm, "
            f"acceleration {self.acceleration:.3g}, on {self._device_holder.device})"
        )


class _Restricted(MRIMixin, LinearPhysics):
    """The voxels of a box of a MultiCoilMRI."""

    def __init__(self, physics: MultiCoilMRI, box: Box) -> None:
        patch = tuple(s.stop - s.start for s in box)
        super().__init__(img_size=(2, *patch), device=physics._device_holder.device)
        self.physics, self.box, self.sqnorm = physics, box, physics.sqnorm
        self.coil_maps = physics.coil_maps[(..., *box)]
        self.response = physics._response(patch)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """k-space of the patch amid zeros."""
        whole = x.new_zeros((*x.shape[:2], *self.physics.img_size[1:]))
        whole[(..., *self.box)] = x
        return self.physics.A(whole)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The patch of the whole adjoint."""
        return self.physics.A_adjoint(y)[(..., *self.box)].contiguous()

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """S AᵀA Sᵀ x, from the patch alone."""
        return _Normal.apply(x.float(), self.coil_maps, self.response, tuple(x.shape[2:]))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, physics: MultiCoilMRI) -> Tensor:
        ctx.physics = physics
        return physics._forward(x.detach())

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Adjoint.apply(y, ctx.physics), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, physics: MultiCoilMRI) -> Tensor:
        ctx.physics = physics
        return physics._adjoint(y.detach())

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Forward.apply(x, ctx.physics), None


class _Normal(torch.autograd.Function):
    """Σ_c S_c* K S_c x, its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: Tensor, response: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.operator = maps, response, shape
        volume = _as_complex(x.detach())[:, None]
        axes = [axis for axis in AXES if response.shape[axis] > 1]
        lengths = [response.shape[axis] for axis in axes]
        padded = math.prod(response.shape[axis] if axis in axes else shape[axis] for axis in AXES)
        coils = max(1, BATCH.get(x.device.type, BATCH["cpu"]) // (padded * len(x)))
        out = torch.zeros((), dtype=torch.complex64, device=x.device)
        for part in maps.split(coils, dim=1):
            spectrum = _transformed(part * volume, axes, lengths).mul_(response[:, None])
            seen = _transformed(spectrum, axes, lengths, keep=[shape[axis] for axis in axes])
            out = out + (part.conj() * seen).sum(1)
        return _as_channels(out)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Normal.apply(x, *ctx.operator), None, None, None


def _tensor(values: Tensor | NDArray[Any], dtype: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(torch.complex64 if dtype is np.complex64 else torch.float32)
    return torch.from_numpy(np.require(values, dtype, ["C", "W"]))


def _as_complex(x: Tensor) -> Tensor:
    """(B, 2, ...) to complex (B, ...)."""
    return torch.complex(x[:, 0], x[:, 1])


def _as_channels(x: Tensor) -> Tensor:
    """Complex (B, ...) to (B, 2, ...)."""
    return torch.stack([x.real, x.imag], 1)


def _transformed(x: Tensor, axes: Sequence[int], lengths: Sequence[int], keep: Sequence[int] | None = None) -> Tensor:
    """Fourier transform zero-padded to ``lengths``; with ``keep`` the inverse, of which so many samples are kept.

    Axis by axis, so that zeros are not transformed; on the CPU by scipy, which needs about half the time of torch.
    """
    if _SCIPY and x.device.type == "cpu":
        a, workers = x.numpy(), torch.get_num_threads()
        for k, (axis, length) in enumerate(zip(axes, lengths, strict=True)):
            transform = scipy.fft.fft if keep is None else scipy.fft.ifft
            a = transform(a, n=length, axis=axis, workers=workers, overwrite_x=True)
            if keep is not None and keep[k] < length:
                a = a[(..., slice(0, keep[k]), *[slice(None)] * (-axis - 1))]
        return torch.from_numpy(a)
    for k, (axis, length) in enumerate(zip(axes, lengths, strict=True)):
        x = torch.fft.fft(x, n=length, dim=axis) if keep is None else torch.fft.ifft(x, n=length, dim=axis)
        x = x if keep is None else x.narrow(axis, 0, keep[k])
    return x


def _centred(x: Tensor, inverse: bool = False) -> Tensor:
    """The centred, orthonormal Fourier transform over the last three axes."""
    if _SCIPY and x.device.type == "cpu":
        transform = scipy.fft.ifftn if inverse else scipy.fft.fftn
        shifted = np.fft.ifftshift(x.numpy(), axes=AXES)
        a = transform(shifted, axes=AXES, norm="ortho", workers=torch.get_num_threads(), overwrite_x=True)
        return torch.from_numpy(np.fft.fftshift(a, axes=AXES))
    return MRIMixin.ifft(x, AXES) if inverse else MRIMixin.fft(x, AXES)


def _cropped(kernel: Tensor, axis: int, patch: int) -> Tensor:
    """A circular kernel at the offsets within a patch, on an axis long enough for them not to meet.

    Where that would be as long as the whole axis, the whole circle does as well: offsets d and d − n see one sample.
    """
    n = kernel.shape[axis]
    length = scipy.fft.next_fast_len(2 * patch - 1)
    if length >= n:
        return kernel
    shape = list(kernel.shape)
    shape[axis] = length
    out = kernel.new_zeros(shape)
    out.narrow(axis, 0, patch).copy_(kernel.narrow(axis, 0, patch))
    if patch > 1:
        out.narrow(axis, length - patch + 1, patch - 1).copy_(kernel.narrow(axis, n - patch + 1, patch - 1))
    return out
