"""Halting networks that save the computation of what has halted.

ACT runs a unit on the images that go on, as one smaller batch. SACT runs it at the positions that go on, and inside the
unit wherever these read, by `dataeff.nn.positions`. Both give the result of masked execution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.halting.model import GroupState, HaltingOutput, HaltingResNet, HaltingUnit, UnitCosts, take_images
from dataeff.nn.backbone import residual_blocks
from dataeff.nn.fold import FoldedResNet
from dataeff.nn.positions import PaddedRows, PositionConv, list_positions, needed_positions


class HaltingInference:
    """Evaluation-mode `HaltingResNet` that stops.

    Args:
        model: in evaluation mode, on the device to run on; its weights are copied.

    Raises:
        ValueError: for a model in training mode, or SACT on a network without BatchNorm.

    Example:
        fast = HaltingInference(model.eval())
        output = fast(images, budget=torch.full((len(images),), 1e8, dtype=torch.float64))
    """

    def __init__(self, model: HaltingResNet):
        self.network = FoldedResNet(model.backbone)
        self.costs, self.stem_macs = model.costs, model.backbone.stem_macs
        self.groups, self.first_units, self.spatial = model.groups, model.first_units, model.spatial
        self.scores = {
            int(number): _FoldedScore(unit) for number, unit in model.halting.items() if isinstance(unit, HaltingUnit)
        }
        self.convs: dict[int, list[PositionConv]] = {}
        if self.spatial:
            for number, block in enumerate(residual_blocks(model.backbone)):
                if number not in self.first_units:
                    pairs = zip(block.convs, block.norms, strict=True)
                    self.convs[number] = [PositionConv(c, n) for c, n in pairs if isinstance(c, nn.Conv2d)]

    @torch.inference_mode()
    def __call__(self, x: Tensor, budget: Tensor | None = None) -> HaltingOutput:
        """Classify images.

        Args:
            x: images, float (B, C, H, W), normalised.
            budget: convolution multiply-adds allowed for each image, float64 (B,), inf for no limit. An image halts,
                as if by its score, where the next unit would leave too little for the first units of the groups to
                come. One whose budget is below the first units of all groups spends these.

        Returns:
            What `HaltingResNet` returns in evaluation mode, within rounding.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses.
        """
        self.network.check_images(x)
        size = (x.shape[2], x.shape[3])
        costs = self.costs(*size)
        minimum = self.stem_macs(*size)[0] + sum(costs[number].dense for number in self.first_units)
        ledger = _Ledger(len(x), costs, minimum, budget, x.device)
        x = self.network.stem(x)
        for group in self.groups:
            x = self.network.run_block(self.network.blocks[group[0]], x)
            ledger.executed[:, group[0]] = 1
            x = (self._finish_positions if self.spatial else self._finish_images)(group, x, ledger)
        return HaltingOutput(self.network.classify(x), ledger.ponder, ledger.executed, ledger.macs)

    def _finish_images(self, group: list[int], x: Tensor, ledger: "_Ledger") -> Tensor:
        """ACT: the units after a group's first, on the images that go on. Returns the group's output."""
        state = GroupState(x, spatial=False)
        images = torch.arange(len(x), device=x.device)
        result = torch.empty_like(x)
        for number in group:
            if number != group[0]:
                block = self.network.blocks[number]
                block.execute_(x, x)
                ledger.executed[images, number] = 1
            last = number == group[-1]
            score = None if last else self.scores[number](x)
            stop = None if score is None else ledger.charge(state.going_on(score), images, number + 1)
            state.add(x, score, stop)
            halted = (~state.active).view(-1).nonzero()[:, 0]
            if not len(halted):
                continue
            ledger.ponder[images[halted]] += state.ponder.view(-1)[halted]
            if len(halted) == len(x) == len(result):
                return state.mixed
            result[images[halted]] = state.mixed[halted]
            if len(halted) == len(x):
                break
            going = state.active.view(-1).nonzero()[:, 0]
            state, x, images = state.select(going), take_images(x, going), images[going]
        return result

    def _finish_positions(self, group: list[int], x: Tensor, ledger: "_Ledger") -> Tensor:
        """SACT: the units after a group's first, at the positions that go on. Returns the group's output."""
        state = GroupState(x, spatial=True)
        features = PaddedRows(x)
        mixed = PaddedRows.zeros(features, features.channels)
        everyone = torch.arange(len(x), device=x.device)
        inner: list[PaddedRows] = []
        positions = list_positions(state.active)
        new = x.permute(0, 2, 3, 1).reshape(len(positions), features.channels)
        for number in group:
            rows = features.row_of(positions)
            if number != group[0]:
                inner = inner or [PaddedRows.zeros(features, c.out_channels) for c in self.convs[number][:-1]]
                new = self._run_unit(number, features, inner, state.active, positions, rows)
                ledger.executed[:, number] = state.active.flatten(1).float().mean(1)
            score = stop = None
            if number != group[-1]:
                score = self.scores[number].at(features, positions, rows)
                stop = ledger.charge(state.going_on(score), everyone, number + 1)
            weight = state.add(None, score, stop)
            mixed.rows.index_add_(0, rows, new * weight[positions[:, 0], 0, positions[:, 1], positions[:, 2], None])
            positions = list_positions(state.active)
            if not len(positions):
                break
        ledger.ponder += state.ponder.flatten(1).mean(1)
        return mixed.features()

    def _run_unit(
        self,
        number: int,
        features: PaddedRows,
        inner: list[PaddedRows],
        active: Tensor,
        positions: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Replace the features at `positions` (and their `rows`) by the unit's output there, which is returned."""
        convs = self.convs[number]
        needed = needed_positions([conv.kernel for conv in convs], active)
        source = features
        for conv, where, target in zip(convs, needed, inner, strict=False):
            places = list_positions(where)
            target.rows.index_copy_(0, target.row_of(places), conv(source, places).relu_())
            source = target
        new = convs[-1](source, positions).add_(features.rows.index_select(0, rows)).relu_()
        features.rows.index_copy_(0, rows, new)
        return new


