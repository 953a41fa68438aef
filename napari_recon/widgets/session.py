"""One viewer's work: the scan that is open, the process that computes, and the layers that show what it does.

The docks show a session and command it; they hold no state that matters, so they can be closed and opened again while
a job runs. The session ends with its viewer, and the process with the session.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from napari.layers import Image
from napari.qt.threading import create_worker
from napari.utils.notifications import show_error, show_info, show_warning
from pydantic import ValidationError
from qtpy.QtCore import QEvent, QObject, QTimer, Signal

from napari_recon.jobs.job import (
    CoilMapsJob,
    DataConsistencyJob,
    Job,
    OperatorJob,
    PADMMParameters,
    PatchJob,
    ReconstructionJob,
    RegularizationJob,
    ResolutionJob,
    SweepJob,
    TrainJob,
)
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
from napari_recon.jobs.volumes import partial_path
from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import KSpaceOptions, KSpaceScan
from napari_recon.scans.scan import Scan, ScanOptions, open_scan
from napari_recon.widgets import layers as shown
from napari_recon.widgets import session_file
from napari_recon.widgets.displays import (
    CoilMapsDisplay,
    DataConsistencyDisplay,
    Display,
    NothingShown,
    ReconstructionDisplay,
    export_layer,
    phase_of,
    run_name,
    told_by,
    write_complex,
)
from napari_recon.widgets.operator_displays import OperatorDisplay, PatchDisplay, write_layer
from napari_recon.widgets.parts_display import PartsDisplay
from napari_recon.widgets.training_display import TrainingDisplay

AnyScan = Scan | KSpaceScan

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_recon.jobs.memory import MemoryPlan
    from napari_recon.widgets.compare_display import Comparison

POLL = 30
"""Milliseconds between two looks at what the process has to say."""
FOCUS_EVERY = 0.25
"""Seconds between two looks at where the person looks."""
CHANGED = ", changed"
"""Ends the name of a run whose parameters were changed amid it."""
RUNS = 5
"""Earlier reconstructions whose curves are kept."""
LATE = 0.02
"""Seconds by which a look comes late when the event loop was busy drawing."""
DISPLAYS: dict[type[Job], type[Display]] = {
    ReconstructionJob: ReconstructionDisplay,
    DataConsistencyJob: DataConsistencyDisplay,
    RegularizationJob: NothingShown,
    ResolutionJob: PartsDisplay,
    SweepJob: PartsDisplay,
    CoilMapsJob: CoilMapsDisplay,
    OperatorJob: OperatorDisplay,
    PatchJob: PatchDisplay,
    TrainJob: TrainingDisplay,
}
"""What shows the volumes of which job."""

_sessions: dict[int, Session] = {}


class WorkerLike(Protocol):
    """What a session needs of :class:`napari_recon.jobs.worker.Worker`."""

    def start(self) -> None: ...
    def submit(self, job: Job) -> None: ...
    def poll(self) -> list[Message]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def finish(self) -> None: ...
    def cancel(self) -> None: ...
    def focus(self, point: tuple[float, float, float] | None) -> None: ...
    def change(self, settings: dict[str, Any]) -> None: ...
    def close(self) -> None: ...
    def volume(self, name: str) -> NDArray[np.float32]: ...


def with_volume(job: Job, path: Path) -> Job:
    """The job with a file for the volume it asks for: an operator's x, what is projected, a start, a reference."""
    if isinstance(job, ReconstructionJob):
        parameters = job.parameters.model_copy(update={"start": str(path)})
        return job.model_copy(update={"parameters": parameters})
    if isinstance(job, SweepJob):
        return job.model_copy(update={"reference": path})
    return job.model_copy(update={"volume": path})


def make_worker() -> WorkerLike:
    """The process that computes (tests put another in its place)."""
    from napari_recon.jobs.worker import Worker

    return Worker()


