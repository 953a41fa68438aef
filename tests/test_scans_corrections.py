"""Corrections: what goes in as attenuation comes out as attenuation, whatever the detector did to it."""

from pathlib import Path

import numpy as np
import pytest

from napari_recon.learning.phantoms import Ellipsoids, make_phantom
from napari_recon.learning.simulate import circular_cone
from napari_recon.scans import Geometry, ScanError
from napari_recon.scans.corrections import FlatField, air_level, bin_pixels
from napari_recon.scans.recording import ArrayFrames, Recording
from napari_recon.scans.scan import Scan

PATH = Path("scan.h5")


def counts_scan(integrals, geometry, flat=30_000.0, dark=100.0, drift=None, dtype=np.uint16, **fields):
    """A scan in memory with these line integrals; drift multiplies the beam of each view."""
    flat = np.broadcast_to(np.asarray(flat, float), geometry.detector_shape)
    dark = np.broadcast_to(np.asarray(dark, float), geometry.detector_shape)
    beam = np.ones(geometry.views) if drift is None else np.asarray(drift)
    raw = (flat - dark) * np.exp(-integrals) * beam[:, None, None] + dark
    raw = np.clip(np.rint(raw), 0, 65535) if np.issubdtype(dtype, np.integer) else raw

    def frames(array):
        return ArrayFrames(PATH, np.ascontiguousarray(array, dtype=dtype))

    given = {"flats": frames(flat[None]), "darks": frames(dark[None]), **fields}
    return Scan(PATH, Recording("test", "test", frames(raw), geometry, **given))


@pytest.fixture
def ball():
    """A ball off the axis, seen with air all around."""
    phantom = Ellipsoids([[1.0, 2.0, 0.0]], [[5, 5, 5]], np.eye(3)[None], [0.05])
    geometry = Geometry.parallel(np.arange(0, 180, 6), (24, 40), 0.5)
    return phantom, geometry


def test_an_uneven_beam_and_detector_leave_no_trace(ball):
    phantom, geometry = ball
    rng = np.random.default_rng(0)
    flat, dark = rng.uniform(20_000, 50_000, (24, 40)), rng.uniform(50, 300, (24, 40)).round()
    exact = phantom.project(geometry)
    scan = counts_scan(exact, geometry, flat, dark)
    p = scan.projections()
    assert p.dtype == np.float32
    assert np.abs(p - exact).max() < 2e-4  # whole counts
    y = scan.measurements()
    assert tuple(y.shape) == (1, 1, 24, 30, 40)
    np.testing.assert_array_equal(y[0, 0].numpy().transpose(1, 0, 2), p)


def test_air_normalisation_removes_a_drifting_beam(ball):
    phantom, geometry = ball
    exact = phantom.project(geometry)
    scan = counts_scan(exact, geometry, drift=np.linspace(0.6, 1.1, geometry.views))
    assert np.abs(scan.projections() - exact).max() > 0.3
    on = scan.with_options(air_normalisation=True)
    assert np.abs(on.projections() - exact).max() < 3e-4
    assert "air normalisation" in on.summary()["Corrections"]
    file_says = counts_scan(exact, geometry, drift=np.full(geometry.views, 0.7), air_normalisation=True)
    assert file_says.air_normalisation
    assert not file_says.with_options(air_normalisation=False).air_normalisation
    assert np.abs(file_says.projections() - exact).max() < 3e-4


def test_air_is_taken_from_the_free_side():
    profile = np.zeros((3, 8, 100), np.float32)
    profile[:, :, :40] = 1.0  # the object leaves the detector at the left
    np.testing.assert_allclose(air_level(profile + 0.3), 0.3, rtol=1e-6)
    rng = np.random.default_rng(0)
    noisy = 0.3 + rng.normal(0, 0.05, (3, 40, 100)).astype(np.float32)
    noisy[:, 3, :] = 50  # a dead row does not matter
    np.testing.assert_allclose(air_level(noisy), 0.3, atol=0.03)


