"""PADMM as a job: its starts, and the changes that are made while it runs."""

import json
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.jobs import Control, ReconstructionJob, run_job
from napari_recon.jobs.job import FDKParameters, PADMMParameters, SIRTParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Failed, Finished, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.stages import Prepared
from napari_recon.jobs.volumes import write_volume
from napari_recon.jobs.worker import Worker
from napari_recon.learning.networks import make_network, save_weights
from napari_recon.learning.simulate import simulate
from napari_recon.reconstruction.unrolled import PostProcessing
from napari_recon.scans import open_scan

SIZE = 20


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=SIZE, views=20, seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that has learned nothing, but is none that leaves FDK as it is."""
    torch.manual_seed(0)
    network = make_network("light", width=4, scales=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.3)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(PostProcessing(network), file, card="Learned nothing.")
    return str(file)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An operator cache of the test's own."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)


def make_job(scan, **parameters):
    parameters = {"start": "fdk", "iterations": 4} | parameters
    return ReconstructionJob(scan=scan, parameters=PADMMParameters(**parameters), device="cpu")


def finished(messages):
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages[-1]


def run(job, prepared=None, tune=None):
    """The job's messages and volumes; ``tune`` is called with the control and every step of the result."""
    control, messages = Control(), []
    for message in run_job(job, control, prepared):
        messages.append(message)
        if tune is not None and isinstance(message, Progress) and message.name == "result":
            tune(control, message.step)
    return messages, control.volumes


def shown(messages):
    """The volumes that are told of."""
    return [m.name for m in messages if isinstance(m, VolumeReady)]


def start_of(job, prepared=None):
    """The result as it stands when it appears: its start."""
    control = Control()
    for message in run_job(job, control, prepared):
        if isinstance(message, VolumeReady) and message.name == "result":
            return control.volumes["result"].copy()
    raise AssertionError("there was no result")


def steps(messages):
    return [m for m in messages if isinstance(m, Progress) and m.name == "result"]


# -- starts --------------------------------------------------------------------------------------------------------


def test_it_begins_where_it_is_told_to(scan, weights, tmp_path):
    grid = open_scan(scan).default_grid()
    volume = np.random.default_rng(0).random(grid.shape, dtype=np.float32)
    file = write_volume(tmp_path / "v.tif", volume, grid)
    np.save(tmp_path / "v.npy", volume)
    np.testing.assert_array_equal(start_of(make_job(scan, start="zeros")), 0)
    np.testing.assert_allclose(start_of(make_job(scan, start=str(file))), volume, atol=1e-6)
    np.testing.assert_allclose(start_of(make_job(scan, start=str(tmp_path / "v.npy"))), volume, atol=1e-6)
    fdk = run(ReconstructionJob(scan=scan, parameters=FDKParameters(), device="cpu"))[1]["fdk"]
    np.testing.assert_allclose(start_of(make_job(scan)), np.maximum(fdk, 0), atol=1e-6)
    messages, volumes = run(make_job(scan, start=weights, iterations=1))
    assert shown(messages) == ["fdk", "start", "result"]
    assert not np.allclose(volumes["start"], fdk)
    np.testing.assert_allclose(start_of(make_job(scan, start=weights)), np.maximum(volumes["start"], 0), atol=1e-6)
    told = finished(messages).provenance["start"]
    assert told["card"] == "Learned nothing."


def test_quick_tv_is_a_start_that_is_shown(scan):
    messages, volumes = run(make_job(scan, start="tv", iterations=1))
    assert shown(messages) == ["fdk", "start", "result"]
    assert volumes["start"].any()
    assert all(not m.figures for m in messages if isinstance(m, Progress) and m.name == "start")


