"""Layers in mm: volumes that are updated box by box, projections, and the acquisition's geometry.

Everything that reaches behind napari's public face (the texture upload, outlines, captions) stands here, behind
guards: where napari changes, the layers still show the right values, only more slowly and without the outline.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.experimental import link_layers
from napari.layers import Image, Surface
from napari.utils.colormaps.standardize_color import transform_color
from numpy.typing import NDArray

from napari_recon.jobs.messages import Region
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import decades, to_image

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer

    from napari_recon.jobs.volumes import ZarrVolume
    from napari_recon.scans.geometry import Geometry
    from napari_recon.scans.kspace import KSpaceScan
    from napari_recon.scans.scan import Scan

Cells = tuple[int, int]
"""Rows and columns of the canvas in grid mode; (1, 1) is no grid."""
KEY = "napari_recon"
"""Where a layer's metadata tells how it was made."""
WORLD = {"axis_labels": ("z", "y", "x"), "units": ("mm", "mm", "mm")}
LINKED = ("contrast_limits_range", "contrast_limits", "colormap", "gamma", "rendering", "attenuation", "iso_threshold")
"""What side by side volumes share, so that a difference seen is a difference of values."""


DECADES = (-5.0, 0.0)
"""Contrast limits of k-space, which is shown in decades below its largest sample."""
LOOK = (-0.26, 0.93, 0.26)
"""Where the camera looks, (z, y, x)."""
CUT = (0.0, 1.0, 0.0)
"""Normal (z, y, x) of the plane that cuts a volume open; it points at what stays, away from the camera."""


def warm_up() -> None:
    """Import and set up what napari does with its first layer in mm: a second that is better spent in a thread."""
    import pint
    import scipy.spatial.transform  # noqa: F401

    pint.get_application_registry()("mm")
    volume_layer("", np.zeros((2, 2, 2), np.float32), (1.0,) * 3, (0.0,) * 3, {})


# -- volumes -------------------------------------------------------------------------------------------------------


def volume_layer(
    name: str,
    array: NDArray[np.float32],
    scale: Sequence[float],
    translate: Sequence[float],
    metadata: dict[str, Any],
    axis_labels: Sequence[str] = ("step", "z", "y", "x"),
) -> Image:
    """A volume (D, H, W), or several in a row, as a layer in the world's mm; it holds the array itself, not a copy."""
    layer = Image(
        array,
        name=name,
        scale=tuple(scale),
        translate=tuple(translate),
        axis_labels=tuple(axis_labels)[-array.ndim :],
        units=("mm",) * array.ndim,  # of a step too: layers of several units make napari give up units altogether
        contrast_limits=(0.0, 1.0),  # else napari reads the whole array
        colormap="magma",
        rendering="attenuated_mip",
        attenuation=0.5,
        metadata={KEY: metadata},
    )
    show_name(layer)
    return layer


def file_layer(name: str, volume: ZarrVolume, metadata: dict[str, Any]) -> Image:
    """A volume that stays in its file, as a layer: a slice is read where one is looked at, in the resolution it takes.

    In 3D napari shows the coarsest resolution, which has 128 voxels along an edge at most, unless the person locks it
    to another.
    """
    import dask.array as da  # what napari cuts slices out of before anything is read

    levels = [da.from_array(level, chunks=level.chunks, name=False) for level in volume.levels]
    edges = volume.scale or [1.0] * 3
    aspect = tuple(edge / edges[0] for edge in edges)
    grid = Grid(volume.levels[0].shape, edges[0], volume.center, (aspect[0], aspect[1], aspect[2]))
    layer = Image(
        levels if len(levels) > 1 else levels[0],
        multiscale=len(levels) > 1,
        cache=False,  # the file may grow
        name=name,
        scale=grid.scale,
        translate=grid.translate,
        axis_labels=("z", "y", "x"),
        units=("mm",) * 3,
        contrast_limits=(0.0, 1.0),  # else napari reads all of a resolution
        colormap="magma",
        rendering="attenuated_mip",
        attenuation=0.5,
        metadata={KEY: metadata},
    )
    show_name(layer)
    find_contrast(layer)
    return layer


