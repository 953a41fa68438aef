"""The part *Try values* of the Reconstruct dock: one parameter over some values, seen at the cursor and measured."""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from napari.layers import Image
from pydantic import BaseModel, ValidationError
from qtpy.QtCore import QRectF, Qt, QTimer, Signal
from qtpy.QtGui import QColor, QMouseEvent, QPainter, QPaintEvent, QPen, QResizeEvent
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QSizePolicy,
    QSpinBox,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from napari_recon.jobs.job import SWEPT, ReconstructionJob, SweepJob
from napari_recon.jobs.volumes import ENDINGS
from napari_recon.scans.errors import ScanError
from napari_recon.widgets import layers as shown
from napari_recon.widgets.compare_plots import Loupe, around
from napari_recon.widgets.curve import COLOURS, Curve
from napari_recon.widgets.displays import LAYER
from napari_recon.widgets.forms import BROWSE, WheelGuard
from napari_recon.widgets.job_dock import make_button
from napari_recon.widgets.operator_displays import can_be_judged_on
from napari_recon.widgets.style import colour, note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_recon.jobs.memory import MemoryPlan
    from napari_recon.scans.scan import Scan
    from napari_recon.widgets.parts_display import PartsDisplay
    from napari_recon.widgets.session import Session

MEASURES = {"psnr": ("PSNR, dB", max), "ssim": ("SSIM", max), "nrmse": ("NRMSE", min)}
"""What needs something to compare with: its name, and what is best."""
QUICK = 1.5e9
"""Voxels times views times iterations, over all values, that take some ten seconds on a CPU."""
BESIDE = 40
"""What an iteration costs beside projecting, in views."""
MARGIN = 16
"""Slices that are reconstructed beyond those that are asked for, on either side."""
SLICES = 12
"""Slices that are tried on, where it is not the whole volume."""
FOLLOW = 50
"""Milliseconds between two looks at where the cursor is."""


