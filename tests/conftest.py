"""What tests of several rooms share: a scan in memory, and, for the docks, a process that only pretends."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from napari_recon.jobs.job import quiet_threads

# Tests draw into a real (virtual) screen: Qt's offscreen platform has no OpenGL.
os.environ.pop("QT_QPA_PLATFORM", None)
quiet_threads(os.environ)  # as the command line and the viewer's process do


def pytest_collection_modifyitems(config, items):
    """Windows come last; where there is no screen they are skipped, and told how to get one.

    Mesa's software OpenGL and triton, which deepinv brings in, each hold an LLVM of their own. Loading triton after
    OpenGL crashes the process, so whatever needs torch runs first. (A viewer never loads torch: its process does.) The
    same holds in each of several processes, to which the Makefile gives whole files in this order.
    """
    items.sort(key=lambda item: item.path.name.startswith("test_widgets"))
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    skip = pytest.mark.skip(reason="needs a screen: run under xvfb-run, as `make test` does")
    for item in items:
        if item.path.name.startswith("test_widgets"):
            item.add_marker(skip)


@pytest.fixture
def memory_scan():
    """A scan that lies in memory: 24 views of 20 x 30 pixels, a ball of 0.03/mm."""
    from napari_recon.scans.geometry import Geometry
    from napari_recon.scans.recording import ArrayFrames, Recording
    from napari_recon.scans.scan import Scan

    geometry = Geometry.cone(np.arange(24) * 15.0, (20, 30), 1.2, 66.0, 199.0)
    v, u = np.meshgrid(np.arange(20) - 9.5, np.arange(30) - 14.5, indexing="ij")
    chord = 0.03 * 2 * np.sqrt(np.maximum(0, 4.0**2 - (u**2 + v**2) * (1.2 / 3.015) ** 2))
    frames = np.repeat(chord[None].astype(np.float32), 24, axis=0)
    path = Path("ball.h5")
    return Scan(path, Recording("in memory", "ball", ArrayFrames(path, frames), geometry, values="line integrals"))


class PretendWorker:
    """Says what a worker would say, a message a poll, from a generator in this process."""

    def __init__(self, patch=8, size=16):
        self.patch, self.size = patch, size
        self.volumes = {}
        self.focused = []
        self.changes = []
        self.jobs = []
        self.state = "idle"
        self.closed = False
        self.started = False
        self.fail = None
        self.story = iter(())

    def start(self):
        self.started = True

    def close(self):
        self.closed = True

    def volume(self, name):
        return self.volumes[name]

    def submit(self, job):
        self.jobs.append(job)
        self.state = "running"
        self.story = self.tell(job)

    def pause(self):
        self.state = "paused"

    def resume(self):
        self.state = "running"

    def finish(self):
        self.state = "finishing"

    def cancel(self):
        self.state = "cancelling"

    def focus(self, point):
        self.focused.append(point)

    def change(self, settings):
        self.changes.append(settings)

    def poll(self):
        if self.state == "paused":
            return []
        message = next(self.story, None)
        return [] if message is None else [message]

    def tell(self, job):
        from napari_recon.jobs.messages import Cancelled, Failed, Finished, Notice, Progress, Stage, VolumeReady

        n, p = self.size, self.patch
        shift = (-(n - 1) / 2 * 0.5,) * 3
        truth = np.fromfunction(lambda z, y, x: np.hypot(np.hypot(z - n / 2, y - n / 2), x - n / 2) < n / 3, (n,) * 3)
        truth = (0.03 * truth).astype(np.float32)
        yield Stage("reading", job.scan.name)
        yield Notice("The air lies at 0.1: switch air normalisation on.")
        yield Stage("fdk")
        noise = np.random.default_rng(0).normal(0, 0.003, truth.shape)
        self.volumes["fdk"] = (truth + noise).astype(np.float32)
        yield VolumeReady("fdk", truth.shape, (0.5,) * 3, shift)
        self.volumes["result"] = self.volumes["fdk"].copy()
        yield Stage("reconstructing", job.parameters.method)
        yield VolumeReady("result", truth.shape, (0.5,) * 3, shift)
        boxes = [tuple(slice(i, i + p) for i in at) for at in itertools.product(range(0, n, p), repeat=3)]
        for step, box in enumerate(boxes, 1):
            if self.state == "cancelling":
                yield Cancelled()
                return
            if self.fail is not None and step == 4:
                yield Failed("killed", self.fail)
                return
            if self.state == "finishing":
                break
            self.volumes["result"][box] = truth[box]
            after = boxes[step] if step < len(boxes) else None
            yield Progress("result", step, len(boxes), box, after, 0.1 * step, 1.0, {"residual": 1 / step})
        complete = self.state != "finishing"
        yield Finished({"residual": 0.1}, 1.0, 10**9, None, complete, {"napari_recon": "test"})


@pytest.fixture
def pretend(monkeypatch):
    """Sessions get a process that only pretends; the fixture is the list of those made."""
    from napari_recon.widgets import session

    made = []

    def make():
        made.append(PretendWorker())
        return made[-1]

    monkeypatch.setattr(session, "make_worker", make)
    return made


@pytest.fixture
def said(monkeypatch):
    """What napari notified the person of: (severity, sentence)."""
    from napari_recon.widgets import scan_dock, session, train_dock

    heard = []
    for module in (session, scan_dock, train_dock):
        for name in ("show_error", "show_warning", "show_info"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda text, s=name: heard.append((s.removeprefix("show_"), text)))
    return heard
