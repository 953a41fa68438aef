"""The jobs about the normal operator: H fitted and seen beside AᵀA, and gradient steps on a patch with both.

The stream of an :class:`~napari_recon.jobs.job.OperatorJob` is: ``Stage("reading")``; ``Stage("fdk")`` or
``Stage("reading the volume")`` and ``VolumeReady("x")``; ``Stage("fitting the normal operator")``, from the first
operator on ``VolumeReady("mask")`` and ``VolumeReady("filter")``, which are updated in place, and a ``Progress`` of
"mask" a step; ``Stage("applying AᵀA")``, ``VolumeReady("exact")``; ``Stage("applying H")``, then ``VolumeReady`` of
"approximate", "error" and "regions"; ``Stage("writing")`` where there is an output. Finish ends the fit as soon as
there is an operator.

That of a :class:`~napari_recon.jobs.job.PatchJob`: ``Stage("reading")``, ``Stage("fdk")``, ``Stage("stepping")``,
``VolumeReady`` of "patch exact", "patch approximate" and "patch difference", a ``Progress`` a step.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.jobs.job import OperatorJob, PatchJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Stage, VolumeReady
from napari_recon.jobs.stages import Run, advance, keep_operator, operator_file
from napari_recon.jobs.volumes import read_volume
from napari_recon.measures.comparison import on_grid
from napari_recon.physics import NormalOperator, XRayTransform
from napari_recon.physics.normal import stream_normal_operator_fit
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Box

REGIONS = 8
"""Regions along an axis, of which each gets its own relative error."""

_DECADES = 4.0
"""How far below its maximum the filter is shown."""

_DARK = 1e-2
"""Regions whose AᵀA x is below this part of the volume's rms have next to nothing to be relative to."""

_FITTING = "fitting the normal operator"


