"""The HTTP face of a served network: a plain FastAPI application over `predict` coroutines; it knows nothing of Ray.

Routes: Open Inference Protocol v2 under `/v2`, `POST /predict` and `/segment` for a plain image, `/metrics`, `/stats`,
a page at `/`, and with a human stage `/tickets` and the page `/human`.
"""

import asyncio
import hmac
import html
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

import dataeff
from dataeff.core.artifact import Prediction
from dataeff.nn.cascade import CascadePrediction
from serve import protocol
from serve.batching import Together
from serve.human_http import HumanDesk, human_page, human_router
from serve.limits import (
    RETRY_AFTER_S,
    Admission,
    Limits,
    RequestError,
    Ticket,
    Wishes,
    check_image_type,
    check_key,
    check_pixels,
    check_rows,
    decode_image,
    media_type,
    parse_wishes,
    read_body,
)
from serve.metrics import Metrics
from serve.models import ServedModel
from serve.openapi import INFERRED, PREDICTED, QUEUED, SEGMENTED, complete, error_responses
from serve.versions import Versions

_INFER_TYPES = ("", protocol.JSON, protocol.BINARY)
_ANSWER_ERRORS = error_responses(400, 413, 415, 500, 503, 504)

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ImageRequest:
    """What a request for one image asks for, but its body."""

    key: str | None
    version: str
    model: ServedModel
    wishes: Wishes


