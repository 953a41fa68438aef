"""The run of PADMM: its start, which a network or any volume may be, and the changes that are made while it runs.

Its stream is that of a reconstruction, with ``Stage("start")``, and ``VolumeReady("start")`` and its ``Progress`` where
the start is computed for the job. Where iterates are kept, ``VolumeReady("iterates")``, (places, D, H, W), comes with
the first, and a ``Progress`` with each: its box ends at the last one, of iteration ``step``. What
:meth:`~napari_recon.jobs.stages.Control.change` asks for takes hold before the next iteration; a ``Notice`` tells what
could not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from napari_recon.jobs.job import STARTS, PADMMParameters
from napari_recon.jobs.memory import kept_iterates, padmm_bytes, short_of
from napari_recon.jobs.messages import Message, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.reconstruct import ReconstructionRun
from napari_recon.jobs.stages import advance
from napari_recon.learning.weights import find_weights, read_header
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    import torch

    from napari_recon.physics import NormalOperator
    from napari_recon.reconstruction import Update

START_PATCH = 64
"""Edge in voxels of the patches that the start's network is applied to."""


class PADMMRun(ReconstructionRun):
    """The run of a reconstruction by PADMM."""

    _now: PADMMParameters
    """The parameters as they are now."""
    _settings: dict[str, Any]
    """What the method is to take up before its next iteration."""
    _fitted: NormalOperator | None = None
    _every = 1
    """Of how many iterations one is kept."""

    def check(self) -> None:
        """Besides the output: a start that is a file must be there."""
        super().check()
        assert isinstance(self.job.parameters, PADMMParameters)
        self._now = self.job.parameters
        self._settings = {}
        start, weights = self._now.start, self._now.start_weights()
        if weights is not None:
            read_header(find_weights(weights))
        elif start not in STARTS and not Path(start).exists():
            raise ScanError(
                f"There is no start {start!r}: choose one of {', '.join(STARTS)}, a volume's file, or weights."
            )

    def _reconstruct(self) -> Iterator[Message]:
        control, parameters = self.control, self._now
        start = yield from self._begin(parameters.start)
        if parameters.preconditioner == "operator" and not control.finishing:
            self._fitted = yield from self._operator("fit", self.physics)
        else:  # one that is at hand can be changed to
            self._fitted = self.prepared.things.get(self._operator_name(self.physics))
        if control.finishing:
            yield from self._finish_early()
            return
        folder = self._scratch()
        if folder is not None:
            yield Notice(
                f"Memory is short, so PADMM keeps its split variables in files in {folder} (TMPDIR names another): "
                "slower, with the same result."
            )
        yield Stage("reconstructing", parameters.method)
        yield from self.follow(self._updates(start, folder), "result", between=self._between)

    def _scratch(self) -> Path | None:
        """A folder for the split variables, where memory has no room for them."""
        if self.y.device.type != "cpu":
            return None
        spectra = self._now.preconditioner in ("circulant", "operator")
        needed = padmm_bytes(self.grid, self.y.numel() * self.y.element_size(), spectra)
        return Path(tempfile.gettempdir()) if short_of(needed * (2 if self.scan.kind == "mri" else 1)) else None

    def _updates(self, start: torch.Tensor | str, scratch: Path | None) -> Iterator[Update]:
        import torch

        from napari_recon.reconstruction.padmm import PADMM

        parameters = self._now
        weights = None
        if parameters.weighted and self.scan.kind == "mri":
            raise ScanError("Photon statistics are of X-rays: leave them out for k-space.")
        if parameters.weighted:
            measured = self.prepared.things.get("measured", self.y)  # of a slab, y is without what lies beside it
            weights = torch.exp(-measured.clamp(min=0))  # the share of the photons that came through
        method = PADMM(
            iterations=parameters.iterations,
            regularization=parameters.regularization,
            rho=parameters.rho,
            preconditioner=parameters.preconditioner,
            weights=weights,
            tolerance=parameters.tolerance,
            adaptive=parameters.adaptive,
            scratch=scratch,
        )
        return method.stream(
            self.y,
            self.physics,
            init=start,
            operator=self._fitted,
            settings=self._take_settings,
            unit=self.prepared.things.get("unit"),
        )

    def _between(self, step: int) -> Iterator[Message]:
        if self._now.keep_iterates:
            yield from self._keep(step)
        yield from self._take_changes(step)

    def _keep(self, step: int) -> Iterator[Message]:
        """Keep the volume of a step as "iterates"[step / every]; where they are full, every second one makes room."""
        grid, control = self.shown_grid, self.control
        if "iterates" not in control.volumes:
            count = kept_iterates(self._now.iterations, grid.voxels)
            kept = control.allocate("iterates", (count, *grid.shape))
            handle = control.handles.get("iterates", "")
            translate = (0.0, *grid.translate)
            labels = ("iteration", "z", "y", "x")
            yield VolumeReady("iterates", kept.shape, (1.0, *grid.scale), translate, handle=handle, axis_labels=labels)
        kept = control.volumes["iterates"]
        first, full = step // self._every, step // self._every >= len(kept)
        if step % (self._every * (2 if full else 1)):
            return
        if full:
            for i in range(1, math.ceil(len(kept) / 2)):
                kept[i] = kept[2 * i]
            self._every, first = 2 * self._every, 0
        place = step // self._every
        kept[place] = control.volumes["result"]
        box = (slice(first, place + 1), *grid.full_box)
        yield Progress("iterates", step, self._now.iterations, box, None, 0.0, None)

    # -- while it runs ---------------------------------------------------------------------------------------------

    def _take_settings(self) -> dict[str, Any]:
        taken, self._settings = self._settings, {}
        return taken

    def _take_changes(self, step: int) -> Iterator[Message]:
        """Check what was asked for, prepare what it needs, and hand it to the method's next iteration."""
        asked = self.control.take_changes()
        before = self._now
        unknown = set(asked) - set(PADMMParameters.TUNABLE)
        if unknown:
            yield Notice(f"{', '.join(sorted(unknown))} cannot be changed while PADMM runs: change it, and run again.")
        asked = {name: value for name, value in asked.items() if name not in unknown}
        try:
            now = PADMMParameters.model_validate(before.model_dump() | asked)
        except ValidationError as error:
            first = error.errors()[0]
            yield Notice(f"{first['loc'][-1]} stays as it was: {first['msg'][0].lower()}{first['msg'][1:]}.")
            return
        changed = {name: getattr(now, name) for name in asked if getattr(now, name) != getattr(before, name)}
        settings = {name: value for name, value in changed.items() if name != "start"}
        try:
            if "start" in changed:
                settings["init"] = yield from self._begin(now.start, shown=False)
            if changed.get("preconditioner") == "operator":
                if self._fitted is None:
                    self._fitted = yield from self._operator("fit", self.physics)
                if self._fitted is None:  # Finish was pressed amid the fit
                    return
                settings["operator"] = self._fitted
        except ScanError as error:
            yield Notice(str(error))
            return
        if changed:
            self._now = now
            self._settings |= settings
            self.used.setdefault("changes", []).append({"step": step, **changed})
            yield Stage("reconstructing", now.method)

    # -- the start -------------------------------------------------------------------------------------------------

    def _begin(self, start: str, shown: bool = True) -> Generator[Message, None, torch.Tensor | str]:
        """The volume (1, 1 or 2, D, H, W) to start from; what is computed is kept for the next job.

        Parameters
        ----------
        start
            As in the parameters.
        shown
            Whether what is computed is a volume that is shown, "start".
        """
        if start == "zeros":
            return "zeros"
        if start == "fdk":
            return self.start
        kept = self.prepared.things
        if start == "last":
            if "last" not in kept:
                raise ScanError(
                    "There is no last result on this grid to start from: run once, or choose another start."
                )
            last: torch.Tensor = kept["last"].to(self.y.device)
            if not bool(last.isfinite().all()):
                raise ScanError("The last result holds NaN or infinity: choose another start.")
            return last.clone()
        parameters = PADMMParameters(start=start)
        weights = parameters.start_weights(self.scan.kind)
        if parameters.start_is_computed:
            yield Stage("start", start)
            return (yield from self._computed(start, None if weights is None else find_weights(weights), shown))
        yield Stage("reading the start", Path(start).name)
        return self.volume_from(Path(start))

    def _computed(self, start: str, weights: Path | None, shown: bool) -> Generator[Message, None, torch.Tensor]:
        """What quick TV, or the network of some weights, makes of the scan."""
        import torch

        from napari_recon.reconstruction.streaming import Update, whole

        kept = self.prepared.things
        if weights is None:
            name, told = "start tv", {}
        else:
            header = read_header(weights)
            name = f"start {header.digest()}"
            told = {"weights": start, "sha256": header.digest(), "card": header.card}
        if name in kept:
            if shown:
                yield from self.follow(iter([Update(whole(kept[name]), kept[name], 0, 0)]), "start", to_the_end=True)
        elif shown:
            yield from self.follow(self._starting(weights), "start")
            volume = self._values("start").to(self.y.device, copy=True)
            if not self.complete:  # Finish was pressed
                return volume
            kept[name] = volume
        else:
            volume = torch.zeros_like(self.start)
            updates = self._starting(weights)
            while (update := advance(updates)) is not None:
                volume[(..., *update.box)] = update.values
                self.control.checkpoint()
            kept[name] = volume
        if told:
            self.used["start"] = told
        found: torch.Tensor = kept[name]
        return found

    def _starting(self, weights: Path | None) -> Iterator[Update]:
        if weights is None:
            from napari_recon.reconstruction.tv import PreconditionedTV

            return PreconditionedTV.of("tv").stream(self.y, self.physics, reference=self.reference)
        from napari_recon.learning.networks import load_weights

        self.expect_kind(read_header(weights), str(weights))
        model = load_weights(weights, self.y.device).model
        model.passes, model.stride = 1, None
        model.patch_size = min(START_PATCH, max(self.grid.shape))
        options: dict[str, Any] = {"init": self.start} if model.init in (None, "fdk") else {}
        return model.stream(self.y, self.physics, **options)
