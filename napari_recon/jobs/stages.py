"""What the runs of all jobs share: the control that steers them, what is kept between them, and common stages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import Job, OperatorJob, ReconstructionJob, ScanJob
from napari_recon.jobs.memory import peak_memory, plan_memory, readable
from napari_recon.jobs.messages import Message, Notice, Progress, Stage, VolumeReady
from napari_recon.scans.errors import ScanError
from napari_recon.scans.slabs import Slab

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch
    from deepinv.physics import LinearPhysics

    from napari_recon.physics import NormalOperator
    from napari_recon.physics.fdk_filter import Window
    from napari_recon.reconstruction import Update
    from napari_recon.scans import Grid, KSpaceScan, Scan

Shape = tuple[int, ...]
Point = tuple[float, float, float]


class JobCancelled(Exception):
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
        The job's volumes by name, "fdk" (or "zero-filled") and "result" of a reconstruction, updated in place while it
        runs; of complex ones the magnitude, and the phase by the name with " phase". Where FDK is the method they are
        one array.
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
        self._changes: deque[dict[str, Any]] = deque()
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

    def change(self, settings: Mapping[str, Any]) -> None:
        """Go on with other parameters from the next step on, where the method can; names as in its parameters."""
        self._changes.append(dict(settings))

    def take_changes(self) -> dict[str, Any]:
        """What :meth:`change` was given since the last call, the later ones over the earlier."""
        taken: dict[str, Any] = {}
        while self._changes:
            taken |= self._changes.popleft()
        return taken

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
            raise JobCancelled

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


AnyJob = TypeVar("AnyJob", bound=ScanJob)


class Run(Generic[AnyJob]):
    """One run of a job: what its stages hand to each other, and the stages that several kinds of jobs have."""

    def __init__(self, job: AnyJob, control: Control, prepared: Prepared) -> None:
        self.job, self.control, self.prepared = job, control, prepared
        self.figures: dict[str, float] = {}
        self.used: dict[str, Any] = {}
        """What beside the job the result depends on, for its provenance."""
        self.complete = True
        self.complex_volumes: dict[str, torch.Tensor] = {}
        """Volumes (1, 2, D, H, W) of MRI, of which the control holds magnitude and phase."""
        self.slab: Slab | None = None
        """What is reconstructed, where only some slices are asked for."""
        self._extended: dict[str, NDArray[np.float32]] = {}
        """Volumes of a slab with what is about it, of which the control holds the slices that are asked for."""
        self._began = control.clock()

    def messages(self) -> Iterator[Message]:
        """All stages; see :func:`run_job`."""
        raise NotImplementedError

    def read(self) -> Iterator[Message]:
        """Open the scan, check that the job fits, and read.

        From here on there are ``scan``; ``grid``, on which is computed; ``shown_grid``, which is less where only some
        slices are asked for; ``physics`` and ``y``.
        """
        job, prepared = self.job, self.prepared
        yield Stage("reading", job.scan.name)
        self.check()
        from napari_recon.physics.devices import resolve_device

        device = resolve_device(job.device)
        key = digest_of(job, state_of(job.scan), str(device))
        if prepared.key != key:
            prepared.clear()
            prepared.key = key
        self.scan: Scan | KSpaceScan = prepared.get("scan", job.open_scan)
        self.grid: Grid = self.scan.default_grid(job.shape, job.voxel_size)
        self.shown_grid = self.grid
        if isinstance(job, ReconstructionJob) and self.scan.kind != "mri":
            self.slab = prepared.things.get("slab") or job.part_of(self.scan.geometry, self.grid)
        if self.slab is not None:
            self.grid, self.shown_grid = self.slab.grid(self.grid), self.slab.core_grid(self.grid)
        if "y" not in prepared.things or isinstance(job, OperatorJob):  # whose fit takes far more than reading did
            plan = plan_memory(job, self.scan)
            if not plan.fits:
                raise ScanError(plan.sentence)
        estimates = self.scan.kind == "mri" and self.scan.recording.read_coil_maps is None
        if estimates and "physics" not in prepared.things:
            yield Stage("estimating coil maps")
        self.physics: Any = prepared.get("physics", lambda: self._physics(device))
        self.y: torch.Tensor = prepared.get("y", lambda: self._measurements(device))

    def _measurements(self, device: torch.device) -> torch.Tensor:
        """What was measured, of a slab the rows that see it."""
        if self.slab is None:
            return self.scan.measurements(device)
        return self.projections().measurements(device, self.slab.rows)

    def _physics(self, device: torch.device) -> Any:
        """The X-ray transform of projections, or the MRI operator of k-space."""
        if self.scan.kind == "mri":
            from napari_recon.physics.mri import MultiCoilMRI

            return MultiCoilMRI.from_scan(self.scan, device)
        from napari_recon.physics import XRayTransform

        geometry = self.scan.geometry
        return XRayTransform(geometry if self.slab is None else geometry.with_rows(self.slab.rows), self.grid, device)

    def projections(self) -> Scan:
        """The scan, where it must hold X-ray projections."""
        if self.scan.kind == "mri":
            raise ScanError(f"{self.job.scan} holds k-space (MRI), and this is done with X-ray projections only.")
        return self.scan

    @property
    def baseline(self) -> str:
        """The volume that is always shown: what to beat."""
        return "zero-filled" if self.scan.kind == "mri" else "fdk"

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
                self.allocate(shown)[...] = self.start[0, 0].cpu().numpy()
                self._hand_over(shown)
                yield self.ready(shown)
            return
        import torch

        updates = FDK(window=window).stream(self.y, self.physics)
        if shown is not None:
            yield from self.follow(updates, shown, to_the_end)
            # On the CPU not a copy: what is shown of FDK stays as it is.
            self.start = torch.from_numpy(self.volume(shown))[None, None].to(self.y.device)
        else:
            self.start = torch.zeros((1, 1, *self.grid.shape), device=self.y.device)
            while (update := advance(updates)) is not None:
                self.start[(..., *update.box)] = update.values
                self.control.checkpoint()
        if self.complete:
            self.prepared.things[name] = self.start

    def first_volume(self, shown: str | None, to_the_end: bool = False) -> Iterator[Message]:
        """FDK of projections, the zero-filled volume of k-space: ``start``, and shown by a name where there is one."""
        if self.scan.kind == "mri":
            yield from self.zero_filled(shown)
        else:
            yield from self.fdk(shown=shown, to_the_end=to_the_end)

    def zero_filled(self, shown: str | None = "zero-filled") -> Iterator[Message]:
        """Aᵀy as ``start`` (1, 2, D, H, W), and as the volume ``shown``; kept from earlier jobs."""
        from napari_recon.reconstruction.sense import ZeroFilled

        yield Stage("zero-filled")
        self.start = self.prepared.get("zero-filled", lambda: ZeroFilled()(self.y, self.physics))
        if shown is not None:
            from napari_recon.reconstruction.streaming import Update, whole

            yield from self.follow(iter([Update(whole(self.start), self.start, 0, 0)]), shown, to_the_end=True)

    def follow(
        self,
        updates: Iterator[Update],
        name: str,
        to_the_end: bool = False,
        between: Callable[[int], Iterable[Message]] = lambda step: (),
    ) -> Iterator[Message]:
        """Copy a method's updates into volume ``name`` and tell of them.

        Parameters
        ----------
        updates
            Of the method.
        name
            The volume; made with the first update.
        to_the_end
            Whether Finish is not heard.
        between
            Called with the step just done before the next one is taken; its messages are passed on.
        """
        control = self.control
        begin = control.clock()
        batch = getattr(self.physics, "batch_bytes", 0)
        try:
            while (update := advance(updates)) is not None:
                if (smaller := getattr(self.physics, "batch_bytes", 0)) < batch:
                    batch = 0  # told once
                    yield Notice(
                        f"Memory ran out, so views are now taken {readable(smaller)} at a time and the job goes on."
                    )
                first = name not in control.volumes
                volume = self.volume(name) if not first else self.allocate(name)
                if update.values.shape[1] == 2:
                    self._take_complex(update, name)
                else:
                    volume[update.box] = update.values[0, 0].detach().cpu().numpy()
                    self._hand_over(name, update.box)
                whole = volume[update.box].shape == volume.shape
                # Of a start nothing is told but its steps; a patch's own figures are of its step, and only what holds
                # for the volume is kept for the end.
                figures = {} if name == "start" else dict(update.figures)
                self.figures |= {k: v for k, v in figures.items() if whole or k == "residual"}
                if first:
                    yield self.ready(name)
                    if f"{name} phase" in control.volumes:
                        yield self.ready(f"{name} phase")
                if update.step > 0:
                    seconds = control.clock() - begin
                    remaining = seconds / update.step * (update.total - update.step) if update.total else None
                    following = update.next_box
                    yield Progress(
                        name,
                        update.step,
                        update.total,
                        self._shown_box(update.box),
                        None if following is None else self._shown_box(following),
                        seconds,
                        remaining,
                        figures,
                    )
                control.checkpoint()
                if control.finishing and not to_the_end:
                    self.complete = self.complete and 0 < update.step == update.total
                    return
                yield from between(update.step)
        finally:
            close = getattr(updates, "close", None)
            if close is not None:
                close()

    def allocate(self, name: str) -> NDArray[np.float32]:
        """A new volume of zeros on ``grid``; what of it lies in ``shown_grid`` is the control's."""
        shown = self.control.allocate(name, self.shown_grid.shape)
        if self.shown_grid == self.grid:
            return shown
        self._extended[name] = np.zeros(self.grid.shape, np.float32)
        return self._extended[name]

    def volume(self, name: str) -> NDArray[np.float32]:
        """A volume on ``grid``."""
        found = self._extended.get(name)
        return self.control.volumes[name] if found is None else found

    def _hand_over(self, name: str, box: tuple[slice, ...] = (slice(None),) * 3) -> None:
        """Give the control what changed in a box of a volume on ``grid``."""
        if name not in self._extended:
            return
        assert self.slab is not None
        inside = self.slab.inside
        first, stop, _ = box[0].indices(self.grid.shape[0])
        first, stop = max(first, inside.start), min(stop, inside.stop)
        if first < stop:
            shown = slice(first - inside.start, stop - inside.start)
            self.control.volumes[name][(shown, *box[1:])] = self._extended[name][(slice(first, stop), *box[1:])]

    def _shown_box(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """A box of ``grid`` in voxels of ``shown_grid``: of one beside it, the slice that is nearest."""
        if self.slab is None:
            return _plain(box)
        inside = self.slab.inside
        height = inside.stop - inside.start
        first = min(max(int(box[0].start) - inside.start, 0), height - 1)
        stop = max(min(int(box[0].stop) - inside.start, height), first + 1)
        return (slice(first, stop), *_plain(box[1:]))

    def _take_complex(self, update: Update, name: str) -> None:
        """Keep a box of a complex volume, and its magnitude and phase in the control's."""
        import torch

        volumes, values = self.control.volumes, update.values.detach().cpu()
        if name not in self.complex_volumes:
            self.complex_volumes[name] = torch.zeros((1, 2, *self.grid.shape))
            self.control.allocate(f"{name} phase", self.grid.shape)
        box: Any = (..., *update.box)
        self.complex_volumes[name][box] = values
        volumes[name][update.box] = torch.hypot(values[0, 0], values[0, 1]).numpy()
        volumes[f"{name} phase"][update.box] = torch.atan2(values[0, 1], values[0, 0]).numpy()

    def volume_from(self, path: Path) -> torch.Tensor:
        """A volume's file as the physics takes it: (1, 1, D, H, W) on the job's grid, of k-space (1, 2, D, H, W).

        Raises
        ------
        ScanError
            If it cannot be read or has another shape, of k-space; or if it holds NaN or infinity.
        """
        import torch

        from napari_recon.jobs.volumes import read_complex_volume, read_volume
        from napari_recon.measures.comparison import on_grid

        if self.scan.kind == "mri":
            volume = read_complex_volume(path)
            if volume.shape != self.grid.shape:
                raise ScanError(
                    f"The volume {path} is of {volume.shape} voxels, and {self.job.scan} fixes {self.grid.shape}: give "
                    "one that was made of this k-space."
                )
            x = torch.from_numpy(np.stack([volume.real, volume.imag]))[None]
        else:
            x = torch.from_numpy(np.array(on_grid(read_volume(path), self.grid), np.float32))[None, None]
        if not bool(x.isfinite().all()):
            raise ScanError(f"The volume {path} holds NaN or infinity: choose another.")
        return x.to(self.y.device)

    def load_operator(self, file: str | Path, physics: LinearPhysics | None = None) -> NormalOperator:
        """The operator of a file, or a ScanError where it belongs to another scan; the last one is kept.

        Parameters
        ----------
        physics
            What it must have been fitted to; None for the job's.
        """
        from napari_recon.physics import NormalOperator

        physics = self.physics if physics is None else physics
        kept, state = self.prepared.things, (str(file), state_of(Path(file)), type(physics).__name__)
        if kept.get("operator file", (None,))[0] != state:
            kept.pop("operator file", None)  # freed before the next one is there
            kept["operator file"] = (state, NormalOperator.load(file, physics, self.y.device))
        operator: NormalOperator = kept["operator file"][1]
        return operator

    def ready(self, name: str) -> VolumeReady:
        """The message that a volume on the job's grid is there, or that the slices of it are that are asked for."""
        grid = self.shown_grid
        handle = self.control.handles.get(name, "")
        return VolumeReady(name, grid.shape, grid.scale, grid.translate, handle=handle)

    def ready_of_coils(self, name: str) -> VolumeReady:
        """The message that a volume for each coil, (coils, D, H, W), is there; a coil is a step of 1."""
        grid, shape = self.grid, self.control.volumes[name].shape
        handle = self.control.handles.get(name, "")
        scale, translate = (1.0, *grid.scale), (0.0, *grid.translate)
        return VolumeReady(name, shape, scale, translate, handle=handle, axis_labels=("coil", "z", "y", "x"))

    def made_by(self) -> tuple[dict[str, Any], float]:
        """How the job's volumes were made, as JSON, and the seconds that it took so far."""
        seconds = self.control.clock() - self._began
        figures = {**self.figures, "seconds": seconds, "peak_memory": float(peak_memory())}
        return provenance(self.job, figures, self.complete) | self.used, seconds


def provenance(job: Job, figures: dict[str, float], complete: bool) -> dict[str, Any]:
    """How a volume was made, as JSON: the job as it can be run again, what ran it, and its figures."""
    from napari_recon import __version__

    return {
        "program": f"napari-recon {__version__}",
        "job": job.model_dump(mode="json"),
        "figures": {name: (value if np.isfinite(value) else None) for name, value in figures.items()},
        "complete": complete,
    }


# -- fitted operators on disk --------------------------------------------------------------------------------------

_KEEP_BYTES = 4 * 10**9


def operator_file(physics: LinearPhysics, seed: int, options: dict[str, Any]) -> Path:
    """Where the operator fitted so to a physics is kept between sessions: named by all of that and the version."""
    import platformdirs

    from napari_recon import __version__
    from napari_recon.physics.normal import describe_physics

    said = json.dumps([__version__, seed, options, describe_physics(physics)], sort_keys=True)
    folder = platformdirs.user_cache_path("napari-recon") / "operators"
    return folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.safetensors"


def keep_operator(operator: NormalOperator, file: Path, physics: LinearPhysics) -> bool:
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


def state_of(path: Path) -> list[Any]:
    """What tells whether a file or folder is still the same: times and sizes of its files."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [[file.name, file.stat().st_mtime_ns, file.stat().st_size] for file in files]
    except OSError:
        return []


def digest_of(job: Job, *more: Any) -> str:
    """A name for the scan, grid, slices (all, of jobs that choose none) and device of a job."""
    said = {"slices": None} | job.model_dump(mode="json", include={"scan", "options", "shape", "voxel_size", "slices"})
    return hashlib.sha256(json.dumps([said, *more], sort_keys=True, default=str).encode()).hexdigest()
