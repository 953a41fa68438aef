"""Small scans that come with the package, so that everything can be tried before any data is at hand."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the samples."""
    return sorted(p.name for p in _HERE.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))


def path(name: str = "walnut-like") -> Path:
    """Where a sample lies, for :func:`napari_recon.open_scan`.

    Raises
    ------
    ScanError
        If there is no such sample.
    """
    from napari_recon.scans.errors import ScanError

    if name not in names():
        raise ScanError(f"There is no sample {name!r}; there are {', '.join(names()) or 'none'}.")
    return _HERE / name
