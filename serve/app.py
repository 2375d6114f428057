"""Ray Serve applications: `serve run serve.app:model artifact=DIR`, `serve.app:cascade stages=DIR,DIR`,
`serve.app:labelling out=DIR` and `serve.app:robustness artifact=DIR`."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from torch import Tensor

from dataeff.core.artifact import Prediction, Predictor, load, read_artifact
from dataeff.core.config import parse_config
from dataeff.core.runtime import set_up_process
from dataeff.data.labelling import read_manifest
from dataeff.nn.cascade import CascadePrediction, Walk
from serve.batching import Batcher, Part, whole
from serve.cascade import Cascade, exits
from serve.distributed import RemoteStages, StageServer
from serve.drift import DriftAlarm
from serve.http import create_app
from serve.human import HumanQueue
from serve.human_http import HumanDesk
from serve.loading import Loader, load_attackable, load_cascade, load_stage, read_attackable
from serve.metrics import Metrics
from serve.models import ServedCascade, ServedModel
from serve.options import (
    CascadeOptions,
    HostOptions,
    LabellingOptions,
    ModelOptions,
    RobustnessOptions,
    ServerOptions,
    deployment_settings,
    stage_settings,
)
from serve.robustness import create_robustness_app
from serve.versions import Version, Versions, parse_versions

O = TypeVar("O", bound=HostOptions)  # noqa: E741

DRIFT_EVERY = 200


def model(args: dict[str, str]) -> Application:
    """Builder of the application that serves one artifact; see `ModelOptions` for its arguments.

    Raises:
        click.UsageError: an unknown or bad argument, or no usable artifact there; `serve run` prints it as one line.
    """
    with one_line():
        options = parse_options(args)
        for version in options.versions().values():
            read_artifact(version.artifact)
    return build(options, partial(load, device=options.device))


def cascade(args: dict[str, str]) -> Application:
    """Builder of the application that serves an IDK cascade; see `CascadeOptions` for its arguments.

    Raises:
        click.UsageError: as for `model`.
    """
    with one_line():
        options = parse_cascade_options(args)
        for version in options.versions().values():
            load_cascade(version, options.device, networks=False)
    return build_cascade(options)


def labelling(args: dict[str, str]) -> Application:
    """Builder of the application that chooses images and takes people's labels; see `LabellingOptions`.

    Raises:
        click.UsageError: as for `model`; also for a folder that holds no labelling by people.
    """
    with one_line():
        options = parse_labelling_options(args)
        read_manifest(Path(options.out))
        if options.artifact:
            read_artifact(options.artifact)
    return host(LabellingServer, options)


def robustness(args: dict[str, str]) -> Application:
    """Builder of the application that attacks a network; see `RobustnessOptions` for its arguments.

    Raises:
        click.UsageError: as for `model`; also for an artifact of a network that cannot be attacked.
    """
    with one_line():
        options = parse_robustness_options(args)
        read_attackable(options.artifact)
    return host(RobustnessServer, options)


@contextmanager
def one_line() -> Iterator[None]:
    """What is wrong with arguments or folders, as `serve run` prints it: one line and no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def parse_options(args: Mapping[str, Any]) -> ModelOptions:
    """Options from `key=value` arguments; a relative artifact folder is taken from here, not from the replica's folder.

    Raises:
        ValueError: one line that names the wrong arguments and what is allowed.
    """
    return _parse(ModelOptions, args, "serve.app:model")


def parse_cascade_options(args: Mapping[str, Any]) -> CascadeOptions:
    """As `parse_options`, for a cascade."""
    return _parse(CascadeOptions, args, "serve.app:cascade")


def parse_labelling_options(args: Mapping[str, Any]) -> LabellingOptions:
    """As `parse_options`, for a labelling."""
    return _parse(LabellingOptions, args, "serve.app:labelling")


def parse_robustness_options(args: Mapping[str, Any]) -> RobustnessOptions:
    """As `parse_options`, for a network that is attacked."""
    return _parse(RobustnessOptions, args, "serve.app:robustness")


def _parse(schema: type[O], args: Mapping[str, Any], where: str) -> O:
    options = parse_config(schema, args, where)
    absolute = {name: _absolute(getattr(options, name)) for name in options.paths if getattr(options, name)}
    return options.model_copy(update=absolute)


def _absolute(folders: str) -> str:
    return ",".join(str(Path(folder.strip()).resolve()) for folder in folders.split(","))


def build(options: ModelOptions, load: Callable[[str], Predictor] = load) -> Application:
    """The application for `options`; `load` turns the artifact folder into a predictor inside each replica."""
    return host(ModelServer, options, load)


def host(server: type["Host"], options: HostOptions, *given: Any) -> Application:
    """The application whose only deployment is `server(options, *given)`."""
    deployment = serve.deployment(**deployment_settings(server.__name__, options))
    application: Application = deployment(serve.ingress()(server)).bind(options, *given)
    return application


def build_cascade(options: CascadeOptions, loader: Loader | None = None) -> Application:
    """The application for a cascade in either layout; `loader` is used inside the replicas."""
    loader = loader or Loader(partial(load_cascade, device=options.device), partial(load_stage, device=options.device))
    if options.layout == "colocated":
        return host(CascadeServer, options, loader)
    stages = [
        serve.deployment(**stage_settings(options, number))(StageServer).bind(options, number, loader)
        for number in range(options.stage_count(loader.cascade))
    ]
    router = serve.deployment(**deployment_settings("CascadeServer", options, cpus=options.router_cpus))
    distributed: Application = router(serve.ingress()(DistributedServer)).bind(options, loader, stages)
    return distributed


