"""The jobs about the normal operator: the fit seen beside AᵀA, gradient steps on a patch, and the figure."""

import json

import numpy as np
import pytest
import torch

from napari_recon.jobs import Control, OperatorJob, PatchJob, ReconstructionJob, run_job
from napari_recon.jobs.figure import operator_figure
from napari_recon.jobs.job import FDKParameters, FitParameters, TVParameters
from napari_recon.jobs.memory import plan_memory, readable
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, Stage, VolumeReady
from napari_recon.jobs.operator import filter_images, patch_box, region_errors
from napari_recon.jobs.stages import Prepared
from napari_recon.jobs.volumes import write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.physics import NormalOperator, XRayTransform
from napari_recon.scans import Grid, open_scan

SHAPE = (13, 16, 18)  # no axis like another, and one whose padding is more than its double
FIT = FitParameters(probes=3, iterations=1, positions=2)
VOLUMES = ["x", "mask", "filter", "exact", "approximate", "error", "regions"]


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=20, views=24, seed=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An operator cache of the test's own."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def make_job(scan, **fields):
    return OperatorJob(scan=scan, **{"shape": SHAPE, "parameters": FIT, "device": "cpu", **fields})


def run(job, control=None, prepared=None):
    """All messages of a job that must finish, and its control."""
    control = control or Control()
    messages = list(run_job(job, control, prepared))
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages, control


def sentence(message):
    assert isinstance(message, Failed), message
    assert message.kind == "input"
    assert message.text.endswith(".")
    assert "\n" not in message.text
    return message.text


def of(kind, messages):
    return [m for m in messages if isinstance(m, kind)]


def run_until(stream, wanted):
    for message in stream:
        if wanted(message):
            return message
    raise AssertionError("the job ended first")


def physics_of(scan, shape=SHAPE):
    return XRayTransform.from_scan(open_scan(scan), shape, device="cpu")


@pytest.fixture(scope="module")
def fitted(scan, tmp_path_factory):
    """An operator file, with the messages and volumes of the job that made it."""
    file = tmp_path_factory.mktemp("operators") / "h.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        import platformdirs

        patch.setattr(platformdirs, "user_cache_path", lambda name: file.parent / name)
        messages, control = run(make_job(scan, output=file))
    return file, messages, control.volumes


# -- the operator job ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        OperatorJob(scan="somewhere", parameters=FIT, volume="x.npy", output="h.safetensors"),
        PatchJob(scan="somewhere", operator="h.safetensors", center=(1, 2.5, 3)),
    ],
    ids=["operator", "patch"],
)
def test_a_job_survives_json(job):
    assert type(job).model_validate_json(job.model_dump_json()) == job


def test_a_fit_tells_its_story_in_order(scan, fitted):
    file, messages, volumes = fitted
    finished = messages[-1]
    assert finished.complete
    assert finished.output == str(file)
    assert OperatorJob.model_validate(finished.provenance["job"]) == make_job(scan, output=file)
    stages = list(dict.fromkeys(m.name for m in of(Stage, messages)))
    fitting = "fitting the normal operator"
    assert stages == ["reading", "fdk", fitting, "applying AᵀA", "applying H", "writing"]
    assert [m.name for m in of(VolumeReady, messages)] == VOLUMES
    for message in of(VolumeReady, messages):
        assert message.shape == volumes[message.name].shape
        assert len(message.scale) == len(message.translate) == len(message.axis_labels) == len(message.shape)
        assert np.isfinite(volumes[message.name]).all()
    steps = [m for m in of(Progress, messages) if m.name == "mask"]
    assert [m.step for m in steps] == sorted(m.step for m in steps)
    assert steps[-1].step == steps[-1].total
    told = [m.figures for m in steps if m.figures]
    assert len(told) >= 2
    assert all({"loss", "held_out", "image", "seconds"} <= figures.keys() for figures in told)
    wanted = {"relative_error", "white", "image", "fit_seconds", "seconds_exact", "seconds_approximate", "worst_region"}
    assert wanted <= finished.figures.keys()
    assert all(np.isfinite(value) for value in finished.figures.values())


