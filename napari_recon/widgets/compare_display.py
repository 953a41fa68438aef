"""Volumes beside each other in the viewer: alike in contrast, with captions, differences, a curtain, and a line."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.experimental import layers_linked, unlink_layers
from napari.layers import Image, Labels, Shapes
from napari.utils.colormaps import Colormap
from qtpy.QtCore import QObject, QTimer, Signal

from napari_recon.measures.comparison import (
    Region,
    box_region,
    field_of_view,
    field_of_view_region,
    is_on_grid,
    label_regions,
    on_grid,
)
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import told_by

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

LEAST, MOST = 2, 6
"""Volumes that can be compared at once."""
REACH = 99.5
"""Percentile of a difference's magnitudes at which its colours would end; that of the middle one is taken for all."""
ABOUT_ZERO = Colormap(
    [(0.6, 0.9, 1.0), (0.1, 0.45, 0.9), (0.0, 0.0, 0.0), (0.9, 0.35, 0.05), (1.0, 0.85, 0.5)], name="about zero"
)
"""Blue for too little, orange for too much, and black, as the canvas is, for no difference."""
LARGE, SMALL = 12, 9
"""Points of what is written into large and small cells."""
GRASP = 12
"""Pixels from the curtain's edge within which it can be taken hold of."""
CONTRAST = ("contrast_limits", "contrast_limits_range")
"""What volumes of several units cannot share."""
COMPARED = ("volume", "training")
"""What layers of ours show that can be compared."""
Ends = tuple[tuple[float, float, float], tuple[float, float, float]]
"""The ends of a line, (z, y, x) in mm."""


@dataclass(frozen=True)
class LayerVolume:
    """A layer's values and where they lie, as measures take them.

    Attributes
    ----------
    data
        (D, H, W), float32; of labels whole numbers.
    voxel_size
        mm; None where the layer has no unit of length.
    grid
        Where the voxels are; in voxels of the layer's own where it has no unit.
    """

    data: NDArray[Any]
    voxel_size: float | None
    grid: Grid


def can_be_compared(layer: Layer) -> bool:
    """Whether a layer is a volume (z, y, x) of values, rather than projections or something that was derived."""
    told = told_by(layer)
    shows = told.get("shows", "projections" if "scan" in told and "job" not in told else "volume")
    return isinstance(layer, Image) and layer.ndim == 3 and not (layer.rgb or layer.multiscale) and shows in COMPARED


def volume_of(layer: Layer) -> LayerVolume:
    """A layer's volume; converts what is no float32, which takes a while: call it from a thread then."""
    grid = shown.grid_of(layer)
    data = np.asarray(layer.data, dtype=np.float32)
    return LayerVolume(data, grid.voxel_size if shown.is_in_mm(layer) else None, grid)


# -- volumes that are computed where they are looked at ------------------------------------------------------------


