"""AdaSkips for inference: equal to the trained network, really sparse, within a budget."""

import pytest
import torch
from torch import nn

from dataeff.dynamic.adaskips.hosts import SmallResNet, build_host
from dataeff.dynamic.adaskips.inference import AdaSkipInference
from dataeff.dynamic.adaskips.model import AdaSkipConfig, AdaSkipModule, AdaSkipResNet


def trained(host=None, **options):
    """A network whose norms are not the identity and whose skip weights spread over [0, 1]."""
    torch.manual_seed(0)
    network = host or SmallResNet((8, 8, 16, 16), (3, 2, 2, 1), 5, 1)
    model = AdaSkipResNet.from_pretrained(network, 5, cfg=AdaSkipConfig(**options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    for stage in model.stages:
        if stage.hyper is not None:
            nn.init.normal_(stage.hyper.output.weight, std=2)
            stage.hyper.mean_weights.uniform_(0.2, 0.8)
    return model.eval()


def images(count=12, size=16, channels=1):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def masked(model, x, tau, weights=None):
    """Logits with skips below tau set to 0, but for each block's largest; by the training code."""
    kept, handles = [], []

    def zero_small(stage, number):
        own = AdaSkipModule.skip_weights

        def replaced(features, image=None, draws=None):
            lam = own(stage, features, image, draws) if weights is None else weights[number]
            mask = torch.zeros_like(lam)
            for j in range(1, stage.count + 1):
                columns = [c for c, pair in enumerate(stage.pairs) if pair[1] == j]
                best = lam[:, columns].argmax(1)
                mask[torch.arange(len(lam)), torch.tensor(columns)[best]] = 1
            mask = torch.maximum(mask, (lam >= tau).float())
            kept.append(mask.bool())
            return lam * mask

        stage.skip_weights = replaced
        handles.append(stage)

    for number, stage in enumerate(model.stages):
        zero_small(stage, number)
    with torch.no_grad():
        logits = model(x)
    for stage in handles:
        del stage.skip_weights
    return logits, kept


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("skips", ["all", "standard"])
@pytest.mark.parametrize("module_bn", [True, False])
def test_leaving_skips_out_equals_multiplying_them_with_zero(tau, skips, module_bn):
    model = trained(skips=skips, module_bn=module_bn)
    logits, kept = masked(model, images(), tau)
    answer = AdaSkipInference(model)(images(), tau)
    torch.testing.assert_close(answer.logits, logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, k) for a, k in zip(answer.active, kept, strict=True))
    if tau == 0.6 and skips == "all":
        assert 0 < torch.cat(answer.active, 1).float().mean() < 1


def test_bottleneck_networks_and_images_as_hyper_input_agree_too():
    model = trained(build_host("resnet50", 5, 3), hyper_input="image")
    with torch.no_grad():
        expected = model(images(2, 64, 3))
    torch.testing.assert_close(AdaSkipInference(model)(images(2, 64, 3)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_skip_that_no_image_takes_is_not_read():
    model = trained(module_bn=False)
    fast = AdaSkipInference(model)
    module = fast.modules[0]
    x = torch.rand(3, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    weights = torch.ones(3, len(module.pairs))
    taken = torch.ones_like(weights, dtype=torch.bool)
    column = AdaSkipModule.pair_index(0, 3)
    taken[:, column] = False
    expected = module(x, weights.index_fill(1, torch.tensor([column]), 0), torch.ones_like(taken))
    weights[:, column] = float("nan")
    torch.testing.assert_close(module(x, weights, taken), expected)
    taken[0, column] = True  # and where one image takes it, the others do not read theirs
    weights[0, column] = 0.0
    torch.testing.assert_close(module(x, weights, taken), expected)


def test_no_weight_below_the_threshold_leaves_a_block_without_a_skip():
    answer = AdaSkipInference(trained())(images(), tau=1.0)
    for active, pairs in zip(answer.active, [s.pairs for s in trained().stages], strict=True):
        for block in {j for _, j in pairs}:
            columns = [column for column, (_, j) in enumerate(pairs) if j == block]
            assert (active[:, columns].sum(1) == 1).all()


def test_macs_count_what_was_executed():
    model = trained()
    costs = model.costs(16, 16)
    answer = AdaSkipInference(model)(images(), tau=0.6)
    expected = torch.full((12,), costs.base + sum(costs.hyper), dtype=torch.float64)
    for active, unit in zip(answer.active, costs.skip, strict=True):
        expected += active.sum(1) * unit
    torch.testing.assert_close(answer.macs, expected)
    assert costs.skip == [8 * 256.0, 8 * 64.0, 16 * 16.0, 16 * 4.0]
    assert AdaSkipInference(model)(images()).macs.max().item() == costs.full


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_no_image_spends_more_than_its_budget_where_backbone_and_skips_fit(share):
    model = trained()
    costs = model.costs(16, 16)
    least = costs.base + costs.skips
    budget = torch.full((12,), least + share * (costs.full - least), dtype=torch.float64)
    budget[:2] = torch.inf
    budget[2:4] = 1.0
    answer = AdaSkipInference(model)(images(), budget=budget)
    assert (answer.macs[4:] <= budget[4:]).all()
    assert (answer.macs[:2] == costs.full).all() and (answer.macs[2:4] == least).all()
    if share == 1.0:
        assert (answer.macs[4:] == costs.full).all()


def test_a_budget_that_leaves_hypernetworks_out_takes_the_mean_weights_and_does_not_run_them():
    model = trained()
    means = [stage.hyper.mean_weights.expand(12, -1) for stage in model.stages]
    budget = torch.full((12,), model.costs(16, 16).base, dtype=torch.float64)
    expected, _ = masked(model, images(), 0.0, means)
    for stage in model.stages:
        for parameter in stage.hyper.parameters():
            nn.init.constant_(parameter, float("nan"))
    answer = AdaSkipInference(model)(images(), budget=budget)
    assert not answer.asked.any()
    torch.testing.assert_close(answer.logits, expected, rtol=1e-5, atol=1e-5)


def test_images_with_and_without_a_budget_share_a_batch():
    model = trained()
    fast = AdaSkipInference(model)
    budget = torch.full((12,), torch.inf, dtype=torch.float64)
    budget[::2] = model.costs(16, 16).base
    mixed = fast(images(), budget=budget).logits
    torch.testing.assert_close(mixed[1::2], fast(images()).logits[1::2], rtol=1e-5, atol=1e-5)
    alone = fast(images()[::2], budget=budget[::2]).logits
    torch.testing.assert_close(mixed[::2], alone, rtol=1e-5, atol=1e-5)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="call model.eval"):
        AdaSkipInference(trained().train())