def test_the_last_result_is_a_start_on_the_same_grid_only(scan):
    prepared = Prepared()
    _, before = run(ReconstructionJob(scan=scan, parameters=SIRTParameters(iterations=2), device="cpu"), prepared)
    np.testing.assert_array_equal(start_of(make_job(scan, start="last"), prepared), before["result"])
    other = make_job(scan, start="last").model_copy(update={"shape": (8, 8, 8)})
    failed = run(other, prepared)[0][-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "input"
    assert "another start" in failed.text


def test_a_start_that_is_not_there_is_one_sentence(scan, tmp_path):
    for start in ("nonsense", str(tmp_path / "v.tif"), str(tmp_path / "w.safetensors")):
        messages, _ = run(make_job(scan, start=start))
        assert isinstance(messages[-1], Failed)
        assert messages[-1].kind == "input"
        assert not any(isinstance(m, VolumeReady) for m in messages)  # refused before anything is computed


def test_a_computed_start_is_kept_for_the_next_run(scan, weights, monkeypatch):
    prepared = Prepared()
    first = start_of(make_job(scan, start=weights), prepared)
    monkeypatch.setattr(PostProcessing, "stream", lambda *_, **__: pytest.fail("computed again"))
    messages, _ = run(make_job(scan, start=weights), prepared)
    assert shown(messages) == ["fdk", "start", "result"]
    np.testing.assert_array_equal(start_of(make_job(scan, start=weights), prepared), first)


def test_finish_during_the_start_keeps_fdk(scan, weights):
    control = Control()
    for message in run_job(make_job(scan, start=weights), control):
        if isinstance(message, VolumeReady) and message.name == "start":
            control.finish()
    assert isinstance(message, Finished)
    assert not message.complete
    np.testing.assert_array_equal(control.volumes["result"], control.volumes["fdk"])


# -- changes -------------------------------------------------------------------------------------------------------


def test_changes_take_hold_at_the_next_iteration_and_are_told(scan):
    def tune(control, step):
        if step == 2:
            control.change({"regularization": 0.1})
            control.change({"iterations": 6})

    messages, changed = run(make_job(scan), tune=tune)
    plain_messages, plain = run(make_job(scan))
    assert [m.total for m in steps(messages)] == [4, 4, 6, 6, 6, 6]
    assert [m.step for m in steps(messages)] == [1, 2, 3, 4, 5, 6]
    same = [
        a.figures["objective"] == pytest.approx(b.figures["objective"])
        for a, b in zip(steps(messages), steps(plain_messages), strict=False)
    ]
    assert same == [True, True, False, False]
    assert np.abs(np.diff(changed["result"])).sum() < np.abs(np.diff(plain["result"])).sum()  # smoother
    made_by = finished(messages).provenance
    assert made_by["changes"] == [{"step": 2, "regularization": 0.1, "iterations": 6}]
    assert made_by["job"]["parameters"]["regularization"] == 1e-3
    assert "changes" not in finished(plain_messages).provenance


def test_another_start_can_be_taken_amid_a_run(scan):
    def tune(control, step):
        if step == 3:
            control.change({"start": "zeros"})

    messages, _ = run(make_job(scan, iterations=5), tune=tune)
    residuals = [m.figures["residual"] for m in steps(messages)]
    assert residuals[3] > residuals[2]
    assert residuals[4] < residuals[3]
    assert finished(messages).provenance["changes"] == [{"step": 3, "start": "zeros"}]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rho": -1}, "rho"),
        ({"start": "nonsense.tif"}, "nonsense"),
        ({"weighted": True}, "weighted"),
    ],
)
def test_a_change_that_will_not_do_is_told_and_the_run_goes_on(scan, change, word):
    def tune(control, step):
        if step == 1:
            control.change(change)

    messages, volumes = run(make_job(scan), tune=tune)
    (notice,) = [m for m in messages if isinstance(m, Notice)]
    assert word in notice.text
    assert notice.text.endswith(".")
    assert "changes" not in finished(messages).provenance
    np.testing.assert_array_equal(volumes["result"], run(make_job(scan))[1]["result"])


def test_changes_wait_and_are_taken_together():
    control = Control()
    control.change({"rho": 0.2})
    control.change({"rho": 0.5, "iterations": 3})
    assert control.take_changes() == {"rho": 0.5, "iterations": 3}
    assert control.take_changes() == {}


