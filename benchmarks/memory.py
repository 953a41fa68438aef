"""What jobs take of memory against what their plan says; and a job within a limit.

    napari-recon bench memory              (or python -m benchmarks.memory [SIZE ...])
    python -m benchmarks.memory --limit [SIZE VIEWS [tv]]
    python -m benchmarks.memory --whole-volume [SIZE VIEWS]

Every job runs in a process of its own, after a small one that loads the libraries and compiles the kernels: these are
no part of a plan. Measured is the peak of resident memory over what was held then, and in which stage it came. Blocks
of more than 1 MB go back to the system when they are freed, as those of large volumes always do, so that what is
resident is what is used. Views are 60, scanner and phantom those of ``napari-recon simulate walnut``; iterations are
few, since the first ones take as much as the last, and networks compute in float32.

``--limit`` reconstructs within 2 GiB of data, and again without a limit, and compares. The limit is RLIMIT_DATA, the
heap and all private mappings that can be written to, touched or not: stricter than resident memory, of which the
libraries alone reserve 1 GB. RLIMIT_AS cannot serve: torch's CUDA libraries map more than 3 GB of addresses without
touching them. ``--whole-volume`` is the shipped network by patches against the whole volume at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (96, 160)
VIEWS = 60
LIMIT = 2 * 2**30
"""Bytes of data that the limited process may have."""

JOBS: dict[str, dict[str, Any]] = {
    "FDK": {"method": "fdk"},
    "SIRT": {"method": "sirt", "iterations": 2},
    "TV, whole volume": {"method": "tv", "patch": None, "iterations": 3},
    "TV, patches, H": {"method": "tv", "patch": 48, "iterations": 2, "passes": 1},
    "TV, patches, exact": {"method": "tv", "patch": 48, "iterations": 2, "passes": 1, "operator": "exact"},
    "PADMM": {"method": "padmm", "start": "fdk", "iterations": 2},
    "PADMM from the network": {"method": "padmm", "iterations": 2},
    "unrolled": {"method": "unrolled", "iterations": 1},
    "unrolled, whole volume": {"method": "unrolled", "iterations": 1, "patch": None},
    "unrolled, 2 passes, H": {"method": "unrolled", "iterations": 1, "passes": 2},
    "unrolled, 2 passes, exact": {"method": "unrolled", "iterations": 1, "passes": 2, "operator": "exact"},
}
SLOW = ("unrolled, 2 passes, exact", "TV, patches, exact")
"""Left out above the first size."""

LIMITED: dict[str, dict[str, Any]] = {
    "unrolled": {"method": "unrolled"},
    "tv": {"method": "tv", "patch": None, "iterations": 4},
}
"""What ``--limit`` runs: the default network, or a few steps of what takes most."""

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def run(*sizes: int) -> list[dict[str, Any]]:
    """Measure all jobs at all sizes; prints the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes or SIZES:
            scan = _scan(Path(folder), size, VIEWS)
            for name, parameters in JOBS.items():
                if name in SLOW and size > min(sizes or SIZES):
                    continue
                row = {"size": size, "job": name, **_in_a_process(_job(scan, size, parameters, float32=True), folder)}
                rows.append(row)
                print(
                    f"{size:4d}³ {name:26s} predicted {row['predicted'] / 1e6:7.0f} MB  measured "
                    f"{row['measured'] / 1e6:7.0f} MB  ratio {row['measured'] / row['predicted']:5.2f}  "
                    f"{row['seconds']:6.1f} s  ({row['stage']})",
                    flush=True,
                )
    return rows


