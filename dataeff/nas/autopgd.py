"""AutoPGD: PGD with momentum, a step that halves where the loss stalls, and restarts (Croce & Hein 2020, algorithm 1).

Source: spec nas_adversarial_robustness section 2.1, L-infinity.
"""

import torch
from torch import Tensor, nn

from dataeff.nas.threat import (
    AdversarialImages,
    AttackConfig,
    check_batch,
    check_labels,
    clip,
    frozen,
    is_flat,
    project,
    refuse_masked,
    respond,
    uniform_noise,
)

MOMENTUM = 0.75  # weight of the new step against the last move


def apgd(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) and labels (B,) -> adversarial images; an image that is wrong already, or that no restart
    fools, is returned as it came.

    Args and Raises: see `dataeff.nas.attacks.Attack`. With `dlr_fallback`, images whose cross-entropy has no gradient
    are attacked by the difference of logits ratio.
    """
    indices = check_batch(x, y, cfg, indices)
    moved = x.detach().clone()
    if len(x):
        with frozen(model):
            _perturb(model, x, y, cfg, indices, moved)
    return moved.as_subclass(AdversarialImages)


def _perturb(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, moved: Tensor) -> None:
    """Write into `moved` what fools the network."""
    with torch.no_grad():
        logits = model(x)
    check_labels(logits, y)
    right = (logits.argmax(1) == y).nonzero()[:, 0]
    parts = [(cfg, right)]
    if cfg.dlr_fallback and len(right):
        flat = is_flat(respond(model, x[right], y[right], "ce").gradient)
        parts = [(cfg, right[~flat]), (cfg.model_copy(update={"loss": "dlr"}), right[flat])]
    for settings, rows in parts:
        for restart in range(cfg.restarts):
            if not len(rows):
                break
            found, fooled = _single_run(model, x[rows], y[rows], settings, indices[rows.cpu()], restart)
            moved[rows[fooled]] = found[fooled]
            rows = rows[~fooled]


def _single_run(
    model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int
) -> tuple[Tensor, Tensor]:
    """The last point of each image's path that the network gets wrong, and whether there is one: (B,) bool."""
    direction = uniform_noise(cfg, "apgd", indices, restart, x)
    point = clip(x + cfg.eps * direction / direction.abs().amax((1, 2, 3), keepdim=True))
    response = respond(model, point, y, cfg.loss)
    if restart == 0:  # later ones attack few images, among which a flat one says nothing about the network
        refuse_masked(response.gradient)
    gradient = response.gradient
    found, fooled = point.clone(), response.logits.argmax(1) != y
    best, best_gradient, best_loss = point, gradient, response.loss
    previous = point
    steps = _StepSize(cfg, response.loss)
    for iteration in range(cfg.steps):
        share = MOMENTUM if iteration else 1.0
        last_move, previous = point - previous, point
        ahead = project(point + steps.size * gradient.sign(), x, cfg.eps)
        point = project(point + share * (ahead - point) + (1 - share) * last_move, x, cfg.eps)
        response = respond(model, point, y, cfg.loss)
        gradient = response.gradient
        wrong = response.logits.argmax(1) != y
        found, fooled = _where(wrong, point, found), fooled | wrong
        better = response.loss > best_loss
        best, best_gradient = _where(better, point, best), _where(better, gradient, best_gradient)
        best_loss = torch.where(better, response.loss, best_loss)
        halved = steps.update(response.loss, best_loss)
        if halved is not None:
            point, gradient = _where(halved, best, point), _where(halved, best_gradient, gradient)
    return found, fooled


class _StepSize:
    """Step size of each image, halved at checkpoints where its loss rose too seldom or its best loss stood still.

    Args:
        start_loss: (B,), at the starting point.

    Attributes:
        size: (B, 1, 1, 1).
    """

    def __init__(self, cfg: AttackConfig, start_loss: Tensor) -> None:
        self.size = torch.full((len(start_loss), 1, 1, 1), 2 * cfg.eps, device=start_loss.device)
        self._rho = cfg.rho
        self._interval = max(int(0.22 * cfg.steps), 1)
        self._shortest, self._shortening = max(int(0.06 * cfg.steps), 1), max(int(0.03 * cfg.steps), 1)
        self._since = 0
        self._last_loss = self._loss_at_check = start_loss
        self._rises = torch.zeros_like(start_loss)
        self._halved = torch.ones_like(start_loss, dtype=torch.bool)

    def update(self, loss: Tensor, best_loss: Tensor) -> Tensor | None:
        """After an iteration: which images' steps were halved, (B,) bool; None between checkpoints."""
        self._rises = self._rises + (loss > self._last_loss)
        self._last_loss = loss
        self._since += 1
        if self._since < self._interval:
            return None
        oscillates = self._rises <= self._rho * self._since
        stalls = ~self._halved & (self._loss_at_check >= best_loss)
        self._halved = oscillates | stalls
        self.size = _where(self._halved, self.size / 2, self.size)
        self._loss_at_check, self._rises = best_loss, torch.zeros_like(loss)
        self._since, self._interval = 0, max(self._interval - self._shortening, self._shortest)
        return self._halved


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask[:, None, None, None], yes, no)
