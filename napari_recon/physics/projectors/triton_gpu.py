"""Joseph's forward projector, its exact adjoint and voxel-driven back projection on GPUs, in Triton.

The same numbers as the CPU's kernels, and the same two families: any vectors, and detectors aligned with z, where
whatever depends on the column alone is computed once for all rows or slices of a block.

- The **forward** projection has a program a block of pixels. Its slices are three stretches: those in which some ray
  is beside the volume or at its edge, and between them those where nothing need be checked.
- The **adjoint** gathers: a program owns a block of voxels, and adds up the rays that cross a voxel's slice within one
  voxel of it. No atomics, hence deterministic; the weights are the forward's, computed by the same formulas.
- **FDK's back projection** has a program a block of voxels and reads images with a border of zeros, so that it need
  not check where it reads.

Positions are float32 and counted from the middle of the grid, pixels from the middle of a view's window; the vectors
are reduced to a ray's crossing of the middle slice in float64, so that it matters little how far away the source is. A
position is off by at most 3e-7 of half the grid's width, 7e-5 voxels at 500 voxels and 3e-4 at 2000, and mostly by a
fifth of that. Sums are float32.

A GPU that computes also draws the viewer, and does not interrupt a kernel: launches are kept to some 10 to 20 ms. Block
shapes are chosen by timing the first launches of the real work. They do not change a voxel's or a ray's order of
summation.

References
----------
P. M. Joseph, An improved algorithm for reprojecting rays through pixel images, IEEE Trans. Med. Imaging 1, 1982.
P. Tillet, H. T. Kung, D. Cox, Triton: an intermediate language and compiler for tiled neural network computations,
MAPL 2019.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.physics.projectors.rays import Rays

# Interpolations (forward) or voxels times views (the others) in one launch: 10 to 20 ms on a large GPU. On slower ones
# launches are cut to LONGEST, once it is known how slow they are.
LAUNCH = {"forward": 4e9, "adjoint": 1e9, "backproject": 3e9}
LONGEST = 20.0  # ms

# Voxels between the first and the last of a slice, beyond which an offset does not fit into 32 bits.
WIDEST = 2**31

# How often every block shape is timed before the fastest is chosen: a GPU that begins to work is slower.
ROUNDS = 2

# Bytes of ray sums, or of projections that come from the host, that are worked on at a time.
BATCH_BYTES = 256 << 20

# (main axis, a, b) as axes of (x, y, z)
_ORDER = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}

# What a view's row of the tables holds, see _view_tables.
FLOATS = tl.constexpr(32)
INTEGERS = tl.constexpr(8)

# A voxel's rays are sought within this many pixels more than the hat's width, against rounding.
SLACK = tl.constexpr(0.01)

# A depth that stands for all that is not in front of the source.
NEAREST = tl.constexpr(1e-6)


@triton.jit
def _one(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


def try_out(device: torch.device) -> None:
    """Compile and run the smallest of kernels, so that what is missing (a C compiler, say) shows before a job begins.

    Raises
    ------
    Exception
        Triton's own, of many kinds.
    """
    with torch.cuda.device(device):
        out = torch.zeros(1, device=device)
        _one[(1,)](out)
    if float(out) != 1.0:
        raise RuntimeError("a kernel ran without effect")


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel that is compiled once, not again for sizes that happen to be 1 or a multiple of 16."""
    parameters = inspect.signature(function).parameters.values()
    sizes = [each.name for each in parameters if each.annotation is inspect.Parameter.empty]
    return triton.jit(function, do_not_specialize=sizes)


# -- what the kernels share -------------------------------------------------------------------------------------------


@triton.jit
def _split(x):  # type: ignore[no-untyped-def]
    """The integer below x, and the rest, by additions: conversions have fewer units.

    Beside 1.5 * 2^23 float32 has no fraction left, and its bits count. For an integer the pair may also be (x - 1, 1).
    """
    shifted = (x - 0.5) + 12582912.0
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000, x - (shifted - 12582912.0)


