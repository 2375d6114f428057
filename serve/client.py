"""A client that outlives a server's faults: every request has a key, and is sent again until it is answered.

    from serve.client import Client

    with Client("http://localhost:8000") as client:
        answer = client.predict(open("digit.png", "rb").read(), accuracy_goal=0.98)

All requests to this server may be repeated: predictions change nothing, a ticket of the human queue is made once for a
key, and the same label twice is one answer.
"""

import random
import time
import uuid
from types import TracebackType
from typing import Any, Self

import httpx

# Answers that another try may change: the server is busy or restarting, or a replica or proxy died under the request.
AGAIN = (429, 500, 502, 503, 504)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0


class ServerError(Exception):
    """The server refused the request, or did not answer it in time."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


class Refusal(str):
    """The sentence of our own server; a proxy in front of it, just started, says other things with the same status."""


class Client:
    """Asks a server of this package.

    Args:
        url: of the application. token: bearer token, if it wants one.
        deadline_s: how long one request may take, all tries together.
        retry: False sends everything once.
    """

    def __init__(self, url: str, token: str | None = None, deadline_s: float = 60.0, retry: bool = True) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers)
        self._deadline_s, self._retry = deadline_s, retry
        self.retries = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def predict(self, image: bytes, key: str | None = None, **wishes: Any) -> dict[str, Any]:
        """Classify an encoded image; `wishes` as in the query of `/predict`, such as accuracy_goal=0.98.

        With a human stage the answer may hold a `ticket`; ask `ticket` for its label later.

        Raises:
            ServerError: refused, or no answer before the deadline.
        """
        headers = {"Content-Type": "application/octet-stream", "Idempotency-Key": key or uuid.uuid4().hex}
        return self.send("POST", "predict", content=image, headers=headers, params=wishes)

    def ticket(self, identifier: str) -> dict[str, Any]:
        """A ticket of the human queue."""
        return self.send("GET", f"tickets/{identifier}")

    def lease(self, worker: str) -> dict[str, Any] | None:
        """The next ticket for a person, or None."""
        return self.send("POST", "leases", json={"worker": worker}) or None

    def label(self, identifier: str, label: int, worker: str) -> dict[str, Any]:
        """Answer a ticket."""
        return self.send("POST", f"tickets/{identifier}", json={"label": label, "worker": worker})

    def send(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """One request that may be repeated; its JSON, or {} for an empty answer."""
        end, wait = time.monotonic() + self._deadline_s, FIRST_WAIT_S
        while True:
            left = end - time.monotonic()
            status, message, pause = self._try(method, path, max(left, 0.1), request)
            if status is not None and status < 400:
                answer: dict[str, Any] = message
                return answer
            final = status is not None and status not in AGAIN and isinstance(message, Refusal)
            pause = max(pause, wait * random.uniform(0.5, 1.5))
            if final or not self._retry or time.monotonic() + pause > end:
                raise ServerError(status, str(message))
            self.retries += 1
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _try(self, method: str, path: str, left: float, request: Any) -> tuple[int | None, Any, float]:
        """Status (None: no answer), body or reason, and how long the server asks to wait."""
        try:
            response = self._client.request(method, path, timeout=left, **request)
        except httpx.TransportError as error:
            return None, f"no answer: {type(error).__name__}", 0.0
        if response.is_success:
            return response.status_code, response.json() if response.content else {}, 0.0
        try:
            message: str = Refusal(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]  # not our server: a proxy before it, which may not know it yet
        wait = response.headers.get("retry-after", "0")
        return response.status_code, message, float(wait) if wait.isdigit() else 0.0
