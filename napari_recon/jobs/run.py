"""Running a job: from the scan to the written volume, as a stream of messages.

``run_job`` computes in the calling process, between one message and the next. The command line and notebooks call it
as it is; the docks reach it through :mod:`napari_recon.jobs.worker`, which runs it in a process of its own. Here are
what all jobs share and the reconstructions; :mod:`napari_recon.jobs.operator` has the jobs about the normal operator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import (
    FDKParameters,
    Job,
    OperatorJob,
    PatchJob,
    ReconstructionJob,
    SIRTParameters,
    TVParameters,
)
from napari_recon.jobs.memory import peak_memory, plan_memory, release_memory, reset_peak
from napari_recon.jobs.messages import (
    Cancelled,
    Failed,
    Finished,
    Message,
    Notice,
    Progress,
    Stage,
    VolumeReady,
)
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch

    from napari_recon.physics import NormalOperator, XRayTransform
    from napari_recon.physics.fdk_filter import Window
    from napari_recon.reconstruction import Update
    from napari_recon.scans import Grid, Scan

Shape = tuple[int, ...]
Point = tuple[float, float, float]


class _Cancel(Exception):
    """Raised where the job notices that it was cancelled."""


class Control:
    """Steers a running job from another thread, and holds its volumes.

    Every order is answered before the job's next step; none of the methods blocks.

    Parameters
    ----------
    allocate
        Makes the array, float32 and zero, of a volume of that name and shape; plain NumPy by default. The worker
        hands in one of shared memory.

    Attributes
    ----------
    volumes
        The job's volumes by name, "fdk" and "result" of a reconstruction, updated in place while it runs. Where FDK
        is the method they are one array.
    handles
        The shared memory's names, where there are any.
    """

    def __init__(self, allocate: Callable[[str, Shape], tuple[NDArray[np.float32], str]] | None = None) -> None:
        self.volumes: dict[str, NDArray[np.float32]] = {}
        self.handles: dict[str, str] = {}
        self._allocate = allocate
        self._running = threading.Event()
        self._running.set()
        self._finish = threading.Event()
        self._cancel = threading.Event()
        self._point: Point | None = None
        self._waited = 0.0

    def allocate(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """A new volume of zeros, kept under ``name``."""
        if self._allocate is None:
            self.volumes[name] = np.zeros(shape, np.float32)
        else:
            self.volumes[name], self.handles[name] = self._allocate(name, shape)
        return self.volumes[name]

    def pause(self) -> None:
        """Wait after the step that runs now."""
        self._running.clear()

    def resume(self) -> None:
        """Go on after a pause."""
        self._running.set()

    def finish(self) -> None:
        """Stop after the step that runs now and keep what there is."""
        self._finish.set()
        self._running.set()

    def cancel(self) -> None:
        """Stop after the step that runs now, free everything and write nothing."""
        self._cancel.set()
        self._running.set()

    def focus(self, point: Point | None) -> None:
        """Work nearest to ``point`` first: (z, y, x) in voxels of the volume, or None for the method's own order."""
        self._point = point

    @property
    def point(self) -> Point | None:
        """What :meth:`focus` was last given."""
        return self._point

    @property
    def paused(self) -> bool:
        """Whether the job waits, or will after its step."""
        return not self._running.is_set()

    @property
    def finishing(self) -> bool:
        """Whether the job is to keep what there is and end."""
        return self._finish.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether the job is to end and leave nothing."""
        return self._cancel.is_set()

    def checkpoint(self) -> None:
        """Between two steps: wait while paused, and leave where cancelled."""
        if not self._running.is_set():
            start = time.perf_counter()
            self._running.wait()
            self._waited += time.perf_counter() - start
        if self._cancel.is_set():
            raise _Cancel

    def clock(self) -> float:
        """Seconds of a clock that stands still during pauses."""
        return time.perf_counter() - self._waited


@dataclass
class Prepared:
    """What a job leaves for the next one on the same scan, grid and device, so that it starts at once.

    Only a process that runs several jobs keeps one; the first job of another scan, and a cancelled one, empty it.
    """

    key: str = ""
    things: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept as ``name``; made where it is not."""
        if name not in self.things:
            self.things[name] = make()
        return self.things[name]

    def clear(self) -> None:
        """Forget everything."""
        self.key, self.things = "", {}


