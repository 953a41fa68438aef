"""Reconstructions that are parts of another job: their messages told under its names, their volumes among its own."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import FDKParameters, PADMMParameters, ReconstructionJob, ZeroFilledParameters
from napari_recon.jobs.messages import Finished, Message, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.stages import Control, Point, Prepared, Shape


def run_part(
    job: ReconstructionJob,
    control: Control,
    name: str,
    prepared: Prepared | None = None,
    told: set[str] | None = None,
) -> Generator[Message, None, Finished]:
    """Run a reconstruction whose result is the volume ``name`` of another job.

    Parameters
    ----------
    job
        The part.
    control
        Of the whole job, which steers the part too; of the part's volumes it gets the result only.
    name
        What the result is called there.
    prepared
        What parts on the same scan and grid leave to each other.
    told
        Notices that need not be told again; those of this part are added.

    Yields
    ------
    The stages, with the name in their detail; ``VolumeReady`` and ``Progress`` of the result; notices.

    Returns
    -------
    How the part ended; ``complete`` is False where Finish was pressed.
    """
    from napari_recon.jobs.padmm import PADMMRun
    from napari_recon.jobs.reconstruct import ReconstructionRun

    parameters = job.parameters
    # What FDK makes is the result itself.
    result = parameters.method if isinstance(parameters, FDKParameters | ZeroFilledParameters) else "result"
    part = PartControl(control, result, name)
    kind = PADMMRun if isinstance(parameters, PADMMParameters) else ReconstructionRun
    run = kind(job, part, Prepared() if prepared is None else prepared)
    finished: Finished | None = None
    for message in run.messages():
        if isinstance(message, Finished):
            finished = message
        elif isinstance(message, Stage):
            yield Stage(message.name, f"{name}, {message.detail}" if message.detail else name)
        elif isinstance(message, VolumeReady) and message.name == result:
            yield replace(message, name=name, handle=control.handles.get(name, ""))
        elif isinstance(message, Progress) and message.name == result:
            yield replace(message, name=name)
        elif isinstance(message, Notice) and (told is None or message.text not in told):
            if told is not None:
                told.add(message.text)
            yield message
    assert finished is not None  # a run ends so, or raises
    return finished


class PartControl(Control):
    """The control of a part: steered by that of the whole job, and with volumes of its own beside the result.

    Parameters
    ----------
    whole
        Of the whole job.
    result
        The volume that lies among the whole job's; None where all are the part's own.
    name
        What that is called there.
    """

    def __init__(self, whole: Control, result: str | None = None, name: str = "") -> None:
        super().__init__()
        self._whole, self._result, self._name = whole, result, name
        self._running, self._finish, self._cancel = whole._running, whole._finish, whole._cancel

    def allocate(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """The result lies where the whole job's volumes do."""
        if name != self._result:
            return super().allocate(name, shape)
        self.volumes[name] = self._whole.allocate(self._name, shape)
        return self.volumes[name]

    @property
    def point(self) -> Point | None:
        """Where the person looks."""
        return self._whole.point

    def checkpoint(self) -> None:
        """Between two steps, as of the whole job."""
        self._whole.checkpoint()

    def clock(self) -> float:
        """The whole job's clock."""
        return self._whole.clock()
