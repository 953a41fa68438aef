"""Which data step gets furthest in the same time, without any network: plain, ramp-filtered, by the fitted H's inverse.

    napari-recon bench data_steps        (or python -m benchmarks.data_steps [SIZE])

Least squares with x ≥ 0 from FDK, on two of the objects of benchmarks.quality at 6, 10 and 19 views (for 96 voxels).
PSNR after BUDGETS seconds (the state before a step that would end later), and the best PSNR on the way with its time.
What is made once for a geometry (norms, filters, the fit of H) is not counted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import EVALUATION, VIEWS, Scanner, figures
from napari_recon.physics.normal import fit_normal_operator
from napari_recon.reconstruction.fdk import FDK

BUDGETS = (0.1, 0.3, 1.0)
INNER = 4
"""Conjugate-gradient steps that apply the inverse of H."""
RIDGE = 0.03
"""What is added to H, relative to its norm, so that the inverse exists."""


def run(size: int = 96) -> list[dict[str, Any]]:
    """Time every variant at every number of views; prints the means over the objects."""
    return [row for v in VIEWS for row in _compare(Scanner(size, max(1, round(size * v / 501))))]


def _compare(scanner: Scanner) -> list[dict[str, Any]]:
    rows = []
    scans = [scanner.scan(*each) for each in (EVALUATION[0], EVALUATION[1])]
    for name, step in _steps(scanner).items():
        for accelerated in (False, True):
            tracks = [_track(step, accelerated, FDK()(y, scanner.xray), y, truth) for truth, y in scans]
            at = {
                f"{b:g} s": float(np.mean([max(t for t in track if t[0] <= b)[1] for track in tracks])) for b in BUDGETS
            }
            best = np.mean([max(track, key=lambda t: t[1]) for track in tracks], axis=0)
            label = name + (", accelerated" if accelerated else "")
            rows.append({"views": scanner.views, "step": label, **at, "best": float(best[1]), "after": float(best[0])})
            told = "  ".join(f"{key}: {value:6.2f} dB" for key, value in at.items())
            print(
                f"{scanner.views:3d} views  {label:28s} {told}  best {best[1]:6.2f} dB after {best[0]:.2f} s",
                flush=True,
            )
    return rows


def _steps(scanner: Scanner) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Directions at x, each of such a length that a step of 1 is stable."""
    from deepinv.optim.linear import conjugate_gradient

    xray, ramp, norm = scanner.xray, scanner.ramp, scanner.xray.sqnorm
    operator = fit_normal_operator(xray, probes=4, iterations=2, positions=3, seed=0)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return xray.A_adjoint(xray.A(x) - y) / norm

    def filtered(x: Tensor, y: Tensor) -> Tensor:
        return ramp.A_adjoint(ramp.A(x) - ramp.measurement(y))

    def ridged(x: Tensor) -> Tensor:
        return operator.apply(x) / norm + RIDGE * x

    def inverse(x: Tensor, y: Tensor) -> Tensor:
        direction: Tensor = conjugate_gradient(ridged, plain(x, y), max_iter=INNER, tol=1e-6)
        return direction

    v = torch.rand((1, *xray.img_size), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(1, 1, *xray.measurement_shape)
    for _ in range(8):  # the largest eigenvalue of (H + ridge)⁻¹ AᵀA
        v = inverse(v / v.norm(), nothing)
    largest = 1.05 * float(v.norm())
    return {"plain": plain, "ramp-filtered": filtered, "inverse of H": lambda x, y: inverse(x, y) / largest}


def _track(
    step: Callable[[Tensor, Tensor], Tensor], accelerated: bool, x: Tensor, y: Tensor, truth: Tensor
) -> list[tuple[float, float]]:
    """(seconds, PSNR) after every step; judging takes no time."""
    x = x.clamp(min=0)
    step(x, y)  # the first use compiles and plans
    found, spent, z, t = [(0.0, figures(x, truth)["psnr"])], 0.0, x, 1.0
    while spent < max(BUDGETS):
        begun = time.perf_counter()
        x_next = (z - step(z, y)).clamp(min=0)
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2 if accelerated else 1.0
        z, x, t = x_next + (t - 1) / t_next * (x_next - x), x_next, t_next
        spent += time.perf_counter() - begun
        found.append((spent, figures(x, truth)["psnr"]))
    return found


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
