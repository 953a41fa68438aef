"""What volumes resolve, and the spectrum of their noise, as plots: of a comparison, and of the halves of the views."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

from napari_recon.jobs.job import ResolutionJob
from napari_recon.jobs.messages import Finished
from napari_recon.measures.comparison import Region
from napari_recon.measures.resolution import (
    AGAINST_REFERENCE,
    ShellCorrelation,
    fourier_shell_correlation,
    noise_power_spectrum,
)
from napari_recon.scans.errors import ScanError
from napari_recon.widgets.compare_plots import SHADES, Line, Plot
from napari_recon.widgets.style import note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_recon.scans.grid import Grid
    from napari_recon.widgets.session import Session

PER_MM = "over 1/mm"


@dataclass(frozen=True)
class Spectra:
    """What a comparison tells of a volume's frequencies.

    Attributes
    ----------
    correlation
        With the other volume; None where there is none.
    noise
        Frequencies in 1/mm and the power at each; None where the region holds no square to measure it in.
    """

    correlation: ShellCorrelation | None
    noise: tuple[NDArray[np.float64], NDArray[np.float64]] | None


def spectra(
    volume: NDArray[np.float32],
    other: NDArray[np.float32] | None,
    grid: Grid,
    view: NDArray[np.bool_],
    region: Region,
    halves: bool = False,
) -> Spectra:
    """A volume's correlation with another one, and the spectrum of its noise; takes a while: call it from a thread.

    Parameters
    ----------
    volume, other
        (D, H, W), on one grid. ``other`` is the reference, or the volume of the other half of the views; or None.
    grid
        Theirs.
    view
        Where they are correlated, (H, W).
    region
        Where the noise is measured. In one that is meant to be uniform all that varies is noise; elsewhere it is the
        difference from the other volume.
    halves
        Whether half that difference is meant: the noise of the mean of two halves.
    """
    correlation = None if other is None else fourier_shell_correlation(volume, other, grid.scale, view)
    noisy = volume
    if other is not None and not region.uniform:
        noisy = (volume - other) / np.float32(2 if halves else 1)
    try:
        noise = noise_power_spectrum(noisy, grid.scale, region.mask)
    except ScanError:  # no square fits into the region
        noise = None
    return Spectra(correlation, noise)


def threshold_lines(correlation: ShellCorrelation) -> list[Line]:
    """The correlation of two halves, its thresholds, and a mark where it falls below each."""
    found = [
        Line("halves of the views", correlation.frequency, correlation.correlation, SHADES[0]),
        *_threshold("half-bit", correlation, correlation.half_bit, correlation.resolution_half_bit, SHADES[1]),
        *_threshold("1/7", correlation, correlation.one_seventh, correlation.resolution_one_seventh, SHADES[2]),
    ]
    return found


def _threshold(
    name: str, correlation: ShellCorrelation, curve: NDArray[np.float64], resolution: float, shade: str
) -> list[Line]:
    lines = [Line(f"{name}: {_reach(correlation, curve, resolution)}", correlation.frequency, curve, shade)]
    if math.isfinite(resolution):
        height = float(np.interp(1 / resolution, correlation.frequency, curve))
        lines.append(Line("", np.full(2, 1 / resolution), np.array([0.0, height]), shade))
    return lines


def _reach(correlation: ShellCorrelation, threshold: NDArray[np.float64] | float, resolution: float) -> str:
    """How far a correlation stays above a threshold, for a legend."""
    if math.isfinite(resolution):
        return f"{resolution:.3g} mm"
    return "above it throughout" if np.any(correlation.correlation >= threshold) else "below it throughout"


class Frequencies(QWidget):
    """Fourier shell correlations of several volumes in one plot, and the spectra of their noise in another.

    Attributes
    ----------
    correlations, noise
        The plots.
    """

    def __init__(self) -> None:
        super().__init__()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        self.correlations = Plot(f"Fourier shell correlation {PER_MM}")
        self.noise = Plot(f"noise power {PER_MM}", log=True, height=130)
        self.said = QLabel()
        self.said.setWordWrap(True)
        for widget in (self.correlations, self.noise, self.said):
            layout.addWidget(widget)
        self._found: list[tuple[str, str, Spectra]] = []
        self.clear()

    def clear(self, say: str = "") -> None:
        """Take the plots away, and say why, or what is waited for."""
        self._found = []
        self.correlations.show_lines([])
        self.noise.show_lines([])
        self._say(say)

    def add(self, name: str, shade: str, found: Spectra, halves: bool = False) -> None:
        """Draw a volume's curves, too.

        Parameters
        ----------
        name
            Of the volume.
        shade
            Its colour.
        found
            Its curves.
        halves
            Whether they are of two halves of the views, which have thresholds of their own.
        """
        self._found.append((name, shade, found))
        lines, noise = [], []
        for label, colour, told in self._found:
            if (correlation := told.correlation) is not None and halves:
                lines += threshold_lines(correlation)
            elif correlation is not None:
                resolution = correlation.resolution(AGAINST_REFERENCE)
                reach = _reach(correlation, AGAINST_REFERENCE, resolution)
                lines.append(Line(f"{label}: {reach}", correlation.frequency, correlation.correlation, colour))
            if told.noise is not None:
                noise.append(Line(label, *told.noise, colour))
        if lines and not halves:
            frequency = lines[0].x
            lines.append(Line("threshold 1/2", frequency, np.full_like(frequency, AGAINST_REFERENCE), ""))
        self.correlations.show_lines(lines)
        self.noise.show_lines(noise)

    def _say(self, text: str) -> None:
        self.said.setText(note(text) if text else "")
        self.said.setVisible(bool(text))

    def say_what_they_are(self, region: Region, reference: str | None, halves: bool) -> None:
        """A sentence beneath the plots: with what volumes were correlated, and what was taken for noise."""
        told = ""
        if reference is not None:
            told = f"Correlated with {reference}: 1/2 is there what 1/7 is between halves of the views. "
        elif halves:
            told = "Correlated with each other: the thresholds are those of volumes of two halves of the views. "
        else:
            told = "Correlations need a reference, or just two volumes, of different views. "
        if not any(found.noise is not None for *_, found in self._found):
            told += f"No square of eight voxels fits into the {region.name}, so noise has no spectrum there."
        elif region.uniform:
            told += f"Noise is what varies in the {region.name}."
        elif reference is not None:
            told += f"Noise is what differs from {reference} in the {region.name}."
        elif halves:
            told += f"Noise is half their difference in the {region.name}, which is that of their mean."
        else:
            told += f"All that varies in the {region.name} counts as noise: mark a uniform region."
        self._say(told)


class ResolutionPlot(QWidget):
    """The correlation of a resolution's two halves, from its end until the next run begins.

    Parameters
    ----------
    session
        The viewer's.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self.plot = Plot(f"Fourier shell correlation {PER_MM}")
        layout.addWidget(self.plot)
        session.finished.connect(self._show_end)
        session.state_changed.connect(self._show_state)
        self.hide()

    def _show_end(self, message: object) -> None:
        if isinstance(message, Finished) and isinstance(self.session.job, ResolutionJob):
            self.show_resolution(message.provenance.get("resolution", {}))

    def show_resolution(self, told: dict[str, Any]) -> None:
        """Draw what a run's provenance tells; nothing where it holds no curves."""
        curves: list[Sequence[float]] = [told.get(name, ()) for name in ("frequency", "correlation", "half_bit")]
        self.setVisible(all(curves))
        if all(curves):
            frequency, correlation, half_bit = (np.asarray(curve, float) for curve in curves)
            self.plot.show_lines(threshold_lines(ShellCorrelation.of(frequency, correlation, half_bit)))
            self.setToolTip(html.escape(told.get("sentence", "")))

    def _show_state(self, state: str) -> None:
        if state == "running":
            self.hide()
