"""Volumes on disk: TIFF, OME-Zarr, MRC, NIfTI and DICOM with voxel size, place in the world and provenance inside.

A volume is written under a temporary name beside its own and then renamed, so that what bears its name is whole.

Values are float32. 16 bits are written where they are asked for (and by DICOM, which has no floats): then value = slope
* number + intercept, slope and intercept standing where each format has them, and are applied when it is read.

The world's x, y and z are taken for a patient's right, anterior and superior, NIfTI's axes; DICOM's first two point the
other way, so that a volume lies in the same place in either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid

FORMATS = {
    "TIFF": (".tif", ".tiff"),
    "OME-Zarr": (".ome.zarr",),
    "NIfTI": (".nii.gz", ".nii"),
    "MRC": (".mrc",),
    "DICOM": (".dcm",),
}
"""What volumes are written as, and what their names end with; DICOM is a folder of slices."""
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
"""What a volume's name ends with."""
_LIBRARIES = {".mrc": "mrcfile", ".nii": "nibabel", ".nii.gz": "nibabel", ".dcm": "pydicom"}
"""What reads and writes the formats that not everyone needs."""

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
    scale
        Edges (z, y, x) of a voxel in mm where they are no cubes; None for cubes, and where the file does not tell.
    """

    data: NDArray[np.float32]
    voxel_size: float | None = None
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    provenance: dict[str, Any] = field(default_factory=dict)
    scale: tuple[float, float, float] | None = None

    @property
    def grid(self) -> Grid:
        """Where the voxels are; voxels of 1 mm where the file does not tell."""
        return _grid(self.data.shape, self.scale or (self.voxel_size or 1.0,) * 3, self.center)


def check_output(path: str | Path) -> Path:
    """The path, if a volume can be written there; asked before anything is computed.

    Raises
    ------
    ScanError
        If the ending is not one of :data:`ENDINGS`, what writes it is not installed, the folder is missing or
        read-only, or something stands there that is no volume.
    """
    path = Path(path)
    ending = _ending(path)
    if ending is None or path.name.lower() in ENDINGS:
        known = ", ".join(ENDINGS)
        raise ScanError(f"The output {path} has no ending that a volume is written by: choose one of {known}.")
    _need_library(path)
    if not path.parent.is_dir():
        raise ScanError(f"The output's folder {path.parent} does not exist: create it, or choose another.")
    if not os.access(path.parent, os.W_OK):
        raise ScanError(f"The output's folder {path.parent} is not writable: choose another.")
    if _is_zarr(path):
        if path.exists() and not (path / "zarr.json").exists() and not (path / ".zgroup").exists():
            raise ScanError(f"{path} exists and is no OME-Zarr volume, so it is left alone: choose another name.")
    elif ending == ".dcm":
        if path.exists() and not (path.is_dir() and all(file.suffix == ".dcm" for file in path.iterdir())):
            raise ScanError(
                f"{path} exists and is no folder of DICOM slices, so it is left alone: choose another name."
            )
    elif path.is_dir():
        raise ScanError(f"{path} is a folder, so no file can take its name: choose another name.")
    return path


def partial_path(path: str | Path, process: int | None = None) -> Path:
    """The temporary name that ``process`` (this one, by default) writes ``path`` under."""
    path = Path(path)
    return path.with_name(f".{path.name}.{process or os.getpid()}.partial")


def remove_partial(path: str | Path, process: int | None = None) -> None:
    """Remove what a process that died left behind while it wrote ``path``."""
    _remove(partial_path(path, process))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for a file or folder, which takes its own if what is in the block ends well.

    A block that removes what it wrote leaves what was there before.

    Raises
    ------
    ScanError
        If it cannot be written.
    """
    partial = partial_path(path)
    _remove(partial)
    try:
        yield partial
        if partial.exists():
            _take_place(partial, path)
    except OSError as error:
        raise ScanError(
            f"Could not write {path} ({error.strerror or error}): free some space or choose another."
        ) from error
    finally:
        _remove(partial)


