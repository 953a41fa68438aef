"""The filter λ of a normal operator as a small figure with axes in 1/mm.

Painted with Qt: matplotlib takes 50 ms for this, and the event loop has no 50 ms during a fit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QImage, QPainter, QPaintEvent
from qtpy.QtWidgets import QSizePolicy, QWidget

from napari_recon.widgets.operator_displays import DECADES, ticks, zero_frequency
from napari_recon.widgets.style import colour

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_recon.jobs.messages import VolumeReady

PIXELS = 256
"""No more samples along an axis than the panel has pixels."""
MARGIN = 34, 16, 40, 32
"""Pixels left of, above, right of and below the slices."""
GAP = 40
"""Pixels between the two slices."""


class FilterPanel(QWidget):
    """Two slices of λ through the zero frequency, over (f_x, f_y) and (f_x, f_z), and a colour bar."""

    def __init__(self) -> None:
        super().__init__()
        self.setFixedHeight(152)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.slices: list[tuple[str, QImage, QRectF]] = []
        self.hide()

    def minimumSizeHint(self) -> QSize:
        """Small: the dock decides."""
        return QSize(120, 60)

    def clear(self) -> None:
        """Forget the last operator's filter."""
        self.slices = []
        self.hide()

    def show_filter(self, volume: NDArray[np.float32], ready: VolumeReady) -> None:
        """Show a "filter" volume, log10 of |λ| over its maximum; only two of its slices are read."""
        z, y, _ = zero_frequency(ready)
        low = [t - s / 2 for t, s in zip(ready.translate, ready.scale, strict=True)]
        high = [a + n * s for a, n, s in zip(low, ready.shape, ready.scale, strict=True)]
        self.slices = []
        for label, plane, axis in (("y", volume[z], 1), ("z", volume[:, y], 0)):
            thinned = plane[tuple(slice(None, None, -(-n // PIXELS)) for n in plane.shape)]
            level = np.clip(255 * (1 + thinned / DECADES), 0, 255).astype(np.uint8)
            image = _image(_colours()[level])
            self.slices.append((label, image, QRectF(low[2], low[axis], high[2] - low[2], high[axis] - low[axis])))
        self.show()
        self.update()

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Paint the slices, their axes and the colour bar."""
        if not self.slices:
            return
        painter = QPainter(self)
        painter.setPen(QColor(colour("text")))
        font = painter.font()
        font.setPixelSize(10)
        painter.setFont(font)
        left, top, right, bottom = MARGIN
        width = (self.width() - left - right - GAP) / 2
        height = self.height() - top - bottom
        for i, (label, image, extent) in enumerate(self.slices):
            frame = QRectF(left + i * (width + GAP), top, width, height)
            painter.drawImage(frame, image)
            painter.drawText(QPointF(frame.left(), top - 5), f"λ over f_x and f_{label}")
            self._paint_axes(painter, frame, extent)
        self._paint_bar(painter, QRectF(self.width() - right + 8, top, 8, height))
        painter.end()

    def _paint_axes(self, painter: QPainter, frame: QRectF, extent: QRectF) -> None:
        """Numbers below and to the left; in a slice as in the viewer, y and z grow downwards."""
        numbers, below = 14, Qt.AlignmentFlag.AlignHCenter | Qt.AlignmentFlag.AlignTop
        beside = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        for f in ticks(extent.left(), extent.right(), 4):
            x = frame.left() + (f - extent.left()) / extent.width() * frame.width()
            painter.drawLine(QPointF(x, frame.bottom()), QPointF(x, frame.bottom() + 2))
            painter.drawText(QRectF(x - 20, frame.bottom() + 2, 40, numbers), below, f"{f:g}")
        for f in ticks(extent.top(), extent.bottom(), 4):
            y = frame.top() + (f - extent.top()) / extent.height() * frame.height()
            painter.drawLine(QPointF(frame.left() - 2, y), QPointF(frame.left(), y))
            painter.drawText(QRectF(frame.left() - 34, y - 7, 30, numbers), beside, f"{f:g}")
        painter.drawText(QRectF(frame.left(), frame.bottom() + 15, frame.width(), numbers), below, "f_x, 1/mm")

    def _paint_bar(self, painter: QPainter, frame: QRectF) -> None:
        painter.drawImage(frame, _image(_colours()[::-1, None]))
        for decade in range(int(DECADES) + 1):
            y = frame.top() + decade / DECADES * frame.height()
            painter.drawText(QPointF(frame.right() + 3, y + 4), f"1e-{decade}" if decade else "1")


@functools.cache
def _colours() -> NDArray[np.uint8]:
    """The 256 colours of inferno, (256, 4)."""
    from matplotlib import colormaps

    return (255 * colormaps["inferno"](np.arange(256))).round().astype(np.uint8)


def _image(pixels: NDArray[np.uint8]) -> QImage:
    """An image (rows, columns, RGBA) that owns its pixels."""
    rows, columns = pixels.shape[:2]
    return QImage(
        np.ascontiguousarray(pixels).tobytes(), columns, rows, 4 * columns, QImage.Format.Format_RGBA8888
    ).copy()
