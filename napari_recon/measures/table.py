"""All measures of several volumes as a table, and the table as CSV and as a figure.

A row is a volume in a region. A volume is judged against the reference by PSNR, SSIM and normalised error; in regions
that are meant to be uniform it is also told its noise, cupping, and contrast to a background. What could not be had,
such as the spectrum of noise in a region of few voxels, is left out of its row.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_recon.measures.comparison import Region, Similarity, as_mask, compare_in_regions, reference_range
from napari_recon.measures.local import contrast_to_noise, cupping, moments
from napari_recon.measures.resolution import ShellCorrelation, noise_summary
from napari_recon.scans.errors import ScanError

Row = dict[str, Any]
"""``volume`` and ``region`` by name, and measures by the keys of :data:`COLUMNS`."""

COLUMNS = {
    "volume": "Volume",
    "region": "Region",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM (mean of slices)",
    "ssim_3d": "SSIM (3D)",
    "nrmse": "NRMSE",
    "data_range": "Data range",
    "residual": "Residual",
    "residual_to_noise": "Residual to noise",
    "mean": "Mean",
    "std": "Standard deviation",
    "contrast_to_noise": "CNR",
    "noise": "Noise",
    "noise_frequency": "Noise frequency (1/mm)",
    "cupping": "Cupping",
}
"""Headings by key, in the order that tables show them."""

_BETTER = {"psnr": "higher", "ssim": "higher", "ssim_3d": "higher", "nrmse": "lower", "contrast_to_noise": "higher"}
"""What is better, where that can be said of a measure by itself."""


def table(
    volumes: Mapping[str, NDArray[np.float32]],
    reference: str | None,
    regions: Sequence[Region] = (),
    data_range: float | None = None,
    *,
    ssim: Sequence[Similarity] = ("2d",),
    voxel_size: float | Sequence[float] | None = None,
    background: str | None = None,
) -> list[Row]:
    """Measure volumes in regions.

    Parameters
    ----------
    volumes
        By name, each (D, H, W), on one grid and of one unit.
    reference
        Which of them the others are compared with; None compares none.
    regions
        Where; none takes all voxels.
    data_range
        What PSNR and SSIM take as the range of values; None takes the reference's, inside the first region.
    ssim
        Which are told, "2d", "3d" or both.
    voxel_size
        mm, or the edges (z, y, x); None leaves the noise out.
    background
        The region that the contrast of the other uniform ones is told against; None leaves it out.

    Returns
    -------
    Rows in the order of the volumes, region by region. The reference's own have no PSNR, SSIM and error.

    Raises
    ------
    ScanError
        If a name is none of a volume or region, shapes differ, a region is empty, or the reference is constant.
    """
    if reference is not None and reference not in volumes:
        raise ScanError(f"There is no volume {reference!r} to compare with: choose one of {', '.join(volumes)}.")
    shapes = {name: volume.shape for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1:
        raise ScanError(f"Volumes of {', '.join(map(str, shapes.values()))} voxels are not on one grid: resample them.")
    chosen = list(regions)
    behind = next((region for region in chosen if region.name == background), None)
    if background is not None and behind is None:
        raise ScanError(f"There is no region {background!r}: choose one of {', '.join(r.name for r in chosen)}.")
    if not chosen and volumes:
        height, width = next(iter(shapes.values()))[1:]
        chosen = [Region("whole volume", np.ones((1, height, width), bool), uniform=False)]
    masks: list[NDArray[np.bool_] | None] = [region.mask for region in chosen] if regions else [None]
    if reference is not None and data_range is None:  # once, though there are several volumes
        data_range = reference_range(volumes[reference], masks[0])
    rows: list[Row] = []
    for name, volume in volumes.items():
        compared: Sequence[Mapping[str, float]] = [{} for _ in chosen]
        if reference is not None and name != reference:
            compared = compare_in_regions(volume, volumes[reference], masks, data_range, ssim)
        for region, figures in zip(chosen, compared, strict=True):
            mean, variance = moments(volume, region.mask)
            row: Row = {"volume": name, "region": region.name, **figures, "mean": mean, "std": math.sqrt(variance)}
            if region.uniform:
                row |= _of_uniform(volume, region, behind, voxel_size)
            rows.append({key: row[key] for key in COLUMNS if key in row})
    return rows


def _of_uniform(
    volume: NDArray[np.float32],
    region: Region,
    background: Region | None,
    voxel_size: float | Sequence[float] | None,
) -> Row:
    """What is told of a region that is meant to be uniform."""
    told: Row = {}
    if background is not None and region.name != background.name:
        told["contrast_to_noise"] = contrast_to_noise(volume, region.mask, background.mask)
    if voxel_size is not None:
        with contextlib.suppress(ScanError):  # no square fits into the region
            told["noise"], told["noise_frequency"] = noise_summary(volume, voxel_size, region.mask)
    depth = cupping(volume, as_mask(region.mask, volume.shape))
    return told | ({} if math.isnan(depth) else {"cupping": depth})


def columns(rows: Sequence[Row]) -> list[str]:
    """The keys that at least one of the rows has, in the order of :data:`COLUMNS`, others behind."""
    found = {key for row in rows for key in row}
    return [key for key in COLUMNS if key in found] + sorted(found - set(COLUMNS))


def check_path(path: str | Path, ending: Literal[".csv", ".png"]) -> Path:
    """The path, if a table or figure can be written there; to be asked before anything is computed.

    Raises
    ------
    ScanError
        If it does not end so, or its folder is missing or read-only.
    """
    path = Path(path)
    folder = path.absolute().parent
    if path.suffix.lower() != ending:
        raise ScanError(f"The file {path} must end in {ending}: choose another name.")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ScanError(f"The file {path} cannot be written: choose a folder that exists and is yours to write in.")
    return path


def write_csv(path: str | Path, rows: Sequence[Row]) -> Path:
    """Write rows as CSV: a line of keys, then a line a row, numbers in full; what a row lacks is empty.

    Raises
    ------
    ScanError
        If the file cannot be written there.
    """
    path = check_path(path, ".csv")

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns(rows))
            writer.writeheader()
            writer.writerows(rows)

    return _take_name(path, write)


def write_figure(path: str | Path, rows: Sequence[Row], title: str = "") -> Path:
    """Write rows as a PNG: a panel a measure with a bar a volume and region, and the numbers beside them.

    Parameters
    ----------
    path
        A .png; replaced if it exists, whole or not at all.
    rows
        Of :func:`table`.
    title
        Over all panels.

    Raises
    ------
    ScanError
        If there is nothing to show, or the figure cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_path(path, ".png")
    shown = [key for key in columns(rows) if key in COLUMNS and key not in ("volume", "region", "data_range")]
    # Mean and deviation say nothing of quality where anything else does.
    shown = [key for key in shown if key not in ("mean", "std")] or shown
    if not shown:
        raise ScanError("There is no measure to draw: compare at least one volume.")
    told = [row for row in rows if any(key in row for key in shown)]  # a reference may have nothing of its own
    names = list(dict.fromkeys(row["volume"] for row in told))
    places = list(dict.fromkeys(row["region"] for row in told))
    across = len(shown) if len(shown) <= 4 else 3
    down = math.ceil(len(shown) / across)
    height = 0.9 + 0.26 * (len(names) * len(places) + 1)
    figure = Figure(figsize=(4.2 * across, max(1.8, height) * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, parse_math=False)
    panels = figure.subplots(down, across, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(shown):
            axes.set_axis_off()
            continue
        _draw(axes, rows, shown[number], names, places)
        if number % across:  # the names stand once a row of panels
            axes.set_yticklabels([])
    data_range = {row["data_range"] for row in rows if "data_range" in row}
    said = [f"data range {value:.4g}" for value in sorted(data_range)]
    said += [f"region: {places[0]}"] if len(places) == 1 else []
    if said:
        figure.supxlabel(", ".join(said), fontsize="small", parse_math=False)
    if len(places) > 1:
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower right", fontsize="small")
    return _take_name(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def write_correlation(path: str | Path, correlation: ShellCorrelation, title: str = "") -> Path:
    """Write a Fourier shell correlation as a PNG: the curve, its thresholds, and where it falls below them.

    Raises
    ------
    ScanError
        If the figure cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_path(path, ".png")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(correlation.frequency, correlation.correlation, color="C0", label="correlation")
    for name, threshold, resolution in (
        ("half-bit", correlation.half_bit, correlation.resolution_half_bit),
        ("1/7", correlation.one_seventh, correlation.resolution_one_seventh),
    ):
        found = f"{name}: {resolution:.3g} mm" if math.isfinite(resolution) else f"{name}: not crossed"
        color = "C1" if name == "half-bit" else "C2"
        axes.plot(correlation.frequency, threshold, color=color, linestyle="--", label=found)
        if math.isfinite(resolution):
            axes.axvline(1 / resolution, color=color, linewidth=0.8)
    axes.set_xlim(0, float(correlation.frequency[-1]))
    axes.set_ylim(min(-0.05, float(correlation.correlation.min())), 1.05)
    axes.set_xlabel("spatial frequency (1/mm)")
    axes.set_ylabel("Fourier shell correlation")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _take_name(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def _draw(axes: Any, rows: Sequence[Row], key: str, names: Sequence[str], places: Sequence[str]) -> None:
    """A panel: bars side by side for the regions, beneath each other for the volumes, the best one's number bold."""
    better = _BETTER.get(key)
    label = COLUMNS.get(key, key) + (f", {better} is better" if better else "")
    values = {(row["volume"], row["region"]): row[key] for row in rows if key in row}
    thick = 0.8 / len(places)
    for number, place in enumerate(places):
        told = {name: values[name, place] for name in names if (name, place) in values}
        finite = [value for value in told.values() if math.isfinite(value)]
        best = None if better is None or len(finite) < 2 else (max if better == "higher" else min)(finite)
        heights = [at + (number - (len(places) - 1) / 2) * thick for at, name in enumerate(names) if name in told]
        drawn = [value if math.isfinite(value) else 0.0 for value in told.values()]
        bars = axes.barh(heights, drawn, thick * 0.9, label=place, color=f"C{number}")
        numbers = axes.bar_label(bars, [f"{value:.4g}" for value in told.values()], padding=3, fontsize="small")
        for text, value in zip(numbers, told.values(), strict=True):
            text.set_fontweight("bold" if value == best else "normal")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.2)
    axes.set_title(label, fontsize="medium", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def _take_name(path: Path, write: Any) -> Path:
    """Write under a temporary name, which then becomes ``path``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise ScanError(
            f"Could not write {path} ({error.strerror or error}): free some space or choose another."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path