def write_volume(
    path: str | Path,
    data: NDArray[np.float32],
    grid: Grid,
    provenance: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    bits: Literal[16, 32] | None = None,
) -> Path | None:
    """Write a volume; a volume of the same name is replaced.

    Parameters
    ----------
    path
        The ending says what is written: .tif or .tiff (ImageJ metadata: voxel size in mm, provenance as its Info),
        .ome.zarr (OME-NGFF 0.5, a pyramid, scale and translation in millimetres, provenance in the attribute
        ``napari_recon``), .nii or .nii.gz (NIfTI-1: x, y, z in mm, provenance as a comment), .mrc (MRC2014: cell and
        origin in ångström, as the format has them, provenance in the extended header), or .dcm (a folder of DICOM
        slices, provenance in a private element).
    data
        (D, H, W).
    grid
        Voxel size and place.
    provenance
        What made it; must be JSON.
    should_stop
        Asked just before the volume takes its name: True leaves nothing behind, and None is returned.
    bits
        32 for float32, 16 for whole numbers with a slope and an intercept from the volume's least and largest value:
        within half a slope of what they were. None is 32, but 16 of DICOM.

    Raises
    ------
    ScanError
        If the path will not do (see :func:`check_output`), the values cannot be had in so many bits, or the disk is
        full.
    """
    path = check_output(path)
    if data.shape != grid.shape:
        raise ScanError(f"The volume of {data.shape} voxels does not belong to a grid of {grid.shape}.")
    ending = _ending(path)
    if ending == ".dcm" and bits == 32:
        raise ScanError(f"DICOM holds whole numbers of 16 bits, and {path} was to have 32: ask for 16.")
    signed = ending in (".nii", ".nii.gz", ".mrc")  # what most that read these know
    numbers = _Numbers()
    if bits == 16 or ending == ".dcm":
        numbers = _Numbers.spanning(data, "int16" if signed else "uint16", path)
    made_by = provenance or {}
    with replacing(path) as partial:
        if _is_zarr(path):
            _write_zarr(partial, data, grid, made_by, numbers, path.name)
        elif ending == ".mrc":
            _write_mrc(partial, data, grid, made_by, numbers)
        elif ending in (".nii", ".nii.gz"):
            _write_nifti(partial, data, grid, made_by, numbers, ending == ".nii.gz")
        elif ending == ".dcm":
            _write_dicom(partial, data, grid, made_by, numbers, path.stem)
        else:
            _write_tiff(partial, data, grid, made_by, numbers)
        if should_stop():
            _remove(partial)
            return None
    return path


def read_volume(path: str | Path) -> Volume:
    """Read a volume of ours, or of others.

    These are a 3D TIFF, OME-Zarr, NIfTI or MRC file, a DICOM slice or a folder of one series of them, a folder of TIFF
    slices, or NumPy's .npy (no voxel size). Axes of NIfTI, MRC and DICOM that run along others than ours, or the other
    way, are swapped and turned around; numbers are brought to values where the file says how.

    Raises
    ------
    ScanError
        If it is missing, damaged, or not 3D, or what reads it is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ScanError(f"There is no volume {path}: check the path.")
    read: Callable[[Path], Volume]
    ending = _ending(path)
    if _is_zarr(path) and path.is_dir():
        read = _read_zarr
    elif path.is_dir() and _dicom_slices(path):
        read = _read_dicom
    elif path.is_dir() and _slices(path):
        read = _read_slices
    elif path.suffix.lower() == ".npy" and path.is_file():
        read = _read_npy
    elif ending in FORMATS["TIFF"] and path.is_file():
        read = _read_tiff
    elif ending in _LIBRARIES and path.is_file():
        read = {".mrc": _read_mrc, ".dcm": _read_dicom}.get(str(ending), _read_nifti)
    else:
        known = ", ".join((*ENDINGS, ".npy"))
        raise ScanError(f"{path} is no volume: give one that ends in {known}, or a folder of slices.")
    if read in (_read_dicom, _read_mrc, _read_nifti):
        _need_library(path if ending in _LIBRARIES else path / ".dcm")
    try:
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


# -- values as numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """How a file holds values: value = slope * number + intercept.

    Slope and intercept are what float32 has, so that all formats hold the same; of 9 digits they come back as they are.
    """

    dtype: str = "float32"
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def spanning(cls, data: NDArray[np.float32], dtype: str, path: Path) -> _Numbers:
        """Whole numbers that reach from the least to the largest value; ``path`` is for what is said."""
        low, high = float(np.min(data)), float(np.max(data))
        if not np.isfinite([low, high]).all():
            raise ScanError(f"The volume holds NaN or infinity, which {path} cannot have in 16 bits: write 32.")
        levels = np.iinfo(dtype)
        # A little more than the range, since rounding the two to float32 must not leave the largest value out.
        slope = float(np.float32((high - low) * (1 + 1e-6) / (levels.max - levels.min)))
        if slope == 0:  # one value
            return cls(dtype, 1.0, low)
        return cls(dtype, slope, float(np.float32(low - slope * levels.min)))

    @property
    def scaled(self) -> bool:
        """Whether the numbers are not the values themselves."""
        return self.dtype != "float32"

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The numbers of values, contiguous; a slice at a time, since a volume may be large."""
        if not self.scaled:
            return np.ascontiguousarray(values, np.float32)
        out, levels = np.empty(values.shape, self.dtype), np.iinfo(self.dtype)
        for k, plane in enumerate(values):
            numbers = np.rint((plane.astype(np.float64) - self.intercept) / self.slope)
            out[k] = np.clip(numbers, levels.min, levels.max)
        return out