def create_app(
    versions: Versions,
    limits: Limits,
    metrics: Metrics,
    human: HumanDesk | None = None,
    token: str | None = None,
    decoding_threads: int = 1,
) -> FastAPI:
    """The FastAPI application of one model and its versions.

    Args:
        human: the queue of a cascade's last stage.
        token: asked for as `Authorization: Bearer TOKEN` everywhere but at `/v2/health` and on the empty pages.
        decoding_threads: threads that decode images.
    """
    app = Application(title="dataeff", version=dataeff.__version__, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    check = token_check(token)
    guarded = APIRouter(dependencies=[Depends(bearer(check))] if token else [])
    denied = error_responses(401) if token else {}
    answer = Answers(limits, metrics)
    in_thread = Together(decoding_threads, "decode")

    async def body_of(request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(415, f"Content-Encoding {encoding[:40]!r} is not supported; send the body uncompressed")
        return await read_body(request.stream(), request.headers.get("content-length"), limits.max_body_bytes)

    def wishes_of(request: Request, key: str | None) -> tuple[str, ServedModel, Wishes]:
        known: tuple[str, ...] = versions.any().wishes + (("allow_human", "webhook") if human else ())
        # Where there is a person, the person is asked unless the request says otherwise.
        usual = {"allow_human": "true"} if human else {}
        wishes = parse_wishes(usual | dict(request.query_params), known)
        version = versions.choose(key) if wishes.version is None else wishes.version
        if human:
            human.check_webhook(wishes.webhook)
        return version, versions.get(version), wishes

    def image_request(request: Request, notes: dict[str, Any]) -> ImageRequest:
        check_image_type(request.headers.get("content-type"))
        key = check_key(request.headers.get("idempotency-key"))
        asked = ImageRequest(key, *wishes_of(request, key))
        notes |= {"version": asked.version, "timeout_s": asked.wishes.timeout_s}
        return asked

    async def predict_body(request: Request, asked: ImageRequest) -> tuple[bytes, Prediction]:
        model = asked.model
        async with asyncio.timeout(asked.wishes.timeout_s):
            body = await body_of(request)
            inputs = await in_thread(_preprocess_body, model, body, limits)
            return body, await model.predict(inputs, model.settings(asked.wishes)[None])

    @guarded.post(
        "/predict",
        summary="Classify one PNG, JPEG or WebP body",
        responses={200: PREDICTED, **({202: QUEUED} if human else {}), **_ANSWER_ERRORS, **error_responses(404, 409)},
    )
    async def predict(request: Request) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            asked = image_request(request, notes)
            body, prediction = await predict_body(request, asked)
            found = asked.model.describe(prediction) | {"version": asked.version}
            notes |= {name: found[name] for name in ("label", "macs", "stage") if name in found}
            if isinstance(prediction, CascadePrediction) and prediction.idk[0] and human:
                return await ask_a_person(human, body, found, asked.key, asked.wishes.webhook)
            return JSONResponse(found)

        return await answer("predict", work)

    @guarded.post(
        "/segment",
        summary="The class of every pixel of one PNG, JPEG or WebP body",
        responses={200: SEGMENTED, **_ANSWER_ERRORS, **error_responses(404)},
    )
    async def segment(request: Request) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            asked = image_request(request, notes)
            if not asked.model.segments:
                raise RequestError(404, "this network classifies whole images; ask /predict")
            _, prediction = await predict_body(request, asked)
            notes["macs"] = float(prediction.macs[0])
            return JSONResponse(await in_thread(asked.model.describe_map, prediction) | {"version": asked.version})

        return await answer("segment", work)

    async def predict_directly(request: Request) -> Response:
        try:
            check(request.headers.get("authorization"))
        except RequestError as error:
            return refusal(error)
        return await predict(request)

    app.direct = {("POST", "/predict"): predict_directly}

    @guarded.post(
        "/v2/models/{name}/infer",
        summary="Inference, Open Inference Protocol v2",
        responses={200: INFERRED, **_ANSWER_ERRORS, **error_responses(404)},
    )
    @guarded.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            check_name(name)
            chosen = versions.choose(check_key(request.headers.get("idempotency-key"))) if version is None else version
            model = versions.get(chosen)
            kind = media_type(request.headers.get("content-type"))
            if kind not in _INFER_TYPES:
                raise RequestError(415, f"Content-Type {kind[:60]!r}: send {protocol.JSON} or {protocol.BINARY}")
            body = await body_of(request)
            header_length = request.headers.get(protocol.HEADER_LENGTH)
            wanted = await in_thread(protocol.decode_request, body, header_length, model.inputs(), model.outputs())
            images = wanted.inputs["images"]
            check_rows(len(images), limits)
            ticket.grow(len(images))
            settings = model.settings_of_rows(wanted.inputs, len(images))
            inputs = await in_thread(_preprocess_tensor, model, images, limits)
            prediction = await model.predict(inputs, settings)
            notes |= {"version": chosen, "rows": len(images), "macs": float(prediction.macs.sum())}
            content, headers = protocol.encode_response(wanted, model.arrays(prediction), versions.name, chosen)
            return Response(content, headers=headers)

        return await answer("infer", work)

    def check_name(name: str) -> None:
        if name != versions.name:
            raise RequestError(404, f"unknown model {name[:60]!r}; this server has {versions.name!r}")

    @guarded.get("/v2", summary="Server metadata", responses=denied)
    async def server() -> dict[str, Any]:
        return {"name": "dataeff", "version": dataeff.__version__, "extensions": ["binary_tensor_data"]}

    add_health(app, "The network is loaded")

    @guarded.get("/v2/models/{name}", summary="Model metadata", responses=error_responses(404))
    @guarded.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        check_name(name)
        model = versions.any() if version is None else versions.get(version)
        return {
            "name": versions.name,
            "versions": list(versions),
            "platform": "dataeff",
            "inputs": [spec.metadata() for spec in model.inputs()],
            "outputs": [spec.metadata() for spec in model.outputs()],
        }

    @guarded.get("/v2/models/{name}/ready", summary="The model is loaded", responses=error_responses(404))
    @guarded.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        check_name(name)
        if version is not None:
            versions.get(version)
        return {"name": versions.name, "ready": True}

    @guarded.get(
        "/metrics",
        summary="Prometheus metrics of the replica that answers",
        responses={200: {"content": {"text/plain": {}}}},
        response_class=Response,
    )
    async def show_metrics() -> Response:
        if human:
            metrics.tickets(await asyncio.to_thread(human.queue.counts))
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @guarded.get("/stats", summary="Versions, and rates of a cascade's stages at the replica that answers")
    async def stats() -> dict[str, Any]:
        return {
            "model": versions.name,
            "classes": versions.any().predictor.card.classes,
            "versions": {
                version: {"weight": weight} | versions.get(version).stats()
                for version, weight in versions.weights().items()
            },
            "failed": versions.failed,
        }

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(index_page(versions, human is not None, hidden=token is not None))

    if human:
        guarded.include_router(human_router(human, error_responses))
        app.add_api_route("/human", human_page, include_in_schema=False, response_class=HTMLResponse)
    app.include_router(guarded, responses=denied)
    app.openapi = complete(  # type: ignore[method-assign]
        app, versions, human is not None, bool(human and human.hosts)
    )

    handle_errors(app)
    return app


class Application(FastAPI):
    """FastAPI with a short way past its routing to the routes in `direct`, by method and path.

    Its layers (routing, dependencies, exit stacks, error handlers) took a third of the interpreter's time under load.
    A function in `direct` answers everything with a response.
    """

    direct: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            handler = self.direct.get((scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))))
            if handler is not None:
                response = await handler(Request(scope, receive))
                return await response(scope, receive, send)
        await super().__call__(scope, receive, send)


