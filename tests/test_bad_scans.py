"""Bad input: one sentence that says what is wrong, where, and what to do."""

import os
import shutil

import h5py
import numpy as np
import pytest
import tifffile

from napari_recon.learning.simulate import simulate
from napari_recon.scans import ScanError, open_scan

SIDECAR = 'kind = "parallel"\nangles = { first = 0, step = 30 }\nflats = "flat.tif"\ndarks = "dark.tif"\n'


@pytest.fixture
def nut(tmp_path):
    return simulate("blobs", tmp_path / "nut", size=12, views=6)


@pytest.fixture
def stack(tmp_path):
    folder = tmp_path / "stack"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(6):
        tifffile.imwrite(folder / f"p{k}.tif", rng.integers(1000, 9000, (5, 8)).astype(np.uint16))
    tifffile.imwrite(folder / "flat.tif", np.full((5, 8), 10_000, np.uint16))
    tifffile.imwrite(folder / "dark.tif", np.full((5, 8), 100, np.uint16))
    (folder / "scan.toml").write_text(SIDECAR)
    return folder


@pytest.fixture
def exchange(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["exchange/data"] = np.random.default_rng(0).integers(1000, 9000, (6, 5, 8)).astype(np.uint16)
        file["exchange/data_white"], file["exchange/data_dark"] = np.full((1, 5, 8), 10_000), np.full((1, 5, 8), 100)
        file["exchange/theta"] = np.arange(6) * 30.0
    return path


def sentence(path, *parts, read=True, **options):
    """Opening (and reading) raises a ScanError of one sentence with these parts in it."""

    def attempt():
        scan = open_scan(path, **options)
        if read:
            scan.projections()

    with pytest.raises(ScanError) as caught:
        attempt()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert "Traceback" not in text
    for part in parts:
        assert part in text, text
    return text


def test_missing_path(tmp_path):
    sentence(tmp_path / "nowhere", "nowhere does not exist", "check the path")


def test_empty_folder(tmp_path):
    sentence(tmp_path, "is an empty folder")


def test_unknown_format_lists_what_is_understood(tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    for path in (tmp_path, tmp_path / "notes.docx"):
        sentence(path, "scan.toml", "DXchange", "NXtomo", "Walnut", ".mat")


def test_tiffs_without_a_sidecar(stack):
    (stack / "scan.toml").unlink()
    sentence(stack, "no scan.toml", "angles")


# -- Walnut -------------------------------------------------------------------------------------------------------


def test_truncated_tiff(nut):
    file = nut / "scan_000002.tif"
    file.write_bytes(file.read_bytes()[:300])
    sentence(nut, "scan_000002.tif", "truncated", "copy it again")
    file.write_bytes(b"")
    sentence(nut, "scan_000002.tif", "truncated", "copy it again")


def test_truncated_plain_tiff_is_seen_at_opening(stack):
    file = stack / "p3.tif"
    file.write_bytes(file.read_bytes()[:-20])
    sentence(stack, "p3.tif", "truncated", read=False)


def test_truncated_multi_page_tiff(stack):
    data = np.stack([tifffile.imread(stack / f"p{k}.tif") for k in range(6)])
    tifffile.imwrite(stack / "all.tif", data)
    for k in range(6):
        (stack / f"p{k}.tif").unlink()
    (stack / "scan.toml").write_text(SIDECAR + 'projections = "all.tif"')
    assert open_scan(stack).shape == (6, 5, 8)
    file = stack / "all.tif"
    with tifffile.TiffFile(file) as tif:
        start = tif.series[0].dataoffset
    os.truncate(file, start + 300)
    sentence(stack, "all.tif", "truncated")


def test_missing_images(nut):
    (nut / "scan_000004.tif").unlink()
    sentence(nut, "lacks 1 of the 6 images", "scan_000004.tif", read=False)


def test_missing_walnut_flats(nut):
    for file in nut.glob("io*.tif"):
        file.unlink()
    sentence(nut, "no flats", read=False)


@pytest.mark.parametrize("columns", [11, 13, 3])
def test_geometry_with_the_wrong_number_of_columns(nut, columns):
    np.savetxt(nut / "scan_geom_corrected.geom", np.ones((7, columns)))
    sentence(nut, "scan_geom_corrected.geom", f"{columns} columns", "12", read=False)


@pytest.mark.parametrize("text", ["", "walnut shell\n", "1 2 3\n1 2\n"])
def test_geometry_that_is_no_table(nut, text):
    (nut / "scan_geom_corrected.geom").write_text(text)
    sentence(nut, "scan_geom_corrected.geom", read=False)


def test_geometry_with_nan(nut):
    vectors = np.loadtxt(nut / "scan_geom_corrected.geom")
    vectors[2, 3] = np.nan
    np.savetxt(nut / "scan_geom_corrected.geom", vectors)
    sentence(nut, "NaN", "row 3", read=False)


def test_frames_of_another_size(nut):
    tifffile.imwrite(nut / "scan_000003.tif", np.ones((4, 4), np.uint16), compression="zlib")
    sentence(nut, "scan_000003.tif", "4 x 4", "other frames")


def test_frames_that_are_all_zero(nut):
    image = tifffile.imread(nut / "scan_000003.tif")
    tifffile.imwrite(nut / "scan_000003.tif", np.zeros_like(image), compression="zlib")
    sentence(nut, "Frame 3", "zero everywhere", "leave the frame")  # of 7 images in reverse, number 3 is view 3


# -- sidecars -----------------------------------------------------------------------------------------------------


def test_angles_that_do_not_match(stack):
    (stack / "scan.toml").write_text(SIDECAR.replace("{ first = 0, step = 30 }", "[0, 30, 60]"))
    sentence(stack, "3 angles for 6 projections", read=False)
    (stack / "scan.toml").write_text(SIDECAR.replace("step = 30", "last = 180, count = 7"))
    sentence(stack, "count = 7", "6 projections", read=False)
    (stack / "scan.toml").write_text(SIDECAR.replace("step = 30", "last = 150, step = 30"))
    sentence(stack, "either step, or last", read=False)


def test_missing_flats(stack):
    (stack / "scan.toml").write_text(SIDECAR.replace('flats = "flat.tif"', 'projections = "p*.tif"'))
    sentence(stack, "no flats", "already_log", read=False)
    (stack / "scan.toml").write_text(SIDECAR.replace("flat.tif", "white*.tif"))
    sentence(stack, "matches flats = 'white*.tif'", read=False)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("detector_pixle = 1", ["'detector_pixle'", "did you mean 'detector_pixel'?"]),
        ("colour = 3", ["'colour'", "the fields are"]),
        ('detector_pixel = "big"', ["detector_pixel", "mm"]),
        ("axis_column = 4\naxis_offset = 1", ["axis_offset", "axis_column", "twice"]),
        ('rotation = "left"', ["rotation", "clockwise"]),
        ('folder = "nowhere"', ["nowhere", "folder"]),
        ('projections = "q*.tif"', ["projections = 'q*.tif'"]),
        ('projections = "none.h5"', ["none.h5", "does not exist"]),
        ("this is = not toml", ["not valid TOML"]),
        ("axis_offset = nan", ["axis_offset"]),
    ],
)
def test_wrong_fields_are_named(stack, line, parts):
    (stack / "scan.toml").write_text(SIDECAR + line)
    sentence(stack, "scan.toml", *parts, read=False)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("parallel", "helical"), ["kind", "cone", "parallel"]),
        (('kind = "parallel"\n', ""), ["'kind' is missing"]),
        (("angles = { first = 0, step = 30 }\n", ""), ["'angles' is missing"]),
        (("{ first = 0, step = 30 }", '"angles.txt"'), ["angles.txt", "does not exist"]),
        (("{ first = 0, step = 30 }", "[0, 1, 2, 3, 4, nan]"), ["NaN"]),
        (('"parallel"', '"cone"'), ["'detector_pixel' is missing"]),
        (('"parallel"', '"cone"\ndetector_pixel = 0.1'), ["'source_object' is missing"]),
        (
            ('"parallel"', '"cone"\ndetector_pixel = 0.1\nsource_object = 300\nsource_detector = 200'),
            ["source-object", "smaller"],
        ),
    ],
)
def test_missing_and_wrong_values(stack, change, parts):
    assert change[0] in SIDECAR
    (stack / "scan.toml").write_text(SIDECAR.replace(*change))
    sentence(stack, "scan.toml", *parts, read=False)


