"""Bad input through the command line: one sentence, exit status 2, nothing left behind."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.learning.simulate import simulate


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=16, views=12)


@pytest.fixture
def scan(good, tmp_path):
    """A good scan of one's own to spoil."""
    return Path(shutil.copytree(good, tmp_path / "in" / "scan"))


@pytest.fixture
def refused(tmp_path):
    """Call a command, and check what every refusal has in common; returns the sentence."""
    out = tmp_path / "out"
    out.mkdir()

    def call(*arguments, output="v.tif"):
        if arguments[0] == "reconstruct":
            arguments = (*arguments, "-o", out / output)
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 2, (result.stdout, result.stderr)
        assert result.stdout == ""
        told = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(told) == 1, result.stderr
        assert told[0].endswith(".")
        assert "Traceback" not in result.stderr
        assert list(out.iterdir()) == []
        return told[0]

    return call


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("reconstruct", tmp_path / "empty")
    assert "empty" in refused("info", tmp_path / "empty")


def test_a_missing_scan(refused, tmp_path):
    assert "nowhere" in refused("reconstruct", tmp_path / "nowhere")


def test_a_file_that_is_no_scan(refused, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Sir")
    assert "letter.txt" in refused("reconstruct", tmp_path / "letter.txt")


def test_a_truncated_tiff(refused, scan):
    frame = scan / "scan_000005.tif"
    frame.write_bytes(frame.read_bytes()[: frame.stat().st_size // 2])
    assert "scan_000005.tif" in refused("reconstruct", scan, "--method", "fdk")


def test_angles_that_do_not_match_the_frames(refused, tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["exchange/data"] = np.full((10, 4, 6), 500, np.uint16)
        file["exchange/data_white"] = np.full((2, 4, 6), 1000, np.uint16)
        file["exchange/data_dark"] = np.zeros((2, 4, 6), np.uint16)
        file["exchange/theta"] = np.arange(13.0)
    told = refused("reconstruct", tmp_path / "scan.h5")
    assert "10" in told
    assert "13" in told


def test_missing_flats(refused, scan):
    for path in scan.glob("io*.tif"):
        path.unlink()
    told = refused("reconstruct", scan)
    assert "flat" in told or "io" in told


@pytest.mark.parametrize("value", [0, np.nan], ids=["zeros", "nan"])
def test_frames_of_zeros_or_nan(refused, scan, value):
    frame = scan / "scan_000003.tif"
    image = tifffile.imread(frame)
    tifffile.imwrite(frame, np.full(image.shape, value, np.float32 if np.isnan(value) else image.dtype))
    for path in scan.glob("scan_*.tif") if np.isnan(value) else []:
        if path != frame:  # one stack, one type
            tifffile.imwrite(path, tifffile.imread(path).astype(np.float32))
    told = refused("reconstruct", scan, "--method", "fdk")
    assert "zero" in told or "NaN" in told


def test_a_geometry_with_the_wrong_number_of_columns(refused, scan):
    (geometry,) = scan.glob("*.geom")
    geometry.write_text("\n".join(" ".join(line.split()[:11]) for line in geometry.read_text().splitlines()))
    assert "12" in refused("reconstruct", scan)


def test_a_volume_that_does_not_fit_in_memory(refused, scan):
    told = refused("reconstruct", scan, "--shape", 30_000, 30_000, 30_000)
    assert "voxel size of at least" in told
    assert "TB" in told


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "mps"])
def test_an_unknown_device(refused, scan, device):
    assert device in refused("reconstruct", scan, "--device", device)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--views", 0), "views"),
        (("--views", 1000), "views"),
        (("--binning", 0), "binning"),
        (("--binning", 64), "inning"),
        (("--patch", 3), "patch"),
        (("--iterations", 0), "iterations"),
        (("--regularization", -1), "regularization"),
        (("--regularization", "nan"), "regularization"),
        (("--voxel-size", 0), "voxel"),
        (("--shape", 0, 4, 4), "shape"),
        (("--method", "fdk", "--patch", 16), "patch"),
        (("--method", "sirt", "--window", "hann"), "window"),
        (("--operator", "missing.safetensors"), "missing.safetensors"),
        (("--exact", "--operator", "x.safetensors"), "--exact"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options_out_of_range(refused, scan, options, named):
    assert named in refused("reconstruct", scan, *options)


@pytest.mark.parametrize("output", ["v.png", "v", "missing/v.tif"])
def test_outputs_that_cannot_be(refused, scan, output):
    assert Path(output).name in refused("reconstruct", scan, output=output) or output == "missing/v.tif"


def test_a_folder_that_is_no_volume_is_not_overwritten(scan, tmp_path):
    folder = tmp_path / "photos.ome.zarr"
    folder.mkdir()
    (folder / "cat.jpg").write_text("meow")
    result = CliRunner().invoke(app, ["reconstruct", str(scan), "-o", str(folder)])
    assert result.exit_code == 2
    assert (folder / "cat.jpg").exists()


def test_an_operator_that_is_none(refused, scan, tmp_path):
    (tmp_path / "h.safetensors").write_bytes(b"not really")
    assert "h.safetensors" in refused("reconstruct", scan, "--operator", tmp_path / "h.safetensors")


def test_an_operator_that_cannot_be_written(refused, scan, tmp_path):
    refused("fit-operator", scan, "-o", tmp_path / "h.txt")
    refused("fit-operator", scan, "-o", tmp_path / "missing" / "h.safetensors")
    refused("fit-operator", scan, "-o", tmp_path / "in")


def test_simulations_that_cannot_be(refused, scan, tmp_path):
    assert "unicorn" in refused("simulate", "unicorn", "-o", tmp_path / "s")
    assert "1 views" in refused("simulate", "walnut", "-o", tmp_path / "s", "--views", 1)
    assert "scan" in refused("simulate", "walnut", "-o", scan)
    assert not (tmp_path / "s").exists()


def test_comparisons_that_cannot_be(refused, scan, tmp_path):
    truth = scan / "truth.tif"
    refused("compare", tmp_path / "missing.tif", "--reference", truth)
    refused("compare", truth, "--reference", tmp_path)
    tifffile.imwrite(tmp_path / "flat.tif", np.ones((16, 16, 16), np.float32))
    assert "constant" in refused("compare", truth, "--reference", tmp_path / "flat.tif")
    tifffile.imwrite(tmp_path / "small.tif", np.ones((4, 4, 4), np.float32))
    assert "voxel size" in refused("compare", tmp_path / "small.tif", "--reference", truth)


def test_a_picture_into_no_folder(refused, tmp_path):
    assert "folder" in refused("demo", "--screenshot", tmp_path / "missing" / "x.png")
