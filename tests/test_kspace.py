"""K-space: the same scan from every format, what is done to it, and what is said about bad files."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.scans import KSpaceOptions, KSpaceScan, ScanError, ScanOptions, open_scan
from napari_recon.scans.kspace import (
    coil_compression,
    combine_coils,
    remove_oversampling,
    root_sum_of_squares,
    to_image,
    to_kspace,
    whitening,
)
from napari_recon.scans.sampling import calibration_size, sampling_mask

MEASURED = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "mri"
needs_data = pytest.mark.skipif(not MEASURED.is_dir(), reason="the measured data is not at ../shared/data/mri")


def noise(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


# -- writers ------------------------------------------------------------------------------------------------------
# Each takes (coils, slices, y, x) as measured slice by slice, or (coils, z, y, x) for 3D, and gives what to open.


def write_npy(folder, kspace, three_d=False, more="", name="scan"):
    np.save(folder / f"{name}.npy", kspace)
    (folder / f"{name}.toml").write_text(f'axes = ["coil", "{"z" if three_d else "slice"}", "y", "x"]\n{more}')
    return folder / f"{name}.npy"


def write_bart(folder, kspace, three_d=False, name="scan"):
    coils, d, h, w = kspace.shape
    dims = [w, h, d if three_d else 1, coils] + [1] * 12
    dims[13] = 1 if three_d else d
    (folder / f"{name}.hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    # Column-major: x runs fastest, slices slowest.
    (kspace if three_d else kspace.transpose(1, 0, 2, 3)).astype(np.complex64).tofile(folder / f"{name}.cfl")
    return folder / f"{name}.cfl"


def write_fastmri(folder, kspace, mask=None, header=None, name="fast"):
    path = folder / f"{name}.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace.transpose(1, 0, 2, 3)
        if mask is not None:
            file["mask"] = mask
        if header is not None:
            file["ismrmrd_header"] = header
    return path


def header(matrix, field_of_view, kept=None, centre=None, trajectory="cartesian"):
    """An ISMRMRD header; matrix, field of view and centre as (z, y, x)."""

    def space(name, n, fov):
        def triple(values):
            return "".join(f"<{a}>{v}</{a}>" for a, v in zip("xyz", values[::-1], strict=True))

        return f"<{name}><matrixSize>{triple(n)}</matrixSize><fieldOfView_mm>{triple(fov)}</fieldOfView_mm></{name}>"

    kept = kept or matrix[2]
    recon = (*field_of_view[:2], field_of_view[2] * kept / matrix[2])
    cz, cy = centre or (matrix[0] // 2, matrix[1] // 2)
    limits = "".join(
        f"<kspace_encoding_step_{k}><minimum>0</minimum><maximum>{n - 1}</maximum><center>{c}</center>"
        f"</kspace_encoding_step_{k}>"
        for k, n, c in ((1, matrix[1], cy), (2, matrix[0], cz))
    )
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions>'
        "<H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
        + space("encodedSpace", matrix, field_of_view)
        + space("reconSpace", (*matrix[:2], kept), recon)
        + f"<encodingLimits>{limits}</encodingLimits><trajectory>{trajectory}</trajectory></encoding></ismrmrdHeader>"
    )


def write_acquisitions(path, xml, lines):
    """ISMRMRD through its own package; a line is its samples (coils, x) and what its header says."""
    with ismrmrd.Dataset(str(path), "dataset", True) as dataset:
        dataset.write_xml_header(xml.encode())
        for samples, told in lines:
            told = dict(told)
            line = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples, np.complex64))
            line.center_sample = told.pop("center_sample", samples.shape[1] // 2)
            line.sample_time_us = told.pop("sample_time_us", 5.0)
            for flag in told.pop("flags", ()):
                line.setFlag(flag)
            for name in ("position", "slice_dir"):
                if name in told:
                    getattr(line, name)[:] = told.pop(name)
            for name, value in told.items():
                setattr(line.idx, name, value)
            dataset.append_acquisition(line)
    return path


def write_ismrmrd(folder, kspace, three_d=False, kept=None, fov=None, lines=(), name="mrd"):
    _, d, h, w = kspace.shape
    matrix = (d if three_d else 1, h, w)
    counter = "kspace_encode_step_2" if three_d else "slice"
    measured = [
        (kspace[:, z, y], {counter: z, "kspace_encode_step_1": y})
        for z in range(d)
        for y in range(h)
        if kspace[:, z, y].any()
    ]
    xml = header(matrix, fov or tuple(float(n) for n in matrix), kept)
    return write_acquisitions(folder / f"{name}.h5", xml, [*lines, *measured])


@pytest.fixture
def slices():
    """Three slices of three coils, every second line beside the middle ones."""
    kspace = noise((3, 3, 14, 12))
    mask = np.zeros(14, bool)
    mask[::2] = mask[5:9] = True
    return kspace * mask[:, None]


@pytest.fixture
def volume():
    """3D, 4 coils, fully sampled, strongest in the middle."""
    return to_kspace(noise((4, 6, 16, 12), 1) + 3)


# -- one scan, four formats ---------------------------------------------------------------------------------------


def same(scans):
    first = scans[0]
    for scan in scans[1:]:
        assert scan.kspace.shape == first.shape
        np.testing.assert_array_equal(scan.mask, first.mask, err_msg=scan.format)
        np.testing.assert_allclose(scan.kspace, first.kspace, atol=1e-6 * np.abs(first.kspace).max())
        images = [root_sum_of_squares(s.kspace) for s in (scan, first)]
        np.testing.assert_allclose(*images, atol=1e-6 * images[1].max(), err_msg=scan.format)
        assert scan.calibration == first.calibration
        assert scan.kind == "mri"


def test_slices_are_the_same_from_every_format(tmp_path, slices):
    files = [write(tmp_path, slices) for write in (write_npy, write_fastmri, write_ismrmrd)]
    files.append(write_bart(tmp_path, slices, name="bart"))
    scans = [open_scan(f) for f in files]
    assert [s.format for s in scans] == [".npy", "fastMRI", "ISMRMRD", "BART"]
    same(scans)
    # 3D is a change of basis across the slices: the images are those of each slice by itself.
    np.testing.assert_allclose(to_image(scans[0].kspace), to_image(slices, (2, 3)), atol=1e-5)
    assert scans[0].mask[:, 0].all()
    assert not scans[0].mask[:, 1].any()
    assert scans[0].acceleration == pytest.approx(14 / np.count_nonzero(slices[0, 0, :, 0]))


def test_3d_is_the_same_from_every_format_that_has_it(tmp_path, volume):
    rng = np.random.default_rng(2)
    volume = volume * (rng.random((6, 16, 1)) < 0.6)
    files = [write_npy(tmp_path, volume, True), write_ismrmrd(tmp_path, volume, True)]
    files.append(write_bart(tmp_path, volume, True, name="bart"))
    scans = [open_scan(f) for f in files]
    same(scans)
    np.testing.assert_allclose(scans[0].kspace, volume)


@needs_data
def test_the_brain_is_the_same_from_every_format(tmp_path):
    kspace = np.load(MEASURED / "sigpy_brain8ch_cartesian_ksp.npy")
    np.save(tmp_path / "brain.npy", kspace)
    (tmp_path / "brain.toml").write_text('axes = ["coil", "y", "x"]')
    stack = kspace[:, None]
    files = [tmp_path / "brain.npy", MEASURED / "derived_brain8ch_fastmri_like.h5"]
    files += [write_ismrmrd(tmp_path, stack), write_bart(tmp_path, stack, name="bart")]
    scans = [open_scan(f) for f in files]
    same(scans)
    assert scans[0].shape == (8, 1, 230, 180)
    assert scans[0].acceleration == pytest.approx(8, rel=0.05)
    assert scans[0].calibration == (1, 24, 24)
    assert not any(s.checks() for s in scans)
    assert scans[2].readout is None  # a slice through 3D: both directions were phase-encoded


@needs_data
def test_a_measured_phantom():
    scan = open_scan(MEASURED / "derived_gre_ismrmrd.h5")
    assert scan.shape == (2, 1, 160, 160)  # 320 samples a line, read out twice as finely as needed
    assert scan.mask.all()
    assert scan.voxel_size == pytest.approx((5.0, 1.6, 1.6))
    image = root_sum_of_squares(scan.kspace)[0]
    assert image[40:120, 40:120].mean() > 5 * image[:10, :10].mean()
    assert scan.checks() == []


# -- oversampling, geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [8, 7, 5])
def test_removing_oversampling_crops_the_image(kept):
    kspace = noise((2, 3, 5, 16))
    less = remove_oversampling(kspace, 3, kept)
    start = 8 - kept // 2
    np.testing.assert_allclose(to_image(less), to_image(kspace)[..., start : start + kept], atol=1e-5)


def test_every_format_removes_oversampling(tmp_path):
    kspace = noise((2, 1, 10, 16))
    cropped = to_image(kspace)[..., 4:12]
    scans = [open_scan(write_npy(tmp_path, kspace, more="oversampling = 2\n"))]
    scans.append(open_scan(write_ismrmrd(tmp_path, kspace, kept=8)))
    for scan in scans:
        assert scan.shape == (2, 1, 10, 8)
        np.testing.assert_allclose(to_image(scan.kspace), cropped, atol=1e-5)
        assert scan.mask.all()
    # fastMRI's readout runs along H.
    turned = kspace.transpose(0, 1, 3, 2)
    scan = open_scan(write_fastmri(tmp_path, turned, header=header((1, 10, 16), (4.0, 20.0, 64.0), 8)))
    np.testing.assert_allclose(to_image(scan.kspace), cropped.transpose(0, 1, 3, 2), atol=1e-5)
    assert scan.voxel_size == pytest.approx((4.0, 4.0, 2.0))


def test_a_partial_echo_stays_one_without_oversampling(tmp_path):
    kspace = noise((2, 1, 6, 32))
    kspace[..., :8] = 0
    scan = open_scan(write_npy(tmp_path, kspace, more="oversampling = 2\n"))
    assert not scan.mask[..., :4].any()
    assert scan.mask[..., 4:].all()
    assert not scan.kspace[..., :4].any()


def test_voxels_need_not_be_cubes(tmp_path, volume):
    scan = open_scan(write_npy(tmp_path, volume, True, "voxel_size = [4.0, 1.0, 2.0]\n"))
    grid = scan.grid
    assert grid.shape == (6, 16, 12)
    assert grid.scale == pytest.approx((4.0, 1.0, 2.0))
    assert grid.extent == pytest.approx((24.0, 16.0, 24.0))
    assert grid.translate == pytest.approx((-10.0, -7.5, -11.0))
    part = grid.crop((slice(2, 4), slice(3, 8), slice(0, 5)))
    assert part.scale == grid.scale
    assert part.translate == pytest.approx((-10 + 2 * 4, -7.5 + 3, -11.0))
    assert grid.resampled(shape=(3, 8, 6)).scale == pytest.approx((8.0, 2.0, 4.0))
    assert scan.default_grid() == grid
    assert "voxel size" not in scan.notes


def test_an_unknown_voxel_size_is_said(tmp_path, volume):
    scan = open_scan(write_bart(tmp_path, volume, True))
    assert scan.voxel_size == (1.0, 1.0, 1.0)
    assert "taken as 1 mm" in scan.notes["voxel size"]
    assert "assumed" in scan.summary()["Voxel size"]


# -- what scanners do ---------------------------------------------------------------------------------------------


def test_slices_measured_interleaved_are_put_in_order(tmp_path):
    kspace = noise((2, 4, 6, 8))
    lines = []
    for counted, place in enumerate((0, 2, 1, 3)):
        told = {"slice": counted, "position": (0, 0, 5.0 * place), "slice_dir": (0, 0, 1)}
        lines += [(kspace[:, place, y], told | {"kspace_encode_step_1": y}) for y in range(6)]
    path = write_acquisitions(tmp_path / "a.h5", header((1, 6, 8), (3.0, 6.0, 8.0)), lines)
    scan = open_scan(path)
    np.testing.assert_allclose(to_image(scan.kspace), to_image(kspace, (2, 3)), atol=1e-5)
    assert scan.voxel_size == pytest.approx((5.0, 1.0, 1.0))  # with the gaps between slices of 3 mm


def test_lines_find_their_places(tmp_path):
    """Averages, backward lines, a centre that is not in the middle, asymmetric echoes, other contrasts."""
    kspace = noise((2, 1, 8, 10))
    row = {"kspace_encode_step_1": 0}  # with the centre at step 2, this is row 4 - 2
    lines = [
        (2 * kspace[:, 0, 2], row),
        (np.zeros_like(kspace[:, 0, 2]), row | {"average": 1}),
        (kspace[:, 0, 3, ::-1], {"kspace_encode_step_1": 1, "flags": [ismrmrd.ACQ_IS_REVERSE]}),
        (kspace[:, 0, 4, 3:], {"kspace_encode_step_1": 2, "center_sample": 2}),
        (kspace[:, 0, 4], {"kspace_encode_step_1": 2, "contrast": 1}),
        (kspace[:, 0, 5], {"kspace_encode_step_1": 3, "flags": [ismrmrd.ACQ_IS_NAVIGATION_DATA]}),
    ]
    scan = open_scan(write_acquisitions(tmp_path / "a.mrd", header((1, 8, 10), (1.0, 8.0, 10.0), None, (0, 2)), lines))
    expected = np.zeros_like(kspace)
    expected[:, :, 2:4] = kspace[:, :, 2:4]
    expected[:, :, 4, 3:] = kspace[:, :, 4, 3:]
    np.testing.assert_allclose(scan.kspace, expected)
    np.testing.assert_array_equal(scan.mask, expected.any(axis=0))
    assert scan.notes["contrast"] == "first of 2"


def test_calibration_lines_count_where_they_belong_to_the_image(tmp_path):
    kspace = noise((2, 1, 8, 10))
    lines = [(kspace[:, 0, y], {"kspace_encode_step_1": y}) for y in range(0, 8, 2)]
    lines.append((kspace[:, 0, 5], {"kspace_encode_step_1": 5, "flags": [ismrmrd.ACQ_IS_PARALLEL_CALIBRATION]}))
    xml = header((1, 8, 10), (1.0, 8.0, 10.0))
    said = (
        "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>"
        "<kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor>"
        "<calibrationMode>embedded</calibrationMode></parallelImaging></encoding>"
    )
    for number, (text, rows) in enumerate(
        [(xml, [0, 2, 4, 6]), (xml.replace("</encoding>", said), [0, 2, 4, 5, 6])],
    ):
        scan = open_scan(write_acquisitions(tmp_path / f"{number}.h5", text, lines))
        assert np.flatnonzero(scan.mask[0, :, 0]).tolist() == rows
        assert ("calibration lines" in scan.notes) == (number == 0)


def test_the_noise_scan_whitens(tmp_path, volume):
    mixing = np.array([[2, 0, 0, 0], [1, 1, 0, 0], [0, 1j, 3, 0], [0, 0, 0, 0.5]])
    samples = (mixing @ noise((4, 500), 3)).astype(np.complex64)
    told = {"flags": [ismrmrd.ACQ_IS_NOISE_MEASUREMENT], "sample_time_us": 5.0}
    path = write_ismrmrd(tmp_path, volume, True, lines=[(samples[:, :250], told), (samples[:, 250:], told)])
    scan = open_scan(path)
    np.testing.assert_allclose(scan.noise, samples, rtol=1e-5)
    white = scan.coil_matrix @ samples
    np.testing.assert_allclose(white @ white.conj().T / 500, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(scan.kspace, combine_coils(whitening(samples), volume), atol=1e-3)
    np.testing.assert_allclose(open_scan(path, prewhiten=False).kspace, volume, atol=1e-5)
    assert "prewhitened" in scan.summary()["Corrections"]


def test_noise_of_another_bandwidth_is_scaled(tmp_path, volume):
    told = {"flags": [ismrmrd.ACQ_IS_NOISE_MEASUREMENT], "sample_time_us": 20.0}
    samples = noise((4, 64))
    scan = open_scan(write_ismrmrd(tmp_path, volume, True, lines=[(samples, told)]))
    np.testing.assert_allclose(scan.noise, 2 * samples, rtol=1e-5)  # a quarter of the bandwidth, half the noise


# -- coils --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coils", [1, 3, 8])
def test_whitened_noise_has_the_identity_as_covariance(coils):
    rng = np.random.default_rng(coils)
    samples = (rng.normal(size=(coils, coils)) @ noise((coils, 400), coils)).astype(np.complex64)
    white = whitening(samples) @ samples
    np.testing.assert_allclose(white @ white.conj().T / 400, np.eye(coils), atol=1e-3)


def test_compression_to_all_coils_loses_nothing(volume):
    kspace = combine_coils(coil_compression(volume, 4), volume)
    assert np.linalg.norm(kspace) == pytest.approx(np.linalg.norm(volume), rel=1e-5)
    np.testing.assert_allclose(root_sum_of_squares(kspace), root_sum_of_squares(volume), rtol=1e-4)
    energy = (np.abs(kspace) ** 2).sum(axis=(1, 2, 3))
    assert (np.diff(energy) <= 0).all()


def test_compression_finds_the_coils_that_matter(volume):
    copies = np.concatenate([volume[:2], 2 * volume[:1] - 1j * volume[1:2]])
    kspace = combine_coils(coil_compression(copies, 2), copies)
    np.testing.assert_allclose(root_sum_of_squares(kspace), root_sum_of_squares(copies), rtol=1e-3)


def test_coil_maps_follow_the_coils(tmp_path):
    maps, image = noise((4, 3, 8, 8), 5), noise((3, 8, 8), 6)
    np.save(tmp_path / "maps.npy", maps)
    np.save(tmp_path / "noise.npy", noise((4, 100), 7))
    more = 'coil_maps = "maps.npy"\nnoise = "noise.npy"\n'
    path = write_npy(tmp_path, to_kspace(maps * image), True, more)
    np.testing.assert_allclose(open_scan(path, prewhiten=False).coil_maps, maps)
    scan = open_scan(path, coils=3)
    assert scan.shape == scan.kspace.shape == (3, 3, 8, 8)
    np.testing.assert_allclose(to_kspace(scan.coil_maps * image), scan.kspace, atol=1e-4)
    assert scan.summary()["Coils"] == "3 virtual of 4"


def test_measurements_are_those_of_deepinvs_physics(tmp_path, volume):
    import torch
    from deepinv.physics import MultiCoilMRI

    rng = np.random.default_rng(2)
    volume = volume * (rng.random((6, 16, 1)) < 0.6)
    scan = open_scan(write_npy(tmp_path, volume, True))
    y = scan.measurements()
    assert y.shape == (1, 2, 4, 6, 16, 12)
    assert y.dtype == torch.float32
    mask = torch.from_numpy(scan.mask.astype(np.float32))
    physics = MultiCoilMRI(mask=mask, coil_maps=torch.ones((4, *scan.mask.shape), dtype=torch.complex64), three_d=True)
    real, imaginary = physics.A_adjoint(y)[0].numpy()
    expected = to_image(scan.kspace).sum(axis=0)  # the maps are one
    np.testing.assert_allclose(real + 1j * imaginary, expected, atol=1e-4 * np.abs(expected).max())


# -- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poisson", "gaussian"])
@pytest.mark.parametrize("shape", [(24, 24, 6), (16, 40, 3), (1, 64, 5)])
@pytest.mark.parametrize("acceleration", [1, 1.5, 5, 10])
def test_patterns_meet_the_acceleration(kind, shape, acceleration):
    mask = sampling_mask(shape, acceleration, kind, seed=3)
    assert mask.shape == shape
    assert (mask == mask[..., :1]).all()  # whole readout lines
    lines = shape[0] * shape[1]
    assert abs(mask[..., 0].sum() - lines / acceleration) <= 0.5  # a line is not halved
    np.testing.assert_array_equal(mask, sampling_mask(shape, acceleration, kind, seed=3))
    assert acceleration == 1 or (mask != sampling_mask(shape, acceleration, kind, seed=4)).any()


def test_poisson_discs_keep_their_distance_and_thin_out():
    mask = sampling_mask((64, 64, 1), 8, "poisson", calibration=8)[..., 0]
    neighbours = sum(np.roll(mask, shift, axis) & mask for shift in (1, -1) for axis in (0, 1))
    outside = np.ones_like(mask)
    outside[24:40, 24:40] = False
    outside[0], outside[-1], outside[:, 0], outside[:, -1] = False, False, False, False
    assert not neighbours[outside].any()
    y, x = np.indices(mask.shape) - 32
    r = np.hypot(y, x)
    assert mask[(r > 8) & (r < 16)].mean() > 1.5 * mask[r > 28].mean()


def test_the_centre_is_found_as_it_was_made():
    for size in (5, 8, 11):
        mask = sampling_mask((32, 32, 4), 4, "poisson", calibration=size, seed=1)
        d, h, w = calibration_size(mask)
        assert size <= d <= size + 2
        assert size <= h <= size + 2
        assert w == 4
    assert calibration_size(np.zeros((4, 4, 4), bool)) == (0, 0, 0)
    assert calibration_size(np.ones((1, 7, 6), bool)) == (1, 7, 6)


def test_full_k_space_can_be_made_sparse(tmp_path, volume):
    path = write_npy(tmp_path, volume, True)
    full = open_scan(path)
    assert full.mask.all()
    sparse = full.with_options(acceleration=4, calibration=3, seed=1)
    assert sparse.acceleration == pytest.approx(4, rel=0.05)
    np.testing.assert_array_equal(sparse.kspace, full.kspace * sparse.mask)
    assert min(sparse.calibration) >= 3
    assert (sparse.measurements()[0, :, :, ~sparse.mask] == 0).all()
    assert "undersampled" in sparse.summary()["Corrections"]


def test_slices_leave_out_the_same_lines(tmp_path):
    scan = open_scan(write_npy(tmp_path, noise((2, 5, 24, 8))), acceleration=3)
    assert (scan.mask == scan.mask[:1]).all()
    assert scan.acceleration == pytest.approx(3, rel=0.05)
    fast = open_scan(write_fastmri(tmp_path, noise((2, 2, 8, 24))), acceleration=3)
    assert (fast.mask == fast.mask[:, :1]).all()  # the readout runs along H


# -- opening ------------------------------------------------------------------------------------------------------


def test_opening_reads_no_samples(tmp_path, slices):
    mask = slices[0, 0, :, 0] != 0
    for path in (write_fastmri(tmp_path, slices, mask=mask[:, None]), write_ismrmrd(tmp_path, slices)):

        def refuse():
            raise AssertionError("read")

        scan = open_scan(path)
        scan = replace(scan, recording=replace(scan.recording, read=refuse))
        assert "2 slices" in scan.summary()["Encoding"] or "3 slices" in scan.summary()["Encoding"]
        assert scan.acceleration > 1


def test_a_mask_of_columns(tmp_path):
    """As fastMRI's test sets give it: one entry a column."""
    mask = np.arange(12) % 3 == 0
    scan = open_scan(write_fastmri(tmp_path, noise((2, 3, 14, 12)) * mask, mask=mask.astype(np.float32)))
    np.testing.assert_array_equal(scan.mask, np.broadcast_to(mask, (3, 14, 12)))
    assert scan.readout == 1


