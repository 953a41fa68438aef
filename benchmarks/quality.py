"""Learned, partitioned reconstruction against everything else, where views are few.

    napari-recon bench quality        (or python -m benchmarks.quality [SIZE] [OBJECTS])

Data: analytic objects with textures (EVALUATION below), whose line integrals are exact and which no network has seen:
networks are trained on synthetic anatomies, another generator. Cone beam of the Walnut scanner, a full circle
of 6, 10 and 19 views at 96 voxels (30, 50 and 100 at 501), the largest line integral 2.5, 30 000 photons a pixel.
Weights of TV, steps of SIRT and of least squares, and the denoiser's level are tuned for every number of views on two
other objects (TUNING). All volumes are clipped at zero; PSNR and SSIM inside the field of view, data range the truth's.
Memory is the peak while the method runs over what was held before.
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
from torch import Tensor, nn

from napari_recon.jobs.memory import peak_memory, release_memory, reset_peak
from napari_recon.learning.networks import load_weights
from napari_recon.learning.training import EXTENT, DataConfig, _circle, _inside, _simulate
from napari_recon.learning.weights import find_weights
from napari_recon.measures.comparison import compare_volumes, field_of_view
from napari_recon.physics.normal import NormalOperator, fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.sirt import SIRT
from napari_recon.reconstruction.start import brightness
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.reconstruction.tv import TV, PreconditionedTV
from napari_recon.reconstruction.unrolled import UnrolledPGD
from napari_recon.scans import open_scan
from napari_recon.scans.grid import Grid

EVALUATION = [(kind, seed) for seed in (101, 102, 103) for kind in ("textured-walnut", "textured-ellipsoids")]
TUNING = [("textured-walnut", 201), ("textured-ellipsoids", 201)]
VIEWS = (30, 50, 100)
"""Of a volume of 501 voxels, as in the paper."""
PATCH, STRIDE = 48, 32
DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "helsinki_fan"

Method = Callable[[Tensor, "Scanner"], Tensor]


class Scanner:
    """A number of views at a size, with what can be made once."""

    def __init__(self, size: int, views: int) -> None:
        self.grid, self.views = Grid((size,) * 3, EXTENT / size), views
        self.xray = XRayTransform(_circle(self.grid, views), self.grid, device="cpu")
        self.xray.sqnorm  # noqa: B018  (kept by the transform: no method pays for it)
        self.ramp = RampFiltered(self.xray)
        self._operator: NormalOperator | None = None

    @property
    def operator(self) -> NormalOperator:
        """H ≈ AᵀFA, as a job fits it."""
        if self._operator is None:
            self._operator = fit_normal_operator(self.ramp, probes=4, iterations=2, positions=3, seed=0)
        return self._operator

    def scan(self, kind: str, seed: int) -> tuple[Tensor, Tensor]:
        """(truth, projections)."""
        data = DataConfig(size=self.grid.shape[0], thickness=(2.5, 2.5))
        ((truth, y),) = _simulate(kind, seed, data, [self.views])
        return truth, y


class WaveletPGD(StreamingReconstructor):
    """Plug-and-play: accelerated ramp-filtered steps with deepinv's wavelets for a proximal operator."""

    def __init__(self, level: float, iterations: int = 12) -> None:
        super().__init__()
        from deepinv.models import WaveletDenoiser

        self.level, self.iterations, self.denoiser = level, iterations, WaveletDenoiser(level=3, wv="db4", wvdim=3)

    @torch.no_grad()
    def stream(self, y: Tensor, physics: Any, **options: Any) -> Iterator[Update]:
        ramp = options["ramp"]
        x, measured = FDK()(y, physics), ramp.measurement(y)
        z, t, level = x, 1.0, torch.tensor(self.level * brightness(x))
        for k in range(self.iterations):
            x_next = self.denoiser(z - ramp.A_adjoint(ramp.A(z) - measured), level).clamp(min=0)
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            z, x, t = x_next + (t - 1) / t_next * (x_next - x), x_next, t_next
            yield Update(whole(x), x, k, self.iterations - 1)


