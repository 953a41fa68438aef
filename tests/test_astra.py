"""ASTRA's projectors, through a stand-in that takes what ASTRA takes and computes it exactly: ASTRA needs a GPU."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from napari_recon.physics import projectors
from napari_recon.physics.projectors import NumbaProjector, Rays, TorchProjector, projector_for
from napari_recon.physics.projectors.astra_gpu import AstraProjector, try_out
from napari_recon.physics.xray import _astra_geometry, _astra_grid
from napari_recon.scans import Geometry, Grid

CPU = torch.device("cpu")
GRID = Grid((6, 8, 10), 0.9, (0.4, -0.7, 1.1))
GEOMETRIES = {
    "cone": Geometry.cone(np.arange(9) * 40.0, (12, 16), (1.1, 0.9), 40.0, 70.0, axis_offset=0.6),
    "parallel": Geometry.parallel(np.arange(9) * 20.0, (12, 16), 0.8),
}


def stand_in(scale=1.0):
    """ASTRA's functions as its documentation has them; every projection is multiplied by ``scale``."""
    made = {}

    def create_projector(kind, projection, volume):
        assert kind == "cuda3d"
        made[len(made) + 1] = NumbaProjector(Rays(_astra_geometry(projection), _astra_grid(volume)))
        return len(made)

    def create_vol_geom(rows, columns, slices, *bounds):
        names = [f"Window{end}{axis}" for axis in "XYZ" for end in ("Min", "Max")]
        counts = {"GridRowCount": rows, "GridColCount": columns, "GridSliceCount": slices}
        return counts | {"option": dict(zip(names, bounds, strict=True))}

    def create_proj_geom(kind, rows, columns, vectors):
        return {"type": kind, "DetectorRowCount": rows, "DetectorColCount": columns, "Vectors": vectors}

    experimental = SimpleNamespace(
        direct_FP3D=lambda number, volume, out: out.copy_(scale * made[number].forward(volume)),
        direct_BP3D=lambda number, out, projections: out.copy_(scale * made[number].adjoint(projections)),
    )
    return SimpleNamespace(
        create_projector=create_projector,
        create_vol_geom=create_vol_geom,
        create_proj_geom=create_proj_geom,
        projector3d=SimpleNamespace(delete=made.pop),
        experimental=experimental,
        made=made,
        __spec__=SimpleNamespace(name="astra"),
    )


@pytest.fixture
def install(monkeypatch):
    """Install the stand-in."""
    works = projectors._astra_works

    def install(**options):
        astra = stand_in(**options)
        monkeypatch.setitem(sys.modules, "astra", astra)
        monkeypatch.setitem(sys.modules, "astra.experimental", astra.experimental)
        works.cache_clear()
        return astra

    yield install
    works.cache_clear()


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometry_and_grid_are_handed_over_as_they_are(install, geometry):
    astra = install()
    rays = Rays(geometry, GRID)
    theirs, ours = AstraProjector(rays, CPU), NumbaProjector(rays)
    volume = torch.rand(GRID.shape)
    projections = ours.forward(volume)
    torch.testing.assert_close(theirs.forward(volume), projections)
    torch.testing.assert_close(theirs.adjoint(projections), ours.adjoint(projections))
    torch.testing.assert_close(theirs.normal(volume), ours.adjoint(projections))
    torch.testing.assert_close(theirs.adjoint(projections, volume.clone()), volume + ours.adjoint(projections))
    assert len(astra.made) == 1
    del theirs
    assert not astra.made  # nothing stays behind on the GPU


def test_it_is_used_where_triton_is_not_and_where_it_is_right(install, monkeypatch):
    rays, gpu = Rays(GEOMETRIES["cone"], GRID), torch.device("cuda:0")
    works = {"triton": False}
    monkeypatch.setattr(projectors, "_triton_works", lambda _: works["triton"])
    monkeypatch.setattr(projectors, "_astra_works", lambda _: True)
    install()
    assert isinstance(projector_for(rays, gpu), AstraProjector)
    assert isinstance(projector_for(rays, CPU), NumbaProjector)
    works["triton"] = True
    assert not isinstance(projector_for(rays, gpu), AstraProjector)
    monkeypatch.setenv("NAPARI_RECON_PROJECTOR", "astra")
    assert isinstance(projector_for(rays, gpu), AstraProjector)
    monkeypatch.setenv("NAPARI_RECON_PROJECTOR", "torch")
    assert type(projector_for(rays, gpu)) is TorchProjector


def test_it_is_not_used_where_it_computes_something_else(install, monkeypatch):
    install()
    try_out(CPU)
    assert projectors._astra_works(CPU)
    install(scale=1.5)
    with pytest.raises(RuntimeError, match="forward projection of a test scan is off by 50 %"):
        try_out(CPU)
    with pytest.warns(UserWarning, match="ASTRA cannot be used on cpu .*PyTorch's projector is used"):
        assert not projectors._astra_works(CPU)
    assert not projectors._astra_works(CPU)  # a second warning would be an error