def find_contrast(layer: Image) -> bool:
    """Set the contrast limits from the coarsest resolution that there is; whether it held anything."""
    coarsest = np.asarray(layer.data[-1] if layer.multiscale else layer.data)
    if (limits := contrast_limits(coarsest)) is None:
        return False
    layer.contrast_limits_range = layer.contrast_limits = limits
    return True


def show_name(layer: Layer, size: float = 13) -> None:
    """Write the layer's name into its part of the canvas, where this napari can."""
    with contextlib.suppress(AttributeError, KeyError):
        layer.name_overlay.position = "top_center"
        layer.name_overlay.font_size = size
        layer.name_overlay.visible = True


@functools.cache
def _caption_overlay() -> Any:
    """An overlay that writes a layer's name and a text; napari's own can only write the name."""
    from napari._vispy.overlays.text import _VispyLayerTextOverlay
    from napari._vispy.utils.visual import overlay_to_visual
    from napari.components.overlays import LayerNameOverlay

    class Caption(LayerNameOverlay):
        text: str = ""

    class VispyCaption(_VispyLayerTextOverlay):
        def _connect_events(self) -> None:
            self.overlay.events.text.connect(self._on_text_change)
            self.layer.events.name.connect(self._on_text_change)

        def _on_text_change(self) -> None:
            self.node.text = f"{self.layer.name}\n{self.overlay.text}"
            self._on_position_change()

    overlay_to_visual[Caption] = VispyCaption
    return Caption


def show_caption(layer: Layer, text: str, size: float = 12) -> None:
    """Write the layer's name and a line below it into its part of the canvas, where this napari can.

    Without a text the name is written alone.
    """
    with contextlib.suppress(AttributeError, ImportError, KeyError, TypeError):
        overlays = layer._overlays
        if "caption" not in overlays:
            if not text:
                return
            overlays["caption"] = _caption_overlay()(position="top_center", font_size=size, text=text, visible=True)
        overlays["caption"].text, overlays["caption"].font_size = text, size
        overlays["caption"].visible = bool(text)
        layer.name_overlay.visible = not text


def caption(layer: Layer) -> str:
    """The line below the layer's name; empty where there is none."""
    with contextlib.suppress(AttributeError, KeyError):
        return str(layer._overlays["caption"].text)
    return ""


