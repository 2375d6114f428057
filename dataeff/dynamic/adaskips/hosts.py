"""The networks that skips are added to, and where their pretrained weights come from.

Source: spec adaskips sections 2.1, 3 and 10. All have torchvision's names: conv1, bn1, layer1 to layer4, fc.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dataeff.core.artifact import WEIGHTS
from dataeff.nn.pointwise import PointwiseConv2d

HostName = Literal["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "small"]
NEW_PARTS = ("hyper", "module_bn", "fc")
PREFIX = "student."  # of the pretrained network in the artifact of an adaskips run


class SmallResNet(nn.Module):
    """A residual network of four stages of basic blocks behind a 3x3 stem, for small images.

    Args:
        widths: channels of the stages; stages 2 to 4 halve the size.
        blocks: of each stage.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity()
        channels = widths[0]
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            stride = 1 if number == 1 else 2
            stage = [_basic_block(channels if n == 0 else width, width, stride if n == 0 else 1) for n in range(count)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            channels = width
        self.fc = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def build_host(
    name: HostName,
    num_classes: int,
    in_channels: int,
    stem: Literal["imagenet", "small"] = "imagenet",
    widths: Sequence[int] = (8, 16, 32, 64),
    blocks: Sequence[int] = (2, 2, 2, 2),
) -> nn.Module:
    """A network with random weights.

    Args:
        stem: of torchvision's networks: 7x7 with stride 2 and a max-pool, or 3x3 without either for small images.
        widths, blocks: of the "small" network.
    """
    if name == "small":
        return SmallResNet(widths, blocks, num_classes, in_channels)
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if stem == "small":
        conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    else:
        conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
    nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = conv1
    return network


def _basic_block(in_channels: int, channels: int, stride: int) -> nn.Module:
    changes = stride > 1 or in_channels != channels
    projection = nn.Sequential(PointwiseConv2d(in_channels, channels, stride), nn.BatchNorm2d(channels))
    block: nn.Module = BasicBlock(in_channels, channels, stride, projection if changes else None)
    return block


def download_weights(name: HostName) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, from its cache or the network.

    Raises:
        ValueError: "small" has none.
        OSError: they cannot be fetched.
    """
    if name == "small":
        raise ValueError("download: torchvision has no weights of the network 'small'; give source or weights")
    state: dict[str, Tensor] = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(
        progress=False, check_hash=True
    )
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights of a pretrained network from a local file, under torchvision's names.

    Args:
        path: .safetensors; .pth or .pt (tensors only, nothing is executed); or the artifact folder of an adaskips run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {path}: no such file; give a .safetensors or .pth file, or an artifact folder"
        )
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights {path}: must end in .safetensors, .pth or .pt")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights {path}: cannot be read as tensors ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path}: must hold a state dict, names and tensors; save model.state_dict()")
    return dict(state)


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor], where: str) -> nn.Linear | None:
    """Load a pretrained network into an `AdaSkipResNet`, names unchanged, and return its classifier, if it has one.

    Hypernetworks, module norms and the classifier of `model` may be missing from `state`, and keep their values.

    Raises:
        ValueError: lists missing and unexpected names, or a tensor of another shape.
    """
    state = _source_of_artifact(state)
    own = model.state_dict()
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    new = {name for name in own if any(part in NEW_PARTS for part in name.split("."))}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # not in torchvision's older files
    missing = sorted(own.keys() - body.keys() - new - counters)
    unexpected = sorted(body.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where}: not the weights of this network; missing: {_listed(missing)}; unexpected: {_listed(unexpected)}"
        )
    wrong = [name for name, value in body.items() if value.shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{where}: {name} has shape {tuple(body[name].shape)}, this network's {tuple(own[name].shape)}; choose the "
            "network, stem and channels (channels=3 in the data string) that the weights were trained with"
        )
    model.load_state_dict({name: value for name, value in body.items() if name not in new}, strict=False)
    if "fc.weight" not in state:
        return None
    classes, features = state["fc.weight"].shape
    head = nn.Linear(features, classes)
    head.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
    return head


def _source_of_artifact(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """From the tensors of an adaskips artifact, those of its backbone and source classifier."""
    if not any(name.startswith(PREFIX) for name in state):
        return state
    found = {}
    for name, value in state.items():
        own = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and not any(part in NEW_PARTS for part in own.split(".")):
            found[own] = value
        elif name.startswith("source_head."):
            found[name.replace("source_head", "fc")] = value
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
