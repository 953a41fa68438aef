"""The *Reconstruct* dock: choose a method, see what it will need, run it and steer it."""

from __future__ import annotations

import contextlib
import html
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.layers import Image
from napari.utils.notifications import show_warning
from pydantic import BaseModel, ValidationError
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QStandardItemModel
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QListView,
    QPushButton,
    QSizePolicy,
    QStackedWidget,
    QWidget,
)

from napari_recon.jobs.job import METHODS as METHODS_OF
from napari_recon.jobs.job import (
    MRI_REGULARIZATION,
    SHIPPED_WEIGHTS,
    STARTS,
    DataConsistencyJob,
    PADMMParameters,
    Parameters,
    ReconstructionJob,
    RegularizationJob,
    ResolutionJob,
    SweepJob,
    TVParameters,
    UnrolledParameters,
)
from napari_recon.jobs.messages import Finished
from napari_recon.jobs.volumes import ENDINGS, FORMATS
from napari_recon.learning.weights import (
    WeightsHeader,
    find_weights,
    outside_training,
    outside_training_of_mri,
    read_header,
)
from napari_recon.scans.errors import ScanError
from napari_recon.widgets.compare_dock import compare_results
from napari_recon.widgets.curve import Convergence
from napari_recon.widgets.displays import LAYER, METHOD_NAMES, phase_of, start_layer, told_by
from napari_recon.widgets.forms import BROWSE, ModelForm, with_browse
from napari_recon.widgets.frequencies import ResolutionPlot
from napari_recon.widgets.job_dock import JobDock, button_row, duration, make_button
from napari_recon.widgets.operator_displays import can_be_judged_on
from napari_recon.widgets.result_menu import ResultMenu
from napari_recon.widgets.style import colour, growing_section, section
from napari_recon.widgets.sweep_panel import SweepPanel

if TYPE_CHECKING:
    import napari.viewer

    from napari_recon.scans.kspace import KSpaceScan

