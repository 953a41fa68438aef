"""Jobs of k-space: the same runs, of complex volumes that are shown by magnitude and phase."""

import json

import numpy as np
import pytest
import tifffile
import torch

from napari_recon.jobs import Control, ReconstructionJob, run_job
from napari_recon.jobs.job import DataConsistencyJob, OperatorJob, PatchJob, RegularizationJob
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Failed, Finished, Notice, Progress, VolumeReady
from napari_recon.jobs.stages import Prepared
from napari_recon.learning.networks import make_network, save_weights
from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.reconstruction.unrolled import UnrolledPGD
from napari_recon.scans import ScanOptions, open_scan

SIZE = 24


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A synthetic head with 6 coils, a third of the samples, and voxels that are no cubes."""
    folder = tmp_path_factory.mktemp("kspace")
    made = simulate_mri("head", seed=3, size=SIZE, acceleration=3, coils=6, calibration=8)
    np.save(folder / "head.npy", made.scan.kspace)
    np.save(folder / "maps.npy", made.scan.coil_maps)
    tifffile.imwrite(folder / "truth.tif", np.abs(made.truth).astype(np.float32))
    (folder / "head.toml").write_text(
        'axes = ["coil", "z", "y", "x"]\nvoxel_size = [2.0, 1.0, 1.5]\ncoil_maps = "maps.npy"\ntruth = "truth.tif"\n'
    )
    return folder / "head.npy"


def run(job, control=None, prepared=None):
    control = control or Control()
    messages = list(run_job(job, control, prepared))
    return messages, control.volumes


def job(scan, method="sense", **more):
    options = {"options": more.pop("options")} if "options" in more else {}
    output = {"output": more.pop("output")} if "output" in more else {}
    return ReconstructionJob(scan=scan, parameters={"method": method, **more}, device="cpu", **options, **output)


def finished(messages):
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages[-1]


def test_volumes_are_magnitudes_and_phases_in_mm(scan):
    messages, volumes = run(job(scan))
    ready = {m.name: m for m in messages if isinstance(m, VolumeReady)}
    assert list(ready) == ["zero-filled", "zero-filled phase", "result", "result phase"]
    assert ready["result"].scale == (2.0, 1.0, 1.5)
    physics = MultiCoilMRI.from_scan(open_scan(scan), "cpu")
    x = physics.A_adjoint(open_scan(scan).measurements())[0]
    back = volumes["zero-filled"] * np.exp(1j * volumes["zero-filled phase"])
    assert np.allclose(back, torch.complex(x[0], x[1]).numpy(), atol=1e-5 * np.abs(back).max())


@pytest.mark.parametrize("method", ["sense", "padmm"])
def test_methods_beat_zero_filling(scan, method):
    zero_filled = finished(run(job(scan, "zero-filled"))[0]).figures
    end = finished(run(job(scan, method))[0])
    assert end.figures["psnr"] > zero_filled["psnr"] + 1
    assert end.figures["residual"] < zero_filled["residual"]
    assert end.provenance["job"]["parameters"]["method"] == method


def test_a_network_of_complex_volumes_is_applied_by_patches(scan, tmp_path):
    torch.manual_seed(0)
    network = make_network("light", channels=2, width=4, scales=2)
    file = tmp_path / "mri.safetensors"
    save_weights(UnrolledPGD(network, 2, step="gradient", init="zero-filled"), file)
    messages, whole = run(job(scan, "unrolled", weights=str(file), patch=None))
    finished(messages)
    messages, parts = run(job(scan, "unrolled", weights=str(file), patch=16, passes=2, operator="exact"))
    boxes = [m.box for m in messages if isinstance(m, Progress) and m.name == "result"]
    assert any(s.stop - s.start < SIZE for box in boxes for s in box)
    assert np.isfinite(parts["result"]).all()
    assert whole["result"].shape == (SIZE,) * 3


def test_weights_of_the_other_kind_are_refused_in_a_sentence(scan):
    messages, _ = run(job(scan, "unrolled"))
    assert isinstance(messages[-1], Failed)
    assert messages[-1].kind == "input"
    assert "are for X-ray projections" in messages[-1].text


@pytest.mark.parametrize("method", ["fdk", "sirt", "tv"])
def test_methods_of_x_rays_are_refused_in_a_sentence(scan, method):
    messages, _ = run(job(scan, method))
    assert messages[-1].kind == "input"
    assert "use zero-filled, sense, padmm, unrolled" in messages[-1].text


def test_what_needs_projections_is_refused_in_a_sentence(scan):
    for other in (DataConsistencyJob(scan=scan), RegularizationJob(scan=scan)):
        messages, _ = run(other)
        assert messages[-1].kind == "input", messages[-1]
        assert "k-space" in messages[-1].text


def test_options_of_the_other_kind_are_refused_in_a_sentence(scan):
    messages, _ = run(job(scan, options=ScanOptions(views=3)))
    assert messages[-1].kind == "input"
    assert "k-space" in messages[-1].text


def test_undersampling_and_coils_are_options_that_come_back_from_json(scan):
    first = job(scan, options={"acceleration": 6.0, "coils": 4})
    again = ReconstructionJob.model_validate_json(first.model_dump_json())
    assert again == first
    assert again.open_scan().shape[0] == 4
    sparse = finished(run(again)[0]).figures["psnr"]
    assert sparse < finished(run(job(scan))[0]).figures["psnr"]


def test_padmm_goes_on_from_the_last_result(scan):
    prepared = Prepared()
    run(job(scan, "padmm", iterations=20), prepared=prepared)
    _, on = run(job(scan, "padmm", iterations=1, start="last"), prepared=prepared)
    _, anew = run(job(scan, "padmm", iterations=1, start="zeros"))
    _, longer = run(job(scan, "padmm", iterations=40))
    assert np.linalg.norm(on["result"] - longer["result"]) < 0.2 * np.linalg.norm(anew["result"] - longer["result"])


def test_what_only_x_rays_have_is_refused_in_a_sentence(scan):
    for parameters in ({"weighted": True}, {"start": "tv"}):
        messages, _ = run(job(scan, "padmm", **parameters))
        assert messages[-1].kind == "input", messages[-1]


def test_finish_before_the_method_keeps_the_zero_filled_image(scan):
    control = Control()
    messages = run_job(job(scan, "sense"), control)
    for message in messages:
        if isinstance(message, VolumeReady) and message.name == "zero-filled phase":
            control.finish()
        last = message
    assert isinstance(last, Finished)
    assert not last.complete
    assert np.array_equal(control.volumes["result"], control.volumes["zero-filled"])


def test_files_keep_voxels_that_are_no_cubes(scan, tmp_path):
    import zarr

    run(job(scan, output=tmp_path / "x.tif"))
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        told = file.imagej_metadata
        resolution = [file.pages[0].tags[name].value for name in ("YResolution", "XResolution")]
    assert told["spacing"] == 2.0
    assert [n / d for n, d in resolution] == pytest.approx([1.0, 1 / 1.5], rel=1e-4)
    assert json.loads(told["Info"])["job"]["parameters"]["method"] == "sense"
    run(job(scan, output=tmp_path / "x.ome.zarr"))
    scales = zarr.open_group(str(tmp_path / "x.ome.zarr")).attrs["ome"]["multiscales"][0]["datasets"][0]
    assert scales["coordinateTransformations"][0]["scale"] == [2.0, 1.0, 1.5]


def test_memory_is_planned(scan):
    plan = plan_memory(job(scan))
    assert plan.fits
    assert plan.items["samples"] >= 6 * 2 * 4 * SIZE**3


def test_no_notice_is_given_where_all_is_well(scan):
    assert not [m for m in run(job(scan))[0] if isinstance(m, Notice)]


def test_the_normal_operator_is_fitted_and_shown(scan, tmp_path):
    file = tmp_path / "h.safetensors"
    parameters = {"probes": 4, "iterations": 1, "positions": 3}
    messages, volumes = run(OperatorJob(scan=scan, parameters=parameters, output=file, device="cpu"))
    end = finished(messages)
    assert {"x", "mask", "mask phase", "filter", "exact", "approximate", "error", "regions"} <= set(volumes)
    assert 0 < end.figures["relative_error"] < 0.5
    ready = {m.name: m for m in messages if isinstance(m, VolumeReady)}
    assert ready["filter"].scale == pytest.approx([1 / (SIZE * edge) for edge in (2.0, 1.0, 1.5)])
    messages, volumes = run(PatchJob(scan=scan, operator=str(file), center=(12, 12, 12), patch=12, steps=2))
    assert finished(messages).figures["difference"] < 0.5
    assert volumes["patch exact"].shape == (3, 12, 12, 12)


def test_a_start_that_is_not_there_for_k_space_is_told(scan):
    messages, begun = run(job(scan, "padmm", iterations=2))  # "network", by default
    assert any("zero-filled" in m.text for m in messages if isinstance(m, Notice))
    messages, asked = run(job(scan, "padmm", iterations=2, start="fdk"))
    assert not [m for m in messages if isinstance(m, Notice)]
    assert np.array_equal(begun["result"], asked["result"])