def test_what_is_shown_is_what_it_says(scan, fitted):
    file, messages, volumes = fitted
    physics = physics_of(scan)
    x = torch.from_numpy(volumes["x"])[None, None]
    exact, approximate = physics.A_adjoint_A(x), NormalOperator.load(file, physics)(x)
    np.testing.assert_allclose(volumes["exact"], exact[0, 0], rtol=1e-4)
    np.testing.assert_allclose(volumes["approximate"], approximate[0, 0], rtol=1e-3, atol=1e-5 * exact.max())
    np.testing.assert_allclose(volumes["error"], (volumes["exact"] - volumes["approximate"]) ** 2, rtol=1e-5)
    difference = float((exact - approximate).norm() / exact.norm())
    assert messages[-1].figures["relative_error"] == pytest.approx(difference, rel=1e-3)
    assert 0 < difference < 0.5
    regions = volumes["regions"]
    assert messages[-1].figures["worst_region"] == pytest.approx(regions.max())
    assert regions.min() <= difference <= regions.max()


def test_the_first_operator_is_seen_and_the_next_ones_replace_it_in_place(scan):
    control, seen = Control(), []
    for message in run_job(make_job(scan), control):
        if isinstance(message, VolumeReady) and message.name == "mask":
            first = control.volumes["mask"]
        if isinstance(message, Progress) and message.name == "mask" and message.figures:
            assert control.volumes["mask"] is first
            seen.append((first.copy(), control.volumes["filter"].copy()))
    assert len(seen) >= 2
    assert all((a != b).any() for a, b in zip(seen[0], seen[-1], strict=True))


def test_a_file_is_shown_as_it_was_when_it_was_fitted(scan, fitted):
    file, before, volumes = fitted
    messages, control = run(make_job(scan, operator=str(file)))
    for name in VOLUMES:
        np.testing.assert_array_equal(control.volumes[name], volumes[name])
    assert messages[-1].output == str(file)

    def curve(told):
        return [m.figures for m in of(Progress, told) if m.name == "mask" and m.figures and "white" not in m.figures]

    assert [row["loss"] for row in curve(messages)] == [row["loss"] for row in curve(before)]
    for name in ("white", "image", "relative_error", "fit_seconds"):
        assert messages[-1].figures[name] == pytest.approx(before[-1].figures[name])


def test_a_file_of_another_scan_or_none_is_refused(scan, fitted, tmp_path):
    job = make_job(scan, operator=str(fitted[0]), options={"views": 12})
    assert "another scan" in sentence(list(run_job(job))[-1])
    (tmp_path / "notes.safetensors").write_text("hello")
    for name in ("nothing.safetensors", "notes.safetensors"):
        for wanted in (
            make_job(scan, operator=str(tmp_path / name)),
            PatchJob(scan=scan, shape=SHAPE, operator=str(tmp_path / name), center=(1, 2, 3), device="cpu"),
        ):
            assert name in sentence(list(run_job(wanted))[-1])


def kept(messages):
    """Whether the operator was one made before."""
    return any("made before" in m.detail for m in of(Stage, messages))


def test_the_same_fit_is_not_made_twice(scan, cache):
    first, before = run(make_job(scan))
    (file,) = cache.rglob("*.safetensors")
    assert first[-1].output == str(file)
    assert not kept(first)
    again, after = run(make_job(scan))
    assert kept(again)
    assert again[-1].output == str(file)
    for name in VOLUMES:
        np.testing.assert_array_equal(before.volumes[name], after.volumes[name])
    for other in (
        make_job(scan, parameters=FIT.model_copy(update={"probes": 2})),
        make_job(scan, seed=1),
        make_job(scan, options={"views": 12}),
    ):
        assert not kept(run(other)[0])
    assert len(list(cache.rglob("*.safetensors"))) == 4


def test_a_damaged_fit_is_made_again(scan, cache):
    run(make_job(scan))
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    messages, _ = run(make_job(scan))
    assert not kept(messages)
    NormalOperator.load(file, physics_of(scan))


