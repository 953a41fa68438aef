"""A volume in slabs against the same at once: memory, seconds, how far apart they are; and killed half-way, resumed.

    napari-recon bench slabs               (or python -m benchmarks.slabs [SIZE VIEWS SLABS [METHOD ...]])
    python -m benchmarks.slabs --margins [SIZE VIEWS SLABS]

The scanner and the phantom are those of ``napari-recon simulate walnut``. Every job runs in a process of its own, after
a small one that loads the libraries and compiles the kernels: the peak of resident memory is that over what was held
then. PSNR is against the true volume, and of the volume in slabs against the one at once; "seam" is the root mean
square of how that difference jumps from slice to slice at the borders of slabs, over the same elsewhere: 1 is no seam.
``--margins`` tells what the margin about a slab costs and gains, beyond which FDK is held: TV of the slabs against that
of the whole, in one process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

METHODS: dict[str, dict[str, Any]] = {
    "FDK": {"method": "fdk"},
    "SIRT": {"method": "sirt", "iterations": 10},
    "TV": {"method": "tv", "patch": None, "iterations": 20},
    "unrolled": {"method": "unrolled"},
}
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""So that what is freed goes back to the system at once, as blocks of large volumes do."""


def run(size: int = 64, views: int = 24, slabs: int = 4, methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure methods (all, by default), and the resumption of one; prints the table."""
    from napari_recon.learning.simulate import simulate

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = simulate("walnut", folder / "scan", size=size, views=views, seed=0)
        for method in methods or METHODS:
            parameters = METHODS[method]
            row = {"size": size, "method": method, **_compared(folder, scan, size, parameters, -(-size // slabs))}
            rows.append(row)
            print(
                f"{size}³ {method:10s} whole {row['whole_bytes'] / 1e6:6.0f} MB {row['whole_seconds']:6.1f} s "
                f"{row['whole_psnr']:6.2f} dB   slabs {row['slabs_bytes'] / 1e6:6.0f} MB {row['slabs_seconds']:6.1f} s "
                f"{row['slabs_psnr']:6.2f} dB   between {row['between']:6.1f} dB, seam {row['seam']:.2f}",
                flush=True,
            )
        row = _resumed(folder, scan, -(-size // slabs))
        rows.append(row)
        print(
            f"killed with {row['finished_when_killed']} of {row['slabs']} slabs finished, {row['made_after']} made "
            f"after that; the same bits: {row['same_bits']}"
        )
    return rows


def _compared(folder: Path, scan: Path, size: int, parameters: dict[str, Any], thickness: int) -> dict[str, Any]:
    from napari_recon.jobs.volumes import read_volume

    row: dict[str, Any] = {}
    volumes = {}
    truth = read_volume(scan / "truth.tif").data
    for kind, slab in (("whole", None), ("slabs", thickness)):
        output = folder / f"{kind}.ome.zarr"
        fields = {"scan": str(scan), "shape": (size,) * 3, "parameters": parameters, "device": "cpu"}
        found = _in_a_process({**fields, "output": str(output), "slab": slab}, folder)
        volumes[kind] = read_volume(output).data
        row |= {f"{kind}_bytes": found["bytes"], f"{kind}_seconds": found["seconds"]}
        row[f"{kind}_psnr"] = _psnr(volumes[kind], truth)
    row["between"] = _psnr(volumes["slabs"], volumes["whole"])
    jumps = np.sqrt(np.mean(np.diff(volumes["slabs"] - volumes["whole"], axis=0) ** 2, axis=(1, 2)))
    seams = np.arange(thickness, size, thickness) - 1
    elsewhere = np.delete(jumps, seams)
    row["seam"] = float(np.sqrt(np.mean(jumps[seams] ** 2) / np.mean(elsewhere**2)))
    return row


def margins(size: int = 96, views: int = 24, slabs: int = 6) -> list[dict[str, Any]]:
    """How far TV in slabs is from TV of the whole, by the margin; prints the table."""
    from napari_recon.jobs import Control, ReconstructionJob, run_job
    from napari_recon.jobs.messages import Finished
    from napari_recon.jobs.volumes import read_volume
    from napari_recon.learning.simulate import simulate
    from napari_recon.scans import open_scan
    from napari_recon.scans import slabs as parts

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = simulate("walnut", folder / "scan", size=size, views=views, seed=0)
        opened = open_scan(scan)
        fields = {"scan": str(scan), "shape": (size,) * 3, "parameters": METHODS["TV"], "device": "cpu"}
        truth, control = read_volume(scan / "truth.tif").data, Control()
        assert isinstance(list(run_job(ReconstructionJob.model_validate(fields), control))[-1], Finished)
        whole = control.volumes["result"]
        geometry, grid = opened.geometry, opened.default_grid((size,) * 3)
        kept = parts.MARGIN, parts.CLIMB
        try:
            for part in (0.3, 0.5, 0.6, 0.8, 1.0):
                parts.MARGIN, parts.CLIMB = 4, part
                output = folder / f"{part}.ome.zarr"
                job = ReconstructionJob.model_validate({**fields, "output": str(output), "slab": -(-size // slabs)})
                assert isinstance(list(run_job(job))[-1], Finished)
                found = read_volume(output).data
                row = {"part": part, "margin": parts.held_margin(geometry, grid)}
                row |= {"between": _psnr(found, whole), "psnr": _psnr(found, truth), "whole_psnr": _psnr(whole, truth)}
                rows.append(row)
                print(
                    f"{size}³, {views} views, {part:.1f} of the climb: {row['margin']:3d} slices   between "
                    f"{row['between']:5.1f} dB   to the truth {row['psnr']:.2f} dB (whole {row['whole_psnr']:.2f})",
                    flush=True,
                )
        finally:
            parts.MARGIN, parts.CLIMB = kept
    return rows


def _psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(np.ptp(b) ** 2 / max(np.mean((a - b) ** 2), 1e-30)))


def _in_a_process(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.slabs", "--one", json.dumps(job)]
    environment = os.environ | MAPPED | {"XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one(said: str) -> dict[str, Any]:
    from napari_recon.jobs import ReconstructionJob, run_job
    from napari_recon.jobs.memory import peak_memory, release_memory, reset_peak
    from napari_recon.jobs.messages import Failed

    job = ReconstructionJob.model_validate_json(said)
    small = list(run_job(job.model_copy(update={"shape": (16, 16, 16), "output": None, "slab": None})))
    assert not isinstance(small[-1], Failed), small[-1]
    release_memory()
    reset_peak()
    before, begun = peak_memory(), time.perf_counter()
    # A run resets the peak when it begins, and so takes no account of what was before.
    last = list(run_job(job))[-1]
    if isinstance(last, Failed):
        raise RuntimeError(last.text + last.detail)
    return {"bytes": peak_memory() - before, "seconds": time.perf_counter() - begun}


def _resumed(folder: Path, scan: Path, thickness: int) -> dict[str, Any]:
    """TV in slabs: at once, and killed by SIGKILL when half of the slabs are finished, and started again."""
    outputs = {name: folder / f"{name}.ome.zarr" for name in ("uninterrupted", "killed")}
    common = ["--method", "tv", "--patch", "0", "--iterations", "20", "--device", "cpu", "--slab", str(thickness)]

    def command(output: Path) -> list[str]:
        return [sys.executable, "-m", "napari_recon.cli", "reconstruct", str(scan), "-o", str(output), *common]

    told = subprocess.run(command(outputs["uninterrupted"]), capture_output=True, text=True, check=True).stderr
    count = len(re.findall(r"Slab \d+ of \d+ is finished", told))
    finished = 0
    with subprocess.Popen(command(outputs["killed"]), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            finished += "is finished" in line
            if finished >= count // 2:
                process.send_signal(signal.SIGKILL)
                break
    told = subprocess.run(command(outputs["killed"]), capture_output=True, text=True, check=True).stderr
    whole, again = (
        {p.relative_to(o): p.read_bytes() for p in o.rglob("c/**/*") if p.is_file()} for o in outputs.values()
    )
    going_on = re.search(r"(\d+) of \d+ slabs are finished", told)
    return {
        "method": "TV, killed and resumed",
        "slabs": count,
        "finished_when_killed": int(going_on[1]) if going_on else 0,
        "made_after": len(re.findall(r"Slab \d+ of \d+ is finished", told)),
        "same_bits": whole == again,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_one(sys.argv[2])))
    elif sys.argv[1:2] == ["--margins"]:
        margins(*map(int, sys.argv[2:]))
    else:
        size, views, slabs = [*map(int, sys.argv[1:4]), *(64, 24, 4)[len(sys.argv[1:4]) :]]
        run(size, views, slabs, sys.argv[4:])
