"""Synthetic anatomies, and scans that are simulated of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from scipy.ndimage import binary_erosion

from napari_recon.learning.anatomy import (
    FIELDS_OF_VIEW,
    KINDS,
    TISSUES,
    anatomy_grid,
    attenuation,
    make_anatomy,
    with_random_contrasts,
)
from napari_recon.learning.phantoms import make_phantom
from napari_recon.learning.simulate import circular_cone, jittered, scattered, simulate
from napari_recon.scans import Grid, ScanError, open_scan


@pytest.fixture(scope="module")
def anatomies():
    """One of every kind, fine enough that structures have an inside."""
    return {kind: make_anatomy(kind, 1, 64) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_an_anatomy_and_another_seed_another(kind):
    first, again, other = (make_anatomy(kind, seed, 24) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.volume, again.volume)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.abs(first.volume - other.volume).mean() > 0.05 * first.volume.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_physical(kind, anatomies):
    volume = anatomies[kind].volume
    assert volume.dtype == np.float32
    assert np.isfinite(volume).all()
    assert volume.min() >= 0
    assert 0.015 < volume.max() < 0.3
    air = (anatomies[kind].labels == 0).mean()
    assert 0.1 < air < 0.95  # the object is in the picture, with room about it


@pytest.mark.parametrize("kind", KINDS)
def test_labels_say_what_the_values_are_of(kind, anatomies):
    anatomy = anatomies[kind]
    assert set(np.unique(anatomy.labels)) == set(anatomy.names)
    checked = 0
    for label, name in anatomy.names.items():
        inside = binary_erosion(anatomy.labels == label, iterations=1 if kind == "foam" else 2, border_value=1)
        if inside.sum() < 200:
            continue  # too thin to have an inside free of partial volume
        low, high = attenuation(name, anatomy.energy_kev)
        mean = anatomy.volume[inside].mean()
        assert 0.94 * low <= mean <= 1.06 * high + 2e-4, (name, mean, low, high)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_object_on_a_finer_grid(kind, anatomies):
    fine = make_anatomy(kind, 1, 128).volume.reshape(64, 2, 64, 2, 64, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(fine.ravel(), anatomies[kind].volume.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_any_grid_shows_its_part_of_the_object(kind, anatomies):
    whole = anatomies[kind]
    box = (slice(20, 37), slice(9, 50), slice(30, 31))
    part = make_anatomy(kind, 1, grid=whole.grid.crop(box))
    assert part.volume.shape == (17, 41, 1)
    np.testing.assert_allclose(part.volume, whole.volume[box], atol=2e-4)
    assert (part.labels == whole.labels[box]).mean() > 0.995
    far = make_anatomy(kind, 1, grid=Grid((3, 4, 5), 1.0, (1e4, 0, 0)))
    assert set(np.unique(far.labels)) <= {0} or kind in ("thorax", "head", "limb")


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_voxels_of_any_size(kind, size):
    anatomy = make_anatomy(kind, 0, size)
    assert np.isfinite(anatomy.volume).all()
    # Coarse voxels hold the mass of fine ones: nothing tints the air.
    fine = make_anatomy(kind, 0, 48).volume
    assert anatomy.volume[0, 0, 0] < 1e-3 or size == 1
    assert anatomy.volume.mean() < 2 * fine.mean() or size == 1


def test_energies_change_contrasts_not_shapes():
    soft, hard = (make_anatomy("limb", 2, 32, energy_kev=energy) for energy in (40, 80))
    np.testing.assert_array_equal(soft.labels, hard.labels)
    names = {name: label for label, name in soft.names.items()}
    ratio = {
        name: soft.volume[soft.labels == names[name]].mean() / hard.volume[soft.labels == names[name]].mean()
        for name in ("muscle", "cortical bone")
    }
    assert 1.2 < ratio["muscle"] < ratio["cortical bone"]


@pytest.mark.parametrize("tissue", TISSUES)
def test_attenuation_falls_with_energy_and_is_tabulated(tissue):
    lows, highs = zip(*(attenuation(tissue, energy) for energy in (40, 50, 60, 70, 80)), strict=True)
    assert all(low <= high for low, high in zip(lows, highs, strict=True))
    assert list(lows) == sorted(lows, reverse=True)
    assert attenuation("water", 60)[0] == pytest.approx(0.0205, rel=0.01)


@pytest.mark.parametrize("kind", ["head", "thorax", "limb"])
def test_implants_are_of_metal(kind):
    plain, metal = (make_anatomy(kind, 0, 96, metal=m) for m in (False, True))
    label = TISSUES["titanium"].label
    assert label in metal.names
    assert label not in plain.names
    assert metal.volume.max() > max(0.2, plain.volume.max())


def test_what_cannot_be_made_is_one_sentence():
    with pytest.raises(ScanError, match=r"unicorn.*thorax"):
        make_anatomy("unicorn")
    with pytest.raises(ScanError, match="120 keV"):
        make_anatomy("head", size=8, energy_kev=120)
    with pytest.raises(ScanError, match="0 voxels"):
        make_anatomy("head", size=0)
    with pytest.raises(ScanError, match="gristle"):
        attenuation("gristle")


# -- scans of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "foam"])
def test_a_scan_holds_line_integrals_and_the_truth(kind, tmp_path):
    folder = simulate(kind, tmp_path / "s", size=24, views=8, seed=2, photons=None)
    scan = open_scan(folder)
    truth, labels = tifffile.imread(folder / "truth.tif"), tifffile.imread(folder / "labels.tif")
    grid = scan.default_grid()
    assert truth.shape == labels.shape == grid.shape == (24, 24, 24)
    assert grid.extent[0] == pytest.approx(FIELDS_OF_VIEW[kind])
    with tifffile.TiffFile(folder / "labels.tif") as tif:
        names = json.loads(tif.imagej_metadata["Info"])
    assert set(np.unique(labels)) <= {int(label) for label in names}
    # Seen from the front, a parallel sum of the truth and the cone's central rays agree where the cone is narrow.
    view = scan.projections()[0]
    middle = view[view.shape[0] // 2 - 1 : view.shape[0] // 2 + 1, view.shape[1] // 2 - 1 : view.shape[1] // 2 + 1]
    expected = truth.sum(axis=1)[11:13, 11:13] * grid.voxel_size
    assert middle.mean() == pytest.approx(expected.mean(), rel=0.1)
    assert max(view[:, 0].max(), view[:, -1].max()) < 0.02 * view.max()  # air at both sides


def test_noise_follows_the_dose(tmp_path):
    def scan(photons):
        return open_scan(simulate("shell", tmp_path / f"{photons}", size=24, views=8, photons=photons)).projections()

    clean = scan(None)
    for photons in (2000, 20_000):
        middle = np.s_[:, 4:-4, 8:-8]
        expected = np.sqrt(np.exp(clean[middle]) / photons)
        noise = (scan(photons) - clean)[middle] / expected
        assert 0.9 < noise.std() < 1.15
        assert abs(noise.mean()) < 0.15


def test_the_detectors_own_noise(tmp_path):
    quiet, loud = (
        open_scan(simulate("blobs", tmp_path / f"{n}", size=16, views=8, read_noise=n)).projections() for n in (0, 400)
    )
    assert loud[:, :, 0].std() > 1.5 * quiet[:, :, 0].std()


def test_beam_hardening_flattens_thick_parts(tmp_path):
    hard, mono = (
        open_scan(simulate("limb", tmp_path / f"{p}", size=24, views=6, photons=None, polychromatic=p)).projections()
        for p in (True, False)
    )
    thick, thin = mono > 0.8 * mono.max(), (mono > 0.05 * mono.max()) & (mono < 0.2 * mono.max())
    assert hard[thick].mean() / mono[thick].mean() < 0.99 * hard[thin].mean() / mono[thin].mean()


def test_scatter_adds_its_share_smoothly():
    phantom = make_phantom("walnut")
    geometry, _ = circular_cone(phantom, 32, 1)
    passed = np.exp(-phantom.project(geometry)[0].astype(float))
    haze = scattered(passed, 0.3)
    shadow = passed < 0.95
    assert haze[shadow].sum() == pytest.approx(0.3 * passed[shadow].sum())
    assert np.abs(np.diff(haze, axis=1)).max() < 0.2 * np.abs(np.diff(passed, axis=1)).max()
    assert not scattered(passed, 0).any()
    assert not scattered(np.ones((5, 6)), 0.5).any()


def test_scatter_darkens_nothing(tmp_path):
    clean, hazy = (
        open_scan(simulate("walnut", tmp_path / f"{f}", size=16, views=4, photons=None, scatter=f)).projections()
        for f in (0.0, 0.4)
    )
    assert hazy[clean > 0.5 * clean.max()].mean() < 0.9 * clean[clean > 0.5 * clean.max()].mean()


def test_jitter_moves_what_it_says():
    geometry, _ = circular_cone(make_phantom("walnut"), 16, 200)
    rng = np.random.default_rng(0)
    moved = jittered(geometry, rng, 0.5, 0.0)
    assert np.std(moved.vectors[:, :6] - geometry.vectors[:, :6]) == pytest.approx(0.5, rel=0.1)
    np.testing.assert_array_equal(moved.vectors[:, 6:], geometry.vectors[:, 6:])
    turned = jittered(geometry, rng, 0.0, 0.7)
    assert np.std(turned.angles - geometry.angles) == pytest.approx(0.7, rel=0.2)
    np.testing.assert_allclose(turned.source_detector, geometry.source_detector)
    np.testing.assert_allclose(turned.pixel_size, geometry.pixel_size)
    np.testing.assert_allclose((turned.u * turned.v).sum(1), 0, atol=1e-9)


def test_a_loose_scanner_writes_what_was_intended(tmp_path):
    firm, loose = (
        open_scan(simulate("blobs", tmp_path / f"{mm}", size=16, views=6, photons=None, jitter_mm=mm))
        for mm in (0.0, 1.0)
    )
    np.testing.assert_allclose(loose.geometry.vectors, firm.geometry.vectors)
    assert np.abs(loose.projections() - firm.projections()).max() > 0.01


def test_options_that_will_not_do(tmp_path):
    for options, word in (
        ({"scatter": -1}, "scatter"),
        ({"jitter_mm": float("nan")}, "jitter"),
        ({"polychromatic": True}, "thorax"),
        ({"metal": True}, "implants"),
    ):
        with pytest.raises(ScanError, match=word):
            simulate("walnut", tmp_path / "s", size=16, views=4, **options)
    with pytest.raises(ScanError, match="512"):
        simulate("head", tmp_path / "s", size=1000)
    with pytest.raises(ScanError, match="head"):
        simulate("teapot", tmp_path / "s", size=16, views=4)
    assert not (tmp_path / "s").exists()


def test_sample_anatomies_are_made_once(tmp_path, monkeypatch):
    import platformdirs

    from napari_recon.widgets.contributions import sample_path

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    path = sample_path("synthetic-head")
    made = (path / "truth.tif").stat().st_mtime_ns
    scan = open_scan(path)
    assert scan.geometry.views == 60
    assert scan.name == "synthetic-head"
    assert sample_path("synthetic-head") == path
    assert (path / "truth.tif").stat().st_mtime_ns == made


def test_the_sample_with_few_views_is_one_that_the_shipped_network_is_for(tmp_path, monkeypatch):
    import platformdirs

    from napari_recon.learning.weights import find_weights, outside_training, read_header
    from napari_recon.widgets.contributions import sample_path

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    scan = open_scan(sample_path("few-view-walnut"))
    assert not outside_training(read_header(find_weights("unrolled")).training, scan.geometry, scan.default_grid())


def test_anatomies_are_scanned_without_torch():
    """The viewer makes its samples itself, and must never load torch."""
    code = "import sys, napari_recon.learning.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_grid_of_a_kind_holds_it():
    assert anatomy_grid("head", 12).extent == (240.0, 240.0, 240.0)


def test_random_contrasts_keep_the_shapes():
    anatomy = make_anatomy("head", 3, size=24)
    found = with_random_contrasts(anatomy, 5)
    assert found.shape == anatomy.volume.shape
    assert found.dtype == np.float32
    assert np.array_equal(found, with_random_contrasts(anatomy, 5))
    assert not np.array_equal(found, with_random_contrasts(anatomy, 6))
    assert float(found.min()) >= 0
    air = anatomy.volume < 1e-3 * anatomy.volume.max()
    assert float(found[air].max()) < 0.01 * float(found.max())
    # Within a tissue it is a scaled copy but for a soft texture; between tissues it is not.
    label = np.bincount(anatomy.labels.ravel())[1:].argmax() + 1
    ratio = found[anatomy.labels == label] / anatomy.volume[anatomy.labels == label]
    assert ratio.std() < 0.2 * ratio.mean()
