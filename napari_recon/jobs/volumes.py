"""Volumes on disk: float32 TIFF and OME-Zarr with voxel size, place in the world and provenance inside.

A volume is written under a temporary name beside its own and then renamed, so that what bears its name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid

ENDINGS = (".tif", ".tiff", ".ome.zarr")
"""What a volume's file name ends with."""

_IMAGEJ_LIMIT = 2**32 - 2**22
"""ImageJ's TIFF holds less than 4 GB; larger volumes become OME-BigTIFF, which Fiji opens through Bio-Formats."""

_LENGTHS = {
    **dict.fromkeys(("m", "meter"), 1e3),
    **dict.fromkeys(("cm", "centimeter"), 10.0),
    **dict.fromkeys(("mm", "millimeter"), 1.0),
    **dict.fromkeys(("µm", "um", "micron", "micrometer", "\\u00b5m"), 1e-3),
    **dict.fromkeys(("nm", "nanometer"), 1e-6),
}
"""Units of length as files name them (the one with a backslash is ImageJ's own), in mm."""


@dataclass(frozen=True)
class Volume:
    """A volume as read from a file.

    Attributes
    ----------
    data
        (D, H, W) = (z, y, x), float32; attenuation in 1/mm where the file is ours.
    voxel_size
        mm, or None where the file does not tell (or its voxels are not cubes).
    center
        World position (x, y, z) of the volume's centre in mm.
    provenance
        How it was made: the job and what ran it; empty where the file is not ours.
    """

    data: NDArray[np.float32]
    voxel_size: float | None = None
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """Where the voxels are; voxels of 1 mm where the file does not tell."""
        d, h, w = self.data.shape
        return Grid((d, h, w), self.voxel_size or 1.0, self.center)


def check_output(path: str | Path) -> Path:
    """The path, if a volume can be written there; asked before anything is computed.

    Raises
    ------
    ScanError
        If the ending is not one of :data:`ENDINGS`, the folder is missing or read-only, or something stands there
        that is no volume.
    """
    path = Path(path)
    if not path.name.lower().endswith(ENDINGS) or path.name.lower() in ENDINGS:
        raise ScanError(f"The output {path} must end in .tif or .ome.zarr: choose one of the two.")
    if not path.parent.is_dir():
        raise ScanError(f"The output's folder {path.parent} does not exist: create it, or choose another.")
    if not os.access(path.parent, os.W_OK):
        raise ScanError(f"The output's folder {path.parent} is not writable: choose another.")
    if _is_zarr(path):
        if path.exists() and not (path / "zarr.json").exists() and not (path / ".zgroup").exists():
            raise ScanError(f"{path} exists and is no OME-Zarr volume, so it is left alone: choose another name.")
    elif path.is_dir():
        raise ScanError(f"{path} is a folder, so no TIFF can take its name: choose another name.")
    return path


def partial_path(path: str | Path, process: int | None = None) -> Path:
    """The temporary name that ``process`` (this one, by default) writes ``path`` under."""
    path = Path(path)
    return path.with_name(f".{path.name}.{process or os.getpid()}.partial")


def remove_partial(path: str | Path, process: int | None = None) -> None:
    """Remove what a process that died left behind while it wrote ``path``."""
    _remove(partial_path(path, process))


