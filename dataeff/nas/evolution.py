"""Searchers without gradients: a random genotype, and NSGA-II over cells.

Source: spec nas_adversarial_robustness sections 2.4 and 2.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataeff.nas.experiment_train import EvaluationStage, NasTrainConfig, NasTrainExperiment
from dataeff.nas.genotype import PRIMITIVES, Genotype, Pair, random_genotype
from dataeff.nas.search import Searcher, SearchTask
from dataeff.nas.settings import SearchSettings

OPERATIONS = PRIMITIVES[1:]

Genome = tuple[int, ...]  # for each cell, each node, twice: operation, predecessor


class RandomSearch(Searcher):
    """No search: a genotype drawn by the seed."""

    total_steps = 0

    def step(self, step: int) -> dict[str, float]:
        raise ValueError("a random genotype needs no search step")

    def architecture(self) -> Genotype:
        return random_genotype(np.random.default_rng([self.task.seed, 23]))


@dataclass
class Individual:
    """A genome and its two objectives, both minimised: validation error after a short training, and multiply-adds."""

    genome: Genome
    error: float
    macs: float

    @property
    def objectives(self) -> tuple[float, float]:
        return self.error, self.macs


class EvolutionarySearch(Searcher):
    """NSGA-II; a step trains one candidate. The architecture is the Pareto set's member with the least error.

    Attributes:
        parents: of the current generation; empty in the first.
        children: of the current generation, as far as they are evaluated.
        queue: genomes of the current generation.
    """

    def __init__(self, task: SearchTask, settings: SearchSettings) -> None:
        super().__init__(task, settings)
        self.parents: list[Individual] = []
        self.children: list[Individual] = []
        self.queue = self._random_genomes()

    @property
    def total_steps(self) -> int:
        return self.settings.evolution.population * self.settings.evolution.generations

    def step(self, step: int) -> dict[str, float]:
        child = self._evaluate(self.queue[len(self.children)])
        self.children.append(child)
        generation = step // self.settings.evolution.population
        if len(self.children) == len(self.queue):
            self.parents = survivors(self.parents + self.children, self.settings.evolution.population)
            self.children = []
            self.queue = self._offspring(generation + 1)
        front = self.pareto_set()
        found = self.architecture().model_dump(mode="json")
        self.history.append({"phase": 0, "epoch": step, "architecture": found})
        best = min(individual.error for individual in front)
        return {
            "generation": float(generation + 1),
            "val_error": child.error,
            "candidate_macs": child.macs,
            "val_accuracy": 1 - best,
            "front": float(len(front)),
        }

    def _evaluate(self, genome: Genome) -> Individual:
        proxy = self.settings.evolution
        config = NasTrainConfig(
            seed=self.task.seed,
            genotype=genotype_of(genome, proxy.nodes),
            cells=proxy.cells,
            channels=proxy.channels,
            aux_weight=0.0,
            drop_path=0.0,
            cutout=0,
            augment=self.settings.augment,
            report_every=proxy.iterations,
            stage=EvaluationStage(iterations=proxy.iterations, batch=self.settings.batch, lr=self.settings.w_lr),
        )
        training = NasTrainExperiment(config, self.task.splits.name, self.runtime, self.task.splits)
        accuracy = training.step()["val_accuracy"]
        return Individual(genome, 1 - accuracy, training.full_macs())

    def _random_genomes(self) -> list[Genome]:
        rng = np.random.default_rng([self.task.seed, 29])
        bounds = gene_bounds(self.settings.evolution.nodes)
        found: dict[Genome, None] = {}
        while len(found) < self.settings.evolution.population:
            found[tuple(int(rng.integers(bound)) for bound in bounds)] = None
        return list(found)

    def _offspring(self, generation: int) -> list[Genome]:
        """Children by tournament, crossover and mutation, none of which was seen in this generation."""
        settings = self.settings.evolution
        rng = np.random.default_rng([self.task.seed, 31, generation])
        bounds = gene_bounds(settings.nodes)
        order = rank_and_crowding([individual.objectives for individual in self.parents])
        seen = {individual.genome for individual in self.parents}
        children: list[Genome] = []
        while len(children) < settings.population:
            first, second = (self.parents[_tournament(order, rng)].genome for _ in range(2))
            genome = _crossover(first, second, rng) if rng.random() < settings.crossover else first
            genome = _mutate(genome, bounds, rng)
            if genome not in seen:
                seen.add(genome)
                children.append(genome)
        return children

    def pareto_set(self) -> list[Individual]:
        """All evaluated candidates that are kept and that no other beats in both objectives."""
        known = self.parents + self.children
        return [known[i] for i in fronts([individual.objectives for individual in known])[0]]

    def architecture(self) -> Genotype:
        best = min(self.pareto_set(), key=lambda individual: individual.objectives)
        return genotype_of(best.genome, self.settings.evolution.nodes)

    def state_dict(self) -> dict[str, Any]:
        def plain(individuals: list[Individual]) -> list[dict[str, Any]]:
            return [{**asdict(individual), "genome": list(individual.genome)} for individual in individuals]

        return {
            **super().state_dict(),
            "parents": plain(self.parents),
            "children": plain(self.children),
            "queue": [list(genome) for genome in self.queue],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.parents, self.children = (
            [Individual(tuple(entry["genome"]), entry["error"], entry["macs"]) for entry in state[name]]
            for name in ("parents", "children")
        )
        self.queue = [tuple(genome) for genome in state["queue"]]


def gene_bounds(nodes: int) -> list[int]:
    """How many values each gene takes: seven operations, and the nodes before."""
    cell = [bound for node in range(2, 2 + nodes) for _ in range(2) for bound in (len(OPERATIONS), node)]
    return cell * 2


def genotype_of(genome: Genome, nodes: int) -> Genotype:
    """The cells of a genome; the output concatenates the nodes that no other takes."""
    cells: list[tuple[Pair, ...]] = []
    concats = []
    for genes in (genome[: 4 * nodes], genome[4 * nodes :]):
        pairs = tuple((OPERATIONS[genes[i]], genes[i + 1]) for i in range(0, len(genes), 2))
        cells.append(pairs)
        taken = {source for _, source in pairs}
        concats.append(tuple(node for node in range(2, 2 + nodes) if node not in taken))
    return Genotype(normal=cells[0], normal_concat=concats[0], reduce=cells[1], reduce_concat=concats[1])


def fronts(objectives: Sequence[tuple[float, ...]]) -> list[list[int]]:
    """Indices by non-dominated rank, all objectives minimised (Deb et al., 2002)."""
    values = np.array(objectives)
    better = (values[:, None] <= values[None]).all(2) & (values[:, None] < values[None]).any(2)
    left = np.ones(len(values), bool)
    ranks: list[list[int]] = []
    while left.any():
        front = np.flatnonzero(left & ~(better & left[:, None]).any(0))
        ranks.append(front.tolist())
        left[front] = False
    return ranks


def crowding(objectives: NDArray[np.float64]) -> NDArray[np.float64]:
    """Crowding distance of the members of one front, (N, M) -> (N,); infinite at the ends."""
    distance = np.zeros(len(objectives))
    for column in objectives.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def rank_and_crowding(objectives: Sequence[tuple[float, ...]]) -> list[tuple[int, float]]:
    """(rank, -crowding distance) of everyone: smaller is better."""
    keys: list[tuple[int, float]] = [(0, 0.0)] * len(objectives)
    for rank, front in enumerate(fronts(objectives)):
        for index, distance in zip(front, crowding(np.array([objectives[i] for i in front])), strict=True):
            keys[index] = (rank, -float(distance))
    return keys


def survivors(individuals: Sequence[Individual], count: int) -> list[Individual]:
    """The best `count` by rank, then by crowding distance."""
    keys = rank_and_crowding([individual.objectives for individual in individuals])
    order = sorted(range(len(individuals)), key=lambda index: (keys[index], index))
    return [individuals[index] for index in order[:count]]


def _tournament(keys: Sequence[tuple[int, float]], rng: np.random.Generator) -> int:
    first, second = rng.integers(len(keys), size=2)
    return int(min(first, second, key=lambda index: keys[index]))


def _crossover(first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
    """Two-point crossover."""
    low, high = sorted(rng.integers(0, len(first) + 1, size=2))
    return first[:low] + second[low:high] + first[high:]


def _mutate(genome: Genome, bounds: Sequence[int], rng: np.random.Generator) -> Genome:
    chosen = rng.random(len(genome)) < 1 / len(genome)
    return tuple(
        int(rng.integers(bound)) if change else gene for gene, bound, change in zip(genome, bounds, chosen, strict=True)
    )
