"""AdaSkips for inference: folded norms, fused sums, and skips below the threshold left out for real.

Source: spec adaskips section 2.8. A budget governs the hypernetworks, by far the largest part of what AdaSkips adds
(section 6.2): a module whose hypernetwork does not fit takes the mean skip weights of the training images. It leaves
skips alone: all of them are below 1 % of the multiply-adds, and leaving out those that training relied on costs most of
the accuracy. That is what the threshold is for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.adaskips.model import (
    AdaSkipModule,
    AdaSkipResNet,
    SkipHyperNetwork,
    check_images,
    check_weights,
    conv_norm_pairs,
)
from dataeff.nn.fold import InferenceConv, channels_last, fold_conv


@dataclass
class AdaSkipAnswer:
    """What one pass gives.

    Attributes:
        logits: float32 (B, K).
        weights: lambda (B, n_m) of each module; mean ones where the hypernetwork did not run.
        active: which skips were taken, bool (B, n_m) of each module.
        asked: whether the module's hypernetwork ran, bool (B, 4).
        macs: executed convolution and skip multiply-adds, float64 (B,).
    """

    logits: Tensor
    weights: list[Tensor]
    active: list[Tensor]
    asked: Tensor
    macs: Tensor


class AdaSkipInference:
    """Evaluation-mode `AdaSkipResNet`.

    Args:
        model: in evaluation mode, on the device to run on; its weights are copied.

    Raises:
        ValueError: for a model in training mode.

    Example:
        answer = AdaSkipInference(model.eval())(images, tau=0.05)
    """

    def __init__(self, model: AdaSkipResNet):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before AdaSkipInference(model)")
        self.in_channels = model.in_channels
        self.costs = model.costs
        conv, norm = model.get_submodule("conv1"), model.get_submodule("bn1")
        assert isinstance(conv, nn.Conv2d)
        self.stem_conv, self.stem_pool = fold_conv(conv, norm), model.get_submodule("maxpool")
        self.modules = [_FoldedModule(stage) for stage in model.stages]
        self.head_weight, self.head_bias = model.fc.weight.detach().clone(), model.fc.bias.detach().clone()

    @torch.inference_mode()
    def __call__(
        self, x: Tensor, tau: float = 0.0, budget: Tensor | None = None, draws: Tensor | None = None
    ) -> AdaSkipAnswer:
        """Classify images.

        Args:
            x: images, float (B, C, H, W), normalised.
            tau: skips with lambda below it are not executed, but for each block's largest.
            budget: multiply-adds allowed for each image, float64 (B,), inf for no limit. An image whose budget is below
                the pretrained network's multiply-adds with all skips asks no hypernetwork.
            draws: uniform numbers (B, n) for random skip weights.
        """
        check_images(x, self.in_channels, training=False)
        costs = self.costs(x.shape[2], x.shape[3])
        count = len(x)
        spent = torch.full((count,), costs.base, dtype=torch.float64, device=x.device)
        left = (torch.full_like(spent, torch.inf) if budget is None else budget.to(spent)) - (costs.base + costs.skips)
        asked = torch.zeros(count, len(self.modules), dtype=torch.bool, device=x.device)
        for number, module in enumerate(self.modules):
            if module.hyper is not None:
                asked[:, number] = left >= costs.hyper[number]
                left = left - asked[:, number] * costs.hyper[number]
        image = channels_last(x.to(self.head_weight.dtype))
        x = channels_last(self.stem_pool(self.stem_conv(image, True)))
        weights: list[Tensor] = []
        active: list[Tensor] = []
        for number, module in enumerate(self.modules):
            used = sum(w.shape[1] for w, m in zip(weights, self.modules, strict=False) if m.weights == "random")
            part = draws[:, used : used + len(module.pairs)] if draws is not None else None
            lam = module.skip_weights(x, image, asked[:, number], part)
            taken = module.choose(lam, tau)
            spent += taken.sum(1) * costs.skip[number]
            x = module(x, lam, taken)
            weights.append(lam)
            active.append(taken)
        spent += asked.double() @ torch.tensor(costs.hyper, dtype=torch.float64, device=spent.device)
        logits = F.linear(x.mean((2, 3)), self.head_weight, self.head_bias)
        return AdaSkipAnswer(logits, weights, active, asked, spent)


class _FoldedModule:
    """An `AdaSkipModule` with folded norms."""

    def __init__(self, module: AdaSkipModule):
        self.pairs, self.weights, self.hyper_input = module.pairs, module.weights, module.hyper_input
        self.name = module.name
        self.blocks: list[list[InferenceConv]] = []
        for block in module.blocks:
            self.blocks.append([fold_conv(conv, norm) for conv, norm in conv_norm_pairs(block)])
        self.projection: InferenceConv | None = None
        downsample = getattr(module.blocks[0], "downsample", None)
        if downsample is not None:
            self.projection = fold_conv(downsample[0], downsample[1])
        self.hyper = _FoldedHyper(module.hyper) if module.hyper is not None else None
        self.scale_shift: tuple[Tensor, Tensor] | None = None
        if module.module_bn is not None:
            self.scale_shift = _scale_and_shift(module.module_bn)

    def skip_weights(self, x: Tensor, image: Tensor, asked: Tensor, draws: Tensor | None) -> Tensor:
        """lambda (B, n); the hypernetwork runs on the images in `asked` only."""
        if self.weights == "ones":
            return x.new_ones(len(x), len(self.pairs))
        if self.hyper is None:
            return torch.rand(len(x), len(self.pairs), device=x.device) if draws is None else draws
        read = x if self.hyper_input == "module_input" else image
        if bool(asked.all()):
            weights = self.hyper(read)
        else:
            weights = self.hyper.mean_weights.expand(len(x), -1).clone()
            if bool(asked.any()):
                weights[asked] = self.hyper(channels_last(read[asked]))
        check_weights(weights, self.name)
        return weights

    def choose(self, weights: Tensor, tau: float) -> Tensor:
        """Skips to take, bool (B, n): those with lambda >= tau, and each block's largest."""
        largest = torch.zeros_like(weights, dtype=torch.bool)
        for number in range(1, len(self.blocks) + 1):
            columns = [column for column, (_, j) in enumerate(self.pairs) if j == number]
            best = weights[:, columns].argmax(1)
            largest[torch.arange(len(weights)), torch.tensor(columns, device=weights.device)[best]] = True
        return (weights >= tau) | largest

    def __call__(self, x: Tensor, weights: Tensor, taken: Tensor) -> Tensor:
        """Features channels-last -> features channels-last; `x` is left as it is."""
        source = x if self.projection is None else channels_last(self.projection(x, relu=False))
        nodes = [source]
        partial = taken.any(0) & ~taken.all(0)
        none = ~taken.any(0)
        for number, convs in enumerate(self.blocks, start=1):
            total = torch.zeros_like(source)
            for column, (i, j) in enumerate(self.pairs):
                if j != number or bool(none[column]):
                    continue
                scale = weights[:, column].to(x.dtype).view(-1, 1, 1, 1)
                if bool(partial[column]):
                    rows = taken[:, column].nonzero().view(-1)
                    total.index_add_(0, rows, nodes[i][rows] * scale[rows])
                else:
                    total.addcmul_(nodes[i], scale)
            branch = x if number == 1 else nodes[-1]
            for conv in convs[:-1]:
                branch = conv(branch, True)
            convs[-1].add_relu_(branch, total)
            nodes.append(total)
        if self.scale_shift is None:
            return nodes[-1]
        scale, shift = self.scale_shift
        return torch.addcmul(shift, nodes[-1], scale)


class _FoldedHyper:
    """A `SkipHyperNetwork` with folded norms."""

    def __init__(self, hyper: SkipHyperNetwork):
        layers = list(hyper.features)
        self.convs = [
            fold_conv(conv, norm) for conv, norm in zip(layers, layers[1:], strict=False) if isinstance(conv, nn.Conv2d)
        ]
        self.weight, self.bias = hyper.output.weight.detach().clone(), hyper.output.bias.detach().clone()
        self.mean_weights = hyper.mean_weights.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, True)
        return torch.sigmoid(F.linear(x.mean((2, 3)), self.weight, self.bias))


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm in evaluation as x * scale + shift, each (1, C, 1, 1); it follows a ReLU and cannot be folded."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return tuple(t.detach().to(norm.weight.dtype).view(1, -1, 1, 1) for t in (scale, shift))  # type: ignore[return-value]
