"""Warm-started, preconditioned ADMM against other methods for the same minimiser, from several starts.

    napari-recon bench warm-start        (or python -m benchmarks.warm_start [SIZE] [OBJECTS])
    python -m benchmarks.warm_start seconds [SIZE...]

Data: textured objects of benchmarks.quality (exact line integrals, 30 000 photons a pixel) and a synthetic anatomy of a
seed that no network was trained on, at 50, 100 and 200 of 501 views scaled to the size; and a Shepp-Logan phantom at
48 voxels and 30 views. All methods minimise ½‖Ax − y‖² + weight · TV(x), x ≥ 0, at the relative weight 1e-3.

x* comes from twenty times as many PADMM steps as it takes to come within 1 %, each with twice the inner steps, and its
optimality is told: by how much 200 steps of FISTA from it lower the objective, how far they move it, and how much
higher PADMM ends from zeros and from the truth after a quarter of the steps. A count is the number of pairs of A and Aᵀ
until the distance to x* *stays* below 2 % or 1 %, with FDK for the unit of the weight and whatever the method sets up;
what the start itself took is told apart (``start_pairs``). Not counted is what belongs to a geometry and is kept: ‖A‖²,
the norm of the ramp-filtered transform, the fit of H. Seconds are those of the same updates, with their
figures; those of the processor are told too, for machines that do other work.

"seconds" is the same for larger volumes: one object, 100 of 501 views, the fast methods, and 80 steps for x*.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_recon.learning.networks import load_weights
from napari_recon.learning.training import EXTENT, DataConfig, _circle, _simulate
from napari_recon.learning.weights import find_weights
from napari_recon.physics.normal import NormalOperator, fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.tv import TV, TVPrior, differences, divergence_adjoint, tv_threshold
from napari_recon.scans.grid import Grid

OBJECTS = [("textured-walnut", 101), ("textured-ellipsoids", 101), ("head", 1_000_001)]
VIEWS = (100, 50, 200)
"""Of a volume of 501 voxels."""
REGULARIZATION = 1e-3
STEPS = {"scalar ADMM": 400, "diagonal ADMM": 400, "PDHG": 400, "FISTA-TV": 250, "PADMM": 80}
"""At most so many."""
RATIOS = (6.0, 10.0, 20.0)
"""Primal over dual step of PDHG, of which the best for each case is told."""

Track = Iterator[Tensor]


class Counted(XRayTransform):
    """An X-ray transform that counts its uses."""

    uses = 0

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.uses += 1
        return super().A(x, **kwargs)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        self.uses += 1
        return super().A_adjoint(y, **kwargs)


class Problem:
    """A scan with its minimiser."""

    def __init__(self, kind: str, seed: int, size: int, views: int) -> None:
        grid = Grid((size,) * 3, EXTENT / size)
        self.physics = Counted(_circle(grid, views), grid, device="cpu")
        self.physics.sqnorm  # noqa: B018  (kept by the transform)
        ((self.truth, self.y),) = _simulate(kind, seed, DataConfig(size=size, thickness=(2.5, 2.5)), [views])
        self.ramp = RampFiltered(self.physics)
        self.fdk = FDK()(self.y, self.physics)
        self.weight = tv_threshold(REGULARIZATION, self.fdk) * self.physics.sqnorm
        self.name = {"object": kind, "seed": seed, "size": size, "views": views}
        self._operator: NormalOperator | None = None

    @property
    def operator(self) -> NormalOperator:
        """H ≈ AᵀA, as a job fits it."""
        if self._operator is None:
            self._operator = fit_normal_operator(self.physics, probes=4, iterations=2, positions=3, seed=0)
        return self._operator

    def objective(self, x: Tensor) -> float:
        residual = XRayTransform.A(self.physics, x) - self.y
        return 0.5 * float(residual.double().square().sum()) + self.weight * float(TVPrior().fn(x))

    def solve(self, steps: int) -> dict[str, float]:
        """Find x*, and tell how far it is from optimal."""
        method = PADMM(steps, REGULARIZATION, inner=16)
        self.best = method(self.y, self.physics)
        further = TV(200, REGULARIZATION, inner=20)(self.y, self.physics, init=self.best)
        least = self.objective(self.best)
        others = [
            self.objective(PADMM(steps // 4, REGULARIZATION)(self.y, self.physics, init=start))
            for start in ("zeros", self.truth)
        ]
        return {
            "objective": least,
            "fista_lowers_it_by": 1 - self.objective(further) / least,
            "fista_moves_it_by": self.distance(further),
            "other_starts_end_higher_by": max(others) / least - 1,
            "residual": float((XRayTransform.A(self.physics, self.best) - self.y).norm() / self.y.norm()),
            "residual_of_truth": float((XRayTransform.A(self.physics, self.truth) - self.y).norm() / self.y.norm()),
            "truth_to_x*": self.distance(self.truth),
            "error_of_x*": self.error(self.best),
        }

    def error(self, x: Tensor) -> float:
        """‖x − truth‖ / ‖truth‖."""
        return float((x - self.truth).norm() / self.truth.norm())

    def distance(self, x: Tensor) -> float:
        """‖x − x*‖ / ‖x*‖."""
        return float((x - self.best).norm() / self.best.norm())


def fista(problem: Problem, start: Tensor, steps: int) -> Track:
    """Our TV, which restarts, with ten inner steps from the last dual."""
    for update in TV(steps, REGULARIZATION).stream(problem.y, problem.physics, init=start):
        yield update.values


def padmm(problem: Problem, start: Tensor, steps: int, preconditioner: Any = "circulant") -> Track:
    """Ours."""
    method = PADMM(steps, REGULARIZATION, preconditioner=preconditioner)
    operator = problem.operator if preconditioner == "operator" else None
    for update in method.stream(problem.y, problem.physics, init=start, operator=operator):
        yield update.values


def pdhg(problem: Problem, start: Tensor, steps: int, ratio: float = 10.0) -> Track:
    """Chambolle and Pock (2011) on A/‖A‖ and ∇/‖∇‖ together, whose squared norm is at most 2."""
    physics, y = problem.physics, problem.y
    FDK()(y, physics)  # the unit of the weight
    norm, gradient = math.sqrt(physics.sqnorm), math.sqrt(12.0)
    weight = problem.weight / physics.sqnorm * gradient
    primal, dual = ratio / math.sqrt(2), 1 / (ratio * math.sqrt(2))
    x = ahead = start.clamp(min=0)
    p, q = torch.zeros_like(y), differences(x) * 0
    yield x
    for _ in range(steps):
        p = (p + dual * (physics.A(ahead) - y) / norm) / (1 + dual)
        q = q + (dual / gradient) * differences(ahead)
        q = q * (weight / q.square().sum(0).sqrt().clamp(min=weight))
        x_next = (x - primal * (physics.A_adjoint(p) / norm + divergence_adjoint(q) / gradient)).clamp(min=0)
        ahead, x = 2 * x_next - x, x_next
        yield x


METHODS: dict[str, tuple[str, Callable[..., Track]]] = {
    "scalar ADMM": ("scalar", partial(padmm, preconditioner="scalar")),
    "diagonal ADMM": ("diagonal", partial(padmm, preconditioner="diagonal")),
    "PDHG": ("none", pdhg),
    "FISTA-TV": ("none", fista),
    "PADMM circulant": ("circulant", padmm),
    "PADMM operator": ("operator", partial(padmm, preconditioner="operator")),
}
STARTS = {
    "scalar ADMM": ("zeros",),
    "diagonal ADMM": ("zeros",),
    "PDHG": ("zeros",),
    "FISTA-TV": ("zeros", "fdk", "network", "truth"),
    "PADMM circulant": ("zeros", "fdk", "network", "unrolled network", "truth", "x*"),
    "PADMM operator": ("zeros", "network"),
}


def starts(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Volumes by name. "network" is the post-processing network whose start is cheapest of those that are there."""
    found: dict[str, Callable[[], Tensor]] = {
        "zeros": lambda: torch.zeros_like(problem.truth),
        "fdk": lambda: FDK()(problem.y, problem.physics),
    }
    folder = Path(__file__).parent / "weights"
    for begin in ("fdk", "least-squares", "tv"):
        file = folder / f"post_{begin}.safetensors"
        if file.exists():
            found["network"] = partial(_learned, problem, file)
            break
    found["unrolled network"] = partial(_learned, problem, find_weights("unrolled"))
    found["truth"] = lambda: problem.truth
    found["x*"] = lambda: problem.best
    return found


