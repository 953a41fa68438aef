"""What shows several reconstructions that are one job: a sweep's values as a filmstrip, or both halves of the views."""

from __future__ import annotations

import math

import numpy as np
from napari.layers import Image
from numpy.typing import NDArray

from napari_recon.jobs.job import HALVES, ReconstructionJob, ResolutionJob, SweepJob, sweep_name
from napari_recon.jobs.messages import Failed, Finished, VolumeReady
from napari_recon.scans.grid import Grid
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import Display, method_name


class PartsDisplay(Display):
    """The results of a job's reconstructions beside each other, slice by slice, with the first one's contrast.

    A layer tells of its own reconstruction, so that it can be run again or its settings be taken.
    """

    job: ResolutionJob | SweepJob

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Each takes the next cell; there is room for all from the first one on."""
        cells = self._cells()
        if not self.layers:
            self._begin([], cells, 2)
        else:
            self._colour()  # the first one is whole by now
        made_by = self.part(message)
        told = {"shows": "volume", "job": made_by.model_dump(mode="json"), "volume": "result"}
        name = f"{method_name(made_by)}, {message.name}"
        layer = shown.volume_layer(name, array, message.scale, message.translate, told)
        self._add(message.name, layer)
        self._colour()
        self.live[message.name] = shown.LiveVolume(self.viewer, layer)
        shown.link([live.layer for live in self.live.values()])
        frame = (message.shape, message.scale, message.translate, cells)
        if frame != self.frame:
            self.frame = frame
            shown.look_at(self.viewer, [layer], cells)

    def part(self, message: VolumeReady) -> ReconstructionJob:
        """The reconstruction that a volume is the result of."""
        d, h, w = message.shape
        grid = Grid((d, h, w), message.scale[0])
        if isinstance(self.job, ResolutionJob):
            return self.job.half(next(half for half, name in HALVES.items() if name == message.name), grid)
        parameter = self.job.parameter
        return self.job.part(next(v for v in self.job.values if sweep_name(parameter, v) == message.name), grid)

    def end(self, message: Finished | Failed) -> None:
        """The last one is whole, too."""
        self._colour()
        super().end(message)

    def _cells(self) -> shown.Cells:
        """Rows and columns for all volumes that will come."""
        count = len(self.job.values) if isinstance(self.job, SweepJob) else len(HALVES)
        rows = 1 if count <= 4 else 2 if count <= 8 else 3
        return rows, math.ceil(count / rows)

    def _colour(self) -> None:
        """All have the contrast of the first, as soon as that holds something."""
        first = next(iter(self.layers.values()), None)
        if not isinstance(first, Image) or (limits := shown.contrast_limits(first.data)) is None:
            return
        for layer in self.layers.values():
            if isinstance(layer, Image):
                layer.contrast_limits_range = (min(0.0, limits[0]), 2 * limits[1])
                layer.contrast_limits = limits
