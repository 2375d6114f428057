"""Ray Serve applications: `serve run serve.app:model artifact=DIR`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from torch import Tensor

from dataeff.core.artifact import Prediction, Predictor, load, read_artifact
from dataeff.core.config import parse_config
from serve.batching import Batcher
from serve.http import ServedModel, create_app
from serve.limits import RETRY_AFTER_S, Limits
from serve.metrics import Metrics


class ModelOptions(Limits):
    """Arguments of `serve run serve.app:model`, each as `key=value`."""

    artifact: str = Field(min_length=1, description="folder of an exported network")
    name: str = Field("", pattern=r"^[\w.-]*$", description="model name in URLs; empty: the artifact's method")
    max_batch: int = Field(64, ge=1, le=4096, description="most images that the network runs at once")
    batch_wait_ms: float = Field(
        3.0, ge=0, le=1000, description="longest that an image waits for company, milliseconds"
    )
    replicas: int = Field(1, ge=1, description="copies of the network")
    num_cpus: float = Field(1.0, gt=0, description="CPU cores of each replica; whole ones become torch threads")

    @model_validator(mode="after")
    def _a_request_fits_the_queue(self) -> "ModelOptions":
        if self.max_rows > self.max_queue:
            raise ValueError(f"max_rows = {self.max_rows} must not exceed max_queue = {self.max_queue}")
        return self


def model(args: dict[str, str]) -> Application:
    """Builder of the application that serves one artifact; see `ModelOptions` for its arguments.

    Raises:
        click.UsageError: an unknown or bad argument, or no usable artifact there; `serve run` prints it as one line.
    """
    try:
        options = parse_options(args)
        read_artifact(options.artifact)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    return build(options)


def parse_options(args: Mapping[str, Any]) -> ModelOptions:
    """Options from `key=value` arguments; a relative artifact folder is taken from here, not from the replica's folder.

    Raises:
        ValueError: one line that names the wrong arguments and what is allowed.
    """
    options = parse_config(ModelOptions, args, "serve.app:model")
    return options.model_copy(update={"artifact": str(Path(options.artifact).resolve())})


def build(options: ModelOptions, load: Callable[[str], Predictor] = load) -> Application:
    """The application for `options`; `load` turns the artifact folder into a predictor inside each replica."""
    deployment = serve.deployment(
        name="ModelServer",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.num_cpus},
        # A replica refuses by itself, counting images. Serve's own limits stand above that, so that health checks still
        # reach a replica whose queue is full, and bound what waits in the proxy.
        max_ongoing_requests=2 * options.max_queue + 64,
        max_queued_requests=options.max_queue,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    )
    application: Application = deployment(serve.ingress()(ModelServer)).bind(options, load)
    return application


class ModelServer:
    """One replica: a predictor, its batches and its HTTP application."""

    def __init__(self, options: ModelOptions, load: Callable[[str], Predictor]) -> None:
        self.options = options
        threads = max(1, int(options.num_cpus))
        torch.set_num_threads(threads)
        self.predictor = load(options.artifact)
        card = self.predictor.card
        self.metrics = Metrics(serve.get_replica_context().replica_id.unique_id, card.cost["full_macs"])
        self.batcher = Batcher(self.run, options.max_batch, options.batch_wait_ms / 1000)
        self.served = ServedModel(options.name or card.method, self.predictor, self.batcher.predict, threads)
        # The first run allocates and tunes; no client should wait for it.
        self.predictor.predict(torch.zeros(1, *self.predictor.input_shape))

    def run(self, images: Tensor, budgets: Tensor) -> Prediction:
        with torch.inference_mode():
            prediction = self.predictor.predict(images, None if budgets.isinf().all() else budgets)
        self.metrics.batch(prediction)
        return prediction

    def check_health(self) -> None:
        self.batcher.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.served, self.options, self.metrics)
