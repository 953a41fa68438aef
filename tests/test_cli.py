"""The command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.jobs import ReconstructionJob
from napari_recon.jobs.volumes import read_volume, write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.scans import Grid


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=24, views=30)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    import platformdirs

    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder)


def call(*arguments, status=0):
    """Run a command in this process; its output, which with --json must be one object."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def reconstruct(scan, output, *more, **kwargs):
    return call("reconstruct", scan, "-o", output, "--device", "cpu", "--json", *more, **kwargs)


def test_help_names_every_command_and_stays_light():
    help_text = call("--help")
    for command in ("demo", "info", "reconstruct", "sweep", "fit-operator", "simulate", "compare", "bench"):
        assert command in help_text
        assert "--json" in call(command, "--help")
    code = (
        "import sys, napari_recon.cli; print([m for m in ('numpy', 'torch', 'pydantic', 'napari') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_it_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "napari_recon", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert "reconstruct" in ran.stdout


def test_info_tells_the_geometry(scan):
    told = call("info", scan, "--views", 15, "--json")
    assert told["summary"]["Views"].startswith("15")
    assert isinstance(told["warnings"], list)
    assert "15" in call("info", scan, "--views", 15)


@pytest.mark.parametrize("name", ["v.tif", "v.ome.zarr"])
@pytest.mark.parametrize(
    "more",
    [
        ("--method", "fdk", "--window", "hann"),
        ("--method", "sirt", "--iterations", 2),
        ("--method", "tv", "--patch", 0, "--iterations", 2),
        ("--method", "tv", "--patch", 16, "--iterations", 2, "--regularization", 1e-3, "--passes", 2),
        ("--patch", 16, "--iterations", 2, "--exact"),
    ],
    ids=["fdk", "sirt", "tv", "patches", "exact"],
)
def test_reconstruct_writes_a_volume_that_tells_how_it_was_made(scan, tmp_path, name, more):
    if name.endswith("zarr") and more[1] != "fdk":
        pytest.skip("writing is the same for all")
    told = reconstruct(scan, tmp_path / name, "--views", 15, "--shape", 20, 22, 24, *more)
    assert told["output"] == str(tmp_path / name)
    assert told["seconds"] > 0
    assert told["peak_memory"] > 2**20
    assert {"residual", "psnr", "ssim", "data_range"} <= told["figures"].keys()
    volume = read_volume(tmp_path / name)
    assert volume.data.shape == (20, 22, 24)
    assert volume.provenance["job"] == told["job"]
    assert ReconstructionJob.model_validate(told["job"]).options.views == 15
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("depth", [1, 2])
def test_thin_volumes_are_reconstructed_patch_by_patch_too(scan, tmp_path, depth):
    told = reconstruct(scan, tmp_path / "v.tif", "--shape", depth, 24, 24, "--voxel-size", 1.4, "--iterations", 2)
    assert told["figures"]["residual"] > 0
    assert read_volume(tmp_path / "v.tif").data.shape == (depth, 24, 24)


def test_a_fitted_operator_is_used_and_refused_for_another_scan(scan, tmp_path):
    file = tmp_path / "h.safetensors"
    told = call("fit-operator", scan, "-o", file, "--device", "cpu", "--json")
    assert file.exists()
    assert 0 < told["figures"]["image"] < 0.5
    with_file = reconstruct(scan, tmp_path / "v.tif", "--iterations", 2, "--patch", 16, "--operator", file)
    assert with_file["figures"]["residual"] < 0.5
    other = reconstruct(scan, tmp_path / "w.tif", "--views", 10, "--operator", file, status=2)
    assert "another scan" in other["error"]
    assert not (tmp_path / "w.tif").exists()


def test_sweep_tells_a_row_a_value(scan, tmp_path):
    asked = ("sweep", scan, "--parameter", "iterations", "--values", "1,4", "--method", "sirt", "--device", "cpu")
    told = call(*asked, "--csv", tmp_path / "rows.csv", "--json")
    assert [row["value"] for row in told["rows"]] == [1, 4]
    assert told["rows"][0]["residual"] > told["rows"][1]["residual"]
    assert told["best"] == max(told["rows"], key=lambda row: row["psnr"])["value"]
    assert told["job"]["binning"] == 2
    assert (tmp_path / "rows.csv").read_text().splitlines()[1].startswith("iterations 1,")
    table = call(*asked, "--slices", 8, 12)
    assert "Residual" in table
    assert "best" in table
    for wrong, said in (("1,a", "no numbers"), ("1,1.5", "1.5 is no iterations"), ("1", "at least 2")):
        refused = call("sweep", scan, "--parameter", "iterations", "--values", wrong, "--json", status=2)
        assert said in refused["error"]


def test_k_space_is_simulated_and_reconstructed(tmp_path):
    folder, out = tmp_path / "head", tmp_path / "head.tif"
    made = call("simulate", "mri-head", "-o", folder, "--size", 16, "--coils", 4, "--acceleration", 2, "--json")
    told = call("info", made["output"], "--json")
    assert (told["kind"], told["coils"]) == ("mri", 4)
    found = call("reconstruct", made["output"], "-o", out, "--method", "sense", "--coils", 3, "--json")
    assert found["job"]["options"]["coils"] == 3
    assert found["figures"]["psnr"] > 10
    assert out.exists()
    operator, quick = tmp_path / "h.safetensors", ("--probes", 2, "--iterations", 0, "--positions", 1)
    fitted = call("fit-operator", made["output"], "-o", operator, *quick, "--figure", tmp_path / "h.png", "--json")
    assert 0 < fitted["figures"]["relative_error"] < 1
    assert (tmp_path / "h.png").exists()


def test_simulate_then_compare(tmp_path):
    folder = tmp_path / "nut"
    assert call("simulate", "walnut", "-o", folder, "--size", 16, "--views", 8, "--photons", 0, "--json")["seconds"] > 0
    own = [
        reconstruct(folder, tmp_path / f"{method}.tif", "--method", method)["figures"]["residual"]
        for method in ("fdk", "sirt")
    ]
    volumes = [tmp_path / "fdk.tif", tmp_path / "sirt.tif"]
    told = call("compare", *volumes, folder / "truth.tif", "--scan", folder, "--json")
    *residuals, of_truth = [row["residual"] for row in told["volumes"]]
    assert residuals == pytest.approx(own, rel=1e-4)
    assert of_truth < residuals[0]
    told = call("compare", *volumes, "--reference", folder / "truth.tif", "--json")
    fdk, sirt = told["volumes"]
    assert sirt["psnr"] > fdk["psnr"]
    assert fdk["data_range"] == sirt["data_range"] > 0
    assert told["field_of_view_radius_mm"] > 0
    assert "PSNR" in call("compare", *volumes, "--reference", folder / "truth.tif")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A cylinder of 0.02 in a field of 0, with noise of two strengths, and its labels."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-15.5:16.5, -15.5:16.5]
    inside = np.broadcast_to(y**2 + x**2 < 11**2, (12, 32, 32))
    truth = np.where(inside, 0.02, 0).astype(np.float32)
    grid = Grid(truth.shape, 0.5)
    write_volume(folder / "truth.tif", truth, grid)
    for name, noise in (("rough", 2e-3), ("fine", 5e-4)):
        made_by = {"figures": {"residual": 0.125}} if name == "fine" else {}
        values = truth + rng.normal(0, noise, truth.shape).astype(np.float32)
        write_volume(folder / f"{name}.tif", values.astype(np.float32), grid, made_by)
    write_volume(folder / "labels.tif", np.where(inside, 1, 2).astype(np.float32), grid)
    return folder


def test_compare_tells_regions_and_writes_table_and_picture(judged, tmp_path):
    volumes = [judged / "rough.tif", judged / "fine.tif"]
    more = ("--labels", judged / "labels.tif", "--box", -1, -3, -3, 1, 3, 3, "--ssim-3d")
    files = ("--csv", tmp_path / "t.csv", "--figure", tmp_path / "t.png")
    told = call("compare", *volumes, "--reference", judged / "truth.tif", *more, *files, "--json")
    by = {(row["volume"], row["region"]): row for row in told["volumes"]}
    assert {region for _, region in by} == {"field of view", "box", "label 1", "label 2"}
    rough, fine = (by[str(path), "field of view"] for path in volumes)
    assert fine["psnr"] > rough["psnr"]
    assert fine["ssim_3d"] > rough["ssim_3d"]
    assert fine["residual"] == 0.125
    assert "residual" not in rough
    assert rough["data_range"] == pytest.approx(0.02)
    assert told["background"] == "box"
    assert by[str(volumes[0]), "label 2"]["contrast_to_noise"] == pytest.approx(10, rel=0.1)
    assert by[str(volumes[0]), "label 1"]["noise"] == pytest.approx(2e-3, rel=0.1)
    assert abs(by[str(volumes[1]), "label 1"]["cupping"]) < 0.02
    assert (told["resampled"], told["notes"]) == (False, [])
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 1 + len(by)
    assert lines[0].startswith("volume,region,psnr,ssim,ssim_3d,nrmse")
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_compare_without_a_reference_tells_what_needs_none(judged):
    told = call("compare", judged / "rough.tif", "--labels", judged / "labels.tif", "--json")
    assert told["reference"] is None
    assert [row["region"] for row in told["volumes"]] == ["field of view", "label 1", "label 2"]
    assert not any("psnr" in row for row in told["volumes"])
    assert told["volumes"][1]["noise_frequency"] > 0
    assert "Noise" in call("compare", judged / "rough.tif", "--labels", judged / "labels.tif")


def test_compare_brings_volumes_onto_one_grid_and_into_one_unit(judged, tmp_path):
    truth = read_volume(judged / "truth.tif")
    coarse = truth.data.reshape(6, 2, 16, 2, 16, 2).mean(axis=(1, 3, 5))
    write_volume(tmp_path / "coarse.tif", 50_000 * coarse - 1000, Grid(coarse.shape, 1.0))
    reference = ("--reference", judged / "truth.tif")
    told = call("compare", tmp_path / "coarse.tif", *reference, "--fit-scale", "--json")
    row = told["volumes"][0]
    assert row["resampled"]
    assert told["resampled"]
    assert ["resampled" in told["notes"][0], "unit" in told["notes"][1]] == [True, True]
    assert row["scale"] == pytest.approx(1 / 50_000, rel=0.2)
    assert row["psnr"] > call("compare", tmp_path / "coarse.tif", *reference, "--json")["volumes"][0]["psnr"] + 20


def test_compare_tells_the_resolution_that_two_halves_agree_to(tmp_path):
    rng = np.random.default_rng(0)
    common = gaussian_filter(rng.normal(size=(12, 32, 32)), 1.5)
    halves = (tmp_path / "even.tif", tmp_path / "odd.tif")
    for path in halves:
        values = common + rng.normal(0, 0.05, common.shape)
        write_volume(path, values.astype(np.float32), Grid(common.shape, 0.5))
    told = call("compare", "--halves", *halves, "--figure", tmp_path / "fsc.png", "--json")
    found = told["resolution"]
    assert len(found["correlation"]) == len(found["half_bit"]) == len(found["frequency_per_mm"]) == 16
    assert found["half_bit_mm"] > found["one_seventh_mm"] > 1
    assert (tmp_path / "fsc.png").stat().st_size > 1000
    assert "1/7" in call("compare", "--halves", *halves)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "nothing to compare"),
        (("rough.tif", "--fit-scale"), "--reference"),
        (("rough.tif", "--box", 90, 90, 90, 91, 91, 91), "No voxel lies in the box"),
        (("rough.tif", "--csv", "t.txt"), "must end in .csv"),
        (("rough.tif", "--labels", "rough.tif"), "no whole numbers"),
        (("--halves", "rough.tif", "fine.tif", "--csv", "t.csv"), "at least one volume"),
    ],
)
def test_what_cannot_be_compared_is_said(judged, monkeypatch, arguments, sentence):
    monkeypatch.chdir(judged)
    before = sorted(judged.iterdir())
    assert sentence in call("compare", *arguments, "--json", status=2)["error"]
    assert sorted(judged.iterdir()) == before


