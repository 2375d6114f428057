"""The distributed layout of a cascade: one deployment a stage, and the walk of a request through them."""

import asyncio
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from torch import Tensor

from dataeff.core.artifact import Prediction
from dataeff.core.runtime import set_up_process
from dataeff.nn.cascade import CascadePrediction, Walk
from serve.batching import Batcher, whole
from serve.cascade import Cascade, Stage, record
from serve.limits import RequestError
from serve.loading import Loader
from serve.metrics import Metrics
from serve.models import ServedModel
from serve.options import CascadeOptions
from serve.versions import Version, Versions, parse_versions

logger = logging.getLogger("ray.serve")

# How long the front waits for all stages to have a new version; they keep the old one as long.
READY_TIMEOUT_S = 300
AGAIN_S = 0.1


class StageServer:
    """One replica of one stage: every version's network, batches over the requests of all routers."""

    def __init__(self, options: CascadeOptions, number: int, loader: Loader) -> None:
        set_up_process(max(1, int(options.of_stage("stage_cpus", number, options.num_cpus))))
        self._number, self._loader, self._options = number, loader, options
        self._metrics = Metrics(serve.get_replica_context().replica_id.unique_id, export=True)
        self._versions = Versions(f"stage {number + 1}", self._load_version, READY_TIMEOUT_S)
        self._applying: asyncio.Task[None] | None = None

    async def _load_version(self, name: str, source: Version) -> ServedModel:
        network: Stage = await asyncio.to_thread(self._loader.stage, source, self._number)
        cascade = await asyncio.to_thread(self._loader.cascade, source, networks=False)
        # The first run allocates and tunes; no client should wait for it.
        await asyncio.to_thread(network.predict, torch.zeros(1, *cascade.input_shape))

        def run(images: Tensor, settings: Tensor) -> Prediction:
            prediction = network.predict(images)
            self._metrics.batch(prediction, cascade.costs[self._number], name)
            return prediction

        largest = int(self._options.of_stage("stage_max_batch", self._number, self._options.max_batch))
        batcher = Batcher(whole(run), largest, self._options.batch_wait_ms / 1000)
        return ServedModel(cascade, batcher.predict, batcher.close, batcher.check)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        wanted = parse_versions(user_config)
        if self._versions:
            self._applying = asyncio.create_task(self._versions.apply(wanted))
        else:
            await self._versions.apply(wanted)

    def check_health(self) -> None:
        self._versions.check()

    async def has(self, key: str) -> bool:
        return self._versions.find(key) is not None

    async def predict(
        self, key: str, images: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
        """Probabilities [B, K] and multiply-adds [B] of the version with that key; None if this replica lacks it."""
        model = self._versions.find(key)
        if model is None:
            return None
        answer = await model.predict(torch.from_numpy(images.copy()), torch.zeros(len(images)))
        return answer.probabilities.numpy(), answer.macs.numpy()


class RemoteStages:
    """A cascade whose networks are deployments; a request that meets a dying replica is sent to the next one.

    Args:
        stages: handles of `StageServer` deployments, cheapest first.
        key: of the version (`Version.key`).
        on_failure: "degrade": when a later stage fails, answer with the one before; "fail": answer 503.
    """

    def __init__(self, cascade: Cascade, stages: list[Any], key: str, timeout_s: float, on_failure: str) -> None:
        self._cascade, self._stages, self._key = cascade, stages, key
        self._timeout_s, self._on_failure = timeout_s, on_failure

    async def ready(self) -> None:
        """Wait until every stage has the version.

        Raises:
            TimeoutError: after `READY_TIMEOUT_S`.
        """
        async with asyncio.timeout(READY_TIMEOUT_S):
            for stage in self._stages:
                while not await stage.has.remote(self._key):
                    await asyncio.sleep(AGAIN_S)

    async def predict(self, images: Tensor, thresholds: Tensor) -> CascadePrediction:
        """Answers for B images.

        Raises:
            RequestError: 503, the first stage failed, or any with `on_failure` "fail".
        """
        walk = Walk(thresholds, len(self._cascade.costs))
        for number in range(len(self._stages)):
            try:
                record(self._cascade, walk, number, await self._ask(number, images[walk.rows]))
            except (TimeoutError, RayServeException, RayActorError, RuntimeError) as error:
                logger.warning("stage %d failed: %s", number + 1, type(error).__name__)
                if number == 0 or self._on_failure == "fail":
                    raise RequestError(503, f"stage {number + 1} does not answer; try again later") from None
                walk.stop()
            if not len(walk.rows):
                break
        return walk.prediction

    async def _ask(self, number: int, images: Tensor) -> Prediction:
        pixels = images.numpy()
        async with asyncio.timeout(self._timeout_s):
            while True:
                try:
                    answer = await self._stages[number].predict.remote(self._key, pixels)
                except BackPressureError:
                    raise
                except RayActorError:
                    answer = None  # the replica died under the request, which changed nothing there
                if answer is not None:
                    probabilities, macs = answer
                    path = torch.empty(len(macs), 0, dtype=torch.bool)
                    return Prediction(torch.from_numpy(probabilities.copy()), torch.from_numpy(macs.copy()), path)
                await asyncio.sleep(AGAIN_S)
