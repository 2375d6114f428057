"""The human stage: a durable queue of images that no network was sure of, and their answers as labelled data.

    python -m serve.human export QUEUE.db DIR --artifact ARTIFACT    # what was answered as DIR/train-*.parquet, once
    python -m serve.human status QUEUE.db

The queue is one SQLite file in write-ahead mode: every call is a transaction of its own that is on the disk when it
returns, so that any process may be killed at any moment. Replicas of one node share the file.
"""

import argparse
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tickets (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    image BLOB NOT NULL,
    image_hash TEXT NOT NULL,
    provisional INTEGER NOT NULL,
    answer TEXT NOT NULL,
    worker TEXT,
    lease_until REAL NOT NULL DEFAULT 0,
    label INTEGER,
    answered REAL,
    webhook TEXT,
    webhook_tries INTEGER NOT NULL DEFAULT 0,
    webhook_next REAL NOT NULL DEFAULT 0,
    batch TEXT
);
CREATE INDEX IF NOT EXISTS open_tickets ON tickets (number) WHERE label IS NULL;
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, written INTEGER NOT NULL DEFAULT 0);
"""
_STATE = "CASE WHEN label IS NOT NULL THEN 'answered' WHEN created < :expired THEN 'expired' ELSE 'open' END"


class TicketError(Exception):
    """A ticket that cannot be had or answered: an HTTP status and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Ticket:
    """One image in the queue.

    state: open, answered, or expired: nobody answered in time and the provisional label stands, until somebody does.
    provisional: the last network's label. answer: what the networks said. lease_until: seconds since 1970.
    """

    id: str
    state: str
    created: float
    provisional: int
    answer: dict[str, Any]
    worker: str | None
    lease_until: float
    label: int | None
    answered: float | None


