"""Warm-started, preconditioned ADMM against other methods for the same minimiser, from several starts.

    napari-recon bench warm-start
    python -m benchmarks.warm_start [CASE...] [--output FILE] [--network WEIGHTS...]
    python -m benchmarks.warm_start --list
    python -m benchmarks.warm_start --summary FILE

Data: textured objects of benchmarks.quality (exact line integrals, 30 000 photons a pixel) and a synthetic anatomy of a
seed that no network was trained on, at 50, 100 and 200 of 501 views scaled to the size; a Shepp-Logan phantom at 48
voxels and 30 views; and two measured scans, without a truth: the slice "helsinki" (60 of 720 views, binned by 4) and
"diamond" (parallel, 91 views, binned by 2). All methods minimise ½‖Ax − y‖² + weight · TV(x), x ≥ 0, at the relative
weight 1e-3 or at another, which the end of a case's name tells. "@noise": the one that the job suggests, the largest
whose residual is down at the noise or, as where structure is finer than a voxel, at 1.5 times what no weight explains
(jobs/regularization.py). "@error": the one with which x* has the truth's own residual, that of noise and such
structure. "voxels" is an object without such structure, A of the volume with photon noise: made with the very A that it
is reconstructed with, it only tells whether the suggested weight is at the noise where noise is all there is.

x* comes from twenty times as many PADMM steps as it takes to come within 1 %, each with twice the inner steps, and its
optimality is told: by how much 200 steps of FISTA from it lower the objective, how far they move it, and how much
higher PADMM ends from zeros and from the truth (or FDK) after a quarter of the steps. A count is the number of pairs of
A and Aᵀ until the distance to x* *stays* below 2 % or 1 %, with FDK for the unit of the weight and whatever the method
sets up; what the start itself took is told apart (``start_pairs``). Not counted is what belongs to a geometry and is
kept: ‖A‖², the norm of the ramp-filtered transform, the fit of H. Seconds are those of the same updates, with their
figures; those of the processor are told too, for machines that do other work. ``error_at_end`` is that of the volume
where a count ended, within 0.4 % of x* if it arrived.

"seconds-SIZE" is the same for larger volumes: one object, 100 of 501 views, the fast methods, and 80 steps for x*; with
SCICO's PDHG, on our A and Aᵀ, where that package is installed.

A case takes minutes, and the machine may be shared: with ``--output`` every row is appended to a file as it comes (a
JSON object a line), what is there already is not computed again, and ``--summary`` tells of such a file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_recon.jobs import Control
from napari_recon.jobs.job import START_WEIGHTS, RegularizationJob
from napari_recon.jobs.quality import noise_level
from napari_recon.jobs.regularization import UNEXPLAINED, RegularizationRun, Row, choose
from napari_recon.jobs.stages import Prepared
from napari_recon.learning.networks import load_weights
from napari_recon.learning.training import EXTENT, DataConfig, _circle, _simulate
from napari_recon.learning.weights import find_weights
from napari_recon.physics.normal import NormalOperator, fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.tv import TV, TVPrior, differences, divergence_adjoint, tv_threshold
from napari_recon.scans import ScanOptions, open_scan
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

OBJECTS = {"walnut": ("textured-walnut", 101), "ellipsoids": ("textured-ellipsoids", 101), "head": ("head", 1_000_001)}
VOXELS = "voxels"
"""The walnut as if it were made of the volume's own voxels."""
INSIDE = ("head",)
"""Objects of the networks' training distribution."""
VIEWS = (100, 50, 200)
"""Of a volume of 501 voxels."""
SIZE, SIZES = 48, (64, 128, 192)
MEASURED = {
    "helsinki": ("helsinki_fan/htc2022_ta_full.mat", ScanOptions(views=60, binning=4)),
    "diamond": ("diamond_parallel", ScanOptions(binning=2)),
}
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
REGULARIZATION = 1e-3
STEPS = {"scalar ADMM": 1500, "diagonal ADMM": 400, "PDHG": 400, "SCICO PDHG": 400, "FISTA-TV": 250, "PADMM": 80}
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
    """A scan with its minimiser.

    Parameters
    ----------
    name
        What it is, for the rows.
    geometry, grid
        Of the scan and the volume.
    y
        Measurements (1, 1, rows, views, columns).
    truth
        (1, 1, D, H, W), where it is known.
    at
        Which weight: "" for REGULARIZATION, "noise" or "error"; see the module.
    """

    best: Tensor
    aim = math.nan
    """The residual that the suggested weight is to have."""

    def __init__(
        self, name: dict[str, Any], geometry: Geometry, grid: Grid, y: Tensor, truth: Tensor | None, at: str
    ) -> None:
        self.physics, self.y, self.truth = Counted(geometry, grid, device="cpu"), y, truth
        self.physics.sqnorm  # noqa: B018  (kept by the transform)
        self.ramp = RampFiltered(self.physics)
        self.fdk = FDK()(self.y, self.physics)
        self.noise = noise_level(y[0, 0].permute(1, 0, 2).numpy())
        self.regularization = REGULARIZATION
        if at == "noise":
            self.regularization = self._suggested()
        elif at == "error":
            self.regularization = self._with_the_truths_residual()
        self.weight = tv_threshold(self.regularization, self.fdk) * self.physics.sqnorm
        self.name = name | {"regularization": self.regularization}
        self._operator: NormalOperator | None = None

    @classmethod
    def simulated(cls, kind: str, seed: int, size: int, views: int, at: str = "") -> Problem:
        """An object with exact line integrals or of a finer volume, with photon noise."""
        grid = Grid((size,) * 3, EXTENT / size)
        config = DataConfig(size=size, thickness=(2.5, 2.5))
        of_voxels = kind == VOXELS
        ((truth, y),) = _simulate(OBJECTS["walnut"][0] if of_voxels else kind, seed, config, [views])
        if of_voxels:
            assert config.photons is not None
            exact = XRayTransform(_circle(grid, views), grid, device="cpu").A(truth).double().numpy()
            counted = np.random.default_rng(seed).poisson(config.photons * np.exp(-exact)).clip(min=1)
            y = torch.from_numpy(-np.log(counted / config.photons)).float()
        name = {"object": kind, "seed": seed, "size": size, "views": views}
        return cls(name, _circle(grid, views), grid, y, truth, at)

    @classmethod
    def measured(cls, name: str, at: str = "") -> Problem:
        """A scan that was measured."""
        file, options = MEASURED[name]
        path = DATA / file
        if name == "diamond":
            path = Path(__file__).parent.parent / "docs" / "examples" / "diamond_parallel.toml"
        scan = open_scan(path, options)
        grid = scan.default_grid()
        told = {"object": name, "seed": None, "size": max(grid.shape), "views": scan.geometry.views}
        return cls(told, scan.geometry, grid, scan.measurements(), None, at)

    def _suggested(self) -> float:
        """The weight that the job would suggest for the whole scan."""
        run = RegularizationRun(RegularizationJob(scan=Path(), device="cpu"), Control(), Prepared())
        run.y, run.physics, run.start = self.y, self.physics, self.fdk
        rows: list[Row] = []
        for _ in run._sweep(rows, self.noise):
            pass
        self.aim = max(self.noise, UNEXPLAINED * rows[-1].residual)
        return choose(rows, self.noise)[0]

    def _with_the_truths_residual(self) -> float:
        """The weight with which x* has the residual that the truth has, to some percent."""
        assert self.truth is not None
        x, aim = self.fdk, self.residual(self.truth)
        low, high = -4.0, -1.0  # powers of ten
        for _ in range(7):
            middle = (low + high) / 2
            x = PADMM(40, 10**middle)(self.y, self.physics, init=x)
            low, high = (middle, high) if self.residual(x) < aim else (low, middle)
        return float(f"{10 ** ((low + high) / 2):.2g}")

    @property
    def operator(self) -> NormalOperator:
        """H ≈ AᵀA, as a job fits it."""
        if self._operator is None:
            self._operator = fit_normal_operator(self.physics, probes=4, iterations=2, positions=3, seed=0)
        return self._operator

    def objective(self, x: Tensor) -> float:
        residual = XRayTransform.A(self.physics, x) - self.y
        return 0.5 * float(residual.double().square().sum()) + self.weight * float(TVPrior().fn(x))

    def residual(self, x: Tensor) -> float:
        """The root mean square of Ax − y."""
        return float((XRayTransform.A(self.physics, x) - self.y).square().mean().sqrt())

    def solve(self, steps: int) -> dict[str, Any]:
        """Find x*, and tell how far it is from optimal."""
        tau = self.regularization
        self.best = PADMM(steps, tau, inner=16)(self.y, self.physics)
        further = TV(200, tau, inner=20)(self.y, self.physics, init=self.best)
        least = self.objective(self.best)
        others = [
            self.objective(PADMM(steps // 4, tau)(self.y, self.physics, init=start))
            for start in ("zeros", "fdk" if self.truth is None else self.truth)
        ]
        residual = self.residual(self.best)
        told: dict[str, Any] = {
            "objective": least,
            "fista_lowers_it_by": 1 - self.objective(further) / least,
            "fista_moves_it_by": self.distance(further),
            "other_starts_end_higher_by": max(others) / least - 1,
            "noise": self.noise,
            "residual_to_noise": residual / self.noise,
        }
        if math.isfinite(self.aim):
            told["residual_to_that_aimed_at"] = residual / self.aim
        if self.truth is not None:
            told |= {
                "residual_to_that_of_truth": residual / self.residual(self.truth),
                "truth_to_x*": self.distance(self.truth),
                "error_of_x*": self.error(self.best),
            }
        return told

    def error(self, x: Tensor) -> float | None:
        """‖x − truth‖ / ‖truth‖, where that is known."""
        return None if self.truth is None else float((x - self.truth).norm() / self.truth.norm())

    def distance(self, x: Tensor) -> float:
        """‖x − x*‖ / ‖x*‖."""
        return float((x - self.best).norm() / self.best.norm())


def fista(problem: Problem, start: Tensor, steps: int) -> Track:
    """Our TV, which restarts, with ten inner steps from the last dual."""
    for update in TV(steps, problem.regularization).stream(problem.y, problem.physics, init=start):
        yield update.values


def padmm(problem: Problem, start: Tensor, steps: int, preconditioner: Any = "circulant") -> Track:
    """Ours."""
    method = PADMM(steps, problem.regularization, preconditioner=preconditioner)
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


def scico_pdhg(problem: Problem, start: Tensor, steps: int, ratio: float = RATIOS[1]) -> Track:
    """The PDHG of SCICO (Balke et al. 2022), a peer on the CPU; with our A and Aᵀ, and the step ratio of ours."""
    import jax
    import jax.numpy as jnp
    from scico import functional, linop, loss, optimize
    from scico.numpy import BlockArray

    physics, y = problem.physics, problem.y
    FDK()(y, physics)  # the unit of the weight
    norm, gradient = math.sqrt(physics.sqnorm), math.sqrt(12.0)
    volume, measured = tuple(start.shape[2:]), tuple(y.shape[2:])

    def called(apply: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[Any], Any]:
        def on_host(x: Any) -> Any:
            return apply(torch.from_numpy(np.array(x))[None, None])[0, 0].numpy() / np.float32(norm)

        return lambda x: jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, jnp.float32), x)

    project = linop.LinearOperator(
        volume, measured, called(physics.A, measured), called(physics.A_adjoint, volume), jnp.float32, jnp.float32
    )
    differ = (1 / gradient) * linop.FiniteDifference(volume, append=0, input_dtype=jnp.float32)
    weight = problem.weight / physics.sqnorm * gradient
    solver = optimize.PDHG(
        f=functional.NonNegativeIndicator(),
        g=functional.SeparableFunctional(
            [loss.SquaredL2Loss(y=jnp.asarray(y[0, 0].numpy() / norm), scale=0.5), weight * functional.L21Norm()]
        ),
        C=linop.VerticalStack([project, differ]),
        tau=ratio / math.sqrt(2),
        sigma=1 / (ratio * math.sqrt(2)),
        x0=jnp.asarray(start[0, 0].numpy()),
        maxiter=1,
    )
    assert isinstance(solver.z, BlockArray)
    yield start
    for _ in range(steps):
        solver.step()
        yield torch.from_numpy(np.array(solver.x))[None, None]