def limit(size: int = 256, views: int = 360, method: str = "unrolled") -> dict[str, Any]:
    """A method's job on a scan, within a limit and without one, and how far apart the results are."""
    import numpy as np
    import tifffile

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scan = _scan(Path(folder), size, views)
        for name, bound in (("limited", LIMIT), ("free", None)):
            output = Path(folder) / f"{name}.tif"
            rows[name] = _in_a_process(_job(scan, size, LIMITED[method], output), folder, bound)
            print(name, {k: v for k, v in rows[name].items() if k != "peaks"}, flush=True)
        a, b = (tifffile.imread(Path(folder) / f"{name}.tif").astype(np.float64) for name in rows)
    rows["difference"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    print(f"relative difference {rows['difference']:.1e}")
    return rows


def whole_volume(size: int = 256, views: int = 120) -> dict[str, Any]:
    """The shipped network by patches and on the whole volume: seconds, peak memory, and PSNR."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scan = _scan(Path(folder), size, views, keep_truth=True)
        for name, patch in (("patches of 48", 48), ("whole volume", None)):
            rows[name] = _in_a_process(_job(scan, size, {"method": "unrolled", "patch": patch}), folder)
            print(name, rows[name], flush=True)
    return rows


def _scan(folder: Path, size: int, views: int, keep_truth: bool = False) -> Path:
    from napari_recon.learning.simulate import simulate

    scan = simulate("walnut", folder / f"walnut-{size}-{views}", size=size, views=views, seed=0)
    if not keep_truth:  # measures against it take memory of their own
        (scan / "truth.tif").unlink()
    return scan


def _job(scan: Path, size: int, parameters: dict[str, Any], output: Path | None = None, float32: bool = False) -> Any:
    from napari_recon.jobs.job import ReconstructionJob

    if parameters["method"] == "unrolled" and float32:
        parameters = parameters | {"precision": "float32"}
    fields = {"scan": scan, "shape": (size,) * 3, "parameters": parameters, "device": "cpu", "output": output}
    return ReconstructionJob.model_validate(fields)


def _in_a_process(job: Any, cache: str, bound: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", job.model_dump_json(), str(bound or 0)]
    environment = os.environ | MAPPED | {"XDG_CACHE_HOME": cache}  # where no operator is kept yet
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _one(job_json: str, bound: int) -> dict[str, Any]:
    from napari_recon.jobs import ReconstructionJob, run_job
    from napari_recon.jobs.memory import peak_memory, plan_memory, release_memory, reset_peak
    from napari_recon.jobs.messages import Failed, Finished, Notice, Stage

    job = ReconstructionJob.model_validate_json(job_json)
    if bound:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    small: dict[str, Any] = {"shape": (16, 16, 16), "output": None}
    last = list(run_job(job.model_copy(update=small)))[-1]
    if isinstance(last, Failed):
        raise RuntimeError(last.text + last.detail)
    release_memory()
    plan = plan_memory(job)
    reset_peak()
    before = peak_memory()
    peaks: dict[str, int] = {}
    stage, notices, figures = "reading", [], {}
    begun = time.perf_counter()
    for message in run_job(job):
        peaks[stage] = max(peaks.get(stage, 0), peak_memory())
        reset_peak()
        if isinstance(message, Stage):
            stage = message.name
        elif isinstance(message, Notice):
            notices.append(message.text)
        elif isinstance(message, Finished):
            figures = message.figures
        elif isinstance(message, Failed):
            raise RuntimeError(message.text + message.detail)
    fullest = max(peaks, key=lambda name: peaks[name])
    return {
        "predicted": plan.host_bytes,
        "measured": peaks[fullest] - before,
        "stage": fullest,
        "resident before": before,
        "peaks": {name: peak - before for name, peak in peaks.items()},
        "items": plan.items,
        "seconds": time.perf_counter() - begun,
        "figures": {name: figures[name] for name in ("psnr", "residual") if name in figures},
        "notices": notices,
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--one"]:
        print(json.dumps(_one(arguments[1], int(arguments[2]))))
    elif arguments[:1] == ["--limit"]:
        limit(*map(int, arguments[1:3]), *arguments[3:])
    elif arguments[:1] == ["--whole-volume"]:
        whole_volume(*map(int, arguments[1:]))
    else:
        run(*map(int, arguments))
