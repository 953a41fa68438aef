"""The normal operator in the viewer: the paper's figure, its filter with axes, and the what-if on a patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from napari.layers import Image, Points
from napari.utils.notifications import show_info
from qtpy.QtCore import QTimer

from napari_recon.jobs.job import OperatorJob, PatchJob
from napari_recon.jobs.messages import Failed, Finished, Progress, VolumeReady
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import Display

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

FIGURE = ("x", "exact", "approximate", "filter", "mask", "error")
"""The paper's figure: two rows of three."""
ORDER = (*FIGURE, "regions", "filter 2", "filter 3", "mask phase")
FITTED = ("mask", "filter", "filter 2", "filter 3", "mask phase")
"""What changes while the operator is fitted."""
NAMES = {
    "x": "x",
    "exact": "AᵀAx",
    "approximate": "Hx",
    "error": "squared error",
    "regions": "error by region",
    "mask": "m",
    "mask phase": "phase of m",
    "filter": "λ",
    "filter 2": "λ₂",
    "filter 3": "λ₃",
}
PATCH_NAMES = {"patch exact": "exact step", "patch approximate": "H step", "patch difference": "difference"}
COLOURS = {
    "mask": "viridis",
    "mask phase": "twilight",
    "filter": "inferno",
    "filter 2": "inferno",
    "filter 3": "inferno",
    "error": "hot",
    "regions": "hot",
}
"""Colormaps that are not magma."""
DECADES = 4.0
"""Powers of ten of λ that are shown."""


