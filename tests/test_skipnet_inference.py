import math
import threading
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import dataeff.dynamic.skipnet.predictor as predictor_module
from dataeff.core.artifact import Card
from dataeff.dynamic.skipnet.inference import SkipNetInference
from dataeff.dynamic.skipnet.model import build_skipnet
from dataeff.nn.fold import FoldedResNet, fold_batch_norm, fold_conv
from dataeff.nn.resnet import conv2d
from dataeff.nn.sparse import FeatureRows, Workspace

GATES = ["rnn", "ffgate1", "ffgate2", "linear"]


def small(gate="rnn", depth=20, classes=10, **options):
    """A network with the statistics of a used BatchNorm and gates that decide image by image."""
    torch.manual_seed(0)
    options.setdefault("widths", (8, 16, 32))
    model = build_skipnet(depth, classes, gate, **options)
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            nn.init.uniform_(layer.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
    model.eval()
    if gate != "none":
        balance(model, images(16, 64 if options.get("family") else 16, options.get("in_channels", 3)))
    return model


@torch.no_grad()
def balance(model, x):
    """Move the gates' biases until about half of the decisions are to execute."""
    if isinstance(model.gates, nn.ModuleList):
        for i, gate in enumerate(model.gates):
            gate.output.bias -= model(x).gate_logits[:, i].quantile(0.5)
    else:
        model.gates.output.weight *= 3
        model.gates.output.bias -= model(x).gate_logits.quantile(0.5)


def images(count=6, size=16, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def decisions(count, gates, share=0.5, seed=0):
    return torch.rand(count, gates, generator=torch.Generator().manual_seed(seed)) < share


def masked(model, x, executed):
    """Masked execution with given decisions: every image passes through every block."""
    with torch.no_grad():
        return model(x, mode="random", draws=(~executed).float(), keep=0.5)


def test_folded_batch_norm_equals_convolution_and_norm():
    conv, norm = conv2d(3, 5, 3), nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.eval()
    x = images(2, 8)
    weight, bias = fold_batch_norm(conv, norm)
    torch.testing.assert_close(torch.conv2d(x, weight, bias, padding=1), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_batch_norm_without_statistics_cannot_be_folded():
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))


@pytest.mark.parametrize("options", [{}, {"norm": "group"}, {"shortcut": "pool_pad"}, {"in_channels": 1}])
def test_the_folded_network_gives_the_logits_of_the_network(options):
    model = small("none", **options)
    x = images(channels=options.get("in_channels", 3))
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(FoldedResNet(model.backbone)(x), model.backbone(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


def test_the_folded_bottleneck_network_gives_the_logits_of_the_network():
    model = small("none", depth=50, family="imagenet", widths=(8, 8, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            FoldedResNet(model.backbone)(images(2, 64)), model.backbone(images(2, 64)), rtol=1e-4, atol=1e-5
        )


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        SkipNetInference(small().train())
    with pytest.raises(ValueError, match="eval"):
        FoldedResNet(small().backbone.train())


def test_a_network_without_gates_is_refused():
    with pytest.raises(ValueError, match="gate='none'"):
        SkipNetInference(small("none"))


def test_replaced_rows_change_and_all_others_stay():
    features = torch.randn(7, 3, 2, 5).contiguous(memory_format=torch.channels_last)
    expected = features.clone()
    rows = FeatureRows(features, Workspace())
    generator = np.random.default_rng(0)
    for step in range(60):
        chosen = np.flatnonzero(generator.random(7) < generator.choice([0.2, 0.5, 0.8, 1.0]))
        part = rows.take(chosen)
        assert torch.equal(part, expected[torch.from_numpy(chosen)])
        part.fill_(float(step))
        expected[torch.from_numpy(chosen)] = float(step)
        if step % 7 == 0:
            assert torch.equal(rows.ordered(), expected)
    assert torch.equal(rows.ordered(), expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [{}, {"norm": "group"}, {"shortcut": "pool_pad"}])
def test_skipping_equals_masked_execution(gate, options):
    model = small(gate, **options)
    with torch.no_grad():
        expected = model(images(16), mode="hard")
    out = SkipNetInference(model)(images(16))
    assert expected.gate_logits.abs().min() > 1e-5, "a decision on the threshold may differ by rounding"
    assert torch.equal(out.gates, expected.gates)
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.gate_logits, expected.gate_logits, rtol=0, atol=1e-5)
    assert torch.equal(out.macs, expected.macs)


def test_the_gates_of_these_tests_decide_image_by_image():
    mixed = [SkipNetInference(small(gate))(images(16)).gates.mean(0) for gate in GATES]
    assert all(((share > 0) & (share < 1)).any() for share in mixed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_forced_decisions_equal_masked_execution(gate, share):
    model, forced = small(gate), decisions(16, 8, share)
    expected = masked(model, images(16), forced)
    out = SkipNetInference(model)(images(16), forced=forced)
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
    assert torch.equal(out.gates.bool(), forced)
    assert out.gate_logits.shape == (16, 8)


def test_bottleneck_blocks_skip_as_well():
    model = small("rnn", depth=50, family="imagenet", widths=(8, 8, 8, 8))
    forced = decisions(5, 15)
    out = SkipNetInference(model)(images(5, 64), forced=forced)
    torch.testing.assert_close(out.logits, masked(model, images(5, 64), forced).logits, rtol=1e-4, atol=1e-5)


def test_a_block_gets_only_the_images_that_execute_it():
    fast, seen = SkipNetInference(small()), []
    forced = decisions(6, 8)
    forced[:, 3] = False
    for block in fast.network.blocks[1:]:
        original = block.execute_

        def counted(x, shortcut, original=original, block=block):
            seen.append((block, len(x)))
            original(x, shortcut)

        block.execute_ = counted
    fast(images(), forced=forced)
    counts = [(block, int(n)) for block, n in zip(fast.network.blocks[1:], forced.sum(0), strict=True)]
    assert seen == [(block, n) for block, n in counts if n]


def test_weights_of_a_block_that_nobody_executes_may_be_nan():
    model, forced = small(), decisions(6, 8)
    forced[:, 4] = False
    expected = SkipNetInference(model)(images(), forced=forced).logits
    for conv in model.blocks[5].convs:
        nn.init.constant_(conv.weight, math.nan)
    torch.testing.assert_close(SkipNetInference(model)(images(), forced=forced).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("gate", GATES)
def test_an_image_alone_gives_what_it_gives_in_a_batch(gate):
    fast = SkipNetInference(small(gate))
    together = fast(images())
    for i in range(6):
        alone = fast(images()[i : i + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=0, atol=1e-5)
        assert torch.equal(alone.gates[0], together.gates[i])


@pytest.mark.parametrize("gate", GATES)
def test_an_empty_batch_gives_empty_answers(gate):
    out = SkipNetInference(small(gate))(images(0))
    assert out.logits.shape == (0, 10) and out.gates.shape == (0, 8) and out.macs.shape == (0,)


def test_images_are_left_as_they_were_and_repeated_calls_agree():
    fast, x = SkipNetInference(small()), images()
    first = fast(x)
    assert torch.equal(x, images())
    assert torch.equal(first.logits, fast(x).logits)


def test_threads_may_share_one_network():
    fast = SkipNetInference(small())
    inputs = [images(size=size) for size in (16, 24, 32)]
    expected = [fast(x).logits for x in inputs]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.allclose(fast(inputs[i]).logits, expected[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nobody_spends_more_than_the_budget_allows():
    model = small()
    fast, costs = SkipNetInference(model), model.costs(16, 16)
    minimum, block = float(costs.minimum), float(costs.blocks.min())
    limits = [math.inf, minimum, minimum + block, minimum + 3.5 * block, 0.0, costs.full]
    budget = torch.tensor(limits, dtype=torch.float64)
    everything = torch.ones(6, 8, dtype=torch.bool)
    out = fast(images(), budget, everything)
    assert out.gates.sum(1).tolist()[:2] == [8, 0] and out.gates[4].sum() == 0
    assert out.gates[5].all()
    assert (out.macs <= budget.clamp_min(minimum)).all()
    assert out.macs[2] == minimum + block
    torch.testing.assert_close(out.logits, masked(model, images(), out.gates.bool()).logits, rtol=0, atol=1e-5)
    for i in range(6):
        alone = fast(images()[i : i + 1], budget[i : i + 1], everything[:1])
        assert torch.equal(alone.gates[0], out.gates[i]) and alone.macs[0] == out.macs[i]
        torch.testing.assert_close(alone.logits[0], out.logits[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", ["rnn", "ffgate1"])
def test_one_network_answers_images_of_several_sizes_one_by_one_and_together(gate):
    """Depth 8: the last block changes the shape, so that no gate knows its width."""
    model = small(gate, depth=8)
    fast = SkipNetInference(model)
    for size in (16, 32, 16):
        x = images(size=size)
        together = fast(x)
        expected = masked(model, x, together.gates.bool()).logits
        torch.testing.assert_close(together.logits, expected, rtol=0, atol=1e-5)
        for i in range(6):
            alone = fast(x[i : i + 1])
            torch.testing.assert_close(alone.gate_logits[0], together.gate_logits[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.logits[0], expected[i], rtol=0, atol=1e-5)


def test_a_convolution_of_one_image_is_the_same_at_every_size_whatever_came_before():
    conv, norm = conv2d(64, 64, 3), nn.BatchNorm2d(64).eval()
    sizes = [torch.randn(1, 64, size, size, generator=torch.Generator().manual_seed(size)) for size in (8, 32)]
    used, fresh = fold_conv(conv, norm), fold_conv(conv, norm)
    for x in sizes:
        used(x.contiguous(memory_format=torch.channels_last), True)
    for x in reversed(sizes):
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(used(x, True), norm(conv(x)).relu(), rtol=1e-4, atol=1e-4)
        assert torch.equal(used(x, True), fresh(x, True))


def test_a_budget_keeps_what_the_gates_of_feed_forward_networks_cost():
    model = small("ffgate1")
    costs = model.costs(16, 16)
    budget = torch.full((6,), float(costs.ungated + costs.blocks[0]), dtype=torch.float64)
    out = SkipNetInference(model)(images(), budget, torch.ones(6, 8, dtype=torch.bool))
    assert float(costs.gates.sum()) > 0
    assert (out.macs <= budget.clamp_min(float(costs.minimum))).all()


def test_a_budget_without_limit_changes_nothing():
    fast = SkipNetInference(small())
    unlimited = fast(images(), torch.full((6,), math.inf, dtype=torch.float64))
    assert torch.equal(unlimited.logits, fast(images()).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": torch.ones(5)}, "one number of multiply-adds per image"),
        ({"budget": torch.full((6,), math.nan)}, "NaN"),
        ({"forced": torch.ones(6, 7, dtype=torch.bool)}, "forced must be bool"),
        ({"forced": torch.ones(6, 8)}, "forced must be bool"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SkipNetInference(small())(images(), **arguments)


def test_images_that_are_not_finite_are_refused():
    x = images()
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        SkipNetInference(small())(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gate", GATES)
def test_skipping_on_a_gpu_equals_masked_execution(gate):
    torch.backends.cudnn.allow_tf32 = False
    model, forced = small(gate).cuda(), decisions(16, 8).cuda()
    out = SkipNetInference(model)(images(16).cuda(), forced=forced)
    torch.testing.assert_close(out.logits, masked(model, images(16).cuda(), forced).logits, rtol=0, atol=1e-5)
    assert out.macs.device.type == "cuda"


class StubPreprocess:
    """Stands for dataeff.data.Preprocess: only the scale of the pixels."""

    @classmethod
    def from_dict(cls, values):
        return SimpleNamespace(from_pil=cls.from_pil)

    @staticmethod
    def from_pil(pictures):
        return torch.stack([torch.from_numpy(np.array(p.resize((16, 16)))).permute(2, 0, 1) / 255 for p in pictures])


@pytest.fixture
def predictor(monkeypatch):
    monkeypatch.setattr("dataeff.nn.predictor.Preprocess", StubPreprocess)

    def make(arm, model):
        card = Card(
            method="skipnet",
            classes=[str(i) for i in range(10)],
            input_shape=(3, 16, 16),
            preprocess={},
            metrics={},
            cost={"macs": 1.0, "params": 1, "full_macs": 1.0},
            data={"name": "none", "fingerprint": ""},
            versions={},
        )
        return predictor_module.skipnet_predictor(model, arm, 0.5, card, "cpu")

    return make


def test_a_gated_predictor_names_its_blocks_and_honours_the_budget(predictor):
    model = small()
    answer = predictor("hrl_sp", model)
    with torch.no_grad():
        expected = model(images(), mode="hard")
    free = answer.predict(images())
    torch.testing.assert_close(free.probabilities, expected.logits.softmax(1))
    assert torch.equal(free.path, expected.gates.bool()) and torch.equal(free.macs, expected.macs)
    assert answer.path_names == [f"block {i}" for i in range(2, 10)]
    minimum = float(model.costs(16, 16).minimum)
    bound = answer.predict(images(), torch.full((6,), minimum, dtype=torch.float64))
    assert not bound.path.any() and (bound.macs == minimum).all()


def test_the_base_predictor_is_the_dense_network_without_optional_parts(predictor):
    model = small("none")
    answer = predictor("base", model)
    found = answer.predict(images(), torch.zeros(6, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(found.probabilities, model.backbone(images()).softmax(1))
    assert answer.path_names == [] and found.path.shape == (6, 0)
    assert (found.macs == model.costs(16, 16).full).all()


def test_random_skipping_answers_an_image_the_same_way_in_every_batch(predictor):
    answer = predictor("sdv", small("none"))
    together, alone = answer.predict(images()), answer.predict(images()[3:4])
    torch.testing.assert_close(alone.probabilities[0], together.probabilities[3])
    assert torch.equal(alone.path[0], together.path[3])
    assert 0 < together.path.float().mean() < 1


def test_stochastic_depth_runs_every_block(predictor):
    found = predictor("stochastic_depth", small("none")).predict(images())
    assert found.path.all()


@pytest.mark.parametrize("arm", ["hrl_sp", "base", "sdv", "stochastic_depth"])
def test_every_predictor_answers_pictures_and_empty_batches(predictor, arm):
    answer = predictor(arm, small("rnn" if arm == "hrl_sp" else "none"))
    found = answer.predict(answer.preprocess([PIL.Image.new("RGB", (20, 30), "red")]))
    assert found.probabilities.dtype == torch.float32 and found.macs.dtype == torch.float64
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(1))
    assert answer.predict(images(0)).probabilities.shape == (0, 10)
