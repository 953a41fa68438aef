"""Which device computes."""

from __future__ import annotations

import torch

from napari_recon.scans.errors import ScanError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for; "auto" is the GPU where there is one, else the CPU.

    Raises
    ------
    ScanError
        If the name is not a device, or the device is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ScanError(f"Unknown device {device!r}: use 'auto', 'cpu' or 'cuda' (or 'cuda:1' and so on).") from None
    if found.type not in ("cpu", "cuda"):
        raise ScanError(f"Device {device!r} is not supported: use 'auto', 'cpu' or 'cuda'.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ScanError(f"Device {device!r} is not on this machine: use 'cpu' or 'auto'.")
    return found
