"""Small curves of how a reconstruction or a fit converges."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
COLOURS = ("#ffb000", "#4fa8ff", "#7bc96f")
"""Of the lines, in turn."""
POINTS = 400
"""No more points than the curve has pixels."""


class Curve(FigureCanvasQTAgg):
    """Figures over steps, with a logarithmic scale where they are positive.

    Parameters
    ----------
    names
        Figures to draw as a line each, and what the lines are called; none draws one, that with the most points (the
        residual where several have as many).
    height
        In pixels.
    """

    def __init__(self, names: Mapping[str, str] | None = None, height: int = 102) -> None:
        figure = Figure(figsize=(3.6, 1.3), dpi=80)
        super().__init__(figure)
        self.setFixedHeight(height)
        self.names = dict(names or {})
        self.axes = figure.add_axes((0.15, 22 / height, 0.82, 1 - 40 / height))
        self.lines = [
            self.axes.plot([], [], lw=1.5, color=c, marker=".", markersize=4 if names else 0)[0]
            for _, c in zip(self.names or ("",), COLOURS, strict=False)
        ]
        self.name = ""
        self._drawn = 0.0
        self._latest: dict[str, list[tuple[int, float]]] = {}
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.timeout.connect(self._draw)
        self._paint_in_theme()
        at = 0.0
        for line, title in zip(self.lines, self.names.values(), strict=False):  # cheaper to draw than a legend
            text = self.axes.text(at, 1.04, title, color=line.get_color(), fontsize=8, transform=self.axes.transAxes)
            text.set_in_layout(False)
            at += (len(title) + 3) / 58
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
        self.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        self.axes.grid(True, color=colour("foreground"), lw=0.5)

    def clear(self) -> None:
        """Forget the last run's curve."""
        self._later.stop()
        self._latest = {}
        for line in self.lines:
            line.set_data([], [])
        self.hide()

    def show_figures(self, curves: dict[str, list[tuple[int, float]]], at_once: bool = False) -> None:
        """Show figures over their steps.

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
        least = 1 if self.names else 2
        curves = {name: points for name, points in self._latest.items() if len(points) >= least}
        if self.names:
            chosen = [name for name in self.names if name in curves]
        else:
            chosen = sorted(curves, key=lambda n: (len(curves[n]), n in NAMES, n == "residual"))[-1:]
        if not chosen:
            return
        self.name = chosen[0]
        seen: list[float] = []
        for i, name in enumerate(chosen):
            points = curves[name]
            points = points[: -1 : max(1, len(points) // POINTS)] + points[-1:]
            steps, values = zip(*points, strict=True)
            self.lines[list(self.names).index(name) if self.names else i].set_data(steps, values)
            seen += values
        if not self.names:
            title = NAMES.get(self.name, self.name.replace("_", " "))
            self.axes.set_title(title, fontsize=8, loc="left", pad=3, color=colour("text"))
        scale: Any = "log" if min(seen) > 0 and max(seen) > 3 * min(seen) else "linear"
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
