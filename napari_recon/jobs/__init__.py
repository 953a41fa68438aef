"""Work as a value (the job), the process that runs it, and the messages that come back."""

from napari_recon.jobs.job import (
    CoilMapsJob,
    DataConsistencyJob,
    Job,
    OperatorJob,
    PatchJob,
    ReconstructionJob,
    RegularizationJob,
    ResolutionJob,
    SweepJob,
)
from napari_recon.jobs.run import run_job
from napari_recon.jobs.stages import Control

__all__ = [
    "CoilMapsJob",
    "Control",
    "DataConsistencyJob",
    "Job",
    "OperatorJob",
    "PatchJob",
    "ReconstructionJob",
    "RegularizationJob",
    "ResolutionJob",
    "SweepJob",
    "run_job",
]