def run_job(job: Job, control: Control | None = None, prepared: Prepared | None = None) -> Iterator[Message]:
    """Run a job and say what happens.

    The stream of a reconstruction is: ``Stage("reading")``, ``Stage("fdk")``, ``VolumeReady("fdk")``, the method's own
    stages, ``VolumeReady("result")`` holding the start, a ``Progress`` a step, ``Stage("writing")``. With FDK as the
    method, "fdk" is the result. Those of the other jobs are told in :mod:`napari_recon.jobs.operator`. Every stream
    ends with exactly one of ``Finished``, ``Cancelled`` and ``Failed``. Dropping the generator ends the job as a
    cancellation does.

    Parameters
    ----------
    job
        The job.
    control
        Steers it; its ``volumes`` hold the arrays.
    prepared
        What an earlier job on the same scan left (see :class:`Prepared`).
    """
    control = control or Control()
    prepared = prepared or Prepared()
    reset_peak()
    try:
        yield from _run_of(job, control, prepared).messages()
    except _Cancel:
        _forget(control, prepared)
        yield Cancelled()
    except GeneratorExit:
        raise
    except ScanError as error:
        yield Failed("input", str(error))
    except Exception as error:
        detail = traceback.format_exc()
        prepared.clear()
        if _is_out_of_memory(error):
            del error
            release_memory()
            yield Failed("memory", f"The job ran out of memory: {_smaller(job)}; the volume so far is kept.", detail)
        else:
            name, text = type(error).__name__, " ".join(str(error).split())
            yield Failed("bug", f"The job failed unexpectedly ({name}: {text[:200]}): please report it.", detail)


def _run_of(job: Job, control: Control, prepared: Prepared) -> Run[Any]:
    if isinstance(job, ReconstructionJob):
        return _Reconstruction(job, control, prepared)
    from napari_recon.jobs.operator import OperatorRun, PatchRun  # it needs torch, and this module

    if isinstance(job, OperatorJob):
        return OperatorRun(job, control, prepared)
    return PatchRun(job, control, prepared)


AnyJob = TypeVar("AnyJob", bound=Job)


