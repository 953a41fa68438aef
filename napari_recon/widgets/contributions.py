"""What the manifest names besides the docks: sample scans, and a reader that shows a scan's projections or k-space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from napari_recon.jobs.volumes import ENDINGS, FORMATS
from napari_recon.scans.errors import ScanError

LayerData = tuple[Any, dict[str, Any], str]

VOLUMES = tuple(ending for ending in ENDINGS if ending not in FORMATS["TIFF"])
"""What the volumes end with that are read here; TIFF is everybody's."""

LARGE = 2**29
"""Bytes from which on an OME-Zarr volume stays in its file, and is read where it is looked at."""

SYNTHETIC: dict[str, tuple[str, dict[str, Any]]] = {
    "few-view-walnut": ("Textured walnut, 10 views", {"kind": "textured-walnut", "size": 96, "views": 10}),
    "synthetic-head": ("Synthetic head", {"kind": "head", "size": 64, "views": 60}),
    "synthetic-thorax": ("Synthetic thorax", {"kind": "thorax", "size": 64, "views": 60}),
    "mri-head-5": ("Synthetic head, MRI, 5 times undersampled", {"kind": "mri-head", "size": 64, "acceleration": 5.0}),
    "mri-head-10": (
        "Synthetic head, MRI, 10 times undersampled",
        {"kind": "mri-head", "size": 64, "acceleration": 10.0},
    ),
}
"""The samples that are simulated when they are first opened: name -> title, and what is simulated.

Kinds that begin with "mri-" are k-space. The first is a scan as the shipped network was trained for, of an object that
it was not trained on.
"""

SAMPLES = {"walnut-like": "Walnut-like cone-beam scan (60 views)", **{name: t for name, (t, _) in SYNTHETIC.items()}}
"""All sample scans: name -> title, as in the manifest."""


def sample_path(name: str) -> Path:
    """Where a sample scan lies; a synthetic one is made in the user's cache first (a few seconds, once a version)."""
    from napari_recon import sample_data

    if name not in SYNTHETIC:
        return Path(sample_data.path(name))
    import platformdirs

    from napari_recon import __version__
    from napari_recon.learning.simulate import simulate
    from napari_recon.learning.simulate_mri import write_mri

    folder = platformdirs.user_cache_path("napari-recon") / "samples" / __version__ / name
    recipe = dict(SYNTHETIC[name][1])
    mri = recipe["kind"].startswith("mri-")
    if not folder.is_dir():
        try:
            if mri:
                write_mri(recipe.pop("kind").removeprefix("mri-"), folder, **recipe)
            else:
                simulate(folder=folder, **recipe)
        except ScanError:
            if not folder.is_dir():  # or another viewer has just made it
                raise
    return folder / "kspace.npy" if mri else folder


def walnut_like() -> list[LayerData]:
    """Projections of the walnut-like sample, for File > Open Sample; the docks take the scan up from the layer."""
    return _projections(sample_path("walnut-like"))


def few_view_walnut() -> list[LayerData]:
    """Projections of a textured walnut from 10 sides, for File > Open Sample."""
    return _projections(sample_path("few-view-walnut"))


def synthetic_head() -> list[LayerData]:
    """Projections of a synthetic head, for File > Open Sample."""
    return _projections(sample_path("synthetic-head"))


def synthetic_thorax() -> list[LayerData]:
    """Projections of a synthetic thorax, for File > Open Sample."""
    return _projections(sample_path("synthetic-thorax"))


def mri_head_5() -> list[LayerData]:
    """K-space of a synthetic head, 8 coils, one of 5 samples taken, for File > Open Sample."""
    return _projections(sample_path("mri-head-5"))


def mri_head_10() -> list[LayerData]:
    """The same with one of 10 samples taken."""
    return _projections(sample_path("mri-head-10"))


def get_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """A reader for scans, saved sessions, and volumes in the formats that napari has no reader for; or None.

    Opening a scan reads no frames, so it is simply tried: a file that is not a scan is left to other readers.
    """
    if not isinstance(path, str):
        return None
    from napari_recon.scans import open_scan
    from napari_recon.widgets.session_file import is_session

    if is_session(path):
        return _session

    try:
        open_scan(path)
    except (ScanError, OSError):
        return _volume if path.lower().rstrip("/").endswith(VOLUMES) else None
    return lambda where: _projections(Path(where if isinstance(where, str) else where[0]))


def _projections(path: Path) -> list[LayerData]:
    from napari_recon.scans import open_scan
    from napari_recon.widgets.layers import kspace, projections

    scan = open_scan(path)
    if scan.kind == "mri":
        return [(each.pop("data"), each, "image") for each in kspace(scan)]
    array, arguments = projections(scan)
    return [(array, arguments, "image")]


def _session(where: Any) -> list[Any]:
    """A saved session, opened in the viewer; where there is none, its volumes."""
    import napari

    from napari_recon.widgets import session_file

    path = Path(where if isinstance(where, str) else where[0])
    viewer = napari.current_viewer()
    if viewer is not None:
        from napari_recon.widgets.session import Session

        Session.of(viewer).open_session(path)
        return [(None,)]
    return [layer.as_layer_data_tuple() for layer in session_file.make_layers(*session_file.read(path))]


def _volume(where: Any) -> list[Any]:
    """A volume's layer, which tells how it was made where the file does."""
    from napari_recon.jobs.volumes import ZarrVolume, read_volume
    from napari_recon.widgets import layers as shown

    path = Path(where if isinstance(where, str) else where[0])
    name = next(path.name[: -len(ending)] for ending in ENDINGS if path.name.lower().endswith(ending))
    if path.name.lower().rstrip("/").endswith(".ome.zarr") and path.is_dir():
        in_file = ZarrVolume.open(path)
        if in_file.levels[0].size * 4 > LARGE:
            layer = shown.file_layer(name, in_file, _told(in_file.provenance))
            if not in_file.provenance:
                del layer.metadata[shown.KEY]
            return [layer.as_layer_data_tuple()]
    volume = read_volume(path)
    told = _told(volume.provenance)
    layer = shown.volume_layer(name, volume.data, volume.grid.scale, volume.grid.translate, told)
    if not told:
        del layer.metadata[shown.KEY]
    if (limits := shown.contrast_limits(volume.data)) is not None:
        layer.contrast_limits_range = layer.contrast_limits = limits
    return [layer.as_layer_data_tuple()]


def _told(made_by: dict[str, Any]) -> dict[str, Any]:
    """What the metadata of a volume's layer tell; nothing of a volume that is not ours."""
    if not made_by:
        return {}
    return {"shows": "volume", "job": made_by.get("job") or {}, "volume": "result", "provenance": made_by}


def write_volume(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write an image layer as napari's File > Save asks for it; the ending says as what."""
    from napari.layers import Image

    from napari_recon.widgets.displays import can_be_exported, export_layer

    layer = Image(data, **attributes)
    if not can_be_exported(layer):
        raise ScanError(
            f"{layer.name} is no volume of three axes, as {Path(path).name} would be: choose another layer."
        )
    return [str(export_layer(layer, Path(path)))]
