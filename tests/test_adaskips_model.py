"""AdaSkips' network: exact sizes, identities, variances, freezing, weights under their own names, bad input."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from dataeff.dynamic.adaskips.analysis import variance_growth, warn_of_explosion
from dataeff.dynamic.adaskips.hosts import SmallResNet, build_host, load_pretrained, read_weights
from dataeff.dynamic.adaskips.model import (
    AdaSkipConfig,
    AdaSkipModule,
    AdaSkipResNet,
    SkipHyperNetwork,
)
from dataeff.metrics.cost import count_macs

SMALL = ((4, 8, 12, 16), (2, 3, 2, 1))


def host(blocks=(2, 3, 2, 1), seed=0):
    torch.manual_seed(seed)
    network = SmallResNet(SMALL[0], blocks, 5, 1)
    for module in network.modules():  # norms that are not the identity, as after training
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def small(cfg=None, **options):
    return AdaSkipResNet.from_pretrained(host(), 3, cfg=cfg or AdaSkipConfig(**options)).eval()


def images(count=4, size=16, channels=1):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "base", "with_skips", "skips"),
    [
        ("resnet18", 11_227_812, 16_102_960, [3, 3, 3, 3]),
        ("resnet34", 21_335_972, 26_218_575, [6, 10, 21, 6]),
        ("resnext50_32x4d", 23_184_804, 97_786_063, [6, 10, 21, 6]),
        ("wide_resnet50_2", 67_039_140, 141_640_399, [6, 10, 21, 6]),
        ("resnet50", 23_712_932, 98_314_191, [6, 10, 21, 6]),
    ],
)
def test_parameters_are_those_of_the_published_table(name, base, with_skips, skips):
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None, num_classes=100)
        model = AdaSkipResNet(network, 100, AdaSkipConfig())
    assert size(network) == base
    assert size(model) == with_skips
    assert [len(stage.pairs) for stage in model.stages] == skips


@pytest.mark.parametrize(("name", "giga"), [("resnet18", 2.7745), ("resnet34", 2.7745)])
def test_hypernetworks_cost_the_published_multiply_adds_at_224(name, giga):
    model = AdaSkipResNet(build_host(name, 100, 3), 100, AdaSkipConfig())
    costs = model.costs(224, 224)
    assert sum(costs.hyper) / 1e9 == pytest.approx(giga, abs=5e-5)
    assert costs.base == count_macs(build_host(name, 100, 3), (3, 224, 224)).conv
    overhead = model.overhead()
    assert overhead["macs"] == sum(costs.hyper) and overhead["params"] == size(model) - size(build_host(name, 100, 3))
    assert overhead["ratio"] == pytest.approx({"resnet18": 2.53, "resnet34": 1.76}[name], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ratio"), [("resnext50_32x4d", 8.91), ("wide_resnet50_2", 3.96), ("resnet50", None)])
def test_bottleneck_hypernetworks_cost_34_giga_multiply_adds_at_224(name, ratio):
    model = AdaSkipResNet(build_host(name, 100, 3), 100, AdaSkipConfig())
    assert sum(model.costs(224, 224).hyper) / 1e9 == pytest.approx(33.988, abs=5e-4)
    if ratio:
        # The source's counter also counts norms and pooling, 1.7 % of ResNeXt's base.
        assert model.overhead()["ratio"] == pytest.approx(ratio, rel=0.02)


def adjacent_only(module):
    weights = torch.tensor([float(i == j - 1) for i, j in module.pairs])
    module.skip_weights = lambda x, image=None, draws=None: weights.expand(len(x), -1)


@pytest.mark.parametrize("blocks", [(2, 3, 2, 1), (1, 1, 1, 1)])
def test_weight_one_on_adjacent_skips_and_no_norm_is_the_pretrained_network(blocks):
    network = host(blocks).eval()
    model = AdaSkipResNet.from_pretrained(network, 5, cfg=AdaSkipConfig(module_bn=False)).eval()
    model.fc.load_state_dict(network.fc.state_dict())
    for stage in model.stages:
        adjacent_only(stage)
    torch.testing.assert_close(model(images()), network(images()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.run(images(), plain=True).embedding, model.run(images()).embedding)


def test_bottleneck_blocks_keep_the_identity_as_well():
    network = torchvision.models.resnet50(weights=None, num_classes=5).eval()
    model = AdaSkipResNet.from_pretrained(network, 5, cfg=AdaSkipConfig(module_bn=False)).eval()
    model.fc.load_state_dict(network.fc.state_dict())
    for stage in model.stages:
        adjacent_only(stage)
    x = images(2, 32, 3)
    torch.testing.assert_close(model(x), network(x), rtol=1e-4, atol=1e-4)


def test_standard_skips_of_weight_one_are_the_plain_network():
    model = small(skips="standard", weights="ones", module_bn=False)
    network = host().eval()
    torch.testing.assert_close(model.run(images(), plain=True).maps[3], model.run(images()).maps[3])
    assert size(model) == size(network) - size(network.fc) + size(model.fc)


def test_a_module_is_the_sum_over_all_earlier_nodes_with_the_input_mapped_once():
    model = small()
    stage = model.stages[1]
    x = torch.randn(3, 4, 8, 8)
    y = stage(x)
    lam = stage.last_lambda
    assert lam.shape == (3, 6)
    first = stage.blocks[0]
    calls = []
    first.downsample.register_forward_hook(lambda *_: calls.append(1))
    nodes = [first.downsample(x)]
    node = x
    for j, block in enumerate(stage.blocks, start=1):
        branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(node)))))
        for i in range(j):
            branch = branch + lam[:, AdaSkipModule.pair_index(i, j)].view(-1, 1, 1, 1) * nodes[i]
        node = torch.relu(branch)
        nodes.append(node)
    torch.testing.assert_close(y, stage.module_bn(node))
    calls.clear()
    stage(x)
    assert len(calls) == 1


def test_columns_of_skips_are_j_j_minus_1_half_plus_i():
    assert [AdaSkipModule.pair_index(i, j) for j in (1, 2, 3) for i in range(j)] == list(range(6))
    with pytest.raises(ValueError, match="i = 2, j = 2"):
        AdaSkipModule.pair_index(2, 2)


def test_skip_weights_are_in_0_1_differ_between_images_and_start_near_one_half():
    weights = small().skip_weights(images(16))
    assert [w.shape for w in weights] == [(16, 3), (16, 6), (16, 3), (16, 1)]
    joined = torch.cat(weights, 1)
    assert ((joined >= 0) & (joined <= 1)).all() and (joined.std(0) > 0).all()
    assert joined.mean().item() == pytest.approx(0.5, abs=0.15)


def test_a_hypernetwork_has_the_recovered_widths():
    hyper = SkipHyperNetwork(6, 10)
    assert [tuple(p.shape) for p in hyper.parameters()] == [
        (12, 6, 3, 3), (12,), (12,), (12, 12, 3, 3), (12,), (12,), (10, 12), (10,),
    ]  # fmt: skip
    assert size(hyper) == 54 * 36 + 8 * 6 + 12 * 10 + 10


def test_only_the_named_modules_get_skips():
    model = small(modules=(2, 4))
    assert [stage.hyper is not None for stage in model.stages] == [False, True, False, True]
    assert [stage.module_bn is not None for stage in model.stages] == [False, True, False, True]
    assert [w.shape[1] for w in model.skip_weights(images())] == [6, 1]


def test_a_hypernetwork_can_read_the_image():
    model = small(hyper_input="image")
    seen = []
    model.stages[2].hyper.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(images())
    assert torch.equal(seen[0], images())


def test_random_weights_are_the_given_draws_and_new_at_every_pass_without():
    model = small(weights="random")
    draws = torch.rand(4, model.num_draws)
    assert torch.equal(torch.cat(model.run(images(), draws).weights, 1), draws)
    assert not torch.equal(model(images()), model(images()))


def branch(channels):
    conv = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    for layer in conv:
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    return conv


def growth(all_skips, blocks=5, channels=64):
    """Variance of each node over the one before, with R(u) = W2 relu(W1 u) scaled to Var(R(u)) = Var(u) (Eq. 5.5)."""
    torch.manual_seed(0)
    nodes = [torch.randn(8, channels, 16, 16)]
    for _ in range(blocks):
        first, second = branch(channels)
        u = nodes[-1]
        with torch.no_grad():
            value = second(torch.relu(first(u)))
            value *= u.std() / value.std()
        nodes.append(value + (sum(nodes) if all_skips else nodes[-1]))
    variances = [node.var().item() for node in nodes]
    return [after / before for before, after in zip(variances, variances[1:], strict=False)]


def test_variance_doubles_a_block_with_single_skips_and_more_than_triples_with_all():
    assert growth(False) == pytest.approx([2.0] * 5, abs=0.2)
    assert min(growth(True)[1:]) > 3
    assert growth(True)[-1] == pytest.approx(4.3, abs=0.4)


def test_an_explosion_of_variance_warns_and_recommends_the_module_norm():
    model = small(weights="ones", module_bn=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 50)
    ratios = variance_growth(model, images())
    with pytest.warns(UserWarning, match="VarianceExplosion: module .*module_bn"):
        warn_of_explosion(ratios)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_explosion(variance_growth(small(), images()))


def test_a_frozen_backbone_neither_learns_nor_moves_its_statistics():
    model = AdaSkipResNet.from_pretrained(host(), 3, freeze_backbone=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(any(part in ("hyper", "module_bn", "fc") for part in name.split(".")) for name in moved)
    assert any("hyper.features.0" in name for name in moved) and any("module_bn" in name for name in moved)


def test_frozen_norms_take_the_batchs_statistics_when_asked():
    model = AdaSkipResNet.from_pretrained(host(), 3, True, AdaSkipConfig(bn_mode="train")).train()
    before = model.bn1.running_mean.clone()
    model(images())
    assert not torch.equal(before, model.bn1.running_mean)


def test_pretrained_weights_are_copied_not_shared():
    network = host()
    model = AdaSkipResNet.from_pretrained(network, 3)
    nn.init.zeros_(model.conv1.weight)
    assert network.conv1.weight.abs().sum() > 0


def test_optimiser_groups_give_the_backbone_a_tenth_of_the_rate():
    model = AdaSkipResNet.from_pretrained(host(), 3)
    new, backbone = model.parameter_groups(0.1)
    assert (new["lr"], backbone["lr"]) == (0.1, pytest.approx(0.01))
    assert len(new["params"]) + len(backbone["params"]) == len(list(model.parameters()))
    frozen = AdaSkipResNet.from_pretrained(host(), 3, freeze_backbone=True)
    assert len(frozen.parameter_groups(0.1)) == 1


def test_the_four_maps_are_there_for_detection_heads():
    maps = small().forward_features(images())
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 16, 16), (8, 8, 8), (12, 4, 4), (16, 2, 2)]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_under_the_names_of_the_pretrained_network(suffix, tmp_path):
    network = host().eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), path)
    model = AdaSkipResNet.from_pretrained(host(seed=9), 3)
    head = load_pretrained(model, read_weights(path), "weights")
    model.eval()
    torch.testing.assert_close(head(model.run(images(), plain=True).embedding), network(images()))


def test_missing_and_unexpected_weights_are_listed():
    state = host().state_dict()
    state["layer9.0.conv1.weight"] = state.pop("layer1.0.conv1.weight")
    with pytest.raises(ValueError, match="missing: layer1.0.conv1.weight; unexpected: layer9.0.conv1.weight"):
        load_pretrained(AdaSkipResNet.from_pretrained(host(), 3), state, "weights x")
    del state["layer9.0.conv1.weight"]
    state = {name: value for name, value in host().state_dict().items() if not name.startswith("fc.")}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert load_pretrained(AdaSkipResNet.from_pretrained(host(), 3), state, "weights x") is None
    with pytest.raises(ValueError, match="conv1.weight has shape"):
        load_pretrained(AdaSkipResNet.from_pretrained(SmallResNet(*SMALL, 5, 3), 3), host().state_dict(), "weights x")


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_weights(tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold a state dict"):
        read_weights(tmp_path / "list.pth")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_weights(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_module_without_blocks_and_one_that_changes_shape_inside_are_refused():
    with pytest.raises(ValueError, match="needs at least one"):
        AdaSkipModule(nn.ModuleList(), 4, 4)
    blocks = list(host().layer1) + list(host().layer2)
    with pytest.raises(ValueError, match="block 3 changes the shape.*module of its own at block 3"):
        AdaSkipModule(nn.ModuleList(blocks), 4, 8)
    plain = AdaSkipModule(nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)]), 4, 4)
    with pytest.raises(ValueError, match="block 2 gives"):
        plain(torch.randn(2, 4, 8, 8))


def test_blocks_without_shortcuts_such_as_vggs_get_skips_too():
    blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
    stage = AdaSkipModule(blocks, 4, 4, weights="ones", module_bn=False)
    x = torch.randn(2, 4, 6, 6)
    one = torch.relu(blocks[0](x) + x)
    two = torch.relu(blocks[1](one) + x + one)
    torch.testing.assert_close(stage(x), torch.relu(blocks[2](two) + x + one + two))


def test_skip_weights_that_are_not_numbers_name_the_module():
    model = small()
    nn.init.constant_(model.stages[2].hyper.output.bias, float("nan"))
    with pytest.raises(ValueError, match=r"module 3: skip weights must be in \[0, 1\].*module_bn"):
        model(images())


def test_one_image_of_1x1_features_in_training_is_refused():
    stage = AdaSkipModule(nn.ModuleList([nn.Conv2d(4, 4, 1)]), 4, 4, weights="ones").train()
    with pytest.raises(ValueError, match="BatchNorm needs more than one value per channel.*drop the last"):
        stage(torch.randn(1, 4, 1, 1))


def test_images_of_another_shape_or_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected images float B x 1 x H x W"):
        small()(images(channels=3))
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        bad = images()
        bad[0, 0, 0, 0] = float("nan")
        small()(bad)
