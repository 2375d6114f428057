"""The network that is trained: AdaSkips with the heads that pretraining and the fine-tuning methods need."""

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from dataeff.dynamic.adaskips.model import AdaSkipResNet


@dataclass
class TransferOutput:
    """One pass: logits (B, K), pooled features (B, d), lambda of each changed module, and what the method asked for:
    logits of the source classes (B, K_s), projected features (B, 128)."""

    logits: Tensor
    embedding: Tensor
    weights: list[Tensor] = field(default_factory=list)
    source_logits: Tensor | None = None
    projection: Tensor | None = None


class TransferNetwork(nn.Module):
    """The network that is pretrained and then transferred, with the extra heads of the fine-tuning methods.

    Args:
        student: its classifier is the target's.
        source_head: classifier of the source data.
        projector: of Bi-Tuning.
    """

    def __init__(
        self, student: AdaSkipResNet, source_head: nn.Linear | None = None, projector: nn.Linear | None = None
    ):
        super().__init__()
        self.student, self.source_head, self.projector = student, source_head, projector

    def forward(self, x: Tensor, draws: Tensor | None = None, plain: bool = False) -> TransferOutput:
        """Images (B, C, H, W); `plain`: the source network as it was pretrained, whose logits are the source's."""
        features = self.student.run(x, draws, plain)
        embedding = features.embedding
        if plain:
            assert self.source_head is not None
            return TransferOutput(self.source_head(embedding), embedding)
        return TransferOutput(
            self.student.classify(embedding),
            embedding,
            features.weights,
            self.source_head(embedding) if self.source_head is not None else None,
            self.projector(embedding) if self.projector is not None else None,
        )


def frozen_copy(model: TransferNetwork) -> TransferNetwork:
    """A copy in evaluation mode that does not learn."""
    duplicate = copy.deepcopy(model).eval()
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
    return duplicate