class Derived:
    """A volume made of two others where it is looked at: in 2D a slice at a time, and nothing of it is kept.

    Parameters
    ----------
    first, second
        (D, H, W), of the same shape.
    """

    dtype, ndim = np.dtype(np.float32), 3

    def __init__(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        self.first, self.second = first, second
        self.shape: tuple[int, ...] = first.shape
        self.size = math.prod(self.shape)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole volume, for who must have it."""
        whole = self[:, :, :]
        return whole if dtype is None else whole.astype(dtype)


class Difference(Derived):
    """The first less the second."""

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        return np.subtract(self.first[key], self.second[key], dtype=np.float32)


class Curtain(Derived):
    """The first before a place on an axis, the second from there on.

    Attributes
    ----------
    axis
        The axis across which the curtain is drawn.
    place
        The first voxel along it that is the second's.
    """

    def __init__(self, first: NDArray[Any], second: NDArray[Any], axis: int) -> None:
        super().__init__(first, second)
        self.axis = axis
        self.place = self.shape[axis] // 2

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        along = np.arange(self.shape[self.axis]) < self.place
        is_first = np.broadcast_to(np.expand_dims(along, [a for a in range(3) if a != self.axis]), self.shape)
        return np.where(is_first[key], self.first[key], self.second[key]).astype(np.float32, copy=False)


# -- regions -------------------------------------------------------------------------------------------------------


def regions(layer: Labels | Shapes | None, grid: Grid) -> list[Region]:
    """Where is measured: what a layer marks, or the field of view; takes a while: call it from a thread.

    Parameters
    ----------
    layer
        Labels, each a region; or Shapes, whose bounding boxes are regions: what is flat across an axis, as what was
        drawn on a slice, reaches through the volume along it. None is the field of view.
    grid
        The grid that is measured on.

    Raises
    ------
    ScanError
        If nothing is marked on the grid.
    """
    if layer is None:
        return [field_of_view_region(grid)]
    if isinstance(layer, Shapes):
        found = []
        for i, shape in enumerate(layer.data, 1):
            corners = np.array([layer.data_to_world(vertex) for vertex in shape])
            low, high = np.full(3, -np.inf), np.full(3, np.inf)
            low[-corners.shape[1] :], high[-corners.shape[1] :] = corners.min(0)[-3:], corners.max(0)[-3:]
            flat = high - low < np.array(grid.scale) / 2
            low[flat], high[flat] = -np.inf, np.inf
            found.append(box_region(grid, tuple(low), tuple(high), f"box {i}"))
        if not found:
            raise ScanError(f"Nothing is drawn in {layer.name}: draw a rectangle, or measure in the field of view.")
        return found
    marked = np.asarray(layer.data)
    if marked.ndim != 3:
        raise ScanError(f"{layer.name} has {marked.ndim} axes: label a volume, with three.")
    if marked.shape != grid.shape or shown.is_in_mm(layer):
        place = shown.grid_of(layer)
        volume = LayerVolume(marked, place.voxel_size if shown.is_in_mm(layer) else None, place)
        marked = on_grid(volume, grid, order=0)
    return label_regions(marked)


# -- the comparison ------------------------------------------------------------------------------------------------


def best_cells(count: int, height: float, width: float, canvas: Sequence[float], bands: bool = False) -> shown.Cells:
    """Rows and columns that show volumes largest.

    Parameters
    ----------
    count
        How many there are.
    height, width
        What a slice of one measures, in any unit.
    canvas
        (height, width) of the canvas in pixels.
    bands
        Whether every row of volumes has one of differences beneath it; the last volume has none.
    """
    best, zoom = (1, count), 0.0
    worth = 1.35 if bands else 1.02  # what stands in one row is compared more easily
    for columns in range(count, 0, -1):
        if bands and count % columns:
            continue  # what is beneath would not be what it belongs to
        rows = math.ceil(count / columns) * (2 if bands else 1)
        now = min(canvas[0] / rows / height, canvas[1] / columns / width)
        if now > worth * zoom:
            best, zoom = (rows, columns), now
    return best


class _Look:
    """How a layer looked, to give it back."""

    NAMES = (*shown.LINKED, "units", "scale", "translate", "visible")

    def __init__(self, layer: Image) -> None:
        self.layer = layer
        self.values = {name: getattr(layer, name) for name in self.NAMES}
        overlay = getattr(layer, "name_overlay", None)
        self.name = None if overlay is None else (overlay.position, overlay.font_size, overlay.visible)

    def give_back(self) -> None:
        """The layer looks as it did."""
        for name, value in self.values.items():
            if not np.array_equal(getattr(self.layer, name), value):
                setattr(self.layer, name, value)
        shown.show_caption(self.layer, "")
        if self.name is not None:
            overlay = self.layer.name_overlay
            overlay.position, overlay.font_size, overlay.visible = self.name


class Comparison(QObject):
    """Two to six volumes beside each other in a viewer, until it is left.

    The layers are the person's own: they are put in order, linked, and given back as they were. Differences and the
    curtain are layers of their own that hold no data.

    Parameters
    ----------
    viewer
        The viewer.
    layers
        The volumes; none is left out of what :func:`can_be_compared`.
    reference
        One of them, which the others are compared with; None for none.
    differences
        Whether to show differences at once.

    Attributes
    ----------
    layers
        The volumes in the order of the grid, the reference last.
    grid
        The grid that is measured on, the reference's; the first volume's where there is none.
    arrays
        The volumes on that grid, by layer; one that lies elsewhere is not there until it was resampled.
    resampled
        The names of those that were.
    fits
        Scale and offset of the volumes that were brought to the reference's unit; their layers keep their own.
    differences
        The layers of differences, by the volume's; empty while they are not shown.
    curtain
        The layer with the curtain; None while it is not drawn.
    line
        The ends of the line that was drawn, on the slice that is shown; None where there is none.

    Raises
    ------
    ScanError
        If a layer is turned or mirrored.
    """

    changed = Signal()
    """Something was deleted, or the comparison was left."""
    line_moved = Signal()
    """The line was drawn, or taken away."""
    slice_moved = Signal()
    """The line lies on another slice now."""
    curtain_moved = Signal()

    def __init__(
        self, viewer: Viewer, layers: Sequence[Image], reference: Image | None, differences: bool = False
    ) -> None:
        super().__init__()
        self.viewer, self.reference = viewer, reference
        self.layers = [layer for layer in layers if layer is not reference]
        if reference is not None:
            self.layers.append(reference)
        self.grid = shown.grid_of(self._gauge())
        self.arrays: dict[Image, NDArray[np.float32]] = {}
        self.resampled: list[str] = []
        self.fits: dict[Image, tuple[float, float]] = {}
        self.differences: dict[Image, Image] = {}
        self._reaches: dict[Image, float] = {}
        self.curtain: Image | None = None
        self.drawing = False
        self.left = False
        self._elsewhere: list[Image] = []
        for layer in self.layers:
            place = shown.grid_of(layer)
            if not is_on_grid(
                LayerVolume(layer.data, place.voxel_size if shown.is_in_mm(layer) else None, place), self.grid
            ):
                self._elsewhere.append(layer)
            elif isinstance(layer.data, np.ndarray) and layer.data.dtype == np.float32:
                self.arrays[layer] = layer.data
        self._before = shown.Arrangement(viewer)
        self._dims = viewer.dims.order, viewer.dims.point
        self._order = list(viewer.layers)
        self._looks = {layer: _Look(layer) for layer in self.layers}
        self._links = contextlib.ExitStack()
        self._with_differences = differences and reference is not None
        self._busy = self._fitting_contrast = False
        self._text, self._cell = LARGE, 0.0
        self._line: tuple[tuple[int, ...], NDArray[np.float64], NDArray[np.float64]] | None = None
        self._outlines: dict[Image, shown.LineOutline] = {}
        self._edge: shown.LineOutline | None = None
        self._alike()
        self.arrange(self._update_differences)
        viewer.layers.events.removed.connect(self._on_removed)
        viewer.dims.events.point.connect(self._on_point)
        viewer.dims.events.order.connect(self._on_axes)
        viewer.dims.events.ndisplay.connect(self._on_axes)
        viewer.mouse_drag_callbacks.append(self._on_press)

    def _gauge(self) -> Image:
        """The layer whose grid is measured on: one that has a unit, if one of the reference's shape has."""
        first = self.reference if self.reference is not None else self.layers[0]
        same = [layer for layer in self.layers if layer.data.shape == first.data.shape and shown.is_in_mm(layer)]
        return first if shown.is_in_mm(first) or not same else same[0]

    # -- side by side ----------------------------------------------------------------------------------------------

    def _alike(self) -> None:
        """One contrast, one gamma, one colormap; volumes without a unit lie where the one they are measured on lies."""
        first, gauge = self.layers[0], self._gauge()
        known = self.arrays.get(self.reference if self.reference is not None else first, first.data)
        limits = shown.contrast_limits(known) if isinstance(known, np.ndarray) else None
        reach = first.contrast_limits_range
        if limits is None:
            limits = first.contrast_limits
        else:
            reach = min(0.0, limits[0]), 2 * limits[1]
        for layer in self.layers:
            for name in (name for name in shown.LINKED if not name.startswith("contrast_limits")):
                if getattr(layer, name) != getattr(first, name):
                    setattr(layer, name, getattr(first, name))
            layer.contrast_limits_range, layer.contrast_limits = reach, limits
            if not shown.is_in_mm(layer) and shown.is_in_mm(gauge) and layer.data.shape == gauge.data.shape:
                layer.units, layer.scale, layer.translate = gauge.units, gauge.scale, gauge.translate
        self._links.enter_context(layers_linked(self.layers, shown.LINKED))

    def arrange(self, change: Callable[[], None] = lambda: None) -> None:
        """Show the grid: the volumes, and beneath them their differences where those are asked for.

        Parameters
        ----------
        change
            Adds or removes layers first: napari then builds the grid only once.
        """
        viewer = self.viewer
        again = viewer.dims.ndisplay == 2 and viewer.dims.ndim == 3
        point = viewer.dims.point
        height, width = (self.grid.extent[axis] for axis in self._displayed)
        with viewer.layers.batched_update():
            change()
            bands = bool(self.differences) and len(self.differences) == len(self.layers) - 1
            cells = best_cells(len(self.layers), height, width, viewer.canvas.size, bands)
            order: list[Image] = []
            for first in range(0, len(self.layers), cells[1]):
                row = self.layers[first : first + cells[1]]
                order += row + [self.differences[layer] for layer in row if layer in self.differences]
            shown.put_in_order(viewer, order)
            shown.make_room(viewer, order, cells, 2)
            self._cell = viewer.canvas.size[1] / cells[1]
            self._text = (
                LARGE if min(viewer.canvas.size[0] / cells[0], viewer.canvas.size[1] / cells[1]) > 300 else SMALL
            )
            for layer in order:
                if shown.caption(layer):
                    shown.show_caption(layer, shown.caption(layer), self._text)
                else:
                    shown.show_name(layer, self._text)
            self._caption_differences()
        shown.look_at(viewer, [self._gauge()], cells)
        self._leave_room(cells, height, width)
        if again and self._sees(point):  # the slice that the person looked at
            viewer.dims.set_point(range(3), point)
        # Python's full collection looks at all that was ever imported, a third of a second amid the slice slider.
        # napari has just collected; what there is now is looked at again when the comparison is left.
        gc.freeze()

    def _leave_room(self, cells: shown.Cells, height: float, width: float) -> None:
        """Let the slices begin below what is written over them."""
        camera, (rows, columns) = self.viewer.scene.camera, self.viewer.canvas.size
        tall, room = rows / cells[0], 4 * self._text + 14
        if tall < 2 * room:
            return
        camera.zoom = 0.97 * min((tall - room) / height, columns / cells[1] / width)
        lower = max(0.0, room - (tall - camera.zoom * height) / 2) / camera.zoom
        centre = list(camera.center)
        centre[-2] -= lower
        camera.center = tuple(centre)

    @property
    def _displayed(self) -> list[int]:
        """The two axes of a volume that slices show, (z, y, x) being 0, 1, 2."""
        more = self.viewer.dims.ndim - 3
        return [max(axis - more, 0) for axis in self.viewer.dims.order[-2:]]

    def _sees(self, point: Sequence[float]) -> bool:
        first, extent = np.array(self.grid.translate), np.array(self.grid.extent)
        place = np.array(point[-3:]) - first
        return bool(np.all(place >= 0) and np.all(place <= extent))

    def look_along(self, axis: int) -> None:
        """Show slices across an axis (0, 1, 2 for z, y, x), through the place that is shown now."""
        viewer = self.viewer
        more, point = viewer.dims.ndim - 3, viewer.dims.point
        rest = [a for a in range(3) if a != axis]
        with viewer.layers.batched_update():
            viewer.dims.ndisplay = 2
            viewer.dims.order = (*range(more), more + axis, *(more + a for a in rest))
        if self.curtain is None:
            self.arrange()
        else:
            shown.look_at(viewer, [self.curtain])
        viewer.dims.set_point(range(viewer.dims.ndim), point)

    def caption(self, layer: Image, text: str) -> None:
        """Write a figure into a volume's cell, below its name."""
        if layer in self.layers:
            shown.show_caption(layer, text, self._text)

    def take_array(self, layer: Image, array: NDArray[np.float32]) -> None:
        """A volume that lies on another grid, or is no float32, was brought onto the one that is measured on."""
        if layer not in self.layers:
            return
        if layer in self._elsewhere:
            self.resampled.append(layer.name)
        self.arrays[layer] = array
        if self._with_differences:
            self.show_differences(True)

    def take_fit(self, layer: Image, array: NDArray[np.float32], scale: float, offset: float) -> None:
        """A volume was brought to the reference's unit; its layer is shown with the same contrast in its own unit."""
        if layer not in self.layers or self.reference is None:
            return
        self.arrays[layer], self.fits[layer] = array, (scale, offset)
        unlink_layers([layer], CONTRAST)
        if len(self.fits) == 1:
            self.reference.events.contrast_limits.connect(self._fit_contrast)
        layer.events.contrast_limits.connect(self._fit_contrast)
        self._fit_contrast()

    def _fit_contrast(self, event: Any = None) -> None:
        """Show values that stand for the same as the same, whichever layer's contrast was changed."""
        if self._fitting_contrast or self.left or self.reference is None:
            return
        self._fitting_contrast = True
        source = self.reference if event is None else event.source
        scale, offset = self.fits.get(source, (1.0, 0.0))
        limits = [scale * value + offset for value in source.contrast_limits]
        for layer in [*self.fits, self.reference]:
            scale, offset = self.fits.get(layer, (1.0, 0.0))
            if layer is source or layer not in self.layers or not scale > 0:  # upside down there is no contrast
                continue
            low, high = ((value - offset) / scale for value in limits)
            layer.contrast_limits_range = min(low, 2 * low - high), 2 * high - low
            layer.contrast_limits = low, high
        self._fitting_contrast = False

    # -- differences -----------------------------------------------------------------------------------------------

    @property
    def with_differences(self) -> bool:
        """Whether differences are asked for."""
        return self._with_differences

    def show_differences(self, wanted: bool) -> None:
        """Show what each volume has more (or less) than the reference beneath it, in colours about zero; or no more."""
        if self.reference is None:
            return
        self._with_differences = wanted
        if self.curtain is None:
            self.arrange(self._update_differences)
        else:
            self._update_differences()
        self._show_line()

    def _update_differences(self) -> None:
        """Make the layers of differences that are wanted and can be had, or delete them."""
        truth = None if self.reference is None else self.arrays.get(self.reference)
        if not self._with_differences or self.reference is None or truth is None:
            self._remove(list(self.differences.values()))
            self.differences = {}
            return
        inside = field_of_view(self.grid)
        step = max(1, round((truth.size / 200_000) ** (1 / 3)))
        for layer in self.layers:
            if layer is self.reference or layer in self.differences or layer not in self.arrays:
                continue
            difference: Any = Difference(self.arrays[layer], truth)  # an array as far as napari is concerned
            sample = difference[::step, ::step, ::step][:, inside[::step, ::step]]
            sample = np.abs(sample[np.isfinite(sample)])
            self._reaches[layer] = float(np.percentile(sample, REACH)) if sample.size else 0.0
            told = {"shows": "difference", "of": [layer.name, self.reference.name]}
            name = f"{layer.name} − {self.reference.name}"
            made = shown.volume_layer(name, difference, self.grid.scale, self.grid.translate, told)
            made.colormap, made.rendering, made.visible = ABOUT_ZERO, "mip", False
            made.events.contrast_limits.connect(self._caption_differences)
            self.viewer.layers.append(made)
            self.differences[layer] = made
        if not self.differences:  # all lie elsewhere, and are being resampled
            return
        # The worst of them, FDK often, would hide what is left of the others.
        reaches = sorted(self._reaches[layer] for layer in self.differences)
        reach = reaches[(len(reaches) - 1) // 2] or max(reaches) or 1.0
        for made in self.differences.values():
            made.contrast_limits_range, made.contrast_limits = (-4 * reach, 4 * reach), (-reach, reach)
        if len(self.differences) > 1:
            self._links.enter_context(layers_linked(list(self.differences.values()), shown.LINKED))

    def _caption_differences(self, event: object = None) -> None:
        """Say what their colours are, in as many words as there is room for: a letter is as wide as its size."""
        for made in self.differences.values():
            low, high = made.contrast_limits
            told = f"{low:.2g} … {high:+.2g}".replace("-", "−")
            named = f"blue {told} orange"
            shown.show_caption(made, named if len(named) * self._text < self._cell else told, self._text)

    # -- the curtain -----------------------------------------------------------------------------------------------

    def show_curtain(self, left: Image, right: Image) -> bool:
        """Show one volume left of a curtain and another right of it, on one slice; False where one is not there yet."""
        if left not in self.arrays or right not in self.arrays:
            return False
        axis = self._displayed[1]
        array: Any = Curtain(self.arrays[left], self.arrays[right], axis)
        name = f"{left.name} | {right.name}"
        if self.curtain is None:
            told = {"shows": "curtain"}
            layer = shown.volume_layer(name, array, self.grid.scale, self.grid.translate, told)
            layer.rendering = "mip"
            like = self.reference if self.reference is not None and self.fits else left  # which is of one unit
            for attribute in shown.LINKED:
                setattr(layer, attribute, getattr(like, attribute))
            with self.viewer.layers.batched_update():
                self.viewer.layers.append(layer)
                shown.make_room(self.viewer, [layer], (1, 1), 2)
            point = self.viewer.dims.point
            shown.look_at(self.viewer, [layer])
            self.viewer.dims.set_point(range(self.viewer.dims.ndim), point)
            self._links.enter_context(layers_linked([layer, like], shown.LINKED))
            self.curtain = layer
            self._edge = shown.LineOutline(self.viewer, layer, "#ffffff")
        else:
            array.place = self.curtain.data.place
            self.curtain.data, self.curtain.name = array, name
        self._show_edge()
        self._show_line()
        return True

    def hide_curtain(self) -> None:
        """Show the grid again."""
        if self.curtain is None:
            return
        self._close_edge()
        layer, self.curtain = self.curtain, None
        self.arrange(lambda: self._remove([layer]))
        self._show_line()

    @property
    def curtain_place(self) -> float:
        """Where the curtain is, 0 at the left edge of the slice and 1 at the right."""
        if self.curtain is None:
            return 0.5
        array = self.curtain.data
        return float(array.place / array.shape[array.axis])

    @curtain_place.setter
    def curtain_place(self, place: float) -> None:
        if self.curtain is None:
            return
        array = self.curtain.data
        array.place = round(min(1.0, max(0.0, place)) * array.shape[array.axis])
        self.curtain.refresh(thumbnail=False, extent=False, highlight=False)
        self._show_edge()
        self.curtain_moved.emit()

    def _show_edge(self) -> None:
        if self.curtain is None or self._edge is None:
            return
        array = self.curtain.data
        low, high = np.full(3, -0.5), np.array(array.shape) - 0.5
        low[array.axis] = high[array.axis] = array.place - 0.5
        self._edge.show((self.curtain.data_to_world(low), self.curtain.data_to_world(high)))

    def _close_edge(self) -> None:
        if self._edge is not None:
            self._edge.close()
            self._edge = None

    # -- the line --------------------------------------------------------------------------------------------------

    @property
    def line(self) -> Ends | None:
        """The ends of the line, on the slice that is shown now."""
        if self._line is None or self.viewer.dims.ndim < 3:  # the volumes are being deleted
            return None
        _, start, end = self._line
        point = np.array(self.viewer.dims.point[-3:], dtype=float)
        ends = []
        for place in (start, end):
            z, y, x = np.where([axis in self._displayed for axis in range(3)], place, point).tolist()
            ends.append((z, y, x))
        return ends[0], ends[1]

    def draw_line(self, start: Sequence[float], end: Sequence[float]) -> None:
        """Draw a line from one place (z, y, x) in mm to another; the slice that is shown has it."""
        self._line = tuple(self._displayed), np.array(start[-3:], float), np.array(end[-3:], float)
        self._show_line()
        self.line_moved.emit()

    def forget_line(self) -> None:
        """Take the line away."""
        self._line = None
        self._show_line()
        self.line_moved.emit()

    def _show_line(self) -> None:
        there = [*self.layers, *self.differences.values()] + ([self.curtain] if self.curtain is not None else [])
        for layer in [layer for layer in self._outlines if layer not in there]:
            self._outlines.pop(layer).close()
        for layer in there if self._line is not None else list(self._outlines):
            if layer not in self._outlines:
                self._outlines[layer] = shown.LineOutline(self.viewer, layer)
            self._outlines[layer].show(self.line)

    def _on_press(self, viewer: Viewer, event: Any) -> Iterator[None]:
        """Drag the curtain's edge, or draw a line; what else is pressed is napari's."""
        if event.button != 1 or viewer.dims.ndisplay != 2 or event.modifiers:
            return
        across = viewer.dims.displayed[-1]
        if self.curtain is not None and self._edge is not None and self._edge.ends is not None:
            grasp = GRASP / viewer.scene.camera.zoom
            if abs(event.position[across] - self._edge.ends[0][across - viewer.dims.ndim]) <= grasp:
                yield from self._drag_curtain(event, across)
                return
        if not self.drawing:
            return
        start = event.position
        event.handled = True  # the camera stays
        yield
        while event.type == "mouse_move":
            self.draw_line(start, event.position)
            event.handled = True
            yield

    def _drag_curtain(self, event: Any, across: int) -> Iterator[None]:
        event.handled = True
        yield
        while event.type == "mouse_move" and self.curtain is not None:
            array = self.curtain.data
            voxel = self.curtain.world_to_data(event.position)[array.axis]
            self.curtain_place = (float(voxel) + 0.5) / array.shape[array.axis]
            event.handled = True
            yield

    def _on_point(self, event: object = None) -> None:
        if self._line is not None:
            self.slice_moved.emit()

    def _on_axes(self, event: object = None) -> None:
        """Other axes are displayed: the line was drawn on others, and the curtain is drawn across another."""
        if self._line is not None and self._line[0] != tuple(self._displayed):
            self.forget_line()
        if self.curtain is not None and self.curtain.data.axis != self._displayed[1]:
            array = self.curtain.data
            array.axis = self._displayed[1]
            self.curtain_place = 0.5

    # -- its end ---------------------------------------------------------------------------------------------------

    def _on_removed(self, event: Any) -> None:
        """What the person deletes is compared no more; a comparison of one volume is none."""
        layer = event.value
        if self._busy or self.left:
            return
        if layer is self.curtain:
            self._close_edge()
            self.curtain = None
            QTimer.singleShot(0, self._arrange_again)
        elif layer in self.differences.values():
            self.differences = {of: made for of, made in self.differences.items() if made is not layer}
        elif layer in self.layers:
            self.layers.remove(layer)
            self.arrays.pop(layer, None)
            self._looks.pop(layer, None)
            if layer is self.reference or len(self.layers) < LEAST or self.curtain is not None:
                QTimer.singleShot(0, self.leave)
                return
            if (beneath := self.differences.pop(layer, None)) is not None:
                QTimer.singleShot(0, lambda: self._remove([beneath]))
        else:
            return
        self._show_line()
        self.changed.emit()

    def _arrange_again(self) -> None:
        if not self.left:
            self.arrange()
            self._show_line()

    def _remove(self, layers: Sequence[Layer]) -> None:
        busy, self._busy = self._busy, True
        for layer in layers:
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
        self._busy = busy

    def leave(self) -> None:
        """Show again what was shown before, the layers as they were. May be called again."""
        if self.left:
            return
        self.close()
        viewer = self.viewer
        with viewer.layers.batched_update():
            self._remove([*self.differences.values(), *([self.curtain] if self.curtain is not None else [])])
            self._links.close()
            for look in self._looks.values():
                look.give_back()
            shown.put_in_order(viewer, [layer for layer in self._order if layer in viewer.layers])
            self._before.restore(viewer)
        viewer.dims.order = self._dims[0] if len(self._dims[0]) == viewer.dims.ndim else viewer.dims.order
        if len(self._dims[1]) == viewer.dims.ndim:
            viewer.dims.set_point(range(viewer.dims.ndim), self._dims[1])
        self.differences, self.curtain = {}, None
        self.changed.emit()

    def close(self) -> None:
        """Let go of the viewer; what is shown stays."""
        if self.left:
            return
        self.left = True
        gc.unfreeze()
        self._close_edge()
        for outline in self._outlines.values():
            outline.close()
        self._outlines, self._line = {}, None
        for layer in [*self.fits, *([self.reference] if self.fits and self.reference is not None else [])]:
            layer.events.contrast_limits.disconnect(self._fit_contrast)
        viewer = self.viewer
        viewer.layers.events.removed.disconnect(self._on_removed)
        viewer.dims.events.point.disconnect(self._on_point)
        viewer.dims.events.order.disconnect(self._on_axes)
        viewer.dims.events.ndisplay.disconnect(self._on_axes)
        with contextlib.suppress(ValueError):
            viewer.mouse_drag_callbacks.remove(self._on_press)
