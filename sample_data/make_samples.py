"""Makes the samples anew: ``python -m napari_recon.sample_data.make_samples``."""

from __future__ import annotations

import shutil
from pathlib import Path

from napari_recon.learning.simulate import simulate

SAMPLES = {
    # name: what simulate() is called with
    "walnut-like": {"kind": "walnut", "size": 96, "views": 60, "seed": 0, "photons": 30_000},
}


def make(folder: Path = Path(__file__).parent) -> None:
    """Write every sample into ``folder``, in place of what is there under its name."""
    for name, how in SAMPLES.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        simulate(folder=folder / name, **how)  # type: ignore[arg-type]


if __name__ == "__main__":
    make()
