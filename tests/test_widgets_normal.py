"""The Normal operator dock, opened through the manifest and pressed with a mouse; the process only pretends."""

from types import SimpleNamespace

import numpy as np
import pytest
from napari.layers import Image
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFileDialog

from napari_recon.jobs.job import FitParameters, OperatorJob, PatchJob
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, Stage, VolumeReady
from napari_recon.widgets import session as session_module
from napari_recon.widgets.operator_displays import FIGURE, filter_axes, ticks, zero_frequency

N, VOXEL = 16, 0.5
SHIFT = (-(N - 1) / 2 * VOXEL,) * 3
FREQUENCY = 1 / (N * VOXEL)
WHOLE = (slice(0, N),) * 3
FIGURES = {
    "relative_error": 0.034, "white": 0.3, "image": 0.1, "residual": 0.2, "worst_region": 0.09,
    "fit_seconds": 3.0, "seconds_exact": 0.8, "seconds_approximate": 0.1,
}  # fmt: skip


def ready(name):
    if name.startswith("filter"):
        labels = ("f_z", "f_y", "f_x")
        return VolumeReady(name, (N,) * 3, (FREQUENCY,) * 3, (-N // 2 * FREQUENCY,) * 3, "1/mm", "", labels)
    if name == "regions":
        return VolumeReady(name, (8,) * 3, (2 * VOXEL,) * 3, tuple(t + VOXEL / 2 for t in SHIFT))
    return VolumeReady(name, (N,) * 3, (VOXEL,) * 3, SHIFT)


def tell(worker, job, file):
    """What a worker says of the jobs of this dock."""
    if isinstance(job, PatchJob):
        yield from tell_patch(worker, job)
        return
    if not isinstance(job, OperatorJob):
        yield from type(worker).tell(worker, job)
        return
    rng = np.random.default_rng(0)
    yield Stage("reading")
    if worker.fail is not None:
        yield Failed("input", worker.fail)
        return
    for name in ("x", "mask", "filter"):
        if name == "mask":
            yield Stage("fitting the normal operator")
            yield Progress("mask", 1, 6, WHOLE, None, 0.1, 0.5)  # a probe: nothing to see yet
        shape = ready(name).shape
        worker.volumes[name] = rng.random(shape, np.float32) * (-4 if name == "filter" else 1)
        yield ready(name)
    for step in range(2, 7):
        if worker.state == "cancelling":
            yield Cancelled()
            return
        if worker.state == "finishing":
            break
        worker.volumes["mask"][:] = step
        figures = {
            "iteration": step - 2.0,
            "loss": 1 / step,
            "held_out": 1.1 / step,
            "image": 0.4 / step,
            "seconds": 0.1,
        }
        yield Progress("mask", step, 6, WHOLE, None, 0.1 * step, 1.0, figures)
    complete = worker.state != "finishing"
    for name in ("exact", "approximate", "error", "regions"):
        worker.volumes[name] = rng.random(ready(name).shape, np.float32)
        yield ready(name)
    yield Finished(FIGURES, 1.0, 10**9, str(file), complete, {"napari_recon": "test"})


def tell_patch(worker, job):
    p, steps = job.patch, job.steps
    rng = np.random.default_rng(0)
    names = ("patch exact", "patch approximate", "patch difference")
    for name in names:
        worker.volumes[name] = np.zeros((steps + 1, p, p, p), np.float32)
        if name != "patch difference":
            worker.volumes[name][0] = rng.random((p, p, p), np.float32)
        yield VolumeReady(
            name, (steps + 1, p, p, p), (1.0, *(VOXEL,) * 3), (0.0, *SHIFT), "mm", "", ("step", "z", "y", "x")
        )
    for step in range(1, steps + 1):
        if worker.state == "cancelling":
            yield Cancelled()
            return
        for name in names:
            worker.volumes[name][step] = 0.01 * step * rng.random((p, p, p), np.float32)
        box = (slice(step, step + 1), *(slice(0, p),) * 3)
        figures = {"difference": 0.01 * step, "seconds_exact": 0.8, "seconds_approximate": 0.1, "speedup": 8.0}
        yield Progress("patch exact", step, steps, box, None, 0.1, 1.0, figures)
    yield Finished(figures, 1.0, 10**9)


@pytest.fixture
def opened(make_napari_viewer, pretend, said, memory_scan, monkeypatch, tmp_path, qtbot):
    """A viewer with the dock and a scan, and an operator's file where the pretended process says it is."""
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Normal operator")
    worker, file = pretend[0], tmp_path / "kept.safetensors"
    file.write_bytes(b"an operator")
    monkeypatch.setattr(worker, "tell", lambda job: tell(worker, job, file), raising=False)
    session = dock.session
    session.open("ball.h5")
    qtbot.waitUntil(lambda: session.scan is not None and dock.run.isEnabled(), timeout=10_000)
    return SimpleNamespace(viewer=viewer, dock=dock, worker=worker, session=session, file=file, said=said)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def idle(qtbot, session):
    qtbot.waitUntil(lambda: session.state == "idle", timeout=20_000)


def fit(qtbot, opened):
    press(qtbot, opened.dock.run)
    idle(qtbot, opened.session)


def compare(qtbot, opened):
    fit(qtbot, opened)
    press(qtbot, opened.dock.compare)
    idle(qtbot, opened.session)


def visible(viewer):
    return [layer.name.split(",")[0].split(" (")[0] for layer in viewer.layers if layer.visible]


def test_without_a_scan_nothing_can_be_pressed(make_napari_viewer, pretend, qtbot):
    viewer = make_napari_viewer()
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Normal operator")
    assert "Open a scan" in dock.subject.text()
    assert not any(b.isEnabled() for b in (dock.run, dock.load, dock.finish, dock.cancel))
    assert dock.result.isHidden()
    assert dock.patch.isHidden()


def test_the_form_makes_the_job(opened, qtbot):
    dock = opened.dock
    assert dock.job().parameters == FitParameters()
    dock.basic.editors["terms"].put(3)
    dock.basic.editors["distribution"].put("residual")
    dock.more.editors["support"].put(7)
    wanted = FitParameters(terms=3, distribution="residual", support=7)
    assert dock.job().parameters == wanted
    assert not dock.more.editors["real_filter"].widget.isEnabled()  # H is symmetric, so λ is real
    dock.more.editors["symmetric"].put(False)
    assert dock.more.editors["real_filter"].widget.isEnabled()
    fit(qtbot, opened)
    assert opened.worker.jobs[0].parameters == wanted.model_copy(update={"symmetric": False})


def test_a_fit_becomes_the_papers_figure(opened, qtbot):
    viewer = opened.viewer
    fit(qtbot, opened)
    assert visible(viewer) == ["x", "AᵀAx", "Hx", "λ", "m", "squared error"]
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (2, 3)
    shown = opened.session.operator.layers
    for name in FIGURE:
        assert shown[name].data is opened.worker.volumes[name]  # the very array, not a copy
        assert [str(u) for u in shown[name].units] == ["millimeter"] * 3
        np.testing.assert_allclose(shown[name].extent.world, shown["x"].extent.world)
    shown["exact"].contrast_limits = (0.1, 0.2)
    assert tuple(shown["approximate"].contrast_limits) == (0.1, 0.2)
    assert shown["mask"].contrast_limits != shown["exact"].contrast_limits
    told = shown["mask"].metadata["napari_recon"]
    assert OperatorJob(**told["job"]) == opened.worker.jobs[0]
    assert told["figures"] == FIGURES


def test_the_figures_are_told_in_words(opened, qtbot):
    fit(qtbot, opened)
    text = opened.dock.verdict.text()
    for words in ("3.4 %", "Good", "worst region 9 %", "white noise 30 %", "8 times faster"):
        assert words in text
    assert "finished early" not in text
    assert not opened.dock.result.isHidden()


def test_the_curves_grow_while_the_operator_is_fitted(opened, qtbot):
    dock = opened.dock
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: not dock.filter.isHidden() and not dock.curve.isHidden(), timeout=10_000)
    assert opened.session.state == "running"
    idle(qtbot, opened.session)
    for line, first in zip(dock.curve.lines, (1 / 2, 1.1 / 2, 0.4 / 2), strict=True):
        steps, values = line.get_data()
        assert list(steps) == [0, 1, 2, 3, 4]
        assert values[0] == pytest.approx(first)
    assert "seconds" not in dock.curve.names


def test_finish_keeps_what_there_is(opened, qtbot):
    dock, session = opened.dock, opened.session
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(session.operator.curve), timeout=10_000)
    press(qtbot, dock.finish)
    idle(qtbot, session)
    assert "finished early" in dock.status.text()
    assert "finished early" in dock.verdict.text()
    assert len(session.operator.curve["loss"]) < 5
    assert session.operator.shows_figure


