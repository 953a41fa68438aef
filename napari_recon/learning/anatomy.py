"""Synthetic anatomies to train and to try on: head, thorax, limb, vessels, shell and foam, no two seeds alike.

An anatomy is a function of the place in mm: every structure is a signed distance, deformed by smooth noise, that is
painted with its tissue's attenuation. A grid only samples it, so the same seed on any grid, whatever its shape, voxel
size and place, shows the same object, and edges are as blurred as the voxels are wide (partial volume). Patients lie as
in DICOM: x grows to their left, y to their back, z to their head.

For judging reconstructions, use :mod:`napari_recon.learning.phantoms` instead: another family, with exact integrals.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid

Array = NDArray[np.float32]
Field = NDArray[np.floating[Any]]
Point = NDArray[np.float64]

ENERGIES_KEV = (40.0, 60.0, 80.0)
"""Where the attenuation of materials is tabulated; between them it is interpolated."""

# Mass attenuation coefficients in cm²/g at ENERGIES_KEV (see attenuation()).
_MATERIALS: dict[str, tuple[float, float, float]] = {
    "air": (0.2485, 0.1875, 0.1662),
    "water": (0.2683, 0.2059, 0.1837),
    "adipose": (0.2396, 0.1974, 0.1800),
    "soft tissue": (0.2688, 0.2048, 0.1823),
    "blood": (0.2740, 0.2057, 0.1827),
    "brain": (0.2717, 0.2058, 0.1831),
    "lung": (0.2701, 0.2053, 0.1826),
    "bone": (0.6655, 0.3148, 0.2229),
    "spongiosa": (0.3996, 0.2414, 0.1959),  # a third of cortical bone in soft tissue, by mass
    "enamel": (0.9810, 0.4060, 0.2450),  # hydroxyapatite from its elements
    "cellulose": (0.2413, 0.1923, 0.1736),  # from its elements
    "acrylic": (0.2350, 0.1924, 0.1751),
    "titanium": (2.2140, 0.7661, 0.4052),
}
_IODINE = (22.10, 7.579, 3.510)


@dataclass(frozen=True)
class Tissue:
    """What a label stands for.

    Attributes
    ----------
    label
        Its number in the label map.
    material
        Whose mass attenuation it has.
    density
        Lowest and highest density in g/cm³ that a seed may draw.
    iodine
        Lowest and highest iodine content in g/cm³.
    """

    label: int
    material: str
    density: tuple[float, float]
    iodine: tuple[float, float] = (0.0, 0.0)


TISSUES: dict[str, Tissue] = {
    "air": Tissue(0, "air", (0.0012, 0.0012)),
    "skin": Tissue(1, "soft tissue", (1.07, 1.11)),
    "fat": Tissue(2, "adipose", (0.91, 0.96)),
    "muscle": Tissue(3, "soft tissue", (1.04, 1.07)),
    "water": Tissue(4, "water", (0.995, 1.01)),
    "cortical bone": Tissue(5, "bone", (1.75, 1.95)),
    "trabecular bone": Tissue(6, "spongiosa", (1.10, 1.25)),
    "cartilage": Tissue(7, "soft tissue", (1.09, 1.14)),
    "grey matter": Tissue(8, "brain", (1.040, 1.050)),
    "white matter": Tissue(9, "brain", (1.022, 1.032)),
    "enamel": Tissue(10, "enamel", (2.4, 2.8)),
    "lung": Tissue(11, "lung", (0.20, 0.34)),
    "blood": Tissue(12, "blood", (1.05, 1.065)),
    "enhanced blood": Tissue(13, "blood", (1.05, 1.065), (0.006, 0.016)),
    "organ": Tissue(14, "soft tissue", (1.05, 1.09)),
    "lesion": Tissue(15, "soft tissue", (1.00, 1.10)),
    "shell": Tissue(16, "cellulose", (1.15, 1.35)),
    "kernel": Tissue(17, "adipose", (0.88, 1.02)),
    "plastic": Tissue(18, "acrylic", (1.10, 1.25)),
    "filler": Tissue(19, "bone", (1.5, 2.2)),
    "titanium": Tissue(20, "titanium", (4.43, 4.54)),
}
"""Every tissue by its name."""

FIELDS_OF_VIEW = {"head": 240.0, "thorax": 360.0, "limb": 140.0, "vessels": 60.0, "shell": 34.0, "foam": 20.0}
"""The kinds, each with the edge in mm of the cube that holds it."""

KINDS = tuple(FIELDS_OF_VIEW)


def attenuation(tissue: str, energy_kev: float = 60.0) -> tuple[float, float]:
    """The range of linear attenuation in 1/mm from which the seeds draw a tissue's mean.

    Mass attenuation coefficients are those of NIST (J. H. Hubbell and S. M. Seltzer, *Tables of X-Ray Mass Attenuation
    Coefficients*, NISTIR 5632, tables 3 and 4, tissues of ICRU-44) at 40, 60 and 80 keV, interpolated between them
    linearly in the logarithms of energy and coefficient.

    Raises
    ------
    ScanError
        If there is no such tissue, or the energy lies outside 40 to 80 keV.
    """
    if tissue not in TISSUES:
        raise ScanError(f"There is no tissue {tissue!r}; there are {', '.join(TISSUES)}.")
    kind = TISSUES[tissue]
    base, iodine = _coefficient(_MATERIALS[kind.material], energy_kev), _coefficient(_IODINE, energy_kev)
    low, high = (
        (base * density + iodine * content) / 10 for density, content in zip(kind.density, kind.iodine, strict=True)
    )
    return low, high


def _coefficient(table: tuple[float, float, float], energy_kev: float) -> float:
    if not ENERGIES_KEV[0] <= energy_kev <= ENERGIES_KEV[-1]:
        raise ScanError(f"An energy of {energy_kev} keV will not do; choose 40 to 80 keV.")
    return float(np.exp(np.interp(np.log(energy_kev), np.log(ENERGIES_KEV), np.log(table))))


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A synthetic anatomy on a grid.

    Attributes
    ----------
    volume
        (D, H, W), float32, attenuation in 1/mm.
    labels
        (D, H, W), uint8: the tissue that fills most of a voxel.
    names
        Label -> name of the tissue, for those that occur.
    grid
        Where the voxels are.
    energy_kev
        The energy that the attenuation belongs to.
    """

    volume: Array
    labels: NDArray[np.uint8]
    names: dict[int, str]
    grid: Grid
    energy_kev: float


def anatomy_grid(kind: str, size: int) -> Grid:
    """The cube that holds a kind, of ``size`` voxels an edge.

    Raises
    ------
    ScanError
        If there is no such kind.
    """
    if kind not in FIELDS_OF_VIEW:
        raise ScanError(f"There is no anatomy {kind!r}; there are {', '.join(KINDS)}.")
    return Grid((size, size, size), FIELDS_OF_VIEW[kind] / size)