class Host:
    """One replica: its threads and its metrics."""

    def __init__(self, options: HostOptions) -> None:
        self.threads = max(1, int(options.num_cpus))
        set_up_process(self.threads)
        self.metrics = Metrics(serve.get_replica_context().replica_id.unique_id, export=True)


class Server(Host, ABC):
    """One replica with versions, and its HTTP application; subclasses load versions."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self.options = options
        self.versions = Versions(options.name, self.load_version, options.timeout_s)
        self.human: HumanDesk | None = None
        self._applying: asyncio.Task[None] | None = None

    @abstractmethod
    async def load_version(self, name: str, source: Version) -> ServedModel:
        """A version, warmed up."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with the version table: before the replica is ready, and after every change of the table.

        A change returns at once, because a replica gets no requests while it is being reconfigured; the new version
        takes over when it is loaded.
        """
        wanted = parse_versions(user_config)
        if self.versions:
            self._applying = asyncio.create_task(self.versions.apply(wanted))
            return
        await self.versions.apply(wanted)
        if self.human:
            self.human.start()

    def check_health(self) -> None:
        self.versions.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        token = self.options.token()
        return create_app(self.versions, self.options, self.metrics, self.human, token, self.threads)


class ModelServer(Server):
    """One replica of one network."""

    def __init__(self, options: ModelOptions, load: Callable[[str], Predictor]) -> None:
        super().__init__(options)
        self._load = load

    async def load_version(self, name: str, source: Version) -> ServedModel:
        predictor = await asyncio.to_thread(self._load, source.artifact)
        full_macs = predictor.card.cost["full_macs"]

        def run(images: Tensor, budgets: Tensor) -> Prediction:
            prediction = predictor.predict(images, None if budgets.isinf().all() else budgets)
            self.metrics.batch(prediction, full_macs, name)
            return prediction

        # The first run allocates and tunes; no client should wait for it.
        await asyncio.to_thread(predictor.predict, torch.zeros(1, *predictor.input_shape))
        batcher = Batcher(whole(run), self.options.max_batch, self.options.batch_wait_ms / 1000)
        return ServedModel(predictor, batcher.predict, batcher.close, batcher.check)


class CascadeServer(Server):
    """One replica of a whole cascade: images that are answered early leave the batch."""

    options: CascadeOptions

    def __init__(self, options: CascadeOptions, loader: Loader) -> None:
        super().__init__(options)
        self._loader = loader
        self.human = self._desk(options) if options.human_queue else None

    def _desk(self, options: CascadeOptions) -> HumanDesk:
        queue = HumanQueue(options.human_queue, options.human_lease_s, options.human_timeout_s, options.human_max_open)
        hosts = [host.strip() for host in options.webhook_hosts.split(",") if host.strip()]
        return HumanDesk(queue, lambda: self.versions.any().predictor.card.classes, hosts, options.human_export)

    async def load_version(self, name: str, source: Version) -> ServedModel:
        cascade = await asyncio.to_thread(self._loader.cascade, source)
        for stage in cascade.stages:
            await asyncio.to_thread(stage.predict, torch.zeros(1, *cascade.input_shape))
        served: ServedCascade

        def run(images: Tensor, thresholds: Tensor) -> Iterator[Part]:
            walk = Walk(thresholds, len(cascade.costs))
            for rows in exits(cascade, images, walk):
                yield rows, walk.prediction
            self.count(served, name, walk.prediction, thresholds)

        batcher = Batcher(run, self.options.max_batch, self.options.batch_wait_ms / 1000)
        alarm = DriftAlarm(cascade.calibrated)
        served = ServedCascade(cascade, batcher.predict, batcher.close, batcher.check, alarm)
        return served

    def count(self, served: ServedCascade, version: str, prediction: CascadePrediction, thresholds: Tensor) -> None:
        self.metrics.batch(prediction, served.cascade.costs[-1], version)
        before = served.alarm.added // DRIFT_EVERY
        served.observe(prediction, thresholds)
        if served.alarm.added // DRIFT_EVERY > before:
            self.metrics.drift(served.alarm.report(version), version)


class DistributedServer(CascadeServer):
    """The front of a cascade whose stages are deployments of their own."""

    def __init__(self, options: CascadeOptions, loader: Loader, stages: list[Any]) -> None:
        super().__init__(options, loader)
        self._stages = stages

    async def load_version(self, name: str, source: Version) -> ServedModel:
        cascade: Cascade = await asyncio.to_thread(self._loader.cascade, source, networks=False)
        remote = RemoteStages(
            cascade, self._stages, source.key, self.options.stage_timeout_s, self.options.on_stage_failure
        )
        await remote.ready()
        served: ServedCascade

        async def predict(images: Tensor, thresholds: Tensor) -> CascadePrediction:
            prediction = await remote.predict(images, thresholds)
            self.count(served, name, prediction, thresholds)
            return prediction

        served = ServedCascade(cascade, predict, alarm=DriftAlarm(cascade.calibrated))
        return served


class LabellingServer(Host):
    """One replica over the folder of a labelling by people."""

    def __init__(self, options: LabellingOptions) -> None:
        super().__init__(options)
        self.options = options
        self.predictor = load(options.artifact, options.device) if options.artifact else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve.labelling import create_labelling_app  # scikit-learn: seconds for every other kind of replica

        folder, token = Path(self.options.out), self.options.token()
        return create_labelling_app(folder, self.options, self.metrics, self.predictor, token, self.threads)


class RobustnessServer(Host):
    """One replica of a network that people attack."""

    def __init__(self, options: RobustnessOptions) -> None:
        super().__init__(options)
        self.options = options
        self.network = load_attackable(options.artifact, options.device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_robustness_app(self.network, self.options, self.metrics, self.options.token(), self.threads)
