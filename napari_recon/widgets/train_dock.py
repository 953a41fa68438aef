"""The *Train* dock: say what is trained on, what, and how long; watch it learn; stop when it is good enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.utils.notifications import show_error, show_info
from pydantic import ValidationError
from qtpy.QtCore import QRectF, QSize, Qt
from qtpy.QtGui import QColor, QImage, QPainter, QPaintEvent
from qtpy.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QSizePolicy,
    QSlider,
    QVBoxLayout,
    QWidget,
)

from napari_recon.jobs.job import TrainJob
from napari_recon.learning.training import (
    DataConfig,
    MethodConfig,
    NetworkConfig,
    OptimisationConfig,
    TrainingConfig,
    ValidationConfig,
    checkpoint_path,
    read_config,
    write_config,
)
from napari_recon.scans.errors import ScanError
from napari_recon.widgets.curve import Curve
from napari_recon.widgets.forms import ModelForm, with_browse
from napari_recon.widgets.job_dock import DEVICES, JobDock, button_row, make_button
from napari_recon.widgets.style import colour, note, section
from napari_recon.widgets.training_display import NAMES

if TYPE_CHECKING:
    import napari.viewer
    from numpy.typing import NDArray

TABLES = {
    "data": DataConfig,
    "network": NetworkConfig,
    "method": MethodConfig,
    "optimisation": OptimisationConfig,
    "validation": ValidationConfig,
}
"""The configuration's tables, each a form."""
SECTIONS = {
    "Data": ("data",),
    "Network and method": ("network", "method"),
    "Optimisation": ("optimisation",),
    "Validation, seed and device": ("validation", ""),
}
"""The dock's sections: title -> tables, "" being what belongs to none."""
CONFIGURATIONS = "Configuration (*.toml)"
WEIGHTS = "Weights (*.safetensors)"


