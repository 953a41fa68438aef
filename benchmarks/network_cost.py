"""What a data step and a network step cost, forward and backward, against the size of the volume: the paper's figure.

    napari-recon bench network_cost        (or python -m benchmarks.network_cost [OUT.png])

Every figure is taken in a process of its own: the time of the second run, and the peak of memory over what was held
before the step, with the volume and the projections already there. Views are 100/501 of the volume's edge (Walnut
geometry); the network is the shipped one; patches are 48 voxels. Where a process would take more than LIMIT it ends
in "does not fit".
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (64, 96, 128, 192, 256)
PATCH = 48
LIMIT = 14 * 2**30
"""Bytes that a process may take."""
STEPS = (
    "data step, whole volume, exact",
    "data step, patch, exact",
    "data step, patch, H",
    "network step, whole volume",
    "network step, patch",
)


def measure(step: str, backward: bool, size: int) -> dict[str, Any]:
    """Seconds and bytes of one step, in this process."""
    import torch

    from benchmarks.quality import Scanner
    from napari_recon.jobs.memory import peak_memory, release_memory, reset_peak
    from napari_recon.learning.networks import load_weights
    from napari_recon.learning.weights import find_weights
    from napari_recon.physics.normal import fit_normal_operator

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    edge = size if "whole" in step else PATCH
    x = torch.rand((1, 1, edge, edge, edge), generator=torch.Generator().manual_seed(0))
    apply: Callable[[torch.Tensor], torch.Tensor]
    if step.startswith("network"):
        apply = load_weights(find_weights("unrolled")).model.networks[0]
        x = x.expand(-1, apply.architecture["options"].get("inputs", 1), -1, -1, -1).contiguous()
    else:
        scanner = Scanner(size, round(size * 100 / 501))
        start = (size - PATCH) // 2
        box = tuple(slice(start, start + PATCH) for _ in range(3))
        if step.endswith("H"):
            operator = fit_normal_operator(scanner.ramp, probes=1, iterations=0, positions=1)
            apply = operator.patch(box).apply
        else:
            apply = scanner.ramp.A_adjoint_A if "whole" in step else scanner.ramp.restrict(box).A_adjoint_A

    def once() -> float:
        begun = time.perf_counter()
        if backward:
            inside = x.clone().requires_grad_()
            apply(inside).square().sum().backward()
        else:
            with torch.no_grad():
                apply(x)
        return time.perf_counter() - begun

    once()
    release_memory()  # or what was freed would hide what is taken
    reset_peak()
    held = peak_memory()
    return {"seconds": once(), "MB": (peak_memory() - held) / 1e6}


def run(output: str = "network-cost.png") -> list[dict[str, Any]]:
    """Measure all steps at all sizes; prints the table and draws the figure."""
    rows = []
    for step in STEPS:
        for backward in (False, True):
            for size in SIZES:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.network_cost",
                    "--one",
                    step,
                    str(int(backward)),
                    str(size),
                ]
                done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
                fits = done.returncode == 0
                found = json.loads(done.stdout.splitlines()[-1]) if fits else {"seconds": None, "MB": None}
                if not fits and "emory" not in done.stderr and done.returncode > 0:
                    raise RuntimeError(done.stderr)
                rows.append({"step": step, "backward": backward, "size": size, **found})
                told = f"{found['seconds']:8.3f} s {found['MB']:8.0f} MB" if fits else "does not fit"
                print(f"{step:32s} {'forward+backward' if backward else 'forward':16s} {size:4d}³ {told}", flush=True)
    draw(rows, output)
    return rows


def draw(rows: list[dict[str, Any]], output: str) -> None:
    """Memory and time against the volume's edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("MB", "seconds"), ("peak memory of a step (MB)", "seconds a step"), strict=True
    ):
        for k, step in enumerate(STEPS):
            for backward in (False, True):
                chosen = [r for r in rows if r["step"] == step and r["backward"] == backward and r[quantity]]
                axes.plot(
                    [r["size"] for r in chosen],
                    [r[quantity] for r in chosen],
                    color=f"C{k}",
                    linestyle="-" if backward else "--",
                    marker="o" if backward else ".",
                    label=step if backward else None,
                )
        axes.set(xlabel="edge of the volume (voxels)", ylabel=label, yscale="log", xticks=SIZES)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, title="solid: forward and backward; dashed: forward", title_fontsize=7)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], bool(int(sys.argv[3])), int(sys.argv[4]))))
    else:
        run(*sys.argv[1:])
