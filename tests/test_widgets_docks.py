"""The docks, opened through the manifest and pressed with a mouse, with a process that only pretends."""

from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtCore import QMimeData, QPointF, Qt, QUrl
from qtpy.QtGui import QDropEvent

from napari_recon.scans import ScanError, ScanOptions
from napari_recon.widgets import session as session_module
from napari_recon.widgets.session import Session


@pytest.fixture
def viewer(make_napari_viewer):
    return make_napari_viewer(strict_qt=True)


@pytest.fixture
def opened(viewer, pretend, said, memory_scan, monkeypatch):
    """A viewer with both docks and the scan at hand."""
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    _, scan_dock = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    return SimpleNamespace(viewer=viewer, scan_dock=scan_dock, dock=dock, worker=pretend[0])


def open_and_wait(qtbot, scan_dock):
    scan_dock.session.open("ball.h5")
    qtbot.waitUntil(lambda: scan_dock.session.scan is not None and scan_dock.session.checks is not None, timeout=10_000)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def run(qtbot, opened, until="idle"):
    scan_dock, dock = opened.scan_dock, opened.dock
    open_and_wait(qtbot, scan_dock)
    press(qtbot, dock.run)
    if until == "idle":
        qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)
    else:
        qtbot.waitUntil(lambda: dock.session.progress is not None, timeout=20_000)


def test_the_docks_share_one_session_and_one_worker(opened, pretend, qtbot):
    viewer, scan_dock, dock, worker = opened.viewer, opened.scan_dock, opened.dock, opened.worker
    assert scan_dock.session is dock.session is Session.of(viewer)
    assert len(pretend) == 1
    qtbot.waitUntil(lambda: worker.started)


def test_opening_shows_the_summary_and_the_checks(opened, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock
    assert not dock.run.isEnabled()
    open_and_wait(qtbot, scan_dock)
    rows = scan_dock.summary.rowCount()
    assert rows == len(scan_dock.session.scan.summary())
    assert "ball" in scan_dock.title.text()
    assert dock.run.isEnabled()
    assert "24 views" in dock.subject.text()
    qtbot.waitUntil(lambda: "free memory" in dock.memory.text(), timeout=5000)


def test_a_scan_that_cannot_be_opened_is_one_sentence(opened, said, monkeypatch, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock

    def refuse(path, options=None):
        raise ScanError("nothing.h5 does not exist: choose another file.")

    monkeypatch.setattr(session_module, "open_scan", refuse)
    scan_dock.session.open("nothing.h5")
    qtbot.waitUntil(lambda: bool(said), timeout=5000)
    assert said == [("error", "nothing.h5 does not exist: choose another file.")]
    assert "Open a scan" in scan_dock.title.text()
    assert not dock.run.isEnabled()


def test_a_scan_can_be_dropped_onto_the_dock(opened, qtbot, tmp_path):
    scan_dock = opened.scan_dock
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(tmp_path))])
    event = QDropEvent(
        QPointF(5, 5), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    )
    scan_dock.dropEvent(event)
    qtbot.waitUntil(lambda: scan_dock.session.scan is not None, timeout=5000)


