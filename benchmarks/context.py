"""What a patch should be trained amid: the truth, the truth with the start's errors, or with the first pass's.

    napari-recon bench context        (or python -m benchmarks.context [STEPS])

Three small trainings that differ in nothing else (48 voxels; 3, 5 and 10 views; patches of 24; STEPS steps; seed 0),
each judged on the evaluation objects of benchmarks.quality after the first pass and after the second.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import EVALUATION, Scanner, figures, learned
from napari_recon.learning.training import TrainingConfig, train
from napari_recon.reconstruction.tv import PreconditionedTV

SIZE, VIEWS, PATCH = 48, (3, 5, 10), 24
CONTEXTS: dict[str, dict[str, Any]] = {
    "truth": {"context_mix": 0.0},
    "truth with the start's errors": {"context_mix": 0.8},
    "truth with the start's or the first pass's errors": {"context_mix": 0.8, "refresh": 200},
}


def run(steps: int = 800) -> list[dict[str, Any]]:
    """Train and judge all three; prints the means over objects."""
    rows = []
    scanners = [Scanner(SIZE, views) for views in VIEWS]
    scans = [(scanner, *scanner.scan(*each)) for scanner in scanners for each in EVALUATION]
    starts = [figures(PreconditionedTV()(y, s.xray, ramp=s.ramp), truth)["psnr"] for s, truth, y in scans]
    print(f"{'start (ramp-filtered TV)':52s} {np.mean(starts):.2f} dB")
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in CONTEXTS.items():
            config = TrainingConfig.model_validate(
                {
                    "data": {"size": SIZE, "views": VIEWS, "count": 30},
                    "network": {"options": {"width": 16}},
                    "optimisation": {
                        "steps": steps,
                        "patch": PATCH,
                        "learning_rate": 1.5e-3,
                        "step_rate": 3,
                        "warm_up": 50,
                    }
                    | changes,
                    "validation": {"every": max(1, steps // 4)},
                }
            )
            file = Path(folder) / f"{len(rows)}.safetensors"
            train(config, file)
            row: dict[str, Any] = {"context": name}
            for passes in (1, 2):
                method = learned(file, patch_size=PATCH, stride=16, passes=passes)
                found = [figures(method(y, scanner), truth)["psnr"] for scanner, truth, y in scans]
                row[f"pass {passes}"] = float(np.mean(found))
            rows.append(row)
            print(f"{name:52s} first pass {row['pass 1']:.2f} dB, second {row['pass 2']:.2f} dB", flush=True)
    return rows


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
