"""Joseph's forward projector, its exact adjoint and voxel-driven back projection on the CPU.

Two families of kernels: one for any vectors, and a faster one for detectors aligned with z (u in the plane z = 0, v
along z), where all pixels of a column share their path in the plane: a slice is first interpolated to one line.

What makes them fast, and is easily lost:

- LLVM does not vectorise a loop that both computes addresses and gathers. Each inner loop is therefore split in two:
  the first computes offsets and weights (vectorised), the second only loads, or stores.
- No branches: everything that is gathered from carries one zero below and two above along its interpolated axes, and
  coordinates are clamped to [0, size - 2], where they meet only zeros. The forward and the adjoint see the same clamp.
- The adjoint is race-free, hence exact and deterministic: each thread owns slices and walks over all rays.

Numba's workqueue threading layer (where neither OpenMP nor TBB is installed) aborts the process when kernels are called
from two threads at once, so that every call holds :data:`kernel_lock`.

References
----------
P. M. Joseph, An improved algorithm for reprojecting rays through pixel images, IEEE Trans. Med. Imaging 1, 1982.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.physics.projectors.rays import Rays

kernel_lock = threading.RLock()
"""Held during every call of a parallel numba kernel (see above); take it before calling one of your own."""

# Bytes of ray sums that are worked on at a time: bounds the memory beyond volume and projections.
BATCH_BYTES = 16 << 20

FAST: dict[str, Any] = {"fastmath": True, "cache": True, "nogil": True, "error_model": "numpy"}
"""How all numba kernels are compiled."""

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64

# Memory order (main axis, a, b) of a volume for each kernel, as axes of (x, y, z). Along b lies what the inner loop
# runs over: the detector's columns in general, its rows (along z) when it is aligned.
_GENERAL_ORDER = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}
_ALIGNED_ORDER = {0: (0, 1, 2), 1: (1, 0, 2)}


@njit(inline="always", **FAST)
def _clamp(x, high):  # type: ignore[no-untyped-def]
    x = x if x > f32(0) else f32(0)
    return x if x < high else high


@njit(inline="always", **FAST)
def _outside(first, last, high):  # type: ignore[no-untyped-def]
    """Whether a line of coordinates from first to last (monotone between) lies wholly in the padding."""
    return (first <= f32(0) and last <= f32(0)) or (first >= high and last >= high)


# -- Joseph, any vectors: volume (S, A + 3, B + 3), sums (views, rows, columns) ---------------------------------------


@njit(parallel=True, **FAST)
def _ray_sums(volume, rays, counts, sums):  # type: ignore[no-untyped-def]
    """Sum the interpolated slices along every ray.

    ``rays`` (n, 6, 3) is the table of :class:`Rays` in (main, a, b) order, ``counts`` (n, 2) the rows and columns of
    each view's window.
    """
    slices, size_a, size_b = volume.shape
    planes = volume.reshape(slices, size_a * size_b)
    stride, high_a, high_b = i32(size_b), f32(size_a - 2), f32(size_b - 2)
    step = u64(size_b)
    block = 8
    blocks = (sums.shape[1] + block - 1) // block
    width = sums.shape[2]
    for task in prange(len(rays) * blocks):
        n = task // blocks
        ray = rays[n]
        rows, columns = counts[n]
        slope_a, slope_b = np.empty(width, f32), np.empty(width, f32)
        start_a, start_b = np.empty(width, f32), np.empty(width, f32)
        weight_a, weight_b = np.empty(width, f32), np.empty(width, f32)
        offset, total = np.empty(width, i32), np.empty(width, f32)
        row0 = (task % blocks) * block
        for r in range(row0, min(row0 + block, rows)):
            for c in range(columns):
                inverse = 1.0 / (ray[3, 0] + c * ray[4, 0] + r * ray[5, 0])
                run_a = (ray[3, 1] + c * ray[4, 1] + r * ray[5, 1]) * inverse
                run_b = (ray[3, 2] + c * ray[4, 2] + r * ray[5, 2]) * inverse
                origin = ray[0, 0] + c * ray[1, 0] + r * ray[2, 0]
                slope_a[c], slope_b[c] = run_a, run_b
                start_a[c] = ray[0, 1] + c * ray[1, 1] + r * ray[2, 1] + 1.0 - origin * run_a
                start_b[c] = ray[0, 2] + c * ray[1, 2] + r * ray[2, 2] + 1.0 - origin * run_b
                total[c] = 0
            last = columns - 1
            for s in range(slices):
                fs = f32(s)
                if _outside(start_a[0] + fs * slope_a[0], start_a[last] + fs * slope_a[last], high_a):
                    continue
                if _outside(start_b[0] + fs * slope_b[0], start_b[last] + fs * slope_b[last], high_b):
                    continue
                plane = planes[s]
                for c in range(columns):
                    a = _clamp(start_a[c] + fs * slope_a[c], high_a)
                    b = _clamp(start_b[c] + fs * slope_b[c], high_b)
                    ia, ib = i32(a), i32(b)
                    weight_a[c], weight_b[c] = a - f32(ia), b - f32(ib)
                    offset[c] = ia * stride + ib
                for c in range(columns):
                    o = u64(u32(offset[c]))
                    fb = weight_b[c]
                    x0, x1 = plane[o], plane[o + u64(1)]
                    o += step
                    y0, y1 = plane[o], plane[o + u64(1)]
                    x0 = x0 + fb * (x1 - x0)
                    y0 = y0 + fb * (y1 - y0)
                    total[c] += x0 + weight_a[c] * (y0 - x0)
            for c in range(columns):
                sums[n, r, c] = total[c]


@njit(parallel=True, **FAST)
def _spread_sums(volume, rays, counts, sums, block):  # type: ignore[no-untyped-def]
    """The transpose of :func:`_ray_sums`, added to ``volume``; a thread owns ``block`` slices."""
    slices, size_a, size_b = volume.shape
    planes = volume.reshape(slices, size_a * size_b)
    stride, high_a, high_b = i32(size_b), f32(size_a - 2), f32(size_b - 2)
    step = u64(size_b)
    width = sums.shape[2]
    for task in prange((slices + block - 1) // block):
        slope_a, slope_b = np.empty(width, f32), np.empty(width, f32)
        start_a, start_b = np.empty(width, f32), np.empty(width, f32)
        w00, w01 = np.zeros(width + 1, f32), np.zeros(width + 1, f32)
        w10, w11 = np.zeros(width + 1, f32), np.zeros(width + 1, f32)
        offset = np.zeros(width + 1, i32)
        for n in range(len(rays)):
            ray = rays[n]
            rows, columns = counts[n]
            last = columns - 1
            half = u64((columns + 1) // 2)
            for r in range(rows):
                value = sums[n, r]
                for c in range(columns):
                    inverse = 1.0 / (ray[3, 0] + c * ray[4, 0] + r * ray[5, 0])
                    run_a = (ray[3, 1] + c * ray[4, 1] + r * ray[5, 1]) * inverse
                    run_b = (ray[3, 2] + c * ray[4, 2] + r * ray[5, 2]) * inverse
                    origin = ray[0, 0] + c * ray[1, 0] + r * ray[2, 0]
                    slope_a[c], slope_b[c] = run_a, run_b
                    start_a[c] = ray[0, 1] + c * ray[1, 1] + r * ray[2, 1] + 1.0 - origin * run_a
                    start_b[c] = ray[0, 2] + c * ray[1, 2] + r * ray[2, 2] + 1.0 - origin * run_b
                for s in range(task * block, min(task * block + block, slices)):
                    fs = f32(s)
                    if _outside(start_a[0] + fs * slope_a[0], start_a[last] + fs * slope_a[last], high_a):
                        continue
                    if _outside(start_b[0] + fs * slope_b[0], start_b[last] + fs * slope_b[last], high_b):
                        continue
                    plane = planes[s]
                    for c in range(columns):
                        a = _clamp(start_a[c] + fs * slope_a[c], high_a)
                        b = _clamp(start_b[c] + fs * slope_b[c], high_b)
                        ia, ib = i32(a), i32(b)
                        fa, fb = a - f32(ia), b - f32(ib)
                        offset[c] = ia * stride + ib
                        q1 = value[c] * fa
                        q0 = value[c] - q1
                        w01[c] = q0 * fb
                        w00[c] = q0 - q0 * fb
                        w11[c] = q1 * fb
                        w10[c] = q1 - q1 * fb
                    if columns % 2:
                        offset[columns] = 0
                        w00[columns] = w01[columns] = w10[columns] = w11[columns] = 0
                    # Neighbouring columns store to the same voxels, each waiting for the one before; two halves of the
                    # row in turn keep the processor busy.
                    for c in range(half):
                        d = u64(c)
                        for _ in range(2):
                            o = u64(u32(offset[d]))
                            plane[o] += w00[d]
                            plane[o + u64(1)] += w01[d]
                            o += step
                            plane[o] += w10[d]
                            plane[o + u64(1)] += w11[d]
                            d += half


# -- Joseph, aligned detector: volume (S, A + 3, Z + 3), sums (views, columns, rows) ----------------------------------


@njit(parallel=True, **FAST)
def _ray_sums_aligned(volume, rays, counts, sums):  # type: ignore[no-untyped-def]
    slices, size_a, size_z = volume.shape
    high_a, high_z = f32(size_a - 2), f32(size_z - 2)
    block = 8
    blocks = (sums.shape[1] + block - 1) // block
    height = sums.shape[2]
    for task in prange(len(rays) * blocks):
        n = task // blocks
        ray = rays[n]
        rows, columns = counts[n]
        total, weight, offset = np.empty(height, f32), np.empty(height, f32), np.empty(height, i32)
        line = np.empty(size_z, f32)
        c0 = (task % blocks) * block
        for c in range(c0, min(c0 + block, columns)):
            origin = ray[0, 0] + c * ray[1, 0]
            inverse = 1.0 / (ray[3, 0] + c * ray[4, 0])
            slope = (ray[3, 1] + c * ray[4, 1]) * inverse
            start = ray[0, 1] + c * ray[1, 1] + 1.0 - origin * slope
            for r in range(rows):
                total[r] = 0
            for s in range(slices):
                a = f32(start + s * slope)
                if a <= f32(0) or a >= high_a:
                    continue
                ia = i32(a)
                fa = a - f32(ia)
                line0, line1 = volume[s, ia], volume[s, ia + 1]
                for q in range(size_z):
                    line[q] = line0[q] + fa * (line1[q] - line0[q])
                t = (s - origin) * inverse
                z0 = f32(ray[0, 2] + c * ray[1, 2] + 1.0 + t * (ray[3, 2] + c * ray[4, 2]))
                dz = f32(ray[2, 2] + t * ray[5, 2])
                for r in range(rows):
                    z = _clamp(z0 + dz * f32(i32(r)), high_z)
                    iz = i32(z)
                    weight[r] = z - f32(iz)
                    offset[r] = iz
                for r in range(rows):
                    o = u64(u32(offset[r]))
                    x0 = line[o]
                    total[r] += x0 + weight[r] * (line[o + u64(1)] - x0)
            for r in range(rows):
                sums[n, c, r] = total[r]


@njit(parallel=True, **FAST)
def _spread_sums_aligned(volume, rays, counts, sums, block):  # type: ignore[no-untyped-def]
    """The transpose of :func:`_ray_sums_aligned`, added to ``volume``; a thread owns ``block`` slices.

    Row r meets z(r) = z0 + r dz and gives voxel q the part hat(z(r) - q) of its value. Since the hat is the second
    difference of the ramp (x)+, what q gets is that of G(q) = sum over rows beyond q of value (z(r) - q), and G comes
    from two running sums over the rows, of value and r value, that all slices share: no scattering. The running sums
    are float64, so that nothing is lost in the differences.
    """
    slices, size_a, size_z = volume.shape
    high_a = f32(size_a - 2)
    height = sums.shape[2]
    for task in prange((slices + block - 1) // block):
        s0, s1 = task * block, min(task * block + block, slices)
        beyond, beyond_r = np.empty(height + 1), np.empty(height + 1)
        first, g0, g1 = np.empty(size_z, i32), np.empty(size_z), np.empty(size_z)
        for n in range(len(rays)):
            ray = rays[n]
            rows, columns = counts[n]
            for c in range(columns):
                origin = ray[0, 0] + c * ray[1, 0]
                inverse = 1.0 / (ray[3, 0] + c * ray[4, 0])
                slope = (ray[3, 1] + c * ray[4, 1]) * inverse
                start = ray[0, 1] + c * ray[1, 1] + 1.0 - origin * slope
                if _outside(f32(start + s0 * slope), f32(start + (s1 - 1) * slope), high_a):
                    continue
                value = sums[n, c]
                run, run_r = 0.0, 0.0
                beyond[rows] = beyond_r[rows] = 0
                for back in range(rows):
                    r = rows - 1 - back
                    run += value[r]
                    run_r += value[r] * r
                    beyond[r], beyond_r[r] = run, run_r
                for s in range(s0, s1):
                    a = f32(start + s * slope)
                    if a <= f32(0) or a >= high_a:
                        continue
                    ia = i32(a)
                    fa = a - f32(ia)
                    ga = f32(1) - fa
                    t = (s - origin) * inverse
                    z0 = ray[0, 2] + c * ray[1, 2] + 1.0 + t * (ray[3, 2] + c * ray[4, 2])
                    dz = ray[2, 2] + t * ray[5, 2]
                    rate = 1.0 / dz
                    for q in range(size_z):  # the first row beyond q
                        r = (q - z0) * rate + 1.0
                        r = r if r > 0.0 else 0.0
                        first[q] = i32(r if r < rows else rows)
                    for q in range(size_z):
                        o = u64(u32(first[q]))
                        g0[q], g1[q] = beyond[o], beyond_r[o]
                    sign = 1.0 if dz > 0 else -1.0  # rows that run downwards: the ramp of the other side
                    for q in range(size_z):
                        g0[q] = sign * ((z0 - q) * g0[q] + dz * g1[q])
                    line0, line1 = volume[s, ia], volume[s, ia + 1]
                    for q in range(1, size_z - 1):
                        part = f32(g0[q - 1] - 2 * g0[q] + g0[q + 1])
                        line0[q] += ga * part
                        line1[q] += fa * part


# -- between ray sums and projections (rows, views, columns): lengths between two slices, and the transpose -----------


@njit(inline="always", **FAST)
def _length(ray, r, c):  # type: ignore[no-untyped-def]
    """|d| / |d_main|: the length of the ray between two slices, in voxels."""
    d0 = f32(ray[3, 0] + c * ray[4, 0] + r * ray[5, 0])
    d1 = f32(ray[3, 1] + c * ray[4, 1] + r * ray[5, 1])
    d2 = f32(ray[3, 2] + c * ray[4, 2] + r * ray[5, 2])
    return f32(math.sqrt(d0 * d0 + d1 * d1 + d2 * d2)) / abs(d0)


@njit(parallel=True, **FAST)
def _give_projections(sums, rays, counts, corners, views, size, aligned, projections):  # type: ignore[no-untyped-def]
    """projections[row, view, column] = length * sums, at the place ``corners`` (n, 2) of each view's window."""
    tile = 16
    for task in prange(len(rays)):
        ray, view = rays[task], views[task]
        rows, columns = counts[task]
        row0, column0 = corners[task]
        for begin in range(0, columns, tile):
            for r in range(rows):
                target = projections[row0 + r, view]
                for c in range(begin, min(begin + tile, columns)):
                    q = sums[task, c, r] if aligned else sums[task, r, c]
                    target[column0 + c] = q * (_length(ray, r, c) * size)


