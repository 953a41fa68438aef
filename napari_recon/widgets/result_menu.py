"""The menu *This result*: what a layer tells of how it was made, done again or handed on, and its volume exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from napari.layers import Image
from napari.utils.notifications import show_error, show_info, show_warning
from qtpy.QtCore import Qt
from qtpy.QtGui import QAction, QGuiApplication
from qtpy.QtWidgets import QFileDialog, QMenu, QPushButton, QSizePolicy

from napari_recon.jobs.job import Job, ReconstructionJob
from napari_recon.jobs.provenance import command_line, not_repeated, python_code, reconstruction_of
from napari_recon.jobs.volumes import ENDINGS, FORMATS
from napari_recon.scans.errors import ScanError
from napari_recon.widgets.displays import LAYER, can_be_exported, start_layer, told_by
from napari_recon.widgets.movie import ENDINGS as MOVIES
from napari_recon.widgets.movie import write_movie

if TYPE_CHECKING:
    from napari.layers import Layer

    from napari_recon.widgets.session import Session


class ResultMenu(QPushButton):
    """A button with a menu about the selected result, or else the last one.

    Parameters
    ----------
    session
        The viewer's.
    take
        Puts a job into the forms.
    """

    def __init__(self, session: Session, take: Callable[[ReconstructionJob], None]) -> None:
        super().__init__()
        self.session, self._take = session, take
        self.setText("This result")
        self.setToolTip("How the selected volume (or else the last result) was made: run it again, copy it, export it.")
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        menu = QMenu(self)
        menu.setToolTipsVisible(True)

        def action(text: str, tip: str, do: Callable[[], None]) -> QAction:
            made = QAction(text, menu)
            made.setToolTip(tip)
            made.triggered.connect(lambda _=False: do())
            menu.addAction(made)
            return made

        self.title = action("", "The volume that is selected, or else the last result.", lambda: None)
        self.title.setEnabled(False)
        self.again = action(
            "Run again", "The same job; on the same device the result is the same bit for bit.", self._run_again
        )
        self.settings = action(
            "Take its settings",
            "Put its method, parameters and grid into the forms, and read the scan as it did.",
            self._take_settings,
        )
        self.as_command = action(
            "Copy as command line", "What to type in a shell.", lambda: self._copy(command_line, "command line")
        )
        self.as_python = action("Copy as Python", "A short script.", lambda: self._copy(python_code, "Python"))
        menu.addSeparator()
        self.export = action(
            "Export …",
            "Write the volume as TIFF, OME-Zarr, NIfTI, MRC or DICOM, in mm; as floats, but DICOM.",
            lambda: self._export(None),
        )
        self.export_16 = action(
            "Export in 16 bits …",
            "Half as large: whole numbers, with the scale that makes values of them again.",
            lambda: self._export(16),
        )
        self.movie = action(
            "Movie …",
            "Turn what is shown once about its axis, or in 2D go through the slices, and write that as .mp4 or .gif; "
            "by napari-animation, if it is installed.",
            self._make_movie,
        )
        menu.aboutToShow.connect(self.refresh)
        self.setMenu(menu)
        self.refresh()

    @property
    def layer(self) -> Image | None:
        """The volume that the menu is about."""
        layers = self.session.viewer.layers
        selected = layers.selection.active
        if selected is not None and can_be_exported(selected):
            return selected
        results = (x for x in reversed(layers) if can_be_exported(x) and reconstruction_of(told_by(x)) is not None)
        return next(results, None)

    @property
    def job(self) -> ReconstructionJob | None:
        """How it was made; None where it does not tell."""
        return None if self.layer is None else reconstruction_of(told_by(self.layer))

    def refresh(self) -> None:
        """Offer what can be done with the volume that the menu is about."""
        layer, job, idle = self.layer, self.job, self.session.state == "idle"
        self.title.setText(layer.name if layer is not None else "There is no result yet")
        self.again.setEnabled(job is not None and idle)
        self.settings.setEnabled(job is not None and idle)
        for action in (self.as_command, self.as_python):
            action.setEnabled(job is not None)
        for action in (self.export, self.export_16, self.movie):
            action.setEnabled(layer is not None)

    # -- what it does ----------------------------------------------------------------------------------------------

    def _run_again(self) -> None:
        layer, job = self.layer, self.job
        if layer is None or job is None:
            return
        start = start_layer(job.parameters, self.session.viewer.layers)
        began = str(getattr(job.parameters, "start", ""))
        if start is None and began.startswith(LAYER):
            show_warning(f"It began from the {began}, which is not there any more.")
            return
        self._tell_what_is_not_repeated(layer)
        # Its file, if it had one, stays as it is.
        self.session.run(job.model_copy(update={"output": None}), start, steered=False)

    def _take_settings(self) -> None:
        job, scan = self.job, self.session.scan
        if job is None:
            return
        if scan is not None and job.scan == scan.path and type(job.options) is type(scan.options):
            self.session.set_options(job.options)
        self._take(job)

    def _copy(self, say: Callable[[Job], str], what: str) -> None:
        layer, job, clipboard = self.layer, self.job, QGuiApplication.clipboard()
        if layer is None or job is None or clipboard is None:
            return
        try:
            text = say(job)
        except ScanError as error:
            show_error(str(error))
            return
        clipboard.setText(text)
        self._tell_what_is_not_repeated(layer)
        show_info(f"How {layer.name} was made is in the clipboard, as {what}.")

    def _tell_what_is_not_repeated(self, layer: Layer) -> None:
        for sentence in not_repeated(told_by(layer).get("provenance") or {}):
            show_warning(sentence)

    def _make_movie(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Write a movie of what is shown", "", "Movies (*.mp4 *.gif)")
        if not path:
            return
        where = Path(path) if path.lower().endswith(MOVIES) else Path(path + MOVIES[0])
        QGuiApplication.setOverrideCursor(Qt.CursorShape.WaitCursor)
        try:
            write_movie(self.session.viewer, where)
        except ScanError as error:
            show_error(str(error))
        else:
            show_info(f"The movie was written to {where}.")
        finally:
            QGuiApplication.restoreOverrideCursor()

    def _export(self, bits: Literal[16] | None) -> None:
        layer = self.layer
        if layer is None:
            return
        kinds = {f"{name} (*{' *'.join(endings)})": endings[0] for name, endings in FORMATS.items()}
        name = "".join(c if c.isalnum() or c in " -_" else "_" for c in layer.name)
        path, kind = QFileDialog.getSaveFileName(self, f"Export {layer.name}", name, ";;".join(kinds))
        if path:
            if not path.lower().endswith(ENDINGS):
                path += kinds.get(kind, ".tif")
            self.session.export(layer, Path(path), bits)
