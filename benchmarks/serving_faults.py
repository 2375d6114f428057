"""Faults under steady load: what a caller sees of them, with our client's retries and without.

    python -m benchmarks.serving_faults

A cascade of tiny fake networks in both layouts, with a human stage in the co-located one. While clients send pictures
one after the other, things are killed and changed. For every fault: answers, failures (no answer 200 or 202 before the
deadline), late answers (over `LATE_S`), wrong ones (another label than the same network gives offline), retries, and
the longest wait. In the end the human queue must hold every ticket that a caller was given, once. The last line: JSON.
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import local_serve
from serve.client import Client, ServerError
from serve.human import HumanQueue
from tests.serve_fakes import FakePredictor, encoded, fake_cascade, picture

LATE_S = 5.0
DEADLINE_S = 60.0
PICTURES = 64


@dataclass
class Seen:
    """What the clients saw during one fault."""

    answered: int = 0
    failed: int = 0
    late: int = 0
    wrong: int = 0
    retries: int = 0
    longest_s: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    tickets: set[str] = field(default_factory=set)


def offline_labels(folder: str) -> list[int]:
    """The label of every picture by the cascade of that name."""
    from serve.versions import Version

    cascade, labels = fake_cascade(Version(artifact=folder)), []
    for number in range(PICTURES):
        with torch.inference_mode():
            found = cascade.predict(FakePredictor().preprocess([picture(number)]))
        labels.append(int(found.probabilities.argmax(1)))
    return labels


class Load:
    """Clients in threads, each sending one picture after another until `stop`."""

    def __init__(self, url: str, labels: dict[str, list[int]], clients: int, retry: bool) -> None:
        self.seen = Seen()
        self._url, self._labels, self._retry = url, labels, retry
        self._bodies = [encoded(picture(number)) for number in range(PICTURES)]
        self._lock, self._end = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Seen:
        self._end.set()
        for thread in self._threads:
            thread.join()
        return self.seen

    def _run(self, number: int) -> None:
        with Client(self._url, deadline_s=DEADLINE_S, retry=self._retry) as client:
            while not self._end.is_set():
                number = (number + 1) % PICTURES
                started, answer, reason = time.perf_counter(), None, ""
                try:
                    answer = client.predict(self._bodies[number])
                except ServerError as error:
                    reason = f"{error.status} {error}"[:60]
                self._note(number, answer, reason, time.perf_counter() - started)
                time.sleep(0.02)
            with self._lock:
                self.seen.retries += client.retries

    def _note(self, number: int, answer: dict[str, Any] | None, reason: str, seconds: float) -> None:
        with self._lock:
            seen = self.seen
            seen.longest_s = max(seen.longest_s, seconds)
            if answer is None:
                seen.failed += 1
                seen.reasons[reason] = seen.reasons.get(reason, 0) + 1
                return
            seen.answered += 1
            seen.late += seconds > LATE_S
            # A degraded answer is an earlier stage's, and says so: not wrong.
            right = self._labels[answer["version"]][number]
            seen.wrong += answer["label"] != right and not answer["degraded"]
            if "ticket" in answer:
                seen.tickets.add(answer["ticket"])


# The server, and what is done to it.


def deploy(port: int, layout: str, versions: dict[str, dict[str, Any]], queue: Path, revision: str) -> None:
    """The cascade of fakes in one layout, with these versions."""
    human = layout == "colocated"
    args = {"artifact": "human1" if human else "fake1", "layout": layout, "name": "fake", "replicas": "2"}
    args |= {"num_cpus": "0.1", "router_cpus": "0.1", "max_queue": "64", "max_rows": "64"}
    args |= {"human_queue": str(queue)} if human else {}
    args |= {"max_batch": revision} if revision else {}
    names = ["CascadeServer"] if human else ["CascadeServer", "Stage1", "Stage2", "Stage3"]
    deployments = [{"name": name, "user_config": {"versions": versions}} for name in names]
    application = {
        "name": "fake",
        "route_prefix": "/",
        "import_path": "tests.serve_fakes:fake_app",
        "args": args,
        "deployments": deployments,
    }
    local_serve.deploy(port, [application])


def kill(name: str) -> Callable[[], None]:
    """kill -9 the first process of this cluster whose title has `name` in it."""

    def act() -> None:
        kill_actor(name)

    return act


def kill_actor(name: str) -> None:
    """kill -9 the first of the actors below this process whose title, such as `ray::ProxyActor`, has `name` in it."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            title = process.cmdline()[0]
            if title.startswith("ray::") and name in title:
                process.kill()
                return
    raise SystemExit(f"no actor {name} to kill")


