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
Decisions = NDArray[np.bool_]
Costs = tuple[float, NDArray[np.float64]]  # multiply-adds: what is always executed, and each block's (N,)
Allowed = NDArray[np.float64] | None  # multiply-adds of each image, (B,)


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
        self._costs: dict[tuple[int, int], Costs] = {}
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
        costs = self._block_costs(x.shape[2], x.shape[3])
        features = network.run_block(network.blocks[0], network.stem(x))
        run = self._run_one if count == 1 else self._run_many
        answer, logits, executed = run(features, costs, allowed, decided)
        # In NumPy: an operator of PyTorch that is called once in a pass takes 20 us, a tenth of a block.
        rows = (logits.T, executed.T.astype(np.float32), costs[0] + executed.T @ costs[1])
        return SkipNetOutput(answer, *(torch.from_numpy(row).to(x.device) for row in rows))

    def _block_costs(self, height: int, width: int) -> Costs:
        if (height, width) not in self._costs:
            costs = self.costs(height, width)
            self._costs[height, width] = float(costs.minimum), costs.blocks.cpu().numpy()
        return self._costs[height, width]

    def _run_many(
        self, features: Tensor, costs: Costs, allowed: Allowed, decided: Decisions | None
    ) -> tuple[Tensor, Floats, Decisions]:
        """From the features (B, C, H, W) of block 1 to class logits (B, K), gate logits and decisions (N, B)."""
        count = len(features)
        minimum, block_costs = costs
        spent = np.full(count, minimum)
        logits = np.empty((self.num_gates, count), dtype=np.float32)
        executed = np.empty((self.num_gates, count), dtype=bool)
        everyone = np.arange(count)

        workspace = self._workspaces.pop() if self._workspaces else Workspace()
        rows = FeatureRows(features, workspace)
        walk = self._walk(count)
        walk.observe(everyone, features)
        for position, block in enumerate(self.network.blocks[1:]):
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
        answer = self.network.classify(rows.ordered())
        self._workspaces.append(workspace)
        return answer, logits, executed

    def _run_one(
        self, features: Tensor, costs: Costs, allowed: Allowed, decided: Decisions | None
    ) -> tuple[Tensor, Floats, Decisions]:
        """`_run_many` for one image: without rows to look after, a third less time between two blocks."""
        spent, block_costs = costs
        forced = None if decided is None else decided[:, 0].tolist()
        logits, executed = list[float | Floats](), list[bool]()
        walk = self._walk_one()
        walk.observe(features)
        for position, block in enumerate(self.network.blocks[1:]):
            logit = walk.logit(position)
            execute = forced[position] if forced is not None else bool(logit >= 0)
            if execute and allowed is not None:
                execute = spent + block_costs[position] <= allowed[0]
                spent += block_costs[position] * execute
            logits.append(logit)
            executed.append(execute)
            if block.changes_shape:
                shortcut = channels_last(block.shortcut(features))
                if execute:
                    block.execute_(features, shortcut)
                features = shortcut
                walk.observe(features)
            elif execute:
                block.execute_(features, features)
                walk.observe(features)
        answer = self.network.classify(features)
        return answer, np.array(logits, np.float32).reshape(-1, 1), np.array(executed, bool).reshape(-1, 1)

    def _walk(self, count: int) -> GateWalk:
        if isinstance(self.gates, list):
            return _FeedForwardWalk(self.gates)
        return _RecurrentWalk(self.gates, count)

    def _walk_one(self) -> "_OneFeedForwardWalk | _OneRecurrentWalk":
        if isinstance(self.gates, list):
            return _OneFeedForwardWalk(self.gates)
        return _OneRecurrentWalk(self.gates)


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