def test_halves_of_the_views_are_reconstructed_apart(scan, tmp_path):
    views = []
    for half in ("even", "odd"):
        told = reconstruct(scan, tmp_path / f"{half}.tif", "--method", "fdk", "--views", 29, "--half", half)
        assert told["job"]["options"]["half"] == half
        views.append(ReconstructionJob.model_validate(told["job"]).open_scan().view_indices.tolist())
    assert sorted(views[0] + views[1]) == [k * 30 // 29 for k in range(29)]
    assert [len(half) for half in views] == [15, 14]
    told = call("compare", "--halves", tmp_path / "even.tif", tmp_path / "odd.tif", "--json")
    assert told["resolution"]["one_seventh_mm"] is None or told["resolution"]["one_seventh_mm"] > 0


def test_json_has_no_nan(tmp_path):
    volume = np.random.default_rng(0).random((2, 16, 16), dtype=np.float32)
    write_volume(tmp_path / "v.tif", volume, Grid(volume.shape, 1.0))
    told = call("compare", tmp_path / "v.tif", "--reference", tmp_path / "v.tif", "--json")
    assert told["volumes"][0]["psnr"] is None  # infinite
    np.save(tmp_path / "v.npy", volume)
    assert "no voxel size" in call("compare", tmp_path / "v.npy", "--json")["notes"][0]


def test_an_interrupted_job_leaves_nothing(scan, tmp_path, monkeypatch):
    from napari_recon.reconstruction import SIRT

    def stream(self, *args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(SIRT, "stream", stream)
    told = reconstruct(scan, tmp_path / "v.tif", "--method", "sirt", status=130)
    assert "nothing was written" in told["error"]
    assert not list(tmp_path.iterdir())


def test_a_job_that_fails_is_told_apart_from_bad_input(scan, tmp_path, monkeypatch):
    from napari_recon.reconstruction import SIRT

    monkeypatch.setattr(SIRT, "stream", lambda *a, **k: 1 / 0)
    assert "report" in reconstruct(scan, tmp_path / "v.tif", "--method", "sirt", status=1)["error"]


def test_bench_of_an_unknown_name_lists_the_known():
    assert "error" in call("bench", "nonsense", "--json", status=2)


def test_the_bar_appears_only_in_a_terminal(capsys):
    from napari_recon.cli import _bar

    with _bar() as bar:
        bar("stage", "", None)
        bar(None, "", 0.5)
    assert capsys.readouterr().err == ""
