"""FDK and the projectors beside RTK's, on the same data (needs the extra ``rtk``)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

itk = pytest.importorskip("itk", reason="RTK is an optional extra")
if not hasattr(itk, "RTK"):
    pytest.skip("RTK is an optional extra", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks._rtk import RTK  # noqa: E402
from benchmarks.projectors import _blob_integrals, _blob_volume, _wobble  # noqa: E402
from napari_recon.physics.xray import XRayTransform  # noqa: E402
from napari_recon.reconstruction.fdk import FDK  # noqa: E402
from napari_recon.scans.geometry import Geometry  # noqa: E402
from napari_recon.scans.grid import Grid  # noqa: E402

GRID = Grid((40, 48, 48), 0.5)
FULL, SHORT = np.arange(0, 360, 3.0), np.arange(0, 222, 2.0)


def circle(angles: np.ndarray, offset: float = 0.0, columns: int = 84) -> Geometry:
    return Geometry.cone(angles, (72, columns), 1.0, 66, 199, axis_offset=offset)


def field_of_view(geometry: Geometry) -> np.ndarray:
    """Where every view sees the voxel, or with a detector off-centre its widest side does."""
    z, y, x = np.meshgrid(
        *(t + GRID.voxel_size * np.arange(n) for t, n in zip(GRID.translate, GRID.shape, strict=True)), indexing="ij"
    )
    radius = np.hypot(x, y)
    half = geometry.detector_shape[0] * geometry.pixel_size[0] / 2 - 1
    return (radius < 0.95 * geometry.field_of_view_radius) & (np.abs(z) < (66 - radius) * half / 199)


@pytest.mark.parametrize(
    ("geometry", "weights"),
    [
        (circle(FULL), None),
        (_wobble(circle(FULL)), None),
        (circle(SHORT), "parker"),
        (circle(-SHORT), "parker"),
        (circle(FULL, offset=20), "displaced"),
        (circle(FULL, offset=-20), "displaced"),
    ],
    ids=["circle", "wobble", "short scan", "short scan backwards", "detector left", "detector right"],
)
def test_fdk_agrees_with_rtk(geometry: Geometry, weights: str | None) -> None:
    exact = _blob_integrals(geometry)
    y = torch.from_numpy(exact).transpose(0, 1)[None, None]
    ours = FDK()(y, XRayTransform(geometry, GRID, device="cpu"))[0, 0].numpy()
    theirs = RTK(geometry, GRID, threads=2).fdk(exact, weights)
    inside = field_of_view(geometry)
    assert inside.mean() > 0.3
    peak = _blob_volume(GRID).max()
    psnr = 20 * np.log10(peak / np.sqrt(np.mean((ours - theirs)[inside].astype(float) ** 2)))
    assert psnr > 60  # 45 would do; the same formulas give more


@pytest.mark.parametrize("geometry", [circle(FULL), _wobble(circle(FULL))], ids=["circle", "wobble"])
def test_projectors_agree_with_rtk(geometry: Geometry) -> None:
    volume, rtk = _blob_volume(GRID), RTK(geometry, GRID, threads=2)
    physics = XRayTransform(geometry, GRID, device="cpu")
    ours = physics.A(torch.from_numpy(volume)[None, None])[0, 0].transpose(0, 1).numpy()
    theirs = rtk.forward(volume)
    assert np.linalg.norm(ours - theirs) < 2e-3 * np.linalg.norm(theirs)
    y = _blob_integrals(geometry)
    ours = physics.A_adjoint(torch.from_numpy(y).transpose(0, 1)[None, None])[0, 0].numpy()
    theirs = rtk.adjoint(y)
    inner = (slice(4, -4),) * 3  # RTK's rays end at the outermost centres, ours half a voxel beyond
    assert np.linalg.norm((ours - theirs)[inner]) < 5e-3 * np.linalg.norm(theirs[inner])
