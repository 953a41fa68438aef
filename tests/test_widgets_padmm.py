"""PADMM in the Reconstruct dock: its start, what can be changed while it runs, and the curves of several runs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QComboBox

from napari_recon.jobs.job import STARTS, DataConsistencyJob, PADMMParameters, RegularizationJob
from napari_recon.jobs.messages import Cancelled, Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.volumes import read_volume
from napari_recon.widgets import session as session_module
from napari_recon.widgets.curve import EARLIER, Convergence
from napari_recon.widgets.forms import BROWSE


class PretendPADMM(PretendWorker):
    """Iterates over the whole volume, and takes up what it is told while it does."""

    def tell(self, job):
        if isinstance(job, DataConsistencyJob):
            yield from self.tell_of_projections(job)
            return
        if isinstance(job, RegularizationJob):
            yield Progress("sweep", 1, 2, (), None, 0.1, 0.1, {"regularization": 0.1})
            told = {"suggestion": {"sentence": "τ = 0.0042 is a good one."}}
            yield Finished({"regularization": 0.0042}, 1.0, 10**9, None, True, told)
            return
        parameters, n = job.parameters, self.size
        shift, box = (-(n - 1) / 2 * 0.5,) * 3, (slice(0, n),) * 3
        yield Stage("reading", job.scan.name)
        names = ["fdk", *(["start"] if parameters.start_is_computed else []), "result"]
        for number, name in enumerate(names):
            self.volumes[name] = np.full((n,) * 3, 0.01 * (number + 1), np.float32)
            yield VolumeReady(name, (n,) * 3, (0.5,) * 3, shift)
        if parameters.keep_iterates:
            self.volumes["iterates"] = np.zeros((parameters.iterations + 1, n, n, n), np.float32)
            labels = ("iteration", "z", "y", "x")
            shape = self.volumes["iterates"].shape
            yield VolumeReady("iterates", shape, (1.0, 0.5, 0.5, 0.5), (0.0, *shift), axis_labels=labels)
        step, total = 0, parameters.iterations
        while step < total:
            if self.state == "cancelling":
                yield Cancelled()
                return
            if self.state == "finishing":
                break
            for change in self.changes:
                total = change.get("iterations", total)
            step += 1
            figures = {"residual": 1 / step, "objective": 5 / step, "primal": 0.1 / step, "dual": 0.2 / step}
            figures["pairs"] = 2 + step
            yield Progress("result", step, total, box, box if step < total else None, 0.1, 1.0, figures)
            if parameters.keep_iterates and step % 2 == 0:  # as if there were no room for all
                self.volumes["iterates"][step // 2] = step
                yield Progress("iterates", step, total, (slice(step // 2, step // 2 + 1), *box), None, 0.0, None)
        yield Finished({"residual": 0.1}, 1.0, 10**9, None, step == total, {"napari_recon": "test"})

    def tell_of_projections(self, job):
        self.asked_for = None if job.volume is None else read_volume(job.volume)
        random = np.random.default_rng(0)
        for name in ("measured", "projected", "residual"):
            self.volumes[name] = random.random((6, 20, 30), dtype=np.float32)
            at = (0.0, -11.4, -17.4)
            yield VolumeReady(name, (6, 20, 30), (1.0, 1.2, 1.2), at, axis_labels=("view", "row", "column"))
        figures = {"residual": 0.05, "noise": 0.01, "residual_to_noise": 1.5, "worst_view": 2.5, "worst_view_index": 4}
        yield Progress("projected", 6, 6, (slice(0, 6), slice(0, 20), slice(0, 30)), None, 0.1, 0.0, figures)
        yield Finished(figures, 1.0, 10**9, None, True, {"napari_recon": "test"})


@pytest.fixture
def opened(make_napari_viewer, said, memory_scan, monkeypatch, qtbot):
    """The dock with its scan, the method chosen, and a start that needs nothing."""
    worker = PretendPADMM()
    monkeypatch.setattr(session_module, "make_worker", lambda: worker)
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.session.open("ball.h5")
    qtbot.waitUntil(lambda: dock.session.scan is not None and dock.session.checks is not None, timeout=10_000)
    dock.method.setCurrentIndex(dock.method.findText("PADMM"))
    dock.padmm.editors["start"].put("fdk")
    return SimpleNamespace(viewer=viewer, dock=dock, session=dock.session, form=dock.padmm, worker=worker)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def run(qtbot, opened, until="idle", **parameters):
    for name, value in parameters.items():
        opened.form.editors[name].put(value)
    qtbot.waitUntil(lambda: opened.dock.run.isEnabled() and not opened.dock._settle.isActive(), timeout=10_000)
    press(qtbot, opened.dock.run)
    if until == "idle":
        qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)
    else:
        qtbot.waitUntil(lambda: opened.session.progress is not None, timeout=20_000)


def offered(opened):
    combo = opened.form.editors["start"].widget
    assert isinstance(combo, QComboBox)
    return [combo.itemText(i) for i in range(combo.count())]


# -- the start -----------------------------------------------------------------------------------------------------


def test_starts_are_offered_with_the_viewers_volumes(opened, qtbot):
    assert offered(opened) == [*STARTS, BROWSE]
    run(qtbot, opened, iterations=2)
    opened.viewer.add_image(np.zeros((5, 5)), name="a picture")
    assert offered(opened) == [*STARTS, "layer: FDK", "layer: PADMM", BROWSE]
    opened.form.editors["start"].put("layer: PADMM")
    opened.viewer.layers.remove("FDK")
    assert opened.form.values()["start"] == "layer: PADMM"
    opened.viewer.layers.remove("PADMM")
    assert opened.form.values()["start"] == STARTS[0]
    assert offered(opened) == [*STARTS, BROWSE]


def test_a_layer_is_handed_over_as_a_file_that_goes_when_the_job_ends(opened, qtbot, monkeypatch):
    read = []
    submit = PretendPADMM.submit

    def look(worker, job):
        if job.parameters.start.endswith(".tif"):
            read.append((job.parameters.start, read_volume(job.parameters.start)))
        submit(worker, job)

    run(qtbot, opened, iterations=2)
    monkeypatch.setattr(PretendPADMM, "submit", look)
    layer = opened.viewer.layers["PADMM"]
    expected = layer.data.copy()
    run(qtbot, opened, start="layer: PADMM")
    ((path, volume),) = read
    np.testing.assert_array_equal(volume.data, expected)
    assert volume.voxel_size == pytest.approx(layer.scale[0])
    assert path.endswith("PADMM.tif")  # which is what provenance tells
    assert not Path(path).exists()


def test_a_computed_start_stands_between_fdk_and_the_result(opened, qtbot):
    run(qtbot, opened, start="tv", iterations=2)
    assert [layer.name for layer in opened.viewer.layers] == ["FDK", "Start: TV", "PADMM"]
    assert opened.viewer.canvas.grid.actual_shape(opened.viewer.layers) == (1, 3)


# -- tuning --------------------------------------------------------------------------------------------------------


def test_edits_during_a_run_are_sent_on_and_the_total_follows(opened, qtbot):
    dock, form = opened.dock, opened.form
    run(qtbot, opened, until="progress", iterations=2000)
    assert not dock.method.isEnabled()
    assert not form.editors["weighted"].widget.isEnabled()
    spin = form.editors["regularization"].widget
    assert spin.isEnabled()
    spin.lineEdit().selectAll()
    for key in "0.02":
        qtbot.keyClick(spin.lineEdit(), key)
        qtbot.wait(50)
    qtbot.wait(300)
    assert not opened.worker.changes  # it is being typed
    qtbot.keyClick(spin.lineEdit(), Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: bool(opened.worker.changes), timeout=5000)
    assert opened.worker.changes == [{"regularization": 0.02}]
    form.editors["preconditioner"].put("diagonal")
    qtbot.waitUntil(lambda: len(opened.worker.changes) == 2, timeout=5000)
    assert opened.worker.changes[1] == {"preconditioner": "diagonal"}
    form.editors["iterations"].put(1500)
    qtbot.waitUntil(lambda: dock.progress.maximum() == 1500, timeout=5000)
    press(qtbot, dock.finish)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)
    assert form.editors["weighted"].widget.isEnabled()
    assert dock.job().parameters.regularization == 0.02
    assert opened.session.curve_label == "fdk, circulant, τ 0.001, changed"
    before = len(opened.worker.changes)
    form.editors["rho"].put(0.7)
    qtbot.wait(400)
    assert len(opened.worker.changes) == before  # nothing runs


def test_a_layer_becomes_the_start_amid_a_run(opened, qtbot):
    run(qtbot, opened, until="progress", iterations=2000)
    opened.form.editors["start"].put("layer: FDK")
    qtbot.waitUntil(lambda: bool(opened.worker.changes), timeout=5000)
    (change,) = opened.worker.changes
    assert list(change) == ["start"]
    assert change["start"].endswith("FDK.tif")
    press(qtbot, opened.dock.cancel)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)


def test_a_start_deleted_amid_its_run_is_no_change(opened, qtbot):
    run(qtbot, opened, iterations=2)
    run(qtbot, opened, until="progress", start="layer: PADMM", iterations=2000)
    opened.viewer.layers.remove("PADMM")
    opened.form.editors["rho"].put(0.5)
    qtbot.waitUntil(lambda: bool(opened.worker.changes), timeout=5000)
    assert opened.worker.changes == [{"rho": 0.5}]
    press(qtbot, opened.dock.cancel)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)


def test_a_dock_opened_amid_a_run_shows_what_runs(opened, qtbot):
    run(qtbot, opened, until="progress", iterations=2000, rho=0.4)
    opened.viewer.window.remove_dock_widget(opened.dock)
    opened.dock.deleteLater()
    _, again = opened.viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    assert again.padmm.value() == PADMMParameters(start="fdk", iterations=2000, rho=0.4)
    again.padmm.editors["rho"].put(0.5)
    qtbot.waitUntil(lambda: bool(opened.worker.changes), timeout=5000)
    assert opened.worker.changes == [{"rho": 0.5}]
    press(qtbot, again.cancel)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)


# -- curves --------------------------------------------------------------------------------------------------------


def points(line):
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_earlier_runs_stay_to_compare_with_until_they_are_cleared(opened, qtbot):
    dock, curve = opened.dock, opened.dock.curve
    run(qtbot, opened, iterations=4)
    assert not curve.isHidden()
    assert curve.legend.isHidden()  # nothing to tell apart
    run(qtbot, opened, start="zeros", preconditioner="scalar", iterations=6)
    assert [label for label, _ in opened.session.runs] == ["fdk, circulant, τ 0.001"]
    legend = curve.legend.text().replace("&nbsp;", " ")
    assert "zeros, scalar" in legend
    assert "fdk, circulant" in legend
    now, before = curve.curve.lines[0], curve.curve._thin[0]
    assert points(now) == [(2 + k, pytest.approx(1 / k)) for k in range(1, 7)]  # over pairs
    assert points(before) == [(2 + k, pytest.approx(1 / k)) for k in range(1, 5)]
    assert before.get_linewidth() < now.get_linewidth()
    assert before.get_color() == EARLIER[0]
    press(qtbot, curve.clear_earlier)
    assert not opened.session.runs
    assert not points(before)
    assert dock.run.isEnabled()


def test_what_the_curves_show_can_be_chosen_and_stays_chosen(opened, qtbot):
    curve = opened.dock.curve
    run(qtbot, opened, iterations=4)
    names = [curve.figure.itemData(i) for i in range(curve.figure.count())]
    assert names == ["residual", "objective", "primal dual"]
    curve.figure.setCurrentIndex(2)
    first, second = curve.curve.lines
    assert points(first)[0] == (3, pytest.approx(0.1))
    assert points(second)[0] == (3, pytest.approx(0.2))
    curve.figure.setCurrentIndex(1)
    run(qtbot, opened, start="zeros", iterations=3)
    assert curve.figure.currentData() == "objective"
    assert points(curve.curve.lines[0])[0] == (3, pytest.approx(5.0))
    assert not points(second)


def test_a_cancelled_run_leaves_no_curve(opened, qtbot):
    run(qtbot, opened, until="progress", iterations=2000)
    qtbot.waitUntil(lambda: opened.session.progress.step > 2, timeout=5000)
    press(qtbot, opened.dock.cancel)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)
    run(qtbot, opened, iterations=3)
    assert not opened.session.runs


def test_another_scan_has_curves_of_its_own(opened, qtbot):
    for _ in range(2):
        run(qtbot, opened, iterations=3)
    opened.session.open("ball.h5")
    qtbot.waitUntil(lambda: not opened.session.runs, timeout=5000)
    assert not opened.session.curve


def test_runs_of_other_methods_are_compared_over_their_steps(qtbot):
    curve = Convergence(lambda: None)
    qtbot.addWidget(curve)
    steps = [(k, 1.0 / k) for k in range(1, 5)]
    curve.show_runs(
        "SIRT", {"residual": steps}, [("fdk", {"residual": steps, "pairs": [(k, 9 * k) for k, _ in steps]})]
    )
    assert points(curve.curve.lines[0]) == points(curve.curve._thin[0]) == steps


# -- against the data ----------------------------------------------------------------------------------------------


def check(qtbot, opened):
    press(qtbot, opened.dock.check)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)


def test_a_volume_is_held_against_the_data(opened, qtbot):
    run(qtbot, opened, iterations=2)
    curve = dict(opened.session.curve)
    opened.viewer.layers.selection.active = opened.viewer.layers["FDK"]
    check(qtbot, opened)
    np.testing.assert_allclose(opened.worker.asked_for.data, opened.viewer.layers["FDK"].data)
    assert opened.worker.jobs[-1].shape == opened.worker.jobs[0].shape  # what was read and projected is still there
    visible = [layer.name for layer in opened.viewer.layers if layer.visible]
    assert visible == ["measured", "projection of FDK", "residual of FDK"]
    measured, projected, residual = (opened.viewer.layers[name] for name in visible)
    assert measured.axis_labels == ("view", "z", "row", "column")
    for view in (0, 4):
        opened.viewer.dims.set_point(0, view)
        shown = measured.world_to_data(opened.viewer.dims.point)
        assert (round(shown[0]), round(shown[1])) == (view, 0)
    np.testing.assert_array_equal(measured.data[:, 0], opened.worker.volumes["measured"])
    assert opened.viewer.canvas.grid.actual_shape(opened.viewer.layers) == (1, 3)
    assert opened.viewer.dims.ndisplay == 2
    measured.contrast_limits = (0.1, 0.3)
    assert tuple(projected.contrast_limits) == (0.1, 0.3)
    assert tuple(residual.contrast_limits) == pytest.approx((-0.04, 0.04))  # zero is in the middle
    assert opened.session.curve == curve
    words = opened.dock.status.text()
    assert "0.05" in words
    assert "1.50 times the noise" in words
    assert "view 4" in words


def test_without_a_choice_the_last_volume_is_checked(opened, qtbot, said, monkeypatch):
    warned = []
    monkeypatch.setattr("napari_recon.widgets.reconstruct_dock.show_warning", warned.append)
    press(qtbot, opened.dock.check)
    assert "no volume to check" in warned[0]
    assert not opened.worker.jobs
    run(qtbot, opened, iterations=2)
    opened.viewer.layers.selection.active = opened.viewer.add_points(np.zeros((1, 3)))
    check(qtbot, opened)
    np.testing.assert_allclose(opened.worker.asked_for.data, opened.viewer.layers["PADMM"].data)


# -- how much to regularise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["TV", "PADMM"])
def test_a_regularisation_is_suggested_and_explained(opened, qtbot, method):
    run(qtbot, opened, iterations=3)
    curve = dict(opened.session.curve)
    dock = opened.dock
    dock.method.setCurrentIndex(dock.method.findText(method))
    form = dock.forms[dock.method.currentIndex()]
    button = next(b for b in dock.suggest if b.isVisibleTo(dock))
    press(qtbot, button)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=20_000)
    assert form.values()["regularization"] == 0.0042
    assert dock.status.text() == "τ = 0.0042 is a good one."
    assert opened.session.curve == curve
    assert [layer.name for layer in opened.viewer.layers if layer.visible] == ["FDK", "PADMM"]


# -- iterates ------------------------------------------------------------------------------------------------------


def test_kept_iterates_are_scrubbed_through_at_the_end(opened, qtbot):
    viewer = opened.viewer
    run(qtbot, opened, iterations=7, keep_iterates=True)
    assert [layer.name for layer in viewer.layers if layer.visible] == ["FDK", "PADMM iterates, every 2"]
    iterates = viewer.layers["PADMM iterates, every 2"]
    assert iterates.data.shape == (4, 16, 16, 16)  # what has been kept, not what there was room for
    assert iterates.axis_labels == ("iteration", "z", "y", "x")
    assert iterates.scale[0] == 2
    assert viewer.dims.point[0] == 6
    viewer.dims.set_point(0, 4)
    assert iterates.world_to_data(viewer.dims.point)[0] == 2
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (1, 2)
    run(qtbot, opened, iterations=2, keep_iterates=False)
    assert [layer.name for layer in viewer.layers if layer.visible] == ["FDK", "PADMM [1]"]


def test_iterates_can_be_looked_at_while_they_come(opened, qtbot):
    viewer = opened.viewer
    run(qtbot, opened, until="progress", iterations=2000, keep_iterates=True)

    def iterates():
        return next((layer for layer in viewer.layers if "iterates" in layer.name), None)

    def kept():
        return 0 if iterates() is None else len(iterates().data)

    qtbot.waitUntil(lambda: kept() > 2, timeout=10_000)
    assert [layer.name for layer in viewer.layers if layer.visible] == ["FDK", "PADMM"]  # what is watched stays
    assert viewer.dims.point[0] > 2  # the newest one is shown
    layer, before = iterates(), kept()
    viewer.dims.set_point(0, 2)
    qtbot.waitUntil(lambda: kept() > before, timeout=10_000)
    assert iterates() is layer
    assert viewer.dims.point[0] == 2  # who looks at an earlier one is left there
    viewer.layers.remove(layer)
    qtbot.wait(300)
    assert iterates() is None
    press(qtbot, opened.dock.finish)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=10_000)
    assert iterates() is None


def test_iterates_of_a_cancelled_run_are_not_shown(opened, qtbot):
    run(qtbot, opened, until="progress", iterations=500, keep_iterates=True)
    press(qtbot, opened.dock.cancel)
    qtbot.waitUntil(lambda: opened.session.state == "idle", timeout=5000)
    assert not list(opened.viewer.layers)
