"""The human queue over HTTP: tickets for callers, a page for the people who answer, and webhooks."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve.human import HumanQueue, Ticket, TicketError
from serve.limits import RequestError

logger = logging.getLogger("ray.serve")

TICKET_ID = Path(pattern="^[0-9a-f]{32}$", description="as given with status 202")
EXPORT_EVERY = 100


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON has one kind of number


Whole = Annotated[int, BeforeValidator(_whole)]


class LeaseRequest(Strict):
    worker: str = Field(min_length=1, max_length=100, description="who asks; a name of your choice")


class LabelRequest(Strict):
    label: Whole = Field(ge=0, description="number of the class")
    worker: str = Field("anonymous", min_length=1, max_length=100, description="who answers")


class HumanDesk:
    """A queue with the class names of the model it belongs to, and what happens after an answer.

    Args:
        webhook_hosts: hosts that a caller may have notified; others are refused, so that nobody can make this server
            call into its own network.
        export: folder for answered images as Parquet; empty: only `python -m serve.human export` writes them.
    """

    def __init__(
        self,
        queue: HumanQueue,
        classes: Callable[[], Sequence[str]],
        webhook_hosts: Sequence[str] = (),
        export: str = "",
    ) -> None:
        self.queue, self.classes = queue, classes
        self.hosts, self._export = set(webhook_hosts), export
        self._caller: asyncio.Task[None] | None = None

    def check_webhook(self, address: str | None) -> None:
        if address is None:
            return
        try:
            parts = urlsplit(address)
            allowed = parts.scheme in ("http", "https") and parts.netloc in self.hosts
        except ValueError:
            allowed = False
        if not allowed:
            hosts = ", ".join(sorted(self.hosts)) or "none"
            raise RequestError(400, f"webhook: only these hosts may be called: {hosts}; see the option webhook_hosts")

    async def add(
        self, image: bytes, answer: dict[str, Any], key: str | None, webhook: str | None
    ) -> tuple[Ticket | None, str]:
        """A ticket, or None and the reason why there is none."""
        try:
            ticket = await asyncio.to_thread(self.queue.add, image, answer["label"], answer, key, webhook)
        except TicketError as error:
            if error.status == 429:
                return None, error.message
            raise RequestError(error.status, error.message) from None
        return ticket, ""

    async def answered(self, identifier: str, request: LabelRequest) -> Ticket:
        if request.label >= len(self.classes()):
            raise RequestError(400, f"label = {request.label}; the classes are 0 to {len(self.classes()) - 1}")
        ticket = await asyncio.to_thread(self.queue.answer, identifier, request.label, request.worker)
        if self._export:
            await asyncio.to_thread(self.queue.export, self._export, self.classes(), EXPORT_EVERY)
        return ticket

    def start(self) -> None:
        """Call webhooks from now on; those that a killed process left over too."""
        if self._caller is None and self.hosts:
            self._caller = asyncio.get_running_loop().create_task(self._call_webhooks())

    async def _call_webhooks(self) -> None:
        async with httpx.AsyncClient(timeout=10, follow_redirects=False) as client:
            while True:
                try:
                    for identifier, address in await asyncio.to_thread(self.queue.claim_webhooks):
                        await self._call(client, identifier, address)
                except Exception:
                    logger.exception("webhooks could not be called; trying again")
                await asyncio.sleep(1)

    async def _call(self, client: httpx.AsyncClient, identifier: str, address: str) -> None:
        body = self.shown(await asyncio.to_thread(self.queue.get, identifier))
        try:
            response = await client.post(address, json=body, headers={"Idempotency-Key": identifier})
        except httpx.HTTPError as error:
            logger.warning("webhook of ticket %s: %s", identifier, type(error).__name__)
            return
        if response.is_success:
            await asyncio.to_thread(self.queue.webhook_done, identifier)

    def shown(self, ticket: Ticket) -> dict[str, Any]:
        """A ticket as callers see it; `label` is the person's, or the provisional one if nobody answered in time."""
        settled = ticket.label if ticket.label is not None else ticket.provisional
        label = None if ticket.state == "open" else settled
        classes = self.classes()
        return {
            "ticket": ticket.id,
            "state": ticket.state,
            "label": label,
            "class": None if label is None else classes[label],
            "provisional_label": ticket.provisional,
            "provisional": ticket.label is None,
            "created": ticket.created,
            "lease_until": ticket.lease_until,
            "path": ticket.answer.get("path", []),
        }