def test_other_methods_do_not_mind_changes(scan):
    control = Control()
    control.change({"iterations": 9})
    job = ReconstructionJob(scan=scan, parameters=SIRTParameters(iterations=2), device="cpu")
    assert isinstance(list(run_job(job, control))[-1], Finished)


# -- iterates ------------------------------------------------------------------------------------------------------


def test_iterates_are_kept_as_they_come(scan):
    control, seen = Control(), {}
    for message in run_job(make_job(scan, iterations=5, keep_iterates=True), control):
        if isinstance(message, VolumeReady) and message.name == "result":
            seen[0] = control.volumes["result"].copy()
        elif isinstance(message, Progress) and message.name == "result":
            seen[message.step] = control.volumes["result"].copy()
    kept = control.volumes["iterates"]
    assert kept.shape == (6, SIZE, SIZE, SIZE)
    for step, volume in seen.items():
        np.testing.assert_array_equal(kept[step], volume)


def test_where_there_is_no_room_every_second_iterate_goes(scan, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.memory._ITERATES", 4 * 5 * SIZE**3)
    control, seen, told = Control(), {}, []
    for message in run_job(make_job(scan, iterations=11, keep_iterates=True), control):
        if isinstance(message, Progress) and message.name == "result":
            seen[message.step] = control.volumes["result"].copy()
        elif isinstance(message, Progress) and message.name == "iterates":
            told.append((message.step, message.box[0].stop - 1))
    kept = control.volumes["iterates"]
    assert len(kept) == 5
    assert told == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (8, 4)]  # step -> where
    for place, step in enumerate((2, 4, 6, 8), start=1):
        np.testing.assert_array_equal(kept[place], seen[step])


def test_kept_iterates_are_in_the_plan(scan):
    without, with_them = (
        plan_memory(make_job(scan, iterations=30, keep_iterates=keep)).items["shown volumes"] for keep in (False, True)
    )
    assert with_them - without == 31 * 4 * SIZE**3


# -- the rest ------------------------------------------------------------------------------------------------------


def test_the_fitted_operator_preconditions(scan):
    messages, volumes = run(make_job(scan, preconditioner="operator"))
    assert any(isinstance(m, Stage) and "fitting" in m.name for m in messages)
    assert steps(messages)[-1].figures["residual"] < steps(messages)[0].figures["residual"]
    assert np.isfinite(volumes["result"]).all()


def test_an_operator_that_an_earlier_run_fitted_can_be_changed_to(scan):
    def tune(control, step):
        if step == 1:
            control.change({"preconditioner": "operator"})

    prepared = Prepared()
    run(make_job(scan, preconditioner="operator", iterations=1), prepared)
    messages, volumes = run(make_job(scan), prepared, tune)
    assert not any(isinstance(m, Notice) for m in messages)
    assert finished(messages).provenance["changes"] == [{"step": 1, "preconditioner": "operator"}]
    assert np.isfinite(volumes["result"]).all()


def test_an_operator_that_is_not_there_is_fitted_amid_the_run(scan):
    def tune(control, step):
        if step == 2:
            control.change({"preconditioner": "operator", "iterations": 6})

    messages, _ = run(make_job(scan), tune=tune)
    told = [m.step if isinstance(m, Progress) else m.name for m in messages if isinstance(m, Progress | Stage)]
    assert "fitting the normal operator" in told[told.index(2) : told.index(3)]
    assert finished(messages).provenance["changes"] == [{"step": 2, "preconditioner": "operator", "iterations": 6}]
    residuals = [m.figures["residual"] for m in steps(messages)]
    assert len(residuals) == 6
    assert residuals[-1] < residuals[1]
    _, plain = run(make_job(scan))
    assert not np.array_equal(plain["result"], run(make_job(scan), tune=tune)[1]["result"])


