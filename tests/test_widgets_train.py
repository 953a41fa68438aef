"""The Train dock, opened through the manifest and pressed with a mouse; the process only pretends."""

from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFileDialog, QToolButton

from napari_recon.jobs.job import TrainJob
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, Stage, VolumeReady
from napari_recon.learning.training import TrainingConfig, checkpoint_path, read_config

P, STEPS = 8, 9
CONFIG = TrainingConfig.model_validate(
    {
        "data": {"kinds": ["foam", "head"], "count": 3, "size": 24, "views": [7, 11], "photons": None},
        "network": {"options": {"width": 4, "scales": 2}},
        "method": {"iterations": 2, "start": "fdk"},
        "optimisation": {"steps": STEPS, "patch": P, "learning_rate": 0.002},
        "validation": {"every": 3, "kinds": ["blobs"]},
        "seed": 5,
        "card": "A test.",
    }
)


def tell(worker, job):
    """What a worker says of a training."""
    if not isinstance(job, TrainJob):
        yield from type(worker).tell(worker, job)
        return
    yield Stage("preparing")
    yield Progress("preparing", 1, 2, (), None, 0.1, 0.1)
    yield Stage("training")
    rng = np.random.default_rng(0)
    figures = {}
    for step in range(1, STEPS + 1):
        if worker.state == "cancelling":
            yield Cancelled()
            return
        if worker.state == "finishing":
            break
        if worker.fail is not None and step == 5:
            yield Failed("input", worker.fail)
            return
        figures = {"loss": 1 / step, "learning_rate": 0.001}
        name, box = "training", ()
        if step % 3 == 0:
            figures |= {"psnr": 20.0 + step, "start_psnr": 18.0, "best_psnr": 20.0 + step}
            name, box = "validation", (slice(0, P),) * 3
            for volume in ("start", "validation", "truth"):
                if step == 3:
                    worker.volumes[volume] = rng.random((P, P, P), np.float32)
                    yield VolumeReady(volume, (P,) * 3, (0.5,) * 3, (0.0,) * 3)
            worker.volumes["validation"][...] = step
        yield Progress(name, step, STEPS, box, None, 0.1 * step, 1.0, figures)
    job.output.write_bytes(b"weights")
    yield Finished(figures, 1.0, 10**9, str(job.output), worker.state != "finishing", {"napari_recon": "test"})


@pytest.fixture
def opened(make_napari_viewer, pretend, said, monkeypatch, tmp_path, qtbot):
    """A viewer with the dock, a small configuration in its forms, and a place for the weights."""
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Train")
    worker = pretend[0]
    monkeypatch.setattr(worker, "tell", lambda job: tell(worker, job), raising=False)
    output = tmp_path / "mine.safetensors"
    dock.show_config(CONFIG)
    dock.output.setText(str(output))
    return SimpleNamespace(viewer=viewer, dock=dock, worker=worker, session=dock.session, output=output, said=said)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def idle(qtbot, session):
    qtbot.waitUntil(lambda: session.state == "idle", timeout=20_000)


def train(qtbot, opened):
    press(qtbot, opened.dock.run)
    idle(qtbot, opened.session)


def test_training_needs_no_scan_but_says_what_it_will_do(make_napari_viewer, pretend, qtbot):
    viewer = make_napari_viewer()
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Train")
    qtbot.waitUntil(lambda: "Needs about" in dock.memory.text(), timeout=10_000)
    assert dock.run.isEnabled()
    assert not any(b.isEnabled() for b in (dock.pause, dock.finish, dock.cancel, dock.use, dock.in_viewer))
    assert "60 synthetic volumes of 96³" in dock.summary.text()
    assert dock.config() == TrainingConfig()


def test_the_forms_make_the_job(opened, qtbot):
    train(qtbot, opened)
    (job,) = opened.worker.jobs
    assert job.training == CONFIG
    assert job.output == opened.output
    assert job.resume


