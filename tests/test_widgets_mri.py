"""K-space in the docks: the same widgets, with what is MRI's."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PretendWorker
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QListView

from napari_recon.jobs.job import (
    MRI_REGULARIZATION,
    CoilMapsJob,
    DataConsistencyJob,
    OperatorJob,
    PADMMParameters,
    RegularizationJob,
    SENSEParameters,
)
from napari_recon.jobs.messages import Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.volumes import read_complex_volume
from napari_recon.scans.kspace import KSpaceScan
from napari_recon.widgets import reconstruct_dock
from napari_recon.widgets import session as session_module


class PretendMRI(PretendWorker):
    """Complex volumes, by magnitude and phase."""

    def tell(self, job):
        yield Stage("reading", job.scan.name)
        if isinstance(job, CoilMapsJob | DataConsistencyJob):
            yield from self.tell_of_coils(job)
            return
        if isinstance(job, RegularizationJob):
            told = {"suggestion": {"sentence": "τ = 0.0042 is a good one."}}
            yield Finished({"regularization": 0.0042}, 1.0, 10**9, None, True, told)
            return
        n, scale = self.size, (2.0, 1.0, 1.0)
        names = ["x"] if isinstance(job, OperatorJob) else ["zero-filled", "result"]
        for number, name in enumerate(names):
            for more in ("", " phase"):
                self.volumes[name + more] = np.full((n,) * 3, number + 1.0, np.float32)
                yield VolumeReady(name + more, (n,) * 3, scale, tuple(-(n - 1) / 2 * s for s in scale))
        self.volumes[f"{names[-1]} phase"][...] = 0.5
        yield Progress(names[-1], 1, 1, (slice(0, n),) * 3, None, 0.1, 0.0, {"residual": 0.1})
        yield Finished({"residual": 0.1}, 1.0, 10**9, None, True, {"napari_recon": "test"})

    def tell_of_coils(self, job):
        """What has an axis of coils: maps, or k-space beside the measured one."""
        shape, scale, at = (3, 10, 12, 14), (1.0, 2.0, 1.0, 1.0), (0.0, -9.0, -5.5, -6.5)
        names, figures = ["coil maps", "coil maps phase"], {}
        if isinstance(job, DataConsistencyJob):
            self.asked_for = read_complex_volume(job.volume)
            names = ["measured", "projected", "residual"]
            figures = {"residual": 0.05, "noise": 1.0, "residual_to_noise": 1.5}
            figures |= {"worst_coil": 2.5, "worst_coil_index": 2}
        else:
            yield Stage("estimating coil maps")
        for name in names:
            self.volumes[name] = np.full(shape, 0.5 if "maps" in name else -6.0, np.float32)
            yield VolumeReady(name, shape, scale, at, axis_labels=("coil", "z", "y", "x"))
        for coil in range(3 if figures else 0):
            self.volumes["projected"][coil] = -coil
            box = (slice(coil, coil + 1), *(slice(0, k) for k in shape[1:]))
            yield Progress("projected", coil + 1, 3, box, None, 0.1, 0.0, figures)
        yield Finished(figures, 1.0, 10**9, None, True, {"napari_recon": "test"})


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
    assert dock.check.isEnabled()
    assert not dock.volume.editors["voxel_size"].widget.isEnabled()
    assert "3 coils" in dock.subject.text()
    assert scan.show_projections.text() == "Show k-space"
    assert not scan.show_coil_maps.isHidden()
    assert scan.corrections.isHidden()
    assert not scan.coils_and_samples.isHidden()
    monkeypatch.setattr(session_module, "open_scan", lambda path, options=None: memory_scan)
    docks.session.open("ball.h5")
    qtbot.waitUntil(lambda: docks.session.scan is memory_scan, timeout=10_000)
    assert offered(dock) == ["fdk", "sirt", "tv", "padmm", "unrolled"]
    assert dock.padmm.values()["regularization"] == PADMMParameters.model_fields["regularization"].default
    assert dock.volume.editors["voxel_size"].widget.isEnabled()
    assert not scan.corrections.isHidden()
    assert scan.show_coil_maps.isHidden()


def test_k_space_mask_and_coil_images_become_layers(docks, qtbot):
    press(qtbot, docks.scan.show_projections)
    qtbot.waitUntil(lambda: len(docks.viewer.layers) == 3, timeout=10_000)
    layers = {layer.name.partition(": ")[2]: layer for layer in docks.viewer.layers}
    assert [name for name, layer in layers.items() if layer.visible] == ["k-space, log₁₀"]
    assert layers["sampling mask"].data.shape == (10, 12, 14)
    assert layers["coil images"].data.shape == (3, 10, 12, 14)
    assert tuple(layers["coil images"].scale) == (1.0, 2.0, 1.0, 1.0)
    assert float(layers["k-space, log₁₀"].data.max()) == 0.0
    # At the centre of k-space, which is not the middle of an even number of sites.
    assert docks.viewer.dims.current_step[1] == 5


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


def finished(qtbot, docks, jobs):
    qtbot.waitUntil(lambda: docks.session.state == "idle" and len(docks.worker.jobs) == jobs, timeout=10_000)


def ran(qtbot, docks):
    """A reconstruction, done."""
    qtbot.waitUntil(docks.dock.run.isEnabled, timeout=10_000)
    press(qtbot, docks.dock.run)
    finished(qtbot, docks, 1)


def test_a_second_run_keeps_one_zero_filled_volume_and_its_phase(docks, qtbot):
    ran(qtbot, docks)
    press(qtbot, docks.dock.run)
    finished(qtbot, docks, 2)
    names = [layer.name for layer in docks.viewer.layers]
    assert names == ["Zero-filled phase", "Zero-filled", "PADMM phase", "PADMM", "PADMM [1] phase", "PADMM [1]"]


def test_coil_maps_are_asked_of_the_process(docks, qtbot):
    titles = set()
    docks.session.stage_changed.connect(lambda _: titles.add(docks.scan.title.text()))
    for jobs in (1, 2):  # those of the second time take the place of the first
        press(qtbot, docks.scan.show_coil_maps)
        assert not docks.scan.show_coil_maps.isEnabled()
        finished(qtbot, docks, jobs)
    assert isinstance(docks.worker.jobs[0], CoilMapsJob)
    layers = {layer.name: layer for layer in docks.viewer.layers}
    assert list(layers) == ["head: coil maps, estimated phase", "head: coil maps, estimated"]
    assert [layer.visible for layer in layers.values()] == [False, True]
    assert tuple(layers["head: coil maps, estimated"].scale) == (1.0, 2.0, 1.0, 1.0)
    assert layers["head: coil maps, estimated"].axis_labels == ("coil", "z", "y", "x")
    assert any("estimating coil maps" in title for title in titles)
    assert "head" in docks.scan.title.text()


def test_a_complex_volume_is_checked_with_its_phase(docks, qtbot):
    ran(qtbot, docks)
    press(qtbot, docks.dock.check)
    finished(qtbot, docks, 2)
    # The magnitude of the result is 2 everywhere, its phase 0.5.
    np.testing.assert_allclose(docks.worker.asked_for, 2 * np.exp(0.5j), rtol=1e-5)
    shown = [layer for layer in docks.viewer.layers if layer.visible]
    assert [layer.name for layer in shown] == ["measured k-space", "k-space of PADMM", "residual of PADMM"]
    assert {tuple(layer.contrast_limits) for layer in shown} == {(-5.0, 0.0)}
    assert np.round(shown[0].world_to_data(docks.viewer.dims.point)[:2]).tolist() == [0, 5]
    assert "1.50 times the noise (at most 2.50 times, in coil 2)" in docks.dock.status.text()
    # The zero-filled volume where that, or its phase, is selected.
    for number, name in enumerate(("Zero-filled", "Zero-filled phase")):
        docks.viewer.layers.selection.active = docks.viewer.layers[name]
        press(qtbot, docks.dock.check)
        finished(qtbot, docks, 3 + number)
        np.testing.assert_allclose(np.abs(docks.worker.asked_for), 1, rtol=1e-5)


def test_a_volume_without_a_phase_is_told_not_to_do(docks, qtbot, monkeypatch):
    told = []
    monkeypatch.setattr(reconstruct_dock, "show_warning", told.append)
    press(qtbot, docks.dock.check)
    assert "no volume" in told[-1]
    docks.viewer.add_image(np.ones((10, 12, 14), np.float32), name="magnitudes")
    press(qtbot, docks.dock.check)
    assert told[-1].startswith("magnitudes ")
    assert "phase is missing" in told[-1]
    assert not docks.worker.jobs


def test_the_weight_of_total_variation_is_suggested_for_k_space(docks, qtbot):
    dock = docks.dock
    sense = dock.forms[reconstruct_dock.METHODS.index(SENSEParameters)]
    assert not [button for button in dock.suggest if sense.isAncestorOf(button)]  # whose weight is another
    (button,) = (button for button in dock.suggest if dock.padmm.isAncestorOf(button))
    press(qtbot, button)
    finished(qtbot, docks, 1)
    assert isinstance(docks.worker.jobs[0], RegularizationJob)
    assert dock.padmm.values()["regularization"] == 0.0042
    assert "τ = 0.0042" in dock.status.text()
