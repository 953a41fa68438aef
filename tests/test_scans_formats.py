"""Readers: the same data through every format is the same scan, and opening one reads no frames."""

import json
import resource
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import tifffile

from napari_recon import sample_data
from napari_recon.learning.phantoms import make_phantom
from napari_recon.learning.simulate import simulate
from napari_recon.scans import Geometry, ScanError, open_scan
from napari_recon.scans.formats import walnut
from napari_recon.scans.formats.tiff_stack import Sidecar

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the measured data is not at ../shared/data")

ANGLES = np.arange(0, 180, 20.0)
SHAPE = (6, 10)


@pytest.fixture
def counts():
    """Raw frames, flat, dark, and the line integrals in them."""
    rng = np.random.default_rng(0)
    integrals = rng.uniform(0, 2, (len(ANGLES), *SHAPE))
    flat = rng.uniform(20_000, 30_000, SHAPE)
    dark = rng.uniform(90, 110, SHAPE).round()
    raw = (flat - dark) * np.exp(-integrals) + dark
    return raw.round().astype(np.uint16), flat.round().astype(np.uint16), dark.astype(np.uint16), integrals


def write_tiffs(folder, counts, sidecar, pages=False):
    raw, flat, dark, _ = counts
    folder.mkdir(parents=True, exist_ok=True)
    if pages:
        tifffile.imwrite(folder / "projections.tif", raw)
    else:
        for k, image in enumerate(raw):
            tifffile.imwrite(folder / f"proj_{k + 1}.tif", image)  # unpadded: 10 must come after 9
    tifffile.imwrite(folder / "flat.tif", flat)
    tifffile.imwrite(folder / "dark.tif", dark)
    (folder / "scan.toml").write_text(textwrap.dedent(sidecar))
    return folder


PARALLEL = """
    kind = "parallel"
    angles = { first = 0, step = 20 }
    flats = "flat*.tif"
    darks = "dark*.tif"
    detector_pixel = 0.5
"""


def write_dxchange(path, counts, **without):
    raw, flat, dark, _ = counts
    with h5py.File(path, "w") as file:
        file["exchange/data"], file["exchange/theta"] = raw, ANGLES
        file["exchange/data_white"], file["exchange/data_dark"] = np.stack([flat] * 3), dark[None]
        for name in without:
            del file[f"exchange/{name}"]
    return path


def write_nxtomo(path, counts, where="entry1/tomo_entry"):
    raw, flat, dark, _ = counts
    with h5py.File(path, "w") as file:
        detector = file.create_group(f"{where}/instrument/a_camera")  # the class names it, not its path
        detector.attrs["NX_class"] = "NXdetector"
        detector["data"] = np.concatenate([[flat], raw[:4], [dark], raw[4:], [raw[0]]])
        n = len(raw)
        detector["image_key"] = np.array([1, 0, 0, 0, 0, 2, *[0] * (n - 4), 3])
        detector["x_pixel_size"] = 500.0
        detector["x_pixel_size"].attrs["units"] = "um"
        sample = file.create_group(f"{where}/sample")
        sample.attrs["NX_class"] = "NXsample"
        sample["rotation_angle"] = np.deg2rad([0, *ANGLES[:4], 0, *ANGLES[4:], 0])
        sample["rotation_angle"].attrs["units"] = "rad"
    return path


@pytest.mark.parametrize("pages", [False, True])
def test_every_format_gives_the_same_scan(tmp_path, counts, pages):
    tiffs = open_scan(write_tiffs(tmp_path / "tiffs", counts, PARALLEL, pages))
    nxtomo = open_scan(write_nxtomo(tmp_path / "a.nxs", counts))
    dxchange = open_scan(write_dxchange(tmp_path / "a.h5", counts))
    assert {tiffs.format, nxtomo.format, dxchange.format} == {"TIFF stack", "NXtomo", "DXchange"}
    for scan in (tiffs, nxtomo, dxchange):
        np.testing.assert_allclose(scan.projections(), counts[3], atol=2e-3)
        np.testing.assert_array_equal(scan.frames[3], counts[0][3])
        np.testing.assert_array_equal(scan.frames[[7, 2, 3]], counts[0][[7, 2, 3]])
        assert scan.frames.dtype == np.uint16
    np.testing.assert_allclose(tiffs.geometry.vectors, nxtomo.geometry.vectors, atol=1e-12)
    assert dxchange.geometry.pixel_size == (1, 1)
    assert "not recorded" in dxchange.notes["pixel size"]
    assert "assumed" in dxchange.summary()["Pixel size"]
    assert "assumed" not in nxtomo.summary()["Pixel size"]


