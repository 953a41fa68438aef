"""Geometry and Grid: ASTRA's conventions, and values that come back out of the vectors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

ANGLES = np.arange(0, 360, 30.0)


def pixel(geometry: Geometry, row: float, column: float) -> np.ndarray:
    """(views, 3): where a pixel of the detector is."""
    rows, columns = geometry.detector_shape
    return geometry.detector_center + geometry.u * (column - (columns - 1) / 2) + geometry.v * (row - (rows - 1) / 2)


def seen_at(geometry: Geometry, point: np.ndarray) -> np.ndarray:
    """(views, 2): row and column in which a point of the world is seen."""
    rows, columns = geometry.detector_shape
    out = []
    for ray, center, u, v in zip(geometry.source, geometry.detector_center, geometry.u, geometry.v, strict=True):
        start = ray if geometry.kind == "cone" else point
        direction = point - ray if geometry.kind == "cone" else ray
        _, a, b = np.linalg.solve(np.stack([direction, -u, -v], 1), center - start)
        out.append((b + (rows - 1) / 2, a + (columns - 1) / 2))
    return np.array(out)


def test_cone_follows_astra():
    # astra_create_proj_geom('cone', ...) and astra.geom_2vec: source (sin, -cos) * SOD, detector (-sin, cos) * ODD.
    angle = 0.3
    row = Geometry.cone(np.rad2deg(angle), (5, 7), (0.2, 0.4), 66, 199).vectors[0]
    s, c = math.sin(angle), math.cos(angle)
    expected = [s * 66, -c * 66, 0, -s * 133, c * 133, 0, c * 0.4, s * 0.4, 0, 0, 0, 0.2]
    np.testing.assert_allclose(row, expected, atol=1e-12)


def test_parallel_follows_astra():
    # parallel3d: ray direction (sin, -cos) up to sign; ours points from source to detector, as a person thinks of it.
    row = Geometry.parallel(0.0, (5, 7), 0.4).vectors[0]
    np.testing.assert_allclose(row, [0, 1, 0, 0, 0, 0, 0.4, 0, 0, 0, 0, 0.4], atol=1e-12)


@given(
    first=st.floats(-180, 180),
    step=st.floats(0.5, 20),
    source=st.floats(20, 500),
    ratio=st.floats(1.1, 10),
    offset=st.floats(-30, 30),
    pitch=st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)),
)
@settings(max_examples=40, deadline=None)
def test_circular_properties_come_back_from_the_vectors(first, step, source, ratio, offset, pitch):
    angles = first + step * np.arange(9)
    geometry = Geometry.cone(angles, (11, 13), pitch, source, source * ratio, offset)
    np.testing.assert_allclose(geometry.source_object, source)
    np.testing.assert_allclose(geometry.source_detector, source * ratio)
    assert geometry.magnification == pytest.approx(ratio)
    np.testing.assert_allclose(geometry.axis_offset, offset, atol=1e-8)
    np.testing.assert_allclose(np.diff(geometry.angles), step, atol=1e-8)
    turn = (geometry.angles[0] - first + 180) % 360 - 180
    assert abs(turn) < 1e-8
    assert geometry.pixel_size == pytest.approx(pitch)


@pytest.mark.parametrize("kind", ["cone", "parallel"])
def test_axis_is_seen_where_the_offset_says(kind):
    made = {"cone": lambda o: Geometry.cone(ANGLES, (6, 10), 0.5, 60, 200, o)}
    made["parallel"] = lambda o: Geometry.parallel(ANGLES, (6, 10), 0.5, o)
    geometry = made[kind](2.75)
    np.testing.assert_allclose(seen_at(geometry, np.zeros(3))[:, 1], 4.5 + 2.75)
    np.testing.assert_allclose(geometry.axis_offset, 2.75)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 12), (13, 11), (1, 17)])
def test_binned_pixels_lie_in_the_middle_of_those_they_are_made_of(factor, shape):
    fine = Geometry.cone(ANGLES, shape, (0.3, 0.2), 66, 199, axis_offset=1.5)
    coarse = fine.binned(factor)
    fv = 1 if shape[0] == 1 else factor
    assert coarse.detector_shape == (shape[0] // fv, shape[1] // factor)
    for row, column in ((0, 0), (coarse.detector_shape[0] - 1, coarse.detector_shape[1] - 1)):
        middle = pixel(fine, row * fv + (fv - 1) / 2, column * factor + (factor - 1) / 2)
        np.testing.assert_allclose(pixel(coarse, row, column), middle, atol=1e-12)
    # and the axis stays where it was in the world
    column_fine = 1.5 + (shape[1] - 1) / 2
    column_coarse = coarse.axis_offset + (coarse.detector_shape[1] - 1) / 2
    np.testing.assert_allclose(column_coarse * factor + (factor - 1) / 2, column_fine)


def test_shifts_add_up():
    geometry = Geometry.parallel(ANGLES, (4, 9), 0.5)
    there = geometry.with_axis_offset(3.0)
    np.testing.assert_allclose(there.axis_offset, 3.0)
    np.testing.assert_allclose(there.with_axis_offset(-3.0).vectors, geometry.vectors, atol=1e-12)


def test_field_of_view_is_tangent_to_the_outermost_ray():
    geometry = Geometry.cone(ANGLES, (4, 101), 0.5, 60, 200)
    source, last = geometry.source[0], pixel(geometry, 1.5, 100)[0]
    ray = (last - source) / np.linalg.norm(last - source)
    distance = np.linalg.norm(np.cross(ray, source))  # of the ray from the axis
    assert geometry.field_of_view_radius == pytest.approx(distance)


def test_default_grid_covers_the_field_of_view_at_the_detectors_resolution():
    geometry = Geometry.cone(ANGLES, (40, 100), 0.5, 60, 200)
    grid = geometry.default_grid()
    assert grid.voxel_size == pytest.approx(0.5 * 60 / 200)
    assert grid.extent[1] >= 2 * geometry.field_of_view_radius
    assert geometry.default_grid(voxel_size=0.3).extent[1] == pytest.approx(grid.extent[1], abs=0.3)
    assert geometry.default_grid(shape=(20, 50, 50)).shape == (20, 50, 50)
    assert Geometry.cone(ANGLES, (1, 100), 0.5, 60, 200).default_grid().shape[0] == 1


def test_repr_tells_the_geometry_in_words_and_units():
    text = repr(Geometry.cone(ANGLES, (40, 100), 0.5, 60, 200))
    for part in ("cone beam", "12 views", "330 degrees", "40 x 100", "0.5", "60 mm", "200 mm"):
        assert part in text
    assert "fan beam" in repr(Geometry.cone(ANGLES, (1, 100), 0.5, 60, 200))
    assert "parallel beam" in repr(Geometry.parallel(ANGLES, (4, 100), 0.5))


def test_a_geometry_is_a_value():
    geometry = Geometry.parallel(ANGLES, (4, 9), 0.5)
    assert geometry == Geometry.parallel(ANGLES, (4, 9), 0.5)
    assert geometry != geometry.with_axis_offset(1)
    assert geometry.select(slice(0, 4)) == Geometry.parallel(ANGLES[:4], (4, 9), 0.5)
    with pytest.raises(ValueError):
        geometry.vectors[0, 0] = 1


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.zeros((3, 11)), "12 numbers"),
        (np.zeros((0, 12)), "no views"),
        (np.full((2, 12), np.nan), "NaN"),
        (np.zeros((2, 12)), "plane"),
    ],
)
def test_bad_vectors_are_refused_in_one_sentence(vectors, said):
    with pytest.raises(ScanError, match=said) as caught:
        Geometry(vectors, (4, 4))
    assert "\n" not in str(caught.value)


def test_distances_and_pixels_must_make_sense():
    with pytest.raises(ScanError, match="smaller than"):
        Geometry.cone(ANGLES, (4, 4), 1.0, 200, 60)
    with pytest.raises(ScanError, match="positive"):
        Geometry.parallel(ANGLES, (4, 4), -1.0)
    with pytest.raises(ScanError, match="bin by less"):
        Geometry.parallel(ANGLES, (4, 4), 1.0).binned(5)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    center=st.tuples(*[st.floats(-5, 5)] * 3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_cropped_voxels_stay_where_they_are(shape, center, data):
    grid = Grid(shape, 0.7, center)
    box = tuple(slice(a := data.draw(st.integers(0, n - 1)), data.draw(st.integers(a + 1, n))) for n in shape)
    crop = grid.crop(box)
    assert crop.shape == tuple(s.stop - s.start for s in box)
    expected = np.array(grid.translate) + 0.7 * np.array([s.start for s in box])
    np.testing.assert_allclose(crop.translate, expected, atol=1e-9)


def test_resampling_keeps_the_region():
    grid = Grid((10, 20, 20), 0.5)
    np.testing.assert_allclose(grid.resampled(voxel_size=0.25).extent, grid.extent)
    np.testing.assert_allclose(grid.resampled(shape=(20, 40, 40)).extent, grid.extent)
    assert grid.resampled((4, 4, 4), 1.0) == Grid((4, 4, 4), 1.0)
    with pytest.raises(ScanError, match="positive"):
        grid.resampled(voxel_size=-1)
    with pytest.raises(ScanError, match="at least 1"):
        Grid((0, 4, 4), 1.0)
