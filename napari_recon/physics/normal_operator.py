"""The normal operator AᵀA approximated by a diagonal and a convolution.

For many scans AᵀA is nearly a convolution whose strength changes slowly over the volume, so that

    H = diag(m) C diag(m)^*,        C x = F⁻¹ (λ · F x)     (linear convolution: the volume is zero-padded)

comes close to it with one mask m and one filter λ. The paper's form for CT leaves out the last factor. What one
kernel cannot say is that the kernel itself changes with position (a cone beam's does, with height and radius). The
form with several terms lets it vary,

    C x = C₀ x + ½ Σ_k (w_k C_k x + C_k w_k x),             w_k = |z|, x² + y²  (on -1..1, less their means),

which is still symmetric and costs one pair of Fourier transforms a term. |z| and not z²: rays tilt in proportion to
the height above the source's plane, and with them the frequencies about the axis that no ray sees.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from deepinv.physics import LinearPhysics, MultiCoilMRI
from torch import Tensor

from napari_recon.scans.errors import ScanError

Box = tuple[slice, ...]

FORMAT = "napari-recon normal operator 2"
"""What an operator file says it is; 1 had other modulations."""

# Whether scipy transforms what is on the CPU; the tests switch it off to see the other devices' road.
_SCIPY = True

# ---------------------------------------------------------------------------------------------------------------
# Padded Fourier transforms


def fft_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The even, fast lengths that hold a linear convolution of a volume of ``shape`` (2n or a little more; 1 for 1)."""
    return tuple(1 if n == 1 else 2 * scipy.fft.next_fast_len(int(n), real=True) for n in shape)


def forward_transform(x: Tensor, lengths: Sequence[int], full: bool) -> Tensor:
    """Fourier transform over the last axes, zero-padded to ``lengths``; the half spectrum of a real x unless ``full``.

    Axis by axis, so that the zeros are not transformed: 7/12 of the work of padding first. On the CPU scipy's
    pocketfft, which needs about half the time of torch's.
    """
    n = len(lengths)
    axes = range(x.ndim - 1, x.ndim - 1 - n, -1)
    if _SCIPY and x.device.type == "cpu":
        a, workers = x.detach().numpy(), torch.get_num_threads()
        for axis, length in zip(axes, reversed(lengths), strict=True):
            first = axis == x.ndim - 1 and not full
            transform = scipy.fft.rfft if first else scipy.fft.fft
            a = transform(
                a, n=length, axis=axis, workers=workers, overwrite_x=a.dtype.kind == "c" and axis < x.ndim - 1
            )
        return torch.from_numpy(a)
    for axis, length in zip(axes, reversed(lengths), strict=True):
        half = axis == x.ndim - 1 and not full
        x = torch.fft.rfft(x, n=length, dim=axis) if half else torch.fft.fft(x, n=length, dim=axis)
    return x


def inverse_transform(s: Tensor, shape: Sequence[int], lengths: Sequence[int], full: bool) -> Tensor:
    """The first ``shape`` samples of the inverse transform over the last axes; overwrites ``s`` on the CPU."""
    n = len(lengths)
    axes = range(s.ndim - n, s.ndim)
    if _SCIPY and s.device.type == "cpu":
        a, workers = s.detach().numpy(), torch.get_num_threads()
        for axis, length, keep in zip(axes, lengths, shape, strict=True):
            if axis == s.ndim - 1 and not full:
                a = scipy.fft.irfft(a, n=length, axis=axis, workers=workers, overwrite_x=True)
            else:
                a = scipy.fft.ifft(a, n=length, axis=axis, workers=workers, overwrite_x=True)
            a = a[(slice(None),) * axis + (slice(0, keep),)]
        return torch.from_numpy(np.ascontiguousarray(a))
    for axis, length, keep in zip(axes, lengths, shape, strict=True):
        half = axis == s.ndim - 1 and not full
        s = torch.fft.irfft(s, n=length, dim=axis) if half else torch.fft.ifft(s, n=length, dim=axis)
        s = s.narrow(axis, 0, keep)
    return s.contiguous()


# ---------------------------------------------------------------------------------------------------------------
# The operator


# w_k by number of dimensions and of terms: sums of |coordinate|^power over axes, as (power, axes). The mean over the
# volume, 1 / (power + 1), is taken off: it only moves something into C₀, and makes the terms nearly orthogonal, so that
# they fit faster. Powers z² and z⁴, products, other angular terms and up to five terms were tried (docs/benchmarks.md).
MODULATIONS: dict[int, dict[int, list[tuple[int, tuple[int, ...]]]]] = {
    2: {1: [], 2: [(2, (0, 1))], 3: [(2, (0,)), (2, (1,))]},
    3: {1: [], 2: [(1, (0,))], 3: [(1, (0,)), (2, (1, 2))]},
}


