"""What a volume resolves, told from two halves of its data; and the spectrum of its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.measures.comparison import as_mask
from napari_recon.scans.errors import ScanError

SOFT_EDGE = 0.05
"""Sigma of what softens the edge of a region before the Fourier transform, relative to the volume's width."""

AGAINST_REFERENCE = 0.5
"""The threshold of a correlation with the truth that 1/7 is between halves: √(2c / (1 + c)) for c = 1/7."""

_FEWEST_SHELLS = 4
"""Below which a volume is too small for a curve."""

_SQUARES = (128, 64, 32, 16, 8)
"""Edges in voxels of the squares that noise is measured in, the first that fits four times being taken."""

_MOST_SQUARES = 256
"""How many squares are looked at; they are spread over the slices."""


@dataclass(frozen=True)
class ShellCorrelation:
    """How well two volumes agree at each spatial frequency.

    Attributes
    ----------
    frequency
        (shells,) 1/mm, up to half a cycle a voxel; frequency 0 is left out.
    correlation
        (shells,) between -1 and 1.
    half_bit
        (shells,) the threshold of half a bit of information a voxel.
    one_seventh
        (shells,) the threshold 1/7, everywhere the same.
    resolution_half_bit, resolution_one_seventh
        mm: one over the frequency at which the curve first falls below the threshold; NaN where it does not.
    sentence
        The two for a person, or why there is none.
    """

    frequency: NDArray[np.float64]
    correlation: NDArray[np.float64]
    half_bit: NDArray[np.float64]
    one_seventh: NDArray[np.float64]
    resolution_half_bit: float
    resolution_one_seventh: float
    sentence: str

    @classmethod
    def of(
        cls, frequency: NDArray[np.float64], correlation: NDArray[np.float64], half_bit: NDArray[np.float64]
    ) -> ShellCorrelation:
        """Add the other threshold, where the curve crosses both, and the sentence."""
        one_seventh = np.full_like(correlation, 1 / 7)
        told, found = [], []
        for threshold in (half_bit, one_seventh):
            crossing, why = _crossing(frequency, correlation - threshold)
            found.append(1 / crossing if crossing is not None else math.nan)
            told.append(f"{found[-1]:.3g} mm" if crossing is not None else why)
        if told[0] == told[1]:
            sentence = f"Resolution: {told[0]} (half-bit and 1/7)."
        else:
            sentence = f"Resolution: {told[0]} (half-bit), {told[1]} (1/7)."
        return cls(frequency, correlation, half_bit, one_seventh, found[0], found[1], sentence)

    def resolution(self, threshold: float) -> float:
        """One over the frequency at which the curve first falls below a threshold, in mm; NaN where it does not."""
        crossing, _ = _crossing(self.frequency, self.correlation - threshold)
        return math.nan if crossing is None else 1 / crossing


