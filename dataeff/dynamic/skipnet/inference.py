"""SkipNet that saves the time of the blocks it skips (spec skipnet section 2.9).

Every block runs on the images that execute it and on no other. The result is that of masked execution in mode "hard".
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dataeff.dynamic.skipnet.model import SkipNet, SkipNetOutput
from dataeff.nn.fold import FoldedResNet, channels_last, fold_conv
from dataeff.nn.gates import FeedForwardGate, RecurrentGate
from dataeff.nn.predictor import check_budget
from dataeff.nn.sparse import FeatureRows, Images, Workspace

Floats = NDArray[np.float32]


class GateWalk(Protocol):
    """The gates of a network asked one after the other for one batch."""

    def observe(self, images: Images, features: Tensor) -> None:
        """Features (n, C, H, W) of these images are new."""

    def logits(self, position: int, rows: FeatureRows) -> Floats:
        """Logit of "execute" of all images, (B,)."""


class SkipNetInference:
    """Evaluation-mode `SkipNet` with real skipping and folded BatchNorm.

    Decisions are read on the CPU, block by block. Threads may call one instance at the same time.

    Args:
        model: with gates, in evaluation mode, on the device to run on; its weights are copied.

    Raises:
        ValueError: for a model in training mode or without gates.

    Example:
        fast = SkipNetInference(model.eval())
        output = fast(images, budget=torch.full((len(images),), 1e8, dtype=torch.float64))
    """

    def __init__(self, model: SkipNet):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before SkipNetInference(model)")
        if model.gates is None:
            raise ValueError("this model has gate='none' and cannot skip: use FoldedResNet(model.backbone)")
        self.network = FoldedResNet(model.backbone)
        self.num_gates = model.num_gates
        self.costs = model.costs
        self._workspaces: list[Workspace] = []  # one for each call that ran at the same time as others
        self.gates: _FoldedRecurrentGate | list[_FoldedFeedForwardGate]
        if isinstance(model.gates, RecurrentGate):
            self.gates = _FoldedRecurrentGate(model.gates)
        else:
            self.gates = [_FoldedFeedForwardGate(gate) for gate in model.gates if isinstance(gate, FeedForwardGate)]

    @torch.inference_mode()
    def __call__(self, x: Tensor, budget: Tensor | None = None, forced: Tensor | None = None) -> SkipNetOutput:
        """Classify images.

        Args:
            x: images, float (B, C, H, W), normalised.
            budget: convolution multiply-adds allowed for each image, float64 (B,), inf for no limit. An image executes
                a block only if this leaves enough for everything that cannot be skipped (projections and all gates).
                An image whose budget is below that minimum spends the minimum.
            forced: decisions that replace those of the gates, bool (B, N); the gates are asked all the same, and the
                budget still holds.

        Returns:
            What `SkipNet` returns in mode "hard", within rounding.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses, or a budget or forced outside the above.
        """
        network = self.network
        network.check_images(x)
        count = len(x)
        check_budget(budget, count)
        allowed = None if budget is None else budget.detach().double().cpu().numpy()
        decided = _check_forced(forced, count, self.num_gates)
        costs = self.costs(x.shape[2], x.shape[3])
        block_costs = costs.blocks.cpu().numpy()
        spent = np.full(count, float(costs.minimum))
        logits = np.empty((self.num_gates, count), dtype=np.float32)
        executed = np.empty((self.num_gates, count), dtype=bool)
        everyone = np.arange(count)

        workspace = self._workspaces.pop() if self._workspaces else Workspace()
        features = network.run_block(network.blocks[0], network.stem(x))
        rows = FeatureRows(features, workspace)
        walk = self._walk(count)
        walk.observe(everyone, features)
        for position, block in enumerate(network.blocks[1:]):
            logits[position] = walk.logits(position, rows)
            execute = decided[position] if decided is not None else logits[position] >= 0
            if allowed is not None:
                execute = execute & (spent + block_costs[position] <= allowed)
                spent[execute] += block_costs[position]
            executed[position] = execute
            images = execute.nonzero()[0]
            if block.changes_shape:
                before = rows.ordered()
                rows = FeatureRows(channels_last(block.shortcut(before)), workspace)
                if len(images):
                    # Copied before the new rows write to the workspace, which may hold `before`.
                    chosen = before if len(images) == count else before[torch.from_numpy(images)]
                    block.execute_(chosen, rows.take(images))
                walk.observe(everyone, rows.ordered())
            elif len(images):
                features = rows.take(images)
                block.execute_(features, features)
                walk.observe(images, features)
        answer = network.classify(rows.ordered())
        self._workspaces.append(workspace)
        gates = torch.from_numpy(executed.T).to(x.device, torch.float32)
        macs = costs.minimum + gates.double() @ costs.blocks
        gate_logits = torch.from_numpy(logits.T).to(x.device)
        return SkipNetOutput(answer, gate_logits, gates, macs)

    def _walk(self, count: int) -> GateWalk:
        if isinstance(self.gates, list):
            return _FeedForwardWalk(self.gates)
        return _RecurrentWalk(self.gates, count)


class _FoldedFeedForwardGate:
    """`FeedForwardGate` with folded norms."""

    def __init__(self, gate: FeedForwardGate):
        layers = list(gate.features)
        self.pool = layers[0] if layers and isinstance(layers[0], nn.MaxPool2d) else None
        self.convs = [
            fold_conv(conv, norm) for conv, norm in zip(layers, layers[1:], strict=False) if isinstance(conv, nn.Conv2d)
        ]
        self.weight, self.bias = gate.output.weight.detach().clone(), gate.output.bias.detach().clone()

    def __call__(self, x: Tensor) -> Floats:
        if self.pool is not None:
            x = self.pool(x)
        for conv in self.convs:
            x = conv(x, True)
        logits: Floats = F.linear(x.mean((2, 3)), self.weight, self.bias).view(-1).float().cpu().numpy()
        return logits


class _FeedForwardWalk:
    """Gates of their own per position: each looks at all images again."""

    def __init__(self, gates: list[_FoldedFeedForwardGate]):
        self.gates = gates

    def observe(self, images: Images, features: Tensor) -> None:
        pass

    def logits(self, position: int, rows: FeatureRows) -> Floats:
        return self.gates[position](rows.ordered())


class _FoldedRecurrentGate:
    """Weights of a `RecurrentGate` with everything that is linear multiplied out.

    Pooling, projection and the LSTM's input matrix become one matrix per position, which acts on the columns
    [2h, 1, pooled]. With sigmoid(z) = (1 + tanh(z/2)) / 2 the four parts of the LSTM take one tanh; the halves are
    in the weights. In float64, rounded once.
    """

    def __init__(self, gate: RecurrentGate):
        def array(tensor: Tensor) -> NDArray[np.float64]:
            result: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
            return result

        hidden = gate.cell.hidden_size
        parts = np.arange(4 * hidden).reshape(4, hidden)
        order = parts[[3, 0, 1, 2]].reshape(-1)  # PyTorch's input, forget, cell, output -> output, input, forget, cell
        halves = np.where(np.arange(4 * hidden) < 3 * hidden, 0.5, 1.0)
        w_input, w_hidden = (array(w)[order].T * halves for w in (gate.cell.weight_ih, gate.cell.weight_hh))
        bias = (array(gate.cell.bias_ih) + array(gate.cell.bias_hh))[order] * halves
        self.hidden = hidden
        self.weights: list[Floats] = []
        for projection in gate.projections:
            assert isinstance(projection, nn.Linear)
            constant = bias + array(projection.bias) @ w_input
            pooled = array(projection.weight).T @ w_input
            rows = np.concatenate([w_hidden / 2, constant[None], pooled])
            self.weights.append(np.ascontiguousarray(rows.T, dtype=np.float32))
        self.output = np.concatenate([array(gate.output.weight)[0] / 2, array(gate.output.bias)]).astype(np.float32)


class _RecurrentWalk:
    """The LSTM's state for one batch, in NumPy: its operators cost a fraction of PyTorch's on arrays this small.

    The pooled features of images that skipped are still those of the block before.
    """

    def __init__(self, gate: _FoldedRecurrentGate, count: int):
        hidden = gate.hidden
        self.gate, self.count = gate, count
        self.inputs = np.zeros((hidden + 1, count), dtype=np.float32)
        self.inputs[hidden] = 1
        # One block of memory, so that one product serves input * candidate and forget * cell.
        memory = np.zeros((5 * hidden, count), dtype=np.float32)
        self.parts, self.sigmoids = memory[: 4 * hidden], memory[: 3 * hidden]
        self.output, self.entering = memory[:hidden], memory[hidden : 3 * hidden]
        self.entered, self.cell = memory[3 * hidden :], memory[4 * hidden :]
        self.products = np.empty((2 * hidden, count), dtype=np.float32)
        self.addends = self.products[:hidden], self.products[hidden:]
        self.tanh_cell = np.empty((hidden, count), dtype=np.float32)
        self.pooling = _Pooling()
        self._slice_inputs()

    def _slice_inputs(self) -> None:
        hidden = self.gate.hidden
        self.hidden_state, self.state = self.inputs[:hidden], self.inputs[: hidden + 1]
        self.pooled = self.inputs[hidden + 1 :]

    def observe(self, images: Images, features: Tensor) -> None:
        pooled = self.pooling(features).T
        if len(images) < self.count:
            self.pooled[:, images] = pooled
        elif pooled.shape == self.pooled.shape:
            self.pooled[:] = pooled
        else:
            self.inputs = np.concatenate([self.state, pooled])
            self._slice_inputs()

    def logits(self, position: int, rows: FeatureRows) -> Floats:
        np.dot(self.gate.weights[position], self.inputs, out=self.parts)
        np.tanh(self.parts, out=self.parts)
        self.sigmoids += 1  # twice the sigmoids
        np.multiply(self.entering, self.entered, out=self.products)
        np.add(*self.addends, out=self.cell)
        self.cell *= 0.5
        np.tanh(self.cell, out=self.tanh_cell)
        np.multiply(self.output, self.tanh_cell, out=self.hidden_state)  # twice the hidden state
        logits: Floats = np.dot(self.gate.output, self.state)
        return logits


class _Pooling:
    """Mean over height and width of channels-last features (n, C, H, W), (n, C)."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def __call__(self, features: Tensor) -> Floats:
        size = features.shape[2] * features.shape[3]
        if len(features) != 1 or features.device.type != "cpu" or features.dtype != torch.float32:
            # Not mean(): its division is one more operator, on a small array.
            pooled: Floats = features.sum((2, 3), dtype=torch.float32).cpu().numpy()
            pooled *= 1 / size
            return pooled
        # One image: a product with a constant row, which takes half the time of a sum. Blocks work in place, so that
        # the features are mostly the same memory as before.
        if features is not self.seen:
            self.seen = features
            self.pixels = features.permute(0, 2, 3, 1).reshape(size, -1)
            self.weights = features.new_full((1, size), 1 / size)
            self.result = features.new_empty(1, features.shape[1])
            self.average: Floats = self.result.numpy()
        torch.mm(self.weights, self.pixels, out=self.result)
        return self.average


def _check_forced(forced: Tensor | None, count: int, num_gates: int) -> NDArray[np.bool_] | None:
    """(N, B): one row of decisions per gate."""
    if forced is None:
        return None
    if forced.shape != (count, num_gates) or forced.dtype != torch.bool:
        raise ValueError(f"forced must be bool {(count, num_gates)}, got {forced.dtype} {tuple(forced.shape)}")
    result: NDArray[np.bool_] = forced.T.cpu().numpy()
    return result