def test_corrections_reach_the_scan_and_the_job(opened, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock
    open_and_wait(qtbot, scan_dock)
    scan_dock.options.set_value(ScanOptions(views=12, binning=2, axis_offset=0.5))
    qtbot.waitUntil(lambda: scan_dock.session.scan.geometry.views == 12, timeout=5000)
    assert scan_dock.session.scan.geometry.detector_shape == (10, 15)
    assert dock.job().options == ScanOptions(views=12, binning=2, axis_offset=0.5)
    assert "12 views" in dock.subject.text()


def test_options_that_the_scan_refuses_are_told_and_undone(opened, said, qtbot):
    scan_dock = opened.scan_dock
    open_and_wait(qtbot, scan_dock)
    scan_dock.options.set_value(ScanOptions(binning=40))
    qtbot.waitUntil(lambda: bool(said), timeout=5000)
    assert said[0][0] == "error"
    assert "bin" in said[0][1].lower()
    assert scan_dock.options.value() == ScanOptions()


def test_projections_are_shown_lazily_in_order(opened, qtbot):
    viewer, scan_dock = opened.viewer, opened.scan_dock
    open_and_wait(qtbot, scan_dock)
    press(qtbot, scan_dock.show_projections)
    qtbot.waitUntil(lambda: len(viewer.layers) == 1, timeout=5000)
    layer = viewer.layers[0]
    assert layer.data.chunks[0] == (1,) * 24  # a view is read when it is shown
    np.testing.assert_array_equal(np.asarray(layer.data), scan_dock.session.scan.projections())
    assert layer.axis_labels == ("view", "row", "column")
    scan_dock.options.set_value(ScanOptions(views=6))
    qtbot.waitUntil(lambda: viewer.layers[0].data.shape[0] == 6, timeout=5000)
    assert len(viewer.layers) == 1  # replaced, not added


def test_the_geometry_is_drawn_where_it_was(opened, qtbot):
    viewer, scan_dock = opened.viewer, opened.scan_dock
    open_and_wait(qtbot, scan_dock)
    press(qtbot, scan_dock.show_geometry)
    source, detector, volume = viewer.layers
    assert viewer.dims.ndisplay == 3
    for layer in viewer.layers:
        assert [str(u) for u in layer.units] == ["millimeter"] * 3
        assert layer.axis_labels == ("z", "y", "x")
    turn = source.data[0]
    np.testing.assert_allclose(np.hypot(turn[:, 1], turn[:, 2]), 66.0, rtol=0.02)  # the source turns about z
    grid = scan_dock.session.scan.default_grid()
    np.testing.assert_allclose(np.ptp(volume.data[0], axis=0), grid.extent, atol=1.0)  # tubes have a width
    far = detector.data[0]
    assert np.hypot(far[:, 1], far[:, 2]).max() == pytest.approx(np.hypot(133.0, 18.0), rel=0.02)


def test_a_run_shows_fdk_and_the_result_side_by_side(opened, qtbot):
    viewer, dock, worker = opened.viewer, opened.dock, opened.worker
    run(qtbot, opened)
    fdk, result = viewer.layers
    assert (fdk.name, result.name) == ("FDK", "Partitioned TV")
    assert fdk.data is worker.volumes["fdk"]  # the very array, not a copy
    assert result.data is worker.volumes["result"]
    assert viewer.dims.ndisplay == 3
    assert viewer.canvas.grid.enabled
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (1, 2)
    assert viewer.canvas.overlays.scale_bar.visible
    assert [str(u) for u in result.units] == ["millimeter"] * 3
    np.testing.assert_allclose(result.translate, (-3.75,) * 3)
    fdk.contrast_limits = (0.001, 0.02)
    assert tuple(result.contrast_limits) == (0.001, 0.02)
    told = result.metadata["napari_recon"]
    assert told["job"]["parameters"]["method"] == "tv"
    assert told["provenance"] == {"napari_recon": "test"}
    assert "residual" in dock.status.text()


def test_the_layer_tells_how_to_make_it_again(opened, qtbot):
    from napari_recon.jobs.job import ReconstructionJob

    viewer, worker = opened.viewer, opened.worker
    run(qtbot, opened)
    assert ReconstructionJob(**viewer.layers[1].metadata["napari_recon"]["job"]) == worker.jobs[0]


def test_the_scans_checks_are_not_told_twice(opened, said, qtbot):
    dock = opened.dock
    run(qtbot, opened)
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)
    assert [text for severity, text in said if severity == "warning"] == [
        "The air lies at 0.1: switch air normalisation on."
    ]


def test_the_patch_outline_follows_the_work_and_goes(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    viewer.show()  # nothing new is drawn before the last has been
    run(qtbot, opened, until="progress")
    press(qtbot, dock.pause)  # drawing in software is slower than a process that only pretends
    outline = dock.session.display.outline
    qtbot.waitUntil(lambda: outline.box is not None, timeout=20_000)
    assert outline.visible
    corners = outline._corners()
    assert len(corners) == 24
    low = [s.start - 0.5 for s in outline.box][::-1]
    np.testing.assert_allclose(corners.min(0), low)
    press(qtbot, dock.pause)
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)
    assert dock.session.display.outline is None
    assert len(viewer.layers) == 2