def test_flats_of_another_detector(stack):
    tifffile.imwrite(stack / "flat.tif", np.ones((4, 8), np.uint16))
    sentence(stack, "flats of 4 x 8", "5 x 8", read=False)


def test_flats_and_darks_swapped(stack):
    (stack / "scan.toml").write_text(
        SIDECAR.replace("flat.tif", "x").replace("dark.tif", "flat.tif").replace('"x"', '"dark.tif"')
    )
    sentence(stack, "swapped")


def test_colour_images(stack):
    for k in range(6):
        tifffile.imwrite(stack / f"p{k}.tif", np.ones((5, 8, 3), np.uint8), photometric="rgb")
    sentence(stack, "grey-scale", read=False)


# -- HDF5 ---------------------------------------------------------------------------------------------------------


def test_hdf5_angles_that_do_not_match(exchange):
    with h5py.File(exchange, "a") as file:
        del file["exchange/theta"]
        file["exchange/theta"] = np.arange(9.0)
    sentence(exchange, "9 angles for 6 projections", read=False)


def test_hdf5_without_flats(exchange):
    with h5py.File(exchange, "a") as file:
        del file["exchange/data_white"]
    sentence(exchange, "no flats", read=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_frames(exchange, value):
    with h5py.File(exchange, "a") as file:
        data = file["exchange/data"][()].astype(np.float32)
        data[4, 1, 2] = value
        del file["exchange/data"]
        file["exchange/data"] = data
    sentence(exchange, "Frame 4", "1 NaN or infinite")
    sentence(exchange, "Frame 4", views=3)  # numbered as in the file: kept are 0, 2, 4


def test_truncated_hdf5(exchange):
    whole = exchange.read_bytes()
    for keep in (100, len(whole) // 2):
        exchange.write_bytes(whole[:keep])
        sentence(exchange, "a.h5", "copy it again", read=False)


def test_hdf5_of_something_else(tmp_path):
    with h5py.File(tmp_path / "mesh.h5", "w") as file:
        file["vertices"] = np.zeros(3)
    sentence(tmp_path / "mesh.h5", "known format", read=False)


def test_nxtomo_angles_that_do_not_match(tmp_path):
    with h5py.File(tmp_path / "a.nxs", "w") as file:
        detector = file.create_group("entry/detector")
        detector.attrs["NX_class"] = "NXdetector"
        detector["data"], detector["image_key"] = np.ones((4, 3, 5)), [1, 2, 0, 0]
        file["entry/rotation_angle"] = np.arange(7.0)
    sentence(tmp_path / "a.nxs", "7 angles for 4 frames", read=False)


def test_damaged_mat(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"\0" * 200)
    sentence(tmp_path / "a.mat", read=False)


# -- options ------------------------------------------------------------------------------------------------------


def test_options_out_of_range(nut):
    sentence(nut, "6 views", "7 were asked", views=7, read=False)
    sentence(nut, "views = 0", views=0, read=False)
    sentence(nut, "bin by less", binning=64, read=False)
    sentence(nut, "no scan option 'bining'", "binning", bining=2, read=False)


def test_a_scan_that_vanishes_after_opening(nut):
    scan = open_scan(nut)
    shutil.rmtree(nut)
    with pytest.raises(ScanError, match="missing"):
        scan.projections()


def test_damaged_truth(nut):
    (nut / "truth.tif").write_bytes(b"II*\0")
    sentence(nut, "truth.tif", "copy it again", read=False)


def test_nothing_is_printed_beside_the_sentence(nut, capfd):
    file = nut / "scan_000002.tif"
    file.write_bytes(file.read_bytes()[:300])
    sentence(nut, "truncated")
    assert capfd.readouterr().err == ""