def human_router(desk: HumanDesk, error_responses: Callable[..., dict[int | str, Any]]) -> APIRouter:
    """Routes under `/tickets`, and the page for people."""
    router = APIRouter(tags=["human stage"])

    async def call(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await asyncio.to_thread(function, *arguments)
        except TicketError as error:
            raise RequestError(error.status, error.message) from None

    @router.get("/tickets", summary="Tickets by state, oldest first", responses=error_responses(400))
    async def tickets(
        state: str = Query("open", pattern="^(open|expired|answered)$"), limit: int = Query(100, ge=1, le=1000)
    ) -> dict[str, Any]:
        desk.start()
        found = await call(desk.queue.tickets, state, limit)
        return {"tickets": [desk.shown(ticket) for ticket in found], "counts": await call(desk.queue.counts)}

    @router.post(
        "/leases",
        summary="Take the oldest ticket that nobody else holds",
        responses=error_responses(400, 413, 415) | {204: {"description": "nothing to do"}},
    )
    async def lease(request: LeaseRequest) -> Response:
        desk.start()
        ticket = await call(desk.queue.lease, request.worker)
        return JSONResponse(desk.shown(ticket)) if ticket else Response(status_code=204)

    @router.get("/tickets/{ticket}", summary="A ticket's state, and its label once there is one",
                responses=error_responses(400, 404))  # fmt: skip
    async def show(ticket: str = TICKET_ID) -> dict[str, Any]:
        return desk.shown(await call(desk.queue.get, ticket))

    @router.get(
        "/tickets/{ticket}/image",
        summary="The image as it was sent",
        responses=error_responses(400, 404) | {200: {"content": {"application/octet-stream": {}}}},
        response_class=Response,
    )
    async def image(ticket: str = TICKET_ID) -> Response:
        # Not as image/svg+xml or text/html, whatever it is: it came from a stranger and is shown by an <img> only.
        headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
        return Response(await call(desk.queue.image, ticket), media_type="application/octet-stream", headers=headers)

    @router.post("/tickets/{ticket}", summary="Answer a ticket", responses=error_responses(400, 404, 409, 413, 415))
    async def answer(request: LabelRequest, ticket: str = TICKET_ID) -> dict[str, Any]:
        desk.start()
        try:
            return desk.shown(await desk.answered(ticket, request))
        except TicketError as error:
            raise RequestError(error.status, error.message) from None

    return router


def human_page() -> HTMLResponse:
    return HTMLResponse(PAGE)


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Which one is it?</title>
<style>body{font:16px sans-serif;max-width:40em;margin:2em auto;padding:0 1em}img{min-width:12em;max-width:100%;
image-rendering:pixelated;border:1px solid #ccc}button{font:inherit;margin:.2em;padding:.4em .8em}.hint{
outline:2px solid #48c}
#left{color:#666}</style>
<h1>Which one is it?</h1>
<p><label>Your name <input id=worker value=""></label> <label>Token <input id=token type=password></label>
<button id=start>Start</button> <span id=left></span>
<p id=message>Press Start.<p><img id=image alt="" hidden><p id=buttons>
<script>
"use strict";
const at = id => document.getElementById(id);
const base = location.pathname.replace(/human$/, "");
let classes = [], ticket = null, timer = null, shown = null;
function headers() {
  const token = at("token").value, fields = {"Content-Type": "application/json"};
  if (token) fields.Authorization = "Bearer " + token;
  return fields;
}
async function ask(path, body) {
  const options = body ? {method: "POST", body: JSON.stringify(body), headers: headers()} : {headers: headers()};
  const response = await fetch(base + path, options);
  if (!response.ok) throw new Error((await response.json()).error || response.status);
  return response;
}
function stop(text) {
  ticket = null; at("image").hidden = true; at("buttons").replaceChildren(); at("message").textContent = text;
}
async function next() {
  clearTimeout(timer);
  try {
    const counts = (await (await ask("tickets?limit=1")).json()).counts;
    at("left").textContent = (counts.open + counts.expired) + " waiting, " + counts.answered + " answered";
    const response = await ask("leases", {worker: at("worker").value || "anonymous"});
    if (response.status === 204) {
      stop("Nothing to do. Looking again in a few seconds.");
      timer = setTimeout(next, 5000);
      return;
    }
    ticket = await response.json();
    const bytes = await (await ask("tickets/" + ticket.ticket + "/image")).blob();
    if (shown) URL.revokeObjectURL(shown);
    shown = URL.createObjectURL(bytes);
    at("image").src = shown; at("image").hidden = false;
    at("message").textContent = "Click, or press the number. The networks' guess is outlined.";
    at("buttons").replaceChildren(...classes.map((name, number) => {
      const button = document.createElement("button");
      button.textContent = number + " " + name;
      if (number === ticket.provisional_label) button.className = "hint";
      button.onclick = () => answer(number);
      return button;
    }));
  } catch (error) { stop(error.message); timer = setTimeout(next, 5000); }
}
async function answer(number) {
  if (!ticket) return;
  const done = ticket; ticket = null;
  try {
    await ask("tickets/" + done.ticket, {label: number, worker: at("worker").value || "anonymous"});
  } catch (error) { at("message").textContent = error.message; await new Promise(ready => setTimeout(ready, 2000)); }
  next();
}
at("start").onclick = async () => {
  try { classes = (await (await ask("stats")).json()).classes; next(); } catch (error) { stop(error.message); }
};
document.onkeydown = event => {
  if (event.target.tagName !== "INPUT" && /^[0-9]$/.test(event.key) && Number(event.key) < classes.length)
    answer(Number(event.key));
};
</script></html>
"""
