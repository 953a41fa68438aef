"""Total variation by patches with H against patches with AᵀA and against the whole volume; and the memory of patches.

    python -m benchmarks.partitioned [SIZE] [VIEWS]

The truth is a phantom of ellipsoids with exact line integrals and Gaussian noise of 1 % of the largest, so that nothing
is reconstructed on the discretisation that made it. PSNR is taken over the field of view, its data range the truth's
maximum. All forms start from the same FDK and take steps of the same length; times are of one run each.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from napari_recon.learning.phantoms import random_ellipsoids
from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, fft_shape, fit_normal_operator
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.tv import TV, tv_patch_solver
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

SOURCE_OBJECT, SOURCE_DETECTOR, EXTENT = 66.0, 199.0, 24.32  # mm
SEED, NOISE, REGULARIZATION, ITERATIONS = 0, 0.01, 1e-3, 20
MEMORY_PATCH = 48


def scan(size: int, views: int) -> XRayTransform:
    geometry = Geometry.cone(
        np.arange(views) * 360 / views, (3 * size // 2,) * 2, 51.2 / size, SOURCE_OBJECT, SOURCE_DETECTOR
    )
    return XRayTransform(geometry, Grid((size,) * 3, EXTENT / size), device="cpu")


def run(size: int = 64, views: int = 60, patch: int | None = None, exact: bool = True) -> list[dict[str, Any]]:
    """Reconstruct one phantom in every form; then measure memory at 64, 128 and 192 voxels. Prints both tables."""
    patch = patch or size // 2
    physics = scan(size, views)
    phantom = random_ellipsoids(SEED, radius=EXTENT * 0.42)
    truth = torch.from_numpy(phantom.volume(physics.grid))[None, None]
    y = torch.from_numpy(phantom.project(physics.geometry)).transpose(0, 1).contiguous()[None, None]
    generator = torch.Generator().manual_seed(SEED)
    y += NOISE * y.max() * torch.randn(y.shape, generator=generator)
    axis = (torch.arange(size) - (size - 1) / 2) * physics.grid.voxel_size
    inside = (axis[:, None] ** 2 + axis**2).sqrt() < physics.geometry.field_of_view_radius - physics.grid.voxel_size
    inside = inside & (axis.abs() < 0.4 * EXTENT)[:, None, None]

    def psnr(x: torch.Tensor) -> float:
        error = float((x - truth)[0, 0][inside].square().mean())
        return 20 * math.log10(float(truth.max())) - 10 * math.log10(error)

    x_fdk = FDK()(y, physics)
    rows: list[dict[str, Any]] = [{"method": "FDK", "seconds": 0.0, "PSNR dB": psnr(x_fdk)}]
    base = tv_patch_solver(physics, x_fdk, ITERATIONS, REGULARIZATION)

    def timed(method: str, reconstruct: Any) -> torch.Tensor:
        start = time.perf_counter()
        x: torch.Tensor = reconstruct()
        seconds = time.perf_counter() - start
        residual = float((physics.A(x) - y).norm() / y.norm())
        rows.append({"method": method, "seconds": seconds, "PSNR dB": psnr(x), "residual": residual})
        return x

    operators = {}
    for terms in (1, 3):
        start = time.perf_counter()
        operators[terms] = fit_normal_operator(physics, terms=terms, seed=SEED)
        rows.append(
            {
                "method": f"fit of H, {terms} term{'s' if terms > 1 else ''}",
                "seconds": time.perf_counter() - start,
                "error white": operators[terms].errors["white"],
                "error truth": operators[terms].relative_error(physics, truth),
            }
        )
    timed("global FISTA", lambda: TV(ITERATIONS, REGULARIZATION, init=x_fdk)(y, physics))
    timed("global FISTA of deepinv", lambda: base(y, physics, init=(x_fdk, x_fdk)))
    for passes in (1, 2, 3):
        solver = tv_patch_solver(physics, x_fdk, math.ceil(ITERATIONS / passes), REGULARIZATION)
        recon = PartitionedReconstructor(solver, patch_size=patch, init=x_fdk, passes=passes)
        label = f"{passes} x {solver.max_iter}"
        x_exact, slow = None, 0.0
        if exact:
            x_exact = timed(f"patches, exact, {label}", partial(recon, y, physics))
            slow = rows[-1]["seconds"]
        for terms, operator in operators.items():
            wrapped = DiagCirculantWrapper(physics, operator=operator)
            x = timed(f"patches, H of {terms}, {label}", partial(recon, y, wrapped))
            if x_exact is not None:
                rows[-1]["off exact"] = float((x - x_exact).norm() / (x_exact - x_fdk).norm())
                rows[-1]["exact / H"] = slow / rows[-1]["seconds"]
    show(f"{size}^3, {views} views, patches of {patch}^3, {ITERATIONS} iterations", rows)
    measured = [memory_of(n, views) for n in (64, 128, 192)]
    show(f"memory, {views} views, patches of {MEMORY_PATCH}^3, H", measured)
    return rows + measured


# -- memory --------------------------------------------------------------------------------------------------------


def memory_of(size: int, views: int) -> dict[str, Any]:
    """Peak memory of a partitioned run with a given H, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.partitioned", "--memory", str(size), str(views)]
    # Every block of more than 1 MB is the system's again as soon as it is freed: what is resident is what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    row: dict[str, Any] = json.loads(out.splitlines()[-1])
    return row


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) / 1024 for line in file if line.startswith(name))


