"""What shows several reconstructions that are one job beside each other: a sweep's, or of both halves of the views."""

from __future__ import annotations

import math

import numpy as np
from napari.layers import Image
from numpy.typing import NDArray

from napari_recon.jobs.job import HALVES, ReconstructionJob, ResolutionJob, SweepJob, sweep_name
from napari_recon.jobs.messages import Failed, Finished, Progress, VolumeReady
from napari_recon.scans.grid import Grid
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import METHOD_NAMES, Display, method_name, told_by

NAME = 9
"""Points of the names and figures in the cells, which are many."""


class PartsDisplay(Display):
    """The results of a job's reconstructions beside each other, slice by slice, with the first one's contrast.

    A layer tells of its own reconstruction, so that it can be run again or its settings be taken.

    Attributes
    ----------
    rows
        Of a sweep, what is told of each value that is done: its ``value``, and figures by name.
    """

    job: ResolutionJob | SweepJob
    rows: tuple[dict[str, float], ...] = ()

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Each takes the next cell; there is room for all from the first one on."""
        cells = self._cells()
        if not self.layers:
            self._begin([], cells, 2)
        else:
            self._colour()  # the first one is whole by now
        made_by = self.part(message)
        told = {"shows": "volume", "job": made_by.model_dump(mode="json"), "volume": "result"}
        layer = shown.volume_layer(self._title(message, made_by), array, message.scale, message.translate, told)
        shown.show_name(layer, NAME)
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
        if self.job.slices is not None and self.job.shape is not None and self.job.voxel_size is not None:
            grid = self.job.coarser(Grid(self.job.shape, self.job.voxel_size))  # the volume is slices of it
        parameter = self.job.parameter
        return self.job.part(next(v for v in self.job.values if sweep_name(parameter, v) == message.name), grid)

    def progressed(self, message: Progress) -> None:
        """Note what is told of a value that is done."""
        super().progressed(message)
        if message.name == "sweep" and isinstance(self.job, SweepJob):
            row = dict(message.figures)
            self.rows = (*self.rows, row)
            if (layer := self.result(row["value"])) is not None:
                words = [f"{row['psnr']:.1f} dB"] if math.isfinite(row.get("psnr", math.nan)) else []
                words += [f"SSIM {row['ssim']:.3f}"] if "ssim" in row else []
                words += [f"residual {row['residual']:.3g}"] if "residual" in row and not words else []
                shown.show_caption(layer, ", ".join(words), NAME)

    def result(self, value: float) -> Image | None:
        """The layer of a sweep's value; None where it has not come, or was deleted."""
        layer = self.layers.get(sweep_name(self.job.parameter, value)) if isinstance(self.job, SweepJob) else None
        return layer if isinstance(layer, Image) else None

    def end(self, message: Finished | Failed) -> None:
        """The last one is whole, too; and each tells of its own making."""
        self._colour()
        super().end(message)
        if not isinstance(message, Finished):
            return
        own: dict[str, dict[str, float]] = {}
        if isinstance(self.job, SweepJob):
            own = {sweep_name(self.job.parameter, row["value"]): row for row in self.rows}
        for name, layer in self.layers.items():
            told, figures = told_by(layer), own.get(name, message.figures)
            made_by = message.provenance | {"job": told.get("job"), "figures": figures}
            layer.metadata[shown.KEY] = told | {"figures": figures, "provenance": made_by}

    def _title(self, message: VolumeReady, made_by: ReconstructionJob) -> str:
        """What a layer is called: short, as a cell is narrow."""
        if not isinstance(self.job, SweepJob):
            return f"{method_name(made_by)}, {message.name}"
        parameters = made_by.parameters
        field = type(parameters).model_fields.get(self.job.parameter)
        title = field.title if field is not None and field.title else self.job.parameter
        name = METHOD_NAMES.get(parameters.method, parameters.method.upper())
        return f"{name}, {title.lower()} {message.name.split()[-1]}"

    def _cells(self) -> shown.Cells:
        """Rows and columns for all volumes that will come."""
        count = len(self.job.values) if isinstance(self.job, SweepJob) else len(HALVES)
        rows = 1 if count <= 3 else 2 if count <= 8 else 3
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
