"""A volume that stays in its file: read where it is looked at, and seen to grow."""

import numpy as np
import pytest

from napari_recon.jobs.messages import Finished, Notice, Progress, Stage
from napari_recon.jobs.volumes import Level, ZarrVolume, write_volume
from napari_recon.scans import Grid
from napari_recon.widgets import contributions
from napari_recon.widgets.layers import KEY

GRID = Grid((80, 150, 140), 0.5, (1.0, 2.0, 3.0))


def a_volume():
    return np.fromfunction(lambda z, y, x: 0.001 * z + 1e-4 * y + 1e-5 * x, GRID.shape, dtype=np.float32)


def test_a_large_volume_is_read_where_it_is_looked_at(make_napari_viewer, tmp_path, monkeypatch):
    path = write_volume(tmp_path / "v.ome.zarr", a_volume(), GRID, {"job": {}, "complete": True})
    monkeypatch.setattr(contributions, "LARGE", 1)
    read = []
    one = Level.__getitem__

    def note(self, key):
        values = one(self, key)
        read.append(values.size)
        return values

    monkeypatch.setattr(Level, "__getitem__", note)
    viewer = make_napari_viewer()
    (layer,) = viewer.open(str(path), plugin="napari-recon")
    assert layer.multiscale
    assert [tuple(level.shape) for level in layer.data] == [(80, 150, 140), (40, 75, 70)]
    assert tuple(layer.scale) == pytest.approx((0.5,) * 3)
    assert tuple(layer.translate) == pytest.approx(GRID.translate)
    assert layer.metadata[KEY]["provenance"]["complete"]
    viewer.dims.point = layer.data_to_world((40, 75, 70))
    assert max(read) < GRID.voxels / 4  # never the whole
    assert layer.get_value((layer.data_to_world((40, 75, 70))), world=True) is not None
    viewer.dims.ndisplay = 3
    assert max(read) < GRID.voxels / 4
    np.testing.assert_array_equal(layer.data[0][3], a_volume()[3])


def test_a_small_volume_is_read_as_ever(make_napari_viewer, tmp_path):
    path = write_volume(tmp_path / "v.ome.zarr", a_volume(), GRID)
    (layer,) = make_napari_viewer().open(str(path), plugin="napari-recon")
    assert not layer.multiscale
    assert KEY not in layer.metadata


def test_a_run_in_slabs_shows_what_is_finished(make_napari_viewer, tmp_path):
    from napari_recon.jobs import ReconstructionJob
    from napari_recon.widgets.displays import ReconstructionDisplay

    viewer, output = make_napari_viewer(), tmp_path / "v.ome.zarr"
    job = ReconstructionJob(scan=tmp_path, output=output, slab=40)
    display = ReconstructionDisplay(viewer, job, "slices")
    for message in (Stage("reading"), Notice("In 2 slabs."), Progress("projections", 3, 3, (), None, 1.0, 0.0)):
        if isinstance(message, Progress):
            display.progressed(message)
    assert not viewer.layers
    volume = ZarrVolume.create(output, GRID, thickness=40)
    volume.describe({"complete": False})
    for start in (0, 40):
        volume.write(start, a_volume()[start : start + 40])
        step = 100 if start == 0 else 200
        display.progressed(Progress("slabs", step - 30, 200, (), None, 1.0, 1.0))
        display.progressed(Progress("slabs", step, 200, (), None, 1.0, 1.0))
        display.draw(None)
        (layer,) = viewer.layers
        viewer.dims.point = layer.data_to_world((start + 20, 75, 70))
        assert layer.get_value(layer.data_to_world((start + 20, 75, 70)), world=True)[1] > 0
    display.end(Finished({"residual": 0.1}, 1.0, 1, str(output), True, {"complete": True}))
    assert layer.metadata[KEY]["figures"] == {"residual": 0.1}
    assert layer.contrast_limits[1] > 0.05
