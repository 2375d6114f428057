"""What a replica counts: served by itself at `/metrics`, and exported by Ray for all replicas together.

Every sample at `/metrics` carries the replica's name, so that scraping through the proxy, which reaches one replica at
a time, never mixes two replicas' counters in one series. With `export`, the same series also go to Ray's metrics
agents, whose Prometheus endpoints list all replicas of all nodes, with the tags `deployment` and `replica`.
"""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dataeff.core.artifact import Prediction
from dataeff.nn.cascade import CascadePrediction

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Series:
    """One Prometheus metric, and Ray's of the same name where it is exported."""

    def __init__(self, local: Any, exported: Any, replica: str, labels: tuple[str, ...]) -> None:
        self._local, self._exported, self._replica, self._labels = local, exported, replica, labels

    def _apply(self, method: str, value: float, tags: tuple[str, ...]) -> None:
        getattr(self._local.labels(self._replica, *tags), method)(value)
        if self._exported is not None and (value > 0 or method != "inc"):  # Ray refuses to count nothing
            getattr(self._exported, method)(value, tags=dict(zip(self._labels, tags, strict=True)))

    def inc(self, value: float, *tags: str) -> None:
        self._apply("inc", value, tags)

    def observe(self, value: float, *tags: str) -> None:
        self._apply("observe", value, tags)

    def set(self, value: float, *tags: str) -> None:
        self._apply("set", value, tags)


class Metrics:
    """What a server reports: answers, their time, batches, exits, and the work spent and saved."""

    def __init__(self, replica: str, export: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.replica = replica
        self._export = export
        self._requests = self._counter("dataeff_requests", "requests answered", "endpoint", "status")
        self._seconds = self._histogram(
            "dataeff_request_seconds", "seconds from arrival to answer", _SECONDS, "endpoint"
        )
        self._batch = self._histogram("dataeff_batch_rows", "images in each batch that the model ran", _ROWS, "version")
        self._spent = self._counter("dataeff_macs_spent", "multiply-adds spent", "version")
        self._saved = self._counter(
            "dataeff_macs_saved", "multiply-adds that the full or last network would have spent on top", "version"
        )
        self._executed = self._counter("dataeff_blocks_executed", "optional blocks or stages executed", "version")
        self._blocks = self._counter("dataeff_blocks", "optional blocks or stages executed or skipped", "version")
        self._exits = self._counter("dataeff_exits", "images by the stage that answered", "version", "stage")
        self._asked = self._counter("dataeff_stage_images", "images that reached each stage", "version", "stage")
        self._idk = self._counter("dataeff_idk", 'images that each stage said "I don\'t know" to', "version", "stage")
        self._degraded = self._counter("dataeff_degraded", "images answered early because a stage failed", "version")
        self._drift = self._gauge("dataeff_drift", "1: IDK rates outside the calibration band", "version")
        self._tickets = self._gauge("dataeff_tickets", "images in the human queue by state", "state")

    def _series(self, kind: Any, name: str, text: str, labels: tuple[str, ...], **options: Any) -> _Series:
        local = kind(name, text, ("replica", *labels), registry=self.registry, **options)
        exported = _exported(kind, name, text, labels, options.get("buckets")) if self._export else None
        return _Series(local, exported, self.replica, labels)

    def _counter(self, name: str, text: str, *labels: str) -> _Series:
        return self._series(Counter, name, text, labels)

    def _gauge(self, name: str, text: str, *labels: str) -> _Series:
        return self._series(Gauge, name, text, labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> _Series:
        return self._series(Histogram, name, text, labels, buckets=buckets)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.inc(1, endpoint, str(status))
        self._seconds.observe(seconds, endpoint)

    def batch(self, prediction: Prediction, reference_macs: float, version: str = "1") -> None:
        """Count a batch; `reference_macs` of the full network, or a cascade's last, say what was saved."""
        rows, blocks = prediction.path.shape
        spent = float(prediction.macs.sum())
        self._batch.observe(rows, version)
        self._spent.inc(spent, version)
        self._saved.inc(max(rows * reference_macs - spent, 0.0), version)
        self._executed.inc(int(prediction.path.sum()), version)
        self._blocks.inc(rows * blocks, version)
        if isinstance(prediction, CascadePrediction):
            self._stages(prediction, version)

    def _stages(self, prediction: CascadePrediction, version: str) -> None:
        stage = prediction.stage
        self._degraded.inc(int(prediction.stopped.sum()), version)
        for number in range(prediction.path.shape[1]):
            asked = int(prediction.path[:, number].sum())
            exits = int((stage == number).sum())
            at_the_end = int(((prediction.idk | prediction.stopped) & (stage == number)).sum())
            self._asked.inc(asked, version, str(number + 1))
            self._exits.inc(exits, version, str(number + 1))
            self._idk.inc(asked - exits + at_the_end, version, str(number + 1))

    def drift(self, alarm: bool, version: str) -> None:
        self._drift.set(float(alarm), version)

    def tickets(self, counts: dict[str, int]) -> None:
        for state, count in counts.items():
            self._tickets.set(count, state)

    def render(self) -> bytes:
        return generate_latest(self.registry)


def _exported(kind: Any, name: str, text: str, labels: tuple[str, ...], buckets: Sequence[float] | None) -> Any:
    from ray.serve import metrics  # the HTTP application and its tests need no Ray

    options: dict[str, Any] = {"description": text, "tag_keys": labels}
    if kind is Histogram:
        return metrics.Histogram(name, boundaries=list(buckets or ()), **options)
    return {Counter: metrics.Counter, Gauge: metrics.Gauge}[kind](name, **options)