def _values(numbers: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """What a file's numbers stand for."""
    if (slope, intercept) == (1.0, 0.0):
        return numbers.astype(np.float32, copy=False)
    out = np.empty(numbers.shape, np.float32)
    for k, plane in enumerate(numbers):
        out[k] = plane * np.float64(slope) + intercept
    return out


def _volume(
    data: NDArray[np.float32],
    scale: Sequence[float] | None = None,
    center: Sequence[float] = (0.0, 0.0, 0.0),
    provenance: dict[str, Any] | None = None,
) -> Volume:
    """A volume of voxels with the edges ``scale`` (z, y, x) in mm, None where the file does not tell."""
    x, y, z = (float(c) for c in center)
    if scale is None or not (np.isfinite(scale).all() and min(scale) > 0):
        return Volume(data, None, (x, y, z), provenance or {})
    edges = (float(scale[0]), float(scale[1]), float(scale[2]))
    if max(edges) - min(edges) < 1e-3 * min(edges):
        return Volume(data, edges[0], (x, y, z), provenance or {})
    return Volume(data, None, (x, y, z), provenance or {}, edges)


def _grid(shape: Sequence[int], scale: Sequence[float], center: tuple[float, float, float]) -> Grid:
    d, h, w = shape
    z, y, x = scale
    return Grid((d, h, w), z, center, (1.0, y / z, x / z))


def _upright(
    data: NDArray[np.float32], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float32], tuple[float, float, float], tuple[float, float, float]]:
    """A volume of any orientation, its axes swapped and turned around until they run along the world's.

    What lies askew is taken for the nearest that does not.

    Parameters
    ----------
    data
        (k, j, i).
    affine
        4 x 4: from (i, j, k, 1) to the world's (x, y, z, 1) in mm.

    Returns
    -------
    (D, H, W); the edges (z, y, x) of its voxels; its centre (x, y, z).
    """
    steps = np.asarray(affine, np.float64)[:3, :3]
    edges = np.linalg.norm(steps, axis=0)
    cosines = steps / np.where(edges > 0, edges, 1)
    # The index that runs along x, along y, and along z.
    along = max(itertools.permutations(range(3)), key=lambda order: sum(abs(cosines[range(3), order])))
    upright = data.transpose([2 - along[axis] for axis in (2, 1, 0)])
    upright = upright[tuple(slice(None, None, -1 if steps[axis, along[axis]] < 0 else 1) for axis in (2, 1, 0))]
    x, y, z = (float(c) for c in steps @ ((np.array(data.shape[::-1]) - 1) / 2) + np.asarray(affine)[:3, 3])
    dz, dy, dx = (float(edges[along[axis]]) for axis in (2, 1, 0))
    return np.array(upright, np.float32, order="C"), (dz, dy, dx), (x, y, z)


# -- TIFF ----------------------------------------------------------------------------------------------------------