def test_walnut_reads_what_the_authors_scripts_read(tmp_path):
    """Images in reverse, each transpose(flipud(image)), the repeated last view dropped (WalnutReconstructionCodes)."""
    rng = np.random.default_rng(1)
    n, rows, columns = 7, 5, 8  # n rows in the geometry, the last of which repeats the first
    vectors = Geometry.cone(np.linspace(0, 360, n), (rows, columns), 0.1496, 66, 199).vectors
    vectors = vectors + rng.normal(scale=1e-3, size=vectors.shape)
    folder = tmp_path / "Walnut3" / "Projections" / "tubeV2"
    folder.mkdir(parents=True)
    np.savetxt(folder / "scan_geom_original.geom", vectors + 1)
    np.savetxt(folder / "scan_geom_corrected.geom", vectors)
    images = rng.integers(1000, 9000, (n, columns, rows)).astype(np.uint16)
    for k, image in enumerate(images):
        tifffile.imwrite(folder / f"scan_{k:06d}.tif", image)
    tifffile.imwrite(folder / "di000000.tif", np.full((columns, rows), 100, np.uint16))
    for k in range(2):
        tifffile.imwrite(folder / f"io{k:06d}.tif", np.full((columns, rows), 10_000 + 200 * k, np.uint16))

    for path in (folder, folder.parent, folder.parent.parent):
        scan = open_scan(path)
        assert scan.name == "Walnut3 tubeV2"
        assert scan.shape == (n - 1, rows, columns)
        np.testing.assert_allclose(scan.geometry.vectors, vectors[:-1], rtol=1e-8)
        expected = np.stack([np.transpose(np.flipud(images[n - 1 - i])) for i in range(n - 1)])
        np.testing.assert_array_equal(scan.frames[:], expected)
        np.testing.assert_allclose(scan.projections(), -np.log((expected - 100.0) / 10_000), rtol=1e-5)

    (folder.parent / "tubeV1").mkdir()
    (folder.parent / "tubeV1" / "scan_geom_original.geom").write_text("")
    with pytest.raises(ScanError, match="tubeV1, tubeV2"):
        open_scan(folder.parent)


def test_storing_an_image_and_reading_it_are_inverse():
    image = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(walnut.from_stored(walnut.to_stored(image)), image)


def test_frames_that_are_line_integrals_or_transmissions_already(tmp_path, counts):
    integrals = counts[3].astype(np.float32)
    for field, data in (("already_log", integrals), ("already_flat", np.exp(-integrals))):
        folder = tmp_path / field
        folder.mkdir()
        tifffile.imwrite(folder / "data.tif", data)
        (folder / "scan.toml").write_text(f'kind="parallel"\nangles={{first=0,step=20}}\n{field}=true')
        np.testing.assert_allclose(open_scan(folder).projections(), integrals, atol=1e-6)


def test_a_sidecar_says_where_the_axis_is_and_which_way_it_turns(tmp_path, counts):
    there = write_tiffs(tmp_path / "images", counts, PARALLEL)
    (tmp_path / "elsewhere.toml").write_text(
        textwrap.dedent(PARALLEL) + 'folder = "images"\nprojections = "proj_*.tif"\naxis_column = 6.0\n'
        'rotation = "clockwise"\nrow_order = "bottom-up"\nvoxel_size = 0.25\n'
    )
    a, b = open_scan(there), open_scan(tmp_path / "elsewhere.toml")
    np.testing.assert_array_equal(a.frames[:], b.frames[:])
    np.testing.assert_allclose(b.geometry.axis_offset, 1.5)  # the centre of 10 columns is 4.5
    np.testing.assert_allclose(b.geometry.angles, -a.geometry.angles, atol=1e-9)
    np.testing.assert_allclose(b.geometry.v, -a.geometry.v)
    assert a.geometry.v[0, 2] < 0  # the first row is the top
    assert b.default_grid().voxel_size == 0.25


@pytest.mark.parametrize(
    "angles",
    ["[0, 20, 40, 60, 80, 100, 120, 140, 160]", '"angles.txt"', "{ first = 0, last = 160, count = 9 }",
     "{ first = 0, last = 160 }", "{ step = 20 }"],
)  # fmt: skip
def test_angles_can_be_said_in_several_ways(tmp_path, counts, angles):
    np.savetxt(tmp_path / "angles.txt", ANGLES)
    folder = write_tiffs(tmp_path, counts, PARALLEL.replace("{ first = 0, step = 20 }", angles))
    np.testing.assert_allclose(open_scan(folder).geometry.angles, ANGLES, atol=1e-9)