def test_sidecars_headers_and_folders_open_their_samples(tmp_path, slices):
    path = write_npy(tmp_path, slices)
    for where in (path, path.with_suffix(".toml"), tmp_path):
        assert open_scan(where).format == ".npy"
    folder = tmp_path / "bart"
    folder.mkdir()
    path = write_bart(folder, slices)
    for where in (path, path.with_suffix(".hdr"), folder):
        assert open_scan(where).format == "BART"
    path.with_suffix(".toml").write_text("voxel_size = 2.0\n")
    assert open_scan(path).voxel_size == (2.0, 2.0, 2.0)


def test_the_options_say_what_is_expected(tmp_path, slices):
    path = write_npy(tmp_path, slices)
    assert isinstance(open_scan(path, KSpaceOptions(coils=2)), KSpaceScan)
    sentence(path, "k-space", "not X-ray", options=ScanOptions())


def test_info_tells_what_matters(tmp_path, volume):
    path = write_npy(tmp_path, volume, True, "voxel_size = [4.0, 1.0, 2.0]\n")
    run = CliRunner().invoke(app, ["info", str(path), "--json"])
    told = json.loads(run.stdout)
    assert told["kind"] == "mri"
    assert (told["coils"], told["matrix"]) == (4, [6, 16, 12])
    assert told["voxel_size"] == [4.0, 1.0, 2.0]
    assert told["calibration"] == [6, 16, 12]
    text = CliRunner().invoke(app, ["info", str(path)]).stdout
    for part in (".npy", "6 x 16 x 12", "fully sampled", "4 x 1 x 2 mm"):
        assert part in text
    refused = CliRunner().invoke(app, ["info", str(path), "--views", "3"])
    assert refused.exit_code == 2
    assert "views" in refused.stderr


