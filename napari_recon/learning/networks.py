"""Networks from volumes to volumes, and the files that keep their weights.

All of them are homogeneous: network(s x) = s network(x) for s > 0, by having neither biases nor normalisation, so that
the unit of the attenuation does not matter (Mohan et al., Robust and interpretable blind image denoising via bias-free
convolutional neural networks, ICLR 2020). And all of them take volumes of any size: one, or several as channels, of
which they change the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_recon.learning.weights import FORMAT, read_header
from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD
from napari_recon.scans.errors import ScanError

Name = Literal["light", "drunet", "unet"]
Method = UnrolledPGD | PostProcessing


class _Convolution(nn.Conv3d):
    """3 x 3 x 3 without bias."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _Convolution(channels, channels), _Convolution(channels, channels)
        nn.init.kaiming_normal_(self.first.weight, 0.1)
        with torch.no_grad():  # a sum of many branches keeps its size when each begins small
            nn.init.kaiming_normal_(self.second.weight, 0.1)
            self.second.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(x), 0.1))


class LightNetwork(nn.Module):
    """A small residual U-Net: residual blocks at a few scales, sums for skips, x added at the end.

    Parameters
    ----------
    channels
        Of the volumes: 1, or 2 for complex ones.
    width
        Features at the finest scale; twice as many at each coarser one.
    scales
        Number of resolutions.
    blocks
        Residual blocks at every scale on the way down, and on the way up.
    inputs
        Volumes that it is shown at a time, as channels; the first of them is changed.

    Notes
    -----
    Volumes are padded to a multiple of 2^(scales - 1) by repeating their border, and cropped again. Weights and
    features are kept channels-last: on a CPU a single volume is then convolved about twice as fast. The last
    convolution starts small, so that a new network is nearly the identity.
    """

    def __init__(self, channels: int = 1, width: int = 24, scales: int = 3, blocks: int = 1, inputs: int = 1) -> None:
        super().__init__()
        if min(channels, width, scales, blocks, inputs) < 1:
            raise ScanError("The light network needs at least one channel, feature, scale, block and input.")
        self.channels = channels
        widths = [width * 2**k for k in range(scales)]
        self.multiple = 2 ** (scales - 1)
        self.head = _Convolution(inputs * channels, width)
        self.down = nn.ModuleList(nn.Conv3d(a, 2 * a, 2, stride=2, bias=False) for a in widths[:-1])
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * a, a, 2, stride=2, bias=False) for a in widths[:-1])
        self.encoder = nn.ModuleList(nn.Sequential(*(_Residual(a) for _ in range(blocks))) for a in widths)
        self.decoder = nn.ModuleList(nn.Sequential(*(_Residual(a) for _ in range(blocks))) for a in widths[:-1])
        self.tail = _Convolution(width, channels)
        with torch.no_grad():
            self.tail.weight.mul_(0.1)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs C, D, H, W) to (B, C, D, H, W)."""
        shape = x.shape[2:]
        padding = [p for n in reversed(shape) for p in (0, -n % self.multiple)]
        inside = F.pad(x, padding, mode="replicate") if any(padding) else x
        h = self.head(inside.contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for k, down in enumerate(self.down):
            h = self.encoder[k](h)
            skips.append(h)
            h = down(h)
        h = self.encoder[-1](h)
        for k in reversed(range(len(self.up))):
            h = self.decoder[k](self.up[k](h) + skips[k])
        change = self.tail(h)[..., : shape[0], : shape[1], : shape[2]]
        return (x[:, : self.channels] + change).contiguous()


class _DRUNet(nn.Module):
    """deepinv's DRUNet in 3D, of what is to be added; told a noise level relative to the volume's own size."""

    def __init__(self, channels: int = 1, noise_level: float = 0.05, inputs: int = 1, **options: Any) -> None:
        super().__init__()
        from deepinv.models import DRUNet

        self.noise_level = noise_level
        self.channels = channels
        self.inside = DRUNet(inputs * channels, channels, dim=3, pretrained=None, **options)

    def forward(self, x: Tensor) -> Tensor:
        # Its noise level is part of its input, and has to scale with it.
        shape = x.shape[2:]
        padding = [p for n in reversed(shape) for p in (0, max(32 - n, -n % 8))]
        inside = F.pad(x, padding, mode="replicate") if any(padding) else x
        level = self.noise_level * x.detach().square().mean((1, 2, 3, 4)).sqrt()
        out: Tensor = self.inside(inside, level)
        return (x[:, : self.channels] + out[..., : shape[0], : shape[1], : shape[2]]).contiguous()


class _UNet(nn.Module):
    """deepinv's UNet in 3D, without biases and normalisation."""

    def __init__(
        self,
        channels: int = 1,
        scales: int = 3,
        channels_per_scale: Sequence[int] | None = None,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        from deepinv.models import UNet

        self.multiple = 2 ** (scales - 1)
        self.inside = UNet(
            inputs * channels,
            channels,
            bias=False,
            batch_norm=False,
            scales=scales,
            channels_per_scale=None if channels_per_scale is None else tuple(channels_per_scale),
            dim=3,
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[2:]
        padding = [p for n in reversed(shape) for p in (0, -n % self.multiple)]
        out: Tensor = self.inside(F.pad(x, padding, mode="replicate") if any(padding) else x)
        return out[..., : shape[0], : shape[1], : shape[2]].contiguous()


_KINDS: dict[str, type[nn.Module]] = {"light": LightNetwork, "drunet": _DRUNet, "unet": _UNet}


def make_network(name: str = "light", **options: Any) -> nn.Module:
    """A network by its name, with random weights.

    Parameters
    ----------
    name
        "light": :class:`LightNetwork`, 0.9 million parameters, for a CPU. "drunet" and "unet": deepinv's in three
        dimensions, for a GPU (about 95 and 6 million parameters as they come).
    **options
        Of the network: channels, width, scales and blocks of "light"; channels, noise_level (relative to the root mean
        square of the volume) and deepinv's own of "drunet"; channels, scales and channels_per_scale of "unet"; and
        inputs of all of them (2 for an UnrolledPGD with a memory).

    Raises
    ------
    ScanError
        If there is no such network or option.
    """
    if name not in _KINDS:
        raise ScanError(f"There is no network {name!r}: use {', '.join(get_args(Name))}.")
    try:
        network = _KINDS[name](**options)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"The network {name!r} cannot be made with {options}: {error}.") from None
    network.architecture = {"name": name, "options": options}  # type: ignore[assignment]
    return network


@dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Attributes
    ----------
    model
        The method with its network, in evaluation mode.
    card
        The model card: what it was trained on, for how long, how good it is.
    training
        The configuration that it was trained by, as plain values.
    figures
        Numbers by name, such as the validation's.
    """

    model: Method
    card: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def save_weights(
    model: Method,
    path: str | Path,
    card: str = "",
    training: dict[str, Any] | None = None,
    figures: dict[str, float] | None = None,
) -> None:
    """Write a method's weights with all that is needed to make it again into a safetensors file.

    Parameters
    ----------
    model
        An UnrolledPGD or a PostProcessing whose network :func:`make_network` made.
    path
        Replaced if it exists, whole or not at all.
    card, training, figures
        See :class:`Weights`.

    Raises
    ------
    ScanError
        If the network has no name to make it again by, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from napari_recon import __version__

    path = Path(path)
    metadata = {
        "format": FORMAT,
        "version": __version__,
        "model": json.dumps(_describe(model)),
        "card": card,
        "training": json.dumps(training or {}),
        "figures": json.dumps(figures or {}),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, str(partial), metadata=metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ScanError(f"The weights could not be written to {path}: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> Weights:
    """Read what :func:`save_weights` wrote.

    Raises
    ------
    ScanError
        If the file does not exist, is damaged, or is none of ours.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ScanError(f"The weights {path} cannot be read ({error}); get the file again.") from None
    try:
        model = _remade(header.model)
        model.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"The weights {path} do not fit the network that they name; get the file again.") from None
    return Weights(model.to(device).eval(), header.card, header.training, header.figures)


def _describe(model: Method) -> dict[str, Any]:
    network = model.networks[0] if isinstance(model, UnrolledPGD) else model.network
    architecture = getattr(network, "architecture", None)
    if architecture is None:
        raise ScanError("The weights of this network cannot be kept: it was not made by make_network.")
    described: dict[str, Any] = {"network": architecture, "patch_size": model.patch_size, "stride": model.stride}
    if isinstance(model.init, str):
        described["init"] = model.init
    if isinstance(model, UnrolledPGD):
        return described | {
            "method": "unrolled",
            "iterations": model.iterations,
            "tied": model.tied,
            "step": model.step,
            "data_steps": model.data_steps,
            "nonnegative": model.nonnegative,
            "memory": model.memory,
            "passes": model.passes,
        }
    return described | {"method": "post-processing"}


def _remade(described: dict[str, Any]) -> Method:
    options = dict(described)
    architecture, method = options.pop("network"), options.pop("method")
    network = make_network(architecture["name"], **architecture["options"])
    return UnrolledPGD(network, **options) if method == "unrolled" else PostProcessing(network, **options)
