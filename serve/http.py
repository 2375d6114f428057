"""The HTTP face of a served network: a plain FastAPI application over a `predict` coroutine; it knows nothing of Ray.

Routes: Open Inference Protocol v2 under `/v2`, `POST /predict` for a plain image, `/metrics` and a page at `/`.
"""

import asyncio
import html
import logging
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from torch import Tensor

import dataeff
from dataeff.core.artifact import Prediction, Predictor
from serve import protocol
from serve.limits import (
    RETRY_AFTER_S,
    Admission,
    Limits,
    RequestError,
    Ticket,
    check_budget,
    check_image_type,
    check_pixels,
    check_rows,
    decode_image,
    media_type,
    parse_budget,
    read_body,
)
from serve.metrics import Metrics
from serve.protocol import TensorSpec

VERSION = "1"
TOP = 5
_INFER_TYPES = ("", protocol.JSON, protocol.BINARY)

logger = logging.getLogger("ray.serve")

PredictRows = Callable[[Tensor, Tensor], Awaitable[Prediction]]


@dataclass
class ServedModel:
    """A network behind HTTP; `predict` answers rows: float32 [B, C, H, W] and float64 [B] multiply-adds allowed."""

    name: str
    predictor: Predictor
    predict: PredictRows
    decoding_threads: int = 1
    decoder: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = ThreadPoolExecutor(self.decoding_threads, thread_name_prefix="decode")

    @property
    def full_macs(self) -> float:
        return self.predictor.card.cost["full_macs"]

    def inputs(self) -> list[TensorSpec]:
        channels, height, width = self.predictor.input_shape
        shapes = {"FP32": (-1, channels, height, width)}
        if channels in (1, 3):
            shapes = {"UINT8": (-1, channels, -1, -1)} | shapes
        return [
            TensorSpec(
                "images", shapes, description="UINT8: raw pixels, preprocessed here; FP32: already preprocessed"
            ),
            TensorSpec(
                "budget",
                {"FP64": (-1,), "FP32": (-1,)},
                optional=True,
                description="for each image, a fraction (0, 1] of the full network's multiply-adds",
            ),
        ]

    def outputs(self) -> list[TensorSpec]:
        return [
            TensorSpec("probabilities", {"FP32": (-1, len(self.predictor.card.classes))}),
            TensorSpec("label", {"INT64": (-1,)}),
            TensorSpec("macs", {"FP64": (-1,)}, description="multiply-adds spent on each image"),
            TensorSpec("path", {"BOOL": (-1, len(self.predictor.path_names))}, description="which optional blocks ran"),
        ]

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "dataeff",
            "inputs": [spec.metadata() for spec in self.inputs()],
            "outputs": [spec.metadata() for spec in self.outputs()],
        }

    def budgets(self, fractions: NDArray[Any]) -> Tensor:
        """Fractions of the full network as multiply-adds, float64 [B]; infinite stays infinite."""
        return torch.from_numpy(fractions.astype(np.float64) * self.full_macs)


