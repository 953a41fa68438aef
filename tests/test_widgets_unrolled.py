"""Trained networks in the Reconstruct dock: their weights, what can be asked of them, and where they do not suit."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFileDialog
from safetensors.numpy import save_file

from napari_recon.jobs.job import SHIPPED_WEIGHTS
from napari_recon.learning.weights import FORMAT, outside_training, shipped_weights
from napari_recon.widgets import session as session_module
from napari_recon.widgets.forms import BROWSE, ModelForm


def write_weights(path, views=(20, 30), size=24, method="unrolled", card="Trained on air."):
    """A file that says what weights say; only a process that runs them would miss the tensors."""
    model = {"method": method, "network": {"name": "light", "options": {}}}
    if method == "unrolled":
        model |= {"iterations": 7, "tied": True, "step": "ramp", "passes": 1}
    told = {"model": model, "training": {"data": {"views": views, "size": size}}, "figures": {}}
    metadata = {"format": FORMAT, "card": card, **{name: json.dumps(value) for name, value in told.items()}}
    save_file({"nothing": np.zeros(1, np.float32)}, path, metadata)
    return str(path)


@pytest.fixture
def opened(make_napari_viewer, pretend, said, memory_scan, monkeypatch, qtbot):
    """The dock with its scan (24 views, 30 voxels across) and the method chosen."""
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.session.open("ball.h5")
    qtbot.waitUntil(lambda: dock.session.scan is not None and dock.session.checks is not None, timeout=10_000)
    dock.method.setCurrentIndex(dock.method.findText("Unrolled network"))
    form = dock.forms[dock.method.currentIndex()]
    return SimpleNamespace(viewer=viewer, dock=dock, form=form, weights=form.editors["weights"], worker=pretend[0])


def settle(qtbot, dock):
    """Wait for what follows an edit."""
    qtbot.waitUntil(lambda: not dock._settle.isActive(), timeout=5000)


def warned(dock):
    return dock.warning.text() if not dock.warning.isHidden() else ""


def test_weights_that_are_not_there_are_said_to_be_missing(opened, qtbot, tmp_path):
    opened.weights.put(str(tmp_path / "gone.safetensors"))
    qtbot.waitUntil(lambda: "There are no weights" in opened.dock.memory.text(), timeout=5000)
    assert "color" in opened.dock.memory.text()
    assert opened.dock.job().parameters.weights == str(tmp_path / "gone.safetensors")


def test_the_list_offers_what_ships_and_a_file(opened):
    combo = opened.weights.widget
    offered = [combo.itemText(i) for i in range(combo.count())]
    assert offered == [*SHIPPED_WEIGHTS.values(), BROWSE]
    assert set(offered[:-1]) <= set(shipped_weights())


def test_a_file_is_browsed_for_and_named_shortly(opened, qtbot, tmp_path, monkeypatch):
    file, combo, changes = write_weights(tmp_path / "mine.safetensors"), opened.weights.widget, []
    opened.form.changed.connect(lambda: changes.append(opened.form.values()["weights"]))
    answers = iter(["", file])
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: (next(answers), ""))
    before = combo.itemText(combo.findText(BROWSE) - 1)  # the last that is passed on the way
    for expected in (before, file):  # the first time the dialog is cancelled
        combo.setFocus()
        for _ in range(combo.findText(BROWSE) - combo.currentIndex()):
            qtbot.keyClick(combo, Qt.Key.Key_Down)
        assert opened.form.values()["weights"] == expected
        assert combo.currentText() != BROWSE
    assert combo.currentText() == "mine.safetensors"
    assert BROWSE not in changes
    assert opened.dock.job().parameters.weights == file


def test_the_dock_warns_before_a_run_and_only_as_long_as_it_holds(opened, qtbot, tmp_path, memory_scan):
    dock = opened.dock
    few = write_weights(tmp_path / "few.safetensors", views=(2, 3), size=30)
    opened.weights.put(few)
    qtbot.waitUntil(lambda: "views = [25] at size = 30" in warned(dock), timeout=5000)
    expected = outside_training(
        {"data": {"views": [2, 3], "size": 30}}, memory_scan.geometry, memory_scan.default_grid()
    )
    assert len(expected) == 1
    assert expected[0] in warned(dock)
    assert dock.run.isEnabled()
    opened.weights.put(write_weights(tmp_path / "right.safetensors", size=30))
    qtbot.waitUntil(lambda: not warned(dock), timeout=5000)
    dock.volume.editors["voxel_size"].put(1.2)
    qtbot.waitUntil(lambda: "bin the detector 3 × 3" in warned(dock), timeout=5000)
    dock.volume.editors["voxel_size"].put(None)
    opened.weights.put(few)
    qtbot.waitUntil(lambda: bool(warned(dock)), timeout=5000)
    dock.method.setCurrentIndex(dock.method.findText("TV"))
    qtbot.waitUntil(lambda: not warned(dock), timeout=5000)


def test_what_means_nothing_to_the_weights_cannot_be_asked(opened, qtbot, tmp_path):
    dock, form = opened.dock, opened.form
    opened.weights.put(write_weights(tmp_path / "a.safetensors"))
    settle(qtbot, dock)
    iterations, passes, operator = (form.editors[name].widget for name in ("iterations", "passes", "operator"))
    assert not operator.isEnabled()  # the one pass of the default has no use for it
    form.editors["passes"].put(2)
    settle(qtbot, dock)
    assert all(widget.isEnabled() for widget in (iterations, passes, operator))
    qtbot.keyClick(iterations.layout().itemAt(0).widget(), Qt.Key.Key_Space)
    assert form.values()["iterations"] == 7  # starts from the weights' own
    form.editors["passes"].put(1)
    settle(qtbot, dock)
    assert not operator.isEnabled()
    opened.weights.put(write_weights(tmp_path / "b.safetensors", method="post-processing"))
    settle(qtbot, dock)
    assert not any(widget.isEnabled() for widget in (iterations, passes, operator))
    assert dock.job().parameters.iterations is None


def test_the_card_is_at_hand(opened, qtbot, tmp_path):
    opened.weights.put(write_weights(tmp_path / "a.safetensors", card="6 <views> & more"))
    settle(qtbot, opened.dock)
    assert "6 &lt;views&gt; &amp; more" in opened.weights.widget.toolTip()


def test_weights_just_trained_are_taken_up(opened, qtbot, tmp_path):
    dock = opened.dock
    dock.method.setCurrentIndex(0)
    dock.session.weights_file = write_weights(tmp_path / "trained.safetensors")
    dock.session.weights_file_changed.emit()
    assert dock.job().parameters.method == "unrolled"
    assert dock.job().parameters.weights == str(tmp_path / "trained.safetensors")
    assert opened.weights.widget.currentText() == "trained.safetensors"


def test_a_run_hands_the_job_over_and_names_its_layer_by_the_weights(opened, qtbot, tmp_path):
    dock = opened.dock
    opened.weights.put(write_weights(tmp_path / "mine.safetensors"))
    opened.form.editors["passes"].put(2)
    opened.form.editors["operator"].put("exact")
    opened.form.editors["patch"].put(16)
    settle(qtbot, dock)
    qtbot.mouseClick(dock.run, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(opened.worker.jobs) and dock.session.state == "idle", timeout=20_000)
    (job,) = opened.worker.jobs
    assert job.parameters.model_dump() == {
        "method": "unrolled",
        "weights": str(tmp_path / "mine.safetensors"),
        "iterations": None,
        "patch": 16,
        "operator": "exact",
        "passes": 2,
        "precision": "auto",
    }
    assert [layer.name for layer in opened.viewer.layers] == ["FDK", "Unrolled network mine"]


def test_an_operator_of_the_other_dock_is_taken_up_and_let_go(opened, qtbot):
    dock, session = opened.dock, opened.dock.session
    for file in ("a.safetensors", "b.safetensors", None):
        session.operator_file = file
        session.operator_file_changed.emit()
        parameters = dock.job().parameters
        assert (parameters.method, parameters.operator) == ("tv", file or "fit")
    combo = dock.forms[dock.method.currentIndex()].editors["operator"].widget
    assert [combo.itemText(i) for i in range(combo.count())] == ["fit", "exact", BROWSE]


def test_a_form_takes_paths_of_files_as_typed(qtbot):
    from napari_recon.jobs.job import UnrolledParameters

    form = ModelForm(UnrolledParameters, skip=("method",), choices={"weights": ["unrolled"]}, files={"weights": "*"})
    qtbot.addWidget(form)
    assert form.value() == UnrolledParameters()
    line = form.editors["weights"].widget.lineEdit()
    line.selectAll()
    qtbot.keyClicks(line, "/data/w.safetensors")
    assert form.value().weights == "/data/w.safetensors"
    form.set_value(UnrolledParameters(weights="/data/v.safetensors", iterations=3, passes=1))
    assert form.value() == UnrolledParameters(weights="/data/v.safetensors", iterations=3, passes=1)
    assert form.editors["weights"].widget.currentText() == "v.safetensors"
