"""The normal operator's approximation: how far off it is, what it changes in a reconstruction, and what it saves.

    python -m benchmarks.normal [speed|fit|reconstruction|errors] [SIZE ...]

Geometry: circular cone beam, source-object 66 mm, source-detector 199 mm, field of view 24.3 mm at every size. H is
fitted on random volumes (seed 0). Held out: Gaussian white noise (the fit draws signs), a Shepp-Logan phantom, a
walnut-like anatomy (seed 7), and the patch residual: what FDK of the anatomy's exact projections is off the truth, on
patches of half the size at the middle, at a corner and at a side. Errors are ‖AᵀAx − Hx‖ / ‖AᵀAx‖ over the volume;
for patches also over the patch alone, which is what a partitioned data step meets. Data ranges do not enter.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.partitioned import EXTENT, ITERATIONS, NOISE, REGULARIZATION, SEED, _status, scan, show
from napari_recon.jobs.memory import reset_peak
from napari_recon.jobs.reconstruct import QUICK_FIT
from napari_recon.learning.phantoms import Phantom, make_phantom, random_ellipsoids
from napari_recon.physics.normal import (
    DiagCirculantWrapper,
    NormalOperator,
    fft_shape,
    fit_normal_operator,
    stream_normal_operator_fit,
)
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.tv import tv_patch_solver

VIEWS = (30, 60, 120, 360)
FITS: dict[str, dict[str, Any]] = {
    "computed start": {"positions": 1, "iterations": 0, "distribution": "white"},
    "1 kernel, white (the paper's distribution)": {"distribution": "white"},
    "1 kernel": {},
    "1 kernel, quick (a job's own fit)": QUICK_FIT,
    "3 kernels": {"terms": 3},
    "3 kernels, quick": {"terms": 3, **QUICK_FIT},
    "3 kernels, 16 probes": {"terms": 3, "probes": 16, "iterations": 8},
}
LARGEST = {"3 kernels": 64, "3 kernels, 16 probes": 48}
"""The largest volumes that a fit is made for: the others take minutes for each."""

Patch = tuple[slice, slice, slice]


def run(part: str = "", sizes: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """All parts, or one; prints their tables."""
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "speed": lambda: speed(sizes or (128, 256)),
        "memory": lambda: [memory_of(n) for n in sizes or (64, 128, 256)],
        "fit": lambda: fit_time((sizes or (128,))[0]),
        "reconstruction": lambda: reconstruction((sizes or (64,))[0]),
        "errors": lambda: errors(sizes or (48, 64, 128)),
    }
    rows = []
    for name, measure in parts.items():
        if part in ("", name):
            found = measure()
            show(name, found)
            rows += [{"part": name, **row} for row in found]
    return rows


# -- one patch: speed, exactness, memory -------------------------------------------------------------------------------


def speed(sizes: tuple[int, ...], patch: int = 64, views: int = 120) -> list[dict[str, Any]]:
    """AᵀA against H on a patch in the middle: on the rays that meet it, and as projections of the whole volume."""
    rows = []
    for size in sizes:
        physics = scan(size, views)
        start = (size - patch) // 2
        box = (slice(start, start + patch),) * 3
        generator = torch.Generator().manual_seed(SEED)
        x = torch.rand((1, 1, patch, patch, patch), generator=generator)
        whole = torch.zeros((1, 1, size, size, size))
        whole[(..., *box)] = x
        restricted = physics.restrict(box)
        steps = {"AᵀA on the patch's rays": lambda r=restricted, x=x: r.A_adjoint_A(x)}
        steps["AᵀA of the whole volume"] = lambda p=physics, w=whole: p.A_adjoint_A(w)
        for terms in (1, 3):
            operator = random_operator(size, terms)
            h = operator.patch(box)
            steps[f"H, {terms} kernel{'s' if terms > 1 else ''}"] = lambda h=h, x=x: h(x)
            error = float((operator(whole)[(..., *box)] - h(x)).norm() / h(x).norm())
            rows.append({"volume": f"{size}^3", "step": f"S H Sᵀ, {terms} kernels", "patch H off by": error})
            del operator
        seconds = {name: best_of(step) for name, step in steps.items()}
        for name, value in seconds.items():
            ratios = {f"{k.split(',')[0]} {k[-9:].strip()}": value / seconds[k] for k in list(seconds)[2:]}
            rows.append(
                {"volume": f"{size}^3", "step": name, "ms": 1000 * value} | {f"/ {k}": v for k, v in ratios.items()}
            )
    return rows


def random_operator(size: int, terms: int) -> NormalOperator:
    """Any m and symmetric kernels of the whole volume's size: a kernel's values change nothing in its cost."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = fft_shape((size,) * 3)
    spectra = torch.rand((terms, *lengths[:-1], lengths[-1] // 2 + 1), generator=generator)
    mask = torch.rand((size,) * 3, generator=generator)
    return NormalOperator(mask, spectra if terms > 1 else spectra[0])


def best_of(step: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest of some runs, after one that is not counted: other work on the machine only ever adds."""
    step()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
        if sum(seconds) > 20:
            break
    return min(seconds)


def memory_of(size: int) -> dict[str, Any]:
    """Peak memory of H on a patch of 64³ (cropping it once, then applying it), in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.normal", "--memory", str(size)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: dict[str, Any] = json.loads(out.splitlines()[-1])
    return row


def _memory(size: int, patch: int = 64) -> dict[str, Any]:
    x = torch.rand((1, 1, patch, patch, patch))
    operator = random_operator(size, 1)
    reset_peak()
    before = _status("VmRSS")
    h = operator.patch((slice(size - patch, size),) * 3)
    crop = _status("VmHWM") - before
    h(x)
    reset_peak()
    before = _status("VmRSS")
    for _ in range(3):
        h(x)
    kept = (h.fourier_filter.nbytes + h.spatial_mask.nbytes) / 2**20
    return {"volume": f"{size}^3", "kept MB": kept, "applying MB": _status("VmHWM") - before, "cropping once MB": crop}


# -- the fit -----------------------------------------------------------------------------------------------------------


def fit_time(size: int, views: int = 60) -> list[dict[str, Any]]:
    """Seconds of the fit of one kernel, and its errors over those of one with far more probes and iterations."""
    physics = scan(size, views)
    held_out = volumes(physics)
    rows = []
    for label, options in (("converged", {"probes": 24, "iterations": 10}), ("quick", QUICK_FIT), ("default", {})):
        begin = time.perf_counter()
        operator = None
        for update in stream_normal_operator_fit(physics, seed=SEED, **options):
            operator = update.operator
        seconds = time.perf_counter() - begin
        assert operator is not None
        row = {"volume": f"{size}^3", "views": views, "fit": label, "seconds": seconds}
        found = errors_of(operator, physics, held_out)
        if not rows:
            best = found
        rows.append(row | found | {f"{k} / converged": found[k] / best[k] for k in ("white", "anatomy", "patch")})
    return rows


def errors(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The table of errors: sizes, views, forms."""
    rows = []
    for size in sizes:
        for views in VIEWS:
            physics = scan(size, views)
            held_out = volumes(physics)
            for label, options in FITS.items():
                if size > LARGEST.get(label, size):
                    continue
                begin = time.perf_counter()
                operator = fit_normal_operator(physics, seed=SEED, **options)
                seconds = time.perf_counter() - begin
                row = {"size": size, "views": views, "fit": label, "seconds": seconds}
                rows.append(row | errors_of(operator, physics, held_out))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def volumes(physics: XRayTransform) -> dict[str, Any]:
    """Held-out volumes with AᵀA of each; patch residuals as (box, x, AᵀAx)."""
    size = physics.grid.shape[0]
    generator = torch.Generator().manual_seed(SEED + 1)
    noise = torch.randn((1, 1, size, size, size), generator=generator)
    radius = 0.42 * EXTENT
    logan, anatomy = make_phantom("shepp-logan", radius=radius), make_phantom("walnut", seed=7, radius=radius)
    found: dict[str, Any] = {
        name: (x, physics.A_adjoint_A(x))
        for name, x in {
            "white": noise,
            "Shepp-Logan": sampled(logan, physics),
            "anatomy": sampled(anatomy, physics),
        }.items()
    }
    residual = sampled(anatomy, physics) - FDK()(measured(anatomy, physics), physics)
    half, quarter = size // 2, size // 4
    for name, corner in {"middle": (quarter,) * 3, "corner": (0, 0, 0), "side": (half, quarter, half)}.items():
        box = tuple(slice(a, a + half) for a in corner)
        x = torch.zeros_like(residual)
        x[(..., *box)] = residual[(..., *box)]
        found[name] = (x, physics.A_adjoint_A(x), box)
    return found


def sampled(phantom: Phantom, physics: XRayTransform) -> torch.Tensor:
    return torch.from_numpy(phantom.volume(physics.grid))[None, None].float()


def measured(phantom: Phantom, physics: XRayTransform) -> torch.Tensor:
    return torch.from_numpy(phantom.project(physics.geometry)).transpose(0, 1).contiguous()[None, None].float()


def errors_of(operator: NormalOperator, physics: XRayTransform, held_out: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    whole, alone = [], []
    for name, (x, exact, *box) in held_out.items():
        error = operator(x).sub_(exact)
        relative = float(error.norm() / exact.norm())
        if not box:
            found[name] = relative
            continue
        inside = (..., *box[0])
        whole.append(relative)
        alone.append(float(error[inside].norm() / exact[inside].norm()))
        if name == "middle":
            found["patch, middle"] = alone[-1]
    found["patch"] = math.sqrt(sum(e * e for e in alone) / len(alone))
    found["patch, whole volume"] = math.sqrt(sum(e * e for e in whole) / len(whole))
    return found


# -- what H changes in a reconstruction --------------------------------------------------------------------------------


def reconstruction(size: int) -> list[dict[str, Any]]:
    """TV by patches of half the size with H against the same with AᵀA, as a job runs it (3 passes)."""
    rows = []
    for views in VIEWS[:3]:
        physics = scan(size, views)
        phantom = random_ellipsoids(SEED, radius=EXTENT * 0.42)
        truth, y = sampled(phantom, physics), measured(phantom, physics)
        y += NOISE * y.max() * torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED))
        axis = (torch.arange(size) - (size - 1) / 2) * physics.grid.voxel_size
        disc = (axis[:, None] ** 2 + axis**2).sqrt() < physics.geometry.field_of_view_radius - physics.grid.voxel_size
        inside = disc & (axis.abs() < 0.4 * EXTENT)[:, None, None]

        def psnr(x: torch.Tensor, truth: torch.Tensor = truth, inside: torch.Tensor = inside) -> float:
            error = float((x - truth)[0, 0][inside].square().mean())
            return 20 * math.log10(float(truth.max())) - 10 * math.log10(error)

        x_fdk = FDK()(y, physics)
        base = tv_patch_solver(physics, x_fdk, math.ceil(ITERATIONS / 3), REGULARIZATION)
        recon = PartitionedReconstructor(base, patch_size=size // 2, init=x_fdk, passes=3)
        begin = time.perf_counter()
        x_exact = recon(y, physics)
        slow = time.perf_counter() - begin
        row = {"size": size, "views": views}
        rows.append({**row, "data step": "FDK, the start", "PSNR dB": psnr(x_fdk)})
        rows.append({**row, "data step": "exact", "PSNR dB": psnr(x_exact), "seconds": slow})
        for label, options in (("1 kernel", {}), ("1 kernel, quick", QUICK_FIT), ("3 kernels", {"terms": 3})):
            wrapped = DiagCirculantWrapper(physics, operator=fit_normal_operator(physics, seed=SEED, **options))
            begin = time.perf_counter()
            x = recon(y, wrapped)
            seconds = time.perf_counter() - begin
            rows.append(
                {
                    **row,
                    "data step": f"H, {label}",
                    "PSNR dB": psnr(x),
                    "off exact": float((x - x_exact).norm() / (x_exact - x_fdk).norm()),
                    "seconds": seconds,
                    "exact / H": slow / seconds,
                }
            )
    return rows


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--memory"]:
        print(json.dumps(_memory(int(arguments[1]))))
    else:
        words = [a for a in arguments if not a.isdigit()]
        run(words[0] if words else "", tuple(int(a) for a in arguments if a.isdigit()))