class OperatorDisplay(Display):
    """A normal operator beside AᵀA, and what is known of it; it outlives its job.

    Attributes
    ----------
    volumes
        The job's arrays by name, as they come; "filter" is log10 of |λ| over its maximum.
    ready
        How they lie in the world, by name.
    curve
        Errors over the rounds of the fit: name -> (round, value).
    figures
        The figures at the end; empty before.
    x
        The name of the layer that it is judged on, or None for FDK.
    file
        The operator's file, once the job has ended.
    complete
        Whether the fit came to its end.
    seconds
        What the job took.
    """

    job: OperatorJob

    def __init__(self, viewer: Viewer, job: OperatorJob, view: str, frame: tuple[Any, ...] = ()) -> None:
        super().__init__(viewer, job, view, frame)
        self.volumes: dict[str, NDArray[np.float32]] = {}
        self.ready: dict[str, VolumeReady] = {}
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self.figures: dict[str, float] = {}
        self.x: str | None = None
        self.file: str | None = None
        self.complete = False
        self.seconds = 0.0
        self._axes_for = 0
        self._outline: shown.PatchOutline | None = None
        viewer.dims.events.ndisplay.connect(self._tidy)

    # -- while the job runs ----------------------------------------------------------------------------------------

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """The paper's figure grows: x, then m and λ while they are fitted, then AᵀA x, H x and the error."""
        name = message.name
        if name == "x phase":  # of MRI: H is judged by magnitudes
            return
        self.volumes[name], self.ready[name] = array, message
        if name == "x":
            self._begin([], (2, 3), None)
        told = self._told(name, "operator")
        scale, translate = message.scale, message.translate
        title = NAMES.get(name, name)
        if name.startswith("filter"):
            # Layers in mm and in 1/mm in one viewer make napari give up units, and a grid has one camera for all cells:
            # so λ takes the place of x, and tells its own axes in its name and its metadata, and by an axes layer.
            told["frequency_step"], told["frequency_zero"] = message.scale, zero_frequency(message)
            title += f" (log10), ±{highest_frequency(message):.2g}/mm"
            scale, translate = self.ready["x"].scale, self.ready["x"].translate
        layer = shown.volume_layer(title, array, scale, translate, told)
        layer.colormap = COLOURS.get(name, "magma")
        layer.visible = name in FIGURE
        if name == "regions":
            layer.interpolation2d = layer.interpolation3d = "nearest"
        if name in FITTED:
            layer.rendering = "translucent"  # they fill the volume: in 3D its surface is to be seen, and its cut
        shown.show_name(layer, 11)
        shown.cut_open(layer, self.view == "cut")
        self._set_limits(name, layer)
        later = [self.layers[n] for n in ORDER[ORDER.index(name) + 1 :] if n in self.layers]
        self._add(name, layer, min(later, key=self.viewer.layers.index, default=None))
        if name in FITTED:
            self.live[name] = shown.LiveVolume(self.viewer, layer)
        if name == "approximate" and "exact" in self.layers:
            first = self.layers["exact"]
            low, high = zip(first.contrast_limits, layer.contrast_limits, strict=True)
            shown.link([first, layer])
            layer.contrast_limits_range, layer.contrast_limits = (0.0, 2 * max(high)), (min(low), max(high))
        layer.events.visible.connect(self._tidy)
        frame = (self.ready["x"].shape, self.ready["x"].scale, self.ready["x"].translate, self.viewer.dims.ndisplay)
        if name == "x" and frame != self.frame:  # else the camera stays where the person has put it
            self.frame = frame
            shown.look_at(self.viewer, [layer], (2, 3))

    def progressed(self, message: Progress) -> None:
        """A step of the fit makes m and all of λ new."""
        for name, value in message.figures.items():
            iteration = int(message.figures.get("iteration", message.step))
            self.curve.setdefault(name, []).append((iteration, value))
        for name in FITTED if message.name == "mask" and message.figures else ():
            if name in self.live:
                self.live[name].changed(tuple(slice(0, n) for n in self.ready[name].shape))
        if "mask" in self.live and message.figures:
            self._set_limits("mask", self.live["mask"].layer)

    def end(self, message: Finished | Failed) -> None:
        """Keep the figures and the file."""
        for name, layer in self.layers.items():
            if name in FITTED:
                self._set_limits(name, layer)
            if isinstance(message, Finished):
                layer.metadata[shown.KEY] |= {"provenance": message.provenance, "figures": message.figures}
        if isinstance(message, Finished):
            self.figures, self.file = message.figures, message.output
            self.complete, self.seconds = message.complete, message.seconds
        super().end(message)

    def _set_limits(self, name: str, layer: Image) -> None:
        if name.startswith("filter"):
            limits: tuple[float, float] | None = (-DECADES, 0.0)
        elif name == "mask phase":
            limits = (-np.pi, np.pi)
        elif name == "regions":
            limits = (0.0, float(np.max(self.volumes[name])) or 1.0)
        else:
            limits = shown.contrast_limits(self.volumes[name])
            if limits is not None and name == "error":
                limits = (0.0, limits[1])
        if limits is not None and np.isfinite(limits).all():
            layer.contrast_limits_range = (min(0.0, limits[0]), max(0.0, limits[1], 2 * limits[1]))
            layer.contrast_limits = limits

    # -- arrangements ----------------------------------------------------------------------------------------------

    @property
    def shows_figure(self) -> bool:
        """Whether there is a layer of all that the paper's figure holds."""
        return all(name in self.layers for name in FIGURE)

    def show_figure(self) -> None:
        """The paper's figure: x, AᵀAx, Hx / λ, m, squared error; in 2D or 3D as the viewer is."""
        self._arrange(FIGURE, (2, 3))
        for name in FIGURE:  # not before: each takes napari a tenth of a second to make
            if name in self.layers:
                _show_colorbar(self.layers[name])

    def show_regions(self) -> None:
        """Where the error is: x, the squared error, and the relative error by region."""
        self._arrange(("x", "error", "regions"), (1, 3))

    def show_filter(self) -> None:
        """λ alone, with its axes in 1/mm."""
        self._arrange(("filter",), (1, 1))

    def _arrange(self, names: Sequence[str], cells: shown.Cells) -> None:
        layers = [self.layers[name] for name in names if name in self.layers]
        if not layers:
            show_info("These layers were deleted: press Fit to have them again.")
            return
        shown.put_in_order(self.viewer, [self.layers[name] for name in ORDER if name in self.layers])
        shown.make_room(self.viewer, layers, cells)
        shown.look_at(self.viewer, layers, cells, 0.96 if cells != (1, 1) else 0.74)  # beside λ alone stand its axes
        self.frame = ()
        self._tidy()

    def mark(self, center: Sequence[float], edge: int) -> None:
        """Draw the box of a patch about a voxel into x; as the job places it, inside the volume."""
        layer = self.layers.get("x")
        if layer is None:
            return
        if self._outline is None:
            self._outline = shown.PatchOutline(self.viewer, layer, color="#4fa8ff")
        box = []
        for c, n in zip(center, layer.data.shape, strict=True):
            p = min(edge, n)
            start = min(max(0, round(c - (p - 1) / 2)), n - p)
            box.append(slice(start, start + p))
        self._outline.show(tuple(box))

    def forget(self, layer: Layer) -> None:
        """The outline goes with x."""
        if layer is self.layers.get("x"):
            self._close_outline()
        super().forget(layer)

    def remove(self, layers: list[Layer] | None = None) -> None:
        """Delete the layers, and let go of the viewer."""
        self.viewer.dims.events.ndisplay.disconnect(self._tidy)
        self._close_outline()
        super().remove(layers)

    def _close_outline(self) -> None:
        if self._outline is not None:
            self._outline.close()
            self._outline = None

    # -- λ's axes --------------------------------------------------------------------------------------------------

    def _add_axes(self) -> None:
        self._axes_for = self.viewer.dims.ndisplay
        axes = filter_axes(self.ready["filter"], self.ready["x"], self._axes_for)
        axes.metadata[shown.KEY] = self._told("axes", "operator")
        self._add("axes", axes)

    def _tidy(self, event: object = None) -> None:
        """λ's axes are shown where λ is shown alone, and the scale in mm where it is not."""
        QTimer.singleShot(0, self._tidy_now)

    def _tidy_now(self) -> None:
        axes, spectrum = self.layers.get("axes"), self.layers.get("filter")
        if spectrum is None:
            return
        alone = [layer for layer in self.viewer.layers if layer.visible and layer is not axes] == [spectrum]
        if alone and axes is not None and self._axes_for != self.viewer.dims.ndisplay:
            self.viewer.layers.remove(axes)
            self.layers.pop("axes", None)
            axes = None
        if alone and axes is None:
            self._add_axes()
            self.viewer.canvas.overlays.scale_bar.visible = False
        elif axes is not None and axes.visible != alone:
            axes.visible = alone
            self.viewer.canvas.overlays.scale_bar.visible = not alone