def test_pause_resume_finish(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    run(qtbot, opened, until="progress")
    press(qtbot, dock.pause)
    assert dock.pause.text() == "Resume"
    step = dock.session.progress.step
    qtbot.wait(200)
    assert dock.session.progress.step <= step + 1
    press(qtbot, dock.pause)
    assert dock.pause.text() == "Pause"
    press(qtbot, dock.finish)
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=5000)
    assert len(viewer.layers) == 2
    assert "finished early" in dock.status.text()


def test_cancel_throws_the_volumes_away_and_brings_back_what_was_shown(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    viewer.add_points(np.zeros((1, 3)), name="mine")
    run(qtbot, opened, until="progress")
    assert not viewer.layers["mine"].visible
    press(qtbot, dock.cancel)
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=5000)
    assert [layer.name for layer in viewer.layers] == ["mine"]
    assert viewer.layers["mine"].visible
    assert dock.run.isEnabled()


def test_a_killed_process_leaves_the_volume_and_a_remedy(opened, said, qtbot):
    viewer, dock, worker = opened.viewer, opened.dock, opened.worker
    worker.fail = "The reconstruction process was killed: choose a smaller patch; the volume so far is kept."
    run(qtbot, opened)
    assert ("error", worker.fail) in said
    assert len(viewer.layers) == 2
    worker.fail = None
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)
    # The same FDK is not shown twice; the earlier result stays, hidden, for comparison.
    assert [layer.name for layer in viewer.layers if layer.visible] == ["FDK", "Partitioned TV [1]"]


def test_a_layer_deleted_during_a_run_does_not_disturb_it(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    run(qtbot, opened, until="progress")
    viewer.layers.remove(viewer.layers["Partitioned TV"])
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)
    assert [layer.name for layer in viewer.layers] == ["FDK"]


def test_the_work_follows_where_the_person_looks(opened, qtbot):
    viewer, dock, worker = opened.viewer, opened.dock, opened.worker
    run(qtbot, opened, until="progress")
    press(qtbot, dock.pause)
    viewer.dims.ndisplay = 2
    layer = viewer.layers["Partitioned TV"]
    viewer.dims.point = tuple(layer.data_to_world((12, 0, 0)))
    viewer.scene.camera.center = tuple(layer.data_to_world((12, 3, 5)))
    qtbot.waitUntil(lambda: bool(worker.focused) and np.allclose(worker.focused[-1], (12, 3, 5)), timeout=5000)


def test_a_job_that_does_not_fit_says_so_in_red_and_cannot_run(opened, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock
    open_and_wait(qtbot, scan_dock)
    shape = dock.volume.editors["shape"]
    shape.put((8000, 8000, 8000))
    qtbot.waitUntil(lambda: "needs about" in dock.memory.text(), timeout=5000)
    assert "color" in dock.memory.text()
    assert not dock.run.isEnabled()
    shape.put(None)
    qtbot.waitUntil(dock.run.isEnabled, timeout=5000)


def test_every_method_makes_a_job(opened, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock
    open_and_wait(qtbot, scan_dock)
    methods = []
    for index in range(dock.method.count()):
        if not dock.method.view().isRowHidden(index):
            dock.method.setCurrentIndex(index)
            methods.append(dock.job().parameters.method)
    assert methods == ["fdk", "sirt", "tv", "padmm", "unrolled"]


def test_a_closed_dock_leaves_the_run_alone(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    run(qtbot, opened, until="progress")
    session = dock.session
    viewer.window.remove_dock_widget(dock)
    dock.deleteLater()
    qtbot.waitUntil(lambda: session.state == "idle", timeout=20_000)
    _, again = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    assert again.session is session
    assert again.run.isEnabled()


def test_closing_the_viewer_ends_the_session(make_napari_viewer, pretend, qtbot):
    viewer = make_napari_viewer()
    viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    session = Session.of(viewer)
    viewer.close()
    qtbot.waitUntil(lambda: pretend[0].closed, timeout=5000)
    assert not session._timer.isActive()
    assert not hasattr(session, "viewer")
    assert not session_module._sessions


def test_docks_fit_beside_the_canvas(opened, qtbot):
    scan_dock, dock = opened.scan_dock, opened.dock
    open_and_wait(qtbot, scan_dock)
    assert scan_dock.sizeHint().width() <= 420
    assert dock.sizeHint().width() <= 420
    assert max(scan_dock.minimumSizeHint().width(), dock.minimumSizeHint().width()) <= 420
