"""What a comparison shows in its dock: curves of all volumes in one plot, and what lies about the cursor, magnified."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from qtpy.QtCore import QRectF, QSize, Qt
from qtpy.QtGui import QColor, QImage, QPainter, QPaintEvent
from qtpy.QtWidgets import QLabel, QSizePolicy, QVBoxLayout, QWidget

from napari_recon.widgets.curve import COLOURS, Curve
from napari_recon.widgets.style import colour

if TYPE_CHECKING:
    from napari.layers import Image
    from numpy.typing import NDArray

SHADES = (*COLOURS, "#ff6f91", "#b388ff", "#4dd0e1")
"""Of the volumes, in turn; the reference is drawn in the colour of text."""
EVERY = 0.12
"""Seconds between two drawings while a line is drawn or the slice moves."""


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes
    ----------
    label
        What the legend says; empty for a line that it does not name.
    x, y
        Its points.
    colour
        #rrggbb, or empty for that of text, dashed: the reference.
    """

    label: str
    x: NDArray[Any]
    y: NDArray[Any]
    colour: str


class _Lines(Curve):
    """Lines over whatever they are over; the axes fit them."""

    def __init__(self, over: str, log: bool, height: int) -> None:
        super().__init__({}, height)
        self._over, self._log = over, log
        self._wanted: Sequence[Line] = ()

    def show_lines(self, wanted: Sequence[Line]) -> None:
        """Draw lines, now or as soon as the last drawing is old enough."""
        self._wanted = wanted
        wait = self._drawn + EVERY - time.perf_counter()
        if wait <= 0:
            self._draw()
        elif not self._later.isActive():
            self._later.start(int(1000 * wait))

    def _draw(self) -> None:
        while len(self.lines) < len(self._wanted):
            self.lines += self.axes.plot([], [], lw=1.2)
        for i, drawn in enumerate(self.lines):
            line = self._wanted[i] if i < len(self._wanted) else None
            drawn.set_data([] if line is None else line.x, [] if line is None else line.y)
            if line is not None:
                drawn.set_color(line.colour or colour("text"))
                drawn.set_linestyle("-" if line.colour else "--")
        if not self._wanted:
            self.hide()
            return
        self.axes.set_yscale("log" if self._log else "linear")
        self.axes.relim()
        self.axes.autoscale_view()
        self.axes.set_title(self._over, fontsize=8, loc="right", pad=3, color=colour("text"))
        self._paint_in_theme()
        self.axes.xaxis.set_major_locator(MaxNLocator(6))
        self._drawn = time.perf_counter()
        self.show()
        self.draw_idle()


class Plot(QWidget):
    """Lines with a legend beneath.

    Parameters
    ----------
    over
        What the lines are over, with its unit.
    log
        Whether the scale is logarithmic.
    """

    def __init__(self, over: str, log: bool = False, height: int = 150) -> None:
        super().__init__()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        self.curve = _Lines(over, log, height)
        self.legend = QLabel()
        layout.addWidget(self.curve)
        layout.addWidget(self.legend)
        self.lines: list[Line] = []

    def show_lines(self, lines: Sequence[Line]) -> None:
        """Draw lines; none takes the plot away."""
        self.lines = list(lines)
        self.curve.show_lines(self.lines)
        words = []
        for line in (line for line in self.lines if line.label):
            sign = "━" if line.colour else "╍"
            words.append(f"<span style='color:{line.colour or colour('text')}'>{sign} {html.escape(line.label)}</span>")
        self.legend.setText("<br>".join(words))
        self.legend.setFixedHeight(self.legend.sizeHint().height() if words else 0)


