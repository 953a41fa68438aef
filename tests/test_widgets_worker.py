"""The docks with the real process: a scan file, a run to its end, a kill, and a viewer that closes."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from qtpy.QtCore import Qt, QTimer

from napari_recon.jobs.messages import Finished
from napari_recon.jobs.worker import Worker
from napari_recon.scans import ScanOptions
from napari_recon.widgets import session as session_module
from napari_recon.widgets.session import Session

LONG = 120_000
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small cone-beam scan on disk."""
    from napari_recon.learning.simulate import simulate

    where = tmp_path_factory.mktemp("scan") / "blobs"
    simulate("blobs", where, size=32, views=24, seed=1)
    return where


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory):
    """One process for several tests: starting one takes seconds. It keeps operators where no other run finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        worker = Worker()
        worker.start()
    yield worker
    worker.close()


@pytest.fixture
def dock(make_napari_viewer, shared_worker, monkeypatch, said, folder, qtbot):
    """The Reconstruct dock with the scan open and small patches."""
    monkeypatch.setattr(session_module, "make_worker", lambda: shared_worker)
    monkeypatch.setattr(shared_worker, "close", shared_worker.cancel)
    viewer = make_napari_viewer()
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    ended = []
    dock.session.finished.connect(ended.append)
    dock.ended = ended
    dock.session.open(folder)
    qtbot.waitUntil(lambda: dock.session.scan is not None, timeout=LONG)
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"patch": 16, "iterations": 3, "operator": "exact"}))
    return dock


def test_a_real_run_ends_with_a_better_volume_and_holds_nothing_up(dock, said, qtbot, monkeypatch):
    """Nothing is drawn here (the window is not shown), so what is timed is ours, not OpenGL's."""
    spent = []

    def timed():
        start, layers = time.perf_counter(), len(dock.session.viewer.layers)
        dock.session._poll()
        if len(dock.session.viewer.layers) == layers:  # building a layer's controls is napari's
            spent.append(time.perf_counter() - start)

    dock.session._timer.timeout.disconnect()
    dock.session._timer.timeout.connect(timed)
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert isinstance(dock.ended[0], Finished), dock.ended
    fdk, result = dock.session.viewer.layers
    assert (fdk.name, result.name) == ("FDK", "Partitioned TV")
    assert np.isfinite(result.data).all()
    assert result.data.any()
    assert not np.array_equal(fdk.data, result.data)
    assert result.metadata["napari_recon"]["figures"]["residual"] < 1
    assert result.metadata["napari_recon"]["provenance"]
    assert not [text for severity, text in said if severity == "error"]
    assert len(spent) > 3
    assert np.median(spent) < 0.02
    assert sorted(spent)[-2] < 0.05, sorted(spent)[-5:]  # one hiccup of a shared machine is forgiven


@pytest.mark.parametrize(
    ("name", "options", "ndisplay"),
    [
        ("docs/examples/diamond_parallel.toml", {"binning": 4}, 3),
        ("docs/examples/tooth.toml", {"binning": 2, "views": 90}, 2),
        ("../shared/data/helsinki_fan/htc2022_ta_full.mat", {"binning": 4, "views": 90}, 2),
    ],
)
def test_measured_data_are_reconstructed(dock, said, qtbot, name, options, ndisplay):
    path = ROOT / name
    if not (ROOT / "../shared/data").is_dir():
        pytest.skip("the measured data is not at ../shared/data")
    dock.session.open(path, ScanOptions(**options))
    qtbot.waitUntil(lambda: dock.session.scan is not None and dock.session.scan.path == path, timeout=LONG)
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"patch": None, "iterations": 3}))
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert isinstance(dock.ended[0], Finished), dock.ended
    viewer = dock.session.viewer
    assert viewer.dims.ndisplay == ndisplay
    fdk, result = viewer.layers
    assert (fdk.name, result.name) == ("FDK", "TV")
    low, high = fdk.contrast_limits
    assert 0 <= low < high < np.inf
    assert 0 < result.metadata["napari_recon"]["figures"]["residual"] < 0.5
    assert not [text for severity, text in said if severity == "error"]


