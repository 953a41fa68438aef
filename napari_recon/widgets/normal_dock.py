"""The *Normal operator* dock: fit H ≈ AᵀA, see m, λ and the error, and what the approximation changes on a patch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from napari.layers import Image
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QGridLayout,
    QLabel,
    QSizePolicy,
    QSlider,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from napari_recon.jobs.job import FitParameters, OperatorJob, PatchJob
from napari_recon.widgets.curve import Curve
from napari_recon.widgets.filter_panel import FilterPanel
from napari_recon.widgets.forms import ModelForm
from napari_recon.widgets.job_dock import JobDock, button_row, duration, make_button
from napari_recon.widgets.operator_displays import FITTED, can_be_judged_on
from napari_recon.widgets.style import colour, note, section

if TYPE_CHECKING:
    import napari.viewer

BASIC = ("terms", "distribution", "probes", "iterations")
"""Parameters of the fit that are always shown."""
LINES = {"loss": "training", "held_out": "held out", "image": "image-like"}
"""The errors of a fit that are drawn, and what they are called."""
GOOD, POOR = 0.05, 0.15
"""Relative errors on x below which H is as good as AᵀA, and above which it is not to be trusted."""
LIVE = 200
"""Milliseconds between two looks at λ while it is fitted."""
FILES = "Normal operator (*.safetensors)"


class NormalOperatorDock(JobDock):
    """Fits and judges the normal operator of the session's scan."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__(napari_viewer, OperatorJob, PatchJob)
        self.viewer = self.session.viewer
        layout = self.content
        layout.addWidget(self.subject)

        more = [name for name in FitParameters.model_fields if name not in BASIC]
        self.basic: ModelForm[FitParameters] = ModelForm(FitParameters, skip=more)
        self.more: ModelForm[FitParameters] = ModelForm(FitParameters, skip=BASIC)
        self.judged_on = QComboBox()
        self.judged_on.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.judged_on.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.judged_on.setToolTip("The volume x that AᵀA x and H x are compared on: FDK, or a layer in mm.")
        rows = self.basic.layout()
        assert isinstance(rows, QFormLayout)
        rows.addRow("Judged on", self.judged_on)
        layout.addWidget(self.basic)
        folded = QWidget()
        inside = QVBoxLayout(folded)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.addWidget(self.more)
        inside.addWidget(self.volume)
        layout.addWidget(section("More, volume and device", folded))
        layout.addWidget(self.memory)

        self.run.setText("Fit")
        self.run.setToolTip("Fit m and λ to this scan; a fit that was made before is shown again.")
        self.load = make_button("Load …", "Show an operator that was saved.", self._ask_for_operator)
        layout.addLayout(button_row(self.run, self.finish, self.cancel, self.load))
        layout.addWidget(self.progress)
        layout.addWidget(self.status)

        self.curve = Curve(LINES, height=104)
        layout.addWidget(self.curve)
        self.filter = FilterPanel()
        layout.addWidget(self.filter)
        layout.addWidget(self._result_part())
        layout.addWidget(self._patch_part())
        layout.addStretch(1)

        for form in (self.basic, self.more):
            form.changed.connect(self._edited)
        self.more.changed.connect(self._show_real_filter)
        self._live = QTimer(self)
        self._live.setSingleShot(True)
        self._live.setInterval(LIVE)
        self._live.timeout.connect(self._show_filter)
        session = self.session
        session.operator_changed.connect(self._show_operator)
        session.place_changed.connect(self._show_patch)
        session.step_shown.connect(self._show_step)
        layers = self.viewer.layers.events
        for event in (layers.inserted, layers.removed, layers.moved):
            event.connect(self._list_layers)
        self._list_layers()
        self._show_real_filter()
        self._follow()
        self._show_operator()

    def _result_part(self) -> QWidget:
        """What came out, and what can be done with it."""
        self.result = QWidget()
        inside = QVBoxLayout(self.result)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(4)
        self.verdict = QLabel()
        self.verdict.setWordWrap(True)
        self.verdict.setTextFormat(Qt.TextFormat.RichText)
        inside.addWidget(self.verdict)
        self.figure = make_button(
            "Paper's figure", "x, AᵀAx, Hx / λ, m, squared error, side by side.", self._show_figure
        )
        self.regions = make_button("Where is the error", "The relative error of every region.", self._show_regions)
        self.spectrum = make_button("λ with axes", "λ alone, with its axes in 1/mm.", self._show_spectrum)
        self.use = make_button("Use in Reconstruct", "TV then takes its data steps with this H.", self._use)
        self.save = make_button("Save …", "Keep the operator in a file.", self._ask_where_to_save)
        self.save_figure = make_button("Save figure …", "Write the paper's figure as PNG.", self._ask_for_figure)
        grid = QGridLayout()
        grid.setSpacing(4)
        buttons = (self.figure, self.regions, self.spectrum, self.use, self.save, self.save_figure)
        for i, button in enumerate(buttons):
            grid.addWidget(button, i // 3, i % 3)
            grid.setColumnStretch(i % 3, 1)
            button.setStyleSheet("padding: 4px 2px")  # three long words beside each other
        inside.addLayout(grid)
        return self.result

    def _patch_part(self) -> QWidget:
        """The what-if: gradient steps on one patch, exact and with H."""
        self.patch = QWidget()
        inside = QVBoxLayout(self.patch)
        inside.setContentsMargins(0, 4, 0, 0)
        inside.setSpacing(4)
        self.what_if = QLabel()
        self.what_if.setWordWrap(True)
        inside.addWidget(self.what_if)
        skip = [name for name in PatchJob.model_fields if name not in ("patch", "steps")]
        self.patch_form: ModelForm[PatchJob] = ModelForm(PatchJob, skip=skip, parent=self.patch)
        self.patch_form.hide()  # its two editors stand in a row of their own
        spins = [self.patch_form.editors[name].widget for name in ("patch", "steps")]
        for spin, text in zip(spins, ("patch ", "steps "), strict=True):
            assert isinstance(spin, QSpinBox)
            spin.setPrefix(text)
        inside.addLayout(button_row(*spins))
        self.compare = make_button(
            "Compare here", "Take gradient steps on this patch, with AᵀA and with H.", self._compare
        )
        self.back = make_button("Back", "Show again what was shown before.", self._leave_patch)
        inside.addLayout(button_row(self.compare, self.back))
        self.steps = QSlider(Qt.Orientation.Horizontal)
        self.steps.setToolTip("The step that is shown. Move it and it is computed, where it has not been yet.")
        self.steps.setRange(0, self.patch_form.values()["steps"])
        self.steps.valueChanged.connect(self._move_step)
        self.patch_form.changed.connect(self._show_patch)
        inside.addWidget(self.steps)
        self.step = QLabel()
        self.step.setWordWrap(True)
        inside.addWidget(self.step)
        return self.patch

    # -- the jobs --------------------------------------------------------------------------------------------------

    def job(self) -> OperatorJob | None:
        """The fit that the form describes; None without a scan."""
        return self._operator_job("fit")

    def _operator_job(self, operator: str) -> OperatorJob | None:
        scan = self.session.scan
        if scan is None:
            return None
        parameters = FitParameters(**self.basic.values(), **self.more.values())
        return OperatorJob(
            scan=scan.path, options=scan.options, operator=operator, parameters=parameters, **self.volume.values()
        )

    def _run(self) -> None:
        self._start("fit")

    def _start(self, operator: str) -> None:
        job = self._operator_job(operator)
        if job is not None:
            self.session.run(job, self.judged_on.currentData())

    def _ask_for_operator(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Load a normal operator", "", FILES)
        if path:
            self._start(path)

    def _ask_where_to_save(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the normal operator", "", FILES)
        if path:
            self.session.save_operator(Path(path).with_suffix(".safetensors"))

    def _ask_for_figure(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the figure", "", "PNG (*.png)")
        if path:
            self.session.save_figure(Path(path).with_suffix(".png"))

    def _use(self) -> None:
        self.session.use_operator()
        frame, dock = self.viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct", tabify=True)
        frame.show()
        frame.raise_()
        dock.setFocus()

    def _show_figure(self) -> None:
        if self.session.operator is not None:
            self.session.operator.show_figure()

    def _show_regions(self) -> None:
        if self.session.operator is not None:
            self.session.operator.show_regions()

    def _show_spectrum(self) -> None:
        if self.session.operator is not None:
            self.session.operator.show_filter()

    # -- the fit ---------------------------------------------------------------------------------------------------

    def _list_layers(self, event: object = None) -> None:
        """Offer FDK and the viewer's volumes in mm, and keep to what was chosen."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            chosen = self.judged_on.currentData()
            self.judged_on.blockSignals(True)
            self.judged_on.clear()
            self.judged_on.addItem("FDK of this scan")
            for layer in self.viewer.layers:
                if isinstance(layer, Image) and can_be_judged_on(layer):
                    self.judged_on.addItem(layer.name, layer)
                    if layer is chosen:
                        self.judged_on.setCurrentIndex(self.judged_on.count() - 1)
            self.judged_on.blockSignals(False)

    def _show_real_filter(self) -> None:
        self.more.editors["real_filter"].widget.setEnabled(not self.more.values()["symmetric"])

    def _show_state(self, state: str) -> None:
        idle = state == "idle"
        for widget in (self.basic, self.more, self.volume):
            widget.setEnabled(idle)
        self.load.setEnabled(idle and self.session.scan is not None)
        super()._show_state(state)
        self._show_operator()

    def _show_progress(self, _: object = None) -> None:
        super()._show_progress()
        session = self.session
        if session.state == "idle" or session.progress is None:
            return
        if isinstance(session.job, PatchJob):
            self._show_patch()
        elif isinstance(session.job, OperatorJob) and session.operator is not None:
            self.curve.show_figures(session.operator.curve)
            if session.progress.name in FITTED and not self._live.isActive():
                self._live.start()

    def _show_filter(self) -> None:
        operator = self.session.operator
        if operator is not None and "filter" in operator.volumes:
            self.filter.show_filter(operator.volumes["filter"], operator.ready["filter"])

    def _show_end(self, message: object) -> None:
        super()._show_end(message)
        self._show_operator()

    def _show_operator(self) -> None:
        """Everything below the form, as the session's operator is."""
        operator, idle = self.session.operator, self.session.state == "idle"
        done = operator is not None and bool(operator.figures) and operator.file is not None
        if operator is None:
            self.curve.clear()
            self.filter.clear()
        else:
            if operator.curve:
                self.curve.show_figures(operator.curve, at_once=done)
            else:
                self.curve.clear()
            if "filter" in operator.volumes:
                self._show_filter()
            else:
                self.filter.clear()
        self.result.setVisible(done)
        self.patch.setVisible(done)
        if operator is not None and done:
            self.verdict.setText(self._sentences(operator.figures, operator.complete))
            self.figure.setEnabled(operator.shows_figure)
            self.regions.setEnabled("regions" in operator.layers)
            self.spectrum.setEnabled("filter" in operator.layers)
            for button in (self.use, self.save, self.compare):
                button.setEnabled(idle)
            self._show_patch()

    def _sentences(self, figures: dict[str, float], complete: bool) -> str:
        """What the figures say, the error on x first."""
        operator = self.session.operator
        assert operator is not None
        on = "this FDK" if operator.x is None else operator.x
        error = figures.get("relative_error", float("nan"))
        shade = colour("error") if error > POOR else colour("warning") if error > GOOD else "#7bc96f"
        lines = [
            f"<span style='font-size: 11pt'>H is <span style='font-size: 20pt; color: {shade}'>{100 * error:.2g} %"
            f"</span> off on {on}</span>"
        ]
        if error <= GOOD:
            meaning = "Good: patch steps with H hardly differ from exact ones."
        elif error <= POOR:
            meaning = "Usable: right in the large; compare a patch below before you trust detail."
        else:
            meaning = "Coarse: use three kernels or other random volumes, or the exact data step."
        lines.append(meaning if complete else f"{meaning} (The fit was finished early.)")
        others = [
            f"{label} {100 * figures[name]:.2g} %"
            for name, label in (("white", "white noise"), ("image", "images"), ("residual", "patch residuals"))
            if name in figures
        ]
        if "worst_region" in figures:
            others.insert(0, f"worst region {100 * figures['worst_region']:.2g} %")
        if others:
            lines.append(note("Off by: " + ", ".join(others) + "."))
        exact, fast = figures.get("seconds_exact"), figures.get("seconds_approximate")
        if exact and fast:
            times = f"AᵀA x takes {duration(exact)}, H x {duration(fast)}: {exact / fast:.2g} times faster."
            lines.append(note(times))
        return "<br>".join(lines)

    # -- the what-if -----------------------------------------------------------------------------------------------

    def patch_job(self) -> PatchJob | None:
        """The what-if at the place that the person chose; None without an operator."""
        operator = self.session.operator
        if operator is None or operator.file is None or "x" not in operator.ready:
            return None
        job = operator.job
        return PatchJob(
            scan=job.scan,
            options=job.options,
            shape=job.shape,
            voxel_size=job.voxel_size,
            device=job.device,
            operator=operator.file,
            center=self.session.place,
            **self.patch_form.values(),
        )

    def _compare(self) -> None:
        job = self.patch_job()
        if job is not None:
            self.session.run(job)

    def _leave_patch(self) -> None:
        if self.session.patch is not None:
            self.session.patch.leave()
        self._show_patch()

    def _move_step(self, step: int) -> None:
        """Show a step; where it was not computed for this place and patch yet, compute it."""
        patch, session = self.session.patch, self.session
        wanted = self.patch_job()
        if session.state == "idle" and wanted is not None:
            same = {"patch", "steps", "operator"}
            if (
                patch is None
                or not patch.layers
                or session.place_moved
                or patch.job.model_dump(include=same) != wanted.model_dump(include=same)
            ):
                session.run(wanted)
                return
        if patch is not None and patch.layers:
            if not patch.shown_now:
                patch.arrange()
            patch.step = step
            self._show_step(patch.step)

    def _show_step(self, step: int) -> None:
        """The viewer shows another step: the slider follows, and the label says what it means."""
        patch = self.session.patch
        if patch is None or not patch.layers:
            return
        self.steps.blockSignals(True)
        self.steps.setRange(0, patch.job.steps)
        self.steps.setValue(step)
        self.steps.blockSignals(False)
        figures = patch.steps.get(step)
        if step == 0:
            self.step.setText("before the first step: FDK in both")
        elif figures is None:
            self.step.setText(f"step {step} is not there yet")
        else:
            words = f"after {step} step{'s' if step > 1 else ''}: H is {100 * figures['difference']:.2g} % off"
            if (speedup := figures.get("speedup")) is not None:
                words += f", {speedup:.2g}× faster"
            self.step.setText(words)

    def _show_patch(self) -> None:
        """The what-if's line: where it is made, and what of it there is."""
        session, patch = self.session, self.session.patch
        if session.operator is None or "x" not in session.operator.ready:
            return
        z, y, x = (round(c) for c in session.place)
        chosen = "chosen by your click" if session.clicked else "click into a volume for another"
        self.what_if.setText(
            "<b>What if</b> a patch took its gradient steps with H?<br>"
            + note(f"Around voxel z {z}, y {y}, x {x} ({chosen}).")
        )
        if session.clicked:
            session.operator.mark(session.place, self.patch_form.values()["patch"])
        self.back.setEnabled(patch is not None and patch.shown_now)
        if patch is not None and patch.layers:
            self._show_step(patch.step)
        else:
            self.steps.blockSignals(True)
            self.steps.setRange(0, self.patch_form.values()["steps"])
            self.steps.blockSignals(False)
            self.step.setText(note("Compare here, or move the slider."))