def test_cancel_brings_back_the_operator_before(opened, qtbot):
    viewer, dock, session = opened.viewer, opened.dock, opened.session
    fit(qtbot, opened)
    before, layers = session.operator, list(viewer.layers)
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: "filter" in session.operator.layers, timeout=10_000)
    press(qtbot, dock.cancel)
    idle(qtbot, session)
    assert session.operator is before
    assert list(viewer.layers) == layers
    assert len(visible(viewer)) == 6
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (2, 3)
    assert "3.4 %" in dock.verdict.text()


def test_a_second_fit_takes_the_place_of_the_first(opened, qtbot):
    fit(qtbot, opened)
    names = {layer.name for layer in opened.viewer.layers}
    first = opened.session.operator
    fit(qtbot, opened)
    assert opened.session.operator is not first
    assert len(opened.viewer.layers) == len(names)
    assert not any(layer in opened.viewer.layers for layer in first.layers.values())


def test_a_refused_file_is_one_sentence_and_changes_nothing(opened, qtbot, monkeypatch):
    fit(qtbot, opened)
    before, layers = opened.session.operator, list(opened.viewer.layers)
    opened.worker.fail = "other.safetensors belongs to another scan: fit an operator for this one."
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: ("other.safetensors", ""))
    press(qtbot, opened.dock.load)
    idle(qtbot, opened.session)
    assert opened.worker.jobs[-1].operator == "other.safetensors"
    assert ("error", opened.worker.fail) in opened.said
    assert opened.session.operator is before
    assert list(opened.viewer.layers) == layers


