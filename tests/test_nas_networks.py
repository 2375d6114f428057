"""Genotypes, evaluation networks and their inference form."""

import numpy as np
import pytest
import torch
from torch import nn

from dataeff.metrics.cost import parameters
from dataeff.nas.analysis import classwise_metrics
from dataeff.nas.capsules import CapsuleOp, dynamic_routing, em_routing, self_routing
from dataeff.nas.experiment_train import cutout
from dataeff.nas.genotype import GENOTYPES, PRIMITIVES, Genotype, named_genotype, random_genotype, structure_stats
from dataeff.nas.inference import folded
from dataeff.nas.network import CellNetwork, reduction_cells
from dataeff.nas.operations import FactorizedReduce, make_operation


def network(name: str = "pc_darts", channels: int = 4, cells: int = 4, **options: object) -> CellNetwork:
    torch.manual_seed(0)
    return CellNetwork(GENOTYPES[name], channels, 10, cells, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "count"), [("darts_v2", 3_349_342), ("p_darts", 3_433_798), ("pc_darts", 3_634_678)])
def test_published_networks_have_exactly_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameters(network(name, 36, 20)) == count


@pytest.mark.parametrize(("name", "millions"), [("darts_v2", 4.7), ("p_darts", 4.9), ("pc_darts_imagenet", 5.3)])
def test_imagenet_networks_have_the_published_size_and_a_stem_of_stride_8(name: str, millions: float) -> None:
    model = CellNetwork(GENOTYPES[name], 48, 1000, 14, stem="imagenet", side=224)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)
    small = network(name, 4, 3, stem="imagenet", side=64)
    assert small.stem(torch.zeros(1, 3, 64, 64)).shape[2] == 16
    assert small.second_stem is not None and small.second_stem(torch.zeros(1, 4, 16, 16)).shape[2] == 8


def test_reduction_cells_stand_at_one_and_two_thirds() -> None:
    assert [reduction_cells(cells) for cells in (20, 8, 3, 2, 1)] == [{6, 13}, {2, 5}, {1, 2}, {0, 1}, {0}]


@pytest.mark.parametrize("side", [4, 7, 9, 32])
def test_every_image_size_from_four_pixels_passes_also_odd_ones(side: int) -> None:
    assert network(side=side, auxiliary=True)(torch.zeros(2, 3, side, side)).shape == (2, 10)
    with pytest.raises(ValueError, match="images of 3 pixels are too small"):
        network(side=3)


def test_a_factorised_reduction_pads_odd_sides_and_refuses_odd_channels() -> None:
    assert FactorizedReduce(4, 6)(torch.zeros(1, 4, 7, 9)).shape == (1, 6, 4, 5)
    with pytest.raises(ValueError, match="even number of channels, got 5"):
        FactorizedReduce(4, 5)


