"""Jobs of several reconstructions in a viewer: both halves of the views, and a sweep."""

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import Qt

from napari_recon.jobs.job import ReconstructionJob, ResolutionJob, SIRTParameters, SweepJob
from napari_recon.jobs.messages import Cancelled, Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.provenance import reconstruction_of
from napari_recon.widgets import session as session_module
from napari_recon.widgets.displays import told_by


class PretendParts(PretendWorker):
    """A volume of a value for each part; empty when it is announced."""

    names = ()

    def tell(self, job):
        n, at = self.size, (-(self.size - 1) / 2,) * 3
        for number, name in enumerate(self.names, 1):
            yield Stage("reconstructing", name)
            self.volumes[name] = np.zeros((n,) * 3, np.float32)
            yield VolumeReady(name, (n,) * 3, (1.0,) * 3, at)
            if self.state == "cancelling":
                yield Cancelled()
                return
            self.volumes[name][...] = number * np.linspace(0, 1, n, dtype=np.float32)
            yield Progress(name, 1, 1, (slice(0, n),) * 3, None, 0.1, 0.0, {"residual": 0.1})
            yield Progress("sweep", number, len(self.names), (), None, 0.1, 0.0, {"value": number})
        told = {"program": "test", "resolution": {"sentence": "Resolution: 1 mm."}}
        yield Finished({"best": 2.0}, 1.0, 10**9, None, True, told)


@pytest.fixture
def dock(make_napari_viewer, said, monkeypatch):
    worker = PretendParts()
    monkeypatch.setattr(session_module, "make_worker", lambda: worker)
    viewer = make_napari_viewer(strict_qt=True)
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.session.worker = worker
    return dock


@pytest.fixture
def session(dock):
    return dock.session


def run(session, job, names, qtbot):
    session.worker.names = names
    ended = []
    session.finished.connect(ended.append)
    session.run(job)
    return ended


JOBS = [
    (ResolutionJob(scan="ball.h5", parameters=SIRTParameters()), ["first half", "second half"], (1, 2)),
    (
        SweepJob(scan="ball.h5", parameters=SIRTParameters(), values=(1, 2, 4, 8, 16)),
        [f"iterations {n}" for n in (1, 2, 4, 8, 16)],
        (2, 3),
    ),
]


@pytest.mark.parametrize(("job", "names", "cells"), JOBS, ids=["halves", "sweep"])
def test_every_part_has_its_cell_its_name_and_its_job(session, qtbot, job, names, cells):
    ended = run(session, job, names, qtbot)
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    layers = list(session.viewer.layers)
    assert [layer.name for layer in layers] == [f"SIRT, {name}" for name in names]
    assert session.viewer.canvas.grid.enabled
    assert session.viewer.canvas.grid.shape == cells
    assert session.viewer.dims.ndisplay == 2
    assert len({tuple(layer.contrast_limits) for layer in layers}) == 1
    assert 0.8 < layers[0].contrast_limits[1] < 1.1  # the first one's
    made_by = [reconstruction_of(told_by(layer)) for layer in layers]
    assert all(isinstance(one, ReconstructionJob) for one in made_by)
    if isinstance(job, SweepJob):
        assert [one.parameters.iterations for one in made_by] == list(job.values)
        assert {one.options.binning for one in made_by} == {2}
    else:
        assert [one.options.half for one in made_by] == ["even", "odd"]


def test_the_dock_tells_the_resolution_of_what_its_forms_say(session, dock, memory_scan, monkeypatch, qtbot):
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    assert not dock.resolution.isEnabled()
    session.open("ball.h5")
    qtbot.waitUntil(lambda: session.scan is not None, timeout=10_000)
    dock.method.setCurrentIndex(dock.method.findData("sirt"))
    session.worker.names = ["first half", "second half"]
    ended = []
    session.finished.connect(ended.append)
    qtbot.mouseClick(dock.resolution, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    assert session.worker.jobs == [ResolutionJob(scan="ball.h5", parameters=SIRTParameters())]
    assert dock.status.text().startswith("Resolution: 1 mm")


def test_a_cancelled_sweep_leaves_the_viewer_as_it_was(session, qtbot):
    session.viewer.add_image(np.ones((4, 4, 4)), name="mine")
    job, names, _ = JOBS[1]
    ended = run(session, job, names, qtbot)
    qtbot.waitUntil(lambda: len(session.viewer.layers) == 3, timeout=20_000)
    session.cancel()
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    assert [(layer.name, layer.visible) for layer in session.viewer.layers] == [("mine", True)]
    assert not session.viewer.canvas.grid.enabled