def test_it_is_judged_on_any_volume_in_mm(opened, qtbot):
    viewer, dock, worker = opened.viewer, opened.dock, opened.worker
    seen = []
    data = np.random.default_rng(1).random((8, 9, 10)).astype(np.float32)
    viewer.add_image(data, name="in pixels")
    mine = viewer.add_image(data, name="mine", scale=(0.7,) * 3, translate=(1, 2, 3), units=("mm",) * 3)
    viewer.add_image(data, name="bricks", scale=(0.7, 0.7, 1.0), units=("mm",) * 3)
    choice = dock.judged_on
    assert [choice.itemText(i) for i in range(choice.count())] == ["FDK of this scan", "mine"]
    choice.setCurrentIndex(1)
    viewer.add_image(data, name="another", scale=(0.7,) * 3, units=("mm",) * 3)
    assert choice.currentText() == "mine"  # still

    def submit(job):
        from napari_recon.jobs.volumes import read_volume

        seen.append((job.volume, read_volume(job.volume)))
        type(worker).submit(worker, job)

    worker.submit = submit
    fit(qtbot, opened)
    path, volume = seen[0]
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.grid.translate, mine.translate, atol=1e-5)
    assert volume.voxel_size == pytest.approx(0.7)
    assert not path.parent.exists()  # not left behind
    assert "off on mine" in dock.verdict.text()
    viewer.layers.remove("mine")
    assert choice.currentText() == "FDK of this scan"


def test_the_filter_alone_has_axes_in_1_per_mm(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    fit(qtbot, opened)
    press(qtbot, dock.spectrum)
    qtbot.waitUntil(lambda: "λ axes (1/mm)" in viewer.layers, timeout=5000)
    assert visible(viewer) == ["λ", "λ axes"]
    assert not viewer.canvas.grid.enabled
    assert not viewer.canvas.overlays.scale_bar.visible  # it would tell mm
    press(qtbot, dock.figure)
    qtbot.waitUntil(lambda: len(visible(viewer)) == 6, timeout=5000)
    assert viewer.canvas.overlays.scale_bar.visible
    told = opened.session.operator.layers["filter"].metadata["napari_recon"]
    np.testing.assert_allclose(told["frequency_step"], FREQUENCY)


@pytest.mark.parametrize("ndisplay", [2, 3])
def test_a_tick_lies_beside_its_frequency(ndisplay):
    axes = filter_axes(ready("filter"), ready("x"), ndisplay)
    numbers = axes.features["tick"]
    zero = np.array(SHIFT) + np.array(zero_frequency(ready("filter"))) * VOXEL
    told = set(ticks(-1.0, 1 - FREQUENCY))
    found = {axis: set() for axis in ((1, 2) if ndisplay == 2 else (0, 1, 2))}
    for point, number in zip(axes.data, numbers, strict=True):
        if number and not number.startswith("f_"):
            for axis, seen in found.items():
                if np.isclose((point[axis] - zero[axis]) / VOXEL * FREQUENCY, float(number), atol=1e-6):
                    seen.add(float(number))
    assert all(told <= seen for seen in found.values())


def test_where_the_error_is_is_hidden_until_asked_for(opened, qtbot):
    fit(qtbot, opened)
    regions = opened.session.operator.layers["regions"]
    assert not regions.visible
    press(qtbot, opened.dock.regions)
    assert regions.visible
    assert str(regions.interpolation2d) == "nearest"
    half = np.array([[-0.5], [0.5]])  # an extent ends at the outer voxels' middles
    x = opened.session.operator.layers["x"]
    np.testing.assert_allclose(regions.extent.world + half * regions.scale, x.extent.world + half * x.scale, atol=1e-6)


def test_the_operator_is_saved_whole_or_not_at_all(opened, qtbot, monkeypatch, tmp_path):
    fit(qtbot, opened)
    path = tmp_path / "mine"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(path), ""))
    press(qtbot, opened.dock.save)
    saved = path.with_suffix(".safetensors")
    qtbot.waitUntil(saved.exists, timeout=5000)
    assert saved.read_bytes() == b"an operator"
    opened.file.unlink()
    saved.unlink()
    press(qtbot, opened.dock.save)
    qtbot.waitUntil(lambda: any(severity == "error" for severity, _ in opened.said), timeout=5000)
    assert list(tmp_path.glob("*mine*")) == []


