"""Running a job: from the scan to the written volume, as a stream of messages.

``run_job`` computes in the calling process, between one message and the next. The command line and notebooks call it
as it is; the docks reach it through :mod:`napari_recon.jobs.worker`, which runs it in a process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

from napari_recon.jobs.job import (
    CoilMapsJob,
    DataConsistencyJob,
    Job,
    OperatorJob,
    PADMMParameters,
    PatchJob,
    ReconstructionJob,
    RegularizationJob,
    ResolutionJob,
    SweepJob,
    TrainJob,
)
from napari_recon.jobs.memory import is_out_of_memory, release_memory, reset_peak
from napari_recon.jobs.messages import Cancelled, Failed, Message
from napari_recon.jobs.stages import Control, JobCancelled, Prepared, Run
from napari_recon.jobs.training import TrainRun
from napari_recon.scans.errors import ScanError


def run_job(job: Job, control: Control | None = None, prepared: Prepared | None = None) -> Iterator[Message]:
    """Run a job and say what happens.

    What comes, and in which order, is told in :mod:`napari_recon.jobs.reconstruct`, :mod:`~napari_recon.jobs.padmm`,
    :mod:`~napari_recon.jobs.slabs`, :mod:`~napari_recon.jobs.consistency`, :mod:`~napari_recon.jobs.regularization`,
    :mod:`~napari_recon.jobs.resolution`, :mod:`~napari_recon.jobs.sweep`, :mod:`~napari_recon.jobs.coil_maps`,
    :mod:`~napari_recon.jobs.operator` and :mod:`~napari_recon.jobs.training`.
    Every stream ends with exactly one of ``Finished``, ``Cancelled`` and ``Failed``. Dropping the generator ends the
    job as a cancellation does; a training keeps what it has.

    Parameters
    ----------
    job
        The job.
    control
        Steers it; its ``volumes`` hold the arrays.
    prepared
        What an earlier job on the same scan left (see :class:`~napari_recon.jobs.stages.Prepared`).
    """
    control = control or Control()
    prepared = prepared or Prepared()
    reset_peak()
    try:
        yield from _run_of(job, control, prepared).messages()
    except JobCancelled:
        _forget(control, prepared)
        yield Cancelled()
    except GeneratorExit:
        raise
    except ScanError as error:
        yield Failed("input", str(error))
    except Exception as error:
        detail = traceback.format_exc()
        prepared.clear()
        if is_out_of_memory(error):
            del error
            release_memory()
            kept = "best weights so far are" if isinstance(job, TrainJob) else "volume so far is"
            yield Failed("memory", f"The job ran out of memory: {_smaller(job)}; the {kept} kept.", detail)
        else:
            name, text = type(error).__name__, " ".join(str(error).split())
            yield Failed("bug", f"The job failed unexpectedly ({name}: {text[:200]}): please report it.", detail)


def _run_of(job: Job, control: Control, prepared: Prepared) -> Run[Any] | TrainRun:
    if isinstance(job, TrainJob):
        prepared.clear()  # the memory is for the training
        return TrainRun(job, control)
    if isinstance(job, ReconstructionJob):
        from napari_recon.jobs.padmm import PADMMRun
        from napari_recon.jobs.reconstruct import ReconstructionRun
        from napari_recon.jobs.slabs import SlabsRun, goes_in_slabs

        if goes_in_slabs(job):
            return SlabsRun(job, control, prepared)
        kind = PADMMRun if isinstance(job.parameters, PADMMParameters) else ReconstructionRun
        return kind(job, control, prepared)
    if isinstance(job, DataConsistencyJob):
        from napari_recon.jobs.consistency import DataConsistencyRun

        return DataConsistencyRun(job, control, prepared)
    if isinstance(job, RegularizationJob):
        from napari_recon.jobs.regularization import RegularizationRun

        return RegularizationRun(job, control, prepared)
    if isinstance(job, ResolutionJob):
        from napari_recon.jobs.resolution import ResolutionRun

        return ResolutionRun(job, control, prepared)
    if isinstance(job, SweepJob):
        from napari_recon.jobs.sweep import SweepRun

        return SweepRun(job, control, prepared)
    if isinstance(job, CoilMapsJob):
        from napari_recon.jobs.coil_maps import CoilMapsRun

        return CoilMapsRun(job, control, prepared)
    from napari_recon.jobs.operator import OperatorRun, PatchRun  # needs torch, which the viewer must not load

    if isinstance(job, OperatorJob):
        return OperatorRun(job, control, prepared)
    return PatchRun(job, control, prepared)


def _forget(control: Control, prepared: Prepared) -> None:
    control.volumes.clear()
    prepared.clear()
    release_memory()


def _smaller(job: Job) -> str:
    """What to change where memory ran out, as a part of a sentence."""
    if isinstance(job, TrainJob):
        return "choose fewer or smaller volumes, or a smaller patch or batch"
    if isinstance(job, OperatorJob) and job.operator == "fit":
        return "choose fewer probes, one kernel, a larger voxel size or more binning"
    if isinstance(job, ReconstructionJob) and isinstance(job.slab, int):
        return "choose a thinner slab"
    if isinstance(job, PatchJob) or getattr(getattr(job, "parameters", None), "patch", None):
        return "choose a smaller patch, a larger voxel size or more binning"
    return "choose a larger voxel size or more binning" + ("" if job.device == "cpu" else ", or the device 'cpu'")
