"""DeepMoE's base networks, embedding and heads: published counts, where gates act, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dataeff.dynamic.deepmoe.model import DeepMoE, MoEOutput, build_deepmoe, normalized
from dataeff.dynamic.deepmoe.network import (
    GatedBlock,
    GatedNetwork,
    MoEConv2d,
    build_network,
    solve_widening,
)
from dataeff.metrics.cost import conv_macs


def small(arch: str = "resnet8", **options: object) -> DeepMoE:
    torch.manual_seed(0)
    settings = {"width": 1, "num_classes": 5, "embedding_widths": (4, 4, 4, 4), "gate_init": "kaiming", **options}
    return build_deepmoe(arch, **settings)  # type: ignore[arg-type]


def brute_force_macs(model: DeepMoE, output: MoEOutput, size: int) -> Tensor:
    """Counted from the shapes that hooks see and each image's gates, channel pair by channel pair."""
    areas: dict[nn.Module, int] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        areas[layer] = result.shape[2] * result.shape[3]

    handles = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    model(torch.zeros(1, model.network.in_channels, size, size))
    for handle in handles:
        handle.remove()
    totals = []
    for image in range(len(output.logits)):
        total = float(sum(p.numel() for p in model.heads.parameters()) + model.embedding.output.weight.numel())
        total += sum(
            layer.weight.numel() * areas[layer] for layer in model.embedding.modules() if isinstance(layer, nn.Conv2d)
        )
        active: Tensor | None = None
        for part in model.network.body:
            layers = [part] if isinstance(part, MoEConv2d) else list(getattr(part, "convs", []))
            if isinstance(part, GatedBlock):
                active = None
                if isinstance(part.shortcut, nn.Sequential):
                    total += part.shortcut[0].weight.numel() * areas[part.shortcut[0]]  # type: ignore[operator, union-attr]
            for layer in layers:
                assert isinstance(layer, MoEConv2d)
                inputs = torch.ones(layer.conv.in_channels, dtype=torch.bool) if active is None else active
                outputs = torch.ones(layer.conv.out_channels, dtype=torch.bool)
                if layer.gate_index is not None:
                    outputs = output.gates[layer.gate_index][image] > 0
                used = layer.conv.weight[outputs][:, inputs]
                total += used.numel() * areas[layer.conv]
                active = outputs
            if isinstance(part, GatedBlock):
                active = None
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


@pytest.mark.parametrize(
    ("strategy", "params", "macs"),
    [("W1-High", 24.15e6, 3.51e8), ("W1-Mid", 24.16e6, 9.18e8)],
)
def test_the_widening_solver_gives_the_printed_parameters_and_cost(strategy: str, params: float, macs: float) -> None:
    network = build_network("vgg16", 100, widths=solve_widening(strategy, params))
    assert network.conv_weights() == pytest.approx(params, rel=5e-4)
    assert network.full_macs(32, 32) == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize("strategy", ["W4-Low", "W13-All"])
def test_strategies_of_several_layers_reach_the_target_by_one_factor(strategy: str) -> None:
    network = build_network("vgg16", 100, widths=solve_widening(strategy, 24.18e6))
    assert network.conv_weights() == pytest.approx(24.18e6, rel=5e-3)


def test_widening_refuses_unknown_strategies_and_targets_below_the_base() -> None:
    with pytest.raises(ValueError, match="W13-All"):
        solve_widening("W2", 24e6)
    with pytest.raises(ValueError, match="at least VGG-16's 14710464"):
        solve_widening("W1-High", 1e6)


def test_known_counts_of_the_base_networks() -> None:
    with torch.device("meta"):
        vgg, resnet50 = build_network("vgg16", 100), build_network("resnet50", 1000)
        design_b = build_network("resnet50", 1000, width=2, block="bottleneck_b")
        resnet101 = build_network("resnet101", 1000)
    count = [sum(p.numel() for p in network.parameters()) for network in (resnet50, design_b, resnet101)]
    assert sum(vgg.gate_channels) == 4224 and len(vgg.gate_channels) == 13
    assert count[0] == 25_557_032 and resnet50.full_macs(224, 224) == pytest.approx(4.09e9, rel=1e-3)
    assert count[2] == 44_549_160
    assert 1 - count[1] / count[2] == pytest.approx(0.06, abs=0.005)  # "6 % fewer parameters than ResNet-101"


