"""What a running job says. Small values that cross processes; volumes stay in shared memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Region = tuple[slice, ...]
"""A box of a volume: a slice an axis, with plain start and stop."""


@dataclass(frozen=True)
class Stage:
    """The job entered a stage: "reading", "fdk", "fitting the normal operator", "reconstructing", "writing", ..."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class VolumeReady:
    """A volume exists from now on: "fdk" and "result" of a reconstruction, "mask", "filter", ... of other jobs.

    ``scale``, ``translate``, ``units`` and ``axis_labels`` are a napari layer's, a number an axis of ``shape``.
    ``handle`` is the shared memory's name when it comes from another process; the consumer of a job in its own
    process finds the array in ``Control.volumes``.
    """

    name: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    translate: tuple[float, ...]
    units: str = "mm"
    handle: str = ""
    axis_labels: tuple[str, ...] = ("z", "y", "x")


@dataclass(frozen=True)
class Progress:
    """A step is done; ``box`` of volume ``name`` holds new values."""

    name: str
    step: int
    total: int
    box: Region
    next_box: Region | None
    seconds: float
    remaining: float | None
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Notice:
    """One sentence for the person, which does not end the job (out of memory, batch halved, say)."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The job ended and its volume stands. ``complete`` is False after Finish was pressed early."""

    figures: dict[str, float]
    seconds: float
    peak_memory: int
    output: str | None = None
    complete: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cancelled:
    """The job was cancelled; nothing was written."""


@dataclass(frozen=True)
class Failed:
    """The job ended in an error; the volume so far stays in its layer.

    ``kind``: "input" (a ScanError, its sentence), "memory", "killed" (the process died), or "bug" (anything else,
    ``detail`` holding the traceback).
    """

    kind: Literal["input", "memory", "killed", "bug"]
    text: str
    detail: str = ""


Message = Stage | VolumeReady | Progress | Notice | Finished | Cancelled | Failed