def test_finish_amid_that_fit_keeps_the_result(scan):
    control, fitting = Control(), False
    for message in run_job(make_job(scan, iterations=50), control):
        if isinstance(message, Progress) and message.step == 2:
            control.change({"preconditioner": "operator"})
        elif isinstance(message, Stage) and "fitting" in message.name:
            fitting = True
            control.finish()
    assert fitting
    assert isinstance(message, Finished)
    assert not message.complete
    assert "changes" not in message.provenance


def test_where_memory_is_short_the_split_variables_are_in_files(scan, monkeypatch):
    job = make_job(scan)
    whole = plan_memory(job)
    _, plain = run(job)
    monkeypatch.setattr("napari_recon.jobs.memory.available_memory", lambda: int(whole.host_bytes / 0.95))
    plan = plan_memory(job)
    assert plan.fits
    assert plan.host_bytes < 0.9 * whole.host_bytes
    monkeypatch.setattr("napari_recon.jobs.memory.available_memory", lambda: 4 * 18 * SIZE**3)
    monkeypatch.setattr("napari_recon.jobs.stages.plan_memory", lambda *_: plan)
    messages, filed = run(job)
    assert [m.text for m in messages if isinstance(m, Notice) and "files" in m.text]
    np.testing.assert_array_equal(filed["result"], plain["result"])


def test_it_ends_where_both_residuals_are_small(scan):
    messages, _ = run(make_job(scan, iterations=200, tolerance=0.05))
    assert finished(messages).complete
    last = steps(messages)[-1]
    assert last.step < 200
    assert max(last.figures["primal"], last.figures["dual"]) < 0.05


def test_photon_statistics_are_weights_between_dark_and_bright_rays(scan):
    _, plain = run(make_job(scan))
    _, weighted = run(make_job(scan, weighted=True))
    assert np.isfinite(weighted["result"]).all()
    assert not np.array_equal(plain["result"], weighted["result"])


@pytest.mark.parametrize("bad", [{"rho": 0}, {"regularization": float("nan")}, {"iterations": 0}, {"start": 3}])
def test_bad_parameters_are_refused_as_values(bad):
    with pytest.raises(ValidationError):
        PADMMParameters(**bad)


# -- from outside --------------------------------------------------------------------------------------------------


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout)


def test_the_command_line_starts_from_a_volume_and_says_how(scan, tmp_path, monkeypatch):
    common = ("--device", "cpu", "--iterations", 2, "--json")
    first = call("reconstruct", scan, "-o", tmp_path / "tv.tif", "--method", "tv", "--patch", 0, *common)
    monkeypatch.chdir(tmp_path)
    more = ("--start", "tv.tif", "--preconditioner", "scalar", "--rho", 0.2, "--regularization", 0.002)
    told = call("reconstruct", scan, "-o", "x.tif", "--method", "padmm", *more, *common)
    assert told["figures"]["residual"] < first["figures"]["residual"]
    assert told["job"]["parameters"] == {
        "method": "padmm",
        "start": str(tmp_path / "tv.tif"),
        "preconditioner": "scalar",
        "iterations": 2,
        "regularization": 0.002,
        "rho": 0.2,
        "adaptive": False,
        "tolerance": 0.0,
        "weighted": False,
        "keep_iterates": False,
    }
    refused = call("reconstruct", scan, "-o", "y.tif", "--method", "sirt", "--start", "fdk", "--json", status=2)
    assert "--start is no option of method 'sirt'" in refused["error"]


def test_a_worker_passes_changes_on(scan):
    with Worker() as worker:
        worker.submit(make_job(scan, iterations=10_000))
        heard, end = [], time.monotonic() + 90
        while not (heard and isinstance(heard[-1], Finished | Failed)):
            assert time.monotonic() < end
            heard += worker.poll()
            if any(isinstance(m, Progress) and m.name == "result" for m in heard) and worker.running:
                worker.change({"iterations": 3})
            time.sleep(0.005)
    assert finished(heard).provenance["changes"][0]["iterations"] == 3