def create_app(model: ServedModel, limits: Limits, metrics: Metrics) -> FastAPI:
    """The FastAPI application of one network."""
    app = FastAPI(title=f"dataeff: {model.name}", version=dataeff.__version__)
    admission = Admission(limits.max_queue)
    decoder = model.decoder

    async def answer(endpoint: str, work: Callable[[Ticket], Awaitable[Response]]) -> Response:
        """Run `work` within the queue and time limits; every failure becomes a status and a sentence."""
        started, response = time.perf_counter(), None
        try:
            with admission.hold() as ticket:
                async with asyncio.timeout(limits.timeout_s):
                    response = await work(ticket)
        except RequestError as error:
            response = error_response(error.status, error.message)
        except TimeoutError:
            response = error_response(
                504, f"no answer within {limits.timeout_s:g} seconds; send fewer images or try later"
            )
        except Exception:
            logger.exception("%s failed", endpoint)
            response = error_response(500, "the server failed on this request; its log has the details")
        finally:
            # 499 as in the proxy's own counts: the client left, which cancels this coroutine.
            status = response.status_code if response else 499
            metrics.answered(endpoint, status, time.perf_counter() - started)
        return response

    async def body_of(request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(415, f"Content-Encoding {encoding[:40]!r} is not supported; send the body uncompressed")
        return await read_body(request.stream(), request.headers.get("content-length"), limits.max_body_bytes)

    async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(decoder, function, *arguments)

    @app.post("/predict", summary="Classify one PNG, JPEG or WebP body; ?budget=FRACTION bounds its multiply-adds")
    async def predict(request: Request) -> Response:
        async def work(ticket: Ticket) -> Response:
            check_image_type(request.headers.get("content-type"))
            unknown = set(request.query_params) - {"budget"}
            if unknown:
                raise RequestError(400, f"unknown query parameter {min(unknown)[:40]!r}; known: budget")
            fraction = parse_budget(request.query_params.get("budget"))
            inputs = await in_thread(_preprocess_body, model, await body_of(request), limits)
            prediction = await model.predict(inputs, model.budgets(np.array([fraction])))
            return JSONResponse(describe(model, prediction))

        return await answer("predict", work)

    @app.post("/v2/models/{name}/infer", summary="Inference, Open Inference Protocol v2")
    @app.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        async def work(ticket: Ticket) -> Response:
            check_model(name, version)
            kind = media_type(request.headers.get("content-type"))
            if kind not in _INFER_TYPES:
                raise RequestError(415, f"Content-Type {kind[:60]!r}: send {protocol.JSON} or {protocol.BINARY}")
            body = await body_of(request)
            header_length = request.headers.get(protocol.HEADER_LENGTH)
            wanted = await in_thread(protocol.decode_request, body, header_length, model.inputs(), model.outputs())
            images = wanted.inputs["images"]
            check_rows(len(images), limits)
            ticket.grow(len(images))
            fractions = _fractions(wanted.inputs.get("budget"), len(images))
            inputs = await in_thread(_preprocess_tensor, model, images, limits)
            prediction = await model.predict(inputs, model.budgets(fractions))
            content, headers = protocol.encode_response(wanted, _arrays(prediction), model.name, VERSION)
            return Response(content, headers=headers)

        return await answer("infer", work)

    def check_model(name: str, version: str) -> None:
        if name != model.name:
            raise RequestError(404, f"unknown model {name[:60]!r}; this server has {model.name!r}")
        if version != VERSION:
            raise RequestError(404, f"model {model.name!r} has no version {version[:20]!r}; it has {VERSION!r}")

    @app.get("/v2", summary="Server metadata")
    async def server() -> dict[str, Any]:
        return {"name": "dataeff", "version": dataeff.__version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", summary="The server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="The network is loaded")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.get("/v2/models/{name}", summary="Model metadata")
    @app.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
    async def model_metadata(name: str, version: str = VERSION) -> dict[str, Any]:
        check_model(name, version)
        return model.metadata()

    @app.get("/v2/models/{name}/ready", summary="The model is loaded")
    @app.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, version: str = VERSION) -> dict[str, Any]:
        check_model(name, version)
        return {"name": model.name, "ready": True}

    @app.get("/metrics", summary="Prometheus metrics of the replica that answers")
    async def show_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(index_page(model))

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return error_response(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return error_response(error.status_code, message, error.headers)

    return app


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    """`{"error": message}`, and when to come back where the server was busy."""
    headers = dict(headers or {})
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return JSONResponse({"error": message}, status, headers)


def describe(model: ServedModel, prediction: Prediction) -> dict[str, Any]:
    """The answer of `/predict` for a prediction of one image."""
    classes = model.predictor.card.classes
    top = prediction.probabilities[0].topk(min(TOP, len(classes)))
    ranked = [
        {"label": label, "class": classes[label], "probability": probability}
        for probability, label in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    macs = prediction.macs[0].item()
    ran = prediction.path[0].tolist()
    return ranked[0] | {
        "top": ranked,
        "macs": macs,
        "full_macs": model.full_macs,
        "reduction": 1 - macs / model.full_macs,
        "blocks": {"executed": sum(ran), "total": len(ran)},
        "path": [name for name, executed in zip(model.predictor.path_names, ran, strict=True) if executed],
    }


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


def _fractions(budget: NDArray[Any] | None, rows: int) -> NDArray[Any]:
    if budget is None:
        return np.full(rows, math.inf)
    if len(budget) != rows:
        raise RequestError(400, f"input 'budget' has {len(budget)} values for {rows} images; send one for each")
    for fraction in (budget.min(), budget.max()):
        check_budget(float(fraction))
    return budget


def _arrays(prediction: Prediction) -> dict[str, tuple[str, NDArray[Any]]]:
    return {
        "probabilities": ("FP32", prediction.probabilities.numpy()),
        "label": ("INT64", prediction.probabilities.argmax(1).numpy()),
        "macs": ("FP64", prediction.macs.numpy()),
        "path": ("BOOL", prediction.path.numpy()),
    }


def index_page(model: ServedModel) -> str:
    """A small page: what is served here and how to ask it."""
    card = model.predictor.card
    rows = {
        "method": card.method,
        "classes": ", ".join(card.classes[:50]),
        "input (C, H, W)": model.predictor.input_shape,
        "data": ", ".join(f"{key} {value}" for key, value in card.data.items()),
        **{f"test {key}": f"{value:.4g}" for key, value in card.metrics.items()},
        **{key: f"{value:,.0f}" for key, value in card.cost.items()},
    }
    table = "".join(f"<tr><th>{html.escape(str(key))}<td>{html.escape(str(value))}" for key, value in rows.items())
    name = html.escape(model.name)
    links = "".join(f'<li><a href="{path}">{path}</a>' for path in (f"v2/models/{name}", "metrics", "docs"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><h1>{name}</h1>"
        "<p>Send a picture: <code>curl --data-binary @image.png -H 'Content-Type: image/png' .../predict</code>"
        f"<ul>{links}</ul><table style='text-align:left'>{table}</table></html>"
    )
