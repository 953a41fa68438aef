"""K-space in a ``.npy``, described by a sidecar of the same name that ends in ``.toml``. A small one::

    axes = ["coil", "y", "x"]        # of coil, slice or z, y, x
    voxel_size = [5.0, 1.0, 1.0]     # mm; z, y, x
    oversampling = 2                 # along the readout, x

The sidecar may also stand beside a BART ``.cfl``, whose axes are known.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.sidecars import load_sidecar
from napari_recon.scans.recording import KSpaceRecording

AXES = ("coil", "slice", "z", "y", "x")


class KSpaceSidecar(BaseModel):
    """The fields of a sidecar of k-space. Lengths in mm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: tuple[Literal["coil", "slice", "z", "y", "x"], ...] | None = Field(
        None,
        description='the order of the array\'s axes, such as ["coil", "z", "y", "x"]; "slice" instead of "z" for '
        "slices measured one by one",
    )
    name: str | None = Field(None, description="a name for people")
    voxel_size: float | tuple[float, float, float] | None = Field(
        None, description="the image's voxel size in mm, one number or [z, y, x]"
    )
    readout: Literal["z", "y", "x"] = Field("x", description='the axis that is read out in one go: "z", "y" or "x"')
    oversampling: float = Field(
        1.0, ge=1, allow_inf_nan=False, description="1 or more: how many times finer than needed the readout is sampled"
    )
    mask: str | None = Field(None, description="a file with the sampled sites, axes as the k-space without coil")
    noise: str | None = Field(None, description="a file with noise samples, coils first")
    coil_maps: str | None = Field(None, description="a file with coil sensitivity maps, axes as the k-space")
    truth: str | None = Field(None, description="a file with the true volume")


def recognises(path: Path) -> bool:
    """Whether this is a .npy file with a sidecar."""
    return path.is_file() and path.suffix.lower() == ".npy" and path.with_suffix(".toml").is_file()


def undescribed(path: Path) -> str:
    """What to write beside a .npy that has no sidecar."""
    ndim = _load(path).ndim
    guess = {2: ("y", "x"), 3: ("coil", "y", "x"), 4: ("coil", "z", "y", "x"), 5: AXES}.get(ndim, ("coil", "y", "x"))
    axes = ", ".join(f'"{a}"' for a in guess)
    return (
        f"{path} is an array and does not say what its axes are: if it is k-space, write a {path.stem}.toml beside it "
        f"with the lines axes = [{axes}] (their order, of coil, slice or z, y, x) and voxel_size = [5.0, 1.0, 1.0] "
        "(mm; z, y, x)."
    )


def read(path: Path) -> KSpaceRecording:
    """Read the sidecar and the array's header.

    Raises
    ------
    ScanError
        If a field is wrong or missing, a file is missing, or the array is not k-space.
    """
    file = path.with_suffix(".toml")
    sidecar = load_sidecar(file, KSpaceSidecar)
    if sidecar.axes is None:
        raise ScanError(f"{file}: the field 'axes' is missing; add axes = {_description('axes')}.")
    axes = sidecar.axes
    array = _load(path)
    if array.dtype.kind != "c":
        raise ScanError(f"{path} holds {array.dtype} values; k-space is complex: save it as complex64.")
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) or {"slice", "z"} <= set(axes):
        raise ScanError(f"{file}: axes = {list(axes)} will not do; it must be {_description('axes')}.")
    if len(axes) != array.ndim:
        raise ScanError(
            f"{file}: axes names {len(axes)} axes and {path.name} has {array.ndim}, of the lengths "
            f"{' x '.join(map(str, array.shape))}: name each of them."
        )
    shape = arranged(array, axes).shape
    return described(sidecar, file, path, ".npy", shape, partial(_read, path, axes), "slice" in axes, {}, axes)


def described(
    sidecar: KSpaceSidecar,
    file: Path,
    path: Path,
    format: str,
    shape: tuple[int, ...],
    read: Any,
    slices: bool,
    notes: dict[str, str],
    axes: tuple[str, ...],
) -> KSpaceRecording:
    """A recording with what the sidecar ``file`` says; ``axes`` are those of .npy files beside the k-space."""

    def beside(field: str) -> Path | None:
        name = getattr(sidecar, field)
        if name is not None and not (file.parent / name).exists():
            raise ScanError(f"{file}: the file {file.parent / name} does not exist; correct the field {field!r}.")
        return None if name is None else file.parent / name

    mask, noise, maps = beside("mask"), beside("noise"), beside("coil_maps")
    size = sidecar.voxel_size
    readout = ("z", "y", "x").index(sidecar.readout)
    return KSpaceRecording(
        format=format,
        name=sidecar.name or path.stem,
        source=path,
        shape=shape,  # type: ignore[arg-type]
        read=read,
        voxel_size=(size,) * 3 if isinstance(size, float) else size,
        slices=slices,
        readout=readout,
        kept=None if sidecar.oversampling == 1 else max(1, round(shape[1 + readout] / sidecar.oversampling)),
        read_mask=partial(_read_mask, mask, axes) if mask else None,
        read_noise=partial(_read_noise, noise) if noise else None,
        read_coil_maps=partial(_read, maps, axes) if maps else None,
        truth=beside("truth"),
        notes={"sidecar": str(file), **notes} if file.is_file() else notes,
    )


def arranged(array: NDArray[Any], axes: tuple[str, ...]) -> NDArray[Any]:
    """The array as (coils, D, H, W), its axes being named; a missing one has the length one."""
    present = [name for name in AXES if name in axes]
    array = array.transpose([axes.index(name) for name in present])
    if "coil" not in axes:
        array = array[None]
    return array if {"slice", "z"} & set(axes) else array[:, None]


def _description(field: str) -> str:
    return str(KSpaceSidecar.model_fields[field].description)


def _load(path: Path) -> NDArray[Any]:
    """A .npy mapped into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ScanError(
            f"{path} cannot be read as a .npy array ({str(error).splitlines()[0].rstrip('.')}): it is damaged or "
            "truncated, or holds Python objects; save it again."
        ) from None
    if not isinstance(array, np.ndarray):
        raise ScanError(f"{path} is an archive of arrays (.npz): save the k-space alone as a .npy.")
    return array


def _read(path: Path, axes: tuple[str, ...]) -> NDArray[Any]:
    if path.suffix.lower() == ".npy":
        array = _load(path)
        if array.ndim != len(axes):
            raise ScanError(f"{path} has {array.ndim} axes and needs {len(axes)}: {', '.join(axes)}.")
        return arranged(array, axes)
    if path.suffix.lower() == ".cfl":
        from napari_recon.scans.formats import bart

        return bart.samples(path)
    raise ScanError(f"{path} must be a .npy or .cfl file.")


def _read_mask(path: Path, axes: tuple[str, ...]) -> NDArray[np.bool_]:
    return _read(path, tuple(a for a in axes if a != "coil"))[0] != 0


def _read_noise(path: Path) -> NDArray[Any]:
    noise = _load(path) if path.suffix.lower() == ".npy" else _read(path, ())
    return noise.reshape(len(noise), -1) if noise.ndim > 1 else noise[None]
