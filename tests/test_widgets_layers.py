"""Layers: what is shown is what was computed, box by box."""

import numpy as np
import pytest
from napari.layers import Image

from napari_recon.widgets import layers as shown
from napari_recon.widgets.layers import LiveVolume, PatchOutline, contrast_limits, merge_boxes, where_the_person_looks


def a_volume(n=32):
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij")
    return np.ascontiguousarray(0.02 * (z**2 + y**2 + x**2 < 0.6), dtype=np.float32)


def add(viewer, array, name="volume"):
    layer = shown.volume_layer(name, array, (0.5,) * 3, (-1.0, 2.0, 3.0), {})
    layer.contrast_limits = (0.0, 0.03)
    return viewer.add_layer(layer)


BOX = (slice(4, 12), slice(16, 24), slice(8, 30))


@pytest.mark.parametrize("ndisplay", [2, 3])
def test_a_box_uploaded_looks_like_the_whole_uploaded(make_napari_viewer, qtbot, ndisplay):
    viewer = make_napari_viewer(show=True)
    array = a_volume()
    layer = add(viewer, array)
    viewer.dims.ndisplay = ndisplay
    viewer.dims.point = layer.data_to_world((8, 16, 16))
    before = viewer.screenshot(flash=False)
    live = LiveVolume(viewer, layer)
    array[BOX] = 0.03
    live.changed(BOX)
    assert live.flush(force=True)
    uploaded = viewer.screenshot(flash=False)
    layer.refresh()
    np.testing.assert_array_equal(uploaded, viewer.screenshot(flash=False))
    assert (uploaded != before).any()
    live.close()


def test_only_the_box_crosses_into_the_texture(make_napari_viewer, qtbot, monkeypatch):
    viewer = make_napari_viewer(show=True)
    array = a_volume()
    layer = add(viewer, array)
    viewer.dims.ndisplay = 3
    texture = viewer.window._qt_viewer.canvas.layer_to_visual[layer].node._texture
    sent = []

    def note(self, data, offset=None, copy=False):
        sent.append((data.shape, offset))

    monkeypatch.setattr(type(texture), "scale_and_set_data", note)
    live = LiveVolume(viewer, layer)
    live.changed(BOX)
    live.flush(force=True)
    assert sent == [((8, 8, 22), (4, 16, 8))]
    live.close()


def test_where_napari_is_another_the_whole_layer_is_uploaded(make_napari_viewer, qtbot, monkeypatch):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    viewer.dims.ndisplay = 3
    refreshed = []
    monkeypatch.setattr(Image, "refresh", lambda self, **kwargs: refreshed.append(kwargs))
    visual = viewer.window._qt_viewer.canvas.layer_to_visual[layer]
    monkeypatch.setattr(visual.node, "_vol_shape", (16, 16, 16))  # as after napari downsampled a large volume
    assert shown.upload_boxes(viewer, layer, [BOX])
    assert refreshed == [{"thumbnail": False, "extent": False, "highlight": False}]


def test_in_2d_only_a_touched_slice_is_refreshed(make_napari_viewer, qtbot, monkeypatch):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    refreshed = []
    live = LiveVolume(viewer, layer)
    for z, times in ((3, 0), (4, 1), (11, 1), (12, 0)):
        viewer.dims.point = layer.data_to_world((z, 0, 0))
        monkeypatch.setattr(Image, "refresh", lambda self, **kwargs: refreshed.append(kwargs))
        live.changed(BOX)
        live.flush(force=True)
        assert len(refreshed) == times, z
        refreshed.clear()
        monkeypatch.undo()
    live.close()


def test_nothing_is_uploaded_before_the_last_was_drawn(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()  # not shown: nothing is ever drawn
    layer = add(viewer, a_volume())
    viewer.dims.ndisplay = 3
    live = LiveVolume(viewer, layer)
    live._drawn = True
    live.changed(BOX)
    assert live.flush()
    for _ in range(50):
        live.changed(BOX)
        assert not live.flush()
    assert live.pending == [BOX]  # merged, not piled up
    live.close()


def test_a_hidden_layer_costs_nothing(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    layer.visible = False
    live = LiveVolume(viewer, layer)
    live.changed(BOX)
    assert not live.flush(force=True)
    assert live.pending == []
    live.close()


def test_merged_boxes_cover_what_the_boxes_cover():
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = []
        for _ in range(rng.integers(1, 12)):
            start = rng.integers(0, 20, 3)
            stop = start + rng.integers(1, 10, 3)
            boxes.append(tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)))
        merged = merge_boxes(boxes)
        want, have = np.zeros((30,) * 3, bool), np.zeros((30,) * 3, bool)
        for box in boxes:
            want[box] = True
        for box in merged:
            have[box] = True
        assert (have | ~want).all()
        assert sum(want[b].size for b in merged) <= sum(want[b].size for b in boxes)