class Run(Generic[AnyJob]):
    """One run of a job: what its stages hand to each other, and the stages that several kinds of jobs have."""

    def __init__(self, job: AnyJob, control: Control, prepared: Prepared) -> None:
        self.job, self.control, self.prepared = job, control, prepared
        self.figures: dict[str, float] = {}
        self.complete = True
        self._began = control.clock()

    def messages(self) -> Iterator[Message]:
        """All stages; see :func:`run_job`."""
        raise NotImplementedError

    def read(self) -> Iterator[Message]:
        """Open the scan, check that the job fits, and read: ``scan``, ``grid``, ``physics`` and ``y`` from here on."""
        job, prepared = self.job, self.prepared
        yield Stage("reading", job.scan.name)
        self.check()
        from napari_recon.physics import XRayTransform
        from napari_recon.physics.devices import resolve_device
        from napari_recon.scans import open_scan

        device = resolve_device(job.device)
        key = _digest(job, _state_of(job.scan), str(device))
        if prepared.key != key:
            prepared.clear()
            prepared.key = key
        self.scan: Scan = prepared.get("scan", lambda: open_scan(job.scan, job.options))
        self.grid: Grid = self.scan.default_grid(job.shape, job.voxel_size)
        if "y" not in prepared.things or isinstance(job, OperatorJob):  # whose fit takes far more than reading did
            plan = plan_memory(job, self.scan)
            if not plan.fits:
                raise ScanError(plan.sentence)
        self.physics: XRayTransform = prepared.get(
            "physics", lambda: XRayTransform.from_scan(self.scan, job.shape, job.voxel_size, device)
        )
        self.y: torch.Tensor = prepared.get("y", lambda: self.scan.measurements(device))

    def check(self) -> None:
        """Refuse what can be refused before anything is read, by a ScanError."""

    def fdk(self, window: Window = "ram-lak", shown: str | None = "fdk", to_the_end: bool = False) -> Iterator[Message]:
        """FDK as ``start`` (1, 1, D, H, W), and as the volume ``shown`` where that is named; kept from earlier jobs."""
        from napari_recon.reconstruction import FDK

        yield Stage("fdk")
        name = f"fdk {window}"
        if name in self.prepared.things:
            self.start: torch.Tensor = self.prepared.things[name]
            if shown is not None:
                self.control.allocate(shown, self.grid.shape)[...] = self.start[0, 0].cpu().numpy()
                yield self.ready(shown)
            return
        import torch

        updates = FDK(window=window).stream(self.y, self.physics)
        if shown is not None:
            yield from self.follow(updates, shown, to_the_end)
            self.start = torch.from_numpy(self.control.volumes[shown].copy())[None, None].to(self.y.device)
        else:
            self.start = torch.zeros((1, 1, *self.grid.shape), device=self.y.device)
            while (update := advance(updates)) is not None:
                self.start[(..., *update.box)] = update.values
                self.control.checkpoint()
        if self.complete:
            self.prepared.things[name] = self.start

    def follow(self, updates: Iterator[Update], name: str, to_the_end: bool = False) -> Iterator[Message]:
        """Copy a method's updates into volume ``name`` and tell of them; Finish ends it unless ``to_the_end``."""
        control = self.control
        begin = control.clock()
        try:
            while (update := advance(updates)) is not None:
                first = name not in control.volumes
                volume = control.volumes[name] if not first else control.allocate(name, self.grid.shape)
                volume[update.box] = update.values[0, 0].detach().cpu().numpy()
                whole = volume[update.box].shape == volume.shape
                # A patch's own figures are of its step; only what holds for the volume is kept for the end.
                self.figures |= {k: v for k, v in update.figures.items() if whole or k == "residual"}
                if first:
                    yield self.ready(name)
                if update.step > 0:
                    seconds = control.clock() - begin
                    remaining = seconds / update.step * (update.total - update.step) if update.total else None
                    following = update.next_box
                    yield Progress(
                        name,
                        update.step,
                        update.total,
                        _plain(update.box),
                        None if following is None else _plain(following),
                        seconds,
                        remaining,
                        dict(update.figures),
                    )
                control.checkpoint()
                if control.finishing and not to_the_end:
                    self.complete = self.complete and 0 < update.step == update.total
                    return
        finally:
            close = getattr(updates, "close", None)
            if close is not None:
                close()

    def load_operator(self, file: str | Path) -> NormalOperator:
        """The operator of a file, or a ScanError where it belongs to another scan; the last one is kept."""
        from napari_recon.physics import NormalOperator

        kept, state = self.prepared.things, (str(file), _state_of(Path(file)))
        if kept.get("operator file", (None,))[0] != state:
            kept.pop("operator file", None)  # freed before the next one is there
            kept["operator file"] = (state, NormalOperator.load(file, self.physics, self.y.device))
        operator: NormalOperator = kept["operator file"][1]
        return operator

    def ready(self, name: str) -> VolumeReady:
        """The message that a volume on the job's grid is there."""
        grid = self.grid
        scale, handle = (grid.voxel_size,) * 3, self.control.handles.get(name, "")
        return VolumeReady(name, grid.shape, scale, grid.translate, handle=handle)

    def made_by(self) -> tuple[dict[str, Any], float]:
        """How the job's volumes were made, as JSON, and the seconds that it took so far."""
        seconds = self.control.clock() - self._began
        figures = {**self.figures, "seconds": seconds, "peak_memory": float(peak_memory())}
        return provenance(self.job, figures, self.complete), seconds


