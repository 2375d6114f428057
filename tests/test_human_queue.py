"""The human stage's queue: leases, time-outs, one label an image, and labelled data that comes out once."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataeff.data import open_splits
from serve.human import HumanQueue, TicketError
from tests.serve_fakes import CLASSES, encoded, picture


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> HumanQueue:
    return HumanQueue(tmp_path / "queue.db", lease_s=60, timeout_s=600, clock=clock)


def test_two_people_never_hold_the_same_image(queue: HumanQueue) -> None:
    tickets = {queue.add(b"%d" % number, 0, {}).id for number in range(40)}

    def take(worker: int) -> list[str]:
        taken = []
        while ticket := queue.lease(f"worker {worker} {len(taken)}"):
            taken.append(ticket.id)
        return taken

    with ThreadPoolExecutor(8) as threads:
        taken = [ticket for part in threads.map(take, range(8)) for ticket in part]
    assert sorted(taken) == sorted(tickets)


def test_a_lease_ends_and_the_image_goes_to_the_next_person(queue: HumanQueue, clock: Clock) -> None:
    ticket = queue.add(b"x", 3, {}).id
    assert queue.lease("ada") is not None
    assert queue.lease("bob") is None
    again = queue.lease("ada")
    assert again is not None and again.id == ticket, "a reloaded page gets its own image again"
    clock.now += 61
    taken = queue.lease("bob")
    assert taken is not None and taken.worker == "bob"
    with pytest.raises(TicketError, match="somebody else"):
        queue.answer(ticket, 1, "ada")
    assert queue.answer(ticket, 1, "bob").label == 1
    assert queue.lease("ada") is None


def test_the_same_answer_twice_is_one_answer_and_another_is_refused(queue: HumanQueue) -> None:
    ticket = queue.add(b"x", 3, {}).id
    first = queue.answer(ticket, 1, "ada")
    assert queue.answer(ticket, 1, "ada") == first
    with pytest.raises(TicketError, match="label 1 already") as caught:
        queue.answer(ticket, 2, "bob")
    assert caught.value.status == 409


def test_an_unanswered_ticket_expires_and_may_still_be_answered(queue: HumanQueue, clock: Clock) -> None:
    ticket = queue.add(b"x", 3, {"path": []}).id
    clock.now += 601
    assert queue.get(ticket).state == "expired" and queue.get(ticket).label is None
    assert queue.counts() == {"open": 0, "expired": 1, "answered": 0}
    assert [item.id for item in queue.tickets("expired")] == [ticket] and not queue.tickets("open")
    assert queue.answer(ticket, 1, "ada").state == "answered"


def test_a_full_queue_refuses_and_a_known_key_still_gets_its_ticket(tmp_path: Path) -> None:
    queue = HumanQueue(tmp_path / "queue.db", max_open=2)
    first = queue.add(b"1", 0, {}, key="one")
    queue.add(b"2", 0, {})
    with pytest.raises(TicketError, match="wait for a person") as caught:
        queue.add(b"3", 0, {})
    assert caught.value.status == 429
    assert queue.add(b"1", 0, {}, key="one") == first
    queue.answer(first.id, 0, "ada")
    queue.add(b"3", 0, {})


def test_unknown_tickets_and_other_files_are_refused(queue: HumanQueue, tmp_path: Path) -> None:
    for call in (queue.get, queue.image, lambda name: queue.answer(name, 1, "ada")):
        with pytest.raises(TicketError, match="no ticket 'nothing'"):
            call("nothing")
    (tmp_path / "other.db").write_text("this is no database, it is a text file")
    with pytest.raises(ValueError, match="not a queue"):
        HumanQueue(tmp_path / "other.db")
    with pytest.raises(ValueError, match="no such folder"):
        HumanQueue(tmp_path / "none" / "queue.db")


def test_webhooks_are_claimed_once_and_come_again_until_they_are_done(queue: HumanQueue, clock: Clock) -> None:
    ticket = queue.add(b"x", 0, {}, webhook="http://host/").id
    assert queue.claim_webhooks() == [], "nothing to tell before the answer"
    queue.answer(ticket, 1, "ada")
    assert queue.claim_webhooks() == [(ticket, "http://host/")]
    assert queue.claim_webhooks() == [], "one caller has it"
    clock.now += 11
    assert queue.claim_webhooks() == [(ticket, "http://host/")], "that caller was killed"
    queue.webhook_done(ticket)
    clock.now += 10_000
    assert queue.claim_webhooks() == []


def test_answers_open_as_a_labelled_data_set(queue: HumanQueue, tmp_path: Path) -> None:
    labels = [number % len(CLASSES) for number in range(30)]
    for number, label in enumerate(labels):
        queue.answer(queue.add(encoded(picture(number)), 0, {}).id, label, "ada")
    queue.add(encoded(picture(99)), 0, {})
    assert queue.export(tmp_path / "labelled", CLASSES) == 30
    assert queue.export(tmp_path / "labelled", CLASSES) == 0, "each image comes out once"
    splits = open_splits(f"parquet:{tmp_path / 'labelled'}?val=0.2&test=0.2")
    assert list(splits.classes) == CLASSES
    counts = Counter[int]()
    for split in (splits.train, splits.val, splits.test):
        counts.update(split.labels.tolist())
    assert counts == Counter(labels)


def test_an_export_that_was_killed_half_way_is_finished_without_doubles(queue: HumanQueue, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def answer(number: int) -> None:
        queue.answer(queue.add(encoded(picture(number)), 0, {}).id, 1, "ada")

    folder = tmp_path / "labelled"
    answer(0)
    queue.export(folder, CLASSES)
    with sqlite3.connect(queue.path) as connection:  # the file is written, and the note of it is not
        connection.execute("UPDATE batches SET written = 0")
    answer(1)
    queue.export(folder, CLASSES)
    rows = [row for path in folder.glob("train*.parquet") for row in pq.read_table(path).column("image").to_pylist()]
    assert len(rows) == len({row["path"] for row in rows}) == 2


WRITER = """
import sys
from serve.human import HumanQueue
queue = HumanQueue(sys.argv[1])
for number in range(10**6):
    queue.add(b"%d" % number, 0, {}, key=f"{sys.argv[2]}-{number}")
    print(number, flush=True)
"""


def test_kill_9_loses_and_doubles_no_ticket(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    acknowledged = 0
    for name in ("a", "b", "c"):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
        )
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        lines = [line for line in process.stdout.read().split("\n") if line.isdigit()]
        acknowledged += 20 + len(lines)
        process.wait()
    counts = HumanQueue(path).counts()
    assert acknowledged <= counts["open"] <= acknowledged + 3, "at most the one under way at each kill"
    assert multiprocessing.active_children() == []


def test_the_commands_show_and_export(queue: HumanQueue, tmp_path: Path) -> None:
    queue.add(b"x", 0, {})
    shown = subprocess.run(
        [sys.executable, "-m", "serve.human", "status", str(queue.path)], capture_output=True, text=True, check=True
    )
    assert '"open": 1' in shown.stdout or '"expired": 1' in shown.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "serve.human", "export", str(queue.path), "out", "--artifact", str(tmp_path / "none")],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and "no such directory" in wrong.stderr and "Traceback" not in wrong.stderr
