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
Macs = NDArray[np.float64]
Costs = tuple[float, Macs]  # multiply-adds: what is always executed, and each block's (N,)
Allowed = Macs | None  # multiply-adds of each image, (B,)


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
        # Kept between calls, one for each call that ran at the same time as others.
        self._workspaces: list[Workspace] = []
        self._walks: list[_OneFeedForwardWalk | _OneRecurrentWalk] = []
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
        answer, *rows = run(features, costs, allowed, decided)
        return SkipNetOutput(answer, *(torch.from_numpy(row).to(x.device) for row in rows))

    def _block_costs(self, height: int, width: int) -> Costs:
        if (height, width) not in self._costs:
            costs = self.costs(height, width)
            self._costs[height, width] = float(costs.minimum), costs.blocks.cpu().numpy()
        return self._costs[height, width]

    def _run_many(
        self, features: Tensor, costs: Costs, allowed: Allowed, decided: Decisions | None
    ) -> tuple[Tensor, Floats, Floats, Macs]:
        """From the features (B, C, H, W) of block 1 to the parts of `SkipNetOutput`."""
        count = len(features)
        minimum, block_costs = costs
        spent = np.full(count, minimum)
        logits = np.empty((self.num_gates, count), dtype=np.float32)
        executed = np.empty((self.num_gates, count), dtype=bool)
        everyone = np.arange(count)

        workspace = self._workspaces.pop() if self._workspaces else Workspace()
        rows = FeatureRows(features, workspace)
        walk = self._walk(count)
        changed: tuple[Images, Tensor] | None = (everyone, features)  # since the last gate
        for position, block in enumerate(self.network.blocks[1:]):
            if changed is not None:
                walk.observe(*changed)
            logits[position] = walk.logits(position, rows)
            execute = decided[position] if decided is not None else logits[position] >= 0
            if allowed is not None:
                execute = execute & (spent + block_costs[position] <= allowed)
                spent[execute] += block_costs[position]
            executed[position] = execute
            images = execute.nonzero()[0]
            changed = None
            if block.changes_shape:
                before = rows.ordered()
                rows = FeatureRows(channels_last(block.shortcut(before)), workspace)
                if len(images):
                    # Copied before the new rows write to the workspace, which may hold `before`.
                    chosen = before if len(images) == count else before[torch.from_numpy(images)]
                    block.execute_(chosen, rows.take(images))
                changed = everyone, rows.ordered()
            elif len(images):
                features = rows.take(images)
                block.execute_(features, features)
                changed = images, features
        answer = self.network.classify(rows.ordered())
        self._workspaces.append(workspace)
        return answer, logits.T, executed.T.astype(np.float32), minimum + executed.T @ block_costs

    def _run_one(
        self, features: Tensor, costs: Costs, allowed: Allowed, decided: Decisions | None
    ) -> tuple[Tensor, Floats, Floats, Macs]:
        """`_run_many` for one image: without rows to look after, a third less time between two blocks."""
        spent, block_costs = costs
        forced = None if decided is None else decided[:, 0].tolist()
        logits, executed = list[float | Floats](), list[bool]()
        walk = self._walks.pop() if self._walks else self._walk_one()
        walk.begin()
        changed = True  # since the last gate
        for position, block in enumerate(self.network.blocks[1:]):
            if changed:
                walk.observe(features)
            logit = walk.logit(position)
            execute = forced[position] if forced is not None else bool(logit >= 0)
            if execute and allowed is not None:
                execute = spent + block_costs[position] <= allowed[0]
            if execute:
                spent += block_costs[position]
            logits.append(logit)
            executed.append(execute)
            changed = execute or block.changes_shape
            if block.changes_shape:
                shortcut = channels_last(block.shortcut(features))
                if execute:
                    block.execute_(features, shortcut)
                features = shortcut
            elif execute:
                block.execute_(features, features)
        self._walks.append(walk)
        answer = self.network.classify(features)
        return answer, np.array([logits], np.float32), np.array([executed], np.float32), np.array([spent])

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

    Pooling, projection and the LSTM's input matrix become one matrix per position. With sigmoid(z) = (1 + t) / 2,
    t = tanh(z/2), the four parts of the LSTM take one tanh, and 2h = (1 + t) tanh(c) is the sum of two columns: the
    matrix acts on [t tanh(c), tanh(c), 1, pooled]. The halves are in the weights. In float64, rounded once.
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
            rows = np.concatenate([w_hidden / 2, w_hidden / 2, constant[None], pooled])
            self.weights.append(np.ascontiguousarray(rows.T, dtype=np.float32))
        output = array(gate.output.weight)[0] / 2
        self.output = np.concatenate([output, output, array(gate.output.bias)]).astype(np.float32)
        self.mean = np.tile(np.eye(hidden, dtype=np.float32) / 2, 4)  # (h, 4h)


class _Cell:
    """What the LSTM holds in one step: rows [t of output, input, forget; g; c; t g; t c], (7h, *images)."""

    def __init__(self, hidden: int, images: tuple[int, ...]):
        memory = np.zeros((7 * hidden, *images), dtype=np.float32)
        self.parts, self.output = memory[: 4 * hidden], memory[:hidden]
        # Neighbours, so that one product serves input and forget, and one sum all that enters the next cell.
        self.entering, self.entered = memory[hidden : 3 * hidden], memory[3 * hidden : 5 * hidden]
        self.cell, self.products = memory[4 * hidden : 5 * hidden], memory[5 * hidden :]
        self.addends = memory[3 * hidden :]