def test_a_trained_network_runs_in_two_passes(dock, said, qtbot, tmp_path):
    file = tmp_path / "tiny.safetensors"
    code = f"""
from napari_recon.learning.networks import make_network, save_weights
from napari_recon.reconstruction.unrolled import UnrolledPGD
training = {{"data": {{"size": 32, "views": [10]}}}}
save_weights(UnrolledPGD(make_network(width=4, scales=2), 1, init="tv"), {str(file)!r}, training=training)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)  # no torch in this process: see conftest.py
    dock.session.weights_file = str(file)
    dock.session.weights_file_changed.emit()
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"patch": 16, "operator": "exact"}))
    qtbot.waitUntil(lambda: "views = [24] at size = 32" in dock.warning.text(), timeout=LONG)
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert isinstance(dock.ended[0], Finished), dock.ended
    fdk, result = dock.session.viewer.layers
    assert (fdk.name, result.name) == ("FDK", "Unrolled network tiny")
    assert not np.array_equal(fdk.data, result.data)
    assert len(result.metadata["napari_recon"]["provenance"]["weights"]["sha256"]) == 64
    assert [text for severity, text in said if severity == "warning" and "views = [24]" in text]
    assert not [text for severity, text in said if severity == "error"]


def test_a_killed_process_leaves_the_viewer_the_volume_and_a_remedy(dock, said, qtbot):
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"iterations": 200}))
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: dock.session.progress is not None and dock.session.progress.name == "result", timeout=LONG)
    os.kill(dock.session.worker.pid, signal.SIGKILL)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert dock.ended[0].kind == "killed"
    errors = [text for severity, text in said if severity == "error"]
    assert len(errors) == 1
    assert "volume so far is kept" in errors[0]
    assert "choose" in errors[0]
    result = dock.session.viewer.layers["Partitioned TV"]
    assert result.data.any()  # still readable: the memory outlives the process
    dock.ended.clear()
    form.set_value(form.value().model_copy(update={"iterations": 2}))
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert isinstance(dock.ended[0], Finished)
    assert result.data.any()


def test_pause_and_cancel_answer_within_a_patch(dock, said, qtbot):
    form = dock.forms[dock.method.currentIndex()]
    form.set_value(form.value().model_copy(update={"iterations": 20}))
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: dock.session.progress is not None and dock.session.progress.name == "result", timeout=LONG)
    press(qtbot, dock.pause)
    qtbot.wait(1500)
    step = dock.session.progress.step
    qtbot.wait(1000)
    assert dock.session.progress.step == step
    press(qtbot, dock.cancel)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert len(dock.session.viewer.layers) == 0
    assert dock.session.state == "idle"


def test_an_operator_is_fitted_judged_and_tried_on_a_patch(dock, said, qtbot):
    viewer, session = dock.session.viewer, dock.session
    _, normal = viewer.window.add_plugin_dock_widget("napari-recon", "Normal operator")
    for name, value in (("probes", 1), ("iterations", 1)):
        normal.basic.editors[name].put(value)
    normal.more.editors["positions"].put(1)
    press(qtbot, normal.run)
    qtbot.waitUntil(lambda: bool(dock.ended), timeout=LONG)
    assert isinstance(dock.ended[0], Finished), dock.ended
    operator = session.operator
    assert operator.shows_figure
    assert Path(operator.file).is_file()
    assert 0 < operator.figures["relative_error"] < 1
    error = operator.volumes["exact"] - operator.volumes["approximate"]
    np.testing.assert_allclose(operator.volumes["error"], error**2, rtol=1e-3, atol=1e-4 * (error**2).max())
    assert len(operator.curve["held_out"]) >= 1
    press(qtbot, normal.compare)
    qtbot.waitUntil(lambda: len(dock.ended) == 2, timeout=LONG)
    assert isinstance(dock.ended[1], Finished), dock.ended
    exact, approximate = (session.patch.volumes[name] for name in ("patch exact", "patch approximate"))
    np.testing.assert_array_equal(exact[0], approximate[0])
    assert not np.array_equal(exact[1], exact[0])
    assert session.patch.steps[1]["difference"] == 0  # both begin with the same gradient
    assert 0 < session.patch.steps[2]["difference"] < 1
    press(qtbot, normal.use)
    assert dock.job().parameters.operator == operator.file
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: len(dock.ended) == 3, timeout=LONG)
    assert isinstance(dock.ended[2], Finished), dock.ended
    assert not [text for severity, text in said if severity == "error"]


def test_closing_the_viewer_ends_the_process(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    session = Session.of(viewer)
    worker = session.worker
    qtbot.waitUntil(lambda: worker.pid is not None, timeout=LONG)
    pid = worker.pid
    viewer.close()
    qtbot.waitUntil(lambda: not alive(pid), timeout=LONG)
    assert not session._timer.isActive()


def test_a_scan_that_is_none_is_one_sentence(make_napari_viewer, said, qtbot, tmp_path):
    viewer = make_napari_viewer()
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    dock.session.open(tmp_path)
    qtbot.waitUntil(lambda: bool(said), timeout=LONG)
    severity, text = said[0]
    assert severity == "error"
    assert str(tmp_path) in text
    assert "Traceback" not in text


def test_the_sample_opens_from_the_menu_and_the_docks_take_it_up(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    viewer.open_sample("napari-recon", "walnut-like")
    qtbot.waitUntil(lambda: dock.session.scan is not None, timeout=LONG)
    assert dock.session.scan.name == "walnut-like"
    assert viewer.layers[0].data.shape[0] == dock.session.scan.geometry.views


def test_a_scan_dropped_on_the_viewer_is_read(make_napari_viewer, folder, qtbot):
    viewer = make_napari_viewer()
    viewer.open(str(folder), plugin="napari-recon")
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    qtbot.waitUntil(lambda: dock.session.scan is not None, timeout=LONG)
    assert dock.session.scan.path == folder


def test_the_reader_leaves_what_is_no_scan_to_others(tmp_path):
    from napari_recon.widgets.contributions import get_reader

    assert get_reader(str(tmp_path)) is None
    (tmp_path / "notes.toml").write_text("title = 'not a scan'\n")
    assert get_reader(str(tmp_path / "notes.toml")) is None
    assert get_reader(["a.h5", "b.h5"]) is None


def test_the_manifest_names_what_is_there():
    from npe2 import PluginManifest

    from napari_recon import sample_data
    from napari_recon.widgets.contributions import SAMPLES, SYNTHETIC

    manifest = PluginManifest.from_distribution("napari-recon")
    for command in manifest.contributions.commands:
        module, name = command.python_name.split(":")
        assert callable(getattr(importlib.import_module(module), name)), command.id
    docks = {w.display_name for w in manifest.contributions.widgets}
    assert docks == {"Scan", "Reconstruct", "Normal operator", "Train", "Compare"}
    assert {s.key: s.display_name for s in manifest.contributions.sample_data} == SAMPLES
    assert set(SAMPLES) - set(SYNTHETIC) <= set(sample_data.names())


def test_timers_stop_with_the_session(dock, qtbot):
    session = dock.session
    viewer = session.viewer
    session.close()
    assert not [t for t in session.findChildren(QTimer) if t.isActive()]
    viewer.add_image(np.zeros((4, 4)))  # nothing is connected any more


def test_the_viewers_process_never_loads_torch(folder):
    """Beside software OpenGL it would crash (see conftest.py); and it takes seconds that the event loop has not."""
    code = f"""
import sys
from napari_recon.jobs.job import ReconstructionJob
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.worker import Worker
from napari_recon.scans import open_scan
from napari_recon.widgets import contributions, demo, layers, normal_dock, reconstruct_dock, scan_dock, session
scan = open_scan({str(folder)!r})
scan.summary(), scan.checks(), layers.projections(scan)
plan_memory(ReconstructionJob(scan=scan.path, device="cpu"), scan)
print(sorted(m for m in ("torch", "triton", "deepinv") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
