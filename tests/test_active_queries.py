"""Queries: each against a hand-computed case, invariances, MC dropout, and the bad inputs of spec section 10."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dataeff.active.mc_dropout import McPrediction, mc_dropout
from dataeff.active.queries import DBAL, QUERIES, ALContext
from dataeff.active.scores import entropy, least_confidence, margin, softmax, variation_ratio

P = np.array([[0.6, 0.3, 0.1], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]])
FROM_MODEL = ("lc", "me", "mm")
FROM_MEMBERS = ("ens_varr", "ens_lc", "ens_me", "ens_mm")


def context(unlabelled: object = (10, 11, 12, 13), seed: int = 0, **fields: object) -> ALContext:
    indices = np.asarray(unlabelled, dtype=np.int64)
    return ALContext(indices, np.array([1, 2], np.int64), np.random.default_rng(seed), **fields)  # type: ignore[arg-type]


def full_context(size: int, seed: int = 0, scale: float = 1.0) -> ALContext:
    """Everything that any query needs, with no two images alike."""
    rng = np.random.default_rng(99)
    members = softmax(scale * rng.normal(size=(3, size, 4)))
    return context(
        np.arange(size) * 3,
        seed,
        probabilities=members[0],
        mc=McPrediction.from_passes(softmax(rng.normal(size=(5, size, 4)))),
        ensemble_probabilities=members,
        features=rng.normal(size=(size, 6)),
        labelled_features=rng.normal(size=(2, 6)),
        labelledness=rng.random(size),
    )


def reordered(ctx: ALContext, order: np.ndarray, seed: int = 0) -> ALContext:
    """The same pool in another order, with a fresh generator."""
    assert ctx.mc is not None and ctx.probabilities is not None and ctx.ensemble_probabilities is not None
    assert ctx.features is not None and ctx.labelledness is not None
    return replace(
        ctx,
        unlabelled=ctx.unlabelled[order],
        rng=np.random.default_rng(seed),
        probabilities=ctx.probabilities[order],
        mc=McPrediction(ctx.mc.mean[order], ctx.mc.mean_entropy[order], ctx.mc.identical),
        ensemble_probabilities=ctx.ensemble_probabilities[:, order],
        features=ctx.features[order],
        labelledness=ctx.labelledness[order],
    )


# --- scores by hand -----------------------------------------------------------------------------------------------


def test_scores_of_three_classes_by_hand() -> None:
    np.testing.assert_allclose(least_confidence(P), [0.4, 0.5, 0.6, 0.0])
    np.testing.assert_allclose(margin(P), [-0.3, 0.0, -0.1, -1.0], atol=1e-15)
    expected = [-(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1)), np.log(2), 1.08890, 0.0]
    np.testing.assert_allclose(entropy(P), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"), [("lc", [12, 11, 10, 13]), ("me", [12, 10, 11, 13]), ("mm", [11, 12, 10, 13])]
)
def test_the_uncertain_are_asked_for_in_order(name: str, expected: list[int]) -> None:
    assert QUERIES[name]().query(context(probabilities=P), 4).tolist() == expected
    assert QUERIES[name]().query(context(probabilities=P), 2).tolist() == expected[:2]


def test_a_selection_carries_the_scores() -> None:
    indices, scores = QUERIES["lc"]().select(context(probabilities=P), 2)
    assert indices.tolist() == [12, 11] and scores == pytest.approx([0.6, 0.5])


def test_softmax_does_not_overflow_and_entropy_takes_zero() -> None:
    p = softmax(np.array([[1e4, 0.0, -1e4], [-1e30, 0.0, 0.0]]))
    np.testing.assert_array_equal(p, [[1, 0, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(entropy(p), [0, np.log(2)])


def test_a_constant_added_to_the_logits_changes_no_query() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 5))
    for name in FROM_MODEL:
        picked = [
            QUERIES[name]().query(context(np.arange(200), probabilities=softmax(logits + shift)), 30).tolist()
            for shift in (0.0, 512.0, -1024.0, np.linspace(-256, 256, 200).round()[:, None])
        ]
        assert all(other == picked[0] for other in picked)


def test_with_two_classes_lc_me_and_mm_ask_for_the_same() -> None:
    logits = 3 * np.random.default_rng(1).normal(size=(300, 2))
    ctx = [context(np.arange(300), probabilities=softmax(logits)) for _ in FROM_MODEL]
    picked = [QUERIES[name]().query(c, 300).tolist() for name, c in zip(FROM_MODEL, ctx, strict=True)]
    assert picked[0] == picked[1] == picked[2]


# --- committees ---------------------------------------------------------------------------------------------------

MEMBERS = np.array(
    [
        [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3]],
        [[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]],
        [[0.7, 0.3, 0.0], [0.9, 0.1, 0.0], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]],
    ]
)


def test_the_variation_ratio_counts_outvoted_members() -> None:
    assert variation_ratio(MEMBERS).tolist() == [0, 1 / 3, 2 / 3, 0]
    random = softmax(np.random.default_rng(0).normal(size=(3, 500, 10)))
    assert set(variation_ratio(random).tolist()) == {0, 1 / 3, 2 / 3}
    assert QUERIES["ens_varr"]().query(context(ensemble_probabilities=MEMBERS), 2).tolist() == [12, 11]


def test_ties_of_the_variation_ratio_go_by_the_seed() -> None:
    members = softmax(np.random.default_rng(0).normal(size=(3, 300, 3)))
    picked = [
        QUERIES["ens_varr"]().query(context(np.arange(300), seed, ensemble_probabilities=members), 20).tolist()
        for seed in (0, 0, 1)
    ]
    assert picked[0] == picked[1] != picked[2]


def test_committees_rank_by_their_mean_prediction() -> None:
    mean = MEMBERS.mean(axis=0)
    for committee, single in (("ens_lc", "lc"), ("ens_me", "me"), ("ens_mm", "mm")):
        ours = QUERIES[committee]().query(context(ensemble_probabilities=MEMBERS), 4)
        assert ours.tolist() == QUERIES[single]().query(context(probabilities=mean), 4).tolist()
    assert QUERIES["ens_lc"]().query(context(ensemble_probabilities=MEMBERS), 1).tolist() == [12]  # 1/3 each


def test_one_member_cannot_disagree() -> None:
    with pytest.raises(ValueError, match="1 ensemble member.*at least 2"):
        QUERIES["ens_varr"]().query(context(ensemble_probabilities=MEMBERS[:1]), 2)


# --- DBAL and BALD ------------------------------------------------------------------------------------------------

PASSES = np.array([[[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.5, 0.5], [0.7, 0.3]]])


def test_bald_is_the_mutual_information_by_hand() -> None:
    mc = McPrediction.from_passes(PASSES)
    # Passes that contradict each other: H = log 2, each pass is certain. Undecided passes: nothing to learn.
    third = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2)) + np.mean(
        [0.9 * np.log(0.9) + 0.1 * np.log(0.1), 0.7 * np.log(0.7) + 0.3 * np.log(0.3)]
    )
    np.testing.assert_allclose(mc.mutual_information, [np.log(2), 0.0, third], atol=1e-12)
    # From the joint distribution of pass t and class y: sum p(t, y) log(p(t, y) / (p(t) p(y))).
    joint = PASSES / len(PASSES)
    mean = joint.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log(joint * len(PASSES) / mean), 0)
    np.testing.assert_allclose(mc.mutual_information, terms.sum(axis=(0, 2)), atol=1e-12)


def test_dbal_asks_for_entropy_of_the_mean_or_for_information() -> None:
    ctx = context((20, 21, 22), mc=McPrediction.from_passes(PASSES))
    assert set(DBAL().query(ctx, 2).tolist()) == {20, 21} and DBAL("bald").query(ctx, 2).tolist() == [20, 22]
    with pytest.raises(ValueError, match="dbal_score = 'mean': must be 'entropy' or 'bald'"):
        DBAL("mean")  # type: ignore[arg-type]


def test_identical_passes_are_reported_and_rank_as_max_entropy_does() -> None:
    p = softmax(np.random.default_rng(3).normal(size=(50, 4)))
    passes = McPrediction.from_passes(np.stack([p] * 5))
    with pytest.warns(UserWarning, match="all passes gave the same predictions"):
        ours = DBAL().query(context(np.arange(50), mc=passes), 50)
    assert ours.tolist() == QUERIES["me"]().query(context(np.arange(50), probabilities=p), 50).tolist()


class Net(nn.Module):
    """Conv and BatchNorm, then dropout and two layers with another dropout between."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(p), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(p / 2), nn.Linear(16, 4))


