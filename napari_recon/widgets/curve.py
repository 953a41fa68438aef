"""Small curves of how a reconstruction or a fit converges."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_qtagg import FigureCanvasQTAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from qtpy.QtCore import QSize, QTimer
from qtpy.QtWidgets import QComboBox, QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from napari_recon.widgets.style import colour

EVERY = 0.7
"""Seconds between two drawings: matplotlib takes tens of milliseconds for one."""
COLOURS = ("#ffb000", "#4fa8ff", "#7bc96f")
"""Of the lines, in turn."""
EARLIER = ("#8f7fb8", "#5f9ea0", "#b07d8a", "#8a9a5b", "#7d8aa5", "#a58a6a")
"""Of the lines of earlier runs, in turn: muted."""
POINTS = 400
"""No more points than the curve has pixels."""
FIGURES = {
    "residual": ("Residual, ‖Ax − y‖ / ‖y‖", ("residual",)),
    "objective": ("Objective", ("objective",)),
    "primal dual": ("Primal and dual (dashed) residual", ("primal", "dual")),
    "change": ("Relative change of each patch", ("change",)),
}
"""What can be shown of a run: what it is called, and the figures that it is made of."""

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Figures over steps: name -> (step, value) pairs."""


class Curve(FigureCanvasQTAgg):
    """Figures over steps, a line each, with a logarithmic scale where they are positive.

    Parameters
    ----------
    names
        Figures to draw, and what their lines are called.
    height
        In pixels.
    """

    def __init__(self, names: Mapping[str, str], height: int = 102) -> None:
        figure = Figure(figsize=(3.6, 1.3), dpi=80)
        super().__init__(figure)
        self.setFixedHeight(height)
        self.names = dict(names)
        self.axes = figure.add_axes((0.15, 22 / height, 0.82, 1 - 40 / height))
        self.lines = [
            self.axes.plot([], [], lw=1.5, color=c, marker=".", markersize=4)[0]
            for _, c in zip(self.names, COLOURS, strict=False)
        ]
        self._drawn = 0.0
        self._latest: Curves = {}
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

    def show_figures(self, curves: Curves, at_once: bool = False) -> None:
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
        seen: list[float] = []
        for line, name in zip(self.lines, self.names, strict=False):
            if name in self._latest:
                seen += _set_points(line, self._latest[name])
        self._show(seen)

    def _show(self, seen: Sequence[float]) -> None:
        """Fit the axes to the values that the lines have, and draw; nothing where there are none."""
        if not seen:
            return
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