@pytest.mark.parametrize("shape", [(24, 40), (25, 43), (1, 41)])
def test_binning_happens_before_the_log_and_agrees_with_the_geometry(shape):
    phantom = Ellipsoids([[0.0, 0.0, 0.0]], [[5, 5, 5]], np.eye(3)[None], [0.2])
    geometry = Geometry.parallel(np.arange(0, 180, 30), shape, 0.4)
    exact = phantom.project(geometry)
    scan = counts_scan(exact, geometry, flat=np.linspace(10_000, 60_000, shape[1])).with_options(binning=2)
    p = scan.projections()
    assert p.shape == (6, *scan.geometry.detector_shape)
    rows, columns = scan.geometry.detector_shape
    fv = 1 if shape[0] == 1 else 2
    t = np.exp(-exact)[:, : rows * fv, : columns * 2].reshape(6, rows, fv, columns, 2)
    gain = np.linspace(10_000, 60_000, shape[1])[: columns * 2].reshape(columns, 2) - 100
    expected = -np.log((t * gain).sum((2, 4)) / (gain.sum(1) * fv))
    np.testing.assert_allclose(p, expected, atol=2e-4)
    inside = exact.max() * 0.5  # away from the edge, binned rays see what their geometry says
    there = phantom.project(scan.geometry)
    keep = there > inside
    assert np.abs(p - there)[keep].max() < 0.03 * exact.max()


def test_logged_data_is_binned_as_photons_too(ball):
    phantom, geometry = ball
    exact = phantom.project(geometry)
    counts = counts_scan(exact, geometry, dtype=np.float32).with_options(binning=3)
    logged = Scan(PATH, Recording("t", "t", ArrayFrames(PATH, exact), geometry, values="line integrals"))
    np.testing.assert_allclose(logged.with_options(binning=3).projections(), counts.projections(), atol=1e-4)


def test_views_are_even_and_start_with_the_first(ball):
    phantom, geometry = ball
    scan = counts_scan(phantom.project(geometry), geometry)
    some = scan.with_options(views=10)
    np.testing.assert_array_equal(some.view_indices, np.arange(0, 30, 3))
    np.testing.assert_array_equal(some.projections(), scan.projections()[::3])
    np.testing.assert_array_equal(some.geometry.vectors, geometry.vectors[::3])
    for n in range(1, 31):
        index = scan.with_options(views=n).view_indices
        assert len(set(index)) == n
        assert np.ptp(np.diff(index)) <= 1 if n > 2 else True
    with pytest.raises(ScanError, match="ask for 30 at most"):
        scan.with_options(views=31)


def test_the_axis_offset_option_is_where_the_axis_is_seen(ball):
    _, geometry = ball
    wobble = geometry.vectors.copy()
    wobble[:, 3:5] += np.random.default_rng(0).normal(0, 0.1, (30, 2))
    wobbling = Geometry(wobble, geometry.detector_shape, "parallel").with_axis_offset(2)
    scan = counts_scan(np.zeros((30, 24, 40)), wobbling)
    moved = scan.with_options(axis_offset=-3.5)
    assert np.mean(moved.geometry.axis_offset) == pytest.approx(-3.5)
    shift = moved.geometry.axis_offset - wobbling.axis_offset
    np.testing.assert_allclose(shift, shift[0], atol=1e-9)  # the wobble stays
    binned = scan.with_options(axis_offset=-3.5, binning=2)
    assert np.mean(binned.geometry.axis_offset) * 2 == pytest.approx(-3.5)
    assert moved.summary()["Axis offset"] == binned.summary()["Axis offset"] == "-3.5 pixels"


def test_zeros_are_guarded_and_told(ball):
    phantom, geometry = ball
    exact = phantom.project(geometry)
    exact[4, 10:12, 18:21] = 30  # nothing comes through
    scan = counts_scan(exact, geometry)
    p = scan.projections()
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p[4, 10:12, 18:21], np.log(2 * 29_900), rtol=1e-4)  # half a count
    assert any("6 pixels" in s and "half a count" in s for s in scan.checks())


def test_dead_pixels_take_no_part(ball):
    phantom, geometry = ball
    flat = np.full((24, 40), 30_000.0)
    flat[3, 7] = flat[:, 20] = 100.0
    exact = phantom.project(geometry)
    scan = counts_scan(exact, geometry, flat)
    p = scan.projections()
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p[:, 3, 7], exact[:, 3, 6], atol=0.02)
    assert np.abs(p - exact).max() < 0.12
    assert any("25 detector pixels" in s for s in scan.checks())
    # in a bin, those that are left speak for it
    np.testing.assert_allclose(
        scan.with_options(binning=2).projections(), counts_scan(exact, geometry).with_options(binning=2).projections(),
        atol=0.12,
    )  # fmt: skip