class PatchDisplay(Display):
    """Gradient steps on a patch, exact and with H, side by side; the steps are the layers' first axis.

    Attributes
    ----------
    steps
        Figures of every step done so far, from 1.
    volumes
        The job's arrays by name.
    """

    job: PatchJob

    def __init__(self, viewer: Viewer, job: PatchJob, view: str, frame: tuple[Any, ...] = ()) -> None:
        super().__init__(viewer, job, view, frame)
        self.steps: dict[int, dict[str, float]] = {}
        self.volumes: dict[str, NDArray[np.float32]] = {}
        self._largest = 0.0

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Three in a row: exact, with H, and the difference in colours about zero; in slices."""
        name = message.name
        if name not in PATCH_NAMES:
            return
        self.volumes[name] = array
        if not self.layers:
            self._begin([], (1, 3), 2)
        layer = shown.volume_layer(
            PATCH_NAMES[name], array, message.scale, message.translate, self._told(name, "patch")
        )
        shown.show_name(layer, 11)
        if name == "patch difference":
            layer.colormap = "PiYG"
        elif (limits := shown.contrast_limits(array[0])) is not None:
            layer.contrast_limits_range, layer.contrast_limits = (0.0, 2 * limits[1]), limits
        self._add(name, layer)
        self.live[name] = shown.LiveVolume(self.viewer, layer)
        if name == "patch approximate" and "patch exact" in self.layers:
            first = self.layers["patch exact"]
            layer.contrast_limits_range, layer.contrast_limits = first.contrast_limits_range, first.contrast_limits
            shown.link([first, layer])
        if len(self.layers) == 1:
            shown.look_at(self.viewer, [layer], (1, 3))
            self.step = 0

    @property
    def shown_now(self) -> bool:
        """Whether one of the three can be seen."""
        return any(layer.visible and layer in self.viewer.layers for layer in self.layers.values())

    @property
    def step(self) -> int:
        """The step that the viewer shows."""
        more = self.viewer.dims.ndim - 4
        if more < 0 or not self.layers:
            return 0
        return int(np.clip(round(self.viewer.dims.point[more]), 0, self.job.steps))

    @step.setter
    def step(self, step: int) -> None:
        more = self.viewer.dims.ndim - 4
        if more >= 0 and self.layers:
            self.viewer.dims.set_point(more, float(step))

    def progressed(self, message: Progress) -> None:
        """All three have a new step; who looks at the last one sees the new one."""
        last = max(self.steps, default=0)
        self.steps[message.step] = message.figures
        for live in self.live.values():
            live.changed(message.box)
        if "patch difference" in self.layers:
            largest = float(np.abs(self.volumes["patch difference"][message.step]).max())
            if np.isfinite(largest) and largest > self._largest:
                self._largest = largest
                layer = self.layers["patch difference"]
                layer.contrast_limits_range = (-2 * largest, 2 * largest)
                layer.contrast_limits = (-largest, largest)
        if self.step == last:
            self.step = message.step

    def end(self, message: Finished | Failed) -> None:
        """The difference tells its scale."""
        if "patch difference" in self.layers and self._largest > 0:
            self.layers["patch difference"].name = f"difference, ±{self._largest:.1g}/mm"
        super().end(message)

    def arrange(self) -> None:
        """Show the three again."""
        layers = list(self.layers.values())
        if layers:
            self._before = shown.Arrangement(self.viewer)
            shown.make_room(self.viewer, layers, (1, 3), 2)
            shown.look_at(self.viewer, layers, (1, 3))

    def leave(self) -> None:
        """Hide the three and show what was there before."""
        for layer in self.layers.values():
            layer.visible = False
        if self._before is not None:
            self._before.restore(self.viewer)


# -- λ in the place of a volume ------------------------------------------------------------------------------------


def zero_frequency(ready: VolumeReady) -> tuple[int, ...]:
    """The index of the zero frequency in a "filter" volume."""
    return tuple(round(-t / s) for t, s in zip(ready.translate, ready.scale, strict=True))


def highest_frequency(ready: VolumeReady) -> float:
    """The largest frequency along any axis, in 1/mm."""
    axes = zip(ready.translate, ready.scale, ready.shape, strict=True)
    return max(max(abs(first), abs(first + (n - 1) * step)) for first, step, n in axes)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most ``count`` + 1 round frequencies between two."""
    return [round(float(f), 12) for f in MaxNLocator(count).tick_values(low, high) if low <= f <= high]


