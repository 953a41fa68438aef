"""Training as a job: what it says, what Finish keeps, and what Cancel leaves."""

import time

import numpy as np
import pytest

from napari_recon.jobs.job import TrainJob
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.run import run_job
from napari_recon.jobs.stages import Control
from napari_recon.jobs.worker import Worker
from napari_recon.learning.networks import load_weights
from napari_recon.learning.training import TrainingConfig, checkpoint_path

CONFIG = TrainingConfig.model_validate(
    {
        "data": {"kinds": ["blobs"], "count": 2, "size": 12, "views": [6]},
        "network": {"options": {"width": 4, "scales": 2}},
        "method": {"iterations": 1, "start": "fdk", "data_steps": 1},
        "optimisation": {"steps": 4, "patch": 8, "batch": 1, "warm_up": 1},
        "validation": {"every": 2, "count": 1},
        "device": "cpu",
    }
)


@pytest.fixture
def job(tmp_path):
    return TrainJob(training=CONFIG, output=tmp_path / "w.safetensors")


def until(job, done, order):
    """Run a job, and give an order after the first message for which ``done`` holds."""
    control, messages = Control(), []
    for message in run_job(job, control):
        messages.append(message)
        if done is not None and done(message):
            getattr(control, order)()
            done = None
    return messages


def at_step(step):
    return lambda m: isinstance(m, Progress) and m.name in ("training", "validation") and m.step == step


def test_a_training_tells_its_steps_and_shows_its_validation(job):
    control = Control()
    messages = list(run_job(job, control))
    assert [m.name for m in messages if isinstance(m, Stage)] == ["preparing", "training"]
    assert [(m.step, m.total) for m in messages if isinstance(m, Progress) and m.name == "preparing"] == [
        (1, 3), (2, 3), (3, 3),
    ]  # fmt: skip
    steps = [m for m in messages if isinstance(m, Progress) and m.name != "preparing"]
    assert [m.step for m in steps] == [1, 2, 3, 4]
    assert [m.name for m in steps] == ["training", "validation"] * 2
    assert all(np.isfinite(m.figures["loss"]) for m in steps)
    assert {"psnr", "start_psnr", "best_psnr"} <= set(steps[1].figures)
    ready = [m for m in messages if isinstance(m, VolumeReady)]
    assert [m.name for m in ready] == ["start", "validation", "truth"]
    assert {m.shape for m in ready} == {(8, 8, 8)}
    assert not np.array_equal(control.volumes["validation"], control.volumes["start"])
    last = messages[-1]
    assert isinstance(last, Finished)
    assert last.complete
    assert last.output == str(job.output)
    assert TrainJob.model_validate(last.provenance["job"]) == job
    assert load_weights(job.output).figures["psnr"] == last.figures["best_psnr"]


def test_finish_keeps_the_best_and_the_job_goes_on_from_there(job):
    last = until(job, at_step(1), "finish")[-1]
    assert isinstance(last, Finished)
    assert not last.complete
    assert load_weights(job.output).figures["steps"] == 1
    assert checkpoint_path(job.output).exists()
    again = [m.step for m in run_job(job) if isinstance(m, Progress) and m.name != "preparing"]
    assert again == [2, 3, 4]
    anew = job.model_copy(update={"resume": False})
    assert [m.step for m in run_job(anew) if isinstance(m, Progress) and m.name != "preparing"] == [1, 2, 3, 4]


def test_finish_before_the_first_step_keeps_nothing(job):
    last = until(job, lambda m: isinstance(m, Stage), "finish")[-1]
    assert isinstance(last, Finished)
    assert not last.complete
    assert last.output is None


def test_cancel_leaves_what_was_there_before(job, tmp_path):
    assert isinstance(until(job, at_step(2), "cancel")[-1], Cancelled)
    assert list(tmp_path.iterdir()) == []
    until(job, at_step(1), "finish")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    assert isinstance(until(job, at_step(3), "cancel")[-1], Cancelled)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_who_stops_listening_loses_nothing(job):
    messages = run_job(job)
    next(m for m in messages if at_step(3)(m))
    messages.close()
    assert load_weights(job.output).figures["steps"] == 2
    assert checkpoint_path(job.output).exists()


def test_what_cannot_be_trained_is_a_sentence(job):
    wrong = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"kinds": ("unicorn",)})})
    (failed,) = [m for m in run_job(job.model_copy(update={"training": wrong})) if isinstance(m, Failed)]
    assert failed.kind == "input"
    assert "unicorn" in failed.text


def test_memory_is_planned_before_anything_is_simulated(job):
    plan = plan_memory(job)
    assert plan.fits
    assert "Needs about" in plan.sentence
    more = CONFIG.data.model_copy(update={"count": 100_000, "size": 512})
    plan = plan_memory(job.model_copy(update={"training": CONFIG.model_copy(update={"data": more})}))
    assert not plan.fits
    assert "fewer or smaller volumes" in plan.sentence


def test_the_viewers_process_trains(job):
    with Worker() as worker:
        worker.submit(job)
        messages = []
        while not messages or not isinstance(messages[-1], Finished | Failed):
            messages.extend(worker.poll())
            time.sleep(0.02)
        assert isinstance(messages[-1], Finished), messages[-1]
        assert worker.volume("truth").shape == (8, 8, 8)
        assert worker.volume("truth").max() > 0
    assert load_weights(job.output).figures["steps"] in (2, 4)