def _write_tiff(path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], numbers: _Numbers) -> None:
    import tifffile

    volume = numbers.of(data)
    rescale = {"slope": numbers.slope, "intercept": numbers.intercept}
    if volume.nbytes < _IMAGEJ_LIMIT:
        info = json.dumps({"center": grid.center, **provenance})
        # ImageJ's calibration by a straight line: what it shows are values.
        calibration = (
            {"cf": 0, "c0": f"{numbers.intercept:.9g}", "c1": f"{numbers.slope:.9g}"} if numbers.scaled else {}
        )
        tifffile.imwrite(
            path,
            volume,
            imagej=True,
            resolution=(1 / grid.scale[2], 1 / grid.scale[1]),
            metadata={"axes": "ZYX", "spacing": grid.scale[0], "unit": "mm", "Info": info, **calibration},
        )
        return
    told = {"center": grid.center, **({"rescale": rescale} if numbers.scaled else {}), **provenance}
    info = json.dumps(told)
    size = {f"PhysicalSize{axis}": edge for axis, edge in zip("ZYX", grid.scale, strict=True)}
    units = {f"PhysicalSize{axis}Unit": "mm" for axis in "XYZ"}
    metadata = {"axes": "ZYX", **size, **units, "Description": info}
    tifffile.imwrite(path, volume, ome=True, bigtiff=True, metadata=metadata)


def _read_tiff(path: Path) -> Volume:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        scale: list[float] | None = None
        info: Any = None
        slope, intercept = 1.0, 0.0
        if file.imagej_metadata:
            meta = file.imagej_metadata
            unit = _LENGTHS.get(str(meta.get("unit", "")).lower())
            info = meta.get("Info")
            if unit and "spacing" in meta:
                deep = float(meta["spacing"])
                tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]  # type: ignore[union-attr]
                across = [tag.value[1] / tag.value[0] if tag and tag.value[0] else deep for tag in tags]
                scale = [edge * unit for edge in (deep, *across)]
            if meta.get("cf") == 0 and "c1" in meta:
                slope, intercept = float(meta["c1"]), float(meta.get("c0", 0.0))
        elif file.is_ome:
            root = tifffile.xml2dict(file.ome_metadata or "")["OME"]["Image"]
            root = root[0] if isinstance(root, list) else root
            pixels, info = root["Pixels"], root.get("Description")
            if "PhysicalSizeX" in pixels:
                sizes = [(f"PhysicalSize{a}" if f"PhysicalSize{a}" in pixels else "PhysicalSizeX") for a in "ZYX"]
                scale = [float(pixels[n]) * _LENGTHS[str(pixels.get(f"{n}Unit", "µm")).lower()] for n in sizes]
        data = file.asarray()
        data = data[None] if data.ndim == 2 else data  # a single slice (fan beam)
        images = (file.imagej_metadata or {}).get("images", len(data))
        if images != len(data):
            raise ScanError(f"{path} has {len(data)} of its {images} slices: it was cut short, so copy it again.")
    provenance = _json(info)
    center = provenance.pop("center", (0.0, 0.0, 0.0))
    if isinstance(rescale := provenance.pop("rescale", None), dict):
        slope, intercept = float(rescale["slope"]), float(rescale["intercept"])
    return _volume(_values(data, slope, intercept), scale, center, provenance)


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


def _write_zarr(
    path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], numbers: _Numbers, name: str
) -> None:
    volume = ZarrVolume.create(path, grid, name=name, numbers=numbers)
    volume.write(0, data)
    volume.describe(provenance)


def _read_zarr(path: Path) -> Volume:
    volume = ZarrVolume.open(path)
    return _volume(np.asarray(volume.levels[0]), volume.scale, volume.center, volume.provenance)


class Level:
    """One resolution of an OME-Zarr volume, (D, H, W), float32: what is asked for is read, and nothing is kept."""

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, int, int] = tuple(array.shape[-3:])
        self.chunks: tuple[int, int, int] = tuple(array.chunks[-3:])
        slope, intercept = array.attrs.get("scale_factor", 1), array.attrs.get("add_offset", 0)
        self._slope, self._intercept = float(slope), float(intercept)

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        key = key if isinstance(key, tuple) else (key,)
        values = np.asarray(self.array[(*(0,) * (self.array.ndim - 3), *key)])  # time and channel of one
        return _values(values, self._slope, self._intercept)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]


