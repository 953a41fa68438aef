"""Some slices of a volume: which rays and voxels they take, and that they come out as in the whole."""

import numpy as np
import pytest
import torch

from napari_recon.physics import XRayTransform
from napari_recon.reconstruction import FDK
from napari_recon.scans import Geometry, Grid, ScanError
from napari_recon.scans.slabs import MARGIN, held_margin, slab_of, slabs_of

ANGLES = np.arange(20) * 18.0


def tilted():
    """A cone beam whose source wobbles and whose detector is shifted and tilted, differently in every view."""
    rng = np.random.default_rng(3)
    vectors = Geometry.cone(ANGLES, (30, 40), 1.0, 60.0, 120.0).vectors.copy()
    vectors[:, :6] += rng.normal(0, 0.6, (len(vectors), 6))
    for i, row in enumerate(vectors):
        turn = np.linalg.qr(np.eye(3) + rng.normal(0, 0.03, (3, 3)))[0]
        turn *= np.sign(np.diag(turn))
        vectors[i, 6:9], vectors[i, 9:12] = turn @ row[6:9], turn @ row[9:12]
    return Geometry(vectors, (30, 40), "cone")


GEOMETRIES = {
    "cone": lambda: Geometry.cone(ANGLES, (44, 40), 1.0, 34.0, 68.0),  # 33 degrees up and down
    "parallel": lambda: Geometry.parallel(ANGLES, (26, 36), 0.8, axis_offset=1.3),
    "tilted": tilted,
}
GRID = Grid((22, 20, 20), 0.9, (0.4, -0.3, 1.1))


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    return GEOMETRIES[request.param]()


def test_a_slab_takes_every_ray_that_sees_it_and_every_voxel_that_these_meet(geometry):
    a = XRayTransform(geometry, GRID, "cpu")
    for core in (slice(0, 4), slice(9, 12), slice(19, 22)):
        slab = slab_of(geometry, GRID, core, margin=2)
        seen = torch.zeros(1, 1, *GRID.shape)
        seen[:, :, max(0, core.start - 2) : core.stop + 2] = 1
        rows = a.A(seen)[0, 0].amax(dim=(1, 2))
        assert not rows[: slab.rows.start].any()
        assert not rows[slab.rows.stop :].any()
        beside = torch.ones(1, 1, *GRID.shape)
        beside[:, :, slab.extended] = 0
        assert not a.A(beside)[:, :, slab.rows].any()


def test_the_rays_of_a_slab_are_those_of_the_whole(geometry):
    slab = slab_of(geometry, GRID, slice(12, 15), margin=1)
    x = torch.rand(1, 1, *GRID.shape)
    whole = XRayTransform(geometry, GRID, "cpu").A(x)
    part = XRayTransform(geometry.with_rows(slab.rows), slab.grid(GRID), "cpu").A(x[:, :, slab.extended])
    torch.testing.assert_close(part, whole[:, :, slab.rows], rtol=1e-4, atol=1e-4 * float(whole.max()))


def test_fdk_of_slices_is_the_crop_of_the_whole(geometry):
    y = torch.rand(1, 1, geometry.detector_shape[0], geometry.views, geometry.detector_shape[1])
    whole = FDK()(y, XRayTransform(geometry, GRID, "cpu"))
    for slab in slabs_of(geometry, GRID, 8, margin=0):
        physics = XRayTransform(geometry.with_rows(slab.rows), slab.core_grid(GRID), "cpu")
        part = FDK()(y[:, :, slab.rows], physics)
        torch.testing.assert_close(part, whole[:, :, slab.core], rtol=1e-3, atol=2e-5 * float(whole.abs().max()))


def test_slabs_cover_the_grid_once_and_need_less_than_all_of_it():
    geometry = Geometry.cone(ANGLES, (60, 40), 1.0, 200.0, 300.0)
    grid = Grid((60, 20, 20), 0.7)
    slabs = slabs_of(geometry, grid, 16, margin=2)
    assert [(s.core.start, s.core.stop) for s in slabs] == [(0, 16), (16, 32), (32, 48), (48, 60)]
    for slab in slabs:
        assert slab.extended.start <= slab.core.start < slab.core.stop <= slab.extended.stop
        assert slab.extended.stop - slab.extended.start < 40
        assert slab.rows.stop - slab.rows.start < 40
        assert slab.core_grid(grid).translate[0] == pytest.approx(grid.translate[0] + slab.core.start * 0.7)


def test_where_the_rest_is_held_the_unknown_slices_grow_with_the_cone_only():
    grid = Grid((400, 120, 120), 1.0)
    margins = [held_margin(Geometry.parallel(ANGLES, (400, 120), 1.0), grid)]
    for distance in (4000.0, 400.0, 250.0):
        margins.append(held_margin(Geometry.cone(ANGLES, (800, 240), 1.0, distance, 2 * distance), grid))
    assert margins[0] == margins[1] == MARGIN
    assert MARGIN < margins[2] < margins[3]
    wide = Geometry.cone(ANGLES, (800, 240), 1.0, 250.0, 500.0)
    for rising in (np.linspace(-100, 100, len(ANGLES)), 600.0):  # a helix, laminography: FDK is none to hold
        vectors = wide.vectors.copy()
        vectors[:, 2] += rising
        vectors[:, 5] += rising if np.ndim(rising) else -rising
        assert held_margin(Geometry(vectors, wide.detector_shape, "cone"), grid) is None
    wobbling = wide.vectors + np.random.default_rng(0).normal(0, 0.5, wide.vectors.shape) * (np.arange(12) < 6)
    assert held_margin(Geometry(wobbling, wide.detector_shape, "cone"), grid) == pytest.approx(margins[3], abs=3)
    for core in (slice(0, 20), slice(100, 120)):
        full, held = slab_of(wide, grid, core), slab_of(wide, grid, core, beyond=margins[3])
        assert held.rows == full.rows
        assert held.extended.stop == core.stop + margins[3] < full.extended.stop
        assert held.extended.start == max(0, core.start - margins[3])


def test_slices_that_are_not_there_or_not_seen_are_refused():
    geometry = Geometry.parallel(ANGLES, (10, 20), 1.0)
    grid = Grid((40, 16, 16), 1.0)
    with pytest.raises(ScanError, match="slices 0 to 39"):
        slab_of(geometry, grid, slice(30, 41))
    with pytest.raises(ScanError, match="No row of the detector sees the slices 0 to 2"):
        slab_of(geometry, grid, slice(0, 3), margin=1)
    with pytest.raises(ScanError, match="rows 0 to 9"):
        geometry.with_rows(slice(3, 11))