class HumanQueue:
    """Tickets in a file.

    Args:
        path: of the SQLite file; its folder must exist.
        lease_s: how long a ticket belongs to the worker who took it.
        timeout_s: after this long without an answer a ticket counts as expired.
        max_open: most open tickets; above it, `add` refuses.

    Raises:
        ValueError: the folder does not exist, or the file is no such queue.
    """

    def __init__(
        self,
        path: str | Path,
        lease_s: float = 120.0,
        timeout_s: float = 86400.0,
        max_open: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path)
        self.lease_s, self.timeout_s, self.max_open = lease_s, timeout_s, max_open
        self._clock = clock
        if not self.path.parent.is_dir():
            raise ValueError(f"human queue {self.path}: no such folder; make it first")
        try:
            with self._connection() as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"human queue {self.path}: not a queue ({error}); give another file") from None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous=FULL")
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Read and write with nobody in between."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def add(
        self, image: bytes, provisional: int, answer: dict[str, Any], key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        """Put an image into the queue; the same `key` gives the ticket that it made before.

        Raises:
            TicketError: 429 if the queue is full, 409 if `key` was used for another image.
        """
        digest = hashlib.sha256(image).hexdigest()
        identifier = hashlib.sha256(key.encode()).hexdigest()[:32] if key else uuid.uuid4().hex
        with self._transaction() as connection:
            found = connection.execute("SELECT image_hash FROM tickets WHERE id = ?", (identifier,)).fetchone()
            if found and found["image_hash"] != digest:
                raise TicketError(409, "this Idempotency-Key was used for another image; use a new one")
            if not found:
                waiting = connection.execute("SELECT COUNT(*) FROM tickets WHERE label IS NULL").fetchone()[0]
                if waiting >= self.max_open:
                    raise TicketError(429, f"{waiting} images wait for a person already; try again later")
                connection.execute(
                    "INSERT INTO tickets (id, created, image, image_hash, provisional, answer, webhook)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (identifier, self._clock(), image, digest, provisional, json.dumps(answer), webhook),
                )
        return self.get(identifier)

    def get(self, identifier: str) -> Ticket:
        """Raises TicketError 404 for an unknown ticket."""
        found = self._select("id = :id", id=identifier)
        if not found:
            raise _unknown(identifier)
        return found[0]

    def image(self, identifier: str) -> bytes:
        with self._connection() as connection:
            row = connection.execute("SELECT image FROM tickets WHERE id = ?", (identifier,)).fetchone()
        if row is None:
            raise _unknown(identifier)
        return bytes(row["image"])

    def tickets(self, state: str = "open", limit: int = 100) -> list[Ticket]:
        """The oldest tickets in that state (open, expired, answered)."""
        return self._select(f"{_STATE} = :state ORDER BY number LIMIT :limit", state=state, limit=limit)

    def _select(self, where: str, **values: Any) -> list[Ticket]:
        query = f"SELECT *, {_STATE} AS state FROM tickets WHERE {where}"
        with self._connection() as connection:
            rows = connection.execute(query, {"expired": self._clock() - self.timeout_s, **values}).fetchall()
        return [_ticket(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Tickets by state."""
        query = f"SELECT {_STATE} AS state, COUNT(*) AS count FROM tickets GROUP BY 1"
        with self._connection() as connection:
            rows = connection.execute(query, {"expired": self._clock() - self.timeout_s}).fetchall()
        return {"open": 0, "expired": 0, "answered": 0} | {row["state"]: row["count"] for row in rows}

    def lease(self, worker: str) -> Ticket | None:
        """The oldest ticket without an answer that nobody else holds; it is `worker`'s for `lease_s` seconds."""
        now = self._clock()
        with self._transaction() as connection:
            row = connection.execute(
                "UPDATE tickets SET worker = :worker, lease_until = :until WHERE number = (SELECT number FROM tickets"
                " WHERE label IS NULL AND (lease_until <= :now OR worker = :worker) ORDER BY number LIMIT 1)"
                " RETURNING id",
                {"worker": worker, "until": now + self.lease_s, "now": now},
            ).fetchone()
        return self.get(row["id"]) if row else None

    def answer(self, identifier: str, label: int, worker: str) -> Ticket:
        """Store a person's label; sending the same again changes nothing.

        Raises:
            TicketError: 404; 409 if somebody else holds the ticket, or it has another label already.
        """
        now = self._clock()
        with self._transaction() as connection:
            row = connection.execute("SELECT * FROM tickets WHERE id = ?", (identifier,)).fetchone()
            if row is None:
                raise _unknown(identifier)
            if row["label"] is not None and row["label"] != label:
                raise TicketError(409, f"the ticket has the label {row['label']} already")
            if row["label"] is None:
                if row["worker"] not in (None, worker) and row["lease_until"] > now:
                    raise TicketError(409, "somebody else holds the ticket at the moment; take another one")
                connection.execute(
                    "UPDATE tickets SET label = ?, answered = ?, worker = ? WHERE id = ?",
                    (label, now, worker, identifier),
                )
        return self.get(identifier)

    def claim_webhooks(self, limit: int = 16, again_s: float = 10.0, most: int = 10) -> list[tuple[str, str]]:
        """(id, address) of answered tickets whose caller is to be told; each comes again after a growing while."""
        now = self._clock()
        with self._transaction() as connection:
            rows = connection.execute(
                "UPDATE tickets SET webhook_tries = webhook_tries + 1,"
                " webhook_next = :now + :again * (1 << webhook_tries) WHERE number IN (SELECT number FROM tickets WHERE"
                " webhook IS NOT NULL AND label IS NOT NULL AND webhook_next <= :now AND webhook_tries < :most"
                " ORDER BY number LIMIT :limit) RETURNING id, webhook",
                {"now": now, "again": again_s, "most": most, "limit": limit},
            ).fetchall()
        return [(row["id"], row["webhook"]) for row in rows]

    def webhook_done(self, identifier: str) -> None:
        with self._connection() as connection:
            connection.execute("UPDATE tickets SET webhook = NULL WHERE id = ?", (identifier,))

    def export(self, directory: str | Path, classes: Sequence[str], least: int = 1) -> int:
        """Write answered images as `DIR/train-*.parquet`, each of them once, and return how many.

        A batch is fixed in the queue before its file is written under the batch's name, so that a process killed in
        between leaves a batch that the next call writes again, and no image comes twice.

        Args:
            least: do nothing if fewer new answers are there.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with self._transaction() as connection:
            fresh = connection.execute("SELECT COUNT(*) FROM tickets WHERE label IS NOT NULL AND batch IS NULL")
            if fresh.fetchone()[0] >= max(least, 1):
                batch = uuid.uuid4().hex
                connection.execute("INSERT INTO batches (id) VALUES (?)", (batch,))
                connection.execute("UPDATE tickets SET batch = ? WHERE label IS NOT NULL AND batch IS NULL", (batch,))
            pending = [row["id"] for row in connection.execute("SELECT id FROM batches WHERE NOT written")]
        return sum(self._write(batch, folder, classes) for batch in pending)

    def _write(self, batch: str, folder: Path, classes: Sequence[str]) -> int:
        with self._connection() as connection:
            rows = connection.execute("SELECT image, id, label FROM tickets WHERE batch = ? ORDER BY number", (batch,))
            found = [(bytes(row["image"]), row["id"], row["label"]) for row in rows]
        features = {
            "image": {"_type": "Image"},
            "label": {"names": list(classes), "_type": "ClassLabel"},
        }
        images = [{"bytes": image, "path": identifier} for image, identifier, _ in found]
        table = pa.table(
            {
                "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                "label": pa.array([label for *_, label in found], pa.int64()),
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        temporary = folder / f".{batch}.{uuid.uuid4().hex}"
        pq.write_table(table, temporary)
        temporary.replace(folder / f"train-{batch}.parquet")
        with self._connection() as connection:
            connection.execute("UPDATE batches SET written = 1 WHERE id = ?", (batch,))
        return len(found)


def _ticket(row: sqlite3.Row) -> Ticket:
    values = {name: row[name] for name in Ticket.__dataclass_fields__}
    return Ticket(**values | {"answer": json.loads(row["answer"])})


def _unknown(identifier: str) -> TicketError:
    return TicketError(404, f"no ticket {identifier[:40]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.human", description="The queue of a cascade's human stage")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="tickets by state")
    export = commands.add_parser("export", help="write answered images as labelled data, each once")
    for command in (status, export):
        command.add_argument("queue", type=Path, help="the SQLite file")
    export.add_argument("directory", type=Path, help="folder for train-*.parquet; open it with parquet:DIR")
    export.add_argument("--artifact", required=True, help="folder of a served network, for the class names")
    arguments = parser.parse_args()
    if not arguments.queue.is_file():
        parser.error(f"{arguments.queue}: no such file")
    queue = HumanQueue(arguments.queue)
    if arguments.command == "status":
        print(json.dumps(queue.counts()))
        return
    from dataeff.core.artifact import read_artifact

    try:
        classes = read_artifact(arguments.artifact).card.classes
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{queue.export(arguments.directory, classes)} images written to {arguments.directory}")


if __name__ == "__main__":
    main()