def _learned(problem: Problem, file: Path) -> Tensor:
    model = load_weights(file).model
    model.patch_size = None
    if hasattr(model, "passes"):
        model.passes = 1
    return model(problem.y, problem.physics, ramp=problem.ramp).clamp(min=0)


def follow(problem: Problem, updates: Track, uses: int, stop: float = 0.004) -> dict[str, Any]:
    """Pairs and seconds until the distance stays below 2 and 1 %; ends once it is far below.

    ``uses`` are applications of A and Aᵀ that the physics does not see: FDK's back projection.
    """
    problem.physics.uses, seconds, worked, below = 0, 0.0, 0.0, 0
    track: list[tuple[float, float, float, float]] = []
    last = problem.best
    while True:
        begun, busy = time.perf_counter(), time.process_time()
        x = next(updates, None)
        seconds, worked = seconds + time.perf_counter() - begun, worked + time.process_time() - busy
        if x is None:
            break
        last = x
        track.append(((problem.physics.uses + uses) / 2, seconds, worked, problem.distance(x)))
        below = below + 1 if track[-1][3] < stop else 0
        if below >= 8:
            break
    found: dict[str, Any] = {"distance_of_start": track[0][3], "distance_at_end": track[-1][3]}
    for percent in (2, 1):
        far = [i for i, each in enumerate(track) if each[3] >= percent / 100]
        at = far[-1] + 1 if far else 0
        # A start that is near enough takes no solver at all.
        pairs, spent, busy_for, _ = track[at] if at < len(track) else (None, None, None, None)
        found[f"pairs_to_{percent}pct"] = 0 if not far else pairs
        found[f"seconds_to_{percent}pct"] = 0.0 if not far else spent
        found[f"cpu_seconds_to_{percent}pct"] = 0.0 if not far else busy_for
    return found | {"objective_at_end": problem.objective(last)}