def make_anatomy(
    kind: str,
    seed: int = 0,
    size: int = 96,
    grid: Grid | None = None,
    energy_kev: float = 60.0,
    metal: bool = False,
    values: Mapping[str, float] | None = None,
) -> Anatomy:
    """A synthetic anatomy: another one for every seed, the same one on every grid and at every energy.

    Parameters
    ----------
    kind
        ``"head"``, ``"thorax"``, ``"limb"``, ``"vessels"``, ``"shell"`` or ``"foam"``.
    seed
        Of shapes, deformations, textures and contrasts.
    size
        Voxels along an edge of the cube that holds the kind (:data:`FIELDS_OF_VIEW`).
    grid
        Any other grid in the same world instead, for a part, another shape or another voxel size.
    energy_kev
        Energy of the photons, 40 to 80 keV.
    metal
        Add titanium implants (to head, thorax and limb).
    values
        Tissue -> what the volume is to hold instead of its attenuation, such as an MRI signal; 0 for those left out.

    Raises
    ------
    ScanError
        If there is no such kind, or the energy or the size will not do.
    """
    own = anatomy_grid(kind, max(int(size), 1))
    if size < 1 or size > 4096:
        raise ScanError(f"A size of {size} voxels will not do; choose 1 to 4096.")
    grid = grid or own
    rng = np.random.default_rng([int(seed), KINDS.index(kind)])
    # Contrasts come first and from a generator of their own: shapes must not change when a tissue is added.
    levels = np.random.default_rng([int(seed), KINDS.index(kind), 1]).random(len(TISSUES))
    painted = np.zeros(len(TISSUES))
    for level, (name, tissue) in zip(levels, TISSUES.items(), strict=True):
        low, high = attenuation(name, energy_kev)
        painted[tissue.label] = low + level * (high - low) if values is None else values.get(name, 0.0)
    paint = _MODELS[kind](rng, metal)

    volume, labels = np.empty(grid.shape, np.float32), np.empty(grid.shape, np.uint8)
    depth, height, width = grid.shape
    thickness = max(1, min(depth, 400_000 // (height * width)))  # a slab's fields stay near the cache

    def slab(start: int) -> None:
        stop = min(start + thickness, depth)
        canvas = _Canvas(grid.crop((slice(start, stop), slice(0, height), slice(0, width))), painted)
        paint(canvas)
        volume[start:stop], labels[start:stop] = canvas.volume, canvas.labels

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # each holds some 100 MB of fields
        list(pool.map(slab, range(0, depth, thickness)))
    np.maximum(volume, 0, out=volume)
    present = set(np.unique(labels).tolist())
    names = {tissue.label: name for name, tissue in TISSUES.items() if tissue.label in present}
    return Anatomy(volume, labels, names, grid, float(energy_kev))


def with_random_contrasts(anatomy: Anatomy, seed: int) -> NDArray[np.float32]:
    """An anatomy's shapes with attenuations that no tissue has: every label's is scaled to a random one.

    Networks that are trained on such volumes learn shapes and the physics, and not the values of tissues (Billot et
    al., SynthSeg, Med. Image Anal. 86, 2023).

    Parameters
    ----------
    anatomy
        Its labels say what belongs together; textures and partial-volume edges are scaled with it.
    seed
        Of the values, and of a soft texture over all.

    Returns
    -------
    (D, H, W), float32, from 0 to somewhat above 1.
    """
    rng = np.random.default_rng([seed, 1])
    counts = np.bincount(anatomy.labels.ravel(), minlength=256)
    means = np.bincount(anatomy.labels.ravel(), anatomy.volume.ravel(), minlength=256) / np.maximum(counts, 1)
    brightest = max(float(means.max()), 1e-12)
    wanted = np.where(means > 0.02 * brightest, rng.uniform(0.05, 1.0, 256), means / brightest)  # air stays air
    factors = np.where(counts > 0, wanted / np.maximum(means, 1e-3 * brightest), 0.0).astype(np.float32)
    coarse = rng.normal(size=[-(-n // int(rng.integers(3, 12))) + 1 for n in anatomy.volume.shape])
    texture = ndimage.zoom(coarse, [n / m for n, m in zip(anatomy.volume.shape, coarse.shape, strict=True)], order=1)
    texture *= rng.uniform(0.0, 0.12)
    volume: NDArray[np.float32] = (anatomy.volume * factors[anatomy.labels] * (1 + texture)).astype(np.float32)
    return np.clip(volume, 0, None)


# -- painting ------------------------------------------------------------------------------------------------------


class _Canvas:
    """A slab of a grid, and what is painted on it; later strokes cover earlier ones."""

    def __init__(self, grid: Grid, values: NDArray[np.float64]) -> None:
        self.voxel = np.float32(grid.voxel_size)
        self._origin = np.array(grid.translate, np.float64)
        self._values = values
        z, y, x = (t + np.arange(n) * grid.voxel_size for t, n in zip(grid.translate, grid.shape, strict=True))
        places = np.broadcast_arrays(
            x[None, None].astype(np.float32), y[None, :, None].astype(np.float32), z[:, None, None].astype(np.float32)
        )
        self.x, self.y, self.z = (np.ascontiguousarray(place) for place in places)
        self._bend = 0.0
        self.volume = np.full(grid.shape, values[0], np.float32)
        self.labels = np.zeros(grid.shape, np.uint8)

    def warp(self, seed: int, scale: float, amplitude: float) -> None:
        """Displace everything that is painted from now on by smooth noise, about ``amplitude`` mm."""
        moved = [self.noise(seed + k, scale) * np.float32(amplitude) for k in range(3)]
        self.x, self.y, self.z = self.x + moved[0], self.y + moved[1], self.z + moved[2]
        self._bend += 4 * amplitude

    def noise(
        self, seed: int, scale: float, octaves: int = 1, stretch: tuple[float, float, float] = (1, 1, 1)
    ) -> Array:
        """Smooth noise of unit variance whose features measure ``scale`` mm; octaves below a voxel are left out."""
        out = np.zeros(self.x.shape, np.float32)
        steps = np.array([scale * s for s in stretch], np.float64)
        power, weight = 0.0, 1.0
        for octave in range(octaves):
            # A voxel averages noise finer than itself away.
            seen = weight * min(1.0, max(0.0, steps.min() / float(self.voxel) - 0.6))
            if seen > 0:
                _add_noise(
                    out,
                    self.x,
                    self.y,
                    self.z,
                    1 / steps,
                    np.uint32((seed * 7919 + octave * 104729 + 1) & 0xFFFFFFFF),
                    seen,
                )
            power += weight**2
            weight *= 0.6
            steps /= 2
        out *= np.float32(1 / (0.27 * math.sqrt(power)))
        return out

    def ellipsoids(
        self, shapes: Sequence[Sequence[float]] | Point, reach: float = 1e9, turn: Point | None = None
    ) -> Array:
        """Signed distance (about) to the union of ellipsoids (x, y, z, a, b, c), exact up to ``reach`` mm outside."""
        reach += float(self.voxel)  # or what is far would still tint large voxels
        out = np.full(self.x.shape, reach, np.float32)
        table = np.array(shapes, np.float64).reshape(-1, 6)
        matrix = np.eye(3) if turn is None else turn
        _ellipsoids(out, self.x, self.y, self.z, self._origin, float(self.voxel), self._bend + reach, table, matrix)
        return out

    def tubes(self, segments: NDArray[np.float64], reach: float | None = None) -> Array:
        """Signed distance to the union of tubes, rows of :func:`_chain`; exact up to ``reach`` mm outside."""
        reach = (0.0 if reach is None else reach) + 2 * float(self.voxel)
        out = np.full(self.x.shape, reach, np.float32)
        _tubes(out, self.x, self.y, self.z, self._origin, float(self.voxel), self._bend + reach, segments)
        return out

    def paint(self, distance: Field, tissue: str, texture: Field | None = None, thickness: float = 1e9) -> None:
        """Cover the inside (where the distance is negative) with a tissue.

        ``texture`` is relative to the tissue's mean; ``thickness`` in mm of a sheet tells how much of a voxel it can
        fill.
        """
        label = TISSUES[tissue].label
        most = min(1.0, thickness / float(self.voxel))
        relief = np.zeros((1, 1, 1)) if texture is None else texture
        _cover(
            self.volume,
            self.labels,
            np.ascontiguousarray(distance, np.float32),
            np.ascontiguousarray(relief, np.float32),
            np.float32(self._values[label]),
            label,
            self.voxel,
            np.float32(most),
        )

    def bone(self, distance: Field, cortex: float, seed: int, grain: float, stretch: float = 1.0) -> None:
        """Bone with a cortex, and trabecular bone inside whose struts are about ``grain`` mm apart."""
        self.paint(distance, "cortical bone")
        struts = self.noise(seed, grain, 3, (1, 1, stretch)) * np.float32(0.13)
        struts += self.noise(seed + 1, 6 * grain) * np.float32(0.06)
        self.paint(distance + np.float32(cortex), "trabecular bone", struts)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _hash(i, j, k, seed):  # type: ignore[no-untyped-def]
    h = (
        np.uint32(i) * np.uint32(0x8DA6B343)
        ^ np.uint32(j) * np.uint32(0xD8163841)
        ^ np.uint32(k) * np.uint32(0xCB1AB31F)
    )
    h = (h ^ seed) * np.uint32(0x9E3779B1)
    h ^= h >> np.uint32(15)
    h = h * np.uint32(0x85EBCA77)
    h ^= h >> np.uint32(13)
    return h


@nb.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _slope(h, x, y, z):  # type: ignore[no-untyped-def]
    """Perlin's twelve gradients, by the hash."""
    g = h & np.uint32(15)
    u = x if g < 8 else y
    v = y if g < 4 else (x if g == 12 or g == 14 else z)
    return (u if (h & np.uint32(1)) == 0 else -u) + (v if (h & np.uint32(2)) == 0 else -v)


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _add_noise(out, x, y, z, frequency, seed, weight):  # type: ignore[no-untyped-def]
    """Perlin's gradient noise (K. Perlin, Improving noise, SIGGRAPH 2002), without his period."""
    one = np.float32(1)
    o, xf, yf, zf = out.ravel(), x.ravel(), y.ravel(), z.ravel()
    fx, fy, fz = np.float32(frequency[0]), np.float32(frequency[1]), np.float32(frequency[2])
    shift = np.float32((seed % np.uint32(997)) * 0.618)
    w = np.float32(weight)
    for n in range(o.size):
        px, py, pz = xf[n] * fx + shift, yf[n] * fy - shift, zf[n] * fz + np.float32(0.5) * shift
        gx, gy, gz = math.floor(px), math.floor(py), math.floor(pz)
        i, j, k = np.int32(gx), np.int32(gy), np.int32(gz)
        a, b, c = np.float32(px - gx), np.float32(py - gy), np.float32(pz - gz)
        u = a * a * a * (a * (a * np.float32(6) - np.float32(15)) + np.float32(10))
        v = b * b * b * (b * (b * np.float32(6) - np.float32(15)) + np.float32(10))
        t = c * c * c * (c * (c * np.float32(6) - np.float32(15)) + np.float32(10))
        n000 = _slope(_hash(i, j, k, seed), a, b, c)
        n100 = _slope(_hash(i + 1, j, k, seed), a - one, b, c)
        n010 = _slope(_hash(i, j + 1, k, seed), a, b - one, c)
        n110 = _slope(_hash(i + 1, j + 1, k, seed), a - one, b - one, c)
        n001 = _slope(_hash(i, j, k + 1, seed), a, b, c - one)
        n101 = _slope(_hash(i + 1, j, k + 1, seed), a - one, b, c - one)
        n011 = _slope(_hash(i, j + 1, k + 1, seed), a, b - one, c - one)
        n111 = _slope(_hash(i + 1, j + 1, k + 1, seed), a - one, b - one, c - one)
        y0 = n000 + u * (n100 - n000) + v * (n010 + u * (n110 - n010) - n000 - u * (n100 - n000))
        y1 = n001 + u * (n101 - n001) + v * (n011 + u * (n111 - n011) - n001 - u * (n101 - n001))
        o[n] += w * (y0 + t * (y1 - y0))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _span(low, high, origin, voxel, count):  # type: ignore[no-untyped-def]
    first = (low - origin) / voxel
    last = (high - origin) / voxel
    return int(min(max(math.ceil(first), 0), count)), int(max(min(math.floor(last) + 1, count), 0))


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _ellipsoids(out, x, y, z, origin, voxel, margin, table, turn):  # type: ignore[no-untyped-def]
    depth, height, width = out.shape
    m = turn.astype(np.float32)
    for e in range(len(table)):
        cx, cy, cz = np.float32(table[e, 0]), np.float32(table[e, 1]), np.float32(table[e, 2])
        ra, rb, rc = np.float32(table[e, 3]), np.float32(table[e, 4]), np.float32(table[e, 5])
        far = max(ra, rb, rc) + margin
        k0, k1 = _span(cz - far, cz + far, origin[0], voxel, depth)
        j0, j1 = _span(cy - far, cy + far, origin[1], voxel, height)
        i0, i1 = _span(cx - far, cx + far, origin[2], voxel, width)
        for k in range(k0, k1):
            for j in range(j0, j1):
                for i in range(i0, i1):
                    dx, dy, dz = x[k, j, i] - cx, y[k, j, i] - cy, z[k, j, i] - cz
                    p = (m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz) / ra
                    q = (m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz) / rb
                    r = (m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz) / rc
                    size = math.sqrt(p * p + q * q + r * r)
                    steep = math.sqrt((p / ra) ** 2 + (q / rb) ** 2 + (r / rc) ** 2)
                    d = size * (size - np.float32(1)) / steep if steep > np.float32(1e-6) else -min(ra, rb, rc)
                    if d < out[k, j, i]:
                        out[k, j, i] = d


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _tubes(out, x, y, z, origin, voxel, margin, table):  # type: ignore[no-untyped-def]
    """Rows: start (3), end (3), radius at both, direction along which it is wider (3), and by what factor."""
    depth, height, width = out.shape
    half = np.float32(voxel / 2)
    for e in range(len(table)):
        s = table[e].astype(np.float32)
        wide = s[11]
        far = max(s[6], s[7]) * max(wide, np.float32(1)) + margin
        k0, k1 = _span(min(s[2], s[5]) - far, max(s[2], s[5]) + far, origin[0], voxel, depth)
        j0, j1 = _span(min(s[1], s[4]) - far, max(s[1], s[4]) + far, origin[1], voxel, height)
        i0, i1 = _span(min(s[0], s[3]) - far, max(s[0], s[3]) + far, origin[2], voxel, width)
        bx, by, bz = s[3] - s[0], s[4] - s[1], s[5] - s[2]
        length = bx * bx + by * by + bz * bz
        squeeze = np.float32(1) - np.float32(1) / (wide * wide)
        for k in range(k0, k1):
            for j in range(j0, j1):
                for i in range(i0, i1):
                    px, py, pz = x[k, j, i] - s[0], y[k, j, i] - s[1], z[k, j, i] - s[2]
                    t = np.float32(0)
                    if length > np.float32(1e-9):
                        t = min(max((px * bx + py * by + pz * bz) / length, np.float32(0)), np.float32(1))
                    px, py, pz = px - t * bx, py - t * by, pz - t * bz
                    along = px * s[8] + py * s[9] + pz * s[10]
                    radius = s[6] + t * (s[7] - s[6])
                    d = math.sqrt(max(px * px + py * py + pz * pz - squeeze * along * along, np.float32(0))) - radius
                    if radius < half:  # thinner than a voxel: it fills no more than its cross-section
                        most = np.float32(0.785) * (radius / half) ** 2
                        d = max(d, np.float32(2) * half * (np.float32(0.5) - most))
                    if d < out[k, j, i]:
                        out[k, j, i] = d


@nb.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _cover(volume, labels, distance, relief, value, label, voxel, most):  # type: ignore[no-untyped-def]
    v, q, d, r = volume.ravel(), labels.ravel(), distance.ravel(), relief.ravel()
    textured = r.size > 1
    for n in range(v.size):
        share = min(np.float32(0.5) - d[n] / voxel, np.float32(1)) * most
        if share > np.float32(0):
            new = value * (np.float32(1) + r[n]) if textured else value
            v[n] += share * (new - v[n])
            if share > np.float32(0.5):
                q[n] = label


def _smooth_min(a: Field, b: Field, k: float) -> Field:
    """The union of two bodies with a fillet of about ``k`` mm."""
    h = np.clip(np.float32(0.5) + (b - a) * np.float32(0.5 / k), 0, 1)
    return b + (a - b) * h - np.float32(k) * h * (1 - h)


def _smooth_max(a: Field, b: Field, k: float) -> Field:
    """What two bodies share, its edges rounded by about ``k`` mm."""
    return -_smooth_min(-a, -b, k)


def _step(x: Field) -> Field:
    """From 0 to 1, smoothly, around 0."""
    return 0.5 + 0.5 * np.tanh(x / 2)


def _chain(
    points: Sequence[Sequence[float] | Point] | Point,
    radii: float | Sequence[float] | Point,
    wide: Sequence[float] = (0, 0, 1),
    factor: float = 1.0,
) -> NDArray[np.float64]:
    """Tubes from point to point; ``factor`` times as wide along the unit vector ``wide``."""
    p = np.asarray(points, np.float64)
    r = np.broadcast_to(np.asarray(radii, np.float64), (len(p),))
    n = len(p) - 1
    across = np.broadcast_to(np.asarray(wide, np.float64), (n, 3))
    return np.hstack([p[:-1], p[1:], r[:-1, None], r[1:, None], across, np.full((n, 1), factor)])


def _curve(points: Sequence[Sequence[float] | Point] | Point, steps: int) -> Point:
    """A smooth curve through points (Catmull-Rom), ``steps`` a span."""
    p = np.asarray(points, np.float64)
    p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    spans = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.vstack([*spans, p[-2:-1]])


def _tree(
    rng: np.random.Generator,
    root: Sequence[float],
    direction: Sequence[float],
    radius: float,
    length: float,
    generations: int,
    inside: Callable[[Point], bool],
    finest: float = 0.0,
) -> NDArray[np.float64]:
    """Tubes of a vessel tree: branches fork, thin out (Murray's law, about) and keep away from each other inside."""
    segments: list[NDArray[np.float64]] = []
    tips: list[Point] = []
    queue = [(np.asarray(root, float), np.asarray(direction, float), radius, length, 0)]
    while queue:
        start, heading, thick, long, generation = queue.pop(0)
        best, room, valid = None, -1.0, 0
        others = np.array(tips) if tips else None
        for attempt in range(12):
            aim = heading / np.linalg.norm(heading) + rng.normal(
                scale=(0.5 if generation else 0.1) + 0.05 * attempt, size=3
            )
            aim /= np.linalg.norm(aim)
            end = start + aim * long * rng.uniform(0.75, 1.2) * (1 - 0.045 * attempt)
            if not inside(end):
                continue
            valid += 1
            free = 1e9 if others is None else float(np.min(np.linalg.norm(others - end, axis=1)))
            if free > room:
                best, room = end, free
            if valid == 6:
                break
        if best is None:
            if long > 2.5 * thick:
                queue.append((start, -heading * 0.2 + rng.normal(size=3), thick * 0.8, long * 0.6, generation + 1))
            continue
        side = rng.normal(size=3) * long * 0.07
        middle = [start + (best - start) * t + side * math.sin(math.pi * t) for t in (0.33, 0.67)]
        thin = thick * 0.93
        segments.append(_chain([start, *middle, best], np.linspace(thick, thin, 4)))
        tips += [*middle, best]
        if generation + 1 < generations:
            share = rng.uniform(0.35, 0.65)
            for part in (share, 1 - share):
                child = thin * part ** (1 / 2.8)
                if child > finest:
                    queue.append((best, best - start, child, long * rng.uniform(0.74, 0.92), generation + 1))
    return np.vstack(segments) if segments else np.zeros((0, 12))


def _turn(rng: np.random.Generator, amount: float) -> Point:
    """A rotation off the identity by about ``amount`` radians."""
    q, r = np.linalg.qr(np.eye(3) + amount * rng.normal(size=(3, 3)) / 2)
    return q * np.sign(np.diag(r))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _pack(centers, radii, count, share, film):  # type: ignore[no-untyped-def]
    """Keep, in place, the spheres clear of the first ``count`` and of each other; returns how many there are."""
    for k in range(count, len(radii)):
        clear = True
        for other in range(count):
            dx, dy, dz = (
                centers[k, 0] - centers[other, 0],
                centers[k, 1] - centers[other, 1],
                centers[k, 2] - centers[other, 2],
            )
            least = share * (radii[k] + radii[other]) + film
            if dx * dx + dy * dy + dz * dz < least * least:
                clear = False
                break
        if clear:
            centers[count], radii[count] = centers[k], radii[k]
            count += 1
    return count


_Painter = Callable[[_Canvas], None]


# -- kinds ---------------------------------------------------------------------------------------------------------
def _head(rng: np.random.Generator, metal: bool) -> _Painter:
    """Skull with diploe, sinuses and teeth; brain with folds and ventricles; eyes, airways, upper neck."""
    s = int(rng.integers(1 << 20))
    wide, long, tall = rng.uniform(0.93, 1.05, 3)
    thickness = rng.uniform(5.5, 8.0)
    scalp = rng.uniform(4.5, 7.5)
    fold = rng.uniform(15, 19)
    fluid = rng.uniform(1.6, 3.2)  # between brain and skull: wider with age
    horn = rng.uniform(0.8, 1.5)
    nod = _turn(rng, 0.12)
    septum = rng.uniform(-1.5, 1.5)
    lesion = [rng.uniform(-45, 45), rng.uniform(-45, 45), rng.uniform(0, 60), *rng.uniform(4, 9, 3)]
    bleed = rng.random() < 0.5
    open_sinus = rng.uniform(0.75, 1.15)

    teeth = []
    for z, toward in ((-77.0, 1.0), (-80.0, -1.0)):
        for k in np.linspace(-1, 1, 14):
            angle = k * math.radians(78)
            x, y = 26 * math.sin(angle), -74 + 44 * (1 - math.cos(angle))
            if rng.random() < 0.93:
                teeth.append((x, y, z, toward))
    crowns = np.vstack([_chain([(x, y, z), (x, y, z + 5 * t)], [3.6, 3.1]) for x, y, z, t in teeth])
    roots = np.vstack([_chain([(x, y, z + 5 * t), (x * 0.97, y + 2, z + 16 * t)], [2.8, 1.2]) for x, y, z, t in teeth])
    jaw = _curve([(-50, 2, -38), (-48, 2, -70), (-34, -38, -92), (-14, -70, -98), (0, -76, -98)], 6)
    jaw = np.vstack([jaw, (jaw * (-1, 1, 1))[::-1]])
    mandible = _chain(jaw, 4.6, (0, 0, 1), 2.1)
    maxilla = _chain(
        [(22, -42, -66), (18, -66, -66), (0, -76, -66), (-18, -66, -66), (-22, -42, -66)], 6, (0, 0, 1), 1.8
    )
    cheek = [(38, -66, -40), (54, -54, -40), (65, -34, -37), (68, -10, -33)]
    zygoma = np.vstack(
        [_chain([(d * x, y, z) for x, y, z in cheek], [6, 5, 3.0, 3.4], (0, 0, 1), 1.7) for d in (-1, 1)]
    )
    horns = [
        _chain(_curve([(d * x, y, z) for x, y, z in path], 4), radii, (0, 0, 1), 1.5)
        for d in (-1, 1)
        for path, radii in (
            ([(7, -34, 22), (9, -14, 30), (13, 12, 33), (23, 36, 22)], np.linspace(4.4, 5.4, 13) * horn),
            ([(23, 36, 22), (31, 24, 4), (34, 2, -8)], np.linspace(5.2, 2.0, 9) * horn),
            ([(23, 36, 22), (20, 58, 20)], np.linspace(4.2, 1.5, 5) * horn),
        )
    ]
    ventricles = np.vstack(horns)
    nerves = np.vstack([_chain([(d * 31, -50, -19), (d * 14, -22, -17)], 2.0) for d in (-1, 1)])
    throat = _chain(_curve([(0, -30, -52), (0, -10, -62), (0, -8, -90), (0, -12, -130)], 5), 7.0, (1, 0, 0), 1.35)
    plate = _chain([(20, -78, 42), (32, -74, 42), (44, -66, 42)], 1.8, (0, 0, 1), 3)

    def floor(c: _Canvas) -> Array:
        """Height of the skull's floor: three fossae that step down to the back."""
        front = _step(-(c.y + 28) / 5)
        back = _step((c.y - 14) / 5)
        bumps = c.noise(s + 3, 26, 2) * 3
        return (-30 + 16 * front - 24 * back + bumps + 0.006 * c.x**2 * front).astype(np.float32)

    def paint(c: _Canvas) -> None:
        c.x, c.y, c.z = ((m[0] * c.x + m[1] * c.y + m[2] * c.z).astype(np.float32) for m in nod.astype(np.float32))
        c._bend += 25
        c.warp(s + 10, 75, 1.1)
        c.x, c.y, c.z = c.x / np.float32(wide), c.y / np.float32(long), c.z / np.float32(tall)
        c._bend += 15
        side = np.abs(c.x)

        cranium = c.ellipsoids([(0, 6, 26, 74, 93, 84)])
        face = c.ellipsoids([(0, -36, -48, 60, 58, 62)])
        neck = np.hypot(c.x / 1.06, c.y - 20 - 0.15 * (c.z + 90)) - 52
        neck = np.maximum(neck, c.z + 45).astype(np.float32)
        outline = _smooth_min(_smooth_min(cranium, face, 26), neck, 34)
        nose = c.ellipsoids([(0, -86, -36, 13, 17, 22), (-9, -86, -48, 9, 11, 8), (9, -86, -48, 9, 11, 8)])
        ears = c.ellipsoids([(-71, 16, -14, 6, 17, 28), (71, 16, -14, 6, 17, 28)])
        outline = _smooth_min(_smooth_min(outline, nose, 9), ears, 4) + c.noise(s, 45) * np.float32(1.4)

        c.paint(outline, "skin")
        c.paint(outline + 2.0, "fat", c.noise(s + 1, 9, 2) * np.float32(0.02))
        deep = 4.5 + 2.5 * c.noise(s + 2, 40)
        flesh = np.where(c.z < -20, outline + deep + 2, cranium + 4.0)
        c.paint(flesh, "muscle", c.noise(s + 4, 6, 2, (1, 1, 2.5)) * np.float32(0.025))
        # Fat between the muscles of face and neck.
        planes = np.abs(c.noise(s + 5, 24, 1, (1, 1, 2.0))) * 9 - 1.1
        c.paint(np.maximum(np.maximum(planes, outline + 7), c.z + 22), "fat")
        c.paint(np.maximum(c.ellipsoids([(-48, -48, -58, 12, 20, 18), (48, -48, -58, 12, 20, 18)]), outline + 3), "fat")

        # The cavity of the brain; the skull is what lies around it.
        low = floor(c)
        wall = thickness * (1 + 0.22 * c.noise(s + 6, 38))
        vault = cranium + scalp + wall
        cavity = _smooth_max(vault, low - c.z, 12)
        around = np.where(cavity - vault > 1.0, wall * 1.25, wall)  # thicker where the floor is
        skull = np.maximum(cavity - around, cranium + scalp - 2).astype(np.float32)
        skull = np.where(c.z < low - 2, np.maximum(skull, np.abs(c.y - 8) - 72), skull).astype(np.float32)
        petrous = c.ellipsoids([(-46, 14, -36, 21, 11, 10), (46, 14, -36, 21, 11, 10)], reach=40)
        mastoid = c.ellipsoids([(-57, 26, -46, 11, 14, 19), (57, 26, -46, 11, 14, 19)], reach=40)
        c.bone(skull, 1.7, s + 20, 4.0)
        inner = np.maximum(skull + 1.7, -cavity + 1.7)
        c.paint(np.maximum(skull, -cavity), "cortical bone")
        struts = c.noise(s + 21, 3.5, 3) * np.float32(0.14)
        c.paint(inner, "trabecular bone", struts)
        c.paint(petrous, "cortical bone", c.noise(s + 22, 5, 2) * np.float32(0.08))
        c.bone(mastoid, 1.6, s + 23, 4.0)
        cells = 2.2 - np.abs(c.noise(s + 24, 6.5)) * 5.5
        c.paint(np.maximum(mastoid + 2.2, cells), "air")

        # Face: jaws, cheeks, teeth.
        middle = c.ellipsoids([(0, -58, -42, 38, 28, 30)], reach=60)
        c.paint(np.maximum(np.abs(middle + 1.2) - 1.2, c.z + 18), "cortical bone", thickness=2.4)
        c.bone(c.tubes(mandible, reach=12), 2.2, s + 30, 4.0)
        c.bone(c.tubes(np.vstack([maxilla, zygoma]), reach=12), 1.6, s + 31, 4.0)
        mouth = c.ellipsoids([(0, -48, -79, 22, 26, 8)], reach=30)
        c.paint(mouth, "air")
        c.paint(c.ellipsoids([(0, -44, -84, 21, 27, 12)], reach=30), "muscle", c.noise(s + 32, 6, 2) * np.float32(0.03))
        c.paint(c.tubes(roots), "cortical bone")
        c.paint(c.tubes(crowns), "enamel")

        # Orbits: bone, fat, globes.
        cones = [(d * 30, -47, -19, 18.5, 29, 17.5) for d in (-1, 1)]
        orbit = c.ellipsoids(cones, reach=30)
        c.paint(
            np.maximum(np.maximum(np.abs(orbit - 1.2) - 1.2, -(c.y + 66)), orbit - 3), "cortical bone", thickness=2.4
        )
        c.paint(np.maximum(orbit, outline + 3), "fat")
        c.paint(c.tubes(nerves), "muscle")
        straps = [
            (d * (30 + e), -47, -19 + f, 2.2 if e else 5, 16, 5 if e else 2.2)
            for d in (-1, 1)
            for e, f in ((13, 0), (-12, 0), (0, 13), (0, -13))
        ]
        c.paint(c.ellipsoids(straps, reach=6), "muscle")
        globes = c.ellipsoids([(d * 31, -61, -19, 12, 12, 12) for d in (-1, 1)], reach=20)
        c.paint(globes, "muscle")
        c.paint(globes + 1.2, "water")
        c.paint(c.ellipsoids([(d * 31, -69.5, -19, 4.5, 2.2, 4.5) for d in (-1, 1)], reach=6), "cartilage")

        # Air: nose, sinuses, ethmoid cells, throat.
        nasal = np.maximum(c.ellipsoids([(0, -54, -44, 13, 32, 21)], reach=60), c.z + 24)
        c.paint(nasal - 1.2, "cortical bone")
        c.paint(nasal, "air")
        shelves = [(d * x, -52, z, 3.4, 23, 6) for d in (-1, 1) for x, z in ((8.0, -56), (7.5, -45), (6.0, -34))]
        c.paint(np.maximum(c.ellipsoids(shelves, reach=8), nasal - 1), "muscle")
        bent = np.abs(c.x - np.float32(septum) * np.sin((c.z + 20) * 0.1)) - 1.1
        c.paint(np.maximum(bent, nasal), "cartilage", thickness=2.2)
        wobble = c.noise(s + 40, 14, 2) * np.float32(2.2)
        k = open_sinus
        maxillary = [(d * 29, -46, -50, 12.5 * k, 16 * k, 15 * k) for d in (-1, 1)]
        sphenoid = [(d * 9, -26, -26, 7 * k, 9 * k, 8 * k) for d in (-1, 1)]
        sinuses = c.ellipsoids(maxillary + sphenoid, reach=30) + wobble
        frontal = np.maximum(
            c.ellipsoids([(d * 13, -77, 2, 13 * k, 5.5, 15 * k) for d in (-1, 1)], reach=20) + wobble * 0.6, skull + 2
        )
        sinuses = np.minimum(sinuses, frontal)
        c.paint(sinuses - 1.3, "cortical bone")
        c.paint(sinuses, "air")
        c.paint(np.maximum(sinuses, c.z + 58 + 4 * c.noise(s + 41, 20)), "muscle")  # mucosa at the bottom
        ethmoid = np.maximum(c.ellipsoids([(0, -46, -20, 10.5, 24, 11)], reach=30), -cavity + 2)
        c.paint(ethmoid, "cortical bone")
        c.paint(np.maximum(ethmoid + 1, 1.0 - np.abs(c.noise(s + 42, 7)) * 5), "air")
        c.paint(c.tubes(throat, reach=20), "air")
        c.paint(
            np.maximum(c.ellipsoids([(d * 62, 8, -30, 18, 3.4, 3.4) for d in (-1, 1)], reach=8), -(side - 46)), "air"
        )

        # Spine of the neck, with its canal.
        dz = np.mod(c.z + 64, 18) - 9
        column = np.maximum(np.hypot(c.x / 1.25, c.y - 18) - 9.5, c.z + 62)
        c.paint(column, "cartilage")
        c.bone(_smooth_max(column, np.abs(dz) - 6.8, 5), 1.2, s + 50, 3.0)
        ring = np.abs(np.hypot(c.x / 1.15, c.y - 37) - 13) - 3.2
        spine = np.maximum(np.minimum(ring, np.maximum(side - 2.6, np.abs(c.y - 58) - 9)), np.abs(dz + 2) - 5)
        spine = np.minimum(
            spine, np.maximum(c.ellipsoids([(d * 22, 22, 0, 9, 7, 999) for d in (-1, 1)], reach=20), np.abs(dz) - 5)
        )
        c.bone(np.maximum(spine, c.z + 60), 1.3, s + 51, 3.0)
        canal = np.maximum(np.hypot(c.x / 1.25, c.y - 37) - 9.5, c.z + 40)
        c.paint(canal, "water")
        c.paint(np.maximum(np.hypot(c.x / 1.3, c.y - 37) - 5, c.z + 40), "white matter")

        # Brain: fluid, folded cortex, white matter, deep nuclei, ventricles.
        c.paint(cavity + 0.8, "water")
        depth = -(cavity + np.float32(fluid))
        cerebellum = (c.z < -6 - 0.2 * (c.y - 40)) & (c.y > 10)
        ridges = c.noise(s + 60, fold, 1) + 0.35 * c.noise(s + 61, fold * 0.55, 1)
        sulcus = np.abs(ridges) * (0.30 * fold) + np.maximum(0, depth - 17) * 0.8  # folds end at a depth
        folia = np.abs(c.noise(s + 62, 9, 1, (2.2, 1.4, 0.55))) * 3.4 + np.maximum(0, depth - 14) * 0.5 + 0.5
        sulcus = np.where(cerebellum, folia, sulcus)
        falx = np.abs(c.x + 1.2 * np.sin(c.y * 0.05)) + np.maximum(0, 18 - c.z) * 0.5
        tent = np.abs(c.z + 6 + 0.2 * (c.y - 40)) + np.maximum(0, 10 - c.y)
        cleft = np.minimum(np.minimum(falx, tent), sulcus)
        ribbon = np.minimum(depth, cleft - 0.5)
        grain = c.noise(s + 63, 5, 2) * np.float32(0.004)
        c.paint((-np.minimum(depth, cleft - 0.75)), "grey matter", grain)
        c.paint((3.4 - ribbon), "white matter", grain)
        nuclei = [
            (d * x, y, z, a, b, e)
            for d in (-1, 1)
            for x, y, z, a, b, e in ((11, 4, 12, 8, 14, 9), (24, -8, 12, 7, 18, 11), (13, -22, 20, 4.5, 10, 6))
        ]
        c.paint(c.ellipsoids(nuclei, reach=15) + c.noise(s + 64, 12), "grey matter", grain)
        stem = np.maximum(c.ellipsoids([(0, 14, -34, 14, 12, 40)], reach=40), cavity + 2)
        c.paint(stem, "white matter", grain)
        c.paint(np.maximum(falx - 0.6, -depth + 1), "cartilage", thickness=1.2)
        fluidic = np.minimum(
            c.tubes(ventricles, reach=12),
            c.ellipsoids([(0, 2, 10, 2.2 * horn, 12, 9), (0, 30, -30, 6, 5, 9)], reach=12),
        )
        c.paint(fluidic + c.noise(s + 65, 9) * np.float32(0.5), "water")
        c.paint(
            np.maximum(c.ellipsoids([(d * 26, 38, 20, 2.6, 4, 2.6) for d in (-1, 1)], reach=6), cavity), "cartilage"
        )
        spot = np.maximum(c.ellipsoids([lesion], reach=15) + 1.5 * c.noise(s + 66, 8), cavity + 6)
        c.paint(spot, "blood" if bleed else "lesion")
        if metal:
            c.paint(c.tubes(plate, reach=6), "titanium")

    return paint


def _thorax(rng: np.random.Generator, metal: bool) -> _Painter:
    """Chest from the shoulders to the kidneys: ribs, spine, sternum, shoulder blades, lungs, heart, upper belly."""
    s = int(rng.integers(1 << 20))
    wide, deep = rng.uniform(0.90, 1.02), rng.uniform(0.90, 1.08)
    fat = rng.uniform(7, 20)
    enhanced = "enhanced blood" if rng.random() < 0.5 else "blood"
    dome = np.array([rng.uniform(-34, -18), rng.uniform(-46, -30)])  # right and left, mm
    sway = rng.uniform(-5, 5)
    heart_turn = _turn(rng, 0.25)
    big = rng.uniform(0.9, 1.15)
    nodules = [
        [d * rng.uniform(45, 90), rng.uniform(-30, 50), rng.uniform(0, 90), *np.repeat(rng.uniform(4, 10), 3)]
        for d in (-1, 1)
        for _ in range(2)
    ]

    def half(z: Any) -> tuple[Any, Any]:
        """Half width and half depth of the rib cage at a height."""
        t = np.sqrt(np.maximum(1 - ((z + 55) / 222) ** 2, 0.03))
        return 128 * t, (88 + 0 * z) * t**0.8

    def spine_y(z: Any) -> Any:
        return 52 + 12 * np.cos((z - 30) / 95)

    ribs, cartilage = [], []
    for k in range(12):
        z0 = 142 - 21.5 * k + rng.uniform(-1.5, 1.5)
        drop = (26 + 5.2 * k) * rng.uniform(0.9, 1.1)
        last = (138 if k < 7 else 122 - 8 * (k - 7)) if k < 10 else 88 - 18 * (k - 10)
        for d in (-1, 1):
            t = np.linspace(0, 1, 18)
            angle = np.radians(14 + (last - 14) * t)
            z = z0 + 5 * np.sin(np.pi * t) - drop * t**1.2
            a, b = half(z)
            path = np.stack([d * a * np.sin(angle), b * np.cos(angle) + 2, z], 1)
            path[0] = [d * 16, spine_y(z0) + 6, z0]
            path[1] = (path[0] + path[2]) / 2 + [0, 4, 0]
            ribs.append(_chain(path, np.linspace(4.6, 4.0, 18), (0, 0, 1), 1.55))
            if k < 7:
                end = [d * 14, -float(half(np.array(z[-1] + 22))[1]) - 3, min(z[-1] + 14 + 2.5 * k, 118 - 17 * k)]
                halfway = (path[-1] + end) / 2 + [0, -5, -6]
                cartilage.append(_chain(_curve([path[-1], halfway, end], 4), 4.4, (0, 0, 1), 1.5))
    rib_tubes, cartilage_tubes = np.vstack(ribs), np.vstack(cartilage)
    front = [(0, -float(half(np.array(z))[1]) - 5, z) for z in (122.0, 95.0, 60.0, 20.0, -8.0)]
    sternum = _chain(front, [5.5, 5, 4.6, 4.8, 3.0], (1, 0, 0), 3.4)
    collars = np.vstack(
        [_chain(_curve([(d * 14, -52, 128), (d * 60, -42, 140), (d * 112, 12, 140)], 6), 5.0) for d in (-1, 1)]
    )

    trachea = _chain(_curve([(0, -6, 200), (0, 4, 130), (1, 14, 66)], 5), 8.5)
    main = np.vstack([_chain([(1, 14, 66), (d * 24, 16, 46), (d * 38, 16, 34)], [7, 6, 5.4]) for d in (-1, 1)])
    aorta = _chain(
        _curve(
            [(4, -18, -8), (-8, -26, 40), (2, -12, 78), (16, 20, 80), (22, 40, 52), (20, 36, -60), (10, 34, -200)], 6
        ),
        rng.uniform(11.5, 14),
    )
    cava = _chain([(-22, -14, 150), (-24, -10, 60), (-22, 0, 0), (-20, 10, -60), (-20, 22, -200)], 9.5)
    pulmonary = np.vstack(
        [
            _chain(_curve([(10, -40, 16), (14, -18, 46), (0, 0, 48), (-32, 8, 34)], 5), 9),
            _chain([(14, -18, 46), (34, 8, 44)], 8.5),
        ]
    )

    def in_lung(p: Point, d: int) -> bool:
        a, b = half(p[2])
        low = (dome[0] if d < 0 else dome[1]) - 0.010 * ((p[0] - d * 62) ** 2 + p[1] ** 2)
        return bool(
            p[0] * d > 26 + (14 if d > 0 and p[2] < 20 and p[1] < 10 else 0)
            and math.hypot(p[0] / (a - 10), p[1] / (b - 10)) < 1
            and p[2] > low + 6
        )

    trees, airways = [], []
    for d in (-1, 1):
        for heading in ((0.5 * d, -0.2, 0.8), (0.9 * d, -0.4, 0.1), (0.6 * d, 0.3, -0.8), (0.6 * d, 0.8, 0.2)):
            trees.append(_tree(rng, (d * 34, rng.uniform(4, 18), 34), heading, 4.6, 27, 7, partial(in_lung, d=d), 0.35))
            airways.append(_tree(rng, (d * 36, 16, 36), heading, 3.6, 24, 4, partial(in_lung, d=d), 0.8))
    vessels, bronchi = np.vstack(trees), np.vstack([trachea, main, *airways])
    liver_vessels = _tree(
        rng, (-30, 0, -115), (-1, 0, 0.3), 5, 26, 6, lambda p: bool(((p - (-58, 0, -98)) ** 2).sum() < 62**2), 0.7
    )
    walls = bronchi.copy()
    walls[:, 6:8] += 1.2
    lead = _chain(_curve([(60, -82, 100), (20, -30, 110), (-22, -8, 70), (0, -40, -40)], 6), 1.3)

    def paint(c: _Canvas) -> None:
        c.warp(s + 10, 130, 4.0)
        c.x, c.y = c.x / np.float32(wide), c.y / np.float32(deep)
        c._bend += 25
        c.x = c.x - np.float32(sway) * np.sin(c.z / 80)
        z = c.z
        side = np.abs(c.x)
        a, b = half(z)
        a, b = a.astype(np.float32), b.astype(np.float32)
        cage = ((np.hypot(c.x / a, c.y / b) - 1) * np.sqrt(a * b)).astype(np.float32)

        # Outline: a rounded box that narrows to the neck and keeps a wall around the cage.
        shoulder = _step((z - 132) / 12)
        w, h = 158 - 34 * shoulder, 112 - 22 * shoulder
        box = (((side / w) ** 2.5 + (np.abs(c.y) / h) ** 2.5) ** np.float32(0.4) - 1) * 105
        groove = 7 * np.exp(-((c.x / 14) ** 2)) * (c.y > 0)
        outline = (box + groove + 2.0 * c.noise(s, 90)).astype(np.float32)
        c.paint(outline, "skin")
        c.paint(outline + 2.0, "fat", c.noise(s + 1, 10, 2) * np.float32(0.025))
        layer = (fat * (1 + 0.3 * c.noise(s + 2, 80) + 0.35 * (c.y < -20) * (z < 40))).astype(np.float32)
        c.paint(outline + 2 + layer, "muscle", c.noise(s + 3, 9, 2, (1, 1, 2)) * np.float32(0.03))
        planes = np.abs(c.noise(s + 4, 34, 1, (1.3, 1.0, 2.6))) * 15 - 1.6
        c.paint(np.maximum(np.maximum(planes, outline + layer + 6), -(cage - 8)), "fat")

        # What the cage holds: fat, belly, lungs.
        c.paint(cage + 6, "fat", c.noise(s + 5, 14, 2) * np.float32(0.03))
        d_right, d_left = float(dome[0]), float(dome[1])
        blend = _step(c.x / 10)
        bowl = (d_right + (d_left - d_right) * blend - 0.010 * ((side - 62) ** 2 + c.y**2)).astype(np.float32)
        under = z - bowl  # negative below the diaphragm
        belly = np.maximum(cage + 7, under + 3).astype(np.float32)
        c.paint(np.maximum(np.maximum(cage + 5, under), -(under + 3.5)), "muscle", thickness=3.5)
        texture = c.noise(s + 6, 8, 3) * np.float32(0.018)
        liver = c.ellipsoids([(-58, -4, -95, 88, 84, 66), (20, -38, -92, 62, 42, 34)])
        c.paint(
            np.maximum(liver + 3 * c.noise(s + 7, 30), belly),
            "organ",
            texture,
        )
        c.paint(np.maximum(c.tubes(liver_vessels), belly), enhanced)
        spleen = np.maximum(c.ellipsoids([(88, 42, -92, 27, 42, 48)]), belly)
        c.paint(spleen, "organ", texture)
        stomach = np.maximum(c.ellipsoids([(58, -22, -96, 40, 42, 44)], reach=30) + 2 * c.noise(s + 8, 24), belly + 2)
        stomach = np.maximum(stomach, -spleen).astype(np.float32)
        c.paint(stomach, "muscle")
        c.paint(stomach + 4, "water", c.noise(s + 9, 10, 2) * np.float32(0.05))
        c.paint(np.maximum(stomach + 4, c.y + 26), "air")
        kidneys = c.ellipsoids([(-52, 48, -160, 26, 24, 50), (52, 48, -152, 26, 24, 50)], reach=20)
        c.paint(np.maximum(kidneys, belly), "organ", texture)
        c.paint(
            np.maximum(c.ellipsoids([(-42, 44, -160, 12, 10, 26), (42, 44, -152, 12, 10, 26)], reach=20), belly), "fat"
        )
        bowel = np.abs(c.noise(s + 11, 34)) * 15 - 9
        c.paint(np.maximum(np.maximum(bowel, belly + 6), np.maximum(z + 120, c.y - 20)), "muscle")
        c.paint(np.maximum(np.maximum(bowel + 4, belly + 6), np.maximum(z + 124, c.y - 10 + 30)), "air")

        # Lungs: between cage, diaphragm and mediastinum.
        hollow = (24 + 14 * np.exp(-(((z - 30) / 40) ** 2)) * np.exp(-(((c.y - 10) / 30) ** 2))).astype(np.float32)
        middle = (hollow + 4 * c.noise(s + 12, 50) - side).astype(np.float32)
        heart = c.ellipsoids([(24 * big, -30, -26, 62 * big, 46 * big, 50 * big)], turn=heart_turn)
        lung = np.maximum(np.maximum(cage + 7, -under), middle)
        lung = np.maximum(lung, 5 - heart)
        back = np.hypot(c.x, c.y - spine_y(z))
        lung = np.maximum(lung, 27 - back).astype(np.float32)
        gravity = (0.0022 * c.y).astype(np.float32)
        parenchyma = c.noise(s + 13, 16, 3) * np.float32(0.14) + gravity
        c.paint(lung, "lung", parenchyma)
        fissure = np.abs(z - 0.9 * c.y - 6 + 4 * c.noise(s + 14, 70)) * 0.74 - 0.8
        c.paint(np.maximum(fissure, lung + 1), "muscle", thickness=0.7)
        c.paint(c.tubes(walls), "cartilage")
        c.paint(c.tubes(vessels), enhanced)
        c.paint(c.tubes(bronchi), "air")
        spots = c.ellipsoids(nodules, reach=12) + c.noise(s + 15, 9, 2) * np.float32(1.3)
        c.paint(np.maximum(spots, lung + 2), "lesion", c.noise(s + 16, 4) * np.float32(0.05))

        # Heart and great vessels.
        c.paint(np.maximum(heart - 4, -under), "fat")
        c.paint(np.maximum(heart, -under), "muscle", c.noise(s + 17, 8, 2) * np.float32(0.015))
        rooms = [
            (38, -22, -34, 27, 21, 30),
            (8, -48, -32, 30, 17, 32),
            (22, 2, -8, 28, 17, 22),
            (-16, -20, -18, 19, 22, 26),
        ]
        chambers = c.ellipsoids([[big * v for v in room] for room in rooms], reach=30, turn=heart_turn)
        c.paint(np.maximum(chambers + 1.5 * c.noise(s + 18, 14), np.maximum(heart + 3, -under)), enhanced)
        big_vessels = np.minimum(np.minimum(c.tubes(aorta, 20), c.tubes(cava, 20)), c.tubes(pulmonary, 20))
        c.paint(big_vessels - 1.6, "muscle")
        c.paint(big_vessels, enhanced)
        gullet = np.hypot((c.x - 8) / 1.3, c.y - 30) - 6
        c.paint(np.maximum(gullet, -60 - z), "muscle")
        c.paint(c.tubes(bronchi[: len(trachea) + len(main)], 12), "air")

        # Bones.
        axis = c.y - spine_y(z)
        dz = np.mod(z + 4, 25.5) - 12.75
        radial = np.hypot(c.x / 1.22, axis) - (15.0 - 1.6 * np.cos(np.pi * dz / 10.2)).astype(np.float32)
        c.paint((radial - 0.5), "cartilage")
        vertebrae = _smooth_max(radial, np.abs(dz) - 10.4 + 0.5 * c.noise(s + 27, 12), 5)
        c.bone(vertebrae, 1.3, s + 20, 5.0, 1.8)
        arch = np.abs(np.hypot(c.x / 1.1, axis - 23) - 11.5) - 3.2
        spinous = np.maximum(np.maximum(side - 3.2, np.abs(axis - 45) - 13), np.abs(dz + 0.35 * (axis - 40)) - 6)
        wings = np.maximum(np.maximum(np.abs(axis - 20 - 0.2 * side) - 4.6, side - 32), np.abs(dz) - 5)
        posterior = _smooth_min(np.maximum(arch, np.abs(dz) - 8), _smooth_min(spinous, wings, 4), 3)
        posterior = np.maximum(posterior, 9.0 - np.hypot(c.x, axis - 23)).astype(np.float32)
        c.bone(posterior, 1.5, s + 21, 4.0)
        canal = (np.hypot(c.x, axis - 23) - 8.5).astype(np.float32)
        c.paint(canal, "fat")
        c.paint(canal + 1.5, "water")
        c.paint((np.hypot(c.x / 1.2, axis - 23) - 4.5), "white matter")
        c.paint(c.tubes(cartilage_tubes, 12), "cartilage", c.noise(s + 22, 6, 2) * np.float32(0.04))
        c.bone(c.tubes(rib_tubes, 12), 1.5, s + 23, 4.0)
        c.bone(c.tubes(sternum, 20), 1.3, s + 24, 4.0)
        c.bone(c.tubes(collars, 12), 1.8, s + 25, 4.0)
        blade = np.abs(cage - 17 - 2.5 * np.sin(z / 24)) - 2.6
        spread = np.maximum(np.abs(side - 86 + 0.16 * (z - 60)) - 30 * (1 - (104 - z) / 150), np.abs(z - 62) - 46)
        blade = np.maximum(np.maximum(blade, spread), 36 - c.y).astype(np.float32)
        c.bone(blade, 1.5, s + 26, 4.0)
        if metal:
            c.paint(c.tubes(lead, 6), "titanium")
            c.paint(c.ellipsoids([(64, -92, 104, 20, 4.5, 20)], reach=10), "titanium")

    return paint


def _limb(rng: np.random.Generator, metal: bool) -> _Painter:
    """Thigh, knee or lower leg: long bones with cortex and trabeculae, muscles in their fasciae, fat, skin."""
    s = int(rng.integers(1 << 20))
    pair = rng.random() < 0.5  # shin and calf bone, or the thigh's one
    knee = rng.uniform(-10, 40)  # height of the wide end: mostly a shaft on one side, an epiphysis on the other
    up = 1.0 if pair else -1.0  # a femur widens downwards, a tibia upwards
    girth = np.array([rng.uniform(46, 56), rng.uniform(48, 58)]) * (0.92 if pair else 1.0)
    fat = rng.uniform(3, 10)
    tilt = rng.uniform(-0.08, 0.08, 2)
    place = np.array([8.0, -14.0]) if pair else np.array([rng.uniform(-5, 5), rng.uniform(-8, 2)])
    shaft = rng.uniform(11.5, 13.5)
    cortex = rng.uniform(3.5, 5.5)
    groups = 13
    ring = rng.uniform(0, 2 * np.pi) + np.arange(groups) * 2.4 + rng.normal(scale=0.2, size=groups)
    away = np.where(np.arange(groups) < 4, 20, 37) + rng.uniform(-5, 5, groups)
    bellies = np.stack([place[0] + away * np.cos(ring), place[1] + 6 + away * np.sin(ring)], 1)
    lean = rng.normal(scale=0.07, size=(groups, 2))
    tone = rng.normal(scale=0.018, size=groups)
    tracks = [
        _chain(_curve([(x + rng.normal(scale=4), y + rng.normal(scale=4), z) for z in (-90, -30, 30, 90)], 5), r)
        for x, y, r in ((place[0] - 16, place[1] + 20, 3.2), (place[0] - 11, place[1] + 24, 2.4), (18, 30, 1.6))
    ]
    veins = []
    for _ in range(4):
        bearing = rng.uniform(0, 2 * np.pi) + rng.normal(scale=0.15, size=4)
        reach = 0.97 * (girth - 5)
        under_skin = np.stack([reach[0] * np.cos(bearing), reach[1] * np.sin(bearing), [-90, -30, 30, 90]], 1)
        veins.append(_chain(_curve(under_skin, 5), 1.5))
    vein_tubes = np.vstack(veins)
    contrast = "enhanced blood" if rng.random() < 0.5 else "blood"
    cyst = [place[0] + rng.uniform(-8, 8), place[1] + rng.uniform(-8, 8), up * (knee + 14), *rng.uniform(4, 8, 3)]
    nail = _chain([(*place, -90), (*place, 90)], 4.5)
    screws = np.vstack([_chain([(place[0] - 30, place[1], z), (place[0] + 30, place[1], z)], 2.2) for z in (-42, -22)])

    def paint(c: _Canvas) -> None:
        c.warp(s + 10, 60, 1.2)
        x = c.x + np.float32(tilt[0]) * c.z
        y = c.y + np.float32(tilt[1]) * c.z
        z = c.z
        swell = (1 + 0.05 * np.sin(z / 40 + s) + 0.0006 * z).astype(np.float32)
        g0, g1 = np.float32(girth[0]) * swell, np.float32(girth[1]) * swell
        outline = ((np.hypot(x / g0, y / g1) - 1) * np.float32(girth.mean()) + 1.6 * c.noise(s, 45)).astype(np.float32)
        c.paint(outline, "skin")
        c.paint(outline + 1.6, "fat", c.noise(s + 1, 5, 3) * np.float32(0.03))
        strands = np.abs(c.noise(s + 2, 9, 1, (1, 1, 1.6))) * 4 - 0.25
        c.paint(np.maximum(strands, outline + 2.5), "muscle", thickness=0.7)
        c.paint(c.tubes(vein_tubes), "blood")

        # Muscles: cells around their bellies, fasciae of fat between.
        layer = (fat * (1 + 0.35 * c.noise(s + 3, 40))).astype(np.float32)
        near = np.full(z.shape, 1e9, np.float32)
        second = near.copy()
        shade = np.zeros(z.shape, np.float32)
        for (bx, by), (lx, ly), dark in zip(bellies, lean, tone, strict=True):
            d = np.hypot(x - np.float32(bx) - np.float32(lx) * z, y - np.float32(by) - np.float32(ly) * z)
            first = d < near
            second = np.where(first, near, np.minimum(second, d))
            shade = np.where(first, np.float32(dark), shade)
            near = np.minimum(near, d)
        gap = (second - near) * np.float32(0.5)
        fibres = c.noise(s + 4, 2.6, 3, (1, 1, 5)) * np.float32(0.03) + shade
        deep = outline + 1.6 + layer
        c.paint(deep, "fat")
        c.paint(np.maximum(deep, 0.8 + 0.4 * c.noise(s + 5, 18) - gap), "muscle", fibres)
        marbling = np.abs(c.noise(s + 6, 8, 2, (1, 1, 4))) * 3 - 0.16
        c.paint(np.maximum(marbling, deep + 2), "fat", thickness=0.45)
        for track in tracks:
            tube = c.tubes(track, 8)
            c.paint(tube - 2.2, "fat")
            c.paint(tube - 0.6, "muscle")
            c.paint(tube, contrast)

        # Bones: a shaft that flares to an epiphysis, then the joint.
        along = np.float32(up) * z - np.float32(knee)  # > 0 towards the joint

        def long_bone(px: float, py: float, radius: float, flare: float, thick: float, end: float, key: int) -> Array:
            dx, dy = x - np.float32(px), y - np.float32(py)
            rise = _step((along - 4) / 9)
            r = radius * (1 + flare * rise)
            triangle = 1 + 0.10 * np.cos(3 * np.arctan2(dy, dx + 1e-6) + 1.0) * (1 - rise)
            d = (np.hypot(dx / (1 + 0.3 * rise), dy) - r * triangle).astype(np.float32)
            d = d + (c.noise(key, 14, 2) * (0.35 + 0.7 * rise)).astype(np.float32)
            d = _smooth_max(d, along - np.float32(end), 9)
            wall = (thick * (1 - 0.82 * rise)).astype(np.float32)
            c.paint(d - 2.0, "cartilage")
            c.paint(d, "cortical bone", c.noise(key + 1, 3, 2, (1, 1, 4)) * np.float32(0.02))
            marrow = d + wall
            c.paint(marrow, "fat", c.noise(key + 2, 5, 2) * np.float32(0.04))
            # Trabeculae fill the end and thin out into the shaft.
            struts = c.noise(key + 3, 2.4, 3, (1, 1, 2.2)) * np.float32(0.22) + c.noise(key + 4, 12) * np.float32(0.08)
            reach = (np.float32(-2.0) - along * np.float32(0.45) + 3.0 * c.noise(key + 5, 9)).astype(np.float32)
            c.paint(
                np.maximum(marrow, reach),
                "trabecular bone",
                struts + np.minimum(0.012 * along, 0.15).astype(np.float32),
            )
            # The scar of the growth plate.
            scar = np.abs(along - np.float32(end - 13) + 1.5 * c.noise(key + 6, 14)) - 0.5
            c.paint(np.maximum(scar, marrow), "cortical bone", thickness=0.7)
            return d

        if pair:
            tibia = long_bone(float(place[0]), float(place[1]), shaft, 0.85, cortex, 27, s + 20)
            long_bone(float(place[0]) - 34, float(place[1]) + 22, 6.0, 0.5, 2.4, 12, s + 40)
            bone = tibia
        else:
            bone = long_bone(float(place[0]), float(place[1]), shaft * 1.05, 0.95, cortex * 1.1, 34, s + 20)
            cap = c.ellipsoids([(place[0] + 2, place[1] - 36, up * (knee + 14), 18, 9, 19)], reach=20)
            c.bone(np.maximum(cap + 0.5 * c.noise(s + 50, 10), outline + 3), 1.4, s + 51, 2.4)
        # The bone beyond the joint.
        gapped = along - np.float32(27 if pair else 34) - 6
        head = np.hypot((x - np.float32(place[0])) / 1.35, y - np.float32(place[1])) - 21 + 0.05 * np.maximum(gapped, 0)
        beyond = -_smooth_min(-head.astype(np.float32), gapped + 1.2 * c.noise(s + 52, 18), 8)
        beyond = beyond.astype(np.float32)
        c.paint(np.maximum(beyond - 2.2, outline + 4), "cartilage")
        c.bone(beyond, 1.5, s + 53, 2.4, 2.0)
        lump = np.maximum(c.ellipsoids([cyst], reach=10), bone + 2.5)
        c.paint(lump - 0.8, "cortical bone", thickness=0.8)
        c.paint(lump, "lesion")
        if metal:
            c.paint(np.minimum(c.tubes(nail, 8), c.tubes(screws, 6)), "titanium")

    return paint


def _vessels(rng: np.random.Generator, metal: bool) -> _Painter:
    """An organ whose arteries and veins hold contrast agent, with an aneurysm, a narrowing and plaques."""
    s = int(rng.integers(1 << 20))
    radii = rng.uniform(20, 25, 3) * (1, 0.9, 1.05)
    turn = _turn(rng, 0.5)

    def inside(p: Point) -> bool:
        return bool((((turn @ p) / (radii - 2.0)) ** 2).sum() < 1)

    hilum = turn.T @ np.array([-radii[0] * 0.95, 0, 0])
    inwards = -hilum / np.linalg.norm(hilum)
    trees = {}
    for name, radius, generations, shift in (("artery", 1.9, 11, (0, -2.5, 2)), ("vein", 2.5, 9, (0, 3, -2))):
        root = hilum * 0.86 + np.array(shift)
        crown = _tree(rng, root, inwards, radius, 12.5, generations, inside, 0.10)
        trunk = _chain(
            _curve([hilum * 1.6 + np.array(shift) * 2, hilum * 1.2 + np.array(shift) * 1.5, root], 5), radius * 1.08
        )
        trees[name] = np.vstack([trunk, crown])
    artery, vein = trees["artery"], trees["vein"]
    wall = artery[artery[:, 6] > 0.6].copy()
    wall[:, 6:8] += 0.35
    sick = rng.choice(len(artery) // 3, 3, replace=False)
    bulge = artery[sick[0], 3:6]
    narrow = artery.copy()
    narrow[sick[1], 6:8] *= 0.5
    size = rng.uniform(1.8, 3.2)
    plaques = [
        [*(artery[k, 3:6] + rng.normal(size=3) * artery[k, 6] * 0.7), *rng.uniform(0.35, 0.8, 3)]
        for k in rng.choice(len(artery) // 3, 6)
    ]
    lesion = [*(turn.T @ (rng.uniform(-0.45, 0.45, 3) * radii)), *rng.uniform(2.5, 4.5, 3)]
    cyst = [*(turn.T @ (rng.uniform(-0.5, 0.5, 3) * radii)), *rng.uniform(1.5, 3.5, 3)]

    def paint(c: _Canvas) -> None:
        # The piece of tissue that holds the organ: fat with strands, in a round vial's outline.
        c.warp(s + 10, 22, 0.6)
        block = (np.hypot(c.x, c.y) - 27.5 + 0.8 * c.noise(s, 20)).astype(np.float32)
        block = _smooth_max(block, np.abs(c.z) - 28.5, 9)
        c.paint(block, "muscle")
        c.paint(block + 1.0, "fat", c.noise(s + 1, 4, 3) * np.float32(0.03))
        strands = np.abs(c.noise(s + 2, 9, 2)) * 3 - 0.22
        c.paint(np.maximum(strands, block + 1.4), "muscle", thickness=0.5)
        organ = c.ellipsoids([(0, 0, 0, *radii)], turn=turn) + c.noise(s + 3, 11, 2) * np.float32(0.9)
        dent = c.ellipsoids([(*(hilum * 0.98), 5, 6, 7)], reach=20)
        organ = -_smooth_min(-organ, dent, 3.0)
        zone = np.clip((organ + 5.5 + c.noise(s + 4, 5)) * np.float32(0.5), 0, 1) * np.float32(
            0.035
        )  # a brighter cortex
        texture = c.noise(s + 5, 2.4, 3) * np.float32(0.02) + zone - np.float32(0.015)
        c.paint(organ - 0.4, "muscle")
        c.paint(organ, "organ", texture)
        c.paint(
            np.maximum(c.ellipsoids([lesion], reach=8) + c.noise(s + 6, 3, 2) * np.float32(0.7), organ + 1),
            "lesion",
            c.noise(s + 7, 1.5, 2) * np.float32(0.03),
        )
        c.paint(np.maximum(c.ellipsoids([cyst], reach=8), organ + 0.5), "water")
        c.paint(c.tubes(vein), "blood")
        c.paint(c.tubes(wall), "muscle")
        c.paint(c.tubes(narrow), "enhanced blood")
        c.paint(c.ellipsoids([(*bulge, size, size * 0.85, size)], reach=5), "enhanced blood")
        c.paint(c.ellipsoids(plaques, reach=2), "cortical bone")

    return paint


def _shell(rng: np.random.Generator, metal: bool) -> _Painter:
    """A nut: furrowed shell with a seam and pores, papery septa, a kernel of folded lobes, air between."""
    s = int(rng.integers(1 << 20))
    hull = np.array([rng.uniform(12.3, 14.2), rng.uniform(11.8, 13.6), rng.uniform(13.6, 15.8)])
    wall = rng.uniform(1.2, 1.9)
    rough = rng.uniform(0.35, 0.75)
    fold = rng.uniform(5.0, 6.5)
    gap = rng.uniform(0.6, 1.6)
    shrink = rng.uniform(0.8, 2.2)
    turn = _turn(rng, 0.6)
    tip = rng.uniform(1.0, 2.2)

    def paint(c: _Canvas) -> None:
        m = turn.astype(np.float32)
        c.x, c.y, c.z = (m[k, 0] * c.x + m[k, 1] * c.y + m[k, 2] * c.z for k in range(3))
        c._bend += 60
        c.warp(s + 10, 16, 0.5)
        x, y, z = c.x, c.y, c.z
        point = (tip * np.exp(-(x**2 + y**2) / 14) * (z > 0)).astype(np.float32)
        egg = (1 + 0.008 * z).astype(np.float32)  # blunter below
        body = c.ellipsoids([(0, 0, 0, *hull)])
        body = body + (egg - 1) * 10 - point
        furrows = 1 - np.abs(c.noise(s, 6.5, 1, (1, 1, 1.8))) * np.float32(1.1)
        seam = np.exp(-((y / 1.3) ** 2)) * 0.9
        relief = (rough * furrows * 0.8 + 0.2 * c.noise(s + 1, 2.2, 2) * rough + seam).astype(np.float32)
        outer = body - relief + 0.5
        thick = (wall * (1 + 0.18 * c.noise(s + 2, 7)) + 0.9 * seam).astype(np.float32)
        hollow = body + thick + 0.3 * c.noise(s + 3, 3.2, 2)
        grain = c.noise(s + 4, 0.9, 2) * np.float32(0.04)
        shell = np.maximum(outer, -hollow).astype(np.float32)
        c.paint(shell, "shell", grain)
        c.paint(np.maximum((0.9 - c.noise(s + 5, 1.5)) * 0.6 + 0.35, shell + 0.25), "air")
        slit = np.maximum(np.abs(y + 0.2 * c.noise(s + 6, 6)) - 0.12, shell)
        c.paint(slit.astype(np.float32), "air", thickness=0.24)

        # Septa: a papery wall in the plane of the seam, and one across its lower half.
        paper = np.abs(x + 0.9 * c.noise(s + 7, 7)) - 0.28
        inside = hollow
        c.paint(
            np.maximum(paper, np.maximum(inside, z - 3 + 2 * c.noise(s + 8, 6))).astype(np.float32),
            "shell",
            thickness=0.55,
        )
        across = np.abs(y + 0.9 * c.noise(s + 9, 7)) - 0.22
        c.paint(np.maximum(across, inside), "shell", thickness=0.45)

        # Kernel: two halves beside the seam's plane, folded from outside, shrunk off the shell.
        bound = hollow + np.float32(shrink) * (0.55 + 0.35 * c.noise(s + 20, 8)).astype(np.float32)
        centre = np.abs(y) - np.float32(gap) - 0.5 * c.noise(s + 21, 6)
        cross = np.abs(x + 0.6 * c.noise(s + 22, 8)) - np.float32(gap) * 0.8
        lobes = np.maximum(bound, -centre)
        core = 3.4 - np.hypot(x, y) * (1 - 0.03 * z) - 1.2 * c.noise(s + 23, 5)  # the hollow in the middle
        lobes = np.maximum(lobes, core)
        lobes = np.maximum(lobes, -(cross + 3.0 * (z > 2)))  # the lobes of a half are joined above
        depth = -bound
        folds = np.abs(c.noise(s + 24, fold) + 0.3 * c.noise(s + 25, fold * 0.5)) * np.float32(fold * 0.28)
        clefts = 0.45 - folds - np.maximum(0, depth - 4.0) * 0.3
        kernel = -_smooth_min(-lobes.astype(np.float32), -clefts.astype(np.float32), 0.8)
        kernel = kernel.astype(np.float32)
        skin = c.noise(s + 26, 1.6, 2) * np.float32(0.03) + c.noise(s + 27, 6) * np.float32(0.03)
        c.paint(kernel, "kernel", skin + np.float32(0.06))
        c.paint(kernel + 0.35, "kernel", skin)
        c.paint(np.maximum((1.0 - c.noise(s + 28, 1.4)) * 0.5 + 0.4, kernel + 0.5), "air")

    return paint


def _foam(rng: np.random.Generator, metal: bool) -> _Painter:
    """A plug of plastic foam: bubbles of all sizes, closed or burst into struts, and a few grains of filler."""
    s = int(rng.integers(1 << 20))
    is_open = rng.random() < 0.5
    radius, height = rng.uniform(8.2, 9.2), 9.4
    largest = rng.uniform(1.1, 1.9)
    squeeze = rng.uniform(0.8, 1.25)
    # Bubbles are placed large ones first. They keep a film between them, or overlap, which leaves struts.
    centers, radii = np.zeros((0, 3)), np.zeros(0)
    for step in range(12):
        size = largest * 0.82**step
        tries = rng.uniform(-1, 1, (4000 + 1500 * step, 3)) * (radius, radius, height)
        sizes = size * rng.uniform(0.9, 1.1, len(tries))
        found, count = np.vstack([centers, tries]), len(radii)
        found_radii = np.concatenate([radii, sizes])
        count = _pack(found, found_radii, count, *((0.68, 0.0) if is_open else (1.0, 0.09)))
        centers, radii = found[:count], found_radii[:count]
    stretch = np.stack([radii, radii, radii * squeeze], 1)
    bubbles = np.hstack([centers, stretch])
    grains = np.hstack([rng.uniform(-0.85, 0.85, (45, 3)) * (radius, radius, height), rng.uniform(0.10, 0.38, (45, 3))])
    grains = grains[np.hypot(grains[:, 0], grains[:, 1]) < radius - 0.5]

    def paint(c: _Canvas) -> None:
        c.warp(s + 10, 7, 0.12)
        plug = (np.hypot(c.x, c.y) - np.float32(radius) + 0.12 * c.noise(s, 3, 2)).astype(np.float32)
        plug = np.maximum(plug, np.abs(c.z) - np.float32(height))
        c.paint(plug, "plastic", c.noise(s + 1, 1.2, 3) * np.float32(0.02))
        c.paint(np.maximum(c.ellipsoids(grains, reach=1.0), plug + 0.05), "filler")
        c.paint(np.maximum(c.ellipsoids(bubbles, reach=1.0), plug + (0 if is_open else 0.25)), "air")

    return paint


_MODELS: dict[str, Callable[[np.random.Generator, bool], _Painter]] = {
    "head": _head,
    "thorax": _thorax,
    "limb": _limb,
    "vessels": _vessels,
    "shell": _shell,
    "foam": _foam,
}
