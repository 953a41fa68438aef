"""Helsinki Tomography Challenge 2022 ``.mat`` files: a fan-beam sinogram whose -log was taken already.

Meaney et al., "Helsinki Tomography Challenge 2022: description of the competition and dataset", Applied Mathematics for
Modern Challenges 1 (2023). The struct ``CtDataFull`` or ``CtDataLimited`` holds ``sinogram`` (views, columns) and
``parameters``: angles in degrees, distances and the binned pixel in mm. The axis is at the detector's centre.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.recording import ArrayFrames, Recording


def recognises(path: Path) -> bool:
    """Whether this is a .mat file that holds a CtData struct, or one that cannot be read."""
    if not (path.is_file() and path.suffix.lower() == ".mat"):
        return False
    try:
        return any(name.startswith("CtData") for name, _, _ in scipy.io.whosmat(path))
    except NotImplementedError:
        return False  # MATLAB 7.3, which is HDF5
    except Exception:
        return True  # damaged: read() says so


def read(path: Path) -> Recording:
    """Read the sinogram; these files are small, and MATLAB compresses them as a whole.

    Raises
    ------
    ScanError
        If a field is missing or the file is damaged.
    """
    try:
        contents = scipy.io.loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises whatever the damaged bytes lead to
        raise ScanError(f"{path} cannot be read as a MATLAB file ({type(error).__name__}): copy it again.") from None
    data = next(value for name, value in contents.items() if name.startswith("CtData"))
    try:
        parameters: dict[str, Any] = data["parameters"]
        sinogram = np.asarray(data["sinogram"], dtype=np.float32)
        angles = np.asarray(parameters["angles"], dtype=np.float64).ravel()
        source_object = float(parameters["distanceSourceOrigin"])
        source_detector = float(parameters["distanceSourceDetector"])
        pixel = float(parameters.get("pixelSizePost", parameters["pixelSize"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ScanError(
            f"{path} lacks what a scan needs ({error}): take the file as the challenge published it."
        ) from None
    if sinogram.ndim != 2 or len(angles) != len(sinogram):
        raise ScanError(
            f"{path} gives {len(angles)} angles for a sinogram of shape {sinogram.shape}; it needs one for each row."
        )
    if len(angles) > 1 and np.isclose(abs(angles[-1] - angles[0]), 360):  # the last view repeats the first
        angles, sinogram = angles[:-1], sinogram[:-1]
    frames = ArrayFrames(path, sinogram[:, None, :])
    return Recording(
        format="Helsinki .mat",
        name=path.stem,
        frames=frames,
        geometry=Geometry.cone(angles, frames.shape[1:], pixel, source_object, source_detector),
        values="line integrals",
        notes={k: str(parameters[k]) for k in ("scanner", "voltage", "voltageUnit", "date") if k in parameters},
    )
