"""The images that the next cycle asks for: what the query needs, computed from the classifier of this one (2.3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataeff.active.classifier import Committee, answers_of
from dataeff.active.mc_dropout import McPrediction, mc_dropout
from dataeff.active.queries import DBAL, QUERIES, ALContext, CoreSetGreedy, Need, QueryStrategy
from dataeff.active.scores import FloatArray
from dataeff.active.settings import ActiveConfig
from dataeff.active.vaal import VaalTraining
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, Preprocess
from dataeff.data.subsets import IntArray
from dataeff.supervised import EVAL_BATCH, mix

QUERY_DRAWS, MC_DRAWS, VAAL_DRAWS = 2, 3, 4  # what a generator is for; 1 is the initial pool's


@dataclass(frozen=True)
class Situation:
    """Where a run stands at the end of a cycle; indices are positions in `pool`, which has no labels."""

    cycle: int
    committee: Committee
    pool: ImageSource
    labelled: IntArray
    unlabelled: IntArray
    preprocess: Preprocess
    runtime: Runtime


def choose_next(config: ActiveConfig, now: Situation) -> IntArray:
    """Indices to label in the next cycle, int64 [min(k, U)]: a function of the seed and the situation."""
    query = build_query(config)
    return query.query(context(query.needs, config, now), config.k)


def build_query(config: ActiveConfig) -> QueryStrategy:
    """The query of a run."""
    if config.query == "dbal":
        return DBAL(config.dbal.score)
    if config.query == "coreset":
        return CoreSetGreedy(config.memory_mb)
    return QUERIES[config.query]()


def context(needs: frozenset[Need], config: ActiveConfig, now: Situation) -> ALContext:
    """What a query needs, and nothing else."""
    fields: dict[str, Any] = {}
    if needs - {"vaal"}:
        answers = answers_of(now.committee, now.pool.subset(now.unlabelled), now.preprocess, now.runtime)
        fields["probabilities"] = answers.mean
        fields["ensemble_probabilities"] = answers.probabilities
        fields["features"] = answers.features
        if "dropout" in needs:
            fields["mc"] = _passes(config, now, torch.from_numpy(answers.shared))
    if "features" in needs:
        labelled = now.pool.subset(now.labelled)
        fields["labelled_features"] = answers_of(now.committee, labelled, now.preprocess, now.runtime).features
    if "vaal" in needs:
        fields["labelledness"] = _labelledness(config, now)
    rng = np.random.default_rng([config.seed, QUERY_DRAWS, now.cycle])
    return ALContext(now.unlabelled, now.labelled, rng, **fields)


def _passes(config: ActiveConfig, now: Situation, shared: Tensor) -> McPrediction:
    """Passes with dropout over features before it, float32 (U, W), which are computed once."""
    classifier = next(iter(now.committee))
    after = nn.Sequential(classifier.encoder.project, classifier.linear)
    blocks = (block.to(now.runtime.device) for block in shared.split(EVAL_BATCH))
    return mc_dropout(nn.Identity(), after, blocks, config.dbal.passes, mix(config.seed, MC_DRAWS, now.cycle))


def _labelledness(config: ActiveConfig, now: Situation) -> FloatArray:
    """VAAL's discriminator on every unlabelled image, trained for this cycle."""

    def images(indices: IntArray) -> Tensor:
        return now.preprocess(now.pool.images(indices))

    seed = mix(config.seed, VAAL_DRAWS, now.cycle)
    training = VaalTraining(images, now.labelled, now.unlabelled, config.vaal, seed, str(now.runtime.device))
    while training.steps_done < training.total_steps:
        training.step()
    return training.labelledness(now.unlabelled)
