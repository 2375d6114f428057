"""Random genotypes, NSGA-II, and the searches of chains."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Preprocess, open_splits
from dataeff.metrics.cost import count_macs
from dataeff.nas.architecture import Chain, ChainNetwork, parse_architecture
from dataeff.nas.blocks import make_block
from dataeff.nas.evolution import EvolutionarySearch, RandomSearch, crowding, fronts, gene_bounds, genotype_of
from dataeff.nas.experiment_search import NasSearchConfig
from dataeff.nas.experiment_train import NasTrainConfig
from dataeff.nas.gated import GatedSearch
from dataeff.nas.routing import RoutingSearch
from dataeff.nas.search import Moment, Searcher, SearchTask
from dataeff.nas.settings import SearchSettings

TINY: dict[str, Any] = {
    "epochs": 3, "arch_start": 1, "search_images": 64, "batch": 16, "init_channels": 4, "augment": "none",
    "arch_lr": 0.05,
    "evolution": {"population": 3, "generations": 3, "nodes": 2, "channels": 4, "cells": 2, "iterations": 4},
    "chain": {"widths": [4, 8, 8], "strides": [1, 2, 1], "layers": 1},
}  # fmt: skip
SEARCHES = {"nsga2": EvolutionarySearch, "proxyless": GatedSearch, "densenas": RoutingSearch}


def make(arm: str, **changes: Any) -> Any:
    splits = open_splits("digits")
    task = SearchTask(splits.train, splits, Preprocess.fit(splits.train), Runtime("cpu"), 0)
    settings = parse_config(SearchSettings, merge({**TINY, "arm": arm}, changes))
    return {**SEARCHES, "random": RandomSearch}[arm](task, settings)


@pytest.mark.parametrize("arm", SEARCHES)
def test_a_search_resumed_in_the_middle_finds_the_same(arm: str) -> None:
    undisturbed: Searcher = make(arm)
    rows, middle, half = [], {}, undisturbed.total_steps // 2
    for step in range(undisturbed.total_steps):
        if step == half:
            middle = copy.deepcopy(undisturbed.state_dict())
        rows.append(undisturbed.step(step))
    resumed: Searcher = make(arm)
    resumed.load_state_dict(middle)
    assert [resumed.step(step) for step in range(half, resumed.total_steps)] == rows[half:]
    assert resumed.architecture() == undisturbed.architecture() and resumed.history == undisturbed.history


def test_a_random_genotype_takes_no_step() -> None:
    search = make("random")
    assert search.total_steps == 0 and search.architecture() == make("random").architecture()


def test_non_dominated_ranks_and_crowding_of_a_hand_made_population() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0), (2.0, 4.0), (5.0, 5.0), (4.0, 2.0)]
    assert fronts(points) == [[0, 1, 2], [3, 5], [4]]
    distance = crowding(np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0]]))
    assert distance[0] == distance[2] == math.inf and distance[1] == pytest.approx(1 + 1)


def test_every_genome_is_a_genotype_whose_output_takes_the_loose_ends() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        genome = tuple(int(rng.integers(bound)) for bound in gene_bounds(5))
        genotype = genotype_of(genome, 5)
        taken = {source for _, source in genotype.normal}
        assert len(genotype.normal) == 10 and not set(genotype.normal_concat) & taken


def test_evolution_keeps_the_best_and_never_trains_a_candidate_twice_in_a_generation() -> None:
    search = make("nsga2")
    search._evaluate = lambda genome: _fake(genome)
    seen: list[tuple[int, ...]] = []
    best = []
    for step in range(search.total_steps):
        seen.append(search.queue[len(search.children)])
        best.append(search.step(step)["val_accuracy"])
    assert best == sorted(best) and len(search.parents) == 3
    for first in range(0, 9, 3):
        assert len(set(seen[first : first + 3])) == 3


def _fake(genome: tuple[int, ...]) -> Any:
    from dataeff.nas.evolution import Individual

    return Individual(genome, sum(genome) / 100, float(genome[0]))


def test_a_gated_step_moves_two_candidates_and_leaves_the_probabilities_of_the_others() -> None:
    search: GatedSearch = make("proxyless", arch_start=0)
    batch = next(search._batches("weights", search.weight_half, 0))
    search.model.train()
    before = search.model.probabilities().detach().clone()
    search._arch_step(batch, batch, Moment(0, 0, 0))
    after = search.model.probabilities().detach()
    untouched = torch.ones_like(before, dtype=torch.bool).scatter(1, search.pairs, False)
    torch.testing.assert_close(after[untouched], before[untouched], rtol=1e-5, atol=1e-7)
    assert bool(((after - before).abs().gather(1, search.pairs) > 1e-4).all())


def test_the_gated_gradient_is_the_derivative_through_the_softmax_of_the_pair() -> None:
    search: GatedSearch = make("proxyless", arch_start=0, chain={"cost_weight": 0.0})
    batch = next(search._batches("weights", search.weight_half, 0))
    search.model.eval()
    moment = Moment(0, 0, 0, architecture=True)
    (found,) = search.arch_gradients(batch, batch, moment)
    pairs = search.pairs
    alpha = search.before.gather(1, pairs).requires_grad_(True)
    draw = search.draws_of_all(moment, len(pairs), 2 + search.before.shape[1])[:, -1]
    binary = F.one_hot((draw >= alpha.softmax(1)[:, 0]).long(), 2).float()
    shares = alpha.softmax(1)
    gates = shares + (binary - shares).detach()  # binary forwards, softmax backwards
    loss = F.cross_entropy(search.model(batch.images, pairs.tolist(), gates), batch.labels)
    (expected,) = torch.autograd.grad(loss, alpha)
    torch.testing.assert_close(found.gather(1, pairs), expected, rtol=1e-4, atol=1e-6)


def test_paths_are_sampled_by_their_probabilities() -> None:
    search: GatedSearch = make("proxyless")
    with torch.no_grad():
        search.model.alpha[0, :3] = torch.tensor([2.0, 1.0, 0.0])
    p = search.model.probabilities()[0].detach()
    counts = torch.bincount(torch.cat([search._sample(Moment(0, 0, n), 1)[0] for n in range(2000)]), minlength=len(p))
    torch.testing.assert_close(counts / 2000, p, atol=0.04, rtol=0)


def test_a_heavy_cost_drives_both_chain_searches_to_cheap_blocks() -> None:
    for arm, weight in (("proxyless", 100.0), ("densenas", 20.0)):
        search = make(arm, arch_start=0, epochs=12, arch_lr=0.3, chain={"cost_weight": weight})
        rows = [search.step(step) for step in range(search.total_steps)]
        assert rows[-1]["expected_cost"] < 0.6 * rows[0]["expected_cost"], arm


def routed(seed: int = 0) -> RoutingSearch:
    search: RoutingSearch = make("densenas")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in search.arch_parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return search


def all_paths(outgoing: list[list[int]], start: int = 0) -> list[list[int]]:
    if start == len(outgoing) - 1:
        return [[start]]
    return [[start, *rest] for j in outgoing[start] for rest in all_paths(outgoing, j)]


def test_the_expected_cost_is_the_mean_over_all_routes_and_the_best_path_is_the_most_probable() -> None:
    for seed in range(3):
        model = routed(seed).model
        routes = {edge: float(p) for edge, p in model.routes().items()}
        expected, probabilities = 0.0, {}
        for path in all_paths(model.outgoing):
            probability = math.prod(routes[edge] for edge in itertools.pairwise(path))
            cost = sum(float(model.heads[f"{i}-{j}"].cost()) for i, j in itertools.pairwise(path))
            cost += sum(float(layer.cost()) for j in path[1:] for layer in model.blocks[j - 1])
            expected += probability * cost
            probabilities[tuple(path)] = probability
        assert float(model.expected_cost()) == pytest.approx(expected, rel=1e-4)
        assert sum(probabilities.values()) == pytest.approx(1.0, rel=1e-5)
        assert tuple(model.best_path()) == max(probabilities, key=lambda path: probabilities[path])


def test_blocks_feed_only_the_next_ones_of_equal_or_half_resolution() -> None:
    model = make("densenas", chain={"widths": [4, 8, 8, 8], "strides": [2, 2, 1, 1], "reach": 2}).model
    assert model.outgoing == [[1], [2, 3], [3, 4], [4], []]


def test_a_derived_chain_is_built_and_has_the_cost_that_its_blocks_have() -> None:
    for arm in ("proxyless", "densenas"):
        search = make(arm)
        chain = search.architecture()
        assert isinstance(chain, Chain) and parse_architecture(chain.model_dump(mode="json")) == chain
        network = ChainNetwork(chain, 10, 1)
        x: Tensor = network(torch.zeros(2, 1, 8, 8))
        assert x.shape == (2, 10)
        side, channels, total = 8, chain.stem, float(9 * chain.stem * 64)
        for layer in chain.layers:
            block = make_block(layer.block, channels, layer.channels, layer.stride)
            total += count_macs(block, (channels, side, side)).conv
            side, channels = side // layer.stride, layer.channels
        assert count_macs(network, (1, 8, 8)).conv == total


def test_chains_of_residual_blocks_are_a_second_space() -> None:
    names = {layer.block for layer in make("densenas", chain={"space": "resnet"}).architecture().layers}
    assert names <= {"basic", "bottleneck"}
    with pytest.raises(ValueError, match="unknown block 'mb4_3'"):
        parse_architecture({"stem": 4, "layers": [{"block": "mb4_3", "channels": 4}]})


def test_the_claim_about_parameters_holds_and_every_claim_has_its_runs() -> None:
    from ray_jobs.claims import Verdict, load_claims, plan

    claims = load_claims("nas_search", "cpu", None)
    cheapest = claims[0]
    figures = {name: [value] for name, value in cheapest.measure({}).items()}
    assert figures["parameters_k4_to_k1"][0] == pytest.approx(187_494 / 1_275_222)
    assert Verdict(cheapest, figures).status == "holds"
    for run in plan(claims):
        schema = NasTrainConfig if run.method == "nas_train" else NasSearchConfig
        parse_config(schema, run.settings)
    with pytest.raises(ValueError, match="--data parquet:DIR"):
        load_claims("nas_search", "gpu", None)


def test_presets_and_sweeps_hold_valid_settings() -> None:
    from dataeff.core.config import parse_space, read_yaml
    from ray_jobs.cli import CONFIGS
    from ray_jobs.sweep import read_sweep

    for method, schema in (("nas_search", NasSearchConfig), ("nas_train", NasTrainConfig)):
        for path in (CONFIGS / method).glob("*.yaml"):
            parse_config(schema, read_yaml(path), str(path))
    for name in ("nas_search", "nas_search_pruned", "nas_multiseed"):
        sweep = read_sweep(name, "nas_search")
        parse_space(NasSearchConfig, sweep.space, read_yaml(CONFIGS / "nas_search" / "cpu.yaml"), name)
