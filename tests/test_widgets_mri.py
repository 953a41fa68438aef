"""K-space in the docks: the same widgets, with what is MRI's."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QListView

from napari_recon.jobs.job import MRI_REGULARIZATION, OperatorJob, PADMMParameters
from napari_recon.jobs.messages import Finished, Progress, Stage, VolumeReady
from napari_recon.scans.kspace import KSpaceScan
from napari_recon.widgets import session as session_module


class PretendMRI(PretendWorker):
    """Complex volumes, by magnitude and phase."""

    def tell(self, job):
        yield Stage("reading", job.scan.name)
        n, scale = self.size, (2.0, 1.0, 1.0)
        names = ["x"] if isinstance(job, OperatorJob) else ["zero-filled", "result"]
        for number, name in enumerate(names):
            for more in ("", " phase"):
                self.volumes[name + more] = np.full((n,) * 3, number + 1.0, np.float32)
                yield VolumeReady(name + more, (n,) * 3, scale, tuple(-(n - 1) / 2 * s for s in scale))
        self.volumes[f"{names[-1]} phase"][...] = 0.5
        yield Progress(names[-1], 1, 1, (slice(0, n),) * 3, None, 0.1, 0.0, {"residual": 0.1})
        yield Finished({"residual": 0.1}, 1.0, 10**9, None, True, {"napari_recon": "test"})


@pytest.fixture
def kspace(tmp_path):
    """A small scan of random samples, a half of them taken."""
    random = np.random.default_rng(0)
    samples = random.standard_normal((3, 10, 12, 14, 2)).view(np.complex128)[..., 0].astype(np.complex64)
    samples[:, 1::2, ::3] = 0
    np.save(tmp_path / "head.npy", samples)
    (tmp_path / "head.toml").write_text('axes = ["coil", "z", "y", "x"]\nvoxel_size = [2.0, 1.0, 1.0]\n')
    return tmp_path / "head.npy"


@pytest.fixture
def docks(make_napari_viewer, said, kspace, monkeypatch, qtbot):
    """Both docks with the scan open."""
    worker = PretendMRI()
    monkeypatch.setattr(session_module, "make_worker", lambda: worker)
    viewer = make_napari_viewer(strict_qt=True)
    _, scan = viewer.window.add_plugin_dock_widget("napari-recon", "Scan")
    _, dock = viewer.window.add_plugin_dock_widget("napari-recon", "Reconstruct")
    dock.session.open(kspace)
    qtbot.waitUntil(lambda: dock.session.scan is not None and dock.session.checks is not None, timeout=10_000)
    return SimpleNamespace(viewer=viewer, scan=scan, dock=dock, session=dock.session, worker=worker)


def press(qtbot, button):
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def offered(dock):
    rows = dock.method.view()
    assert isinstance(rows, QListView)
    return [dock.method.itemData(i) for i in range(dock.method.count()) if not rows.isRowHidden(i)]


def test_the_docks_offer_what_is_for_k_space(docks, memory_scan, monkeypatch, qtbot):
    dock, scan = docks.dock, docks.scan
    assert isinstance(docks.session.scan, KSpaceScan)
    assert offered(dock) == ["zero-filled", "sense", "padmm", "unrolled"]
    assert dock.method.currentData() == "padmm"
    assert dock.padmm.values()["regularization"] == MRI_REGULARIZATION
    assert not dock.check.isEnabled()
    assert not dock.volume.editors["voxel_size"].widget.isEnabled()
    assert "3 coils" in dock.subject.text()
    assert scan.show_projections.text() == "Show k-space"
    assert scan.corrections.isHidden()
    assert not scan.coils_and_samples.isHidden()
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    docks.session.open("ball.h5")
    qtbot.waitUntil(lambda: docks.session.scan is memory_scan, timeout=10_000)
    assert offered(dock) == ["fdk", "sirt", "tv", "padmm", "unrolled"]
    assert dock.padmm.values()["regularization"] == PADMMParameters.model_fields["regularization"].default
    assert dock.volume.editors["voxel_size"].widget.isEnabled()
    assert not scan.corrections.isHidden()


def test_k_space_mask_and_coil_images_become_layers(docks, qtbot):
    press(qtbot, docks.scan.show_projections)
    qtbot.waitUntil(lambda: len(docks.viewer.layers) == 3, timeout=10_000)
    layers = {layer.name.partition(": ")[2]: layer for layer in docks.viewer.layers}
    assert [name for name, layer in layers.items() if layer.visible] == ["k-space, log₁₀"]
    assert layers["sampling mask"].data.shape == (10, 12, 14)
    assert layers["coil images"].data.shape == (3, 10, 12, 14)
    assert tuple(layers["coil images"].scale) == (1.0, 2.0, 1.0, 1.0)
    assert float(layers["k-space, log₁₀"].data.max()) == 0.0


def test_undersampling_is_an_option_of_the_scan(docks, qtbot):
    docks.scan.kspace_options.editors["acceleration"].put(4.0)
    docks.scan._settle.start()
    qtbot.waitUntil(lambda: docks.session.scan.options.acceleration == 4.0, timeout=10_000)
    assert docks.dock.job().options.acceleration == 4.0


def test_magnitudes_are_shown_and_phases_wait(docks, qtbot):
    qtbot.waitUntil(docks.dock.run.isEnabled, timeout=10_000)
    press(qtbot, docks.dock.run)
    qtbot.waitUntil(lambda: docks.session.state == "idle" and len(docks.worker.jobs) == 1, timeout=10_000)
    layers = {layer.name: layer for layer in docks.viewer.layers}
    assert list(layers) == ["Zero-filled phase", "Zero-filled", "PADMM phase", "PADMM"]
    assert [name for name, layer in layers.items() if layer.visible] == ["Zero-filled", "PADMM"]
    assert tuple(layers["PADMM phase"].contrast_limits) == pytest.approx((-np.pi, np.pi))
    assert layers["PADMM"].colormap.name == "gray"
    assert docks.viewer.layers.selection.active is layers["PADMM"]
    layers["PADMM phase"].visible = True
    assert float(layers["PADMM phase"].data[3, 3, 3]) == 0.5
    assert tuple(layers["PADMM"].scale) == (2.0, 1.0, 1.0)