class _Reconstruction(Run[ReconstructionJob]):
    """The run of a reconstruction."""

    def messages(self) -> Iterator[Message]:
        """All stages; see :func:`run_job`."""
        job, control = self.job, self.control
        parameters = job.parameters
        yield from self.read()
        control.checkpoint()
        # FDK is always computed and shown: it is what to beat, and where the methods start.
        yield from self.fdk(parameters.window if isinstance(parameters, FDKParameters) else "ram-lak")
        control.checkpoint()
        if isinstance(parameters, FDKParameters):
            control.volumes["result"] = control.volumes["fdk"]
        else:
            yield from self._reconstruct()
        yield from self._measure()
        made_by, seconds = self.made_by()
        output = None
        if job.output is not None:
            from napari_recon.jobs.volumes import write_volume

            yield Stage("writing", str(job.output))
            control.checkpoint()
            volume = control.volumes["result"]
            if write_volume(job.output, volume, self.grid, made_by, lambda: control.cancelled) is None:
                raise _Cancel
            output = str(job.output)
        yield Finished(self.figures, seconds, peak_memory(), output, self.complete, made_by)

    def check(self) -> None:
        """The output must be one that can be written."""
        if self.job.output is not None:
            from napari_recon.jobs.volumes import check_output

            check_output(self.job.output)

    def _reconstruct(self) -> Iterator[Message]:
        parameters = self.job.parameters
        if isinstance(parameters, TVParameters) and parameters.patch is not None:
            patch, begin = parameters.patch, self.start
            operator = yield from self._operator(parameters)
            yield Stage("reconstructing", parameters.method)
            if self.control.finishing:
                yield from self._finish_early()
                return
            try:
                yield from self.follow(self._partitioned(parameters, patch, operator, begin), "result")
            except Exception as error:
                if not _is_out_of_memory(error) or patch <= 16:
                    raise
                _drop_frames(error)
                patch = max(16, patch // 2)
            else:
                return
            import torch

            release_memory()
            yield Notice(f"Memory ran out, so the patch was halved to {patch} voxels and the job goes on.")
            if "result" in self.control.volumes:
                begin = torch.from_numpy(self.control.volumes["result"].copy())[None, None].to(self.y.device)
            yield from self.follow(self._partitioned(parameters, patch, operator, begin), "result")
            return
        yield Stage("reconstructing", parameters.method)
        if self.control.finishing:
            yield from self._finish_early()
            return
        if isinstance(parameters, SIRTParameters):
            from napari_recon.reconstruction import SIRT

            method: Any = SIRT(iterations=parameters.iterations, nonnegative=parameters.nonnegative)
        else:
            from napari_recon.reconstruction import TV

            assert isinstance(parameters, TVParameters)
            method = TV(iterations=parameters.iterations, regularization=parameters.regularization)
        yield from self.follow(method.stream(self.y, self.physics, init=self.start), "result")

    def _partitioned(
        self, parameters: TVParameters, patch: int, operator: NormalOperator | None, start: torch.Tensor
    ) -> Iterator[Update]:
        """Updates of TV by patches, with ``operator`` in place of AᵀA where there is one."""
        from napari_recon.physics import DiagCirculantWrapper
        from napari_recon.reconstruction import PartitionedReconstructor
        from napari_recon.reconstruction.tv import tv_patch_solver

        size, physics = (1, *self.grid.shape), self.physics
        iterations = math.ceil(parameters.iterations / parameters.passes)
        method = PartitionedReconstructor(
            base_reconstructor=tv_patch_solver(physics, self.start, iterations, parameters.regularization),
            img_size=size,
            patch_size=patch,
            passes=parameters.passes,
            batch=patches_at_once(patch, self.y.device),
        )
        wrapped = DiagCirculantWrapper(physics=physics, img_size=size, scaling=1.0, device=self.y.device)
        return method.stream(
            self.y,
            physics if operator is None else wrapped,
            operator=operator,
            init=start,
            focus=lambda: self.control.point,
        )

    def _operator(self, parameters: TVParameters) -> Generator[Message, None, NormalOperator | None]:
        """The normal operator that the job asks for: none, a file's, the last job's, the disk's, or a new fit."""
        from napari_recon.physics import NormalOperator

        if parameters.operator == "exact":
            return None
        device = self.y.device
        if parameters.operator != "fit":
            return self.load_operator(parameters.operator)
        kept = self.prepared.things
        name = f"operator {self.job.seed}"
        if name not in kept:
            file = operator_file(self.physics, self.job.seed, QUICK_FIT)
            operator = None
            with contextlib.suppress(ScanError, OSError):  # not there, damaged, or from another version
                operator = NormalOperator.load(file, self.physics, device)
                file.touch()  # used last, so forgotten last
            if operator is None:
                operator = yield from self._fit()
                if operator is None:
                    return None
                keep_operator(operator, file, self.physics)
            kept[name] = operator
        return kept[name]

    def _fit(self) -> Generator[Message, None, NormalOperator | None]:
        from napari_recon.physics.normal import stream_normal_operator_fit

        name = "fitting the normal operator"
        yield Stage(name)
        updates = stream_normal_operator_fit(self.physics, seed=self.job.seed, device=self.y.device, **QUICK_FIT)
        operator = None
        while (update := advance(updates)) is not None:
            operator = update.operator
            error = update.figures.get("held_out")
            told = "" if error is None else f", relative error {error:.2g}"
            yield Stage(name, f"{update.stage}, step {update.step} of {update.total}{told}")
            self.control.checkpoint()
            if self.control.finishing:
                return None
        return operator

    def _measure(self) -> Iterator[Message]:
        """The figures of the end: the residual, and the distance to the truth where the scan has one."""
        control = self.control
        control.checkpoint()
        yield Stage("measuring")
        volume = control.volumes["result"]
        if not np.isfinite(volume).all():
            yield Notice("The result holds NaN or infinity: choose fewer iterations or more regularisation.")
            return
        if "residual" not in self.figures or not self.complete:
            self.figures["residual"] = relative_residual(self.physics, volume, self.y, control.checkpoint)
        if self.scan.truth is not None:
            from napari_recon.jobs.quality import compare_volumes, field_of_view, on_grid
            from napari_recon.jobs.volumes import read_volume

            control.checkpoint()
            try:
                truth = on_grid(read_volume(self.scan.truth), self.grid)
                inside = field_of_view(self.grid, self.scan.geometry.field_of_view_radius)
                self.figures |= compare_volumes(volume, truth, inside)
            except ScanError as error:  # the job is done; only its figure is not to be had
                yield Notice(str(error))

    def _finish_early(self) -> Iterator[Message]:
        """Finish was pressed before the method began: what there is, is FDK."""
        self.complete = False
        self.control.allocate("result", self.grid.shape)[...] = self.control.volumes["fdk"]
        yield self.ready("result")


def relative_residual(
    physics: XRayTransform, volume: NDArray[np.float32], y: torch.Tensor, between: Callable[[], None] = lambda: None
) -> float:
    """||A x - y|| / ||y||, a few views at a time: a second set of projections may not fit.

    Parameters
    ----------
    volume
        (D, H, W), 1/mm.
    y
        (1, 1, rows, views, columns).
    between
        Called between two groups of views.
    """
    import torch

    x = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(y.device)
    views = y.shape[3]
    group = max(1, views // 8)
    error = power = 0.0
    for first in range(0, views, group):
        between()
        chosen = np.arange(first, min(first + group, views))
        with torch.no_grad():
            measured = y[:, :, :, first : first + group]
            error += float(torch.sum((physics.subset(chosen).A(x) - measured).double() ** 2))
            power += float(torch.sum(measured.double() ** 2))
    return (error / power) ** 0.5 if power > 0 else float("inf")


def provenance(job: Job, figures: dict[str, float], complete: bool) -> dict[str, Any]:
    """How a volume was made, as JSON: the job as it can be run again, what ran it, and its figures."""
    from napari_recon import __version__

    return {
        "program": f"napari-recon {__version__}",
        "job": job.model_dump(mode="json"),
        "figures": {name: (value if np.isfinite(value) else None) for name, value in figures.items()},
        "complete": complete,
    }


def patches_at_once(patch: int, device: torch.device) -> int:
    """How many patches of an edge the solver gets at once: one on the CPU, more on a GPU that they would leave idle.

    A voxel of a patch costs about 400 bytes with H and total variation: padded spectra, iterates, duals.
    """
    if device.type != "cuda":
        return 1
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(16, int(0.25 * free / (400 * patch**3))))


# -- fitted operators on disk --------------------------------------------------------------------------------------

QUICK_FIT: dict[str, Any] = {"probes": 4, "iterations": 2, "positions": 3}
"""How a job fits: a person waits. About half the time of the full fit, which ``fit-operator`` makes, for nearly its
errors (docs/benchmarks.md)."""

_KEEP_BYTES = 4 * 10**9


def operator_file(physics: XRayTransform, seed: int, options: dict[str, Any]) -> Path:
    """Where the operator fitted so to a physics is kept between sessions: named by all of that and the version."""
    import platformdirs

    from napari_recon import __version__
    from napari_recon.physics.normal import describe_physics

    said = json.dumps([__version__, seed, options, describe_physics(physics)], sort_keys=True)
    folder = platformdirs.user_cache_path("napari-recon") / "operators"
    return folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.safetensors"


def keep_operator(operator: NormalOperator, file: Path, physics: XRayTransform) -> bool:
    """Keep an operator for the next session; the ones used longest ago make room. Whether it could be written."""
    with contextlib.suppress(OSError, ScanError):  # a full disk costs the next job a fit, nothing more
        file.parent.mkdir(parents=True, exist_ok=True)
        operator.save(file, physics)
        others = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = file.stat().st_size
        for path in others:
            total += 0 if path == file else path.stat().st_size
            if total > _KEEP_BYTES and path != file:
                path.unlink()
        return True
    return False


# -- small things --------------------------------------------------------------------------------------------------


def advance(updates: Iterator[Any]) -> Any:
    """The next update, or None. Gradients are off here and not around the yield: the consumer's are its own affair."""
    import torch

    with torch.no_grad():
        return next(updates, None)


def _plain(box: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(int(s.start), int(s.stop)) for s in box)


def _forget(control: Control, prepared: Prepared) -> None:
    control.volumes.clear()
    prepared.clear()
    release_memory()


def _drop_frames(error: BaseException) -> None:
    """The frames of a traceback keep alive the very arrays that there was no room for."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__  # type: ignore[assignment]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def _smaller(job: Job) -> str:
    """What to change where memory ran out, as a part of a sentence."""
    if isinstance(job, OperatorJob) and job.operator == "fit":
        return "choose fewer probes, one kernel, a larger voxel size or more binning"
    if isinstance(job, PatchJob) or (isinstance(job.parameters, TVParameters) and job.parameters.patch):
        return "choose a smaller patch, a larger voxel size or more binning"
    return "choose a larger voxel size or more binning" + ("" if job.device == "cpu" else ", or the device 'cpu'")


def _state_of(path: Path) -> list[Any]:
    """What tells whether a file or folder is still the same: times and sizes of its files."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [[file.name, file.stat().st_mtime_ns, file.stat().st_size] for file in files]
    except OSError:
        return []


def _digest(job: Job, *more: Any) -> str:
    """A name for the scan, grid and device of a job."""
    said = job.model_dump(mode="json", include={"scan", "options", "shape", "voxel_size"})
    return hashlib.sha256(json.dumps([said, *more], sort_keys=True, default=str).encode()).hexdigest()