class OperatorRun(Run[OperatorJob]):
    """The run of an operator's fit, or of a file, up to H x beside AᵀA x."""

    file: Path | None = None
    """Where the operator lies, once it does."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        yield from self.read()
        control.checkpoint()
        if job.operator != "fit":
            self.load_operator(job.operator)  # refused before anything is computed
        yield from self._volume()
        control.checkpoint()
        operator = yield from self._operator()
        self.figures |= operator.errors
        if operator.history:
            self.figures["fit_seconds"] = operator.history[-1]["seconds"]
        yield from self._compare(operator)
        made_by, seconds = self.made_by()
        if job.output is not None:
            yield Stage("writing", str(job.output))
            control.checkpoint()
            operator.save(job.output, self.physics)
            self.file = job.output
        elif self.file is None:  # not complete, or what could not be kept before: then the person is told why
            self.file = self._cached() if self.complete else self._cached().with_stem(self._cached().stem + "-partial")
            control.checkpoint()
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                folder = self.file.parent
                raise ScanError(
                    f"The operator cannot be kept in {folder} ({error.strerror}): give an output."
                ) from error
            operator.save(self.file, self.physics)
        yield Finished(self.figures, seconds, peak_memory(), str(self.file), self.complete, made_by)

    def check(self) -> None:
        """The output must be an operator file that can be written."""
        path = self.job.output
        if path is None:
            return
        if path.suffix != ".safetensors":
            raise ScanError(f"The operator file {path} must end in .safetensors: choose another name.")
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ScanError(f"{path} cannot be written: choose a folder that exists and is yours to write in.")

    # -- the stages ------------------------------------------------------------------------------------------------

    def _volume(self) -> Iterator[Message]:
        """The volume x as ``start``: the scan's FDK, or the one that the job names."""
        path = self.job.volume
        if path is None:
            yield from self.first_volume("x", to_the_end=True)
        else:
            yield Stage("reading the volume", path.name)
            data = on_grid(read_volume(path), self.grid)
            self.control.allocate("x", self.grid.shape)[...] = data
            self.start = torch.from_numpy(np.array(data, np.float32))[None, None].to(self.y.device)
            if self.scan.kind == "mri":  # of a magnitude, which is all that a file holds
                self.start = torch.cat([self.start, torch.zeros_like(self.start)], 1)
            yield self.ready("x")
        if not torch.isfinite(self.start).all() or not self.start.any():
            which = "The first volume of the scan" if path is None else f"The volume {path}, on the grid of the job,"
            raise ScanError(f"{which} is empty or holds NaN or infinity: choose another volume to see the operator on.")

    def _operator(self) -> Generator[Message, None, NormalOperator]:
        """The operator of the file, of the disk's earlier fit, or of a new one; shown, with its history."""
        if self.job.operator != "fit":
            self.file = Path(self.job.operator)
            return (yield from self._replay(self.load_operator(self.file)))
        file = self._cached()
        with contextlib.suppress(ScanError, OSError):  # not there, damaged, or from another version
            operator = self.load_operator(file)
            file.touch()  # used last, so forgotten last
            self.file = file
            return (yield from self._replay(operator))
        operator = yield from self._fit()
        if self.complete and keep_operator(operator, file, self.physics):
            self.file = file
        return operator

    def _cached(self) -> Path:
        return operator_file(self.physics, self.job.seed, self.job.parameters.model_dump())

    def _replay(self, operator: NormalOperator) -> Generator[Message, None, NormalOperator]:
        """Show an operator that was fitted before as if it were fitted now."""
        yield Stage(_FITTING, "made before, shown again")
        yield from self._show(operator)
        for step, row in enumerate(operator.history, 1):
            seconds = row.get("seconds", 0.0)
            yield Progress("mask", step, len(operator.history), self.grid.full_box, None, seconds, 0.0, dict(row))
        return operator

    def _fit(self) -> Generator[Message, None, NormalOperator]:
        options = self.job.parameters.model_dump()
        options["real_filter"] |= options["symmetric"]
        control = self.control
        begin, stage, shown = control.clock(), "", None
        rows = []
        yield Stage(_FITTING)
        updates = stream_normal_operator_fit(self.physics, seed=self.job.seed, device=self.y.device, **options)
        with contextlib.closing(updates):  # type: ignore[type-var]
            while (update := advance(updates)) is not None:
                if update.stage != stage:
                    stage = update.stage
                    yield Stage(_FITTING, "" if stage == "fitting" else stage)
                if update.operator is not None and update.operator is not shown:
                    shown = update.operator
                    yield from self._show(shown)
                if stage == "fitting":
                    rows.append(update.figures)
                seconds = control.clock() - begin
                remaining = seconds / update.step * (update.total - update.step) if update.step else None
                # The last update's errors are of other volumes, and have their place at the end.
                box, figures = self.grid.full_box, dict(update.figures) if stage == "fitting" else {}
                yield Progress("mask", update.step, update.total, box, None, seconds, remaining, figures)
                control.checkpoint()
                if control.finishing and shown is not None and stage != "done":
                    self.complete = False
                    shown.history = rows
                    break
        assert shown is not None
        return shown

    def _show(self, operator: NormalOperator) -> Iterator[Message]:
        """Show m and λ as volumes, made or updated in place."""
        m, grid = operator.spatial_mask, self.grid
        images = {"mask": m.abs().cpu().numpy()}
        if m.is_complex():
            images["mask phase"] = m.angle().cpu().numpy()
        for number, image in enumerate(filter_images(operator), 1):
            images["filter" if number == 1 else f"filter {number}"] = image
        for name, image in images.items():
            first = name not in self.control.volumes
            volume = self.control.allocate(name, grid.shape) if first else self.control.volumes[name]
            volume[...] = image
            if not first:
                continue
            if name.startswith("mask"):
                yield self.ready(name)
                continue
            scale = tuple(1 / (n * edge) for n, edge in zip(grid.shape, grid.scale, strict=True))
            translate = tuple(-(n // 2) * s for n, s in zip(grid.shape, scale, strict=True))
            handle, labels = self.control.handles.get(name, ""), ("f_z", "f_y", "f_x")
            yield VolumeReady(name, grid.shape, scale, translate, "1/mm", handle, labels)

    def _compare(self, operator: NormalOperator) -> Iterator[Message]:
        """AᵀA x and H x, how long each takes, and how far they are apart and where."""
        control, grid, x = self.control, self.grid, self.start
        yield Stage("applying AᵀA")
        control.checkpoint()
        _warm_up(self.physics)
        answer, self.figures["seconds_exact"] = _timed(self.physics.A_adjoint_A, x)
        exact = control.allocate("exact", grid.shape)
        exact[...] = values_shown(answer)
        yield self.ready("exact")
        control.checkpoint()
        yield Stage("applying H")
        _timed(operator.apply, x)  # the first time is dearer
        control.checkpoint()
        other, self.figures["seconds_approximate"] = _timed(operator.apply, x)
        approximate = control.allocate("approximate", grid.shape)
        approximate[...] = values_shown(other)
        yield self.ready("approximate")
        error = control.allocate("error", grid.shape)
        error[...] = other.sub_(answer).square_().sum((0, 1)).cpu().numpy()
        self.figures["relative_error"] = math.sqrt(_sum(error) / max(_sum(np.square(exact)), 1e-60))
        yield self.ready("error")
        blocks = tuple(math.ceil(n / REGIONS) for n in grid.shape)
        values = region_errors(exact, error, blocks)
        self.figures["worst_region"] = float(values.max())
        control.allocate("regions", values.shape)[...] = values
        scale = tuple(b * edge for b, edge in zip(blocks, grid.scale, strict=True))
        translate = tuple(
            t + (b - 1) / 2 * edge for t, b, edge in zip(grid.translate, blocks, grid.scale, strict=True)
        )  # a region's centre
        yield VolumeReady("regions", values.shape, scale, translate, handle=control.handles.get("regions", ""))


class PatchRun(Run[PatchJob]):
    """The run of gradient steps on a patch, with AᵀA and with H."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        yield from self.read()
        control.checkpoint()
        operator = self.load_operator(job.operator)
        yield from self.first_volume(None)
        control.checkpoint()
        yield from self._step(operator)
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)

    def _step(self, operator: NormalOperator) -> Iterator[Message]:
        """Steps x ← x − (S g + N (x − S x₀)) / ‖A‖² from S x₀ on, with N = S AᵀA Sᵀ and with S H Sᵀ side by side."""
        job, control = self.job, self.control
        yield Stage("stepping")
        gradient = self.prepared.get("gradient", self._gradient)
        control.checkpoint()
        box = patch_box(job.center, job.patch, self.grid.shape)
        length = 1 / self.physics.sqnorm
        control.checkpoint()
        restricted, cropped = self.physics.restrict(box), operator.patch(box)
        start, g = self.start[(..., *box)].contiguous(), gradient[(..., *box)].contiguous()
        _warm_up(restricted)
        _timed(cropped.apply, start)
        steps = {"exact": restricted.A_adjoint_A, "approximate": cropped.apply}
        values, spent = dict.fromkeys(steps, start), dict.fromkeys(steps, 0.0)
        shape = (job.steps + 1, *start.shape[2:])
        patch_grid = self.grid.crop(box)
        for name in (*steps, "difference"):
            volume = control.allocate(f"patch {name}", shape)
            volume[0] = 0 if name == "difference" else values_shown(start)
            yield VolumeReady(
                f"patch {name}",
                shape,
                (1.0, *patch_grid.scale),
                (0.0, *patch_grid.translate),
                handle=control.handles.get(f"patch {name}", ""),
                axis_labels=("step", "z", "y", "x"),
            )
        begin = control.clock()
        for k in range(1, job.steps + 1):
            control.checkpoint()
            if control.finishing:
                self.complete = False
                break
            for name, normal in steps.items():
                answer, seconds = _timed(normal, values[name] - start)
                values[name] = values[name] - length * (g + answer)
                spent[name] += seconds
                control.volumes[f"patch {name}"][k] = values_shown(values[name])
            apart, moved = values["approximate"] - values["exact"], values["exact"] - start
            control.volumes["patch difference"][k] = values_shown(-apart)
            self.figures = {
                "difference": float(apart.norm() / moved.norm().clamp(min=1e-30)),
                "seconds_exact": spent["exact"] / k,
                "seconds_approximate": spent["approximate"] / k,
                "speedup": spent["exact"] / max(spent["approximate"], 1e-9),
            }
            passed = control.clock() - begin
            now = (slice(k, k + 1), *(slice(0, n) for n in shape[1:]))
            left = passed / k * (job.steps - k)
            yield Progress("patch exact", k, job.steps, now, None, passed, left, dict(self.figures))

    def _gradient(self) -> Tensor:
        """Aᵀ(A x₀ − y) at the first volume x₀: what the data say about every voxel, once for all patches."""
        with torch.no_grad():
            residual = self.physics.A(self.start)
            residual -= self.y
            return self.physics.A_adjoint(residual)


# -- what is shown -------------------------------------------------------------------------------------------------


def values_shown(x: Tensor) -> NDArray[np.float32]:
    """(D, H, W) of a volume (1, 1, D, H, W); of a complex one (1, 2, D, H, W) the magnitude."""
    shown: NDArray[np.float32] = (torch.hypot(x[0, 0], x[0, 1]) if x.shape[1] == 2 else x[0, 0]).cpu().numpy()
    return shown


def filter_images(operator: NormalOperator) -> list[NDArray[np.float32]]:
    """log₁₀(|λ| / max |λ|) of every kernel, clipped at -4, with frequency zero in the middle.

    Sampled as the spectrum of the volume itself is, at k / (n · voxel size): every second one of the padded
    frequencies, where the padding doubles the volume.

    Parameters
    ----------
    operator
        H for volumes (D, H, W), not batched.

    Returns
    -------
    list of ndarray
        (D, H, W), float32, one a kernel; the maximum is the first one's. Frequency zero is at index n // 2.
    """
    filters = operator.fourier_filter if operator.terms > 1 else operator.fourier_filter.unsqueeze(0)
    images, largest = [], 0.0
    for spectrum in filters:
        for axis, (n, length) in enumerate(zip(operator.shape, operator.lengths, strict=True)):
            if axis == operator.dims - 1 and not operator.full_spectrum:
                spectrum = _whole_spectrum(spectrum, length)
            spectrum = _as_often_as(spectrum, axis, n, length)
        magnitude = torch.fft.fftshift(spectrum.abs())
        largest = largest or max(float(magnitude.max()), 1e-30)
        images.append((magnitude / largest).clamp(min=10**-_DECADES).log10().cpu().numpy())
    return images


def _as_often_as(spectrum: Tensor, axis: int, n: int, length: int) -> Tensor:
    """The same kernel's spectrum with n frequencies along an axis that has ``length`` (1, or at least 2n)."""
    if length <= 2 * n:
        return spectrum[(slice(None),) * axis + (slice(None, None, length // n),)]
    kernel = torch.fft.ifft(spectrum, dim=axis)  # offsets 0 .. n - 1 at its beginning, -n .. -1 at its end
    return torch.fft.fft(kernel.narrow(axis, 0, n) + kernel.narrow(axis, length - n, n), dim=axis)


def _whole_spectrum(half: Tensor, length: int) -> Tensor:
    """The full last axis of the half spectrum of a real kernel: S(-f) is the conjugate of S(f)."""
    mirrored = half[..., 1 : length - half.shape[-1] + 1].conj()
    others = tuple(range(half.ndim - 1))
    mirrored = mirrored.flip((*others, half.ndim - 1)).roll((1,) * len(others), others)
    return torch.cat((half, mirrored), dim=-1)


def region_errors(
    exact: NDArray[np.float32], squared_error: NDArray[np.float32], blocks: tuple[int, ...]
) -> NDArray[np.float32]:
    """‖AᵀA x − H x‖ / ‖AᵀA x‖ of every block of voxels.

    Where AᵀA x is next to nothing, the error is relative to the whole volume's rms instead.

    Parameters
    ----------
    exact, squared_error
        AᵀA x and (AᵀA x − H x)², both (D, H, W).
    blocks
        Edges of a block in voxels; those at the end of an axis may be smaller.

    Returns
    -------
    ndarray
        One value a block, float32, none of them NaN.
    """

    def totals(values: NDArray[np.float32]) -> NDArray[np.float64]:
        found: NDArray = values
        for axis, (n, block) in enumerate(zip(values.shape, blocks, strict=True)):
            found = np.add.reduceat(found, np.arange(0, n, block), axis=axis, dtype=np.float64)
        return found

    power, error = totals(np.square(exact)), totals(squared_error)
    edges = [np.diff([*range(0, n, block), n]) for n, block in zip(exact.shape, blocks, strict=True)]
    voxels = edges[0][:, None, None] * edges[1][:, None] * edges[2]
    overall = voxels * (power.sum() / exact.size)
    power = np.where(power < _DARK**2 * overall, overall, power)
    return np.sqrt(error / np.maximum(power, 1e-60)).astype(np.float32)


def patch_box(center: tuple[float, float, float], edge: int, shape: tuple[int, int, int]) -> Box:
    """The box of a patch about ``center`` (z, y, x, in voxels), moved into the volume; thinner where that is."""
    z, y, x = (
        slice(start := min(max(0, round(c - (p - 1) / 2)), n - p), start + p)
        for c, n, p in ((c, n, min(edge, n)) for c, n in zip(center, shape, strict=True))
    )
    return z, y, x


# -- small things --------------------------------------------------------------------------------------------------


def _warm_up(physics: LinearPhysics) -> None:
    """One view of AᵀA, so that what is timed afterwards does not compile anything."""
    if not isinstance(physics, XRayTransform):  # only it has kernels that are compiled
        return
    one = physics.subset(slice(0, 1))
    with torch.no_grad():
        one.A_adjoint_A(torch.zeros((1, *one.img_size), device=one._device_holder.device))


def _timed(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
    """The answer, and the seconds that it took."""
    with torch.no_grad():
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begin = time.perf_counter()
        answer = function(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return answer, time.perf_counter() - begin


def _sum(values: NDArray[np.float32]) -> float:
    return float(values.sum(dtype=np.float64))
