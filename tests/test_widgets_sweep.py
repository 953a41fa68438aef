"""Trying values of a parameter in the Reconstruct dock: what is offered, what comes, and what a click takes."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import QPoint, Qt

from napari_recon.jobs.job import SWEPT, SIRTParameters, SweepJob, TVParameters, UnrolledParameters, sweep_name
from napari_recon.jobs.messages import Cancelled, Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.provenance import reconstruction_of
from napari_recon.jobs.volumes import read_volume
from napari_recon.scans.grid import Grid
from napari_recon.widgets import session as session_module
from napari_recon.widgets.displays import told_by
from napari_recon.widgets.sweep_panel import is_geometric, quick_binning, values_around


class PretendSweep(PretendWorker):
    """A volume of its number for each value; the second value is the best, where there is something to compare with."""

    compared = True
    reference = None

    def tell(self, job):
        if not isinstance(job, SweepJob):
            yield from super().tell(job)
            return
        self.reference = None if job.reference is None else read_volume(job.reference).data
        grid = job.coarser(Grid(job.shape, job.voxel_size))
        first, stop = job.coarse_slices(grid) or (0, grid.shape[0])
        grid = grid.crop((slice(first, stop), slice(0, grid.shape[1]), slice(0, grid.shape[2])))
        rows = []
        for number, value in enumerate(job.values, 1):
            name = sweep_name(job.parameter, value)
            yield Stage("reconstructing", name)
            self.volumes[name] = np.full(grid.shape, 0.1 * number, np.float32)
            yield VolumeReady(name, grid.shape, grid.scale, grid.translate)
            if self.state == "cancelling":
                yield Cancelled()
                return
            yield Progress(name, 1, 1, grid.full_box, None, 0.1, 0.0, {"residual": 0.1})
            rows.append({"value": value, "residual": 0.1 * number, "seconds": 1.0})
            if self.compared:
                rows[-1] |= {"psnr": 30.0 - abs(number - 2), "ssim": 0.8 + 0.01 * number, "nrmse": 0.1}
            yield Progress("sweep", number, len(job.values), (), None, 0.1, 0.0, rows[-1])
            if self.state == "finishing":
                break
        told = {"program": "test", "job": job.model_dump(mode="json"), "sweep": {"rows": rows}}
        figures = {"best": job.values[1]} if self.compared else {}
        yield Finished(figures, 1.0, 10**9, None, len(rows) == len(job.values), told)


@pytest.fixture
def opened(make_napari_viewer, said, memory_scan, monkeypatch, qtbot):
    """The dock with its scan, and the part opened."""
    worker = PretendSweep()
    monkeypatch.setattr(session_module, "make_worker", lambda: worker)
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.session.open("ball.h5")
    qtbot.waitUntil(lambda: dock.session.scan is not None and dock.session.checks is not None, timeout=10_000)
    qtbot.mouseClick(dock.sweep_section.toggleButton(), Qt.MouseButton.LeftButton)
    settle(qtbot, dock)
    return SimpleNamespace(viewer=viewer, dock=dock, session=dock.session, panel=dock.sweep, worker=worker, said=said)


def settle(qtbot, dock):
    """Until what was edited has been planned."""
    qtbot.waitUntil(lambda: not dock._settle.isActive() and dock.sweep.run.isEnabled(), timeout=10_000)


def method(opened, qtbot, name):
    opened.dock.method.setCurrentIndex(opened.dock.method.findData(name))
    settle(qtbot, opened.dock)


def choose(opened, qtbot, parameter, values=None):
    opened.panel.parameter.setCurrentIndex(opened.panel.parameter.findData(parameter))
    if values is not None:
        opened.panel.values.selectAll()
        qtbot.keyClicks(opened.panel.values, values)
    settle(qtbot, opened.dock)


def press(opened, qtbot):
    ended = []
    opened.session.finished.connect(ended.append)
    qtbot.mouseClick(opened.panel.run, Qt.MouseButton.LeftButton)
    return ended


def swept(opened, qtbot):
    ended = press(opened, qtbot)
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    return opened.worker.jobs[-1]


def click_picture(opened, qtbot, number):
    middle = opened.panel.strip.place_of(number).center()
    qtbot.mouseClick(opened.panel.strip, Qt.MouseButton.LeftButton, pos=QPoint(int(middle.x()), int(middle.y())))


# -- what is offered -----------------------------------------------------------------------------------------------


def test_only_the_methods_parameters_are_offered_with_values_about_the_present_one(opened, qtbot):
    panel = opened.panel

    def offered():
        return [panel.parameter.itemData(i) for i in range(panel.parameter.count())]

    assert offered() == ["regularization", "iterations", "passes", "patch", "views"]
    assert panel.values.text() == "0.00025, 0.0005, 0.001, 0.002, 0.004"
    opened.dock.forms[opened.dock.method.currentIndex()].editors["regularization"].put(0.01)
    qtbot.waitUntil(lambda: "0.01" in panel.values.text().split(", "), timeout=5000)
    choose(opened, qtbot, "regularization", "0.3, 3")
    opened.dock.forms[opened.dock.method.currentIndex()].editors["regularization"].put(0.02)
    settle(qtbot, opened.dock)
    assert panel.values.text() == "0.3, 3"  # what was typed stays
    method(opened, qtbot, "fdk")
    assert offered() == ["views"]
    assert panel.values.text() == "3, 6, 12, 24"


@pytest.mark.parametrize("parameters", [TVParameters(patch=None), SIRTParameters(), UnrolledParameters()])
def test_all_that_is_offered_can_be_swept(parameters):
    for name in [name for name in SWEPT if name in type(parameters).model_fields or name == "views"]:
        values = values_around(parameters, name, 60, 30)
        assert len(values) >= 2
        SweepJob(scan="ball.h5", parameters=parameters, parameter=name, values=values)


def test_the_binning_makes_it_quick_and_no_coarser_than_that():
    assert quick_binning(24**3, 30, 100) == 1
    assert quick_binning(96**3, 60, 100) > 1
    assert quick_binning(1000**3, 1000, 1000) == 8


def test_the_axis_is_logarithmic_where_values_are_factors():
    assert is_geometric((0.25, 0.5, 1, 2))
    assert is_geometric((1, 10))
    assert not is_geometric((10, 20, 30, 40))
    assert not is_geometric((0, 1, 10))


def test_values_that_will_not_do_are_said(opened, qtbot):
    for typed, said in (("0.1, many", "many is no number"), ("0.1", "at least 2"), ("-1, 1", "-1 is no")):
        opened.panel.values.selectAll()
        qtbot.keyClicks(opened.panel.values, typed)
        qtbot.waitUntil(lambda said=said: said in opened.panel.about.text(), timeout=5000)
        assert not opened.panel.run.isEnabled()
    assert opened.dock.run.isEnabled()  # a reconstruction is as possible as it was


# -- what comes ----------------------------------------------------------------------------------------------------


def test_a_sweep_is_run_as_described_and_shown_as_pictures_and_curves(opened, qtbot):
    method(opened, qtbot, "sirt")
    choose(opened, qtbot, "iterations", "25, 50, 100")
    opened.panel.binning.setValue(2)
    settle(qtbot, opened.dock)
    assert "3 reconstructions" in opened.panel.about.text()
    job = swept(opened, qtbot)
    assert (job.parameter, job.values, job.binning, job.slices) == ("iterations", (25, 50, 100), 2, None)
    assert job.parameters == SIRTParameters()
    panel = opened.panel
    assert [caption.split()[0] for caption, _ in panel.strip.pictures] == ["25", "50", "100"]
    assert ["★" in caption for caption, _ in panel.strip.pictures] == [False, True, False]
    assert panel.strip.framed == 1  # what is in the form
    levels = [int(picture[len(picture) // 2, len(picture) // 2].sum()) for _, picture in panel.strip.pictures]
    assert levels == sorted(levels)  # each shows its own volume, in one contrast
    np.testing.assert_allclose(panel.plot.lines[0].get_ydata(), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(panel.plot.lines[1].get_ydata(), [29, 30, 29])
    assert list(panel.plot.best.get_xdata()) == [50]
    assert panel.plot.present.get_xdata()[0] == 50
    assert panel.plot.axes.get_xscale() == "log"
    panel.measure.setCurrentIndex(panel.measure.findData("ssim"))
    assert panel.best() == 100
    assert "best PSNR with 50" in opened.dock.status.text()


def test_a_click_takes_a_value_into_the_form_and_says_so(opened, qtbot):
    method(opened, qtbot, "sirt")
    choose(opened, qtbot, "iterations", "25, 50, 100")
    swept(opened, qtbot)
    method(opened, qtbot, "fdk")
    click_picture(opened, qtbot, 2)
    assert opened.dock.method.currentData() == "sirt"
    assert opened.dock.job().parameters == SIRTParameters(iterations=100)
    assert opened.panel.strip.framed == 2
    assert "100" in opened.panel.said.text()
    plot = opened.panel.plot
    x, _ = plot.axes.transData.transform((25, 0.15))
    at = QPoint(int(x / plot.devicePixelRatioF()), plot.height() // 2)
    qtbot.mouseClick(plot, Qt.MouseButton.LeftButton, pos=at)
    assert opened.dock.job().parameters.iterations == 25


def test_a_number_of_views_is_taken_into_how_the_scan_is_read(opened, qtbot):
    method(opened, qtbot, "fdk")
    choose(opened, qtbot, "views", "6, 24")
    assert swept(opened, qtbot).values == (6, 24)
    assert opened.panel.strip.framed == 1
    click_picture(opened, qtbot, 0)
    qtbot.waitUntil(lambda: opened.session.scan.geometry.views == 6, timeout=10_000)
    assert "6 views" in opened.panel.said.text()
    settle(qtbot, opened.dock)
    assert opened.panel.strip.framed == 0  # the pictures are there still


def test_without_a_reference_the_residual_is_told_and_pictures_follow_the_place_that_is_looked_at(opened, qtbot):
    opened.worker.compared = False
    choose(opened, qtbot, "regularization", "0.001, 0.002")
    swept(opened, qtbot)
    panel = opened.panel
    assert panel.best() is None
    assert "0.1" in panel.strip.pictures[0][0]
    assert panel.measure.isHidden()
    assert not panel.plot.right.get_visible()
    layer = opened.session.sweep.result(0.001)
    depth = layer.data.shape[0]
    layer.data[depth // 2 :] = 0.0
    pictures = []
    for slice_ in (0, depth - 1):
        opened.viewer.dims.set_point(0, layer.data_to_world((slice_, 0, 0))[0])
        qtbot.waitUntil(lambda: not panel._follow.isActive(), timeout=5000)
        pictures.append(panel.strip.pictures[0][1].copy())
    assert (pictures[0] != pictures[1]).any()


def test_slices_about_the_one_on_screen_are_tried(opened, qtbot):
    choose(opened, qtbot, "regularization", "0.001, 0.002")
    panel, scan = opened.panel, opened.session.scan
    grid = scan.default_grid()
    opened.viewer.add_image(np.zeros(grid.shape), scale=grid.scale, translate=grid.translate, units=("mm",) * 3)
    panel.where.setCurrentIndex(panel.where.findData("slices"))
    panel.slices.setValue(4)
    panel.binning.setValue(1)
    opened.viewer.dims.set_point(0, grid.translate[0] + 6 * grid.scale[0])
    settle(qtbot, opened.dock)
    qtbot.waitUntil(lambda: "slices 4 to 7" in panel.about.text(), timeout=5000)
    job = swept(opened, qtbot)
    assert job.slices == (4, 8)
    made_by = reconstruction_of(told_by(opened.viewer.layers[-1]))
    assert (made_by.slices, made_by.shape) == ((4, 8), grid.shape)
    assert opened.viewer.layers[-1].data.shape == (4, *grid.shape[1:])
    np.testing.assert_allclose(opened.viewer.layers[-1].translate[0], grid.translate[0] + 4 * grid.scale[0])


def test_a_layer_is_handed_over_to_be_compared_with(opened, qtbot):
    choose(opened, qtbot, "regularization", "0.001, 0.002")
    grid = opened.session.scan.default_grid()
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    opened.viewer.add_image(values, name="dense", scale=grid.scale, translate=grid.translate, units=("mm",) * 3)
    opened.panel.reference.setCurrentIndex(opened.panel.reference.findText("dense"))
    job = swept(opened, qtbot)
    np.testing.assert_array_equal(opened.worker.reference, values)
    assert not job.reference.exists()  # the file goes with the job
    opened.dock.padmm.editors["start"].put("layer: dense")
    opened.dock.method.setCurrentIndex(opened.dock.method.findData("padmm"))
    qtbot.waitUntil(lambda: "another start" in opened.panel.about.text(), timeout=5000)
    assert not opened.panel.run.isEnabled()


def test_finish_keeps_what_is_done_and_cancel_the_last_sweep(opened, qtbot):
    choose(opened, qtbot, "regularization", "0.001, 0.002")
    ended = press(opened, qtbot)
    qtbot.waitUntil(lambda: opened.session.sweep is not None and bool(opened.session.sweep.layers), timeout=10_000)
    qtbot.mouseClick(opened.dock.finish, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(ended), timeout=10_000)
    assert len(opened.panel.strip.pictures) == 1
    assert opened.session.stage == "finished early"
    first = opened.session.sweep
    settle(qtbot, opened.dock)
    ended = press(opened, qtbot)
    qtbot.waitUntil(lambda: opened.session.sweep is not first and bool(opened.session.sweep.layers), timeout=10_000)
    qtbot.mouseClick(opened.dock.cancel, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(ended), timeout=10_000)
    assert opened.session.sweep is first
    assert len(opened.panel.strip.pictures) == 1


# -- what is left of it --------------------------------------------------------------------------------------------


def test_the_results_tell_how_they_were_made_and_outlive_the_dock_and_the_next_run(opened, qtbot):
    choose(opened, qtbot, "regularization", "0.0005, 0.001, 0.002")
    swept(opened, qtbot)
    layer = opened.viewer.layers["TV, regularisation 0.002"]
    told = told_by(layer)
    assert told["figures"]["psnr"] == 29.0
    assert reconstruction_of(told["provenance"]) == reconstruction_of(told)  # what is exported tells the same
    opened.viewer.layers.selection.active = layer
    opened.dock.result.refresh()
    opened.dock.result.settings.trigger()
    assert opened.dock.job().parameters.regularization == 0.002
    ended = []
    opened.session.finished.connect(ended.append)
    settle(qtbot, opened.dock)
    qtbot.mouseClick(opened.dock.run, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    assert len(opened.panel.strip.pictures) == 3
    opened.viewer.layers.remove(layer)
    opened.panel.show_results()
    assert len(opened.panel.strip.pictures) == 2
    opened.viewer.window.remove_dock_widget(opened.dock)
    _, dock = opened.viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.sweep_section.expand(animate=False)
    settle(qtbot, dock)
    assert len(dock.sweep.strip.pictures) == 2