class ZarrVolume:
    """An OME-Zarr volume where it lies: read a part at a time, and written slab by slab with its pyramid.

    What is written can be read at any moment; what is not yet, is zero.

    Attributes
    ----------
    path
        The folder.
    levels
        Its resolutions, finest first.
    scale
        Edges (z, y, x) of the finest's voxels in mm; None where the file does not tell.
    center
        World position (x, y, z) of the volume's centre in mm.
    provenance
        How it was made; empty where it is not ours.
    """

    def __init__(self, path: Path, group: Any) -> None:
        self.path = path
        attributes = dict(group.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            raise ScanError(f"{path} holds no multiscales metadata, so it is no OME-Zarr image.")
        arrays = [group[dataset["path"]] for dataset in scales[0]["datasets"]]
        shape = arrays[0].shape
        if len(shape) < 3 or any(n > 1 for n in shape[:-3]):
            raise ScanError(f"{path} has {len(shape)} dimensions {shape}; a volume has three (z, y, x).")
        self.levels = [Level(array) for array in arrays]
        self.scale, self.center = _placed(scales[0], self.levels[0].shape)
        made_by = attributes.get("napari_recon", {})
        self.provenance: dict[str, Any] = made_by if isinstance(made_by, dict) else {}

    @classmethod
    def open(cls, path: str | Path, writable: bool = False) -> ZarrVolume:
        """One that is there.

        Raises
        ------
        ScanError
            If it is no OME-Zarr volume.
        """
        import zarr

        return cls(Path(path), zarr.open_group(str(path), mode="r+" if writable else "r"))

    @classmethod
    def create(
        cls,
        path: str | Path,
        grid: Grid,
        thickness: int | None = None,
        name: str | None = None,
        numbers: _Numbers | None = None,
    ) -> ZarrVolume:
        """A new one of zeros, in place of what is there.

        Parameters
        ----------
        path
            The folder.
        grid
            Its shape and place.
        thickness
            Of the slabs in which it is to be written, a multiple of :func:`slab_step`: no two then share a chunk, so
            that neither an end amid writing nor another process touches what is finished. None writes it whole.
        name
            In its metadata; None takes the folder's.
        numbers
            How it holds values; None holds float32.
        """
        import zarr
        from ome_zarr.writer import write_multiscales_metadata

        path, numbers = Path(path), numbers or _Numbers()
        root = zarr.open_group(str(path), mode="w", zarr_format=3)
        shapes = _pyramid(grid.shape)
        deep = 64
        if thickness is not None:
            step = slab_step(grid.shape)
            parts = thickness // step
            deep = step * max((n for n in range(1, parts + 1) if parts % n == 0 and n * step <= 64), default=1)
        datasets = []
        for number, shape in enumerate(shapes):
            size = [edge * 2**number for edge in grid.scale]
            depth = deep if thickness is None else max(1, deep >> number)
            array = root.create_array(
                str(number),
                shape=shape,
                dtype=numbers.dtype,
                chunks=tuple(min(most, n) for most, n in zip((depth, 64, 64), shape, strict=True)),
                dimension_names=("z", "y", "x"),
            )
            if numbers.scaled:  # as the CF conventions call them, which xarray knows
                array.attrs.update({"scale_factor": numbers.slope, "add_offset": numbers.intercept})
            # A coarser voxel lies in the middle of the 2 x 2 x 2 that it averages.
            shift = [(coarse - edge) / 2 for coarse, edge in zip(size, grid.scale, strict=True)]
            transforms = [
                {"type": "scale", "scale": size},
                {"type": "translation", "translation": [t + s for t, s in zip(grid.translate, shift, strict=True)]},
            ]
            datasets.append({"path": str(number), "coordinateTransformations": transforms})
        axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
        write_multiscales_metadata(root, datasets, axes=axes, name=name or path.name)
        return cls(path, root)

    def write(self, start: int, values: NDArray[np.float32]) -> None:
        """Write the slices from ``start`` on, in all resolutions; ``start`` is a multiple of :func:`slab_step`."""
        level = np.ascontiguousarray(values, np.float32)
        for number, each in enumerate(self.levels):
            if number:
                d, h, w = (n // 2 for n in level.shape)
                level = (
                    level[: 2 * d, : 2 * h, : 2 * w].reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5), dtype=np.float32)
                )
            first = start >> number
            if len(level):
                numbers = _Numbers(each.array.dtype.name, each._slope, each._intercept)
                each.array[first : first + len(level)] = numbers.of(level)

    def describe(self, provenance: dict[str, Any], **more: Any) -> None:
        """Say how it was made, and ``more`` beside that; who reads meanwhile sees what was said before, or this."""
        file = self.path / "zarr.json"
        said = json.loads(file.read_text())
        said["attributes"]["napari_recon"] = provenance | more
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(said, indent=2))
        partial.replace(file)
        self.provenance = provenance | more


