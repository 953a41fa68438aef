"""A form from a pydantic model: the docks show what a job holds, and nothing is written down twice.

Titles become labels, descriptions tooltips, bounds the bounds of the editors. ``None`` is a box that is not ticked.
"""

from __future__ import annotations

import contextlib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from qtpy.QtCore import QEvent, QObject, Qt, Signal
from qtpy.QtGui import QValidator
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QSizePolicy,
    QSpinBox,
    QToolButton,
    QWidget,
)

Model = TypeVar("Model", bound=BaseModel)

BROWSE = "Browse…"
"""The choice that asks for a file."""


class NumberBox(QDoubleSpinBox):
    """A number over many decades: shown as 0.001 or 2e-05, typed as either, stepped by a tenth of itself."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setDecimals(9)
        self.setStepType(QAbstractSpinBox.StepType.AdaptiveDecimalStepType)

    def textFromValue(self, value: float) -> str:
        """The shortest text of the number."""
        return f"{value:.6g}"

    def valueFromText(self, text: str | None) -> float:
        """The number of a text that :meth:`validate` accepts."""
        return float((text or "0").removeprefix(self.prefix()).removesuffix(self.suffix()))

    def validate(self, text: str | None, position: int) -> tuple[QValidator.State, str, int]:
        """Whether a text is a number within the bounds, or may become one."""
        text = text or ""
        try:
            value = self.valueFromText(text)
        except ValueError:
            return QValidator.State.Intermediate, text, position
        inside = self.minimum() <= value <= self.maximum()
        return (QValidator.State.Acceptable if inside else QValidator.State.Intermediate), text, position


class WheelGuard(QObject):
    """Keeps the mouse wheel from changing a value that is only scrolled past."""

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        if event is None or event.type() != QEvent.Type.Wheel or not isinstance(watched, QWidget) or watched.hasFocus():
            return False
        event.ignore()
        return True


class Editor:
    """One editor: its widget, and how a value is got out of it and put into it."""

    def __init__(
        self, widget: QWidget, get: Callable[[], Any], put: Callable[[Any], None], changed: Sequence[Any]
    ) -> None:
        self.widget, self.get, self.put, self.changed = widget, get, put, list(changed)


def make_editor(annotation: Any, field: FieldInfo, choices: Sequence[str] = (), files: str = "") -> Editor:
    """The editor of a field.

    Parameters
    ----------
    annotation
        The field's type: int, float, bool, str, a Literal, a tuple of some ints or floats, or one of these or None; a
        tuple of any length, a dict (as TOML's ``key = value, ...``), or the path of a folder or None.
    field
        Holds the default and the bounds.
    choices
        Suggestions for a text: it becomes an editable list.
    files
        For a text that may be a file: the dialog's filter, as Qt has it; the list then ends with "Browse…".

    Raises
    ------
    TypeError
        If the type has no editor: a programming error, found when the form is built.
    """
    annotation = _plain(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        (inner,) = [a for a in arguments if a is not type(None)]
        if inner is bool:
            return _tristate()
        if inner is Path:
            return _folder()
        return _optional(make_editor(inner, field, choices))
    if origin is Literal:
        editor, meant = _choice([str(a) for a in arguments]), {str(a): a for a in arguments}
        return Editor(editor.widget, lambda: meant[editor.get()], editor.put, editor.changed)
    if annotation is bool:
        box = QCheckBox()
        return Editor(box, box.isChecked, lambda v: box.setChecked(bool(v)), [box.toggled])
    if annotation is int:
        low, high = _bounds(field, 0, 1_000_000)
        spin = _whole_number(int(low), int(high))
        return Editor(spin, spin.value, lambda v: spin.setValue(int(v)), [spin.valueChanged])
    if annotation is float:
        low, high = _bounds(field, -1e6, 1e6)
        number = NumberBox()
        number.setRange(low, high)
        return Editor(number, number.value, lambda v: number.setValue(float(v)), [number.valueChanged])
    if annotation is str and (choices or files):
        return _choice(choices, editable=True, files=files)
    if annotation is str:
        line = QLineEdit()
        return Editor(line, line.text, lambda v: line.setText(str(v)), [line.editingFinished])
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return _list()
    if origin is tuple and arguments and {_plain(a) for a in arguments} == {int}:
        return _whole_numbers(len(arguments))
    if origin is tuple and arguments and {_plain(a) for a in arguments} == {float}:
        return _numbers(len(arguments), _bounds(field, 0, 1e6))
    if origin is dict:
        return _table()
    raise TypeError(f"no editor for a field of type {annotation}")


def _plain(annotation: Any) -> Any:
    """The type in an ``Annotated`` one."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _bounds(field: FieldInfo, low: float, high: float) -> tuple[float, float]:
    """Bounds of a field's pydantic constraints; an open bound becomes the next number that the editor can show."""
    for constraint in field.metadata:
        low = getattr(constraint, "ge", low)
        high = getattr(constraint, "le", high)
        if (above := getattr(constraint, "gt", None)) is not None:
            low = above + (1 if field.annotation is int else 1e-6)
        if (below := getattr(constraint, "lt", None)) is not None:
            high = below - (1 if field.annotation is int else 1e-6)
    return low, high


def _whole_number(low: int, high: int) -> QSpinBox:
    spin = QSpinBox()
    spin.setRange(low, high)
    spin.setKeyboardTracking(False)
    return spin


def _whole_numbers(count: int) -> Editor:
    widget = QWidget()
    row = QHBoxLayout(widget)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(2)
    spins = [_whole_number(1, 8192) for _ in range(count)]
    for spin in spins:
        spin.setButtonSymbols(QAbstractSpinBox.ButtonSymbols.NoButtons)
        spin.setValue(128)
        spin.setStyleSheet("min-width: 44px")  # napari's style asks for more than three fit beside each other
        row.addWidget(spin)

    def put(values: Sequence[int]) -> None:
        for spin, value in zip(spins, values, strict=True):
            spin.setValue(int(value))

    return Editor(widget, lambda: tuple(s.value() for s in spins), put, [s.valueChanged for s in spins])


def _numbers(count: int, bounds: tuple[float, float]) -> Editor:
    widget = QWidget()
    row = QHBoxLayout(widget)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(2)
    boxes = [NumberBox() for _ in range(count)]
    for box in boxes:
        box.setRange(*bounds)
        row.addWidget(box)

    def put(values: Sequence[float]) -> None:
        for box, value in zip(boxes, values, strict=True):
            box.setValue(float(value))

    return Editor(widget, lambda: tuple(b.value() for b in boxes), put, [b.valueChanged for b in boxes])


def _list() -> Editor:
    """Words or numbers between commas; the model says which of them will not do."""
    line = QLineEdit()

    def get() -> tuple[str, ...]:
        return tuple(part.strip() for part in line.text().split(",") if part.strip())

    def put(values: Sequence[Any]) -> None:
        line.setText(", ".join(map(str, values)))
        line.setCursorPosition(0)  # a long list begins with its first

    return Editor(line, get, put, [line.textChanged])


def _table() -> Editor:
    """A TOML table in a line: ``width = 16, scales = 2``."""
    line = QLineEdit()
    line.setPlaceholderText("key = value, …")

    def get() -> Any:
        """The table, or the text where it is none yet, which the model will refuse."""
        try:
            return tomllib.loads(f"table = {{{line.text()}}}")["table"]
        except tomllib.TOMLDecodeError:
            return line.text()

    def put(table: Mapping[str, Any]) -> None:
        line.setText(tomli_w.dumps(dict(table)).strip().replace("\n", ", "))

    return Editor(line, get, put, [line.textChanged])


def with_browse(line: QLineEdit, ask: Callable[[], None]) -> QWidget:
    """A line for a path, with a button that asks for one."""
    widget, browse = QWidget(), QToolButton()
    row = QHBoxLayout(widget)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(2)
    row.addWidget(line, 1)
    row.addWidget(browse)
    browse.setText("…")
    browse.clicked.connect(lambda: ask())
    return widget


def _folder() -> Editor:
    """The path of a folder; an empty line is none."""
    line = QLineEdit()
    line.setPlaceholderText("none")

    def ask() -> None:
        path = QFileDialog.getExistingDirectory(widget, "Choose a folder", line.text())
        if path:
            line.setText(path)

    widget = with_browse(line, ask)

    def get() -> Path | None:
        return Path(line.text().strip()) if line.text().strip() else None

    return Editor(widget, get, lambda path: line.setText("" if path is None else str(path)), [line.textChanged])


def _choice(values: Sequence[str], editable: bool = False, files: str = "") -> Editor:
    combo = QComboBox()
    combo.addItems([*values, BROWSE] if files else list(values))
    combo.setEditable(editable)
    combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    chosen = combo.currentText()

    def get() -> str:
        """The text, or what a choice stands for that was added with data of its own."""
        if files and combo.currentText() == BROWSE:  # asked about just now
            return chosen
        stands_for = combo.currentData() if combo.currentText() == combo.itemText(combo.currentIndex()) else None
        return combo.currentText() if stands_for is None else str(stands_for)

    def put(value: object) -> None:
        text = str(value)
        place = max(combo.findData(text), combo.findText(text))
        if place < 0 and files and Path(text).suffix:  # a file, shown by its name
            place = combo.findText(BROWSE)
            combo.insertItem(place, Path(text).name, text)
            combo.setItemData(place, text, Qt.ItemDataRole.ToolTipRole)
        if place >= 0:
            combo.setCurrentIndex(place)
        else:
            combo.setCurrentText(text)

    def remember(_: str) -> None:
        nonlocal chosen
        chosen = get()

    def ask(index: int) -> None:
        if combo.itemText(index) == BROWSE:
            path, _ = QFileDialog.getOpenFileName(combo, "Choose a file", "", files)
            put(path or chosen)

    if files:
        combo.currentTextChanged.connect(remember)
        combo.activated.connect(ask)
    return Editor(combo, get, put, [combo.currentTextChanged])


def _tristate() -> Editor:
    """Yes, no, or what the file says."""
    combo = QComboBox()
    for text, value in (("as the file says", None), ("yes", True), ("no", False)):
        combo.addItem(text, value)

    def put(value: bool | None) -> None:
        combo.setCurrentIndex({None: 0, True: 1, False: 2}[value])

    return Editor(combo, combo.currentData, put, [combo.currentIndexChanged])


def _optional(inner: Editor) -> Editor:
    widget = QWidget()
    row = QHBoxLayout(widget)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(4)
    tick = QCheckBox()
    inner.widget.setEnabled(False)
    tick.toggled.connect(inner.widget.setEnabled)
    row.addWidget(tick)
    row.addWidget(inner.widget, 1)
    widget.setFocusProxy(inner.widget)

    def put(value: Any) -> None:
        tick.setChecked(value is not None)
        if value is not None:
            inner.put(value)

    return Editor(widget, lambda: inner.get() if tick.isChecked() else None, put, [tick.toggled, *inner.changed])


class ModelForm(QWidget, Generic[Model]):
    """A form whose value is an instance of a pydantic model.

    Parameters
    ----------
    model
        The model's class; its defaults are what the form starts with.
    skip
        Fields that the form leaves at their defaults.
    choices
        Suggestions for text fields, by name.
    files
        Filters of the file dialog of text fields that may be files, by name.
    units
        Units shown behind numbers, by name.
    """

    changed = Signal()

    def __init__(
        self,
        model: type[Model],
        skip: Sequence[str] = (),
        choices: Mapping[str, Sequence[str]] | None = None,
        files: Mapping[str, str] | None = None,
        units: dict[str, str] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.model = model
        self.editors: dict[str, Editor] = {}
        self._guard = WheelGuard(self)
        layout = QFormLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        layout.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
        layout.setVerticalSpacing(4)
        for name, field in model.model_fields.items():
            if name in skip:
                continue
            editor = make_editor(field.annotation, field, (choices or {}).get(name, ()), (files or {}).get(name, ""))
            label = QLabel(field.title or name.replace("_", " ").capitalize())
            for widget in (label, editor.widget):
                widget.setToolTip(f"<qt>{field.description}</qt>" if field.description else "")
            for widget in (editor.widget, *editor.widget.findChildren(QWidget)):
                if isinstance(widget, (QAbstractSpinBox, QComboBox)):
                    widget.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
                    widget.installEventFilter(self._guard)
                    widget.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
                    if isinstance(widget, (QSpinBox, QDoubleSpinBox)) and units and name in units:
                        widget.setSuffix(f" {units[name]}")
            if not field.is_required() and (default := field.get_default(call_default_factory=True)) is not None:
                editor.put(default)
            for signal in editor.changed:
                signal.connect(self._tell)
            editor.widget.setObjectName(name)
            layout.addRow(label, editor.widget)
            self.editors[name] = editor

    def _tell(self, *_: object) -> None:
        self.changed.emit()

    def values(self) -> dict[str, Any]:
        """What the form shows, by field."""
        return {name: editor.get() for name, editor in self.editors.items()}

    def value(self) -> Model:
        """The model with what the form shows; skipped fields must have defaults."""
        return self.model(**self.values())

    def set_value(self, value: Model) -> None:
        """Show a model's values; ``changed`` is emitted once, and only if something differs."""
        with contextlib.suppress(ValidationError):  # what is shown may be none
            if value == self.value():
                return
        self.blockSignals(True)
        for name, editor in self.editors.items():
            editor.put(getattr(value, name))
        self.blockSignals(False)
        self.changed.emit()

    def suggest(self, name: str, value: Any, high: int | None = None) -> None:
        """What an unticked field starts from when it is ticked, and its upper bound (whole numbers)."""
        editor = self.editors[name]
        spins = editor.widget.findChildren(QAbstractSpinBox)
        values = value if isinstance(value, (tuple, list)) else [value]
        for spin, number in zip(spins, values, strict=False):
            spin.blockSignals(True)
            if high is not None and isinstance(spin, QSpinBox):
                spin.setMaximum(high)
            if editor.get() is None and isinstance(spin, (QSpinBox, QDoubleSpinBox)):
                spin.setValue(number)
            spin.blockSignals(False)
