"""The *Reconstruct* dock: choose a method, see what it will need, run it and steer it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QGridLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QStackedWidget,
    QToolButton,
)

from napari_recon.jobs.job import Parameters, ReconstructionJob, TVParameters
from napari_recon.jobs.messages import Finished
from napari_recon.widgets.curve import Curve
from napari_recon.widgets.forms import ModelForm
from napari_recon.widgets.session import METHOD_NAMES, Session
from napari_recon.widgets.style import Scrolled, colour, note, section

if TYPE_CHECKING:
    import napari.viewer

    from napari_recon.jobs.memory import MemoryPlan

METHODS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Parameters)[0])
CHOICES = {"operator": ("fit", "exact"), "device": ("auto", "cpu", "cuda")}
VIEWS = {"cut": "3D, cut open", "whole": "3D", "slices": "slices"}
"""How volumes are shown: what a session calls it, and its name for a person."""
FIGURES = {
    "residual": ("residual", "{:.3g}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
}
"""Figures told at the end of a run: name -> (label, format)."""


class ReconstructDock(Scrolled):
    """Runs reconstructions of the session's scan."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__()
        self.session = Session.of(napari_viewer)
        self._plan: MemoryPlan | None = None
        layout = self.content

        self.subject = QLabel()
        self.subject.setWordWrap(True)
        layout.addWidget(self.subject)

        self.method = QComboBox()
        self.forms: list[ModelForm] = []
        self.parameters = QStackedWidget()
        for model in METHODS:
            name = str(model.model_fields["method"].default)
            self.method.addItem(METHOD_NAMES.get(name, name.upper()), name)
            explanation = (model.__doc__ or "").strip().splitlines()[0]
            self.method.setItemData(self.method.count() - 1, explanation, Qt.ItemDataRole.ToolTipRole)
            form: ModelForm = ModelForm(model, skip=("method",), choices=CHOICES)
            form.changed.connect(self._edited)
            self.forms.append(form)
            self.parameters.addWidget(form)
        row = QFormLayout()
        row.setContentsMargins(0, 0, 0, 0)
        row.addRow("Method", self.method)
        layout.addLayout(row)
        layout.addWidget(self.parameters)
        self.method.currentIndexChanged.connect(self._choose_method)

        self.volume = ModelForm(
            ReconstructionJob,
            skip=("scan", "options", "parameters", "output", "seed"),
            choices=CHOICES,
            units={"voxel_size": "mm"},
        )
        self.volume.changed.connect(self._edited)
        self.view = QComboBox()
        for view, text in VIEWS.items():
            self.view.addItem(text, view)
        self.view.setToolTip("How the volumes are shown when a run starts; napari's own buttons change it at any time.")
        self.view.currentIndexChanged.connect(self._choose_view)
        self.output = QLineEdit()
        self.output.setPlaceholderText("not saved (.tif or .ome.zarr)")
        self.output.setToolTip("Where the result is written when the run ends.")
        self.output.textChanged.connect(self._edited)
        browse = QToolButton()
        browse.setText("…")
        browse.clicked.connect(self._ask_for_output)
        save = QHBoxLayout()
        save.setSpacing(2)
        save.addWidget(self.output, 1)
        save.addWidget(browse)
        rows = self.volume.layout()
        assert isinstance(rows, QFormLayout)
        rows.addRow("Save to", save)
        rows.addRow("Show as", self.view)
        layout.addWidget(section("Volume, device and output", self.volume))

        self.memory = QLabel()
        self.memory.setWordWrap(True)
        layout.addWidget(self.memory)

        buttons = QGridLayout()
        buttons.setSpacing(4)
        self.run = self._button(buttons, 0, "Run", "Reconstruct the scan.", self._run)
        self.pause = self._button(buttons, 1, "Pause", "Wait after the current patch.", self._pause)
        self.finish = self._button(
            buttons, 2, "Finish", "Stop after the current patch and keep what there is.", self.session.finish
        )
        self.cancel = self._button(buttons, 3, "Cancel", "Stop and throw away this run's volumes.", self.session.cancel)
        layout.addLayout(buttons)

        self.progress = QProgressBar()
        self.progress.setTextVisible(False)
        self.progress.setMaximumHeight(10)
        layout.addWidget(self.progress)
        self.status = QLabel()
        self.status.setWordWrap(True)
        layout.addWidget(self.status)
        self.curve = Curve()
        layout.addWidget(self.curve)
        layout.addStretch(1)

        self._settle = QTimer(self)
        self._settle.setSingleShot(True)
        self._settle.setInterval(200)
        self._settle.timeout.connect(self._ask_for_plan)
        session = self.session
        session.scan_changed.connect(self._show_scan)
        session.state_changed.connect(self._show_state)
        session.stage_changed.connect(self._show_progress)
        session.progressed.connect(self._show_progress)
        session.finished.connect(self._show_end)
        self.method.setCurrentIndex(METHODS.index(TVParameters))
        self._choose_method()
        self._show_scan()
        self._show_state(session.state)

    def _button(self, grid: QGridLayout, column: int, text: str, tip: str, pressed: Any) -> QPushButton:
        button = QPushButton(text)
        button.setToolTip(tip)
        button.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        button.clicked.connect(lambda _=False: pressed())
        grid.addWidget(button, 0, column)
        return button

    # -- the job ---------------------------------------------------------------------------------------------------

    def job(self) -> ReconstructionJob | None:
        """The job that the form describes; None without a scan.

        Raises
        ------
        pydantic.ValidationError
            If what was typed makes no job.
        """
        scan = self.session.scan
        if scan is None:
            return None
        output = self.output.text().strip()
        return ReconstructionJob(
            scan=scan.path,
            options=scan.options,
            parameters=self.forms[self.method.currentIndex()].value(),
            output=Path(output) if output else None,
            **self.volume.values(),
        )

    def _choose_method(self, _: int = 0) -> None:
        index = self.method.currentIndex()
        for i in range(self.parameters.count()):  # a stack is as tall as its tallest page; let only one count
            page = self.parameters.widget(i)
            if page is not None:
                policy = QSizePolicy.Policy.Preferred if i == index else QSizePolicy.Policy.Ignored
                page.setSizePolicy(policy, policy)
        self.parameters.setCurrentIndex(index)
        self.method.setToolTip(self.method.itemData(index, Qt.ItemDataRole.ToolTipRole))
        self._edited()

    def _choose_view(self, index: int) -> None:
        self.session.view = self.view.itemData(index)

    def _ask_for_output(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the result", "", "TIFF (*.tif *.tiff);;OME-Zarr (*.ome.zarr)")
        if path:
            self.output.setText(path)

    def _edited(self, *_: object) -> None:
        if hasattr(self, "_settle"):
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

    def _run(self) -> None:
        job = self.job()
        if job is not None:
            self.curve.clear()
            self.session.run(job)

    def _pause(self) -> None:
        if self.session.state == "paused":
            self.session.resume()
        else:
            self.session.pause()

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
        text = f"<b>{scan.name}</b>, {scan.geometry.views} views"
        if scan.options.binning > 1:
            text += f", binned {scan.options.binning} × {scan.options.binning}"
        values = self.volume.values()
        try:
            grid = scan.default_grid(values["shape"], values["voxel_size"])
            d, h, w = grid.shape
            size = " × ".join(f"{e:.3g}" for e in grid.extent)
            text += "<br>" + note(f"{d} × {h} × {w} voxels of {grid.voxel_size:.4g} mm")
            self.subject.setToolTip(f"{size} mm (z × y × x)")
        except ValueError as error:
            text += "<br>" + note(str(error))
        self.subject.setText(text)

    def _show_plan(self, plan: MemoryPlan) -> None:
        self._plan = plan
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
        self.memory.setText(f"<span style='color:{colour('error')}'>{error}</span>")
        self._show_state(self.session.state)

    def _show_state(self, state: str) -> None:
        idle = state == "idle"
        self.run.setEnabled(idle and self.session.scan is not None and (self._plan is None or self._plan.fits))
        self.pause.setEnabled(state in ("running", "paused"))
        self.pause.setText("Resume" if state == "paused" else "Pause")
        self.finish.setEnabled(state in ("running", "paused"))
        self.cancel.setEnabled(state in ("running", "paused", "finishing"))
        for widget in (self.method, self.parameters, self.volume):
            widget.setEnabled(idle)
        self._show_progress()

    def _show_progress(self, _: object = None) -> None:
        session, progress = self.session, self.session.progress
        if session.state == "idle":
            return
        words = [session.stage if session.state in ("running", "idle") else session.state]
        if progress is not None and progress.name == "result":
            self.progress.setRange(0, max(1, progress.total))
            self.progress.setValue(progress.step)
            words.append(f"step {progress.step} of {progress.total}")
            if progress.remaining is not None and session.state == "running":
                words.append(f"{duration(progress.remaining)} left")
            self.curve.show_figures(session.curve)
        else:
            self.progress.setRange(0, 1)
            self.progress.setValue(0)
        self.status.setText(", ".join(words))

    def _show_end(self, message: object) -> None:
        self.progress.setRange(0, 1)
        self.progress.setValue(int(isinstance(message, Finished)))
        self.curve.show_figures(self.session.curve, at_once=True)
        words = [self.session.stage]
        if isinstance(message, Finished):
            words[0] += f" in {duration(message.seconds)}"
            for name, (label, form) in FIGURES.items():
                if name in message.figures:
                    words.append(f"{label} {form.format(message.figures[name])}")
            words.append(f"{message.peak_memory / 1e9:.2g} GB at most")
        self.status.setText(", ".join(words))
        self._edited()


def duration(seconds: float) -> str:
    """Seconds for a person: 0.8 s, 12 s, 3:20 min, 1:05 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
