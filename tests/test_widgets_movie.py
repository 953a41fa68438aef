"""A movie of what is shown; napari-animation, which takes the pictures, is one that only pretends."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtWidgets import QFileDialog

from napari_recon.scans import ScanError
from napari_recon.widgets import layers as shown
from napari_recon.widgets import result_menu
from napari_recon.widgets.movie import write_movie


class PretendAnimation:
    """Notes where the camera and the slice are at each key frame."""

    fail = None

    def __init__(self, viewer):
        self.viewer, self.seen = viewer, []
        type(self).last = self

    def capture_keyframe(self, steps):
        camera = self.viewer.scene.camera
        self.seen.append((camera.view_direction, camera.up_direction, self.viewer.dims.current_step))

    def animate(self, filename, fps, canvas_only):
        with open(filename, "wb") as file:
            file.write(b"a movie")
        if self.fail is not None:
            raise self.fail


@pytest.fixture
def animation(monkeypatch):
    monkeypatch.setitem(sys.modules, "napari_animation", SimpleNamespace(Animation=PretendAnimation))
    return PretendAnimation


@pytest.fixture
def viewer(make_napari_viewer):
    viewer = make_napari_viewer(strict_qt=True)
    array = np.random.default_rng(0).random((6, 7, 8), np.float32)
    viewer.add_layer(shown.volume_layer("volume", array, (0.5,) * 3, (0.0,) * 3, {"shows": "volume"}))
    return viewer


def test_a_volume_turns_once_about_its_axis_and_stands_as_before(viewer, animation, tmp_path):
    viewer.dims.ndisplay = 3
    shown.look_at(viewer, list(viewer.layers))
    camera = viewer.scene.camera
    before = camera.angles, camera.center, camera.zoom
    write_movie(viewer, tmp_path / "turn.mp4")
    views = np.array([view for view, *_ in animation.last.seen])
    np.testing.assert_allclose(views[:, 0], views[0, 0], atol=1e-6)  # as far above the slices all the way
    turned = np.unwrap(np.arctan2(views[:, 1], views[:, 2]))
    assert abs(turned[-1] - turned[0]) == pytest.approx(2 * np.pi)
    assert np.all(np.diff(turned) * np.sign(turned[-1] - turned[0]) > 0)
    assert all(up[0] > 0.5 for _, up, _ in animation.last.seen)  # the axis stays upright
    np.testing.assert_allclose(camera.angles, before[0], atol=1e-4)
    assert (camera.center, camera.zoom) == before[1:]
    assert [path.name for path in tmp_path.iterdir()] == ["turn.mp4"]


def test_in_slices_the_movie_goes_through_all_of_them(viewer, animation, tmp_path):
    viewer.dims.order = (1, 0, 2)
    viewer.dims.set_current_step(1, 3)
    write_movie(viewer, tmp_path / "through.gif")
    assert [steps[1] for *_, steps in animation.last.seen] == list(range(7))
    assert viewer.dims.current_step[1] == 3


def test_what_keeps_a_movie_from_being_made_is_said(viewer, animation, monkeypatch, tmp_path):
    with pytest.raises(ScanError, match=r"\.mp4 or \.gif"):
        write_movie(viewer, tmp_path / "movie.avi")
    with pytest.raises(ScanError, match="folder"):
        write_movie(viewer, tmp_path / "nowhere" / "movie.mp4")
    monkeypatch.setattr(animation, "fail", OSError(28, "No space left on device"))
    with pytest.raises(ScanError, match="No space left"):
        write_movie(viewer, tmp_path / "movie.mp4")
    assert not list(tmp_path.iterdir())
    viewer.layers[0].visible = False
    with pytest.raises(ScanError, match="No volume is shown"):
        write_movie(viewer, tmp_path / "movie.mp4")


def test_the_menu_says_what_to_install(viewer, pretend, said, monkeypatch, tmp_path):
    heard = []
    monkeypatch.setattr(result_menu, "show_error", heard.append)
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "movie"), ""))
    monkeypatch.setitem(sys.modules, "napari_animation", None)  # cannot be imported
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.result.menu().aboutToShow.emit()
    assert dock.result.movie.isEnabled()
    dock.result.movie.trigger()
    assert "pip install napari-animation" in heard[0]
    assert not list(tmp_path.iterdir())
