"""Jobs of k-space: the same runs, of complex volumes that are shown by magnitude and phase."""

import json

import numpy as np
import pytest
import tifffile
import torch

from napari_recon.jobs import Control, ReconstructionJob, run_job
from napari_recon.jobs.job import CoilMapsJob, DataConsistencyJob, OperatorJob, PatchJob, RegularizationJob
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Failed, Finished, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.quality import kspace_noise
from napari_recon.jobs.regularization import held_out_sites
from napari_recon.jobs.stages import Prepared
from napari_recon.learning.networks import make_network, save_weights
from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.reconstruction.unrolled import UnrolledPGD
from napari_recon.scans import ScanOptions, open_scan
from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import decades

SIZE = 24


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A synthetic head with 6 coils, a third of the samples, and voxels that are no cubes."""
    folder = tmp_path_factory.mktemp("kspace")
    made = simulate_mri("head", seed=3, size=SIZE, acceleration=3, coils=6, calibration=8)
    np.save(folder / "head.npy", made.scan.kspace)
    np.save(folder / "maps.npy", made.scan.coil_maps)
    np.save(folder / "complex.npy", made.truth)
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
    messages, _ = run(job(scan, "padmm", weighted=True))
    assert messages[-1].kind == "input", messages[-1]


def test_quick_tv_is_a_start_of_k_space(scan):
    messages, volumes = run(job(scan, "padmm", iterations=1, start="tv"))
    first = finished(messages).figures["psnr"]
    assert {"start", "start phase"} <= set(volumes)
    assert first > finished(run(job(scan, "padmm", iterations=1, start="fdk"))[0]).figures["psnr"] + 1


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


@pytest.fixture
def weights(tmp_path):
    """A network of complex volumes that was never trained, as the weights that ship."""
    torch.manual_seed(0)
    network = make_network("light", channels=2, width=4, scales=2)
    file = tmp_path / "mri.safetensors"
    training = {"data": {"modality": "mri", "accelerations": [3.0], "size": SIZE}}
    save_weights(UnrolledPGD(network, 2, step="gradient", init="zero-filled"), file, training=training)
    return file


def test_padmm_begins_with_what_a_network_makes_of_k_space(scan, weights):
    prepared = Prepared()
    messages, volumes = run(job(scan, "padmm", iterations=40, start=str(weights)), prepared=prepared)
    assert finished(messages).provenance["start"]["weights"] == str(weights)
    assert {"start", "start phase", "result", "result phase"} <= set(volumes)
    again, shown = run(job(scan, "padmm", iterations=1, start=str(weights)), prepared=prepared)
    finished(again)
    assert np.array_equal(shown["start"], volumes["start"])
    _, cold = run(job(scan, "padmm", iterations=40, start="zeros"))
    assert np.linalg.norm(volumes["result"] - cold["result"]) < 0.02 * np.linalg.norm(cold["result"])


def test_padmm_begins_with_a_complex_file(scan, tmp_path):
    _, there = run(job(scan, "padmm", iterations=40, start="zeros"))
    volume = there["result"] * np.exp(1j * there["result phase"])
    np.save(tmp_path / "x.npy", volume.astype(np.complex64))
    _, on = run(job(scan, "padmm", iterations=1, start=str(tmp_path / "x.npy")))
    assert np.linalg.norm(on["result"] - there["result"]) < 0.05 * np.linalg.norm(there["result"])
    np.save(tmp_path / "real.npy", there["result"])
    messages, _ = run(job(scan, "padmm", iterations=1, start=str(tmp_path / "real.npy")))
    assert "the phase is missing" in messages[-1].text


def test_weights_for_projections_are_no_start_of_k_space(scan):
    messages, _ = run(job(scan, "padmm", start="unrolled"))
    assert messages[-1].kind == "input"
    assert "are for X-ray projections" in messages[-1].text


def test_k_space_unlike_that_of_training_is_told(scan, weights):
    messages, _ = run(job(scan, "unrolled", weights=str(weights)))
    assert not [m for m in messages if isinstance(m, Notice)]
    messages, _ = run(job(scan, "unrolled", weights=str(weights), options={"acceleration": 8.0}))
    assert "more than the weights were trained on" in next(m.text for m in messages if isinstance(m, Notice))


# -- a volume beside the data --------------------------------------------------------------------------------------


def write_scan(folder, made, **described):
    """A simulated scan as a .npy with a sidecar."""
    folder.mkdir()
    np.save(folder / "head.npy", made.scan.kspace)
    lines = {"axes": ["coil", "z", "y", "x"], "voxel_size": 1.0, **described}
    (folder / "head.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    return folder / "head.npy"


@pytest.fixture(scope="module")
def whitened(tmp_path_factory):
    """A scan that brings its noise and its coil maps, and its truth in the unit of its noise, (D, H, W), complex."""
    folder = tmp_path_factory.mktemp("noisy")
    made = simulate_mri("head", seed=3, size=SIZE, acceleration=3, coils=6, calibration=8)
    path = write_scan(folder / "scan", made, coil_maps="maps.npy", noise="noise.npy")
    noise = made.noise * np.random.default_rng(0).standard_normal((6, 4000, 2)).view(np.complex128)[..., 0]
    np.save(path.with_name("noise.npy"), noise.astype(np.complex64))
    np.save(path.with_name("maps.npy"), made.scan.coil_maps)
    return path, (made.truth / (np.sqrt(2) * made.noise)).astype(np.complex64)


def check(scan, volume=None, prepared=None):
    messages, volumes = run(DataConsistencyJob(scan=scan, volume=volume, device="cpu"), prepared=prepared)
    return messages, volumes, finished(messages).figures


def test_k_space_of_a_volume_stands_beside_the_measured_one(scan):
    opened = open_scan(scan)
    messages, volumes, figures = check(scan, scan.with_name("complex.npy"))
    ready = [m for m in messages if isinstance(m, VolumeReady)]
    assert [m.name for m in ready] == ["measured", "projected", "residual"]
    assert {m.axis_labels for m in ready} == {("coil", "z", "y", "x")}
    assert {m.scale for m in ready} == {(1.0, 2.0, 1.0, 1.5)}
    x = np.load(scan.with_name("complex.npy"))
    y = MultiCoilMRI.from_scan(opened, "cpu").A(torch.from_numpy(np.stack([x.real, x.imag]))[None])[0].numpy()
    made, largest = y[0] + 1j * y[1], float(np.abs(opened.kspace).max())
    for name, values in (("measured", opened.kspace), ("projected", made), ("residual", made - opened.kspace)):
        np.testing.assert_allclose(volumes[name], decades(values, largest), atol=1e-2)
        assert (volumes[name][:, ~opened.mask] == volumes[name].min()).all()  # what was not sampled is black
    error = np.linalg.norm(made - opened.kspace) / np.linalg.norm(opened.kspace)
    assert figures["residual"] == pytest.approx(error, rel=1e-4)
    steps = [m for m in messages if isinstance(m, Progress)]
    assert steps[-1].step == steps[-1].total == 6


def test_the_truth_of_k_space_is_at_the_noise_and_a_hallucination_is_not(whitened, tmp_path):
    scan, truth = whitened
    np.save(tmp_path / "right.npy", truth)
    middle = (slice(SIZE // 2 - 3, SIZE // 2 + 3),) * 3
    truth = truth.copy()
    truth[middle] += np.abs(truth).max()
    np.save(tmp_path / "wrong.npy", truth)
    right, wrong = (check(scan, tmp_path / f"{name}.npy")[2] for name in ("right", "wrong"))
    assert right["noise"] == pytest.approx(1, rel=1e-3)  # of prewhitened k-space
    assert right["residual_to_noise"] == pytest.approx(1, abs=0.05)
    assert right["worst_coil"] < 1.1
    assert wrong["residual_to_noise"] > 1.5
    assert wrong["worst_coil"] > wrong["residual_to_noise"]


def test_the_noise_of_k_space_is_told_without_a_noise_scan():
    made = simulate_mri("head", seed=3, size=SIZE, acceleration=3, coils=4, snr=8.0)
    assert kspace_noise(made.scan) == pytest.approx(np.full(4, np.sqrt(2) * made.noise), rel=0.2)


def test_the_last_complex_result_is_checked(scan):
    prepared = Prepared()
    made = finished(run(job(scan), prepared=prepared)[0]).figures
    assert check(scan, None, prepared)[2]["residual"] == pytest.approx(made["residual"], rel=1e-3)


def test_a_volume_that_k_space_cannot_be_made_of_is_one_sentence(scan, tmp_path):
    np.save(tmp_path / "real.npy", np.ones((SIZE,) * 3, np.float32))
    np.save(tmp_path / "small.npy", np.ones((8, 8, 8), np.complex64))
    np.save(tmp_path / "nan.npy", np.full((SIZE,) * 3, np.nan, np.complex64))
    refused = {
        scan.with_name("truth.tif"): "the phase is missing",
        tmp_path / "real.npy": "the phase is missing",
        tmp_path / "small.npy": "(8, 8, 8)",
        tmp_path / "nan.npy": "NaN",
        tmp_path / "none.npy": "no volume",
        None: "last result",
    }
    for volume, word in refused.items():
        messages, _ = run(DataConsistencyJob(scan=scan, volume=volume, device="cpu"))
        assert messages[-1].kind == "input", messages[-1]
        assert word in messages[-1].text


def test_finish_keeps_the_coils_that_are_there(scan):
    control = Control()
    for message in run_job(DataConsistencyJob(scan=scan, volume=scan.with_name("complex.npy"), device="cpu"), control):
        if isinstance(message, Progress):
            control.finish()
    assert not message.complete
    seen = (control.volumes["projected"] > control.volumes["projected"].min()).any(axis=(1, 2, 3))
    assert list(np.flatnonzero(seen)) == [0]


# -- coil maps -----------------------------------------------------------------------------------------------------


def test_coil_maps_are_seen_whether_they_came_or_are_estimated(scan, tmp_path):
    plain = write_scan(tmp_path / "plain", simulate_mri("head", seed=3, size=SIZE, acceleration=2, coils=4))
    for path, estimated in ((scan, False), (plain, True)):
        prepared = Prepared()
        messages, volumes = run(CoilMapsJob(scan=path, device="cpu"), prepared=prepared)
        finished(messages)
        stages = [m.name for m in messages if isinstance(m, Stage)]
        assert ("estimating coil maps" in stages) == estimated
        ready = {m.name: m for m in messages if isinstance(m, VolumeReady)}
        assert list(ready) == ["coil maps", "coil maps phase"]
        assert ready["coil maps"].axis_labels == ("coil", "z", "y", "x")
        total = (volumes["coil maps"] ** 2).sum(0)
        assert np.allclose(total[total > 0], 1, atol=1e-4)
        after, _ = run(job(path, "zero-filled"), prepared=prepared)  # which finds them made
        assert not [m for m in after if isinstance(m, Stage) and m.name == "estimating coil maps"]


def test_projections_have_no_coil_maps(memory_scan, monkeypatch, tmp_path):
    monkeypatch.setattr("napari_recon.jobs.job.open_scan", lambda *_: memory_scan)
    messages, _ = run(CoilMapsJob(scan=tmp_path / "ball.h5"))
    assert messages[-1].kind == "input"
    assert "no coil" in messages[-1].text


# -- how much to regularise ----------------------------------------------------------------------------------------


def suggested(scan, prepared=None):
    messages, _ = run(RegularizationJob(scan=scan, device="cpu"), prepared=prepared)
    return messages, finished(messages)


def test_noisier_k_space_is_regularised_more_and_better_than_by_other_values(tmp_path):
    found = {}
    for snr in (5.0, 50.0):
        made = simulate_mri("head", seed=3, size=SIZE, acceleration=3, coils=6, snr=snr)
        path = write_scan(tmp_path / f"{snr}", made, coil_maps="maps.npy", truth="truth.tif")
        np.save(path.with_name("maps.npy"), made.scan.coil_maps)
        tifffile.imwrite(path.with_name("truth.tif"), np.abs(made.truth))
        end = suggested(path)[1]
        found[snr] = tau = end.figures["regularization"]
        assert f"τ = {tau:g} " in end.provenance["suggestion"]["sentence"]
        weights = (tau, tau / 10, tau * 10)
        best, *others = (
            finished(run(job(path, "padmm", regularization=w, iterations=15, start="fdk"))[0]).figures["psnr"]
            for w in weights
        )
        assert best > max(others)
    assert found[5.0] > 3 * found[50.0]


def test_a_suggestion_for_k_space_uses_what_is_kept_and_leaves_it(scan):
    prepared = Prepared()
    run(job(scan, "padmm", iterations=2, start="fdk"), prepared=prepared)
    kept = dict(prepared.things)
    messages, end = suggested(scan, prepared)
    assert prepared.things == kept
    assert not any(isinstance(m, VolumeReady) for m in messages)
    held = [row["held_out"] for row in end.provenance["suggestion"]["sweep"]]
    assert end.figures["held_out"] == pytest.approx(min(held), rel=0.05)
    json.dumps(end.provenance)


def test_some_slices_are_enough_for_a_suggestion(scan, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.regularization.LARGEST_MRI", 6 * 6 * SIZE**2)
    messages, _ = suggested(scan)
    (voxels,) = (m.detail for m in messages if isinstance(m, Stage) and m.name == "comparing")
    assert sorted(int(n) for n in voxels.split() if n.isdigit()) == [6, SIZE, SIZE]


@pytest.mark.parametrize("throughout", [[], [2], [0, 2]])
def test_what_is_held_out_could_have_been_left_out(throughout):
    shape = tuple(1 if axis in throughout else 24 for axis in range(3))
    mask = np.random.default_rng(0).random(shape) < 0.3
    mask[tuple(slice(9, 15) if n > 1 else slice(None) for n in shape)] = True
    mask = np.broadcast_to(mask, (24, 24, 24))
    calibration = [24 if axis in throughout else 6 for axis in range(3)]
    held = held_out_sites(mask, calibration, throughout, seed=0)
    assert not (held & ~mask).any()
    assert not held[9:15, 9:15, 9:15].any()
    assert 0.02 < held.sum() / mask.sum() < 0.12
    for axis in throughout:  # whole lines
        assert (held == held.take([0], axis)).all()


def test_of_k_space_that_is_whole_something_is_held_out():
    held = held_out_sites(np.ones((12, 24, 24), bool), (12, 24, 24), [0, 1, 2], seed=0)
    assert 0.02 < held.mean() < 0.1
    with pytest.raises(ScanError, match="held out"):
        held_out_sites(np.zeros((1, 24, 24), bool), (0, 0, 0), [], seed=0)