class Loupe(QWidget):
    """What lies about one place in each volume, magnified, beside each other; a cross marks the place."""

    GAP, CAPTION, COLUMNS, HALF = 4, 15, 3, 10

    def __init__(self) -> None:
        super().__init__()
        policy = QSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)
        self.pictures: list[tuple[str, NDArray[np.uint8]]] = []

    def hasHeightForWidth(self) -> bool:
        """The pictures are square."""
        return True

    def heightForWidth(self, width: int) -> int:
        """As many rows as there are pictures for."""
        rows = max(1, math.ceil(len(self.pictures) / self.COLUMNS))
        return rows * (self._edge(width) + self.CAPTION)

    def sizeHint(self) -> QSize:
        """Beside the canvas."""
        return QSize(340, self.heightForWidth(340))

    def minimumSizeHint(self) -> QSize:
        """Small: the dock decides."""
        return QSize(120, self.heightForWidth(120))

    def _edge(self, width: int) -> int:
        columns = min(self.COLUMNS, max(2, len(self.pictures)))
        return (width - (columns - 1) * self.GAP) // columns

    def show_pictures(self, pictures: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
        """Show pictures (h, w, 4) by name, as :func:`around` makes them."""
        other = len(pictures) != len(self.pictures)
        self.pictures = list(pictures)
        if other:
            self.updateGeometry()
        self.update()

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Paint the pictures and their names."""
        painter = QPainter(self)
        font = painter.font()
        font.setPixelSize(11)
        painter.setFont(font)
        edge = self._edge(self.width())
        for i, (name, pixels) in enumerate(self.pictures):
            left = i % self.COLUMNS * (edge + self.GAP)
            top = i // self.COLUMNS * (edge + self.CAPTION)
            rows, columns = pixels.shape[:2]
            image = QImage(pixels.tobytes(), columns, rows, 4 * columns, QImage.Format.Format_RGBA8888)
            painter.drawImage(QRectF(left, top + self.CAPTION, edge, edge), image)
            painter.setPen(QColor(colour("text")))
            words = painter.fontMetrics().elidedText(name, Qt.TextElideMode.ElideRight, edge)
            painter.drawText(QRectF(left, top, edge, self.CAPTION), Qt.AlignmentFlag.AlignCenter, words)
            painter.setPen(QColor(255, 176, 0, 150))
            middle_x, middle_y, arm = left + edge / 2, top + self.CAPTION + edge / 2, edge / 12
            painter.drawLine(round(middle_x - arm), round(middle_y), round(middle_x + arm), round(middle_y))
            painter.drawLine(round(middle_x), round(middle_y - arm), round(middle_x), round(middle_y + arm))
        painter.end()


def around(
    array: NDArray[np.float32], layer: Image, voxel: Sequence[float], displayed: Sequence[int], half: int = Loupe.HALF
) -> NDArray[np.uint8] | None:
    """A square of a slice about a voxel in a layer's contrast and colours.

    Parameters
    ----------
    array
        The volume (D, H, W).
    layer
        Whose contrast limits, gamma and colormap are taken.
    voxel
        (z, y, x).
    displayed
        The two axes that the slice shows, downwards and to the right.
    half
        Voxels to either side.

    Returns
    -------
    (2 half + 1, 2 half + 1, 4) of uint8, transparent beyond the volume; None where the voxel is outside of it.
    """
    centre = [round(v) for v in voxel]
    if any(not 0 <= c < n for c, n in zip(centre, array.shape, strict=True)):
        return None
    window = [slice(c, c + 1) for c in centre]
    for axis in displayed:
        window[axis] = slice(max(0, centre[axis] - half), centre[axis] + half + 1)
    hidden = next(axis for axis in range(3) if axis not in displayed)
    values = np.take(array[tuple(window)], 0, axis=hidden)
    if list(displayed) != sorted(displayed):
        values = values.T
    low, high = layer.contrast_limits
    share = np.clip((np.nan_to_num(values) - low) / max(high - low, 1e-30), 0, 1) ** layer.gamma
    colours = (255 * layer.colormap.map(share.ravel()).reshape(*share.shape, 4)).round().astype(np.uint8)
    square = np.zeros((2 * half + 1, 2 * half + 1, 4), np.uint8)
    row, column = (max(0, half - centre[axis]) for axis in displayed)
    square[row : row + colours.shape[0], column : column + colours.shape[1]] = colours
    return square
