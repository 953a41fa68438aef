"""Every figure of docs/benchmarks.md: ``napari-recon bench NAME``, or ``python -m benchmarks.NAME``."""

import os

from napari_recon.jobs.job import quiet_threads

quiet_threads(os.environ)  # before any benchmark loads torch