class TrainDock(JobDock):
    """Trains networks in the session's process; it needs no scan."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__(napari_viewer, TrainJob)
        self.viewer = self.session.viewer
        self.volume.setParent(self)  # an empty form: a training has no grid
        self.volume.hide()
        layout = self.content
        self.subject.setText("<b>Training</b>")
        self.open = make_button("Open …", "Show a CONFIG.toml, as the command line takes it.", self._ask_for_config)
        self.save = make_button("Save …", "Write what the forms show as CONFIG.toml.", self._ask_where_to_save)
        head = QHBoxLayout()
        head.addWidget(self.subject, 3)
        head.addLayout(button_row(self.open, self.save), 2)
        layout.addLayout(head)
        self.summary = QLabel()
        self.summary.setWordWrap(True)
        layout.addWidget(self.summary)

        self.forms: dict[str, ModelForm] = {name: ModelForm(model) for name, model in TABLES.items()}
        self.forms[""] = ModelForm(TrainingConfig, skip=tuple(TABLES), choices={"device": DEVICES})
        self.sections = []
        for title, tables in SECTIONS.items():
            inside = QWidget()
            column = QVBoxLayout(inside)
            column.setContentsMargins(0, 0, 0, 0)
            column.setSpacing(4)
            for name in tables:
                column.addWidget(self.forms[name])
                self.forms[name].changed.connect(self._edited)
            self.sections.append(section(title, inside))
            layout.addWidget(self.sections[-1])

        layout.addLayout(self._output_part())
        layout.addWidget(self.memory)
        self.run.setText("Train")
        self.run.setToolTip("Train with this configuration; stopped training goes on.")
        self.finish.setText("Stop")
        self.finish.setToolTip("Stop after the current step; the best weights and a checkpoint are kept.")
        self.cancel.setToolTip("Stop, and leave the weights' file as it was before.")
        self.pause = make_button("Pause", "Wait after the current step.", self._pause)
        layout.addLayout(button_row(self.run, self.pause, self.finish, self.cancel))
        layout.addWidget(self.progress)
        layout.addWidget(self.status)
        self.loss = Curve({"loss": "loss, smoothed"}, height=96)
        self.psnr = Curve({"psnr": "validation PSNR in dB", "start_psnr": "its start"}, height=104)
        layout.addWidget(self.loss)
        layout.addWidget(self.psnr)
        layout.addWidget(self._validation_part())
        layout.addStretch(1)
        self._follow()
        self._show_training()

    def _output_part(self) -> QFormLayout:
        """Where the weights go, and whether what is there is gone on with."""
        self.output = QLineEdit()
        self.output.setPlaceholderText("asked for when training starts")
        self.output.setToolTip("The best weights so far are always in this file (.safetensors).")
        self.output.textChanged.connect(self._edited)
        self.anew = QCheckBox("Begin anew")
        self.anew.setToolTip("Forget the checkpoint of a training that was stopped, rather than go on from it.")
        rows = QFormLayout()
        rows.setContentsMargins(0, 0, 0, 0)
        rows.addRow("Weights to", with_browse(self.output, self._ask_for_output))
        rows.addRow("", self.anew)
        return rows

    def _validation_part(self) -> QWidget:
        """The validation patch beside its truth, and what can be done with the weights."""
        self.validation = QWidget()
        inside = QVBoxLayout(self.validation)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(4)
        self.verdict = QLabel()
        self.verdict.setWordWrap(True)
        self.pictures = PatchPictures()
        self.slice = QSlider(Qt.Orientation.Horizontal)
        self.slice.setToolTip("The slice that is shown.")
        self.slice.valueChanged.connect(self.pictures.show_slice)
        self.in_viewer = make_button("Show in viewer", "Make layers of them, side by side.", self._show_layers)
        self.use = make_button("Use in Reconstruct", "Reconstruct with the weights that were trained.", self._use)
        for widget in (self.pictures, self.slice, self.verdict):
            inside.addWidget(widget)
        inside.addLayout(button_row(self.in_viewer, self.use))
        return self.validation

    # -- the job ---------------------------------------------------------------------------------------------------

    def config(self) -> TrainingConfig:
        """The configuration that the forms show.

        Raises
        ------
        pydantic.ValidationError
            If what was typed makes none.
        """
        tables = {name: form.values() for name, form in self.forms.items() if name}
        return TrainingConfig.model_validate(tables | self.forms[""].values())

    def show_config(self, config: TrainingConfig) -> None:
        """Show a configuration in the forms."""
        for name, form in self.forms.items():
            form.set_value(getattr(config, name) if name else config)

    def job(self) -> TrainJob:
        """The job that the forms describe.

        Raises
        ------
        pydantic.ValidationError
            If what was typed makes no job.
        """
        output = Path(self.output.text().strip() or "weights.safetensors").expanduser()
        return TrainJob(training=self.config(), output=output, resume=not self.anew.isChecked())

    def _run(self) -> None:
        if not self.output.text().strip():
            self._ask_for_output()
        if not self.output.text().strip():
            return
        try:
            job = self.job()
        except ValidationError:
            self._ask_for_plan()  # which says what is wrong
            return
        for part in self.sections:
            part.collapse(animate=False)
        self.session.run(job)
        self.anew.setChecked(False)  # stopped, this training is to go on
        self._show_training()

    def _pause(self) -> None:
        if self.session.state == "paused":
            self.session.resume()
        else:
            self.session.pause()

    def _ask_for_output(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Weights to write", self.output.text(), WEIGHTS)
        if path:
            self.output.setText(str(Path(path).with_suffix(".safetensors")))

    def _ask_for_config(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Open a configuration", "", CONFIGURATIONS)
        if not path:
            return
        try:
            config = read_config(path)
        except ScanError as error:
            show_error(str(error))
            return
        self.show_config(config)
        self.subject.setText(f"<b>{Path(path).name}</b>")
        self.subject.setToolTip(path)

    def _ask_where_to_save(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the configuration", "", CONFIGURATIONS)
        if not path:
            return
        file = Path(path).with_suffix(".toml")
        try:
            write_config(self.config(), file)
        except (ScanError, ValidationError) as error:
            show_error(str(error) if isinstance(error, ScanError) else _sentence(error))
            return
        self.subject.setText(f"<b>{file.name}</b>")
        self.subject.setToolTip(str(file))
        show_info(f"The configuration was written to {file}.")

    def _show_layers(self) -> None:
        if self.session.training is not None:
            self.session.training.show_layers()

    def _use(self) -> None:
        self.session.use_weights()
        frame, dock = self.viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct", tabify=True)
        frame.show()
        frame.raise_()
        dock.setFocus()

    # -- showing ---------------------------------------------------------------------------------------------------

    def _show_scan(self) -> None:
        """Training needs no scan: what changes with one is nothing here."""
        self._edited()
        self._show_state(self.session.state)

    def _show_subject(self) -> None:
        pass

    def _ask_for_plan(self) -> None:
        there = checkpoint_path(self.output.text().strip() or "weights.safetensors")
        self.anew.setVisible(bool(self.output.text().strip()) and there.expanduser().exists())
        if self.anew.isHidden():
            self.anew.setChecked(False)
        try:
            self.summary.setText(note(_summary(self.config())))
        except ValidationError:
            self.summary.setText("")
        super()._ask_for_plan()

    def _show_state(self, state: str) -> None:
        idle = state == "idle"
        for widget in (*self.forms.values(), self.output, self.anew, self.open):
            widget.setEnabled(idle)
        super()._show_state(state)
        self.run.setEnabled(idle and (self._plan is None or self._plan.fits))
        self.pause.setEnabled(self.mine and state in ("running", "paused"))
        self.pause.setText("Resume" if state == "paused" and self.mine else "Pause")
        self._show_buttons()

    def _show_buttons(self) -> None:
        training = self.session.training
        self.in_viewer.setEnabled(training is not None and "validation" in training.volumes)
        self.use.setEnabled(self.session.state == "idle" and training is not None and training.output is not None)

    def _show_progress(self, _: object = None) -> None:
        super()._show_progress()
        if self.mine and self.session.state != "idle":
            self._show_training()

    def _show_end(self, message: object) -> None:
        super()._show_end(message)
        self._show_training(at_once=True)

    def _show_training(self, at_once: bool = False) -> None:
        """Curves, pictures and figures of the session's training."""
        training = self.session.training
        for curve in (self.loss, self.psnr):
            if training is None or not any(name in training.curve for name in curve.names):
                curve.clear()
            else:
                curve.show_figures(training.curve, at_once=at_once)
        seen = training is not None and "validation" in training.volumes
        self.validation.setVisible(seen)
        if training is None or not seen:
            self.pictures.clear()
            return
        if self.pictures.show_volumes(training.volumes, training.validated):
            n = len(training.volumes["validation"])
            self.slice.setRange(0, n - 1)
            self.slice.setValue(n // 2)
        self.verdict.setText(_verdict(training.figures, training.validated, training.output))
        self._show_buttons()


class PatchPictures(QWidget):
    """A slice of the start, of what was trained so far, and of the truth, side by side with the same grey levels."""

    GAP, CAPTION = 4, 16

    def __init__(self) -> None:
        super().__init__()
        policy = QSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)
        self.volumes: dict[str, NDArray[np.float32]] = {}
        self.step, self.index = 0, 0
        self._high = 1.0

    def hasHeightForWidth(self) -> bool:
        """The pictures are square."""
        return True

    def heightForWidth(self, width: int) -> int:
        """As high as a picture is wide, and a line for what it is."""
        return self._edge(width) + self.CAPTION

    def sizeHint(self) -> QSize:
        """Three pictures that fit beside the canvas."""
        return QSize(360, self.heightForWidth(360))

    def minimumSizeHint(self) -> QSize:
        """Small: the dock decides."""
        return QSize(120, self.heightForWidth(120))

    def _edge(self, width: int) -> int:
        count = max(2, len(self.volumes))
        return (width - (count - 1) * self.GAP) // count

    def clear(self) -> None:
        """Forget the last training's patch."""
        self.volumes = {}
        self.update()

    def show_volumes(self, volumes: dict[str, NDArray[np.float32]], step: int) -> bool:
        """Show volumes (p, p, p) by name, as they are after a step; whether they are of another patch than before."""
        other = self.volumes.get("validation") is not volumes["validation"]
        self.volumes, self.step = dict(volumes), step
        if other:
            self._high = float(np.quantile(volumes.get("truth", volumes["validation"]), 0.999)) or 1.0
        self.updateGeometry()
        self.update()
        return other

    def show_slice(self, index: int) -> None:
        """Show another slice."""
        self.index = index
        self.update()

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Paint the three slices and what they are."""
        if not self.volumes:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        font = painter.font()
        font.setPixelSize(11)
        painter.setFont(font)
        painter.setPen(QColor(colour("text")))
        edge = self._edge(self.width())
        middle = Qt.AlignmentFlag.AlignHCenter | Qt.AlignmentFlag.AlignVCenter
        for i, name in enumerate(name for name in NAMES if name in self.volumes):
            left = i * (edge + self.GAP)
            frame = QRectF(left, self.CAPTION, edge, edge)
            words = f"after step {self.step}" if name == "validation" else NAMES[name]
            painter.drawText(QRectF(left, 0, edge, self.CAPTION), middle, words)
            volume = self.volumes[name]
            painter.drawImage(frame, self._image(volume[min(self.index, len(volume) - 1)]))
        painter.end()

    def _image(self, plane: NDArray[np.float32]) -> QImage:
        grey = np.clip(plane * (255 / self._high), 0, 255).astype(np.uint8)
        rows, columns = grey.shape
        return QImage(grey.tobytes(), columns, rows, columns, QImage.Format.Format_Grayscale8).copy()


def _summary(config: TrainingConfig) -> str:
    """What is trained on what, in a sentence."""
    data, method, optimisation = config.data, config.method, config.optimisation
    views = f"{', '.join(map(str, data.views))} views" if data.views else "all views"
    if data.scans is not None:
        how = "with their references" if data.supervision == "reference" else "without references"
        source = f"The scans of {data.scans.name}, {views}, {how}"
    elif data.folder is not None:
        source = f"Up to {data.count} volumes of {data.folder.name}, as {data.size}³ voxels, {views}"
    else:
        source = f"{data.count} synthetic volumes of {data.size}³ voxels, {views}"
    where = f"unrolled {method.iterations} times" if method.name == "unrolled" else f"after {method.start}"
    whole = data.scans is not None and data.supervision == "splitting"
    count = optimisation.batch * optimisation.accumulation
    one, many = ("whole volume", "whole volumes") if whole else ("patch", "patches")
    each = f"{count} {many if count > 1 else one}" + ("" if whole else f" of {optimisation.patch}³ voxels")
    network = f"the {config.network.name} network, {where}"
    return f"{source}; {network}; {optimisation.steps} steps of {each}."


def _verdict(figures: dict[str, float], step: int, output: str | None) -> str:
    """What validation found, and where the best weights are."""
    if "psnr" not in figures:
        return ""
    gain = figures["best_psnr"] - figures["start_psnr"]
    shade = "#7bc96f" if gain > 0 else colour("warning")
    words = (
        f"<span style='font-size: 16pt; color: {shade}'>{gain:+.2f} dB</span> at best over its start, "
        f"{figures['best_psnr']:.2f} against {figures['start_psnr']:.2f} dB"
    )
    details = f"{figures['psnr']:.2f} dB after step {step}."
    if output is not None:
        details += f" The best weights are in {Path(output).name}."
    return f"{words}<br>{note(details)}"


def _sentence(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}; change it and try again."