def figures(x: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR and SSIM of a volume clipped at zero."""
    inside = _inside(truth.shape[-1])
    return compare_volumes(x[0, 0].clamp(min=0).numpy(), truth[0, 0].numpy(), inside)


def tuned(make: Callable[[float], Method], values: tuple[float, ...], scanner: Scanner) -> tuple[Method, float]:
    """The method whose value gives the best mean PSNR on the tuning objects."""
    scans = [scanner.scan(*each) for each in TUNING]
    found = {v: np.mean([figures(make(v)(y, scanner), truth)["psnr"] for truth, y in scans]) for v in values}
    best = max(found, key=lambda v: found[v])
    if best in (min(values), max(values)):
        print(f"  (the best value, {best:g}, is at the end of its range {values})", file=sys.stderr)
    return make(best), best


def learned(file: str | Path, **changes: Any) -> Method:
    """A trained method; ``operator=True`` uses H in the second pass."""
    model = load_weights(file).model
    use_operator = changes.pop("operator", False)
    for name, value in changes.items():
        assert hasattr(model, name), name
        setattr(model, name, value)

    def apply(y: Tensor, scanner: Scanner) -> Tensor:
        options = {"operator": scanner.operator} if use_operator else {}
        return model(y, scanner.xray, ramp=scanner.ramp, **options)

    return apply


def with_h_alone(y: Tensor, scanner: Scanner) -> Tensor:
    """The unrolled network on the whole volume with H for AᵀFA: the paper's ablation without the partition."""
    model = load_weights(find_weights("unrolled")).model
    assert isinstance(model, UnrolledPGD)
    h, b = scanner.operator, scanner.ramp.A_adjoint(scanner.ramp.measurement(y))
    x = PreconditionedTV()(y, scanner.xray, ramp=scanner.ramp)
    with torch.no_grad():
        *_, x = model.unroll(x, lambda v: h.apply(v) - b, brightness(x))
    return x


def no_network(y: Tensor, scanner: Scanner, start: str = "tv") -> Tensor:
    """The shipped network's data steps, with x ≥ 0 and nothing else."""
    shipped = load_weights(find_weights("unrolled")).model
    assert isinstance(shipped, UnrolledPGD)
    steps = UnrolledPGD(nn.Identity(), 1, step_size=1.0, data_steps=shipped.iterations * shipped.data_steps, init=start)
    steps.nonnegative = True
    result: Tensor = steps.eval()(y, scanner.xray, ramp=scanner.ramp)
    return result


def methods(scanner: Scanner) -> dict[str, Method]:
    """All rows at a number of views, tuned where there is something to tune."""
    kept: dict[str, str] = {}

    def keep(name: str, make: Callable[[float], Method], values: tuple[float, ...], unit: str = "") -> Method:
        method, value = tuned(make, values, scanner)
        kept[name] = f"{value:g}{unit}"
        return method

    rows: dict[str, Method] = {"FDK": lambda y, s: FDK()(y, s.xray)}
    rows["SIRT"] = keep("SIRT", lambda n: lambda y, s: SIRT(int(n))(y, s.xray), (50, 100, 200, 400), " steps")
    weights = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    rows["TV, 200 steps"] = keep("TV, 200 steps", lambda w: lambda y, s: TV(200, w)(y, s.xray), weights)
    rows["TV, ramp-filtered, 40 steps, weight by rule"] = lambda y, s: PreconditionedTV()(y, s.xray, ramp=s.ramp)
    rows["no network: ramp-filtered steps, x ≥ 0"] = keep(
        "no network: ramp-filtered steps, x ≥ 0",
        lambda n: lambda y, s: PreconditionedTV(int(n), 0.0)(y, s.xray, ramp=s.ramp),
        (3, 6, 9, 12, 18, 25, 50),
        " steps",
    )
    rows["no network: the unrolled network's data steps after its start"] = no_network
    rows["plug-and-play, deepinv's 3D wavelets"] = keep(
        "plug-and-play, deepinv's 3D wavelets",
        lambda v: lambda y, s: WaveletPGD(v)(y, s.xray, ramp=s.ramp),
        (1e-3, 3e-3, 1e-2, 3e-2),
    )
    folder = Path(__file__).parent / "weights"
    for start, name in (("fdk", "FDK"), ("least-squares", "the no-network steps"), ("tv", "ramp-filtered TV")):
        file = folder / f"post_{start}.safetensors"
        if file.exists():
            rows[f"post-processing of {name}"] = learned(file, patch_size=None)
    equal = folder / "unrolled_2000.safetensors"
    if equal.exists():
        rows["unrolled, trained as long as the post-processing, whole, exact"] = learned(
            equal, patch_size=None, passes=1
        )
    shipped = find_weights("unrolled")
    rows["unrolled, whole volume, exact"] = learned(shipped, patch_size=None, passes=1)
    rows["unrolled, whole volume, H"] = with_h_alone
    by_patches = partial(learned, shipped, patch_size=PATCH, stride=STRIDE)
    rows["unrolled by patches, one pass"] = by_patches(passes=1)
    rows["unrolled by patches, two passes, exact"] = by_patches(passes=2)
    rows["unrolled by patches, two passes, H"] = by_patches(passes=2, operator=True)
    scanner.operator  # noqa: B018  (fitted once for a geometry, not for every scan)
    for name, value in kept.items():
        print(f"  tuned: {name}: {value}", file=sys.stderr)
    return rows


def run(size: int = 96, objects: int = len(EVALUATION)) -> list[dict[str, Any]]:
    """Every method on every object at every number of views; prints the means."""
    table: list[dict[str, Any]] = []
    for views in (max(1, round(size * v / 501)) for v in VIEWS):
        scanner = Scanner(size, views)
        print(f"\n{views} views of {size}³:", flush=True)
        rows = methods(scanner)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        for kind, seed in EVALUATION[:objects]:
            truth, y = scanner.scan(kind, seed)
            for name, method in rows.items():
                release_memory()
                reset_peak()
                held, begun = peak_memory(), time.perf_counter()
                x = method(y, scanner)
                seconds, peak = time.perf_counter() - begun, peak_memory() - held
                assert x.shape == truth.shape
                found[name].append(figures(x, truth) | {"seconds": seconds, "MB": peak / 1e6})
        for name, each in found.items():
            mean = {key: float(np.mean([e[key] for e in each])) for key in ("psnr", "ssim", "seconds", "MB")}
            spread = float(np.std([e["psnr"] for e in each]))
            table.append(
                {"views": views, "method": name, **mean, "psnr_std": spread, "psnrs": [e["psnr"] for e in each]}
            )
            print(
                f"  {name:62s} {mean['psnr']:6.2f} dB  SSIM {mean['ssim']:.3f}  {mean['seconds']:6.1f} s"
                f"  {mean['MB']:6.0f} MB",
                flush=True,
            )
    return table + helsinki()


def helsinki(folder: Path = DATA, picture: str | Path | None = None) -> list[dict[str, Any]]:
    """A measured fan-beam scan at 30 and 60 of 720 views against FDK of all.

    The networks have only seen synthetic objects in cone beams. Nothing is tuned on this scan but for the row that says
    so.
    """
    file = folder / "htc2022_ta_full.mat"
    if not file.exists():
        print(f"({file} is not there: its rows are left out)", file=sys.stderr)
        return []
    scan = open_scan(file)
    grid = scan.default_grid()
    radius = scan.geometry.field_of_view_radius - grid.voxel_size
    inside = field_of_view(grid, radius)
    truth = FDK()(scan.measurements(), XRayTransform(scan.geometry, grid, device="cpu")).clamp(min=0)
    table, shown = [], {"FDK, 720 views": truth}
    for views in (30, 60):
        sparse = open_scan(file, views=views)
        y, xray = sparse.measurements(), XRayTransform(sparse.geometry, grid, device="cpu")
        ramp = RampFiltered(xray)

        def psnr(x: Tensor) -> dict[str, float]:
            return compare_volumes(x[0, 0].clamp(min=0).numpy(), truth[0, 0].numpy(), inside)

        rows: dict[str, Tensor] = {"FDK": FDK()(y, xray), "SIRT, 200 steps": SIRT(200)(y, xray)}
        weights = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
        found = {w: TV(200, w)(y, xray) for w in weights}
        best = max(weights, key=lambda w: psnr(found[w])["psnr"])
        rows["TV, 200 steps, default weight"] = TV(200)(y, xray)
        rows[f"TV, 200 steps, best weight for this scan ({best:g})"] = found[best]
        rows["TV, ramp-filtered, 40 steps, weight by rule"] = PreconditionedTV()(y, xray, ramp=ramp)
        rows["no network: 12 ramp-filtered steps, x ≥ 0"] = PreconditionedTV(12, 0.0)(y, xray, ramp=ramp)
        for start in ("fdk", "least-squares", "tv"):
            weights_file = Path(__file__).parent / "weights" / f"post_{start}.safetensors"
            if weights_file.exists():
                model = load_weights(weights_file).model
                model.patch_size = None
                rows[f"post-processing of {start}"] = model(y, xray)
        model = load_weights(find_weights("unrolled")).model
        model.patch_size = None
        rows["unrolled, whole slice"] = model(y, xray)
        for name, x in rows.items():
            table.append({"data": "helsinki ta", "views": views, "method": name, **psnr(x)})
            print(f"  helsinki ta, {views} views  {name:52s} {table[-1]['psnr']:6.2f} dB  SSIM {table[-1]['ssim']:.3f}")
            if name.startswith(("FDK", "TV, 200 steps, best", "unrolled")):
                shown[f"{name.split(',')[0]}, {views} views: {table[-1]['psnr']:.1f} dB"] = x
    if picture is not None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 * len(shown) / 2 + 1.5, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, x) in zip(figure.subplots(2, math.ceil(len(shown) / 2)).flat, shown.items(), strict=False):
            axes.imshow(x[0, 0, 0], cmap="gray", vmin=0, vmax=float(truth.quantile(0.999)))
            axes.set_title(name, fontsize=8)
        for axes in figure.axes:
            axes.set_axis_off()
        figure.savefig(picture, dpi=120)
    return table


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