class Session(QObject):
    """What one viewer's docks share. Make it with :meth:`of`.

    Attributes
    ----------
    viewer
        The napari viewer.
    scan
        The open scan, or None.
    checks
        What looks wrong with the scan; None until it has been looked at.
    state
        "idle", "running", "paused", "finishing" or "cancelling".
    job
        The job that runs or ran last.
    stage
        What it is doing, in words.
    progress
        Its last Progress.
    curve
        The figures of the reconstruction that runs or ran last over its steps: name -> list of (step, value).
    curve_label
        What that reconstruction is called beside others.
    runs
        The same of earlier reconstructions of the scan: (label, curve), the last one at the end.
    tuned
        The parameters of the PADMM that runs or ran last, as they are now.
    operator
        The normal operator that was fitted or loaded last, or is now, with its layers.
    patch
        The what-if on a patch that ran last, or runs now, with its layers.
    sweep
        The sweep that ran last, or runs now, with its layers and what is told of its values.
    place_moved
        Whether the person chose another place since the last what-if.
    operator_file
        The operator that reconstructions are to use, or None: see :meth:`use_operator`.
    training
        The training that ran last, or runs now, with its curves.
    weights_file
        The weights that reconstructions are to use, or None: see :meth:`use_weights`.
    comparison
        The volumes that stand beside each other to be compared, or did last.
    """

    scan_changed = Signal()
    busy_changed = Signal(str)
    checks_changed = Signal()
    state_changed = Signal(str)
    stage_changed = Signal(str)
    progressed = Signal()
    finished = Signal(object)
    job_offered = Signal(object)
    operator_changed = Signal()
    operator_file_changed = Signal()
    weights_file_changed = Signal()
    place_changed = Signal()
    step_shown = Signal(int)

    @classmethod
    def of(cls, viewer: Viewer) -> Session:
        """The session of a viewer; docks get proxies of viewers, which are taken off."""
        viewer = getattr(viewer, "__wrapped__", viewer)
        if id(viewer) not in _sessions:
            _sessions[id(viewer)] = cls(viewer)
        return _sessions[id(viewer)]

    def __init__(self, viewer: Viewer) -> None:
        super().__init__()
        self.viewer = viewer
        self._key = id(viewer)
        self.scan: AnyScan | None = None
        self.checks: list[str] | None = None
        self.state = "idle"
        self.stage = ""
        self.job: Job | None = None
        self.progress: Progress | None = None
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self.curve_label = ""
        self.runs: list[tuple[str, dict[str, list[tuple[int, float]]]]] = []
        self.tuned: PADMMParameters | None = None
        self.view = "cut"
        self.worker = make_worker()
        self._tasks: dict[str, int] = {}
        self._told: set[str] = set()
        self.display: Display | None = None
        self.operator: OperatorDisplay | None = None
        self.patch: PatchDisplay | None = None
        self.sweep: PartsDisplay | None = None
        self._last_sweep: PartsDisplay | None = None
        self.operator_file: str | None = None
        self.training: TrainingDisplay | None = None
        self.weights_file: str | None = None
        self.comparison: Comparison | None = None
        self._former: Display | None = None
        self._handed_over: Path | None = None
        self._place: tuple[float, float, float] | None = None
        self.place_moved = False
        self._focus: tuple[float, float, float] | None = None
        self._focus_asked = 0.0
        self._steered = True
        self._polled = 0.0
        self._warm = False
        self._closed = False
        self._timer = QTimer(self)
        self._timer.setInterval(POLL)
        self._timer.timeout.connect(self._poll)
        viewer.layers.events.inserted.connect(self._on_layer_inserted)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        viewer.dims.events.point.connect(self._on_point)
        viewer.mouse_drag_callbacks.append(self._on_press)
        self._window, self._canvas = viewer.window._qt_window, viewer.window._qt_viewer
        self._window.installEventFilter(self)
        self._canvas.installEventFilter(self)
        self._in_thread("worker", self.worker.start, lambda _: None)
        self._in_thread("warm-up", shown.warm_up, self._warmed_up, self._warmed_up)
        for layer in reversed(viewer.layers):
            if self._adopt(layer):
                break

    # -- ending ----------------------------------------------------------------------------------------------------

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """End with the window.

        ``viewer.close()`` closes the canvas first, and nothing stops it any more. A person closes the window, which may
        still ask and stay: look again when that is decided.
        """
        if event is not None and not self._closed:
            if event.type() == QEvent.Type.Close and watched is self._window:
                QTimer.singleShot(0, self._close_with_window)
            elif event.type() in (QEvent.Type.Close, QEvent.Type.DeferredDelete):
                self.close()
        return False

    def _close_with_window(self) -> None:
        if self._closed:
            return
        try:
            gone = not self._window.isVisible()
        except RuntimeError:  # deleted
            gone = True
        if gone:
            self.close()

    def close(self) -> None:
        """End the process and let go of the viewer. May be called again."""
        if self._closed:
            return
        self._closed = True
        _sessions.pop(self._key, None)
        self._timer.stop()
        self._tasks.clear()
        for watched in (self._window, self._canvas):
            with contextlib.suppress(RuntimeError):  # deleted
                watched.removeEventFilter(self)
        for display in (self.display, self.operator, self.patch, self.sweep, self.training, self.comparison):
            if display is not None:
                display.close()
        self.viewer.layers.events.inserted.disconnect(self._on_layer_inserted)
        self.viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self.viewer.dims.events.point.disconnect(self._on_point)
        self.viewer.mouse_drag_callbacks.remove(self._on_press)
        self.worker.close()
        self._forget_handed_over()
        self.display = self.operator = self.patch = self.training = self._former = None
        self.sweep = self._last_sweep = None
        del self.viewer, self._window, self._canvas

    # -- work off the event loop -----------------------------------------------------------------------------------

    def _in_thread(
        self,
        name: str,
        work: Callable[[], Any],
        done: Callable[[Any], None],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Do short work in a thread and take its result in the event loop; a newer task of the name supersedes it."""
        number = self._tasks.get(name, 0) + 1
        self._tasks[name] = number

        def attempt() -> tuple[Any, Exception | None]:
            try:
                return work(), None
            except Exception as error:
                return None, error

        def finish(outcome: tuple[Any, Exception | None]) -> None:
            if self._closed or self._tasks.get(name) != number:
                return
            result, error = outcome
            if error is None:
                done(result)
            elif failed is not None:
                failed(error)
            else:
                self._report(error)

        create_worker(attempt, _connect={"returned": finish})

    def _report(self, error: Exception) -> None:
        """Tell the person: a sentence for what they can mend, the traceback for what they cannot."""
        if isinstance(error, ScanError):
            show_error(str(error))
        elif isinstance(error, ValidationError):
            first = error.errors()[0]
            show_error(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; change it and try again.")
        else:
            raise error

    # -- the scan --------------------------------------------------------------------------------------------------

    def open(self, path: str | Path, options: ScanOptions | KSpaceOptions | None = None) -> None:
        """Open a scan, or a saved session; ``scan_changed`` tells when it is there, a notification if it cannot be."""
        path = Path(path).expanduser()
        if session_file.is_session(path):
            self.open_session(path)
            return
        self.busy_changed.emit(f"Opening {path.name} …")

        def opened(result: tuple[AnyScan, dict[str, str]]) -> None:
            self.busy_changed.emit("")
            self._set_scan(*result)

        def failed(error: Exception) -> None:
            self.busy_changed.emit("")
            self._report(error)

        def work() -> tuple[AnyScan, dict[str, str]]:
            scan = open_scan(path) if options is None else open_scan(path, options)
            return scan, scan.summary()

        self._in_thread("scan", work, opened, failed)

    def set_options(self, options: ScanOptions | KSpaceOptions) -> None:
        """Read the open scan differently."""
        scan = self.scan
        if scan is None or options == scan.options:
            return

        def work() -> tuple[AnyScan, dict[str, str]]:
            changed = scan.with_options(**options.model_dump())
            return changed, changed.summary()

        def failed(error: Exception) -> None:
            self._report(error)
            self.scan_changed.emit()  # the forms show again what holds

        self._in_thread("scan", work, lambda result: self._set_scan(*result), failed)

    def _set_scan(self, scan: AnyScan, summary: dict[str, str]) -> None:
        self.scan, self.summary, self.checks = scan, summary, None
        self._told = set()
        self._forget_operator_file()
        self.runs, self.curve = [], {}
        self.scan_changed.emit()
        self.checks_changed.emit()
        self._in_thread("checks", scan.checks, self._checked, lambda error: self._checked([str(error)]))
        if self._scan_layers("projections"):
            self.add_projections()
        if self._scan_layers("geometry"):
            self.add_geometry()

    def _checked(self, sentences: list[str]) -> None:
        self.checks = list(sentences)
        self._told |= set(sentences)
        self.checks_changed.emit()

    def add_projections(self) -> None:
        """Show what was measured: projections, whose views are read as they are looked at, or k-space."""
        scan = self.scan
        if scan is None:
            return
        if scan.kind == "mri":
            self._add_kspace(scan)
            return

        def done(result: tuple[Any, dict[str, Any]]) -> None:
            array, arguments = result
            arguments["metadata"][shown.KEY]["shows"] = "projections"
            self._replace("projections", [Image(array, **arguments)])

        self._in_thread("projections", lambda: shown.projections(scan), done)

    def _add_kspace(self, scan: KSpaceScan) -> None:
        def done(found: list[dict[str, Any]]) -> None:
            for each in found:
                each["metadata"][shown.KEY]["shows"] = "projections"
            self._replace("projections", [Image(each.pop("data"), **each) for each in found])

        self._in_thread("projections", lambda: shown.kspace(scan), done)

    def add_coil_maps(self) -> None:
        """Let the process show the coil maps of k-space, which it may have to estimate."""
        scan = self.scan
        if scan is not None and scan.kind == "mri":
            self.run(CoilMapsJob(scan=scan.path, options=scan.options))

    def add_geometry(self) -> None:
        """Show where source and detector were, and the volume's box, in 3D."""
        if self.scan is None or self.scan.kind == "mri":
            return
        layers = shown.geometry_layers(self.scan.geometry, self.scan.default_grid(), self.scan.name)
        self._replace("geometry", layers)

    def _scan_layers(self, what: str) -> list[Layer]:
        return [x for x in self.viewer.layers if told_by(x).get("shows") == what]

    def _replace(self, what: str, layers: list[Any]) -> None:
        """Put layers in the place of those that showed the same of the scan before."""
        new = True
        for old in self._scan_layers(what):
            new = False
            self.viewer.layers.remove(old)
        if new and self.state == "idle":
            self.viewer.canvas.grid.enabled = False
            for other in self.viewer.layers:
                other.visible = what == "geometry" and told_by(other).get("shows") == "volume"
        for layer in layers:
            self.viewer.add_layer(layer)
        if new and self.state == "idle":
            self.viewer.dims.ndisplay = 3 if what == "geometry" else 2
            if self.display is not None:
                self.display.frame = ()
            if what == "geometry":
                shown.look_at(self.viewer, layers)
            else:
                self.viewer.fit_to_view(layers=layers)
                if self.scan is not None and self.scan.kind == "mri":
                    shown.go_to_centre(self.viewer, layers[-1])

    def _on_layer_inserted(self, event: Any) -> None:
        self._adopt(event.value)

    def _adopt(self, layer: Layer) -> bool:
        """Make the scan of a projections layer (a sample, a file that was dropped on the viewer) the session's."""
        told = told_by(layer)
        if "scan" not in told or told.get("shows", "projections") != "projections":
            return False
        if "shows" not in told:
            layer.metadata[shown.KEY]["shows"] = "projections"
            asked = told.get("options", {})
            options = KSpaceOptions(**asked) if "coils" in asked else ScanOptions(**asked)
            if self.scan is None or str(self.scan.path) != told["scan"] or self.scan.options != options:
                path = Path(told["scan"])

                def work() -> tuple[AnyScan, dict[str, str]]:
                    scan: AnyScan = open_scan(path, options)
                    return scan, scan.summary()

                self._in_thread("scan", work, lambda result: self._take_over(*result))
        return True

    def _take_over(self, scan: AnyScan, summary: dict[str, str]) -> None:
        """As :meth:`_set_scan`, where the projections are shown already."""
        self.scan, self.summary, self.checks = scan, summary, None
        self._told = set()
        self._forget_operator_file()
        self.runs, self.curve = [], {}
        self.scan_changed.emit()
        self.checks_changed.emit()
        self._in_thread("checks", scan.checks, self._checked, lambda error: self._checked([str(error)]))

    # -- the job ---------------------------------------------------------------------------------------------------

    def plan(self, job: Job, done: Callable[[MemoryPlan], None], failed: Callable[[Exception], None]) -> None:
        """Plan a job's memory in a thread."""
        from napari_recon.jobs.memory import plan_memory

        scan = self.scan
        if scan is not None and (isinstance(job, TrainJob) or scan.options != job.options):
            scan = None
        self._in_thread("plan " + type(job).__name__, lambda: plan_memory(job, scan), done, failed)

    def run(self, job: Job, x: Image | None = None, steered: bool = True, quietly: bool = False) -> None:
        """Run a job; its volumes become layers as they come.

        Parameters
        ----------
        job
            The job.
        x
            A layer that the job is to take as its volume (an :class:`OperatorJob` judges the operator on it, a
            :class:`DataConsistencyJob` projects it, a PADMM starts from it, a :class:`SweepJob` compares with it): it
            is handed over as a file, with its phase where k-space is made of it.
        steered
            Whether patches are computed where the person looks. What overlaps is then added in another order, and
            rounding differs.
        quietly
            Whether only its figures are wanted: what the viewer shows, a comparison too, stays as it is.
        """
        if self.state != "idle":
            show_warning("A job runs already: press Finish or Cancel first.")
            return
        self._steered = steered
        if self.comparison is not None and not quietly:  # the job arranges its volumes in what was there before
            self.comparison.leave()
        kind, before = NothingShown if quietly else DISPLAYS[type(job)], self.display
        same = isinstance(before, kind | NothingShown) or kind is NothingShown  # as the camera is concerned
        self.display = kind(self.viewer, job, self.view, before.frame if before is not None and same else ())
        self.job, self.progress = job, None
        if isinstance(job, ReconstructionJob):
            if any(len(points) > 1 for points in self.curve.values()):
                self.runs = [*self.runs[1 - RUNS :], (self.curve_label, self.curve)]
            self.curve, self.curve_label = {}, run_name(job)
            self.tuned = job.parameters if isinstance(job.parameters, PADMMParameters) else None
        self._focus, self._focus_asked = None, 0.0
        if isinstance(self.display, OperatorDisplay):
            self._former, self.operator = self.operator, self.display
            self.display.x = None if x is None else x.name
        elif isinstance(self.display, DataConsistencyDisplay):
            self.display.of = "" if x is None else x.name
        elif isinstance(self.display, CoilMapsDisplay):
            assert isinstance(self.scan, KSpaceScan)
            estimated = self.scan.recording.read_coil_maps is None
            self.display.of = f"{self.scan.name}: coil maps{', estimated' if estimated else ''}"
        elif isinstance(self.display, PatchDisplay):
            self._former, self.patch = self.patch, self.display
            self.place_moved = False
        elif isinstance(self.display, PartsDisplay) and isinstance(job, SweepJob):
            self._last_sweep, self.sweep = self.sweep, self.display
        elif isinstance(self.display, TrainingDisplay):
            self._former, self.training = self.training, self.display
        self._set_state("running")
        self._set_stage("starting")
        if x is None:
            self._submit(job)
            return

        def written(path: Path) -> None:
            if self.state == "cancelling":
                self._end(Cancelled())
            else:
                self._submit(with_volume(job, path))

        takes_phase = isinstance(job, DataConsistencyJob | ReconstructionJob)
        self._hand_over(x, written, lambda text: self._end(Failed("input", text)), takes_phase)

    def _hand_over(
        self,
        x: Image,
        done: Callable[[Path], None],
        failed: Callable[[str], None],
        takes_phase: bool = True,
    ) -> None:
        """Write a layer where the process can read it, in a thread; the files go when the job ends.

        Of k-space with its phase, where the job ``takes_phase``.
        """
        phase = phase_of(x, self.viewer.layers) if takes_phase and isinstance(self.scan, KSpaceScan) else None
        if self._handed_over is None:
            self._handed_over = Path(tempfile.mkdtemp(prefix="napari-recon-"))
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in x.name)  # provenance will name the file
        path = self._handed_over / f"{name or 'layer'}.{'tif' if phase is None else 'npy'}"
        self._set_stage(f"handing {x.name} over")

        def sorry(error: Exception) -> None:
            failed(str(error) if isinstance(error, ScanError) else f"The layer could not be handed over: {error}.")

        def write() -> None:
            if phase is None:
                write_layer(x, path)
            else:
                write_complex(x, phase, path)

        self._in_thread("hand over", write, lambda _: done(path), sorry)

    def tune(self, parameters: PADMMParameters, start: Image | None = None) -> None:
        """Let the PADMM that runs go on with other parameters, from its next iteration on.

        Parameters
        ----------
        parameters
            As they should be; what cannot be changed while it runs stays.
        start
            The layer that their start stands for, where it does.
        """
        before = self.tuned
        if before is None or self.state not in ("running", "paused"):
            return
        changes = {
            n: getattr(parameters, n) for n in parameters.TUNABLE if getattr(parameters, n) != getattr(before, n)
        }
        if not changes:
            return
        self.tuned = before.model_copy(update=changes)
        self.curve_label = self.curve_label.removesuffix(CHANGED) + CHANGED
        if "start" not in changes or start is None:
            self.worker.change(changes)
            return

        def written(path: Path) -> None:
            self.worker.change(changes | {"start": str(path)})

        self._hand_over(start, written, show_warning)

    def _forget_handed_over(self) -> None:
        if self._handed_over is not None:
            shutil.rmtree(self._handed_over, ignore_errors=True)
            self._handed_over = None

    def _submit(self, job: Job) -> None:
        self.worker.submit(job)
        if self.state == "finishing":  # pressed while the layer was handed over
            self.worker.finish()
        self._polled = time.perf_counter()
        self._timer.start()

    def forget_runs(self) -> None:
        """Forget the curves of earlier reconstructions."""
        self.runs = []

    def pause(self) -> None:
        """Wait after the current patch."""
        if self.state == "running":
            self.worker.pause()
            self._set_state("paused")

    def resume(self) -> None:
        """Go on."""
        if self.state == "paused":
            self.worker.resume()
            self._set_state("running")

    def finish(self) -> None:
        """Stop after the current patch and keep what there is."""
        if self.state in ("running", "paused"):
            self.worker.finish()
            self._set_state("finishing")

    def cancel(self) -> None:
        """Stop, and throw away what there is."""
        if self.state in ("running", "paused", "finishing"):
            self.worker.cancel()
            self._set_state("cancelling")

    def _set_state(self, state: str) -> None:
        self.state = state
        self.state_changed.emit(state)

    def _set_stage(self, stage: str) -> None:
        self.stage = stage
        self.stage_changed.emit(stage)

    def _warmed_up(self, _: object) -> None:
        self._warm = True

    def _poll(self) -> None:
        """Take what the process has to say, then bring the changed boxes onto the screen."""
        if not self._warm:  # a layer made while another thread still reads pint's units would not find them
            return
        now = time.perf_counter()
        late, self._polled = now - self._polled - POLL / 1000, now
        display = self.display
        assert display is not None
        if late > LATE:
            display.rest(late)
        latest: Progress | None = None
        for message in self.worker.poll():
            match message:
                case Progress():
                    display.progressed(message)
                    if message.name == "iterates":
                        continue
                    latest = message
                    if isinstance(self.job, ReconstructionJob):
                        for name, value in message.figures.items():
                            self.curve.setdefault(name, []).append((message.step, value))
                case VolumeReady():
                    self._add_volume(display, message)
                case Stage():
                    self._set_stage(message.name + (f": {message.detail}" if message.detail else ""))
                case Notice():
                    if message.text not in self._told:  # the scan's checks say the same
                        self._told.add(message.text)
                        show_warning(message.text)
                case Finished() | Cancelled() | Failed():
                    self._end(message)
        if latest is not None and self.state != "idle":
            self.progress = latest
            self.progressed.emit()
        if self.state != "idle":
            display.draw(self.progress)
            self._look_where_the_person_looks()

    def _look_where_the_person_looks(self) -> None:
        now = time.perf_counter()
        watched = self.display.watched if self.display is not None else None
        if watched is None or not self._steered or now - self._focus_asked < FOCUS_EVERY:
            return
        self._focus_asked = now
        focus = shown.where_the_person_looks(self.viewer, watched)
        if focus is not None and (
            self._focus is None or max(abs(a - b) for a, b in zip(focus, self._focus, strict=True)) >= 1
        ):
            self._focus = focus
            self.worker.focus(focus)

    def _add_volume(self, display: Display, message: VolumeReady) -> None:
        if isinstance(display, PatchDisplay) and isinstance(self._former, PatchDisplay):
            self._former.remove()  # two what-ifs beside each other would share the steps' axis
            self._former = None
        display.show(message, self.worker.volume(message.name))
        if display is self.operator:
            self.operator_changed.emit()

    def _end(self, message: Finished | Cancelled | Failed) -> None:
        self._timer.stop()
        self._forget_handed_over()
        display, former = self.display, self._former
        assert display is not None
        self._former = None
        if isinstance(message, Cancelled) or (isinstance(message, Failed) and display.empty):
            display.undo()
            if display is self.operator:
                self.operator = former if isinstance(former, OperatorDisplay) else None
            elif display is self.patch:
                self.patch = former if isinstance(former, PatchDisplay) else None
            elif display is self.sweep:
                self.sweep = self._last_sweep
            elif display is self.training:
                self.training = former if isinstance(former, TrainingDisplay) else None
        else:
            display.end(message)
            if former is not None:
                former.remove()
        if isinstance(message, Cancelled):
            if isinstance(self.job, ReconstructionJob):
                self.curve = {}
            self._set_stage("cancelled")
        elif isinstance(message, Finished):
            self._set_stage("done" if message.complete else "finished early")
            if message.output and isinstance(self.job, ReconstructionJob):
                show_info(f"The volume was written to {message.output}.")
            elif message.output and isinstance(self.job, TrainJob):
                show_info(f"The best weights were written to {message.output}.")
        else:
            self._set_stage("failed")
            show_error(message.text)
        self._last_sweep = None
        self._set_state("idle")
        self.finished.emit(message)
        self.operator_changed.emit()

    def _on_layer_removed(self, event: Any) -> None:
        """A layer that the person deletes is only no longer shown; the job goes on."""
        for display in (self.display, self.operator, self.patch, self.sweep, self.training):
            if display is not None:
                display.forget(event.value)

    # -- the normal operator ---------------------------------------------------------------------------------------

    def use_operator(self) -> None:
        """Let reconstructions use the operator that was fitted or loaded last."""
        if self.operator is not None and self.operator.file is not None:
            self.operator_file = self.operator.file
            self.operator_file_changed.emit()

    def _forget_operator_file(self) -> None:
        """Another scan is open: the operator was made for the last."""
        if self.operator_file is not None:
            self.operator_file = None
            self.operator_file_changed.emit()

    def use_weights(self) -> None:
        """Let reconstructions use the weights that were trained last."""
        if self.training is not None and self.training.output is not None:
            self.weights_file = self.training.output
            self.weights_file_changed.emit()

    def save_operator(self, path: Path) -> None:
        """Copy the operator's file, in a thread."""
        assert self.operator is not None
        assert self.operator.file is not None
        file = Path(self.operator.file)

        def work() -> None:
            partial = partial_path(path)
            try:
                shutil.copyfile(file, partial)
                os.replace(partial, path)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ScanError(f"Could not write {path} ({reason}): free some space or choose another.") from error
            finally:
                partial.unlink(missing_ok=True)

        self._in_thread("save", work, lambda _: show_info(f"The operator was written to {path}."))

    def save_figure(self, path: Path) -> None:
        """Draw the paper's figure into a PNG file, in a thread."""
        operator = self.operator
        assert operator is not None
        volumes, figures = dict(operator.volumes), dict(operator.figures)
        voxel_size, title = operator.ready["x"].scale[0], self.scan.name if self.scan is not None else ""

        def work() -> None:
            from napari_recon.jobs.figure import operator_figure

            operator_figure(volumes, voxel_size, figures, path, title)

        self._in_thread("figure", work, lambda _: show_info(f"The figure was written to {path}."))

    @property
    def clicked(self) -> bool:
        """Whether the person chose the place of the next what-if."""
        return self._place is not None

    @property
    def place(self) -> tuple[float, float, float]:
        """The voxel (z, y, x) of the operator's volume that a what-if is made at.

        Where the person clicked last; else what the view shows the middle of; else the middle of the volume.
        """
        assert self.operator is not None
        ready = self.operator.ready["x"]
        last = np.array(ready.shape) - 1.0
        at = last / 2
        if self._place is not None:
            at = (np.array(self._place) - ready.translate) / ready.scale
        elif (layer := self.operator.layers.get("x")) is not None and not self.viewer.mouse_over_canvas:
            at = np.array(shown.where_the_person_looks(self.viewer, layer) or at)
        z, y, x = (round(float(v), 2) for v in np.clip(at, 0, last))
        return z, y, x

    def _on_press(self, viewer: Viewer, event: Any) -> Iterator[None]:
        """A click (no drag) into a volume is where the next what-if is made."""
        if event.button != 1 or self.operator is None:
            return
        yield
        if event.type == "mouse_move":
            return
        visible = [x for x in self.viewer.layers if isinstance(x, Image) and x.visible and x.ndim == 3]
        for layer in visible:
            voxel = shown.where_the_person_looks(self.viewer, layer)
            if voxel is not None:
                z, y, x = layer.data_to_world(voxel)
                self._place, self.place_moved = (float(z), float(y), float(x)), True
                self.place_changed.emit()
                return

    def _on_point(self, event: object = None) -> None:
        """The slider of the steps was moved, here or in the viewer."""
        if self.patch is not None and self.patch.layers:
            self.step_shown.emit(self.patch.step)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, layer: Image, path: Path, bits: Literal[16, 32] | None = None) -> None:
        """Write a layer's volume, in a thread; the ending says as what."""
        work = lambda: export_layer(layer, path, bits)  # noqa: E731
        self._in_thread(f"export {path}", work, lambda _: show_info(f"{layer.name} was written to {path}."))

    def save_session(self, path: str | Path) -> None:
        """Save scan, results and view in a folder, in a thread; see :mod:`~napari_recon.widgets.session_file`."""
        if self.state != "idle":
            show_warning("A job runs, whose volumes still change: press Finish, or wait for its end.")
            return
        scan, job = self.scan, self.job
        try:
            path = session_file.check_folder(path)
            session, volumes = session_file.describe(
                self.viewer,
                None if scan is None else scan.path,
                ScanOptions() if scan is None else scan.options,
                job if isinstance(job, ReconstructionJob) else None,
            )
        except ScanError as error:
            self._report(error)
            return
        self.busy_changed.emit(f"Saving {path.name} …")

        def done(_: object) -> None:
            self.busy_changed.emit("")
            show_info(f"The session was saved in {path}.")

        self._in_thread("save session", lambda: session_file.write(path, session, volumes), done, self._not_busy)

    def open_session(self, path: str | Path) -> None:
        """Open a saved session: its scan, and its volumes beside what the viewer shows already, in its place."""
        path = Path(path).expanduser()
        if self.state != "idle":
            show_warning("A job runs: press Finish or Cancel first.")
            return
        self.busy_changed.emit(f"Opening {path.name} …")

        def work() -> tuple[Any, ...]:
            session, volumes = session_file.read(path)
            where, scan, why = session.find_scan(path), None, ""
            if where is not None:
                try:
                    asked = session.options
                    scan = open_scan(where) if asked == ScanOptions() else open_scan(where, asked)
                except ScanError as error:  # what was made of it is there all the same
                    why = str(error)
            return session, volumes, scan, {} if scan is None else scan.summary(), why

        def opened(found: tuple[Any, ...]) -> None:
            session, volumes, scan, summary, why = found
            self.busy_changed.emit("")
            if self.comparison is not None:
                self.comparison.leave()
            if scan is not None:
                self._take_over(scan, summary)
            session_file.show(self.viewer, session, session_file.make_layers(session, volumes))
            if self.display is not None:
                self.display.frame = ()
            if session.job is not None:
                self.job_offered.emit(session.job)
            if why:
                show_warning(f"The session's volumes are shown, but its scan could not be opened: {why}")

        self._in_thread("scan", work, opened, self._not_busy)

    def _not_busy(self, error: Exception) -> None:
        self.busy_changed.emit("")
        self._report(error)
