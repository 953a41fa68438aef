"""The *Reconstruct* dock: choose a method, see what it will need, run it and steer it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLineEdit,
    QSizePolicy,
    QStackedWidget,
    QToolButton,
)

from napari_recon.jobs.job import Parameters, ReconstructionJob, TVParameters
from napari_recon.jobs.messages import Finished
from napari_recon.widgets.curve import Curve
from napari_recon.widgets.displays import METHOD_NAMES
from napari_recon.widgets.forms import ModelForm
from napari_recon.widgets.job_dock import JobDock, button_row, make_button
from napari_recon.widgets.style import section

if TYPE_CHECKING:
    import napari.viewer

METHODS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Parameters)[0])
OPERATORS = ("fit", "exact")
VIEWS = {"cut": "3D, cut open", "whole": "3D", "slices": "slices"}
"""How volumes are shown: what a session calls it, and its name for a person."""
FIGURES = {
    "residual": ("residual", "{:.3g}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
}
"""Figures told at the end of a run: name -> (label, format)."""


class ReconstructDock(JobDock):
    """Runs reconstructions of the session's scan."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__(napari_viewer, ReconstructionJob)
        layout = self.content
        layout.addWidget(self.subject)

        self.method = QComboBox()
        self.forms: list[ModelForm] = []
        self.parameters = QStackedWidget()
        for model in METHODS:
            name = str(model.model_fields["method"].default)
            self.method.addItem(METHOD_NAMES.get(name, name.upper()), name)
            explanation = (model.__doc__ or "").strip().splitlines()[0]
            self.method.setItemData(self.method.count() - 1, explanation, Qt.ItemDataRole.ToolTipRole)
            form: ModelForm = ModelForm(model, skip=("method",), choices={"operator": OPERATORS})
            form.changed.connect(self._edited)
            self.forms.append(form)
            self.parameters.addWidget(form)
        row = QFormLayout()
        row.setContentsMargins(0, 0, 0, 0)
        row.addRow("Method", self.method)
        layout.addLayout(row)
        layout.addWidget(self.parameters)
        self.method.currentIndexChanged.connect(self._choose_method)

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
        layout.addWidget(self.memory)

        self.run.setText("Run")
        self.run.setToolTip("Reconstruct the scan.")
        self.pause = make_button("Pause", "Wait after the current patch.", self._pause)
        layout.addLayout(button_row(self.run, self.pause, self.finish, self.cancel))
        layout.addWidget(self.progress)
        layout.addWidget(self.status)
        self.curve = Curve()
        layout.addWidget(self.curve)
        layout.addStretch(1)

        self.session.operator_file_changed.connect(self._use_operator)
        self.method.setCurrentIndex(METHODS.index(TVParameters))
        self._choose_method()
        self._follow()
        self._use_operator()

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

    def _use_operator(self) -> None:
        """Take the session's operator up as a choice, and choose it; or let go of one of another scan."""
        index, file = METHODS.index(TVParameters), self.session.operator_file
        combo = self.forms[index].editors["operator"].widget
        assert isinstance(combo, QComboBox)
        if file is None and combo.currentText() == combo.itemText(len(OPERATORS)):
            combo.setCurrentIndex(0)
        while combo.count() > len(OPERATORS):
            combo.removeItem(len(OPERATORS))
        if file is not None:
            combo.addItem("the Normal operator dock's H", file)
            combo.setCurrentIndex(combo.count() - 1)
            self.method.setCurrentIndex(index)

    # -- showing ---------------------------------------------------------------------------------------------------

    def _show_state(self, state: str) -> None:
        self.pause.setEnabled(self.mine and state in ("running", "paused"))
        self.pause.setText("Resume" if state == "paused" and self.mine else "Pause")
        for widget in (self.method, self.parameters, self.volume):
            widget.setEnabled(state == "idle")
        super()._show_state(state)

    def _show_progress(self, _: object = None) -> None:
        super()._show_progress()
        progress = self.session.progress
        if self.mine and self.session.state != "idle" and progress is not None:
            self.curve.show_figures(self.session.curve)

    def _show_end(self, message: object) -> None:
        super()._show_end(message)
        if self.mine:
            self.curve.show_figures(self.session.curve, at_once=True)

    def _words_at_the_end(self, message: object) -> list[str]:
        words = super()._words_at_the_end(message)
        if isinstance(message, Finished):
            found = [(label, form, message.figures[n]) for n, (label, form) in FIGURES.items() if n in message.figures]
            words[1:1] = [f"{label} {form.format(value)}" for label, form, value in found]
        return words