METHODS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Parameters)[0])
OPERATORS = ("fit", "exact")
DOCKS_OPERATOR = "the Normal operator dock's H"
FILES = {
    "operator": "Normal operators (*.safetensors)",
    "weights": "Weights (*.safetensors)",
    "start": "Volumes and weights (*.tif *.tiff *.npy *.safetensors)",
}
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
        others = (DataConsistencyJob, RegularizationJob, ResolutionJob, SweepJob)
        super().__init__(napari_viewer, ReconstructionJob, *others)
        layout = self.content
        layout.addWidget(self.subject)

        self.method = QComboBox()
        self.forms: list[ModelForm] = []
        self.suggest: list[QPushButton] = []
        self.parameters = QStackedWidget()
        choices = {"operator": OPERATORS, "weights": tuple(SHIPPED_WEIGHTS.values()), "start": STARTS}
        for model in METHODS:
            name = str(model.model_fields["method"].default)
            self.method.addItem(METHOD_NAMES.get(name, name.upper()), name)
            explanation = (model.__doc__ or "").strip().splitlines()[0]
            self.method.setItemData(self.method.count() - 1, explanation, Qt.ItemDataRole.ToolTipRole)
            form: ModelForm = ModelForm(model, skip=("method",), choices=choices, files=FILES)
            form.changed.connect(self._edited)
            if model in (TVParameters, PADMMParameters):
                self._offer_suggestion(form)
            if model is PADMMParameters:  # half a number, while it is typed, is no change of a run
                for spin in form.findChildren(QAbstractSpinBox):
                    spin.setKeyboardTracking(False)
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
        self._suggestion_for: ModelForm[Any] | None = None
        self.method.currentIndexChanged.connect(self._choose_method)

        self.view = QComboBox()
        for view, text in VIEWS.items():
            self.view.addItem(text, view)
        self.view.setToolTip("How the volumes are shown when a run starts; napari's own buttons change it at any time.")
        self.view.currentIndexChanged.connect(self._choose_view)
        self.output = QLineEdit()
        self.output.setPlaceholderText("not saved (.tif, .ome.zarr, .nii …)")
        self.output.setToolTip(f"Where the result is written when the run ends: {', '.join(ENDINGS)}.")
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
        self.curve = Convergence(self._forget_runs)
        layout.addWidget(self.curve)
        self.sweep = SweepPanel(self.session, self.job, self.take_value)
        self.sweep.changed.connect(self._edited)
        self.sweep.grown.connect(lambda: QTimer.singleShot(200, self._show_strip))
        self.sweep_section = growing_section("Try values of a parameter", self.sweep)
        self.sweep_section.toggled.connect(self.sweep.unfold)
        layout.addWidget(self.sweep_section)
        self.resolved = ResolutionPlot(self.session)
        layout.addWidget(self.resolved)
        self.check = make_button(
            "Check against data",
            "Project the selected volume (or else the last result), or make k-space of it, and show it beside what was "
            "measured, with what is left over: what a volume shows and the data do not, shows there.",
            self._check,
        )
        self.resolution = make_button(
            "Resolution",
            "Reconstruct so from every second view, and again from the others: what comes out alike is resolved "
            "(Fourier shell correlation). It takes one to two times as long as a run.",
            self._resolve,
        )
        self.result = ResultMenu(self.session, self.take)
        layout.addLayout(button_row(self.check, self.resolution))
        self.compare = make_button(
            "Compare",
            "Put what the last run showed into one grid, with the truth where the scan has one, and measure it: what "
            "is better, where, and by how much.",
            lambda: compare_results(self.session, self),
        )
        layout.addLayout(button_row(self.compare, self.result))
        layout.addStretch(1)

        self.session.operator_file_changed.connect(self._use_operator)
        self.session.weights_file_changed.connect(self._use_weights)
        self.session.job_offered.connect(self.take)
        self.viewer = self.session.viewer
        layers = self.viewer.layers.events
        for event in (layers.inserted, layers.removed, layers.moved):
            event.connect(self._list_layers)
        self._list_layers()
        self.method.setCurrentIndex(METHODS.index(TVParameters))
        if self.tuning and self.session.tuned is not None:  # the dock was closed amid a run
            self.method.setCurrentIndex(METHODS.index(PADMMParameters))
            self.padmm.set_value(self.session.tuned)
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

    def take(self, job: ReconstructionJob) -> None:
        """Put a job's method, parameters and grid into the forms; k-space fixes the grid."""
        scan = self.session.scan
        index = METHODS.index(type(job.parameters))
        self.method.setCurrentIndex(index)
        self.forms[index].set_value(job.parameters)
        for name, editor in self.volume.editors.items():
            if name == "device" or scan is None or scan.kind == "x-ray":
                editor.put(getattr(job, name))
        self._edited()

    def take_value(self, sweep: SweepJob, value: float) -> str:
        """Put a value that a sweep tried into the forms, or let the scan be read so; says what was done."""
        scan = self.session.scan
        if sweep.parameter == "views":
            if self.session.state != "idle" or scan is None:
                return "A job reads the scan: wait until it ends, then choose again."
            self.session.set_options(scan.options.model_copy(update={"views": int(value)}))
            return f"The scan is read with {value:g} views now: press Run."
        index = METHODS.index(type(sweep.parameters))
        self.method.setCurrentIndex(index)
        self.forms[index].editors[sweep.parameter].put(value)
        title = METHODS[index].model_fields[sweep.parameter].title
        return f"{title} is {value:g} in the form now" + (": press Run." if self.session.state == "idle" else ".")

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

    def _show_scan(self) -> None:
        """Offer the methods of the scan's kind; k-space fixes the grid."""
        scan = self.session.scan
        if scan is not None:
            offered = METHODS_OF[scan.kind]
            names = [str(self.method.itemData(i)) for i in range(self.method.count())]
            rows, model = self.method.view(), self.method.model()
            for i, name in enumerate(names):
                if isinstance(rows, QListView):
                    rows.setRowHidden(i, name not in offered)
                if isinstance(model, QStandardItemModel) and (item := model.item(i)) is not None:
                    item.setEnabled(name in offered)
            if names[self.method.currentIndex()] not in offered:
                self.method.setCurrentIndex(names.index("padmm" if scan.kind == "mri" else "tv"))
            usual = {"x-ray": float(PADMMParameters.model_fields["regularization"].default), "mri": MRI_REGULARIZATION}
            if self.padmm.values()["regularization"] in usual.values():  # nobody has chosen another
                self.padmm.editors["regularization"].put(usual[scan.kind])
            for form in self.forms:
                if "weights" in form.editors and form.values()["weights"] in SHIPPED_WEIGHTS.values():
                    form.editors["weights"].put(SHIPPED_WEIGHTS[scan.kind])
            for name in ("shape", "voxel_size"):
                self.volume.editors[name].widget.setEnabled(scan.kind == "x-ray")
                if scan.kind == "mri":
                    self.volume.editors[name].put(None)
            self._list_layers()
        super()._show_scan()

    def _choose_view(self, index: int) -> None:
        self.session.view = self.view.itemData(index)

    def _ask_for_output(self) -> None:
        kinds = ";;".join(f"{name} (*{' *'.join(endings)})" for name, endings in FORMATS.items())
        path, _ = QFileDialog.getSaveFileName(self, "Save the result", "", kinds)
        if path:
            self.output.setText(path)

    def _run(self) -> None:
        job = self.job()
        if job is not None:
            self.session.run(job, start_layer(job.parameters, self.viewer.layers))
            self._show_curves()

    def _offer_suggestion(self, form: ModelForm[Any]) -> None:
        """Put a button beside a form's regularisation that finds a value for it."""
        rows, editor = form.layout(), form.editors["regularization"].widget
        assert isinstance(rows, QFormLayout)
        place = rows.getWidgetPosition(editor)[0]
        button = QPushButton("Suggest")
        button.setToolTip(
            "<qt>Compare values on a part of the scan, which takes some seconds, and take the largest whose residual "
            "is down at the noise, or at what no value explains; of k-space the one that predicts best the samples "
            "that were held out.</qt>"
        )
        button.clicked.connect(lambda _=False: self._suggest())
        both = QWidget()
        beside = QHBoxLayout(both)
        beside.setContentsMargins(0, 0, 0, 0)
        beside.setSpacing(2)
        rows.removeWidget(editor)
        beside.addWidget(editor, 1)
        beside.addWidget(button)
        rows.setWidget(place, QFormLayout.ItemRole.FieldRole, both)
        self.suggest.append(button)

    def _suggest(self) -> None:
        """Let the process look for a regularisation; what it finds goes into the form that is shown."""
        scan = self.session.scan
        if scan is not None:
            job = RegularizationJob(scan=scan.path, options=scan.options, **self.volume.values())
            self._suggestion_for = self.forms[self.method.currentIndex()]
            self.session.run(job)

    def _resolve(self) -> None:
        """Let both halves of the views tell what the method that is chosen resolves."""
        job = self.job()
        if job is not None:
            self.session.run(ResolutionJob(**{name: getattr(job, name) for name in ResolutionJob.model_fields}))

    def _check(self) -> None:
        """Hold the selected volume, or the last result, against the data; on the grid that it was made on."""
        scan, selected = self.session.scan, self.viewer.layers.selection.active
        if scan is not None and scan.kind == "mri":
            self._check_complex(scan)
            return
        candidates = [selected, *reversed(self.viewer.layers)]
        layer = next((x for x in candidates if isinstance(x, Image) and can_be_judged_on(x)), None)
        if scan is None or layer is None:
            show_warning("There is no volume to check: run a reconstruction, or select a volume layer in mm.")
            return
        made = told_by(layer).get("job", {})
        if not {"shape", "voxel_size"} <= set(made):
            made = {"shape": layer.data.shape, "voxel_size": float(layer.scale[0])}
        job = DataConsistencyJob(
            scan=scan.path,
            options=scan.options,
            shape=made["shape"],
            voxel_size=made["voxel_size"],
            device=self.volume.values()["device"],
        )
        self.session.run(job, layer)

    def _check_complex(self, scan: KSpaceScan) -> None:
        """The same of k-space: a volume takes its phase with it."""
        layers, selected = self.viewer.layers, self.viewer.layers.selection.active
        phases = {x: phase for x in layers if told_by(x).get("shows") == "volume" and (phase := phase_of(x, layers))}
        asked = next((x for x, phase in phases.items() if selected in (x, phase)), None)
        if asked is None and isinstance(selected, Image) and "napari_recon" not in selected.metadata:
            show_warning(
                f"{selected.name} is no complex volume: its phase is missing, without which there is no k-space of it. "
                "Select a volume that was reconstructed here."
            )
            return
        layer = asked or next(reversed(phases), None)
        if layer is None:
            show_warning("There is no volume to check: run a reconstruction.")
            return
        device = self.volume.values()["device"]
        self.session.run(DataConsistencyJob(scan=scan.path, options=scan.options, device=device), layer)

    def _pause(self) -> None:
        if self.session.state == "paused":
            self.session.resume()
        else:
            self.session.pause()

    # -- PADMM -----------------------------------------------------------------------------------------------------

    @property
    def padmm(self) -> ModelForm[Any]:
        """The form of PADMM."""
        return self.forms[METHODS.index(PADMMParameters)]

    @property
    def tuning(self) -> bool:
        """Whether a PADMM runs, whose parameters can be changed."""
        job = self.session.job
        runs = self.session.state in ("running", "paused")
        return runs and isinstance(job, ReconstructionJob) and isinstance(job.parameters, PADMMParameters)

    def _list_layers(self, event: object = None) -> None:
        """Offer the viewer's volumes in mm as starts, and keep to what was chosen."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            combo = self.padmm.editors["start"].widget
            assert isinstance(combo, QComboBox)
            chosen = self.padmm.values()["start"]
            layers, scan = self.viewer.layers, self.session.scan
            mri = scan is not None and scan.kind == "mri"
            there = [x.name for x in layers if (phase_of(x, layers) if mri else can_be_judged_on(x))]
            combo.blockSignals(True)
            for i in reversed(range(combo.count())):
                if combo.itemText(i).startswith(LAYER):
                    combo.removeItem(i)
            for name in there:
                combo.insertItem(combo.findText(BROWSE), LAYER + name)
            gone = chosen.startswith(LAYER) and chosen.removeprefix(LAYER) not in there
            # Amid a run it is what the run began with, and nothing to change.
            self.padmm.editors["start"].put(STARTS[0] if gone and not self.tuning else chosen)
            combo.blockSignals(False)

    def _tune(self) -> None:
        """Send what was edited on to the run."""
        with contextlib.suppress(ValidationError):  # what is typed may be no parameters yet
            parameters = self.padmm.value()
            self.session.tune(parameters, start_layer(parameters, self.viewer.layers))

    def _forget_runs(self) -> None:
        self.session.forget_runs()
        self._show_curves()

    def _show_curves(self, at_once: bool = True) -> None:
        session = self.session
        self.curve.show_runs(session.curve_label, session.curve, session.runs, at_once)

    # -- what other docks hand over --------------------------------------------------------------------------------

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
            if scan is not None and scan.kind == "mri":
                sentences = outside_training_of_mri(header.training, scan.acceleration, scan.grid.shape)
            elif scan is not None:
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
        if self.tuning:
            self._tune()
        super()._ask_for_plan()
        self.sweep.refresh()

    # -- showing ---------------------------------------------------------------------------------------------------

    def _show_state(self, state: str) -> None:
        self.pause.setEnabled(self.mine and state in ("running", "paused"))
        self.pause.setText("Resume" if state == "paused" and self.mine else "Pause")
        for widget in (self.method, self.volume):
            widget.setEnabled(state == "idle")
        self.parameters.setEnabled(state == "idle" or self.tuning)
        for name, editor in self.padmm.editors.items():
            editor.widget.setEnabled(state == "idle" or name in PADMMParameters.TUNABLE)
        scan = self.session.scan
        for button in (self.check, *self.suggest):
            button.setEnabled(state == "idle" and scan is not None)
        self.resolution.setEnabled(state == "idle" and scan is not None and scan.kind == "x-ray")
        self.sweep.show_state(state)
        super()._show_state(state)

    def _show_progress(self, _: object = None) -> None:
        super()._show_progress()
        if isinstance(self.session.job, SweepJob) and self.session.state == "running":
            self._show_sweep(self.session.job)
        if self.mine and self.session.state != "idle":
            self._show_curves(at_once=False)

    def _show_sweep(self, job: SweepJob) -> None:
        """How far a sweep is in all."""
        progress, display = self.session.progress, self.session.sweep
        rows = [] if display is None else display.rows
        words, part = [f"value {min(len(rows) + 1, len(job.values))} of {len(job.values)}", self.session.stage], 0.0
        if progress is not None and progress.name != "sweep":
            part = progress.step / max(1, progress.total)
            words.append(f"step {progress.step} of {progress.total}")
        if rows:
            mean = sum(row.get("seconds", 0.0) for row in rows) / len(rows)
            words.append(f"{duration(mean * max(0.0, len(job.values) - len(rows) - part))} left")
        self.progress.setRange(0, 100 * len(job.values))
        self.progress.setValue(round(100 * (len(rows) + part)))
        self.status.setText(", ".join(words))

    def _show_strip(self) -> None:
        """Scroll to where the pictures of a sweep come."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            self.ensureWidgetVisible(self.sweep.said, 0, 8)

    def _show_end(self, message: object) -> None:
        super()._show_end(message)
        if not self.mine:
            return
        if isinstance(message, Finished) and isinstance(self.session.job, RegularizationJob):
            if self._suggestion_for is not None:
                self._suggestion_for.editors["regularization"].put(message.figures["regularization"])
        else:
            self._show_curves()

    def _words_at_the_end(self, message: object) -> list[str]:
        words = super()._words_at_the_end(message)
        if isinstance(message, Finished) and isinstance(self.session.job, DataConsistencyJob):
            return [consistency_sentence(message.figures)]
        if isinstance(message, Finished) and isinstance(self.session.job, RegularizationJob):
            return [message.provenance["suggestion"]["sentence"]]
        if isinstance(message, Finished) and isinstance(self.session.job, SweepJob):
            best = message.figures.get("best")
            words[1:1] = [] if best is None else [f"best PSNR with {best:g}"]
            return words
        if isinstance(message, Finished) and isinstance(self.session.job, ResolutionJob):
            return [message.provenance["resolution"]["sentence"].rstrip("."), *words[1:]]
        if isinstance(message, Finished):
            found = [(label, form, message.figures[n]) for n, (label, form) in FIGURES.items() if n in message.figures]
            words[1:1] = [f"{label} {form.format(value)}" for label, form, value in found]
        return words


def consistency_sentence(figures: dict[str, float]) -> str:
    """What the figures of a DataConsistencyJob say, for a person."""
    said = f"‖Ax − y‖ / ‖y‖ = {figures.get('residual', 0):.3g}"
    ratio = figures.get("residual_to_noise")
    if ratio is None:
        return said + "; the noise of so few data cannot be told."
    said += f", {ratio:.2f} times the noise"
    part = "view" if "worst_view" in figures else "coil"
    if ratio > 1.2:
        said += f" (at most {figures[f'worst_{part}']:.2f} times, in {part} {int(figures[f'worst_{part}_index'])})"
        return said + ": where the residual has shapes, volume and data differ."
    # Several coils see every voxel more than once: the best of volumes has their residual well below the noise.
    overfit = 0.8 if part == "view" else 0.6
    return said + ": " + ("the volume fits the noise too." if ratio < overfit else "the volume explains the data.")
