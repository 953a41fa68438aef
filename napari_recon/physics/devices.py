"""Which device computes."""

from __future__ import annotations

import os

import torch

from napari_recon.scans.errors import ScanError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for; "auto" is the GPU where there is one, else the CPU.

    Where torchrun has started several processes on a machine (LOCAL_WORLD_SIZE, LOCAL_RANK), "auto" and "cuda" are the
    GPU of this process: its own, or, of fewer GPUs than processes, one in turn.

    Raises
    ------
    ScanError
        If the name is not a device, or the device is not on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and (gpus := torch.cuda.device_count()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ScanError(f"Unknown device {device!r}: use 'auto', 'cpu' or 'cuda' (or 'cuda:1' and so on).") from None
    if found.type not in ("cpu", "cuda"):
        raise ScanError(f"Device {device!r} is not supported: use 'auto', 'cpu' or 'cuda'.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ScanError(f"Device {device!r} is not on this machine: use 'cpu' or 'auto'.")
    return found
