"""The *Compare* dock: volumes beside each other, what they measure, where they differ, and along a line."""

from __future__ import annotations

import contextlib
import functools
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Shapes
from napari.utils.notifications import show_info, show_warning
from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtGui import QDoubleValidator
from qtpy.QtWidgets import (
    QAbstractItemView,
    QApplication,
    QCheckBox,
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QListWidget,
    QListWidgetItem,
    QSizePolicy,
    QSlider,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_recon.jobs.job import DataConsistencyJob
from napari_recon.jobs.messages import Finished
from napari_recon.measures.comparison import Region, Similarity, field_of_view, fit_scale, on_grid, value_range
from napari_recon.measures.local import histogram, line_profile
from napari_recon.measures.table import COLUMNS, Row, columns, table, write_csv, write_figure
from napari_recon.scans.errors import ScanError
from napari_recon.widgets import layers as shown
from napari_recon.widgets.compare_display import (
    LEAST,
    MOST,
    Comparison,
    can_be_compared,
    regions,
    volume_of,
)
from napari_recon.widgets.compare_plots import SHADES, Line, Loupe, Plot, around
from napari_recon.widgets.displays import phase_of, told_by
from napari_recon.widgets.frequencies import Frequencies, Spectra, spectra
from napari_recon.widgets.job_dock import button_row, make_button
from napari_recon.widgets.operator_displays import can_be_judged_on
from napari_recon.widgets.session import Session
from napari_recon.widgets.style import Scrolled, colour, frame_of, growing_section, note

if TYPE_CHECKING:
    import napari.viewer
    from numpy.typing import NDArray

    from napari_recon.jobs.volumes import Volume

TRUTH = "Truth"
"""What the volume is called that a simulated scan was made of."""
TRUTHS = ("truth", "reference", "ground")
"""Words in a layer's name that make it the reference until another is chosen."""
SHORT = {"volume": "Volume", "region": "Region", "psnr": "PSNR", "ssim": "SSIM", "nrmse": "NRMSE"}
"""Headings of the columns that are always shown, where there is little room."""
RESIDUALS = ("residual", "residual_to_noise")
BEST = {"psnr": max, "ssim": max, "ssim_3d": max, "nrmse": min}
FILES = "Volumes (*.tif *.tiff *.npy *.ome.zarr zarr.json);;All files (*)"
ROW, MOST_ROWS, FEW = 22, 9, 5
"""Pixels of a row of the table, rows before it scrolls, and columns that fit beside the canvas."""
SLIDER = 1000
"""Steps of the curtain's slider."""
FOLLOW, REST = 50, 150
"""Milliseconds between two looks at where the cursor and the line are, and after which a slider rests."""


class CompareDock(Scrolled):
    """Compares two to six volumes, layers or files, with a reference or without one."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__()
        self.session = Session.of(napari_viewer)
        self.viewer = self.session.viewer
        self.rows: list[Row] = []
        self._seen: set[Image] = set()
        self._named: Image | None = None
        self._regions: list[Region] = []
        self._residuals: dict[Image, Row] = {}
        self._projecting: list[Image] = []
        layout = self.content
        title = QLabel(note("Tick two to six volumes, and choose a reference."))
        title.setWordWrap(True)
        layout.addWidget(title)
        layout.addWidget(self._volumes_part())
        self.compare = make_button("Compare", "Show the volumes beside each other and measure them.", self._compare)
        self.back = make_button("Back", "Show again what was shown before, as it was.", self._leave)
        layout.addLayout(button_row(self.compare, self.back))
        self.shows = self._shows_part()
        layout.addWidget(self.shows)
        self.status = QLabel()
        self.status.setWordWrap(True)
        layout.addWidget(self.status)
        layout.addWidget(self._table_part())
        layout.addWidget(self._profile_part())
        layout.addWidget(self._histogram_part())
        layout.addWidget(self._frequencies_part())
        layout.addWidget(self._loupe_part())
        layout.addStretch(1)
        self._follow, self._profile_due, self._rest = QTimer(self), QTimer(self), QTimer(self)
        for timer, look, wait in (
            (self._follow, self._show_around, FOLLOW),
            (self._profile_due, self._show_profile, FOLLOW),
            (self._rest, self._show_profile, REST),
        ):
            timer.setSingleShot(True)
            timer.setInterval(wait)
            timer.timeout.connect(look)
        events = self.viewer.layers.events
        for event in (events.inserted, events.removed, events.reordered, events.renamed):
            event.connect(self._list_layers)
        self.viewer.mouse_move_callbacks.append(self._on_move)
        self.viewer.dims.events.point.connect(self._on_move)
        self.session.finished.connect(self._projected)
        self.session.scan_changed.connect(self._residuals.clear)
        self._list_layers()
        self._attach()

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """What is in the dock grows with what is compared: nothing of it is squeezed, it is scrolled."""
        done = super().eventFilter(watched, event)
        if event is not None and event.type() in (QEvent.Type.LayoutRequest, QEvent.Type.Resize):
            inner, viewport = self.widget(), self.viewport()
            if inner is not None and viewport is not None and watched is inner:
                inner.setMinimumHeight(self.content.totalHeightForWidth(viewport.width()))
                self.updateGeometry()
        return done

    # -- its parts -------------------------------------------------------------------------------------------------

    def _volumes_part(self) -> QWidget:
        part = QWidget()
        form = QFormLayout(part)
        form.setContentsMargins(0, 0, 0, 0)
        form.setVerticalSpacing(4)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        self.volumes = QListWidget()
        self.volumes.setSelectionMode(QAbstractItemView.SelectionMode.NoSelection)
        self.volumes.setFixedHeight(96)
        self.volumes.setToolTip("The viewer's volumes; an earlier comparison is left as soon as you compare again.")
        self.volumes.itemChanged.connect(self._ticked)
        self.add = make_button("Add file …", "Open volumes from files as layers, ticked.", self._ask_for_files)
        self.reference = _choice("What the others are measured against; without one there are no PSNR, SSIM, NRMSE.")
        self.region = _choice(
            "Where is measured: the cylinder that the scan sees, or the regions of a labels or shapes layer. A box "
            "drawn on a slice reaches through the volume."
        )
        self.data_range = QLineEdit()
        self.data_range.setValidator(QDoubleValidator(0.0, math.inf, 12))
        self.data_range.setToolTip(
            "What PSNR and SSIM take as the range of values; empty takes the reference's largest less its smallest "
            "value in the field of view."
        )
        form.addRow(self.volumes)
        form.addRow(self.add)
        form.addRow("Reference", self.reference)
        form.addRow("Measured in", self.region)
        form.addRow("Data range", self.data_range)
        self.fit_scale = QCheckBox("fit to the reference")
        self.fit_scale.setToolTip(
            "Fit scale and offset, for volumes of another unit: each is measured, and shown, times the scale and plus "
            "the offset that bring it nearest to the reference in the field of view. It costs a copy of each in memory."
        )
        form.addRow("", self.fit_scale)
        self.fit_scale.toggled.connect(lambda _: self._compare() if self.comparison is not None else None)
        self.reference.currentIndexChanged.connect(self._show_buttons)
        self.region.activated.connect(lambda _: self._measure())
        self.data_range.editingFinished.connect(self._range_edited)
        self._range = ""
        return part

    def _shows_part(self) -> QWidget:
        """What the comparison can show besides the grid."""
        part = QWidget()
        inside = QVBoxLayout(part)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(4)
        self.differences = make_button(
            "Differences", "Each volume less the reference beneath it, in colours about zero.", self._show_differences
        )
        self.curtain = make_button(
            "Curtain", "Two volumes on one slice: drag the edge between them, or the slider.", self._show_curtain
        )
        for button in (self.differences, self.curtain):
            button.setCheckable(True)
        self.axes = [
            make_button(name, f"Slices across {name}, in all volumes.", functools.partial(self._look_along, axis))
            for axis, name in enumerate("zyx")
        ]
        row = QHBoxLayout()
        row.setSpacing(4)
        row.addWidget(self.differences, 3)
        row.addWidget(self.curtain, 3)
        for button in self.axes:
            row.addWidget(button, 1)
            button.setStyleSheet("padding: 4px 2px; min-width: 22px")
        inside.addLayout(row)
        self.curtain_part = QWidget()
        beneath = QHBoxLayout(self.curtain_part)
        beneath.setContentsMargins(0, 0, 0, 0)
        beneath.setSpacing(4)
        self.on_left, self.on_right = _choice("Left of the curtain."), _choice("Right of the curtain.")
        self.curtain_place = QSlider(Qt.Orientation.Horizontal)
        self.curtain_place.setRange(0, SLIDER)
        self.curtain_place.setValue(SLIDER // 2)
        beneath.addWidget(self.on_left, 2)
        beneath.addWidget(self.curtain_place, 3)
        beneath.addWidget(self.on_right, 2)
        self.on_left.activated.connect(lambda _: self._show_curtain())
        self.on_right.activated.connect(lambda _: self._show_curtain())
        self.curtain_place.valueChanged.connect(self._move_curtain)
        self.curtain_part.hide()
        inside.addWidget(self.curtain_part)
        return part

    def _table_part(self) -> QWidget:
        self.results = QWidget()
        inside = QVBoxLayout(self.results)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(4)
        self.table = QTableWidget()
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        if (numbers := self.table.verticalHeader()) is not None:
            numbers.hide()
            numbers.setDefaultSectionSize(ROW)
        self.table.setMinimumWidth(0)
        self.table.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        inside.addWidget(self.table)
        self.copy = make_button("Copy", "The table as text, to paste into a spreadsheet.", self._copy)
        self.csv = make_button("CSV …", "Write the table as CSV, all columns, numbers in full.", self._ask_for_csv)
        self.figure = make_button("Figure …", "Write the measures as a PNG.", self._ask_for_figure)
        self.more = QCheckBox("more")
        self.more.setToolTip(
            "Further columns: the 3D SSIM; the residual of the run that made the volume; mean and spread; in regions "
            "of a layer also noise, cupping, and contrast to noise (CNR) against the first of them."
        )
        self.more.toggled.connect(lambda _: self._measure())
        self.residuals = make_button(
            "Residuals",
            "Project each volume (or make k-space of it), and tell what it leaves of the scan that is open: "
            "‖Ax − y‖ / ‖y‖, and the same over the noise.",
            self._ask_for_residuals,
        )
        row = QHBoxLayout()
        row.setSpacing(4)
        for button, share in ((self.residuals, 5), (self.copy, 4), (self.csv, 4), (self.figure, 5)):
            button.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)  # five do not widen the dock
            row.addWidget(button, share)
        row.addWidget(self.more)
        inside.addLayout(row)
        self.results.hide()
        return self.results

    def _profile_part(self) -> QWidget:
        inside = QWidget()
        layout = QVBoxLayout(inside)
        layout.setContentsMargins(0, 0, 0, 0)
        self.draw = make_button("Draw a line", "Drag on a slice; the camera stays while this is pressed.", self._draw)
        self.draw.setCheckable(True)
        self.clear = make_button("Clear", "Take the line away.", self._forget_line)
        layout.addLayout(button_row(self.draw, self.clear))
        self.profile = Plot("over mm from its start")
        layout.addWidget(self.profile)
        self.profile_section = growing_section("Along a line", inside)
        return self.profile_section

    def _histogram_part(self) -> QWidget:
        self.histogram = Plot("voxels over value", log=True, height=130)
        self.histogram_section = growing_section("Histogram", self.histogram)
        self.histogram_section.toggled.connect(lambda _: self._count())
        return self.histogram_section

    def _frequencies_part(self) -> QWidget:
        self.frequencies = Frequencies()
        self.frequencies_section = growing_section("Frequencies", self.frequencies)
        self.frequencies_section.toggleButton().setToolTip(
            "What each volume resolves (Fourier shell correlation with the reference), and the spectrum of its noise "
            "where is measured."
        )
        self.frequencies_section.toggled.connect(lambda _: self._correlate())
        return self.frequencies_section

    def _loupe_part(self) -> QWidget:
        self.loupe = Loupe()
        self.loupe_section = growing_section("About the cursor, magnified", self.loupe)
        return self.loupe_section

    # -- which volumes ---------------------------------------------------------------------------------------------

    @property
    def comparison(self) -> Comparison | None:
        """The comparison that is on."""
        comparison = self.session.comparison
        return None if comparison is None or comparison.left else comparison

    @property
    def chosen(self) -> list[Image]:
        """The layers that are ticked."""
        ticked = [item for item in self._items if item.checkState() == Qt.CheckState.Checked]
        return [item.data(Qt.ItemDataRole.UserRole) for item in ticked]

    @property
    def _items(self) -> list[QListWidgetItem]:
        items = (self.volumes.item(i) for i in range(self.volumes.count()))
        return [item for item in items if item is not None]

    @property
    def _listed(self) -> list[Image]:
        return [item.data(Qt.ItemDataRole.UserRole) for item in self._items]

    def _tick(self, layers: Sequence[Image]) -> None:
        """Tick these layers and no others."""
        self.volumes.blockSignals(True)
        for item in self._items:
            wanted = item.data(Qt.ItemDataRole.UserRole) in layers
            item.setCheckState(Qt.CheckState.Checked if wanted else Qt.CheckState.Unchecked)
        self.volumes.blockSignals(False)
        self._ticked()

    def _list_layers(self, event: object = None) -> None:
        """Offer what there is, and keep to what was chosen; what is new is ticked while there is room."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            ticked = self.chosen
            there = [layer for layer in self.viewer.layers if can_be_compared(layer)]
            new = [layer for layer in there if layer not in self._seen]
            self._seen = set(there)
            ticked += new[: max(0, MOST - len([layer for layer in ticked if layer in there]))]
            self.volumes.blockSignals(True)
            self.volumes.clear()
            for layer in there:
                item = QListWidgetItem(layer.name)
                item.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsUserCheckable)
                item.setData(Qt.ItemDataRole.UserRole, layer)
                item.setCheckState(Qt.CheckState.Checked if layer in ticked else Qt.CheckState.Unchecked)
                self.volumes.addItem(item)
            self.volumes.blockSignals(False)
            _offer(
                self.region,
                [None, *(x for x in self.viewer.layers if isinstance(x, (Labels, Shapes)))],
                "field of view",
            )
            self._ticked()

    def _ticked(self, _: object = None) -> None:
        chosen = self.chosen
        before = self.reference.currentData()
        _offer(self.reference, [None, *chosen], "none")
        if before is None:
            named = [layer for layer in chosen if any(word in layer.name.lower() for word in TRUTHS)]
            fresh = [layer for layer in named if layer is not self._named]
            if fresh:
                self._named = fresh[0]
                self.reference.setCurrentIndex(self.reference.findData(fresh[0]))
        self._show_buttons()

    def _show_buttons(self, _: object = None) -> None:
        count, comparison = len(self.chosen), self.comparison
        self.compare.setEnabled(LEAST <= count <= MOST)
        self.compare.setToolTip(
            "Show the volumes beside each other and measure them."
            if LEAST <= count <= MOST
            else f"{count} volumes are ticked: tick {LEAST} to {MOST}."
        )
        self.back.setEnabled(comparison is not None)
        self.shows.setVisible(comparison is not None)
        self.draw.setEnabled(comparison is not None)
        self.clear.setEnabled(comparison is not None)
        self.differences.setEnabled(comparison is not None and comparison.reference is not None)
        self.fit_scale.setEnabled(self.reference.currentData() is not None)

    def _ask_for_files(self) -> None:
        paths, _ = QFileDialog.getOpenFileNames(self, "Add volumes", "", FILES)
        for path in paths:
            chosen = Path(path)
            self.add_file(chosen.parent if chosen.name == "zarr.json" else chosen)

    def compare_layers(self, layers: Sequence[Image], truth: Path | None = None) -> None:
        """Compare just these layers; with the truth that a file holds, if any, and what they differ in from it."""
        there = None if truth is None else next((x for x in self._listed if told_by(x).get("file") == str(truth)), None)
        if truth is not None and there is None:
            self.add_file(truth, TRUTH, lambda layer: self.compare_layers(layers, truth))
            return
        chosen = [layer for layer in layers if layer is not there][: MOST - (there is not None)]
        self._leave()
        self._tick([*chosen, *([] if there is None else [there])])
        self.reference.setCurrentIndex(max(0, self.reference.findData(there)))
        self.differences.setChecked(there is not None)
        if self.compare.isEnabled():
            self._compare()

    def add_file(self, path: Path, name: str = "", then: Callable[[Image], None] = lambda _: None) -> None:
        """Open a volume's file as a layer, in a thread; a sentence tells if it cannot be.

        Parameters
        ----------
        path
            Of the file.
        name
            Of the layer; empty takes the file's.
        then
            What is done with the layer.
        """
        from napari_recon.jobs.volumes import read_volume

        def work() -> tuple[Volume, tuple[float, float] | None]:
            volume = read_volume(path)
            return volume, shown.contrast_limits(volume.data)

        self._say(f"Opening {path.name} …")
        done: Callable[[Any], None] = lambda read: then(self._add_layer(path, name, *read))  # noqa: E731
        self.session._in_thread(f"add {path}", work, done, self._sorry)

    def _add_layer(self, path: Path, name: str, volume: Volume, limits: tuple[float, float] | None) -> Image:
        grid, made_by = volume.grid, volume.provenance
        told: dict[str, Any] = {"shows": "volume", "file": str(path)}
        if made_by:
            told |= {"job": made_by.get("job") or {}, "volume": "result", "provenance": made_by}
        like = [x for x in self.chosen if x.data.shape == volume.data.shape and shown.is_in_mm(x)]
        if volume.voxel_size is None and like:
            grid = shown.grid_of(like[0])
            show_info(f"{path.name} tells no voxel size: it is taken to lie where {like[0].name} lies.")
        stem = path.name.removesuffix(".ome.zarr") if path.name.endswith(".ome.zarr") else path.stem
        layer = shown.volume_layer(name or stem, volume.data, grid.scale, grid.translate, told)
        if limits is not None:
            layer.contrast_limits_range, layer.contrast_limits = (min(0.0, limits[0]), 2 * limits[1]), limits
        self._say("")
        # Amid a comparison, or where one follows, it would take a cell that is another's.
        layer.visible = self.comparison is None and not name
        self.viewer.add_layer(layer)
        return layer

    # -- the comparison --------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        if self.session.state != "idle":
            show_warning("A job shows its volumes now: press Finish or Cancel first, or wait for its end.")
            return
        if not self.session._warm:  # pint reads its units in a thread, and has none until then
            QTimer.singleShot(50, self._compare)
            return
        differences, fitted = self.differences.isChecked(), self.fit_scale.isChecked()
        self._leave()
        chosen, reference = self.chosen, self.reference.currentData()
        self.rows = []
        try:
            comparison = Comparison(self.viewer, chosen, reference, differences and not fitted)
        except ScanError as error:
            self._sorry(error)
            return
        self.session.comparison = comparison
        self._attach()
        self.histogram.show_lines([])
        self.frequencies.clear()
        _offer(self.on_left, comparison.layers, "")
        _offer(self.on_right, comparison.layers, "")
        self.on_right.setCurrentIndex(len(comparison.layers) - 1)
        self.differences.setChecked(differences and reference is not None)
        self._bring()

    def _attach(self) -> None:
        """Follow the session's comparison; it may be older than the dock."""
        comparison = self.comparison
        if comparison is not None:
            comparison.changed.connect(self._changed)
            comparison.line_moved.connect(self._line_moved)
            comparison.slice_moved.connect(self._slice_moved)
            comparison.curtain_moved.connect(self._curtain_moved)
            self.differences.setChecked(comparison.with_differences)
            for choice in (self.on_left, self.on_right):
                if choice.count() == 0:
                    _offer(choice, comparison.layers, "")
        self._show_buttons()

    def _leave(self) -> None:
        if self.comparison is not None:
            self.comparison.leave()

    def _changed(self) -> None:
        """Something of the comparison was deleted, or it was left."""
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            comparison = self.comparison
            if comparison is None:
                self.draw.setChecked(False)
                self.curtain.setChecked(False)
                self.curtain_part.hide()
                self.profile.show_lines([])
                self.frequencies.clear()
                if self._projecting:
                    self._projecting = []
                    self.session.cancel()
                self.session._in_thread("measures", lambda: None, lambda _: None)  # what is measured now is not shown
                self._say("")
            else:
                self.rows = [row for row in self.rows if row["volume"] in [layer.name for layer in comparison.layers]]
                self.curtain.setChecked(comparison.curtain is not None)
                self.curtain_part.setVisible(comparison.curtain is not None)
                self._show_table()
            self._show_buttons()

    def _bring(self) -> None:
        """Bring what lies on another grid, or is no float32, onto the one that is measured on; then measure."""
        comparison = self.comparison
        assert comparison is not None
        missing = [layer for layer in comparison.layers if layer not in comparison.arrays]
        grid = comparison.grid

        def work() -> list[tuple[Image, NDArray[np.float32] | None, str]]:
            brought: list[tuple[Image, NDArray[np.float32] | None, str]] = []
            for layer in missing:
                try:
                    brought.append((layer, on_grid(volume_of(layer), grid), ""))
                except ScanError as error:
                    brought.append((layer, None, f"{layer.name}: {error}"))
            return brought

        def done(brought: list[tuple[Image, NDArray[np.float32] | None, str]]) -> None:
            if self.comparison is not comparison:
                return
            for layer, array, sentence in brought:
                if array is None:
                    show_warning(sentence)
                else:
                    comparison.take_array(layer, array)
            self._fit()

        if missing:
            self._say("Resampling " + ", ".join(layer.name for layer in missing) + " …")
            self.session._in_thread("measures", work, done, self._sorry)
        else:
            self._fit()

    def _fit(self) -> None:
        """Bring the volumes to the reference's unit, where that is asked for; then measure."""
        comparison = self.comparison
        assert comparison is not None
        reference = comparison.reference
        if not self.fit_scale.isChecked() or reference is None or reference not in comparison.arrays:
            self._measure()
            return
        truth, mask = comparison.arrays[reference], field_of_view(comparison.grid)
        others = [layer for layer in comparison.layers if layer is not reference and layer in comparison.arrays]

        def work() -> list[tuple[Image, NDArray[np.float32], float, float]]:
            fitted = []
            for layer in others:
                array = comparison.arrays[layer]
                scale, offset = fit_scale(array, truth, mask)
                fitted.append((layer, np.float32(scale) * array + np.float32(offset), scale, offset))
            return fitted

        def done(fitted: list[tuple[Image, NDArray[np.float32], float, float]]) -> None:
            if self.comparison is not comparison:
                return
            for each in fitted:
                comparison.take_fit(*each)
            comparison.show_differences(self.differences.isChecked())
            self._measure()

        self._say("Fitting scale and offset …")
        self.session._in_thread("measures", work, done, self._sorry)

    # -- measures --------------------------------------------------------------------------------------------------

    def _range_edited(self) -> None:
        if self.data_range.text() != self._range:
            self._range = self.data_range.text()
            self._measure()

    def _measure(self) -> None:
        """Measure volume after volume in a thread; each has its row, and its figure in its cell, as it is done."""
        comparison = self.comparison
        if comparison is None:
            return
        reference = comparison.reference
        layers = [layer for layer in comparison.layers if layer in comparison.arrays]
        if reference is not None and reference not in layers:
            self._say("The reference cannot be measured with: choose another.", error=True)
            return
        where, grid = self.region.currentData(), comparison.grid
        try:
            reach = float(self.data_range.text()) if self.data_range.text().strip() else None
        except ValueError:
            self._say(f"The data range {self.data_range.text()} is no number: clear it, or give one.", error=True)
            return
        similarity: tuple[Similarity, ...] = ("2d", "3d") if self.more.isChecked() else ("2d",)
        self.rows, self._regions = [], []
        for layer in comparison.layers:
            comparison.caption(layer, "reference" if layer is reference else "")
        waiting = [layer for layer in layers if layer is not reference] + [x for x in layers if x is reference]
        truth = None if reference is None else comparison.arrays[reference]

        def work(layer: Image) -> tuple[list[Region], list[Row]]:
            found = self._regions or regions(where, grid)
            volumes, wide = {layer.name: comparison.arrays[layer]}, reach
            if reference is not None and truth is not None:
                volumes[reference.name] = truth
                if wide is None:  # not that of a region: where it is uniform it has none
                    low, high = value_range(truth, field_of_view(grid)[None])
                    wide = high - low if high > low else None
            rows = table(
                volumes,
                None if reference is None or layer is reference else reference.name,
                found,
                wide,
                ssim=similarity,
                voxel_size=grid.scale,
                background=found[0].name if where is not None and len(found) > 1 else None,
            )
            return found, [row | self._residual_of(layer) for row in rows if row["volume"] == layer.name]

        def begin(layer: Image) -> None:
            self._say(f"Measuring {layer.name} …")
            self.session._in_thread("measures", lambda: work(layer), lambda result: done(layer, *result), self._sorry)

        def done(layer: Image, found: list[Region], rows: list[Row]) -> None:
            if self.comparison is not comparison:
                return
            self._regions = found
            self.rows += rows
            comparison.caption(layer, _caption(rows[0]) if layer is not reference else "reference")
            self._show_table()
            waiting.remove(layer)
            if waiting:
                begin(waiting[0])
            else:
                self._say(self._summary())
                self._count()
                self._correlate()

        begin(waiting[0])

    def _residual_of(self, layer: Image) -> Row:
        """What was found when it was projected, or else by the run that made it."""
        told = told_by(layer).get("figures") or {}
        return self._residuals.get(layer) or ({"residual": told["residual"]} if "residual" in told else {})

    def _ask_for_residuals(self) -> None:
        """Let the process project volume after volume; each residual comes into the table as it is there."""
        comparison, scan = self.comparison, self.session.scan
        if comparison is None or scan is None:
            show_warning("There is no scan to project the volumes for: open theirs in the Scan dock.")
            return
        if self.session.state != "idle":
            show_warning("A job runs already: press Finish or Cancel first.")
            return
        layers = self.viewer.layers
        could = phase_of if scan.kind == "mri" else lambda layer, _: can_be_judged_on(layer)
        self._projecting = [layer for layer in comparison.layers if could(layer, layers)]
        without = [layer.name for layer in comparison.layers if layer not in self._projecting]
        if without:
            why = "have no phase" if scan.kind == "mri" else "are no volumes of cubic voxels in mm"
            show_warning(f"{', '.join(without)} {why}, so they have no residual.")
        self._project()

    def _project(self) -> None:
        scan = self.session.scan
        if not self._projecting or scan is None or self.session.state != "idle":
            self._projecting = []
            return
        layer = self._projecting[0]
        placed = {} if scan.kind == "mri" else {"shape": layer.data.shape, "voxel_size": float(layer.scale[0])}
        self._say(f"Projecting {layer.name} …")
        self.session.run(DataConsistencyJob(scan=scan.path, options=scan.options, **placed), layer, quietly=True)

    def _projected(self, message: object) -> None:
        """A job ended; if it was for a residual, it comes into the table, and the next volume's turn has come."""
        if not self._projecting or not isinstance(self.session.job, DataConsistencyJob):
            return
        layer = self._projecting.pop(0)
        if not isinstance(message, Finished) or not message.complete:
            self._projecting = []
        else:
            self._residuals[layer] = {key: message.figures[key] for key in RESIDUALS if key in message.figures}
            self.rows = [
                {key: full[key] for key in columns([full])}
                for row in self.rows
                for full in (row | self._residuals[layer] if row["volume"] == layer.name else row,)
            ]
            self._show_table()
        if self._projecting:
            QTimer.singleShot(0, self._project)
        elif self.comparison is not None:
            self._say(self._summary())

    def _summary(self) -> str:
        """What the figures are worth: range, region, and what was resampled."""
        comparison = self.comparison
        assert comparison is not None
        said = []
        reach = next((row["data_range"] for row in self.rows if "data_range" in row), None)
        if reach is not None:
            own = "as you gave it" if self.data_range.text().strip() else "the reference's"
            self.data_range.setPlaceholderText(f"{reach:.4g}, the reference's")
            said.append(f"Data range {reach:.4g}, {own}.")
        if self._regions:
            names = [region.name for region in self._regions]
            said.append(f"Measured in the {names[0]}." if len(names) == 1 else f"Measured in {len(names)} regions.")
        if comparison.resampled:
            of = comparison.reference or comparison.layers[0]
            verb = "was" if len(comparison.resampled) == 1 else "were"
            said.append(f"{', '.join(comparison.resampled)} {verb} resampled onto the grid of {of.name}.")
        if comparison.fits and comparison.reference is not None:
            fitted = [f"{layer.name} × {a:.3g} {b:+.3g}" for layer, (a, b) in comparison.fits.items()]
            said.append(f"Brought to the unit of {comparison.reference.name}: {', '.join(fitted)}.")
        if comparison.reference is None:
            said.append("Without a reference there are no PSNR, SSIM and NRMSE.")
        return " ".join(said)

    def _show_table(self) -> None:
        """The table of the rows that there are; the best of a column in bold."""
        self.results.setVisible(bool(self.rows))
        if not self.rows:
            return
        several = len({row["region"] for row in self.rows}) > 1
        measured = any("psnr" in row for row in self.rows)
        keys = [key for key in columns(self.rows) if self._is_shown(key, several, measured)]
        self.table.setColumnCount(len(keys))
        self.table.setRowCount(len(self.rows))
        self.table.setHorizontalHeaderLabels([SHORT.get(key, COLUMNS.get(key, key)) for key in keys])
        for i, key in enumerate(keys):
            heading = self.table.horizontalHeaderItem(i)
            if heading is not None:
                heading.setToolTip(COLUMNS.get(key, key))
        best: dict[tuple[str, str], float] = {}
        for key, better in BEST.items():
            for region in {row["region"] for row in self.rows}:
                there = [row[key] for row in self.rows if row["region"] == region and key in row]
                there = [value for value in there if math.isfinite(value)]
                if len(there) > 1:
                    best[key, region] = better(there)
        for i, row in enumerate(self.rows):
            for j, key in enumerate(keys):
                item = QTableWidgetItem(_number(key, row.get(key, "")))
                if key not in ("volume", "region"):
                    item.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
                if key in row and best.get((key, row["region"])) == row[key]:
                    font = item.font()
                    font.setBold(True)
                    item.setFont(font)
                self.table.setItem(i, j, item)
        header, bar = self.table.horizontalHeader(), self.table.horizontalScrollBar()
        if header is None or bar is None:
            return
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        if len(keys) <= FEW:
            header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        below = 0 if len(keys) <= FEW else bar.sizeHint().height()
        tall = sum(self.table.rowHeight(i) for i in range(min(len(self.rows), MOST_ROWS)))
        self.table.setFixedHeight(header.sizeHint().height() + tall + below + 2 * self.table.frameWidth() + 2)

    def _is_shown(self, key: str, several: bool, measured: bool) -> bool:
        if key == "region":
            return several
        if self.more.isChecked() or not measured:
            return True
        return key in SHORT or (several and key == "contrast_to_noise") or (key == "residual" and bool(self._residuals))

    def _copy(self) -> None:
        """The table as it is shown, cells between tabs."""
        texts = []
        keys = range(self.table.columnCount())
        texts.append([self._heading(j) for j in keys])
        for i in range(self.table.rowCount()):
            cells = (self.table.item(i, j) for j in keys)
            texts.append(["" if cell is None else cell.text() for cell in cells])
        clipboard = QApplication.clipboard()
        if clipboard is not None:
            clipboard.setText("\n".join("\t".join(line) for line in texts))

    def _heading(self, column: int) -> str:
        item = self.table.horizontalHeaderItem(column)
        return "" if item is None else item.toolTip()

    def _ask_for_csv(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Write the table", "", "CSV (*.csv)")
        if path:
            where, rows = Path(path).with_suffix(".csv"), list(self.rows)
            self._write(lambda: write_csv(where, rows), "table")

    def _ask_for_figure(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Write the measures as a figure", "", "PNG (*.png)")
        if path:
            where, rows = Path(path).with_suffix(".png"), list(self.rows)
            self._write(lambda: write_figure(where, rows), "figure")

    def _write(self, work: Any, what: str) -> None:
        self.session._in_thread(what, work, lambda path: show_info(f"The {what} was written to {path}."))

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _show_differences(self) -> None:
        comparison = self.comparison
        if comparison is not None:
            if comparison.curtain is not None:
                self.curtain.setChecked(False)
                self._show_curtain()
            comparison.show_differences(self.differences.isChecked())

    def _show_curtain(self) -> None:
        comparison = self.comparison
        if comparison is None:
            return
        wanted = self.curtain.isChecked()
        if wanted and not comparison.show_curtain(self.on_left.currentData(), self.on_right.currentData()):
            show_warning("These volumes are not on one grid yet: wait until they were resampled.")
            self.curtain.setChecked(False)
        elif not wanted:
            comparison.hide_curtain()
        self.curtain_part.setVisible(self.curtain.isChecked())
        self._curtain_moved()

    def _move_curtain(self, value: int) -> None:
        if self.comparison is not None:
            self.comparison.curtain_place = value / SLIDER

    def _curtain_moved(self) -> None:
        if self.comparison is not None:
            self.curtain_place.blockSignals(True)
            self.curtain_place.setValue(round(SLIDER * self.comparison.curtain_place))
            self.curtain_place.blockSignals(False)

    def _look_along(self, axis: int) -> None:
        if self.comparison is not None:
            self.comparison.look_along(axis)

    # -- along a line, values, and about the cursor ----------------------------------------------------------------

    def _lines(self) -> list[tuple[Image, NDArray[np.float32], str]]:
        """The volumes that are on the grid, and the colour that stands for each."""
        comparison = self.comparison
        if comparison is None:
            return []
        others = [layer for layer in comparison.layers if layer is not comparison.reference]
        shades = dict(zip(others, SHADES, strict=False))
        there = [layer for layer in comparison.layers if layer in comparison.arrays]
        return [(layer, comparison.arrays[layer], shades.get(layer, "")) for layer in there]

    def _draw(self) -> None:
        if self.comparison is not None:
            self.comparison.drawing = self.draw.isChecked()

    def _forget_line(self) -> None:
        if self.comparison is not None:
            self.comparison.forget_line()

    def _line_moved(self) -> None:
        if not self._profile_due.isActive():
            self._profile_due.start()

    def _slice_moved(self) -> None:
        """The curves are drawn when the slider rests: amid its way they would make every slice late."""
        self._profile_due.stop()
        self._rest.start()

    def _show_profile(self) -> None:
        """The values of all volumes along the line, and how wide its largest edge is."""
        comparison = self.comparison
        with contextlib.suppress(RuntimeError):  # the dock is being deleted
            if comparison is None or comparison.line is None:
                self.profile.show_lines([])
                return
            start, end = comparison.line
            if np.allclose(start, end):
                return
            lines = []
            for layer, array, shade in self._lines():
                found = line_profile(array, comparison.grid, start, end)
                width = "no edge" if math.isnan(found.edge_width) else f"edge {found.edge_width:.3g} mm"
                lines.append(Line(f"{layer.name}, {width}", found.position, found.value, shade))
            self.profile.show_lines(lines)

    def _count(self) -> None:
        """The histogram of all volumes in the field of view, counted in a thread, where it can be seen."""
        comparison = self.comparison
        if comparison is None or not self.histogram_section.isExpanded():
            return
        lines, mask = self._lines(), field_of_view(comparison.grid)

        def done(counted: tuple[NDArray[np.float64], NDArray[np.int64]]) -> None:
            edges, counts = counted
            middle = (edges[1:] + edges[:-1]) / 2
            self.histogram.show_lines(
                [
                    Line(layer.name, middle, np.where(count > 0, count, np.nan), shade)
                    for (layer, _, shade), count in zip(lines, counts, strict=True)
                ]
            )

        arrays = [array for _, array, _ in lines]
        self.session._in_thread("histogram", lambda: histogram(arrays, mask), done, self._sorry)

    def _correlate(self) -> None:
        """The frequencies of volume after volume, in a thread, where they can be seen."""
        comparison = self.comparison
        if comparison is None or not self._regions or not self.frequencies_section.isExpanded():
            return
        lines, reference, plots = self._lines(), comparison.reference, self.frequencies
        grid, region, view = comparison.grid, self._regions[0], field_of_view(comparison.grid)
        halves = reference is None and len(lines) == 2
        other = lines[1][1] if halves else None if reference is None else comparison.arrays[reference]
        waiting = lines[:1] if halves else [line for line in lines if line[0] is not reference]
        plots.clear("Correlating …")

        def begin() -> None:
            layer, array, shade = waiting.pop(0)
            name = "half their difference" if halves and not region.uniform else layer.name
            work = functools.partial(spectra, array, other, grid, view, region, halves)
            self.session._in_thread("frequencies", work, functools.partial(done, name, shade), sorry)

        def done(name: str, shade: str, found: Spectra) -> None:
            if self.comparison is not comparison:
                return
            plots.add(name, shade, found, halves)
            if waiting:
                begin()
            else:
                plots.say_what_they_are(region, None if reference is None else reference.name, halves)

        def sorry(error: Exception) -> None:
            plots.clear()
            self._sorry(error)

        begin()

    def _on_move(self, *_: object) -> None:
        """The cursor moved, or the slice beneath it."""
        try:
            if self.comparison is not None and self.loupe_section.isExpanded() and not self._follow.isActive():
                self._follow.start()
        except RuntimeError:  # the dock is gone
            with contextlib.suppress(ValueError):
                self.viewer.mouse_move_callbacks.remove(self._on_move)

    def _show_around(self) -> None:
        """What lies about the cursor in each volume."""
        comparison, viewer = self.comparison, self.viewer
        if comparison is None or viewer.dims.ndisplay != 2:
            return
        grid, more = comparison.grid, viewer.dims.ndim - 3
        place = np.array(viewer.cursor.position[-3:], dtype=float)
        voxel = (place - np.array(grid.translate)) / np.array(grid.scale)
        displayed = [axis - more for axis in viewer.dims.displayed]
        # Arrays that were brought to the reference's unit are seen with its contrast.
        like = comparison.reference if comparison.fits else None
        found = [(layer, around(array, like or layer, tuple(voxel), displayed)) for layer, array, _ in self._lines()]
        pictures = [(layer.name, picture) for layer, picture in found if picture is not None]
        if pictures:
            self.loupe.show_pictures(pictures)

    # -- telling ---------------------------------------------------------------------------------------------------

    def _say(self, text: str, error: bool = False) -> None:
        shade = colour("error") if error else "#8a929c"
        self.status.setText(f"<span style='color:{shade}'>{html.escape(text)}</span>" if text else "")

    def _sorry(self, error: Exception) -> None:
        self._say("")
        if isinstance(error, ScanError):
            self._say(str(error), error=True)
        self.session._report(error)


def compare_results(session: Session, beside: QWidget) -> CompareDock:
    """Open the Compare dock, and compare what the last reconstruction showed, with the truth where the scan has one.

    Parameters
    ----------
    session
        The viewer's.
    beside
        A widget in a dock: a Compare dock that is new shares its place, as a tab in front of it.

    Returns
    -------
    The dock. Where there are no two volumes it waits for a choice.
    """
    window = session.viewer.window
    frame, dock = window.add_plugin_dock_widget("napari-recon", "Compare", tabify=False)
    here = frame_of(beside)
    if here is not None and frame not in window._qt_window.tabifiedDockWidgets(here):
        window._qt_window.tabifyDockWidget(here, frame)
    frame.show()
    frame.raise_()
    layers = [layer for layer in session.viewer.layers if can_be_compared(layer) and "volume" in told_by(layer)]
    last = next((told_by(layer)["job"] for layer in reversed(layers) if told_by(layer)["volume"] == "result"), None)
    scan = session.scan
    dock.compare_layers(
        [layer for layer in layers if told_by(layer)["job"] == last],
        scan.truth if scan is not None and last is not None else None,
    )
    return dock


def _choice(tip: str) -> QComboBox:
    combo = QComboBox()
    combo.setToolTip(tip)
    combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
    combo.setMinimumContentsLength(6)
    return combo


def _offer(combo: QComboBox, choices: Sequence[Any], none: str) -> None:
    """Offer layers by their names, None by a word, and keep to what was chosen."""
    before = combo.currentData()
    combo.blockSignals(True)
    combo.clear()
    for choice in choices:
        combo.addItem(none if choice is None else choice.name, choice)
        if choice is before:
            combo.setCurrentIndex(combo.count() - 1)
    combo.blockSignals(False)


def _number(key: str, value: Any) -> str:
    """A measure for a person; the table's file has it in full."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "equal" if key == "psnr" and value > 0 else "–"
    return f"{value:.2f}" if key == "psnr" else f"{value:.4f}" if key.startswith("ssim") else f"{value:.3g}"


def _caption(row: Row) -> str:
    """A volume's figures in its cell; empty where there are none."""
    if "psnr" not in row:
        return ""
    psnr = f"{row['psnr']:.1f} dB" if math.isfinite(row["psnr"]) else "equal"
    return psnr + (f", SSIM {row['ssim']:.3f}" if math.isfinite(row.get("ssim", math.nan)) else "")
