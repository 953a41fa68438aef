"""Simulated k-space: deterministic, as noisy as stated, and true to its truth."""

import numpy as np
import pytest
import tifffile

from napari_recon.learning.anatomy import make_anatomy
from napari_recon.learning.simulate_mri import KINDS, simulate_mri, write_mri
from napari_recon.scans import open_scan
from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import to_image


@pytest.mark.parametrize("kind", ["head", "ellipsoids"])
def test_the_same_seed_is_the_same_scan(kind):
    first, again, other = (simulate_mri(kind, seed, 16, 3, coils=4) for seed in (1, 1, 2))
    assert np.array_equal(first.scan.kspace, again.scan.kspace)
    assert np.array_equal(first.scan.mask, again.scan.mask)
    assert not np.array_equal(np.abs(first.truth), np.abs(other.truth))
    assert not np.array_equal(first.scan.mask, other.scan.mask)


@pytest.mark.parametrize("kind", ["head", "vessels", "textured-walnut"])
def test_full_sampling_shows_the_truth(kind):
    simulated = simulate_mri(kind, 0, 16, 1, coils=5, snr=None)
    combined = (simulated.scan.coil_maps.conj() * to_image(simulated.scan.kspace)).sum(0)
    assert np.allclose(combined, simulated.truth, atol=1e-5)
    assert simulated.scan.mask.all()


def test_coil_maps_are_normalised_smooth_and_differ():
    simulated = simulate_mri("head", 0, 24, 2)
    maps, inside = simulated.scan.coil_maps, np.abs(simulated.truth) > 0.05 * np.abs(simulated.truth).max()
    assert np.allclose((np.abs(maps) ** 2).sum(0), 1, atol=1e-5)
    assert max(np.abs(np.gradient(maps, axis=axis))[:, inside].max() for axis in (1, 2, 3)) < 0.35
    columns = maps.reshape(len(maps), -1)
    overlap = (
        np.abs(columns @ columns.conj().T) / np.linalg.norm(columns, axis=1) / np.linalg.norm(columns, axis=1)[:, None]
    )
    assert (overlap - np.eye(len(maps))).max() < 0.9


@pytest.mark.parametrize("acceleration", [2.5, 5, 8])
def test_the_acceleration_is_met_and_the_centre_is_whole(acceleration):
    simulated = simulate_mri("ellipsoids", 0, 32, acceleration, coils=2)
    assert simulated.scan.mask.size / simulated.scan.mask.sum() == pytest.approx(acceleration, rel=0.05)
    assert min(simulated.scan.calibration) >= 8
    assert not simulated.scan.kspace[:, ~simulated.scan.mask].any()
    assert (simulated.scan.mask == simulated.scan.mask[:, :, :1]).all()


def test_noise_is_white_and_as_strong_as_stated():
    clean, noisy = (simulate_mri("ellipsoids", 3, 24, 2, coils=3, snr=snr) for snr in (None, 10))
    noise = (noisy.scan.kspace - clean.scan.kspace)[:, noisy.scan.mask]
    assert np.std(noise.real) == pytest.approx(noisy.noise, rel=0.05)
    assert np.std(noise.imag) == pytest.approx(noisy.noise, rel=0.05)
    bright = np.abs(noisy.truth)
    inside = bright > 0.05 * bright.max()
    assert bright[inside].mean() / noisy.noise == pytest.approx(10, rel=0.01)


def test_noise_and_coils_do_not_change_the_object():
    one, other = simulate_mri("head", 4, 16, 2, coils=4, snr=10), simulate_mri("head", 4, 16, 4, coils=8, snr=None)
    # Shading is the coils' doing.
    assert np.corrcoef(np.abs(one.truth).ravel(), np.abs(other.truth).ravel())[0, 1] > 0.95
    assert np.allclose(np.angle(one.truth * other.truth.conj())[np.abs(one.truth) > 0.01], 0, atol=1e-4)


def test_sequences_show_fluid_differently():
    one = make_anatomy("head", 0, 32).labels == 4
    t1, t2 = (np.abs(simulate_mri("head", 0, 32, 1, snr=None, weighting=w).truth) for w in ("T1", "T2"))
    assert t1[one].mean() / t1.mean() < t2[one].mean() / t2.mean()


def test_anatomies_hold_any_values():
    anatomy = make_anatomy("head", 0, 24, values={"white matter": 1.0})
    assert anatomy.volume.max() <= 1.2
    assert anatomy.volume[anatomy.labels == 9].mean() > 0.6
    assert np.array_equal(anatomy.labels, make_anatomy("head", 0, 24).labels)


@pytest.mark.parametrize("coil_maps", [False, True])
def test_what_is_written_opens_as_a_scan(tmp_path, coil_maps):
    path = write_mri("head", tmp_path / "scan", coil_maps=coil_maps, seed=1, size=16, acceleration=3, coils=4)
    simulated, scan = simulate_mri("head", 1, 16, 3, coils=4), open_scan(path)
    assert np.array_equal(scan.kspace, simulated.scan.kspace)
    assert np.array_equal(scan.mask, simulated.scan.mask)
    assert scan.voxel_size == simulated.scan.voxel_size
    assert np.array_equal(tifffile.imread(scan.truth), np.abs(simulated.truth))
    assert (scan.coil_maps is not None) == coil_maps


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ScanError, match="not an empty folder"):
        write_mri("head", tmp_path, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "options", [{"kind": "brain"}, {"size": 4}, {"coils": 0}, {"snr": -1.0}, {"weighting": "T3"}, {"acceleration": 0.5}]
)
def test_what_cannot_be_simulated_is_said(options):
    with pytest.raises(ScanError):
        simulate_mri(**{"size": 16, **options})


def test_heads_and_phantoms_are_all_there():
    assert "head" in KINDS
    assert "ellipsoids" in KINDS
