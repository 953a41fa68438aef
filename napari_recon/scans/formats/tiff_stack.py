"""TIFF or HDF5 frames described by a ``scan.toml`` that says what the frames themselves do not.

The sidecar stands in the frames' folder, or elsewhere with a ``folder``. A small one::

    kind = "cone"
    source_object = 210.0          # mm
    source_detector = 553.0        # mm
    detector_pixel = 0.2           # mm
    angles = { first = 0.0, step = 0.5 }
    projections = "scan_*.tif"
    flats = "flat_*.tif"
    darks = "dark_*.tif"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats import dxchange, nxtomo
from napari_recon.scans.formats.sidecars import load_sidecar
from napari_recon.scans.formats.tiff_files import natural, tiff_frames
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.recording import Frames, Recording

SUFFIXES = (".tif", ".tiff")


class AngleRange(BaseModel):
    """Evenly spaced angles in degrees: first with step, or first, last (included) and count."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    first: float = 0.0
    last: float | None = None
    step: float | None = None
    count: int | None = Field(None, ge=1)


class Sidecar(BaseModel):
    """The fields of a scan.toml. Lengths in mm, angles in degrees."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cone", "fan", "parallel"] = Field(description='"cone", "fan" or "parallel"')
    name: str | None = Field(None, description="a name for people")
    folder: str = Field(".", description="the frames' folder, relative to this file")
    projections: str | None = Field(
        None, description="a file name pattern such as 'raw_*.tif', one multi-page TIFF, or an HDF5 file"
    )
    flats: str | None = Field(None, description="a file name pattern such as 'flat_*.tif'")
    darks: str | None = Field(None, description="a file name pattern such as 'dark_*.tif'")
    angles: list[float] | str | AngleRange | None = Field(
        None,
        description="a list of degrees, the name of a text file, { first, step }, or { first, last, count } with the "
        "last angle included",
    )
    rotation: Literal["clockwise", "counter-clockwise"] = Field(
        "counter-clockwise",
        description='"clockwise" or "counter-clockwise": how the source turns around the object as the angles grow, '
        "seen from above (opposite to the way in which a turntable turns)",
    )
    row_order: Literal["top-down", "bottom-up"] = Field(
        "top-down", description='"top-down" where a frame\'s first row is its top, or "bottom-up"'
    )
    detector_pixel: float | tuple[float, float] | None = Field(
        None, description="the detector's pitch in mm, one number or [row pitch, column pitch]"
    )
    source_object: float | None = Field(None, gt=0, description="the distance from source to rotation axis in mm")
    source_detector: float | None = Field(None, gt=0, description="the distance from source to detector in mm")
    axis_offset: float | None = Field(
        None, allow_inf_nan=False, description="pixels from the detector's centre to the right, where the axis is seen"
    )
    axis_column: float | None = Field(
        None, allow_inf_nan=False, description="the column in which the axis is seen, counted from 0"
    )
    air_normalisation: bool = Field(False, description="true or false")
    already_flat: bool = Field(False, description="true where the frames are transmissions, flat-fielded already")
    already_log: bool = Field(False, description="true where the frames are line integrals already")
    voxel_size: float | None = Field(None, gt=0, description="the volume's voxel size in mm")


def recognises(path: Path) -> bool:
    """Whether this is a .toml file (but not of k-space), or a folder with a scan.toml."""
    file = path if path.is_file() else path / "scan.toml"
    return file.is_file() and file.suffix.lower() == ".toml" and described_samples(file) is None


def described_samples(path: Path) -> Path | None:
    """The k-space of the same name that a .toml or .hdr stands beside, if any."""
    suffixes = (".cfl",) if path.suffix.lower() == ".hdr" else (".npy", ".cfl")
    return next((p for p in map(path.with_suffix, suffixes) if p.is_file()), None)


def read(path: Path) -> Recording:
    """Read the sidecar and find the frames.

    Raises
    ------
    ScanError
        If a field is wrong or missing, frames are missing, or angles and frames do not match.
    """
    file = path / "scan.toml" if path.is_dir() else path
    sidecar = load_sidecar(file, Sidecar)
    folder = (file.parent / sidecar.folder).resolve()
    if not folder.is_dir():
        raise ScanError(f"{file}: the folder {folder} does not exist; correct the field 'folder'.")

    values: Literal["counts", "transmission", "line integrals"] = "counts"
    values = "line integrals" if sidecar.already_log else "transmission" if sidecar.already_flat else "counts"
    found = _hdf5(file, sidecar, folder) if _is_hdf5(sidecar.projections) else _tiffs(file, sidecar, folder)
    frames, flats, darks, recorded = found
    if flats is None and values == "counts":
        raise ScanError(
            f"{file}: there are no flats (frames without object), which -log needs; name them in 'flats', or say "
            "already_flat or already_log = true if that was done before."
        )
    angles = _angles(file, sidecar, folder, len(frames), recorded)
    geometry, notes = _geometry(file, sidecar, angles, frames.shape[1:])
    grid = geometry.default_grid(voxel_size=sidecar.voxel_size) if sidecar.voxel_size else None
    return Recording(
        format="TIFF stack" if not _is_hdf5(sidecar.projections) else "HDF5 with scan.toml",
        name=sidecar.name or (file.parent.name if file.name == "scan.toml" else file.stem),
        frames=frames,
        geometry=geometry,
        flats=flats if values == "counts" else None,
        darks=darks if values == "counts" else None,
        values=values,
        air_normalisation=sidecar.air_normalisation,
        grid=grid,
        notes={"sidecar": str(file), **notes},
    )


def _is_hdf5(name: str | None) -> bool:
    return name is not None and Path(name).suffix.lower() in dxchange.SUFFIXES


_Found = tuple[Frames, Frames | None, Frames | None, NDArray[np.float64] | None]


def _hdf5(file: Path, sidecar: Sidecar, folder: Path) -> _Found:
    path = folder / str(sidecar.projections)
    if not path.is_file():
        raise ScanError(f"{file}: the file {path} does not exist; correct the field 'projections'.")
    for reader in (nxtomo, dxchange):
        if reader.recognises(path):
            return reader.contents(path)
    raise ScanError(f"{path} is neither DXchange nor NXtomo: convert it to one of them.")


def _tiffs(file: Path, sidecar: Sidecar, folder: Path) -> _Found:
    def matching(field: str, pattern: str) -> list[Path]:
        found = sorted((p for p in folder.glob(pattern) if p.is_file()), key=natural)
        if not found:
            raise ScanError(f"{file}: no file in {folder} matches {field} = {pattern!r}; correct the pattern.")
        return found

    flats = matching("flats", sidecar.flats) if sidecar.flats else []
    darks = matching("darks", sidecar.darks) if sidecar.darks else []
    if sidecar.projections:
        images = matching("projections", sidecar.projections)
    else:
        others = {*flats, *darks}
        images = sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p not in others), key=natural)
        if not images:
            raise ScanError(f"{file}: {folder} holds no TIFF files; name the frames in 'projections'.")
    return tiff_frames(images), tiff_frames(flats) if flats else None, tiff_frames(darks) if darks else None, None


def _angles(
    file: Path, sidecar: Sidecar, folder: Path, frames: int, recorded: NDArray[np.float64] | None
) -> NDArray[Any]:
    given = sidecar.angles
    if given is None:
        if recorded is None:
            raise ScanError(f"{file}: the field 'angles' is missing; add {Sidecar.model_fields['angles'].description}.")
        return recorded
    if isinstance(given, AngleRange):
        return _range(file, given, frames)
    origin = "angles"
    if isinstance(given, str):
        where = next((p for p in (folder / given, file.parent / given) if p.is_file()), None)
        if where is None:
            raise ScanError(f"{file}: the angles' file {folder / given} does not exist; correct the field 'angles'.")
        try:
            given = list(np.loadtxt(where, ndmin=1).ravel())
        except ValueError:
            raise ScanError(f"{where} is not a list of numbers; write one angle in degrees a line.") from None
        origin = str(where)
    angles = np.asarray(given, dtype=np.float64)
    if not np.isfinite(angles).all():
        raise ScanError(f"{file}: {origin} holds NaN or infinity; write one angle in degrees for each projection.")
    if len(angles) != frames:
        raise ScanError(
            f"{file}: {origin} gives {len(angles)} angles for {frames} projections; give one for each projection and "
            "none for flats and darks, or write angles = { first = ..., step = ... }."
        )
    return angles


def _range(file: Path, given: AngleRange, frames: int) -> NDArray[Any]:
    if given.count is not None and given.count != frames:
        raise ScanError(
            f"{file}: angles has count = {given.count} but there are {frames} projections; make them agree."
        )
    if (given.step is None) == (given.last is None):
        raise ScanError(
            f"{file}: angles needs either step, or last (included); it has {'both' if given.step else 'neither'}."
        )
    if given.step is not None:
        return given.first + given.step * np.arange(frames)
    assert given.last is not None
    return given.first + (given.last - given.first) / max(1, frames - 1) * np.arange(frames)


def _geometry(
    file: Path, sidecar: Sidecar, angles: NDArray[np.float64], detector: tuple[int, ...]
) -> tuple[Geometry, dict[str, str]]:
    rows, columns = detector
    notes: dict[str, str] = {}
    pixel: Any = sidecar.detector_pixel
    if pixel is None:
        if sidecar.kind != "parallel":
            raise ScanError(f"{file}: the field 'detector_pixel' is missing; a {sidecar.kind} beam needs it, in mm.")
        pixel = 1.0
        notes["pixel size"] = "not recorded; taken as 1 mm, so attenuation is per pixel"
    if sidecar.axis_offset is not None and sidecar.axis_column is not None:
        raise ScanError(f"{file}: axis_offset and axis_column say the same thing twice; keep one of them.")
    offset = sidecar.axis_offset or 0.0
    if sidecar.axis_column is not None:
        offset = sidecar.axis_column - (columns - 1) / 2
    if sidecar.rotation == "clockwise":
        angles = -angles
    if sidecar.kind == "fan" and rows != 1:
        raise ScanError(f'{file}: kind = "fan" needs frames of one row and these have {rows}; write kind = "cone".')
    try:
        if sidecar.kind == "parallel":
            geometry = Geometry.parallel(angles, (rows, columns), pixel, offset)
        elif sidecar.source_object is None or sidecar.source_detector is None:
            lacking = "source_object" if sidecar.source_object is None else "source_detector"
            raise ScanError(f"the field {lacking!r} is missing; a {sidecar.kind} beam needs it, in mm.")
        else:
            geometry = Geometry.cone(
                angles, (rows, columns), pixel, sidecar.source_object, sidecar.source_detector, offset
            )
    except ScanError as error:
        raise ScanError(f"{file}: {error}") from None
    return (top_down(geometry) if sidecar.row_order == "top-down" else geometry), notes


def top_down(geometry: Geometry) -> Geometry:
    """The same detector with its rows counted from the top: v points down."""
    vectors = geometry.vectors.copy()
    vectors[:, 9:12] *= -1
    return Geometry(vectors, geometry.detector_shape, geometry.kind)