def test_a_flat_without_beam_is_refused():
    with pytest.raises(ScanError, match="swapped"):
        FlatField(np.full((3, 4), 90.0, np.float32), np.full((3, 4), 100.0, np.float32), (3, 4))


def test_bin_pixels_keeps_every_photon():
    frames = np.random.default_rng(0).integers(0, 1000, (3, 8, 12))
    assert bin_pixels(frames, 4).sum() == frames.sum()
    assert bin_pixels(frames[:, :7, :11], 2).shape == (3, 3, 5)


def test_memory_is_bounded_by_chunks():
    frames = ArrayFrames(PATH, np.ones((30, 24, 40), np.uint16))
    pieces = list(frames.chunks(megabytes=24 * 40 * 4 * 7 / 1e6))
    assert [len(p) for _, p in pieces] == [7, 7, 7, 7, 2]
    assert pieces[-1][0] == slice(28, 30)


# -- what checks() sees -------------------------------------------------------------------------------------------


def nut_scan(**changes):
    phantom = make_phantom("walnut", 0)
    geometry, _ = circular_cone(phantom, 32, 60)
    return counts_scan(phantom.project(geometry), geometry, **changes)


def test_a_good_scan_gives_no_complaint():
    assert nut_scan().checks() == []


def test_air_that_is_not_zero_is_told():
    said = nut_scan(drift=np.full(60, 0.7)).checks()
    assert any("0.36 instead of 0" in s and "0.70 of the flats" in s for s in said)
    assert nut_scan(drift=np.full(60, 0.7)).with_options(air_normalisation=True).checks() == []


def test_a_truncated_object_is_told():
    phantom = make_phantom("walnut", 0)
    geometry, _ = circular_cone(phantom, 32, 60)
    narrow = Geometry(geometry.vectors, (geometry.detector_shape[0], geometry.detector_shape[1] // 2), "cone")
    assert any("detector's edge" in s for s in counts_scan(phantom.project(narrow), narrow).checks())


def test_saturated_and_hot_pixels_are_told():
    scan = nut_scan(flat=80_000.0, dark=np.where(np.arange(38) == 5, 30_000.0, 100.0))
    said = " ".join(scan.checks())
    assert "Saturated" in said
    assert "Hot in the darks" in said


@pytest.mark.parametrize("offset", [-5.3, 0.0, 7.8])
@pytest.mark.parametrize("binning", [1, 2, 3])
def test_a_wrong_axis_is_told_with_the_right_one(offset, binning):
    phantom = Ellipsoids([[3.0, -2, 0], [-3, 1, 1]], [[3, 4, 5], [2, 2, 2]], np.eye(3)[None].repeat(2, 0), [0.05, 0.05])
    true = Geometry.parallel(np.arange(0, 181, 4), (16, 80), 0.4, axis_offset=offset)
    scan = counts_scan(phantom.project(true), Geometry.parallel(np.arange(0, 181, 4), (16, 80), 0.4))
    scan = scan.with_options(binning=binning)
    said = [s for s in scan.checks() if "axis" in s]
    if offset == 0:
        assert not said
        return
    suggested = float(said[0].split("axis offset to ")[1].rstrip("."))
    assert suggested == pytest.approx(offset, abs=0.3 * binning)
    assert not any("axis" in s for s in scan.with_options(axis_offset=suggested).checks())


def test_few_views_and_short_arcs_are_told():
    phantom = Ellipsoids([[0.0, 0, 0]], [[3, 3, 3]], np.eye(3)[None], [0.05])
    short = Geometry.parallel(np.arange(0, 90, 2), (8, 40), 0.4)
    assert any("half a turn" in s for s in counts_scan(phantom.project(short), short).checks())
    few = Geometry.parallel(np.arange(0, 180, 20), (8, 40), 0.4)
    assert any("9 views are few" in s for s in counts_scan(phantom.project(few), few).checks())
    cone = Geometry.cone(np.arange(0, 181, 4), (8, 60), 2.0, 66, 199)
    assert any("fan of" in s for s in counts_scan(phantom.project(cone), cone).checks())


def test_bad_frames_are_told_not_raised(ball):
    _, geometry = ball
    frames = np.zeros((30, 24, 40), np.float32)
    frames[3, 2, 1] = np.nan
    scan = Scan(PATH, Recording("t", "t", ArrayFrames(PATH, frames), geometry, values="line integrals"))
    assert any("NaN" in s for s in scan.checks())