def filter_axes(ready: VolumeReady, x: VolumeReady, ndisplay: int) -> Points:
    """Axes in 1/mm beside a filter that is drawn in the place of x: rows of dots, and numbers at some of them.

    In 2D they lie in the middle slice, f_x below and f_y on the left. In 3D they meet at the lower edge of the plane
    that cuts the volume open.
    """
    n, step, zero = np.array(x.shape), np.array(x.scale), np.array(zero_frequency(ready))
    low, high = np.array(x.translate) - step / 2, np.array(x.translate) + (n - 0.5) * step
    middle = np.array(x.translate) + zero * step
    edge = float(np.max(high - low))
    outside = 0.02 * edge
    if ndisplay == 2:
        corner = np.array([middle[0], high[1] + outside, low[2] - outside])
        beside = {1: (0.0, 0.0, -0.06), 2: (0.0, 0.04, 0.0)}  # where numbers stand, in edges
        ends = {1: -1, 2: 1}  # y grows downwards, to the corner
    else:
        corner = np.array([low[0] - outside, middle[1], low[2] - outside])
        beside = {0: (0.0, 0.0, -0.06), 1: (0.0, 0.0, -0.06), 2: (-0.05, 0.0, 0.0)}
        ends = {0: 1, 1: 1, 2: 1}
    where: list[NDArray[np.float64]] = []
    text: list[str] = []
    size: list[float] = []
    for axis in (axis for axis in beside if n[axis] > 1):
        first, last = -zero[axis] * ready.scale[axis], (n[axis] - 1 - zero[axis]) * ready.scale[axis]
        round_ones = ticks(first, last)
        frequencies = np.array(
            [*np.linspace(first, last, 81), *round_ones, *round_ones, last if ends[axis] > 0 else first]
        )
        points = np.tile(corner, (len(frequencies), 1))
        points[:, axis] = middle[axis] + frequencies / ready.scale[axis] * step[axis]
        points[-1 - len(round_ones) :] += np.array(beside[axis]) * edge
        if (ndisplay, axis) == (2, 1):
            points[-1, 2] = corner[2]  # above its axis, else it would be cut off
        points[-1, axis] += ends[axis] * 0.07 * edge
        where += list(points)
        size += [0.004 * edge] * 81 + [0.012 * edge] * len(round_ones) + [0.0] * (len(round_ones) + 1)
        text += [""] * (81 + len(round_ones)) + [f"{f:g}" for f in round_ones] + [f"f_{'zyx'[axis]}, 1/mm"]
    return Points(
        np.array(where),
        name="λ axes (1/mm)",
        size=np.maximum(size, 1e-4 * edge),
        face_color=np.array([(1.0, 1.0, 1.0, float(s > 0)) for s in size]),
        border_color="transparent",
        border_width=0,
        features={"tick": text},
        text={"string": "{tick}", "size": 9, "color": "white", "anchor": "center"},
        axis_labels=("z", "y", "x"),
        units=("mm",) * 3,
    )