def slab_step(shape: tuple[int, int, int]) -> int:
    """What the thickness of slabs is a multiple of, so that each has voxels of its own in all resolutions."""
    return int(2 ** (len(_pyramid(shape)) - 1))


def _pyramid(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes of the resolutions: halved until 128 voxels or fewer are left, seven times at most."""
    shapes = [tuple(int(n) for n in shape)]
    while len(shapes) < 8 and max(shapes[-1]) > 128 and min(shapes[-1]) >= 2:
        shapes.append(tuple(n // 2 for n in shapes[-1]))
    return shapes


def _placed(multiscales: dict[str, Any], shape: Sequence[int]) -> tuple[list[float] | None, tuple[float, float, float]]:
    """The voxel's edges (z, y, x) and the centre (x, y, z) in mm that OME-NGFF metadata tell."""
    axes, first = multiscales.get("axes", []), multiscales["datasets"][0]
    steps, starts = [1.0] * 3, None
    for transform in first.get("coordinateTransformations", []):
        if transform["type"] == "scale":
            steps = [float(s) for s in transform["scale"][-3:]]
        if transform["type"] == "translation":
            starts = [float(t) for t in transform["translation"][-3:]]
    units = [_LENGTHS.get(str(a.get("unit", "")).lower()) if isinstance(a, dict) else None for a in axes[-3:]]
    if not units or None in units:
        return None, (0.0, 0.0, 0.0)
    scale = [float(s * u) for s, u in zip(steps, units, strict=True)]  # type: ignore[operator]
    if starts is None:
        return scale, (0.0, 0.0, 0.0)
    z, y, x = (
        t * u + (n - 1) / 2 * edge  # type: ignore[operator]
        for t, u, n, edge in zip(starts, units, shape, scale, strict=True)
    )
    return scale, (x, y, z)


# -- MRC -----------------------------------------------------------------------------------------------------------

_ANGSTROM = 1e-7
"""MRC's unit of length in mm."""


def _write_mrc(path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], numbers: _Numbers) -> None:
    import mrcfile

    told: dict[str, Any] = {"center": grid.center, "provenance": provenance}
    with mrcfile.new(path) as file:
        file.set_data(numbers.of(data))
        file.set_volume()
        file.voxel_size = tuple(edge / _ANGSTROM for edge in grid.scale[::-1])
        for axis, start in zip("zyx", grid.translate, strict=True):
            file.header.origin[axis] = start / _ANGSTROM
        if numbers.scaled:  # the format has no field for them: a person finds them in the label
            told["rescale"] = [numbers.slope, numbers.intercept]
            file.add_label(f"value = {numbers.slope:.9g} * number + {numbers.intercept:.9g}")
        file.set_extended_header(np.frombuffer(json.dumps(told).encode(), np.uint8))
        file.header.exttyp = b"JSON"


def _read_mrc(path: Path) -> Volume:
    import mrcfile

    with mrcfile.open(path, mode="r") as file:
        header = file.header
        data = np.asarray(file.data)
        if data.dtype.kind == "c":
            raise ScanError(f"{path} holds complex values; a volume has real numbers.")
        if data.ndim == 2:
            data = data[None]
        edges = np.array([file.voxel_size[axis] for axis in "xyz"], np.float64) * _ANGSTROM
        origin = np.array([header.origin[axis] for axis in "xyz"], np.float64) * _ANGSTROM
        along = [int(header[name]) - 1 for name in ("mapc", "mapr", "maps")]  # the world's axis of i, of j, of k
        extended = np.asarray(file.extended_header).tobytes() if bytes(header.exttyp) == b"JSON" else b""
        told = _json(extended.decode(errors="replace"))
    slope, intercept = told.get("rescale", (1.0, 0.0))
    data = _values(data, float(slope), float(intercept))
    provenance = told.get("provenance")
    if data.ndim != 3 or sorted(along) != [0, 1, 2] or not edges.all():
        return _volume(data, None, (0, 0, 0), provenance)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(edges)[:, along]
    affine[:3, 3] = origin
    data, scale, center = _upright(data, affine)
    if not origin.any():  # nobody said where it is
        center = (0.0, 0.0, 0.0)
    return _volume(data, scale, told.get("center", center), provenance)


