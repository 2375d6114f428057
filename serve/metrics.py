"""Prometheus counters of one replica, served by it at `/metrics`.

Every sample carries the replica's name, so that scraping through the proxy, which reaches one replica at a time, never
mixes two replicas' counters in one series.
"""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from dataeff.core.artifact import Prediction

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What a server reports: answers, their time, batches, and the work spent and saved."""

    def __init__(self, replica: str, full_macs: float) -> None:
        self.registry = CollectorRegistry()
        self.replica = replica
        self.full_macs = full_macs
        self._requests = self._counter("dataeff_requests", "requests answered", "endpoint", "status")
        self._seconds = self._histogram(
            "dataeff_request_seconds", "seconds from arrival to answer", _SECONDS, "endpoint"
        )
        self._batch = self._histogram("dataeff_batch_rows", "images in each batch that the model ran", _ROWS)
        self._spent = self._counter("dataeff_macs_spent", "multiply-adds spent")
        self._saved = self._counter("dataeff_macs_saved", "multiply-adds that the full network would have spent on top")
        self._executed = self._counter("dataeff_blocks_executed", "optional blocks executed")
        self._blocks = self._counter("dataeff_blocks", "optional blocks executed or skipped")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("replica", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("replica", *labels), buckets=buckets, registry=self.registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(self.replica, endpoint, str(status)).inc()
        self._seconds.labels(self.replica, endpoint).observe(seconds)

    def batch(self, prediction: Prediction) -> None:
        rows, blocks = prediction.path.shape
        spent = float(prediction.macs.sum())
        self._batch.labels(self.replica).observe(rows)
        self._spent.labels(self.replica).inc(spent)
        self._saved.labels(self.replica).inc(max(rows * self.full_macs - spent, 0.0))
        self._executed.labels(self.replica).inc(int(prediction.path.sum()))
        self._blocks.labels(self.replica).inc(rows * blocks)

    def render(self) -> bytes:
        return generate_latest(self.registry)
