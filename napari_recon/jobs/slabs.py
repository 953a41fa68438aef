"""A reconstruction that memory has no room for: slab after slab along z, into an .ome.zarr that is readable meanwhile.

Every slab is a reconstruction of some slices and a margin about them (:mod:`napari_recon.scans.slabs`). What lies
beyond is held at its FDK, whose projections are taken off the slab's measurements: what a ray meets elsewhere in a wide
cone is not reconstructed once more. All have the units of the whole: what regularisation is relative to is measured
once, on the FDK of all slabs. Projections are read and corrected once, into a file in which a slab's rows lie together.

All that is needed to go on lies in a folder beside the output, ``.NAME.ome.zarr.work``, until the end: the same job
started again takes up where it was stopped, with the same result bit for bit. Under torchrun each process takes its own
slabs; the first one reads the projections, and ends it.

The stream is ``Stage("reading")``, ``Stage("fdk")`` where units are measured, then ``Stage("slab 3 of 8")`` with a
slab's own stages as its detail, and ``Progress("slabs")`` in hundredths of a slab, whole ones when it is finished and
its box can be read; ``Stage("measuring")``. ``Progress("projections")`` tells how many views are read, or rows
measured. No volume is shown, as there is no room for one: it grows in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import (
    FDKParameters,
    PADMMParameters,
    ReconstructionJob,
    UnrolledParameters,
)
from napari_recon.jobs.memory import peak_memory, plan_memory, readable, release_memory
from napari_recon.jobs.messages import Finished, Message, Notice, Progress, Stage
from napari_recon.jobs.parts import PartControl
from napari_recon.jobs.stages import JobCancelled, Prepared, Run, digest_of, state_of
from napari_recon.jobs.volumes import ZarrVolume, check_output, slab_step
from napari_recon.learning.weights import find_weights, read_header
from napari_recon.scans.errors import ScanError
from napari_recon.scans.scan import Scan
from napari_recon.scans.slabs import MARGIN, Slab, rows_seeing, slab_of, slices_met

if TYPE_CHECKING:
    import torch

    from napari_recon.physics import XRayTransform

_COARSE = 32
"""Voxels along an axis of the grid on which the norm of the whole is estimated: within a percent, see the tests."""
_RELEASED = 2**24
"""Bytes of a slab from which on memory is given back between two: that takes half a second."""
_WAIT = 0.2
"""Seconds between two looks for what another process is to write."""


def goes_in_slabs(job: ReconstructionJob) -> bool:
    """Whether a job is run slab by slab: because it says so, or because memory has no room for the whole.

    Raises
    ------
    ScanError
        If the scan cannot be opened, or the job asks for slabs where there are none.
    """
    if job.slab is None or (job.slab == "auto" and (job.slices is not None or not job.into_zarr)):
        return False
    scan = job.open_scan()
    if job.slab == "auto":
        if scan.kind == "mri":
            return False
        assert job.output is not None
        begun = _Work(work_folder(job.output)).note("job")
        if begun is not None and begun.get("digest") == _identity(job, scan):  # whatever is free by now
            return True
        return not plan_memory(job.model_copy(update={"slab": None}), scan).fits
    if job.slices is not None:
        raise ScanError("Some slices are a slab already: leave out the slices, or the slab.")
    if scan.kind == "mri":
        raise ScanError(f"Every sample of the k-space {job.scan} sees all slices: leave the slab out.")
    if not job.into_zarr:
        raise ScanError("A volume is written slab by slab as OME-Zarr only: give an output that ends in .ome.zarr.")
    return True


def work_folder(output: Path) -> Path:
    """Where a run in slabs keeps what it needs to go on."""
    return output.with_name(f".{output.name}.work")


def _identity(job: ReconstructionJob, scan: Scan) -> str:
    """What tells whether a run that was stopped was one of the same job, on the same scan."""
    from napari_recon import __version__
    from napari_recon.physics.devices import resolve_device

    said = job.model_dump(mode="json", exclude={"output"})
    parameters, files = job.parameters, [state_of(job.scan)]
    weights = parameters.weights if isinstance(parameters, UnrolledParameters) else None
    if isinstance(parameters, PADMMParameters):
        weights = parameters.start_weights()
        if parameters.starts_from_file:
            files.append(state_of(Path(parameters.start)))
    grid, digest = scan.default_grid(job.shape, job.voxel_size), None
    if weights is not None:
        digest = read_header(find_weights(weights)).digest()
    more = [__version__, resolve_device(job.device).type, grid.shape, grid.voxel_size, digest, *files]
    return hashlib.sha256(json.dumps([said, more], sort_keys=True, default=str).encode()).hexdigest()


class SlabsRun(Run[ReconstructionJob]):
    """The run of a reconstruction in slabs."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job = self.job
        yield Stage("reading", job.scan.name)
        self.check()
        from napari_recon.physics.devices import resolve_device

        self.prepared.clear()  # the memory is for the slabs
        self.device = resolve_device(job.device)
        self.scan: Scan = job.open_scan()  # type: ignore[assignment]
        self.grid = self.shown_grid = self.scan.default_grid(job.shape, job.voxel_size)
        assert job.output is not None
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.work = _Work(work_folder(job.output))
        self.told: set[str] = set()
        try:
            yield from self._begin()
            yield from self._units()
            yield from self._slabs()
            if self.rank == 0:
                yield from self._end()
        except JobCancelled:
            if self.rank == 0:
                if self.work.has("projections.raw"):  # else what stands there is another job's
                    shutil.rmtree(job.output, ignore_errors=True)
                self.work.remove()
            raise
        except OSError as error:
            raise ScanError(
                f"Could not write {job.output} or {self.work.folder} ({error.strerror or error}): free some space and "
                "start the same job again, which goes on."
            ) from error
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), str(job.output), self.complete, made_by)

    def check(self) -> None:
        """Refuse what cannot be done in slabs."""
        job, parameters = self.job, self.job.parameters
        assert job.output is not None
        check_output(job.output)
        if job.bits == 16:
            raise ScanError("16 bits take the whole volume's range, which slabs do not know of each other: write 32.")
        operator = getattr(parameters, "operator", "fit")
        if operator not in ("fit", "exact"):
            raise ScanError(f"The operator {operator} is of the whole volume, not of slabs: use 'fit' or 'exact'.")
        if isinstance(parameters, PADMMParameters) and parameters.start == "last":
            raise ScanError("Slabs cannot begin at the last result, which is no file: choose another start.")
        if isinstance(parameters, UnrolledParameters):
            self.used["weights"] = {
                "name": parameters.weights,
                "sha256": read_header(find_weights(parameters.weights)).digest(),
            }

    # -- beginning, or going on ------------------------------------------------------------------------------------

    def _begin(self) -> Iterator[Message]:
        """The working folder, the projections in it, and the store: ``store``, ``slabs`` and ``detector``."""
        job, work = self.job, self.work
        assert job.output is not None
        views, rows, columns = self.scan.shape
        digest, goes_on = _identity(job, self.scan), False
        if self.rank == 0:
            known = work.note("job") or {}
            goes_on = known.get("digest") == digest and work.has("projections.raw") and self._store_is_ours()
            if not goes_on:
                known = {"digest": digest, "thickness": self._thickness()}
                work.begin(known)
                yield Notice(self._sentence(known["thickness"]))
                yield from self._read_projections(work.folder / "projections.raw")
        else:
            yield Stage("waiting", "for the first process to read the projections")
            self._wait(lambda: (work.note("job") or {}).get("digest") == digest and work.has("projections.raw"))
        thickness = int((work.note("job") or {})["thickness"])
        depth = self.grid.shape[0]
        self.cores = [slice(k, min(k + thickness, depth)) for k in range(0, depth, thickness)]
        self.detector = rows, views, columns
        self.store = ZarrVolume.open(job.output, writable=True)
        if goes_on:
            done = sum(self._finished(n) for n in range(len(self.cores)))
            yield Notice(f"Going on where it was stopped: {done} of {len(self.cores)} slabs are finished.")

    def _sentence(self, thickness: int) -> str:
        """Why, and in how many slabs."""
        count = math.ceil(self.grid.shape[0] / thickness)
        slabs = f"{count} slabs of {thickness} slices" if count > 1 else "one slab"
        if self.job.slab == "auto" and "in slabs" in (said := plan_memory(self.job, self.scan).sentence):
            return said.replace("in slabs", f"in {slabs}")
        return f"The volume is reconstructed in {slabs}, one after the other."

    def _store_is_ours(self) -> bool:
        """Whether the output is what the working folder belongs to."""
        assert self.job.output is not None
        try:
            return ZarrVolume.open(self.job.output).levels[0].shape == self.grid.shape
        except Exception:  # not there, damaged, or something else
            return False

    def _thickness(self) -> int:
        """How thick slabs are: as asked for, or as thick as memory has room for."""
        depth, step = self.grid.shape[0], slab_step(self.grid.shape)
        if isinstance(self.job.slab, int):
            return math.ceil(self.job.slab / step) * step
        count, tried = 2, 0
        while True:
            thickness = math.ceil(depth / count / step) * step
            if thickness != tried:
                tried, count = thickness, math.ceil(depth / thickness)
                cores = [slice(k, min(k + thickness, depth)) for k in range(0, depth, thickness)]
                plans = [plan_memory(self._part(core), self.scan, held=True) for core in cores if self._is_seen(core)]
                if all(plan.fits for plan in plans):
                    return thickness
                if thickness == step:
                    raise ScanError(next(plan.sentence for plan in plans if not plan.fits))
            count += max(1, count // 4)

    def _read_projections(self, file: Path) -> Iterator[Message]:
        """Read and correct all projections into a file, (rows, views, columns), and make the empty store."""
        views, rows, columns = shape = self.scan.shape
        free = shutil.disk_usage(file.parent).free
        held = 0 if isinstance(self.job.parameters, FDKParameters) else self.grid.voxels
        needed = 4 * (math.prod(shape) + round(8 / 7 * self.grid.voxels) + held)
        if needed > free:
            raise ScanError(
                f"The projections and the volume take {readable(needed)} beside {self.job.output}, where "
                f"{readable(free)} are free: free some space, or choose another folder."
            )
        partial = file.with_name("projections.partial")
        _claim(partial, 4 * math.prod(shape))
        if held:
            _claim(self.work.folder / "fdk.raw", 4 * held)
        begin = self.control.clock()
        for piece, values in self.scan.corrected_chunks():
            mapped = np.memmap(partial, np.float32, "r+", shape=(rows, views, columns))
            mapped[:, piece] = values.transpose(1, 0, 2)
            del mapped  # or all that was written would count as this process's memory
            self.control.checkpoint()
            seconds = self.control.clock() - begin
            left = seconds / piece.stop * (views - piece.stop)
            yield Progress("projections", piece.stop, views, self.grid.full_box, None, seconds, left)
        assert self.job.output is not None
        thickness = int((self.work.note("job") or {})["thickness"])
        if self.job.output.exists():
            shutil.rmtree(self.job.output)
        ZarrVolume.create(self.job.output, self.grid, thickness)
        partial.replace(file)

    # -- what holds for the whole ------------------------------------------------------------------------------------

    def _units(self) -> Iterator[Message]:
        """What parts have in common: FDK in a file, and ``units``, by name, so that no seam comes from these."""
        self.units: dict[str, float] = {}
        parameters, work = self.job.parameters, self.work
        if isinstance(parameters, FDKParameters):
            return
        count = len(self.cores)
        for n in range(self.rank, count, self.world):
            yield Stage("fdk", f"slab {n + 1} of {count}")
            if not work.has(f"fdk-{n}.npy"):
                work.save(f"fdk-{n}.npy", self._fdk(self.cores[n]))
            self.control.checkpoint()
        if self.rank == 0 and work.note("units") is None:
            self._wait(lambda: all(work.has(f"fdk-{n}.npy") for n in range(count)))
            yield Stage("measuring", "what holds for the whole")
            samples = np.concatenate([np.load(work.folder / f"fdk-{n}.npy") for n in range(count)])
            units = {"brightness": _quantile(samples), "sqnorm": self._sqnorm()}
            if isinstance(parameters, UnrolledParameters) or getattr(parameters, "start", None) in ("tv", "network"):
                units["ramp"] = self._ramp(units["sqnorm"])
            work.keep("units", units)
        self._wait(lambda: work.note("units") is not None)
        self.units = work.note("units") or {}

    def _fdk(self, core: slice) -> NDArray[np.float32]:
        """Write a slab's FDK into the file; of its magnitude every n-th voxel, n as for the whole's brightness."""
        from napari_recon.reconstruction import FDK

        step = max(1, self.grid.voxels // 1_000_000)
        begin = core.start * self.grid.shape[1] * self.grid.shape[2]
        volume = np.zeros((core.stop - core.start, *self.grid.shape[1:]), np.float32)
        if self._is_seen(core, margin=0):
            slab = replace(slab_of(self.scan.geometry, self.grid, core, margin=0), extended=core)
            volume = FDK()(self._rows(slab.rows), self._physics_of(slab))[0, 0].cpu().numpy()
        with (self.work.folder / "fdk.raw").open("r+b") as file:
            file.seek(4 * begin)
            file.write(volume.tobytes())
            os.fsync(file.fileno())
        return np.abs(volume).ravel()[-begin % step :: step]

    def _sqnorm(self) -> float:
        """‖A‖² of the whole, from a grid that is coarser: it is mostly smooth structures that A makes large."""
        from napari_recon.physics import XRayTransform

        geometry, grid = self.scan.geometry, self.grid
        factor = math.ceil(max(grid.shape) / _COARSE)
        factor = max(1, min(factor, *(n // 4 for n in geometry.detector_shape if n > 1)))
        chosen = geometry.select(slice(None, None, math.ceil(geometry.views / _COARSE)))
        d, h, w = (math.ceil(n / factor) for n in grid.shape)
        coarse = grid.resampled(shape=(d, h, w))
        physics = XRayTransform(chosen.binned(factor) if factor > 1 else chosen, coarse, self.device)
        # A view and a pixel stand for several; and so does a voxel.
        pixels = factor * (factor if geometry.detector_shape[0] > 1 else 1)
        voxels = (coarse.voxel_size / grid.voxel_size) ** (3 if grid.shape[0] > 1 else 2)
        return physics.sqnorm * geometry.views / chosen.views * pixels / voxels

    def _ramp(self, sqnorm: float) -> float:
        """‖AᵀFA‖ of the slab in the middle, which no other's exceeds by more than is to spare."""
        from napari_recon.physics.ramp_filtered import RampFiltered

        cores = [core for core in self.cores if self._is_seen(core)]
        middle = self._slab_of(cores[len(cores) // 2])
        return RampFiltered(self._physics_of(middle, sqnorm)).largest

    # -- the slabs ---------------------------------------------------------------------------------------------------

    def _slabs(self) -> Iterator[Message]:
        """Reconstruct, write and note this process's slabs that are not finished."""
        count = len(self.cores)
        mine = range(self.rank, count, self.world)
        todo = [n for n in mine if not self._finished(n)]
        before, begin = len(mine) - len(todo), self.control.clock()

        def progress(core: slice, finished: int, inside: float, figures: dict[str, float]) -> Progress:
            seconds, done = self.control.clock() - begin, finished + inside
            left = seconds / done * (len(todo) - done) if done else None
            # Whole slabs are told of when they are finished, and not otherwise.
            step = 100 * (before + finished) + (min(99, max(1, round(100 * inside))) if inside else 0)
            box = (core, *self.grid.full_box[1:])
            return Progress("slabs", step, 100 * len(mine), box, None, seconds, left, figures)

        if todo:
            self._describe(complete=False)
        for done, n in enumerate(todo):
            if self.control.finishing:
                self.complete = False
                return
            core, name = self.cores[n], f"slab {n + 1} of {count}"
            values = np.zeros((core.stop - core.start, *self.grid.shape[1:]), np.float32)
            if self._is_seen(core):  # else nothing is known of it
                if not isinstance(self.job.parameters, FDKParameters):
                    yield Stage(name, "projecting what lies beside it")
                part = self._run_of(core)
                for message in part.reconstruction():
                    if isinstance(message, Stage):
                        yield Stage(name, f"{message.name}, {message.detail}" if message.detail else message.name)
                    elif isinstance(message, Progress) and message.name == "result" and message.total:
                        yield progress(core, done, message.step / message.total, message.figures)
                    elif isinstance(message, Notice) and message.text not in self.told:
                        self.told.add(message.text)
                        yield message
                if not part.complete:  # Finish was pressed amid it
                    self.complete = False
                    return
                values = part.control.volumes["result"]
                self.used |= part.used
                part.prepared.clear()
                del part
            if not np.isfinite(values).all():
                raise ScanError(
                    f"The result of the slices {core.start} to {core.stop - 1} holds NaN or infinity: choose fewer "
                    "iterations or more regularisation."
                )
            self.store.write(core.start, values)
            self.work.keep(f"slab-{n}", {"seconds": self.control.clock() - begin})
            self._describe(complete=False)
            if values.nbytes > _RELEASED:
                del values
                release_memory()
            yield progress(core, done + 1, 0.0, {})
        if self.rank == 0 and not self.control.finishing:
            told = 0
            while (found := sum(self._finished(n) for n in range(count))) < count:
                if found > told:  # by the others
                    self._describe(complete=False)
                    told = found
                self.control.checkpoint()
                time.sleep(_WAIT)

    def _is_seen(self, core: slice, margin: int = MARGIN) -> bool:
        """Whether any ray meets a slab, or a margin about it; FDK has none."""
        margin = 0 if isinstance(self.job.parameters, FDKParameters) else margin
        start, stop = max(0, core.start - margin), min(self.grid.shape[0], core.stop + margin)
        return rows_seeing(self.scan.geometry, self.grid, start, stop) is not None

    def _slab_of(self, core: slice) -> Slab:
        """What some slices take."""
        slab = self._part(core).part_of(self.scan.geometry, self.grid, held=True)
        assert slab is not None
        return slab

    def _part(self, core: slice) -> ReconstructionJob:
        """The reconstruction of some slices."""
        changes: dict[str, Any] = {"slices": (core.start, core.stop), "slab": None, "output": None}
        if isinstance(self.job.parameters, PADMMParameters):
            changes["parameters"] = self.job.parameters.model_copy(update={"keep_iterates": False})
        return self.job.model_copy(update=changes)

    def _run_of(self, core: slice) -> Any:
        """The run of some slices, to which their rays and the units of the whole are handed."""
        from napari_recon.jobs.padmm import PADMMRun
        from napari_recon.jobs.reconstruct import ReconstructionRun
        from napari_recon.physics.ramp_filtered import RampFiltered

        part, slab = self._part(core), self._slab_of(core)
        physics = self._physics_of(slab, self.units.get("sqnorm"))
        things: dict[str, Any] = {"scan": self.scan, "slab": slab, "physics": physics, "y": self._rows(slab.rows)}
        if not isinstance(part.parameters, FDKParameters):
            if isinstance(part.parameters, PADMMParameters) and part.parameters.weighted:
                things["measured"] = things["y"].clone()
            self._take_off(things["y"], slab)
            things["fdk ram-lak"] = self._held(slab.extended)
        if "brightness" in self.units:
            things["unit"] = self.units["brightness"]
        if "ramp" in self.units:
            things["physics of ramp steps"] = RampFiltered(physics, self.units["ramp"])
        prepared = Prepared(digest_of(part, state_of(part.scan), str(self.device)), things)
        kind = PADMMRun if isinstance(part.parameters, PADMMParameters) else ReconstructionRun
        return kind(part, PartControl(self.control), prepared)

    def _physics_of(self, slab: Slab, sqnorm: float | None = None) -> XRayTransform:
        from napari_recon.physics import XRayTransform

        return XRayTransform(self.scan.geometry.with_rows(slab.rows), slab.grid(self.grid), self.device, sqnorm=sqnorm)

    def _rows(self, rows: slice) -> torch.Tensor:
        """Rows of the measurements, (1, 1, rows, views, columns); read, not mapped, so that memory is what it seems."""
        import torch

        _, views, columns = self.detector
        count = (rows.stop - rows.start) * views * columns
        file = self.work.folder / "projections.raw"
        values = np.fromfile(file, np.float32, count, offset=4 * rows.start * views * columns)
        return torch.from_numpy(values.reshape(-1, views, columns))[None, None].to(self.device)

    def _held(self, slices: slice) -> torch.Tensor:
        """FDK of some slices, (1, 1, slices, H, W); on the CPU the file itself, of which nothing is written."""
        import torch

        _, height, width = self.grid.shape
        offset = 4 * slices.start * height * width
        shape = slices.stop - slices.start, height, width
        mapped = np.memmap(self.work.folder / "fdk.raw", np.float32, "c", offset, shape)
        return torch.from_numpy(mapped)[None, None].to(self.device)

    def _take_off(self, y: torch.Tensor, slab: Slab) -> None:
        """Take off a slab's rows ``y``, in place, what FDK beside it projects to; some slices and views at a time."""
        import torch

        geometry, rows, views = self.scan.geometry, slab.rows, self.scan.geometry.views
        low, high = slices_met(geometry, self.grid, rows)
        thickness, group = self.cores[0].stop, max(1, views // 8)
        beside = [(low, slab.extended.start), (slab.extended.stop, high)]
        for here in [slice(k, min(k + thickness, end)) for first, end in beside for k in range(first, end, thickness)]:
            seen = rows_seeing(geometry, self.grid, here.start, here.stop)
            if seen is None:
                continue
            some = slice(max(seen.start, rows.start), min(seen.stop, rows.stop))
            if some.start >= some.stop:
                continue
            physics, x = self._physics_of(Slab(here, here, some)), self._held(here)
            taken = y[:, :, some.start - rows.start : some.stop - rows.start]
            for first in range(0, views, group):
                chosen = slice(first, min(first + group, views))
                with torch.no_grad():
                    taken[:, :, :, chosen] -= physics.subset(chosen).A(x)
                self.control.checkpoint()

    def _finished(self, n: int) -> bool:
        return self.work.has(f"slab-{n}.json")

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end(self) -> Iterator[Message]:
        """The figures, what the volume tells of itself, and what was only for the way there removed."""
        if self.complete:
            yield Stage("measuring")
            yield from self._measure()
        self._describe(self.complete)
        if self.complete:
            self.work.remove()

    def _measure(self) -> Iterator[Message]:
        """The residual, a few rows at a time: each takes the slices that its rays meet."""
        import torch

        geometry, count = self.scan.geometry, len(self.cores)
        rows = geometry.detector_shape[0]
        edges = [round(i * rows / count) for i in range(count + 1)]
        error = power = 0.0
        begin = self.control.clock()
        for step, (first, stop) in enumerate(pairwise(edges), start=1):
            if first == stop:
                continue
            some = slice(first, stop)
            low, high = slices_met(geometry, self.grid, some)
            y = self._rows(some)
            if low < high:
                slab = Slab(slice(low, high), slice(low, high), some)
                x = torch.from_numpy(self.store.levels[0][low:high])[None, None].to(self.device)
                with torch.no_grad():
                    error += float(torch.sum((self._physics_of(slab).A(x) - y).double() ** 2))
            else:
                error += float(torch.sum(y.double() ** 2))
            power += float(torch.sum(y.double() ** 2))
            self.control.checkpoint()
            seconds = self.control.clock() - begin
            left = seconds / step * (count - step)
            yield Progress("projections", step, count, self.grid.full_box, None, seconds, left)
        self.figures["residual"] = (error / power) ** 0.5 if power > 0 else float("inf")

    def _describe(self, complete: bool) -> None:
        """Say in the store how it is made, and which slices are finished; of several processes the first one does."""
        if self.rank > 0:
            return
        made_by, _ = self.made_by()
        done = [[core.start, core.stop] for n, core in enumerate(self.cores) if self._finished(n)]
        self.store.describe(made_by | {"complete": complete}, **({} if complete else {"finished_slices": done}))

    def _wait(self, there: Any) -> None:
        """Wait for what another process is to write."""
        while not there():
            self.control.checkpoint()
            time.sleep(_WAIT)


def _claim(file: Path, size: int) -> None:
    """Make a file of so many bytes: a full disk is to be an error now, not a crash amid writing."""
    with file.open("wb") as out:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(out.fileno(), 0, size)
        else:
            out.truncate(size)


class _Work:
    """The folder in which a run in slabs keeps what it needs to go on; all that bears its name is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, job: dict[str, Any]) -> None:
        """Begin anew."""
        self.remove()
        self.folder.mkdir()
        self.keep("job", job)

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).exists()

    def note(self, name: str) -> dict[str, Any] | None:
        """What was kept as ``name``; None where nothing was."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
            return found
        return None

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Keep ``value`` as ``name``."""
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        partial.write_text(json.dumps(value))
        partial.replace(self.folder / f"{name}.json")

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Save an array under a file's name."""
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(self.folder / name)


def _quantile(samples: NDArray[np.float32]) -> float:
    """The brightness of which these are the samples."""
    import torch

    from napari_recon.reconstruction.start import brightness

    return brightness(torch.from_numpy(samples)[None, None])