# -- bad input ----------------------------------------------------------------------------------------------------


def sentence(path, *parts, **options):
    """Opening and reading raises a ScanError of one sentence with these parts in it."""

    def attempt():
        scan = open_scan(path, **options)
        _ = scan.mask, scan.coil_maps, scan.kspace

    with pytest.raises(ScanError) as caught:
        attempt()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    for part in parts:
        assert part in text, text


def test_an_array_without_a_sidecar(tmp_path):
    np.save(tmp_path / "a.npy", noise((2, 4, 4)))
    sentence(tmp_path / "a.npy", "a.toml", 'axes = ["coil", "y", "x"]', "voxel_size")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["'axes' is missing"]),
        ('axes = ["coil", "y"]', ["axes"]),
        ('axes = ["y", "x"]', ["names 2 axes", "has 4", "3 x 3 x 14 x 12"]),
        ('axes = ["coil", "y", "x", "time"]', ["axes"]),
        ('axes = ["coil", "slice", "z", "x"]', ["axes"]),
        ('axis = ["coil", "slice", "y", "x"]', ["'axis'", "did you mean 'axes'?"]),
        ('axes = ["coil", "slice", "y", "x"]\noversampling = 0.5', ["oversampling", "1 or more"]),
        ('axes = ["coil", "slice", "y", "x"]\nvoxel_size = -1.0', ["voxel size", "positive"]),
        ('axes = ["coil", "slice", "y", "x"]\nmask = "m.npy"', ["m.npy", "does not exist", "'mask'"]),
        ("axes = [", ["not valid TOML"]),
    ],
)
def test_wrong_sidecars(tmp_path, slices, text, parts):
    path = write_npy(tmp_path, slices)
    path.with_suffix(".toml").write_text(text)
    sentence(path, *parts)


