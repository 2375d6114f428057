"""The super-network against one operation after another, and what becomes of its weights."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.nas_cost import BaselineNetwork
from dataeff.nas.discretise import (
    CellWeights,
    cell_weights_from,
    derive_cell,
    derive_genotype,
    keep_operations,
    restrict_skips,
)
from dataeff.nas.edges import cell_edges
from dataeff.nas.genotype import PRIMITIVES
from dataeff.nas.settings import Phase
from dataeff.nas.supernet import EDGES, SuperNetwork, SuperNetworkShape, build_supernet

ALL = [list(PRIMITIVES)] * 14


def sets_of(count: int, seed: int) -> list[list[str]]:
    """Different operations on every edge, as after a phase."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(8, generator=generator)[:count].tolist() for _ in EDGES]
    return [[name for i, name in enumerate(PRIMITIVES) if i in row or i == 3] for row in chosen]


def supernet(channels: int = 8, cells: int = 3, k: int = 4, sets: list[list[str]] | None = None) -> SuperNetwork:
    torch.manual_seed(0)
    shape = SuperNetworkShape(channels, cells, 10, 1, k, k > 1)
    return SuperNetwork(shape, sets or ALL, sets or ALL, PRIMITIVES)


@pytest.mark.parametrize(("k", "count"), [(1, 1_275_222), (2, 434_742), (4, 187_494)])
def test_parameters_of_the_super_network_are_those_of_the_source(k: int, count: int) -> None:
    assert sum(p.numel() for p in supernet(16, 5, k).parameters()) == count


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("sets", [None, sets_of(5, 1), sets_of(3, 2)], ids=["8 operations", "5", "3"])
def test_stacked_edges_give_what_one_operation_after_another_gives(k: int, sets: list[list[str]] | None) -> None:
    model = supernet(k=k, sets=sets).double().train()
    with torch.no_grad():
        for parameter in model.arch_parameters():
            parameter.copy_(torch.randn_like(parameter))
    one_by_one = BaselineNetwork(model, {"normal": sets or ALL, "reduce": sets or ALL}).double().train()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    labels = torch.arange(6)
    found = []
    for network in (model, one_by_one):
        logits = network(x)
        found.append([logits, *torch.autograd.grad(F.cross_entropy(logits, labels), model.arch_parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_alpha_sums_to_one_on_every_edge_and_beta_at_every_node() -> None:
    model = supernet(sets=sets_of(5, 1))
    for kind in ("normal", "reduce"):
        alpha, beta = model.cell_weights(kind)
        torch.testing.assert_close(alpha.sum(1), torch.ones(14))
        assert torch.equal(alpha > 0, model.get_buffer(f"mask_{kind}")) and beta is not None
        torch.testing.assert_close(torch.stack([part.sum() for part in beta.split([2, 3, 4, 5])]), torch.ones(4))


def test_initial_alpha_and_beta_are_small_and_beta_is_off_where_channels_are_whole() -> None:
    model = supernet(k=1)
    assert float(model.get_parameter("alpha_normal").detach().std()) == pytest.approx(1e-3, rel=0.3)
    assert model.cell_weights("normal").beta is None
    assert len(model.arch_parameters()) == 2 and len(supernet(k=4).arch_parameters()) == 4


def test_shuffling_puts_every_channel_of_the_mixed_part_apart() -> None:
    cell = supernet(channels=8, k=4).cells[0]
    mixed, bypass = torch.arange(2.0).view(1, 2, 1, 1), torch.arange(2.0, 8.0).view(1, 6, 1, 1)
    joined = cell._join(mixed, bypass, None).flatten().tolist()
    assert joined == torch.arange(8.0).view(4, 2).T.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_random_sampling_mixes_the_chosen_channels_and_leaves_the_others_in_place() -> None:
    torch.manual_seed(1)
    model = supernet(channels=8, cells=3, k=4)
    cell = model.cells[0]
    selected = torch.tensor([5, 2, 0, 1, 3, 4, 6, 7])
    cell.preprocess[0] = cell.preprocess[1] = torch.nn.Identity()
    x = torch.randn(2, 8, 6, 6)
    none_only = torch.zeros(14, 8)
    none_only[:, 0] = 1.0  # no operation but `none`: the mixed channels are empty
    ones = torch.tensor([1.0, 0.0] + [0.0] * 12)  # node 2 takes input 0 only
    node = cell(x, x, none_only, ones, None, selected)[:, :8]
    assert float(node[:, [5, 2]].abs().max()) == 0
    assert torch.equal(node[:, [0, 1, 3, 4, 6, 7]], x[:, [0, 1, 3, 4, 6, 7]])


def test_skip_dropout_acts_on_identities_of_single_images() -> None:
    model = supernet(k=1).eval()
    x = torch.randn(3, 1, 8, 8)
    drop = torch.ones(3, 3, 14)
    assert torch.allclose(model(x, drop), model(x), atol=1e-6)
    drop[1, 2] = 0.0
    changed = (model(x, drop) - model(x)).abs().max(1).values
    assert float(changed[1]) > 1e-5 and float(changed[[0, 2]].max()) < 1e-6


def test_weights_and_architecture_are_told_apart() -> None:
    model = supernet()
    ids = [id(p) for p in model.weight_parameters()] + [id(p) for p in model.arch_parameters()]
    assert len(set(ids)) == len(ids) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("channels", "k", "message"),
    [
        (6, 4, "cell 0: 6 channels are not divisible by partial_k = 4; change init_channels"),
        (4, 8, "cell 0: 4 channels are not divisible by partial_k = 8"),
    ],
)
def test_channels_that_do_not_divide_are_refused_with_the_cell(channels: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        supernet(channels, 3, k)


def test_an_odd_share_of_channels_is_refused_where_a_reduction_needs_two_halves() -> None:
    with pytest.raises(ValueError, match="cell 0: a factorised reduction has an even number of channels, got 3"):
        supernet(6, 2, 4)


def test_images_below_four_pixels_and_capsules_wider_than_the_share_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 3 pixels are too small"):
        build_supernet(SuperNetworkShape(8, 3, 10), ALL, ALL, PRIMITIVES, 3)
    operations = [*PRIMITIVES, "caps_dynamic"]
    with pytest.raises(ValueError, match="C/K = 2 is below the capsule dimension"):
        build_supernet(SuperNetworkShape(8, 3, 10), [operations] * 14, [operations] * 14, operations, 8)
    assert SuperNetwork(SuperNetworkShape(16, 3, 10), [operations] * 14, [operations] * 14, operations)(
        torch.randn(2, 3, 8, 8)
    ).shape == (2, 10)


def weights(alpha: dict[tuple[int, str], float], beta: list[float] | None = None) -> CellWeights:
    """Raw alpha at the given (edge, operation), 0 elsewhere."""
    raw = torch.zeros(14, 8)
    for (edge, name), value in alpha.items():
        raw[edge, PRIMITIVES.index(name)] = value
    return cell_weights_from(raw, None if beta is None else torch.tensor(beta))


def test_none_is_never_chosen_and_two_different_edges_are_kept_at_every_node() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        raw = torch.randn(14, 8)
        raw[:, 0] += 5.0
        pairs = derive_cell(cell_weights_from(raw, torch.randn(14)), PRIMITIVES)
        assert len(pairs) == 8 and all(name != "none" for name, _ in pairs)
        assert all(a[1] != b[1] for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_beta_decides_between_edges_only_where_there_is_one() -> None:
    # Node 3 has the edges 2, 3, 4 from 0, 1, 2; alpha prefers 0 and 1, beta prefers 1 and 2.
    alpha = {(2, "sep_conv_3x3"): 3.0, (3, "sep_conv_5x5"): 2.0, (4, "dil_conv_3x3"): 1.0}
    beta = [0.0] * 14
    beta[3], beta[4] = 3.0, 3.0
    assert dict(derive_cell(weights(alpha), PRIMITIVES)[2:4]) == {"sep_conv_3x3": 0, "sep_conv_5x5": 1}
    assert dict(derive_cell(weights(alpha, beta), PRIMITIVES)[2:4]) == {"sep_conv_5x5": 1, "dil_conv_3x3": 2}


def test_a_phase_drops_the_weakest_operations_of_each_edge() -> None:
    alpha = weights(
        {(0, "none"): 1.0, (0, "dil_conv_5x5"): 2.0, (0, "skip_connect"): -1.0, (0, "max_pool_3x3"): -2.0}
    ).alpha
    kept = keep_operations(alpha, ALL, PRIMITIVES, 6)
    assert kept[0] == ["none", "avg_pool_3x3", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
    assert all(len(names) == 6 for names in kept)
    assert keep_operations(alpha, kept, PRIMITIVES, 3)[0][0] == "none"


def test_the_skip_limit_removes_the_weakest_skips_first() -> None:
    strong = {(edge.index, "skip_connect"): 2.0 + edge.index / 10 for edge in cell_edges()}
    second = {(edge.index, "sep_conv_3x3"): 1.0 for edge in cell_edges()}
    found = weights({**strong, **second})
    assert sum(name == "skip_connect" for name, _ in derive_cell(found, PRIMITIVES)) == 8
    pairs = restrict_skips(found, PRIMITIVES, 2)
    skips = [position for position, (name, _) in enumerate(pairs) if name == "skip_connect"]
    assert len(skips) == 2 and min(skips) >= 6  # those of the last node were the strongest


def test_an_unreachable_skip_limit_is_kept_with_a_warning_and_a_collapse_is_reported() -> None:
    alpha = torch.zeros(14, 8)
    alpha[:, PRIMITIVES.index("skip_connect")] = 1.0
    only_skips = CellWeights(alpha, None)
    with pytest.warns(UserWarning, match="8 skip connections stay, more than max_skips = 2"):
        restrict_skips(only_skips, PRIMITIVES, 2)
    with pytest.warns(UserWarning, match=r"collapse: 8 of 8 .*softmax\(alpha\): \[\[0.0, 0.0, 0.0, 1.0"):
        derive_genotype(only_skips, only_skips, PRIMITIVES)


def test_skip_dropout_follows_the_formula() -> None:
    phase = Phase(11, 5, 25, 10, 25, 0.4)
    assert [phase.drop_probability(epoch) for epoch in (0, 9)] == pytest.approx([0.4 * 24 / 25, 0.4 * 15 / 25])
    assert [phase.drop_probability(epoch) for epoch in (10, 24)] == pytest.approx(
        [0.4, 0.4 * 2.718281828 ** (-0.2 * 14)]
    )