class NormalOperator:
    """H ≈ AᵀA as a mask and a filter: ``diag(m) C diag(m)^*`` or, as in the paper for CT, ``diag(m) C``.

    A value: nothing changes after it was made. ``operator(x)`` is H x.

    Parameters
    ----------
    spatial_mask
        m, (*spatial) such as (D, H, W), real; complex (for MRI) makes the operator work on complex volumes, which
        deepinv stores as 2 channels.
    fourier_filter
        λ: the half spectrum (*lengths[:-1], lengths[-1] // 2 + 1) of a real kernel, with ``lengths =
        fft_shape(spatial)``; or the full spectrum (*lengths) where volumes are complex. Real for a symmetric kernel,
        else complex. For several terms, one leading axis more.
    symmetric
        Whether the mask is applied on both sides.
    coordinates
        Per axis the positions of the voxels on -1..1, which only the modulations of several terms need; by default
        those of a whole volume.
    batched
        Whether the mask (B, *spatial) and the coordinates (B, n) carry a batch axis: one patch a volume.

    Attributes
    ----------
    shape, terms, is_complex
        Voxels that it works on; number of kernels; whether volumes are complex.
    settings, history, errors
        How it was fitted: the fit's options, a row of figures an iteration, and relative errors by kind of volume.

    Raises
    ------
    ScanError
        If λ does not belong to a volume of m's shape.
    """

    def __init__(
        self,
        spatial_mask: Tensor,
        fourier_filter: Tensor,
        symmetric: bool = True,
        coordinates: Sequence[Tensor] | None = None,
        batched: bool = False,
    ) -> None:
        dims = spatial_mask.ndim - batched
        self.shape: tuple[int, ...] = tuple(spatial_mask.shape[batched:])
        self.lengths = fft_shape(self.shape)
        got = tuple(fourier_filter.shape[-dims:])
        last = (self.lengths[-1], self.lengths[-1] // 2 + 1)
        if fourier_filter.ndim not in (dims, dims + 1) or got[:-1] != self.lengths[:-1] or got[-1] not in last:
            raise ScanError(
                f"The Fourier filter of shape {tuple(fourier_filter.shape)} does not belong to a spatial mask of shape "
                f"{tuple(spatial_mask.shape)}: use the pair that fit_normal_operator returned for this volume."
            )
        self.full_spectrum = got[-1] == self.lengths[-1] and self.lengths[-1] > 1
        if spatial_mask.is_complex() and not self.full_spectrum:
            raise ScanError(
                "A complex spatial mask needs the full spectrum of λ, not the half spectrum of a real kernel."
            )
        self.spatial_mask, self.fourier_filter = spatial_mask, fourier_filter
        self.symmetric, self.batched, self.dims = bool(symmetric), bool(batched), dims
        self.terms: int = fourier_filter.shape[0] if fourier_filter.ndim == dims + 1 else 1
        if self.terms not in MODULATIONS[dims]:
            raise ScanError(f"A normal operator in {dims}D has {sorted(MODULATIONS[dims])} terms, not {self.terms}.")
        self.is_complex = self.full_spectrum
        if coordinates is None:
            coordinates = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.shape]
        self.coordinates = [values.to(spatial_mask.device) for values in coordinates]
        self.settings: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.errors: dict[str, float] = {}
        self._patch_filters: dict[tuple[int, ...], Tensor] = {}

    def to(self, device: str | torch.device) -> NormalOperator:
        """The operator on another device (itself if it is there)."""
        if self.spatial_mask.device == torch.device(device):
            return self
        moved = NormalOperator(
            self.spatial_mask.to(device), self.fourier_filter.to(device), self.symmetric, self.coordinates, self.batched
        )
        moved.settings, moved.history, moved.errors = self.settings, self.history, self.errors
        moved._patch_filters = {shape: filters.to(device) for shape, filters in self._patch_filters.items()}
        return moved

    def modulations(self) -> list[Tensor]:
        """w_k of every term after the first, broadcastable to (B, C, *spatial); zero on average over the volume."""
        weights = []
        for power, axes in MODULATIONS[self.dims][self.terms]:
            w = torch.zeros((), device=self.spatial_mask.device)
            for axis in axes:
                values = self.coordinates[axis]
                spread = [1] * self.dims
                spread[axis] = values.shape[-1]
                w = w + (values.abs() ** power - 1 / (power + 1)).reshape(-1, 1, *spread)
            weights.append(w)
        return weights

    # -- what it does ---------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """The same as :meth:`apply`."""
        return self.apply(x)

    def apply(self, x: Tensor) -> Tensor:
        """H x for volumes (B, C, *spatial); differentiable in x."""
        return _Application.apply(x, self, False)

    def adjoint(self, x: Tensor) -> Tensor:
        """H^* x for volumes (B, C, *spatial); the same as :meth:`apply` in the symmetric form with a real λ."""
        return _Application.apply(x, self, True)

    def _apply_now(self, x: Tensor, adjoint: bool) -> Tensor:
        if tuple(x.shape[2:]) != self.shape:
            raise ScanError(
                f"The normal operator stands for volumes of {self.shape} voxels, but was given {tuple(x.shape[2:])}; "
                "fit it again for this volume."
            )
        if self.is_complex:
            if x.shape[1] != 2:
                raise ScanError(
                    f"This normal operator needs complex volumes as 2 channels (real, imaginary); got {x.shape[1]}."
                )
            x = torch.view_as_complex(x.movedim(1, -1).contiguous()).unsqueeze(1)
        mask = self.spatial_mask.unsqueeze(1) if self.batched else self.spatial_mask
        if self.symmetric:
            out = self.convolve(mask.conj() * x, adjoint).mul_(mask)
        elif adjoint:
            out = self.convolve(mask.conj() * x, adjoint)
        else:
            out = self.convolve(x, adjoint).mul_(mask)
        if self.is_complex:
            out = torch.view_as_real(out.squeeze(1)).movedim(-1, 1).contiguous()
        return out

    def convolve(self, x: Tensor, adjoint: bool = False, filters: Tensor | None = None) -> Tensor:
        filters = self.fourier_filter if filters is None else filters
        if adjoint and filters.is_complex():
            filters = filters.conj()
        parts = filters if self.terms > 1 else filters.unsqueeze(0)
        spectrum = forward_transform(x, self.lengths, self.full_spectrum)
        if self.terms == 1:
            return inverse_transform(spectrum.mul_(parts[0]), self.shape, self.lengths, self.full_spectrum)
        weights = self.modulations()
        gathered = spectrum * parts[0]
        for w, part in zip(weights, parts[1:], strict=True):
            gathered += forward_transform(w * x, self.lengths, self.full_spectrum).mul_(part).mul_(0.5)
        out = inverse_transform(gathered, self.shape, self.lengths, self.full_spectrum)
        for w, part in zip(weights, parts[1:], strict=True):
            out += inverse_transform(spectrum * part, self.shape, self.lengths, self.full_spectrum).mul_(0.5 * w)
        return out

    # -- on patches -----------------------------------------------------------------------------------------------

    def patch(self, box: Box) -> NormalOperator:
        """S H Sᵀ for the voxels of ``box``: the mask cropped, the kernel cropped to offsets that the patch holds.

        Equal to cropping the whole operator's answer, to rounding, at the cost of the patch alone. Filters are kept
        by patch shape: of all patches of one shape only the first pays.
        """
        self._check(box)
        return NormalOperator(
            self.spatial_mask[box],
            self._patch_filter(tuple(s.stop - s.start for s in box)),
            self.symmetric,
            [values[s] for values, s in zip(self.coordinates, box, strict=True)],
        )

    def patches(self, boxes: Sequence[Box]) -> NormalOperator:
        """S H Sᵀ for a batch of boxes of one shape, working on (len(boxes), C, *patch)."""
        shapes = {tuple(s.stop - s.start for s in box) for box in boxes}
        if len(shapes) != 1:
            raise ScanError(f"The patches of a batch must have one shape, not {sorted(shapes)}.")
        for box in boxes:
            self._check(box)
        return NormalOperator(
            torch.stack([self.spatial_mask[box] for box in boxes]),
            self._patch_filter(shapes.pop()),
            self.symmetric,
            [torch.stack([values[box[axis]] for box in boxes]) for axis, values in enumerate(self.coordinates)],
            batched=True,
        )

    def _check(self, box: Box) -> None:
        if (
            self.batched
            or len(box) != self.dims
            or any(not 0 <= s.start < s.stop <= n for s, n in zip(box, self.shape, strict=True))
        ):
            raise ScanError(f"The box {box} does not lie inside the volume of {self.shape} voxels.")

    def _patch_filter(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._patch_filters:
            terms = self.fourier_filter if self.terms > 1 else self.fourier_filter.unsqueeze(0)
            cropped = torch.stack([self._crop_filter(part, shape) for part in terms])
            self._patch_filters[shape] = cropped if self.terms > 1 else cropped[0]
        return self._patch_filters[shape]

    def _crop_filter(self, spectrum: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The spectrum of the kernel at offsets within a patch.

        Axis by axis and in slices of the last axis, so that the kernel of the whole volume, eight times the volume,
        never exists.
        """
        if shape == self.shape:
            return spectrum
        lengths, smaller = self.lengths, fft_shape(shape)
        step = max(1, (1 << 20) // max(1, math.prod(spectrum.shape[:-1])))  # 8 MB at a time
        pieces = []
        for start in range(0, spectrum.shape[-1], step):
            piece = spectrum[..., start : start + step].to(torch.complex64)
            for axis in range(self.dims - 1):
                piece = _wrap_crop(torch.fft.ifft(piece, dim=axis), axis, shape[axis], lengths[axis], smaller[axis])
            pieces.append(piece)
        kernel = torch.cat(pieces, dim=-1)
        last = self.dims - 1
        if self.full_spectrum:
            kernel = torch.fft.ifft(kernel, dim=last)
        else:
            kernel = torch.fft.irfft(kernel, n=lengths[last], dim=last)
        kernel = _wrap_crop(kernel, last, shape[last], lengths[last], smaller[last])
        if self.full_spectrum:
            cropped = torch.fft.fftn(kernel, dim=tuple(range(self.dims)))
        else:
            cropped = torch.fft.rfftn(kernel, dim=tuple(range(self.dims)))
        return (cropped if spectrum.is_complex() else cropped.real).contiguous()

    # -- looked at ------------------------------------------------------------------------------------------------

    def kernel(self) -> Tensor:
        """The convolution kernel(s) with offset 0 in the middle, (terms,) (2D - 1, 2H - 1, 2W - 1)."""
        axes = tuple(range(-self.dims, 0))
        if self.full_spectrum:
            c = torch.fft.ifftn(self.fourier_filter, dim=axes)
        else:
            c = torch.fft.irfftn(self.fourier_filter, s=self.lengths, dim=axes)
        c = torch.roll(c, [n - 1 for n in self.shape], axes)
        inside: Any = (..., *(slice(0, 2 * n - 1) for n in self.shape))
        return c[inside]

    def sqnorm(self, iterations: int = 12, seed: int = 0) -> float:
        """An upper estimate of the largest eigenvalue of H in magnitude (power iteration, plus 2 %)."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        batch = self.spatial_mask.shape[0] if self.batched else 1
        x = torch.rand((batch, 2 if self.is_complex else 1, *self.shape), generator=generator).to(
            self.spatial_mask.device
        )
        norm = 0.0
        for _ in range(iterations):
            x = x / x.norm()
            x = self.apply(x)
            norm = float(x.norm())
            if norm == 0:
                break
        return 1.02 * norm

    def relative_error(self, physics: LinearPhysics, x: Tensor) -> float:
        """‖AᵀA x − H x‖ / ‖AᵀA x‖ on a volume of your choice (B, C, *spatial)."""
        exact = physics.A_adjoint_A(x)
        return float((exact - self.apply(x)).norm() / exact.norm().clamp(min=1e-30))

    def __repr__(self) -> str:
        form = "m C m*" if self.symmetric else "m C"
        values = "complex" if self.is_complex else "real"
        return (
            f"NormalOperator({form}, {self.shape} voxels, {values}, {self.terms} term{'s' if self.terms > 1 else ''})"
        )

    # -- kept -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, physics: LinearPhysics | None = None) -> None:
        """Write m, λ, the fit's history and what they belong to into a safetensors file.

        Parameters
        ----------
        path
            Replaced if it exists, whole or not at all.
        physics
            The physics it was fitted to; its geometry and grid are kept, and :meth:`load` compares them.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        from napari_recon import __version__

        path = Path(path)
        metadata = {
            "format": FORMAT,
            "version": __version__,
            "symmetric": json.dumps(self.symmetric),
            "settings": json.dumps(self.settings),
            "history": json.dumps(self.history),
            "errors": json.dumps(self.errors),
            "physics": json.dumps(describe_physics(physics) if physics is not None else {}),
        }
        tensors = {"spatial_mask": self.spatial_mask, "fourier_filter": self.fourier_filter}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, str(partial), metadata=metadata)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise ScanError(f"The normal operator could not be written to {path}: {error}.") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | Path, physics: LinearPhysics | None = None, device: str | torch.device = "cpu"
    ) -> NormalOperator:
        """Read an operator written by :meth:`save`.

        Raises
        ------
        ScanError
            If the file is no such operator, or was fitted to another scan or grid than ``physics``.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                kept_format = metadata.get("format", "")
                if not kept_format.startswith(FORMAT[:-1]):
                    raise ScanError(
                        f"{path} is a safetensors file, but not a normal operator; use fit-operator to make one."
                    )
                if kept_format != FORMAT:
                    version = metadata.get("version", "another version")
                    raise ScanError(
                        f"The operator file {path} was written by napari-recon {version}, whose form this version does "
                        "not read; fit it again."
                    )
                tensors = {k: file.get_tensor(k) for k in ("spatial_mask", "fourier_filter")}
        except FileNotFoundError:
            raise ScanError(f"The operator file {path} does not exist; use fit-operator to make it.") from None
        except (SafetensorError, OSError) as error:
            raise ScanError(f"The operator file {path} cannot be read ({error}); fit it again.") from None
        if physics is not None:
            kept, wanted = json.loads(metadata.get("physics", "{}")), describe_physics(physics)
            for name, value in wanted.items():
                if name in kept and kept[name] != value:
                    hashed = name in ("vectors", "sampling_mask", "coil_maps")
                    shown = "" if hashed else f" ({kept[name]}, not {value})"
                    named = {"vectors": "views or geometry", "coil_maps": "set of coil maps"}
                    label = named.get(name, name.replace("_", " "))
                    raise ScanError(
                        f"The operator file {path} was fitted to another scan: its {label} differs{shown}; "
                        "fit it again for this scan."
                    )
        operator = cls(tensors["spatial_mask"], tensors["fourier_filter"], json.loads(metadata["symmetric"]))
        operator.settings = json.loads(metadata["settings"])
        operator.history, operator.errors = json.loads(metadata["history"]), json.loads(metadata["errors"])
        return operator


def _wrap_crop(c: Tensor, axis: int, keep: int, length: int, smaller: int) -> Tensor:
    """Offsets |d| <= keep - 1 of a wrapped-around axis of ``length``, as a wrapped-around axis of ``smaller``."""
    if length == 1:
        return c
    out_shape = list(c.shape)
    out_shape[axis] = smaller
    out = c.new_zeros(out_shape)
    out.narrow(axis, 0, keep).copy_(c.narrow(axis, 0, keep))
    if keep > 1:
        out.narrow(axis, smaller - keep + 1, keep - 1).copy_(c.narrow(axis, length - keep + 1, keep - 1))
    return out


class _Application(torch.autograd.Function):
    """H x with H^* as its backward: no intermediate is kept, whatever computes the Fourier transforms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: NormalOperator, adjoint: bool) -> Tensor:  # type: ignore[override]
        ctx.operator, ctx.adjoint = operator, adjoint
        return operator._apply_now(x, adjoint)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Application.apply(grads[0], ctx.operator, not ctx.adjoint), None, None


def describe_physics(physics: LinearPhysics) -> dict[str, Any]:
    """What an operator file keeps of its physics: plain values, equal when the physics is the same."""
    described: dict[str, Any] = {"physics": type(physics).__name__}
    geometry, grid = getattr(physics, "geometry", None), getattr(physics, "grid", None)
    if geometry is not None and grid is not None:
        described |= {
            "beam": geometry.kind,
            "number_of_views": geometry.views,
            "detector": list(geometry.detector_shape),
            "shape": list(grid.shape),
            "voxel_size": round(grid.voxel_size, 9),
            "center": [round(c, 6) for c in grid.center],
            "normalized": bool(getattr(physics, "normalize", False)),
            "vectors": hashlib.sha256(np.round(geometry.vectors, 6).tobytes()).hexdigest(),
        }
    elif isinstance(physics, MultiCoilMRI):
        mask, maps = physics.mask[:, 0], physics.coil_maps
        described |= {
            "shape": [int(n) for n in mask.shape[1:]],
            "coils": int(maps.shape[1]),
            "sampling_mask": _digest(mask),
            "coil_maps": _digest(torch.view_as_real(maps).mul(1e3).round().int()),
        }
    elif getattr(physics, "img_size", None) is not None:
        described["img_size"] = [int(n) for n in physics.img_size]
    return described


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy(force=True).tobytes()).hexdigest()