def flood(url: str) -> Callable[[], None]:
    """More requests at once than the queue takes, from clients that do not come back."""

    def act() -> None:
        import asyncio

        from benchmarks.http_load import load_test

        flooded = asyncio.run(load_test(f"{url}/predict", [encoded(picture(0))], 600, 3))
        print(f"  the flood itself: {dict(flooded.failures)}")

    return act


def during(act: Callable[[], None], url: str, labels: dict[str, list[int]], retry: bool, after_s: float) -> Seen:
    """Load for a second, `act`, and load until the server has had `after_s` seconds to recover."""
    load = Load(url, labels, 8, retry)
    try:
        time.sleep(1)
        act()
        time.sleep(after_s)
    finally:
        seen = load.stop()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="What callers see of faults in the server")
    parser.add_argument("--after", type=float, default=6, help="seconds of load after each fault (default %(default)s)")
    parser.add_argument("--only", help="one fault, by a part of its name")
    parser.add_argument("--without-retries", action="store_true", help="send everything once, to see what retries hide")
    arguments = parser.parse_args()
    with local_serve.local_serve(num_cpus=4) as port:
        results = run(arguments, f"http://127.0.0.1:{port}", port, Path(tempfile.mkdtemp()) / "queue.db")
    print(json.dumps(results))


def run(arguments: argparse.Namespace, url: str, port: int, queue: Path) -> dict[str, Any]:
    one, two = {"1": {"artifact": "human1"}}, {"2": {"artifact": "human2"}}
    colocated = {
        "kill a replica": kill("CascadeServer"),
        "kill the proxy": kill("HAProxyManager"),
        "kill the controller": kill("ServeController"),
        "swap the version": lambda: deploy(port, "colocated", two, queue, ""),
        "swap it back": lambda: deploy(port, "colocated", one, queue, ""),
        "fill the queue": flood(url),
        "restart the application": lambda: deploy(port, "colocated", one, queue, "32"),
    }
    distributed = {"kill a stage's only replica": kill("Stage2")}
    labels = {"1": offline_labels("human1"), "2": offline_labels("human2")}
    results: dict[str, Any] = {}
    tickets: set[str] = set()
    for layout, faults in (("colocated", colocated), ("distributed", distributed)):
        chosen = {name: act for name, act in faults.items() if not arguments.only or arguments.only in name}
        if not chosen:
            continue
        start = one if layout == "colocated" else {"1": {"artifact": "fake1"}}
        if layout == "distributed":
            labels = {"1": offline_labels("fake1")}
        deploy(port, layout, start, queue, "")
        print(f"{layout:<32}{'answered':>9}{'failed':>8}{'late':>6}{'wrong':>7}{'retries':>9}{'longest s':>11}")
        for name, act in chosen.items():
            seen = during(act, url, labels, not arguments.without_retries, arguments.after)
            tickets |= seen.tickets
            numbers = (seen.answered, seen.failed, seen.late, seen.wrong, seen.retries)
            print(
                f"{name:<32}{numbers[0]:>9}{numbers[1]:>8}{numbers[2]:>6}{numbers[3]:>7}{numbers[4]:>9}{seen.longest_s:>11.1f}"
            )
            for reason, count in seen.reasons.items():
                print(f"  {count} x {reason}")
            key = name.replace(" ", "_").replace("'", "")
            results |= {
                f"{key}_{what}": value
                for what, value in zip(("answered", "failed", "late", "wrong", "retries"), numbers, strict=True)
            }
            results[f"{key}_longest_s"] = seen.longest_s
    return results | tickets_of(queue, tickets)


def tickets_of(path: Path, given: set[str]) -> dict[str, int]:
    """Tickets that callers were given and the queue lacks, or holds although no caller heard of them."""
    if not path.exists():
        return {}
    kept = {ticket.id for ticket in HumanQueue(path).tickets("open", 10**6)}
    lost, unheard = len(given - kept), len(kept - given)
    print(f"human queue: {len(kept)} tickets, {lost} lost, {unheard} that no caller heard of")
    return {"tickets": len(kept), "tickets_lost": lost, "tickets_unheard": unheard}


if __name__ == "__main__":
    main()
