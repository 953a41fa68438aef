"""Projectors on a GPU: billions of voxel updates a second, beside PyTorch's and diffct's; and a whole reconstruction.

    napari-recon bench gpu        (or python -m benchmarks.gpu [--size N] [--views V] [--no-reconstruction])

The scan is the Walnut's: 501 x 501 x 501 voxels of 0.1 mm, 1200 views of 972 x 768 pixels of 0.1496 mm over a circle;
smaller sizes are the same scan with larger voxels and pixels. GUPS are voxels x views / second / 10^9, whatever the
number of rays. The projectors' inputs and outputs lie on the GPU. Each figure is the median of three runs after one
that compiles and tunes; PyTorch and diffct (pip install diffct, version 2; Siddon's method) take
a tenth of the views. The error is against the CPU's kernels, on a small scan.

"of the limit" compares with the memory bandwidth that a copy reaches on the same card: the least bytes that an
operation must move between the chip and its memory are the volume once for every launch (read and written where it is
added to) and the projections once. What is far from that limit is held back by the chip: an interpolation takes four
loads of 4 bytes through the first cache, and some 30 instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_recon.physics.projectors import NumbaProjector, Projector, Rays, TorchProjector, projector_for
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

SIZE, VIEWS, DETECTOR = 501, 1200, (972, 768)
VOXEL, PIXEL, SOURCE_OBJECT, SOURCE_DETECTOR = 0.1, 0.1496, 66.0, 199.0  # mm
FEWER = 10
"""One view in so many for the others."""
RECONSTRUCTION_VIEWS = 50


def scan(size: int, views: int) -> Rays:
    """The Walnut's scan with voxels and pixels larger by 501 / size."""
    coarser = SIZE / size
    shape = tuple(max(1, round(n / coarser)) for n in DETECTOR)
    angles = np.arange(views) * 360 / views
    geometry = Geometry.cone(angles, (shape[0], shape[1]), PIXEL * coarser, SOURCE_OBJECT, SOURCE_DETECTOR)
    return Rays(geometry, Grid((size,) * 3, VOXEL * coarser))


