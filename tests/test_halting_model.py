"""ACT and SACT: halting by hand, the ponder cost's gradient, costs, and networks that stop against masked execution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.halting.inference import HaltingInference
from dataeff.dynamic.halting.model import GroupState, HaltingResNet, HaltingUnit, ponder_loss
from dataeff.metrics.cost import conv_macs
from dataeff.nn.backbone import backbone_macs, residual_blocks
from dataeff.nn.resnet import ResNet

BOTH = pytest.mark.parametrize("spatial", [False, True], ids=["act", "sact"])


def images(count: int = 8, size: int = 16) -> Tensor:
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return noise * torch.linspace(0.2, 2, count).view(-1, 1, 1, 1)


def small(
    spatial: bool, depth: int = 20, family: str = "cifar", widths: tuple[int, ...] = (8, 16, 32)
) -> HaltingResNet:
    """A network with the statistics of a used BatchNorm whose scores stop images (or positions) at different units."""
    torch.manual_seed(0)
    model = HaltingResNet(ResNet(depth, 10, 3, widths, family=family), spatial)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
        if isinstance(layer, HaltingUnit) and layer.conv is not None:
            nn.init.normal_(layer.conv.weight, std=0.2, generator=generator)
    model.eval()
    for unit in model.halting.values():
        spread(unit, model, images(size=64 if family == "imagenet" else 16), generator)
    return model


@torch.no_grad()
def spread(unit: nn.Module, model: HaltingResNet, x: Tensor, generator: torch.Generator) -> None:
    """Give the pooled part of a unit's score a spread of 3 and the whole a median of 4, of the images `x`."""
    assert isinstance(unit, HaltingUnit)
    nn.init.normal_(unit.output.weight, generator=generator)
    seen: list[Tensor] = []
    hook = unit.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(x)
    hook.remove()
    unit.output.weight.mul_(3 / unit.output(seen[0].mean((2, 3))).std())
    unit.output.bias.add_(4 - torch.logit(unit(seen[0]), eps=1e-6).median())


def constant_scores(model: HaltingResNet, logit: float) -> HaltingResNet:
    for unit in model.halting.values():
        assert isinstance(unit, HaltingUnit)
        for parameter in unit.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(unit.output.bias, logit)
    return model


def never_halting(model: HaltingResNet) -> HaltingResNet:
    return constant_scores(model, -50.0)


def test_weights_and_ponder_cost_of_a_hand_computed_group() -> None:
    x = torch.ones(2, 1, 1, 1)
    state = GroupState(x, spatial=False)
    scores = [torch.tensor([0.4, 0.995]).view(2, 1, 1, 1), torch.tensor([0.7, 0.5]).view(2, 1, 1, 1)]
    first = state.add(1 * x, scores[0])
    assert first.flatten().tolist() == pytest.approx([0.4, 1.0])  # 0.995 >= 1 - epsilon: the second image halts
    second = state.add(2 * x, scores[1])
    assert second.flatten().tolist() == pytest.approx([0.6, 0.0])
    state.add(3 * x, None)
    assert state.mixed.flatten().tolist() == pytest.approx([0.4 + 2 * 0.6, 1.0])
    assert state.ponder.flatten().tolist() == pytest.approx([2 + 0.6, 1 + 1.0])  # N + R


@BOTH
def test_the_weights_of_an_image_or_position_sum_to_one_whatever_the_scores(spatial: bool) -> None:
    x = torch.randn(5, 3, 4, 4)
    state = GroupState(x, spatial)
    total: Tensor | float = 0.0
    for number in range(4):
        total = total + state.add(x, torch.rand(state.active.shape) if number < 3 else None)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(state.mixed, x)


def test_the_ponder_cost_falls_with_the_scores_before_the_last_unit() -> None:
    score = torch.full((1, 1, 1, 1), 0.3, requires_grad=True)
    state = GroupState(torch.zeros(1, 1, 1, 1), spatial=False)
    state.add(torch.zeros(1, 1, 1, 1), score)
    state.add(torch.zeros(1, 1, 1, 1), None)
    state.ponder.sum().backward()
    assert score.grad is not None and score.grad.item() == -1.0


@BOTH
def test_a_network_that_never_halts_is_the_base_network_at_full_cost(spatial: bool) -> None:
    model = never_halting(small(spatial))
    output = model(images())
    torch.testing.assert_close(output.logits, model.backbone(images()), rtol=1e-4, atol=1e-4)
    assert backbone_macs(model.backbone, 16, 16) == conv_macs(model.backbone, (3, 16, 16))
    scores = conv_macs(model, (3, 16, 16)) - backbone_macs(model.backbone, 16, 16)
    assert output.macs.tolist() == [backbone_macs(model.backbone, 16, 16) + scores] * 8
    assert (scores > 0) == spatial


