"""The shipped networks in bfloat16 beside float32: what it costs in dB, and in seconds on this machine.

    napari-recon bench precision              (or python -m benchmarks.precision [SIZE])

Objects, sampling and judging as in ``bench quality`` and ``bench mri``, by patches of 48. Only the network computes in
bfloat16, the physics never. Both start from the same volume; seconds are CPU time of the network and its data steps.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.mri import judge
from benchmarks.quality import EVALUATION, Scanner, figures
from napari_recon.learning.networks import load_weights
from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.learning.weights import find_weights
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.reconstruction.start import start_volume

VIEWS = (6, 10, 20)
"""For a volume of 96 voxels; as many a voxel at other sizes."""
MRI = ((("head", 1_000_001), 5.0), (("textured-ellipsoids", 101), 5.0), (("head", 1_000_001), 10.0))


@torch.no_grad()
def run(size: int = 96) -> list[dict[str, Any]]:
    """Reconstruct every object both ways; prints the table."""
    rows = []
    model: Any = load_weights(find_weights("unrolled")).model.eval()
    for views in VIEWS:
        scanner = Scanner(size, max(3, round(views * size / 96)))
        for kind, seed in EVALUATION[:2]:
            truth, y = scanner.scan(kind, seed)
            start = start_volume("tv", y, scanner.xray)
            found = _both(model, y, scanner.xray, start, ramp=scanner.ramp)
            psnr = [figures(x, truth)["psnr"] for x, _ in found]
            rows.append(_row(f"{kind}, {scanner.views} views", psnr, [t for _, t in found]))
    model = load_weights(find_weights("mri")).model.eval()
    for (kind, seed), acceleration in MRI:
        made = simulate_mri(kind, seed, size, acceleration, 8, 30.0)
        y, physics = made.scan.measurements(), MultiCoilMRI.from_scan(made.scan, "cpu")
        found = _both(model, y, physics, start_volume(model.init, y, physics))
        rows.append(
            _row(f"MRI {kind}, R = {acceleration:g}", [judge(x, made)[0] for x, _ in found], [t for _, t in found])
        )
    return rows


def _both(model: Any, y: Tensor, physics: Any, start: Tensor, **options: Any) -> list[tuple[Tensor, float]]:
    """The volumes of float32 and of bfloat16, with their seconds of CPU time."""
    model.patch_size = 48
    found = []
    for mixed in (False, True):
        model.mixed_precision = mixed
        begun = time.process_time()
        found.append((model(y, physics, init=start, **options), time.process_time() - begun))
    return found


def _row(name: str, psnr: list[float], seconds: list[float]) -> dict[str, Any]:
    print(
        f"{name:36s} float32 {psnr[0]:6.2f} dB {seconds[0]:6.1f} s  bfloat16 {psnr[1]:6.2f} dB {seconds[1]:6.1f} s  "
        f"difference {psnr[1] - psnr[0]:+.3f} dB",
        flush=True,
    )
    return {"object": name, "float32": psnr[0], "bfloat16": psnr[1], "seconds": seconds}


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
