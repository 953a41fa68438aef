"""Work as a value (the job), the process that runs it, and the messages that come back."""

from napari_recon.jobs.job import Job, OperatorJob, PatchJob, ReconstructionJob
from napari_recon.jobs.run import Control, run_job

__all__ = ["Control", "Job", "OperatorJob", "PatchJob", "ReconstructionJob", "run_job"]
