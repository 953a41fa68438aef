"""The demo: both docks, a scan with few views, FDK at once, then the learned reconstruction live, patch by patch.

It can go on to the comparison of the two with the truth, which the dock's button *Compare* shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import napari
from PIL import Image as Picture
from qtpy.QtCore import Qt, QTimer

from napari_recon.jobs.job import UnrolledParameters
from napari_recon.jobs.messages import Failed
from napari_recon.widgets.compare_dock import CompareDock
from napari_recon.widgets.contributions import sample_path
from napari_recon.widgets.reconstruct_dock import METHODS, ReconstructDock
from napari_recon.widgets.scan_dock import ScanDock
from napari_recon.widgets.session import Session
from napari_recon.widgets.style import frame_of

SIZE, SIZE_OF_COMPARISON = (1600, 1000), (1600, 900)
SETTLE = 1500
"""Milliseconds after which nothing in the window moves any more."""
LINE = -0.16
"""Where the comparison's line lies in the slice, relative to its height: through the kernel."""
PATIENCE = 600
"""Seconds after which a screenshot is taken of what there is."""


def run_demo(screenshot: Path | None = None, compare: bool = False, sample: str = "few-view-walnut") -> int:
    """Open napari and reconstruct a sample scan before the person's eyes.

    Parameters
    ----------
    screenshot
        Where to save a picture of the window once the run has ended; then napari closes. None leaves it open.
    compare
        Whether to go on to the comparison with the truth.
    sample
        The sample scan's name.

    Returns
    -------
    The process's exit status: 0, or 1 if the reconstruction failed (its sentence is on stderr).
    """
    viewer = napari.Viewer(title="napari-recon", show_welcome_screen=False)
    demo = Demo(viewer, screenshot, compare)
    demo.session.open(sample_path(sample))
    napari.run()
    return demo.status


class Demo:
    """The steps of the demo, each started by the session's signal that the last is done."""

    def __init__(self, viewer: napari.Viewer, screenshot: Path | None = None, compare: bool = False) -> None:
        self.viewer, self.screenshot, self.status, self.compare = viewer, screenshot, 0, compare
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
        elif self.compare:
            QTimer.singleShot(500, self._make_room)
            return
        self._end()

    def _make_room(self) -> None:
        """Of the picture of a comparison, which is about the volumes: what else the window holds is folded away."""
        if self.screenshot is not None:
            canvas = self.viewer.window._qt_viewer
            for part in (canvas.dockLayerList, canvas.dockLayerControls, frame_of(self.docks[0])):
                if part is not None:
                    part.hide()
            self.viewer.window.resize(*SIZE_OF_COMPARISON)
        QTimer.singleShot(200, self._press_compare)  # when the canvas has its size

    def _press_compare(self) -> None:
        self.docks[1].compare.click()
        self._wait_for_measures()

    def _wait_for_measures(self) -> None:
        _, dock = self.viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
        assert isinstance(dock, CompareDock)
        if not dock.rows or "…" in dock.status.text():
            QTimer.singleShot(100, self._wait_for_measures)
            return
        if self.screenshot is not None and dock.comparison is not None:
            dock.profile_section.expand(animate=False)
            _, tall, wide = dock.comparison.grid.extent
            dock.comparison.draw_line((0.0, LINE * tall, -0.41 * wide), (0.0, LINE * tall, 0.41 * wide))
            for layer in dock.comparison.layers:
                layer.interpolation2d = "linear"  # few voxels on many pixels
        self._end()

    def _end(self) -> None:
        if self.screenshot is not None:
            QTimer.singleShot(SETTLE, self._take_picture)  # when the last patch has been drawn, and the docks laid out

    def _take_picture(self) -> None:
        assert self.screenshot is not None
        pixels = self.viewer.screenshot(canvas_only=False, flash=False)
        picture = Picture.fromarray(pixels[..., :3]).quantize(256)  # for a page, in a third of the bytes
        picture.save(self.screenshot, format="png", optimize=True)
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
