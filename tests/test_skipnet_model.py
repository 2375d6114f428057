import pytest
import torch
import torch.nn.functional as F

from dataeff.dynamic.skipnet.losses import hybrid_rl_loss
from dataeff.dynamic.skipnet.model import build_skipnet, survival_probabilities
from dataeff.metrics.cost import conv_macs

GATES = ["rnn", "ffgate1", "ffgate2", "linear"]


def small(gate="rnn", **options):
    torch.manual_seed(0)
    return build_skipnet(20, 10, gate, widths=(8, 16, 32), **options)


def images(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def force(model, executed):
    """Give every gate the same certain decision."""
    gates = [model.gates] if hasattr(model.gates, "cell") else model.gates
    for gate in gates:
        torch.nn.init.zeros_(gate.output.weight)
        torch.nn.init.constant_(gate.output.bias, 5.0 if executed else -5.0)


@pytest.mark.parametrize(("depth", "gates"), [(38, 17), (74, 35), (110, 53), (152, 74)])
def test_there_is_a_gate_before_every_block_but_the_first(depth, gates):
    assert build_skipnet(depth).num_gates == gates


@pytest.mark.parametrize("gate", GATES)
def test_executing_every_block_gives_the_base_network(gate):
    model = small(gate).eval()
    force(model, True)
    out = model(images())
    assert torch.equal(out.gates, torch.ones(4, 8))
    torch.testing.assert_close(out.logits, model.backbone(images()))
    torch.testing.assert_close(model(images(), mode="full").logits, model.backbone(images()))


def test_skipping_every_block_leaves_stem_block_1_and_the_shortcuts():
    model = small().eval()
    force(model, False)
    x = model.blocks[0](model.backbone.stem(images()))
    for block in model.blocks[1:]:
        x = block.shortcut(x)
    out = model(images())
    torch.testing.assert_close(out.logits, model.backbone.classify(x))
    assert not out.gates.any()


def test_a_skipped_block_leaves_that_images_features_untouched_and_not_the_others():
    model = small("none").eval()
    draws = torch.full((4, 8), 0.9)
    draws[1, 0] = 0.1
    kept = model(images(), mode="random", draws=draws, keep=0.5)
    skipped = model(images(), mode="random", draws=torch.full((4, 8), 0.9), keep=0.5)
    assert kept.gates.sum() == 1 and kept.gates[1, 0] == 1
    assert not torch.allclose(kept.logits[1], skipped.logits[1])
    assert torch.equal(kept.logits[[0, 2, 3]], skipped.logits[[0, 2, 3]])


def test_soft_gates_mix_block_and_shortcut_as_equation_2_1_says():
    model = small("linear").eval()
    x = model.blocks[0](model.backbone.stem(images()))
    for gate, block in zip(model.gates, model.blocks[1:], strict=True):
        s = torch.sigmoid(gate(x)).view(-1, 1, 1, 1)
        x = s * block(x) + (1 - s) * block.shortcut(x)
    out = model(images(), mode="soft")
    torch.testing.assert_close(out.logits, model.backbone.classify(x), rtol=1e-4, atol=1e-5)
    assert ((out.gates > 0) & (out.gates < 1)).all()


def test_a_gate_reads_the_gated_output_of_the_block_before():
    model = small().eval()
    calls = []
    model.gates.register_forward_hook(lambda m, args, out: calls.append(args[0]))
    force(model, False)
    model(images())
    first = model.blocks[0](model.backbone.stem(images()))
    assert torch.equal(calls[0], first) and torch.equal(calls[1], first)
    assert torch.equal(calls[3], model.blocks[3].shortcut(first))


@pytest.mark.parametrize("gate", ["ffgate1", "ffgate2", "linear"])
def test_straight_through_is_hard_forward_and_soft_backward(gate):
    model = small(gate).eval()
    hard, through = model(images(), mode="hard"), model(images(), mode="straight_through")
    assert torch.equal(hard.logits, through.logits)
    assert set(through.gates.unique().tolist()) <= {0.0, 1.0}
    (gradient,) = torch.autograd.grad(through.gates[:, -1].sum(), model.gates[-1].output.bias)
    s = torch.sigmoid(through.gate_logits[:, -1])
    torch.testing.assert_close(gradient, (s * (1 - s)).sum().view(1))


def test_a_probability_of_one_half_executes():
    model = small("linear").eval()
    for gate in model.gates:
        torch.nn.init.zeros_(gate.output.weight)
    assert model(images()).gates.all()
    assert model(images(), mode="straight_through").gates.all()


def test_sampled_gates_are_bernoulli_with_the_gates_probability_and_carry_no_gradient():
    model = small("linear", gate_bias_init=1.0).eval()
    for gate in model.gates:
        torch.nn.init.zeros_(gate.output.weight)
    draws = torch.rand(400, 8, generator=torch.Generator().manual_seed(0))
    out = model(images(400, 8), mode="sample", draws=draws)
    assert out.gates.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.03)
    assert not out.gates.requires_grad and out.gate_logits.requires_grad
    assert torch.equal(out.gates, (draws < torch.sigmoid(out.gate_logits)).float())