def contrast_limits(volume: NDArray[np.float32]) -> tuple[float, float] | None:
    """Limits from a sample of the volume inside the field of view, or None while it holds nothing.

    The cylinder about z is what the scan sees; the corners beyond it hold streaks that would set the limits. At most
    about 200 000 voxels are read, so that this takes milliseconds at any size.
    """
    step = max(1, math.ceil((volume.size / 200_000) ** (1 / 3)))
    sample = volume[:: min(step, max(1, volume.shape[0] // 2)), ::step, ::step]
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in sample.shape[1:])
    inside = sample[:, y[:, None] ** 2 + x[None, :] ** 2 <= 0.9]
    inside = inside[np.isfinite(inside)]
    if inside.size == 0 or not inside.any():
        return None
    low, high = (float(q) for q in np.percentile(inside, (1.0, 99.8)))
    low = max(low, 0.0)  # air: what lies below zero is noise
    return (low, high) if high > low else None


def link(layers: Sequence[Image]) -> None:
    """Let volumes share contrast, colours and rendering."""
    if len(layers) > 1:
        link_layers(layers, LINKED)


class Arrangement:
    """What a viewer shows and how, to come back to: layers, grid, and camera."""

    def __init__(self, viewer: Viewer) -> None:
        grid, camera = viewer.canvas.grid, viewer.scene.camera
        self.layers = [layer for layer in viewer.layers if layer.visible]
        self.grid = grid.enabled, grid.shape, grid.stride
        self.ndisplay = viewer.dims.ndisplay
        self.camera = camera.center, camera.zoom, camera.angles

    def restore(self, viewer: Viewer) -> None:
        """Show it again: the layers that are still there, and nothing less than is shown now."""
        for layer in self.layers:
            if layer in viewer.layers:
                layer.visible = True
        grid, camera = viewer.canvas.grid, viewer.scene.camera
        grid.enabled, grid.shape, grid.stride = self.grid
        viewer.dims.ndisplay = self.ndisplay
        camera.center, camera.zoom, camera.angles = self.camera


def make_room(viewer: Viewer, layers: Sequence[Layer], cells: Cells, ndisplay: Literal[2, 3] | None = None) -> None:
    """Show only these of the viewer's layers, and make rows and columns for them and those to come, in mm.

    Done before volumes are added: every layer that is shown makes napari build the whole grid again.
    """
    for other in viewer.layers:
        other.visible = other in layers
    grid = viewer.canvas.grid
    if cells != (1, 1) and (not grid.enabled or grid.shape != cells or grid.stride != 1):
        grid.stride, grid.shape = 1, cells
    grid.enabled = cells != (1, 1)
    viewer.canvas.overlays.scale_bar.gridded = False
    viewer.canvas.overlays.scale_bar.visible = True
    if ndisplay is not None:
        viewer.dims.ndisplay = ndisplay


def put_in_order(viewer: Viewer, layers: Sequence[Layer]) -> None:
    """Let layers stand in the viewer's list in this order, at the places that they have; a grid is filled in it."""
    places = sorted(viewer.layers.index(layer) for layer in layers)
    for place, layer in zip(places, layers, strict=True):
        if (now := viewer.layers.index(layer)) != place:
            viewer.layers.move(now, place)


def cut_open(layer: Image, cut: bool = True) -> None:
    """Cut a volume open through its middle, in 3D; or close it."""
    # In the world's mm: vispy clips volumes there, whatever napari says of data coordinates.
    middle = layer.data_to_world([(n - 1) / 2 for n in layer.data.shape])
    plane = {"position": tuple(middle), "normal": CUT, "enabled": True}
    layer.experimental_clipping_planes = [plane] if cut else []


def look_at(viewer: Viewer, layers: Sequence[Layer], cells: Cells = (1, 1), fill: float = 0.96) -> None:
    """Fill the canvas, or one of its rows and columns, with layers; above 1 their corners are cut off.

    In 3D from the front, a little from above and from the side, with the rotation axis upright; in 2D at the middle
    slice.
    """
    camera = viewer.scene.camera
    extent = np.array([layer.extent.world[:, -3:] for layer in layers])
    low, high = extent[:, 0].min(0), extent[:, 1].max(0)
    camera.center = tuple((low + high) / 2)
    if viewer.dims.ndisplay == 3:
        camera.perspective = 0.0
        camera.set_view_direction(view_direction=LOOK, up_direction=(1.0, 0.0, 0.0))
        along = np.array(camera.view_direction)
        up = np.array(camera.up_direction)
        across = np.stack([up, np.cross(along, up)])
    else:
        more = viewer.dims.ndim - 3
        viewer.dims.set_point(range(more, more + 3), (low + high) / 2)
        across = np.eye(3)[[max(axis - more, 0) for axis in viewer.dims.displayed]]
    # napari's own fit takes the box's diagonal for every direction, and so leaves much of the canvas empty.
    height, width = np.maximum(np.abs(across) @ (high - low), 1e-9).tolist()
    rows, columns = viewer.canvas.size
    camera.zoom = fill * min(rows / cells[0] / height, columns / cells[1] / width)


def go_to_centre(viewer: Viewer, layer: Image) -> None:
    """Step to the planes with the centre of k-space, at index n // 2 of its axes; that is where its energy is."""
    centre = layer.data_to_world([n // 2 for n in layer.data.shape])[-3:]
    viewer.dims.set_point(range(viewer.dims.ndim - 3, viewer.dims.ndim), centre)


def displayed_axes(viewer: Viewer, layer: Layer) -> list[int]:
    """The axes of a layer that are displayed; a viewer has as many axes as its layer with the most, to the front."""
    more = viewer.dims.ndim - layer.ndim
    return [axis - more for axis in viewer.dims.displayed if axis >= more]


# -- updates, box by box -------------------------------------------------------------------------------------------


class LiveVolume:
    """A volume layer whose data change in place while it is shown.

    :meth:`changed` notes a box; :meth:`flush`, called from a timer, brings what was noted onto the screen: in 3D by
    uploading only those boxes into the texture, in 2D by a refresh if the slice that is shown was touched.

    Drawing a volume can take longer than computing a patch (software GL takes a second). So nothing is uploaded before
    what was uploaded last has been drawn, and then only after a rest of three times as long as the drawing took, so
    that most of the event loop's time stays with the person. The boxes of the meantime are merged.
    """

    def __init__(self, viewer: Viewer, layer: Image) -> None:
        self.viewer, self.layer = viewer, layer
        self.pending: list[Region] = []
        self._drawn = True
        self._not_before = 0.0
        self._canvas = _scene_canvas(viewer)
        if self._canvas is not None:
            self._canvas.events.draw.connect(self._on_draw)

    def _on_draw(self, event: object = None) -> None:
        self._drawn = True

    @property
    def may_draw(self) -> bool:
        """Whether what was uploaded has been drawn, and the event loop has had its rest since."""
        return self._canvas is None or (self._drawn and time.perf_counter() >= self._not_before)

    def rest(self, late: float) -> None:
        """Leave the event loop alone for a while: it was ``late`` by so many seconds.

        Lateness is the only honest measure of drawing: vispy's draw event returns after milliseconds, and the GL calls
        that it queued are carried out when Qt swaps the buffers.
        """
        self._not_before = time.perf_counter() + min(4.0, 3 * late)

    def changed(self, box: Region) -> None:
        """Note that the data in ``box`` are new."""
        self.pending = merge_boxes([*self.pending, box])

    def flush(self, force: bool = False) -> bool:
        """Bring what changed onto the screen; whether anything was uploaded.

        ``force`` waits for no drawing: for the end of a run.
        """
        if not self.pending or self.layer not in self.viewer.layers:
            self.pending = []
            return False
        if not self.layer.visible:
            self.pending = []  # napari reads the layer afresh when it is made visible
            return False
        if not force and not self.may_draw:
            return False
        boxes, self.pending = self.pending, []
        if self.viewer.dims.ndisplay == 3:
            uploaded = upload_boxes(self.viewer, self.layer, boxes)
        else:
            uploaded = self._refresh_slice(boxes)
        if uploaded:
            self._drawn = False
        return uploaded

    def _refresh_slice(self, boxes: Sequence[Region]) -> bool:
        shown = displayed_axes(self.viewer, self.layer)
        point = self.layer.world_to_data(self.viewer.dims.point)
        hidden = [axis for axis in range(self.layer.ndim) if axis not in shown]
        touched = any(all(box[a].start <= round(point[a]) < box[a].stop for a in hidden) for box in boxes)
        if touched:
            self.layer.refresh(thumbnail=False, extent=False, highlight=False)
        return touched

    def close(self) -> None:
        """Undo the connections."""
        if self._canvas is not None:
            self._canvas.events.draw.disconnect(self._on_draw)
            self._canvas = None
        self.pending = []


def merge_boxes(boxes: Sequence[Region]) -> list[Region]:
    """Fewer boxes that cover the same voxels: two become their hull where that uploads no more than both would."""
    merged: list[Region] = []
    for box in boxes:
        while True:
            for i, other in enumerate(merged):
                hull = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other, strict=True))
                if _voxels(hull) <= _voxels(box) + _voxels(other):
                    box = hull
                    del merged[i]
                    break
            else:
                break
        merged.append(box)
    return merged


def _voxels(box: Sequence[slice]) -> int:
    return math.prod(s.stop - s.start for s in box)


def upload_boxes(viewer: Viewer, layer: Image, boxes: Sequence[Region]) -> bool:
    """Bring boxes of a layer's data into its 3D texture.

    This is the one function that knows napari's and vispy's insides. Everything it relies on is checked; where
    something is not as expected (another napari, a texture that was downsampled because the card allows no larger one,
    no float textures) the whole layer is uploaded by a public call.
    """
    try:
        visual = viewer.window._qt_viewer.canvas.layer_to_visual[layer]
        node = visual.node
        texture = node._texture
        usable = (
            viewer.dims.ndisplay == 3
            and displayed_axes(viewer, layer) == [0, 1, 2]
            and layer.data.dtype == np.float32
            and tuple(node._vol_shape) == layer.data.shape
            and tuple(texture.shape[:3]) == layer.data.shape
            and not texture.is_normalized  # scaled on the CPU: a box alone would be scaled differently
        )
        if usable:
            for box in boxes:
                offset = tuple(s.start for s in box)
                # A contiguous copy of the box: vispy keeps it until the next drawing.
                texture.scale_and_set_data(np.array(layer.data[box], order="C"), offset=offset, copy=False)
            node.update()
            return True
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        pass
    layer.refresh(thumbnail=False, extent=False, highlight=False)
    return True


def _scene_canvas(viewer: Viewer) -> Any:
    try:
        return viewer.window._qt_viewer.canvas._scene_canvas
    except AttributeError:
        return None


class Outline:
    """Lines that are drawn with a layer.

    A child of the layer's own vispy node: it follows the layer in grid mode and from 2D to 3D, costs a few vertices,
    and leaves the layer list alone. Subclasses say where the lines are, and whether that changes with the slice.
    """

    _follows_slice = True

    def __init__(self, viewer: Viewer, layer: Image, color: str = "#ffb000") -> None:
        self.viewer, self.layer = viewer, layer
        self._line: Any = None
        try:
            from vispy.scene.visuals import Line
            from vispy.visuals.transforms import MatrixTransform

            node = viewer.window._qt_viewer.canvas.layer_to_visual[layer].node
            line = Line(pos=np.zeros((2, 3), np.float32), color=color, width=2, connect="segments", parent=node)
            line.transform = MatrixTransform()  # napari sets the matrix of every child of a layer's node
            line.set_gl_state("translucent", depth_test=False)
            line.order = 1_000_000
            line.visible = False
            self._line = line
        except (AttributeError, KeyError, ImportError):
            return
        if self._follows_slice:
            viewer.dims.events.point.connect(self._redraw)
        viewer.dims.events.ndisplay.connect(self._redraw)

    @property
    def visible(self) -> bool:
        """Whether the outline is drawn now."""
        return self._line is not None and bool(self._line.visible)

    def _redraw(self, event: object = None) -> None:
        if self._line is None:
            return
        with contextlib.suppress(AttributeError, KeyError):
            visual = self.viewer.window._qt_viewer.canvas.layer_to_visual[self.layer]
            node = visual.node
            if self._line.parent is not node:
                self._line.parent = node
            visual._on_matrix_change()  # in 2D the node is shifted by half a voxel, its children back
            corners = self._corners()
            self._line.visible = corners is not None
            if corners is not None:
                self._line.set_data(pos=corners)
            node.update()

    def _corners(self) -> NDArray[np.float32] | None:
        """Vertices of the lines, two a line, in the node's coordinates: x, y(, z) of displayed axes, in voxels."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the outline away and undo the connections."""
        if self._line is not None:
            for event in (self.viewer.dims.events.point, self.viewer.dims.events.ndisplay):
                with contextlib.suppress(TypeError, ValueError):
                    event.disconnect(self._redraw)
            self._line.parent = None
            self._line = None


class PatchOutline(Outline):
    """The twelve edges of the patch that is being worked on.

    In 2D they show only while the slice passes through the patch.
    """

    def __init__(self, viewer: Viewer, layer: Image, color: str = "#ffb000") -> None:
        super().__init__(viewer, layer, color)
        self.box: Region | None = None

    def show(self, box: Region | None) -> None:
        """Draw a box, or none."""
        if box != self.box:
            self.box = box
            self._redraw()

    def _corners(self) -> NDArray[np.float32] | None:
        if self.box is None:
            return None
        displayed = displayed_axes(self.viewer, self.layer)
        point = self.layer.world_to_data(self.viewer.dims.point)
        for axis in range(3):
            if axis not in displayed and not self.box[axis].start <= round(point[axis]) < self.box[axis].stop:
                return None
        low = np.array([self.box[a].start - 0.5 for a in displayed][::-1], np.float32)
        high = np.array([self.box[a].stop - 0.5 for a in displayed][::-1], np.float32)
        n = len(displayed)
        edges = []
        for axis in range(n):
            for corner in range(2 ** (n - 1)):
                start = np.array([(corner >> (a - (a > axis))) & 1 if a != axis else 0 for a in range(n)])
                stop = start.copy()
                stop[axis] = 1
                edges += [low + start * (high - low), low + stop * (high - low)]
        return np.array(edges, np.float32)


class LineOutline(Outline):
    """One straight line between two places of the world; in 2D it is seen on every slice."""

    _follows_slice = False

    def __init__(self, viewer: Viewer, layer: Image, color: str = "#ffb000") -> None:
        super().__init__(viewer, layer, color)
        self.ends: tuple[Sequence[float], Sequence[float]] | None = None

    def show(self, ends: tuple[Sequence[float], Sequence[float]] | None) -> None:
        """Draw a line from one (z, y, x) in mm to another, or none."""
        self.ends = ends
        self._redraw()

    def _corners(self) -> NDArray[np.float32] | None:
        if self.ends is None:
            return None
        displayed = displayed_axes(self.viewer, self.layer)
        return np.array([np.asarray(self.layer.world_to_data(end))[displayed][::-1] for end in self.ends], np.float32)


def where_the_person_looks(viewer: Viewer, layer: Image) -> tuple[float, float, float] | None:
    """The voxel (z, y, x) that the person looks at: under the cursor, else the middle of the view; None if outside.

    In 2D it lies on the slice; in 3D halfway along the ray through the volume.
    """
    if layer.ndim != 3:
        return None
    displayed = displayed_axes(viewer, layer)
    over = viewer.mouse_over_canvas
    point = np.array(viewer.dims.point, dtype=float)[-3:]
    where = np.array(viewer.cursor.position if over else viewer.scene.camera.center, dtype=float)[-3:]
    if len(displayed) == 3 and over:
        direction = viewer.scene.camera.calculate_nd_view_direction(3, tuple(displayed))
        near, far = layer.get_ray_intersections(where, direction, displayed, world=True)
        if near is None or far is None:
            return None
        voxel = (np.asarray(near) + np.asarray(far)) / 2
    else:
        for axis in displayed:
            point[axis] = where[axis]
        voxel = np.asarray(layer.world_to_data(point))
    upper = np.array(layer.data.shape) - 1.0
    if not np.isfinite(voxel).all() or (voxel < -0.5).any() or (voxel > upper + 0.5).any():
        return None
    z, y, x = (float(v) for v in np.clip(voxel, 0, upper))
    return z, y, x


# -- the scan ------------------------------------------------------------------------------------------------------


def is_in_mm(layer: Layer) -> bool:
    """Whether a layer's unit is one of length; napari's own is the pixel."""
    return all(unit.is_compatible_with("mm") for unit in layer.units)


def grid_of(layer: Layer) -> Grid:
    """Where the voxels of a volume's layer are, in mm (or in its own unit, where that is none of length).

    Raises
    ------
    ScanError
        If the layer is turned, sheared or mirrored.
    """
    turned = layer.affine.linear_matrix
    if not np.allclose(turned, np.eye(len(turned))) or np.any(layer.shear) or not np.allclose(layer.rotate, np.eye(3)):
        raise ScanError(f"{layer.name} is turned or sheared: resample it, or reset its transform.")
    if min(layer.scale) <= 0:
        raise ScanError(f"{layer.name} is mirrored: give it a positive scale.")
    mm = [float((1 * unit).to("mm").magnitude) if is_in_mm(layer) else 1.0 for unit in layer.units]
    edges = np.array(layer.scale) * mm
    moved = np.array(layer.translate) + np.array(layer.affine.translate)
    d, h, w = layer.data.shape
    z, y, x = moved * mm + (np.array((d, h, w)) - 1) / 2 * edges
    ratio = edges / edges[0]
    aspect = tuple(1.0 if abs(a - 1) < 1e-6 else float(a) for a in ratio)
    return Grid((d, h, w), float(edges[0]), (float(x), float(y), float(z)), (aspect[0], aspect[1], aspect[2]))


def geometry_layers(geometry: Geometry, grid: Grid, name: str) -> list[Surface]:
    """Source path, detector at a few views, and the volume's box, as layers in mm.

    A parallel beam has no source: an arrow's worth of path shows where its rays come from.
    """
    views = np.unique(np.linspace(0, geometry.views - 1, min(geometry.views, 240)).round().astype(int))
    center = geometry.detector_center
    span = max(geometry.pixel_size[1] * geometry.detector_shape[1], *grid.extent)
    if geometry.kind == "cone":
        source = geometry.source
    else:
        ray = geometry.source / np.linalg.norm(geometry.source, axis=1, keepdims=True)
        source = -1.5 * span * ray
        if np.linalg.norm(center, axis=1).max() < span:  # drawn beyond the volume, where a detector would be
            center = center + span * ray
    rows, columns = geometry.detector_shape
    corners = [(-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)]

    def detector(view: int) -> NDArray[np.float64]:
        u, v = geometry.u[view] * columns / 2, geometry.v[view] * rows / 2
        return np.array([center[view] + a * v + b * u for a, b in corners])

    few = np.unique(np.linspace(0, geometry.views, 9)[:-1].round().astype(int) % geometry.views)
    outlines = [detector(v) for v in few]
    if geometry.kind == "cone":
        beam = [np.array([source[0], corner]) for corner in detector(0)[:4]]
    else:
        beam = [np.array([corner + source[0] - center[0], corner]) for corner in detector(0)[:4]]
    reach = float(np.max(np.abs(np.concatenate([source, center]))))
    thick = reach / 150
    return [
        _lines([source[views]], f"{name}: source" if geometry.kind == "cone" else f"{name}: beam", "#ffb000", thick),
        _lines([*outlines, *beam], f"{name}: detector", "#4fa8ff", thick * 0.7),
        _lines(box_paths(grid), f"{name}: volume", "#f0f0f0", thick),
    ]


def box_paths(grid: Grid) -> list[NDArray[np.float64]]:
    """The twelve edges of a grid's box as paths of (x, y, z) in mm."""
    half = np.array(grid.extent[::-1]) / 2
    square = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)])
    faces = [np.column_stack([square, np.full(5, s)]) for s in (-1, 1)]
    posts = [np.array([(a, b, -1), (a, b, 1)]) for a, b in square[:4]]
    return [np.array(grid.center) + path * half for path in (*faces, *posts)]