@njit(parallel=True, **FAST)
def _take_projections(sums, rays, counts, corners, views, size, aligned, projections):  # type: ignore[no-untyped-def]
    """The transpose of :func:`_give_projections`."""
    tile = 16
    for task in prange(len(rays)):
        ray, view = rays[task], views[task]
        rows, columns = counts[task]
        row0, column0 = corners[task]
        for begin in range(0, columns, tile):
            for r in range(rows):
                source = projections[row0 + r, view]
                for c in range(begin, min(begin + tile, columns)):
                    q = source[column0 + c] * (_length(ray, r, c) * size)
                    if aligned:
                        sums[task, c, r] = q
                    else:
                        sums[task, r, c] = q


@njit(parallel=True, **FAST)
def _square_lengths(sums, rays, counts, size, aligned):  # type: ignore[no-untyped-def]
    """Both of the above in one, without the projections: sums *= length^2."""
    for task in prange(len(rays)):
        ray = rays[task]
        rows, columns = counts[task]
        if aligned:
            for c in range(columns):
                for r in range(rows):
                    length = _length(ray, r, c) * size
                    sums[task, c, r] *= length * length
        else:
            for r in range(rows):
                for c in range(columns):
                    length = _length(ray, r, c) * size
                    sums[task, r, c] *= length * length


