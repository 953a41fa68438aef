"""The *Scan* dock: open a scan, see what it is and what looks wrong, correct it, show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QAction, QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import (
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QMenu,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_recon.jobs.job import CoilMapsJob
from napari_recon.scans.kspace import KSpaceOptions
from napari_recon.scans.scan import ScanOptions
from napari_recon.widgets.forms import ModelForm
from napari_recon.widgets.session import Session
from napari_recon.widgets.session_file import ENDING
from napari_recon.widgets.style import Scrolled, colour, note, section

if TYPE_CHECKING:
    import napari.viewer

SETTLE = 400
"""Milliseconds that a correction rests before the scan is read anew."""


class ScanDock(Scrolled):
    """Opens a scan and shows what it is. Scans may also be dropped onto the dock."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__()
        self.session = Session.of(napari_viewer)
        self.setAcceptDrops(True)
        layout = self.content

        self.open_file = QPushButton("Open file …")
        self.open_file.setToolTip(
            "A scan in one file: scan.toml, HDF5 (.h5, .nxs), MATLAB (.mat); k-space as fastMRI's or ISMRMRD's HDF5, "
            "BART's .cfl, or .npy with a sidecar."
        )
        self.open_file.clicked.connect(self._ask_for_file)
        self.open_folder = QPushButton("Open folder …")
        self.open_folder.setToolTip("A scan in a folder: the Walnut layout, or TIFFs beside a scan.toml.")
        self.open_folder.clicked.connect(self._ask_for_folder)
        self.samples = QPushButton("Sample")
        self.samples.setToolTip("Open one of the scans that come with napari-recon.")
        self.samples.setMenu(self._sample_menu())
        row = QHBoxLayout()
        row.setSpacing(4)
        row.addWidget(self.open_file, 1)
        row.addWidget(self.open_folder, 1)
        row.addWidget(self.samples)
        layout.addLayout(row)
        self.save_session = QPushButton("Save session …")
        self.save_session.setToolTip("Keep the scan's path, the volumes, how they were made, and the view in a folder.")
        self.save_session.clicked.connect(self._ask_where_to_save)
        self.open_session = QPushButton("Open session …")
        self.open_session.setToolTip(f"Open a folder that was saved as a session, NAME{ENDING}.")
        self.open_session.clicked.connect(self._ask_for_session)
        row = QHBoxLayout()
        row.setSpacing(4)
        row.addWidget(self.open_session, 1)
        row.addWidget(self.save_session, 1)
        layout.addLayout(row)

        self.title = QLabel()
        self.title.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.title.setWordWrap(True)
        layout.addWidget(self.title)

        self.details = QWidget()
        details = QVBoxLayout(self.details)
        details.setContentsMargins(0, 0, 0, 0)
        details.setSpacing(5)
        self.summary = QFormLayout()
        self.summary.setContentsMargins(0, 0, 0, 0)
        self.summary.setVerticalSpacing(0)
        self.summary.setHorizontalSpacing(12)
        self.summary.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
        details.addLayout(self.summary)
        self.checks = QLabel()
        self.checks.setWordWrap(True)
        self.checks.setTextFormat(Qt.TextFormat.RichText)
        details.addWidget(self.checks)

        self.options = ModelForm(ScanOptions, skip=["half"], units={"axis_offset": "px"})
        self.corrections = section("Views and corrections", self.options)
        details.addWidget(self.corrections)
        self.kspace_options = ModelForm(KSpaceOptions)
        self.coils_and_samples = section("Coils and samples", self.kspace_options)
        details.addWidget(self.coils_and_samples)

        self.show_projections = QPushButton("Show projections")
        self.show_projections.clicked.connect(self.session.add_projections)
        self.show_geometry = QPushButton("Show geometry")
        self.show_geometry.setToolTip("Add the source's path, the detector and the volume's box as 3D layers in mm.")
        self.show_geometry.clicked.connect(self.session.add_geometry)
        row = QHBoxLayout()
        row.setSpacing(4)
        row.addWidget(self.show_projections)
        self.show_coil_maps = QPushButton("Show coil maps")
        self.show_coil_maps.setToolTip(
            "Add the coils' sensitivities as layers, magnitude and phase: those of the scan, or else estimated ones."
        )
        self.show_coil_maps.clicked.connect(self.session.add_coil_maps)
        row.addWidget(self.show_geometry)
        row.addWidget(self.show_coil_maps)
        details.addLayout(row)
        layout.addWidget(self.details)
        layout.addStretch(1)

        self._settle = QTimer(self)
        self._settle.setSingleShot(True)
        self._settle.setInterval(SETTLE)
        self._settle.timeout.connect(self._apply_options)
        for form in (self.options, self.kspace_options):
            form.changed.connect(self._settle.start)
        self.session.busy_changed.connect(self._show_busy)
        self.session.scan_changed.connect(self._show_scan)
        self.session.checks_changed.connect(self._show_checks)
        self.session.state_changed.connect(self._show_state)
        self.session.stage_changed.connect(self._show_state)
        self._show_scan()
        self._show_checks()

    # -- opening ---------------------------------------------------------------------------------------------------

    def _ask_for_file(self) -> None:
        path, _ = QFileDialog.getOpenFileName(
            self,
            "Open a scan",
            "",
            "Scans (*.toml *.h5 *.hdf5 *.hdf *.nxs *.mat *.tif *.tiff *.cfl *.hdr *.npy);;All files (*)",
        )
        if path:
            self.session.open(path)

    def _ask_for_folder(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open a scan's folder")
        if path:
            self.session.open(path)

    def _ask_for_session(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open a session")
        if path:
            self.session.open_session(path)

    def _ask_where_to_save(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the session", "", f"Sessions (*{ENDING})")
        if path:
            self.session.save_session(path)

    def _sample_menu(self) -> QMenu:
        from napari_recon.widgets.contributions import SAMPLES, sample_path

        menu = QMenu(self)
        for name, title in SAMPLES.items():
            action = QAction(title, menu)
            action.triggered.connect(lambda _=False, n=name: self.session.open(sample_path(n)))
            menu.addAction(action)
        return menu

    def dragEnterEvent(self, event: QDragEnterEvent | None) -> None:
        """Welcome files and folders."""
        if event is not None and dropped_paths(event):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent | None) -> None:
        """Open what was dropped."""
        if event is None:
            return
        paths = dropped_paths(event)
        event.acceptProposedAction()
        if len(paths) == 1:
            self.session.open(paths[0])
        elif paths:
            show_error(f"{len(paths)} files were dropped; a scan is one file or folder: drop the folder around them.")

    # -- showing ---------------------------------------------------------------------------------------------------

    def _apply_options(self) -> None:
        mri = self.session.scan is not None and self.session.scan.kind == "mri"
        self.session.set_options(self.kspace_options.value() if mri else self.options.value())

    def _show_busy(self, text: str) -> None:
        if text:
            self.title.setText(note(text))
        else:
            self._show_title()

    def _show_title(self) -> None:
        scan = self.session.scan
        if scan is None:
            self.title.setText(note("Open a scan, drop one here, or start with a sample."))
        else:
            self.title.setText(f"<b>{scan.name}</b>")
            self.title.setToolTip(str(scan.path))

    def _show_scan(self) -> None:
        scan = self.session.scan
        self._show_title()
        self.details.setVisible(scan is not None)
        while self.summary.rowCount():
            self.summary.removeRow(0)
        if scan is None:
            return
        for name, value in self.session.summary.items():
            text = QLabel(value)
            text.setWordWrap(True)
            text.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
            self.summary.addRow(QLabel(note(name)), text)
        self._settle.stop()
        mri = scan.kind == "mri"
        self.corrections.setVisible(not mri)
        self.coils_and_samples.setVisible(mri)
        self.show_geometry.setVisible(not mri)
        self.show_coil_maps.setVisible(mri)
        self._show_state()
        self.show_projections.setText("Show k-space" if mri else "Show projections")
        self.show_projections.setToolTip(
            "Add k-space, its sampling mask, and the coils' images as layers."
            if mri
            else "Add the line integrals as a layer; a view is read when it is shown."
        )
        form: ModelForm[Any] = self.kspace_options if mri else self.options
        form.blockSignals(True)
        if scan.kind == "mri":
            form.suggest("coils", scan.recording.shape[0], high=scan.recording.shape[0])
            form.suggest("acceleration", 4.0)
        else:
            have = len(scan.recording.frames)
            form.suggest("views", have, high=have)
            form.suggest("axis_offset", round(float(scan.recording.geometry.axis_offset.mean()), 2))
        form.set_value(scan.options)
        form.blockSignals(False)

    def _show_state(self, _: str = "") -> None:
        """Coil maps are the process's work, which does one thing at a time."""
        idle = self.session.state == "idle"
        self.show_coil_maps.setEnabled(idle)
        if isinstance(self.session.job, CoilMapsJob):
            self._show_busy("" if idle else f"{self.session.stage} …")

    def _show_checks(self) -> None:
        checks = self.session.checks
        if checks is None:
            self.checks.setText(note("Looking at the data …"))
        elif not checks:
            self.checks.setText(note("✓ Nothing looks wrong with the data."))
        else:
            warning = colour("warning")
            lines = (f"<p style='margin:2px 0'><span style='color:{warning}'>▲</span> {text}</p>" for text in checks)
            self.checks.setText("".join(lines))


def dropped_paths(event: QDropEvent) -> list[Path]:
    """Files and folders that are being dragged."""
    data = event.mimeData()
    return [Path(url.toLocalFile()) for url in data.urls() if url.isLocalFile()] if data is not None else []
