"""Synthetic objects with exact line integrals: ellipsoids, Gaussian blobs, and objects made from them.

An object is what it is in mm, independent of any grid: ``volume(grid)`` samples it, ``project(geometry)`` integrates it
along every ray in closed form, for cone and parallel beam alike. Projections of a sampled volume would repeat the
reconstruction's own discretisation (the "inverse crime"); these do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba as nb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

_MAX_HITS = 512  # ellipsoids that a single ray may meet


@dataclass(frozen=True, eq=False)
class Ellipsoids:
    """Solid ellipsoids.

    Parameters
    ----------
    centers
        (n, 3), x y z in mm.
    axes
        (n, 3), semi-axes in mm.
    rotations
        (n, 3, 3): the rows are the directions of the semi-axes in the world.
    values
        (n,), attenuation in 1/mm.
    replace
        False: values add where ellipsoids overlap. True: a later ellipsoid replaces what lies beneath it, so that
        hollows, unions and cracks can be cut from whole shapes.

    Raises
    ------
    ScanError
        If shapes do not agree or a semi-axis is not positive.
    """

    centers: NDArray[np.float64]
    axes: NDArray[np.float64]
    rotations: NDArray[np.float64]
    values: NDArray[np.float64]
    replace: bool = False

    def __post_init__(self) -> None:
        n = len(np.atleast_1d(self.values))
        for name, shape in (("centers", (n, 3)), ("axes", (n, 3)), ("rotations", (n, 3, 3)), ("values", (n,))):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.float64).reshape(-1)
            if array.size != math.prod(shape) or not np.isfinite(array).all():
                raise ScanError(f"The ellipsoids' {name} must be {shape} finite numbers for {n} values.")
            object.__setattr__(self, name, array.reshape(shape))
        if not (self.axes > 0).all():
            raise ScanError("The semi-axes of the ellipsoids must be positive, in mm.")
        if n > _MAX_HITS:
            raise ScanError(f"{n} ellipsoids are too many; make it at most {_MAX_HITS}.")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def _to_body(self) -> NDArray[np.float64]:
        """(n, 3, 3): world vectors to coordinates in which each ellipsoid is the unit ball."""
        return self.rotations / self.axes[:, :, None]

    def surface_points(self, count: int = 200) -> NDArray[np.float64]:
        """(n * count, 3): points spread over all surfaces, x y z in mm."""
        k = np.arange(count) + 0.5
        polar, azimuth = np.arccos(1 - 2 * k / count), np.pi * (1 + 5**0.5) * k
        ball = np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], 1)
        return (np.einsum("nij,ni,pi->npj", self.rotations, self.axes, ball) + self.centers[:, None]).reshape(-1, 3)

    def volume(self, grid: Grid, supersampling: int = 3) -> NDArray[np.float32]:
        """The object on a grid, each voxel the mean of ``supersampling``³ points.

        Returns
        -------
        (D, H, W), float32, 1/mm.
        """
        out = np.empty(grid.shape, np.float32)
        half = np.sqrt(np.einsum("nij,ni->nj", self.rotations**2, self.axes**2))
        _fill(
            out,
            np.array(grid.translate, dtype=np.float64),
            grid.voxel_size,
            self.centers,
            np.ascontiguousarray(self._to_body),
            half,
            self.values,
            self.replace,
            int(supersampling),
        )
        return out

    def project(self, geometry: Geometry) -> NDArray[np.float32]:
        """Exact line integrals from source to pixel centre (along the whole line if the beam is parallel).

        Returns
        -------
        (views, rows, columns), float32, dimensionless.
        """
        out = np.empty((geometry.views, *geometry.detector_shape), np.float32)
        corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=np.float64)
        boxes = np.einsum("nij,ni,pi->npj", self.rotations, self.axes, corners) + self.centers[:, None]
        windows = _windows(geometry, boxes)
        _integrate(
            out,
            geometry.vectors,
            geometry.kind == "cone",
            windows,
            self.centers,
            np.ascontiguousarray(self._to_body),
            self.values,
            self.replace,
        )
        return out


@dataclass(frozen=True, eq=False)
class Blobs:
    """Gaussian blobs: value · exp(-r² / 2σ²), smooth, so that a grid holds them without error.

    Parameters
    ----------
    centers
        (n, 3), x y z in mm.
    sigmas
        (n,), mm.
    values
        (n,), peak attenuation in 1/mm.
    """

    centers: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("centers", "sigmas", "values"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float64))
        n = self.values.size
        if self.centers.shape != (n, 3) or self.sigmas.shape != (n,) or not (self.sigmas > 0).all():
            raise ScanError(f"Blobs need centers (n, 3), positive sigmas (n,) and values (n,); there are {n} values.")

    def __len__(self) -> int:
        return len(self.values)

    def surface_points(self, count: int = 200) -> NDArray[np.float64]:
        """(n * count, 3): points at 3.5 σ, where a blob has faded to 0.2 % of its peak; x y z in mm."""
        eye = np.broadcast_to(np.eye(3), (len(self), 3, 3))
        balls = Ellipsoids(self.centers, np.repeat(3.5 * self.sigmas[:, None], 3, 1), eye, self.values)
        return balls.surface_points(count)

    def volume(self, grid: Grid) -> NDArray[np.float32]:
        """(D, H, W), float32, 1/mm: the blobs at the voxels' centres."""
        out = np.zeros(grid.shape, np.float64)
        z, y, x = (t + np.arange(n) * grid.voxel_size for t, n in zip(grid.translate, grid.shape, strict=True))
        for center, sigma, value in zip(self.centers, self.sigmas, self.values, strict=True):
            ex, ey, ez = (np.exp(-((a - c) ** 2) / (2 * sigma**2)) for a, c in zip((x, y, z), center, strict=True))
            out += value * ez[:, None, None] * ey[:, None] * ex
        return out.astype(np.float32)

    def project(self, geometry: Geometry) -> NDArray[np.float32]:
        """(views, rows, columns), float32: exact integrals along the whole line of every ray."""
        out = np.empty((geometry.views, *geometry.detector_shape), np.float32)
        _integrate_blobs(out, geometry.vectors, geometry.kind == "cone", self.centers, self.sigmas, self.values)
        return out


