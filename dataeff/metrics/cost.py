"""Cost of a network counted on a real forward pass.

A MAC is one multiply-add. Following the residual-network papers only convolutions count as "the" cost
(spec skipnet section 2.10); linear and recurrent layers are counted beside them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class MacCount:
    """Multiply-adds for one image. `by_module` holds every counted layer by its qualified name."""

    conv: float = 0.0
    linear: float = 0.0
    by_module: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.conv + self.linear


def count_macs(module: nn.Module, input_shape: tuple[int, ...], **forward_arguments: Any) -> MacCount:
    """Run `module` once in evaluation mode on one zero input and count the multiply-adds of every layer called.

    Layers that are called several times count each time; layers that are not called do not count. Counted are
    nn.Conv1d/2d/3d and their transposed forms, nn.Linear and nn.LSTMCell.

    Args:
        module: any network; its training mode is restored afterwards.
        input_shape: shape of one input without the batch axis, e.g. (3, 32, 32).
        forward_arguments: passed to the forward call, e.g. `mode="full"`.
    """
    count = MacCount()
    handles = []

    def hook_for(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            macs = _layer_macs(layer, inputs[0], output)
            count.by_module[name] = count.by_module.get(name, 0.0) + macs
            if isinstance(layer, nn.modules.conv._ConvNd):
                count.conv += macs
            else:
                count.linear += macs

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.LSTMCell):
            handles.append(layer.register_forward_hook(hook_for(name)))
    modes = {layer: layer.training for layer in module.modules()}
    reference = next(module.parameters(), torch.empty(0))
    try:
        module.eval()
        with torch.no_grad():
            zeros = torch.zeros(1, *input_shape, device=reference.device, dtype=reference.dtype)
            module(zeros, **forward_arguments)
    finally:
        for handle in handles:
            handle.remove()
        for layer, training in modes.items():
            layer.training = training
    return count


def conv_macs(module: nn.Module, input_shape: tuple[int, ...], **forward_arguments: Any) -> float:
    """Convolution multiply-adds of one image; arguments as for `count_macs`."""
    return count_macs(module, input_shape, **forward_arguments).conv


def parameters(module: nn.Module) -> int:
    """Number of trainable scalars; a shared tensor counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _layer_macs(layer: nn.Module, inputs: Tensor, output: Any) -> float:
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return float(inputs.numel() * layer.weight.numel() // layer.in_channels)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return float(output.numel() * layer.weight.numel() // layer.out_channels)
    if isinstance(layer, nn.Linear):
        return float(output.numel() * layer.in_features)
    assert isinstance(layer, nn.LSTMCell)
    return float(len(inputs) * (layer.weight_ih.numel() + layer.weight_hh.numel()))
