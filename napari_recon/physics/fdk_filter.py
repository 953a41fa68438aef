"""What is done to projections before FDK's back projection: ray weights and the ramp filter.

References
----------
L. A. Feldkamp, L. C. Davis, J. W. Kress, Practical cone-beam algorithm, J. Opt. Soc. Am. A 1, 1984.
A. C. Kak, M. Slaney, Principles of computerized tomographic imaging, 1988, chapter 3.
D. L. Parker, Optimal short scan convolution reconstruction for fan beam CT, Med. Phys. 9, 1982.
M. D. Silver, A method for including redundant data in computed tomography, Med. Phys. 27, 2000.
G. Wang, X-ray micro-CT with a displaced detector array, Med. Phys. 29, 2002.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry

Window = Literal["ram-lak", "shepp-logan", "cosine", "hann"]

# A gap between views this wide, and this many times the usual one, is an arc that was not scanned.
MISSING_ARC = math.radians(20)
MISSING_STEPS = 2.5

# The detector counts as off-centre when its sides differ by more than this fraction of its width (as RTK's).
OFF_CENTRE = 0.1

# Bytes of projections that are filtered at a time; the FFT needs some four times as much, best within a core's cache.
BATCH_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def fdk_weights(geometry: Geometry) -> NDArray[np.float64]:
    """How much each view, and each of its columns, counts in FDK: quadrature over the angle times redundancy.

    The angular step of a view is half the way to both its neighbours, from the actual angles, so that views may be
    uneven or cover more than a turn. Every ray's weights, with those of the same ray measured from the other side, sum
    to one: by halving on a full turn, by Parker's weights in Silver's form on shorter arcs, by Wang's weights for a
    full turn with the detector off-centre. Arcs shorter than half a turn are given as they are.

    Parameters
    ----------
    geometry
        Cone (fan) or parallel beam; turned about z.

    Returns
    -------
    (views, columns), in radians.

    Raises
    ------
    ScanError
        If a view looks along z, about which FDK takes the views to turn.
    """
    across = np.linalg.norm(geometry.source[:, :2], axis=1) / np.linalg.norm(geometry.source, axis=1).clip(min=1e-300)
    if (across < 1e-3).any():
        raise ScanError(
            f"View {int(np.argmin(across))} looks along the rotation axis z, which FDK cannot use; "
            "check the geometry, or use an iterative method."
        )
    angle = np.deg2rad(geometry.angles)
    position = _position(geometry)
    steps, scanned = _steps(angle, 2 * math.pi)
    if scanned is None and is_displaced(geometry):
        return 0.5 * steps[:, None] * _wang(position)
    if geometry.kind == "parallel":
        steps, _ = _steps(angle, math.pi)
        return np.repeat(steps[:, None], position.shape[1], axis=1)
    if scanned is None:
        return np.repeat(0.5 * steps[:, None], position.shape[1], axis=1)
    begin, arc = scanned
    since = np.mod(angle - begin + 1e-9, 2 * math.pi) - 1e-9
    return steps[:, None] * _parker(since[:, None], position, arc)


def is_displaced(geometry: Geometry) -> bool:
    """Whether the detector is off-centre on a full turn, so that its narrow side is measured from across only."""
    left, right = _overlap(_position(geometry))
    if abs(left + right) <= OFF_CENTRE * (right - left):
        return False
    return _steps(np.deg2rad(geometry.angles), 2 * math.pi)[1] is None


def _position(geometry: Geometry) -> NDArray[np.float64]:
    """(views, columns): where each column's ray passes the axis, negated when the same ray is measured backwards.

    Cone beam: the fan angle, counter-clockwise from the ray through the axis, in radians. Parallel beam: the distance
    from the axis in mm.
    """
    k = np.arange(geometry.detector_shape[1]) - (geometry.detector_shape[1] - 1) / 2
    pixel = geometry.detector_center[:, None] + k[:, None] * geometry.u[:, None]
    # Of a tilted column the pixel at the source's height counts, whichever rows the detector has.
    height = geometry.source[:, 2] if geometry.kind == "cone" else np.zeros(geometry.views)
    upright = np.abs(geometry.v[:, 2]) > 0.5 * np.linalg.norm(geometry.v, axis=1)  # a single row may have any v
    rise = np.where(upright, geometry.v[:, 2], 1.0)[:, None]
    steps = np.where(upright[:, None], (height[:, None] - pixel[..., 2]) / rise, 0.0)
    pixel = (pixel + steps[..., None] * geometry.v[:, None])[..., :2]
    if geometry.kind == "parallel":
        along = geometry.source[:, None, :2] / np.linalg.norm(geometry.source[:, None, :2], axis=-1, keepdims=True)
        return along[..., 0] * pixel[..., 1] - along[..., 1] * pixel[..., 0]
    along, ray = -geometry.source[:, None, :2], pixel - geometry.source[:, None, :2]
    cross = along[..., 0] * ray[..., 1] - along[..., 1] * ray[..., 0]
    return np.arctan2(cross, np.sum(along * ray, axis=-1))


def _steps(angle: NDArray[np.float64], period: float) -> tuple[NDArray[np.float64], tuple[float, float] | None]:
    """The part of ``period`` that each angle stands for, and the (begin, length) of the arc if not all was scanned."""
    order = np.argsort(np.mod(angle, period), kind="stable")
    place = np.mod(angle, period)[order]
    after = np.diff(place, append=place[0] + period)  # after[i]: from i to the next
    widest = int(np.argmax(after))
    missing = len(angle) > 2 and after[widest] > max(MISSING_ARC, MISSING_STEPS * float(np.median(after)))
    arc = None
    if missing:
        first = (widest + 1) % len(angle)
        arc = float(place[first]), period - float(after[widest])
        after[widest] = 0
    steps = np.empty_like(after)
    steps[order] = (after + np.roll(after, 1)) / 2
    return steps, arc


def _parker(since: NDArray[np.float64], fan: NDArray[np.float64], arc: float) -> NDArray[np.float64]:
    """Parker's weights for views ``since`` the arc's begin (counter-clockwise), rays at ``fan`` angles; radians."""
    excess = (arc - math.pi) / 2  # Silver's virtual half fan angle
    if excess <= 0:
        return np.ones(np.broadcast_shapes(since.shape, fan.shape))
    rise, fall = excess - fan, excess + fan
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.sin(math.pi / 4 * since / rise) ** 2
        down = np.sin(math.pi / 4 * (math.pi + 2 * excess - since) / fall) ** 2
    weight = np.where(since < 2 * rise, up, 1.0)
    return np.where(since > math.pi - 2 * fan, down, weight)


def _overlap(position: NDArray[np.float64]) -> tuple[float, float]:
    """The outermost positions that every view sees."""
    return float(position.min(axis=1).max()), float(position.max(axis=1).min())


def _wang(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that rise from 0 to 2 across the part of the detector that sees both sides of the axis."""
    left, right = _overlap(position)
    half = max(min(-left, right), 1e-12 * (right - left))
    side = 1.0 if right > -left else -1.0
    return 1 + np.sin(math.pi / 2 * np.clip(side * position / half, -1, 1))