def run(size: int = 48, objects: int = len(OBJECTS)) -> dict[str, Any]:
    """Every method from its starts; prints a line each."""
    cases = [("shepp-logan", 5, 48, 30)]
    cases += [(kind, seed, size, round(size * v / 501)) for v in VIEWS for kind, seed in OBJECTS[:objects]]
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    for case in cases:
        problem = Problem(*case)
        problems.append(_solved(problem, 400 if 501 * case[3] > 60 * case[2] else 1000))
        rows += _compare(problem, STARTS)
    return {"rows": rows, "problems": problems, **ratios(rows)}


def run_seconds(sizes: tuple[int, ...] = (64, 128)) -> dict[str, Any]:
    """The fast methods at larger sizes."""
    chosen = ("zeros", "network")
    methods = {"PDHG": ("zeros",), "FISTA-TV": chosen, "PADMM circulant": chosen}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        problem = Problem(*OBJECTS[0], size, round(size * 100 / 501))
        problem.best = PADMM(80, REGULARIZATION)(problem.y, problem.physics)
        print(f"\n{problem.name}", flush=True)
        rows += _compare(problem, methods, RATIOS[1:2])
    return {"rows": rows, **ratios(rows)}


def _solved(problem: Problem, steps: int) -> dict[str, Any]:
    told = problem.solve(steps)
    print(f"\n{problem.name}\n  { ({key: float(f'{value:.3g}') for key, value in told.items()}) }", flush=True)
    return problem.name | told


