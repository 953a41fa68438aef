"""What every reconstruction method of ours has in common: it tells what it does while it does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

Region = tuple[slice, ...]
"""Slices over a volume's spatial axes."""


@dataclass(frozen=True)
class Update:
    """One step of a reconstruction.

    Attributes
    ----------
    box
        Which part of the volume changed, as slices over its spatial axes.
    values
        The new values in ``box``: (B, C, d, h, w), and only valid until the generator is resumed (methods may hand out
        views of their working volume); copy what is to be kept.
    step, total
        The step just done, from 1, and how many there will be.
    figures
        Numbers of this step by name, for example ``residual``.
    next_box
        What is worked on next, or None after the last step.
    """

    box: Region
    values: Tensor
    step: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)
    next_box: Region | None = None


class StreamingReconstructor(Reconstructor):
    """A deepinv Reconstructor whose work can be watched.

    Subclasses write :meth:`stream`; ``forward`` runs it to its end. Pausing, stopping, progress and live layers need
    nothing else: who consumes the generator decides when, and whether, the next step is taken.
    """

    def stream(self, y: Tensor, physics: Physics, **options: Any) -> Iterator[Update]:
        """Yield the start as step 0, holding the whole volume, then an :class:`Update` a step."""
        raise NotImplementedError

    def forward(self, y: Tensor, physics: Physics, **options: Any) -> Tensor:
        """The reconstruction, (B, C, D, H, W): the last word of :meth:`stream`."""
        updates = self.stream(y, physics, **options)
        volume = next(updates).values
        for update in updates:
            at: Any = (..., *update.box)
            volume[at] = update.values  # free of cost where the method hands out views of its volume
        return volume


def whole(x: Tensor) -> Region:
    """The box of a whole volume (B, C, *spatial)."""
    return tuple(slice(0, n) for n in x.shape[2:])