METHODS: dict[str, tuple[str, Callable[..., Track]]] = {
    "scalar ADMM": ("scalar", partial(padmm, preconditioner="scalar")),
    "diagonal ADMM": ("diagonal", partial(padmm, preconditioner="diagonal")),
    "PDHG": ("none", pdhg),
    "SCICO PDHG": ("none", scico_pdhg),
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


def starts(problem: Problem, networks: Sequence[Path] = ()) -> dict[str, Callable[[], Tensor]]:
    """Volumes by name.

    "network" is the first of ``networks``, or the shipped one that PADMM starts from; further ones are called by their
    file.
    """
    found: dict[str, Callable[[], Tensor]] = {
        "zeros": lambda: torch.zeros_like(problem.fdk),
        "fdk": lambda: FDK()(problem.y, problem.physics),
    }
    for i, file in enumerate(networks or [find_weights(START_WEIGHTS["x-ray"])]):
        found["network" if i == 0 else f"network {file.stem}"] = partial(_learned, problem, file)
    found["unrolled network"] = partial(_learned, problem, find_weights("unrolled"))
    if (truth := problem.truth) is not None:
        found["truth"] = lambda: truth
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
    return found | {"objective_at_end": problem.objective(last), "error_at_end": problem.error(last)}


# -- cases ---------------------------------------------------------------------------------------------------------


def cases() -> list[str]:
    """Their names, those first that are quick."""
    names = ["shepp-logan-48-30"]
    names += [f"{kind}-{SIZE}-{round(SIZE * views / 501)}" for views in VIEWS for kind in OBJECTS]
    simulated = list(names)
    names += [name for name, (file, _) in MEASURED.items() if (DATA / file).exists()]
    suggested = [*names, f"{VOXELS}-{SIZE}-{round(SIZE * 200 / 501)}"]
    return [
        *names,
        *(f"{name}@error" for name in simulated),
        *(f"{name}@noise" for name in suggested),
        *(f"seconds-{size}" for size in SIZES),
    ]


def run(chosen: Sequence[str] = (), output: Path | None = None, networks: Sequence[Path] = ()) -> dict[str, Any]:
    """Every method from its starts, case by case; prints a line each."""
    record = _Record(output)
    for name in chosen or cases():
        if name in record.complete:
            continue
        print(f"\n{name}", flush=True)
        if name.startswith("seconds-"):
            size = int(name.removeprefix("seconds-"))
            problem = Problem.simulated(*OBJECTS["walnut"], size, round(size * 100 / 501))
            problem.best = PADMM(80, REGULARIZATION)(problem.y, problem.physics)
            methods = {"PDHG": ("zeros",), "FISTA-TV": ("zeros", "network"), "PADMM circulant": ("zeros", "network")}
            if importlib.util.find_spec("scico") is not None:
                methods["SCICO PDHG"] = ("zeros",)
            _compare(name, problem, methods, record, networks, RATIOS[1:2])
        else:
            problem = _problem(name)
            few = 501 * problem.name["views"] <= 60 * problem.name["size"]
            told = problem.solve(1000 if few else 400)
            figures = {key: float(f"{value:.3g}") for key, value in told.items()}
            print(f"  τ {problem.regularization:g}  {figures}", flush=True)
            if not any(known["case"] == name for known in record.problems):
                record.add("problem", {"case": name} | problem.name | told)
            _compare(name, problem, STARTS, record, networks)
        record.add("complete", {"case": name})
    return summary(record)


def _problem(name: str) -> Problem:
    case, _, at = name.partition("@")
    if case in MEASURED:
        return Problem.measured(case, at)
    kind, size, views = case.rsplit("-", 2)
    seeded = {"shepp-logan": ("shepp-logan", 5), VOXELS: (VOXELS, 101)}.get(kind) or OBJECTS[kind]
    return Problem.simulated(*seeded, int(size), int(views), at)


class _Record:
    """Rows and problems, in a file where there is one: what is in it already is known."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.problems: list[dict[str, Any]] = []
        self.complete: set[str] = set()
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                self._take(**json.loads(line))

    def _take(self, kind: str, told: dict[str, Any]) -> None:
        if kind == "row":
            self.rows.append(told)
        elif kind == "problem":
            self.problems.append(told)
        else:
            self.complete.add(told["case"])

    def add(self, kind: str, told: dict[str, Any]) -> None:
        """Keep what was found."""
        self._take(kind, told)
        if self.file is not None:
            with self.file.open("a") as file:
                print(json.dumps({"kind": kind, "told": told}), file=file)

    def has(self, case: str, method: str, start: str) -> bool:
        """Whether a row is there."""
        return any((row["case"], row["method"], row["start"]) == (case, method, start) for row in self.rows)


def _compare(
    case: str,
    problem: Problem,
    methods: dict[str, tuple[str, ...]],
    record: _Record,
    networks: Sequence[Path],
    steps_of_pdhg: tuple[float, ...] = RATIOS,
) -> None:
    if "PADMM operator" in methods:
        problem.operator  # noqa: B018  (of a geometry, too)
    for start, make in starts(problem, networks).items():
        wanted = [
            method
            for method in METHODS
            if (start if not start.startswith("network") else "network") in methods.get(method, ())
            and not record.has(case, method, start)
        ]
        if not wanted:
            continue
        problem.physics.uses = 0
        begun = time.perf_counter()
        x = make()
        taken, uses = time.perf_counter() - begun, problem.physics.uses
        uses += start == "fdk" or "network" in start  # their FDK
        for method in wanted:
            preconditioner, track = METHODS[method]
            steps = STEPS[method.split(" circ")[0].split(" oper")[0]]
            if method == "PDHG":
                tries = [follow(problem, track(problem, x, steps, ratio=ratio), 1) for ratio in steps_of_pdhg]
                found = min(tries, key=lambda each: each["pairs_to_1pct"] or math.inf)
            else:
                found = follow(problem, track(problem, x, steps), 1)
            row = {
                "case": case,
                **problem.name,
                "method": method,
                "preconditioner": preconditioner,
                "start": start,
                "start_pairs": uses / 2,
                "start_seconds": taken,
                "error_of_start": problem.error(x),
                **found,
            }
            record.add("row", row)
            print(
                f"  {method:16s} from {start:17s} ({100 * row['distance_of_start']:5.1f} %)  to 2 %: "
                f"{row['pairs_to_2pct']!s:>6}  to 1 %: {row['pairs_to_1pct']!s:>6} pairs "
                f"{row['seconds_to_1pct'] or math.nan:6.2f} s, CPU {row['cpu_seconds_to_1pct'] or math.nan:6.2f} s  "
                f"(start: {row['start_pairs']:4.1f} pairs)",
                flush=True,
            )


# -- what they come to ---------------------------------------------------------------------------------------------


def summary(record: _Record) -> dict[str, Any]:
    """Rows, problems, errors against the truth, and ratios: those at the fixed weight, and apart those at others."""
    timed = [row for row in record.rows if row["case"].startswith("seconds-")]
    of = {at: [row for row in record.rows if row["case"].endswith(at)] for at in ("@error", "@noise")}
    fixed = [row for row in record.rows if "@" not in row["case"] and row not in timed]
    return {
        "rows": record.rows,
        "problems": record.problems,
        "errors": errors([row for row in record.rows if row not in timed]),
        "at_the_error": ratios(of["@error"]),
        "at_the_noise": ratios(of["@noise"]),
        "seconds": ratios(timed),
        **ratios(fixed),
    }


def errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The warm-started result's error beside the networks' alone, case by case: RMSEs over the truth's norm."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["start"]: row for row in rows if row["case"] == case and row["method"] == "PADMM circulant"}
        if not {"network", "unrolled network"} <= set(of) or of["network"]["error_at_end"] is None:
            continue
        network, unrolled = of["network"]["error_of_start"], of["unrolled network"]["error_of_start"]
        result = of["network"]["error_at_end"]
        found.append(
            {
                "case": case,
                "inside_the_training_distribution": of["network"]["object"] in INSIDE,
                "network": network,
                "unrolled": unrolled,
                "fdk": of["fdk"]["error_of_start"] if "fdk" in of else None,
                "warm_started": result,
                "lower_than_the_network_by": 1 - result / network,
                "lower_than_the_unrolled_by": 1 - result / unrolled,
            }
        )
    return found


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the problems of pairs to 1 % over another method's; one that does not arrive takes all its steps."""

    def pairs(case: str, method: str, start: str, whole: bool = False) -> float | None:
        for row in rows:
            if row["case"] == case and (row["method"], row["start"]) == (method, start):
                arrived = row["pairs_to_1pct"]
                taken = STEPS[method.split(" circ")[0]] if arrived is None else arrived
                return float(taken + (row["start_pairs"] if whole else 0))
        return None

    def ratio(first: tuple[Any, ...], second: tuple[Any, ...]) -> float | None:
        each = []
        for case in dict.fromkeys(row["case"] for row in rows):
            top, bottom = pairs(case, *first), pairs(case, *second)
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


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_start")
    parser.add_argument("case", nargs="*", help="names of cases; all where none is given")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to add to")
    parser.add_argument("--network", type=Path, nargs="+", default=[], help="weights to start from")
    parser.add_argument("--summary", type=Path, help="tell of such a file")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.case) - set(cases())):
        parser.error(f"there is no case {unknown[0]!r}: --list tells them")
    if chosen.list:
        print("\n".join(cases()))
        return
    if chosen.summary is not None:
        found = summary(_Record(chosen.summary))
    else:
        found = run(chosen.case, chosen.output, chosen.network)
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    _main()
