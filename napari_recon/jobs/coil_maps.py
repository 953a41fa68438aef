"""The run that shows the coil sensitivities of k-space.

The stream is: ``Stage("reading")``, ``Stage("estimating coil maps")`` where the scan brings none and no job before has
estimated them, ``VolumeReady`` of "coil maps" and "coil maps phase", each (coils, D, H, W): magnitudes, whose squares
sum to one, and radians. They are those that reconstructions take.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from napari_recon.jobs.job import CoilMapsJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message
from napari_recon.jobs.stages import Run


class CoilMapsRun(Run[CoilMapsJob]):
    """The run that shows coil maps."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        yield from self.read()
        self.control.checkpoint()
        maps = self.physics.coil_maps[0].cpu().numpy()
        for name, values in (("coil maps", np.abs(maps)), ("coil maps phase", np.angle(maps))):
            self.control.allocate(name, maps.shape)[...] = values
            yield self.ready_of_coils(name)
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)
