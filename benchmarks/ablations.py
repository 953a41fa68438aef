"""What a patch should be trained amid, and what the network should start from.

    napari-recon bench ablations        (or python -m benchmarks.ablations [STEPS [COUNT]])

Small trainings that differ in nothing but what is told (48 voxels; 3, 5 and 10 views; patches of 24; STEPS steps on
COUNT anatomies; seed 0), each judged on the evaluation objects of benchmarks.quality. Contexts are judged after the
first pass by patches and after the second; starts on the whole volume, with the seconds that a volume takes in all.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import EVALUATION, Method, Scanner, figures, learned
from napari_recon.learning.training import TrainingConfig, train
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.tv import PreconditionedTV

SIZE, VIEWS, PATCH = 48, (3, 5, 10), 24
CONTEXTS: dict[str, dict[str, Any]] = {
    "truth": {"context_mix": 0.0},
    "truth with the start's errors": {"context_mix": 0.8},
    "truth with the start's or the first pass's errors": {"context_mix": 0.8, "refresh": 150},
}
STARTS: dict[str, tuple[Method, dict[str, Any]]] = {
    "FDK": (lambda y, s: FDK()(y, s.xray), {"start": "fdk"}),
    "FDK, twice the data steps": (lambda y, s: FDK()(y, s.xray), {"start": "fdk", "data_steps": 6}),
    "ramp-filtered least squares, 12 steps": (
        lambda y, s: PreconditionedTV(12, 0.0)(y, s.xray, ramp=s.ramp),
        {"start": "least-squares"},
    ),
    "ramp-filtered TV, 40 steps": (lambda y, s: PreconditionedTV()(y, s.xray, ramp=s.ramp), {"start": "tv"}),
}


def run(steps: int = 600, count: int = 20) -> list[dict[str, Any]]:
    """Train and judge all of them; prints the means over objects and numbers of views."""
    scanners = [Scanner(SIZE, views) for views in VIEWS]
    scans = [(scanner, *scanner.scan(*each)) for scanner in scanners for each in EVALUATION]

    def judged(method: Method) -> tuple[float, float]:
        """(PSNR, seconds a volume)."""
        begun = time.perf_counter()
        found = [figures(method(y, scanner), truth)["psnr"] for scanner, truth, y in scans]
        return float(np.mean(found)), (time.perf_counter() - begun) / len(scans)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def trained(method: dict[str, Any], optimisation: dict[str, Any]) -> Path:
            config = {
                "data": {"size": SIZE, "views": VIEWS, "count": count},
                "network": {"options": {"width": 16}},
                "method": method,
                "optimisation": {
                    "steps": steps,
                    "patch": PATCH,
                    "learning_rate": 1.5e-3,
                    "step_rate": 3,
                    "warm_up": 50,
                    "context_mix": 0.8,
                }
                | optimisation,
                "validation": {"every": max(1, steps // 3)},
            }
            file = Path(folder) / f"{len(rows)}.safetensors"
            train(TrainingConfig.model_validate(config), file)
            return file

        usual = None
        for name, changes in CONTEXTS.items():
            file = trained({}, changes)
            usual = file if changes == {"context_mix": 0.8} else usual
            first, second = (judged(learned(file, patch_size=PATCH, stride=16, passes=p))[0] for p in (1, 2))
            rows.append({"context": name, "pass 1": first, "pass 2": second})
            print(f"trained amid: {name:52s} first pass {first:.2f} dB, second {second:.2f} dB", flush=True)
        for name, (start, method) in STARTS.items():
            file = usual if method == {"start": "tv"} and usual is not None else trained(method, {})
            alone, _ = judged(start)
            after, seconds = judged(learned(file, patch_size=None, passes=1))
            rows.append({"start": name, "alone": alone, "unrolled": after, "seconds": seconds})
            print(f"start: {name:40s} alone {alone:.2f} dB, unrolled {after:.2f} dB, {seconds:.2f} s", flush=True)
    return rows


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