def write_volume(
    path: str | Path,
    data: NDArray[np.float32],
    grid: Grid,
    provenance: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Write a volume; a volume of the same name is replaced.

    Parameters
    ----------
    path
        .tif or .tiff (float32, ImageJ metadata: voxel size in mm, provenance as its Info), or .ome.zarr (OME-NGFF
        0.5, a pyramid, scale and translation in millimetres, provenance in the attribute ``napari_recon``).
    data
        (D, H, W), written as float32; nothing is rescaled.
    grid
        Voxel size and place.
    provenance
        What made it; must be JSON.
    should_stop
        Asked just before the volume takes its name: True leaves nothing behind, and None is returned.

    Raises
    ------
    ScanError
        If the path will not do (see :func:`check_output`), or the disk is full.
    """
    path = check_output(path)
    if data.shape != grid.shape:
        raise ScanError(f"The volume of {data.shape} voxels does not belong to a grid of {grid.shape}.")
    partial = partial_path(path)
    _remove(partial)
    try:
        if _is_zarr(path):
            _write_zarr(partial, data, grid, provenance or {}, path.name)
        else:
            _write_tiff(partial, data, grid, provenance or {})
        if should_stop():
            return None
        _take_place(partial, path)
    except OSError as error:
        raise ScanError(
            f"Could not write {path} ({error.strerror or error}): free some space or choose another."
        ) from error
    finally:
        _remove(partial)
    return path


def read_volume(path: str | Path) -> Volume:
    """Read a volume of ours, or any 3D TIFF, OME-Zarr, folder of TIFF slices, or NumPy's .npy (no voxel size).

    Raises
    ------
    ScanError
        If it is missing, damaged, or not 3D.
    """
    path = Path(path)
    if not path.exists():
        raise ScanError(f"There is no volume {path}: check the path.")
    slices = not _is_zarr(path) and path.is_dir() and bool(_slices(path))
    if not slices and (not path.name.lower().endswith((*ENDINGS, ".npy")) or path.is_dir() != _is_zarr(path)):
        raise ScanError(f"{path} is no volume: give a .tif, an .ome.zarr, a .npy or a folder of TIFF slices.")
    try:
        file = _read_npy if path.suffix.lower() == ".npy" else _read_tiff
        read = _read_slices if slices else _read_zarr if _is_zarr(path) else file
        volume = read(path)
    except ScanError:
        raise
    except Exception as error:  # tifffile and zarr raise what they please on damaged files
        raise ScanError(f"{path} could not be read as a volume ({error}): it may be damaged or cut short.") from error
    if volume.data.ndim != 3:
        raise ScanError(f"{path} has {volume.data.ndim} dimensions {volume.data.shape}; a volume has three (z, y, x).")
    return volume


def read_complex_volume(path: str | Path) -> NDArray[np.complex64]:
    """A complex volume (D, H, W), as k-space is made of, from NumPy's .npy.

    Raises
    ------
    ScanError
        If it is missing, damaged, not 3D, or without a phase.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy" or not path.is_file():
        volume = read_volume(path)  # which says what is wrong, if anything is
        raise ScanError(
            f"{path} holds {volume.data.dtype} numbers, and k-space is made of complex ones: the phase is missing, so "
            "give a .npy of complex numbers."
        )
    try:
        data = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ScanError(f"{path} could not be read as a volume ({error}): it may be damaged or cut short.") from error
    if data.ndim != 3:
        raise ScanError(f"{path} has {data.ndim} dimensions {data.shape}; a volume has three (z, y, x).")
    if data.dtype.kind != "c":
        raise ScanError(
            f"{path} holds values of type {data.dtype}, and k-space is made of complex ones: the phase is missing, so "
            "give a .npy of complex numbers."
        )
    return data.astype(np.complex64, copy=False)


# -- TIFF ----------------------------------------------------------------------------------------------------------


def _write_tiff(path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any]) -> None:
    import tifffile

    info = json.dumps({"center": grid.center, **provenance})
    volume = np.ascontiguousarray(data, np.float32)
    if volume.nbytes < _IMAGEJ_LIMIT:
        tifffile.imwrite(
            path,
            volume,
            imagej=True,
            resolution=(1 / grid.scale[2], 1 / grid.scale[1]),
            metadata={"axes": "ZYX", "spacing": grid.scale[0], "unit": "mm", "Info": info},
        )
        return
    size = {f"PhysicalSize{axis}": edge for axis, edge in zip("ZYX", grid.scale, strict=True)}
    units = {f"PhysicalSize{axis}Unit": "mm" for axis in "XYZ"}
    metadata = {"axes": "ZYX", **size, **units, "Description": info}
    tifffile.imwrite(path, volume, ome=True, bigtiff=True, metadata=metadata)


def _read_tiff(path: Path) -> Volume:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        size: float | None = None
        info: Any = None
        if file.imagej_metadata:
            meta = file.imagej_metadata
            unit = _LENGTHS.get(str(meta.get("unit", "")).lower())
            tag = page.tags.get("XResolution")  # type: ignore[union-attr]
            info = meta.get("Info")
            if unit and "spacing" in meta:
                size = float(meta["spacing"]) * unit
                across = tag.value[1] / tag.value[0] * unit if tag and tag.value[0] else size
                size = size if abs(across - size) < 1e-3 * size else None
        elif file.is_ome:
            root = tifffile.xml2dict(file.ome_metadata or "")["OME"]["Image"]
            root = root[0] if isinstance(root, list) else root
            pixels, info = root["Pixels"], root.get("Description")
            sizes = [
                float(pixels[f"PhysicalSize{a}"]) * _LENGTHS[str(pixels.get(f"PhysicalSize{a}Unit", "µm")).lower()]
                for a in "XYZ"
                if f"PhysicalSize{a}" in pixels
            ]
            size = sizes[0] if sizes and max(sizes) - min(sizes) < 1e-3 * min(sizes) else None
        data = file.asarray().astype(np.float32, copy=False)
        data = data[None] if data.ndim == 2 else data  # a single slice (fan beam)
        images = (file.imagej_metadata or {}).get("images", len(data))
        if images != len(data):
            raise ScanError(f"{path} has {len(data)} of its {images} slices: it was cut short, so copy it again.")
    provenance = _json(info)
    center = provenance.pop("center", (0.0, 0.0, 0.0))
    return Volume(data, size, (center[0], center[1], center[2]), provenance)


