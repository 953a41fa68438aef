"""What a weights file says of itself, which weights there are, and whether they suit a scan. No torch here.

The network itself is made by :func:`napari_recon.learning.networks.load_weights`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

FORMAT = "napari-recon weights 1"

_APART = 1.5
"""By what factor views a voxel, and voxels a pixel, may differ from the training's."""
_BEYOND = 1.05
"""By what factor a volume may be larger than what every view sees: its corners and edges are."""


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says of itself.

    Attributes
    ----------
    path
        The file.
    model
        The method and its network, as needed to make them again: ``method``, ``network``, ``iterations``, ...
    card
        The model card: what it was trained on, for how long, how good it is.
    training
        The configuration that it was trained by, as plain values.
    figures
        Numbers by name, such as the validation's.
    """

    path: Path
    model: dict[str, Any]
    card: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of the file, as hexadecimal digits."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_weights() -> dict[str, Path]:
    """The weights that come with the package, by name."""
    folder = Path(str(importlib.resources.files("napari_recon"))) / "weights"
    return {file.stem: file for file in sorted(folder.glob("*.safetensors"))}


def find_weights(name_or_path: str | Path) -> Path:
    """The file of weights that are given by the name of shipped ones, or by their path.

    Raises
    ------
    ScanError
        If there are none; the sentence lists those that ship.
    """
    shipped = shipped_weights()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if shipped:
        problem, remedy = "", f"give the name of some that ship ({', '.join(shipped)}), or"
    else:
        problem, remedy = " (no weights ship with this version)", "give"
    raise ScanError(
        f"There are no weights {str(name_or_path)!r}{problem}: {remedy} the path of a .safetensors file that "
        "'napari-recon train' made."
    )


def read_header(path: str | Path) -> WeightsHeader:
    """Read what a weights file says of itself, and none of its tensors.

    Raises
    ------
    ScanError
        If the file does not exist, is damaged, or is none of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ScanError(f"The weights {path} do not exist; check the path, or train some.") from None
    except (SafetensorError, OSError) as error:
        raise ScanError(f"The weights {path} cannot be read ({error}); get the file again.") from None
    kept = metadata.get("format", "")
    if not kept.startswith(FORMAT[:-1]):
        raise ScanError(
            f"{path} is a safetensors file, but not weights of a reconstruction network; use 'napari-recon train' to "
            "make some."
        )
    if kept != FORMAT:
        raise ScanError(
            f"The weights {path} were written by napari-recon {metadata.get('version', 'of another version')}, whose "
            "form this version does not read; train again, or use that version."
        )
    try:
        model, training, figures = (json.loads(metadata[name]) for name in ("model", "training", "figures"))
        return WeightsHeader(Path(path), model | {"method": model["method"]}, metadata["card"], training, figures)
    except (KeyError, ValueError, TypeError):
        raise ScanError(f"The weights {path} do not say what network they are of; get the file again.") from None


def outside_training_of_mri(training: dict[str, Any], acceleration: float, shape: Sequence[int]) -> list[str]:
    """In what respects k-space is unlike that which weights were trained on, and what would be needed.

    Parameters
    ----------
    training
        Of a :class:`WeightsHeader`.
    acceleration
        Sites of k-space over sampled ones.
    shape
        (D, H, W) of the volume.

    Returns
    -------
    A sentence each; none where the scan is like them.
    """
    trained = training.get("data", {}).get("accelerations")
    if not trained:
        return ["The weights do not say what they were trained on, so whether they suit this scan is unknown."]
    found = []
    if not min(trained) / _APART <= acceleration <= max(trained) * _APART:
        than = "less" if acceleration < min(trained) else "more"
        found.append(
            f"An acceleration of {acceleration:.3g} is {than} than the weights were trained on "
            f"({min(trained):g} to {max(trained):g}): train with [data] accelerations = [{acceleration:.2g}], or use "
            "PADMM."
        )
    if shape[0] == 1:
        found.append(
            "The weights were trained on volumes, and this is one slice, which is shown to them as if it were repeated:"
            " compare with PADMM."
        )
    return found


