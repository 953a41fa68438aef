"""How the volumes of a job stand in the viewer: as which layers, beside which others, seen from where.

A session makes a display for every job it runs and hands it what the job says. When the job ends, the display lets go
of its layers, which stay; those of a normal operator and of a what-if can be arranged again later.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.layers import Image
from pydantic import BaseModel

from napari_recon.jobs.job import (
    SHIPPED_WEIGHTS,
    CoilMapsJob,
    DataConsistencyJob,
    Job,
    PADMMParameters,
    ReconstructionJob,
    UnrolledParameters,
)
from napari_recon.jobs.messages import Failed, Finished, Progress, VolumeReady
from napari_recon.scans.kspace import FAINTEST
from napari_recon.widgets import layers as shown

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

THIN = 8
"""Slices below which a volume is shown in 2D whatever was asked for."""
LAYER = "layer: "
"""How a start that is a layer of the viewer begins; its name follows."""
METHOD_NAMES = {
    "fdk": "FDK",
    "zero-filled": "Zero-filled",
    "sense": "CG-SENSE",
    "sirt": "SIRT",
    "tv": "TV",
    "padmm": "PADMM",
    "unrolled": "Unrolled network",
}
BASELINES = ("fdk", "zero-filled")
"""What a job shows first, of X-rays and of k-space: what is to be beaten."""
PHASE = " phase"
"""How the phase of a complex volume is called after it."""


class Display:
    """The layers of one job, live while it runs.

    Attributes
    ----------
    job
        The job.
    live
        The volumes that may still change, by the job's name for them.
    layers
        All layers made for the job, by the same names, and some more of the display's own.
    frame
        What the camera was set for; the next display leaves the camera where the person put it if it is the same.
    """

    def __init__(self, viewer: Viewer, job: Job, view: str, frame: tuple[Any, ...] = ()) -> None:
        self.viewer, self.job, self.view, self.frame = viewer, job, view, frame
        self.live: dict[str, shown.LiveVolume] = {}
        self.layers: dict[str, Image | Layer] = {}
        self._before: shown.Arrangement | None = None
        self._added: list[Layer] = []

    # -- while the job runs ----------------------------------------------------------------------------------------

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Make a layer of a volume that came; subclasses say how."""
        raise NotImplementedError

    def progressed(self, message: Progress) -> None:
        """Note which part of which volume is new."""
        if message.name in self.live:
            self.live[message.name].changed(message.box)

    def draw(self, progress: Progress | None) -> None:
        """Bring what is new onto the screen, unless drawing the last still goes on."""
        for live in self.live.values():
            live.flush()

    def rest(self, late: float) -> None:
        """Leave the event loop alone for a while: it was ``late`` by so many seconds."""
        for live in self.live.values():
            live.rest(late)

    @property
    def watched(self) -> Image | None:
        """The layer whose patches are computed where the person looks, if there is one."""
        return None

    def forget(self, layer: Layer) -> None:
        """A layer was deleted by the person: it is only no longer shown."""
        for name, live in list(self.live.items()):
            if live.layer is layer:
                live.close()
                del self.live[name]
        self.layers = {name: mine for name, mine in self.layers.items() if mine is not layer}

    # -- when it ends ----------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether there is nothing yet that a failed job would leave."""
        return not self.layers

    def end(self, message: Finished | Failed) -> None:
        """The job ended: show all of it, and let the layers tell how they were made."""
        for live in self.live.values():
            live.flush(force=True)
            # The one full look at the data: the thumbnail was left alone while the data changed.
            live.layer.refresh(data_displayed=False, highlight=False, extent=False)
            if isinstance(message, Finished):
                live.layer.metadata[shown.KEY] |= {"provenance": message.provenance, "figures": message.figures}
        self.close()

    def undo(self) -> None:
        """The job was cancelled: its layers go, and what was shown before is shown again."""
        self.close()
        self.remove(self._added)
        if self._before is not None:
            self._before.restore(self.viewer)
        self.frame = ()

    def remove(self, layers: list[Layer] | None = None) -> None:
        """Delete layers; all of the display's own by default."""
        for layer in list(self.layers.values()) if layers is None else layers:
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)

    def close(self) -> None:
        """Let go of the layers; they stay."""
        for live in self.live.values():
            live.close()
        self.live = {}

    # -- what subclasses are made of -------------------------------------------------------------------------------

    def _begin(self, keep: list[Layer], cells: shown.Cells, ndisplay: Literal[2, 3] | None) -> None:
        """Remember what the viewer shows, then make room."""
        if self._before is None:
            self._before = shown.Arrangement(self.viewer)
        shown.make_room(self.viewer, keep, cells, ndisplay)

    def _add(self, name: str, layer: Layer, before: Layer | None = None) -> None:
        """Add a layer under the job's name for it; below another in the list, which is before it in a grid."""
        layers = self.viewer.layers
        layers.insert(layers.index(before) if before is not None else len(layers), layer)
        self.layers[name] = layer
        self._added.append(layer)

    def _show_phase(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """A phase in cyclic colours, not visible, under its magnitude."""
        of = self.layers[message.name.removesuffix(PHASE)]
        told = self._told(message.name, "phase")
        name, labels = of.name + PHASE, message.axis_labels
        layer = shown.volume_layer(name, array, message.scale, message.translate, told, labels)
        layer.colormap, layer.rendering = "hsv", "mip"
        layer.contrast_limits_range = layer.contrast_limits = (-np.pi, np.pi)
        layer.visible = False
        self._add(message.name, layer, before=of)
        self.viewer.layers.selection.active = of
        self.live[message.name] = shown.LiveVolume(self.viewer, layer)

    def _told(self, name: str, shows: str) -> dict[str, Any]:
        """What a layer's metadata tells from the start."""
        return {"shows": shows, "job": self.job.model_dump(mode="json"), "volume": name}


class ReconstructionDisplay(Display):
    """FDK, a computed start, and the result side by side, and an outline around the patch that is worked on.

    Complex volumes are shown by their magnitude; their phases are layers that wait to be made visible.
    """

    job: ReconstructionJob

    def __init__(self, viewer: Viewer, job: ReconstructionJob, view: str, frame: tuple[Any, ...] = ()) -> None:
        super().__init__(viewer, job, view, frame)
        self.outline: shown.PatchOutline | None = None
        self._same_phase: Image | None = None
        self._iterates: tuple[VolumeReady, NDArray[np.float32]] | None = None
        self._kept, self._every, self._behind = 0, 1, False

    @property
    def watched(self) -> Image | None:
        """The result."""
        return self.live["result"].layer if "result" in self.live else None

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """FDK is kept from an earlier run where it is the same; the result takes over its colours."""
        if message.name == "iterates":
            self._iterates = message, array
            return
        if message.name.endswith(PHASE):
            if self._same_phase is not None and message.name.removesuffix(PHASE) in BASELINES:
                self._same_phase.metadata[shown.KEY] = self._told(message.name, "phase")
                self.layers[message.name] = self._same_phase
                self.live[message.name] = shown.LiveVolume(self.viewer, self._same_phase)
            else:
                self._show_phase(message, array)
            return
        parameters, baseline = self.job.parameters, message.name in BASELINES
        mri = BASELINES[1] in (message.name, *self.layers)
        cells = (1, 1) if parameters.method in BASELINES else (1, 2)
        if isinstance(parameters, PADMMParameters) and parameters.start_is_computed:
            cells = (1, 3)
        layer = self._same_fdk(array) if baseline else None
        if layer is not None:
            self._same_phase = phase_of(layer, self.viewer.layers)
        if baseline:
            volumetric = self.view != "slices" and min(array.shape) >= THIN
            self._begin([layer] if layer else [], cells, 3 if volumetric else 2)
        told = self._told(message.name, "volume")
        if layer is not None:
            layer.metadata[shown.KEY] = told
            shown.cut_open(layer, self.view == "cut")
            self.layers[message.name] = layer
        else:
            name = start_name(self.job) if message.name == "start" else METHOD_NAMES.get(message.name)
            name = method_name(self.job) if name is None else name
            layer = shown.volume_layer(name, array, message.scale, message.translate, told)
            if mri:
                layer.colormap = "gray"
            self._colour(layer)
            shown.cut_open(layer, self.view == "cut")
            self._add(message.name, layer)
        self.live[message.name] = shown.LiveVolume(self.viewer, layer)
        shown.link([live.layer for name, live in self.live.items() if not name.endswith(PHASE)])
        frame = (message.shape, message.scale, message.translate, self.view, cells)
        if frame != self.frame:  # else the camera stays where the person has put it
            self.frame = frame
            # What lies in the corners of a volume is outside the field of view.
            shown.look_at(self.viewer, [layer], cells, fill=1.15 if self.viewer.dims.ndisplay == 3 else 0.96)
        if message.name == "result":
            self.outline = shown.PatchOutline(self.viewer, layer)

    def draw(self, progress: Progress | None) -> None:
        """Bring changed boxes and the outline onto the screen."""
        result = self.live.get("result")
        if self.outline is not None and result is not None and result.may_draw and progress is not None:
            box = progress.next_box if progress.name == "result" else None
            part = box is not None and any(
                s.stop - s.start < n for s, n in zip(box, result.layer.data.shape, strict=True)
            )
            self.outline.show(box if part else None)
        iterates = self.layers.get("iterates")
        if result is None or result.may_draw or iterates is None or not iterates.visible:
            self._show_iterates()
        super().draw(progress)

    def progressed(self, message: Progress) -> None:
        """Note which part is new, or that an iterate was kept."""
        if message.name == "iterates":
            self._kept, self._behind = message.box[0].stop, True
            self._every = max(1, message.step // max(1, self._kept - 1))
        if message.name == "slabs" and message.step and message.step % 100 == 0:
            self._show_file()
        super().progressed(message)
        if (phase := self.live.get(message.name + PHASE)) is not None:
            phase.changed(message.box)

    def _show_file(self) -> None:
        """A run in slabs has no volume in memory: its layer shows the file, as far as that has grown."""
        from napari_recon.jobs.volumes import ZarrVolume

        layer = self.layers.get("result")
        if isinstance(layer, Image):
            if layer.contrast_limits == [0.0, 1.0]:  # so far there was nothing to see
                shown.find_contrast(layer)
            layer.refresh()
            return
        assert self.job.output is not None
        volume = ZarrVolume.open(self.job.output)
        volumetric = self.view != "slices" and min(volume.levels[0].shape) >= THIN
        self._begin([], (1, 1), 3 if volumetric else 2)
        layer = shown.file_layer(method_name(self.job), volume, self._told("result", "volume"))
        shown.cut_open(layer, self.view == "cut")
        self._add("result", layer)
        shown.look_at(self.viewer, [layer], (1, 1), fill=1.15 if self.viewer.dims.ndisplay == 3 else 0.96)

    def _show_iterates(self) -> None:
        """Bring the layer of the iterates up to what was kept.

        It is hidden while the run goes on, unless the person shows it: the result is what is watched, and a further
        axis is in its way. Who looks at the last iterate goes on to the next.
        """
        result = self.layers.get("result")
        if not self._behind or self._iterates is None or self._kept < 2 or not isinstance(result, Image):
            return
        self._behind = False
        ready, array = self._iterates
        scale, data = (float(self._every), *ready.scale[1:]), array[: self._kept]
        base = method_name(self.job) if result.name.endswith("iterates") else result.name
        name = f"{base} iterates" + (f", every {self._every}" if self._every > 1 else "")
        layer = self.layers.get("iterates")
        at_last = layer is None or self._iterate_shown(layer) >= len(layer.data) - 1
        if isinstance(layer, Image):
            layer.data, layer.scale, layer.name = data, scale, name
            layer.metadata[shown.KEY]["every"] = self._every
        else:
            told = self._told("iterates", "iterates") | {"every": self._every}
            layer = shown.volume_layer(name, data, scale, ready.translate, told, ready.axis_labels)
            for attribute in shown.LINKED:
                setattr(layer, attribute, getattr(result, attribute))
            layer.experimental_clipping_planes = result.experimental_clipping_planes
            layer.visible = False
            self._add("iterates", layer)
        more = self.viewer.dims.ndim - 4
        if at_last and more >= 0:
            self.viewer.dims.set_point(more, (self._kept - 1) * scale[0])

    def _iterate_shown(self, layer: Layer) -> int:
        return round(float(layer.world_to_data(self.viewer.dims.point)[0]))

    def end(self, message: Finished | Failed) -> None:
        """The iterates that were kept take the result's place, the last one first."""
        self._show_iterates()
        result, layer = self.layers.get("result"), self.layers.get("iterates")
        if isinstance(result, Image) and "result" not in self.live and isinstance(message, Finished):  # it is in a file
            shown.find_contrast(result)
            result.metadata[shown.KEY] |= {"provenance": message.provenance, "figures": message.figures}
            result.refresh()
        if layer is not None and result is not None:
            result.visible, layer.visible = False, result.visible or layer.visible
            if isinstance(message, Finished):
                layer.metadata[shown.KEY] |= {"provenance": message.provenance, "figures": message.figures}
        super().end(message)

    def forget(self, layer: Layer) -> None:
        """The outline goes with the result; iterates that were deleted do not come back."""
        if self.watched is layer:
            self._close_outline()
        if self.layers.get("iterates") is layer:
            self._iterates = None
        super().forget(layer)

    def close(self) -> None:
        """Let go of the layers, and take the outline away."""
        self._close_outline()
        super().close()

    def _close_outline(self) -> None:
        if self.outline is not None:
            self.outline.close()
            self.outline = None

    def _same_fdk(self, array: NDArray[np.float32]) -> Image | None:
        """The FDK layer of an earlier run, where it shows the same: it is kept rather than built again."""
        mine = _fdk_identity(self.job.model_dump(mode="json"))
        for layer in self.viewer.layers:
            told = told_by(layer)
            if told.get("volume") in BASELINES and _fdk_identity(told["job"]) == mine:
                few = (slice(None, None, 7),) * 3  # the file may have changed; a sample tells
                if layer.data.shape == array.shape and (layer.data[few] == array[few]).all():
                    return layer
        return None

    def _colour(self, layer: Image) -> None:
        """The contrast and colours of this run's FDK; FDK's own are set from its values, once."""
        first = next((self.live[name] for name in BASELINES if name in self.live), None)
        if first is not None:
            for name in shown.LINKED:
                setattr(layer, name, getattr(first.layer, name))
        elif (limits := shown.contrast_limits(layer.data)) is not None:
            layer.contrast_limits_range = (min(0.0, limits[0]), 2 * limits[1])
            layer.contrast_limits = limits


class NothingShown(Display):
    """The display of a job that has no volumes, or whose volumes nobody asked to see."""

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Nothing is shown of it."""


class CoilMapsDisplay(Display):
    """The magnitudes of coil maps, coils being an axis to step through, and their phases, not visible.

    Attributes
    ----------
    of
        What they are of.
    """

    job: CoilMapsJob
    of = ""

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """They take the place of those that were shown before."""
        if message.name.endswith(PHASE):
            self._show_phase(message, array)
            return
        for layer in [x for x in self.viewer.layers if isinstance(told_by(x).get("job"), dict)]:
            if told_by(layer).get("volume") in (message.name, message.name + PHASE):
                self.viewer.layers.remove(layer)
        self._begin([], (1, 1), 2)
        told = self._told(message.name, "coil maps")
        layer = shown.volume_layer(self.of, array, message.scale, message.translate, told, message.axis_labels)
        layer.colormap, layer.rendering = "gray", "mip"
        self._add(message.name, layer)
        self.live[message.name] = shown.LiveVolume(self.viewer, layer)
        shown.look_at(self.viewer, [layer])


class DataConsistencyDisplay(Display):
    """What was measured, what the volume projects to, and their difference, view by view, side by side.

    k-space is shown as the scan's is, coil by coil, its difference in the same decades.

    Attributes
    ----------
    of
        The name of the volume's layer, where it is one.
    """

    job: DataConsistencyJob
    of = ""

    def show(self, message: VolumeReady, array: NDArray[np.float32]) -> None:
        """Measured and projected share their contrast; the residual's colours are about zero."""
        name = message.name
        if not self.layers:
            self._begin([], (1, 3), 2)
        of = f" of {self.of}" if self.of else ""
        if message.axis_labels[0] == "coil":
            self._show_kspace(message, array, of)
            return
        title = {"measured": "measured", "projected": f"projection{of}", "residual": f"residual{of}"}[name]
        told = self._told(name, "data consistency")
        # Views have an axis of their own, else volumes and their z would stretch it; z is one slab.
        step, pitch_v, pitch_u = message.scale
        scale = (step, pitch_v * array.shape[1], pitch_v, pitch_u)
        first_view, *corner = message.translate
        labels = ("view", "z", "row", "column")
        layer = shown.volume_layer(title, array[:, None], scale, (first_view, 0.0, *corner), told, labels)
        layer.colormap = "PiYG" if name == "residual" else "gray"
        layer.rendering = "mip"
        shown.show_name(layer, 11)
        first = self.layers.get("measured")
        if name == "measured":
            low, high = (float(q) for q in np.percentile(array[:: max(1, len(array) // 3)], (0.5, 99.9)))
            if high > low:
                layer.contrast_limits_range, layer.contrast_limits = (min(0.0, low), 2 * high), (low, high)
        elif name == "projected" and isinstance(first, Image):
            layer.contrast_limits_range, layer.contrast_limits = first.contrast_limits_range, first.contrast_limits
            shown.link([first, layer])
        self._add(name, layer)
        self.live[name] = shown.LiveVolume(self.viewer, layer)
        if name == "measured":
            shown.look_at(self.viewer, [layer], (1, 3))
            self.viewer.dims.set_point((self.viewer.dims.ndim - 4, self.viewer.dims.ndim - 3), (first_view, 0.0))

    def _show_kspace(self, message: VolumeReady, array: NDArray[np.float32], of: str) -> None:
        """All three in the decades of what was measured."""
        name = message.name
        title = {"measured": "measured k-space", "projected": f"k-space{of}", "residual": f"residual{of}"}[name]
        told = self._told(name, "data consistency")
        layer = shown.volume_layer(title, array, message.scale, message.translate, told, message.axis_labels)
        layer.colormap, layer.rendering = "gray", "mip"
        layer.contrast_limits_range, layer.contrast_limits = (FAINTEST, 0.0), shown.DECADES
        shown.show_name(layer, 11)
        self._add(name, layer)
        self.live[name] = shown.LiveVolume(self.viewer, layer)
        shown.link([live.layer for live in self.live.values()])
        if name == "measured":
            shown.look_at(self.viewer, [layer], (1, 3))
            self.viewer.dims.set_point(self.viewer.dims.ndim - 4, 0.0)  # the first coil is the first to come
            shown.go_to_centre(self.viewer, layer)

    def progressed(self, message: Progress) -> None:
        """Projection and residual have new views; the residual's colours reach four times the noise."""
        views, *pixels = message.box
        if len(pixels) == 3:  # a coil of k-space
            for live in self.live.values():
                live.changed(message.box)
            return
        for live in self.live.values():
            live.changed((views, slice(0, 1), *pixels))
        residual = self.layers.get("residual")
        reach = 4 * message.figures.get("noise", 0.0)
        if residual is not None and residual.contrast_limits[1] != reach and np.isfinite(reach) and reach > 0:
            residual.contrast_limits_range, residual.contrast_limits = (-4 * reach, 4 * reach), (-reach, reach)


def method_name(job: ReconstructionJob) -> str:
    """A job's method as a layer's name."""
    name = METHOD_NAMES.get(job.parameters.method, job.parameters.method.upper())
    if isinstance(job.parameters, UnrolledParameters):  # results of several weights stand beside each other
        weights = Path(job.parameters.weights).stem
        return name if weights in SHIPPED_WEIGHTS.values() else f"{name} {weights}"
    return f"Partitioned {name}" if getattr(job.parameters, "patch", None) else name


def start_name(job: ReconstructionJob) -> str:
    """A computed start as a layer's name."""
    start = getattr(job.parameters, "start", "")
    return f"Start: {'TV' if start == 'tv' else Path(start).stem}"


def run_name(job: ReconstructionJob) -> str:
    """A run beside others of the scan: what it was done by, as far as it decides how it converges."""
    parameters = job.parameters
    if isinstance(parameters, PADMMParameters):
        start = Path(parameters.start.removeprefix(LAYER)).stem
        return f"{start}, {parameters.preconditioner}, τ {parameters.regularization:g}"
    return method_name(job)


def told_by(layer: Layer) -> dict[str, Any]:
    """What a layer's metadata tells of how it was made; empty where it is not ours."""
    told = layer.metadata.get(shown.KEY)
    return told if isinstance(told, dict) else {}


def start_layer(parameters: BaseModel, layers: Iterable[Layer]) -> Image | None:
    """The layer that PADMM is to start from, if it is one of these."""
    if isinstance(parameters, PADMMParameters) and parameters.start.startswith(LAYER):
        name = parameters.start.removeprefix(LAYER)
        return next((x for x in layers if x.name == name and isinstance(x, Image)), None)
    return None


def can_be_exported(layer: Layer) -> bool:
    """Whether a layer is one volume of numbers, of ours or not."""
    told = told_by(layer)
    measured = "scan" in told and "job" not in told  # projections, k-space
    return isinstance(layer, Image) and layer.ndim == 3 and not (layer.rgb or layer.multiscale or measured)


def export_layer(layer: Layer, path: Path, bits: Literal[16, 32] | None = None) -> Path:
    """Write a layer's volume, where it lies and with what it tells; takes a while: call it from a thread.

    Raises
    ------
    ScanError
        If it cannot be written there, see :func:`~napari_recon.jobs.volumes.write_volume`, or is turned or sheared.
    """
    from napari_recon.jobs.volumes import write_volume

    told = told_by(layer)
    made_by = told.get("provenance") or {name: told[name] for name in ("job",) if name in told}
    write_volume(path, np.asarray(layer.data, np.float32), shown.grid_of(layer), made_by, bits=bits)
    return path


def phase_of(layer: Layer, among: Iterable[Layer]) -> Image | None:
    """The layer that holds the phase of a complex volume, whose magnitude a layer is; None where there is none."""
    told = told_by(layer)
    if "volume" not in told:
        return None
    wanted = told | {"volume": told["volume"] + PHASE, "shows": "phase"}
    same = ("volume", "shows", "job", "provenance")
    for other in among:
        if isinstance(other, Image) and all(told_by(other).get(name) == wanted.get(name) for name in same):
            return other
    return None


def write_complex(layer: Image, phase: Image, path: Path) -> None:
    """Write the complex volume of two layers as a .npy; takes a while: call it from a thread."""
    np.save(path, (np.asarray(layer.data) * np.exp(1j * np.asarray(phase.data))).astype(np.complex64))


def _fdk_identity(job: dict[str, Any]) -> tuple[Any, ...]:
    parameters = job["parameters"]
    window = parameters.get("window", "ram-lak") if parameters["method"] == "fdk" else "ram-lak"
    return job["scan"], str(job["options"]), str(job["shape"]), job["voxel_size"], window
