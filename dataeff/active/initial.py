"""The first images to label, and the self-supervised results they are chosen by, trained once (spec section 2.2)."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataeff.active.pools import LOSS_POOLS, hardest, random_pool, spread_over_clusters
from dataeff.active.settings import ActiveConfig
from dataeff.core.config import Config
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource
from dataeff.data.cache import locked, replacing
from dataeff.data.subsets import IntArray
from dataeff.metrics.kmeans import kmeans
from dataeff.pretraining.fit import fit_pretext
from dataeff.pretraining.settings import with_clusters
from dataeff.pretraining.task import Clusterer

POOL_DRAWS = 1  # tells the pool's generator from those of the queries
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class PoolScores:
    """What the initial pool was chosen by.

    Args:
        key: hash of the task's settings, the seed and the images in their order.
        values: loss of every image of the pool, float64 [N], or its cluster, int64 [N].
    """

    key: str
    values: NDArray[np.generic]

    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key, "values": torch.from_numpy(self.values)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "PoolScores":
        return cls(str(state["key"]), state["values"].numpy())


def choose_pool(
    config: ActiveConfig, pool: ImageSource, num_classes: int, fingerprint: str, runtime: Runtime
) -> tuple[IntArray, PoolScores | None]:
    """The initial pool: positions int64 [B], and what it was chosen by (None for a random one).

    Args:
        pool: all images, without labels.
        fingerprint: of the images and their order.

    Raises:
        ValueError: the budget is out of range, or (`DegenerateScoreError`) the scores rank nothing.
    """
    rng = np.random.default_rng([config.seed, POOL_DRAWS])
    if config.pool == "random":
        return random_pool(len(pool), config.budget, rng), None
    clusters = config.n_clusters or num_classes
    scores = pool_scores(config, pool, clusters, fingerprint, runtime)
    if config.pool in LOSS_POOLS:
        return hardest(scores.values.astype(np.float64), config.budget, rng, config.n_bins), scores
    ids = scores.values.astype(np.int64)
    return spread_over_clusters(ids, config.budget, int(max(clusters, ids.max() + 1)), rng, config.allocation), scores


def pool_scores(
    config: ActiveConfig, pool: ImageSource, clusters: int, fingerprint: str, runtime: Runtime
) -> PoolScores:
    """Losses or clusters of the pool's task; what is finished, or begun, in `config.cache` is not done again."""
    name = "simclr" if config.pool == "kmeans" else config.pool
    settings = with_clusters(getattr(config, name), clusters)
    key = _key({"task": settings, "seed": config.seed, "images": fingerprint})

    def train(checkpoint: Path | None) -> Arrays:
        task = fit_pretext(settings, pool, config.seed, runtime, checkpoint=checkpoint)
        if isinstance(task, Clusterer):
            return {"clusters": task.assign(pool)}
        results: Arrays = {"losses": task.loss_per_sample(pool)}
        return results | ({"features": task.features(pool)} if name == "simclr" else {})

    found = _once(config.cache, name, key, train, runtime)
    if config.pool == "kmeans":
        features = found["features"].astype(np.float32)

        def cluster(checkpoint: Path | None) -> Arrays:
            result = kmeans(features, clusters, config.seed, config.kmeans_restarts, memory_mib=config.memory_mb)
            return {"clusters": result.labels}

        key = _key({"features": key, "clusters": clusters, "restarts": config.kmeans_restarts})
        found = _once(config.cache, "kmeans", key, cluster, runtime)
    return PoolScores(key, found["losses" if config.pool in LOSS_POOLS else "clusters"])


def _key(about: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, Config) else value

    settings = {name: plain(value) for name, value in about.items()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _once(cache: str | None, name: str, key: str, compute: Callable[[Path | None], Arrays], runtime: Runtime) -> Arrays:
    """The arrays that `compute` returns, from the cache folder where a run has put them already.

    One process computes while others wait. What is computed leaves its checkpoints beside the result until that is
    complete, so that a killed one goes on.

    Args:
        compute: folder for its checkpoints, or None -> arrays.
    """
    if cache is None:
        return compute(None)
    folder = Path(cache)
    result, working = folder / f"{name}-{key}.npz", folder / f"{name}-{key}.part"
    with _main_holds(folder, f"{name}-{key}", runtime):
        if not _main_says(result.is_file(), runtime):
            arrays = compute(working)
            if runtime.is_main:
                with replacing(result) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # names are free
                shutil.rmtree(working, ignore_errors=True)
            return arrays
        with np.load(result, allow_pickle=False) as stored:
            return dict(stored)


@contextlib.contextmanager
def _main_holds(folder: Path, key: str, runtime: Runtime) -> Iterator[None]:
    """The main worker holds the lock; the others follow what it finds."""
    with locked(folder, key) if runtime.is_main else contextlib.nullcontext():
        yield


def _main_says(value: bool, runtime: Runtime) -> bool:
    """The main worker's answer, on every worker."""
    shared = torch.tensor(float(value and runtime.is_main), device=runtime.device)
    return bool(runtime.all_reduce(shared) > 0)