def test_cone_and_fan_sidecars(tmp_path, counts):
    cone = PARALLEL.replace("parallel", "cone") + "    source_object = 66\n    source_detector = 199\n"
    scan = open_scan(write_tiffs(tmp_path / "cone", counts, cone))
    expected = Geometry.cone(ANGLES, SHAPE, 0.5, 66, 199).vectors.copy()
    expected[:, 9:] *= -1
    np.testing.assert_allclose(scan.geometry.vectors, expected)
    fan = tuple(a[..., 2:3, :] for a in counts)
    assert open_scan(write_tiffs(tmp_path / "fan", fan, cone.replace("cone", "fan"))).geometry.is_fan
    with pytest.raises(ScanError, match="one row"):
        open_scan(write_tiffs(tmp_path / "no", counts, cone.replace("cone", "fan")))


def test_hdf5_frames_with_a_sidecar(tmp_path, counts):
    write_dxchange(tmp_path / "a.h5", counts, theta=True)
    with pytest.raises(ScanError, match=r"no exchange/theta.*scan\.toml"):
        open_scan(tmp_path / "a.h5")
    (tmp_path / "a.toml").write_text(
        'kind = "cone"\nprojections = "a.h5"\nangles = { first = 0, step = 20 }\ndetector_pixel = 0.5\n'
        "source_object = 66\nsource_detector = 199\n"
    )
    scan = open_scan(tmp_path / "a.toml")
    np.testing.assert_allclose(scan.projections(), counts[3], atol=2e-3)
    assert scan.geometry.kind == "cone"


def test_a_folder_with_one_scan_file_is_that_scan(tmp_path, counts):
    write_dxchange(tmp_path / "only.h5", counts)
    assert open_scan(tmp_path).name == "only"


def test_opening_reads_no_frames(tmp_path):
    """2 GB of frames, as sparse files: opening them takes neither time nor memory."""
    shape = (1000, 1024, 1024)
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file.create_dataset("exchange/data", shape, np.uint16)
        file.create_dataset("exchange/data_white", (1, *shape[1:]), np.uint16)
        file["exchange/theta"] = np.linspace(0, 180, shape[0])
    folder = tmp_path / "stack"
    folder.mkdir()
    del_me = tifffile.memmap(folder / "big.tif", shape=shape, dtype=np.uint16, bigtiff=True)
    del del_me
    (folder / "scan.toml").write_text('kind="parallel"\nangles={first=0,step=0.18}\nalready_log=true')
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for path in (tmp_path / "big.h5", folder):
        scan = open_scan(path, views=30, binning=2)
        assert scan.shape == (30, 512, 512)
        scan.summary()
        scan.default_grid()
        assert scan.frames[29].shape == shape[1:]  # and one frame is one frame
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_compressed_and_multi_page_tiffs_read_frame_by_frame(tmp_path, counts):
    folder = write_tiffs(tmp_path, counts, PARALLEL, pages=True)
    tifffile.imwrite(folder / "projections.tif", counts[0], compression="zlib")
    scan = open_scan(folder)
    np.testing.assert_array_equal(scan.frames[[8, 1]], counts[0][[8, 1]])
    np.testing.assert_allclose(scan.projections(), counts[3], atol=2e-3)


def test_helsinki(tmp_path):
    sinogram = np.random.default_rng(0).uniform(0, 2, (9, 12))
    parameters = {
        "angles": np.linspace(0, 360, 9), "distanceSourceOrigin": 410.66, "distanceSourceDetector": 553.74,
        "pixelSize": 0.05, "pixelSizePost": 0.2, "scanner": "a scanner",
    }  # fmt: skip
    scipy.io.savemat(tmp_path / "a.mat", {"CtDataFull": {"sinogram": sinogram, "parameters": parameters}})
    scan = open_scan(tmp_path / "a.mat")
    assert scan.geometry.is_fan
    assert scan.shape == (8, 1, 12)  # the last view repeats the first
    np.testing.assert_allclose(scan.projections()[:, 0], sinogram[:-1], rtol=1e-6)
    np.testing.assert_allclose(scan.geometry.source_detector, 553.74)
    assert scan.geometry.pixel_size == pytest.approx((0.2, 0.2))


def test_the_sample_is_small_and_whole():
    assert "walnut-like" in sample_data.names()
    folder = sample_data.path("walnut-like")
    assert sum(f.stat().st_size for f in folder.parent.rglob("*") if f.is_file()) < 2e6
    scan = open_scan(folder)
    assert scan.shape[0] == 60
    assert scan.default_grid().shape == (96, 96, 96)
    exact = make_phantom("walnut", 0).project(scan.geometry)
    assert np.corrcoef(scan.projections().ravel(), exact.ravel())[0, 1] > 0.999
    with pytest.raises(ScanError, match="walnut-like"):
        sample_data.path("no such")