# -- voxel-driven back projection of filtered projections -------------------------------------------------------------


@njit(parallel=True, **FAST)
def _backproject(filtered, matrices, out):  # type: ignore[no-untyped-def]
    """out[k, j, i] += sum over views of W^-2 times the bilinear sample. filtered (n, rows + 3, columns + 3)."""
    views, height, width = filtered.shape
    depth, ny, nx = out.shape
    images = filtered.reshape(views, height * width)
    stride, step, high_u, high_v = i32(width), u64(width), f32(width - 2), f32(height - 2)
    block = 8
    blocks = (ny + block - 1) // block
    for task in prange(depth * blocks):
        k, j0 = task // blocks, (task % blocks) * block
        total = np.zeros((block, nx), f32)
        offset, weight_u, weight_v, scale = np.empty(nx, i32), np.empty(nx, f32), np.empty(nx, f32), np.empty(nx, f32)
        for n in range(views):
            m, image = matrices[n], images[n]
            step_u, step_v, step_w = f32(m[0, 0]), f32(m[1, 0]), f32(m[2, 0])
            for jj in range(min(block, ny - j0)):
                j = j0 + jj
                acc = total[jj]
                u0 = f32(m[0, 1] * j + m[0, 2] * k + m[0, 3])
                v0 = f32(m[1, 1] * j + m[1, 2] * k + m[1, 3])
                w0 = f32(m[2, 1] * j + m[2, 2] * k + m[2, 3])
                for i in range(nx):
                    fi = f32(i32(i))
                    inverse = f32(1) / (w0 + fi * step_w)
                    u = _clamp((u0 + fi * step_u) * inverse + f32(1), high_u)
                    v = _clamp((v0 + fi * step_v) * inverse + f32(1), high_v)
                    iu, iv = i32(u), i32(v)
                    weight_u[i], weight_v[i] = u - f32(iu), v - f32(iv)
                    scale[i] = inverse * inverse
                    offset[i] = iv * stride + iu
                for i in range(nx):
                    o = u64(u32(offset[i]))
                    fu = weight_u[i]
                    x0, x1 = image[o], image[o + u64(1)]
                    o += step
                    y0, y1 = image[o], image[o + u64(1)]
                    x0 = x0 + fu * (x1 - x0)
                    y0 = y0 + fu * (y1 - y0)
                    acc[i] += (x0 + weight_v[i] * (y0 - x0)) * scale[i]
        for jj in range(min(block, ny - j0)):
            for i in range(nx):
                out[k, j0 + jj, i] += total[jj, i]


