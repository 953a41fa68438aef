"""Forms from pydantic models: what is put in comes out, within the model's bounds."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field
from qtpy.QtGui import QValidator
from qtpy.QtWidgets import QAbstractSpinBox, QLabel

from napari_recon.jobs.job import TVParameters
from napari_recon.scans import ScanOptions
from napari_recon.widgets.forms import ModelForm, NumberBox


class Everything(BaseModel):
    whole: int = Field(3, ge=1, le=9, title="Whole number", description="How many.")
    real: float = Field(1e-3, gt=0)
    yes: bool = True
    kind: Literal["a", "b"] = "a"
    text: str = "fit"
    maybe: int | None = None
    perhaps: float | None = Field(0.5, ge=-2, le=2)
    unsure: bool | None = None
    shape: tuple[int, int, int] | None = None


def test_the_form_starts_with_the_defaults(qtbot):
    form = ModelForm(Everything, choices={"text": ("fit", "exact")})
    qtbot.addWidget(form)
    assert form.value() == Everything()


@pytest.mark.parametrize("model", [TVParameters, ScanOptions])
def test_our_models_start_with_their_defaults(qtbot, model):
    form = ModelForm(model, skip=("method",))
    qtbot.addWidget(form)
    assert form.value() == model()


def test_what_is_put_in_comes_out(qtbot):
    form = ModelForm(Everything, choices={"text": ("fit", "exact")})
    qtbot.addWidget(form)
    value = Everything(
        whole=7, real=2.5e-5, yes=False, kind="b", text="my.safetensors", maybe=12, perhaps=None, unsure=False,
        shape=(4, 5, 6),
    )  # fmt: skip
    changes = []
    form.changed.connect(lambda: changes.append(1))
    form.set_value(value)
    assert form.value() == value
    assert len(changes) == 1
    form.set_value(value)
    assert len(changes) == 1


def test_bounds_titles_and_descriptions_are_the_models(qtbot):
    form = ModelForm(Everything)
    qtbot.addWidget(form)
    spin = form.editors["whole"].widget
    assert (spin.minimum(), spin.maximum()) == (1, 9)
    assert form.editors["real"].widget.minimum() > 0
    assert "How many." in spin.toolTip()
    assert "Whole number" in [label.text() for label in form.findChildren(QLabel)]


def test_a_suggestion_waits_until_the_box_is_ticked(qtbot):
    form = ModelForm(Everything)
    qtbot.addWidget(form)
    form.suggest("maybe", 60, high=60)
    form.suggest("shape", (7, 8, 9))
    assert form.value() == Everything()
    box = form.editors["maybe"].widget
    box.layout().itemAt(0).widget().setChecked(True)
    assert form.value().maybe == 60
    assert max(s.maximum() for s in box.findChildren(QAbstractSpinBox)) == 60
    form.editors["shape"].widget.layout().itemAt(0).widget().setChecked(True)
    assert form.value().shape == (7, 8, 9)


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("0.001", 1e-3), ("2", 2.0)])
def test_numbers_are_typed_as_people_write_them(qtbot, text, value):
    box = NumberBox()
    qtbot.addWidget(box)
    box.setRange(0, 10)
    box.lineEdit().setText(text)
    box.interpretText()
    assert box.value() == pytest.approx(value)
    assert box.validate("1e", 2)[0] == QValidator.State.Intermediate
    assert box.validate("11", 2)[0] == QValidator.State.Intermediate
    assert box.textFromValue(2e-5) == "2e-05"