def values_around(parameters: BaseModel, parameter: str, all_views: int, views: int) -> tuple[float, ...]:
    """Values worth trying about the present one: halves and doubles, as far as the parameter can take them.

    Parameters
    ----------
    parameters
        A method's.
    parameter
        One of theirs, or "views".
    all_views, views
        What the scan has, and what is kept of it now.
    """
    if parameter == "views":
        kept = {views, *(all_views // part for part in (8, 4, 2, 1))}
        return tuple(sorted(count for count in kept if count >= 2))
    now = getattr(parameters, parameter)
    tried: set[float]
    if parameter == "passes":
        tried = {now, 1, 2, 3, 5}
    elif parameter == "patch":
        tried = {8 * max(1, round((now or 64) * factor / 8)) for factor in (0.25, 0.5, 1, 2)} | {now or 64}
    elif isinstance(now, float):
        tried = {float(f"{(now or 1e-3) * factor:.3g}") for factor in (0.25, 0.5, 1, 2, 4)} | {now}
    else:
        tried = {round((now or 10) * factor) for factor in (0.25, 0.5, 1, 2, 4)}
    return tuple(sorted(value for value in tried if _can_be(parameters, parameter, value)))


def _can_be(parameters: BaseModel, parameter: str, value: float) -> bool:
    try:
        type(parameters)(**{**parameters.model_dump(), parameter: value})
    except ValidationError:
        return False
    return True


def quick_binning(voxels: int, views: int, steps: int) -> int:
    """The least binning with which so many steps over so many voxels and views take some ten seconds."""
    return next((b for b in (1, 2, 4) if voxels / b**3 * (views + BESIDE) * steps <= QUICK), 8)


def is_geometric(values: Sequence[float]) -> bool:
    """Whether values are spread by factors rather than by steps, so that a logarithmic axis shows them better."""
    low, *_ = ordered = sorted(values)
    if low <= 0:
        return False
    steps = np.diff(ordered)
    return bool(ordered[-1] > 3 * low and (len(steps) < 2 or steps.max() > 1.9 * steps.min()))


class Strip(Loupe):
    """What lies about one place in each result, beside each other; a click says which."""

    HALF = 14
    clicked = Signal(int)

    def __init__(self) -> None:
        super().__init__()
        self.framed: int | None = None
        self.expected = 0
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setToolTip("What lies about the cursor with each value. Click one to take its value.")

    def show_strip(self, pictures: Sequence[tuple[str, Any]], framed: int | None, expected: int) -> None:
        """Show pictures by their captions, one of them with a frame about it, with room for all that will come."""
        self.framed, self.expected = framed, expected
        self.show_pictures(pictures)
        self._fit()

    def heightForWidth(self, width: int) -> int:
        """As many rows as there will be pictures for."""
        return math.ceil(self.expected / self.COLUMNS) * (self._edge(width) + self.CAPTION)

    def _edge(self, width: int) -> int:
        return (width - (self.COLUMNS - 1) * self.GAP) // self.COLUMNS

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        """As tall as all rows of pictures, whatever there is room for: the dock scrolls."""
        super().resizeEvent(event)
        self._fit()

    def _fit(self) -> None:
        self.setFixedHeight(self.heightForWidth(self.width()))

    def place_of(self, index: int) -> QRectF:
        """Where a picture is painted."""
        edge = self._edge(self.width())
        row, column = divmod(index, self.COLUMNS)
        return QRectF(column * (edge + self.GAP), row * (edge + self.CAPTION) + self.CAPTION, edge, edge)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Paint the pictures, and the frame."""
        super().paintEvent(event)
        if self.framed is not None:
            painter = QPainter(self)
            pen = QPen(QColor(COLOURS[0]))
            pen.setWidth(2)
            painter.setPen(pen)
            painter.drawRect(self.place_of(self.framed).adjusted(1, 1, -1, -1))
            painter.end()

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        """Say which picture was clicked."""
        if event is None or event.button() != Qt.MouseButton.LeftButton:
            return
        for index in range(len(self.pictures)):
            if self.place_of(index).adjusted(0, -self.CAPTION, 0, 0).contains(event.position()):
                self.clicked.emit(index)
                return


class SweepPlot(Curve):
    """The residual, and a measure where there is something to compare with, over the parameter."""

    clicked = Signal(float)

    def __init__(self) -> None:
        super().__init__({}, 138)
        bottom, height = 22 / 138, 1 - 42 / 138
        self.right = self.axes.twinx()
        for axes in (self.axes, self.right):
            axes.set_position((0.14, bottom, 0.72, height))
        self.lines = [
            axes.plot([], [], lw=1.5, color=c, marker="o", markersize=4)[0]
            for axes, c in zip((self.axes, self.right), COLOURS, strict=False)
        ]
        self.best = self.right.plot([], [], color=COLOURS[1], marker="*", markersize=11, ls="")[0]
        self.present = self.axes.axvline(np.nan, ls=":", lw=1.2)
        place: dict[str, Any] = {"y": 1.05, "fontsize": 8}
        self.titles = [
            self.axes.text(0.0, s="", color=COLOURS[0], transform=self.axes.transAxes, ha="left", **place),
            self.axes.text(0.5, s="", transform=self.axes.transAxes, ha="center", **place),
            self.axes.text(1.0, s="", color=COLOURS[1], transform=self.axes.transAxes, ha="right", **place),
        ]
        self.values: list[float] = []
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setToolTip("Click a point to take its value. The dotted line is the value in the form.")
        self.mpl_connect("button_press_event", self._pressed)

    def show_sweep(
        self, name: str, rows: Sequence[dict[str, float]], measure: str, present: float | None, best: float | None
    ) -> None:
        """Draw what is told of the values.

        Parameters
        ----------
        name
            The parameter's.
        rows
            ``value``, ``residual`` and measures of each value that is done.
        measure
            Which of :data:`MEASURES` is drawn on the right; empty for none.
        present, best
            The value in the form, and the one with the best measure.
        """
        rows = sorted(rows, key=lambda row: row["value"])
        self.values = [row["value"] for row in rows]
        self.setVisible(bool(rows))
        if not rows:
            return
        for line, axes, key in zip(self.lines, (self.axes, self.right), ("residual", measure), strict=True):
            points = [(row["value"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
            line.set_data([x for x, _ in points], [y for _, y in points])
            heights = [y for _, y in points]
            logarithmic = bool(heights) and min(heights) > 0 and max(heights) > 10 * min(heights)
            axes.set_yscale("log" if logarithmic else "linear")
            if logarithmic:  # plain numbers
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
            axes.set_xscale("log" if is_geometric(self.values) else "linear")
            axes.xaxis.set_minor_locator(NullLocator())
        self.right.set_visible(bool(measure))
        at_best = [row for row in rows if row["value"] == best and measure in row]
        self.best.set_data([row["value"] for row in at_best], [row[measure] for row in at_best])
        self.present.set_xdata([np.nan if present is None else present] * 2)
        self.present.set_visible(present is not None and self.values[0] <= present <= self.values[-1])
        for axes in (self.axes, self.right):
            axes.relim()
            axes.autoscale_view()
        low, high = self.values[0], self.values[-1]
        if is_geometric(self.values):
            rim = (high / low) ** 0.06
            self.axes.set_xlim(low / rim, high * rim)
        else:
            rim = 0.06 * (high - low) or 1.0
            self.axes.set_xlim(low - rim, high + rim)
        for title, text in zip(self.titles, ("residual", f"over {name}", MEASURES.get(measure, ("",))[0]), strict=True):
            title.set_text(text)
        self._paint_in_theme()
        self.axes.xaxis.set_major_locator(FixedLocator(self.values if len(self.values) < 8 else self.values[::2]))
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        self.axes.tick_params(axis="y", colors=COLOURS[0])
        self.right.tick_params(axis="y", colors=COLOURS[1], labelsize=7, length=2, which="both")
        for spine in self.right.spines.values():
            spine.set_visible(False)
        self.titles[1].set_color(colour("text"))
        self.present.set_color(colour("text"))
        self.draw_idle()

    def _pressed(self, event: Any) -> None:
        """Take the value that is nearest to the left or right, margins and all."""
        if event.button == 1 and self.values:
            places = self.axes.transData.transform([(value, self.axes.get_ylim()[0]) for value in self.values])
            self.clicked.emit(self.values[int(np.abs(places[:, 0] - event.x).argmin())])


class SweepPanel(QWidget):
    """Describes a sweep about what the forms say, runs it, and shows what came of it.

    Parameters
    ----------
    session
        The viewer's.
    described
        The reconstruction that the dock's forms describe; None without a scan.
    take
        Puts a value of a sweep into the forms, and says so in a sentence.
    """

    changed = Signal()
    grown = Signal()

    def __init__(
        self,
        session: Session,
        described: Callable[[], ReconstructionJob | None],
        take: Callable[[SweepJob, float], str],
    ) -> None:
        super().__init__()
        self.session, self.viewer = session, session.viewer
        self._described, self._take = described, take
        self._offered: tuple[float, ...] = ()
        self._binning_chosen = False
        self._place: tuple[float, float, float] | None = None
        self._pictured: list[float] = []
        self._plan: MemoryPlan | None = None
        self._took = ""
        self._state, self._open = session.state, False
        self._build()
        self._follow = QTimer(self)
        self._follow.setSingleShot(True)
        self._follow.setInterval(FOLLOW)
        self._follow.timeout.connect(self.look)
        for event in (self.viewer.layers.events.inserted, self.viewer.layers.events.removed):
            event.connect(self._list_references)
        self.viewer.dims.events.point.connect(self._on_point)
        self.viewer.mouse_move_callbacks.append(self._on_move)
        session.progressed.connect(self._on_progress)
        session.finished.connect(lambda _: self.show_results())
        self._list_references()
        self.show_results()

    def _build(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        rows = QFormLayout()
        rows.setContentsMargins(0, 0, 0, 0)
        rows.setVerticalSpacing(4)
        rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        self.parameter, self.where, self.reference, self.measure = QComboBox(), QComboBox(), QComboBox(), QComboBox()
        guard = WheelGuard(self)
        for combo in (self.parameter, self.where, self.reference, self.measure):
            combo.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
            combo.installEventFilter(guard)
            combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.parameter.setToolTip("What is varied; all else is as in the forms above.")
        self.parameter.currentIndexChanged.connect(lambda _: self._offer_values())
        rows.addRow("Parameter", self.parameter)

        self.values = QLineEdit()
        self.values.setToolTip("Two to twelve values, with commas between them.")
        self.values.textChanged.connect(self._edited)
        again = QToolButton()
        again.setText("↺")
        again.setToolTip("Halves and doubles of the value that is in the form now.")
        again.clicked.connect(lambda: self._offer_values())
        rows.addRow("Values", _beside(self.values, again))

        self.where.addItem("whole volume", "volume")
        self.where.addItem("slices on screen", "slices")
        self.where.setToolTip("Slices about the one on screen can be tried at full resolution.")
        self.where.currentIndexChanged.connect(self._chose_where)
        self.slices, self.binning = QSpinBox(), QSpinBox()
        self.slices.setRange(1, 512)
        self.slices.setValue(SLICES)
        self.slices.setToolTip("How many slices about the one on screen.")
        self.slices.setVisible(False)
        self.binning.setRange(1, 16)
        self.binning.setPrefix("÷ ")
        for spin in (self.slices, self.binning):
            spin.setMaximumWidth(84)
        self.binning.setToolTip(
            "Detector and voxels so many times coarser than in the forms above. What is offered takes some ten seconds "
            "on a CPU; what is best on coarse voxels is close to it on fine ones, and rarely the same."
        )
        for spin in (self.slices, self.binning):
            spin.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
            spin.installEventFilter(guard)
            spin.setKeyboardTracking(False)
        self.slices.valueChanged.connect(self._edited)
        self.binning.valueChanged.connect(self._chose_binning)
        rows.addRow("On", _beside(self.where, self.slices, self.binning))

        self.reference.setToolTip("What the results are compared with, brought onto their voxels.")
        self.reference.activated.connect(self._ask_for_reference)
        rows.addRow("Compare with", self.reference)
        layout.addLayout(rows)

        self.about = QLabel()
        self.about.setWordWrap(True)
        layout.addWidget(self.about)
        self.run = make_button("Try values", "Reconstruct with each of the values, one after the other.", self._run)
        layout.addWidget(self.run)

        self.results = QWidget()
        inside = QVBoxLayout(self.results)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(4)
        self.said = QLabel()
        self.said.setWordWrap(True)
        self.strip = Strip()
        self.strip.clicked.connect(self._clicked)
        self.plot = SweepPlot()
        self.plot.clicked.connect(self.take)
        for key, (title, _) in MEASURES.items():
            self.measure.addItem(title.split(",")[0], key)
        self.measure.setToolTip("The measure on the pictures, and on the right of the plot.")
        self.measure.setFixedWidth(96)
        self.measure.currentIndexChanged.connect(lambda _: self.show_results())
        inside.addWidget(self.strip)
        inside.addWidget(self.plot)
        inside.addWidget(_beside(self.said, self.measure))
        layout.addWidget(self.results)

    # -- the job ---------------------------------------------------------------------------------------------------

    def job(self) -> SweepJob | None:
        """The sweep that is described; None without a scan that can have one.

        Raises
        ------
        pydantic.ValidationError
            If what was typed makes no job.
        ScanError
            If a value is no number, or the reconstruction would begin at a layer.
        """
        base, scan = self._described(), self._scan
        if base is None or scan is None:
            return None
        if str(getattr(base.parameters, "start", "")).startswith(LAYER):
            raise ScanError("A sweep cannot begin at a layer, which is on other voxels: choose another start.")
        grid = scan.default_grid(base.shape, base.voxel_size)
        reference = self.reference.currentData()
        return SweepJob(
            scan=base.scan,
            options=base.options,
            shape=grid.shape,
            voxel_size=grid.voxel_size,
            device=base.device,
            seed=base.seed,
            parameters=base.parameters,
            parameter=self.parameter.currentData(),
            values=self._typed(),
            binning=self.binning.value(),
            slices=self._slices(grid.shape[0], grid.translate[0], grid.scale[0]),
            reference=reference if isinstance(reference, Path) else None,
        )

    @property
    def _scan(self) -> Scan | None:
        """The scan, where it is one that can be swept."""
        scan = self.session.scan
        return scan if scan is not None and scan.kind == "x-ray" else None

    def _typed(self) -> tuple[float, ...]:
        numbers = []
        for word in self.values.text().split(","):
            try:
                numbers += [float(word)] if word.strip() else []
            except ValueError:
                raise ScanError(f"{word.strip()} is no number: type values with commas between them.") from None
        return tuple(numbers)

    def _slices(self, depth: int, first: float, edge: float) -> tuple[int, int] | None:
        """[first, stop) of the slices about the one on screen, of a grid that begins at ``first`` in mm."""
        if self.where.currentData() != "slices":
            return None
        count = min(depth, self.slices.value())
        begin = round((float(self.viewer.dims.point[-3]) - first) / edge) - count // 2
        begin = min(max(0, begin), depth - count)
        return begin, begin + count

    def _run(self) -> None:
        job = self._described_job()
        if job is not None:
            layer = self.reference.currentData()
            self.session.run(job, layer if isinstance(layer, Image) else None)
            self._place, self._took = None, ""
            self.show_results()
            self.grown.emit()

    def _described_job(self) -> SweepJob | None:
        """The job, or None and a sentence about what is wrong."""
        try:
            return self.job()
        except ValidationError as error:
            first = error.errors()[0]
            where = "" if not first["loc"] else f"{first['loc'][0]}: "
            self._say_about(f"{where}{first['msg'].removeprefix('Value error, ')}.", error=True)
        except ValueError as error:
            self._say_about(str(error), error=True)
        return None

    # -- what is offered -------------------------------------------------------------------------------------------

    def unfold(self, opened: bool) -> None:
        """The part was opened or folded away: what nobody sees is not kept up."""
        self._open = opened
        if opened:
            self.refresh()

    def refresh(self) -> None:
        """Follow the forms: offer the method's parameters, values about the present one, and tell what it needs."""
        base = self._base()
        if base is None or self._scan is None:
            self._say_about("" if self.session.scan is None else "Sweeps are made of X-ray projections.")
            self.run.setEnabled(False)
            return
        fields = type(base.parameters).model_fields
        names = {name: fields[name].title or name for name in SWEPT if name in fields} | {"views": "Views"}
        if [self.parameter.itemData(i) for i in range(self.parameter.count())] != list(names):
            before = self.parameter.currentData()
            self.parameter.blockSignals(True)
            self.parameter.clear()
            for name, title in names.items():
                self.parameter.addItem(title, name)
            self.parameter.setCurrentIndex(max(0, self.parameter.findData(before)))
            self.parameter.blockSignals(False)
            self._offer_values()
        elif self.values.text() == _text(self._offered):  # nobody has typed others
            self._offer_values()
        truth = "the scan's truth" if self._scan.truth is not None else "nothing"
        self.reference.setItemText(0, truth)
        if not self._binning_chosen:
            self._offer_binning(base)
        job = self._described_job()
        if job is None:
            self._plan = None
            self.run.setEnabled(False)
        elif self._open:
            self.session.plan(job, self._show_plan, self._no_plan)
        self.show_results()

    def _base(self) -> ReconstructionJob | None:
        with contextlib.suppress(ValidationError, ValueError):  # the dock says so
            return self._described()
        return None

    def present(self, name: str) -> float | None:
        """The value that is in the form now; None where there is none."""
        base, scan = self._base(), self._scan
        if base is None or scan is None:
            return None
        return scan.geometry.views if name == "views" else getattr(base.parameters, name, None)

    def _offer_values(self) -> None:
        base, scan, parameter = self._base(), self._scan, self.parameter.currentData()
        if base is not None and scan is not None and parameter is not None:
            views = scan.recording.geometry.views
            self._offered = values_around(base.parameters, parameter, views, scan.geometry.views)
            self.values.setText(_text(self._offered))
            self.values.setCursorPosition(0)  # a long list begins with its first

    def _offer_binning(self, base: ReconstructionJob) -> None:
        scan = self._scan
        assert scan is not None
        with contextlib.suppress(ScanError):  # no grid: the dock says so
            depth, h, w = scan.default_grid(base.shape, base.voxel_size).shape
            if self.where.currentData() == "slices":
                depth = min(depth, self.slices.value() + 2 * MARGIN)
            rounds = getattr(base.parameters, "iterations", None) or 10
            typed = self._typed() or (0.0,)
            steps = int(sum(typed)) if self.parameter.currentData() == "iterations" else rounds * len(typed)
            self.binning.blockSignals(True)
            self.binning.setValue(quick_binning(depth * h * w, scan.geometry.views, steps))
            self.binning.blockSignals(False)

    def _list_references(self, event: object = None) -> None:
        """Offer the viewer's volumes and files, and keep to what was chosen."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            combo = self.reference
            before = combo.currentData()
            files = [d for i in range(combo.count()) if isinstance(d := combo.itemData(i), Path)]
            first = combo.itemText(0) or "nothing"
            combo.blockSignals(True)
            combo.clear()
            combo.addItem(first, None)
            for layer in self.viewer.layers:
                if can_be_judged_on(layer):
                    combo.addItem(layer.name, layer)
            for path in files:
                combo.addItem(path.name, path)
            combo.addItem(BROWSE, BROWSE)
            found = [i for i in range(combo.count()) if combo.itemData(i) is before or combo.itemData(i) == before]
            combo.setCurrentIndex(found[0] if found else 0)
            combo.blockSignals(False)

    def _ask_for_reference(self, index: int) -> None:
        combo = self.reference
        if combo.itemData(index) == BROWSE:
            path, _ = QFileDialog.getOpenFileName(self, "Compare with", "", f"Volumes (*{' *'.join(ENDINGS)} *.npy)")
            combo.setCurrentIndex(0)
            if path:
                self.compare_with(Path(path))
        self._edited()

    def compare_with(self, path: Path) -> None:
        """Choose a file to compare with."""
        place = self.reference.findText(BROWSE)
        self.reference.insertItem(place, path.name, path)
        self.reference.setCurrentIndex(place)
        self._edited()

    def _chose_where(self, _: int) -> None:
        self.slices.setVisible(self.where.currentData() == "slices")
        self._binning_chosen = False
        self._edited()

    def _chose_binning(self, _: int) -> None:
        self._binning_chosen = True
        self._edited()

    def _edited(self, *_: object) -> None:
        self.changed.emit()

    # -- what it needs ---------------------------------------------------------------------------------------------

    def _show_plan(self, plan: MemoryPlan) -> None:
        job = self._described_job()
        self._plan = None if job is None else plan  # something else may have been typed since
        self.show_state(self._state)
        if job is None:
            return
        assert job.shape is not None
        d, h, w = (max(1, math.ceil(n / job.binning)) for n in job.shape)
        words = f"{len(job.values)} reconstructions of {d} × {h} × {w} voxels"
        if job.slices is not None:
            first, stop = job.slices
            d = math.ceil((stop - first) / job.binning)
            words = f"{len(job.values)} times {d} × {h} × {w} voxels: slices {first} to {stop - 1} of {job.shape[0]}"
        if plan.fits:
            self._say_about(f"{words}. {plan.sentence}")
        else:
            self._say_about(plan.sentence, error=True)

    def _no_plan(self, error: Exception) -> None:
        self._plan = None
        self._say_about(str(error), error=True)
        self.show_state(self._state)

    def _say_about(self, text: str, error: bool = False) -> None:
        shade = colour("error")
        self.about.setText(f"<span style='color:{shade}'>{html.escape(text)}</span>" if error else note(text))

    def show_state(self, state: str) -> None:
        """What may be pressed."""
        self._state = state
        self.run.setEnabled(state == "idle" and self._scan is not None and self._plan is not None and self._plan.fits)

    # -- what came of it -------------------------------------------------------------------------------------------

    @property
    def display(self) -> PartsDisplay | None:
        """The results of the last sweep of this scan."""
        display, scan = self.session.sweep, self.session.scan
        return display if display is not None and scan is not None and display.job.scan == scan.path else None

    @property
    def sweep(self) -> SweepJob | None:
        """The job that they are of."""
        job = None if self.display is None else self.display.job
        return job if isinstance(job, SweepJob) else None

    def show_results(self) -> None:
        """Show what there is of the sweep, as far as it is."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            display, job = self.display, self.sweep
            self.results.setVisible(job is not None)
            if display is None or job is None:
                return
            there = [key for key in MEASURES if any(key in row for row in display.rows)]
            self.measure.setVisible(bool(there))
            measure, best = self._measure(), self.best()
            present = self._present_of(job)
            first = self.plot.isHidden()
            self.plot.show_sweep(self._title(job), display.rows, measure, present, best)
            if first and display.rows:
                self.grown.emit()
            self.look()
            star = "" if best is None else f"★ best {MEASURES[measure][0].split(',')[0]}. "
            hint = note(f"{star}Click a picture or a point to take its value.")
            self.said.setText(html.escape(self._took) if self._took else hint)

    def _measure(self) -> str:
        """The measure that is chosen, where there is something to compare with."""
        display, measure = self.display, str(self.measure.currentData())
        return measure if display is not None and any(measure in row for row in display.rows) else ""

    def best(self) -> float | None:
        """The value with the best measure; None where there is nothing to compare with."""
        display, measure = self.display, self._measure()
        if display is None or not measure:
            return None
        rows = [row for row in display.rows if math.isfinite(row.get(measure, math.nan))]
        return MEASURES[measure][1](rows, key=lambda row: row[measure])["value"] if rows else None

    def _present_of(self, job: SweepJob) -> float | None:
        base = self._base()
        same = base is not None and type(base.parameters) is type(job.parameters)
        return self.present(job.parameter) if same or job.parameter == "views" else None

    def _title(self, job: SweepJob) -> str:
        field = type(job.parameters).model_fields.get(job.parameter)
        return (field.title if field is not None and field.title else job.parameter).lower()

    def look(self) -> None:
        """Show what lies where the person looks, with each value."""
        display, job = self.display, self.sweep
        if display is None or job is None or not self._open:
            return
        there = [(value, layer) for value in job.values if (layer := display.result(value)) is not None]
        told = {row["value"]: row for row in display.rows}
        measure, best, present = self._measure() or "residual", self.best(), self._present_of(job)
        pictures: list[tuple[str, NDArray[np.uint8]]] = []
        self._pictured = []
        for value, layer in there:
            if not pictures:  # all have one grid
                self._place = shown.where_the_person_looks(self.viewer, layer) or self._place
                displayed = shown.displayed_axes(self.viewer, layer)
            voxel = self._place or [(n - 1) / 2 for n in layer.data.shape]
            picture = around(layer.data, layer, voxel, displayed if len(displayed) == 2 else (1, 2), Strip.HALF)
            if picture is not None:
                caption = f"{value:g}" + (f" · {_short(measure, told[value])}" if value in told else " …")
                pictures.append((caption + (" ★" if value == best else ""), picture))
                self._pictured.append(value)
        framed = self._pictured.index(present) if present in self._pictured else None
        self.strip.show_strip(pictures, framed, len(job.values) if self.session.display is display else len(pictures))

    def _on_move(self, *_: object) -> None:
        """The cursor moved, or the slice beneath it."""
        try:
            if self.sweep is not None and self._open and not self._follow.isActive():
                self._follow.start()
        except RuntimeError:  # the dock is gone
            with contextlib.suppress(ValueError):
                self.viewer.mouse_move_callbacks.remove(self._on_move)

    def _on_point(self, event: object = None) -> None:
        with contextlib.suppress(RuntimeError):  # the dock is gone
            self._on_move()
            if self.where.currentData() == "slices" and self._open:
                self._edited()

    def _on_progress(self) -> None:
        if self.session.display is not self.display or self.session.progress is None:
            return
        if self.session.progress.name == "sweep":
            self.show_results()
        else:
            self._on_move()

    def _clicked(self, index: int) -> None:
        self.take(self._pictured[index])

    def take(self, value: float) -> None:
        """Put a value of the sweep into the forms, and say so."""
        if self.sweep is not None:
            self._took = self._take(self.sweep, value)
            self.show_results()


def _beside(*widgets: QWidget) -> QWidget:
    both = QWidget()
    row = QHBoxLayout(both)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(2)
    for i, widget in enumerate(widgets):
        row.addWidget(widget, 1 if i == 0 else 0)
    return both


def _text(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _short(measure: str, row: dict[str, float]) -> str:
    """A figure for a picture's caption."""
    value = row.get(measure, math.nan)
    if measure == "psnr":
        return f"{value:.1f} dB"
    return f"{value:.3f}" if measure == "ssim" else f"{value:.3g}"