class Answers:
    """Runs the work of requests within the queue: every failure becomes a status and a sentence, every request a line
    in the log."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.admission = Admission(limits.max_queue)

    async def __call__(self, endpoint: str, work: Callable[[Ticket, dict[str, Any]], Awaitable[Response]]) -> Response:
        started, response, notes = time.perf_counter(), None, dict[str, Any]()
        try:
            with self.admission.hold() as ticket:
                async with asyncio.timeout(self.limits.timeout_s):
                    response = await work(ticket, notes)
        except RequestError as error:
            response = error_response(error.status, error.message)
        except TimeoutError:
            limit = min(self.limits.timeout_s, notes.get("timeout_s") or self.limits.timeout_s)
            response = error_response(504, f"no answer within {limit:g} seconds; send fewer images or try later")
        except Exception:
            logger.exception("%s failed", endpoint)
            response = error_response(500, "the server failed on this request; its log has the details")
        finally:
            # 499 as in the proxy's own counts: the client left, which cancels this coroutine.
            status = response.status_code if response else 499
            seconds = time.perf_counter() - started
            self.metrics.answered(endpoint, status, seconds)
            # No image content, no addresses, no tokens: only what was asked of the model and what it cost.
            line = {"endpoint": endpoint, "status": status, "milliseconds": round(seconds * 1000, 1)} | notes
            fields = {key: value for key, value in line.items() if value is not None}
            logger.info("answered", extra=fields | {"log_to_stderr": False})  # Ray's key: the log file has the fields
        return response


def add_health(app: FastAPI, ready: str) -> None:
    """The routes of health checks, which need no token; `ready` says what their answer means."""

    @app.get("/v2/health/live", summary="The server runs")
    async def is_live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary=ready)
    async def is_ready() -> dict[str, bool]:
        return {"ready": True}


def handle_errors(app: FastAPI) -> None:
    """Every refusal, also FastAPI's own, as a status and `{"error": one sentence}`."""

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        return error_response(400, f"{'.'.join(map(str, problem['loc']))[:100]}: {problem['msg']}")

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, RequestError):  # of `BodyLimit`, while FastAPI reads the body
            return refusal(error.__cause__)
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request))  # Starlette names those of the first route only
        return error_response(error.status_code, message, headers)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Methods that some route has for the path of a request."""
    reached = [route for route in app.router.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in reached for method in getattr(route, "methods", ())})


class BodyLimit:
    """Stops reading a body that grows beyond `max_bytes`, for the routes whose bodies FastAPI reads."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                raise RequestError(413, f"the body is larger than {self.max_bytes} bytes; send less")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


def token_check(token: str | None) -> Callable[[str | None], None]:
    """A check of `Authorization` headers, which refuses with 401; without a token all pass."""

    def check(header: str | None) -> None:
        if token is None:
            return
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError(401, "the bearer token is missing or wrong; send Authorization: Bearer TOKEN")

    return check


def bearer(check: Callable[[str | None], None]) -> Callable[..., Awaitable[None]]:
    """`check` as a dependency of FastAPI that shows in the OpenAPI page."""
    given_by_client = Depends(HTTPBearer(auto_error=False))

    async def dependency(request: Request, given: HTTPAuthorizationCredentials | None = given_by_client) -> None:
        check(request.headers.get("authorization"))

    return dependency


async def ask_a_person(
    human: HumanDesk, body: bytes, found: dict[str, Any], key: str | None, webhook: str | None
) -> Response:
    """202 with a ticket, or the networks' answer if the queue is full."""
    human.start()
    ticket, reason = await human.add(body, found, key, webhook)
    if ticket is None:
        return JSONResponse(found | {"degraded": True, "human": reason})
    return JSONResponse(found | {"ticket": ticket.id, "provisional_label": ticket.provisional}, 202)


def refusal(error: RequestError) -> JSONResponse:
    return error_response(error.status, error.message, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    """`{"error": message}`, and when to come back where the server was busy."""
    headers = dict(headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return JSONResponse({"error": message}, status, headers)


def _preprocess_body(model: ServedModel, body: bytes, limits: Limits) -> Tensor:
    return model.predictor.preprocess([decode_image(body, limits)])


def _preprocess_tensor(model: ServedModel, images: NDArray[Any], limits: Limits) -> Tensor:
    """FP32 rows as they are; UINT8 [B, C, H, W] through the same preprocessing as decoded images."""
    if images.dtype != np.uint8:
        return torch.from_numpy(images.copy())
    rows, channels, height, width = images.shape
    if height == 0 or width == 0:
        raise RequestError(400, f"input 'images': images of {height} x {width} pixels; send at least 1 x 1")
    check_pixels(rows * height * width, limits)
    layers = images[:, 0] if channels == 1 else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return model.predictor.preprocess([PIL.Image.fromarray(layer) for layer in layers])


def index_page(versions: Versions, human: bool, hidden: bool) -> str:
    """A small page: what is served here and how to ask it; behind a token, only how."""
    card = versions.any().predictor.card
    rows: dict[str, Any] = {} if hidden else {
        "method": card.method,
        "versions": ", ".join(versions),
        "classes": ", ".join(card.classes[:50]),
        "input (C, H, W)": card.input_shape,
        "data": ", ".join(f"{key} {value}" for key, value in card.data.items()),
        **{f"test {key}": f"{value:.4g}" for key, value in card.metrics.items()},
        **{key: f"{value:,.0f}" for key, value in card.cost.items()},
    }  # fmt: skip
    table = "".join(f"<tr><th>{html.escape(str(key))}<td>{html.escape(str(value))}" for key, value in rows.items())
    name = html.escape(versions.name)
    pages = [f"v2/models/{name}", "stats", "metrics", "docs", *(["human"] if human else [])]
    links = "".join(f'<li><a href="{path}">{path}</a>' for path in pages)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><h1>{name}</h1>"
        "<p>Send a picture: <code>curl --data-binary @image.png -H 'Content-Type: image/png' .../predict</code>"
        f"<ul>{links}</ul><table style='text-align:left'>{table}</table></html>"
    )