@pytest.mark.parametrize("name", PRIMITIVES[1:])
@pytest.mark.parametrize("stride", [1, 2])
def test_operations_keep_channels_and_divide_the_sides_by_their_stride(name: str, stride: int) -> None:
    assert make_operation(name, 4, stride)(torch.zeros(2, 4, 9, 8)).shape == (2, 4, -(-9 // stride), 8 // stride)


def test_search_norms_are_not_affine_and_evaluation_pools_have_no_norm() -> None:
    norms = [layer for layer in make_operation("sep_conv_3x3", 4, 1, affine=False) if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 2 and not any(norm.affine for norm in norms)
    assert isinstance(make_operation("max_pool_3x3", 4, 1), nn.MaxPool2d)


@pytest.mark.parametrize("side", [8, 32])
def test_the_tower_answers_in_training_only_and_its_gradient_reaches_the_cells_below(side: int) -> None:
    model = network(auxiliary=True, side=side)
    x = torch.randn(4, 3, side, side)
    _, tower = model.train()(x, both=True)
    tower.square().sum().backward()
    assert tower.shape == (4, 10)
    reached = {
        int(n.split(".")[1]) for n, p in model.named_parameters() if n.startswith("cells") and p.grad is not None
    }
    assert reached == set(range(model.auxiliary_cell + 1))
    assert model.eval()(x, both=True)[1] is None


def test_drop_path_drops_an_operation_of_one_image_and_never_a_skip_connection() -> None:
    model = network("darts_v2").eval()
    x = torch.randn(2, 3, 8, 8)
    keep = torch.ones(2, *model.drop_sites)
    keep[1, 1] = 0.0
    plain, dropped = model(x), model(x, keep)
    assert torch.equal(plain[0], dropped[0]) and not torch.allclose(plain[1], dropped[1])
    identities = [i for i, op in enumerate(model.cells[0].operations) if isinstance(op, nn.Identity)]
    only_skips = torch.ones(2, *model.drop_sites)
    only_skips[:, 0, identities] = 0.0
    assert identities and torch.equal(model(x, only_skips), plain)


@pytest.mark.parametrize("name", GENOTYPES)
def test_the_folded_network_gives_the_same_answers(name: str) -> None:
    model = network(name, auxiliary=True, side=12)
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            model.train()(torch.randn(16, 3, 12, 12))
        model.eval()
        for size in (1, 5):
            x = torch.randn(size, 3, 12, 12).to(memory_format=torch.channels_last)
            torch.testing.assert_close(folded(model)(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="training mode"):
        folded(model.train())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normal": [("sep_conv_3x3", 2), ("skip_connect", 0)]}, "node 2 cannot take node 2; it must be from 0 to 1"),
        ({"normal": [("sep_conv_3", 1), ("skip_connect", 0)]}, "'sep_conv_3' .did you mean 'sep_conv_3x3'"),
        ({"normal": [("none", 1), ("skip_connect", 0)]}, "unknown operation 'none'"),
        ({"normal": [("skip_connect", 0)]}, "1 pairs; it needs two a node"),
        ({"normal_concat": [3]}, "concat .3. must be different nodes of .2."),
        ({"normal": [("skip_connect", 0)] * 4, "normal_concat": [3]}, "nothing uses the nodes .2."),
    ],
)  # fmt: skip
def test_impossible_genotypes_are_refused(changes: dict[str, object], message: str) -> None:
    cell = [("skip_connect", 0), ("max_pool_3x3", 1)]
    values = {"normal": cell, "normal_concat": [2], "reduce": cell, "reduce_concat": [2]}
    Genotype.model_validate(values)
    with pytest.raises(ValueError, match=message):
        Genotype.model_validate({**values, **changes})


def test_an_unknown_genotype_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'pc_darts'"):
        named_genotype("pcdarts")


def test_random_genotypes_have_two_different_predecessors_and_all_operations_equally_often() -> None:
    drawn = [random_genotype(np.random.default_rng(seed)) for seed in range(300)]
    names = [name for genotype in drawn for name, _ in genotype.normal + genotype.reduce]
    for genotype in drawn:
        assert all(a[1] != b[1] for a, b in zip(genotype.normal[::2], genotype.normal[1::2], strict=True))
    assert all(abs(names.count(name) / len(names) - 1 / 7) < 0.02 for name in PRIMITIVES[1:])
    assert {genotype.normal[2][1] for genotype in drawn} == {0, 1, 2}


def test_structure_of_the_published_darts_cell() -> None:
    assert structure_stats(GENOTYPES["darts_v2"].normal) == {"depth": 2, "skips": 2, "param_free": 2, "dilated": 1}
    assert structure_stats(GENOTYPES["p_darts"].normal) == {"depth": 3, "skips": 2, "param_free": 2, "dilated": 2}


def test_classwise_metrics_of_the_published_confusion_matrix() -> None:
    rows = (
        "941 3 12 6 0 0 3 2 25 8 | 1 976 0 0 0 0 0 0 2 21 | 16 0 935 10 13 12 9 2 2 1 | 8 1 20 848 12 78 19 9 4 1 | "
        "1 0 7 10 958 7 7 10 0 0 | 2 1 8 50 6 917 6 7 1 2 | 4 0 13 9 3 1 969 1 0 0 | 7 0 7 3 7 10 1 965 0 0 | "
        "15 5 2 2 0 0 2 0 967 7 | 3 14 0 1 0 0 1 0 8 973"
    )
    confusion = np.array([[int(value) for value in row.split()] for row in rows.split("|")])
    table = classwise_metrics(confusion, [str(k) for k in range(10)])
    assert all(value == pytest.approx(0.9449) for value in table["all"].values())
    assert table["0"]["recall"] == pytest.approx(0.941) and table["0"]["precision"] == pytest.approx(941 / 998)
    assert table["8"]["accuracy"] == pytest.approx(1 - (33 + 42) / 10_000)


def test_cutout_clears_a_square_that_may_leave_the_image() -> None:
    images = torch.ones(2, 1, 8, 8)
    cut = cutout(images, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), 4)
    assert float((cut[0] == 0).sum()) == 16 and float((cut[1] == 0).sum()) == 4
    assert torch.equal(cutout(images, torch.zeros(2, 2), 0), images)


@pytest.mark.parametrize(("routing", "channels"), [("dynamic", 8), ("em", 32), ("self", 8)])
def test_capsules_keep_the_shape_and_every_weight_learns(routing: str, channels: int) -> None:
    torch.manual_seed(0)
    op = CapsuleOp(routing, channels, 2)
    out = op(torch.randn(2, channels, 6, 6))
    assert out.shape == (2, channels, 3, 3)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in op.parameters())
    with pytest.raises(ValueError, match="not a multiple of the capsule dimension"):
        CapsuleOp(routing, 6, 1)


def test_routing_prefers_the_output_on_which_votes_agree() -> None:
    votes = torch.zeros(1, 3, 2, 4)
    votes[0, :, 0, 0] = 1.0  # all agree on output 0, and contradict each other on output 1
    votes[0, :, 1, :3] = torch.eye(3)
    v = dynamic_routing(votes)
    assert float(v[0, 0].norm()) > 1.5 * float(v[0, 1].norm()) and float(v.norm(dim=-1).max()) < 1
    mean, active = em_routing(votes, torch.ones(1, 3), torch.zeros(2), torch.zeros(2))
    assert torch.allclose(mean[0, 0], votes[0, 0, 0], atol=1e-3) and float(active[0, 0]) > float(active[0, 1])
    _, shares = self_routing(votes, torch.ones(1, 3), torch.tensor([[[2.0, 0.0]]]).expand(1, 3, 2))
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-4) and float(shares[0, 0]) > 0.85