class _FoldedScore:
    """`HaltingUnit` for inference."""

    def __init__(self, unit: HaltingUnit):
        self.weight, self.bias = unit.output.weight.detach().clone(), unit.output.bias.detach().clone()
        self.conv: Tensor | None = None
        if unit.conv is not None:
            self.conv = unit.conv.weight.detach().permute(2, 3, 1, 0).reshape(-1, 1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Features (n, C, H, W) -> ACT's scores (n, 1, 1, 1)."""
        return torch.sigmoid(F.linear(x.mean((2, 3)), self.weight, self.bias)).view(-1, 1, 1, 1)

    def at(self, features: PaddedRows, positions: Tensor, rows: Tensor) -> Tensor:
        """SACT's scores (B, 1, H, W) at `positions`, 0 elsewhere."""
        assert self.conv is not None
        size = features.height * features.width
        pooled = features.rows.view(features.count, features.image, features.channels).sum(1) / size
        logits = (features.patches(rows, 3) @ self.conv)[:, 0]
        logits += F.linear(pooled, self.weight, self.bias)[:, 0].index_select(0, positions[:, 0])
        scores = logits.new_zeros(features.count, 1, features.height, features.width)
        scores[positions[:, 0], 0, positions[:, 1], positions[:, 2]] = torch.sigmoid(logits)
        return scores


class _Ledger:
    """What each image of a batch has run and spent."""

    def __init__(self, count: int, costs: list[UnitCosts], minimum: float, budget: Tensor | None, device: torch.device):
        self.costs = costs
        self.macs = torch.full((count,), minimum, dtype=torch.float64, device=device)
        self.allowed = None if budget is None else budget.to(device, torch.float64)
        self.ponder = torch.zeros(count, device=device)
        self.executed = torch.zeros(count, len(costs), device=device)

    def charge(self, active: Tensor, images: Tensor, number: int) -> Tensor | None:
        """Pay for unit `number` at `active`, (n, 1, ...), of `images`; which cannot, bool (n, 1, 1, 1)."""
        price = self.costs[number].spent(active)
        stop = None
        if self.allowed is not None:
            unpaid = self.macs[images] + price > self.allowed[images]
            price = price * ~unpaid
            stop = unpaid.view(-1, 1, 1, 1)
        self.macs[images] += price
        return stop