def test_the_figure_is_saved(opened, qtbot, monkeypatch, tmp_path):
    fit(qtbot, opened)
    path = tmp_path / "figure.png"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(path), ""))
    press(qtbot, opened.dock.save_figure)
    qtbot.waitUntil(path.exists, timeout=20_000)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_reconstruction_uses_the_operator(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    fit(qtbot, opened)
    press(qtbot, dock.use)  # opens the dock
    _, reconstruct = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    assert reconstruct.job().parameters.operator == str(opened.file)
    reconstruct.forms[reconstruct.method.currentIndex()].editors["operator"].put("exact")
    assert reconstruct.job().parameters.operator == "exact"
    press(qtbot, dock.use)
    assert reconstruct.job().parameters.operator == str(opened.file)
    opened.session.set_options(opened.session.scan.options.model_copy(update={"views": 12}))
    qtbot.waitUntil(lambda: opened.session.scan.geometry.views == 12, timeout=5000)
    assert reconstruct.job().parameters.operator == "fit"  # the operator was for 24 views


def test_while_a_reconstruction_runs_the_dock_waits(opened, qtbot):
    viewer, dock, session = opened.viewer, opened.dock, opened.session
    fit(qtbot, opened)
    _, reconstruct = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    press(qtbot, reconstruct.run)
    buttons = (dock.run, dock.load, dock.finish, dock.cancel, dock.compare, dock.use)
    assert not any(b.isEnabled() for b in buttons)
    idle(qtbot, session)
    qtbot.waitUntil(dock.run.isEnabled, timeout=5000)
    assert dock.compare.isEnabled()
    assert "3.4 %" in dock.verdict.text()
    assert "residual" not in dock.status.text()


def test_a_layer_deleted_during_the_fit_does_not_disturb_it(opened, qtbot):
    viewer, dock, session = opened.viewer, opened.dock, opened.session
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(session.operator.curve), timeout=10_000)
    viewer.layers.remove("m")
    viewer.layers.remove("x")
    idle(qtbot, session)
    assert "3.4 %" in dock.verdict.text()
    assert not dock.figure.isEnabled()
    assert dock.spectrum.isEnabled()
    press(qtbot, dock.compare)
    idle(qtbot, session)
    assert len(session.patch.steps) == 10


def test_a_dock_closed_and_opened_again_shows_what_was_found(opened, qtbot):
    viewer, dock, session = opened.viewer, opened.dock, opened.session
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: bool(session.operator.curve), timeout=10_000)
    viewer.window.remove_dock_widget(dock)
    dock.deleteLater()
    idle(qtbot, session)
    viewer.add_image(np.zeros((4, 4)))  # the old dock lists layers no more
    _, again = viewer.window.add_plugin_dock_widget("napari-recon", "Normal operator")
    assert again is not dock
    assert "3.4 %" in again.verdict.text()
    assert not again.curve.isHidden()
    assert not again.filter.isHidden()


