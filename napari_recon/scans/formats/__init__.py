"""A reader for each format. Each has ``recognises(path) -> bool`` and ``read(path) -> Recording | KSpaceRecording``."""

from __future__ import annotations

from pathlib import Path

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats import (
    bart,
    dxchange,
    fastmri,
    helsinki,
    ismrmrd_files,
    npy,
    nxtomo,
    tiff_stack,
    walnut,
)
from napari_recon.scans.recording import KSpaceRecording, Recording

READERS = (walnut, tiff_stack, nxtomo, fastmri, ismrmrd_files, dxchange, helsinki, npy, bart)

UNDERSTOOD = (
    "a Walnut folder (scan_geom_*.geom with scan_*.tif), a folder of TIFFs with scan.toml, DXchange or NXtomo HDF5 "
    "(.h5, .hdf5, .nxs), Helsinki challenge .mat files; and k-space as fastMRI or ISMRMRD HDF5, BART .cfl, or .npy "
    "with a .toml beside it"
)


def read(path: Path) -> Recording | KSpaceRecording:
    """Read whatever ``path`` is, without its frames.

    Raises
    ------
    ScanError
        If it is missing, not understood, or wrong in itself.
    """
    if not path.exists():
        raise ScanError(f"{path} does not exist: check the path.")
    if path.suffix.lower() in (".toml", ".hdr") and (samples := tiff_stack.described_samples(path)) is not None:
        return read(samples)
    if (reader := _reader(path)) is not None:
        return reader.read(path)
    if path.is_file() and path.suffix.lower() == ".npy":
        raise ScanError(npy.undescribed(path))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if not files:
            raise ScanError(f"{path} is an empty folder: choose the folder that holds the projections.")
        scans = [p for p in files if _reader(p) is not None]
        if len(scans) == 1:
            return read(scans[0])
        tiffs = any(p.suffix.lower() in tiff_stack.SUFFIXES for p in files)
        if scans:
            names = ", ".join(p.name for p in scans[:6])
            also = ", or describe its TIFFs in a scan.toml" if tiffs else ""
            raise ScanError(f"{path} holds several scans ({names}): open one of them{also}.")
        if tiffs:
            raise ScanError(
                f"{path} holds TIFF files but no scan.toml, and TIFFs alone do not say angles and distances: add a "
                "scan.toml with kind, angles, flats, darks and detector_pixel."
            )
    raise ScanError(f"{path} is not a scan of a known format; understood are {UNDERSTOOD}.")


def _reader(path: Path):  # type: ignore[no-untyped-def]
    return next((reader for reader in READERS if reader.recognises(path)), None)