def outside_training(training: dict[str, Any], geometry: Geometry, grid: Grid) -> list[str]:
    """In what respects a scan is unlike those that weights were trained on, and what would be needed.

    The attenuation's unit is none of them: networks scale with their input.

    Parameters
    ----------
    training
        Of a :class:`WeightsHeader`.
    geometry, grid
        Of the reconstruction.

    Returns
    -------
    A sentence each; none where the scan is like them, or where they were measured scans, of whose geometry the file
    does not tell.
    """
    data = training.get("data", {})
    if data.get("scans"):
        return []
    size, views = data.get("size"), data.get("views")
    if not (size and views):
        return ["The weights do not say what they were trained on, so whether they suit this scan is unknown."]
    if geometry.kind != "cone" or geometry.is_fan:
        beam = "fan" if geometry.is_fan else geometry.kind
        return [
            f"The weights were trained on cone beam, and this scan is {beam} beam: train on such scans ([data] scans), "
            "or use TV."
        ]
    found = [_arc(geometry), _sampling(geometry, grid, size, views), _resolution(geometry, grid), _view(geometry, grid)]
    return [sentence for sentence in found if sentence]


def _arc(geometry: Geometry) -> str:
    """Training scans go full circle; the largest gap between two views tells, in whatever order they are."""
    angles = np.sort(geometry.angles % 360)
    gap = float(np.diff(angles, append=angles[0] + 360).max())
    if gap <= 2.5 * 360 / geometry.views:
        return ""
    return (
        f"The weights were trained on full circles, and this scan leaves {gap:.3g}° in one piece without a view: train "
        "on scans like it ([data] scans), or use TV."
    )


def _sampling(geometry: Geometry, grid: Grid, size: int, views: list[int]) -> str:
    """Views for every voxel across the volume: how much of it is measured, whatever its size."""
    across = max(grid.shape[1:])
    here, fewest, most = geometry.views / across, min(views) / size, max(views) / size
    if fewest / _APART <= here <= most * _APART:
        return ""
    than = "fewer" if here < fewest else "more"
    trained = f"{fewest:.2g}" if fewest == most else f"{fewest:.2g} to {most:.2g}"
    return (
        f"{geometry.views} views for {across} voxels across ({here:.2g} a voxel) are {than} "
        f"than the weights were trained on ({trained}): train with [data] views = [{max(1, round(here * size))}] at "
        f"size = {size}, or use TV."
    )


def _resolution(geometry: Geometry, grid: Grid) -> str:
    """A voxel of the training is what a pixel sees at the axis."""
    pixel = geometry.pixel_size[1] / geometry.magnification
    ratio = grid.voxel_size / pixel
    if 1 / _APART <= ratio <= _APART:
        return ""
    if ratio > 1:
        remedy = f"bin the detector {round(ratio)} × {round(ratio)}, or choose a voxel size of {pixel:.3g} mm"
    else:
        remedy = f"choose a voxel size of {pixel:.3g} mm"
    return (
        f"The voxels are {grid.voxel_size:.3g} mm and the detector resolves {pixel:.3g} mm at the axis, which were "
        f"equal when the weights were trained: {remedy}."
    )


def _view(geometry: Geometry, grid: Grid) -> str:
    """Every view of the training sees the cylinder in the volume; what lies beyond a view is truncated."""
    rows, columns = geometry.detector_shape
    pitch_v, pitch_u = geometry.pixel_size
    half = max(0.0, columns / 2 - abs(float(np.mean(geometry.axis_offset)))) * pitch_u
    fan = math.atan(half / float(np.mean(geometry.source_detector)))
    width = 2 * float(np.mean(geometry.source_object)) * math.sin(fan)
    height = rows * pitch_v / geometry.magnification
    tall, *wide = grid.extent
    if max(wide) <= _BEYOND * width and tall <= _BEYOND * height:
        return ""
    return (
        f"The volume is {tall:.3g} × {max(wide):.3g} mm (height × width), of which every view sees {height:.3g} × "
        f"{width:.3g} mm, and the weights were trained on volumes that all views see: choose a smaller shape, or use "
        "TV where the object is larger than the view."
    )