class _RunsCurve(Curve):
    """One of the things that can be shown of a run, and thinner the same of earlier runs."""

    def __init__(self, height: int) -> None:
        super().__init__({"first": "", "second": ""}, height)
        for line in self.lines:
            line.set_marker("")
            line.set_color(COLOURS[0])
        self.lines[1].set_linestyle("--")
        self.shown = ""
        self.earlier: Sequence[tuple[str, Curves]] = ()
        self._thin: list[Line2D] = []

    def _draw(self) -> None:
        _, names = FIGURES.get(self.shown, ("", (self.shown,)))
        for line in (*self.lines, *self._thin):
            line.set_data([], [])
        by_pairs = all("pairs" in run for run in (self._latest, *(curves for _, curves in self.earlier)) if run)
        seen: list[float] = []
        for line, name in zip(self.lines, names, strict=False):
            seen += _set_points(line, _over_pairs(self._latest, name, by_pairs))
        while len(self._thin) < 2 * len(self.earlier):
            style = "-" if len(self._thin) % 2 == 0 else "--"
            self._thin += self.axes.plot([], [], lw=0.9, ls=style, color=EARLIER[len(self._thin) // 2 % len(EARLIER)])
        for i, (_, curves) in enumerate(self.earlier):
            for line, name in zip(self._thin[2 * i : 2 * i + 2], names, strict=False):
                seen += _set_points(line, _over_pairs(curves, name, by_pairs))
        over = "pairs of A and Aᵀ" if by_pairs else "steps"
        self.axes.set_title(f"over {over}", fontsize=8, loc="right", pad=3, color=colour("text"))
        self._show(seen)


class Convergence(QWidget):
    """How a run converges, beside earlier ones: which figure is shown can be chosen.

    Parameters
    ----------
    forget
        Called when the person wants the earlier runs to go.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        super().__init__()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        row = QHBoxLayout()
        self.figure = QComboBox()
        self.figure.setToolTip("What the curves show.")
        self.figure.currentIndexChanged.connect(self._choose)
        self.clear_earlier = QPushButton("Clear")
        self.clear_earlier.setToolTip("Forget the curves of earlier runs.")
        self.clear_earlier.clicked.connect(lambda: forget())
        row.addWidget(self.figure, 1)
        row.addWidget(self.clear_earlier)
        layout.addLayout(row)
        self.curve = _RunsCurve(132)
        layout.addWidget(self.curve)
        self.legend = QLabel()
        self.legend.setWordWrap(True)
        layout.addWidget(self.legend)
        self._wanted = "residual"
        self.hide()

    def show_runs(
        self, label: str, curves: Curves, earlier: Sequence[tuple[str, Curves]] = (), at_once: bool = False
    ) -> None:
        """Show what runs there are.

        Parameters
        ----------
        label, curves
            The run that is on, or was last: what it is called, and its figures over steps.
        earlier
            The same of earlier ones.
        at_once
            Draw now rather than when it is due.
        """
        earlier = [(name, run) for name, run in earlier if run]
        there = [run for run in (curves, *(run for _, run in earlier)) if run]
        figures = {name for run in there for name, points in run.items() if len(points) > 1 and name != "pairs"}
        choices = [name for name, (_, parts) in FIGURES.items() if figures >= set(parts)]
        choices += sorted(figures - {part for _, parts in FIGURES.values() for part in parts})
        self.setVisible(bool(choices))
        if not choices:
            self.curve.clear()
            return
        if [self.figure.itemData(i) for i in range(self.figure.count())] != choices:
            self.figure.blockSignals(True)
            self.figure.clear()
            for name in choices:
                self.figure.addItem(FIGURES.get(name, (name.replace("_", " ").capitalize(),))[0], name)
            self.figure.setCurrentIndex(choices.index(self._wanted) if self._wanted in choices else 0)
            self.figure.blockSignals(False)
        self.curve.shown = self.figure.currentData()
        self.curve.earlier = earlier
        self.clear_earlier.setVisible(bool(earlier))
        names = [(label, COLOURS[0])] if curves else []
        names += [(name, EARLIER[i % len(EARLIER)]) for i, (name, _) in enumerate(earlier)]
        words = [(html.escape(name).replace(" ", "&nbsp;"), c) for name, c in names]  # a name is not broken
        text = " &nbsp; ".join(f"<span style='color:{c}'>━&nbsp;{name}</span>" for name, c in words)
        if text != self.legend.text():
            self.legend.setText(text)
        self.legend.setVisible(bool(earlier))
        self.curve.show_figures(curves, at_once)

    def _choose(self, _: int) -> None:
        self._wanted = self.curve.shown = self.figure.currentData()
        self.curve._draw()


def _set_points(line: Line2D, points: Sequence[tuple[float, float]]) -> list[float]:
    """Give a line points, no more than can be seen; their values."""
    points = [*points[: -1 : max(1, len(points) // POINTS)], *points[-1:]]
    line.set_data([x for x, _ in points], [value for _, value in points])
    return [value for _, value in points]


def _over_pairs(curves: Curves, name: str, by_pairs: bool) -> Sequence[tuple[float, float]]:
    """A figure over its steps, or over the pairs of A and Aᵀ that they took: what runs can be compared by."""
    points = curves.get(name, ())
    if not by_pairs:
        return points
    pairs = dict(curves.get("pairs", ()))
    return [(pairs[step], value) for step, value in points if step in pairs]