@dataclass(frozen=True, eq=False)
class Textured:
    """Ellipsoids with a texture of blobs on them.

    Parameters
    ----------
    body
        The shapes, each of one value.
    texture
        What is added.
    """

    body: Ellipsoids
    texture: Blobs

    def __len__(self) -> int:
        return len(self.body) + len(self.texture)

    def surface_points(self, count: int = 200) -> NDArray[np.float64]:
        """The body's, (n * count, 3): x y z in mm."""
        return self.body.surface_points(count)

    def volume(self, grid: Grid) -> NDArray[np.float32]:
        """(D, H, W), float32, 1/mm."""
        return self.body.volume(grid) + self.texture.volume(grid)

    def project(self, geometry: Geometry) -> NDArray[np.float32]:
        """(views, rows, columns), float32: exact integrals."""
        return self.body.project(geometry) + self.texture.project(geometry)


Phantom = Ellipsoids | Blobs | Textured

# -- kinds -------------------------------------------------------------------------------------------------------


def shepp_logan(radius: float = 16.0) -> Ellipsoids:
    """The three-dimensional Shepp-Logan head with Toft's contrasts (Kak & Slaney 1988; Toft 1996).

    Parameters
    ----------
    radius
        mm from the centre to the crown; the skull attenuates 0.05 per mm, the brain 0.01.
    """
    # value, semi-axes a b c, centre x y z, rotation about z in degrees; unit radius 0.92
    table = np.array(
        [
            [1.0, 0.69, 0.92, 0.81, 0, 0, 0, 0],
            [-0.8, 0.6624, 0.874, 0.78, 0, -0.0184, 0, 0],
            [-0.2, 0.11, 0.31, 0.22, 0.22, 0, 0, -18],
            [-0.2, 0.16, 0.41, 0.28, -0.22, 0, 0, 18],
            [0.1, 0.21, 0.25, 0.41, 0, 0.35, -0.15, 0],
            [0.1, 0.046, 0.046, 0.05, 0, 0.1, 0.25, 0],
            [0.1, 0.046, 0.046, 0.05, 0, -0.1, 0.25, 0],
            [0.1, 0.046, 0.023, 0.05, -0.08, -0.605, 0, 0],
            [0.1, 0.023, 0.023, 0.02, 0, -0.606, 0, 0],
            [0.1, 0.023, 0.046, 0.02, 0.06, -0.605, 0, 0],
        ]
    )
    angle, zero = np.deg2rad(table[:, 7]), np.zeros(len(table))
    c, s = np.cos(angle), np.sin(angle)
    rotations = np.stack(
        [np.stack([c, s, zero], 1), np.stack([-s, c, zero], 1), np.stack([zero, zero, zero + 1], 1)], 1
    )
    scale = radius / 0.92
    return Ellipsoids(table[:, 4:7] * scale, table[:, 1:4] * scale, rotations, table[:, 0] * 0.05)


