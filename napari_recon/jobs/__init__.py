"""A reconstruction as a value (the job), the process that runs it, and the messages that come back."""

from napari_recon.jobs.job import ReconstructionJob
from napari_recon.jobs.run import Control, run_job

__all__ = ["Control", "ReconstructionJob", "run_job"]
