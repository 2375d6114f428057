"""SkipNet: a residual network with a gate before every block but the first.

Source: spec skipnet sections 2.1 to 2.4, 2.10 and 5. In training all images pass through all blocks (masked
execution): batch statistics include skipped images and every parameter gets a gradient, so DistributedDataParallel
needs no search for unused parameters. `inference.SkipNetInference` is the version that really skips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.skipnet.losses import straight_through
from dataeff.nn.gates import FeedForwardGate, GateState, RecurrentGate
from dataeff.nn.resnet import Family, Norm, ResidualBlock, ResNet, Shortcut

Gate = Literal["rnn", "ffgate1", "ffgate2", "linear", "none"]
FEED_FORWARD_VARIANTS: dict[str, Literal["I", "II", "linear"]] = {"ffgate1": "I", "ffgate2": "II", "linear": "linear"}

# What a gate's logit becomes in Eq. 2.1: (logit, uniform numbers, temperature) -> value, each (B,).
GATE_RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "straight_through": lambda logit, draws, temperature: straight_through(torch.sigmoid(logit)),
    "sample": lambda logit, draws, temperature: (draws < torch.sigmoid(logit.detach())).float(),
    "hard": lambda logit, draws, temperature: (logit >= 0).float(),
    "soft": lambda logit, draws, temperature: torch.sigmoid(logit),
    "gumbel": lambda logit, draws, temperature: torch.sigmoid((logit + _logistic_noise(draws)) / temperature),
}
UNGATED_MODES = ("random", "full", "expected")
MODES_WITH_DRAWS = ("sample", "gumbel", "random")


@dataclass
class SkipNetOutput:
    """One forward pass.

    Attributes:
        logits: class logits, float32 (B, K).
        gate_logits: logit of "execute" of every gate on the path taken, float32 (B, N); (B, 0) in the modes that do
            not ask the gates ("random", "full", "expected").
        gates: value used in Eq. 2.1, float32 (B, N), column i for block i+2; 0 or 1, in "soft", "gumbel" and
            "expected" between 0 and 1.
        macs: convolution multiply-adds spent on each image, float64 (B,): blocks whose gate is above 0, the gates
            if they were asked, stem, first block and all shortcut projections.
    """

    logits: Tensor
    gate_logits: Tensor
    gates: Tensor
    macs: Tensor


@dataclass(frozen=True)
class SkipNetCosts:
    """Multiply-adds of one image by part. Tensors are float64 (N,), entry i for block i+2 and the gate before it.

    Attributes:
        stem, first_block: convolutions that always run (the first block with its shortcut).
        blocks: residual branches.
        shortcuts: projections where the shape changes; run whether the block is skipped or not.
        gates: convolutions of the gates.
        head_linear, gate_linear: linear and LSTM multiply-adds, kept apart: they are not in any total here.
    """

    stem: float
    first_block: float
    blocks: Tensor
    shortcuts: Tensor
    gates: Tensor
    head_linear: float
    gate_linear: Tensor

    @property
    def full(self) -> float:
        """The base network: every block, no gates."""
        return self.stem + self.first_block + float(self.blocks.sum() + self.shortcuts.sum())

    @property
    def ungated(self) -> Tensor:
        """What an image costs when every gated block is skipped and no gate is asked, float64 scalar."""
        return self.shortcuts.sum() + (self.stem + self.first_block)

    @property
    def minimum(self) -> Tensor:
        """What an image costs when every gate is asked and every gated block is skipped, float64 scalar."""
        return self.ungated + self.gates.sum()


class SkipNet(nn.Module):
    """A `ResNet` (`backbone`) whose blocks 2..M are executed or bypassed image by image.

    Gate i reads the gated output of block i and decides block i+1, so there are N = M - 1 gates.

    Args:
        backbone: the base network.
        gate: "rnn" (one LSTM for all positions), "ffgate1", "ffgate2", "linear" or "none" (no gate parameters; only
            the modes "full", "random" and "expected").
        norm: normalisation inside feed-forward gates, "batch" or "group".
        embed_dim, hidden_dim: LSTM input and state size ("rnn" only).
        gate_bias_init: bias of the gates' output at the start; 0.5 to 2 keeps small runs from skipping everything.
    """

    def __init__(
        self,
        backbone: ResNet,
        gate: Gate = "rnn",
        norm: Norm = "batch",
        embed_dim: int = 10,
        hidden_dim: int = 10,
        gate_bias_init: float = 0.0,
    ):
        super().__init__()
        self.backbone = backbone
        channels = [block.out_channels for block in self.blocks[:-1]]
        self.gates: nn.ModuleList | RecurrentGate | None
        if gate == "none":
            self.gates = None
        elif gate == "rnn":
            self.gates = RecurrentGate(channels, embed_dim, hidden_dim, gate_bias_init)
        elif gate in FEED_FORWARD_VARIANTS:
            variant = FEED_FORWARD_VARIANTS[gate]
            self.gates = nn.ModuleList(FeedForwardGate(c, variant, norm, gate_bias_init) for c in channels)
        else:
            raise ValueError(f"gate must be 'rnn', 'ffgate1', 'ffgate2', 'linear' or 'none', got {gate!r}")
        self._costs: dict[tuple[int, int, torch.device], SkipNetCosts] = {}

    @property
    def blocks(self) -> list[ResidualBlock]:
        """Blocks 1..M; block 1 always runs."""
        return [block for block in self.backbone.blocks if isinstance(block, ResidualBlock)]

    @property
    def num_gates(self) -> int:
        """N, the number of blocks that can be skipped."""
        return len(self.backbone.blocks) - 1

    def forward(
        self,
        x: Tensor,
        mode: str = "hard",
        draws: Tensor | None = None,
        keep: float | Tensor | None = None,
        temperature: float = 1.0,
    ) -> SkipNetOutput:
        """Classify images and decide block by block, sequentially.

        Args:
            x: images, float (B, C, H, W), normalised.
            mode: "straight_through" (hard forward, gradient as if soft; Eq. 2.7), "sample" (Bernoulli, no gradient
                through it), "hard" (execute where the probability is at least 0.5), "soft" (the probability
                itself), "gumbel" (relaxed sample), "random" (execute with probability `keep`, gates not asked:
                the SDV baseline and stochastic depth in training), "full" (the base network) or "expected" (the
                residual branch scaled by `keep`: stochastic depth at inference).
            draws: uniform numbers in [0, 1), (B, N), for "sample", "gumbel" and "random"; equal rows make one
                decision for the whole mini-batch.
            keep: execute-probability for "random" and "expected", a number or (N,).
            temperature: of the relaxed sample ("gumbel" only), above 0.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses, an unknown mode or a missing argument.
        """
        self.backbone.check_images(x)
        size = (x.shape[2], x.shape[3])
        draws, keep = self._check_arguments(x, mode, draws, keep, temperature)
        blocks = self.blocks
        x = blocks[0](self.backbone.stem(x))
        state: GateState | None = None
        logits: list[Tensor] = []
        gates: list[Tensor] = []
        for position, block in enumerate(blocks[1:]):
            if mode == "full":
                x = block(x)
                continue
            if mode == "expected":
                x = F.relu(block.residual(x) * keep[position] + block.shortcut(x))
                continue
            if mode == "random":
                gate = (draws[:, position] < keep[position]).float()
            else:
                logit, state = self._ask_gate(x, state, position)
                gate = GATE_RULES[mode](logit, draws[:, position], temperature)
                logits.append(logit)
            gates.append(gate)
            x = _gated(block, x, gate)
        if mode in ("full", "expected"):
            value = keep if mode == "expected" else x.new_ones(self.num_gates)
            gates = list(value.float().expand(len(x), -1).unbind(1))
        values = torch.stack(gates, 1)
        gate_logits = torch.stack(logits, 1) if logits else values.new_empty(len(x), 0)
        costs = self.costs(*size)
        spent = costs.ungated if mode in UNGATED_MODES else costs.minimum
        macs = spent + (values.detach() > 0).double() @ costs.blocks
        return SkipNetOutput(self.backbone.classify(x), gate_logits, values, macs)

    def _check_arguments(
        self, x: Tensor, mode: str, draws: Tensor | None, keep: float | Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        if mode not in GATE_RULES and mode not in UNGATED_MODES:
            raise ValueError(f"mode must be one of {', '.join([*GATE_RULES, *UNGATED_MODES])}, got {mode!r}")
        if self.gates is None and mode in GATE_RULES:
            raise ValueError(f"mode {mode!r} needs gates, this network has gate='none': use {', '.join(UNGATED_MODES)}")
        if mode in MODES_WITH_DRAWS and (draws is None or draws.shape != (len(x), self.num_gates)):
            shape = None if draws is None else tuple(draws.shape)
            raise ValueError(f"mode {mode!r} needs draws of shape {(len(x), self.num_gates)}, got {shape}")
        if mode in ("random", "expected"):
            if keep is None:
                raise ValueError(f"mode {mode!r} needs keep, the execute-probability (a number or one per gate)")
            keep = torch.as_tensor(keep, device=x.device, dtype=torch.float32).expand(self.num_gates)
        if mode == "gumbel" and temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        unused = x.new_empty(len(x), self.num_gates)
        return draws if draws is not None else unused, keep if isinstance(keep, Tensor) else unused

    def _ask_gate(self, x: Tensor, state: GateState | None, position: int) -> tuple[Tensor, GateState | None]:
        if isinstance(self.gates, RecurrentGate):
            logit, state = self.gates(x, state, position)
            return logit, state
        assert self.gates is not None
        return self.gates[position](x), None

    def costs(self, height: int, width: int) -> SkipNetCosts:
        """Multiply-adds by part for images of `height` x `width`, on the device of the parameters."""
        device = self.backbone.head.weight.device
        key = (height, width, device)
        if key not in self._costs:
            self._costs[key] = self._count_costs(height, width, device)
        return self._costs[key]

    def _count_costs(self, height: int, width: int, device: torch.device) -> SkipNetCosts:
        stem, height, width = self.backbone.stem_macs(height, width)
        residuals, shortcuts, gates, gate_linear = [], [], [], []
        for position, block in enumerate(self.blocks):
            residual, shortcut, height, width = block.macs(height, width)
            residuals.append(residual)
            shortcuts.append(shortcut)
            if position == self.num_gates:
                break
            gate = self.gates[position] if isinstance(self.gates, nn.ModuleList) else None
            gates.append(gate.macs(height, width) if isinstance(gate, FeedForwardGate) else 0.0)
            if isinstance(self.gates, RecurrentGate):
                gate_linear.append(self.gates.linear_macs(position))
            else:
                gate_linear.append(gate.linear_macs() if isinstance(gate, FeedForwardGate) else 0.0)

        def vector(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return SkipNetCosts(
            stem=stem,
            first_block=residuals[0] + shortcuts[0],
            blocks=vector(residuals[1:]),
            shortcuts=vector(shortcuts[1:]),
            gates=vector(gates),
            head_linear=float(self.backbone.head.weight.numel()),
            gate_linear=vector(gate_linear),
        )

    @torch.no_grad()
    def scale_gates(self, temperature: float) -> None:
        """Divide weights and bias of the gates' output by `temperature`, once, before stage 2 (spec section 2.8).

        Below 1 makes decisions nearly certain, above 1 makes them explore.
        """
        if not temperature > 0:
            raise ValueError(f"gate_temperature must be above 0, got {temperature}")
        gates = [self.gates] if isinstance(self.gates, RecurrentGate) else list(self.gates or [])
        for gate in gates:
            assert isinstance(gate, RecurrentGate | FeedForwardGate)
            gate.output.weight.div_(temperature)
            gate.output.bias.div_(temperature)


def build_skipnet(
    depth: int = 38,
    num_classes: int = 10,
    gate: Gate = "rnn",
    in_channels: int = 3,
    widths: tuple[int, ...] | None = None,
    norm: Norm = "batch",
    shortcut: Shortcut = "projection",
    family: Family = "cifar",
    embed_dim: int = 10,
    hidden_dim: int = 10,
    gate_bias_init: float = 0.0,
) -> SkipNet:
    """SkipNet from scratch; arguments as for `ResNet` and `SkipNet`.

    Example:
        model = build_skipnet(depth=110, num_classes=10, gate="rnn")
        output = model(images, mode="straight_through")
        loss = F.cross_entropy(output.logits, labels)
    """
    backbone = ResNet(depth, num_classes, in_channels, widths, norm, shortcut, family)
    return SkipNet(backbone, gate, norm, embed_dim, hidden_dim, gate_bias_init)


def survival_probabilities(num_gates: int, last: float = 0.5) -> Tensor:
    """Keep vector (N,) of stochastic depth, p_l = 1 - (l/L)(1 - last) for the blocks l = 2..L with L = N + 1.

    Block 1 always executes here, unlike in the stochastic-depth paper.
    """
    if not 0 < last <= 1:
        raise ValueError(f"survival probability of the last block must be in (0, 1], got {last}")
    count = num_gates + 1
    return 1 - torch.arange(2, count + 1, dtype=torch.float32) / count * (1 - last)


def _gated(block: ResidualBlock, x: Tensor, gate: Tensor) -> Tensor:
    """Eq. 2.1 on all images: gate * block(x) + (1 - gate) * shortcut(x), gate (B,).

    lerp is exact for gates 0 and 1 and reads the features once.
    """
    shortcut = block.shortcut(x)
    executed = F.relu(block.residual(x) + shortcut)
    return torch.lerp(shortcut, executed, gate.to(executed.dtype).view(-1, 1, 1, 1))


def _logistic_noise(draws: Tensor) -> Tensor:
    """Difference of two Gumbel numbers, from one uniform number."""
    return torch.logit(draws, eps=1e-6)