@BOTH
def test_a_new_network_starts_by_running_all_of_three_units(spatial: bool) -> None:
    torch.manual_seed(0)
    model = HaltingResNet(ResNet(20, 10), spatial).eval()
    assert model(images()).executed.min() == 1


@BOTH
def test_every_parameter_gets_a_gradient_in_training_even_when_everything_halts_at_once(spatial: bool) -> None:
    model = constant_scores(small(spatial), 50.0).train()
    loss, parts = ponder_loss(model(images()), torch.arange(8), 0.1)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert float(parts["ponder"]) == pytest.approx(3 * (1 + 1))


@BOTH
@pytest.mark.parametrize(("depth", "family", "widths"), [(20, "cifar", (8, 16, 32)), (50, "imagenet", (4, 4, 8, 8))])
def test_stopping_equals_masked_execution(spatial: bool, depth: int, family: str, widths: tuple[int, ...]) -> None:
    model, x = small(spatial, depth, family, widths), images(size=16 if family == "cifar" else 64)
    with torch.no_grad():
        expected = model(x)
    found = HaltingInference(model)(x)
    share = expected.executed.mean(0)
    assert ((share > 0.05) & (share < 0.95)).any(), "the test's network must halt in between"
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.executed, expected.executed)
    torch.testing.assert_close(found.ponder, expected.ponder, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.macs, expected.macs, rtol=1e-12, atol=0)


@BOTH
def test_units_that_nobody_reaches_may_hold_nan(spatial: bool) -> None:
    model = constant_scores(small(spatial), 50.0)
    expected = model(images()).logits.detach()
    for number, block in enumerate(residual_blocks(model.backbone)):
        if number not in model.first_units:
            for parameter in block.parameters():
                nn.init.constant_(parameter, float("nan"))
    torch.testing.assert_close(HaltingInference(model)(images()).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_multiply_adds_of_sact_are_the_positions_that_a_hand_count_needs() -> None:
    cost = small(True).costs(16, 16)[1]
    active = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    active[0, 0, 0, 0] = active[1, 0, 5, 5] = True
    weights = 9 * 8 * 8
    # The first convolution runs on the 3x3 neighbourhood, of which a corner has 4 positions inside the image.
    assert cost.spent(active).tolist() == [4 * weights + weights + 9 * 8, 9 * weights + weights + 9 * 8]


@BOTH
def test_an_image_spends_at_most_its_budget_and_the_rest_is_not_touched(spatial: bool) -> None:
    model = never_halting(small(spatial))
    fast = HaltingInference(model)
    free = fast(images())
    floor = model.backbone.stem_macs(16, 16)[0] + sum(model.costs(16, 16)[n].dense for n in model.first_units)
    budget = torch.linspace(0.8 * floor, float(free.macs.max()), 8, dtype=torch.float64)
    limited = fast(images(), budget)
    assert bool((limited.macs <= budget.clamp(min=floor)).all())
    assert float(limited.macs[0]) == floor and limited.macs.tolist() == sorted(limited.macs.tolist())
    assert torch.equal(limited.macs[-1], free.macs[-1])
    torch.testing.assert_close(limited.logits[-1], free.logits[-1], rtol=1e-4, atol=1e-5)
    unlimited = fast(images(), torch.full((8,), float("inf"), dtype=torch.float64))
    torch.testing.assert_close(unlimited.logits, free.logits)


@BOTH
def test_an_image_alone_and_an_empty_batch_are_answered(spatial: bool) -> None:
    fast = HaltingInference(small(spatial))
    torch.testing.assert_close(fast(images()[2:3]).logits, fast(images()).logits[2:3], rtol=1e-4, atol=1e-5)
    assert fast(images()[:0]).logits.shape == (0, 10)


def test_bad_images_training_mode_and_norms_across_positions_are_refused() -> None:
    model = small(False)
    with pytest.raises(ValueError, match="multiples of 4"):
        HaltingInference(model)(torch.zeros(2, 3, 16, 18))
    with pytest.raises(ValueError, match="training mode"):
        HaltingInference(model.train())
    with pytest.raises(ValueError, match="norm='batch'"):
        HaltingInference(HaltingResNet(ResNet(20, norm="group"), True).eval())


def test_a_larger_tau_weighs_the_ponder_cost() -> None:
    output = small(False)(images())
    cheap, dear = (ponder_loss(output, torch.arange(8), tau)[0] for tau in (0.0, 0.5))
    torch.testing.assert_close(dear - cheap, 0.5 * output.ponder.mean())
    torch.testing.assert_close(cheap, F.cross_entropy(output.logits, torch.arange(8)))
