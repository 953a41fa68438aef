"""The demo: both docks, a scan with few views, FDK at once, then the learned reconstruction live, patch by patch."""

from __future__ import annotations

import sys
from pathlib import Path

import napari
from qtpy.QtCore import Qt, QTimer

from napari_recon.jobs.job import UnrolledParameters
from napari_recon.jobs.messages import Failed
from napari_recon.widgets.contributions import sample_path
from napari_recon.widgets.reconstruct_dock import METHODS, ReconstructDock
from napari_recon.widgets.scan_dock import ScanDock
from napari_recon.widgets.session import Session

SIZE = (1600, 1000)
PATIENCE = 600
"""Seconds after which a screenshot is taken of what there is."""


def run_demo(screenshot: Path | None = None, sample: str = "few-view-walnut") -> int:
    """Open napari and reconstruct a sample scan before the person's eyes.

    Parameters
    ----------
    screenshot
        Where to save a picture of the window once the run has ended; then napari closes. None leaves it open.
    sample
        The sample scan's name.

    Returns
    -------
    The process's exit status: 0, or 1 if the reconstruction failed (its sentence is on stderr).
    """
    viewer = napari.Viewer(title="napari-recon", show_welcome_screen=False)
    demo = Demo(viewer, screenshot)
    demo.session.open(sample_path(sample))
    napari.run()
    return demo.status


class Demo:
    """The steps of the demo, each started by the session's signal that the last is done."""

    def __init__(self, viewer: napari.Viewer, screenshot: Path | None = None) -> None:
        self.viewer, self.screenshot, self.status = viewer, screenshot, 0
        self.session = Session.of(viewer)
        self.docks = arrange(viewer)
        self.session.scan_changed.connect(self._run)
        self.session.finished.connect(self._ended)
        self._started = False
        if screenshot is not None:
            QTimer.singleShot(1000 * PATIENCE, self._take_picture)

    def _run(self) -> None:
        if self.session.scan is not None and not self._started:
            self._started = True
            QTimer.singleShot(0, self._press_run)

    def _press_run(self) -> None:
        dock = self.docks[1]
        dock.method.setCurrentIndex(METHODS.index(UnrolledParameters))
        dock.run.click()

    def _ended(self, message: object) -> None:
        if isinstance(message, Failed):
            self.status = 1
            print(message.text, file=sys.stderr)
        if self.screenshot is not None:
            QTimer.singleShot(500, self._take_picture)  # when the last patch has been drawn

    def _take_picture(self) -> None:
        assert self.screenshot is not None
        self.viewer.screenshot(str(self.screenshot), canvas_only=False, flash=False)
        self.viewer.close()


def arrange(viewer: napari.Viewer) -> tuple[ScanDock, ReconstructDock]:
    """Both docks on the right of a window that shows volumes side by side."""
    viewer.window.resize(*SIZE)
    scan_frame, scan_dock = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    frame, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")

    def share_the_column() -> None:
        wanted = scan_dock.sizeHint().height() + 46
        window = scan_frame.window()
        window.resizeDocks([scan_frame, frame], [wanted, SIZE[1] - wanted], Qt.Orientation.Vertical)
        window.resizeDocks([scan_frame], [360], Qt.Orientation.Horizontal)

    scan_dock.session.checks_changed.connect(lambda: QTimer.singleShot(0, share_the_column))
    return scan_dock, dock