def _measure(size: int, views: int) -> dict[str, Any]:
    """MB of a run beyond what lies there before it, and beyond the volumes and projections that it must hold.

    These are, while patches are worked on, the volume shown, the context and the gradient; in the global step also the
    residual and the projector's two padded copies in place of the gradient.
    """
    rng = np.random.default_rng(SEED)
    lengths = fft_shape((size,) * 3)
    for n in (56, size):  # the first run compiles and fills every pool of the libraries
        physics = scan(n, views)
        lengths = fft_shape((n,) * 3)
        spectrum = torch.from_numpy(rng.random((*lengths[:-1], lengths[-1] // 2 + 1), dtype=np.float32))
        operator = NormalOperator(torch.ones((n,) * 3), spectrum)
        x0 = torch.from_numpy(rng.random((1, 1, n, n, n), dtype=np.float32))
        y = physics.A(x0)
        base = tv_patch_solver(physics, x0, 3, REGULARIZATION)
        recon = PartitionedReconstructor(base, patch_size=MEMORY_PATCH, init=x0)
        wrapped = DiagCirculantWrapper(physics, operator=operator)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or it would hide what is allocated
        _forget_peak()
        before = _status("VmRSS")
        peaks = {"global": 0.0, "patches": 0.0}
        for update in recon.stream(y, wrapped):
            # The first update comes after A, the second after Aᵀ and one patch.
            part = "global" if update.step <= 1 else "patches"
            peaks[part] = max(peaks[part], _status("VmHWM"))
            _forget_peak()
            if update.step == 20:
                break
    volume, projections = x0.nbytes / 2**20, y.nbytes / 2**20
    return {
        "size": size,
        "volume MB": volume,
        "projections MB": projections,
        "patches: beyond 3 volumes MB": peaks["patches"] - before - 3 * volume,
        "global step: MB": peaks["global"] - before,
        "global step: volumes": (peaks["global"] - before - projections) / volume,
    }


def _forget_peak() -> None:
    """The peak starts again from what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(title)
    widths = [max(len(name), *(len(_text(row.get(name))) for row in rows)) for name in names]
    for line in [dict(zip(names, names, strict=True)), *rows]:
        print("  ".join(_text(line.get(name)).ljust(width) for name, width in zip(names, widths, strict=True)))
    print()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--memory"]:
        print(json.dumps(_measure(int(arguments[1]), int(arguments[2]))))
    else:
        numbers = [int(a) for a in arguments]
        run(size=numbers[0] if numbers else 64, views=numbers[1] if len(numbers) > 1 else 60)
