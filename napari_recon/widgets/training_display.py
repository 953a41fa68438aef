"""A training in the viewer: its curves, and a validation patch beside the truth, as pictures and as layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from napari_recon.jobs.job import TrainJob
from napari_recon.jobs.messages import Failed, Finished, Progress, VolumeReady
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import Display

if TYPE_CHECKING:
    import numpy as np
    from napari.viewer import Viewer
    from numpy.typing import NDArray

NAMES = {"start": "start", "validation": "trained", "truth": "truth"}
"""The volumes of a training in their order, and what their layers are called."""
MEMORY = 0.98
"""How much of the smoothed loss stays from step to step, once there are enough of them."""


class TrainingDisplay(Display):
    """What is known of a training; it outlives its job. Layers are only made where they are asked for.

    Attributes
    ----------
    volumes
        A patch of a validation volume, (p, p, p): "start", "validation" (as trained so far) and "truth".
    validated
        The step that "validation" is of.
    curve
        Over the steps, name -> (step, value): "loss", smoothed; "psnr" and "start_psnr" of the validation.
    figures
        The latest figures.
    output
        The file of the best weights, once the job has ended.
    complete
        Whether training came to its end.
    """

    job: TrainJob

    def __init__(self, viewer: Viewer, job: TrainJob, view: str, frame: tuple[Any, ...] = ()) -> None:
        super().__init__(viewer, job, view, frame)
        self.volumes: dict[str, NDArray[np.float32]] = {}
        self.ready: dict[str, VolumeReady] = {}
        self.validated = 0
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self.figures: dict[str, float] = {}
        self.output: str | None = None
        self.complete = False
        self._over = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep when the job fails."""
        return not self.curve

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Keep a volume."""
        self.volumes[message.name], self.ready[message.name] = array, message

    def progressed(self, message: Progress) -> None:
        """Lengthen the curves."""
        super().progressed(message)
        self.figures |= message.figures
        for name in ("loss", "psnr", "start_psnr"):
            if name in message.figures:
                points = self.curve.setdefault(name, [])
                value = message.figures[name]
                if name == "loss" and points:
                    keep = min(MEMORY, len(points) / (len(points) + 1))  # a mean at first
                    value = keep * points[-1][1] + (1 - keep) * value
                points.append((message.step, value))
        if message.name == "validation":
            self.validated = message.step

    def end(self, message: Finished | Failed) -> None:
        """Say where the weights are."""
        super().end(message)
        self._over = True
        if isinstance(message, Finished):
            self.output, self.complete = message.output, message.complete
        elif "best_psnr" in self.figures:  # what was found before is kept
            self.output = str(self.job.output)

    def show_layers(self) -> None:
        """Make the patch layers beside each other, or make them visible again; they follow the training."""
        names = [name for name in NAMES if name in self.volumes]
        if not names:
            return
        mine = [layer for layer in self.layers.values() if layer in self.viewer.layers]
        self._before = None
        self._begin(mine, (1, len(names)), 3)
        for layer in mine:
            layer.visible = True
        missing = [name for name in names if name not in self.layers]
        limits = shown.contrast_limits(self.volumes.get("truth", self.volumes["validation"]))
        for name in missing:
            ready = self.ready[name]
            layer = shown.volume_layer(
                NAMES[name], self.volumes[name], ready.scale, ready.translate, self._told(name, "training")
            )
            if limits is not None:
                layer.contrast_limits_range = (min(0.0, limits[0]), 2 * limits[1])
                layer.contrast_limits = limits
            shown.cut_open(layer, self.view == "cut")
            self._add(name, layer)
            if name == "validation" and not self._over:
                self.live[name] = shown.LiveVolume(self.viewer, layer)
        if missing:
            shown.link([self.layers[name] for name in names])
        shown.look_at(self.viewer, [self.layers[names[0]]], (1, len(names)))