def test_a_simulated_scan_opens_through_its_parent_too(tmp_path):
    simulate("blobs", tmp_path / "here" / "tubeV1", size=12, views=4)
    assert open_scan(tmp_path / "here").shape == open_scan(tmp_path / "here" / "tubeV1").shape


# -- real data ----------------------------------------------------------------------------------------------------


@needs_data
def test_diamond_is_the_same_through_three_formats():
    toml = open_scan(ROOT / "docs" / "examples" / "diamond_parallel.toml")
    assert toml.shape == (91, 135, 160)
    np.testing.assert_allclose(toml.geometry.axis_offset, 85.9 - 79.5, atol=1e-9)
    p = toml.projections()
    assert abs(np.median(p[:, :, -6:])) < 0.02  # air at zero
    assert np.isfinite(p).all()
    raw = np.asarray(toml.frames)
    for name in ("derived_dxchange.h5", "derived_nxtomo.nxs"):
        other = open_scan(SHARED / "diamond_parallel" / name)
        np.testing.assert_array_equal(other.frames[:], raw)
        same = other.with_options(air_normalisation=True, axis_offset=6.4)
        np.testing.assert_allclose(same.geometry.vectors, toml.geometry.vectors, atol=1e-3)  # angles are rounded
        np.testing.assert_allclose(same.projections(), p, atol=1e-5)
        said = " ".join(other.checks())
        assert "air normalisation" in said
        assert "axis offset to 6.3" in said or "axis offset to 6.4" in said
    assert not any("air" in s or "axis" in s for s in toml.checks())


@needs_data
def test_diamonds_angle_file_is_told_about_in_a_sentence(tmp_path):
    text = (ROOT / "docs" / "examples" / "diamond_parallel.toml").read_text()
    text = text.replace("{ first = -88.2, step = 2.0 }", '"angles.txt"')
    text = text.replace("../../../shared/data/diamond_parallel", json.dumps(str(SHARED / "diamond_parallel"))[1:-1])
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(ScanError, match="111 angles for 91 projections"):
        open_scan(tmp_path / "d.toml")


@needs_data
def test_tooth_and_its_axis():
    plain = open_scan(SHARED / "tooth" / "tooth.h5")
    assert plain.shape == (181, 2, 640)
    assert any("axis offset to -23.9" in s for s in plain.checks())  # 295.6 - 319.5
    known = open_scan(ROOT / "docs" / "examples" / "tooth.toml")
    np.testing.assert_array_equal(known.projections(), plain.projections())
    np.testing.assert_allclose(known.geometry.axis_offset, -23.9, atol=1e-9)


@needs_data
def test_helsinki_real():
    scan = open_scan(SHARED / "helsinki_fan" / "htc2022_ta_full.mat")
    assert scan.shape == (720, 1, 560)
    assert scan.geometry.magnification == pytest.approx(553.74 / 410.66)
    assert scan.default_grid().voxel_size == pytest.approx(0.148322, rel=1e-4)
    with pytest.raises(ScanError, match="known format"):
        open_scan(SHARED / "helsinki_fan" / "htc2022_ta_full_recon_fbp.mat")


@needs_data
def test_helsinki_reconstructs_to_the_authors_own_picture():
    """Orientation, distances and values at once; the authors' rows run downwards and their values are per voxel."""
    torch = pytest.importorskip("torch")
    from napari_recon.physics import XRayTransform
    from napari_recon.reconstruction import FDK

    scan = open_scan(SHARED / "helsinki_fan" / "htc2022_ta_full.mat")
    theirs = scipy.io.loadmat(SHARED / "helsinki_fan" / "htc2022_ta_full_recon_fbp.mat")["reconFullFbp"]
    physics = XRayTransform.from_scan(scan, shape=(1, 512, 512), voxel_size=0.148322, device="cpu")
    with torch.no_grad():
        ours = FDK()(scan.measurements(), physics)[0, 0, 0].numpy() * 0.148322
    assert np.corrcoef(ours[::-1].ravel(), theirs.ravel())[0, 1] > 0.999
    assert np.abs(ours[::-1] - theirs).mean() < 0.01 * theirs.max()


def test_the_docs_name_every_field_of_the_sidecar():
    text = (ROOT / "docs" / "scan_formats.md").read_text()
    for field in Sidecar.model_fields:
        assert f"`{field}`" in text
