"""Arguments of the applications, each as `key=value`, and the Serve deployments that they mean."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from serve.limits import RETRY_AFTER_S, LabellingLimits, Limits, RobustnessLimits
from serve.versions import Version, VersionTable


class HostOptions(Limits):
    """What every application takes."""

    paths: ClassVar[tuple[str, ...]] = ("artifact", "token_file")

    artifact: str = ""
    replicas: int = Field(1, ge=1, description="copies of the network")
    num_cpus: float = Field(1.0, gt=0, description="CPU cores of each replica; whole ones become torch threads")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of each replica; above 0 the network runs there")
    token_file: str = Field("", description="file with a bearer token that clients must send; empty: none")
    surge: int = Field(
        100, ge=0, le=100, description="percent of extra replicas while code or arguments change; 0: no spare resources"
    )
    log_format: Literal["JSON", "TEXT"] = Field("JSON", description="of the replicas' log")

    @model_validator(mode="after")
    def _a_request_fits_the_queue(self) -> "HostOptions":
        if self.max_rows > self.max_queue:
            raise ValueError(f"max_rows = {self.max_rows} must not exceed max_queue = {self.max_queue}")
        return self

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    def token(self) -> str | None:
        """The bearer token.

        Raises:
            ValueError: the file is empty.
        """
        if not self.token_file:
            return None
        token = Path(self.token_file).read_text(encoding="utf-8").strip()
        if not token:
            raise ValueError(f"token_file = {self.token_file} is empty; write a token into it or leave the option out")
        return token


class ServerOptions(HostOptions):
    """What the applications take that serve networks under versions."""

    split: str = Field("", description="with several artifacts: their shares of the traffic, as 0.9,0.1")
    name: str = Field("", pattern=r"^[\w.-]*$", description="model name in URLs; empty: the artifact's method")
    max_batch: int = Field(64, ge=1, le=4096, description="most images that the network runs at once")
    batch_wait_ms: float = Field(
        0.0, ge=0, le=1000, description="longest that an image waits for company at a free network, milliseconds"
    )

    def versions(self) -> dict[str, Version]:
        """Versions "1", "2", ... of the artifacts given, with the split as weights.

        Raises:
            ValueError: another number of shares than of artifacts.
        """
        sources = self.sources()
        shares = numbers("split", self.split) or [1.0] * len(sources)
        if len(shares) != len(sources):
            raise ValueError(f"split = {self.split!r} has {len(shares)} shares for {len(sources)} versions")
        return {
            str(number): source.model_copy(update={"weight": share})
            for number, (source, share) in enumerate(zip(sources, shares, strict=True), 1)
        }

    def sources(self) -> list[Version]:
        return [Version(artifact=folder) for folder in self.artifact.split(",")]


class ModelOptions(ServerOptions):
    """Arguments of `serve run serve.app:model`."""

    artifact: str = Field(min_length=1, description="folder of an exported network; several, with commas, are versions")


class LabellingOptions(LabellingLimits, HostOptions):
    """Arguments of `serve run serve.app:labelling`."""

    paths: ClassVar[tuple[str, ...]] = (*HostOptions.paths, "out")

    out: str = Field(min_length=1, description="folder of a labelling by people, made by ray_jobs.label")
    artifact: str = Field("", description="folder of an exported network, for images in /select")


class RobustnessOptions(RobustnessLimits, HostOptions):
    """Arguments of `serve run serve.app:robustness`."""

    artifact: str = Field(min_length=1, description="folder of a network of robustness, nas_train or nas_search")


class CascadeOptions(ServerOptions):
    """Arguments of `serve run serve.app:cascade`."""

    paths: ClassVar[tuple[str, ...]] = (*ServerOptions.paths, "stages", "human_queue", "human_export")

    artifact: str = Field("", description="folder of a fitted cascade; several, with commas, are versions")
    stages: str = Field("", description="instead: folders of exported networks, cheapest first, with commas")
    thresholds: str = Field(
        "", description="with stages: uncertainty (1 - largest probability) above which the next is asked, as 0.2,0.1"
    )
    layout: Literal["colocated", "distributed"] = Field(
        "colocated", description="all stages in one replica, or a deployment for each"
    )
    stage_replicas: str = Field("", description="distributed: replicas of each stage, as 1,1,2")
    stage_max_replicas: str = Field("", description="distributed: scale each stage up to this many with its load")
    stage_cpus: str = Field("", description="distributed: CPU cores of each stage's replicas; default num_cpus")
    stage_gpus: str = Field("", description="distributed: GPUs of each stage's replicas; default num_gpus")
    stage_max_batch: str = Field("", description="distributed: largest batch of each stage; default max_batch")
    stage_timeout_s: float = Field(10.0, gt=0, description="distributed: longest wait for one stage, seconds")
    on_stage_failure: Literal["degrade", "fail"] = Field(
        "degrade", description="distributed: answer with the stage before, marked as degraded, or with 503"
    )
    router_cpus: float = Field(0.5, gt=0, description="distributed: CPU cores of the replicas in front of the stages")
    human_queue: str = Field("", description="SQLite file of the human stage; empty: no human stage")
    human_lease_s: float = Field(120.0, gt=0, description="how long an image belongs to the person who took it")
    human_timeout_s: float = Field(86400.0, gt=0, description="after this long the provisional label stands")
    human_max_open: int = Field(10_000, ge=1, description="most images that wait for a person")
    human_export: str = Field("", description="folder for answered images as Parquet, 100 at a time")
    webhook_hosts: str = Field("", description="hosts (HOST or HOST:PORT, with commas) that callers may have notified")

    @model_validator(mode="after")
    def _one_source(self) -> "CascadeOptions":
        if bool(self.artifact) == bool(self.stages):
            raise ValueError("give either artifact=DIR, a fitted cascade, or stages=DIR,DIR with thresholds=0.2")
        return self

    def sources(self) -> list[Version]:
        if self.artifact:
            return super().sources()
        folders, thresholds = tuple(self.stages.split(",")), tuple(numbers("thresholds", self.thresholds))
        return [Version(stages=folders, thresholds=thresholds)]

    def stage_count(self, load: Any) -> int:
        """Stages of the first version; the others must have as many."""
        counts = {len(load(version, networks=False).costs) for version in self.versions().values()}
        if len(counts) != 1:
            raise ValueError(f"the versions have {sorted(counts)} stages; layout=distributed needs the same number")
        return counts.pop()

    def of_stage(self, name: str, number: int, default: float) -> float:
        """Entry `number` of a list with an entry for each stage."""
        values = numbers(name, getattr(self, name))
        if values and number >= len(values):
            raise ValueError(f"{name} = {getattr(self, name)!r} has no entry for stage {number + 1}")
        return values[number] if values else default


def numbers(name: str, text: str) -> list[float]:
    """`"0.2,0.1"` as numbers of at least 0.

    Raises:
        ValueError: anything else.
    """
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{name} = {text!r}: give numbers with commas, as 0.2,0.1") from None
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"{name} = {text!r}: give numbers of at least 0")
    return values


def deployment_settings(name: str, options: HostOptions, cpus: float | None = None) -> dict[str, Any]:
    """Keywords of `serve.deployment` for the deployment that answers HTTP."""
    return _common(name, options) | {
        "num_replicas": options.replicas,
        "ray_actor_options": {"num_cpus": cpus or options.num_cpus, "num_gpus": 0 if cpus else options.num_gpus},
        # A replica refuses by itself, counting images. Serve's own limits stand above that, so that health checks still
        # reach a replica whose queue is full, and bound what waits in the proxy.
        "max_ongoing_requests": 2 * options.max_queue + 64,
        "max_queued_requests": options.max_queue,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        "logging_config": LoggingConfig(encoding=options.log_format, enable_access_log=False),
    }


def stage_settings(options: CascadeOptions, number: int) -> dict[str, Any]:
    """Keywords of `serve.deployment` for one stage of a distributed cascade."""
    replicas = int(options.of_stage("stage_replicas", number, 1))
    most = int(options.of_stage("stage_max_replicas", number, 0))
    batch = int(options.of_stage("stage_max_batch", number, options.max_batch))
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if most:
        # Half a batch waiting at every replica: more replicas would only run smaller batches.
        target = max(1.0, batch / 2)
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas, max_replicas=most, target_ongoing_requests=target
            )
        }
    return _common(f"Stage{number + 1}", options) | scaling | {
        "ray_actor_options": {
            "num_cpus": options.of_stage("stage_cpus", number, options.num_cpus),
            "num_gpus": options.of_stage("stage_gpus", number, options.num_gpus),
        },
        "max_ongoing_requests": 4 * batch,
        "max_queued_requests": options.max_queue,
        "logging_config": LoggingConfig(encoding=options.log_format, enable_access_log=False),
    }  # fmt: skip


def _common(name: str, options: HostOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if isinstance(options, ServerOptions):
        settings["user_config"] = VersionTable(versions=options.versions()).model_dump(mode="json")
    return settings | {
        "name": name,
        # A replica that is to go finishes what it has; its successor is ready before it stops taking requests.
        "graceful_shutdown_timeout_s": options.timeout_s + 5,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_surge_percent": options.surge,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
    }