class _Lstm:
    """The LSTM's state, in NumPy: its operators cost a fraction of PyTorch's on arrays this small.

    Args:
        images: (B,) for a batch, () for one image: the last dimensions of everything.
    """

    def __init__(self, gate: _FoldedRecurrentGate, images: tuple[int, ...]):
        hidden = gate.hidden
        self.gate = gate
        self.inputs = np.zeros((hidden + 1, *images), dtype=np.float32)
        self.inputs[hidden] = 1
        # One block of memory, so that one product serves input * candidate and forget * cell.
        memory = np.zeros((5 * hidden, *images), dtype=np.float32)
        self.parts, self.sigmoids = memory[: 4 * hidden], memory[: 3 * hidden]
        self.output, self.entering = memory[:hidden], memory[hidden : 3 * hidden]
        self.entered, self.cell = memory[3 * hidden :], memory[4 * hidden :]
        self.products = np.empty((2 * hidden, *images), dtype=np.float32)
        self.addends = self.products[:hidden], self.products[hidden:]
        self.tanh_cell = np.empty((hidden, *images), dtype=np.float32)
        self.enter(0)

    def enter(self, channels: int) -> None:
        """Make room for pooled features of so many channels (C, *images), zeros until they are written."""
        hidden = self.gate.hidden
        state = self.inputs[: hidden + 1]
        self.inputs = np.concatenate([state, np.zeros((channels, *state.shape[1:]), dtype=np.float32)])
        self.hidden_state, self.state = self.inputs[:hidden], self.inputs[: hidden + 1]
        self.pooled = self.inputs[hidden + 1 :]

    def step(self, position: int) -> Floats:
        """The next logit of every image."""
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


class _RecurrentWalk:
    """One LSTM for all gates. The pooled features of images that skipped are still those of the block before."""

    def __init__(self, gate: _FoldedRecurrentGate, count: int):
        self.lstm, self.count = _Lstm(gate, (count,)), count

    def observe(self, images: Images, features: Tensor) -> None:
        # Not mean(): its division is one more operator, on a small array.
        pooled = features.sum((2, 3), dtype=torch.float32).cpu().numpy().T
        pooled *= 1 / (features.shape[2] * features.shape[3])
        if len(images) < self.count:
            self.lstm.pooled[:, images] = pooled
            return
        if pooled.shape != self.lstm.pooled.shape:
            self.lstm.enter(len(pooled))
        self.lstm.pooled[:] = pooled

    def logits(self, position: int, rows: FeatureRows) -> Floats:
        return self.lstm.step(position)


class _OneFeedForwardWalk:
    """`_FeedForwardWalk` for one image."""

    def __init__(self, gates: list[_FoldedFeedForwardGate]):
        self.gates = gates

    def observe(self, features: Tensor) -> None:
        self.features = features

    def logit(self, position: int) -> Floats:
        return self.gates[position](self.features)


class _OneRecurrentWalk:
    """`_RecurrentWalk` for one image, which pools by a product with a constant row: faster than a sum."""

    def __init__(self, gate: _FoldedRecurrentGate):
        self.lstm = _Lstm(gate, ())
        self.features: Tensor | None = None

    def observe(self, features: Tensor) -> None:
        # Blocks work in place, so that the features are mostly the same memory as before.
        if features is not self.features:
            self._enter(features)
        torch.mm(self.weights, self.pixels, out=self.pooled)
        if not self.shared:
            self.lstm.pooled[:] = self.pooled.cpu().numpy()[0]

    def _enter(self, features: Tensor) -> None:
        _, channels, height, width = features.shape
        self.lstm.enter(channels)
        self.features = features
        self.pixels = features.permute(0, 2, 3, 1).reshape(height * width, channels)
        self.weights = features.new_full((1, height * width), 1 / (height * width))
        self.shared = features.device.type == "cpu" and features.dtype == torch.float32
        self.pooled = features.new_empty(1, channels)
        if self.shared:
            self.pooled = torch.from_numpy(self.lstm.pooled).view(1, channels)

    def logit(self, position: int) -> Floats:
        return self.lstm.step(position)


def _check_forced(forced: Tensor | None, count: int, num_gates: int) -> NDArray[np.bool_] | None:
    """(N, B): one row of decisions per gate."""
    if forced is None:
        return None
    if forced.shape != (count, num_gates) or forced.dtype != torch.bool:
        raise ValueError(f"forced must be bool {(count, num_gates)}, got {forced.dtype} {tuple(forced.shape)}")
    result: NDArray[np.bool_] = forced.T.cpu().numpy()
    return result
