"""A session in a folder: the scan, the volumes that are shown with how they were made, and the view of them.

``NAME.recon/`` holds session.json and an OME-Zarr a volume, which other programs open too. The scan stays where it is.
Complex volumes are two layers, magnitude and phase, and are kept as such. What has a further axis (iterates, coil maps)
or is the scan's own (projections, k-space) is left out: the former is computed again, the latter shown again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.layers import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from napari_recon.jobs.job import ReconstructionJob
from napari_recon.jobs.volumes import Volume, read_volume, replacing, write_volume
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import KSpaceOptions
from napari_recon.scans.scan import ScanOptions
from napari_recon.widgets import layers as shown
from napari_recon.widgets.displays import told_by

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

ENDING = ".recon"
"""What a session's folder ends with."""
CONTENTS = "session.json"
"""The file in it that tells what the volumes are."""
LOOK = (
    "contrast_limits_range",
    "contrast_limits",
    "gamma",
    "rendering",
    "attenuation",
    "iso_threshold",
    "opacity",
    "blending",
    "visible",
)
"""How a volume is shown, besides its colormap and what cuts it open."""


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedLayer(_Kept):
    """A volume's layer.

    Attributes
    ----------
    name
        The layer's.
    file
        The volume's, in the folder.
    told
        The layer's metadata of ours: what it shows, its job, its provenance.
    colormap, look
        How it is shown.
    planes
        What cuts it open.
    linked
        A number that layers share whose look is linked; None where it is not.
    """

    name: str
    file: str
    told: dict[str, Any] = {}
    colormap: str = "gray"
    look: dict[str, Any] = {}
    planes: list[dict[str, Any]] = []
    linked: int | None = None


class SavedView(_Kept):
    """What a viewer shows and from where: dims, grid and camera."""

    ndisplay: Literal[2, 3] = 2
    order: tuple[int, ...] = ()
    point: tuple[float, ...] = ()
    grid: bool = False
    grid_shape: tuple[int, int] = (-1, -1)
    grid_stride: int = 1
    center: tuple[float, ...] = ()
    zoom: float = Field(default=1.0, gt=0)
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)


class SavedSession(_Kept):
    """The contents of a session's folder.

    Attributes
    ----------
    program
        What wrote it.
    scan
        Path of the scan, absolute; None where none was open.
    beside
        The same from the folder that the session lies in, for both moved together.
    options
        How the scan is read.
    job
        The last reconstruction, for the form.
    layers
        In the viewer's order.
    view
        What was seen of them.
    """

    program: str
    scan: str | None = None
    beside: str | None = None
    options: ScanOptions | KSpaceOptions = ScanOptions()
    job: ReconstructionJob | None = None
    layers: list[SavedLayer] = []
    view: SavedView = SavedView()

    def find_scan(self, folder: Path) -> Path | None:
        """Where the scan is now: where it was, or beside the session's folder as it was."""
        if self.scan is None:
            return None
        first = Path(self.scan)
        second = first if self.beside is None else Path(os.path.normpath(folder.absolute().parent / self.beside))
        return second if second.exists() and not first.exists() else first


def is_session(path: str | Path) -> bool:
    """Whether a path is a session's folder."""
    return (Path(path) / CONTENTS).is_file()


def check_folder(path: str | Path) -> Path:
    """The path with its ending, if a session can be saved there.

    Raises
    ------
    ScanError
        If its folder does not exist, or something else stands there.
    """
    path = Path(path).expanduser()
    path = path if path.name.lower().endswith(ENDING) else path.with_name(path.name + ENDING)
    if not path.parent.is_dir():
        raise ScanError(f"The folder {path.parent} does not exist: create it, or choose another.")
    if path.exists() and not is_session(path):
        raise ScanError(f"{path} exists and is no session, so it is left alone: choose another name.")
    return path


def is_kept(layer: Layer) -> bool:
    """Whether a layer is a volume that a session keeps: a result, or one that the person loaded."""
    if not isinstance(layer, Image) or layer.ndim != 3 or layer.rgb or layer.multiscale:
        return False
    told = told_by(layer)
    return told.get("shows", "projections" if "scan" in told else "volume") in ("volume", "phase")