def run(size: int = SIZE, views: int = VIEWS, reconstruction: bool = True) -> list[dict[str, Any]]:
    """Measure and print every row.

    Raises
    ------
    ScanError
        Without a GPU.
    """
    if not torch.cuda.is_available():
        raise ScanError("There is no CUDA GPU here, which this benchmark is about; run it where nvidia-smi shows one.")
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = _bandwidth(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows = list(_told(_errors(device)))
    rows += _told(_ours(scan(size, views), device, bandwidth))
    torch.cuda.empty_cache()
    rows += _told(_torch(scan(size, max(1, views // FEWER)), device))
    torch.cuda.empty_cache()
    if importlib.util.find_spec("diffct") is None:
        print("diffct is not installed (pip install diffct): no rows of it", file=sys.stderr)
    else:
        rows += _told(_diffct(scan(size, max(1, views // FEWER)), device))
    torch.cuda.empty_cache()
    if reconstruction:
        rows += _told(_reconstructions(scan(size, RECONSTRUCTION_VIEWS), device))
    return [{"device": name, "bandwidth": bandwidth, **row} for row in rows]


# -- right --------------------------------------------------------------------------------------------------------


def _errors(device: torch.device) -> Iterator[dict[str, Any]]:
    circle = scan(48, 24)
    vectors = circle.geometry.vectors + np.random.default_rng(0).normal(scale=0.02, size=circle.geometry.vectors.shape)
    turned = Geometry(vectors, circle.geometry.detector_shape)
    for kind, rays in (("aligned", circle), ("any vectors", Rays(turned, circle.grid))):
        ours, cpu = projector_for(rays, device), NumbaProjector(rays)
        x, y = _random(rays.grid.shape), _random(_measured(rays))
        pairs = {
            "forward": (ours.forward(x.to(device)), cpu.forward(x)),
            "adjoint": (ours.adjoint(y.to(device)), cpu.adjoint(y)),
            "normal": (ours.normal(x.to(device)), cpu.normal(x)),
            "adjoint, from the host": (ours.adjoint(y), cpu.adjoint(y)),
            "FDK back projection": (_fdk(ours, y.to(device)), _fdk(cpu, y)),
        }
        for operation, (found, expected) in pairs.items():
            error = float(torch.linalg.vector_norm(found.cpu() - expected) / torch.linalg.vector_norm(expected))
            yield {"who": type(ours).__name__, "operation": f"{operation}, {kind}", "size": 48, "error": error}
        again = ours.adjoint(y.to(device))
        same = float(torch.equal(again, pairs["adjoint"][0]))
        yield {"who": type(ours).__name__, "operation": f"adjoint twice, same bits, {kind}", "size": 48, "same": same}


# -- fast ---------------------------------------------------------------------------------------------------------


def _ours(rays: Rays, device: torch.device, bandwidth: float) -> Iterator[dict[str, Any]]:
    from napari_recon.physics.projectors.triton_gpu import LAUNCH, TritonProjector

    projector = projector_for(rays, device)
    who = type(projector).__name__
    volume_bytes, projections_bytes = 4 * rays.grid.voxels, 4 * math.prod(_measured(rays))
    moved = {}
    if isinstance(projector, TritonProjector):
        launches = len(list(projector._batches()))
        moved["forward"] = launches * volume_bytes + projections_bytes
        # read, weighted and written, and gathered from
        moved["adjoint"] = 2 * launches * volume_bytes + 3 * projections_bytes
        launches = math.ceil(rays.geometry.views / max(1, LAUNCH["backproject"] // rays.grid.voxels))
        moved["FDK back projection"] = 2 * launches * volume_bytes + projections_bytes
    for row in _timed_operations(projector, rays, device):
        limit = moved.get(row["operation"])
        of_limit = {} if limit is None else {"of the limit": limit / bandwidth / row["seconds"]}
        yield {"who": who, **row, **of_limit}
    x = _random(rays.grid.shape).to(device)
    seconds = _seconds(lambda: projector.normal(x))
    yield {"who": who, **_speed("normal (AᵀA)", rays, seconds)}
    y = _random(_measured(rays))
    yield {"who": who, **_speed("adjoint, from the host", rays, _seconds(lambda: projector.adjoint(y)))}


def _torch(rays: Rays, device: torch.device) -> Iterator[dict[str, Any]]:
    for row in _timed_operations(TorchProjector(rays, device), rays, device):
        yield {"who": "TorchProjector", **row}


def _timed_operations(projector: Projector, rays: Rays, device: torch.device) -> Iterator[dict[str, Any]]:
    x = _random(rays.grid.shape).to(device)
    yield _speed("forward", rays, _seconds(partial(projector.forward, x)))
    yield _speed("adjoint", rays, _seconds(partial(projector.adjoint, _random(_measured(rays)).to(device))))
    count = min(rays.geometry.views, max(1, (1 << 30) // (4 * math.prod(rays.geometry.detector_shape))))
    buffer, inside = projector.filtered_buffer(count, rays.geometry.detector_shape[0])
    inside.uniform_()

    def back_project() -> None:
        for n in range(0, rays.geometry.views, count):
            projector.backproject(buffer[: rays.geometry.views - n], n, 0, x)

    yield _speed("FDK back projection", rays, _seconds(back_project))


def _diffct(rays: Rays, device: torch.device) -> Iterator[dict[str, Any]]:
    """Their projectors (version 2) on the same vectors; and how far theirs is from ours on a ball."""
    from diffct import ConeBackprojectorFunction, ConeProjectorFunction, cone_weighted_backproject

    g, grid = rays.geometry, rays.grid
    (rows, columns), (pitch_row, pitch_column) = g.detector_shape, g.pixel_size
    u, v = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in (g.u, g.v))
    vectors = [
        torch.from_numpy(np.ascontiguousarray(q)).float().to(device) for q in (g.source, g.detector_center, u, v)
    ]
    sizes = (pitch_column, pitch_row, grid.voxel_size)

    def forward(x: Tensor) -> Tensor:
        return ConeProjectorFunction.apply(x, *vectors, columns, rows, *sizes)

    x = _random(grid.shape).to(device)
    yield {"who": "diffct", **_speed("forward", rays, _seconds(partial(forward, x)))}
    y = _random((g.views, columns, rows)).to(device)
    calls: dict[str, Callable[..., Any]] = {
        "adjoint": ConeBackprojectorFunction.apply,
        "FDK back projection": cone_weighted_backproject,
    }
    for operation, call in calls.items():
        seconds = _seconds(partial(call, y, *vectors, *grid.shape, *sizes))
        yield {"who": "diffct", **_speed(operation, rays, seconds)}
    few = Rays(g.select([0, g.views // 3]), grid)
    vectors = [q[[0, g.views // 3]] for q in vectors]
    ball = _ball(grid, device)[0, 0]
    ours, theirs = projector_for(few, device).forward(ball), forward(ball).permute(2, 0, 1)
    difference = float(torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(ours))
    yield {"who": "diffct", "operation": "forward, off ours on a ball", "size": grid.shape[0], "difference": difference}


# -- and of use ---------------------------------------------------------------------------------------------------


def _reconstructions(rays: Rays, device: torch.device) -> Iterator[dict[str, Any]]:
    """FDK, fit of H, and partitioned reconstructions with H: seconds and the GPU's peak, from projections on it."""
    from napari_recon.learning.networks import load_weights
    from napari_recon.learning.weights import find_weights
    from napari_recon.physics.normal import DiagCirculantWrapper, fit_normal_operator
    from napari_recon.physics.ramp_filtered import RampFiltered
    from napari_recon.physics.xray import XRayTransform
    from napari_recon.reconstruction.fdk import FDK
    from napari_recon.reconstruction.partitioned import PartitionedReconstructor
    from napari_recon.reconstruction.tv import tv_patch_solver

    physics = XRayTransform(rays.geometry, rays.grid, device=device)
    with torch.no_grad():
        y = physics.A(_ball(rays.grid, device))
    found: dict[str, Any] = {}

    def measured(operation: str, call: Callable[[], Any]) -> dict[str, Any]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        found[operation] = call()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        return {
            "who": "napari-recon",
            "operation": operation,
            "size": rays.grid.shape[0],
            "views": rays.geometry.views,
            "seconds": seconds,
            "peak GB": torch.cuda.max_memory_allocated(device) / 1e9,
        }

    yield measured("FDK, first", lambda: FDK()(y, physics))
    yield measured("FDK", lambda: FDK()(y, physics))
    x_fdk = found["FDK"]
    yield measured("fit of H", lambda: fit_normal_operator(physics, seed=0))
    wrapped = DiagCirculantWrapper(physics, operator=found["fit of H"])
    solver = tv_patch_solver(physics, x_fdk, 7, 1e-3)
    patch = min(96, *rays.grid.shape)
    patches = PartitionedReconstructor(solver, patch_size=patch, init=x_fdk, passes=3)
    yield measured("TV, partitioned + H", lambda: patches(y, wrapped))
    ramp = RampFiltered(physics)
    yield measured("fit of H, ramp-filtered", lambda: fit_normal_operator(ramp, seed=0))
    options = {"ramp": ramp, "operator": found["fit of H, ramp-filtered"]}
    model = load_weights(find_weights("unrolled"), device).model
    model.patch_size, model.stride, model.batch = patch, patch * 2 // 3, 8
    if hasattr(model, "passes"):
        model.passes = 2
    for half in (False, True):
        model.mixed_precision = half
        label = f"unrolled, light, partitioned + H{', bfloat16' if half else ''}"
        yield measured(label, lambda: model(y, physics, **options))


def _ball(grid: Grid, device: torch.device) -> Tensor:
    """A hollow ball, 1/mm."""
    z, y, x = (torch.linspace(-1, 1, n, device=device) for n in grid.shape)
    radius = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt()
    return (0.03 * ((radius < 0.7) & (radius > 0.2)).float())[None, None]


# -- measuring ----------------------------------------------------------------------------------------------------


def _bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GB."""
    a = torch.rand(1 << 28, device=device)
    b = torch.empty_like(a)
    seconds = _seconds(lambda: b.copy_(a), repeats=10)
    return 2 * a.nbytes / seconds


def _seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """The median of some runs, on the GPU's own clock, after one or, if short, several: kernels are tuned meanwhile."""
    begin_warming = time.perf_counter()
    for _ in range(12):
        call()
        torch.cuda.synchronize()
        if time.perf_counter() - begin_warming > 3:
            break
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _speed(operation: str, rays: Rays, seconds: float) -> dict[str, Any]:
    views = rays.geometry.views
    gups = rays.grid.voxels * views / seconds / 1e9
    return {"operation": operation, "size": rays.grid.shape[0], "views": views, "seconds": seconds, "GUPS": gups}


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _measured(rays: Rays) -> tuple[int, int, int]:
    rows, columns = rays.geometry.detector_shape
    return rows, rays.geometry.views, columns


def _fdk(projector: Projector, y: Tensor) -> Tensor:
    buffer, inside = projector.filtered_buffer(y.shape[1], y.shape[0])
    inside.copy_(y)
    out = torch.zeros(projector.rays.grid.shape, device=y.device)
    projector.backproject(buffer, 0, 0, out)
    return out


def _told(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, each printed when it is there; what fails is a row that says so, so that the others are still had."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            row = {"who": "-", "operation": f"failed: {type(error).__name__}: {str(error).strip()[:200]}"}
        figures = {k: v for k, v in row.items() if k not in ("who", "operation")}
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{row['who']:16} {row['operation']:42} {text}", flush=True)
        yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--views", type=int, default=VIEWS)
    parser.add_argument("--no-reconstruction", action="store_true")
    arguments = parser.parse_args()
    try:
        run(arguments.size, arguments.views, not arguments.no_reconstruction)
    except ScanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
