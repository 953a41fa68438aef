"""What comparing costs the person in front of napari: the time to the grid, and stalls while the slice slider moves.

    python -m benchmarks.compare [SIZE] [VOLUMES]        (needs a screen; xvfb-run gives a virtual one)

The time to the grid is from the press of Compare until the volumes stand beside each other, named and linked; measures
come after it, in a thread. A stall is the longest time between two beats of a 2 ms timer in the event loop while the
slider goes through the slices: first while the volumes are measured, then once they were, then with the differences
beneath them, then with a line, whose profiles are drawn when the slider rests. OpenGL's drawing is left out: the window
is not shown.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import napari
import numpy as np
from qtpy.QtWidgets import QApplication

from benchmarks.viewer import Beats, wait
from napari_recon.scans.grid import Grid
from napari_recon.widgets.compare_dock import CompareDock
from napari_recon.widgets.layers import volume_layer

VOXEL = 0.1
STOPS = 64
"""Slices that the slider stops at on its way through the volume."""


def volumes(size: int, count: int) -> dict[str, np.ndarray]:
    """A ball with holes, and worse and worse versions of it."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    truth = 0.03 * ((z**2 + y**2 + x**2 < 0.8) & (np.sin(20 * z) * np.sin(20 * y) * np.sin(20 * x) < 0.5))
    rng = np.random.default_rng(0)
    made = {"Truth": truth.astype(np.float32)}
    for i in range(1, count):
        noise = rng.standard_normal(truth.shape, np.float32)
        made[f"Volume {i}"] = made["Truth"] + np.float32(0.001 * i) * noise
    return made


def scrub(viewer: napari.Viewer, size: int) -> float:
    """Seconds of the longest stall while the slider goes through the slices, and of what it leaves to be done."""
    with Beats() as beats:
        for index in np.linspace(0, size - 1, STOPS):
            viewer.dims.set_current_step(0, round(index))
            QApplication.processEvents()
        end = time.perf_counter() + 0.5
        wait(lambda: time.perf_counter() > end)
    return beats.longest()


def run(size: int = 256, count: int = 6) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows: what, value, unit, goal."""
    viewer = napari.Viewer(show=False, show_welcome_screen=False)
    viewer.window.resize(1600, 1000)
    grid = Grid((size,) * 3, VOXEL)
    dock: CompareDock
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
    wait(lambda: dock.session._warm)
    for name, array in volumes(size, count).items():
        layer = volume_layer(name, array, grid.scale, grid.translate, {"shows": "volume"})
        layer.contrast_limits = (0.0, 0.03)
        viewer.add_layer(layer)
    wait(dock.compare.isEnabled)
    stalls = {}
    try:
        start = time.perf_counter()
        dock.compare.click()
        seconds = time.perf_counter() - start
        stalls["while they are measured"] = scrub(viewer, size)
        wait(lambda: bool(dock.rows) and "…" not in dock.status.text())
        measured = time.perf_counter() - start
        stalls["once they were measured"] = scrub(viewer, size)
        dock.differences.click()
        stalls["with differences"] = scrub(viewer, size)
        assert dock.comparison is not None
        dock.profile_section.expand(animate=False)
        dock.comparison.draw_line((0.0, 0.0, -0.4 * size * VOXEL), (0.0, 0.0, 0.4 * size * VOXEL))
        stalls["with differences and profiles"] = scrub(viewer, size)
    finally:
        viewer.close()
    rows = [
        {"what": f"Compare pressed to the grid of {count} volumes of {size}^3, s", "value": seconds, "goal": "< 2"},
        {"what": "Compare pressed to the last measure, s", "value": measured},
    ]
    rows += [
        {"what": f"longest stall while the slice slider moves, {when}, ms", "value": 1e3 * value, "goal": "< 100"}
        for when, value in stalls.items()
    ]
    print(f"{'what':80} {'value':>9} {'goal':>9}")
    for row in rows:
        print(f"{row['what']:80} {row['value']:9.3g} {row.get('goal', ''):>9}")
    return rows


if __name__ == "__main__":
    run(*(int(argument) for argument in sys.argv[1:]))