def describe(
    viewer: Viewer, scan: Path | None, options: ScanOptions | KSpaceOptions, job: ReconstructionJob | None
) -> tuple[SavedSession, list[tuple[NDArray[Any], Grid]]]:
    """What is to be saved of a viewer, and the volumes; reads no data.

    Raises
    ------
    ScanError
        If a volume is turned or sheared.
    """
    from napari_recon import __version__

    kept = [layer for layer in viewer.layers if is_kept(layer)]
    groups: list[set[Layer]] = []
    with contextlib.suppress(ImportError):  # where this napari tells which are linked
        from napari.layers.utils._link_layers import get_linked_layers

        for layer in kept:
            others = get_linked_layers(layer)
            if others and not any(layer in group for group in groups):
                groups.append({layer, *others})
    saved = []
    for number, layer in enumerate(kept):
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in layer.name)
        planes = [
            {"position": list(p.position), "normal": list(p.normal), "enabled": bool(p.enabled)}
            for p in layer.experimental_clipping_planes
        ]
        look = {key: getattr(layer, key) for key in LOOK}
        saved.append(
            SavedLayer(
                name=layer.name,
                file=f"{number + 1}-{name[:60]}.ome.zarr",
                told=told_by(layer),
                colormap=layer.colormap.name,
                look={key: str(value) if key in ("rendering", "blending") else value for key, value in look.items()},
                planes=planes,
                linked=next((n for n, group in enumerate(groups) if layer in group), None),
            )
        )
    dims, grid, camera = viewer.dims, viewer.canvas.grid, viewer.scene.camera
    more = dims.ndim - 3
    view = SavedView(
        ndisplay=dims.ndisplay,
        order=tuple(a - more for a in dims.order if a >= more) if more >= 0 else (),
        point=tuple(float(p) for p in dims.point[-3:]),
        grid=grid.enabled,
        grid_shape=grid.shape,
        grid_stride=grid.stride,
        center=tuple(float(c) for c in camera.center),
        zoom=float(camera.zoom),
        angles=camera.angles,
    )
    session = SavedSession(
        program=f"napari-recon {__version__}",
        scan=None if scan is None else str(scan.absolute()),
        options=options,
        job=job,
        layers=saved,
        view=view,
    )
    return session, [(layer.data, shown.grid_of(layer)) for layer in kept]


def write(path: Path, session: SavedSession, volumes: list[tuple[NDArray[Any], Grid]]) -> Path:
    """Write a session's folder; one of the same name is replaced as a whole. Takes a while: call it from a thread.

    Raises
    ------
    ScanError
        If it cannot be written there.
    """
    path = check_folder(path)
    if session.scan is not None:
        with contextlib.suppress(ValueError):  # another drive
            beside = os.path.relpath(session.scan, path.absolute().parent)
            session = session.model_copy(update={"beside": beside})
    with replacing(path) as partial:
        partial.mkdir()
        for layer, (data, grid) in zip(session.layers, volumes, strict=True):
            made_by = layer.told.get("provenance") or {
                name: layer.told[name] for name in ("job",) if name in layer.told
            }
            write_volume(partial / layer.file, np.asarray(data, np.float32), grid, made_by)
        (partial / CONTENTS).write_text(session.model_dump_json(indent=1), encoding="utf-8")
    return path


def read(path: str | Path) -> tuple[SavedSession, list[Volume]]:
    """Read a session's folder; takes a while: call it from a thread.

    Raises
    ------
    ScanError
        If it is no session, is damaged, or lacks a volume.
    """
    path = Path(path)
    if not is_session(path):
        raise ScanError(f"{path} is no session: choose a folder that was saved as one, NAME{ENDING}.")
    try:
        session = SavedSession.model_validate_json((path / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise ScanError(
            f"{path / CONTENTS} could not be read ({f'{where}: ' * bool(where)}{first['msg']}): it is damaged or of "
            "another version."
        ) from None
    return session, [read_volume(path / layer.file) for layer in session.layers]


def make_layers(session: SavedSession, volumes: list[Volume]) -> list[Image]:
    """The layers of a session, as they looked."""
    made = []
    for saved, volume in zip(session.layers, volumes, strict=True):
        grid = volume.grid
        layer = shown.volume_layer(saved.name, volume.data, grid.scale, grid.translate, saved.told)
        if not saved.told:
            del layer.metadata[shown.KEY]
        with contextlib.suppress(KeyError, ValueError, TypeError):  # one that only that napari had
            layer.colormap = saved.colormap
        for name in LOOK:
            if name in saved.look:
                with contextlib.suppress(ValueError, TypeError):
                    value = saved.look[name]
                    setattr(layer, name, tuple(value) if isinstance(value, list) else value)
        layer.experimental_clipping_planes = saved.planes
        made.append(layer)
    return made


def show(viewer: Viewer, session: SavedSession, layers: list[Image]) -> None:
    """Add a session's layers to a viewer and see of them what was seen; what else is there is hidden."""
    visible = [layer.visible for layer in layers]
    shape = session.view.grid_shape
    shown.make_room(viewer, [], shape if session.view.grid else (1, 1), session.view.ndisplay)
    for layer, seen in zip(layers, visible, strict=True):
        layer.visible = seen
        viewer.layers.append(layer)
    for number in {saved.linked for saved in session.layers} - {None}:
        together = zip(session.layers, layers, strict=True)
        shown.link([layer for saved, layer in together if saved.linked == number])
    view, dims, camera = session.view, viewer.dims, viewer.scene.camera
    more = dims.ndim - 3
    if more >= 0 and sorted(view.order) == [0, 1, 2]:
        dims.order = (*range(more), *(a + more for a in view.order))
    viewer.canvas.grid.stride = view.grid_stride
    if more >= 0 and len(view.point) == 3:
        dims.set_point(range(more, more + 3), view.point)
    if view.center:
        camera.center, camera.zoom, camera.angles = view.center, view.zoom, view.angles
