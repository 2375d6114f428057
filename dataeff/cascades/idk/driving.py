"""The driving task: a small LRCN on video that hands over to a person when in doubt (spec sections 3 and 8.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.cascades.idk.cascade import CascadeReport, evaluate_tables
from dataeff.cascades.idk.fit import FitConfig, FittedCascade, fit_cascade
from dataeff.core.experiment import seed_everything
from dataeff.data.dashcam import STATES, Clips


class LRCN(nn.Module):
    """A CNN on each frame and its difference to the one before, an LSTM over time, and the next state.

    Input: clips float32 (B, T, 1, H, W); output: logits (B, classes).
    """

    def __init__(self, size: int = 16, classes: int = len(STATES), features: int = 48, hidden: int = 32) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(2, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, features),
            nn.ReLU(),
        )
        self.memory = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, clips: Tensor) -> Tensor:
        before = torch.cat([clips[:, :1], clips[:, :-1]], dim=1)
        pairs = torch.cat([clips, clips - before], dim=2)
        features = self.frame(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        logits: Tensor = self.head(self.memory(features)[0][:, -1])
        return logits


def train_lrcn(clips: Clips, steps: int = 500, batch: int = 64, lr: float = 2e-3, seed: int = 0) -> LRCN:
    """An LRCN trained with Adam on mini-batches of clips; in evaluation mode."""
    seed_everything(seed)
    model = LRCN(clips.frames.shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(clips.labels), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(clips.frames[rows]), clips.labels[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def answers(model: LRCN, clips: Clips, batch: int = 500) -> Tensor:
    """Probabilities of the next state, float32 (N, 4)."""
    return torch.cat([model(part).softmax(1) for part in clips.frames.split(batch)])


@dataclass(frozen=True)
class HandOver:
    """A cascade of driver model and person, and its report on test clips."""

    fitted: FittedCascade
    test: CascadeReport

    @property
    def interventions(self) -> float:
        """Share of the clips where the person takes over."""
        return float(self.test.idk_overall[-1])


def hand_over(
    calibration: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], config: FitConfig, seed: int = 0
) -> HandOver:
    """Fit when the person takes over, for an absolute accuracy goal.

    Args:
        calibration, test: probabilities (n, 4) and labels (n,) of each set. config: with an `accuracy_goal`.
    """
    (known, labels), (new, new_labels) = calibration, test
    # One intervention is the unit of cost; the model's own answers are free beside it.
    fitted = fit_cascade([known], labels.numpy(), [0.0], config, human_cost=1.0, seed=seed)
    return HandOver(fitted, evaluate_tables([new], new_labels.numpy(), fitted.idk, [0.0, 1.0]))
