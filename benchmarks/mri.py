"""Multi-coil MRI of synthetic objects: zero-filled, CG-SENSE, total variation, and networks, whole and by patches.

    napari-recon bench mri              (or python -m benchmarks.mri [SIZE [OBJECTS [ACCELERATION ...]]])
    python -m benchmarks.mri FILE [PICTURE.png]

K-space of 8 coils at a signal-to-noise ratio of 30, Poisson-disc sampling, coil maps known: a head of a seed that no
network was trained on, and two phantoms of another generator, with other shapes, contrasts, phases and coils. What
there is to tune is tuned on another head and another phantom of half the size. PSNR and SSIM are of magnitudes, their
data range the truth's largest; PSNR within the object (the truth above 5 % of its largest), SSIM over the whole volume.
Memory is the peak while a method runs over what was held before; the fit of H is not in its rows. Times are of one run
each.

With a file, one slice of measured k-space: a twentieth of the samples outside the calibration region is left out, and
methods are judged by their residual on these, ours beside sigpy's own, each at the best of its weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from napari_recon.jobs.memory import peak_memory, release_memory, reset_peak
from napari_recon.learning.networks import load_weights
from napari_recon.learning.simulate_mri import SimulatedMRI, simulate_mri
from napari_recon.learning.weights import shipped_weights
from napari_recon.physics.coil_maps import estimate_coil_maps
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, fit_normal_operator
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.sense import CGSense, ZeroFilled
from napari_recon.reconstruction.streaming import StreamingReconstructor
from napari_recon.reconstruction.tv import TV, tv_patch_solver
from napari_recon.scans import open_scan
from napari_recon.scans.kspace import middle, to_image, to_kspace

OBJECTS = (("head", 1_000_001), ("textured-ellipsoids", 101), ("textured-walnut", 101))
TUNING = (("head", 1_000_201), ("textured-ellipsoids", 201))
"""At half the size, which takes an eighth of the time; weights and steps are relative."""
WEIGHTS = (1e-3, 2e-3, 4e-3, 8e-3)
SEED = 1000
"""Of the samples that are left out."""

Method = Callable[[Tensor, MultiCoilMRI], Tensor]
_OPERATORS: dict[MultiCoilMRI, NormalOperator] = {}


def judge(x: Tensor, simulated: SimulatedMRI) -> tuple[float, float]:
    """PSNR in dB and SSIM of magnitudes."""
    found, true = torch.linalg.vector_norm(x[0], dim=0), torch.from_numpy(simulated.truth).abs()
    inside, largest = true > 0.05 * true.max(), float(true.max())
    error = float((found - true)[inside].square().mean())
    ssim = structural_similarity(found.numpy(), true.numpy(), data_range=largest)
    return 10 * math.log10(largest**2 / error), float(ssim)


def learned(file: Path, **changes: Any) -> Method:
    """A trained method; ``operator=True`` uses H in the second pass."""
    model = load_weights(file).model
    with_h = changes.pop("operator", False)
    for name, value in changes.items():
        assert hasattr(model, name), name
        setattr(model, name, value)
    return lambda y, a: model(y, a, operator=operator_of(a)) if with_h else model(y, a)


def methods(size: int, tuning: list[tuple[SimulatedMRI, Tensor, MultiCoilMRI]]) -> dict[str, Method]:
    """All rows; weights of total variation and the steps of CG-SENSE are those that suit the tuning scans best."""

    def tuned(name: str, make: Callable[[float], Method], values: tuple[float, ...]) -> Method:
        found = {v: np.mean([judge(make(v)(y, a), made)[0] for made, y, a in tuning]) for v in values}
        best = max(found, key=lambda v: found[v])
        print(f"  tuned: {name}: {best:g} of {values}", file=sys.stderr, flush=True)
        return make(best)

    patch, stride, steps = size // 2, size // 3, 12
    rows: dict[str, Method] = {
        "zero-filled": lambda y, a: ZeroFilled()(y, a),
        "root of the sum of squares": lambda y, a: ZeroFilled("root-sum-of-squares")(y, a),
    }
    rows["CG-SENSE"] = tuned("CG-SENSE", lambda n: lambda y, a: CGSense(int(n))(y, a), (4, 8, 12))
    rows["PADMM, 30 iterations"] = tuned("PADMM", lambda w: PADMM(30, w), WEIGHTS)
    rows["TV of the two parts, whole, 24 steps"] = tuned("TV", lambda w: TV(2 * steps, w, nonnegative=False), WEIGHTS)

    def by_patches(y: Tensor, a: MultiCoilMRI, operator: NormalOperator | None = None) -> Tensor:
        start = CGSense()(y, a)
        solver = tv_patch_solver(a, start, steps, WEIGHTS[1], nonnegative=False)
        method = PartitionedReconstructor(solver, patch_size=patch, passes=2)
        wrapped = a if operator is None else DiagCirculantWrapper(a, operator=operator)
        return method(y, wrapped, init=start)

    rows[f"TV by patches of {patch}, exact, 2 x {steps} steps"] = by_patches
    rows[f"TV by patches of {patch}, H, 2 x {steps} steps"] = lambda y, a: by_patches(y, a, operator_of(a))
    post, shipped = Path(__file__).parent / "weights" / "mri_post.safetensors", shipped_weights().get("mri")
    if post.exists():
        rows["post-processing of CG-SENSE"] = learned(post, patch_size=None)
    if (first := shipped_weights().get("start_mri")) is not None:
        rows["unrolled from CG-SENSE, whole volume"] = learned(first, patch_size=None, passes=1)
    if shipped is not None:
        rows["unrolled, whole volume"] = learned(shipped, patch_size=None, passes=1)
        partitioned = partial(learned, shipped, patch_size=patch, stride=stride)
        rows["unrolled by patches, one pass"] = partitioned(passes=1)
        rows["unrolled by patches, two passes, exact"] = partitioned(passes=2)
        rows["unrolled by patches, two passes, H"] = partitioned(passes=2, operator=True)
    return rows


def operator_of(physics: MultiCoilMRI) -> NormalOperator:
    """H, fitted once to each scan, as a job fits it."""
    if physics not in _OPERATORS:
        _OPERATORS.clear()
        began = time.perf_counter()
        fitted = fit_normal_operator(physics, probes=4, iterations=2, positions=3, seed=0)
        print(f"  H fitted in {time.perf_counter() - began:.0f} s: {fitted.errors}", file=sys.stderr, flush=True)
        _OPERATORS[physics] = fitted
    return _OPERATORS[physics]


def run(size: int = 96, objects: int = len(OBJECTS), *accelerations: int) -> list[dict[str, Any]]:
    """Print a table of every method's mean over the objects, for each acceleration."""
    table: list[dict[str, Any]] = []
    for acceleration in accelerations or (5, 10):
        scans = [_scan(*each, size // 2, acceleration) for each in TUNING]
        rows = methods(size, scans)
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in rows}
        for kind, seed in OBJECTS[:objects]:
            made, y, physics = _scan(kind, seed, size, acceleration)
            operator_of(physics)  # whose fit is not in the rows
            for name, method in rows.items():
                release_memory()
                reset_peak()
                held, began = peak_memory(), time.perf_counter()
                x = method(y, physics)
                spent = time.perf_counter() - began, (peak_memory() - held) / 1e6
                found[name].append((*judge(x, made), *spent))
                psnr, ssim, seconds, megabytes = found[name][-1]
                told = f"{psnr:6.2f} dB  SSIM {ssim:.3f} {seconds:7.1f} s {megabytes:6.0f} MB"
                print(f"  {kind:20s} R = {acceleration:2d}  {name:44s} {told}", file=sys.stderr, flush=True)
        print(f"\nR = {acceleration}, {size}³, mean of {objects} objects", flush=True)
        for name, each in found.items():
            psnr, ssim, seconds, megabytes = map(float, np.mean(each, axis=0))
            mean = {"psnr": psnr, "ssim": ssim, "seconds": seconds, "MB": megabytes}
            table.append({"acceleration": acceleration, "method": name, **mean, "psnrs": [e[0] for e in each]})
            print(f"  {name:44s} {psnr:6.2f} dB  SSIM {ssim:.3f} {seconds:7.1f} s {megabytes:6.0f} MB", flush=True)
    return table


def _scan(kind: str, seed: int, size: int, acceleration: float) -> tuple[SimulatedMRI, Tensor, MultiCoilMRI]:
    made = simulate_mri(kind, seed, size, acceleration)
    return made, made.scan.measurements(), MultiCoilMRI.from_scan(made.scan)


def held_out(path: Path, picture: Path | None = None) -> None:
    """Print the residuals on samples that were left out, and draw the slices side by side."""
    import sigpy.mri.app as sigpy

    scan = open_scan(path)
    z, calibration = scan.shape[1] // 2, (1, *scan.calibration[1:])
    # One slice: the image's, where slices were measured one by one.
    kspace = to_image(scan.kspace, (1,))[:, z : z + 1] if scan.shape[1] > 1 else scan.kspace
    kspace = kspace / np.abs(kspace).max()
    mask = scan.mask[z : z + 1]
    left_out = mask & (np.random.default_rng(SEED).random(mask.shape) < 0.05)
    left_out[tuple(middle(n, c) for n, c in zip(mask.shape, calibration, strict=True))] = False
    seen = mask & ~left_out
    maps = estimate_coil_maps(kspace * seen, calibration)
    physics, others = MultiCoilMRI(seen, maps, device="cpu"), MultiCoilMRI(left_out, maps, device="cpu")
    y = torch.from_numpy(np.stack([kspace.real, kspace.imag]))[None]
    slices: dict[str, NDArray[Any]] = {}

    def ours(method: StreamingReconstructor) -> tuple[float, NDArray[Any]]:
        x = method(y * physics.mask[:, :, None], physics)
        wanted = others.mask[:, :, None] * y
        return float((others.A(x) - wanted).norm() / wanted.norm()), torch.linalg.vector_norm(x[0, :, 0], dim=0).numpy()

    their_maps = sigpy.EspiritCalib((kspace * seen)[:, 0], calib_width=min(calibration[1:]), show_pbar=False).run()

    def theirs(app: Any, weight: float) -> tuple[float, NDArray[Any]]:
        x = app((kspace * seen)[:, 0], their_maps, lamda=weight, show_pbar=False).run()
        wanted = (left_out * kspace)[:, 0]
        error = left_out[0] * to_kspace(their_maps * x, (1, 2)) - wanted
        return float(np.linalg.norm(error) / np.linalg.norm(wanted)), np.abs(x)

    def told(name: str, tried: dict[float, Callable[[], tuple[float, NDArray[Any]]]]) -> None:
        found = {setting: make() for setting, make in tried.items()}
        best = min(found, key=lambda setting: found[setting][0])
        slices[name] = found[best][1]
        print(f"{name:32s} residual on samples left out {found[best][0]:.4f}  (at {best:g})", flush=True)

    print(f"{path.name}: {physics}")
    told("zero-filled", {0: lambda: ours(ZeroFilled())})
    told("CG-SENSE", {n: lambda n=n: ours(CGSense(n)) for n in (4, 8, 12)})  # type: ignore[misc]
    told("PADMM", {w: lambda w=w: ours(PADMM(30, w)) for w in (1e-3, 3e-3, 1e-2)})  # type: ignore[misc]
    if (shipped := shipped_weights().get("mri")) is not None:
        model = load_weights(shipped).model
        model.patch_size = None
        told("unrolled network", {0: lambda: ours(model)})
    for name, app, weights in (
        ("sigpy SENSE", sigpy.SenseRecon, (1e-3, 1e-2, 1e-1)),
        ("sigpy total variation", sigpy.TotalVariationRecon, (1e-4, 3e-4, 1e-3)),
        ("sigpy wavelets", sigpy.L1WaveletRecon, (3e-4, 1e-3, 3e-3)),
    ):
        told(name, {w: lambda w=w, app=app: theirs(app, w) for w in weights})  # type: ignore[misc]
    if picture is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(slices), 5), layout="constrained")
        for axes, (name, image) in zip(figure.subplots(1, len(slices)), slices.items(), strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=np.quantile(image, 0.998))
            axes.set_title(name)
            axes.set_axis_off()
        figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) > 1 and Path(sys.argv[1]).exists():
        held_out(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    else:
        run(*map(int, sys.argv[1:]))