# -- NIfTI ---------------------------------------------------------------------------------------------------------


def _write_nifti(
    path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], numbers: _Numbers, compressed: bool
) -> None:
    import gzip

    from nibabel.nifti1 import Nifti1Extension, Nifti1Image

    affine = np.diag([*grid.scale[::-1], 1.0])
    affine[:3, 3] = grid.translate[::-1]
    image = Nifti1Image(numbers.of(data).transpose(2, 1, 0), affine)
    header = image.header
    header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if numbers.scaled:
        header.set_slope_inter(numbers.slope, numbers.intercept)
    header.extensions.append(Nifti1Extension("comment", json.dumps(provenance).encode()))
    with open(path, "wb") as file:
        if compressed:  # neither a time nor the temporary name within: what is written twice is the same
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _read_nifti(path: Path) -> Volume:
    import nibabel

    image: Any = nibabel.load(path)
    data = np.array(image.dataobj, np.float32)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    data = data[..., None] if data.ndim == 2 else data
    provenance: dict[str, Any] = {}
    for extension in image.header.extensions:
        if extension.get_code() == 6:  # a comment
            provenance = provenance or _json(extension.get_content())
    if data.ndim != 3:
        return Volume(data.T)  # refused by its dimensions
    unit = _LENGTHS.get(image.header.get_xyzt_units()[0], 1.0)
    upright, scale, center = _upright(data.transpose(2, 1, 0), np.diag([unit, unit, unit, 1.0]) @ image.affine)
    return _volume(upright, scale, center, provenance)


# -- DICOM ---------------------------------------------------------------------------------------------------------

