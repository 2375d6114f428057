"""HydraNet that executes only the selected branches, with folded BatchNorm (spec hydranet section 2.5)."""

import torch
from torch import Tensor, nn

from dataeff.dynamic.hydranet.blocks import Folded
from dataeff.dynamic.hydranet.model import LEARNED, HydraNet, HydraOutput, combine_pairs, selection_mask, top_k
from dataeff.nn.branches import Fold, run_branches
from dataeff.nn.fold import channels_last
from dataeff.nn.predictor import check_budget


class HydraInference:
    """Evaluation-mode `HydraNet` for answering.

    The (image, branch) pairs of a batch are sorted by branch: a branch runs once, on its images, and its features are
    added to theirs.

    Args:
        model: in evaluation mode, on the device to run on; its weights are copied.
        dense: run all branches on all images and mask, as in training; the baseline of timings.

    Raises:
        ValueError: for a model in training mode.

    Example:
        fast = HydraInference(model.eval())
        output = fast(images, budget=torch.full((len(images),), 1e7, dtype=torch.float64))
    """

    def __init__(self, model: HydraNet, dense: bool = False):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before HydraInference(model)")
        self.model = model
        self.stem = model.stem.fold(Fold())
        self.gate_tail = model.gate.tail.fold(Fold()) if model.gate is not None else None
        self.combiner = model.combiner.fold(Fold())
        self.store: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.bank = self._fold(None) if dense else None
        self.branches = [] if dense else [self._fold(branch) for branch in range(model.config.n_branches)]
        self.weighted = model.config.strategy in LEARNED

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        budget: Tensor | None = None,
        k: int | None = None,
        executed: Tensor | None = None,
        rescale: bool = False,
    ) -> HydraOutput:
        """Classify images.

        Args:
            x: images float (B, C, H, W), normalised.
            budget: multiply-adds allowed for each image, float64 (B,), inf for no limit: an image executes as many of
                its k branches as fit, best first, and one if none fits.
            k: branches of an image, in place of the trained number.
            executed: which branches an image runs, bool (B, n), in place of the gate's choice and the budget.
            rescale: bring the sum of fewer or more branches to the scale of the trained k.

        Returns:
            What `HydraNet` returns in evaluation mode, within rounding.

        Raises:
            ValueError: as `HydraNet.forward`, and for a budget of a wrong shape or NaN.
        """
        model, config = self.model, self.model.config
        model.check_images(x)
        check_budget(budget, len(x))
        h = self.stem(channels_last(x.to(model.classifier.weight.dtype)))
        gate_logits = self._scores(h)
        if executed is None:
            selected = model.select(gate_logits, k)
            if budget is not None and model.gate is not None:
                selected = self._within(budget, selected, (x.shape[2], x.shape[3]))
            executed = selection_mask(selected, config.n_branches)
        else:
            selected = top_k(executed.float(), int(executed.sum(1).max()))
            selected = torch.where(executed.gather(1, selected), selected, -1)
        probs = gate_logits.softmax(1)
        weights = probs if self.weighted else None
        if rescale:
            scale = config.k / executed.sum(1, keepdim=True).clamp(min=1)
            weights = (probs if self.weighted else torch.ones_like(probs)) * scale
        if self.bank is not None:
            outputs = self.bank(h).unflatten(1, (config.n_branches, model.features))
            combined = model.combine_masked(outputs, executed, weights)
        else:
            shape = model.feature_shape(h)
            combined = combine_pairs(run_branches(h, executed, self._run), executed, weights, shape, config.combine)
        logits = model.classify(self.combiner(combined))
        return HydraOutput(logits, gate_logits, probs, selected, model.macs(executed, (x.shape[2], x.shape[3])))

    def _fold(self, branch: int | None) -> Folded:
        fold = Fold(branch, self.store)
        tail, projection = self.model.branches.fold(fold), self.model.projection.fold(fold)
        return lambda h: projection(tail(h))

    def _run(self, branch: int, h: Tensor) -> Tensor:
        return self.branches[branch](h)

    def _scores(self, h: Tensor) -> Tensor:
        gate = self.model.gate
        if self.gate_tail is None or gate is None:
            return self.model.gate_scores(h)
        return self.model.to_branches(gate.output(self.gate_tail(h).float()))

    def _within(self, budget: Tensor, selected: Tensor, size: tuple[int, int]) -> Tensor:
        costs = self.model.costs(*size)
        affordable = ((budget.to(selected.device) - costs.fixed) / costs.branch).floor().clamp(min=1)
        ranks = torch.arange(selected.shape[1], device=selected.device)
        return torch.where(ranks < affordable[:, None], selected, -1)