def _slices(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.tif"), *folder.glob("*.tiff")])


def _read_slices(folder: Path) -> Volume:
    import tifffile

    return Volume(np.stack([tifffile.imread(path).astype(np.float32, copy=False) for path in _slices(folder)]))


def _read_npy(path: Path) -> Volume:
    data = np.load(path, allow_pickle=False)
    if data.dtype.kind not in "fiub":
        raise ScanError(f"{path} holds values of type {data.dtype}; a volume has real numbers.")
    return Volume(data.astype(np.float32, copy=False))


# -- OME-Zarr ------------------------------------------------------------------------------------------------------


def _write_zarr(path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], name: str) -> None:
    import zarr
    from ome_zarr.writer import write_multiscales_metadata

    root = zarr.open_group(str(path), mode="w", zarr_format=3)
    level = np.ascontiguousarray(data, np.float32)
    datasets = []
    for number in range(8):
        size = [edge * 2**number for edge in grid.scale]
        array = root.create_array(
            str(number),
            shape=level.shape,
            dtype="float32",
            chunks=tuple(min(64, n) for n in level.shape),
            dimension_names=("z", "y", "x"),
        )
        array[:] = level
        # A coarser voxel lies in the middle of the 2 x 2 x 2 that it averages.
        shift = [(coarse - edge) / 2 for coarse, edge in zip(size, grid.scale, strict=True)]
        transforms = [
            {"type": "scale", "scale": size},
            {"type": "translation", "translation": [t + s for t, s in zip(grid.translate, shift, strict=True)]},
        ]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
        if max(level.shape) <= 128 or min(level.shape) < 2:
            break
        d, h, w = (n // 2 for n in level.shape)
        level = level[: 2 * d, : 2 * h, : 2 * w].reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5), dtype=np.float32)
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    write_multiscales_metadata(root, datasets, axes=axes, name=name)
    root.attrs["napari_recon"] = provenance


def _read_zarr(path: Path) -> Volume:
    import zarr

    root = zarr.open_group(str(path), mode="r")
    attributes = dict(root.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")  # type: ignore[union-attr]
    if not scales:
        raise ScanError(f"{path} holds no multiscales metadata, so it is no OME-Zarr image.")
    axes, first = scales[0].get("axes", []), scales[0]["datasets"][0]
    data = np.asarray(root[first["path"]][...], np.float32)  # type: ignore[index]
    while data.ndim > 3 and data.shape[0] == 1:  # time and channel of one
        data, axes = data[0], axes[1:]
    steps, starts = [1.0] * 3, None
    for transform in first.get("coordinateTransformations", []):
        if transform["type"] == "scale":
            steps = [float(s) for s in transform["scale"][-3:]]
        if transform["type"] == "translation":
            starts = [float(t) for t in transform["translation"][-3:]]
    units = [_LENGTHS.get(str(a.get("unit", "")).lower()) if isinstance(a, dict) else None for a in axes[-3:]]
    size, center = None, (0.0, 0.0, 0.0)
    if data.ndim == 3 and units and None not in units:
        mm = [float(s * u) for s, u in zip(steps, units, strict=True)]  # type: ignore[operator]
        size = mm[0] if max(mm) - min(mm) < 1e-3 * min(mm) else None
        if size and starts is not None:
            z, y, x = (
                t * u + (n - 1) / 2 * size  # type: ignore[operator]
                for t, u, n in zip(starts, units, data.shape, strict=True)
            )
            center = (x, y, z)
    provenance = attributes.get("napari_recon", {})
    return Volume(data, size, center, provenance if isinstance(provenance, dict) else {})


# -- names ---------------------------------------------------------------------------------------------------------


def _is_zarr(path: Path) -> bool:
    return path.name.lower().endswith(".zarr")


def _json(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _take_place(partial: Path, path: Path) -> None:
    if partial.is_dir() and path.exists():  # a folder cannot replace a folder that is not empty
        old = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
        _remove(old)
        path.rename(old)
        partial.rename(path)
        _remove(old)
    else:
        partial.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