def ramp(length: int, window: Window = "ram-lak") -> NDArray[np.float64]:
    """The ramp filter's transfer function at unit pitch, (length // 2 + 1,): the spectrum of the band-limited kernel.

    The kernel h[0] = 1/4, h[k odd] = -1/(pi k)^2 (Kak & Slaney, equation 3.61), not |f|, so that the mean is right.
    """
    kernel = np.zeros(length)
    k = np.arange(1, length // 2 + 1, 2)
    kernel[0] = 0.25
    kernel[k] = kernel[-k] = -1 / (math.pi * k) ** 2
    f = np.linspace(0, 1, length // 2 + 1)  # in units of the Nyquist frequency
    shape = {
        "ram-lak": np.ones_like(f),
        "shepp-logan": np.sinc(f / 2),
        "cosine": np.cos(math.pi / 2 * f),
        "hann": 0.5 + 0.5 * np.cos(math.pi * f),
    }[window]
    return np.fft.rfft(kernel).real * shape


class FDKFilter:
    """Cosine weight, ray weights and ramp filter of a geometry, with all constants of FDK folded in.

    Back projection is then the plain sum over views of W^-2 times the sample, W the voxel's depth over the detector's.

    Parameters
    ----------
    geometry
        The whole geometry: weights depend on all its views together.
    window
        Low-pass window of the ramp.

    Attributes
    ----------
    detector
        The geometry that filtered projections have: wider than the measured one where that is off-centre, since
        weighted projections are zero beyond its narrow side, but filtered ones are not.
    """

    def __init__(self, geometry: Geometry, window: Window = "ram-lak") -> None:
        if window not in get_args(Window):
            raise ScanError(f"Unknown filter window {window!r}; use one of {', '.join(get_args(Window))}.")
        self.geometry = geometry
        rows, columns = geometry.detector_shape
        self.pad = (0, 0)  # columns to add on the left and on the right
        self.detector = geometry
        if is_displaced(geometry):
            offset = 2 * geometry.axis_offset
            self.pad = max(0, math.ceil(-offset.min())), max(0, math.ceil(offset.max()))
            vectors = geometry.vectors.copy()
            vectors[:, 3:6] += geometry.u * ((self.pad[1] - self.pad[0]) / 2)
            self.detector = Geometry(vectors, (rows, columns + sum(self.pad)), geometry.kind)
        self.length = next_fast_len(2 * (columns + sum(self.pad)), real=True)
        self.length += self.length % 2
        self.ramp = ramp(self.length, window)
        weights = fdk_weights(geometry)
        # Weights that are the same for all columns go with the filter, at no cost.
        self.per_column = weights if (np.ptp(weights, axis=1) > 0).any() else None
        view = np.ones(len(weights)) if self.per_column is not None else weights[:, 0]
        pitch = np.linalg.norm(geometry.u, axis=1)
        if geometry.kind == "cone":
            near, far = geometry.source_object, geometry.source_detector
            # (SOD/SDD)^2 of the distance weight, the pitch at the axis, SDD of the cosine weight
            self.scale = view * (near / far) ** 2 / (pitch * near / far) * far
        else:
            along = geometry.source / np.linalg.norm(geometry.source, axis=1, keepdims=True)
            across = geometry.u - np.sum(geometry.u * along, axis=1, keepdims=True) * along
            self.scale = view / np.linalg.norm(across, axis=1)

    def __call__(
        self, y: Tensor, rows: slice | None = None, views: slice | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Filter projections.

        Parameters
        ----------
        y
            (..., rows, views, columns): all projections.
        rows, views
            Which of them to filter; all by default.
        out
            Where to put the result, of any strides.

        Returns
        -------
        (..., rows, views, columns of :attr:`detector`) of those asked for, float32.
        """
        rows = slice(*(rows or slice(None)).indices(self.geometry.detector_shape[0]))
        views = slice(*(views or slice(None)).indices(self.geometry.views))
        height, count, columns = rows.stop - rows.start, views.stop - views.start, self.detector.detector_shape[1]
        if out is None:
            out = torch.empty(*y.shape[:-3], height, count, columns, dtype=torch.float32, device=y.device)
        limit = BATCH_BYTES.get(y.device.type, BATCH_BYTES["cpu"])
        step = max(1, int(limit // (4 * height * columns * max(1, math.prod(y.shape[:-3])))))
        for n in range(views.start, views.stop, step):
            part = slice(n, min(n + step, views.stop))
            place = slice(part.start - views.start, part.stop - views.start)
            out[..., place, :] = self._filter(y[..., rows, part, :].float(), rows, part)
        return out

    def _filter(self, y: Tensor, rows: slice, views: slice) -> Tensor:
        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device=y.device, dtype=torch.float32)

        g = self.geometry
        if g.kind == "cone":
            # |P - s|^2 of pixel (l, k): P - s = m + k u + l v. The cross term vanishes on rectangular pixels.
            k = np.arange(g.detector_shape[1]) - (g.detector_shape[1] - 1) / 2
            row = np.arange(rows.start, rows.stop) - (g.detector_shape[0] - 1) / 2
            u, v, m = g.u[views], g.v[views], (g.detector_center - g.source)[views]
            across = np.sum((m[:, None] + k[:, None] * u[:, None]) ** 2, axis=-1)  # (n, columns)
            along = row[:, None] ** 2 * np.sum(v**2, axis=-1) + 2 * row[:, None] * np.sum(m * v, axis=-1)  # (rows, n)
            squared = put(across) + put(along)[..., None]
            skew = np.sum(u * v, axis=-1)
            if np.abs(skew).max() > 1e-6 * np.abs(np.sum(u * u, axis=-1)).max():
                squared += put(2 * row[:, None] * skew)[..., None] * put(k)
            y = squared.rsqrt_() * y
        if self.per_column is not None:
            y = y * put(self.per_column[views])
        spectrum = torch.fft.rfft(y, n=self.length)
        spectrum *= put(self.ramp * self.scale[views, None])
        filtered = torch.fft.irfft(spectrum, n=self.length)
        left, right = self.pad
        inside = filtered[..., : g.detector_shape[1] + right]
        return torch.cat([filtered[..., -left:], inside], dim=-1) if left else inside


def filter_projections(y: Tensor, geometry: Geometry, window: Window = "ram-lak") -> Tensor:
    """Weight and ramp-filter projections for FDK.

    Parameters
    ----------
    y
        (..., rows, views, columns) line integrals.
    geometry
        Where they were measured.
    window
        Low-pass window of the ramp.

    Returns
    -------
    The same shape, float32, so that the plain sum over views of W^-2 times the sample is the reconstruction in 1/mm
    (with a detector off-centre only where all views see it, see :attr:`FDKFilter.detector`).
    """
    whole = FDKFilter(geometry, window)
    return whole(y)[..., whole.pad[0] : whole.pad[0] + geometry.detector_shape[1]]
