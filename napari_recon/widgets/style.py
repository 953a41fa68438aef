"""What the docks look like: napari's own colours, one width, and a scroll bar where the screen is small."""

from __future__ import annotations

import contextlib
import html

from napari.settings import get_settings
from napari.utils.theme import get_theme
from qtpy.QtCore import QObject, QSize, Qt
from qtpy.QtWidgets import QDockWidget, QFrame, QScrollArea, QVBoxLayout, QWidget
from superqt import QCollapsible

WIDTH = 380
"""Pixels that a dock likes to be wide."""
UNBOUNDED = (1 << 24) - 1
"""Qt's largest height of a widget."""


def colour(name: str) -> str:
    """A colour of napari's current theme ("text", "secondary", "warning", "error", "canvas", ...) as #rrggbb."""
    with contextlib.suppress(Exception):
        theme = get_theme(get_settings().appearance.theme)
        return getattr(theme, name).as_hex()
    return {"warning": "#e3b617", "error": "#d2222d", "canvas": "#000000"}.get(name, "#9a9a9a")


def note(text: str) -> str:
    """Text for a label, dimmed: what explains rather than tells."""
    return f"<span style='color:#8a929c'>{html.escape(text)}</span>"


def section(title: str, widget: QWidget) -> QCollapsible:
    """A part of a dock that is folded away until it is asked for."""
    part = QCollapsible(title)
    part.toggleButton().setStyleSheet(
        "QPushButton { background: transparent; border: none; text-align: left; padding: 3px 0px; }"
    )
    outer, inner = part.layout(), part.content().layout()
    if outer is not None and inner is not None:
        outer.setContentsMargins(0, 0, 0, 0)
        inner.setContentsMargins(12, 2, 0, 2)
    part.addWidget(widget)
    part.collapse(animate=False)
    return part


def growing_section(title: str, widget: QWidget) -> QCollapsible:
    """The same of what may grow while it is open: it is as tall as what is in it becomes."""
    part = section(title, widget)
    widget.removeEventFilter(part)  # else superqt bounds it by what it was when it was opened
    part.setDuration(0)
    part.toggled.connect(lambda opened: part.content().setMaximumHeight(UNBOUNDED if opened else 0))
    return part


def frame_of(widget: QWidget) -> QDockWidget | None:
    """The frame in the window that a widget lies in, however deep."""
    here: QObject | None = widget
    while here is not None and not isinstance(here, QDockWidget):
        here = here.parent()
    return here


class Scrolled(QScrollArea):
    """A dock's content, as tall as it likes; ``content`` is the layout to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        inner = QWidget()
        self.content = QVBoxLayout(inner)
        self.content.setContentsMargins(6, 2, 6, 2)
        self.content.setSpacing(5)
        self.setWidget(inner)
        self.setMinimumWidth(320)

    def sizeHint(self) -> QSize:
        """The content's height, so that two docks share a column well."""
        return QSize(WIDTH, self.content.totalHeightForWidth(WIDTH - 24) + 6)