def test_wrong_arrays(tmp_path, slices):
    sentence(write_npy(tmp_path, slices.real), "float32", "complex")
    path = write_npy(tmp_path, slices)
    path.write_bytes(path.read_bytes()[:-100])
    sentence(path, "scan.npy", "truncated")
    slices[1, 0, 0, 0] = np.nan
    sentence(write_npy(tmp_path, slices), "coil 1", "NaN")
    sentence(write_npy(tmp_path, 0 * np.nan_to_num(slices)), "zeros only")


def test_slices_that_are_sampled_differently(tmp_path, slices):
    slices[:, 1] = np.roll(slices[:, 1], 1, axis=1)
    for write in (write_npy, write_ismrmrd):
        path = write(tmp_path, slices)
        sentence(path, "slice 1", "other places", "slice = 1")
        scan = open_scan(path, slice=1)
        assert scan.shape == (3, 1, 14, 12)
        np.testing.assert_allclose(scan.kspace[:, 0], slices[:, 1])
        assert scan.summary()["Encoding"] == "Cartesian, slice 1 of 3"


def test_files_beside_that_do_not_fit(tmp_path, slices):
    np.save(tmp_path / "b.npy", np.ones((2, 4, 4)))
    sentence(write_npy(tmp_path, slices, more='mask = "b.npy"'), "mask", "(2, 4, 4)")
    sentence(write_npy(tmp_path, slices, more='coil_maps = "b.npy"'), "b.npy", "3 axes")
    sentence(write_npy(tmp_path, slices, more='noise = "b.npy"'), "noise scan", "3 coils")
    np.save(tmp_path / "b.npy", np.zeros((3, 2, 14, 12), complex))
    sentence(write_npy(tmp_path, slices, more='coil_maps = "b.npy"'), "coil maps", "(3, 3, 14, 12)")
    np.save(tmp_path / "b.npy", noise((3, 2)))
    sentence(write_npy(tmp_path, slices, more='noise = "b.npy"'), "2 samples", "prewhiten")
    np.save(tmp_path / "b.npy", np.ones((3, 1)) * noise((1, 50)))
    sentence(write_npy(tmp_path, slices, more='noise = "b.npy"'), "singular", "prewhiten")