def test_the_fit_of_a_reconstruction_is_another_one(scan, cache):
    run(make_job(scan))
    run(ReconstructionJob(scan=scan, shape=SHAPE, parameters=TVParameters(iterations=1, patch=8), device="cpu"))
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_the_fit_just_made_is_kept_however_large_it_is(scan, cache, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.stages._KEEP_BYTES", 1)
    run(make_job(scan))
    messages, _ = run(make_job(scan, seed=1))
    assert [str(file) for file in cache.rglob("*.safetensors")] == [messages[-1].output]


def is_first_figure(message):
    return isinstance(message, Progress) and message.name == "mask" and bool(message.figures)


def test_finish_keeps_the_operator_so_far_and_still_shows_it(scan, cache):
    control = Control()
    stream = run_job(make_job(scan, parameters=FIT.model_copy(update={"iterations": 100})), control)
    run_until(stream, is_first_figure)
    control.finish()
    rest = list(stream)
    finished = rest[-1]
    assert isinstance(finished, Finished)
    assert not finished.complete
    assert not [m for m in of(Progress, rest) if m.figures]
    assert set(control.volumes) == set(VOLUMES)
    operator = NormalOperator.load(finished.output, physics_of(scan))
    assert operator.history
    np.testing.assert_array_equal(operator.spatial_mask.abs(), control.volumes["mask"])
    # What was not fitted to its end is not taken for a fit the next time.
    assert finished.output.endswith("-partial.safetensors")
    assert not kept(run(make_job(scan))[0])


def test_finish_before_there_is_an_operator_waits_for_the_first(scan):
    control = Control()
    stream = run_job(make_job(scan, parameters=FIT.model_copy(update={"iterations": 100})), control)
    next(stream)
    control.finish()
    finished = list(stream)[-1]
    assert isinstance(finished, Finished)
    assert not finished.complete
    assert set(control.volumes) == set(VOLUMES)


@pytest.mark.parametrize("stage", ["fdk", "fitting the normal operator", "applying AᵀA", "applying H", "writing"])
def test_cancel_leaves_nothing(scan, tmp_path, stage):
    control, prepared = Control(), Prepared()
    stream = run_job(make_job(scan, output=tmp_path / "h.safetensors"), control, prepared)
    run_until(stream, lambda m: isinstance(m, Stage) and m.name == stage)
    control.cancel()
    assert isinstance(list(stream)[-1], Cancelled)
    assert not control.volumes
    assert not prepared.things
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_outputs_that_will_not_do_are_refused_at_once(scan, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("h.tif", "nowhere/h.safetensors", "folder.safetensors"):
        messages = list(run_job(make_job(scan, output=tmp_path / name)))
        sentence(messages[-1])
        assert len(messages) == 2


def test_a_cache_that_cannot_be_written_is_told(scan, cache):
    cache.write_text("no folder")
    control = Control()
    assert "give an output" in sentence(list(run_job(make_job(scan), control))[-1])
    assert set(control.volumes) == set(VOLUMES)  # seen all the same


# -- seen on a volume of one's own -----------------------------------------------------------------------------------


def test_a_volume_of_ones_own_is_brought_onto_the_grid(scan, fitted, tmp_path):
    grid = open_scan(scan).default_grid(SHAPE)
    x = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    write_volume(tmp_path / "x.tif", x, grid)
    coarse = Grid((7, 8, 9), 2 * grid.voxel_size, grid.center)
    write_volume(tmp_path / "coarse.tif", np.ones(coarse.shape, np.float32), coarse)
    for name in ("x.npy", "x.tif", "coarse.tif"):
        messages, control = run(make_job(scan, operator=str(fitted[0]), volume=tmp_path / name))
        assert [m.name for m in of(Stage, messages)][:2] == ["reading", "reading the volume"]
        assert control.volumes["x"].shape == SHAPE
        if name != "coarse.tif":
            np.testing.assert_array_equal(control.volumes["x"], x)
    assert control.volumes["x"][6, 8, 9] == pytest.approx(1)


def test_volumes_that_tell_nothing_are_refused(scan, fitted, tmp_path):
    np.save(tmp_path / "empty.npy", np.zeros(SHAPE, np.float32))
    np.save(tmp_path / "nan.npy", np.full(SHAPE, np.nan, np.float32))
    np.save(tmp_path / "flat.npy", np.ones((4, 4), np.float32))
    np.save(tmp_path / "complex.npy", np.ones(SHAPE, np.complex64))
    np.save(tmp_path / "other.npy", np.ones((3, 4, 5), np.float32))
    for path in [*tmp_path.glob("*.npy"), tmp_path / "nothing.tif"]:
        job = make_job(scan, operator=str(fitted[0]), volume=path)
        assert "volume" in sentence(list(run_job(job))[-1])


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_the_map_of_regions_agrees_with_its_definition_and_has_no_nan():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(5, 9, 17)).astype(np.float32)
    exact[:2, :3, :4] = 0  # a region with nothing to be relative to
    error = (exact - rng.normal(size=exact.shape)).astype(np.float32) ** 2
    blocks = (1, 3, 4)
    found = region_errors(exact, error, blocks)
    assert found.shape == (5, 3, 5)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    block = slice(4, 5), slice(3, 6), slice(16, 17)
    direct = np.sqrt(error[block].sum() / (exact[block].astype(float) ** 2).sum())
    assert found[4, 1, 4] == pytest.approx(direct, rel=1e-5)
    rms = np.sqrt(np.mean(exact.astype(float) ** 2))
    assert found[0, 0, 0] == pytest.approx(np.sqrt(error[:1, :3, :4].mean()) / rms, rel=1e-5)
    assert not region_errors(np.zeros((3, 3, 3), np.float32), np.zeros((3, 3, 3), np.float32), (1, 1, 1)).any()


def test_regions_lie_where_their_voxels_do(fitted):
    ready = {m.name: m for m in of(VolumeReady, fitted[1])}
    whole, regions = ready["exact"], ready["regions"]
    for axis, n in enumerate(SHAPE):
        block = -(-n // 8)
        assert regions.shape[axis] == -(-n // block)
        assert regions.scale[axis] == pytest.approx(block * whole.scale[axis])
        # The lower edge of the first region is that of the first voxel.
        low = regions.translate[axis] - regions.scale[axis] / 2
        assert low == pytest.approx(whole.translate[axis] - whole.scale[axis] / 2)


@pytest.mark.parametrize("parameters", [{}, {"symmetric": False, "real_filter": False}, {"terms": 3}], ids=str)
def test_the_filter_is_the_kernels_spectrum_about_frequency_zero(scan, parameters):
    messages, control = run(make_job(scan, parameters=FIT.model_copy(update={**parameters, "iterations": 0})))
    operator = NormalOperator.load(messages[-1].output)
    kernels = operator.kernel().numpy().reshape(operator.terms, *(2 * n - 1 for n in SHAPE)).astype(float)
    names = [m.name for m in of(VolumeReady, messages) if m.name.startswith("filter")]
    assert names == ["filter", "filter 2", "filter 3"][: operator.terms]
    (ready, *_) = [m for m in of(VolumeReady, messages) if m.name == "filter"]
    assert (ready.units, ready.axis_labels) == ("1/mm", ("f_z", "f_y", "f_x"))
    size = open_scan(scan).default_grid(SHAPE).voxel_size
    spectra = []
    for kernel in kernels:
        spectrum = kernel.astype(complex)
        for axis, n in enumerate(SHAPE):
            # The definition: the sum over offsets at the frequencies that the volume's layer names, in 1/mm.
            f = ready.translate[axis] + ready.scale[axis] * np.arange(n)
            offsets = np.arange(-(n - 1), n) * size
            spectrum = np.moveaxis(
                np.tensordot(np.exp(-2j * np.pi * np.outer(f, offsets)), spectrum, (1, axis)), 0, axis
            )
        spectra.append(np.abs(spectrum))
    for name, spectrum in zip(names, spectra, strict=True):
        shown = control.volumes[name]
        assert shown.shape == SHAPE
        assert shown.min() >= -4
        np.testing.assert_allclose(shown, np.log10(np.maximum(spectrum / spectra[0].max(), 1e-4)), atol=2e-2)
    for axis, n in enumerate(SHAPE):
        assert ready.translate[axis] + (n // 2) * ready.scale[axis] == pytest.approx(0)


def test_the_filter_is_symmetric_about_frequency_zero_and_highest_on_its_axis(fitted):
    shown = fitted[2]["filter"]
    assert shown.max() == 0
    assert np.unravel_index(shown.argmax(), SHAPE)[1:] == tuple(n // 2 for n in SHAPE[1:])
    odd = shown[:, 1:, 1:]  # of an even number the lowest frequency has no opposite
    np.testing.assert_allclose(odd, odd[::-1, ::-1, ::-1], atol=1e-3)


def test_a_complex_filter_and_a_slice_can_be_shown():
    """As magnetic resonance has them: the full spectrum; and a fan beam: one slice."""
    shape = (1, 6, 8)
    kernel = torch.zeros((1, 12, 16), dtype=torch.complex64)
    kernel[0, 0, 0], kernel[0, 1, -1] = 2, 1j
    operator = NormalOperator(torch.ones(shape, dtype=torch.complex64), torch.fft.fftn(kernel))
    (shown,) = filter_images(operator)
    fy, fx = np.meshgrid(np.arange(-3, 3) / 6, np.arange(-4, 4) / 8, indexing="ij")
    expected = np.abs(2 + 1j * np.exp(-2j * np.pi * (fy - fx)))
    np.testing.assert_allclose(shown[0], np.log10(expected / expected.max()), atol=1e-5)


# -- the patch job ---------------------------------------------------------------------------------------------------


def patch_job(scan, file, **fields):
    given = {"shape": SHAPE, "operator": str(file), "center": (6, 8, 9), "patch": 8, "steps": 4, "device": "cpu"}
    return PatchJob(scan=scan, **{**given, **fields})


PATCHES = ["patch exact", "patch approximate", "patch difference"]


def test_steps_on_a_patch_tell_their_story(scan, fitted):
    messages, control = run(patch_job(scan, fitted[0]))
    assert [m.name for m in of(Stage, messages)] == ["reading", "fdk", "stepping"]
    assert [m.name for m in of(VolumeReady, messages)] == PATCHES
    grid = open_scan(scan).default_grid(SHAPE)
    for message in of(VolumeReady, messages):
        assert message.shape == control.volumes[message.name].shape == (5, 8, 8, 8)
        assert message.scale == pytest.approx((1, *[grid.voxel_size] * 3))
        assert message.translate == pytest.approx((0, *grid.crop(patch_box((6, 8, 9), 8, SHAPE)).translate))
        assert message.axis_labels == ("step", "z", "y", "x")
    steps = of(Progress, messages)
    assert [(m.name, m.step, m.total) for m in steps] == [("patch exact", k, 4) for k in range(1, 5)]
    assert [(m.box[0].start, m.box[0].stop) for m in steps] == [(k, k + 1) for k in range(1, 5)]
    finished = messages[-1]
    assert finished.complete
    assert finished.output is None
    assert finished.figures == steps[-1].figures
    assert finished.figures.keys() == {"difference", "seconds_exact", "seconds_approximate", "speedup"}
    assert 0 < finished.figures["difference"] < 0.5
    assert PatchJob.model_validate(finished.provenance["job"]) == patch_job(scan, fitted[0])


def test_both_go_down_the_gradient_from_the_fdk(scan, fitted):
    _, control = run(patch_job(scan, fitted[0]))
    other = Control()
    run(ReconstructionJob(scan=scan, shape=SHAPE, parameters=FDKParameters(), device="cpu"), other)
    box, fdk = patch_box((6, 8, 9), 8, SHAPE), torch.from_numpy(other.volumes["fdk"])[None, None]
    exact, approximate, difference = (control.volumes[name] for name in PATCHES)
    np.testing.assert_array_equal(exact[0], fdk[0, 0][box])
    np.testing.assert_array_equal(approximate[0], exact[0])
    np.testing.assert_allclose(difference, exact - approximate, atol=1e-7)
    # Exactly: every step is one of gradient descent on the data term of the whole volume, the rest held still.
    physics, y = physics_of(scan), open_scan(scan).measurements("cpu")
    x = fdk.clone()
    for k in range(1, 5):
        x[(..., *box)] -= (physics.A_adjoint(physics.A(x) - y) / physics.sqnorm)[(..., *box)]
        np.testing.assert_allclose(exact[k], x[0, 0][box], atol=1e-4 * float(fdk.abs().max()))


def test_where_h_is_exact_nothing_differs(scan, fitted, monkeypatch):
    physics = physics_of(scan)

    class Exact:
        def __init__(self, box):
            self.apply = physics.restrict(box).A_adjoint_A

    monkeypatch.setattr(NormalOperator, "patch", lambda self, box: Exact(box))
    messages, control = run(patch_job(scan, fitted[0]))
    assert messages[-1].figures["difference"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(control.volumes["patch difference"], 0, atol=1e-6)


@pytest.mark.parametrize("center", [(-5, 0, 0), (12, 15, 17), (100, 8, -3.6)])
def test_a_patch_beyond_the_border_is_moved_inside(scan, fitted, center):
    box = patch_box(center, 14, SHAPE)
    assert all(0 <= s.start < s.stop <= n for s, n in zip(box, SHAPE, strict=True))
    assert [s.stop - s.start for s in box] == [13, 14, 14]
    _, control = run(patch_job(scan, fitted[0], center=center, patch=14, steps=1))
    assert control.volumes["patch exact"].shape == (2, 13, 14, 14)


def test_a_patch_inside_is_about_its_center():
    assert patch_box((10, 20.4, 30), 9, (64, 64, 64)) == (slice(6, 15), slice(16, 25), slice(26, 35))


def test_a_second_patch_starts_at_once(scan, fitted, monkeypatch):
    from napari_recon.scans import Scan

    prepared = Prepared()
    run(patch_job(scan, fitted[0]), prepared=prepared)
    monkeypatch.setattr(Scan, "measurements", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(NormalOperator, "load", lambda *_: pytest.fail("loaded again"))
    monkeypatch.setattr(XRayTransform, "A", lambda *_: pytest.fail("projected again"))
    run(patch_job(scan, fitted[0], center=(2, 2, 2)), prepared=prepared)


def test_an_operator_file_that_changed_is_read_again(scan, fitted, tmp_path):
    file, prepared = tmp_path / "h.safetensors", Prepared()
    file.write_bytes(fitted[0].read_bytes())
    _, before = run(patch_job(scan, file), prepared=prepared)
    operator = NormalOperator.load(file)
    NormalOperator(0.5 * operator.spatial_mask, operator.fourier_filter).save(file, physics_of(scan))
    _, after = run(patch_job(scan, file), prepared=prepared)
    np.testing.assert_array_equal(before.volumes["patch exact"], after.volumes["patch exact"])
    assert (before.volumes["patch approximate"] != after.volumes["patch approximate"]).any()


def test_finish_keeps_the_steps_so_far_and_cancel_none(scan, fitted):
    for order, last in (("finish", Finished), ("cancel", Cancelled)):
        control = Control()
        stream = run_job(patch_job(scan, fitted[0], steps=200), control)
        run_until(stream, lambda m: isinstance(m, Progress) and m.step == 2)
        getattr(control, order)()
        rest = list(stream)
        assert isinstance(rest[-1], last)
        assert not of(Progress, rest)
        if last is Finished:
            assert not rest[-1].complete
            assert control.volumes["patch exact"][2].any()
            assert not control.volumes["patch exact"][3:].any()
        else:
            assert not control.volumes


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_plan_grows_with_what_a_fit_holds(scan):
    def needed(**parameters):
        job = make_job(scan, shape=(48,) * 3, parameters=FIT.model_copy(update=parameters))
        plan = plan_memory(job)
        assert plan.fits
        assert sum(plan.items.values()) == plan.host_bytes
        assert readable(plan.host_bytes) in plan.sentence
        return plan.host_bytes

    assert needed() < needed(probes=16) < needed(probes=16, terms=3)


def test_a_plan_that_does_not_fit_says_what_to_change(scan, fitted, monkeypatch):
    jobs = [
        make_job(scan, shape=(400,) * 3, parameters=FitParameters(terms=3, probes=32)),
        patch_job(scan, fitted[0], shape=(400,) * 3),
    ]
    monkeypatch.setattr("napari_recon.jobs.memory.available_memory", lambda: 10**9)
    monkeypatch.setattr(Control, "allocate", lambda *_: pytest.fail("allocated"))
    for job in jobs:
        assert not plan_memory(job).fits
        assert "voxel size of at least" in sentence(list(run_job(job))[-1])
    assert "one kernel, or fewer probes" in plan_memory(jobs[0]).sentence


MEASURE = """
import sys
from napari_recon.jobs import OperatorJob, PatchJob, run_job
from napari_recon.jobs.memory import peak_memory, plan_memory, release_memory, reset_peak
job = {"OperatorJob": OperatorJob, "PatchJob": PatchJob}[sys.argv[1]].model_validate_json(sys.argv[2])
small = OperatorJob(scan=job.scan, shape=(8, 8, 8), device="cpu", output=sys.argv[3] + "/small.safetensors")
list(run_job(small))  # libraries and kernels are no part of the plan
if isinstance(job, PatchJob):
    list(run_job(PatchJob(scan=job.scan, shape=(8, 8, 8), operator=str(small.output), center=(4, 4, 4), device="cpu")))
release_memory()
reset_peak()
before = peak_memory()
assert type(list(run_job(job))[-1]).__name__ == "Finished"
print((peak_memory() - before) / plan_memory(job).host_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "three kernels", "file", "patch"])
def test_the_plan_is_what_it_takes(scan, tmp_path, monkeypatch, kind):
    import os
    import subprocess
    import sys

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parameters = FIT.model_copy(update={"terms": 3 if kind == "three kernels" else 1})
    job = make_job(scan, shape=(96,) * 3, parameters=parameters, output=tmp_path / "h.safetensors")
    if kind in ("file", "patch"):
        run(job)
        job = make_job(scan, shape=(96,) * 3, operator=str(job.output))
    if kind == "patch":
        job = patch_job(scan, job.operator, shape=(96,) * 3, patch=48)
    command = [sys.executable, "-c", MEASURE, type(job).__name__, job.model_dump_json(), str(tmp_path)]
    taken = float(subprocess.check_output(command, text=True, env=os.environ))
    assert 0.4 < taken < 1.15


# -- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_is_a_picture(fitted, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "h.png"
    for _ in range(2):  # the second time over the first
        operator_figure(fitted[2], 0.5, fitted[1][-1].figures, path, "10_000 $views of a phantom")
    picture = imread(path)
    assert picture.ndim == 3
    assert min(picture.shape[:2]) > 400
    assert [p.name for p in tmp_path.iterdir()] == ["h.png"]


def test_a_figure_of_what_is_there_so_far(fitted, tmp_path):
    operator_figure({"x": fitted[2]["x"]}, 0.5, {}, tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 0


def test_a_figure_that_cannot_be_written_leaves_nothing(fitted, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from napari_recon.scans import ScanError

    for name in ("h.jpg", "nowhere/h.png"):
        with pytest.raises(ScanError, match=r"\.$"):
            operator_figure(fitted[2], 0.5, {}, tmp_path / name)

    def full(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(ScanError, match="No space left"):
        operator_figure(fitted[2], 0.5, {}, tmp_path / "h.png")
    assert not list(tmp_path.iterdir())


def test_drawing_the_figure_does_not_cost_torch():
    import subprocess
    import sys

    code = (
        "import sys, napari_recon.jobs.figure; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- the command line ------------------------------------------------------------------------------------------------


def test_fit_operator_shows_and_draws_what_it_fitted(scan, tmp_path):
    from typer.testing import CliRunner

    from napari_recon.cli import app

    def call(*arguments, status=0):
        told = [
            "fit-operator",
            str(scan),
            "--device",
            "cpu",
            "--json",
            "--shape",
            *map(str, SHAPE),
            *map(str, arguments),
        ]
        result = CliRunner().invoke(app, told, catch_exceptions=False)
        assert result.exit_code == status, result.stderr
        return json.loads(result.stdout)

    file, figure = tmp_path / "h.safetensors", tmp_path / "h.png"
    options = ["--probes", 2, "--iterations", 0, "--positions", 1, "--nonsymmetric", "--distribution", "image"]
    np.save(tmp_path / "x.npy", np.ones(SHAPE, np.float32))
    told = call("-o", file, "--figure", figure, "--volume", tmp_path / "x.npy", *options)
    assert told["output"] == str(file)
    assert told["figures"]["relative_error"] > 0
    assert figure.stat().st_size > 0
    assert not NormalOperator.load(file, physics_of(scan)).symmetric
    assert OperatorJob.model_validate(told["job"]).parameters.distribution == "image"
    assert "--terms" in call("-o", file, "--terms", 2, status=2)["error"]
    assert "png" in call("-o", file, "--figure", tmp_path / "h.jpg", status=2)["error"]
