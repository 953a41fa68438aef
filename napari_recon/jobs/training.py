"""Training as a job.

The stream of a :class:`~napari_recon.jobs.job.TrainJob` is: ``Stage("preparing")`` and a ``Progress`` of "preparing" a
scan that was simulated or read; ``Stage("training")`` and a ``Progress`` of "training" a step, with its loss; at the
first validation ``VolumeReady`` of "start", "validation" and, where it is known, "truth", the same patch of a volume
that is not trained on; at every one a ``Progress`` of "validation" with the PSNR, "validation" being updated in place.

Finish keeps the best weights and a checkpoint, from which the same job goes on. Cancel leaves what was there before.
No torch is imported before training begins.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import TrainJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Region, Stage, VolumeReady
from napari_recon.jobs.stages import Control, JobCancelled, provenance
from napari_recon.learning.training import TrainingUpdate, checkpoint_path, stream_training


class TrainRun:
    """The run of a training."""

    def __init__(self, job: TrainJob, control: Control) -> None:
        self.job, self.control = job, control
        self.figures: dict[str, float] = {}

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        began = control.clock()
        before = {path: _contents(path) for path in (job.output, checkpoint_path(job.output))}
        complete = True
        updates = stream_training(job.training, job.output, job.resume)
        try:
            stage, stage_began, first = "", began, 0
            while (update := next(updates, None)) is not None:
                if update.stage != stage:
                    stage, stage_began, first = update.stage, control.clock(), update.step - 1
                    yield Stage(stage)
                yield from self._told(update, control.clock() - stage_began, first)
                control.checkpoint()
                if control.finishing and update.step < update.total:
                    complete = False
                    yield Stage("keeping the best")
                    break
            updates.close()
        except JobCancelled as cancelled:
            with contextlib.suppress(JobCancelled):
                updates.throw(cancelled)  # rather than close, upon which it would keep what it has
            for path, contents in before.items():
                _put_back(path, contents)
            raise
        seconds, peak = control.clock() - began, peak_memory()
        made_by = provenance(job, {**self.figures, "seconds": seconds, "peak_memory": float(peak)}, complete)
        output = str(job.output) if job.output.exists() else None  # finished before the first step
        yield Finished(self.figures, seconds, peak, output, complete, made_by)

    def _told(self, update: TrainingUpdate, seconds: float, first: int) -> Iterator[Message]:
        """What one update says: ``seconds`` of its stage have passed since its step ``first``."""
        self.figures |= update.figures
        name: str = update.stage
        box: Region = ()
        if update.patch is not None:
            name, box = "validation", tuple(slice(0, n) for n in update.patch.shape)
            for volume, values in (("start", update.start), ("validation", update.patch), ("truth", update.truth)):
                if values is not None:
                    yield from self._show(volume, values, update.voxel_size)
        remaining = seconds / max(1, update.step - first) * (update.total - update.step)
        yield Progress(name, update.step, update.total, box, None, seconds, remaining, dict(update.figures))

    def _show(self, name: str, values: NDArray[np.float32], voxel: float) -> Iterator[Message]:
        control = self.control
        new = name not in control.volumes
        volume = control.allocate(name, values.shape) if new else control.volumes[name]
        volume[...] = values
        if new:
            shift = tuple(-(n - 1) / 2 * voxel for n in values.shape)
            yield VolumeReady(name, values.shape, (voxel,) * 3, shift, handle=control.handles.get(name, ""))


def _contents(path: Path) -> bytes | None:
    """What a file holds, or None where there is none; weights and checkpoints take some megabytes."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _put_back(path: Path, contents: bytes | None) -> None:
    if contents is None:
        path.unlink(missing_ok=True)
        return
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(contents)
    os.replace(unfinished, path)