def can_be_judged_on(layer: Layer) -> bool:
    """Whether a layer is a volume in mm that an operator can be tried on, rather than one of the operator's own."""
    told = layer.metadata.get(shown.KEY)
    shows = told.get("shows", "projections" if "scan" in told else "volume") if isinstance(told, dict) else "volume"
    if not isinstance(layer, Image) or layer.ndim != 3 or layer.rgb or layer.multiscale or shows != "volume":
        return False
    edge = layer.scale[0]
    return all(str(unit) == "millimeter" for unit in layer.units) and bool(np.allclose(layer.scale, edge, rtol=1e-4))


def write_layer(layer: Image, path: Path) -> None:
    """Write a layer's volume as a TIFF that keeps its place; takes a while: call it from a thread."""
    from napari_recon.jobs.volumes import write_volume
    from napari_recon.scans.grid import Grid

    data = np.asarray(layer.data, dtype=np.float32)
    voxel, first = float(layer.scale[0]), np.asarray(layer.translate, dtype=float)
    z, y, x = (float(c) for c in first + (np.array(data.shape) - 1) / 2 * voxel)
    d, h, w = data.shape
    write_volume(path, data, Grid((d, h, w), voxel, (x, y, z)), {})


def _show_colorbar(layer: Image) -> None:
    """A narrow colour bar in the layer's corner, where this napari has one."""
    bar = getattr(layer, "colorbar", None)
    if bar is not None:
        bar.size, bar.font_size, bar.tick_length, bar.visible = (8, 60), 7, 2, True