def test_options_that_ask_too_much(tmp_path, slices):
    path = write_npy(tmp_path, slices)
    sentence(path, "3 coils", "5 were asked for", coils=5)
    sentence(path, "acceleration of 1.2", acceleration=1.2)
    sentence(path, "acceleration", acceleration=0.5)
    sentence(path, "'views'", "coils", views=3)
    sentence(path, "slice 2 at most", slice=3)
    sentence(write_bart(tmp_path, slices, True, name="bart"), "no stack of slices", slice=0)
    with pytest.raises(ScanError, match="fixes the image"):
        open_scan(path).default_grid(shape=(8, 8, 8))


def test_bad_fastmri(tmp_path, slices):
    sentence(write_fastmri(tmp_path, slices.real), "kspace", "complex")
    sentence(write_fastmri(tmp_path, slices, mask=np.ones(5)), "mask", "(5,)")
    sentence(write_fastmri(tmp_path, slices, header="<a/>"), "header", "convert")
    path = write_fastmri(tmp_path, slices)
    path.write_bytes(path.read_bytes()[:3000])
    sentence(path, "damaged or truncated")


def test_bad_ismrmrd(tmp_path):
    line = (noise((2, 8)), {"kspace_encode_step_1": 3})
    xml = header((1, 6, 8), (1.0, 6.0, 8.0))

    def refused(xml, lines, *parts, path=tmp_path / "a.h5"):
        path.unlink(missing_ok=True)
        sentence(write_acquisitions(path, xml, lines), "a.h5", *parts)

    refused("no header", [line], "header", "convert")
    refused(xml.replace("cartesian", "spiral"), [line], "spiral", "Cartesian")
    refused(xml, [(noise((2, 8)), {"kspace_encode_step_1": 6})], "encoding steps", "1 x 6 x 8")
    refused(xml, [(noise((2, 8)), {"flags": [ismrmrd.ACQ_IS_NOISE_MEASUREMENT]})], "no lines of an image")
    refused(xml, [line, (noise((3, 8)), {"kspace_encode_step_1": 2})], "2, 3 coils")


def test_bad_bart(tmp_path, slices):
    path = write_bart(tmp_path, slices)
    text = path.with_suffix(".hdr").read_text()
    path.with_suffix(".hdr").write_text("# Dimensions\nmany\n")
    sentence(path, "scan.hdr", "second line")
    path.with_suffix(".hdr").write_text(text)
    path.write_bytes(path.read_bytes()[:-8])
    sentence(path, "scan.cfl", "truncated")
    path.with_suffix(".hdr").unlink()
    sentence(path, "scan.hdr beside it")


def test_what_looks_wrong_is_said(tmp_path, volume):
    assert open_scan(write_npy(tmp_path, volume, True)).checks() == []
    shifted = np.fft.ifftshift(volume, (1, 2, 3))
    assert any("not near the middle" in s for s in open_scan(write_npy(tmp_path, shifted, True)).checks())
    dead = volume.copy()
    dead[2] = 0
    assert any("No signal in coil 2" in s for s in open_scan(write_npy(tmp_path, dead, True)).checks())
    holes = volume.copy()
    holes[:, ::2] = 0
    assert any("fully sampled centre" in s for s in open_scan(write_npy(tmp_path, holes, True)).checks())