class _Lstm:
    """The LSTM's state, in NumPy: its operators cost a fraction of PyTorch's on arrays this small.

    Args:
        images: (B,) for a batch, () for one image: the last dimensions of everything.
    """

    def __init__(self, gate: _FoldedRecurrentGate, images: tuple[int, ...]):
        hidden = gate.hidden
        self.gate = gate
        self.here, self.there = _Cell(hidden, images), _Cell(hidden, images)
        width = max(weights.shape[1] for weights in gate.weights)
        self.columns = np.zeros((width, *images), dtype=np.float32)  # pooled of the widest block
        self.state = self.columns[: 2 * hidden + 1]
        self.gated, self.tanh_cell = self.state[:hidden], self.state[hidden:-1]
        self.state[-1] = 1

    def reset(self) -> None:
        """Begin with other images."""
        self.state[:-1].fill(0)
        self.here.cell.fill(0)

    def enter(self, channels: int) -> Floats:
        """Where to write pooled features of so many channels from now on, (C, *images)."""
        end = len(self.state) + channels
        self.inputs = self.columns[:end]
        return self.columns[len(self.state) : end]

    def step(self, position: int) -> Floats:
        """The next logit of every image."""
        here, there = self.here, self.there
        # Methods and positional arguments: a gate between two blocks takes 20 us, four times what it takes in a loop of
        # gates, and every indirection counts.
        self.gate.weights[position].dot(self.inputs, here.parts)
        np.tanh(here.parts, here.parts)
        np.multiply(here.entering, here.entered, here.products)
        self.gate.mean.dot(here.addends, there.cell)  # ((1 + t) g + (1 + t) c) / 2
        np.tanh(there.cell, self.tanh_cell)
        np.multiply(here.output, self.tanh_cell, self.gated)
        self.here, self.there = there, here
        logits: Floats = self.gate.output.dot(self.state)
        return logits


class _RecurrentWalk:
    """One LSTM for all gates. The pooled features of images that skipped are still those of the block before."""

    def __init__(self, gate: _FoldedRecurrentGate, count: int):
        self.lstm, self.count = _Lstm(gate, (count,)), count
        self.pooled = self.lstm.enter(0)

    def observe(self, images: Images, features: Tensor) -> None:
        # Not mean(): its division is one more operator, on a small array.
        pooled = features.sum((2, 3), dtype=torch.float32).cpu().numpy().T
        pooled *= 1 / (features.shape[2] * features.shape[3])
        if len(images) < self.count:
            self.pooled[:, images] = pooled
            return
        if len(pooled) != len(self.pooled):
            self.pooled = self.lstm.enter(len(pooled))
        self.pooled[:] = pooled

    def logits(self, position: int, rows: FeatureRows) -> Floats:
        return self.lstm.step(position)


class _OneFeedForwardWalk:
    """`_FeedForwardWalk` for one image."""

    def __init__(self, gates: list[_FoldedFeedForwardGate]):
        self.gates = gates

    def begin(self) -> None:
        pass

    def observe(self, features: Tensor) -> None:
        self.features = features

    def logit(self, position: int) -> Floats:
        logit: Floats = self.gates[position](self.features)[0]
        return logit


class _OneRecurrentWalk:
    """`_RecurrentWalk` for one image after the other, which pools by a product with a constant row: faster than a sum.

    What features of one size need is made once: an operator of PyTorch without work takes 20 us between convolutions,
    which leave nothing of it in the processor's caches.
    """

    def __init__(self, gate: _FoldedRecurrentGate):
        self.lstm = _Lstm(gate, ())
        self.rooms: dict[int, _Room] = {}
        self.features: Tensor | None = None

    def begin(self) -> None:
        self.lstm.reset()
        self.features = None

    def observe(self, features: Tensor) -> None:
        # Blocks work in place, so that the features are mostly the same memory as before.
        if features is not self.features:
            self._enter(features)
        room = self.room
        torch.mm(room.weights, self.pixels, out=room.pooled)
        if room.copy_to is not None:
            room.copy_to[:] = room.pooled.cpu().numpy()[0]

    def _enter(self, features: Tensor) -> None:
        _, channels, height, width = features.shape
        self.features = features
        self.pixels = features.as_strided((height * width, channels), (channels, 1))  # of channels-last memory
        pooled = self.lstm.enter(channels)
        if channels not in self.rooms or self.rooms[channels].weights.shape[1] != height * width:
            self.rooms[channels] = _Room(features, pooled)
        self.room = self.rooms[channels]

    def logit(self, position: int) -> Floats:
        return self.lstm.step(position)


class _Room:
    """Where features (1, C, H, W) of one size are pooled.

    Args:
        pooled: the LSTM's memory (C,), which is written at once where PyTorch can share it.
    """

    def __init__(self, features: Tensor, pooled: Floats):
        _, channels, height, width = features.shape
        self.weights = features.new_full((1, height * width), 1 / (height * width))
        shared = features.device.type == "cpu" and features.dtype == torch.float32
        self.pooled = torch.from_numpy(pooled).view(1, channels) if shared else features.new_empty(1, channels)
        self.copy_to = None if shared else pooled


def _check_forced(forced: Tensor | None, count: int, num_gates: int) -> NDArray[np.bool_] | None:
    """(N, B): one row of decisions per gate."""
    if forced is None:
        return None
    if forced.shape != (count, num_gates) or forced.dtype != torch.bool:
        raise ValueError(f"forced must be bool {(count, num_gates)}, got {forced.dtype} {tuple(forced.shape)}")
    result: NDArray[np.bool_] = forced.numpy(force=True).T
    return result