IMAGES = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_part_before_dropout_runs_once_and_the_result_is_that_of_whole_passes() -> None:
    net, runs = Net(), []
    net.trunk.register_forward_hook(lambda *_: runs.append(1))
    mc = mc_dropout(net.trunk, net.head, IMAGES.split(20), passes=7, seed=2)
    assert len(runs) == 2 and len(mc) == 40 and not mc.identical
    whole = mc_dropout(nn.Identity(), nn.Sequential(net.trunk, net.head), [IMAGES], passes=7, seed=2)
    np.testing.assert_allclose(mc.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(mc.mean_entropy, whole.mean_entropy, atol=1e-6)


def test_neither_order_nor_batches_nor_memory_change_what_a_pass_says() -> None:
    net, order = Net(), torch.randperm(40, generator=torch.Generator().manual_seed(3))
    mc = mc_dropout(net.trunk, net.head, [IMAGES], passes=9, seed=4)
    other = mc_dropout(net.trunk, net.head, IMAGES[order].split(7), passes=9, seed=4, rows_at_once=15)
    np.testing.assert_allclose(other.mean, mc.mean[order.numpy()], atol=1e-6)
    assert np.abs(mc_dropout(net.trunk, net.head, [IMAGES], passes=9, seed=5).mean - mc.mean).max() > 1e-3


def test_many_passes_agree_with_pytorchs_own_dropout() -> None:
    net = Net().eval()
    mc = mc_dropout(net.trunk, net.head, [IMAGES[:4]], passes=4000, seed=0)
    net.head.train()
    with torch.no_grad():
        hidden = net.trunk(IMAGES[:4])
        theirs = net.head(hidden.repeat(4000, 1)).softmax(1).view(4000, 4, 4).numpy()
    np.testing.assert_allclose(mc.mean, theirs.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(mc.mutual_information, McPrediction.from_passes(theirs).mutual_information, atol=0.01)


def test_batch_norm_stays_in_eval_mode_and_the_modes_come_back() -> None:
    net = Net().train()
    net.head[0].eval()
    before = net.trunk[1].running_mean.clone()
    mc_dropout(net.trunk, net.head, [IMAGES], passes=2)
    assert torch.equal(net.trunk[1].running_mean, before)
    assert net.trunk.training and net.head.training and not net.head[0].training


def test_dbal_without_dropout_is_refused() -> None:
    net = Net(p=0.0)
    with pytest.raises(ValueError, match="DBAL needs dropout_p > 0"):
        mc_dropout(net.trunk, net.head, [IMAGES])
    with pytest.raises(ValueError, match="stands in the part that runs once"):
        mc_dropout(nn.Sequential(nn.Dropout(0.2)), Net().head, [IMAGES])
    with pytest.raises(ValueError, match="passes = 0: must be at least 1"):
        mc_dropout(net.trunk, Net().head, [IMAGES], passes=0)


# --- core-set, VAAL -----------------------------------------------------------------------------------------------


def test_the_core_set_asks_for_the_planted_outlier_first() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 8))
    features[37] += 50
    ctx = context(np.arange(100) + 7, features=features, labelled_features=rng.normal(size=(2, 8)))
    picked, distances = QUERIES["coreset"]().select(ctx, 5)
    assert picked[0] == 44 and distances[0] > 100 and (np.diff(distances) <= 0).all()


