"""A small curve of how a reconstruction converges."""

from __future__ import annotations

import time
from typing import Any

from matplotlib.backends.backend_qtagg import FigureCanvasQTAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from qtpy.QtCore import QSize, QTimer

from napari_recon.widgets.style import colour

EVERY = 0.7
"""Seconds between two drawings: matplotlib takes tens of milliseconds for one."""
NAMES = {
    "residual": "residual, ‖Ax − y‖ / ‖y‖",
    "change": "relative change of each patch",
    "objective": "objective",
}
"""What figures are called; these are shown rather than others."""
POINTS = 400
"""No more points than the curve has pixels."""


class Curve(FigureCanvasQTAgg):
    """Figures over steps, with a logarithmic scale where they are positive."""

    def __init__(self) -> None:
        figure = Figure(figsize=(3.6, 1.3), dpi=80)
        super().__init__(figure)
        self.setFixedHeight(102)
        self.axes = figure.add_axes((0.15, 0.22, 0.82, 0.62))
        (self.line,) = self.axes.plot([], [], lw=1.5, color="#ffb000")
        self.name = ""
        self._drawn = 0.0
        self._latest: dict[str, list[tuple[int, float]]] = {}
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.timeout.connect(self._draw)
        self._paint_in_theme()
        self.hide()

    def minimumSizeHint(self) -> QSize:
        """Small: the dock decides."""
        return QSize(120, 60)

    def _paint_in_theme(self) -> None:
        text = colour("text")
        self.figure.set_facecolor(colour("background"))
        self.axes.set_facecolor(colour("background"))
        for spine in self.axes.spines.values():
            spine.set_color(colour("primary"))
        self.axes.tick_params(colors=text, labelsize=7, length=2, which="both")
        self.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        self.axes.grid(True, color=colour("foreground"), lw=0.5)

    def clear(self) -> None:
        """Forget the last run's curve."""
        self._later.stop()
        self._latest = {}
        self.line.set_data([], [])
        self.hide()

    def show_figures(self, curves: dict[str, list[tuple[int, float]]], at_once: bool = False) -> None:
        """Show the figure with the most points; the residual where several have as many.

        Parameters
        ----------
        curves
            Name -> (step, value) pairs.
        at_once
            Draw now rather than when it is due.
        """
        self._latest = curves
        wait = 0.0 if at_once else self._drawn + EVERY - time.perf_counter()
        if wait <= 0:
            self._draw()
        elif not self._later.isActive():
            self._later.start(int(1000 * wait))

    def _draw(self) -> None:
        curves = {name: points for name, points in self._latest.items() if len(points) > 1}
        if not curves:
            return
        self.name = max(curves, key=lambda n: (len(curves[n]), n in NAMES, n == "residual"))
        points = curves[self.name]
        points = points[:: max(1, len(points) // POINTS)] + points[-1:]
        steps, values = zip(*points, strict=True)
        self.line.set_data(steps, values)
        title = NAMES.get(self.name, self.name.replace("_", " "))
        self.axes.set_title(title, fontsize=8, loc="left", pad=3, color=colour("text"))
        scale: Any = "log" if min(values) > 0 and max(values) > 3 * min(values) else "linear"
        if self.axes.get_yscale() != scale:
            self.axes.set_yscale(scale)
            if scale == "log":  # plain numbers: matplotlib's powers of ten take longer to set than all else to draw
                self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                self.axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
                self.axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        self.axes.relim()
        self.axes.autoscale_view()
        self._paint_in_theme()
        self._drawn = time.perf_counter()
        if self.isHidden():
            self.show()
        self.draw_idle()
