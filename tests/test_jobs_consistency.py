"""Whether a volume explains the data: the job, and the noise that it is held against."""

import numpy as np
import pytest
from pydantic import ValidationError

from napari_recon.jobs import Control, DataConsistencyJob, ReconstructionJob, run_job
from napari_recon.jobs.job import SIRTParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Failed, Finished, Progress, VolumeReady
from napari_recon.jobs.quality import noise_level
from napari_recon.jobs.stages import Prepared
from napari_recon.jobs.volumes import read_volume, write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.scans import open_scan

SIZE = 24


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("blobs", tmp_path_factory.mktemp("scans") / "phantom", size=SIZE, views=20, seed=1, photons=2000)


def run(job, prepared=None):
    control = Control()
    messages = list(run_job(job, control, prepared))
    return messages, control.volumes


def check(scan, volume=None, prepared=None, **fields):
    messages, volumes = run(DataConsistencyJob(scan=scan, volume=volume, device="cpu", **fields), prepared)
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages, volumes, messages[-1].figures


# -- the job -------------------------------------------------------------------------------------------------------


def test_projections_are_shown_as_a_person_measures_them(scan):
    opened = open_scan(scan)
    messages, volumes, figures = check(scan, opened.truth)
    ready = [m for m in messages if isinstance(m, VolumeReady)]
    assert [m.name for m in ready] == ["measured", "projected", "residual"]
    assert {m.axis_labels for m in ready} == {("view", "row", "column")}
    assert {m.shape for m in ready} == {opened.shape}
    np.testing.assert_allclose(volumes["measured"], opened.projections(), atol=1e-6)
    np.testing.assert_allclose(volumes["residual"], volumes["projected"] - volumes["measured"], atol=1e-6)
    error = np.linalg.norm(volumes["residual"]) / np.linalg.norm(volumes["measured"])
    assert figures["residual"] == pytest.approx(error, rel=1e-4)
    steps = [m for m in messages if isinstance(m, Progress)]
    assert steps[-1].step == steps[-1].total == opened.geometry.views


def test_the_truth_is_at_the_noise_and_a_hallucination_is_not(scan, tmp_path):
    truth = read_volume(open_scan(scan).truth)
    _, plain, right = check(scan, open_scan(scan).truth)
    assert right["residual_to_noise"] == pytest.approx(1, abs=0.15)
    data = truth.data.copy()
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
    data[middle, middle, middle] += 0.5 * data.max()
    _, volumes, wrong = check(scan, write_volume(tmp_path / "v.tif", data, truth.grid))
    assert wrong["residual_to_noise"] > 1.2 * right["residual_to_noise"]
    assert wrong["worst_view"] >= wrong["residual_to_noise"]
    more = np.abs(volumes["residual"] - plain["residual"]).mean(0)
    row, column = np.unravel_index(more.argmax(), more.shape)
    assert abs(row - (more.shape[0] - 1) / 2) < 4  # it shows where the hallucination is
    assert abs(column - (more.shape[1] - 1) / 2) < 4


def test_the_last_result_is_checked_where_no_file_is_given(scan):
    prepared = Prepared()
    messages, _ = run(ReconstructionJob(scan=scan, parameters=SIRTParameters(iterations=3), device="cpu"), prepared)
    _, _, figures = check(scan, None, prepared)
    assert figures["residual"] == pytest.approx(messages[-1].figures["residual"], rel=1e-3)


@pytest.mark.parametrize(("volume", "word"), [(None, "last result"), ("nothing.tif", "nothing.tif")])
def test_a_volume_that_is_not_there_is_one_sentence(scan, volume, word):
    (*_, failed), _ = run(DataConsistencyJob(scan=scan, volume=volume, device="cpu"))
    assert isinstance(failed, Failed)
    assert failed.kind == "input"
    assert word in failed.text
    assert failed.text.endswith(".")


def test_finish_keeps_the_views_that_are_there(scan):
    control = Control()
    for message in run_job(DataConsistencyJob(scan=scan, volume=open_scan(scan).truth, device="cpu"), control):
        if isinstance(message, Progress):
            control.finish()
    assert isinstance(message, Finished)
    assert not message.complete
    seen = control.volumes["projected"].any(axis=(1, 2))
    assert seen.any()
    assert not seen.all()


def test_its_memory_is_planned(scan):
    plan = plan_memory(DataConsistencyJob(scan=scan, device="cpu"))
    assert plan.fits
    assert plan.host_bytes > 3 * 4 * np.prod(open_scan(scan).shape)
    with pytest.raises(ValidationError):
        DataConsistencyJob(scan=scan, output="x.tif")


# -- the noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("sigma", [0.002, 0.05])
def test_the_noise_is_told_from_noisy_projections_of_an_object(rows, sigma):
    v, u = np.meshgrid(np.linspace(-1, 1, rows) if rows > 1 else [0.0], np.linspace(-1, 1, 200), indexing="ij")
    chord = 2 * np.sqrt(np.maximum(0, 0.6 - u**2 - v**2)) + 0.5 * (np.abs(u) < 0.2)  # with edges
    noise = np.random.default_rng(0).normal(0, sigma, (30, rows, 200))
    assert noise_level((chord + noise).astype(np.float32)) == pytest.approx(sigma, rel=0.2)


def test_noise_that_grows_behind_the_object_is_told_on_average():
    u = np.linspace(-1, 1, 80)
    line = np.broadcast_to(3 * np.sqrt(np.maximum(0, 1 - u**2)), (30, 40, 80))
    sigma = 0.01 * np.exp(line / 2)  # photons
    noisy = line + sigma * np.random.default_rng(0).standard_normal(line.shape)
    assert noise_level(noisy.astype(np.float32)) == pytest.approx(np.sqrt(np.mean(sigma**2)), rel=0.1)


def test_a_detector_too_narrow_to_tell_has_no_known_noise():
    assert np.isnan(noise_level(np.zeros((4, 5, 2), np.float32)))