def test_the_core_set_starts_at_random_without_labels() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4))
    first = {
        int(
            QUERIES["coreset"]().query(
                ALContext(np.arange(30), np.empty(0, np.int64), np.random.default_rng(seed), features=features), 3
            )[0]
        )
        for seed in range(20)
    }
    assert len(first) > 5


def test_vaal_asks_for_what_looks_least_labelled() -> None:
    assert QUERIES["vaal"]().query(context(labelledness=np.array([0.9, 0.2, 0.5, 0.1])), 3).tolist() == [13, 11, 12]


# --- all of them --------------------------------------------------------------------------------------------------


def test_the_table_has_the_eleven_queries_and_says_what_they_need() -> None:
    needs = {name: set(query.needs) for name, query in QUERIES.items()}
    assert needs == {
        "random": set(),
        **dict.fromkeys(FROM_MODEL, {"model"}),
        "dbal": {"dropout"},
        "coreset": {"features"},
        "vaal": {"vaal"},
        **dict.fromkeys(FROM_MEMBERS, {"ensemble"}),
    }


@pytest.mark.parametrize("name", QUERIES)
def test_the_order_of_the_pool_changes_nothing(name: str) -> None:
    ctx, order = full_context(60), np.random.default_rng(8).permutation(60)
    picked = QUERIES[name]().query(ctx, 25)
    assert len(set(picked.tolist())) == 25 and set(picked.tolist()) <= set(ctx.unlabelled.tolist())
    assert QUERIES[name]().query(reordered(ctx, order), 25).tolist() == picked.tolist()


