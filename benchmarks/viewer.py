"""What a run costs the person in front of napari: stalls of the event loop, the wait for the first patch, an upload.

    python -m benchmarks.viewer [SIZE] [VIEWS]        (needs a screen; xvfb-run gives a virtual one)

A stall is the longest time between two beats of a 2 ms timer in the event loop. OpenGL's drawing is left out: the
window is not shown while stalls are measured, and every changed box is uploaded as if it were. The napari layers that
appear when a volume is there are napari's to build; they are a row of their own. The first patch is timed in a shown
window, from the press of Run to its upload, and to the end of the drawing that shows it (software OpenGL under Xvfb
takes most of that). Drawing and computing share the processor's cores in all of these.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import napari
import numpy as np
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication

from napari_recon.jobs.messages import Failed
from napari_recon.learning.simulate import simulate
from napari_recon.widgets.demo import arrange
from napari_recon.widgets.layers import LiveVolume, look_at, upload_boxes, volume_layer
from napari_recon.widgets.reconstruct_dock import ReconstructDock

BEAT = 2
"""Milliseconds between two beats of the event loop."""
PATIENCE = 900.0


class Beats:
    """Times of a timer's ticks; the longest gap is the longest stall."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._timer = QTimer()
        self._timer.setInterval(BEAT)
        self._timer.timeout.connect(lambda: self.times.append(time.perf_counter()))

    def __enter__(self) -> Beats:
        self.times = [time.perf_counter()]
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.stop()

    def longest(self, leave_out: list[tuple[float, float]] = ()) -> float:  # type: ignore[assignment]
        """Seconds of the longest gap that overlaps none of some spans of time."""
        gaps = [
            after - before
            for before, after in zip(self.times, self.times[1:], strict=False)
            if not any(before < stop and start < after for start, stop in leave_out)
        ]
        return max(gaps, default=0.0)


def wait(until: Any) -> None:
    """Run the event loop until something holds."""
    end = time.perf_counter() + PATIENCE
    while not until():
        if time.perf_counter() > end:
            raise TimeoutError("the viewer's benchmark waited too long")
        QApplication.processEvents()
        time.sleep(0.0005)


def open_docks(scan: Path, patch: int, shown: bool) -> tuple[napari.Viewer, ReconstructDock]:
    """A viewer with both docks, the scan, and a warm process."""
    viewer = napari.Viewer(show=shown, show_welcome_screen=False)
    _, dock = arrange(viewer)
    dock.session.open(scan)
    wait(lambda: dock.session.checks is not None and dock.session.worker.ready)
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"patch": patch}))
    return viewer, dock


def run(size: int = 128, views: int = 60, patch: int = 64) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows: what, value, unit, goal."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scan = simulate("walnut", Path(folder) / "walnut", size=size, views=views)
        rows += stalls(scan, patch)
        rows += first_patch(scan, patch)
    rows += uploads(2 * size, 64)
    print(f"{'what':64} {'value':>9} {'goal':>9}")
    for row in rows:
        print(f"{row['what']:64} {row['value']:9.3g} {row.get('goal', ''):>9}")
    return rows


def stalls(scan: Path, patch: int) -> list[dict[str, Any]]:
    """Longest stalls from opening the docks to the end of a run; nothing is drawn."""
    viewer, dock = open_docks(scan, patch, shown=False)
    session, building = dock.session, []
    add = session._add_volume

    def timed_add(message: Any) -> None:
        start = time.perf_counter()
        add(message)
        building.append((start, time.perf_counter()))

    session._add_volume = timed_add  # type: ignore[method-assign]
    may_draw, LiveVolume.may_draw = LiveVolume.may_draw, True  # type: ignore[assignment]
    ended: list[object] = []
    session.finished.connect(ended.append)
    try:
        with Beats() as opening:
            session.checks = dock._plan = None
            session.open(scan)
            wait(lambda: session.checks is not None and dock._plan is not None)
        with Beats() as running:
            dock.run.click()
            wait(lambda: bool(ended))
    finally:
        LiveVolume.may_draw = may_draw  # type: ignore[method-assign]
        viewer.close()
    if isinstance(ended[0], Failed):
        raise RuntimeError(ended[0].text)
    return [
        {"what": "longest stall while a scan is opened, checked and planned, ms", "value": 1e3 * opening.longest()},
        {
            "what": "longest stall of the event loop during a run, ms",
            "value": 1e3 * running.longest(building),
            "goal": "< 50",
        },
        {
            "what": "napari builds a layer and its controls for a volume, ms",
            "value": 1e3 * max(stop - start for start, stop in building),
        },
    ]


def first_patch(scan: Path, patch: int) -> list[dict[str, Any]]:
    """From Run to the first patch, when the process is warm and FDK and the operator are there from a run before."""
    viewer, dock = open_docks(scan, patch, shown=True)
    session = dock.session
    ended: list[object] = []
    session.finished.connect(ended.append)
    try:
        dock.run.click()
        wait(lambda: session.progress is not None and session.progress.name == "result")
        dock.finish.click()
        wait(lambda: bool(ended))
        wait(dock.run.isEnabled)
        start = time.perf_counter()
        dock.run.click()
        wait(
            lambda: (
                session.display is not None
                and "result" in session.display.live
                and session.progress is not None
                and session.progress.name == "result"
            )
        )
        told = time.perf_counter() - start
        live = session.display.live["result"]
        wait(lambda: not live._drawn or "result" not in session.display.live)
        uploaded = time.perf_counter() - start
        wait(lambda: live._drawn)
        QApplication.processEvents()
        drawn = time.perf_counter() - start
        dock.cancel.click()
        wait(lambda: len(ended) == 2)
    finally:
        viewer.close()
    return [
        {"what": "Run pressed to the first patch's arrival in the viewer, s", "value": told, "goal": "< 1.5"},
        {"what": "Run pressed to the first patch's upload, s", "value": uploaded, "goal": "< 1.5"},
        {"what": "Run pressed to the first patch drawn (software GL counts), s", "value": drawn},
    ]


def uploads(size: int, patch: int, repeats: int = 7) -> list[dict[str, Any]]:
    """One patch of a 3D layer against ``layer.data = array``, on the host's side, least of several."""
    viewer = napari.Viewer(show_welcome_screen=False)
    array = np.random.default_rng(0).random((size,) * 3, dtype=np.float32)
    layer = viewer.add_layer(volume_layer("volume", array, 0.1, (0.0, 0.0, 0.0), {}))
    viewer.dims.ndisplay = 3
    look_at(viewer, [layer])
    box = (slice(size // 4, size // 4 + patch),) * 3
    ours, napari_s = [], []
    try:
        for _ in range(repeats):
            QApplication.processEvents()
            start = time.perf_counter()
            upload_boxes(viewer, layer, [box])
            ours.append(time.perf_counter() - start)
            QApplication.processEvents()
            start = time.perf_counter()
            layer.data = array
            napari_s.append(time.perf_counter() - start)
    finally:
        viewer.close()
    return [
        {"what": f"upload of one {patch}^3 patch of a {size}^3 layer, ms", "value": 1e3 * min(ours)},
        {"what": f"layer.data = array of {size}^3, ms", "value": 1e3 * min(napari_s)},
        {"what": "ratio", "value": min(napari_s) / min(ours), "goal": ">= 20"},
    ]


if __name__ == "__main__":
    run(*(int(argument) for argument in sys.argv[1:]))
