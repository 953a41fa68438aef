"""What the manifest names besides the docks: sample scans, and a reader that shows a scan's projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from napari_recon.scans.errors import ScanError

LayerData = tuple[Any, dict[str, Any], str]

SAMPLES = {"walnut-like": "Walnut-like cone-beam scan (60 views)"}
"""The sample scans in the wheel: name -> title, as in the manifest."""


def sample_path(name: str) -> Path:
    """Where a sample scan lies."""
    from napari_recon import sample_data

    return Path(sample_data.path(name))


def walnut_like() -> list[LayerData]:
    """Projections of the walnut-like sample, for File > Open Sample; the docks take the scan up from the layer."""
    return _projections(sample_path("walnut-like"))


def get_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """A reader for what :func:`napari_recon.open_scan` understands, or None for everything else.

    Opening a scan reads no frames, so it is simply tried: a file that is not a scan is left to other readers.
    """
    if not isinstance(path, str):
        return None
    from napari_recon.scans import open_scan

    try:
        open_scan(path)
    except (ScanError, OSError):
        return None
    return lambda where: _projections(Path(where if isinstance(where, str) else where[0]))


def _projections(path: Path) -> list[LayerData]:
    from napari_recon.scans import open_scan
    from napari_recon.widgets.layers import projections

    array, arguments = projections(open_scan(path))
    return [(array, arguments, "image")]