def fourier_shell_correlation(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    voxel_size: float | Sequence[float],
    mask: NDArray[np.bool_] | None = None,
) -> ShellCorrelation:
    """Fourier shell correlation of two volumes that were made of independent data, such as odd and even views.

    The correlation is Σ F₁F₂* / √(Σ|F₁|² Σ|F₂|²) over a shell of frequencies (Harauz & van Heel 1986, Optik 73:146); of
    a single slice, over a ring. The half-bit threshold (van Heel & Schatz 2005, J. Struct. Biol. 151:250) is

        (0.2071 + 1.9102 / √n) / (1.2071 + 0.9102 / √n),

    n being the independent voxels of the shell: all of them, times the share of the volume that the softened region
    fills. The threshold 1/7, better known as 0.143, is that of Rosenthal & Henderson 2003 (J. Mol. Biol. 333:721). Both
    are about the volume of all data, told from halves.

    What a method assumes of all volumes is in both halves, and so counts as signal: a network's or a strong
    regulariser's resolution is that of what comes out alike, which need not be true.

    Parameters
    ----------
    first, second
        (D, H, W), on the same grid.
    voxel_size
        mm; or the edges (z, y, x).
    mask
        Where the object may be: (H, W), (1, H, W) or (D, H, W); None takes all. Its edge is softened inwards, the
        volume's too, since a sharp one would correlate with itself.

    Raises
    ------
    ScanError
        If the shapes differ, a volume holds NaN or nothing but one value, or they are too small for four shells.
    """
    from scipy.fft import rfftn

    if first.shape != second.shape:
        raise ScanError(f"Volumes of {first.shape} and {second.shape} voxels cannot be correlated: use one grid.")
    edges = _edges(voxel_size)
    window = _softened(as_mask(mask, first.shape), first.shape)
    power, fourth = _powers(window, first.shape)
    if not power > 0:
        raise ScanError("The region is too small for its edge to be softened: choose a larger one.")
    fill = power**2 / (math.prod(first.shape) * fourth)
    spectra = []
    for volume in (first, second):
        mean = float(np.sum(volume * window, dtype=np.float64) / _total(window, first.shape))
        if not np.isfinite(mean):
            raise ScanError("A volume that holds NaN or infinity has no Fourier transform: mend it first.")
        spectra.append(rfftn((volume - np.float32(mean)) * window, axes=(0, 1, 2)))
    shells = _Shells(first.shape, edges)
    if shells.count < _FEWEST_SHELLS:
        raise ScanError(f"Volumes of {first.shape} voxels are too small for a correlation of shells: use larger ones.")
    one, other = spectra
    products = shells.sums(
        lambda k: (one[k].real * other[k].real + one[k].imag * other[k].imag, _squares(one[k]), _squares(other[k]))
    )
    cross, own, its = products[0], products[1], products[2]
    if not (own.sum() > 0 and its.sum() > 0):
        raise ScanError("A volume of one value correlates with nothing: check what it holds.")
    correlation = np.divide(cross, np.sqrt(own * its), out=np.zeros_like(cross), where=own * its > 0)
    root = np.sqrt(np.maximum(1.0, shells.voxels * fill))
    half_bit = (0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root)
    return ShellCorrelation.of(shells.frequency, correlation, half_bit)


def _crossing(frequency: NDArray[np.float64], above: NDArray[np.float64]) -> tuple[float | None, str]:
    """Where a curve, having been above zero, first falls below; or None and why it does not."""
    over = np.flatnonzero(above >= 0)  # the first shells have so few voxels that no correlation is above all doubt
    if not len(over):
        return None, "none, as the halves agree at no frequency"
    below = np.flatnonzero(above[over[0] :] < 0)
    if not len(below):
        return None, f"better than {1 / frequency[-1]:.3g} mm, the finest that the voxels can hold"
    after = over[0] + int(below[0])
    before = after - 1
    share = above[before] / (above[before] - above[after])
    return float(frequency[before] + share * (frequency[after] - frequency[before])), ""


class _Shells:
    """Shells of frequencies of a real volume's half spectrum, as wide as one over its longest edge."""

    def __init__(self, shape: tuple[int, ...], edges: tuple[float, float, float]) -> None:
        axes = [(n, edge) for n, edge in zip(shape, edges, strict=True) if n > 1]
        self._width = 1 / max((n * edge for n, edge in axes), default=1.0)
        highest = 0.5 / max((edge for _, edge in axes), default=1.0)
        self.count = math.floor(highest / self._width + 1e-6)
        self.frequency: NDArray[np.float64] = self._width * np.arange(1, self.count + 1, dtype=np.float64)
        self._z, self._y = (np.fft.fftfreq(n, edge) for n, edge in zip(shape[:2], edges[:2], strict=True))
        self._x = np.fft.rfftfreq(shape[2], edges[2])
        # Of most columns a spectrum's other half holds the mirror image.
        self._weight = np.full(len(self._x), 2.0)
        self._weight[0] = 1.0
        if shape[2] % 2 == 0:
            self._weight[-1] = 1.0
        self.voxels = self.sums(lambda k: (np.ones((shape[1], len(self._x))),))[0]

    def sums(self, planes: Any) -> NDArray[np.float64]:
        """(quantities, shells): sums over whole shells of what ``planes(k)`` tells of the spectrum's plane k."""
        sums: NDArray[np.float64] | None = None
        for k, z in enumerate(self._z):
            distance = np.sqrt(z**2 + self._y[:, None] ** 2 + self._x**2)
            shell = np.round(distance / self._width).astype(np.intp)
            inside = (shell > 0) & (shell <= self.count)
            weight = np.broadcast_to(self._weight, shell.shape)[inside]
            found = [
                np.bincount(shell[inside] - 1, weight * values[inside], minlength=self.count) for values in planes(k)
            ]
            sums = np.array(found) if sums is None else sums + found
        assert sums is not None
        return sums


