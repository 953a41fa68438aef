"""Multi-coil k-space of synthetic objects: heads to train and to try on, phantoms to judge with.

A head is an anatomy whose tissues have the signal of an MRI sequence, with a soft texture, a smooth phase, and coils
that are loops of wire around it (Biot and Savart). A phantom is another family in every respect: other shapes and
contrasts, a polynomial phase, Gaussian coils. Both are sampled along whole readout lines, with complex white noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
import tomli_w
from numpy.typing import NDArray
from scipy import ndimage

from napari_recon.learning import anatomy, phantoms
from napari_recon.learning.simulate import expect_new, new_folder
from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import KSpaceScan, to_kspace
from napari_recon.scans.recording import KSpaceRecording
from napari_recon.scans.sampling import sampling_mask

Complex = NDArray[np.complex64]
Sampling = Literal["poisson", "gaussian"]

KINDS = (*anatomy.KINDS, *phantoms.KINDS)
"""What can be scanned: anatomies (for training and trying) and phantoms (for judging)."""

# Signal of tissues in common sequences, in units of the brightest; what is not named gives none.
WEIGHTINGS: dict[str, dict[str, float]] = {
    "T1": {
        "skin": 0.55,
        "fat": 1.0,
        "muscle": 0.45,
        "water": 0.14,
        "cortical bone": 0.03,
        "trabecular bone": 0.65,
        "cartilage": 0.40,
        "grey matter": 0.47,
        "white matter": 0.70,
        "blood": 0.85,
        "lesion": 0.32,
    },
    "T2": {
        "skin": 0.35,
        "fat": 0.60,
        "muscle": 0.20,
        "water": 1.0,
        "cortical bone": 0.02,
        "trabecular bone": 0.40,
        "cartilage": 0.25,
        "grey matter": 0.52,
        "white matter": 0.38,
        "blood": 0.15,
        "lesion": 0.85,
    },
    "PD": {
        "skin": 0.60,
        "fat": 0.80,
        "muscle": 0.62,
        "water": 1.0,
        "cortical bone": 0.05,
        "trabecular bone": 0.55,
        "cartilage": 0.60,
        "grey matter": 0.85,
        "white matter": 0.70,
        "blood": 0.70,
        "lesion": 0.90,
    },
}
"""Sequence -> tissue -> signal."""

_COARSE = 20  # coil maps are computed on so many points an axis, and interpolated
_SEGMENTS = 24  # of a coil's loop


@dataclass(frozen=True, eq=False)
class SimulatedMRI:
    """A simulated MRI scan and what is true of it.

    Attributes
    ----------
    scan
        Its k-space, with the true coil maps, whose squares sum to one.
    truth
        (D, H, W), complex64: what full sampling without noise would show, combined by those maps.
    noise
        Standard deviation of the real and the imaginary part of every sample, and so of the fully sampled image.
    """

    scan: KSpaceScan
    truth: Complex
    noise: float


def simulate_mri(
    kind: str = "head",
    seed: int = 0,
    size: int = 96,
    acceleration: float = 5.0,
    coils: int = 8,
    snr: float | None = 30.0,
    *,
    sampling: Sampling = "poisson",
    calibration: int | None = None,
    weighting: str | None = None,
) -> SimulatedMRI:
    """Simulate the k-space of a synthetic object; the same for the same seed.

    Parameters
    ----------
    kind
        An anatomy of :data:`napari_recon.learning.anatomy.KINDS`, or a phantom of
        :data:`napari_recon.learning.phantoms.KINDS`.
    seed
        Of object, phase, coils, sampling and noise.
    size
        Voxels along an edge.
    acceleration
        Sites of k-space over samples; 1 samples all.
    coils
        Receiver coils.
    snr
        Mean magnitude of the object over the standard deviation of the noise in each of the two parts, as full
        sampling would have it; None leaves the noise out.
    sampling
        See :func:`napari_recon.scans.sampling.sampling_mask`.
    calibration
        Edge of the fully sampled centre; by default a quarter of the size, 24 at most.
    weighting
        Of a head: ``"T1"``, ``"T2"`` or ``"PD"``; by default the seed chooses.

    Raises
    ------
    ScanError
        If there is no such kind, or a number is out of range.
    """
    if kind not in KINDS:
        raise ScanError(f"There is nothing called {kind!r} to scan by MRI; there are {', '.join(KINDS)}.")
    if not 8 <= size <= 512:
        raise ScanError(f"A size of {size} voxels will not do; choose 8 to 512.")
    if not 1 <= coils <= 128:
        raise ScanError(f"{coils} coils will not do; choose 1 to 128.")
    if snr is not None and not 0 < snr < math.inf:
        raise ScanError(f"A signal-to-noise ratio of {snr} will not do; choose more than 0, or none for no noise.")
    if weighting is not None and weighting not in WEIGHTINGS:
        raise ScanError(f"There is no weighting {weighting!r}; there are {', '.join(WEIGHTINGS)}.")
    # A generator for each, so that more coils or another noise do not make another object.
    of_object, of_phase, of_coils, of_noise = (np.random.default_rng([seed, 100 + k]) for k in range(4))
    shape = (size, size, size)
    if kind in anatomy.KINDS:
        grid = anatomy.anatomy_grid(kind, size)
        magnitude = _anatomy(kind, of_object, seed, size, weighting)
        phase, maps = _smooth_phase(of_phase, shape), _loops(of_coils, coils, shape)
    else:
        grid = Grid(shape, 34.0 / size)
        magnitude = np.clip(phantoms.make_phantom(kind, seed).volume(grid), 0, None)
        magnitude /= max(float(magnitude.max()), 1e-12)
        phase, maps = _polynomial_phase(of_phase, shape), _gaussians(of_coils, coils, shape)
    total = np.sqrt((np.abs(maps) ** 2).sum(0))
    maps = (maps / total).astype(np.complex64)
    shading = total / total[_central(shape)].mean()  # what is near the coils is bright
    truth = (magnitude * shading * np.exp(1j * phase)).astype(np.complex64)

    width = min(24, size // 4) if calibration is None else calibration
    mask = sampling_mask(shape, acceleration, sampling, width, seed)
    brightness = np.abs(truth)
    inside = brightness > 0.05 * brightness.max()
    noise = 0.0 if snr is None else float(brightness[inside].mean()) / snr
    kspace = np.empty((coils, *shape), np.complex64)
    for coil in range(coils):
        kspace[coil] = to_kspace(maps[coil] * truth)
        if noise:
            parts = of_noise.standard_normal((2, *shape), np.float32)
            kspace[coil] += np.float32(noise) * (parts[0] + 1j * parts[1])
        kspace[coil] *= mask
    source = Path(f"{kind}, seed {seed}")
    recording = KSpaceRecording(
        "simulated",
        kind,
        source,
        (coils, size, size, size),
        lambda: kspace,
        voxel_size=grid.scale,
        read_mask=lambda: mask,
        read_coil_maps=lambda: maps,
    )
    return SimulatedMRI(KSpaceScan(source, recording), truth, noise)


def write_mri(kind: str, folder: str | Path, *, coil_maps: bool = False, **options: Any) -> Path:
    """Simulate a scan and write it as an array with a sidecar, with the magnitude of its truth beside it.

    Parameters
    ----------
    kind, **options
        As for :func:`simulate_mri`.
    folder
        Where it goes: ``kspace.npy`` (what :func:`napari_recon.open_scan` opens), ``kspace.toml`` and ``truth.tif``. It
        must not exist, or be empty.
    coil_maps
        Whether the true coil maps go with it, as ``coil_maps.npy``; else they are to be estimated.

    Returns
    -------
    ``kspace.npy``.

    Raises
    ------
    ScanError
        As :func:`simulate_mri`, or if the folder holds something. Nothing is left half-written.
    """
    folder = Path(folder).expanduser()
    expect_new(folder)
    simulated = simulate_mri(kind, **options)
    scan = simulated.scan
    described = {"name": scan.name, "axes": ["coil", "z", "y", "x"], "voxel_size": list(scan.voxel_size)}
    described |= {"truth": "truth.tif", **({"coil_maps": "coil_maps.npy"} if coil_maps else {})}
    with new_folder(folder) as partial:
        np.save(partial / "kspace.npy", scan.kspace)
        if coil_maps:
            np.save(partial / "coil_maps.npy", np.asarray(scan.coil_maps))
        edge = scan.voxel_size[0]
        tifffile.imwrite(
            partial / "truth.tif",
            np.abs(simulated.truth),
            imagej=True,
            resolution=(1 / edge, 1 / edge),
            metadata={"axes": "ZYX", "spacing": edge, "unit": "mm"},
        )
        (partial / "kspace.toml").write_text(tomli_w.dumps(described), encoding="utf-8")
    return folder / "kspace.npy"


# -- objects -------------------------------------------------------------------------------------------------------


def _anatomy(kind: str, rng: np.random.Generator, seed: int, size: int, weighting: str | None) -> NDArray[np.float32]:
    """The magnitude of an anatomy, with a texture: of any contrasts, unless it is a head."""
    if kind == "head":
        magnitude = _head(rng, seed, size, weighting)
    else:  # of which WEIGHTINGS know no tissues
        magnitude = anatomy.with_random_contrasts(anatomy.make_anatomy(kind, seed, size), seed)
        magnitude = np.clip(magnitude, 0, None) / max(float(np.quantile(magnitude, 0.999)), 1e-12)
    for spacing, amount in ((3.0, rng.uniform(0.01, 0.04)), (size / 8, rng.uniform(0.0, 0.06))):
        magnitude = magnitude * (1 + amount * _smooth(rng, magnitude.shape, spacing))
    return np.clip(magnitude, 0, None).astype(np.float32)


def _head(rng: np.random.Generator, seed: int, size: int, weighting: str | None) -> NDArray[np.float32]:
    """Between two sequences, tissues somewhat off."""
    names = list(WEIGHTINGS)
    first = weighting or names[rng.choice(len(names), p=(0.5, 0.3, 0.2))]
    other, share = names[rng.integers(len(names))], rng.uniform(0, 0.3)
    signal = {
        tissue: ((1 - share) * value + share * WEIGHTINGS[other][tissue]) * math.exp(rng.normal(scale=0.1))
        for tissue, value in WEIGHTINGS[first].items()
    }
    return anatomy.make_anatomy("head", seed, size, values=signal).volume


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], spacing: float) -> NDArray[np.float32]:
    """Noise of about unit variance whose values are independent ``spacing`` voxels apart."""
    coarse = rng.standard_normal([max(2, round(n / spacing)) + 1 for n in shape], np.float32)
    return _resized(coarse, shape)


def _smooth_phase(rng: np.random.Generator, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Radians: a ramp and slow waves."""
    waves = _smooth(rng, shape, max(shape) / 3) * rng.uniform(0.3, 0.9)
    ramp = sum(a * p for a, p in zip(rng.uniform(-1.5, 1.5, 3), _places(shape), strict=True))
    out: NDArray[np.float32] = (waves + ramp + rng.uniform(-np.pi, np.pi)).astype(np.float32)
    return out