@pytest.mark.parametrize("name", sorted(set(QUERIES) - {"random", "coreset"}))
def test_scores_that_rank_nothing_mean_a_seeded_random_choice_with_a_warning(name: str) -> None:
    size = 200
    uniform = np.full((size, 4), 0.25)
    mc = McPrediction(uniform, np.full(size, np.log(4)), False)

    def picked(seed: int, fill: float = 0.25) -> list[int]:
        p = np.full((size, 4), fill)
        ctx = context(
            np.arange(size),
            seed,
            probabilities=p,
            mc=McPrediction(p, mc.mean_entropy, False),
            ensemble_probabilities=np.stack([p] * 3),
            labelledness=p[:, 0],
        )
        with pytest.warns(UserWarning, match="chosen at random"):
            return QUERIES[name]().query(ctx, 20).tolist()

    assert picked(0) == picked(0) != picked(1)
    if name != "ens_varr":  # votes are finite whatever the probabilities
        assert picked(0, np.nan) == picked(0)


def test_features_that_are_not_finite_mean_a_random_choice() -> None:
    features = np.ones((50, 3))
    features[4, 1] = np.nan
    ctx = context(np.arange(50), features=features, labelled_features=np.zeros((2, 3)))
    with pytest.warns(UserWarning, match="features are not finite.*at random"):
        assert len(set(QUERIES["coreset"]().query(ctx, 10).tolist())) == 10


def test_random_choices_and_ties_are_uniform_over_the_pool() -> None:
    counts = np.zeros(40)
    for seed in range(1500):
        counts[QUERIES["random"]().query(context(np.arange(40), seed), 10)] += 1
    assert np.abs(counts / 1500 - 0.25).max() < 0.06


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_beyond_the_pool_takes_the_rest_with_a_warning(name: str) -> None:
    ctx = full_context(6)
    with pytest.warns(UserWarning, match="k = 9 with 6 unlabelled images: all of them"):
        assert sorted(QUERIES[name]().query(ctx, 9).tolist()) == ctx.unlabelled.tolist()


@pytest.mark.parametrize("name", QUERIES)
def test_an_empty_pool_gives_an_empty_answer(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picked = QUERIES[name]().query(full_context(0), 5)
    assert picked.shape == (0,) and picked.dtype == np.int64


@pytest.mark.parametrize("k", [0, -3, 2.0, True, None])
def test_a_query_size_out_of_range_is_refused(k: object) -> None:
    for name in QUERIES:
        with pytest.raises(ValueError, match=f"k = {k!r} with 20 unlabelled images: must be a whole number"):
            QUERIES[name]().query(full_context(20), k)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(QUERIES) - {"random"}))
def test_what_a_query_needs_and_does_not_get_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{QUERIES[name].__name__} needs .*: fill that field"):
        QUERIES[name]().query(context(), 2)


def test_rows_that_do_not_match_the_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="MaxEntropy: probabilities has 3 rows for 4 images"):
        QUERIES["me"]().query(context(probabilities=P[:3]), 2)
    with pytest.raises(ValueError, match="EnsembleME: ensemble_probabilities has 4 rows for 3 images"):
        QUERIES["ens_me"]().query(context((1, 2, 3), ensemble_probabilities=MEMBERS), 2)
    with pytest.raises(ValueError, match="CoreSetGreedy: labelled_features has 5 rows for 2 images"):
        QUERIES["coreset"]().query(context(features=np.zeros((4, 2)), labelled_features=np.zeros((5, 2))), 2)