_PRIVATE = 0x0071
"""Group of the private element that holds the provenance."""
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""To DICOM's patient axes (left, posterior, superior) from the world's, and back."""


def _write_dicom(
    path: Path, data: NDArray, grid: Grid, provenance: dict[str, Any], numbers: _Numbers, name: str
) -> None:
    import datetime

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

    mri = "coils" in ((provenance.get("job") or {}).get("options") or {})
    storage = MRImageStorage if mri else CTImageStorage  # slices, which every viewer opens
    study, series, place = (generate_uid() for _ in range(3))
    now = datetime.datetime.now()
    z0, y0, x0 = grid.translate
    dz, dy, dx = (f"{edge:.9g}" for edge in grid.scale)
    low, high = float(np.min(data)), float(np.max(data))
    path.mkdir()
    for k in range(grid.shape[0]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = storage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = Dataset()
        one.file_meta = meta
        one.SpecificCharacterSet = "ISO_IR 192"
        one.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        one.SOPClassUID, one.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, place
        one.StudyDate = one.SeriesDate = one.ContentDate = now.strftime("%Y%m%d")
        one.StudyTime = one.SeriesTime = one.ContentTime = now.strftime("%H%M%S")
        one.Modality = "MR" if mri else "CT"
        one.Manufacturer = "napari-recon"
        one.PatientName = one.PatientID = one.SeriesDescription = name[:64]
        one.AccessionNumber = one.ReferringPhysicianName = one.PatientBirthDate = one.PatientSex = ""
        one.StudyID = one.PositionReferenceIndicator = one.PatientPosition = ""
        one.SeriesNumber, one.AcquisitionNumber, one.InstanceNumber = 1, 1, k + 1
        if mri:
            one.ScanningSequence, one.SequenceVariant, one.ScanOptions = "RM", "NONE", ""
            one.MRAcquisitionType, one.EchoTime, one.EchoTrainLength = "3D", None, None
        else:
            one.KVP = None
        # The world's x and y run to DICOM's right and back, see the module.
        one.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        one.ImagePositionPatient = [f"{c:.9g}" for c in (-x0, -y0, z0 + k * grid.scale[0])]
        one.PixelSpacing, one.SliceThickness, one.SpacingBetweenSlices = [dy, dx], dz, dz
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.Rows, one.Columns = grid.shape[1:]
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.RescaleSlope, one.RescaleIntercept = f"{numbers.slope:.9g}", f"{numbers.intercept:.9g}"
        one.RescaleType = "US"
        one.WindowCenter, one.WindowWidth = f"{(low + high) / 2:.9g}", f"{max(high - low, numbers.slope):.9g}"
        one.VOILUTFunction = "LINEAR_EXACT"  # windows narrower than 1 are for this one only
        one.PixelData = numbers.of(data[k : k + 1]).astype("<u2", copy=False).tobytes()
        one.private_block(_PRIVATE, "napari-recon", create=True).add_new(1, "UT", json.dumps(provenance))
        one.save_as(path / f"{k + 1:05d}.dcm", enforce_file_format=True)


def _dicom_slices(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() == ".dcm") if path.is_dir() else [path]


def _read_dicom(path: Path) -> Volume:
    from pydicom import dcmread

    found = [dcmread(file) for file in _dicom_slices(path)]
    if any(int(one.get("NumberOfFrames", 1) or 1) > 1 for one in found):
        raise ScanError(f"{path} holds several frames in one file, which is not read: give a folder of slices.")
    series, shapes = {one.get("SeriesInstanceUID") for one in found}, {(one.Rows, one.Columns) for one in found}
    if len(series) > 1 or len(shapes) > 1:
        raise ScanError(f"{path} holds the slices of more than one series: give a folder with those of one.")
    first = found[0]
    placed = all("ImagePositionPatient" in one and "ImageOrientationPatient" in one for one in found)
    affine = np.eye(4)
    if placed:
        rows, columns = np.array(first.ImageOrientationPatient, np.float64).reshape(2, 3)
        normal = np.cross(rows, columns)
        at = [float(np.array(one.ImagePositionPatient, np.float64) @ normal) for one in found]
        found = [found[k] for k in np.argsort(at, kind="stable")]
        corners = np.array([one.ImagePositionPatient for one in found], np.float64)
        deep = float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
        step = normal * deep if len(found) == 1 else (corners[-1] - corners[0]) / (len(found) - 1)
        if np.abs(corners - corners[0] - np.arange(len(found))[:, None] * step).max() > 0.05 * np.linalg.norm(step):
            raise ScanError(f"The slices of {path} are not evenly spaced: some are missing, or it is no volume.")
        pitch = np.array(first.get("PixelSpacing", (1.0, 1.0)), np.float64)
        affine[:3, :3] = np.stack([rows * pitch[1], columns * pitch[0], step], axis=1)
        affine[:3, 3] = corners[0]
    else:
        found.sort(key=lambda one: int(one.get("InstanceNumber") or 0))
    data = np.stack(
        [
            _values(one.pixel_array[None], float(one.get("RescaleSlope", 1)), float(one.get("RescaleIntercept", 0)))[0]
            for one in found
        ]
    )
    try:
        provenance = _json(first.private_block(_PRIVATE, "napari-recon")[1].value)
    except KeyError:
        provenance = {}
    if not placed:
        return Volume(data, provenance=provenance)
    upright, scale, center = _upright(data, _LPS @ affine)
    return _volume(upright, scale, center, provenance)


# -- names ---------------------------------------------------------------------------------------------------------


def _is_zarr(path: Path) -> bool:
    return path.name.lower().endswith(".zarr")


def _ending(path: Path) -> str | None:
    """The one of :data:`ENDINGS` that the name has."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def _need_library(path: Path) -> None:
    library = _LIBRARIES.get(_ending(path) or "")
    if library is not None and importlib.util.find_spec(library) is None:
        raise ScanError(f"{path} needs {library}: install it with pip install 'napari-recon[formats]'.")


def _json(text: Any) -> dict[str, Any]:
    """What a file tells of itself; nothing, where that is not ours."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    try:
        found = json.loads(text.rstrip("\0"))
    except (AttributeError, ValueError):
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