@pytest.mark.parametrize(("block", "expected"), [("bottleneck_a", 52 / 17), ("bottleneck_b", 30 / 17)])
def test_doubling_a_bottleneck_multiplies_its_weights_as_counted_in_the_spec(block: str, expected: float) -> None:
    def weights(width: float) -> int:
        network = build_network("resnet50", 10, width=width, block=block)  # type: ignore[arg-type]
        part = network.body[3]
        assert isinstance(part, GatedBlock)
        return sum(layer.conv.weight.numel() for layer in part.convs)  # type: ignore[union-attr, operator, misc]

    with torch.device("meta"):
        assert weights(2) / weights(1) == pytest.approx(expected)


@pytest.mark.parametrize("arch", ["vgg6", "resnet8", "resnet18_cifar", "resnet50", "drn10"])
def test_full_cost_equals_pytorchs_counter(arch: str) -> None:
    network = build_network(arch, 7, widths=(8, 8, 8, 8) if arch in ("resnet18_cifar", "resnet50") else None).eval()
    with FlopCounterMode(display=False) as counter:
        network.features(torch.zeros(1, 3, 32, 32), lambda index, x: None)
    assert 2 * network.full_macs(32, 32) == counter.get_total_flops()


@pytest.mark.parametrize("arch", ["vgg6", "resnet8", "resnet50"])
def test_cost_of_an_image_equals_the_brute_force_count(arch: str) -> None:
    model = small(arch, widths=(8, 8, 8, 8) if arch == "resnet50" else None).eval()
    output = model(torch.randn(3, 3, 32, 32))
    assert 0.2 < float(output.active_share.mean()) < 0.8
    assert torch.equal(output.macs, brute_force_macs(model, output, 32))


def test_gates_are_rectified_bias_free_products_with_the_embedding() -> None:
    model = small().eval()
    output = model(torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(output.embedding.sum(1), torch.ones(4))
    assert [gate.shape[1] for gate in output.gates] == model.network.gate_channels
    torch.testing.assert_close(torch.cat(output.gates, 1), (output.embedding @ next(model.heads.parameters()).T).relu())
    assert bool((torch.cat(output.gates, 1) == 0).any())
    assert not any("bias" in name for name, _ in model.heads.named_parameters())


def test_heads_around_one_start_with_every_channel_on() -> None:
    output = small(gate_init="ones", latent=32).eval()(torch.randn(4, 3, 16, 16))
    assert float(output.active_share.min()) == 1
    assert float(torch.cat(output.gates, 1).detach().mean()) == pytest.approx(1, abs=0.05)


def test_the_gate_acts_behind_the_norm_so_that_a_closed_channel_is_zero() -> None:
    layer = MoEConv2d(3, 4, 3).eval()
    nn.init.ones_(layer.norm.bias)
    gate = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(layer(x, gate), layer(x) * gate[:, :, None, None])
    assert not layer(x, gate)[:, [1, 3]].any()


@pytest.mark.parametrize(
    ("block", "gated", "convs"), [("basic", {0, 1}, 2), ("bottleneck_a", {0, 1}, 3), ("bottleneck_b", {1}, 3)]
)
def test_each_block_design_gates_its_convolutions_and_never_the_shortcut(
    block: str, gated: set[int], convs: int
) -> None:
    network = build_network("resnet8", 3, block=block)  # type: ignore[arg-type]
    part = network.body[2]
    assert isinstance(part, GatedBlock) and len(part.convs) == convs
    assert {i for i, layer in enumerate(part.convs) if layer.gate_index is not None} == gated
    assert isinstance(network.body[0], MoEConv2d) and network.body[0].gate_index is None
    x = torch.randn(2, part.convs[0].conv.in_channels, 8, 8)  # type: ignore[union-attr, arg-type]
    closed = part.eval()(x, lambda index, features: torch.zeros(2, network.gate_channels[index]))
    if block == "basic":  # everything but the shortcut is closed
        torch.testing.assert_close(closed, part.shortcut(x).relu())


def test_gated_convs_chooses_another_reading_of_a_design() -> None:
    network = build_network("resnet8", 3, block="bottleneck_a", gated_convs=(1, 2))
    assert len(network.gate_channels) == 6 and network.gate_channels[1] == 64


def test_closing_every_gate_of_a_residual_network_leaves_the_shortcuts() -> None:
    model = small().eval()
    nn.init.constant_(next(model.heads.parameters()), -1.0)
    output = model(torch.randn(2, 3, 16, 16))
    assert float(output.active_share.max()) == 0 and bool(output.logits.isfinite().all())
    assert float((output.logits[0] - output.logits[1]).abs().max()) > 0


def test_keep_top_leaves_one_channel_in_a_layer_without_any() -> None:
    model = small("vgg6", keep_top=True).eval()
    nn.init.uniform_(next(model.heads.parameters()), -2, -1)
    output = model(torch.randn(2, 3, 16, 16))
    assert all(((gate > 0).sum(1) == 1).all() for gate in output.gates)


def test_normalised_gates_do_not_depend_on_a_common_scale() -> None:
    gates = [torch.tensor([[0.0, 1.0, 3.0]]), torch.zeros(1, 2)]
    first, empty = normalized(gates)
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.5, 1.5]]))
    torch.testing.assert_close(normalized([gates[0] * 7])[0], first)
    assert not empty.any()
    model = small(normalize_gates=True).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x).logits
    with torch.no_grad():
        next(model.heads.parameters()).mul_(3)
    torch.testing.assert_close(model(x).logits, before)


