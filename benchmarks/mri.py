"""Multi-coil MRI of synthetic objects: classical methods, and patches with AᵀA against patches with H.

    python -m benchmarks.mri [SIZE] [KIND] [ACCELERATION ...]
    python -m benchmarks.mri FILE [PICTURE.png]

K-space of 8 coils at a signal-to-noise ratio of 30, Poisson-disc sampling. PSNR and SSIM are of magnitudes, their data
range the truth's largest; PSNR within the object (the truth above 5 % of its largest), SSIM over the whole volume.
Times are of one run each.

With a file, one slice of measured k-space: a twentieth of the samples outside the calibration region is left out, and
methods are judged by their residual on these, ours beside sigpy's own, each at the best of its weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from napari_recon.learning.simulate_mri import SimulatedMRI, simulate_mri
from napari_recon.physics.coil_maps import estimate_coil_maps
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.normal import DiagCirculantWrapper, fit_normal_operator
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.sense import CGSense, ZeroFilled
from napari_recon.reconstruction.streaming import StreamingReconstructor
from napari_recon.reconstruction.tv import TV, tv_patch_solver
from napari_recon.scans import open_scan
from napari_recon.scans.kspace import middle, to_image, to_kspace

SEED, STEPS, WEIGHT = 1000, 12, 2e-3


def judge(x: Tensor, simulated: SimulatedMRI) -> tuple[float, float]:
    """PSNR in dB and SSIM of magnitudes."""
    found, true = torch.linalg.vector_norm(x[0], dim=0), torch.from_numpy(simulated.truth).abs()
    inside, largest = true > 0.05 * true.max(), float(true.max())
    error = float((found - true)[inside].square().mean())
    ssim = structural_similarity(found.numpy(), true.numpy(), data_range=largest)
    return 10 * math.log10(largest**2 / error), float(ssim)


def run(size: int = 48, kind: str = "head", acceleration: float = 5.0) -> None:
    """Print a table of one scan."""
    simulated = simulate_mri(kind, SEED, size, acceleration)
    scan = simulated.scan
    y, weight = scan.measurements(), WEIGHT

    def told(name: str, make: Callable[[], Tensor]) -> Tensor:
        began = time.perf_counter()
        x = make()
        seconds = time.perf_counter() - began
        psnr, ssim = judge(x, simulated)
        print(f"{name:44s} {psnr:6.2f} dB   SSIM {ssim:.4f}   {seconds:7.2f} s", flush=True)
        return x

    began = time.perf_counter()
    estimated = MultiCoilMRI.from_scan(scan, coil_maps=estimate_coil_maps(scan.kspace, scan.calibration))
    physics = MultiCoilMRI.from_scan(scan)
    print(f"{kind}, {physics}; ESPIRiT {time.perf_counter() - began:.1f} s")
    for name, a in (("maps known", physics), ("maps by ESPIRiT", estimated)):
        told(f"zero-filled, {name}", lambda a=a: ZeroFilled()(y, a))  # type: ignore[misc]
        told(f"CG-SENSE, {name}", lambda a=a: CGSense()(y, a))  # type: ignore[misc]
        told(f"PADMM, {name}", lambda a=a: PADMM(20, weight)(y, a))  # type: ignore[misc]
    told("root of the sum of squares", lambda: ZeroFilled("root-sum-of-squares")(y, physics))
    told(f"TV whole, {2 * STEPS} steps", lambda: TV(2 * STEPS, weight, nonnegative=False)(y, physics))
    began = time.perf_counter()
    normal = fit_normal_operator(physics)
    print(f"H fitted in {time.perf_counter() - began:.1f} s: {normal.errors}")
    wrapper = DiagCirculantWrapper(physics, operator=normal)
    start = CGSense()(y, physics)
    solver = tv_patch_solver(physics, start, STEPS, weight, nonnegative=False)
    patches = PartitionedReconstructor(solver, patch_size=size // 2, passes=2)
    for name, a in (("AᵀA", physics), ("H", wrapper)):
        told(f"TV by patches of {size // 2} with {name}, 2 x {STEPS} steps", lambda a=a: patches(y, a))  # type: ignore[misc]


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
        sys.exit()
    chosen = [float(a) for a in sys.argv[3:]] or [5.0, 10.0]
    for acceleration in chosen:
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 48, sys.argv[2] if len(sys.argv) > 2 else "head", acceleration)