def _softened(inside: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A window that is 1 well inside a mask and falls to 0 at its edge and at the volume's; it broadcasts to it."""
    from scipy.ndimage import gaussian_filter

    sigmas = [SOFT_EDGE * n if n > 1 else 0.0 for n in shape]
    across = min(sigma for sigma, n in zip(sigmas[1:], shape[1:], strict=True) if n > 1) if max(shape[1:]) > 1 else 0.0
    smooth = [sigmas[0] if len(inside) > 1 else 0.0, *(across if n > 1 else 0.0 for n in shape[1:])]
    # Zero is what lies beyond, so that the volume's own edges are softened with the mask's.
    window = gaussian_filter(inside.astype(np.float32), smooth, mode="constant", truncate=3.0)
    window = _raised(window)
    if len(inside) == 1 and shape[0] > 1:  # the same in all slices: the ends are softened by themselves
        ends = _raised(gaussian_filter(np.ones(shape[0], np.float32), sigmas[0], mode="constant", truncate=3.0))
        window = window * ends[:, None, None]
    return window


def _raised(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """From 0 where a smoothed edge is at one half, and beyond, to 1; with no kink at either end."""
    return np.sin(np.pi / 2 * np.clip(2 * smooth - 1, 0, 1), dtype=np.float32) ** 2


def _powers(window: NDArray[np.float32], shape: tuple[int, ...]) -> tuple[float, float]:
    """Sums of the second and the fourth power over the volume."""
    times = math.prod(shape) / window.size
    second = window**2
    return float(second.sum(dtype=np.float64)) * times, float((second**2).sum(dtype=np.float64)) * times


def _total(window: NDArray[np.float32], shape: tuple[int, ...]) -> float:
    return float(window.sum(dtype=np.float64)) * math.prod(shape) / window.size


def _squares(values: NDArray[np.complex64]) -> NDArray[np.float32]:
    return values.real**2 + values.imag**2


# -- noise ---------------------------------------------------------------------------------------------------------


def noise_power_spectrum(
    volume: NDArray[np.float32],
    voxel_size: float | Sequence[float],
    mask: NDArray[np.bool_] | None = None,
    size: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noise power spectrum of slices, averaged over directions.

    It is (Δx Δy / n²) ⟨|DFT|²⟩ over squares of n² voxels that overlap by half, less a polynomial of second order in
    each (ICRU Report 87, 2012; Siewerdsen et al. 2002, Med. Phys. 29:2655). Its integral over the plane of frequencies
    is the variance. Whatever varies in the region counts as noise: give a uniform one, or half the difference of two
    volumes that were made of odd and even views, which holds the noise of their mean everywhere.

    Parameters
    ----------
    volume
        (D, H, W).
    voxel_size
        mm; or the edges (z, y, x).
    mask
        The region, in which the squares lie: (H, W), (1, H, W) or (D, H, W); None takes all.
    size
        n; None takes a power of two that fits, 128 at most.

    Returns
    -------
    Frequencies in 1/mm, up to half a cycle a voxel, and the power at each in the value's unit squared times mm².

    Raises
    ------
    ScanError
        If no square fits into the region.
    """
    spectrum, _, frequency = _planar_spectrum(volume, _edges(voxel_size), mask, size)
    highest = 0.5 / max(_edges(voxel_size)[1:])
    width = highest / (len(spectrum) // 2)
    ring = np.round(frequency / width).astype(np.intp)
    count = len(spectrum) // 2
    inside = (ring > 0) & (ring <= count)
    power = np.bincount(ring[inside] - 1, spectrum[inside], minlength=count)
    members = np.bincount(ring[inside] - 1, minlength=count)
    return width * np.arange(1, count + 1, dtype=np.float64), power / np.maximum(members, 1)


def noise_summary(
    volume: NDArray[np.float32], voxel_size: float | Sequence[float], mask: NDArray[np.bool_] | None = None
) -> tuple[float, float]:
    """The noise in a uniform region: its standard deviation, and its mean frequency in 1/mm (low for coarse noise).

    Both are of the squares of :func:`noise_power_spectrum`, so that shading is not taken for noise.
    """
    spectrum, variance, frequency = _planar_spectrum(volume, _edges(voxel_size), mask, None)
    total = float(spectrum.sum())
    return math.sqrt(variance), float((spectrum * frequency).sum() / total) if total > 0 else math.nan


def _planar_spectrum(
    volume: NDArray[np.float32],
    edges: tuple[float, float, float],
    mask: NDArray[np.bool_] | None,
    size: int | None,
) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """The mean spectrum (n, n) of squares in a region, the variance in them, and the frequencies (n, n) in 1/mm."""
    inside = as_mask(mask, volume.shape)
    size, places = _places(inside, len(volume), size)
    u = np.linspace(-1, 1, size)
    v, u = np.meshgrid(u, u, indexing="ij")
    terms = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v]).reshape(6, -1)
    basis = np.linalg.qr(terms.T)[0]
    spectrum = np.zeros((size, size))
    for z, y, x in places:
        square = volume[z, y : y + size, x : x + size].astype(np.float64).ravel()
        square -= basis @ (basis.T @ square)
        spectrum += np.abs(np.fft.fft2(square.reshape(size, size))) ** 2
    spectrum *= edges[1] * edges[2] / (size**2 * len(places))
    frequency = np.hypot(np.fft.fftfreq(size, edges[1])[:, None], np.fft.fftfreq(size, edges[2]))
    # Six of the n² degrees of freedom went into the polynomial.
    variance = spectrum.sum() / (size**2 * edges[1] * edges[2]) * size**2 / (size**2 - 6)
    return spectrum, float(variance), frequency


def _places(inside: NDArray[np.bool_], depth: int, size: int | None) -> tuple[int, list[tuple[int, int, int]]]:
    """The squares that lie in a region: their edge, and where they begin (z, y, x)."""
    best: tuple[int, list[tuple[int, int, int]]] | None = None
    planes = list(inside) if len(inside) == depth else [inside[0]] * depth
    # Squares of neighbouring slices tell nearly the same: so many slices are enough.
    slices = np.unique(np.linspace(0, depth - 1, min(depth, 64)).round().astype(int))
    for edge in _SQUARES if size is None else (size,):
        if edge < 4 or edge > min(inside.shape[1:]):
            continue
        places = []
        corners: list[tuple[int, int]] = []
        for number, z in enumerate(slices):
            if number == 0 or len(inside) == depth:
                corners = _corners(planes[z], edge)
            places += [(int(z), y, x) for y, x in corners]
        if places and (best is None or len(places) >= 4):
            best = edge, places
        if len(places) >= 4:
            break
    if best is None:
        wanted = "eight" if size is None else size
        raise ScanError(f"No square of {wanted} voxels fits into the region, so its noise has no spectrum.")
    edge, places = best
    chosen = np.unique(np.linspace(0, len(places) - 1, min(len(places), _MOST_SQUARES)).round().astype(int))
    return edge, [places[i] for i in chosen]


def _corners(plane: NDArray[np.bool_], edge: int) -> list[tuple[int, int]]:
    """First corners (y, x) of the squares of an edge that lie wholly in a plane's mask, at steps of half an edge."""
    rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    if not len(rows):
        return []
    sums = np.pad(np.cumsum(np.cumsum(plane, axis=0, dtype=np.int64), axis=1), ((1, 0), (1, 0)))
    found = []
    for y in range(int(rows[0]), int(rows[-1]) - edge + 2, edge // 2):
        for x in range(int(columns[0]), int(columns[-1]) - edge + 2, edge // 2):
            if sums[y + edge, x + edge] - sums[y, x + edge] - sums[y + edge, x] + sums[y, x] == edge**2:
                found.append((y, x))
    return found


def _edges(voxel_size: float | Sequence[float]) -> tuple[float, float, float]:
    z, y, x = (float(voxel_size),) * 3 if isinstance(voxel_size, int | float) else (float(e) for e in voxel_size)
    if not all(math.isfinite(edge) and edge > 0 for edge in (z, y, x)):
        raise ScanError(f"The voxel size {voxel_size} must be a positive number of millimetres.")
    return z, y, x