def _compare(
    problem: Problem, methods: dict[str, tuple[str, ...]], steps_of_pdhg: tuple[float, ...] = RATIOS
) -> list[dict[str, Any]]:
    rows = []
    if "PADMM operator" in methods:
        problem.operator  # noqa: B018  (of a geometry, too)
    for start, make in starts(problem).items():
        if not any(start in each for each in methods.values()):
            continue
        problem.physics.uses = 0
        begun = time.perf_counter()
        x = make()
        taken, uses = time.perf_counter() - begun, problem.physics.uses
        uses += start in ("fdk", "network", "unrolled network")  # their FDK
        for method, (preconditioner, track) in METHODS.items():
            if start not in methods.get(method, ()):
                continue
            steps = STEPS[method.split(" circ")[0].split(" oper")[0]]
            if method == "PDHG":
                tries = [follow(problem, track(problem, x, steps, ratio=ratio), 1) for ratio in steps_of_pdhg]
                found = min(tries, key=lambda each: each["pairs_to_1pct"] or math.inf)
            else:
                found = follow(problem, track(problem, x, steps), 1)
            row = problem.name | {
                "method": method,
                "preconditioner": preconditioner,
                "start": start,
                "start_pairs": uses / 2,
                "start_seconds": taken,
                "error_of_start": problem.error(x),
                **found,
            }
            rows.append(row)
            print(
                f"  {method:16s} from {start:17s} ({100 * row['distance_of_start']:5.1f} %)  to 2 %: "
                f"{row['pairs_to_2pct']!s:>6}  to 1 %: {row['pairs_to_1pct']!s:>6} pairs "
                f"{row['seconds_to_1pct'] or math.nan:6.2f} s, CPU {row['cpu_seconds_to_1pct'] or math.nan:6.2f} s  "
                f"(start: {row['start_pairs']:4.1f} pairs)",
                flush=True,
            )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the problems of pairs to 1 % over another method's; one that does not arrive takes all its steps."""

    def pairs(problem: tuple[Any, ...], method: str, start: str, whole: bool = False) -> float | None:
        for row in rows:
            if _name(row) == problem and (row["method"], row["start"]) == (method, start):
                arrived = row["pairs_to_1pct"]
                taken = STEPS[method.split(" circ")[0]] if arrived is None else arrived
                return float(taken + (row["start_pairs"] if whole else 0))
        return None

    def ratio(first: tuple[Any, ...], second: tuple[Any, ...]) -> float | None:
        each = []
        for problem in dict.fromkeys(_name(row) for row in rows):
            top, bottom = pairs(problem, *first), pairs(problem, *second)
            if top is not None and bottom:
                each.append(top / bottom)
        return float(np.mean(each)) if each else None

    warm, cold, fista_zeros = ("PADMM circulant", "network"), ("PADMM circulant", "zeros"), ("FISTA-TV", "zeros")
    return {
        "ratio_to_scalar_admm": ratio(warm, ("scalar ADMM", "zeros")),
        "ratio_to_fista": ratio(warm, fista_zeros),
        "ratio_warm_to_cold": ratio(warm, cold),
        "ratio_to_scalar_admm_with_the_start": ratio((*warm, True), ("scalar ADMM", "zeros")),
        "ratio_to_fista_with_the_start": ratio((*warm, True), fista_zeros),
        "ratio_warm_to_cold_with_the_start": ratio((*warm, True), cold),
        "ratio_cold_to_scalar_admm": ratio(cold, ("scalar ADMM", "zeros")),
        "ratio_cold_to_fista": ratio(cold, fista_zeros),
        "ratio_cold_to_pdhg": ratio(cold, ("PDHG", "zeros")),
    }


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("object", "seed", "size", "views"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["seconds"]:
        run_seconds(tuple(map(int, sys.argv[2:])) or (64, 128))
    else:
        run(*map(int, sys.argv[1:]))
