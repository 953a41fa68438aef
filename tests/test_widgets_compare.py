"""The Compare dock, opened through the manifest and pressed with a mouse; drawing is napari's."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import QPoint, Qt
from qtpy.QtWidgets import QApplication, QFileDialog
from scipy.ndimage import gaussian_filter

from napari_recon.measures.comparison import compare_volumes, field_of_view
from napari_recon.measures.resolution import fourier_shell_correlation
from napari_recon.scans.grid import Grid
from napari_recon.widgets import compare_dock as dock_module
from napari_recon.widgets import layers as shown
from napari_recon.widgets import session as session_module
from napari_recon.widgets.compare_display import Curtain, Difference, best_cells
from napari_recon.widgets.compare_plots import around

N, VOXEL = 20, 0.5
GRID = Grid((N, N, N), VOXEL)


def ball(noise=0.0, seed=0):
    z, y, x = np.indices((N,) * 3) - (N - 1) / 2
    truth = 0.03 * (np.sqrt(z**2 + y**2 + x**2) < N / 3)
    return (truth + noise * np.random.default_rng(seed).standard_normal(truth.shape)).astype(np.float32)


def add(viewer, name, array, grid=GRID):
    layer = shown.volume_layer(name, array, grid.scale, grid.translate, {"shows": "volume"})
    layer.contrast_limits = (0.0, 0.02)
    return viewer.add_layer(layer)


@pytest.fixture
def opened(make_napari_viewer, pretend, said, monkeypatch, qtbot):
    """A viewer with three volumes, one of them the truth, and the dock."""
    for name in ("show_warning", "show_info"):
        monkeypatch.setattr(dock_module, name, lambda text, s=name: said.append((s.removeprefix("show_"), text)))
    viewer = make_napari_viewer(strict_qt=True)
    add(viewer, "Truth", ball())
    add(viewer, "FDK", ball(0.006, 1)).colormap = "gray"
    add(viewer, "TV", ball(0.002, 2))
    viewer.dims.ndisplay = 3
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
    return SimpleNamespace(viewer=viewer, dock=dock, said=said)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def compare(qtbot, opened):
    press(qtbot, opened.dock.compare)
    measured(qtbot, opened.dock)
    return opened.dock.comparison


def measured(qtbot, dock):
    """Until all volumes have their rows; while they are measured the status ends in an ellipsis."""
    qtbot.waitUntil(lambda: bool(dock.rows) and "…" not in dock.status.text(), timeout=60_000)


def cell_texts(dock):
    table = dock.table
    return [[table.item(i, j).text() for j in range(table.columnCount())] for i in range(table.rowCount())]


def names_shown(viewer):
    return [layer.name for layer in viewer.layers if layer.visible]


def test_one_click_shows_a_linked_grid_with_names_and_figures(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    assert [layer.name for layer in dock.chosen] == ["Truth", "FDK", "TV"]
    assert dock.reference.currentText() == "Truth"  # by its name, until another is chosen
    comparison = compare(qtbot, opened)
    assert viewer.canvas.grid.enabled
    assert viewer.dims.ndisplay == 2
    assert names_shown(viewer) == ["FDK", "TV", "Truth"]  # the order of the grid, the reference last
    fdk, tv, truth = (viewer.layers[name] for name in ("FDK", "TV", "Truth"))
    assert tuple(fdk.contrast_limits) == tuple(tv.contrast_limits) == tuple(truth.contrast_limits)
    fdk.contrast_limits, fdk.gamma, fdk.colormap = (0.001, 0.01), 0.7, "viridis"
    for other in (tv, truth):
        assert tuple(other.contrast_limits) == (0.001, 0.01)
        assert other.gamma == 0.7
        assert other.colormap.name == "viridis"
    assert shown.caption(truth) == "reference"
    wanted = compare_volumes(tv.data, truth.data, field_of_view(GRID))
    assert shown.caption(tv) == f"{wanted['psnr']:.1f} dB, SSIM {wanted['ssim']:.3f}"
    assert comparison.resampled == []


def test_the_table_holds_the_measures_of_the_field_of_view(opened, qtbot):
    dock = opened.dock
    compare(qtbot, opened)
    truth = opened.viewer.layers["Truth"].data
    for line in cell_texts(dock)[:2]:
        wanted = compare_volumes(opened.viewer.layers[line[0]].data, truth, field_of_view(GRID))
        assert line[1:] == [f"{wanted['psnr']:.2f}", f"{wanted['ssim']:.4f}", f"{wanted['nrmse']:.3g}"]
    assert dock.table.item(1, 1).font().bold()  # the better one
    assert not dock.table.item(0, 1).font().bold()
    assert "field of view" in dock.status.text()
    press(qtbot, dock.copy)
    lines = QApplication.clipboard().text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["Volume", "FDK", "TV", "Truth"]


def test_another_data_range_is_taken_and_said(opened, qtbot):
    dock = opened.dock
    compare(qtbot, opened)
    before = dock.rows[0]["psnr"]
    dock.data_range.setFocus()
    qtbot.keyClicks(dock.data_range, "0.3")
    qtbot.keyClick(dock.data_range, Qt.Key.Key_Return)
    measured(qtbot, dock)
    assert dock.rows[0]["psnr"] == pytest.approx(before + 20, abs=0.5)  # ten times the range of 0.03
    assert "0.3, as you gave it" in dock.status.text()


def test_back_gives_everything_back_as_it_was(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    viewer.layers["TV"].visible = False
    looks = {x.name: (tuple(x.contrast_limits), x.gamma, x.colormap.name) for x in viewer.layers}
    camera = viewer.scene.camera
    camera.zoom, camera.angles = 12.5, (10.0, 20.0, 30.0)
    dock.differences.setChecked(True)
    compare(qtbot, opened)
    assert "FDK − Truth" in viewer.layers
    viewer.layers["FDK"].gamma = 0.5
    press(qtbot, dock.back)
    assert [layer.name for layer in viewer.layers] == ["Truth", "FDK", "TV"]
    assert names_shown(viewer) == ["Truth", "FDK"]
    assert {x.name: (tuple(x.contrast_limits), x.gamma, x.colormap.name) for x in viewer.layers} == looks
    assert not viewer.canvas.grid.enabled
    assert viewer.dims.ndisplay == 3
    assert camera.zoom == 12.5
    assert all(shown.caption(layer) == "" for layer in viewer.layers)
    viewer.layers["FDK"].gamma = 0.9
    assert viewer.layers["Truth"].gamma == 1.0  # no longer linked
    assert not dock.back.isEnabled()


def test_differences_stand_beneath_their_volumes_in_colours_about_zero(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    press(qtbot, dock.differences)
    rows, columns = viewer.canvas.grid.actual_shape(viewer.layers)
    assert (rows, columns) == (2, 3)
    places = {x.name: viewer.canvas.grid.position(i, viewer.layers) for i, x in enumerate(viewer.layers)}
    assert places["FDK − Truth"] == (1, places["FDK"][1])
    assert places["TV − Truth"] == (1, places["TV"][1])
    difference = viewer.layers["FDK − Truth"]
    low, high = difference.contrast_limits
    assert low == -high < 0
    assert tuple(viewer.layers["TV − Truth"].contrast_limits) == (low, high)
    np.testing.assert_array_equal(np.asarray(difference.data), viewer.layers["FDK"].data - viewer.layers["Truth"].data)
    press(qtbot, dock.differences)
    assert names_shown(viewer) == ["FDK", "TV", "Truth"]
    assert len(viewer.layers) == 3


def test_volumes_on_other_grids_are_resampled_and_that_is_said(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    coarse = Grid((N // 2,) * 3, 2 * VOXEL)
    add(viewer, "Coarse", ball()[::2, ::2, ::2].copy(), coarse)
    comparison = compare(qtbot, opened)
    assert comparison.resampled == ["Coarse"]
    assert "Coarse was resampled onto the grid of Truth" in dock.status.text()
    row = next(row for row in dock.rows if row["volume"] == "Coarse")
    assert row["psnr"] > 10
    assert viewer.layers["Coarse"].data.shape == coarse.shape  # the layer itself stays


def test_a_volume_without_unit_and_of_the_same_shape_is_laid_onto_the_others(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    plain = viewer.add_image(ball(0.001), name="Plain")
    comparison = compare(qtbot, opened)
    assert comparison.resampled == []
    np.testing.assert_allclose(plain.translate, GRID.translate)
    press(qtbot, dock.back)
    np.testing.assert_allclose(plain.translate, 0.0)
    np.testing.assert_allclose(plain.scale, 1.0)


def test_without_a_reference_volumes_still_stand_side_by_side(opened, qtbot):
    dock = opened.dock
    dock.reference.setCurrentIndex(0)
    comparison = compare(qtbot, opened)
    assert comparison.reference is None
    assert not dock.differences.isEnabled()
    assert "Without a reference" in dock.status.text()
    assert [row["volume"] for row in dock.rows] == ["Truth", "FDK", "TV"]


def test_labels_are_regions(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    marked = np.zeros((N,) * 3, np.int32)
    marked[8:12, 8:12, 8:12] = 1
    marked[8:12, 1:4, 8:12] = 2
    viewer.add_labels(marked, name="Where", scale=GRID.scale, translate=GRID.translate)
    dock.region.setCurrentText("Where")
    compare(qtbot, opened)
    assert {row["region"] for row in dock.rows} == {"label 1", "label 2"}
    inside = compare_volumes(viewer.layers["TV"].data, viewer.layers["Truth"].data, marked == 1, data_range=1.0)
    row = next(row for row in dock.rows if (row["volume"], row["region"]) == ("TV", "label 1"))
    assert row["nrmse"] == pytest.approx(inside["nrmse"])


def test_a_box_drawn_on_a_slice_reaches_through_the_volume(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    low, high = -2.0, 2.0
    corners = np.array([(0.0, low, low), (0.0, low, high), (0.0, high, high), (0.0, high, low)])
    viewer.add_shapes([corners], shape_type="rectangle", name="Box")
    dock.region.setCurrentText("Box")
    compare(qtbot, opened)
    box = np.zeros((1, N, N), bool)
    along = np.abs((np.arange(N) - (N - 1) / 2) * VOXEL) <= 2.0
    box[0] = along[:, None] & along
    wanted = compare_volumes(viewer.layers["TV"].data, viewer.layers["Truth"].data, box, data_range=1.0)
    row = next(row for row in dock.rows if row["volume"] == "TV")
    assert row["nrmse"] == pytest.approx(wanted["nrmse"])


def test_files_become_layers_that_are_ticked(opened, monkeypatch, qtbot, tmp_path):
    from napari_recon.jobs.volumes import write_volume

    write_volume(tmp_path / "other.tif", ball(0.004), GRID)
    files = [str(tmp_path / "other.tif"), str(tmp_path / "missing.tif")]
    monkeypatch.setattr(QFileDialog, "getOpenFileNames", lambda *_: (files, ""))
    press(qtbot, opened.dock.add)
    qtbot.waitUntil(lambda: "other" in opened.viewer.layers, timeout=5000)
    qtbot.waitUntil(lambda: bool(opened.said), timeout=5000)
    assert "missing.tif" in opened.said[0][1]
    assert "other" in [layer.name for layer in opened.dock.chosen]
    np.testing.assert_allclose(opened.viewer.layers["other"].translate, GRID.translate)


def test_the_table_is_written_as_csv_and_as_a_figure(opened, monkeypatch, qtbot, tmp_path):
    dock = opened.dock
    compare(qtbot, opened)
    for name, button in (("table.csv", dock.csv), ("figure.png", dock.figure)):
        monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_, name=name: (str(tmp_path / name), ""))
        press(qtbot, button)
        qtbot.waitUntil(lambda name=name: (tmp_path / name).is_file(), timeout=20_000)
    text = (tmp_path / "table.csv").read_text()
    assert all(name in text for name in ("FDK", "TV", "Truth"))


def drag(qtbot, viewer, start, end):
    """Drag the mouse over the canvas from one place in the world to another, of the first cell."""
    canvas = viewer.window._qt_viewer.canvas
    native = canvas.native
    view = canvas.grid_views[0] if viewer.canvas.grid.enabled else canvas.view
    transform = view.scene.node_transform(canvas._scene_canvas.scene)

    def pixel(place):
        x, y = transform.map([place[-1], place[-2], 0, 1])[:2]
        return QPoint(round(float(x)), round(float(y)))

    qtbot.mousePress(native, Qt.MouseButton.LeftButton, pos=pixel(start))
    for share in (0.5, 1.0):
        place = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
        qtbot.mouseMove(native, pos=pixel(place))
        qtbot.wait(20)
    qtbot.mouseRelease(native, Qt.MouseButton.LeftButton, pos=pixel(end))


def test_a_line_drawn_on_a_slice_shows_all_profiles(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    viewer.show()
    comparison = compare(qtbot, opened)
    dock.profile_section.expand(animate=False)
    qtbot.waitUntil(lambda: dock.draw.height() > 10, timeout=5000)
    centre = viewer.scene.camera.center
    press(qtbot, dock.draw)
    qtbot.wait(200)
    drag(qtbot, viewer, (0.0, 0.0, -4.5), (0.0, 0.0, 4.5))
    assert viewer.scene.camera.center == centre  # the line was drawn, the camera stayed
    start, end = comparison.line
    np.testing.assert_allclose(start[1:], (0.0, -4.5), atol=0.1)
    np.testing.assert_allclose(end[1:], (0.0, 4.5), atol=0.1)
    qtbot.waitUntil(lambda: len(dock.profile.lines) == 3, timeout=5000)
    assert [line.label.split(",")[0] for line in dock.profile.lines] == ["FDK", "TV", "Truth"]
    qtbot.waitUntil(lambda: "mm" in dock.profile.lines[2].label, timeout=5000)  # the ball has an edge
    outlines = comparison._outlines
    assert all(outlines[layer].visible for layer in comparison.layers)
    viewer.dims.set_point(0, GRID.translate[0])  # at the ball's pole there is nothing, and no edge
    qtbot.waitUntil(lambda: "no edge" in dock.profile.lines[2].label, timeout=5000)
    press(qtbot, dock.clear)
    qtbot.waitUntil(lambda: dock.profile.lines == [], timeout=5000)


def test_the_curtain_shows_one_volume_on_either_side_and_follows_the_mouse(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    viewer.show()
    comparison = compare(qtbot, opened)
    press(qtbot, dock.curtain)
    assert names_shown(viewer) == ["FDK | Truth"]
    layer = comparison.curtain
    fdk, truth = viewer.layers["FDK"].data, viewer.layers["Truth"].data
    np.testing.assert_array_equal(np.asarray(layer.data)[:, :, : N // 2], fdk[:, :, : N // 2])
    np.testing.assert_array_equal(np.asarray(layer.data)[:, :, N // 2 :], truth[:, :, N // 2 :])
    dock.curtain_place.setValue(250)
    plane = layer._slice.image.view
    z = round(layer.world_to_data(viewer.dims.point)[0])
    np.testing.assert_array_equal(plane[:, :5], fdk[z, :, :5])
    np.testing.assert_array_equal(plane[:, 5:], truth[z, :, 5:])
    qtbot.wait(200)
    edge = GRID.translate[2] + 4.5 * VOXEL
    drag(qtbot, viewer, (0.0, 0.0, edge), (0.0, 0.0, edge + 5 * VOXEL))
    assert layer.data.place == 10
    assert dock.curtain_place.value() == 500
    press(qtbot, dock.curtain)
    assert names_shown(viewer) == ["FDK", "TV", "Truth"]


def test_slices_across_other_axes_in_all_volumes(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    viewer.dims.set_point(range(3), (1.25, -0.75, 0.25))
    press(qtbot, dock.axes[2])
    assert viewer.dims.displayed == (0, 1)
    np.testing.assert_allclose(viewer.dims.point, (1.25, -0.75, 0.25))
    press(qtbot, dock.back)
    assert viewer.dims.order == (0, 1, 2)


def test_the_histogram_counts_all_volumes_where_it_is_seen(opened, qtbot):
    dock = opened.dock
    compare(qtbot, opened)
    assert dock.histogram.lines == []
    dock.histogram_section.expand(animate=False)
    qtbot.waitUntil(lambda: len(dock.histogram.lines) == 3, timeout=5000)
    inside = field_of_view(GRID).sum() * N
    assert all(np.nansum(line.y) == inside for line in dock.histogram.lines)


def test_what_is_deleted_is_compared_no_more(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    compare(qtbot, opened)
    press(qtbot, dock.differences)
    viewer.layers.remove("TV")
    qtbot.waitUntil(lambda: "TV − Truth" not in viewer.layers, timeout=2000)
    assert [row["volume"] for row in dock.rows] == ["FDK", "Truth"]
    viewer.layers.remove("Truth")  # nothing is left to compare with
    qtbot.waitUntil(lambda: dock.comparison is None, timeout=2000)
    assert names_shown(viewer) == ["FDK"]
    assert not dock.compare.isEnabled()


def test_the_comparison_outlives_its_dock(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    comparison = compare(qtbot, opened)
    viewer.window.remove_dock_widget(dock)
    dock.deleteLater()
    qtbot.wait(50)
    _, again = viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
    assert again.comparison is comparison
    press(qtbot, again.back)
    assert comparison.left


def test_a_job_that_starts_ends_the_comparison(opened, qtbot):
    from napari_recon.jobs.job import ReconstructionJob

    viewer, dock = opened.viewer, opened.dock
    viewer.layers["TV"].visible = False
    comparison = compare(qtbot, opened)
    dock.session.run(ReconstructionJob(scan="ball.h5"))
    assert comparison.left
    assert not viewer.canvas.grid.enabled
    assert names_shown(viewer) == ["Truth", "FDK"]  # what Cancel is to bring back
    dock.session.cancel()
    qtbot.waitUntil(lambda: dock.session.state == "idle", timeout=20_000)


def test_fewer_than_two_and_more_than_six_are_refused(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    for i in range(5):
        add(viewer, f"More {i}", ball(0.001, i))
    assert len(dock.chosen) == 6
    assert dock.compare.isEnabled()
    dock.volumes.item(7).setCheckState(Qt.CheckState.Checked)
    assert not dock.compare.isEnabled()
    for i in range(1, 8):
        dock.volumes.item(i).setCheckState(Qt.CheckState.Unchecked)
    assert not dock.compare.isEnabled()


def test_what_is_magnified_has_the_layers_colours_and_ends_with_the_volume():
    array = np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    layer = shown.volume_layer("volume", array, (1.0,) * 3, (0.0,) * 3, {"shows": "volume"})
    layer.colormap, layer.contrast_limits = "gray", (0.0, 335.0)
    square = around(array, layer, (2, 0, 4), (1, 2), half=2)
    assert square.shape == (5, 5, 4)
    assert not square[:2].any()  # above the first row there is nothing
    np.testing.assert_allclose(square[2:, :, 0], 255 * array[2, 0:3, 2:7] / 335, atol=1)
    turned = around(array, layer, (2, 0, 4), (2, 1), half=2)
    np.testing.assert_array_equal(turned, square.swapaxes(0, 1))
    assert around(array, layer, (6, 0, 0), (1, 2)) is None


def test_cells_are_as_large_as_the_canvas_allows():
    assert best_cells(2, 1, 1, (500, 1000)) == (1, 2)
    assert best_cells(4, 1, 1, (800, 800)) == (2, 2)
    assert best_cells(6, 1, 1, (600, 900)) == (2, 3)
    rows, columns = best_cells(6, 1, 1, (900, 700), bands=True)
    assert rows % 2 == 0
    assert 6 % columns == 0


# -- frequencies, units, residuals ---------------------------------------------------------------------------------


def test_frequencies_of_all_volumes_are_told_against_the_reference_where_they_are_seen(opened, qtbot):
    dock = opened.dock
    opened.viewer.layers["FDK"].data = ball(0.02, 1)
    compare(qtbot, opened)
    assert dock.frequencies.correlations.lines == []
    dock.frequencies_section.expand(animate=False)
    plots = dock.frequencies
    qtbot.waitUntil(lambda: "Correlated with Truth" in plots.said.text(), timeout=10_000)
    *curves, threshold = plots.correlations.lines
    assert [line.label.split(":")[0] for line in curves] == ["FDK", "TV"]
    assert set(threshold.y) == {0.5}
    assert curves[1].y[3:].mean() > curves[0].y[3:].mean()  # there is less noise in it
    found = fourier_shell_correlation(ball(0.02, 1), ball(), VOXEL, field_of_view(GRID))
    np.testing.assert_allclose(curves[0].y, found.correlation)
    assert f"{found.resolution(0.5):.3g} mm" in curves[0].label
    fdk, tv = plots.noise.lines  # what differs from the truth is noise of ten times the deviation
    assert np.median(fdk.y / tv.y) == pytest.approx(100, rel=0.5)


def test_two_volumes_without_a_reference_are_halves_with_their_thresholds(opened, qtbot):
    dock = opened.dock
    dock.reference.setCurrentIndex(0)
    dock.volumes.item(0).setCheckState(Qt.CheckState.Unchecked)
    dock.frequencies_section.expand(animate=False)
    compare(qtbot, opened)
    qtbot.waitUntil(lambda: "halves of the views" in dock.frequencies.said.text(), timeout=10_000)
    labels = [line.label for line in dock.frequencies.correlations.lines if line.label]
    assert labels[0] == "halves of the views"
    assert labels[1].startswith("half-bit: ")
    assert labels[2].startswith("1/7: ")
    assert len(dock.frequencies.noise.lines) == 1
    dock.volumes.item(0).setCheckState(Qt.CheckState.Checked)
    dock.reference.setCurrentIndex(0)
    compare(qtbot, opened)
    qtbot.waitUntil(lambda: "need a reference" in dock.frequencies.said.text(), timeout=10_000)
    assert dock.frequencies.correlations.lines == []
    assert len(dock.frequencies.noise.lines) == 3


def test_a_volume_of_another_unit_is_measured_and_shown_in_that_of_the_reference(opened, qtbot):
    viewer, dock = opened.viewer, opened.dock
    grey = add(viewer, "Grey", 2000 * ball(0.002, 2) - 500)
    dock.fit_scale.click()
    dock.differences.setChecked(True)
    comparison = compare(qtbot, opened)
    tv, other = (next(row for row in dock.rows if row["volume"] == name) for name in ("TV", "Grey"))
    assert other["psnr"] == pytest.approx(tv["psnr"], abs=1e-3)
    assert "Grey × 0.000" in dock.status.text()
    assert np.abs(np.asarray(viewer.layers["Grey − Truth"].data)).max() < 0.02
    assert grey.data.min() < -400  # the layer itself stays
    scale, offset = comparison.fits[grey]
    for limits in ((0.0, 0.02), (0.005, 0.01)):
        viewer.layers["TV"].contrast_limits = limits
        at = [scale * limit + offset for limit in grey.contrast_limits]
        truth = viewer.layers["Truth"].contrast_limits
        np.testing.assert_allclose(at, truth, rtol=1e-3, atol=1e-6)
    grey.contrast_limits = [(limit - offset) / scale for limit in (0.0, 0.03)]
    np.testing.assert_allclose(viewer.layers["Truth"].contrast_limits, (0.0, 0.03), rtol=1e-3, atol=1e-6)
    dock.fit_scale.click()  # compares again, without
    measured(qtbot, dock)
    assert next(row for row in dock.rows if row["volume"] == "Grey")["psnr"] < 0
    press(qtbot, dock.back)
    assert tuple(grey.contrast_limits) == (0.0, 0.02)


def test_a_resolution_is_shown_with_its_thresholds_until_the_next_run(make_napari_viewer, pretend, said, qtbot):
    from napari_recon.jobs.job import ReconstructionJob, ResolutionJob
    from napari_recon.jobs.messages import Finished

    rng = np.random.default_rng(0)
    common = gaussian_filter(rng.normal(size=(32,) * 3), 1.5)
    halves = [(common + rng.normal(0, 0.05, common.shape)).astype(np.float32) for _ in range(2)]
    found = fourier_shell_correlation(*halves, VOXEL)
    told = {"sentence": found.sentence}
    told |= {name: getattr(found, name).tolist() for name in ("frequency", "correlation", "half_bit", "one_seventh")}
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    plot, session = dock.resolved, dock.session
    assert not plot.isVisibleTo(dock)
    session.job = ResolutionJob(scan="ball.h5")
    session.finished.emit(Finished({}, 1.0, 1, None, True, {"resolution": told}))
    assert plot.isVisibleTo(dock)
    labels = [line.label for line in plot.plot.lines if line.label]
    assert labels[1:] == [
        f"half-bit: {found.resolution_half_bit:.3g} mm",
        f"1/7: {found.resolution_one_seventh:.3g} mm",
    ]
    marks = [line.x[0] for line in plot.plot.lines if not line.label]
    assert marks == pytest.approx([1 / found.resolution_half_bit, 1 / found.resolution_one_seventh])
    session.run(ReconstructionJob(scan="ball.h5"))
    assert not plot.isVisibleTo(dock)
    session.cancel()
    qtbot.waitUntil(lambda: session.state == "idle", timeout=20_000)


class Projecting(PretendWorker):
    """Says what a volume leaves of a scan: a part that is its largest value."""

    def tell(self, job):
        from napari_recon.jobs.messages import Finished, VolumeReady
        from napari_recon.jobs.volumes import read_volume

        self.volumes["measured"] = np.zeros((4, 5, 6), np.float32)
        yield VolumeReady("measured", (4, 5, 6), (1.0,) * 3, (0.0,) * 3, axis_labels=("view", "row", "column"))
        figures = {"residual": float(read_volume(job.volume).data.max()), "residual_to_noise": 1.5, "noise": 0.1}
        yield Finished(figures, 1.0, 10**9, None, True, {})


def test_residuals_of_all_volumes_come_into_the_table_and_the_comparison_stays(opened, memory_scan, monkeypatch, qtbot):
    viewer, dock = opened.viewer, opened.dock
    comparison = compare(qtbot, opened)
    press(qtbot, dock.residuals)
    assert "no scan" in opened.said[-1][1]
    dock.session.worker = Projecting()
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    dock.session.open("ball.h5")
    qtbot.waitUntil(lambda: dock.session.scan is not None, timeout=10_000)
    before = names_shown(viewer)
    press(qtbot, dock.residuals)
    qtbot.waitUntil(lambda: sum("residual" in row for row in dock.rows) == 3, timeout=20_000)
    qtbot.waitUntil(lambda: "…" not in dock.status.text(), timeout=5000)
    for row in dock.rows:
        assert row["residual"] == pytest.approx(viewer.layers[row["volume"]].data.max(), rel=1e-5)
    assert dock.table.horizontalHeaderItem(dock.table.columnCount() - 1).text() == "Residual"
    assert [job.shape for job in dock.session.worker.jobs] == [(N,) * 3] * 3
    assert dock.comparison is comparison
    assert names_shown(viewer) == before


def test_one_press_compares_what_a_run_showed_with_the_truth(
    make_napari_viewer, pretend, memory_scan, monkeypatch, qtbot, said, tmp_path
):
    from dataclasses import replace

    from napari_recon.jobs.job import ReconstructionJob
    from napari_recon.jobs.volumes import write_volume

    n = 16  # what the worker that pretends makes
    write_volume(tmp_path / "truth.tif", ball()[:n, :n, :n].copy(), Grid((n,) * 3, 0.5))
    scan = replace(memory_scan, recording=replace(memory_scan.recording, truth=tmp_path / "truth.tif"))
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: scan)
    viewer = make_napari_viewer(strict_qt=True)
    _, reconstruct = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    session, ended = reconstruct.session, []
    session.finished.connect(ended.append)
    session.open("ball.h5")
    qtbot.waitUntil(lambda: session.scan is not None, timeout=10_000)
    session.run(ReconstructionJob(scan="ball.h5"))
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    add(viewer, "Another", ball())
    press(qtbot, reconstruct.compare)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
    measured(qtbot, dock)
    names = [layer.name for layer in dock.comparison.layers]
    assert names == ["FDK", "Partitioned TV", "Truth"]
    assert dock.comparison.reference is viewer.layers["Truth"]
    assert {"FDK − Truth", "Partitioned TV − Truth"} <= set(names_shown(viewer))
    press(qtbot, dock.back)
    press(qtbot, reconstruct.compare)  # again, with the truth that is there by now
    measured(qtbot, dock)
    assert [layer.name for layer in viewer.layers].count("Truth") == 1


def test_the_demo_goes_on_to_its_comparison(make_napari_viewer, pretend, said, qtbot, tmp_path):
    from napari_recon.learning.simulate import simulate
    from napari_recon.widgets.demo import Demo

    folder = simulate("shepp-logan", tmp_path / "scan", size=16, views=12)
    viewer = make_napari_viewer(strict_qt=True)
    demo = Demo(viewer, compare=True)
    demo.session.open(folder)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Compare")
    measured(qtbot, dock)
    assert [layer.name for layer in dock.comparison.layers] == ["FDK", "Unrolled network", "Truth"]
    assert {"FDK − Truth", "Unrolled network − Truth"} <= set(names_shown(viewer))
    assert [row["volume"] for row in dock.rows if "psnr" in row] == ["FDK", "Unrolled network"]
    assert demo.status == 0


# -- what is computed where it is looked at ------------------------------------------------------------------------


@pytest.mark.parametrize("key", [np.s_[3], np.s_[3, :, :], np.s_[:, 4, :], np.s_[:, :, 5], np.s_[2, 3, 4], np.s_[::2]])
def test_derived_volumes_are_computed_where_they_are_looked_at(key):
    first, second = np.random.default_rng(0).random((2, 6, 7, 8), np.float32)
    np.testing.assert_array_equal(Difference(first, second)[key], (first - second)[key])
    for axis in range(3):
        curtain = Curtain(first, second, axis)
        curtain.place = 2
        whole = second.copy()
        before = [slice(None)] * 3
        before[axis] = slice(0, 2)
        whole[tuple(before)] = first[tuple(before)]
        np.testing.assert_array_equal(curtain[key], whole[key])