def test_a_configuration_is_saved_as_the_command_line_reads_it_and_opened_again(opened, qtbot, monkeypatch, tmp_path):
    dock, file = opened.dock, tmp_path / "mine.toml"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(file.with_suffix("")), ""))
    press(qtbot, dock.save)
    assert read_config(file) == CONFIG
    dock.show_config(TrainingConfig())
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: (str(file), ""))
    press(qtbot, dock.open)
    assert dock.config() == CONFIG
    assert "mine.toml" in dock.subject.text()
    file.write_text("[data]\nsize = 'big'")
    press(qtbot, dock.open)
    assert [severity for severity, _ in opened.said] == ["info", "error"]
    assert dock.config() == CONFIG


def test_scans_of_ones_own_are_chosen_by_their_folder(opened, qtbot, monkeypatch, tmp_path):
    dock = opened.dock
    folder = dock.forms["data"].editors["scans"].widget
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path))
    qtbot.mouseClick(folder.findChild(QToolButton), Qt.MouseButton.LeftButton)
    dock.forms["data"].editors["views"].put(())
    dock.forms["data"].editors["supervision"].put("splitting")
    assert dock.config().data.scans == tmp_path
    assert dock.config().data.views == ()
    qtbot.waitUntil(lambda: "without references" in dock.summary.text(), timeout=5000)
    assert dock.run.isEnabled()


def test_what_makes_no_configuration_is_said_and_not_run(opened, qtbot):
    dock = opened.dock
    dock.forms["data"].editors["views"].put(("seven",))
    qtbot.waitUntil(lambda: "data.views" in dock.memory.text(), timeout=5000)
    press(qtbot, dock.run)
    assert opened.worker.jobs == []
    dock.show_config(CONFIG)
    assert dock.config() == CONFIG


def test_without_a_place_for_the_weights_one_is_asked_for(opened, qtbot, monkeypatch):
    opened.dock.output.clear()
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: ("", ""))
    press(qtbot, opened.dock.run)
    assert opened.worker.jobs == []
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(opened.output.with_suffix("")), ""))
    train(qtbot, opened)
    assert opened.worker.jobs[0].output == opened.output


def test_curves_and_pictures_follow_the_training(opened, qtbot):
    dock, session = opened.dock, opened.session
    train(qtbot, opened)
    training = session.training
    assert [step for step, _ in training.curve["loss"]] == list(range(1, STEPS + 1))
    assert training.curve["psnr"] == [(3, 23.0), (6, 26.0), (9, 29.0)]
    losses = [value for _, value in training.curve["loss"]]
    assert losses == sorted(losses, reverse=True)  # smoothed, it falls as the loss does
    assert losses[-1] > 1 / STEPS  # and later
    assert not dock.loss.isHidden()
    assert not dock.psnr.isHidden()
    assert list(dock.pictures.volumes) == ["start", "validation", "truth"]
    assert dock.pictures.step == 9
    assert dock.slice.maximum() == P - 1
    assert dock.pictures.index == P // 2
    dock.slice.setValue(1)
    assert dock.pictures.index == 1
    assert "+11.00 dB" in dock.verdict.text()
    assert "mine.safetensors" in dock.verdict.text()
    assert list(opened.viewer.layers) == []  # the viewer is the person's


def test_the_patch_is_shown_in_the_viewer_where_it_is_asked_for(opened, qtbot):
    dock, viewer = opened.dock, opened.viewer
    viewer.add_image(np.zeros((4, 4, 4)), name="mine")
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: dock.in_viewer.isEnabled(), timeout=10_000)
    press(qtbot, dock.in_viewer)
    assert [layer.name for layer in viewer.layers if layer.visible] == ["start", "trained", "truth"]
    assert viewer.canvas.grid.actual_shape(viewer.layers) == (1, 3)
    trained = viewer.layers["trained"]
    idle(qtbot, opened.session)
    assert trained.data is opened.worker.volumes["validation"]  # the very array, not a copy
    assert tuple(trained.contrast_limits) == tuple(viewer.layers["truth"].contrast_limits)
    viewer.layers.remove(trained)
    press(qtbot, dock.in_viewer)
    assert {layer.name for layer in viewer.layers if layer.visible} == {"start", "trained", "truth"}


