"""The *Reconstruct* dock: choose a method, see what it will need, run it and steer it."""

from __future__ import annotations

import html
import typing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QLabel,
    QLineEdit,
    QSizePolicy,
    QStackedWidget,
)

from napari_recon.jobs.job import Parameters, ReconstructionJob, TVParameters, UnrolledParameters
from napari_recon.jobs.messages import Finished
from napari_recon.learning.weights import WeightsHeader, find_weights, outside_training, read_header, shipped_weights
from napari_recon.scans.errors import ScanError
from napari_recon.widgets.curve import Curve
from napari_recon.widgets.displays import METHOD_NAMES
from napari_recon.widgets.forms import ModelForm, with_browse
from napari_recon.widgets.job_dock import JobDock, button_row, make_button
from napari_recon.widgets.style import colour, section

if TYPE_CHECKING:
    import napari.viewer

METHODS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Parameters)[0])
OPERATORS = ("fit", "exact")
DOCKS_OPERATOR = "the Normal operator dock's H"
FILES = {"operator": "Normal operators (*.safetensors)", "weights": "Weights (*.safetensors)"}
"""Filters of the file dialogs of fields that may be files."""
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
        default = str(UnrolledParameters.model_fields["weights"].default)
        weights = [default, *(name for name in shipped_weights() if name != default)]
        choices = {"operator": OPERATORS, "weights": weights}
        for model in METHODS:
            name = str(model.model_fields["method"].default)
            self.method.addItem(METHOD_NAMES.get(name, name.upper()), name)
            explanation = (model.__doc__ or "").strip().splitlines()[0]
            self.method.setItemData(self.method.count() - 1, explanation, Qt.ItemDataRole.ToolTipRole)
            form: ModelForm = ModelForm(model, skip=("method",), choices=choices, files=FILES)
            form.changed.connect(self._edited)
            self.forms.append(form)
            self.parameters.addWidget(form)
        row = QFormLayout()
        row.setContentsMargins(0, 0, 0, 0)
        row.addRow("Method", self.method)
        layout.addLayout(row)
        layout.addWidget(self.parameters)
        self.warning = QLabel()
        self.warning.setWordWrap(True)
        self.warning.setVisible(False)
        layout.addWidget(self.warning)
        self._header: tuple[object, WeightsHeader] | None = None
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
        rows = self.volume.layout()
        assert isinstance(rows, QFormLayout)
        rows.addRow("Save to", with_browse(self.output, self._ask_for_output))
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
        self.session.weights_file_changed.connect(self._use_weights)
        self.method.setCurrentIndex(METHODS.index(TVParameters))
        self._choose_method()
        self._follow()
        self._use_operator()
        self._use_weights()

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
        place = combo.findText(DOCKS_OPERATOR)
        if place >= 0:
            if file is None and combo.currentIndex() == place:
                combo.setCurrentIndex(0)
            combo.removeItem(place)
        if file is not None:
            combo.insertItem(len(OPERATORS), DOCKS_OPERATOR, file)
            combo.setCurrentIndex(len(OPERATORS))
            self.method.setCurrentIndex(index)

    def _use_weights(self) -> None:
        """Take up the weights that the session was told to use."""
        file = self.session.weights_file
        if file is not None:
            index = METHODS.index(UnrolledParameters)
            self.forms[index].editors["weights"].put(file)
            self.method.setCurrentIndex(index)
            self._edited()  # the same file may hold other weights now

    # -- the weights -----------------------------------------------------------------------------------------------

    def header(self) -> WeightsHeader | None:
        """What the chosen weights say of themselves; None where the method has none.

        Raises
        ------
        ScanError
            If they are not there, or no weights.
        """
        if METHODS[self.method.currentIndex()] is not UnrolledParameters:
            return None
        path = find_weights(self.forms[self.method.currentIndex()].values()["weights"])
        state = path, path.stat().st_mtime_ns
        if self._header is None or self._header[0] != state:
            self._header = state, read_header(path)
        return self._header[1]

    def _show_weights(self) -> None:
        """What the form can ask of the chosen weights, and in what they are unlike the scan."""
        sentences: list[str] = []
        try:
            header = self.header()
        except ScanError:  # the plan says so
            header = None
        if header is not None:
            form = self.forms[self.method.currentIndex()]
            unrolled = header.model["method"] == "unrolled"
            values = form.values()
            for name, means_something in (
                ("iterations", unrolled),
                ("passes", unrolled),
                ("operator", unrolled and values["passes"] > 1),
            ):
                form.editors[name].widget.setEnabled(means_something)
            if unrolled:
                form.suggest("iterations", header.model["iterations"])
            else:
                form.editors["iterations"].put(None)
            form.editors["weights"].widget.setToolTip(f"<qt>{html.escape(header.card)}</qt>")
            scan = self.session.scan
            if scan is not None:
                grid = self.volume.values()
                try:
                    chosen = scan.default_grid(grid["shape"], grid["voxel_size"])
                    sentences = outside_training(header.training, scan.geometry, chosen)
                except ScanError:  # the line about the scan says so
                    pass
        text = "<br>".join(html.escape(sentence) for sentence in sentences)
        self.warning.setText(f"<span style='color:{colour('warning')}'>{text}</span>")
        self.warning.setVisible(bool(sentences))

    def _ask_for_plan(self) -> None:
        self._show_weights()
        super()._ask_for_plan()

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
