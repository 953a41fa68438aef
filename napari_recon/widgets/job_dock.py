"""What the docks that run jobs share: the scan's line, grid and device, the memory, buttons, and progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QPushButton, QSizePolicy, QWidget

from napari_recon.jobs.job import Job
from napari_recon.jobs.messages import Finished
from napari_recon.widgets.forms import ModelForm
from napari_recon.widgets.session import Session
from napari_recon.widgets.style import Scrolled, colour, note

if TYPE_CHECKING:
    import napari.viewer

    from napari_recon.jobs.memory import MemoryPlan

DEVICES = ("auto", "cpu", "cuda")


class JobDock(Scrolled):
    """A dock that describes a job of the session's scan, runs it, and follows it.

    Subclasses lay out the parts, say what the job is, and call :meth:`_follow` at the end of their ``__init__``.

    Parameters
    ----------
    napari_viewer
        The viewer.
    model
        The job's model; its shape, voxel size and device make the form ``volume``.
    others
        Further jobs that the dock runs.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer, model: type[BaseModel], *others: type[BaseModel]) -> None:
        super().__init__()
        self.session = Session.of(napari_viewer)
        self.kinds = (model, *others)
        self._plan: MemoryPlan | None = None
        self.subject = QLabel()
        self.subject.setWordWrap(True)
        grid = ("shape", "voxel_size", "device")
        self.volume = ModelForm(
            model,
            skip=[name for name in model.model_fields if name not in grid],
            choices={"device": DEVICES},
            units={"voxel_size": "mm"},
        )
        self.volume.changed.connect(self._edited)
        self.memory = QLabel()
        self.memory.setWordWrap(True)
        self.progress = QProgressBar()
        self.progress.setTextVisible(False)
        self.progress.setMaximumHeight(10)
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.run = make_button("", "", self._run)
        self.finish = make_button("Finish", "Stop after the current step and keep what there is.", self.session.finish)
        self.cancel = make_button("Cancel", "Stop and throw away this run's volumes.", self.session.cancel)
        self._settle = QTimer(self)
        self._settle.setSingleShot(True)
        self._settle.setInterval(200)
        self._settle.timeout.connect(self._ask_for_plan)

    def _follow(self) -> None:
        """Show the session as it is, and whatever becomes of it."""
        session = self.session
        session.scan_changed.connect(self._show_scan)
        session.state_changed.connect(self._show_state)
        session.stage_changed.connect(self._show_progress)
        session.progressed.connect(self._show_progress)
        session.finished.connect(self._show_end)
        self._show_scan()

    # -- the job ---------------------------------------------------------------------------------------------------

    def job(self) -> Job | None:
        """The job that the form describes; None without a scan.

        Raises
        ------
        pydantic.ValidationError
            If what was typed makes no job.
        """
        raise NotImplementedError

    @property
    def mine(self) -> bool:
        """Whether the session's job is one of those that this dock runs."""
        return isinstance(self.session.job, self.kinds)

    def _run(self) -> None:
        raise NotImplementedError

    def _edited(self, *_: object) -> None:
        self._settle.start()

    def _ask_for_plan(self) -> None:
        try:
            job = self.job()
        except ValidationError as error:
            first = error.errors()[0]
            self._no_plan(ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}."))
            return
        if job is not None:
            self.session.plan(job, self._show_plan, self._no_plan)

    # -- showing ---------------------------------------------------------------------------------------------------

    def _show_scan(self) -> None:
        scan = self.session.scan
        self._plan = None
        if scan is None:
            self.subject.setText(note("Open a scan first: in the Scan dock, or from File > Open Sample."))
            self.memory.setText("")
        else:
            grid = scan.default_grid()
            self.volume.suggest("voxel_size", grid.voxel_size)
            self.volume.suggest("shape", grid.shape)
            self._show_subject()
            self._edited()
        self._show_state(self.session.state)

    def _show_subject(self) -> None:
        scan = self.session.scan
        if scan is None:
            return
        if scan.kind == "mri":
            text = f"<b>{scan.name}</b>, {scan.coils} coils"
        else:
            text = f"<b>{scan.name}</b>, {scan.geometry.views} views"
            if scan.options.binning > 1:
                text += f", binned {scan.options.binning} × {scan.options.binning}"
        values = self.volume.values()
        try:
            grid = scan.default_grid(values["shape"], values["voxel_size"])
            d, h, w = grid.shape
            size = " × ".join(f"{e:.3g}" for e in grid.extent)
            edges = sorted(set(grid.scale), key=grid.scale.index)
            text += "<br>" + note(f"{d} × {h} × {w} voxels of {' × '.join(f'{e:.4g}' for e in edges)} mm")
            self.subject.setToolTip(f"{size} mm (z × y × x)")
        except ValueError as error:
            text += "<br>" + note(str(error))
        self.subject.setText(text)

    def _show_plan(self, plan: MemoryPlan) -> None:
        self._plan = plan
        with contextlib.suppress(RuntimeError):  # the dock was deleted while it was planned
            self._show_subject()
            if plan.fits:
                self.memory.setText(note(plan.sentence))
            else:
                self.memory.setText(f"<span style='color:{colour('error')}'>{plan.sentence}</span>")
            gigabytes = (f"{name}: {size / 1e9:.2f} GB" for name, size in plan.items.items())
            self.memory.setToolTip("\n".join(gigabytes))
            self._show_state(self.session.state)

    def _no_plan(self, error: Exception) -> None:
        self._plan = None
        with contextlib.suppress(RuntimeError):  # as above
            self.memory.setText(f"<span style='color:{colour('error')}'>{error}</span>")
            self._show_state(self.session.state)

    def _show_state(self, state: str) -> None:
        """What may be pressed: another dock's job is only waited for."""
        idle = state == "idle"
        self.run.setEnabled(idle and self.session.scan is not None and (self._plan is None or self._plan.fits))
        self.finish.setEnabled(self.mine and state in ("running", "paused"))
        self.cancel.setEnabled(self.mine and state in ("running", "paused", "finishing"))
        self._show_progress()

    def _show_progress(self, _: object = None) -> None:
        """The bar and the words of the job that runs, if it is this dock's."""
        session, progress = self.session, self.session.progress
        if session.state == "idle":
            return
        if not self.mine:
            self.status.setText(note("Another job runs."))
            return
        words = [session.stage if session.state == "running" else session.state]
        if progress is not None:
            self.progress.setRange(0, max(1, progress.total))
            self.progress.setValue(progress.step)
            words.append(f"step {progress.step} of {progress.total}")
            if progress.remaining is not None and session.state == "running":
                words.append(f"{duration(progress.remaining)} left")
        else:
            self.progress.setRange(0, 1)
            self.progress.setValue(0)
        self.status.setText(", ".join(words))

    def _show_end(self, message: object) -> None:
        if not self.mine:
            self.status.setText("")
            return
        self.progress.setRange(0, 1)
        self.progress.setValue(int(isinstance(message, Finished)))
        self.status.setText(", ".join(self._words_at_the_end(message)))
        self._edited()

    def _words_at_the_end(self, message: object) -> list[str]:
        words = [self.session.stage]
        if isinstance(message, Finished):
            words[0] += f" in {duration(message.seconds)}"
            words.append(f"{message.peak_memory / 1e9:.2g} GB at most")
        return words


def button_row(*buttons: QWidget) -> QHBoxLayout:
    """Buttons of equal width beside each other."""
    row = QHBoxLayout()
    row.setSpacing(4)
    for button in buttons:
        row.addWidget(button, 1)
    return row


def make_button(text: str, tip: str, pressed: Callable[[], Any]) -> QPushButton:
    """A button as wide as its share of the row."""
    button = QPushButton(text)
    button.setToolTip(tip)
    button.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
    button.clicked.connect(lambda _=False: pressed())
    return button


def duration(seconds: float) -> str:
    """Seconds for a person: 0.03 s, 0.8 s, 2.5 s, 12 s, 3:20 min, 1:05 h."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
