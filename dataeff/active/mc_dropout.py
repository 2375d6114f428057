"""Predictions of many networks for the price of a little more than one: passes with dropout (spec initial_pools
section 2.3, `dbal`).

What stands before the first dropout layer is the same in every pass and runs once; only the rest runs T times, on T
masks at once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataeff.active.scores import FloatArray, entropy, softmax


@dataclass(frozen=True)
class McPrediction:
    """What T passes with dropout say of U images.

    Args:
        mean: mean prediction, float64 [U, C].
        mean_entropy: mean over the passes of each pass's entropy in nats, float64 [U].
        identical: every pass gave the same.
    """

    mean: FloatArray
    mean_entropy: FloatArray
    identical: bool

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def mutual_information(self) -> FloatArray:
        """BALD: H[mean prediction] - mean H[prediction] in nats, float64 [U], at least 0 but for rounding."""
        return entropy(self.mean) - self.mean_entropy

    @classmethod
    def from_passes(cls, probabilities: np.ndarray) -> "McPrediction":
        """From the predictions of every pass, float [T, U, C]."""
        passes = np.asarray(probabilities, dtype=np.float64)
        identical = bool((passes == passes[:1]).all())
        return cls(passes.mean(axis=0), entropy(passes).mean(axis=0), identical)


@torch.no_grad()
def mc_dropout(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[Tensor],
    passes: int = 25,
    seed: int = 0,
    rows_at_once: int = 8192,
) -> McPrediction:
    """Predictions of `passes` networks that dropout draws from one.

    BatchNorm and all else are in eval mode; only dropout is on. A pass is one draw of the network: its masks are the
    same for all images (Kirsch et al. 2019, "BatchBALD", section 3.2), so that neither the order of the images nor the
    size of a batch changes a prediction.

    Args:
        before: the part before the first dropout layer, images [B, ...] -> hidden [B, ...]; `nn.Identity()` where there
            is none. Runs once a batch.
        after: the rest, hidden [B, ...] -> logits [B, C], with at least one `nn.Dropout` of p > 0. Runs on B * T rows.
        batches: images, on the device of the modules.
        passes: T, at least 1.
        seed: of the masks.
        rows_at_once: bound on the rows that `after` sees at once, for memory.

    Raises:
        ValueError: no dropout layer with p > 0 in `after`, or one in `before`; or passes below 1.

    Example::

        after = nn.Sequential(classifier.encoder.project, classifier.linear)
        mc = mc_dropout(classifier.encoder.trunk, after, batches, passes=25, seed=7)
        ctx = ALContext(unlabelled, labelled, rng, mc=mc)
    """
    if passes < 1:
        raise ValueError(f"passes = {passes}: must be at least 1")
    if not _dropouts(after):
        raise ValueError("DBAL needs dropout_p > 0: the part after the features has no active dropout layer")
    if _dropouts(before):
        raise ValueError("a dropout layer stands in the part that runs once: it belongs to `after`")
    modes = [(module, module.training) for part in (before, after) for module in part.modules()]
    for module, _ in modes:
        module.eval()
    masks = _Masks(_dropouts(after), passes, seed)
    means, entropies, identical = [], [], True
    try:
        for images in batches:
            hidden = before(images)
            group = max(1, rows_at_once // max(1, len(images)))
            total, total_entropy, first_pass = 0.0, 0.0, None
            for first in range(0, passes, group):
                with masks.of(first, min(first + group, passes)) as count:
                    logits = after(hidden.expand(count, *hidden.shape).flatten(0, 1))
                p = softmax(logits.view(count, len(images), -1).cpu().numpy())
                first_pass = p[:1] if first_pass is None else first_pass
                identical = identical and bool((p == first_pass).all())
                total, total_entropy = total + p.sum(axis=0), total_entropy + entropy(p).sum(axis=0)
            means.append(total / passes)
            entropies.append(total_entropy / passes)
    finally:
        for module, mode in modes:
            module.training = mode
    return McPrediction(np.concatenate(means), np.concatenate(entropies), identical)


def _dropouts(module: nn.Module) -> list[nn.Dropout]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Dropout) and layer.p > 0]


class _Masks:
    """One mask a pass and layer, drawn when the layer is first met and kept for all batches."""

    def __init__(self, layers: list[nn.Dropout], passes: int, seed: int) -> None:
        self.layers = layers
        self.passes = passes
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[nn.Module, Tensor] = {}

    @contextmanager
    def of(self, first: int, last: int) -> Iterator[int]:
        """Within, dropout layers apply the masks of passes `first` to before `last` to rows that come pass by pass."""

        def apply(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
            x = inputs[0]
            if layer not in self.drawn:
                keep = 1 - float(layer.p)  # type: ignore[arg-type]
                draws = torch.rand(self.passes, *x.shape[1:], generator=self.generator)
                self.drawn[layer] = ((draws < keep) / keep).to(x)
            mask = self.drawn[layer][first:last].unsqueeze(1)
            masked: Tensor = x.unflatten(0, (last - first, -1)) * mask
            return masked.flatten(0, 1)

        hooks = [layer.register_forward_hook(apply) for layer in self.layers]
        try:
            yield last - first
        finally:
            for hook in hooks:
                hook.remove()
