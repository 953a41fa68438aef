"""Measures of volumes: against scikit-image, against formulas, and on what is known."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter
from scipy.special import erf
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from napari_recon.jobs.volumes import Volume
from napari_recon.measures.comparison import (
    Region,
    box_region,
    compare_volumes,
    field_of_view,
    field_of_view_region,
    fit_scale,
    is_on_grid,
    label_regions,
    on_grid,
    value_range,
)
from napari_recon.measures.local import contrast_to_noise, cupping, histogram, line_profile, moments
from napari_recon.measures.resolution import (
    AGAINST_REFERENCE,
    fourier_shell_correlation,
    noise_power_spectrum,
    noise_summary,
)
from napari_recon.measures.table import table, write_csv, write_figure
from napari_recon.scans import Grid, ScanError

REAL = Path(__file__).parents[2] / "shared" / "data" / "helsinki_fan"


def pair(shape, seed=0):
    """A random volume in 1/mm and a noisy one."""
    rng = np.random.default_rng(seed)
    truth = gaussian_filter(rng.random(shape), 1).astype(np.float32) * 0.03
    return truth + rng.normal(0, 1e-3, shape).astype(np.float32), truth


# -- against a reference -------------------------------------------------------------------------------------------

SETTINGS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def agrees_with_skimage(volume, truth):
    reach = float(truth.max() - truth.min())
    both = ("2d", "3d") if min(truth.shape) >= 11 else ("2d",)
    found = compare_volumes(volume, truth, ssim=both)
    assert found["data_range"] == pytest.approx(reach)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, volume, data_range=reach), abs=1e-6)
    slices = [structural_similarity(t, v, data_range=reach, **SETTINGS) for t, v in zip(truth, volume, strict=True)]
    assert found["ssim"] == pytest.approx(np.mean(slices, dtype=np.float64), abs=1e-6)
    if "3d" in both:
        whole = structural_similarity(truth, volume, data_range=reach, **SETTINGS)
        assert found["ssim_3d"] == pytest.approx(float(whole), abs=1e-6)


@pytest.mark.parametrize("shape", [(13, 24, 20), (1, 24, 24), (24, 16, 18)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape, monkeypatch):
    monkeypatch.setattr("napari_recon.measures.comparison._SLAB", 5 * shape[1] * shape[2])  # slabs of five slices
    agrees_with_skimage(*pair(shape))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the measured data beside the project")
def test_they_are_of_a_measured_object_too():
    plane = loadmat(REAL / "htc2022_ta_full_recon_fbp.mat")["reconFullFbp"].astype(np.float32)
    truth = np.stack([np.roll(plane, k, axis=0)[::3, ::3] for k in range(12)])
    agrees_with_skimage(gaussian_filter(truth, 0.7), truth)


def test_only_the_region_counts_and_a_unit_is_no_quality():
    noisy, truth = pair((4, 32, 32))
    told = compare_volumes(noisy, truth)
    scaled = compare_volumes(1000 * noisy, 1000 * truth)
    for name in ("psnr", "ssim", "nrmse"):
        assert scaled[name] == pytest.approx(told[name], rel=1e-4)
    inside = field_of_view(Grid(truth.shape, 1.0))
    spoiled = np.where(inside, noisy, 7).astype(np.float32)
    for mask in (inside, inside[None], np.broadcast_to(inside, truth.shape)):
        assert compare_volumes(spoiled, truth, mask)["psnr"] == compare_volumes(noisy, truth, inside)["psnr"]
    same = compare_volumes(truth, truth)
    assert same["ssim"] == pytest.approx(1)
    assert same["psnr"] == math.inf
    assert compare_volumes(noisy, truth, data_range=1.0)["psnr"] > told["psnr"]


@pytest.mark.parametrize("slab", [3, 12, 40])
def test_ssim_in_a_region_is_the_mean_of_scikit_images_map(slab, monkeypatch):
    noisy, truth = pair((15, 20, 24))
    monkeypatch.setattr("napari_recon.measures.comparison._SLAB", slab * 20 * 24)
    some = np.random.default_rng(1).random(truth.shape) < 0.3
    reach = float(truth[some].max() - truth[some].min())
    found = compare_volumes(noisy, truth, some, ssim=("2d", "3d"))
    _, whole = structural_similarity(truth, noisy, data_range=reach, full=True, **SETTINGS)
    slices = [
        structural_similarity(t, v, data_range=reach, full=True, **SETTINGS)[1]
        for t, v in zip(truth, noisy, strict=True)
    ]
    assert found["ssim_3d"] == pytest.approx(whole[some].mean(dtype=np.float64), abs=1e-6)
    assert found["ssim"] == pytest.approx(np.stack(slices)[some].mean(dtype=np.float64), abs=1e-6)


def test_what_cannot_be_compared_is_said():
    noisy, truth = pair((4, 16, 16))
    with pytest.raises(ScanError, match="cannot be compared"):
        compare_volumes(noisy[:2], truth)
    with pytest.raises(ScanError, match="constant"):
        compare_volumes(noisy, np.ones_like(truth))
    with pytest.raises(ScanError, match="no voxel"):
        compare_volumes(noisy, truth, np.zeros(truth.shape, bool))
    with pytest.raises(ScanError, match="data range"):
        compare_volumes(noisy, truth, data_range=0)
    assert math.isnan(compare_volumes(noisy, truth, ssim=("3d",))["ssim_3d"])  # thinner than a window


def test_scale_and_offset_of_another_unit_are_found():
    _, truth = pair((5, 20, 20))
    inside = field_of_view(Grid(truth.shape, 1.0))
    hounsfield = np.where(inside, (truth - 0.02) / 0.02 * 1000, -3000).astype(np.float32)
    scale, offset = fit_scale(hounsfield, truth, inside)
    assert scale == pytest.approx(2e-5, rel=1e-4)
    assert offset == pytest.approx(0.02, rel=1e-4)
    with pytest.raises(ScanError, match="constant"):
        fit_scale(np.full_like(truth, 0.1), truth)


def test_volumes_are_brought_onto_one_grid():
    def ramp(grid):
        axes = (t + s * np.arange(n) for t, s, n in zip(grid.translate, grid.scale, grid.shape, strict=True))
        z, y, x = np.meshgrid(*axes, indexing="ij")
        return (z + 2 * y - 3 * x).astype(np.float32)

    fine, coarse = Grid((20, 20, 20), 0.5, (1, 0, 2)), Grid((6, 5, 4), 1.1, (1, 0, 2))
    volume = Volume(ramp(fine), fine.voxel_size, fine.center)
    assert not is_on_grid(volume, coarse)
    np.testing.assert_allclose(on_grid(volume, coarse), ramp(coarse), atol=1e-4)
    assert is_on_grid(volume, fine)
    assert on_grid(volume, fine) is volume.data
    with pytest.raises(ScanError, match="voxel size"):
        on_grid(Volume(ramp(fine)), coarse)
    labels = Volume(np.kron([[[1, 3]]], np.ones((4, 8, 4))).astype(np.float32), 1.0)
    assert set(np.unique(on_grid(labels, Grid((7, 15, 15), 0.5), order=0))) == {1, 3}  # no label between two


def test_a_region_is_a_box_in_the_world_or_a_label():
    grid = Grid((4, 6, 8), 0.5, (10, 0, -3))
    z, y, x = grid.translate
    box = box_region(grid, (z + 0.5, y, x + 1.0), (z + 1.0, y + 0.5, x + 1.0)).mask
    assert [int(n) for n in np.argwhere(box).min(axis=0)] == [1, 0, 2]
    assert [int(n) for n in np.argwhere(box).max(axis=0)] == [2, 1, 2]
    with pytest.raises(ScanError, match="in mm"):
        box_region(grid, (100, 0, 0), (101, 1, 1))
    labels = np.zeros(grid.shape, np.uint8)
    labels[1, 2], labels[3] = 5, 2
    assert [(r.name, int(r.mask.sum())) for r in label_regions(labels)] == [("label 2", 48), ("label 5", 8)]
    with pytest.raises(ScanError, match="whole numbers"):
        label_regions(np.full(grid.shape, 0.5))


# -- resolution ----------------------------------------------------------------------------------------------------

SHELLS, VOXEL = 40, 0.2


def halves(sigma=1.2, noise=0.2, seed=0, shape=(SHELLS,) * 3):
    """White noise, blurred with a Gaussian on the torus and seen twice with noise; and its expected correlation."""
    rng = np.random.default_rng(seed)
    frequencies = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij", sparse=True)
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * sum(f**2 for f in frequencies))
    signal = np.fft.ifftn(np.fft.fftn(rng.normal(size=shape)) * transfer).real

    def expected(frequency):  # in cycles a voxel; the signal's power over the sum of both
        power = np.exp(-4 * (np.pi * sigma * frequency) ** 2)
        return power / (power + noise**2)

    return *(np.float32(signal + rng.normal(0, noise, shape)) for _ in range(2)), expected


@pytest.mark.parametrize("sigma", [0.9, 1.6])
@pytest.mark.parametrize("masked", [False, True])
def test_the_shell_correlation_is_that_of_the_formula(sigma, masked):
    first, second, expected = halves(sigma)
    mask = field_of_view(Grid(first.shape, VOXEL)) if masked else None
    found = fourier_shell_correlation(first, second, VOXEL, mask)
    shell = 1 / (SHELLS * VOXEL)
    np.testing.assert_allclose(found.frequency, shell * np.arange(1, SHELLS // 2 + 1))
    curve = expected(found.frequency * VOXEL)
    np.testing.assert_allclose(found.correlation[4:], curve[4:], atol=0.12)
    # The crossing by the formula: 1/7 = s / (s + n) where s = n / 6.
    crossing = math.sqrt(math.log(6 / 0.2**2)) / (2 * math.pi * sigma) / VOXEL
    if crossing < found.frequency[-1]:
        assert 1 / found.resolution_one_seventh == pytest.approx(crossing, abs=shell)
    fine = np.linspace(found.frequency[0], found.frequency[-1], 2000)
    under = fine[expected(fine * VOXEL) < np.interp(fine, found.frequency, found.half_bit)]
    assert 1 / found.resolution_half_bit == pytest.approx(under[under > 4 * shell][0], abs=shell)


def test_a_volume_with_the_noise_of_both_halves_reaches_one_half_where_they_reach_one_seventh():
    rng = np.random.default_rng(3)
    truth = gaussian_filter(rng.normal(size=(40,) * 3), 1.2, mode="wrap")
    noise = [rng.normal(0, 0.05, truth.shape) for _ in range(2)]
    halves = [(truth + one).astype(np.float32) for one in noise]
    both = fourier_shell_correlation(*halves, VOXEL)
    mean = fourier_shell_correlation((halves[0] + halves[1]) / 2, truth.astype(np.float32), VOXEL)
    shell = both.frequency[1] - both.frequency[0]
    assert 1 / mean.resolution(AGAINST_REFERENCE) == pytest.approx(1 / both.resolution_one_seventh, abs=shell)
    assert both.resolution(1 / 7) == both.resolution_one_seventh
    assert math.isnan(both.resolution(-1.0))


def test_a_resolution_that_is_not_there_is_said():
    rng = np.random.default_rng(1)
    shape = (1, 48, 48)  # of a slice it is a ring
    one, other = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    same = fourier_shell_correlation(one, one, 0.5)
    assert math.isnan(same.resolution_half_bit)
    assert "better than 1 mm" in same.sentence
    assert np.allclose(same.correlation, 1, atol=1e-5)
    none = fourier_shell_correlation(one, -one, 0.5)
    assert math.isnan(none.resolution_one_seventh)
    assert "no frequency" in none.sentence
    unrelated = fourier_shell_correlation(one, other, 0.5)
    assert np.abs(unrelated.correlation[6:]).mean() < 0.15
    with pytest.raises(ScanError, match="one grid"):
        fourier_shell_correlation(one, other[:, 1:], 0.5)
    with pytest.raises(ScanError, match="one value"):
        fourier_shell_correlation(np.ones(shape, np.float32), other, 0.5)
    with pytest.raises(ScanError, match="NaN"):
        fourier_shell_correlation(np.full(shape, np.nan, np.float32), other, 0.5)


def test_shells_are_of_the_world_where_voxels_are_boxes():
    first, second, _ = halves(shape=(20, 40, 40))
    cubes = fourier_shell_correlation(first, second, 0.2)
    boxes = fourier_shell_correlation(first, second, (0.4, 0.2, 0.2))
    assert cubes.frequency[-1] == pytest.approx(2.5)
    assert boxes.frequency[-1] == pytest.approx(1.25)  # what the longest edge can hold


def test_the_noise_power_spectrum_integrates_to_the_variance():
    rng = np.random.default_rng(2)
    sigma, voxel = 0.02, 0.25
    shading = np.linspace(0, 1, 64)[:, None] ** 2
    white = (rng.normal(0, sigma, (12, 64, 64)) + shading).astype(np.float32)
    frequency, power = noise_power_spectrum(white, voxel)
    assert frequency[-1] == pytest.approx(2)
    np.testing.assert_allclose(power[3:], sigma**2 * voxel**2, rtol=0.25)
    level, middle = noise_summary(white, voxel)
    assert level == pytest.approx(sigma, rel=0.03)
    blurred = gaussian_filter(white, (0, 1.5, 1.5))
    assert noise_summary(blurred, voxel)[1] < 0.6 * middle  # coarser noise
    with pytest.raises(ScanError, match="fits"):
        noise_power_spectrum(white, voxel, field_of_view(Grid(white.shape, voxel), 0.5))


# -- at a place ----------------------------------------------------------------------------------------------------


def ball(sigma_mm, noise=0.0, grid=None):
    """A half space in x of 0.03, its edge an error function at x = 1 mm."""
    grid = grid or Grid((3, 8, 60), 0.2)
    x = grid.translate[2] + grid.scale[2] * np.arange(grid.shape[2])
    values = 0.015 * (1 + erf((x - 1.0) / (math.sqrt(2) * sigma_mm)))
    volume = np.broadcast_to(values, grid.shape) + np.random.default_rng(0).normal(0, noise, grid.shape)
    return volume.astype(np.float32), grid


@pytest.mark.parametrize(("sigma", "noise", "within"), [(0.4, 0, 0.05), (0.8, 0, 0.05), (0.6, 1e-3, 0.2)])
@pytest.mark.parametrize("back", [False, True])
def test_an_edge_has_the_width_of_its_error_function(sigma, noise, within, back):
    volume, grid = ball(sigma, noise)
    ends = [(0, 0, -5.5), (0, 0, 5.5)]
    profile = line_profile(volume, grid, *(ends[::-1] if back else ends))
    assert profile.position[-1] == pytest.approx(11)
    assert profile.edge_width == pytest.approx(2.5631 * sigma, rel=within)  # 10 to 90 % of a normal distribution
    assert profile.edge_position == pytest.approx(4.5 if back else 6.5, abs=0.1)


def test_where_there_is_no_edge_it_has_no_width():
    flat = np.full((3, 8, 60), 0.03, np.float32)
    grid = Grid(flat.shape, 0.2)
    assert math.isnan(line_profile(flat, grid, (0, 0, -5), (0, 0, 5)).edge_width)
    noise = np.random.default_rng(3).normal(0, 1, flat.shape).astype(np.float32)
    for y in (-0.7, -0.2, 0, 0.45):
        assert math.isnan(line_profile(noise, grid, (0, y, -5), (0, y, 5)).edge_width)
    with pytest.raises(ScanError, match="two different ends"):
        line_profile(flat, grid, (0, 0, 0), (0, 0, 0))


def test_a_profile_lies_where_the_line_does():
    grid = Grid((5, 6, 7), 0.5, (1.0, 2.0, 3.0))
    z, y, x = np.meshgrid(
        *(t + s * np.arange(n) for t, s, n in zip(grid.translate, grid.scale, grid.shape, strict=True)), indexing="ij"
    )
    start, end = (2.5, 1.5, 0.5), (3.4, 2.7, 1.9)
    profile = line_profile((z + 10 * y - 3 * x).astype(np.float32), grid, start, end)
    share = profile.position / profile.position[-1]
    a, b, c = (s + share * (e - s) for s, e in zip(start, end, strict=True))
    np.testing.assert_allclose(profile.value, a + 10 * b - 3 * c, atol=1e-4)


def test_contrast_is_told_in_noise_and_cupping_in_parts():
    rng = np.random.default_rng(4)
    volume = rng.normal(0, 2, (6, 40, 40)).astype(np.float32)
    left = np.zeros((1, 40, 40), bool)
    left[..., :20] = True
    volume[..., :20] += 10
    assert contrast_to_noise(volume, left, ~left) == pytest.approx(5, rel=0.05)
    grid = Grid((3, 41, 41), 0.5)
    object_mask = field_of_view(grid)
    y, x = np.mgrid[-20:21, -20:21] / 20.5
    cupped = np.where(object_mask, 0.8 + 0.2 * (x**2 + y**2), 0).astype(np.float32)[None].repeat(3, 0)
    assert cupping(cupped, object_mask) == pytest.approx(0.15, abs=0.04)
    assert cupping(object_mask[None].astype(np.float32), object_mask) == pytest.approx(0)
    assert math.isnan(cupping(cupped, field_of_view(grid, 1.0)))  # of a needle it is not told


def test_histograms_share_their_bins():
    noisy, truth = pair((4, 16, 16))
    edges, counts = histogram([noisy, truth], bins=32)
    assert edges[[0, -1]] == pytest.approx([min(noisy.min(), truth.min()), max(noisy.max(), truth.max())])
    assert counts.sum(axis=1).tolist() == [noisy.size] * 2
    inside = field_of_view(Grid(noisy.shape, 1.0))
    assert histogram([noisy], inside)[1].sum() == 4 * inside.sum()


def test_measuring_costs_neither_torch_nor_qt():
    code = (
        "import sys, numpy as np\n"
        "from napari_recon import compare_volumes\n"
        "from napari_recon.measures import comparison, local, resolution, table\n"
        "v = np.arange(12**3, dtype=np.float32).reshape(12, 12, 12)\n"
        "compare_volumes(v, v, ssim=('2d', '3d'))\n"
        "print([m for m in ('torch', 'qtpy', 'napari', 'matplotlib.pyplot') if m in sys.modules])\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_a_volume_and_region(tmp_path):
    noisy, truth = pair((12, 32, 32))
    grid = Grid(truth.shape, 0.5)
    labels = np.zeros(truth.shape, np.uint8)
    labels[:, 4:14, 4:14], labels[:, 16:28, 16:28] = 1, 2
    truth[labels == 2] += 0.05
    noisy[labels == 2] += 0.05
    regions = [field_of_view_region(grid), *label_regions(labels)]
    volumes = {"truth": truth, "fdk": noisy, "tv": (noisy + truth) / 2}
    rows = table(volumes, "truth", regions, ssim=("2d", "3d"), voxel_size=0.5, background="label 1")
    assert [(row["volume"], row["region"]) for row in rows] == [
        (name, region.name) for name in volumes for region in regions
    ]
    by = {(row["volume"], row["region"]): row for row in rows}
    fdk, tv = by["fdk", "field of view"], by["tv", "field of view"]
    assert fdk == {**fdk, **compare_volumes(noisy, truth, regions[0].mask, ssim=("2d", "3d"))}
    assert tv["psnr"] > fdk["psnr"]
    assert "psnr" not in by["truth", "field of view"]
    assert len({row["data_range"] for row in rows if "data_range" in row}) == 1
    low, high = value_range(truth, regions[0].mask)
    assert fdk["data_range"] == pytest.approx(high - low)
    # Noise is told where values are meant to be one.
    assert "noise" not in fdk
    assert by["tv", "label 1"]["noise"] < by["fdk", "label 1"]["noise"]
    assert by["fdk", "label 2"]["contrast_to_noise"] > 3
    assert "contrast_to_noise" not in by["fdk", "label 1"]
    mean, variance = moments(noisy, labels == 2)
    assert by["fdk", "label 2"]["mean"] == pytest.approx(noisy[labels == 2].mean(), rel=1e-5)
    assert (mean, math.sqrt(variance)) == (by["fdk", "label 2"]["mean"], by["fdk", "label 2"]["std"])

    read = list(csv.DictReader(write_csv(tmp_path / "t.csv", rows).open()))
    assert float(read[3]["psnr"]) == fdk["psnr"]
    assert read[0]["psnr"] == ""
    with Image.open(write_figure(tmp_path / "t.png", rows[::3], "Three volumes")) as image:
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.png"]


def test_a_table_without_a_reference_tells_what_needs_none(tmp_path):
    noisy, truth = pair((3, 24, 24))
    rows = table({"a": noisy, "b": truth}, None)
    assert [sorted(row) for row in rows] == [["mean", "region", "std", "volume"]] * 2
    write_figure(tmp_path / "t.png", rows)


def test_a_table_says_what_is_wrong(tmp_path):
    noisy, truth = pair((3, 24, 24))
    with pytest.raises(ScanError, match="no volume 'c'"):
        table({"a": noisy}, "c")
    with pytest.raises(ScanError, match="one grid"):
        table({"a": noisy, "b": truth[:2]}, None)
    with pytest.raises(ScanError, match="no region"):
        table({"a": noisy}, None, [Region("r", np.ones((1, 24, 24), bool))], background="s")
    rows = table({"a": noisy, "b": truth}, "b")
    with pytest.raises(ScanError, match=r"\.csv"):
        write_csv(tmp_path / "t.txt", rows)
    with pytest.raises(ScanError, match="folder"):
        write_figure(tmp_path / "no" / "t.png", rows)
    assert not list(tmp_path.iterdir())
