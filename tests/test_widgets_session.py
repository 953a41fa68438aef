"""What becomes of results: run again, copied, exported, and saved and reopened with the whole session."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtGui import QGuiApplication
from qtpy.QtWidgets import QFileDialog

from napari_recon.jobs.job import FDKParameters, PADMMParameters, ReconstructionJob, SIRTParameters
from napari_recon.jobs.provenance import command_line, python_code
from napari_recon.jobs.volumes import read_volume
from napari_recon.learning.simulate import simulate
from napari_recon.scans import ScanError, ScanOptions
from napari_recon.widgets import result_menu, session_file
from napari_recon.widgets.displays import LAYER, phase_of, told_by
from napari_recon.widgets.session import Session


@pytest.fixture
def viewer(make_napari_viewer):
    return make_napari_viewer(strict_qt=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=16, views=12)


@pytest.fixture
def told_by_menu(monkeypatch):
    heard = []
    for name in ("show_error", "show_warning", "show_info"):
        monkeypatch.setattr(result_menu, name, lambda text, s=name: heard.append((s.removeprefix("show_"), text)))
    return heard


@pytest.fixture
def opened(viewer, pretend, said, told_by_menu, folder, qtbot):
    """A viewer with both docks, a scan, and what a job made of it."""
    _, scan_dock = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    session = scan_dock.session
    session.open(folder, ScanOptions(views=6))
    qtbot.waitUntil(lambda: session.scan is not None and session.checks is not None, timeout=10_000)
    dock.take(ReconstructionJob(scan=folder, parameters=SIRTParameters(iterations=7, nonnegative=False)))
    run(qtbot, session, dock.job())
    return SimpleNamespace(
        viewer=viewer, scan_dock=scan_dock, dock=dock, session=session, worker=pretend[0], told=told_by_menu
    )


def run(qtbot, session, job):
    session.run(job)
    qtbot.waitUntil(lambda: session.state == "idle", timeout=20_000)


def choose(menu, action):
    """As a person does: open the menu, then press what it offers."""
    menu.menu().aboutToShow.emit()
    assert action.isEnabled(), action.text()
    action.trigger()


def layer_of(viewer, name):
    return next(x for x in viewer.layers if told_by(x).get("volume") == name)


# -- this result ---------------------------------------------------------------------------------------------------


def test_again_is_the_same_job_and_not_steered(opened, qtbot):
    menu, worker = opened.dock.result, opened.worker
    first = worker.jobs[-1]
    opened.dock.take(first.model_copy(update={"parameters": FDKParameters()}))  # the form says another one by now
    choose(menu, menu.again)
    qtbot.waitUntil(lambda: len(worker.jobs) == 2, timeout=5000)
    before = list(worker.focused)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)
    assert worker.jobs[-1] == first
    assert worker.focused == before


def test_again_does_not_write_over_a_file(opened, qtbot, tmp_path):
    layer = layer_of(opened.viewer, "result")
    told_by(layer)["job"]["output"] = str(tmp_path / "v.tif")
    choose(opened.dock.result, opened.dock.result.again)
    qtbot.waitUntil(lambda: len(opened.worker.jobs) == 2, timeout=5000)
    assert opened.worker.jobs[-1].output is None
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)


def test_copies_say_what_was_done(opened):
    menu, job = opened.dock.result, opened.worker.jobs[-1]
    choose(menu, menu.as_command)
    assert QGuiApplication.clipboard().text() == command_line(job)
    choose(menu, menu.as_python)
    assert QGuiApplication.clipboard().text() == python_code(job)


def test_settings_go_into_the_forms(opened, qtbot):
    dock, session = opened.dock, opened.session
    wanted = dock.job()
    other = wanted.model_copy(update={"parameters": PADMMParameters(), "shape": (9, 9, 9), "options": ScanOptions()})
    session.set_options(ScanOptions())
    qtbot.waitUntil(lambda: session.scan.options == ScanOptions(), timeout=5000)
    dock.take(other)
    assert dock.job().parameters == PADMMParameters()
    assert dock.job().shape == (9, 9, 9)
    choose(dock.result, dock.result.settings)
    qtbot.waitUntil(lambda: session.scan.options == wanted.options, timeout=5000)
    assert dock.job() == wanted


def test_a_start_that_is_gone_is_told(opened):
    layer = layer_of(opened.viewer, "result")
    started = PADMMParameters(start=f"{LAYER}thrown away").model_dump(mode="json")
    layer.metadata["napari_recon"] = told_by(layer) | {"job": told_by(layer)["job"] | {"parameters": started}}
    opened.viewer.layers.selection.active = layer
    choose(opened.dock.result, opened.dock.result.again)
    assert len(opened.worker.jobs) == 1
    assert "thrown away" in opened.told[-1][1]
    choose(opened.dock.result, opened.dock.result.as_command)
    assert opened.told[-1][0] == "error"


def test_nothing_is_offered_where_nothing_is(viewer, pretend):
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    menu = dock.result
    assert not any(action.isEnabled() for action in (menu.again, menu.as_command, menu.as_python, menu.export))
    viewer.add_image(np.zeros((3, 4, 5), np.float32), name="theirs")
    menu.refresh()
    assert menu.export.isEnabled()
    assert not menu.again.isEnabled()


@pytest.mark.parametrize("bits", [None, 16])
def test_the_selected_volume_is_exported_where_it_lies(opened, qtbot, tmp_path, monkeypatch, said, bits):
    layer = layer_of(opened.viewer, "fdk")
    opened.viewer.layers.selection.active = layer
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "mine"), "OME-Zarr (*.ome.zarr)"))
    choose(opened.dock.result, opened.dock.result.export if bits is None else opened.dock.result.export_16)
    qtbot.waitUntil(lambda: (tmp_path / "mine.ome.zarr").exists(), timeout=10_000)
    volume = read_volume(tmp_path / "mine.ome.zarr")
    np.testing.assert_allclose(volume.data, layer.data, atol=0 if bits is None else 1e-5)
    assert volume.grid.scale == tuple(layer.scale)
    assert volume.grid.translate == pytest.approx(tuple(layer.translate))
    qtbot.waitUntil(lambda: any("written" in text for _, text in said), timeout=5000)


def test_napari_saves_and_opens_our_formats(opened, tmp_path, monkeypatch):
    pytest.importorskip("nibabel")
    viewer, layer = opened.viewer, layer_of(opened.viewer, "result")
    layer.metadata["napari_recon"]["provenance"] = {"job": told_by(layer)["job"], "figures": {}}
    assert layer.save(str(tmp_path / "v.nii.gz")) == [str(tmp_path / "v.nii.gz")]
    (again,) = viewer.open(str(tmp_path / "v.nii.gz"), plugin="napari-recon")
    np.testing.assert_array_equal(again.data, layer.data)
    np.testing.assert_allclose(again.translate, layer.translate, atol=1e-5)
    viewer.layers.selection.active = again
    assert opened.dock.result.job == opened.worker.jobs[-1]  # the file told


# -- sessions ------------------------------------------------------------------------------------------------------


def save(qtbot, session, path):
    session.save_session(path)
    path = path.with_suffix(".recon")
    qtbot.waitUntil(lambda: session_file.is_session(path), timeout=20_000)
    return path


def arrange(viewer):
    """See the volumes from somewhere else than a run shows them."""
    viewer.dims.ndisplay = 2
    viewer.dims.order = (1, 0, 2)
    viewer.dims.set_point((0, 1, 2), (0.5, -1.0, 1.5))
    viewer.scene.camera.center, viewer.scene.camera.zoom = (0.0, 1.0, -2.0), 33.0
    layer_of(viewer, "fdk").contrast_limits = (0.001, 0.02)
    layer_of(viewer, "result").name = "my best / so far"


def test_a_session_comes_back_as_it_was(opened, qtbot, tmp_path, make_napari_viewer):
    viewer = opened.viewer
    arrange(viewer)
    viewer.add_image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), name="truth", scale=(1, 2, 3), visible=False)
    path = save(qtbot, opened.session, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.recon"]

    other = make_napari_viewer(strict_qt=True)
    _, scan_dock = other.window.add_plugin_dock_widget("napari-recon", "Scan")
    _, dock = other.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    other.add_image(np.zeros((4, 4, 4)), name="in the way")
    scan_dock.session.open(path)  # as a dropped folder is
    qtbot.waitUntil(lambda: len(other.layers) == 4 and scan_dock.session.scan is not None, timeout=20_000)
    assert scan_dock.session.scan.options == ScanOptions(views=6)
    assert not other.layers["in the way"].visible
    names = ["fdk", "result"]
    for name in names:
        old, new = layer_of(viewer, name), layer_of(other, name)
        np.testing.assert_array_equal(new.data, old.data)
        assert new.name == old.name
        for attribute in ("visible", "contrast_limits", "gamma", "rendering"):
            assert getattr(new, attribute) == getattr(old, attribute), attribute
        assert new.colormap.name == old.colormap.name
        np.testing.assert_allclose(new.scale, old.scale)
        np.testing.assert_allclose(new.translate, old.translate)
        assert told_by(new)["job"] == told_by(old)["job"]
        assert told_by(new)["provenance"] == told_by(old)["provenance"]
    np.testing.assert_array_equal(other.layers["truth"].data, viewer.layers["truth"].data)
    assert tuple(other.layers["truth"].scale) == (1, 2, 3)
    assert other.dims.ndisplay == 2
    assert other.dims.order == viewer.dims.order
    assert other.dims.point == pytest.approx(viewer.dims.point, abs=0.26)  # on the nearest slice
    assert other.scene.camera.center == pytest.approx(viewer.scene.camera.center)
    assert other.scene.camera.zoom == pytest.approx(33.0)
    assert other.canvas.grid.enabled == viewer.canvas.grid.enabled
    layer_of(other, "fdk").gamma = 0.5  # what was linked is linked
    assert layer_of(other, "result").gamma == 0.5
    assert dock.job().parameters == opened.worker.jobs[-1].parameters
    other.layers.selection.active = layer_of(other, "result")
    assert dock.result.job == opened.worker.jobs[-1]


def test_complex_results_keep_their_phase(viewer, pretend, tmp_path, qtbot):
    session = Session.of(viewer)
    told = {"shows": "volume", "volume": "result", "job": {"scan": "k.npy"}, "provenance": {"complete": True}}
    data = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    viewer.add_image(data, name="x", metadata={"napari_recon": told})
    phase = told | {"volume": "result phase", "shows": "phase"}
    viewer.add_image(data / 3, name="x phase", visible=False, metadata={"napari_recon": phase})
    path = save(qtbot, session, tmp_path / "k")
    viewer.layers.clear()
    session.open_session(path)
    qtbot.waitUntil(lambda: len(viewer.layers) == 2, timeout=20_000)
    assert phase_of(viewer.layers["x"], viewer.layers) is viewer.layers["x phase"]
    np.testing.assert_array_equal(viewer.layers["x phase"].data, data / 3)


def test_file_open_opens_a_session(opened, qtbot, tmp_path):
    path = save(qtbot, opened.session, tmp_path / "mine")
    kept = [x.name for x in opened.viewer.layers]
    opened.viewer.layers.clear()
    opened.viewer.open(str(path), plugin="napari-recon")
    qtbot.waitUntil(lambda: [x.name for x in opened.viewer.layers] == kept, timeout=20_000)


def test_a_session_is_not_saved_amid_a_job(opened, qtbot, tmp_path, said):
    opened.session.run(opened.dock.job())
    opened.session.save_session(tmp_path / "mine")
    assert "job" in said[-1][1].lower()
    assert not list(tmp_path.iterdir())
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)


def test_scan_and_session_may_move_together(opened, folder, qtbot, tmp_path):
    (tmp_path / "here").mkdir()
    scan = shutil.copytree(folder, tmp_path / "here" / "scan")
    opened.session.open(scan)
    qtbot.waitUntil(lambda: opened.session.scan.path == scan, timeout=10_000)
    save(qtbot, opened.session, tmp_path / "here" / "mine")
    shutil.move(tmp_path / "here", tmp_path / "there")
    opened.session.open_session(tmp_path / "there" / "mine.recon")
    qtbot.waitUntil(lambda: opened.session.scan.path == tmp_path / "there" / "scan", timeout=20_000)


def test_results_are_shown_where_their_scan_is_gone(opened, qtbot, tmp_path, said):
    path = save(qtbot, opened.session, tmp_path / "mine")
    contents = json.loads((path / "session.json").read_text())
    (path / "session.json").write_text(json.dumps(contents | {"scan": "/nowhere", "beside": None}))
    opened.viewer.layers.clear()
    said.clear()
    opened.session.open_session(path)
    qtbot.waitUntil(lambda: len(opened.viewer.layers) == 2, timeout=20_000)
    assert "nowhere" in said[-1][1]


def test_a_failed_save_leaves_the_last_one(opened, qtbot, tmp_path, said, monkeypatch):
    path = save(qtbot, opened.session, tmp_path / "mine")
    before = (path / "session.json").read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_file, "write_volume", full)
    said.clear()
    opened.session.save_session(path)
    qtbot.waitUntil(lambda: bool(said), timeout=10_000)
    assert "No space left" in said[-1][1]
    assert [file.name for file in tmp_path.iterdir()] == ["mine.recon"]
    assert (path / "session.json").read_text() == before
    assert session_file.read(path)[1][0].data.any()


def test_damaged_sessions_and_other_folders_are_one_sentence(opened, qtbot, tmp_path):
    (tmp_path / "thesis.recon").mkdir()
    (tmp_path / "thesis.recon" / "chapter.txt").write_text("mine")
    with pytest.raises(ScanError, match="left alone"):
        session_file.check_folder(tmp_path / "thesis.recon")
    with pytest.raises(ScanError, match="no session"):
        session_file.read(tmp_path / "thesis.recon")
    path = save(qtbot, opened.session, tmp_path / "mine")
    for damage in ("{", json.dumps({"program": 3}), json.dumps({"program": "x", "layers": [{"name": "v"}]})):
        (path / "session.json").write_text(damage)
        with pytest.raises(ScanError, match=r"session\.json"):
            session_file.read(path)
