"""One viewer's work: the scan that is open, the process that computes, and the layers that show what it does.

The docks show a session and command it; they hold no state that matters, so they can be closed and opened again while
a job runs. The session ends with its viewer, and the process with the session.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from napari.qt.threading import create_worker
from napari.utils.notifications import show_error, show_info, show_warning
from pydantic import ValidationError
from qtpy.QtCore import QEvent, QObject, QTimer, Signal

from napari_recon.jobs.job import ReconstructionJob
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
from napari_recon.scans.scan import Scan, ScanOptions, open_scan
from napari_recon.widgets import layers as shown

if TYPE_CHECKING:
    import numpy as np
    from napari.layers import Image, Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_recon.jobs.memory import MemoryPlan

POLL = 30
"""Milliseconds between two looks at what the process has to say."""
FOCUS_EVERY = 0.25
"""Seconds between two looks at where the person looks."""
THIN = 8
"""Slices below which a volume is shown in 2D whatever was asked for."""
LATE = 0.02
"""Seconds by which a look comes late when the event loop was busy drawing."""
METHOD_NAMES = {"fdk": "FDK", "sirt": "SIRT", "tv": "TV", "padmm": "PADMM", "unrolled": "Unrolled"}

_sessions: dict[int, Session] = {}


class WorkerLike(Protocol):
    """What a session needs of :class:`napari_recon.jobs.worker.Worker`."""

    def start(self) -> None: ...
    def submit(self, job: ReconstructionJob) -> None: ...
    def poll(self) -> list[Message]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def finish(self) -> None: ...
    def cancel(self) -> None: ...
    def focus(self, point: tuple[float, float, float] | None) -> None: ...
    def close(self) -> None: ...
    def volume(self, name: str) -> NDArray[np.float32]: ...


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
        Its figures over its steps: name -> list of (step, value).
    """

    scan_changed = Signal()
    busy_changed = Signal(str)
    checks_changed = Signal()
    state_changed = Signal(str)
    stage_changed = Signal(str)
    progressed = Signal()
    finished = Signal(object)

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
        self.scan: Scan | None = None
        self.checks: list[str] | None = None
        self.state = "idle"
        self.stage = ""
        self.job: ReconstructionJob | None = None
        self.progress: Progress | None = None
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self.view = "cut"
        self.worker = make_worker()
        self._tasks: dict[str, int] = {}
        self._told: set[str] = set()
        self._live: dict[str, shown.LiveVolume] = {}
        self._outline: shown.PatchOutline | None = None
        self._added: list[Layer] = []
        self._hidden: list[Layer] = []
        self._frame: tuple[Any, ...] = ()
        self._focus: tuple[float, float, float] | None = None
        self._focus_asked = 0.0
        self._polled = 0.0
        self._closed = False
        self._timer = QTimer(self)
        self._timer.setInterval(POLL)
        self._timer.timeout.connect(self._poll)
        viewer.layers.events.inserted.connect(self._on_layer_inserted)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        self._window, self._canvas = viewer.window._qt_window, viewer.window._qt_viewer
        self._window.installEventFilter(self)
        self._canvas.installEventFilter(self)
        self._in_thread("worker", self.worker.start, lambda _: None)
        self._in_thread("warm-up", shown.warm_up, lambda _: None)
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
        self._let_go_of_layers()
        self.viewer.layers.events.inserted.disconnect(self._on_layer_inserted)
        self.viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self.worker.close()
        self._added, self._hidden = [], []
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

    def open(self, path: str | Path, options: ScanOptions | None = None) -> None:
        """Open a scan; ``scan_changed`` tells when it is there, a notification if it cannot be."""
        path = Path(path).expanduser()
        self.busy_changed.emit(f"Opening {path.name} …")

        def opened(result: tuple[Scan, dict[str, str]]) -> None:
            self.busy_changed.emit("")
            self._set_scan(*result)

        def failed(error: Exception) -> None:
            self.busy_changed.emit("")
            self._report(error)

        def work() -> tuple[Scan, dict[str, str]]:
            scan = open_scan(path, options)
            return scan, scan.summary()

        self._in_thread("scan", work, opened, failed)

    def set_options(self, options: ScanOptions) -> None:
        """Read the open scan differently."""
        scan = self.scan
        if scan is None or options == scan.options:
            return

        def work() -> tuple[Scan, dict[str, str]]:
            changed = scan.with_options(**options.model_dump())
            return changed, changed.summary()

        def failed(error: Exception) -> None:
            self._report(error)
            self.scan_changed.emit()  # the forms show again what holds

        self._in_thread("scan", work, lambda result: self._set_scan(*result), failed)

    def _set_scan(self, scan: Scan, summary: dict[str, str]) -> None:
        self.scan, self.summary, self.checks = scan, summary, None
        self._told = set()
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
        """Show the projections; views are read as they are looked at."""
        scan = self.scan
        if scan is None:
            return

        def done(result: tuple[Any, dict[str, Any]]) -> None:
            from napari.layers import Image

            array, arguments = result
            arguments["metadata"][shown.KEY]["shows"] = "projections"
            self._replace("projections", [Image(array, **arguments)])

        self._in_thread("projections", lambda: shown.projections(scan), done)

    def add_geometry(self) -> None:
        """Show where source and detector were, and the volume's box, in 3D."""
        if self.scan is None:
            return
        layers = shown.geometry_layers(self.scan.geometry, self.scan.default_grid(), self.scan.name)
        self._replace("geometry", layers)

    def _scan_layers(self, what: str) -> list[Layer]:
        return [x for x in self.viewer.layers if _told_by(x).get("shows") == what]

    def _replace(self, what: str, layers: list[Any]) -> None:
        """Put layers in the place of those that showed the same of the scan before."""
        new = True
        for old in self._scan_layers(what):
            new = False
            self.viewer.layers.remove(old)
        if new and self.state == "idle":
            self.viewer.canvas.grid.enabled = False
            for other in self.viewer.layers:
                other.visible = what == "geometry" and _told_by(other).get("shows") == "volume"
        for layer in layers:
            self.viewer.add_layer(layer)
        if new and self.state == "idle":
            self.viewer.dims.ndisplay = 3 if what == "geometry" else 2
            self._frame = ()
            if what == "geometry":
                shown.look_at(self.viewer, layers)
            else:
                self.viewer.fit_to_view(layers=layers)

    def _on_layer_inserted(self, event: Any) -> None:
        self._adopt(event.value)

    def _adopt(self, layer: Layer) -> bool:
        """Make the scan of a projections layer (a sample, a file that was dropped on the viewer) the session's."""
        told = _told_by(layer)
        if "scan" not in told or told.get("shows", "projections") != "projections":
            return False
        if "shows" not in told:
            layer.metadata[shown.KEY]["shows"] = "projections"
            options = ScanOptions(**told.get("options", {}))
            if self.scan is None or str(self.scan.path) != told["scan"] or self.scan.options != options:
                path = Path(told["scan"])

                def work() -> tuple[Scan, dict[str, str]]:
                    scan = open_scan(path, options)
                    return scan, scan.summary()

                self._in_thread("scan", work, lambda result: self._take_over(*result))
        return True

    def _take_over(self, scan: Scan, summary: dict[str, str]) -> None:
        """As :meth:`_set_scan`, where the projections are shown already."""
        self.scan, self.summary, self.checks = scan, summary, None
        self._told = set()
        self.scan_changed.emit()
        self.checks_changed.emit()
        self._in_thread("checks", scan.checks, self._checked, lambda error: self._checked([str(error)]))

    # -- the job ---------------------------------------------------------------------------------------------------

    def plan(
        self, job: ReconstructionJob, done: Callable[[MemoryPlan], None], failed: Callable[[Exception], None]
    ) -> None:
        """Plan a job's memory in a thread."""
        from napari_recon.jobs.memory import plan_memory

        scan = self.scan if self.scan is not None and self.scan.options == job.options else None
        self._in_thread("plan", lambda: plan_memory(job, scan), done, failed)

    def run(self, job: ReconstructionJob) -> None:
        """Run a job; its volumes become layers as they come."""
        if self.state != "idle":
            show_warning("A reconstruction runs already: press Finish or Cancel first.")
            return
        self._let_go_of_layers()
        self.job, self.progress, self.curve = job, None, {}
        self._focus, self._focus_asked = None, 0.0
        self._set_state("running")
        self._set_stage("starting")
        self.worker.submit(job)
        self._polled = time.perf_counter()
        self._timer.start()

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

    def _poll(self) -> None:
        """Take what the process has to say, then bring the changed boxes onto the screen."""
        now = time.perf_counter()
        late, self._polled = now - self._polled - POLL / 1000, now
        if late > LATE:
            for live in self._live.values():
                live.rest(late)
        latest: Progress | None = None
        for message in self.worker.poll():
            match message:
                case Progress():
                    latest = message
                    if message.name in self._live:
                        self._live[message.name].changed(message.box)
                    for name, value in message.figures.items():
                        self.curve.setdefault(name, []).append((message.step, value))
                case VolumeReady():
                    self._add_volume(message)
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
            self._show_changes()
            self._look_where_the_person_looks()

    def _show_changes(self) -> None:
        """Bring changed boxes and the outline onto the screen, unless drawing the last ones still goes on."""
        live = self._live.get("result")
        if self._outline is not None and live is not None and live.may_draw and self.progress is not None:
            self._outline.show(self.progress.next_box if self.progress.name == "result" else None)
        for live in self._live.values():
            live.flush()

    def _look_where_the_person_looks(self) -> None:
        now = time.perf_counter()
        if "result" not in self._live or now - self._focus_asked < FOCUS_EVERY:
            return
        self._focus_asked = now
        focus = shown.where_the_person_looks(self.viewer, self._live["result"].layer)
        if focus is not None and (
            self._focus is None or max(abs(a - b) for a, b in zip(focus, self._focus, strict=True)) >= 1
        ):
            self._focus = focus
            self.worker.focus(focus)

    def _add_volume(self, message: VolumeReady) -> None:
        assert self.job is not None
        array = self.worker.volume(message.name)
        columns = 1 if self.job.parameters.method == "fdk" else 2
        layer = self._same_fdk(array) if message.name == "fdk" else None
        if message.name == "fdk":
            self._hidden = [x for x in self.viewer.layers if x.visible and x is not layer]
            volumetric = self.view != "slices" and min(array.shape) >= THIN
            shown.make_room(self.viewer, [layer] if layer else [], columns, volumetric)
        told = {"shows": "volume", "job": self.job.model_dump(mode="json"), "volume": message.name}
        if layer is not None:
            layer.metadata[shown.KEY] = told
            shown.cut_open(layer, self.view == "cut")
        else:
            name = "FDK" if message.name == "fdk" else method_name(self.job)
            layer = shown.volume_layer(name, array, message.voxel_size, message.translate, told)
            self._colour(layer)
            shown.cut_open(layer, self.view == "cut")
            self.viewer.add_layer(layer)
            self._added.append(layer)
        self._live[message.name] = shown.LiveVolume(self.viewer, layer)
        shown.link([live.layer for live in self._live.values()])
        frame = (message.shape, message.voxel_size, message.translate, self.view, columns)
        if frame != self._frame:  # else the camera stays where the person has put it
            self._frame = frame
            # What lies in the corners of a volume is outside the field of view.
            shown.look_at(self.viewer, [layer], columns, fill=1.15 if self.viewer.dims.ndisplay == 3 else 0.96)
        if message.name == "result":
            self._outline = shown.PatchOutline(self.viewer, layer)

    def _same_fdk(self, array: NDArray[np.float32]) -> Image | None:
        """The FDK layer of an earlier run, where it shows the same: it is kept rather than built again."""
        assert self.job is not None
        mine = _fdk_identity(self.job.model_dump(mode="json"))
        for layer in self.viewer.layers:
            told = _told_by(layer)
            if told.get("volume") == "fdk" and _fdk_identity(told["job"]) == mine:
                few = (slice(None, None, 7),) * 3  # the file may have changed; a sample tells
                if layer.data.shape == array.shape and (layer.data[few] == array[few]).all():
                    return layer
        return None

    def _colour(self, layer: Image) -> None:
        """The contrast and colours of this run's FDK; FDK's own are set from its values, once."""
        first = self._live.get("fdk")
        if first is not None:
            for name in shown.LINKED:
                setattr(layer, name, getattr(first.layer, name))
        elif (limits := shown.contrast_limits(layer.data)) is not None:
            layer.contrast_limits_range = (min(0.0, limits[0]), 2 * limits[1])
            layer.contrast_limits = limits

    def _end(self, message: Finished | Cancelled | Failed) -> None:
        self._timer.stop()
        layers = {name: live.layer for name, live in self._live.items()}
        for live in self._live.values():
            live.flush(force=True)
        self._let_go_of_layers()
        if isinstance(message, Cancelled):
            for added in self._added:
                if added in self.viewer.layers:
                    self.viewer.layers.remove(added)
            for hidden in self._hidden:
                if hidden in self.viewer.layers:
                    hidden.visible = True
            self.viewer.canvas.grid.enabled = False
            self._frame = ()
            self._set_stage("cancelled")
        else:
            for layer in layers.values():
                # The one full look at the data: the thumbnail was left alone while the data changed.
                layer.refresh(data_displayed=False, highlight=False, extent=False)
        if isinstance(message, Finished):
            for layer in layers.values():
                layer.metadata[shown.KEY] |= {"provenance": message.provenance, "figures": message.figures}
            self._set_stage("done" if message.complete else "finished early")
            if message.output:
                show_info(f"The volume was written to {message.output}.")
        elif isinstance(message, Failed):
            self._set_stage("failed")
            show_error(message.text)
        self._added, self._hidden = [], []
        self._set_state("idle")
        self.finished.emit(message)

    def _let_go_of_layers(self) -> None:
        if self._outline is not None:
            self._outline.close()
            self._outline = None
        for live in self._live.values():
            live.close()
        self._live = {}

    def _on_layer_removed(self, event: Any) -> None:
        """A layer that the person deletes is only no longer shown; the job goes on."""
        for name, live in list(self._live.items()):
            if live.layer is event.value:
                live.close()
                del self._live[name]
                if name == "result" and self._outline is not None:
                    self._outline.close()
                    self._outline = None


def method_name(job: ReconstructionJob) -> str:
    """A job's method as a layer's name."""
    name = METHOD_NAMES.get(job.parameters.method, job.parameters.method.upper())
    return f"Partitioned {name}" if getattr(job.parameters, "patch", None) else name


def _told_by(layer: Layer) -> dict[str, Any]:
    told = layer.metadata.get(shown.KEY)
    return told if isinstance(told, dict) else {}


def _fdk_identity(job: dict[str, Any]) -> tuple[Any, ...]:
    parameters = job["parameters"]
    window = parameters.get("window", "ram-lak") if parameters["method"] == "fdk" else "ram-lak"
    return job["scan"], str(job["options"]), str(job["shape"]), job["voxel_size"], window