def test_an_embedding_can_be_given_and_must_fit() -> None:
    model = small().eval()
    x = torch.randn(3, 3, 16, 16)
    output = model(x)
    swapped = model(x, embedding=output.embedding.flip(0))
    torch.testing.assert_close(swapped.gates[0], output.gates[0].flip(0))
    with pytest.raises(ValueError, match=r"\(B, d\) = \(3, 5\), got \(3, 4\)"):
        model(x, embedding=torch.zeros(3, 4))


def test_the_embedding_network_costs_about_two_percent() -> None:
    with torch.device("meta"):
        cifar = build_deepmoe("resnet56", width=1)
        imagenet = build_deepmoe("resnet50", 1000, block="bottleneck_a", embedding_widths=(16, 32, 64, 128, 128))
    ratio = cifar.embedding.macs(32, 32) / cifar.network.full_macs(32, 32)
    assert ratio == pytest.approx(0.017, abs=0.001)
    base = build_network("resnet50", 10).full_macs(224, 224)
    assert imagenet.embedding.macs(224, 224) / base == pytest.approx(0.0145, abs=0.001)


def test_the_cost_counter_agrees_with_hooks_on_the_embedding() -> None:
    model = small()
    hooked = conv_macs(model.embedding, (3, 32, 32))
    assert model.embedding.macs(32, 32) == hooked + model.embedding.output.weight.numel()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"B x 3 x H x W, got torch.float32 \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got torch.float32 \(3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(2, 3, 4, 16), "H and W at least 8"),
        (torch.full((2, 3, 16, 16), torch.nan), "NaN or Inf"),
        (torch.full((2, 3, 16, 16), torch.inf), "NaN or Inf"),
    ],
)
def test_bad_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().eval()(images)


def test_one_image_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        small()(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet9"}, "unknown arch 'resnet9'"),
        ({"width": 0.5}, "width of a gated network must be at least 1, got 0.5"),
        ({"width": 99}, "width must be above 0 and at most 16"),
        ({"block": "bottleneck_c"}, "block must be one of basic, bottleneck_a, bottleneck_b"),
        ({"arch": "vgg6", "block": "basic"}, "for residual networks"),
        ({"gated_convs": (2,)}, "numbers from 0 to 1"),
        ({"gated_layers": (1,)}, "gated_layers is for VGG"),
        ({"arch": "vgg6", "gated_layers": ()}, "no gated layer"),
        ({"widths": (8,)}, "must be 3 positive numbers"),
        ({"latent": 7, "class_head": "identity"}, "needs latent = 5 classes, got 7"),
        ({"temperature": 0}, "temperature above 0"),
        ({"gate_init": "zeros"}, "gate_init must be"),
        ({"embedding_widths": ()}, "at least 1"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)  # type: ignore[arg-type]


def test_fine_tuning_needs_a_frozen_router() -> None:
    model = small()
    with pytest.raises(RuntimeError, match="freeze_router"):
        model.check_router_frozen()
    model.freeze_router()
    model.check_router_frozen()
    model.train()  # would move the statistics of M
    with pytest.raises(RuntimeError, match="freeze_router"):
        model.check_router_frozen()


def test_bfloat16_arithmetic_keeps_gates_and_zeros_exact() -> None:
    model = small().eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert all(gate.dtype == torch.float32 for gate in output.gates) and output.macs.dtype == torch.float64
    assert bool((torch.cat(output.gates, 1) == 0).any()) and output.logits.dtype == torch.float32


def test_a_dilated_network_keeps_its_resolution_and_answers_every_pixel() -> None:
    with torch.device("meta"):
        drn = build_network("drn_a_50", 19)
    assert isinstance(drn, GatedNetwork) and drn.stride == 8
    model = small("drn10", num_classes=4, latent=8).eval()
    assert model.network.stride == 2
    dilations = {layer.conv.dilation[0] for layer in model.network.convs() if layer.conv.kernel_size[0] == 3}
    assert dilations == {1, 2, 4}
    assert model(torch.randn(2, 3, 24, 32)).logits.shape == (2, 4, 24, 32)