def blobs(seed: int = 0, radius: float = 16.0, count: int = 12) -> Blobs:
    """Random Gaussian blobs within ``radius`` mm of the centre."""
    rng = np.random.default_rng(seed)
    sigmas = radius * rng.uniform(0.04, 0.14, count)
    centers = _directions(rng, count) * ((radius - 3.5 * sigmas) * rng.random(count) ** (1 / 3))[:, None]
    return Blobs(centers, sigmas, rng.uniform(0.01, 0.05, count))


def random_ellipsoids(seed: int = 0, radius: float = 16.0, count: int = 40) -> Ellipsoids:
    """Random ellipsoids inside a large one: no two seeds alike."""
    rng = np.random.default_rng(seed)
    body = _Sculpture(radius)
    hull = rng.uniform(0.75, 0.98, 3)
    body.add((0, 0, 0), hull, rng.uniform(0.015, 0.03), _rotation(rng))
    for _ in range(count - 1):
        axes = rng.uniform(0.02, 0.22, 3)
        center = _directions(rng, 1)[0] * rng.random() ** (1 / 3) * (hull.min() - axes.max())
        body.add(center, axes, rng.choice([0.0, *rng.uniform(0.01, 0.06, 3)]), _rotation(rng))
    return body.ellipsoids()


def walnut(seed: int = 0, radius: float = 16.0) -> Ellipsoids:
    """A nut: rough shell with a seam and pores, hollow; septa; a kernel of two lobed, folded halves; bright grains.

    Parameters
    ----------
    seed
        Every seed is another nut.
    radius
        mm from the centre to the tip. The shell attenuates about 0.045 per mm, the kernel 0.025.
    """
    rng = np.random.default_rng(seed)
    nut = _Sculpture(radius)
    shell, hull = 0.045, np.array([0.80, 0.76, 0.90])
    wall = 0.085

    # Shell: body, the ridge of its seam (in the plane y = 0), the tip, and bumps all over.
    nut.add((0, 0, 0), hull, shell)
    nut.add((0, 0, 0), (hull[0] + 0.055, 0.075, hull[2] + 0.035), shell)
    nut.add((0, 0, hull[2]), (0.11, 0.09, 0.10), shell)
    nut.add((0, 0, -hull[2]), (0.20, 0.15, 0.06), shell)
    for outward in _spread(rng, 44):
        point = outward * hull
        normal = point / hull**2
        size = rng.uniform(0.10, 0.20)
        nut.add(
            point * 0.965,
            (size, size * rng.uniform(0.35, 0.8), 0.055),
            shell * rng.uniform(0.97, 1.03),
            _facing(normal, rng),
        )
    # The hollow, and ridges that run into it.
    hollow = hull - wall
    nut.add((0, 0, 0), hollow, 0.0)
    for outward in _spread(rng, 18):
        point = outward * hollow
        size = rng.uniform(0.08, 0.16)
        nut.add(point * 1.01, (size, size * 0.5, 0.035), shell, _facing(point / hollow**2, rng))
    # Pores in the wall.
    for outward in _directions(rng, 24):
        depth = hull - wall * rng.uniform(0.35, 0.7)
        size = rng.uniform(0.010, 0.026)
        nut.add(outward * depth, (size * 2, size, size * 0.8), 0.0, _facing(outward * depth / hull**2, rng))

    # Kernel: two halves either side of the seam, each of two lobes joined by a bridge, all of them folded.
    inner = hollow - 0.055
    for side in (-1, 1):
        for lobe in (-1, 1):
            for k in range(13):
                t = (k + 0.5) / 13
                height = (1 - 2 * t) * 0.84 * inner[2]
                room = math.sqrt(max(0.0, 1 - (height / inner[2]) ** 2))
                lobe_axes = np.array([0.255, 0.225, 0.12]) * rng.uniform(0.8, 1.1, 3)
                lobe_axes[:2] *= 0.35 + 0.65 * room
                reach = np.array([inner[0] * room - lobe_axes[0], inner[1] * room - lobe_axes[1]])
                bearing = math.radians(rng.uniform(30, 66))
                center = (
                    lobe * reach[0] * math.cos(bearing),
                    side * max(0.6 * lobe_axes[1] + 0.04, reach[1] * math.sin(bearing)),
                    height,
                )
                nut.add(center, lobe_axes, 0.0255 * rng.uniform(0.96, 1.04), _tilt(rng, 0.5))
        for k in range(4):
            height = (k - 1.5) * 0.22 * inner[2]
            nut.add(
                (0, side * 0.36 * inner[1], height),
                (0.27, 0.15, 0.14),
                0.0255 * rng.uniform(0.97, 1.03),
                _tilt(rng, 0.3),
            )
    # Folds: thin cracks of air that run into the kernel from outside.
    for k in range(28):
        side, lobe = (-1, 1)[k % 2], (-1, 1)[(k // 2) % 2]
        bearing, height = math.radians(rng.uniform(15, 80)), rng.uniform(-0.6, 0.6) * inner[2]
        room = math.sqrt(1 - (height / inner[2]) ** 2)
        center = (
            lobe * inner[0] * room * 0.86 * math.cos(bearing),
            side * inner[1] * room * 0.86 * math.sin(bearing),
            height,
        )
        nut.add(center, (rng.uniform(0.12, 0.24), rng.uniform(0.06, 0.13), 0.018), 0.0, _tilt(rng, 0.6))
    # Septa: papery walls between the halves, and across.
    nut.add((0, 0, 0), (hollow[0] * 0.99, 0.020, hollow[2] * 0.99), 0.020, _tilt(rng, 0.008))
    nut.add((0, 0, -0.32), (0.022, hollow[1] * 0.72, 0.36), 0.020, _tilt(rng, 0.06))
    nut.add((0, 0, 0.55), (0.09, 0.06, 0.26), 0.020, _tilt(rng, 0.1))
    # Grains brighter than anything else: they show resolution, and streaks.
    for k in range(8):
        bearing = 2 * math.pi * (k + rng.uniform(-0.3, 0.3)) / 8
        center = (0.42 * math.cos(bearing), 0.40 * math.sin(bearing), rng.uniform(-0.4, 0.4))
        nut.add(center, np.full(3, rng.uniform(0.014, 0.026)), 0.075)
    return nut.ellipsoids()


def textured(
    body: Ellipsoids, seed: int = 0, radius: float = 16.0, count: int = 1500, contrast: float = 0.4
) -> Textured:
    """A body with a texture of soft grains wherever it is solid: no longer piecewise constant.

    Parameters
    ----------
    body
        Any ellipsoids.
    seed
        Of the grains' places, sizes (1 to 4 % of the radius) and brightness.
    radius
        mm, that of the body.
    count
        Grains.
    contrast
        Largest value of a grain, relative to what it lies in.
    """
    rng = np.random.default_rng([seed, 7])
    coarse = Grid((96, 96, 96), 2.1 * radius / 96)
    values = body.volume(coarse, supersampling=1)
    found: list[tuple[NDArray[np.float64], float, float]] = []
    reach = np.concatenate([np.zeros((1, 3)), 1.5 * np.eye(3), -1.5 * np.eye(3)])
    for _ in range(60 * count):
        if len(found) == count:
            break
        center, sigma = radius * rng.uniform(-0.95, 0.95, 3), radius * rng.uniform(0.012, 0.04)
        index = np.rint((center + sigma * reach - coarse.translate[::-1]) / coarse.voxel_size).astype(int)[:, ::-1]
        near = values[tuple(np.clip(index, 0, 95).T)]
        if near.min() > 0:  # no grain reaches far into a hollow
            found.append((center, sigma, float(near.min()) * rng.uniform(0.1, 1.0) * contrast))
    centers, sigmas, peaks = (np.array(column) for column in zip(*found, strict=True))
    return Textured(body, Blobs(centers, sigmas, peaks))


KINDS = ("walnut", "shepp-logan", "ellipsoids", "blobs", "textured-walnut", "textured-ellipsoids")


def make_phantom(kind: str, seed: int = 0, radius: float = 16.0) -> Phantom:
    """A phantom by its name, about ``radius`` mm around the origin.

    Raises
    ------
    ScanError
        If there is no such kind.
    """
    if kind == "walnut":
        return walnut(seed, radius)
    if kind == "shepp-logan":
        return shepp_logan(radius)
    if kind == "ellipsoids":
        return random_ellipsoids(seed, radius)
    if kind == "blobs":
        return blobs(seed, radius)
    if kind == "textured-walnut":
        return textured(walnut(seed, radius), seed, radius)
    if kind == "textured-ellipsoids":
        return textured(random_ellipsoids(seed, radius), seed, radius)
    raise ScanError(f"There is no phantom {kind!r}; there are {', '.join(KINDS)}.")


class _Sculpture:
    """Collects ellipsoids in units of the radius, later ones replacing what lies beneath."""

    def __init__(self, radius: float) -> None:
        self._radius = radius
        self._parts: list[tuple[NDArray, NDArray, NDArray, float]] = []

    def add(self, center: ArrayLike, axes: ArrayLike, value: float, rotation: NDArray | None = None) -> None:
        turn = np.eye(3) if rotation is None else rotation
        self._parts.append((np.asarray(center, float), np.asarray(axes, float), turn, float(value)))

    def ellipsoids(self) -> Ellipsoids:
        centers, axes, rotations, values = (np.array(column) for column in zip(*self._parts, strict=True))
        return Ellipsoids(centers * self._radius, axes * self._radius, rotations, values, replace=True)


def _directions(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    v = rng.normal(size=(count, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def _spread(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """(count, 3) directions spread evenly, a little disturbed."""
    k = np.arange(count) + 0.5
    polar, azimuth = np.arccos(1 - 2 * k / count), np.pi * (1 + 5**0.5) * k
    v = np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], 1)
    v += rng.normal(scale=0.12, size=v.shape)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def _rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q


def _tilt(rng: np.random.Generator, amount: float) -> NDArray[np.float64]:
    """A rotation near the identity: off by about ``amount`` radians."""
    q, r = np.linalg.qr(np.eye(3) + amount * rng.normal(size=(3, 3)) / 2)
    return q * np.sign(np.diag(r))


def _facing(normal: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A rotation whose third axis is ``normal``, turned at random about it."""
    n = normal / np.linalg.norm(normal)
    a = np.cross(n, rng.normal(size=3))
    a /= np.linalg.norm(a)
    return np.stack([a, np.cross(n, a), n])


# -- kernels -----------------------------------------------------------------------------------------------------


def _windows(geometry: Geometry, points: NDArray[np.float64]) -> NDArray[np.int64]:
    """(views, n, 4): first and last row, first and last column (exclusive) that each of n sets of points may touch.

    ``points`` is (n, p, 3): corners of boxes that hold the ellipsoids. The image of a convex hull is the hull of its
    corners' images as long as all of them lie before the source; where one does not, the whole detector is taken.
    """
    rows, columns = geometry.detector_shape
    out = np.empty((geometry.views, len(points), 4), np.int64)
    for view, vector in enumerate(geometry.vectors):
        source, center, u, v = vector.reshape(4, 3)
        if geometry.kind == "cone":
            # P = source + t (center - source + a u + b v): solve for (t, t a, t b).
            solved = np.linalg.solve(np.stack([center - source, u, v], 1), (points - source).reshape(-1, 3).T)
            depth = solved[0]
            with np.errstate(divide="ignore", invalid="ignore"):
                a, b = solved[1] / depth, solved[2] / depth
        else:
            solved = np.linalg.solve(np.stack([source, u, v], 1), (points - center).reshape(-1, 3).T)
            depth, a, b = np.ones(solved.shape[1]), solved[1], solved[2]
        shape = points.shape[:2]
        behind = (depth.reshape(shape) <= 1e-6).any(axis=1)
        for k, (along, count) in enumerate(((b, rows), (a, columns))):
            along = along.reshape(shape) + (count - 1) / 2
            low, high = np.floor(along.min(axis=1)), np.ceil(along.max(axis=1)) + 1
            out[view, :, 2 * k] = np.where(behind, 0, np.clip(np.nan_to_num(low), 0, count))
            out[view, :, 2 * k + 1] = np.where(behind, count, np.clip(np.nan_to_num(high), 0, count))
    return out


@nb.njit(parallel=True, cache=True, nogil=True)
def _integrate(out, vectors, cone, windows, centers, to_body, values, replace):  # type: ignore[no-untyped-def]
    views, rows, columns = out.shape
    n = len(values)
    for job in nb.prange(views * rows):
        view, row = job // rows, job % rows
        vec = vectors[view]
        near, far, which = np.empty(n), np.empty(n), np.empty(n, np.int64)
        cuts = np.empty(2 * n)
        here = np.empty(n, np.int64)
        count = 0
        for e in range(n):
            if windows[view, e, 0] <= row < windows[view, e, 1]:
                here[count] = e
                count += 1
        for column in range(columns):
            a, b = column - (columns - 1) / 2, row - (rows - 1) / 2
            px = vec[3] + a * vec[6] + b * vec[9]
            py = vec[4] + a * vec[7] + b * vec[10]
            pz = vec[5] + a * vec[8] + b * vec[11]
            if cone:
                sx, sy, sz = vec[0], vec[1], vec[2]
                dx, dy, dz = px - sx, py - sy, pz - sz
            else:
                sx, sy, sz = px, py, pz
                dx, dy, dz = vec[0], vec[1], vec[2]
            length = math.sqrt(dx * dx + dy * dy + dz * dz)
            hits = 0
            total = 0.0
            for k in range(count):
                e = here[k]
                if not windows[view, e, 2] <= column < windows[view, e, 3]:
                    continue
                m = to_body[e]
                ox, oy, oz = sx - centers[e, 0], sy - centers[e, 1], sz - centers[e, 2]
                p0 = m[0, 0] * ox + m[0, 1] * oy + m[0, 2] * oz
                p1 = m[1, 0] * ox + m[1, 1] * oy + m[1, 2] * oz
                p2 = m[2, 0] * ox + m[2, 1] * oy + m[2, 2] * oz
                q0 = m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz
                q1 = m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz
                q2 = m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz
                qq = q0 * q0 + q1 * q1 + q2 * q2
                pq = p0 * q0 + p1 * q1 + p2 * q2
                # |p + t q|² = 1, from the point nearest the centre: no cancellation for a distant source.
                t = -pq / qq
                c0, c1, c2 = p0 + t * q0, p1 + t * q1, p2 + t * q2
                rest = 1.0 - (c0 * c0 + c1 * c1 + c2 * c2)
                if rest <= 0:
                    continue
                half = math.sqrt(rest / qq)
                t0, t1 = t - half, t + half
                if cone:  # only between the source and the detector
                    t0, t1 = max(t0, 0.0), min(t1, 1.0)
                    if t1 <= t0:
                        continue
                if replace:
                    near[hits], far[hits], which[hits] = t0, t1, e
                    hits += 1
                else:
                    total += values[e] * (t1 - t0)
            if hits > 0:
                for k in range(hits):
                    cuts[2 * k], cuts[2 * k + 1] = near[k], far[k]
                for i in range(1, 2 * hits):  # insertion sort: few and nearly sorted
                    x = cuts[i]
                    j = i - 1
                    while j >= 0 and cuts[j] > x:
                        cuts[j + 1] = cuts[j]
                        j -= 1
                    cuts[j + 1] = x
                for i in range(2 * hits - 1):
                    middle = 0.5 * (cuts[i] + cuts[i + 1])
                    top = -1
                    for k in range(hits - 1, -1, -1):  # hits are in order: the last that holds the point wins
                        if near[k] <= middle <= far[k]:
                            top = which[k]
                            break
                    if top >= 0:
                        total += values[top] * (cuts[i + 1] - cuts[i])
            out[view, row, column] = total * length


@nb.njit(parallel=True, cache=True, nogil=True)
def _integrate_blobs(out, vectors, cone, centers, sigmas, values):  # type: ignore[no-untyped-def]
    views, rows, columns = out.shape
    for job in nb.prange(views * rows):
        view, row = job // rows, job % rows
        vec = vectors[view]
        for column in range(columns):
            a, b = column - (columns - 1) / 2, row - (rows - 1) / 2
            px = vec[3] + a * vec[6] + b * vec[9]
            py = vec[4] + a * vec[7] + b * vec[10]
            pz = vec[5] + a * vec[8] + b * vec[11]
            dx, dy, dz = vec[0], vec[1], vec[2]
            if cone:
                dx, dy, dz = px - vec[0], py - vec[1], pz - vec[2]
            dd = dx * dx + dy * dy + dz * dz
            total = 0.0
            for e in range(len(values)):
                wx, wy, wz = centers[e, 0] - px, centers[e, 1] - py, centers[e, 2] - pz
                t = (wx * dx + wy * dy + wz * dz) / dd
                wx, wy, wz = wx - t * dx, wy - t * dy, wz - t * dz
                r = (wx * wx + wy * wy + wz * wz) / (2 * sigmas[e] * sigmas[e])
                if r < 60:
                    total += values[e] * sigmas[e] * math.exp(-r)
            out[view, row, column] = total * math.sqrt(2 * math.pi)


@nb.njit(parallel=True, cache=True, nogil=True)
def _fill(out, translate, voxel, centers, to_body, half, values, replace, fine):  # type: ignore[no-untyped-def]
    """Paint spans of sub-voxels: along a row of them an ellipsoid is one interval, known in closed form."""
    depth, height, width = out.shape
    step = voxel / fine
    first = -(fine - 1) / 2 * step  # the first sub-voxel's place within its voxel
    for k in nb.prange(depth):
        total = np.zeros((height, width))
        line = np.zeros(width * fine)
        for sub in range(fine):
            z = translate[0] + k * voxel + first + sub * step
            for j in range(height * fine):
                y = translate[1] + first + j * step
                line[:] = 0
                for e in range(len(values)):
                    oy, oz = y - centers[e, 1], z - centers[e, 2]
                    if abs(oz) >= half[e, 2] or abs(oy) >= half[e, 1]:
                        continue
                    m = to_body[e]
                    q0, q1, q2 = m[0, 0], m[1, 0], m[2, 0]
                    p0, p1, p2 = (
                        m[0, 1] * oy + m[0, 2] * oz,
                        m[1, 1] * oy + m[1, 2] * oz,
                        m[2, 1] * oy + m[2, 2] * oz,
                    )
                    qq = q0 * q0 + q1 * q1 + q2 * q2
                    t = -(p0 * q0 + p1 * q1 + p2 * q2) / qq
                    c0, c1, c2 = p0 + t * q0, p1 + t * q1, p2 + t * q2
                    rest = 1.0 - (c0 * c0 + c1 * c1 + c2 * c2)
                    if rest <= 0:
                        continue
                    reach = math.sqrt(rest / qq)
                    x = centers[e, 0] + t
                    origin = translate[2] + first
                    i0 = max(0, math.ceil((x - reach - origin) / step))
                    i1 = min(width * fine, math.floor((x + reach - origin) / step) + 1)
                    if replace:
                        for i in range(i0, i1):
                            line[i] = values[e]
                    else:
                        for i in range(i0, i1):
                            line[i] += values[e]
                row = total[j // fine]
                for i in range(width):
                    for s in range(fine):
                        row[i] += line[i * fine + s]
        for j in range(height):
            for i in range(width):
                out[k, j, i] = total[j, i] / fine**3
