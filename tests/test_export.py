"""Volumes in the formats of others: what they hold, where they lie, and what comes back."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.jobs import volumes
from napari_recon.jobs.volumes import FORMATS, check_output, read_volume, write_volume
from napari_recon.scans import Grid, ScanError

ENDINGS = [".tif", ".ome.zarr", ".nii", ".nii.gz", ".mrc", ".dcm"]
FLOATS = [ending for ending in ENDINGS if ending != ".dcm"]
MADE_BY = {"job": {"scan": "Wörk µ", "seed": 3}, "figures": {"psnr": 30.5}}
GRID = Grid((5, 7, 6), 0.25, (1.5, -2.0, 40.0))


@pytest.fixture
def data():
    """Different along every axis and either way of it, in the range of attenuation."""
    return np.random.default_rng(0).normal(0.02, 0.01, GRID.shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _libraries(request):
    ending = getattr(request.node, "callspec", None) and request.node.callspec.params.get("ending")
    if ending in volumes._LIBRARIES:
        pytest.importorskip(volumes._LIBRARIES[ending])


@pytest.mark.parametrize("ending", FLOATS)
@pytest.mark.parametrize("shape", [(5, 7, 6), (1, 9, 8)])
def test_floats_come_back_bit_for_bit_where_they_were(tmp_path, ending, shape):
    values = np.random.default_rng(1).normal(0.02, 1, shape).astype(np.float32)
    grid = Grid(shape, 0.137, (1.5, -2.0, 40.0))
    for _ in range(2):  # the second time over the first
        write_volume(tmp_path / f"v{ending}", values, grid, MADE_BY)
    volume = read_volume(tmp_path / f"v{ending}")
    np.testing.assert_array_equal(volume.data, values)
    assert volume.data.dtype == np.float32
    assert volume.voxel_size == pytest.approx(0.137)
    assert volume.center == pytest.approx(grid.center, abs=1e-5)
    assert volume.provenance == MADE_BY
    assert [path.name for path in tmp_path.iterdir()] == [f"v{ending}"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_voxels_that_are_no_cubes_keep_their_edges(tmp_path, data, ending):
    grid = Grid(data.shape, 2.0, (3.0, 2.0, 1.0), (1.0, 0.5, 0.25))
    write_volume(tmp_path / f"v{ending}", data, grid)
    volume = read_volume(tmp_path / f"v{ending}")
    assert volume.voxel_size is None
    assert volume.grid.scale == pytest.approx((2.0, 1.0, 0.5))
    assert volume.grid.translate == pytest.approx(grid.translate, abs=1e-5)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("offset", [0.0, -7.0])
def test_16_bits_are_within_half_a_step_and_tell_their_scale(tmp_path, data, ending, offset):
    values = data + np.float32(offset)
    write_volume(tmp_path / f"v{ending}", values, GRID, MADE_BY, bits=16)
    volume = read_volume(tmp_path / f"v{ending}")
    step = float(np.ptp(values)) / 65535
    assert np.abs(volume.data - values).max() <= 0.51 * step + np.spacing(np.abs(values).max())
    assert volume.voxel_size == pytest.approx(0.25)
    assert volume.center == pytest.approx(GRID.center, abs=1e-5)
    assert volume.provenance == MADE_BY


@pytest.mark.parametrize("ending", FLOATS)
def test_nobody_gets_16_bits_without_asking(tmp_path, data, ending):
    path = tmp_path / f"v{ending}"
    write_volume(path, data, GRID)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    assert ending in (".nii.gz", ".ome.zarr") or size >= 4 * data.size
    np.testing.assert_array_equal(read_volume(path).data, data)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_volume_of_one_value_has_16_bits_too(tmp_path, ending):
    values = np.full((2, 3, 4), 0.03, np.float32)
    write_volume(tmp_path / f"v{ending}", values, Grid(values.shape, 1.0), bits=16)
    np.testing.assert_allclose(read_volume(tmp_path / f"v{ending}").data, values, rtol=1e-6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_finite_is_refused_in_16_bits_and_leaves_nothing(tmp_path, data, ending):
    data[2, 3, 4] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        write_volume(tmp_path / f"v{ending}", data, GRID, bits=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stopped_writer_leaves_what_was_there(tmp_path, data, ending):
    path = tmp_path / f"v{ending}"
    write_volume(path, data, GRID)
    assert write_volume(path, 2 * data, GRID, should_stop=lambda: True) is None
    assert np.abs(read_volume(path).data - data).max() < 1e-6
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_fiji_reads_16_bits_by_its_own_calibration(tmp_path, data):
    import tifffile

    write_volume(tmp_path / "v.tif", data, GRID, bits=16)
    with tifffile.TiffFile(tmp_path / "v.tif") as file:
        numbers, told = file.asarray(), file.imagej_metadata
    assert numbers.dtype == np.uint16
    assert told["cf"] == 0
    np.testing.assert_allclose(told["c0"] + told["c1"] * numbers.astype(float), data, atol=float(np.ptp(data)) / 65535)


def test_large_tiffs_have_16_bits_too(tmp_path, data, monkeypatch):
    monkeypatch.setattr(volumes, "_IMAGEJ_LIMIT", 100)
    grid = Grid(data.shape, 2.0, (3.0, 2.0, 1.0), (1.0, 0.5, 0.25))
    write_volume(tmp_path / "v.tif", data, grid, MADE_BY, bits=16)
    volume = read_volume(tmp_path / "v.tif")
    np.testing.assert_allclose(volume.data, data, atol=float(np.ptp(data)) / 65535)
    assert volume.grid.scale == pytest.approx((2.0, 1.0, 0.5))
    assert volume.provenance == MADE_BY


@pytest.mark.parametrize("bits", [32, 16])
def test_nifti_has_x_first_and_an_affine_to_the_world(tmp_path, data, bits):
    nibabel = pytest.importorskip("nibabel")
    write_volume(tmp_path / "v.nii.gz", data, GRID, bits=bits)
    image = nibabel.load(tmp_path / "v.nii.gz")
    assert image.shape == data.shape[::-1]
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms() == pytest.approx((0.25,) * 3)
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [*GRID.translate[::-1], 1])
    i, j, k = 4, 2, 3
    assert image.get_fdata()[i, j, k] == pytest.approx(data[k, j, i], abs=float(np.ptp(data)) / 65535)
    assert image.get_data_dtype() == (np.float32 if bits == 32 else np.int16)


def test_mrc_is_valid_and_in_angstrom(tmp_path, data, capsys):
    mrcfile = pytest.importorskip("mrcfile")
    for bits in (32, 16):
        write_volume(tmp_path / "v.mrc", data, GRID, MADE_BY, bits=bits)
        mrcfile.validate(tmp_path / "v.mrc")
        _, *complaints = capsys.readouterr().out.strip().splitlines()
        # An extended header is skipped by who does not know it; the standard has no type for provenance.
        assert all("exttyp = 'JSON'" in complaint for complaint in complaints)
    write_volume(tmp_path / "v.mrc", data, GRID)
    with mrcfile.open(tmp_path / "v.mrc") as file:
        assert file.is_volume()
        assert file.voxel_size.x == pytest.approx(0.25e7)
        np.testing.assert_array_equal(file.data, data)


def test_dicom_slices_are_where_nifti_says(tmp_path, data):
    """A viewer that knows both shows the volume in one place: x, y, z to the right, to the front, up."""
    pydicom, nibabel = pytest.importorskip("pydicom"), pytest.importorskip("nibabel")
    write_volume(tmp_path / "v.dcm", data, GRID)
    write_volume(tmp_path / "v.nii", data, GRID)
    affine = nibabel.load(tmp_path / "v.nii").affine
    files = sorted((tmp_path / "v.dcm").iterdir())
    assert len(files) == GRID.shape[0]
    for k, file in enumerate(files):
        one = pydicom.dcmread(file)
        row, column = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
        j, i = 2, 5
        lps = np.array(one.ImagePositionPatient) + i * one.PixelSpacing[1] * row + j * one.PixelSpacing[0] * column
        np.testing.assert_allclose(lps * [-1, -1, 1], (affine @ [i, j, k, 1])[:3], atol=1e-4)
        value = one.pixel_array[j, i] * float(one.RescaleSlope) + float(one.RescaleIntercept)
        assert value == pytest.approx(data[k, j, i], abs=float(np.ptp(data)) / 65535)


def test_dicom_has_16_bits_only(tmp_path, data):
    pytest.importorskip("pydicom")
    with pytest.raises(ScanError, match="16"):
        write_volume(tmp_path / "v.dcm", data, GRID, bits=32)


def test_other_orientations_are_turned_into_ours(tmp_path, data):
    """As another program stores it: y first, then z, then x backwards; the same place all the same."""
    nibabel = pytest.importorskip("nibabel")
    write_volume(tmp_path / "ours.nii", data, GRID)
    ours = nibabel.load(tmp_path / "ours.nii")
    turned = ours.as_reoriented(nibabel.orientations.axcodes2ornt("LAS"))
    swapped = nibabel.Nifti1Image(
        np.asarray(turned.dataobj).transpose(1, 2, 0), turned.affine @ np.eye(4)[:, [1, 2, 0, 3]]
    )
    swapped.header.set_xyzt_units("mm")
    swapped.to_filename(tmp_path / "theirs.nii")
    volume = read_volume(tmp_path / "theirs.nii")
    np.testing.assert_array_equal(volume.data, data)
    assert volume.grid.translate == pytest.approx(GRID.translate, abs=1e-5)


def test_mrc_axes_in_another_order_are_turned_into_ours(tmp_path, data):
    mrcfile = pytest.importorskip("mrcfile")
    with mrcfile.new(tmp_path / "theirs.mrc") as file:
        file.set_data(np.ascontiguousarray(data.transpose(2, 1, 0)))  # sections along x, columns along z
        file.set_volume()
        file.header.cella.x, file.header.cella.y, file.header.cella.z = (1e7 * e for e in GRID.extent[::-1])
        file.header.mx, file.header.my, file.header.mz = data.shape[::-1]
        file.header.mapc, file.header.mapr, file.header.maps = 3, 2, 1
    volume = read_volume(tmp_path / "theirs.mrc")
    np.testing.assert_array_equal(volume.data, data)
    assert volume.voxel_size == pytest.approx(0.25)


def test_slices_that_are_missing_or_mixed_are_told(tmp_path, data):
    pytest.importorskip("pydicom")
    write_volume(tmp_path / "v.dcm", data, GRID)
    (tmp_path / "v.dcm" / "00003.dcm").unlink()
    with pytest.raises(ScanError, match="evenly"):
        read_volume(tmp_path / "v.dcm")
    write_volume(tmp_path / "v.dcm", data, GRID)
    write_volume(tmp_path / "w.dcm", data, GRID)
    (tmp_path / "w.dcm" / "00001.dcm").rename(tmp_path / "v.dcm" / "other.dcm")
    with pytest.raises(ScanError, match="one"):
        read_volume(tmp_path / "v.dcm")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mrc"])
def test_damaged_files_are_one_sentence(tmp_path, data, ending):
    write_volume(tmp_path / f"v{ending}", data, GRID)
    (tmp_path / f"short{ending}").write_bytes((tmp_path / f"v{ending}").read_bytes()[:700])
    with pytest.raises(ScanError, match="short"):
        read_volume(tmp_path / f"short{ending}")


def test_a_folder_of_other_things_is_no_place_for_slices(tmp_path, data):
    pytest.importorskip("pydicom")
    (tmp_path / "v.dcm").mkdir()
    (tmp_path / "v.dcm" / "thesis.txt").write_text("mine")
    with pytest.raises(ScanError, match="left alone"):
        write_volume(tmp_path / "v.dcm", data, GRID)
    assert (tmp_path / "v.dcm" / "thesis.txt").read_text() == "mine"


def test_a_library_that_is_not_there_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: None)
    for ending in (*FORMATS["NIfTI"], *FORMATS["MRC"], *FORMATS["DICOM"]):
        with pytest.raises(ScanError, match=r"napari-recon\[formats\]"):
            check_output(tmp_path / f"v{ending}")
    check_output(tmp_path / "v.tif")


def test_the_command_line_exports_what_another_program_wrote(tmp_path, data):
    pytest.importorskip("nibabel")
    write_volume(tmp_path / "v.tif", data, GRID, MADE_BY)

    def export(name, *more, status=0):
        arguments = ["export", tmp_path / "v.tif", "-o", tmp_path / name, "--json", *more]
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == status, result.stderr
        return json.loads(result.stdout)

    assert export("v.nii.gz")["shape"] == list(data.shape)
    volume = read_volume(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(volume.data, data)
    assert volume.provenance == MADE_BY
    export("v.ome.zarr", "--bits", "16")
    volume = read_volume(tmp_path / "v.ome.zarr")
    assert 0 < np.abs(volume.data - data).max() <= np.ptp(data) / 65535
    assert "ending" in export("v.png", status=2)["error"]