def _polynomial_phase(rng: np.random.Generator, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Radians: a random polynomial of degree three."""
    z, y, x = (2 * p for p in _places(shape))
    out = np.zeros(shape)
    for i in range(4):
        for j in range(4 - i):
            for k in range(4 - i - j):
                out = out + rng.normal(scale=0.8 / (1 + i + j + k)) * z**i * y**j * x**k
    return out.astype(np.float32)


# -- coils ---------------------------------------------------------------------------------------------------------


def _loops(rng: np.random.Generator, coils: int, shape: tuple[int, int, int]) -> NDArray[np.complex128]:
    """Receive sensitivities (coils, D, H, W) of loops on a cylinder about z, by Biot and Savart; Bx − i By."""
    rings = 1 if coils < 6 else 2
    places = np.stack(np.broadcast_arrays(*_places((_COARSE,) * 3)), -1).reshape(-1, 3)[:, ::-1]  # x y z, 1 = the cube
    begin = rng.uniform(0, 2 * np.pi)
    out = []
    for coil in range(coils):
        ring, position = coil % rings, coil // rings
        count = len(range(ring, coils, rings))
        angle = begin + 2 * np.pi * (position + 0.5 * ring) / count + rng.normal(scale=0.06)
        height = ((ring + 0.5) / rings - 0.5) * rng.uniform(0.75, 0.9) + rng.normal(scale=0.03)
        outward = np.array([np.cos(angle), np.sin(angle), 0.0])
        around, up = np.array([-outward[1], outward[0], 0.0]), np.array([0.0, 0.0, 1.0])
        turn = np.linspace(0, 2 * np.pi, _SEGMENTS + 1)[:, None]
        wide, tall = min(0.45, 2.6 / count) * rng.uniform(0.85, 1.1), rng.uniform(0.28, 0.36)
        loop = rng.uniform(0.62, 0.72) * outward + height * up + wide * np.cos(turn) * around + tall * np.sin(turn) * up
        field = np.zeros((len(places), 3))
        for start, stop in pairwise(loop):
            away = places - (start + stop) / 2
            # A wire has a thickness: the field stays finite where it passes.
            field += np.cross(stop - start, away) / ((away**2).sum(1, keepdims=True) + 0.12**2) ** 1.5
        out.append((field[:, 0] - 1j * field[:, 1]).reshape((_COARSE,) * 3))
    return np.stack([_resized(m.real, shape) + 1j * _resized(m.imag, shape) for m in out])


def _gaussians(rng: np.random.Generator, coils: int, shape: tuple[int, int, int]) -> NDArray[np.complex128]:
    """Sensitivities (coils, D, H, W) that fall off like Gaussians from points around the object, each with a ramp."""
    z, y, x = _places(shape)
    out = []
    for coil in range(coils):
        polar = math.acos(1 - 2 * (coil + 0.5) / coils)
        azimuth = np.pi * (1 + 5**0.5) * coil + rng.normal(scale=0.1)
        center = 0.6 * np.array([math.cos(polar), math.sin(polar) * np.sin(azimuth), math.sin(polar) * np.cos(azimuth)])
        distance = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2
        a, b, c = rng.normal(scale=1.5, size=3)
        phase = a * z + b * y + c * x + rng.uniform(-np.pi, np.pi)
        out.append(np.exp(-distance / (2 * rng.uniform(0.4, 0.55) ** 2) + 1j * phase))
    return np.stack(out)


def _places(shape: tuple[int, int, int]) -> list[NDArray[np.float64]]:
    """z, y, x from -1/2 to 1/2 over the volume, broadcastable."""
    out = []
    for axis, n in enumerate(shape):
        spread = [1, 1, 1]
        spread[axis] = n
        out.append(((np.arange(n) - (n - 1) / 2) / n).reshape(spread))
    return out


def _central(shape: tuple[int, ...]) -> Any:
    """The middle half of every axis."""
    return tuple(slice(n // 4, n - n // 4) for n in shape)


def _resized(volume: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Another number of voxels in the same place, cubic in between."""
    factors = [n / m for n, m in zip(shape, volume.shape, strict=True)]
    out: NDArray[np.float32] = ndimage.zoom(volume.astype(np.float32), factors, order=3, mode="nearest", grid_mode=True)
    return out
