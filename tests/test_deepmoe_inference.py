"""Sub-channel execution equals masked execution, computes nothing else, and keeps to budgets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataeff.dynamic.deepmoe.baselines import RuntimePruning, RuntimePruningInference
from dataeff.dynamic.deepmoe.inference import ChannelNetwork, DeepMoEInference
from dataeff.dynamic.deepmoe.model import DeepMoE, build_deepmoe
from dataeff.dynamic.deepmoe.network import MoEConv2d, build_network
from dataeff.dynamic.deepmoe.perlayer import PerLayerInference, PerLayerMoE


def settle(model: nn.Module) -> None:
    """Norms as after training: neither mean 0 nor variance 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.5)  # type: ignore[arg-type]


def make(arch: str = "resnet8", **options: Any) -> DeepMoE:
    torch.manual_seed(0)
    settings = {"width": 1, "num_classes": 5, "embedding_widths": (4, 4, 4, 4), "gate_init": "kaiming", "latent": 8}
    model = build_deepmoe(arch, **{**settings, **options})
    settle(model)
    # Differences between images large enough that patterns differ.
    nn.init.normal_(model.embedding.output.weight, 0, 3)
    return model.eval()


def assert_same(model: DeepMoE, fast: DeepMoEInference, x: Tensor, **options: Any) -> None:
    with torch.no_grad():
        expected = model(x)
    found = fast(x, **options)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.embedding_logits, expected.embedding_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.active_share, expected.active_share)
    for first, second in zip(found.gates, expected.gates, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


SHAPES: dict[str, dict[str, Any]] = {
    "vgg6": {},
    "resnet8": {},
    "resnet18": {"widths": (8, 8, 16, 16)},
    "resnet50": {"widths": (8, 8, 8, 8)},
    "resnet18_cifar": {"widths": (8, 8, 8, 8), "width": 2},
    "drn10": {},
}


@pytest.mark.parametrize("arch", SHAPES)
@pytest.mark.parametrize("max_groups", [None, 1, 64])
def test_active_channels_give_what_masked_execution_gives(arch: str, max_groups: int | None) -> None:
    model = make(arch, **SHAPES[arch])
    fast = DeepMoEInference(model)
    x = torch.randn(6, 3, 32, 32)
    assert_same(model, fast, x, max_groups=max_groups)
    assert_same(model, fast, x[:1], max_groups=max_groups)


@pytest.mark.parametrize("options", [{"normalize_gates": True}, {"keep_top": True}, {"latent_activation": "relu"}])
def test_options_of_the_gates_hold_in_inference(options: dict[str, Any]) -> None:
    model = make("vgg6", **options)
    assert_same(model, DeepMoEInference(model), torch.randn(5, 3, 16, 16))


def test_cost_is_that_of_the_patterns_or_of_their_union() -> None:
    model = make("vgg6")
    x = torch.randn(12, 3, 16, 16)
    fast = DeepMoEInference(model)
    with torch.no_grad():
        expected = model(x)
    patterns = (torch.cat(expected.gates, 1) > 0).unique(dim=0)
    exact = fast(x, max_groups=64)
    assert len(exact.groups.unique()) == len(patterns) > 3
    assert torch.equal(exact.macs, expected.macs)
    union = fast(x, max_groups=1)
    counts = torch.stack([part.any(0).sum() for part in patterns.split(model.network.gate_channels, 1)])[None]
    assert torch.equal(union.macs, (model.network.macs(counts, 16, 16) + model.router_macs(16, 16)).expand(12))
    assert len(union.groups.unique()) == 1


def test_many_patterns_fall_back_to_unions_where_small_networks_do_not_pay() -> None:
    model = make("vgg6")
    x = torch.randn(64, 3, 8, 8)
    output = DeepMoEInference(model)(x)
    patterns = (torch.cat(output.gates, 1) > 0).unique(dim=0)
    assert 1 <= len(output.groups.unique()) < len(patterns) / 2
    assert_same(model, DeepMoEInference(model), x)


def test_weights_of_inactive_channels_may_be_nan() -> None:
    model = make("vgg6")
    x = torch.randn(1, 3, 16, 16)
    expected = DeepMoEInference(model)(x)
    with torch.no_grad():
        for layer in model.network.convs():
            assert layer.gate_index is not None
            layer.conv.weight[expected.gates[layer.gate_index][0] == 0] = torch.nan
    poisoned = DeepMoEInference(model)(x)
    assert torch.equal(poisoned.logits, expected.logits)


@pytest.mark.parametrize("arch", ["vgg6", "resnet8"])
def test_layers_without_active_channels_pass_on_their_bias_or_the_shortcut(arch: str) -> None:
    model = make(arch)
    with torch.no_grad():
        heads = next(model.heads.parameters())
        heads[: model.network.gate_channels[0]] = -1
        heads[-model.network.gate_channels[-1] :] = -1
    assert_same(model, DeepMoEInference(model), torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("arch", ["vgg6", "resnet8"])
def test_a_budget_keeps_the_largest_gates_and_is_met(arch: str) -> None:
    model = make(arch)
    x = torch.randn(16, 3, 16, 16)
    fast = DeepMoEInference(model)
    free = fast(x, max_groups=64)
    floor = fast(x, budget=torch.zeros(16, dtype=torch.float64), max_groups=64).macs
    assert bool((floor < free.macs).all())
    budget = floor + torch.linspace(0, 1.2, 16, dtype=torch.float64) * (free.macs - floor)
    bounded = fast(x, budget=budget)
    assert bool((bounded.macs <= budget + 1e-6).all())
    assert float(bounded.macs.sum()) > float(floor.sum())
    for kept, gate in zip(bounded.gates, free.gates, strict=True):
        assert bool(((kept == gate) | (kept == 0)).all())
        smallest_kept = torch.where(kept > 0, kept, torch.inf).amin(1)
        largest_closed = torch.where((kept == 0) & (gate > 0), gate, -torch.inf).amax(1)
        assert bool((largest_closed <= smallest_kept).all())
    unlimited = fast(x, budget=torch.full((16,), torch.inf, dtype=torch.float64), max_groups=64)
    assert torch.equal(unlimited.macs, free.macs)


def test_a_union_never_breaks_the_budget_of_a_member() -> None:
    model = make("vgg6")
    x = torch.randn(40, 3, 8, 8)
    fast = DeepMoEInference(model)
    own = fast(x, max_groups=64).macs
    output = fast(x, budget=own * 1.01)
    assert bool((output.macs <= own * 1.01).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": torch.ones(3)}, r"\(2,\), got shape \(3,\)"),
        ({"budget": torch.tensor([1.0, torch.nan])}, "NaN"),
        ({"embedding": torch.zeros(2, 3)}, r"\(B, d\) = \(2, 8\)"),
        ({"max_groups": 0}, "max_groups must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepMoEInference(make("vgg6"))(torch.zeros(2, 3, 16, 16), **options)


def test_a_network_in_training_mode_is_refused() -> None:
    model = make("vgg6")
    next(model.network.convs()).norm.train()
    with pytest.raises(ValueError, match="training mode"):
        DeepMoEInference(model)


def test_cut_weights_are_kept_for_the_patterns_used_last() -> None:
    model = make("vgg6")
    network = ChannelNetwork(model.network, cached_patterns=2)
    bits = [(torch.rand(sum(model.network.gate_channels)) > 0.5).numpy() for _ in range(3)]
    first = network.pattern(bits[0], (16, 16))
    network.pattern(bits[1], (16, 16))
    assert network.pattern(bits[0], (16, 16)) is first
    network.pattern(bits[2], (16, 16))  # drops bits[1]
    assert network.pattern(bits[0], (16, 16)) is first and len(network._patterns) == 2


def test_the_dense_network_of_the_same_operators_is_the_network() -> None:
    network = build_network("resnet8", 4)
    settle(network)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = network.eval().classify(network.features(x, lambda index, _: None), x.shape)
    logits, macs = ChannelNetwork(network).dense(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert macs.tolist() == [network.full_macs(16, 16)] * 3


def per_layer(arch: str = "vgg6") -> PerLayerMoE:
    torch.manual_seed(0)
    widths = {"vgg6": (8, 8, 12, 12, 16, 16)}.get(arch, SHAPES[arch].get("widths"))
    model = PerLayerMoE(build_network(arch, 4, widths=widths), latent=8, gate_init="kaiming")
    settle(model)
    for latent in model.heads.latents:
        nn.init.normal_(latent.weight, 0, 4)
    return model.eval()


@pytest.mark.parametrize("arch", ["vgg6", "resnet8", "resnet50", "resnet18_cifar", "drn10"])
def test_gates_that_read_the_layer_before_run_active_channels_only(arch: str) -> None:
    model = per_layer(arch)
    x = 3 * torch.randn(6, 3, 32, 32)
    fast = PerLayerInference(model)
    with torch.no_grad():
        expected = model(x)
    found = fast(x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.macs, expected.macs) and torch.equal(found.path, expected.path)
    patterns = [len((gate > 0).unique(dim=0)) for gate in expected.gates]
    assert max(patterns) > 1, "the gates of the test differ between images"
    assert fast.executions >= sum(patterns)


def test_gates_of_a_layer_depend_on_the_layer_before_and_cost_what_their_weights_multiply() -> None:
    model = per_layer()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        next(model.network.convs()).conv.weight.mul_(-1)
        after = model(x)
    assert torch.equal(before.gates[0], after.gates[0]) and not torch.equal(before.gates[1], after.gates[1])
    widths = [3, 8, 8, 12, 12, 16, 16]
    assert model.router_macs() == sum(8 * (a + b) for a, b in zip(widths, widths[1:], strict=False))
    counts = torch.stack([(gate > 0).sum(1) for gate in before.gates], 1)
    assert torch.equal(before.macs, model.network.macs(counts, 16, 16) + model.router_macs())


def test_weights_of_channels_that_a_layer_s_own_gate_closes_may_be_nan() -> None:
    model = per_layer()
    x = torch.randn(1, 3, 16, 16)
    expected = PerLayerInference(model)(x)
    with torch.no_grad():
        for layer, gate in zip(model.network.convs(), expected.gates, strict=True):
            layer.conv.weight[gate[0] == 0] = torch.nan
    assert torch.equal(PerLayerInference(model)(x).logits, expected.logits)
    with pytest.raises(ValueError, match="training mode"):
        PerLayerInference(model.train())


def test_runtime_pruning_computes_the_groups_that_its_agent_keeps() -> None:
    torch.manual_seed(0)
    model = RuntimePruning(build_network("vgg6", 4, widths=(8, 8, 12, 12, 16, 16)), groups=3, hidden=8)
    settle(model)
    nn.init.normal_(model.output.weight, 0, 5)
    model.eval()
    x = 3 * torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    assert len(expected.actions.unique()) > 1
    found = RuntimePruningInference(model)(x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.macs, expected.macs) and torch.equal(found.path, expected.path)
    layers = [layer for layer in model.network.body if isinstance(layer, MoEConv2d)]
    with torch.no_grad():
        layers[0].conv.weight[int(model.kept(0, int(expected.actions[:, 0].max()))) :] = torch.nan
    assert torch.equal(RuntimePruningInference(model)(x).logits, found.logits)
