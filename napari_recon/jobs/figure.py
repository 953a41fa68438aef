"""The normal operator as a figure for a paper: x, AᵀA x, H x, λ, m and the squared error, side by side.

No torch and no pyplot here: the docks draw it too, from the volumes that they show.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from napari_recon.jobs.volumes import replacing
from napari_recon.scans.errors import ScanError

_PANELS = {
    "x": "x",
    "exact": "AᵀA x",
    "approximate": "H x",
    "filter": "|λ| / max |λ|",
    "mask": "m",
    "error": "squared error",
}


def check_figure(path: str | Path) -> Path:
    """The path, if a figure can be written there.

    Raises
    ------
    ScanError
        If it does not end in .png, or its folder is missing or read-only.
    """
    path = Path(path)
    folder = path.absolute().parent
    if path.suffix.lower() != ".png":
        raise ScanError(f"The figure {path} must end in .png: choose another name.")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ScanError(f"The figure {path} cannot be written: choose a folder that exists and is yours to write in.")
    return path


def operator_figure(
    volumes: Mapping[str, NDArray],
    voxel_size: float,
    figures: Mapping[str, float],
    path: Path,
    title: str = "",
) -> None:
    """Write the normal operator's figure as a PNG: the middle axial slices of what an OperatorJob shows.

    Parameters
    ----------
    volumes
        "x", "exact", "approximate", "filter" (log₁₀), "mask" and "error", each (D, H, W); the panel of one that is not
        there stays empty.
    voxel_size
        mm.
    figures
        Of the job; ``relative_error`` stands over the squared error.
    path
        A .png; replaced if it exists, whole or not at all.
    title
        Over all panels: the scan's name, say.

    Raises
    ------
    ScanError
        If the figure cannot be written there.
    """
    path = check_figure(path)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, parse_math=False)
    both = [volumes[name][len(volumes[name]) // 2] for name in ("exact", "approximate") if name in volumes]
    limits = {"vmin": min(map(np.min, both)), "vmax": max(map(np.max, both))} if both else {}
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        if name not in volumes:
            axes.set_axis_off()
            continue
        image = volumes[name][len(volumes[name]) // 2]
        shown: dict[str, Any] = {"cmap": "gray"}
        if name == "filter":
            image, shown = 10.0**image, {"cmap": "viridis", "norm": LogNorm(1e-4, 1)}
        elif name in ("mask", "error"):
            shown = {"cmap": "viridis" if name == "mask" else "magma"}
        elif name != "x":
            shown |= limits
        drawn = axes.imshow(image, extent=_extent(image.shape, voxel_size, name == "filter"), **shown)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
        if name == "filter":  # without TeX-like powers of ten, which are slow to typeset
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if name == "error" and "relative_error" in figures:
            label += f", relative {figures['relative_error']:.3g}"
        axes.set_title(label, parse_math=False)
        said = "frequency in {} (1/mm)" if name == "filter" else "{} (mm)"
        axes.set_xlabel(said.format("x"))
        axes.set_ylabel(said.format("y"))
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _extent(shape: tuple[int, ...], voxel_size: float, frequencies: bool) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a slice (H, W): mm about the volume's centre, or 1/mm; y grows downwards."""
    edges = []
    for n in shape:
        step = 1 / (n * voxel_size) if frequencies else voxel_size
        first = -(n // 2 + 0.5) * step if frequencies else -n / 2 * step
        edges.append((first, first + n * step))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top
