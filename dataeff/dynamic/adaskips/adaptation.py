"""Zero-shot domain adaptation: the uniform prior on features, and adversarial adaptation of the target's encoder.

Source: spec adaskips section 2.7; the definitions are those of the published papers.
"""

import math
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.data import Batch
from dataeff.dynamic.adaskips.network import TransferNetwork

Average = Callable[[Tensor], Tensor]
NO_SIGNAL = 1e-3  # a discriminator's loss, in nats, this near to 0 or to that of a coin


class UniformPriorRegularizer(nn.Module):
    """Makes features look like u ~ U(-a, a)^d to a discriminator D that is trained along.

    L_D = -E[log D(u)] - E[log(1 - D(z))]; the encoder adds -gamma E[log D(z)] to its loss.

    Args:
        dim: d.
        bound: a.
        weight: gamma.
        lr: of D's Adam.
    """

    def __init__(self, dim: int, bound: float = 1.0, weight: float = 0.1, lr: float = 1e-4):
        super().__init__()
        self.bound, self.weight = bound, weight
        self.discriminator = _mlp(dim, 128, 1)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr)

    def discriminator_loss(self, z: Tensor, u: Tensor) -> Tensor:
        """L_D of features z and prior samples u, both (B, d)."""
        on_prior, on_features = self.discriminator(u), self.discriminator(z)
        return F.softplus(-on_prior).mean() + F.softplus(on_features).mean()

    def encoder_loss(self, z: Tensor) -> Tensor:
        """-E[log D(z)], without gamma."""
        return F.softplus(-self.discriminator(z)).mean()

    def step(self, z: Tensor, draws: Tensor, average: Average) -> Tensor:
        """Train D on features (B, d) and as many samples of the prior, from uniform numbers (B, d); how often it was
        right before, a scalar.

        Args:
            average: mean of a gradient over workers.
        """
        u = self.bound * (2 * draws - 1)
        z = z.detach()
        with torch.no_grad():
            right = torch.cat([self.discriminator(u) > 0, self.discriminator(z) <= 0]).float().mean()
        _update(self.optimizer, self.discriminator_loss(z, u), average)
        return right


class ADDATrainer(nn.Module):
    """The frozen source encoder and the discriminator that tells its features from the target encoder's.

    Args:
        source: network trained on the source; a frozen copy.
        lr: of the discriminator's Adam (betas 0.5 and 0.999).
        patience: mini-batches in a row in which the discriminator teaches nothing - its loss near 0, or near ln 2, a
            coin's - after which `stopped` is set.
    """

    def __init__(self, source: TransferNetwork, lr: float = 2e-4, patience: int = 500):
        super().__init__()
        self.source, self.patience = source, patience
        self.discriminator = _mlp(source.student.embedding_dim, 500, 2)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr, betas=(0.5, 0.999))
        self.idle = 0

    @property
    def stopped(self) -> bool:
        return self.idle >= self.patience

    def discriminator_loss(self, source_z: Tensor, target_z: Tensor) -> Tensor:
        """Cross-entropy of telling source (1) from target (0); features (B, d), as many of both.

        Raises:
            ValueError: different numbers of features.
        """
        if len(source_z) != len(target_z):
            raise ValueError(
                f"the discriminator must see as many images of both domains, got {len(source_z)} of the source and "
                f"{len(target_z)} of the target"
            )
        logits = self.discriminator(torch.cat([source_z, target_z]))
        return F.cross_entropy(logits, _domains(len(source_z), len(target_z), logits.device))

    def encoder_loss(self, target_z: Tensor) -> Tensor:
        """Cross-entropy with inverted labels: target features should look like the source's."""
        logits = self.discriminator(target_z)
        return F.cross_entropy(logits, torch.ones(len(target_z), dtype=torch.int64, device=logits.device))

    def step(self, source_images: Tensor, target_z: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Train the discriminator; its loss and how often it was right before, scalars."""
        with torch.no_grad():
            source_z = self.source(source_images).embedding
            target_z = target_z.detach()
            logits = self.discriminator(torch.cat([source_z, target_z]))
            right = (logits.argmax(1) == _domains(len(source_z), len(target_z), logits.device)).float().mean()
        loss = self.discriminator_loss(source_z, target_z)
        _update(self.optimizer, loss, average)
        return loss.detach(), right

    def watch(self, loss: float) -> None:
        """Count a mini-batch whose discriminator loss (mean over workers) teaches nothing; say so when it stops."""
        before = self.stopped
        self.idle = self.idle + 1 if loss < NO_SIGNAL or abs(loss - math.log(2)) < NO_SIGNAL else 0
        if self.stopped and not before:
            state = "close to 0: it tells the domains apart with certainty" if loss < 0.1 else "that of a coin"
            warnings.warn(
                f"ADDA: for {self.patience} mini-batches the discriminator's loss was {state}; adaptation stops",
                stacklevel=2,
            )


@torch.no_grad()
def evaluate_zsda(model: nn.Module, source: Iterable[Batch], target: Iterable[Batch]) -> dict[str, float]:
    """Accuracy of a classifier (images -> logits), in evaluation mode, on both domains."""

    def accuracy(batches: Iterable[Batch]) -> float:
        right = [model(batch.images).argmax(1) == batch.labels for batch in batches]
        return float(torch.cat(right).double().mean())

    model.eval()
    return {"source_accuracy": accuracy(source), "target_accuracy": accuracy(target)}


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Three layers, ReLU between them."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def _domains(source: int, target: int, device: torch.device) -> Tensor:
    return torch.tensor([1] * source + [0] * target, device=device)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, average: Average) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.copy_(average(parameter.grad))
    optimizer.step()