def test_draws_alone_decide_a_sampled_pass():
    model = small().eval()
    draws = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = model(images(), mode="sample", draws=draws)
    torch.manual_seed(2)
    second = model(images(), mode="sample", draws=draws)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.gates, second.gates)


def test_gumbel_gates_are_relaxed_and_harden_as_the_temperature_falls():
    model = small().eval()
    draws = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    warm = model(images(), mode="gumbel", draws=draws, temperature=1.0)
    cold = model(images(), mode="gumbel", draws=draws, temperature=0.01)
    assert ((warm.gates > 0) & (warm.gates < 1)).all()
    distance = torch.minimum(cold.gates, 1 - cold.gates).mean()
    assert distance < 0.02 < torch.minimum(warm.gates, 1 - warm.gates).mean()
    cold.gates.sum().backward()
    assert model.gates.output.bias.grad is not None


def test_random_skipping_keeps_the_share_asked_for_and_needs_no_gates():
    model = small("none").eval()
    draws = torch.rand(300, 8, generator=torch.Generator().manual_seed(0))
    keep = torch.linspace(0, 1, 8)
    out = model(images(300, 8), mode="random", draws=draws, keep=keep)
    torch.testing.assert_close(out.gates.mean(0), keep, atol=0.07, rtol=0)
    assert out.gate_logits.shape == (300, 0)


def test_stochastic_depth_scales_the_residual_branch_by_its_survival_at_inference():
    model = small("none").eval()
    keep = survival_probabilities(8)
    x = model.blocks[0](model.backbone.stem(images()))
    for p, block in zip(keep, model.blocks[1:], strict=True):
        x = F.relu(p * block.residual(x) + block.shortcut(x))
    torch.testing.assert_close(model(images(), mode="expected", keep=keep).logits, model.backbone.classify(x))
    whole = model(images(), mode="expected", keep=1.0)
    torch.testing.assert_close(whole.logits, model.backbone(images()))


def test_survival_falls_linearly_to_one_half_at_the_last_block():
    keep = survival_probabilities(8)
    torch.testing.assert_close(keep, 1 - torch.arange(2, 10) / 9 * 0.5)
    assert keep[-1] == 0.5


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shortcut", ["projection", "pool_pad"])
def test_macs_are_stem_block_1_gates_shortcuts_and_the_executed_blocks(gate, shortcut):
    model = small(gate, shortcut=shortcut).eval()
    costs = model.costs(16, 16)
    out = model(images())
    expected = (
        costs.stem + costs.first_block + (costs.shortcuts + costs.gates).sum() + out.gates.double() @ costs.blocks
    )
    assert torch.equal(out.macs, expected) and out.macs.dtype == torch.float64
    every_layer = conv_macs(model, (3, 16, 16))
    assert every_layer == costs.minimum + costs.blocks.sum()


@pytest.mark.parametrize("gate", [*GATES, "none"])
def test_mode_full_costs_what_a_hook_counts_on_the_base_network(gate):
    model = small(gate).eval()
    counted = conv_macs(model.backbone, (3, 16, 16))
    assert model.costs(16, 16).full == counted
    assert model(images(), mode="full").macs.tolist() == [counted] * 4


