"""The command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
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
    for command in ("demo", "info", "reconstruct", "fit-operator", "simulate", "compare", "bench"):
        assert command in help_text
        assert "--json" in call(command, "--help")
    code = (
        "import sys, napari_recon.cli; print([m for m in ('numpy', 'torch', 'pydantic', 'napari') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_it_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "napari_recon.cli", "--help"], capture_output=True, text=True)
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
    for method in ("fdk", "sirt"):
        reconstruct(folder, tmp_path / f"{method}.tif", "--method", method)
    volumes = [tmp_path / "fdk.tif", tmp_path / "sirt.tif"]
    told = call("compare", *volumes, "--reference", folder / "truth.tif", "--json")
    fdk, sirt = told["volumes"]
    assert sirt["psnr"] > fdk["psnr"]
    assert fdk["data_range"] == sirt["data_range"] > 0
    assert told["field_of_view_radius_mm"] > 0
    assert "PSNR" in call("compare", *volumes, "--reference", folder / "truth.tif")


def test_json_has_no_nan(tmp_path):
    volume = np.random.default_rng(0).random((2, 16, 16), dtype=np.float32)
    write_volume(tmp_path / "v.tif", volume, Grid(volume.shape, 1.0))
    told = call("compare", tmp_path / "v.tif", "--reference", tmp_path / "v.tif", "--json")
    assert told["volumes"][0]["psnr"] is None  # infinite


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
