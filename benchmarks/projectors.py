"""Forward projection, matched adjoint and FDK on the CPU: seconds, accuracy, and ratios to RTK in the same run.

    python -m benchmarks.projectors [SIZE] [VIEWS]

Ours is timed through XRayTransform and FDK on tensors as a person has them, conversions included. The repeats of both
sides alternate, so that load from elsewhere meets both; the least of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import get_num_threads
from numpy.typing import NDArray

from napari_recon.physics.projectors import warm_up
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

SOURCE_OBJECT, SOURCE_DETECTOR = 66.0, 199.0  # mm, as the Walnut scans

# Gaussians: value, centre (x, y, z) mm, width mm
BLOBS = [
    (1, (0, 0, 0), 3),
    (0.8, (4, -2, 1.5), 1.2),
    (-0.5, (-3, 3, -2), 1),
    (0.7, (-4, -4, 3), 0.8),
    (0.6, (1, 6, -4), 0.9),
]


def run(size: int = 128, views: int = 90, repeats: int = 5) -> list[dict[str, Any]]:
    """Time the circular geometry (detector aligned with the axis) and the same with any vectors; print the table.

    Parameters
    ----------
    size
        Voxels along each axis; the detector has 1.5 size pixels along each.
    views
        Views over a full circle.
    repeats
        Of every measurement.
    """
    grid = Grid((size, size, size), 24.32 / size)
    circle = Geometry.cone(
        np.arange(views) * 360 / views, (3 * size // 2,) * 2, 51.2 / size, SOURCE_OBJECT, SOURCE_DETECTOR
    )
    wobbling = _wobble(circle)
    threads = get_num_threads()
    try:
        from benchmarks._rtk import RTK as rtk_for
    except ImportError:
        rtk_for = None  # type: ignore[assignment,misc]
        print("RTK is not installed (pip install napari-recon[rtk]): no ratios", file=sys.stderr)
    warm_up()
    volume = _blob_volume(grid)
    rows: list[dict[str, Any]] = []
    for name, geometry in (("aligned", circle), ("any vectors", wobbling)):
        exact = _blob_integrals(geometry)
        physics, fdk = XRayTransform(geometry, grid, device="cpu"), FDK()
        x, y = torch.from_numpy(volume)[None, None], torch.from_numpy(exact).transpose(0, 1).contiguous()[None, None]
        rtk = rtk_for(geometry, grid, threads) if rtk_for is not None else None
        error = float(torch.linalg.vector_norm(physics.A(x) - y) / torch.linalg.vector_norm(y))
        compared: list[tuple[str, Callable[[], Any], Callable[[], Any] | None]] = [
            ("FDK", partial(fdk.forward, y, physics), partial(rtk.fdk, exact) if rtk else None),
            ("forward", partial(physics.A, x), partial(rtk.forward, volume) if rtk else None),
            ("matched adjoint", partial(physics.A_adjoint, y), partial(rtk.adjoint, exact) if rtk else None),
        ]
        for what, ours, theirs in compared:
            seconds, rtk_seconds = _least(ours, theirs, repeats)
            row = {
                "geometry": name,
                "operation": what,
                "size": size,
                "views": views,
                "threads": threads,
                "seconds": seconds,
            }
            if rtk_seconds is not None:
                row |= {"rtk_seconds": rtk_seconds, "ratio": rtk_seconds / seconds}
            rows.append(row)
        rows.append({"geometry": name, "operation": "forward error on blobs", "error": error})
        rows.append({"geometry": name, "operation": "adjointness", "error": _adjointness(physics)})
    _print(rows)
    return rows


def _wobble(geometry: Geometry) -> Geometry:
    """The geometry with every view shifted a little and its detector turned a little in its plane."""
    random = np.random.default_rng(0)
    vectors = geometry.vectors.copy()
    vectors[:, :6] += random.normal(scale=0.02, size=(geometry.views, 6))
    turn = random.normal(scale=2e-3, size=(geometry.views, 1))
    pitch = np.linalg.norm(geometry.v, axis=1, keepdims=True) / np.linalg.norm(geometry.u, axis=1, keepdims=True)
    vectors[:, 6:9] = np.cos(turn) * geometry.u + np.sin(turn) * geometry.v / pitch
    vectors[:, 9:12] = np.cos(turn) * geometry.v - np.sin(turn) * geometry.u * pitch
    return Geometry(vectors, geometry.detector_shape, geometry.kind)


def _blob_volume(grid: Grid) -> NDArray[np.float32]:
    axes = [t + grid.voxel_size * np.arange(n) for t, n in zip(grid.translate, grid.shape, strict=True)]
    out = np.zeros(grid.shape)
    for value, center, width in BLOBS:
        z, y, x = (np.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in zip(axes, center[::-1], strict=True))
        out += value * z[:, None, None] * y[:, None] * x
    return out.astype(np.float32)


def _blob_integrals(geometry: Geometry) -> NDArray[np.float32]:
    rows, columns = geometry.detector_shape
    r, c = np.arange(rows)[:, None, None] - (rows - 1) / 2, np.arange(columns)[:, None] - (columns - 1) / 2
    out = np.zeros((geometry.views, rows, columns), np.float32)
    for n in range(geometry.views):
        ray = geometry.detector_center[n] + r * geometry.v[n] + c * geometry.u[n] - geometry.source[n]
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        for value, center, width in BLOBS:
            to = np.array(center) - geometry.source[n]
            square = to @ to - (ray @ to) ** 2  # of the distance between ray and centre
            out[n] += value * np.sqrt(2 * np.pi) * width * np.exp(-square / (2 * width**2))
    return out


def _adjointness(physics: XRayTransform) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, *physics.img_size, generator=generator)
    y = torch.rand(1, 1, *physics.measurement_shape, generator=generator)
    left, right = (physics.A(x).double() * y).sum(), (x * physics.A_adjoint(y).double()).sum()
    return float(abs(left - right) / abs(left))


def _least(ours: Callable[[], Any], theirs: Callable[[], Any] | None, repeats: int) -> tuple[float, float | None]:
    def timed(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    first, second = [], []
    for _ in range(repeats):
        first += [timed(ours) for _ in range(2)]  # theirs takes several times as long
        if theirs is not None:
            second.append(timed(theirs))
    return min(first), min(second, default=None)


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'geometry':12} {'operation':24} {'seconds':>9} {'RTK':>9} {'ratio':>7}")
    for row in rows:
        if "error" in row:
            print(f"{row['geometry']:12} {row['operation']:24} {row['error']:9.2g}")
        else:
            rtk = f"{row['rtk_seconds']:9.3f} {row['ratio']:7.1f}" if "ratio" in row else ""
            print(f"{row['geometry']:12} {row['operation']:24} {row['seconds']:9.3f} {rtk}")


if __name__ == "__main__":
    run(*(int(a) for a in sys.argv[1:3]))