def _lines(paths: Sequence[NDArray[np.float64]], name: str, color: str, width: float) -> Surface:
    """Paths of (x, y, z) as thin tubes in a layer in (z, y, x).

    Tubes are seen from every side, which the flat ribbons of Vectors are not; and napari triangulates Shapes with
    numba, which takes many seconds the first time.
    """
    vertices, faces = tubes(paths, width / 2)
    return Surface(
        (vertices[:, ::-1], faces),
        vertex_colors=np.tile(transform_color(color), (len(vertices), 1)),
        shading="none",
        name=name,
        metadata={KEY: {"shows": "geometry"}},
        **WORLD,
    )


def tubes(paths: Sequence[NDArray[np.float64]], radius: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Square tubes along the segments of paths: vertices (8 a segment, 3) and triangles (8 a segment, 3)."""
    start = np.concatenate([path[:-1] for path in paths])
    stop = np.concatenate([path[1:] for path in paths])
    along = stop - start
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-12)
    least = np.eye(3)[np.abs(along).argmin(axis=1)]  # an axis that the segment does not follow
    side = np.cross(along, least)
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
    other = np.cross(along, side)
    rim = radius * np.stack([side, other, -side, -other], axis=1)  # (segments, 4, 3)
    # A little longer than the segment, so that corners close.
    ends = [start - radius * along, stop + radius * along]
    vertices = np.concatenate([end[:, None] + rim for end in ends], axis=1).reshape(-1, 3)
    k = np.arange(4)
    following = (k + 1) % 4
    one = np.concatenate([np.stack([k, following, k + 4], 1), np.stack([following, following + 4, k + 4], 1)])
    faces = (8 * np.arange(len(start))[:, None, None] + one).reshape(-1, 3)
    return vertices, faces


def kspace(scan: KSpaceScan) -> list[dict[str, Any]]:
    """A scan's k-space, sampling mask and coils' images, each as the arguments of an Image layer.

    Reads all: call it from a thread.

    k-space is shown as the logarithm of its magnitude, in decades below the largest sample; the coils' images by their
    magnitudes. Coils are an axis to step through.

    Raises
    ------
    ScanError
        If the samples cannot be read.
    """

    def arguments(what: str, values: NDArray[Any], limits: tuple[float, float], visible: bool) -> dict[str, Any]:
        return {
            "data": values.astype(np.float32, copy=False),
            "name": f"{scan.name}: {what}",
            "scale": (1.0, *scan.grid.scale)[-values.ndim :],
            "translate": (0.0, *scan.grid.translate)[-values.ndim :],
            "axis_labels": ("coil", "z", "y", "x")[-values.ndim :],
            "units": ("mm",) * values.ndim,
            "contrast_limits": limits,
            "colormap": "gray",
            "visible": visible,
            "metadata": {KEY: {"scan": str(scan.path), "options": scan.options.model_dump(mode="json")}},
        }

    images = np.abs(to_image(scan.kspace))
    bright = float(np.percentile(images[:: max(1, len(images) // 4)], 99.8)) or 1.0
    return [
        arguments("coil images", images, (0.0, bright), False),
        arguments("sampling mask", scan.mask, (0.0, 1.0), False),
        arguments("k-space, log₁₀", decades(scan.kspace, float(np.abs(scan.kspace).max())), DECADES, True),
    ]


def projections(scan: Scan) -> tuple[Any, dict[str, Any]]:
    """The scan's line integrals (views, rows, columns) as an array that reads a view when it is shown.

    Returns
    -------
    A dask array, float32, and the arguments of the Image layer that shows it. Reads three views, for the contrast
    limits, and the flats: call it from a thread.

    Raises
    ------
    ScanError
        If those views cannot be read.
    """
    import dask.array as da

    views, rows, columns = scan.shape
    pitch_v, pitch_u = scan.geometry.pixel_size
    correction = scan.correction()

    def read(view: int) -> NDArray[np.float32]:
        raw = scan.frames[view : view + 1]
        if (fault := scan.frame_fault(raw)) is not None:
            raise ScanError(f"Frame {scan.view_indices[view]} of {scan.path} {fault[1]}")
        return scan.correct(raw, correction)

    array = da.map_blocks(
        lambda block_info=None: read(block_info[None]["array-location"][0][0]),
        chunks=((1,) * views, (rows,), (columns,)),
        dtype=np.float32,
        meta=np.zeros((0, 0, 0), np.float32),
    )
    few = np.concatenate([read(v) for v in sorted({0, views // 3, 2 * views // 3})])
    low, high = (float(q) for q in np.percentile(few, (0.5, 99.9)))
    return array, {
        "name": f"{scan.name}: projections",
        "scale": (1.0, pitch_v, pitch_u),
        "translate": (0.0, -(rows - 1) / 2 * pitch_v, -(columns - 1) / 2 * pitch_u),
        "axis_labels": ("view", "row", "column"),
        # A view is no millimetre, but layers of several units in one viewer make napari give up units altogether.
        "units": ("mm", "mm", "mm"),
        "contrast_limits": (low, high) if high > low else (0.0, 1.0),
        "colormap": "gray",
        "metadata": {KEY: {"scan": str(scan.path), "options": scan.options.model_dump(mode="json")}},
    }
