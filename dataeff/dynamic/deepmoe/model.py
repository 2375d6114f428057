"""DeepMoE: every channel of every gated convolution is an expert, chosen per image by a shallow embedding network.

Source: spec deepmoe sections 2.1 to 2.3. B images, K classes, d latent experts, L gated layers of C_l channels. In
training all channels are computed and multiplied by their gates (masked execution); `inference.DeepMoEInference`
computes the active ones only.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.deepmoe.network import Block, GatedNetwork, build_network
from dataeff.nn.resnet import Init, conv2d_macs, init_weights

LatentActivation = Literal["softmax", "relu", "identity"]
GateInit = Literal["ones", "kaiming"]
EMBEDDING_WIDTHS = {4: (32, 64, 64, 64), 5: (16, 32, 64, 128, 128)}
GATE_INIT_STD = 0.3


@dataclass
class MoEOutput:
    """One forward pass.

    Attributes:
        logits: float32 (B, K), for dense answers (B, K, H, W).
        gates: value of every gate before `normalize_gates`, float32 (B, C_l) per gated layer; exact zeros are off.
        embedding: latent mixture weights e, (B, d).
        embedding_logits: class logits of the embedding for L_e, (B, K).
        macs: multiply-adds of each image, float64 (B,): shortcuts and ungated convolutions, active channels of the
            gated ones, embedding network and heads; without the classifier.
        active_share: mean over layers of |A_l| / C_l, (B,).
    """

    logits: Tensor
    gates: list[Tensor]
    embedding: Tensor
    embedding_logits: Tensor
    macs: Tensor
    active_share: Tensor


class ShallowEmbedding(nn.Module):
    """Images (B, C, H, W) -> latent logits v (B, d) and latent mixture weights e = softmax(v / T) (B, d).

    3x3 convolutions of stride 2, BN, ReLU; global average pool; linear (spec section 2.2; widths are an open choice).

    Args:
        widths: of the convolutions, 4 for CIFAR, 5 for ImageNet.
        activation: of the latent.
        temperature: T; a high one makes gates equal for all images.
        init: of the weights, see `build_network`.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...] = EMBEDDING_WIDTHS[4],
        latent: int = 128,
        activation: LatentActivation = "softmax",
        temperature: float = 1.0,
        init: Init = "he",
    ):
        super().__init__()
        if not widths or min(widths) < 1 or latent < 1:
            raise ValueError(f"embedding widths and latent must be at least 1, got {list(widths)} and {latent}")
        if activation not in ("softmax", "relu", "identity") or not temperature > 0:
            raise ValueError(
                f"latent_activation must be softmax, relu or identity and temperature above 0, "
                f"got {activation!r} and {temperature}"
            )
        layers: list[nn.Module] = []
        for inputs, outputs in zip((in_channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], latent)
        self.activation, self.temperature, self.latent = activation, temperature, latent
        if init == "he":
            init_weights(self)

    @property
    def smallest(self) -> int:
        """Height and width an image needs for every convolution but the last to halve something."""
        return 1 << (len(self.features) // 3 - 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(images)
        with torch.autocast(x.device.type, enabled=False):  # a rounded latent would move gates across zero
            logits = self.output(x.mean((2, 3), dtype=torch.float32))
            return logits, self.activate(logits)

    def activate(self, logits: Tensor) -> Tensor:
        """v -> e."""
        if self.activation == "softmax":
            return F.softmax(logits / self.temperature, 1)
        return F.relu(logits) if self.activation == "relu" else logits

    def macs(self, height: int, width: int) -> float:
        """Multiply-adds of one image, the linear layer included."""
        total = float(self.output.weight.numel())
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                macs, height, width = conv2d_macs(layer, height, width)
                total += macs
        return total


class SparseGatingHeads(nn.Module):
    """e (B, d) -> g^l = ReLU(W_g^l e) (B, C_l) for every gated layer, without bias (Eq. 3.6).

    Args:
        channels: C_l of every layer.
        latent: d.
        init: "ones": W_g ~ N(1, 0.3), so that with a softmax latent all channels start on; "kaiming": zero mean, about
            half start off, and a channel that is off for all images never gets a gradient again.
        keep_top: give the largest channel of a layer without active ones the gate `FLOOR`.
    """

    FLOOR = 0.01

    def __init__(self, channels: list[int], latent: int, init: GateInit = "ones", keep_top: bool = False):
        super().__init__()
        if init not in ("ones", "kaiming"):
            raise ValueError(f"gate_init must be 'ones' or 'kaiming', got {init!r}")
        self.channels, self.keep_top = list(channels), keep_top
        self.weight = nn.Parameter(torch.empty(sum(channels), latent))  # the W_g^l below each other
        if init == "ones":
            nn.init.normal_(self.weight, 1.0, GATE_INIT_STD)
        else:
            nn.init.normal_(self.weight, 0.0, math.sqrt(2 / latent))

    def forward(self, embedding: Tensor) -> list[Tensor]:
        with torch.autocast(embedding.device.type, enabled=False):
            scores = F.linear(embedding.float(), self.weight)
        gates = list(F.relu(scores).split(self.channels, 1))
        if not self.keep_top:
            return gates
        return [self._with_top(*pair) for pair in zip(gates, scores.split(self.channels, 1), strict=True)]

    def _with_top(self, gate: Tensor, scores: Tensor) -> Tensor:
        top = F.one_hot(scores.argmax(1), scores.shape[1]) * (gate.amax(1, keepdim=True) == 0)
        return gate + self.FLOOR * top.to(gate.dtype)


class DeepMoE(nn.Module):
    """Base network, embedding network, gating heads, and a classifier on the embedding.

    Args:
        network: the base.
        embedding: M.
        class_head: "linear" d -> K on the latent logits, or "identity" (d = K: they are class logits themselves).
        gate_init, keep_top: see `SparseGatingHeads`.
        normalize_gates: divide a layer's gates by the mean of the positive ones before they are applied, so that the
            penalty cannot be lowered by a common scale.
        heads: in place of `SparseGatingHeads`; called with e, and with `draws` where `forward` gets some.

    Example:
        model = build_deepmoe("resnet20", num_classes=10, width=2)
        output = model(images)
        loss, parts = deepmoe_loss(output, labels, lam=2.0, mu=1.0)
    """

    def __init__(
        self,
        network: GatedNetwork,
        embedding: ShallowEmbedding,
        class_head: Literal["linear", "identity"] = "linear",
        gate_init: GateInit = "ones",
        keep_top: bool = False,
        normalize_gates: bool = False,
        heads: nn.Module | None = None,
    ):
        super().__init__()
        if class_head == "identity" and embedding.latent != network.num_classes:
            raise ValueError(
                f"class_head 'identity' needs latent = {network.num_classes} classes, got {embedding.latent}"
            )
        if not network.gate_channels:
            raise ValueError("the base network has no gated layer")
        self.network, self.embedding = network, embedding
        self.heads = heads or SparseGatingHeads(network.gate_channels, embedding.latent, gate_init, keep_top)
        linear = class_head == "linear"
        self.class_head: nn.Module = nn.Linear(embedding.latent, network.num_classes) if linear else nn.Identity()
        self.normalize_gates = normalize_gates

    @property
    def smallest(self) -> int:
        """Height and width that images need at least."""
        return max(self.embedding.smallest, self.network.stride)

    def forward(self, x: Tensor, embedding: Tensor | None = None, draws: Tensor | None = None) -> MoEOutput:
        """Classify images.

        Args:
            x: float (B, C, H, W), normalised.
            embedding: (B, d), in place of the images' own latent mixture weights (the shuffling analysis).
            draws: uniform numbers (B, sum of C_l) for heads with noise.

        Raises:
            ValueError: for images that `GatedNetwork.check_images` refuses or an embedding of another shape.
        """
        self.network.check_images(x, self.smallest)
        latent, e = self.embedding(x)
        if embedding is not None:
            check_embedding(embedding, len(x), self.embedding.latent)
            e = embedding
        gates: list[Tensor] = self.heads(e) if draws is None else self.heads(e, draws)
        applied = normalized(gates) if self.normalize_gates else gates
        features = self.network.features(x, lambda index, _: applied[index])
        with torch.autocast(x.device.type, enabled=False):
            embedding_logits = self.class_head(latent)
        counts = active_counts(gates)
        macs = self.network.macs(counts, x.shape[2], x.shape[3]) + self.router_macs(x.shape[2], x.shape[3])
        return MoEOutput(
            self.network.classify(features, x.shape), gates, e, embedding_logits, macs, self.active_share(counts)
        )

    def router_macs(self, height: int, width: int) -> float:
        """Multiply-adds of embedding network and heads for one image."""
        return self.embedding.macs(height, width) + self.embedding.latent * sum(self.network.gate_channels)

    def active_share(self, counts: Tensor) -> Tensor:
        """Active channels (B, L) -> mean over layers of |A_l| / C_l, (B,)."""
        return active_shares(counts, self.network.gate_channels)

    def freeze_router(self) -> None:
        """Fix embedding, heads and class head for the fine-tune stage; they belong in eval mode as well."""
        for part in (self.embedding, self.heads, self.class_head):
            part.requires_grad_(False)
            part.eval()

    def check_router_frozen(self) -> None:
        """
        Raises:
            RuntimeError: the router still learns, or its BatchNorm statistics would move.
        """
        parts = (self.embedding, self.heads, self.class_head)
        if any(p.requires_grad for part in parts for p in part.parameters()) or self.embedding.training:
            raise RuntimeError("fine-tuning needs a frozen router in evaluation mode: call freeze_router()")


def check_embedding(embedding: Tensor, count: int, latent: int) -> None:
    """
    Raises:
        ValueError: an embedding that is not (count, latent).
    """
    if embedding.shape != (count, latent):
        raise ValueError(f"embedding must be (B, d) = {(count, latent)}, got {tuple(embedding.shape)}")


def active_counts(gates: list[Tensor]) -> Tensor:
    """|A_l| of each image, int64 (B, L)."""
    return torch.stack([(gate.detach() > 0).sum(1) for gate in gates], 1)


def active_shares(counts: Tensor, channels: list[int]) -> Tensor:
    """Active channels (B, L) of layers with C_l channels -> mean over layers of |A_l| / C_l, (B,)."""
    return (counts / torch.tensor(channels, device=counts.device)).mean(1)


def normalized(gates: list[Tensor]) -> list[Tensor]:
    """Each layer's gates divided by the mean of the image's positive ones."""
    result = []
    for gate in gates:
        count = (gate > 0).sum(1, keepdim=True).clamp(min=1)
        result.append(gate * count / gate.sum(1, keepdim=True).clamp(min=1e-12))
    return result


def build_deepmoe(
    arch: str = "vgg16",
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 2,
    block: Block | None = None,
    widths: tuple[int, ...] | None = None,
    gated_convs: tuple[int, ...] | None = None,
    gated_layers: tuple[int, ...] | None = None,
    embedding_widths: tuple[int, ...] = EMBEDDING_WIDTHS[4],
    latent: int | None = None,
    latent_activation: LatentActivation = "softmax",
    temperature: float = 1.0,
    class_head: Literal["linear", "identity"] | None = None,
    gate_init: GateInit = "ones",
    keep_top: bool = False,
    normalize_gates: bool = False,
    init: Init = "he",
) -> DeepMoE:
    """DeepMoE from scratch: wide with `width` 2, narrow with 1; arguments as for `build_network` and `DeepMoE`.

    Args:
        latent: d; None for the number of classes.
        class_head: None for "identity" where d = K, else "linear".

    Raises:
        ValueError: width below 1, or what the parts refuse.
    """
    if width < 1:
        raise ValueError(f"width of a gated network must be at least 1, got {width}")
    network = build_network(arch, num_classes, in_channels, width, block, widths, gated_convs, gated_layers, init)
    latent = latent or num_classes
    embedding = ShallowEmbedding(in_channels, embedding_widths, latent, latent_activation, temperature, init)
    head = class_head or ("identity" if latent == num_classes else "linear")
    return DeepMoE(network, embedding, head, gate_init, keep_top, normalize_gates)