def test_pausing_and_stopping_keep_the_best(opened, qtbot):
    dock, session = opened.dock, opened.session
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: "psnr" in session.training.curve, timeout=10_000)
    press(qtbot, dock.pause)
    assert session.state == "paused"
    assert dock.pause.text() == "Resume"
    press(qtbot, dock.pause)
    press(qtbot, dock.finish)
    idle(qtbot, session)
    assert "finished early" in dock.status.text()
    assert session.training.output == str(opened.output)
    assert dock.use.isEnabled()


def test_stopped_training_goes_on_unless_it_is_to_begin_anew(opened, qtbot):
    dock = opened.dock
    qtbot.waitUntil(lambda: "Needs about" in dock.memory.text(), timeout=10_000)
    assert dock.anew.isHidden()
    checkpoint_path(opened.output).write_bytes(b"a checkpoint")
    train(qtbot, opened)
    qtbot.waitUntil(lambda: not dock.anew.isHidden(), timeout=5000)
    dock.anew.setChecked(True)
    train(qtbot, opened)
    train(qtbot, opened)  # which was stopped, say
    assert [job.resume for job in opened.worker.jobs] == [True, False, True]


def test_a_cancelled_training_brings_the_last_one_back(opened, qtbot):
    dock, session = opened.dock, opened.session
    train(qtbot, opened)
    before = session.training
    press(qtbot, dock.run)
    qtbot.waitUntil(lambda: session.training is not before and "psnr" in session.training.curve, timeout=10_000)
    press(qtbot, dock.cancel)
    idle(qtbot, session)
    assert session.training is before
    assert dock.pictures.step == STEPS
    assert dock.use.isEnabled()


def test_what_goes_wrong_is_said_and_the_curves_stay(opened, qtbot):
    opened.worker.fail = "Training diverged at step 5: lower optimisation.learning_rate."
    train(qtbot, opened)
    assert ("error", opened.worker.fail) in opened.said
    assert opened.session.training.curve["psnr"] == [(3, 23.0)]
    assert not opened.dock.loss.isHidden()
    assert opened.dock.run.isEnabled()


def test_reconstructions_are_offered_the_weights(opened, qtbot):
    told = []
    opened.session.weights_file_changed.connect(lambda: told.append(opened.session.weights_file))
    train(qtbot, opened)
    press(qtbot, opened.dock.use)  # opens the dock
    assert told == [str(opened.output)]
    _, reconstruct = opened.viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    assert reconstruct.method.currentData() == "unrolled"
    assert reconstruct.forms[reconstruct.method.currentIndex()].values()["weights"] == str(opened.output)


def test_a_dock_closed_and_opened_again_shows_what_was_trained(opened, qtbot):
    viewer, session = opened.viewer, opened.session
    press(qtbot, opened.dock.run)
    qtbot.waitUntil(lambda: "psnr" in session.training.curve, timeout=10_000)
    viewer.window.remove_dock_widget(opened.dock)
    opened.dock.deleteLater()
    idle(qtbot, session)
    _, again = viewer.window.add_plugin_dock_widget("napari-recon", "Train")
    assert again is not opened.dock
    assert not again.loss.isHidden()
    assert "+11.00 dB" in again.verdict.text()


def test_the_dock_fits_beside_the_canvas(opened, qtbot):
    train(qtbot, opened)
    for part in opened.dock.sections:
        part.expand(animate=False)
    assert opened.dock.sizeHint().width() <= 420
    assert opened.dock.minimumSizeHint().width() <= 420
    assert opened.dock.widget().minimumSizeHint().width() <= 400