def test_a_what_if_stands_side_by_side_step_by_step(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    job = opened.worker.jobs[-1]
    assert job.operator == str(opened.file)
    np.testing.assert_allclose(job.center, ((N - 1) / 2,) * 3, atol=0.6)
    assert visible(viewer) == ["exact step", "H step", "difference"]
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (1, 3)
    low, high = opened.session.patch.layers["patch difference"].contrast_limits
    assert low == -high
    assert dock.steps.maximum() == job.steps
    assert dock.steps.value() == job.steps  # it followed the work
    assert "after 10 steps: H is 10 % off, 8× faster" in dock.step.text()


def test_the_slider_and_the_viewer_keep_in_step(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    jobs = len(opened.worker.jobs)
    dock.steps.setValue(3)
    assert viewer.dims.point[0] == 3
    assert "after 3 steps: H is 3 % off" in dock.step.text()
    viewer.dims.set_point(0, 6)
    assert dock.steps.value() == 6
    assert "after 6 steps" in dock.step.text()
    assert len(opened.worker.jobs) == jobs  # nothing was computed again


def test_who_looks_at_an_earlier_step_is_left_there(opened, qtbot):
    dock, session = opened.dock, opened.session
    fit(qtbot, opened)
    press(qtbot, dock.compare)
    qtbot.waitUntil(lambda: session.patch is not None and len(session.patch.steps) >= 2, timeout=10_000)
    dock.steps.setValue(1)
    idle(qtbot, session)
    assert session.patch.step == 1
    assert dock.steps.value() == 1


def test_moving_the_slider_before_any_run_computes(opened, qtbot):
    fit(qtbot, opened)
    opened.dock.steps.setValue(4)
    assert opened.session.state == "running"
    idle(qtbot, opened.session)
    assert isinstance(opened.worker.jobs[-1], PatchJob)


def test_back_shows_what_was_shown_before(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    press(qtbot, dock.back)
    assert visible(viewer) == ["x", "AᵀAx", "Hx", "λ", "m", "squared error"]
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (2, 3)
    assert not dock.back.isEnabled()
    dock.steps.setValue(2)
    assert visible(viewer) == ["exact step", "H step", "difference"]
    press(qtbot, dock.figure)
    assert len(visible(viewer)) == 6


def click(viewer, layer, voxel):
    """A click into a layer, as the canvas tells it."""
    viewer.mouse_over_canvas = True
    viewer.cursor.position = tuple(layer.data_to_world(voxel))
    event = SimpleNamespace(button=1, type="mouse_press", modifiers=(), handled=False)
    for callback in list(viewer.mouse_drag_callbacks):
        told = callback(viewer, event)
        next(told, None)
        event.type = "mouse_release"
        next(told, None)
    viewer.mouse_over_canvas = False


def test_a_click_chooses_the_place_and_the_slider_then_computes_there(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    press(qtbot, dock.back)
    x = opened.session.operator.layers["x"]
    viewer.dims.set_point(1, x.data_to_world((4, 0, 0))[0])
    click(viewer, x, (4, 11, 6))
    assert "z 4, y 11, x 6" in dock.what_if.text()
    jobs = len(opened.worker.jobs)
    dock.steps.setValue(5)
    idle(qtbot, opened.session)
    assert len(opened.worker.jobs) == jobs + 1
    np.testing.assert_allclose(opened.worker.jobs[-1].center, (4, 11, 6), atol=0.01)
    names = [layer.name for layer in viewer.layers if isinstance(layer, Image) and layer.ndim == 4]
    assert len(names) == 3  # the patch before made room


def test_a_reconstruction_after_a_what_if_is_shown_as_ever(opened, qtbot):
    viewer = opened.viewer
    compare(qtbot, opened)
    _, reconstruct = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    press(qtbot, reconstruct.run)
    idle(qtbot, opened.session)
    assert visible(viewer) == ["FDK", "Partitioned TV"]
    assert viewer.dims.ndim == 4
    assert viewer.dims.ndisplay == 3
    assert "residual" in reconstruct.status.text()


def test_a_cancelled_what_if_brings_the_figure_back(opened, qtbot):
    dock, session = opened.dock, opened.session
    fit(qtbot, opened)
    press(qtbot, dock.compare)
    qtbot.waitUntil(lambda: session.patch is not None and bool(session.patch.steps), timeout=10_000)
    press(qtbot, dock.cancel)
    idle(qtbot, session)
    assert session.patch is None
    assert len(visible(opened.viewer)) == 6


def test_a_process_that_dies_leaves_the_dock_usable(opened, qtbot):
    dock, worker = opened.dock, opened.worker
    worker.fail = "The process was killed: choose fewer probes."
    fit(qtbot, opened)
    assert ("error", worker.fail) in opened.said
    assert opened.session.operator is None
    assert dock.result.isHidden()
    worker.fail = None
    qtbot.waitUntil(dock.run.isEnabled, timeout=5000)
    fit(qtbot, opened)
    assert "3.4 %" in dock.verdict.text()


def test_the_dock_fits_beside_the_canvas(opened, qtbot):
    fit(qtbot, opened)
    assert opened.dock.sizeHint().width() <= 420
    assert opened.dock.minimumSizeHint().width() <= 420
