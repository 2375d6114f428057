import pytest
import torch
from torch import nn

from dataeff.metrics.cost import conv_macs, count_macs
from dataeff.nn.gates import FeedForwardGate, RecurrentGate
from dataeff.nn.resnet import ResidualBlock


@pytest.mark.parametrize("variant", ["I", "II", "linear"])
@pytest.mark.parametrize("size", [(2, 2), (8, 8), (7, 9)])
def test_a_feed_forward_gate_gives_one_logit_an_image_at_any_size(variant, size):
    gate = FeedForwardGate(8, variant).eval()
    assert gate(torch.randn(3, 8, *size)).shape == (3,)
    assert gate(torch.randn(1, 8, *size)).shape == (1,)
    assert gate(torch.randn(0, 8, *size)).shape == (0,)


@pytest.mark.parametrize(("variant", "share"), [("I", 0.15625), ("II", 0.125), ("linear", 0.0)])
def test_a_feed_forward_gate_costs_its_counted_share_of_a_basic_block(variant, share):
    gate, block = FeedForwardGate(16, variant), ResidualBlock(16, 16)
    counted = conv_macs(gate, (16, 32, 32))
    assert counted == gate.macs(32, 32)
    assert counted / conv_macs(block, (16, 32, 32)) == share


def test_a_recurrent_gate_costs_less_than_0_2_percent_of_a_block():
    gate = RecurrentGate([64, 64])
    assert gate.linear_macs(0) == 640 + 800 + 10
    assert gate.linear_macs(0) / conv_macs(ResidualBlock(64, 64), (64, 8, 8)) < 0.002
    count = count_macs(gate, (64, 8, 8), state=None, position=0)
    assert (count.conv, count.linear) == (0, gate.linear_macs(0))


def test_an_unknown_gate_variant_is_refused():
    with pytest.raises(ValueError, match="'I', 'II' or 'linear', got 'III'"):
        FeedForwardGate(8, "III")


def test_the_recurrent_gate_is_one_lstm_with_a_projection_of_its_own_per_position():
    gate = RecurrentGate([8, 16, 16])
    assert [p.in_features for p in gate.projections] == [8, 16, 16]
    assert sum(isinstance(m, nn.LSTMCell) for m in gate.modules()) == 1
    assert sum(p.numel() for p in gate.parameters()) == (8 + 16 + 16 + 3) * 10 + 2 * 40 * 10 + 2 * 40 + 11


def test_the_recurrent_gate_equals_torchs_lstm_over_the_positions():
    torch.manual_seed(0)
    gate = RecurrentGate([4, 6, 6], hidden_dim=7, bias_init=0.3)
    nn.init.normal_(gate.cell.bias_ih)
    features = [torch.randn(5, c, 3, 3) for c in (4, 6, 6)]
    logits, state = [], None
    for position, x in enumerate(features):
        logit, state = gate(x, state, position)
        logits.append(logit)
    lstm = nn.LSTM(10, 7, batch_first=True)
    lstm.load_state_dict({f"{name}_l0": value for name, value in gate.cell.state_dict().items()})
    embedded = [project(x.mean((2, 3))) for project, x in zip(gate.projections, features, strict=True)]
    expected = gate.output(lstm(torch.stack(embedded, 1))[0])[:, :, 0]
    torch.testing.assert_close(torch.stack(logits, 1), expected)


def test_the_first_gate_starts_from_a_zero_state_and_later_gates_remember():
    torch.manual_seed(0)
    gate = RecurrentGate([4, 4])
    x = torch.randn(2, 4, 3, 3)
    zeros = (torch.zeros(2, 10), torch.zeros(2, 10))
    first, state = gate(x, None, 0)
    torch.testing.assert_close(first, gate(x, zeros, 0)[0])
    assert not torch.allclose(gate(x, state, 1)[0], gate(x, zeros, 1)[0])


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_the_output_bias_starts_at_gate_bias_init(bias):
    assert RecurrentGate([4], bias_init=bias).output.bias.item() == bias
    assert FeedForwardGate(4, "II", bias_init=bias).output.bias.item() == bias


def test_recurrent_weights_start_xavier_normal_with_zero_bias():
    gate = RecurrentGate([16], embed_dim=50, hidden_dim=50)
    assert gate.cell.weight_ih.std().item() == pytest.approx((2 / (200 + 50)) ** 0.5, rel=0.05)
    assert not gate.cell.bias_ih.any() and not gate.cell.bias_hh.any()


def test_gradients_reach_the_features_through_the_recurrent_gate():
    gate = RecurrentGate([4])
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    gate(x, None, 0)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_logits_stay_float32_under_autocast():
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert FeedForwardGate(8, "I")(x).dtype == torch.float32
        logit, state = RecurrentGate([8])(x, None, 0)
    assert logit.dtype == state[0].dtype == torch.float32
