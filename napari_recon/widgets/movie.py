"""A movie of what the viewer shows: a volume that turns once about its axis, or its slices one after the other."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from napari.viewer import Viewer

ENDINGS = (".mp4", ".gif")
TURN, BETWEEN = 24, 5
"""Places of the camera on its way round, and frames from one to the next."""
MOST_SLICES = 240
"""Beyond which some are left out."""
FRAMES_PER_SECOND = 20


def write_movie(viewer: Viewer, path: Path) -> None:
    """Write a movie of the canvas, in 3D of one turn about z, in 2D of all slices; the viewer waits meanwhile.

    Camera and slice are afterwards where they were. napari-animation takes the pictures.

    Parameters
    ----------
    viewer
        What it shows is what is seen.
    path
        A .mp4 or .gif, replaced if it exists, whole or not at all.

    Raises
    ------
    ScanError
        If napari-animation is not installed, the path will not do, or nothing is shown.
    """
    try:
        animation: Any = importlib.import_module("napari_animation")
    except ImportError as error:
        raise ScanError(
            f"A movie needs napari-animation, which cannot be imported ({error}): pip install napari-animation."
        ) from error
    if path.suffix.lower() not in ENDINGS:
        raise ScanError(f"The movie {path} must end in .mp4 or .gif: choose another name.")
    if not path.absolute().parent.is_dir():
        raise ScanError(f"The folder of {path} does not exist: create it, or choose another.")
    if viewer.dims.ndim < 3 or not any(layer.visible for layer in viewer.layers):
        raise ScanError("No volume is shown, so there is nothing for a movie: show one.")
    camera, dims = viewer.scene.camera, viewer.dims
    before = camera.angles, camera.center, camera.zoom, dims.point
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix.lower()}")  # its ending says what it is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it knows napari's camera by its former name
            movie = animation.Animation(viewer)
            for steps in _around(viewer) if dims.ndisplay == 3 else _through(viewer):
                movie.capture_keyframe(steps=steps)
            movie.animate(str(partial), fps=FRAMES_PER_SECOND, canvas_only=True)
        partial.replace(path)
    except OSError as error:
        raise ScanError(
            f"Could not write {path} ({error.strerror or error}): free some space or choose another."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        camera.angles, camera.center, camera.zoom = before[:3]
        dims.set_point(range(dims.ndim), before[3])


def _around(viewer: Viewer) -> Iterator[int]:
    """Move the camera about z, back to where it began; yields the frames from the last place to each."""
    camera = viewer.scene.camera
    view, up = np.array(camera.view_direction, float), np.array(camera.up_direction, float)
    for place in range(TURN + 1):
        angle = 2 * math.pi * place / TURN
        turned = np.eye(3)
        turned[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        camera.set_view_direction(view_direction=tuple(turned @ view), up_direction=tuple(turned @ up))
        yield BETWEEN


def _through(viewer: Viewer) -> Iterator[int]:
    """Go through the slices of the axis that is not shown; yields the frames from the last to each."""
    dims = viewer.dims
    axis = dims.order[-3]
    count = dims.nsteps[axis]
    for index in np.unique(np.linspace(0, count - 1, min(count, MOST_SLICES)).round().astype(int)):
        dims.set_current_step(axis, int(index))
        yield 1