def test_costs_follow_the_image_size():
    model = small("ffgate1").eval()
    assert model.costs(32, 32).full == 4 * model.costs(16, 16).full
    assert model.costs(16, 16).gates[0] / model.costs(16, 16).blocks[0] == 0.15625


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("gate", GATES)
def test_every_parameter_gets_a_gradient_in_training_whatever_is_skipped(gate, norm):
    model = small(gate, norm=norm).train()
    force(model, False)
    F.cross_entropy(model(images(), mode="straight_through").logits, torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    out = model(images(), mode="sample", draws=torch.rand(4, 8))
    hybrid_rl_loss(out, torch.arange(4), alpha=1.0)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_batch_statistics_include_skipped_images():
    model = small().train()
    force(model, False)
    before = model.blocks[3].norms[0].running_mean.clone()
    model(images(), mode="straight_through")
    assert not torch.equal(before, model.blocks[3].norms[0].running_mean)


@pytest.mark.parametrize("gate", GATES)
def test_an_image_alone_gives_the_same_result_as_inside_a_batch(gate):
    model = small(gate).eval()
    batch, alone = model(images()), model(images()[2:3])
    torch.testing.assert_close(alone.logits, batch.logits[2:3], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.gates, batch.gates[2:3]) and alone.gate_logits.shape == (1, 8)


def test_an_empty_batch_gives_empty_outputs_in_evaluation():
    out = small().eval()(images()[:0])
    assert out.logits.shape == (0, 10) and out.gates.shape == (0, 8) and out.macs.shape == (0,)


def test_scaling_the_gates_divides_their_logits_once():
    for gate in GATES:
        model = small(gate, gate_bias_init=0.7).eval()
        before = model(images(), mode="sample", draws=torch.zeros(4, 8)).gate_logits
        model.scale_gates(0.05)
        after = model(images(), mode="sample", draws=torch.zeros(4, 8)).gate_logits
        torch.testing.assert_close(after, before / 0.05, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="got 0"):
        model.scale_gates(0)


def test_a_positive_gate_bias_starts_from_execute():
    assert small("rnn", gate_bias_init=4.0).eval()(images()).gates.all()
    assert not small("rnn", gate_bias_init=-4.0).eval()(images()).gates.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "maybe"}, "straight_through.*got 'maybe'"),
        ({"mode": "sample"}, "draws of shape \\(4, 8\\), got None"),
        ({"mode": "sample", "draws": torch.rand(4, 7)}, "got \\(4, 7\\)"),
        ({"mode": "random", "draws": torch.rand(4, 8)}, "needs keep"),
        ({"mode": "gumbel", "draws": torch.rand(4, 8), "temperature": 0.0}, "above 0, got 0.0"),
    ],
)
def test_a_missing_or_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small().eval()(images(), **arguments)


def test_a_network_without_gates_cannot_be_asked_to_decide():
    with pytest.raises(ValueError, match="gate='none'"):
        small("none").eval()(images(), mode="hard")
    with pytest.raises(ValueError, match="'ffgate2', 'linear' or 'none', got 'mlp'"):
        small("mlp")


def test_bad_images_are_refused_at_the_network():
    with pytest.raises(ValueError, match="multiples of 4"):
        small().eval()(torch.zeros(2, 3, 16, 18))
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        bad = images()
        bad[0, 0, 0, 0] = float("nan")
        small().eval()(bad)
    with pytest.raises(ValueError, match="at least 2"):
        small().train()(images(1), mode="straight_through")


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("gate", ["rnn", "ffgate1"])
def test_bfloat16_autocast_trains_and_returns_float32(gate, norm):
    model = small(gate, norm=norm).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images(), mode="straight_through")
        assert out.logits.dtype == out.gate_logits.dtype == out.gates.dtype == torch.float32
        F.cross_entropy(out.logits, torch.arange(4)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert set(out.gates.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("gate", ["rnn", "ffgate2"])
def test_the_network_compiles_as_one_graph(gate):
    model = small(gate).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(), mode="hard").logits, model(images(), mode="hard").logits)
    assert torch.equal(compiled(images(), mode="hard").macs, model(images(), mode="hard").macs)


def test_imagenet_networks_skip_as_well():
    model = build_skipnet(50, 5, "ffgate2", widths=(8, 8, 16, 16), family="imagenet").eval()
    force(model, False)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.gates.shape == (2, 15) and not out.gates.any()
    assert torch.equal(out.macs, model.costs(64, 64).minimum.expand(2))