@njit(parallel=True, **FAST)
def _backproject_aligned(filtered, matrices, out):  # type: ignore[no-untyped-def]
    """As :func:`_backproject` where column and depth do not depend on z. filtered (n, columns + 3, rows + 3).

    A tile of voxel columns takes two views at a time, so that it stores its sums half as often.
    """
    views, width, height = filtered.shape
    depth, ny, nx = out.shape
    high_u, high_v = f32(width - 2), f32(height - 2)
    tile_x, tile_y = 8, 4
    tiles_x, tiles_y = (nx + tile_x - 1) // tile_x, (ny + tile_y - 1) // tile_y
    for task in prange(tiles_x * tiles_y):
        j0, i0 = (task // tiles_x) * tile_y, (task % tiles_x) * tile_x
        total = np.zeros((tile_y * tile_x, depth), f32)
        column_a, column_b = np.empty(height, f32), np.empty(height, f32)
        offset_a, offset_b = np.empty(depth, i32), np.empty(depth, i32)
        weight_a, weight_b = np.empty(depth, f32), np.empty(depth, f32)
        for n0 in range(0, views, 2):
            for place in range(tile_y * tile_x):
                j, i = j0 + place // tile_x, i0 + place % tile_x
                if j >= ny or i >= nx:
                    continue
                acc = total[place]
                seen = 0
                for n in range(n0, min(n0 + 2, views)):
                    m = matrices[n]
                    inverse = 1.0 / (m[2, 0] * i + m[2, 1] * j + m[2, 3])
                    u = f32((m[0, 0] * i + m[0, 1] * j + m[0, 3]) * inverse) + f32(1)
                    if u <= f32(0) or u >= high_u:
                        continue
                    iu = i32(u)
                    column0, column1 = filtered[n, iu], filtered[n, iu + 1]
                    scale = f32(inverse * inverse)
                    g1 = (u - f32(iu)) * scale
                    g0 = scale - g1
                    v0 = f32((m[1, 0] * i + m[1, 1] * j + m[1, 3]) * inverse) + f32(1)
                    dv = f32(m[1, 2] * inverse)
                    column = column_b if seen else column_a
                    offset = offset_b if seen else offset_a
                    weight = weight_b if seen else weight_a
                    for q in range(height):
                        column[q] = g0 * column0[q] + g1 * column1[q]
                    for k in range(depth):
                        v = _clamp(v0 + dv * f32(i32(k)), high_v)
                        iv = i32(v)
                        weight[k] = v - f32(iv)
                        offset[k] = iv
                    seen += 1
                if seen == 2:
                    for k in range(depth):
                        o, p = u64(u32(offset_a[k])), u64(u32(offset_b[k]))
                        x0, y0 = column_a[o], column_b[p]
                        x0 += weight_a[k] * (column_a[o + u64(1)] - x0)
                        y0 += weight_b[k] * (column_b[p + u64(1)] - y0)
                        acc[k] += x0 + y0
                elif seen == 1:
                    for k in range(depth):
                        o = u64(u32(offset_a[k]))
                        x0 = column_a[o]
                        acc[k] += x0 + weight_a[k] * (column_a[o + u64(1)] - x0)
        for k in range(depth):
            for j in range(j0, min(j0 + tile_y, ny)):
                for i in range(i0, min(i0 + tile_x, nx)):
                    out[k, j, i] += total[(j - j0) * tile_x + i - i0, k]


# -- the projector ----------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Some views of a group, each cut to the window of rays that can meet the volume."""

    views: NDArray[np.int64]
    rays: NDArray[np.float64]  # (n, 6, 3), in the kernel's axis order, starting at the window's first pixel
    counts: NDArray[np.int64]  # (n, 2): rows and columns of the window
    corners: NDArray[np.int64]  # (n, 2): first row and column of the window
    aligned: bool

    def empty_sums(self) -> NDArray[np.float32]:
        rows, columns = (int(n) for n in self.counts.max(axis=0))
        return np.empty((len(self.views), *((columns, rows) if self.aligned else (rows, columns))), np.float32)


class NumbaProjector:
    """Forward projection, exact adjoint and FDK's back projection on the CPU.

    Parameters
    ----------
    rays
        The geometry and the grid.
    """

    def __init__(self, rays: Rays) -> None:
        self.rays = rays
        self.size = f32(rays.grid.voxel_size)

    def forward(self, volume: Tensor) -> Tensor:
        """Line integrals (rows, views, columns) of a volume (D, H, W), float32."""
        rows, columns = self.rays.geometry.detector_shape
        full = (self.rays.window == (0, rows, 0, columns)).all()
        out = (np.empty if full else np.zeros)((rows, self.rays.geometry.views, columns), np.float32)
        array = _array(volume)
        with kernel_lock:
            for axis, aligned, views in self.rays.groups:
                padded = _pad(array, _order(axis, aligned))
                for batch in self._batches(axis, aligned, views):
                    sums = self._sum(padded, batch)
                    _give_projections(
                        sums, batch.rays, batch.counts, batch.corners, batch.views, self.size, aligned, out
                    )
                del padded  # before the next one is there
        return torch.from_numpy(out)

    def adjoint(self, projections: Tensor, out: Tensor | None = None) -> Tensor:
        """The transpose of :meth:`forward`: (rows, views, columns) -> (D, H, W), float32; added to ``out`` if given."""
        out = torch.zeros(self.rays.grid.shape) if out is None else out
        array = _array(projections)
        with kernel_lock:
            for axis, aligned, views in self.rays.groups:
                padded = _padded(self.rays.grid.shape, _order(axis, aligned))
                for batch in self._batches(axis, aligned, views):
                    sums = batch.empty_sums()
                    _take_projections(
                        sums, batch.rays, batch.counts, batch.corners, batch.views, self.size, aligned, array
                    )
                    self._spread(padded, batch, sums)
                _unpad(padded, _order(axis, aligned), out)
        return out

    def normal(self, volume: Tensor) -> Tensor:
        """Adjoint of forward, without ever holding the projections: only those rays of a few views at a time."""
        out = torch.zeros(self.rays.grid.shape)
        array = _array(volume)
        with kernel_lock:
            for axis, aligned, views in self.rays.groups:
                source = _pad(array, _order(axis, aligned))
                target = np.zeros_like(source)
                for batch in self._batches(axis, aligned, views):
                    sums = self._sum(source, batch)
                    _square_lengths(sums, batch.rays, batch.counts, self.size, aligned)
                    self._spread(target, batch, sums)
                _unpad(target, _order(axis, aligned), out)
                del source, target  # before the next ones are there
        return out

    def filtered_buffer(self, views: int, rows: int) -> tuple[NDArray[np.float32], Tensor]:
        """Where filtered projections of some views and rows are to be put for :meth:`backproject`.

        Returns
        -------
        The buffer, and its inside as (rows, views, columns).
        """
        columns = self.rays.geometry.detector_shape[1]
        if self._all_aligned:
            buffer = _padded((views, columns, rows), (2, 1, 0))
            return buffer, torch.from_numpy(buffer[:, 1:-2, 1:-2].transpose(2, 0, 1))
        buffer = _padded((views, rows, columns), (2, 1, 0))
        return buffer, torch.from_numpy(buffer[:, 1:-2, 1:-2].transpose(1, 0, 2))

    def backproject(self, buffer: NDArray[np.float32], first_view: int, first_row: int, out: Tensor) -> None:
        """Add to ``out`` (D, H, W) the sum over views of W^-2 times the sample where each voxel is seen (FDK).

        W is the voxel's depth over that of the detector (1 for parallel beam).
        """
        matrices = self.rays.homography[first_view : first_view + len(buffer)].copy()
        matrices[:, 1] -= first_row * matrices[:, 2]
        with kernel_lock:
            (_backproject_aligned if self._all_aligned else _backproject)(buffer, matrices, out.numpy())

    @property
    def _all_aligned(self) -> bool:
        return bool(self.rays.aligned.all())

    def _batches(self, axis: int, aligned: bool, views: NDArray[np.int64]) -> Iterator[_Batch]:
        window = self.rays.window[views]
        corners, counts = window[:, 0::2], window[:, 1::2] - window[:, 0::2]
        table = self.rays.table[views][:, :, list(_order(axis, aligned))]
        # o and d of the window's first pixel
        shift = corners[:, 1, None, None] * table[:, (1, 4)] + corners[:, 0, None, None] * table[:, (2, 5)]
        table[:, (0, 3)] += shift
        rows, columns = counts.max(axis=0)
        size = max(1, int(BATCH_BYTES // (4 * rows * columns)))
        for i in range(0, len(views), size):
            part = slice(i, i + size)
            yield _Batch(views[part], table[part], counts[part].copy(), corners[part].copy(), aligned)

    def _sum(self, padded: NDArray[np.float32], batch: _Batch) -> NDArray[np.float32]:
        sums = batch.empty_sums()
        (_ray_sums_aligned if batch.aligned else _ray_sums)(padded, batch.rays, batch.counts, sums)
        return sums

    def _spread(self, padded: NDArray[np.float32], batch: _Batch, sums: NDArray[np.float32]) -> None:
        # Several slices share the rays' preparation; fewer where there are many threads to feed.
        block = int(np.clip(len(padded) // (4 * get_num_threads()), 1, 16))
        (_spread_sums_aligned if batch.aligned else _spread_sums)(padded, batch.rays, batch.counts, sums, block)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)


def _order(axis: int, aligned: bool) -> tuple[int, int, int]:
    return _ALIGNED_ORDER[axis] if aligned else _GENERAL_ORDER[axis]


def _padded(shape: tuple[int, int, int], order: tuple[int, int, int]) -> NDArray[np.float32]:
    """Zeros for a volume (z, y, x) in the memory order of a kernel, with its padding."""
    s, a, b = (shape[2 - q] for q in order)
    return np.zeros((s, a + 3, b + 3), np.float32)


def _pad(volume: NDArray[np.float32], order: tuple[int, int, int]) -> NDArray[np.float32]:
    padded = _padded(volume.shape, order)  # type: ignore[arg-type]
    # torch copies transposed arrays in parallel
    axes = tuple(2 - q for q in order)
    torch.from_numpy(padded)[:, 1:-2, 1:-2].copy_(torch.from_numpy(volume).permute(axes))
    return padded


def _unpad(padded: NDArray[np.float32], order: tuple[int, int, int], out: Tensor) -> None:
    """Add a padded volume in a kernel's memory order to ``out`` (D, H, W)."""
    axes = tuple(2 - q for q in order)
    out.permute(axes).add_(torch.from_numpy(padded)[:, 1:-2, 1:-2])
