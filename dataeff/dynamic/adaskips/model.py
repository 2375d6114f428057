"""AdaSkips: every skip connection inside a stage of a residual network, weighted for each image by a hypernetwork.

Source: spec adaskips sections 2.1 to 2.4 and 9. The names of a pretrained network's tensors stay as they are: the
blocks of a module are its children "0", "1", ..., beside them only `hyper` and `module_bn` are new.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dataeff.metrics.cost import count_macs

SkipWeights = Literal["hyper", "ones", "random"]
Skips = Literal["standard", "all"]
STAGES = 4


@dataclass(frozen=True)
class AdaSkipConfig:
    """What is added to a pretrained network (spec section 9).

    Attributes:
        skips: "all" k(k+1)/2 connections of a module, or the "standard" ones between neighbours.
        module_bn: a BatchNorm at the end of every module.
        weights: "hyper" (predicted for each image), "ones", or "random" (uniform, drawn anew for each image).
        hyper_input: what a hypernetwork reads, the module's input or the image.
        hyper_width_mult: hidden channels of a hypernetwork over the channels of its input.
        modules: stages, from 1 to 4, that are changed; the others stay as they are.
        bn_mode: norms of a frozen backbone use their running statistics ("eval") or those of the batch ("train").
        sparsity_tau: at inference, skips with a weight below it are left out; a block keeps its largest.
    """

    skips: Skips = "all"
    module_bn: bool = True
    weights: SkipWeights = "hyper"
    hyper_input: Literal["module_input", "image"] = "module_input"
    hyper_width_mult: float = 2.0
    modules: tuple[int, ...] = (1, 2, 3, 4)
    bn_mode: Literal["eval", "train"] = "eval"
    sparsity_tau: float = 0.0


class SkipHyperNetwork(nn.Module):
    """Features (B, c, h, w) -> skip weights (B, n_skips) in [0, 1] (spec section 2.3).

    Two 3x3 convolutions with BatchNorm and ReLU at the features' resolution, global average pool, linear, sigmoid.

    Attributes:
        mean_weights: mean over the training images (n_skips,), set at the end of training; stands in at inference
            where a budget leaves the hypernetwork out.
    """

    mean_weights: Tensor

    def __init__(self, in_channels: int, n_skips: int, width_mult: float = 2.0):
        super().__init__()
        width = max(1, round(width_mult * in_channels))
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.output = nn.Linear(width, n_skips)
        self.register_buffer("mean_weights", torch.full((n_skips,), 0.5))
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feat: Tensor) -> Tensor:
        with torch.autocast(feat.device.type, enabled=False):
            pooled = self.features(feat.float()).mean((2, 3))
            weights: Tensor = torch.sigmoid(self.output(pooled))
        return weights


class AdaSkipModule(nn.Module):
    """One stage: blocks 1..k with nodes N_0 (the input) to N_k, N_j = ReLU(R_j(N_{j-1}) + sum of lambda_ij N_i).

    N_0 enters the sums through the first block's shortcut (computed once); R_1 reads it as it is. The adjacent skips
    are weighted as well: they replace the identity (spec section 2.2). A block is torchvision's `BasicBlock` or
    `Bottleneck`, a module with `residual` and `shortcut`, or any other module, which then is a residual branch itself.

    Args:
        blocks: the pretrained blocks; shared, not copied.
        in_channels, out_channels: of the module.
        weights, module_bn, hyper_input: see `AdaSkipConfig`.
        skips: all pairs, or adjacent ones.
        width_mult: of the hypernetwork.
        image_channels: of the image, for hyper_input "image".
        name: of the module in messages.

    Raises:
        ValueError: no blocks, or a block behind the first that changes the shape.
    """

    def __init__(
        self,
        blocks: nn.ModuleList | nn.Sequential,
        in_channels: int,
        out_channels: int,
        weights: SkipWeights = "hyper",
        module_bn: bool = True,
        hyper_input: Literal["module_input", "image"] = "module_input",
        skips: Skips = "all",
        width_mult: float = 2.0,
        image_channels: int = 3,
        name: str = "module",
    ):
        super().__init__()
        self.name, self.count, self.weights, self.hyper_input = name, len(blocks), weights, hyper_input
        if self.count < 1:
            raise ValueError(f"{name}: no blocks; a module needs at least one")
        for number, block in enumerate(blocks, start=1):
            if number > 1 and getattr(block, "downsample", None) is not None:
                raise ValueError(
                    f"{name}: block {number} changes the shape, so that no skip can pass it; "
                    f"start a module of its own at block {number}"
                )
            self.add_module(str(number - 1), block)
        pairs = [(i, j) for j in range(1, self.count + 1) for i in range(j)]
        self.pairs = pairs if skips == "all" else [(i, j) for i, j in pairs if i == j - 1]
        self.hyper: SkipHyperNetwork | None = None
        if weights == "hyper":
            channels = in_channels if hyper_input == "module_input" else image_channels
            self.hyper = SkipHyperNetwork(channels, len(self.pairs), width_mult)
        self.module_bn = nn.BatchNorm2d(out_channels) if module_bn else None
        self.last_lambda: Tensor | None = None

    @staticmethod
    def pair_index(i: int, j: int) -> int:
        """Column of the skip from node i to node j, 0 <= i < j, among all of a module."""
        if not 0 <= i < j:
            raise ValueError(f"a skip leads from node i to a later node j, got i = {i}, j = {j}")
        return j * (j - 1) // 2 + i

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.get_submodule(str(number)) for number in range(self.count)]

    def forward(self, x: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Features (B, c, h, w) -> (B, c_out, h', w').

        Args:
            image: (B, C, H, W), for hyper_input "image".
            draws: uniform numbers (B, n_skips) for weights "random"; None takes them from the global generator.

        Raises:
            ValueError: one image of 1x1 features in training with a module BatchNorm; skip weights that are not in
                [0, 1]; blocks whose outputs differ in shape.
        """
        weights = self.skip_weights(x, image, draws)
        self.last_lambda = weights
        nodes = [shortcut(self.blocks[0], x)]
        node = x
        for number, block in enumerate(self.blocks, start=1):
            node = residual(block, node)
            for column, (i, j) in enumerate(self.pairs):
                if j == number:
                    if nodes[i].shape != node.shape:
                        raise ValueError(
                            f"{self.name}: block {number} gives {tuple(node.shape[1:])} where node {i} has "
                            f"{tuple(nodes[i].shape[1:])}; start a module of its own at block {number}"
                        )
                    node = node + nodes[i] * weights[:, column].to(node.dtype).view(-1, 1, 1, 1)
            node = torch.relu(node)
            nodes.append(node)
        if self.module_bn is None:
            return node
        if self.training and node.shape[0] * node.shape[2] * node.shape[3] == 1:
            raise ValueError(
                f"{self.name}: BatchNorm needs more than one value per channel in training, got one image of 1x1 "
                "features; use batches of at least 2 images (drop the last one)"
            )
        normed: Tensor = self.module_bn(node)
        return normed

    def skip_weights(self, x: Tensor, image: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """lambda (B, n_skips), a column for each of `pairs`; arguments as for `forward`."""
        if self.weights == "ones":
            return x.new_ones(len(x), len(self.pairs))
        if self.weights == "random":
            return torch.rand(len(x), len(self.pairs), device=x.device) if draws is None else draws
        assert self.hyper is not None
        read = x if self.hyper_input == "module_input" else image
        if read is None:
            raise ValueError(f"{self.name}: hyper_input 'image' needs the image")
        weights: Tensor = self.hyper(read)
        # In training on a GPU the check would make every step wait for the device.
        if not self.training or weights.device.type == "cpu":
            check_weights(weights, self.name)
        return weights

    def plain(self, x: Tensor) -> Tensor:
        """The stage as it was pretrained."""
        for block in self.blocks:
            x = block(x)
        return x


def check_weights(weights: Tensor, name: str) -> None:
    """Refuse skip weights that are not numbers in [0, 1] (spec section 10)."""
    weights = weights.detach()
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(
            f"{name}: skip weights must be in [0, 1], got {float(weights.min()):g} to {float(weights.max()):g}; "
            "exploding activations are the usual cause: set module_bn, or a smaller lr"
        )


def conv_norm_pairs(block: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    """(conv, norm) pairs of the residual branch of a torchvision block, in order; ReLU between them."""
    pairs = []
    for number in (1, 2, 3):
        conv = getattr(block, f"conv{number}", None)
        if isinstance(conv, nn.Conv2d):
            pairs.append((conv, block.get_submodule(f"bn{number}")))
    return pairs


def residual(block: nn.Module, x: Tensor) -> Tensor:
    """R_j: a block without its shortcut and last ReLU."""
    own = getattr(block, "residual", None)
    if own is not None:
        branch: Tensor = own(x)
        return branch
    pairs = conv_norm_pairs(block)
    if not pairs:  # a block without a shortcut of its own, such as VGG's
        output: Tensor = block(x)
        return output
    for conv, norm in pairs[:-1]:
        x = torch.relu(norm(conv(x)))
    last, last_norm = pairs[-1]
    result: Tensor = last_norm(last(x))
    return result


def shortcut(block: nn.Module, x: Tensor) -> Tensor:
    """N_0 in the shape of the module's output, by the first block's own shortcut."""
    branch = getattr(block, "shortcut", None) or getattr(block, "downsample", None)
    mapped: Tensor = x if branch is None else branch(x)
    return mapped


@dataclass
class AdaSkipFeatures:
    """One forward pass: maps of the modules, lambda (B, n_m) of each changed module, pooled features (B, d)."""

    maps: list[Tensor]
    weights: list[Tensor] = field(default_factory=list)
    embedding: Tensor = field(default_factory=lambda: torch.empty(0))


class AdaSkipResNet(nn.Module):
    """A residual network whose stages are `AdaSkipModule`s; build it with `from_pretrained`.

    Attributes:
        stem_names, backbone_names: children that come from the pretrained network.
    """

    def __init__(self, resnet: nn.Module, num_classes: int, cfg: AdaSkipConfig):
        super().__init__()
        self.cfg = cfg
        self.frozen = False
        for name in ("conv1", "bn1", "relu", "maxpool"):
            self.add_module(name, resnet.get_submodule(name))
        conv1 = self.get_submodule("conv1")
        assert isinstance(conv1, nn.Conv2d)
        self.in_channels, channels = conv1.in_channels, conv1.out_channels
        for number in range(1, STAGES + 1):
            blocks = resnet.get_submodule(f"layer{number}")
            assert isinstance(blocks, nn.Sequential)
            out_channels = _out_channels(blocks, channels)
            changed = number in cfg.modules
            module = AdaSkipModule(
                blocks,
                channels,
                out_channels,
                weights=cfg.weights if changed else "ones",
                module_bn=cfg.module_bn and changed,
                hyper_input=cfg.hyper_input,
                skips=cfg.skips if changed else "standard",
                width_mult=cfg.hyper_width_mult,
                image_channels=self.in_channels,
                name=f"module {number}",
            )
            self.add_module(f"layer{number}", module)
            channels = out_channels
        self.embedding_dim = channels
        self.fc = nn.Linear(channels, num_classes)
        self._costs: dict[tuple[int, int], AdaSkipCosts] = {}

    @classmethod
    def from_pretrained(
        cls, resnet: nn.Module, num_classes: int, freeze_backbone: bool = False, cfg: AdaSkipConfig | None = None
    ) -> "AdaSkipResNet":
        """Add the skips to a copy of a pretrained network and replace its classifier.

        Args:
            resnet: torchvision's ResNet, or a network with the same parts (conv1, bn1, relu, maxpool, layer1 to
                layer4); not changed.
            num_classes: K of the target data.
            freeze_backbone: only the classifier, the hypernetworks and the module norms learn.

        Example:
            model = AdaSkipResNet.from_pretrained(torchvision.models.resnet18(weights=None), 100)
            logits = model(images)
        """
        model = cls(copy.deepcopy(resnet), num_classes, cfg or AdaSkipConfig())
        model.freeze_backbone(freeze_backbone)
        return model

    @property
    def stages(self) -> list[AdaSkipModule]:
        """Modules 1 to 4."""
        modules = [self.get_submodule(f"layer{number}") for number in range(1, STAGES + 1)]
        return [module for module in modules if isinstance(module, AdaSkipModule)]

    @property
    def num_draws(self) -> int:
        """Uniform numbers that an image needs with weights "random"."""
        return sum(len(stage.pairs) for stage in self.stages if stage.weights == "random")

    def new_parts(self) -> list[nn.Module]:
        """What the pretrained network did not have: hypernetworks, module norms, classifier."""
        parts = [part for stage in self.stages for part in (stage.hyper, stage.module_bn) if part is not None]
        return [*parts, self.fc]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Parameters of the pretrained network without its classifier."""
        new = {id(parameter) for part in self.new_parts() for parameter in part.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in new]

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters of `new_parts`."""
        return [parameter for part in self.new_parts() for parameter in part.parameters()]

    def freeze_backbone(self, frozen: bool) -> None:
        """Fix the pretrained weights, and with bn_mode "eval" the norms' statistics, or let them learn again."""
        self.frozen = frozen
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "AdaSkipResNet":
        super().train(mode)
        if mode and self.frozen and self.cfg.bn_mode == "eval":
            new = {id(module) for part in self.new_parts() for module in part.modules()}
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in new:
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits float32 (B, K)."""
        return self.classify(self.run(x).embedding)

    def classify(self, embedding: Tensor) -> Tensor:
        """Pooled features (B, d) -> logits float32 (B, K); float32 also under autocast."""
        with torch.autocast(embedding.device.type, enabled=False):
            logits: Tensor = self.fc(embedding.float())
        return logits

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The four modules' outputs, for detection and segmentation heads."""
        return self.run(x).maps

    def skip_weights(self, x: Tensor) -> list[Tensor]:
        """lambda (B, n_m) of every module that was changed."""
        return self.run(x).weights

    def run(self, x: Tensor, draws: Tensor | None = None, plain: bool = False) -> AdaSkipFeatures:
        """Everything that one pass computes.

        Args:
            x: images (B, C, H, W), normalised.
            draws: uniform numbers (B, `num_draws`) for weights "random".
            plain: as the network was before skips were added.
        """
        check_images(x, self.in_channels, self.training)
        image = x
        x = self.stem(x)
        result = AdaSkipFeatures([])
        used = 0
        for stage in self.stages:
            if plain:
                x = stage.plain(x)
            else:
                part = None
                if stage.weights == "random" and draws is not None:
                    part = draws[:, used : used + len(stage.pairs)]
                    used += len(stage.pairs)
                x = stage(x, image, part)
                if self._is_changed(stage):
                    assert stage.last_lambda is not None
                    result.weights.append(stage.last_lambda)
                    stage.last_lambda = stage.last_lambda.detach()
            result.maps.append(x)
        result.embedding = x.mean((2, 3), dtype=torch.float32)
        return result

    def _is_changed(self, stage: AdaSkipModule) -> bool:
        return self.stages.index(stage) + 1 in self.cfg.modules

    def stem(self, x: Tensor) -> Tensor:
        """Images -> features that enter module 1."""
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(name)(x)
        return x

    def parameter_groups(self, base_lr: float, backbone_mult: float = 0.1) -> list[dict[str, object]]:
        """Groups for an optimiser: new parts at `base_lr`, the backbone, where it learns, at a multiple of it."""
        groups = [
            {"params": self.new_parameters(), "lr": base_lr},
            {"params": [p for p in self.backbone_parameters() if p.requires_grad], "lr": base_lr * backbone_mult},
        ]
        return [group for group in groups if group["params"]]

    def costs(self, height: int, width: int) -> "AdaSkipCosts":
        """Multiply-adds of one image of `height` x `width`, by part."""
        if (height, width) not in self._costs:
            self._costs[height, width] = self._count_costs(height, width)
        return self._costs[height, width]

    def _count_costs(self, height: int, width: int) -> "AdaSkipCosts":
        by_module = count_macs(self, (self.in_channels, height, width)).by_module
        hyper, units = [], []
        maps = self._map_sizes(height, width)
        for number, (stage, size) in enumerate(zip(self.stages, maps, strict=True), start=1):
            prefix = f"layer{number}.hyper.features"
            hyper.append(sum(macs for name, macs in by_module.items() if name.startswith(prefix)))
            units.append(float(size) if stage.weights != "ones" else 0.0)
        linear = sum(macs for name, macs in by_module.items() if isinstance(self.get_submodule(name), nn.Linear))
        skips = [unit * len(stage.pairs) for unit, stage in zip(units, self.stages, strict=True)]
        return AdaSkipCosts(sum(by_module.values()) - sum(hyper) - linear, hyper, units, sum(skips))

    def _map_sizes(self, height: int, width: int) -> list[int]:
        """Numbers in one image's map behind each module."""
        training = self.training
        reference = self.fc.weight
        with torch.no_grad():
            zeros = torch.zeros(1, self.in_channels, height, width, device=reference.device, dtype=reference.dtype)
            maps = self.eval().run(zeros).maps
        self.train(training)
        return [one[0].numel() for one in maps]

    def overhead(self, height: int = 224, width: int = 224) -> dict[str, float]:
        """What the skips add: parameters, convolution multiply-adds of the hypernetworks for one image, and the ratio
        of the changed network's multiply-adds to the pretrained one's."""
        costs = self.costs(height, width)
        with_skips = sum(p.numel() for part in self.new_parts()[:-1] for p in part.parameters())
        macs = sum(costs.hyper)
        return {"params": float(with_skips), "macs": macs, "ratio": (costs.base + macs) / costs.base}


@dataclass(frozen=True)
class AdaSkipCosts:
    """Multiply-adds of one image.

    Attributes:
        base: convolutions of the pretrained network.
        hyper: convolutions of each module's hypernetwork.
        skip: one weighted skip in each module: a multiply-add for every number of the map. 0 with weights "ones",
            where a skip is an addition only, as in the pretrained network.
        skips: all of them.
    """

    base: float
    hyper: list[float]
    skip: list[float]
    skips: float

    @property
    def full(self) -> float:
        """Everything executed."""
        return self.base + sum(self.hyper) + self.skips


def check_images(x: Tensor, channels: int, training: bool) -> None:
    """Refuse images that are not float (B, channels, H, W), or in evaluation not finite.

    Raises:
        ValueError: says what was expected and what was seen.
    """
    if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"expected images float B x {channels} x H x W, got {x.dtype} {tuple(x.shape)}")
    if not training and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"expected images with finite values, got {int((~torch.isfinite(x)).sum())} NaN or Inf")


def _out_channels(blocks: nn.Sequential, in_channels: int) -> int:
    """Channels of a stage's output, from the last convolution of its last block."""
    convs = [layer for layer in blocks.modules() if isinstance(layer, nn.Conv2d)]
    if not convs:
        return in_channels
    last = conv_norm_pairs(blocks[-1])
    return last[-1][0].out_channels if last else convs[-1].out_channels
