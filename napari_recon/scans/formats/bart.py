"""BART's ``.cfl`` with its ``.hdr``: dimensions in the header's second line, complex64 in column-major order.

https://codeberg.org/mrirecon/bart; the dimensions are readout, two phase encodings, coils, maps, ..., slices (13).
Voxel size, noise and the like come from a sidecar of the same name that ends in ``.toml``, where there is one.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats import npy
from napari_recon.scans.formats.sidecars import load_sidecar
from napari_recon.scans.recording import KSpaceRecording

COIL, SLICE = 3, 13
# What the other dimensions count, for people.
_NAMES = {4: "maps", 5: "echo", 6: "coefficient", 10: "time", 11: "time 2", 14: "average", 15: "batch"}


def recognises(path: Path) -> bool:
    """Whether this is a .cfl file."""
    return path.is_file() and path.suffix.lower() == ".cfl"


def read(path: Path) -> KSpaceRecording:
    """Read the header, and the sidecar where there is one.

    Raises
    ------
    ScanError
        If the header is missing or wrong, the samples are truncated, or both slices and slabs are there.
    """
    dims = dimensions(path)
    if dims[2] > 1 and dims[SLICE] > 1:
        raise ScanError(f"{path} holds {dims[SLICE]} slabs of 3D k-space: extract one of them (bart slice 13 0).")
    notes = {
        _NAMES.get(k, f"dimension {k}"): f"first of {n}"
        for k, n in enumerate(dims)
        if n > 1 and k not in (0, 1, 2, COIL, SLICE)
    }
    file = path.with_suffix(".toml")
    sidecar = load_sidecar(file, npy.KSpaceSidecar) if file.is_file() else npy.KSpaceSidecar.model_validate({})
    if sidecar.axes is not None:
        raise ScanError(f"{file}: the axes of a .cfl are known; leave the field 'axes' out.")
    slices = dims[SLICE] > 1
    shape = (dims[COIL], dims[SLICE] if slices else dims[2], dims[1], dims[0])
    axes = ("coil", "slice" if slices else "z", "y", "x")
    return npy.described(sidecar, file, path, "BART", shape, partial(samples, path), slices, notes, axes)


def dimensions(path: Path) -> list[int]:
    """The 16 dimensions of a .cfl, from its header."""
    header = path.with_suffix(".hdr")
    if not header.is_file():
        raise ScanError(f"{path} has no header: put {header.name} beside it.")
    lines = header.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        dims = [int(word) for word in lines[1].split()]
    except (IndexError, ValueError):
        dims = []
    if not dims or min(dims) < 1:
        raise ScanError(f"{header} does not give the dimensions in its second line: write the files again.")
    needed, there = 8 * math.prod(dims), path.stat().st_size
    if there < needed:
        raise ScanError(
            f"{path} has {there} bytes and its header asks for {needed}: it is truncated, so copy it again."
        )
    return dims + [1] * (16 - len(dims))


def samples(path: Path) -> NDArray[Any]:
    """(coils, D, H, W), mapped into memory: z or slices for D; the first of every other dimension."""
    dims = dimensions(path)
    array = np.memmap(path, np.complex64, mode="r", shape=tuple(dims[::-1]))  # column-major is C with the axes reversed
    last = len(dims) - 1
    index = tuple(slice(None) if last - k in (0, 1, 2, COIL, SLICE) else 0 for k in range(len(dims)))
    slices, coils, z, y, x = array[index].shape
    return array[index].transpose(1, 0, 2, 3, 4).reshape(coils, slices * z, y, x)