@triton.jit
def _crossings(view, fr, fc, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rays of pixels (fr, fc) cross the middle slice, and their slopes: a, slope of a, b, slope of b."""
    depth = 1.0 + tl.load(view) * fc
    a = tl.load(view + 2) + tl.load(view + 3) * fc + tl.load(view + 4) * fr
    b = tl.load(view + 5) + tl.load(view + 6) * fc
    slope_a = tl.load(view + 8) + tl.load(view + 9) * fc + tl.load(view + 10) * fr
    slope_b = tl.load(view + 11) + tl.load(view + 12) * fc
    if not ALIGNED:
        depth += tl.load(view + 1) * fr
        b += tl.load(view + 7) * fr
        slope_b += tl.load(view + 13) * fr
    inverse = 1.0 / depth
    return a * inverse, slope_a * inverse, b * inverse, slope_b * inverse


@triton.jit
def _stretch(start, slope, low, high):  # type: ignore[no-untyped-def]
    """First and last t with low < start + t slope < high; the first is the larger one where there is none."""
    level = tl.abs(slope) < 1e-12
    rate = 1.0 / tl.where(level, 1.0, slope)
    one, other = (low - start) * rate, (high - start) * rate
    beside = tl.where((start > low) & (start < high), -1e30, 1e30)
    first = tl.where(level, beside, tl.minimum(one, other))
    last = tl.where(level, -beside, tl.maximum(one, other))
    return first, last


@triton.jit
def _block(first, nx, ny, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr):  # type: ignore[no-untyped-def]
    """The voxels of a program: x and y (1, BX BY), z (BZ, 1)."""
    tile = tl.program_id(0) + first
    across, down = (nx + BX - 1) // BX, (ny + BY - 1) // BY
    place = tl.arange(0, BX * BY)[None, :]
    x = (tile % across) * BX + place % BX
    y = (tile // across % down) * BY + place // BX
    z = (tile // (across * down)) * BZ + tl.arange(0, BZ)[:, None]
    return x, y, z


# -- Joseph's forward projection --------------------------------------------------------------------------------------


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    plane, a, b, size_a, size_b, middle_a, middle_b, stride_a, CHECKED: tl.constexpr, WIDE: tl.constexpr
):
    """The bilinear samples of a slice; ``plane`` is its middle. CHECKED: zero outside, else all lie inside."""
    ia, fa = _split(a)
    ib, fb = _split(b)
    row = ia.to(tl.int64) * stride_a if WIDE else ia * stride_a
    place = (plane + ib) + row
    if CHECKED:
        low_a = (ia >= -middle_a) & (ia < size_a - middle_a)
        high_a = (ia >= -1 - middle_a) & (ia < size_a - middle_a - 1)
        low_b = (ib >= -middle_b) & (ib < size_b - middle_b)
        high_b = (ib >= -1 - middle_b) & (ib < size_b - middle_b - 1)
        x0 = tl.load(place, mask=low_a & low_b, other=0.0)
        x1 = tl.load(place + 1, mask=low_a & high_b, other=0.0)
        y0 = tl.load(place + stride_a, mask=high_a & low_b, other=0.0)
        y1 = tl.load(place + stride_a + 1, mask=high_a & high_b, other=0.0)
    else:
        x0 = tl.load(place)
        x1 = tl.load(place + 1)
        y0 = tl.load(place + stride_a)
        y1 = tl.load(place + stride_a + 1)
    x0 += fb * (x1 - x0)
    y0 += fb * (y1 - y0)
    return x0 + fa * (y0 - x0)


@_kernel
def _forward(  # type: ignore[no-untyped-def]
    volume,
    floats,
    integers,
    out,
    first,
    tiles,
    middle,
    slices,
    size_a,
    size_b,
    stride_s,
    stride_a,
    pitch_row,
    pitch_view,
    voxel_size,
    ALIGNED: tl.constexpr,
    CUT: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Line integrals of the views' windows; CUT: times the ray's length once more, into (n, rows, columns)."""
    n = tl.program_id(1)
    tile = tl.program_id(0) + first
    view, place = floats + n * FLOATS, integers + n * INTEGERS
    rows, columns = tl.load(place + 3), tl.load(place + 4)
    row = (tile // tiles) * BR + tl.arange(0, BR)[:, None]
    column = (tile % tiles) * BC + tl.arange(0, BC)[None, :]
    if (tile // tiles) * BR >= rows or (tile % tiles) * BC >= columns:
        return
    # Pixels beyond the window follow its last ray, so that none of a block reads elsewhere.
    fr = (tl.minimum(row, rows - 1) - tl.load(place + 5)).to(tl.float32)
    fc = (tl.minimum(column, columns - 1) - tl.load(place + 6)).to(tl.float32)
    a, slope_a, b, slope_b = _crossings(view, fr, fc, ALIGNED)

    middle_s, middle_a, middle_b = slices // 2, size_a // 2, size_b // 2
    some_a, none_a = _stretch(a, slope_a, -1.0 - middle_a, 0.0 + size_a - middle_a)
    some_b, none_b = _stretch(b, slope_b, -1.0 - middle_b, 0.0 + size_b - middle_b)
    all_a, less_a = _stretch(a, slope_a, 0.01 - middle_a, size_a - middle_a - 1.01)
    all_b, less_b = _stretch(b, slope_b, 0.01 - middle_b, size_b - middle_b - 1.01)
    begin = tl.min(tl.maximum(some_a, some_b)) + middle_s - 1.0
    end = tl.max(tl.minimum(none_a, none_b)) + middle_s + 2.0
    inside = tl.max(tl.maximum(all_a, all_b)) + middle_s + 2.0
    outside = tl.min(tl.minimum(less_a, less_b)) + middle_s - 1.0
    most = slices + 0.0
    s0 = tl.clamp(begin, 0.0, most).to(tl.int32)
    s3 = tl.maximum(tl.clamp(end, 0.0, most).to(tl.int32), s0)
    s1 = tl.minimum(tl.maximum(tl.clamp(inside, 0.0, most).to(tl.int32), s0), s3)
    s2 = tl.minimum(tl.maximum(tl.clamp(outside, 0.0, most).to(tl.int32), s1), s3)

    plane = volume + middle + s0.to(tl.int64) * stride_s
    t = (s0 - middle_s).to(tl.float32)
    total = tl.full((BR, BC), 0.0, tl.float32)
    for _ in range(s0, s1):
        total += _sample(
            plane, a + t * slope_a, b + t * slope_b, size_a, size_b, middle_a, middle_b, stride_a, True, WIDE
        )
        plane += stride_s
        t += 1.0
    for _ in range(s1, s2):
        total += _sample(
            plane, a + t * slope_a, b + t * slope_b, size_a, size_b, middle_a, middle_b, stride_a, False, WIDE
        )
        plane += stride_s
        t += 1.0
    for _ in range(s2, s3):
        total += _sample(
            plane, a + t * slope_a, b + t * slope_b, size_a, size_b, middle_a, middle_b, stride_a, True, WIDE
        )
        plane += stride_s
        t += 1.0

    length = voxel_size * tl.sqrt(1.0 + slope_a * slope_a + slope_b * slope_b)
    total *= length
    if CUT:
        total *= length
        target = n.to(tl.int64) * pitch_view + row * pitch_row + column
    else:
        target = (tl.load(place + 1) + row).to(tl.int64) * pitch_row + tl.load(place).to(tl.int64) * pitch_view
        target += tl.load(place + 2) + column
    tl.store(out + target, total, mask=(row < rows) & (column < columns))


# -- its exact transpose ----------------------------------------------------------------------------------------------


@_kernel
def _weigh(  # type: ignore[no-untyped-def]
    projections,
    floats,
    integers,
    sums,
    tiles,
    in_row,
    in_view,
    in_column,
    pitch_row,
    pitch_view,
    voxel_size,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The views' windows times the rays' lengths, into (n, rows, columns)."""
    n, tile = tl.program_id(1), tl.program_id(0)
    view, place = floats + n * FLOATS, integers + n * INTEGERS
    row = (tile // tiles) * BR + tl.arange(0, BR)[:, None]
    column = (tile % tiles) * BC + tl.arange(0, BC)[None, :]
    inside = (row < tl.load(place + 3)) & (column < tl.load(place + 4))
    fr, fc = (row - tl.load(place + 5)).to(tl.float32), (column - tl.load(place + 6)).to(tl.float32)
    _a, slope_a, _b, slope_b = _crossings(view, fr, fc, ALIGNED)
    source = (tl.load(place + 1) + row).to(tl.int64) * in_row + tl.load(place).to(tl.int64) * in_view
    source += (tl.load(place + 2) + column).to(tl.int64) * in_column
    value = tl.load(projections + source, mask=inside, other=0.0)
    value *= voxel_size * tl.sqrt(1.0 + slope_a * slope_a + slope_b * slope_b)
    tl.store(sums + n.to(tl.int64) * pitch_view + row * pitch_row + column, value, mask=inside)


@triton.jit
def _corner(view, s, a, b):  # type: ignore[no-untyped-def]
    """The column and row that see a point."""
    w = tl.load(view + 22) * s + tl.load(view + 23) * a + tl.load(view + 24) * b + tl.load(view + 25)
    inverse = 1.0 / tl.maximum(w, NEAREST)
    u = tl.load(view + 14) * s + tl.load(view + 15) * a + tl.load(view + 16) * b + tl.load(view + 17)
    v = tl.load(view + 18) * s + tl.load(view + 19) * a + tl.load(view + 20) * b + tl.load(view + 21)
    return u * inverse, v * inverse


@triton.jit
def _gather_aligned(  # type: ignore[no-untyped-def]
    image, view, place, pitch_row, s, a, b
):
    """The sum over one view's rays near each voxel, where columns cross at a b that no row changes."""
    rows, columns = tl.load(place + 3), tl.load(place + 4)
    middle_row, middle_column = tl.load(place + 5), tl.load(place + 6)
    u0, _v0 = _corner(view, s, 0.0, b - 1.0)
    u1, _v1 = _corner(view, s, 0.0, b + 1.0)
    # Float, since an integer overflows where a corner lies beside the source.
    low, high = 0.0 - middle_column, 0.0 + columns - middle_column
    first_c = tl.clamp(tl.ceil(tl.minimum(u0, u1) - SLACK), low, high)
    last_c = tl.clamp(tl.floor(tl.maximum(u0, u1) + SLACK), low - 1.0, high - 1.0)
    count_c = tl.max(last_c - first_c).to(tl.int32) + 1

    per_column = tl.load(view)
    a0, a1 = tl.load(view + 2) + s * tl.load(view + 8), tl.load(view + 3) + s * tl.load(view + 9)
    b0, b1 = tl.load(view + 5) + s * tl.load(view + 11), tl.load(view + 6) + s * tl.load(view + 12)
    per_row = tl.load(view + 4) + s * tl.load(view + 10)  # of a, times the depth
    rate = 1.0 / per_row
    widest = tl.maximum(tl.abs(1.0 + per_column * first_c), tl.abs(1.0 + per_column * last_c)) * tl.abs(rate)
    count_r = tl.minimum(tl.max(2.0 * (widest + SLACK)), rows + 0.0).to(tl.int32) + 1

    first_row, last_row = 0.0 - middle_row, 0.0 + rows - middle_row
    total = tl.zeros_like(a + b)
    for i in range(count_c):
        fc = first_c + i
        depth = 1.0 + per_column * fc
        inverse = 1.0 / depth
        weight_b = 1.0 - tl.abs((b0 + b1 * fc) * inverse - b)
        weight_b = tl.where((fc <= last_c) & (weight_b > 0.0), weight_b, 0.0)
        offset = (a0 + a1 * fc) * inverse - a  # of the row 0 from the voxel
        step = per_row * inverse
        half, centre = tl.abs(rate * depth) + SLACK, -offset * (rate * depth)
        fr = tl.clamp(tl.ceil(centre - half), first_row, last_row)
        start = image + (fc.to(tl.int32) + middle_column)
        pixel = (fr.to(tl.int32) + middle_row) * pitch_row
        offset += fr * step
        part = tl.zeros_like(total)
        for _ in range(count_r):
            weight_a = 1.0 - tl.abs(offset)
            near = (weight_a > 0.0) & (weight_b > 0.0) & (fr < last_row)
            part += weight_a * tl.load(start + pixel, mask=near, other=0.0)
            offset += step
            fr += 1.0
            pixel += pitch_row
        total += weight_b * part
    return total


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    image, view, place, pitch_row, s, a, b
):
    """The sum over one view's rays near each voxel: those within the box about what sees its four neighbours."""
    rows, columns = tl.load(place + 3), tl.load(place + 4)
    middle_row, middle_column = tl.load(place + 5), tl.load(place + 6)
    u0, v0 = _corner(view, s, a - 1.0, b - 1.0)
    u1, v1 = _corner(view, s, a - 1.0, b + 1.0)
    u2, v2 = _corner(view, s, a + 1.0, b - 1.0)
    u3, v3 = _corner(view, s, a + 1.0, b + 1.0)
    low_u, high_u = (
        tl.minimum(tl.minimum(u0, u1), tl.minimum(u2, u3)),
        tl.maximum(tl.maximum(u0, u1), tl.maximum(u2, u3)),
    )
    low_v, high_v = (
        tl.minimum(tl.minimum(v0, v1), tl.minimum(v2, v3)),
        tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3)),
    )
    low, high = 0.0 - middle_column, 0.0 + columns - middle_column
    first_c = tl.clamp(tl.ceil(low_u - SLACK), low, high)
    last_c = tl.clamp(tl.floor(high_u + SLACK), low - 1.0, high - 1.0)
    low, high = 0.0 - middle_row, 0.0 + rows - middle_row
    first_r = tl.clamp(tl.ceil(low_v - SLACK), low, high)
    last_r = tl.clamp(tl.floor(high_v + SLACK), low - 1.0, high - 1.0)
    count_c = tl.max(last_c - first_c).to(tl.int32) + 1
    count_r = tl.max(last_r - first_r).to(tl.int32) + 1

    a0, ac, ar = tl.load(view + 2), tl.load(view + 3), tl.load(view + 4)
    b0, bc, br = tl.load(view + 5), tl.load(view + 6), tl.load(view + 7)
    slope_a0, slope_ac, slope_ar = tl.load(view + 8), tl.load(view + 9), tl.load(view + 10)
    slope_b0, slope_bc, slope_br = tl.load(view + 11), tl.load(view + 12), tl.load(view + 13)
    depth_c, depth_r = tl.load(view), tl.load(view + 1)
    # The distances from the voxel times the depth are linear in column and row: a step adds the same everywhere.
    step_a, step_b = (ac + s * slope_ac) - a * depth_c, (bc + s * slope_bc) - b * depth_c
    total = tl.zeros_like(s + a + b)
    start = image + (first_c.to(tl.int32) + middle_column)
    for j in range(count_r):
        fr = first_r + j
        depth = 1.0 + depth_r * fr + depth_c * first_c
        along_a = (a0 + s * slope_a0) + (ar + s * slope_ar) * fr + (ac + s * slope_ac) * first_c - a * depth
        along_b = (b0 + s * slope_b0) + (br + s * slope_br) * fr + (bc + s * slope_bc) * first_c - b * depth
        pixel = start + (fr.to(tl.int32) + middle_row) * pitch_row
        for i in range(count_c):
            inverse = 1.0 / depth
            weight_a, weight_b = 1.0 - tl.abs(along_a * inverse), 1.0 - tl.abs(along_b * inverse)
            near = (weight_a > 0.0) & (weight_b > 0.0) & (fr <= last_r) & (first_c + i <= last_c)
            total += weight_a * weight_b * tl.load(pixel, mask=near, other=0.0)
            along_a += step_a
            along_b += step_b
            depth += depth_c
            pixel += 1
    return total


@_kernel
def _adjoint(  # type: ignore[no-untyped-def]
    sums,
    floats,
    integers,
    out,
    views,
    first,
    nx,
    ny,
    nz,
    stride_y,
    stride_z,
    pitch_row,
    pitch_view,
    AXIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
):
    """Add the transpose of a batch of weighted views (n, rows, columns) to ``out``."""
    x, y, z = _block(first, nx, ny, BX, BY, BZ)
    # Voxels beyond the grid follow its last, so that they do not lengthen the search.
    fx = (tl.minimum(x, nx - 1) - nx // 2).to(tl.float32)
    fy = (tl.minimum(y, ny - 1) - ny // 2).to(tl.float32)
    fz = (tl.minimum(z, nz - 1) - nz // 2).to(tl.float32)
    total = tl.full((BZ, BX * BY), 0.0, tl.float32)
    view, place, image = floats, integers, sums
    for _ in range(views):
        if AXIS == 2:
            total += _gather(image, view, place, pitch_row, fz, fy, fx)
        elif ALIGNED:
            total += _gather_aligned(
                image, view, place, pitch_row, fx if AXIS == 0 else fy, fz, fy if AXIS == 0 else fx
            )
        else:
            total += _gather(image, view, place, pitch_row, fx if AXIS == 0 else fy, fz, fy if AXIS == 0 else fx)
        view += FLOATS
        place += INTEGERS
        image += pitch_view
    target = out + (z.to(tl.int64) * stride_z + y.to(tl.int64) * stride_y + x)
    inside = (x < nx) & (y < ny) & (z < nz)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


# -- voxel-driven back projection of filtered projections -------------------------------------------------------------


@_kernel
def _backproject(  # type: ignore[no-untyped-def]
    images,
    matrices,
    out,
    views,
    first,
    nx,
    ny,
    nz,
    stride_y,
    stride_z,
    rows,
    columns,
    ALIGNED: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
):
    """Add the sum over views of W^-2 times the bilinear sample; images (n, rows + 4, columns + 4), two zeros about."""
    x, y, z = _block(first, nx, ny, BX, BY, BZ)
    fx, fy, fz = (x - nx // 2).to(tl.float32), (y - ny // 2).to(tl.float32), (z - nz // 2).to(tl.float32)
    middle_row, middle_column = rows // 2, columns // 2
    pitch = columns + 4
    low_u, high_u = -1.0 - middle_column, 0.0 + columns - middle_column
    low_v, high_v = -1.0 - middle_row, 0.0 + rows - middle_row
    image = images + (middle_row + 2) * pitch + middle_column + 2
    matrix = matrices
    total = tl.full((BZ, BX * BY), 0.0, tl.float32)
    for _ in range(views):
        w = tl.load(matrix + 8) * fx + tl.load(matrix + 9) * fy + tl.load(matrix + 11)
        u = tl.load(matrix) * fx + tl.load(matrix + 1) * fy + tl.load(matrix + 3)
        v = tl.load(matrix + 4) * fx + tl.load(matrix + 5) * fy + tl.load(matrix + 7)
        if ALIGNED:
            inverse = 1.0 / w
            v = v * inverse + (tl.load(matrix + 6) * inverse) * fz
        else:
            inverse = 1.0 / (w + tl.load(matrix + 10) * fz)
            u += tl.load(matrix + 2) * fz
            v = (v + tl.load(matrix + 6) * fz) * inverse
        u *= inverse
        iu, fu = _split(tl.minimum(tl.maximum(u, low_u), high_u))
        iv, fv = _split(tl.minimum(tl.maximum(v, low_v), high_v))
        pixel = (image + iu) + iv * pitch
        x0 = tl.load(pixel)
        x1 = tl.load(pixel + 1)
        y0 = tl.load(pixel + pitch)
        y1 = tl.load(pixel + pitch + 1)
        x0 += fu * (x1 - x0)
        y0 += fu * (y1 - y0)
        total += (x0 + fv * (y0 - x0)) * (inverse * inverse)
        image += (rows + 4) * pitch
        matrix += 12
    target = out + (z.to(tl.int64) * stride_z + y.to(tl.int64) * stride_y + x)
    inside = (x < nx) & (y < ny) & (z < nz)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


INTERPRETED = not isinstance(_forward, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1 when triton was first imported)."""

# Products and sums in one instruction, as the CPU's kernels; loops have no loads that could be fetched ahead.
_OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}


# -- tables -----------------------------------------------------------------------------------------------------------


# Main axis, aligned, views, and their tables.
_Group = tuple[int, bool, NDArray[np.int64], Tensor, Tensor]


class _Batch(NamedTuple):
    """Some views of a group, each with the window of rays that can meet the volume."""

    axis: int
    aligned: bool
    views: NDArray[np.int64]
    floats: Tensor  # (n, FLOATS) float32
    integers: Tensor  # (n, INTEGERS) int32: view, first row and column, rows and columns, middle row and column
    rows: int  # of the largest window
    columns: int
    box: tuple[int, int, int, int]  # first row, last row + 1, first column, last column + 1 of all their windows

    def local(self) -> Tensor:
        """``integers`` for projections (rows, n, columns) that hold these views and the box only."""
        integers = self.integers.clone()
        integers[:, 0] = torch.arange(len(self.views), dtype=torch.int32, device=integers.device)
        integers[:, 1] -= self.box[0]
        integers[:, 2] -= self.box[2]
        return integers


def _view_tables(rays: Rays, axis: int, views: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """What the kernels know of views with a main axis; positions count from the grid's middle voxel.

    With (s, a, b) the main axis and the two others, and c and r counted from the window's middle pixel, a ray crosses
    slice s where a = (p + s q) / depth, p, q and depth being linear in (1, c, r); b likewise. A row holds depth's
    factors of c and r (the constant is 1), then those of p for a (1, c, r) and b, q for a and b, and from 14 the
    homography (3, 4) from (s, a, b, 1) to (c W, r W, W).
    """
    order = list(_ORDER[axis])
    shape = np.array(rays.grid.shape[::-1])[order]
    middle = shape // 2
    window = rays.window[views]
    corner, count = window[:, 0::2], window[:, 1::2] - window[:, 0::2]
    row, column = (corner + count // 2).T.astype(float)
    table = rays.table[views][:, :, order]  # (n, 6, 3)

    def at_the_middle(k: int) -> NDArray[np.float64]:
        return table[:, k] + column[:, None] * table[:, k + 1] + row[:, None] * table[:, k + 2]

    origin = np.stack([at_the_middle(0) - middle, table[:, 1], table[:, 2]], axis=1)  # (n, 3: 1 c r, 3: s a b)
    direction = np.stack([at_the_middle(3), table[:, 4], table[:, 5]], axis=1)
    # The crossing is (o_a d_s - o_s d_a + s d_a) / d_s, and one of o and d is constant.
    p = origin[:, :1] * direction[:, :, :1] - origin[:, :1, :1] * direction
    p[:, 1:] += origin[:, 1:] * direction[:, :1, :1] - origin[:, 1:, :1] * direction[:, :1]
    depth = direction[:, :, 0]
    homography = rays.homography[views].copy()
    homography = np.concatenate([homography[:, :, order], homography[:, :, 3:]], axis=2)
    homography[:, :, 3] += homography[:, :, :3] @ middle
    homography[:, 0] -= column[:, None] * homography[:, 2]
    homography[:, 1] -= row[:, None] * homography[:, 2]
    floats = np.zeros((len(views), FLOATS.value))
    floats[:, :2] = depth[:, 1:] / depth[:, :1]
    for k, linear in enumerate((p[:, :, 1], p[:, :, 2], direction[:, :, 1], direction[:, :, 2])):
        floats[:, 2 + 3 * k : 5 + 3 * k] = linear / depth[:, :1]
    floats[:, 14:26] = homography.reshape(len(views), 12)
    integers = np.zeros((len(views), INTEGERS.value), np.int32)
    integers[:, 0] = views
    integers[:, 1:3], integers[:, 3:5], integers[:, 5:7] = corner, count, count // 2
    return floats.astype(np.float32), integers


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small array on the device, without waiting for what is under way there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_known: weakref.WeakKeyDictionary[Rays, dict[torch.device, list[_Group]]] = weakref.WeakKeyDictionary()


def _tables(rays: Rays, device: torch.device) -> list[_Group]:
    """The groups of views with their tables on a device; kept, since iterations ask for them again and again."""
    found = _known.setdefault(rays, {})
    if device not in found:
        found[device] = []
        for axis, aligned, views in rays.groups:
            floats, integers = _view_tables(rays, axis, views)
            found[device].append((axis, aligned, views, _upload(floats, device), _upload(integers, device)))
    return found[device]


# -- to and from the host ---------------------------------------------------------------------------------------------


def _cut(projections: Tensor, batch: _Batch) -> Tensor:
    """The batch's views, rows and columns of projections on the host, pinned where there is a GPU."""
    r0, r1, c0, c1 = batch.box
    views = torch.from_numpy(batch.views)
    out = torch.empty(r1 - r0, len(views), c1 - c0, pin_memory=torch.cuda.is_available())
    return torch.index_select(projections[r0:r1, :, c0:c1], 1, views, out=out)


def _put(out: Tensor, batch: _Batch, values: Tensor, event: torch.cuda.Event | None) -> None:
    """Put a batch's projections into those on the host, once they have arrived."""
    if event is not None:
        event.synchronize()
    r0, r1, c0, c1 = batch.box
    out[r0:r1, :, c0:c1].index_copy_(1, torch.from_numpy(batch.views), values)


class _Arrival:
    """A copy to the device beside its work. Pinned memory that is let go stays until the copies from it are done."""

    def __init__(self, pinned: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._done: torch.cuda.Event | None = None
        if stream is None:
            self._tensor = pinned.to(device)
            return
        with torch.cuda.stream(stream):
            self._tensor = pinned.to(device, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def tensor(self) -> Tensor:
        """What was copied; the current stream waits for it."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._tensor.device)
            current.wait_event(self._done)
            self._tensor.record_stream(current)
        return self._tensor


# -- launching --------------------------------------------------------------------------------------------------------


class _Tuned:
    """A kernel's block shapes, of which the fastest is kept for each kind and size of problem.

    The first launches of the real work, each with another shape, are timed: nothing is computed twice, and who has
    little to compute does not wait.

    Parameters
    ----------
    kind
        Of :data:`LAUNCH`.
    shapes
        What is tried: the kernel's block sizes and ``num_warps``. The interpreter takes the first.
    """

    def __init__(self, kind: str, *shapes: dict[str, int]) -> None:
        self.kind = kind
        self.shapes = shapes
        self._times: dict[tuple[Any, ...], list[float]] = {}  # ms for a unit of work

    def __call__(
        self,
        key: tuple[Any, ...],
        work: float,
        tiles: Callable[[dict[str, int]], int],
        launch: Callable[[int, int, dict[str, int]], None],
    ) -> None:
        """Launch all tiles, in launches of bounded length.

        Parameters
        ----------
        key
            What else the choice depends on.
        work
            Of all tiles, as :data:`LAUNCH` counts it.
        tiles
            How many there are with a shape.
        launch
            Launches (first tile, how many) with a shape.
        """
        # Problems of about the same size share their choice.
        times = self._times.setdefault((*key, round(math.log2(max(work, 1.0)) / 3)), [])
        trials = ROUNDS * len(self.shapes)
        known = INTERPRETED or len(times) >= trials
        choice = int(np.argmin(times[:trials])) if known and times else len(times)
        shape = self.shapes[choice % len(self.shapes)]
        count = tiles(shape)
        limit = min(LAUNCH[self.kind], LONGEST / min(times)) if times else LAUNCH[self.kind]
        step = max(1, math.ceil(count * min(1.0, limit / max(work, 1.0))))
        first = 0
        if not known:
            launch(0, 0, shape)  # compiles and loads it
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            launch(0, min(step, count), shape)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * count / (min(step, count) * work))
            first = step
        for tile in range(first, count, step):
            launch(tile, min(step, count - tile), shape)


_forward_tuned = _Tuned(
    "forward",
    {"BR": 16, "BC": 32, "num_warps": 4},
    {"BR": 8, "BC": 32, "num_warps": 4},
    {"BR": 8, "BC": 64, "num_warps": 8},
    {"BR": 32, "BC": 32, "num_warps": 8},
    {"BR": 16, "BC": 16, "num_warps": 4},
)
_adjoint_tuned = _Tuned(
    "adjoint",
    {"BX": 16, "BY": 2, "BZ": 16, "num_warps": 4},
    {"BX": 32, "BY": 1, "BZ": 16, "num_warps": 4},
    {"BX": 32, "BY": 1, "BZ": 8, "num_warps": 4},
    {"BX": 8, "BY": 4, "BZ": 16, "num_warps": 4},
    {"BX": 32, "BY": 2, "BZ": 16, "num_warps": 8},
)
_backproject_tuned = _Tuned(
    "backproject",
    {"BX": 16, "BY": 4, "BZ": 16, "num_warps": 4},
    {"BX": 32, "BY": 1, "BZ": 16, "num_warps": 4},
    {"BX": 32, "BY": 2, "BZ": 32, "num_warps": 8},
    {"BX": 16, "BY": 8, "BZ": 16, "num_warps": 8},
    {"BX": 8, "BY": 8, "BZ": 32, "num_warps": 8},
)
_WEIGH = {"BR": 8, "BC": 64}


# -- the projector ----------------------------------------------------------------------------------------------------


class TritonProjector:
    """Forward projection, exact adjoint and FDK's back projection on a GPU.

    Projections may lie on the host: they are then copied a batch of views at a time, while the GPU works on another.

    Parameters
    ----------
    rays
        The geometry and the grid.
    device
        The GPU; the CPU only under Triton's interpreter.
    """

    def __init__(self, rays: Rays, device: torch.device) -> None:
        self.rays = rays
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def forward(self, volume: Tensor, out: Tensor | None = None) -> Tensor:
        """Line integrals (rows, views, columns) of a volume (D, H, W), float32.

        Parameters
        ----------
        volume
            On the projector's device.
        out
            Where to put them, on the device or on the host; by default a new tensor on the device.
        """
        rows, columns = self.rays.geometry.detector_shape
        if out is None:
            out = torch.empty(rows, self.rays.geometry.views, columns, device=self.device)
        if not (self.rays.window == (0, rows, 0, columns)).all():
            out.zero_()
        with self._current():
            if self._is_here(out):
                for batch, source in self._batches_of(volume):
                    self._sum(source, batch, batch.integers, out, out.stride(0), out.stride(1))
            else:
                self._sum_for_host(volume, out)
        return out

    def adjoint(self, projections: Tensor, out: Tensor | None = None) -> Tensor:
        """The transpose of :meth:`forward`: (rows, views, columns) -> (D, H, W), float32; added to ``out`` if given."""
        out = torch.zeros(self.rays.grid.shape, device=self.device) if out is None else out
        with self._current():
            for batch, measured, integers in self._arriving(projections):
                sums = torch.empty(len(batch.views), batch.rows, batch.columns, device=self.device)
                tiles = triton.cdiv(batch.columns, _WEIGH["BC"])
                _weigh[(triton.cdiv(batch.rows, _WEIGH["BR"]) * tiles, len(batch.views))](
                    measured,
                    batch.floats,
                    integers,
                    sums,
                    tiles,
                    *measured.stride(),
                    batch.columns,
                    batch.rows * batch.columns,
                    self.rays.grid.voxel_size,
                    ALIGNED=batch.aligned,
                    **_OPTIONS,
                    **_WEIGH,
                )
                self._spread(sums, batch, out)
        return out

    def normal(self, volume: Tensor) -> Tensor:
        """Adjoint of forward, without ever holding the projections: only those rays of a few views at a time."""
        out = torch.zeros(self.rays.grid.shape, device=self.device)
        with self._current():
            for batch, source in self._batches_of(volume):
                sums = torch.empty(len(batch.views), batch.rows, batch.columns, device=self.device)
                self._sum(source, batch, batch.integers, sums, batch.columns, batch.rows * batch.columns, cut=True)
                self._spread(sums, batch, out)
        return out

    def filtered_buffer(self, views: int, rows: int) -> tuple[Tensor, Tensor]:
        """Where filtered projections of some views and rows are to be put for :meth:`backproject`."""
        buffer = torch.zeros(views, rows + 4, self.rays.geometry.detector_shape[1] + 4, device=self.device)
        return buffer, buffer[:, 2:-2, 2:-2].transpose(0, 1)

    def backproject(self, buffer: Tensor, first_view: int, first_row: int, out: Tensor) -> None:
        """Add to ``out`` (D, H, W) the sum over views of W^-2 times the sample where each voxel is seen (FDK)."""
        views, rows, columns = buffer.shape[0], buffer.shape[1] - 4, buffer.shape[2] - 4
        matrices = self.rays.homography[first_view : first_view + views].copy()
        matrices[:, :, 3] += matrices[:, :, :3] @ (np.array(self.rays.grid.shape[::-1]) // 2)
        matrices[:, 0] -= columns // 2 * matrices[:, 2]
        matrices[:, 1] -= (first_row + rows // 2) * matrices[:, 2]
        table = _upload(matrices.reshape(views, 12).astype(np.float32), self.device)
        aligned = bool(self.rays.aligned[first_view : first_view + views].all())
        count = max(1, int(LAUNCH["backproject"] // self.rays.grid.voxels))
        with self._current():
            for n in range(0, views, count):
                images, rows_of_table = buffer[n : n + count], table[n : n + count]

                def launch(
                    first: int,
                    tiles: int,
                    shape: dict[str, int],
                    images: Tensor = images,
                    rows_of_table: Tensor = rows_of_table,
                ) -> None:
                    _backproject[(tiles,)](
                        images,
                        rows_of_table,
                        out,
                        len(images),
                        first,
                        *self.rays.grid.shape[::-1],
                        out.stride(1),
                        out.stride(0),
                        rows,
                        columns,
                        ALIGNED=aligned,
                        **_OPTIONS,
                        **shape,
                    )

                work = float(self.rays.grid.voxels * len(images))
                _backproject_tuned((aligned, self.device), work, self._blocks, launch)

    # -- launches -------------------------------------------------------------------------------------------------

    def _sum(
        self,
        source: Tensor,
        batch: _Batch,
        integers: Tensor,
        out: Tensor,
        pitch_row: int,
        pitch_view: int,
        cut: bool = False,
    ) -> None:
        """Forward projection of a volume in the batch's order, see _forward."""
        slices, size_a, size_b = source.shape
        stride_s, stride_a, _ = source.stride()
        wide = size_a * stride_a >= WIDEST

        def across(shape: dict[str, int]) -> int:
            return triton.cdiv(batch.columns, shape["BC"])

        def tiles(shape: dict[str, int]) -> int:
            return triton.cdiv(batch.rows, shape["BR"]) * across(shape)

        def launch(first: int, count: int, shape: dict[str, int]) -> None:
            _forward[(count, len(batch.views))](
                source,
                batch.floats,
                integers,
                out,
                first,
                across(shape),
                size_a // 2 * stride_a + size_b // 2,
                slices,
                size_a,
                size_b,
                stride_s,
                stride_a,
                pitch_row,
                pitch_view,
                self.rays.grid.voxel_size,
                ALIGNED=batch.aligned,
                CUT=cut,
                WIDE=wide,
                **_OPTIONS,
                **shape,
            )

        work = float(len(batch.views) * batch.rows * batch.columns * slices)
        _forward_tuned((batch.aligned, batch.axis, self.device), work, tiles, launch)

    def _spread(self, sums: Tensor, batch: _Batch, out: Tensor) -> None:
        """Add the transpose of weighted rays (n, rows, columns) to ``out`` (D, H, W)."""

        def launch(first: int, count: int, shape: dict[str, int]) -> None:
            _adjoint[(count,)](
                sums,
                batch.floats,
                batch.integers,
                out,
                len(batch.views),
                first,
                *self.rays.grid.shape[::-1],
                out.stride(1),
                out.stride(0),
                batch.columns,
                batch.rows * batch.columns,
                AXIS=batch.axis,
                ALIGNED=batch.aligned,
                **_OPTIONS,
                **shape,
            )

        work = float(self.rays.grid.voxels * len(batch.views))
        _adjoint_tuned((batch.aligned, batch.axis, self.device), work, self._blocks, launch)

    def _blocks(self, shape: dict[str, int]) -> int:
        d, h, w = self.rays.grid.shape
        return triton.cdiv(w, shape["BX"]) * triton.cdiv(h, shape["BY"]) * triton.cdiv(d, shape["BZ"])

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Launches go to the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    # -- batches of views -----------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[_Batch]:
        for axis, aligned, views, floats, integers in _tables(self.rays, self.device):
            window = self.rays.window[views]
            rows, columns = (int(n) for n in (window[:, 1::2] - window[:, 0::2]).max(axis=0))
            slices = self.rays.grid.shape[2 - axis]
            count = min(
                LAUNCH["forward"] / (rows * columns * slices),
                LAUNCH["adjoint"] / self.rays.grid.voxels,
                BATCH_BYTES / (4 * rows * columns),
            )
            step = max(1, int(count))
            for n in range(0, len(views), step):
                part = slice(n, n + step)
                box = window[part]
                yield _Batch(
                    axis,
                    aligned,
                    views[part],
                    floats[part],
                    integers[part],
                    rows,
                    columns,
                    (int(box[:, 0].min()), int(box[:, 1].max()), int(box[:, 2].min()), int(box[:, 3].max())),
                )

    def _batches_of(self, volume: Tensor) -> Iterator[tuple[_Batch, Tensor]]:
        """Every batch with the volume in the order (main axis, a, b), b contiguous."""
        volume = volume.contiguous()
        source, axis = volume, -1
        for batch in self._batches():
            if batch.axis != axis:
                axis = batch.axis
                source = volume.permute(tuple(2 - q for q in _ORDER[axis]))
                if axis == 0:  # neighbouring pixels are neighbours along y: else every one reads a line of its own
                    source = source.contiguous()
            yield batch, source

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def _arriving(self, projections: Tensor) -> Iterator[tuple[_Batch, Tensor, Tensor]]:
        """Every batch with projections (rows, views, columns) on the device and its ``integers`` for these."""
        if self._is_here(projections):
            for batch in self._batches():
                yield batch, projections, batch.integers
            return
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        before: tuple[_Batch, _Arrival] | None = None
        for batch in self._batches():
            coming = batch, _Arrival(_cut(projections, batch), self.device, stream)
            if before is not None:
                yield before[0], before[1].tensor(), before[0].local()
            before = coming
        if before is not None:
            yield before[0], before[1].tensor(), before[0].local()

    def _sum_for_host(self, volume: Tensor, out: Tensor) -> None:
        """Forward projection to the host: a batch is copied while the next one is computed."""
        before: tuple[_Batch, Tensor, torch.cuda.Event | None] | None = None
        for batch, source in self._batches_of(volume):
            r0, r1, c0, c1 = batch.box
            here = torch.zeros(r1 - r0, len(batch.views), c1 - c0, device=self.device)
            self._sum(source, batch, batch.local(), here, here.stride(0), here.stride(1))
            if self.device.type == "cuda":
                there = torch.empty(here.shape, pin_memory=True)
                there.copy_(here, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            else:
                there, event = here, None
            if before is not None:
                _put(out, *before)
            before = batch, there, event
        if before is not None:
            _put(out, *before)