def test_merging_a_volume_of_patches_gives_the_volume():
    boxes = [(slice(z, z + 8), slice(y, y + 8), slice(x, x + 8)) for z in (0, 8) for y in (0, 8) for x in (0, 8)]
    assert merge_boxes(boxes) == [(slice(0, 16),) * 3]


def test_contrast_limits_ignore_what_lies_outside_the_field_of_view():
    volume = a_volume(64)
    volume[:, :4, :4] = 100.0  # streaks in a corner
    low, high = contrast_limits(volume)
    assert 0 <= low < high
    assert high == pytest.approx(0.02, rel=0.1)
    assert contrast_limits(np.zeros((8, 8, 8), np.float32)) is None
    assert contrast_limits(np.full((8, 8, 8), np.nan, np.float32)) is None
    assert contrast_limits(a_volume(64)[32:33]) is not None


def test_the_outline_is_drawn_in_3d_and_on_its_slices(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    viewer.dims.ndisplay = 3
    outline = PatchOutline(viewer, layer)
    outline.show(BOX)
    assert outline.visible
    assert len(outline._corners()) == 24
    viewer.dims.ndisplay = 2
    viewer.dims.point = layer.data_to_world((8, 0, 0))
    assert outline.visible
    corners = outline._corners()
    assert len(corners) == 8
    np.testing.assert_allclose((corners.min(0), corners.max(0)), ((7.5, 15.5), (29.5, 23.5)))
    viewer.dims.point = layer.data_to_world((20, 0, 0))
    assert not outline.visible
    outline.show(None)
    outline.close()
    node = viewer.window._qt_viewer.canvas.layer_to_visual[layer].node
    assert not [child for child in node.children if type(child).__name__ == "Line"]


def test_the_outline_is_where_the_box_is(make_napari_viewer, qtbot):
    """A box around the only bright voxels has its edges around the bright pixels."""
    viewer = make_napari_viewer(show=True)
    array = np.zeros((32, 32, 32), np.float32)
    array[BOX] = 0.03
    layer = add(viewer, array)
    layer.colormap = "gray"
    layer.name_overlay.visible = False
    viewer.dims.point = layer.data_to_world((8, 0, 0))
    outline = PatchOutline(viewer, layer, color="red")
    plain = viewer.screenshot(flash=False).astype(int)
    outline.show(BOX)
    red = viewer.screenshot(flash=False).astype(int)
    lit = np.argwhere(plain[..., 0] > 200)
    drawn = np.argwhere((red[..., 0] > 150) & (red[..., 1] < 120))
    assert len(drawn)
    assert np.abs(drawn.min(0) - lit.min(0)).max() <= 3
    assert np.abs(drawn.max(0) - lit.max(0)).max() <= 3
    outline.close()


def test_looking_in_the_middle_of_the_view(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    viewer.dims.ndisplay = 3
    viewer.fit_to_view()
    np.testing.assert_allclose(where_the_person_looks(viewer, layer), (15.5,) * 3, atol=0.6)
    viewer.scene.camera.center = (1000.0, 0, 0)
    assert where_the_person_looks(viewer, layer) is None


def test_looking_along_the_ray_under_the_cursor(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    layer = add(viewer, a_volume())
    viewer.dims.ndisplay = 3
    viewer.fit_to_view()
    viewer.scene.camera.angles = (0, 0, 90)
    viewer.mouse_over_canvas = True
    viewer.cursor.position = tuple(layer.data_to_world((10, 20, 12)))
    direction = np.abs(viewer.scene.camera.view_direction)
    point = np.array(where_the_person_looks(viewer, layer))
    along = int(direction.argmax())
    across = [a for a in range(3) if a != along]
    np.testing.assert_allclose(point[across], np.array((10, 20, 12))[across], atol=0.6)
    assert point[along] == pytest.approx(15.5, abs=1.0)  # halfway through
