"""Active learning over HTTP (spec initial_pools section 9): which images to label, and labels by people.

A plain FastAPI application over the folder of `python -m ray_jobs.label --classes ...`; it knows nothing of Ray.
`POST /select` and `/initial_pool` choose among what a request describes, by position; `GET /request`, `POST /label` and
`GET /curve` are about the images of the folder, by name.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, StringConstraints

import dataeff
from dataeff.core.artifact import Predictor
from dataeff.core.run import METRICS, read_rows
from dataeff.data.label_file import LabelConflict, add_labels, request_labels
from dataeff.data.labelling import read_manifest
from serve.http import Answers, BodyLimit, add_health, bearer, handle_errors, token_check
from serve.human_http import Strict
from serve.limits import LabellingLimits, RequestError, Ticket
from serve.metrics import Metrics
from serve.openapi import error_responses, without_422
from serve.selection import Pool, PoolRequest, Selected, SelectRequest, initial_pool, select

Name = Annotated[str, Field(max_length=5000)]
ClassName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]


class Asked(BaseModel):
    cycle: int | None = Field(description="null: nothing is asked for now")
    images: list[str]
    classes: list[str]
    labels: dict[str, str] = Field(description="those that the request has already")


class NewLabels(Strict):
    labels: dict[Name, ClassName] = Field(description="image name -> class name")


class Missing(BaseModel):
    missing: int = Field(description="images of the request without a label; at 0 run ray_jobs.label again")


class Cycle(BaseModel):
    cycle: int
    n_labelled: int
    test_accuracy: float


def asked(folder: Path) -> dict[str, Any]:
    """The answer of `/request`."""
    try:
        request, labels = request_labels(folder)
    except LabelConflict as error:
        raise RequestError(409, str(error)) from None
    now = {"cycle": request.cycle, "images": request.images} if request else {"cycle": None, "images": []}
    return now | {"classes": read_manifest(folder).classes, "labels": labels}


def label(folder: Path, labels: dict[str, str]) -> dict[str, int]:
    """The answer of `/label`."""
    try:
        return {"missing": add_labels(folder, labels)}
    except LabelConflict as error:
        raise RequestError(409, f"{error}; nothing was taken") from None
    except ValueError as error:
        raise RequestError(400, f"{error}; nothing was taken") from None


def curve(folder: Path) -> list[dict[str, Any]]:
    """The answer of `/curve`."""
    rows = read_rows(folder / METRICS) if (folder / METRICS).is_file() else []
    return [
        {"cycle": int(row["step"]) - 1, "n_labelled": int(row["n_labelled"]), "test_accuracy": row["test_accuracy"]}
        for row in rows
    ]


def create_labelling_app(
    folder: Path,
    limits: LabellingLimits,
    metrics: Metrics,
    predictor: Predictor | None = None,
    token: str | None = None,
    threads: int = 1,
) -> FastAPI:
    """The FastAPI application of a labelling by people.

    Args:
        predictor: classifies the images of `/select`.
        token: asked for as `Authorization: Bearer TOKEN` everywhere but at `/v2/health`.
        threads: requests that choose at once; the others wait.
    """
    app = FastAPI(title="dataeff: labelling", version=dataeff.__version__, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    guarded = APIRouter(
        dependencies=[Depends(bearer(token_check(token)))] if token else [],
        responses=error_responses(*([401] if token else []), 500, 503, 504),
    )
    answer = Answers(limits, metrics)
    choosing = ThreadPoolExecutor(threads, thread_name_prefix="choose")
    classes = len(read_manifest(folder).classes)
    refusals = error_responses(400, 413)

    async def answered(
        endpoint: str, pool: ThreadPoolExecutor | None, function: Callable[..., Any], *given: Any
    ) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, function, *given))

        return await answer(endpoint, work)

    @guarded.post("/select", summary="Which images to label next", response_model=Selected, responses=refusals)
    async def post_select(request: SelectRequest) -> Response:
        return await answered("select", choosing, select, request, limits, predictor)

    @guarded.post("/initial_pool", summary="Which images to label first", response_model=Pool, responses=refusals)
    async def post_initial_pool(request: PoolRequest) -> Response:
        return await answered("initial_pool", choosing, initial_pool, request, limits, classes)

    @guarded.get("/request", summary="What people are asked now", response_model=Asked, responses=error_responses(409))
    async def get_request() -> Response:
        return await answered("request", None, asked, folder)

    @guarded.post("/label", summary="Labels for the request that waits", response_model=Missing,
                  responses=error_responses(400, 409, 413))  # fmt: skip
    async def post_label(request: NewLabels) -> Response:
        return await answered("label", None, label, folder, request.labels)

    @guarded.get("/curve", summary="How good the network was after each cycle", response_model=list[Cycle])
    async def get_curve() -> Response:
        return await answered("curve", None, curve, folder)

    @guarded.get("/metrics", summary="Prometheus metrics of the replica that answers", response_class=Response,
                 responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    async def show_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(guarded)
    add_health(app, "The folder can be read")
    handle_errors(app)
    app.openapi = lambda: without_422(  # type: ignore[method-assign]
        get_openapi(title=app.title, version=app.version, routes=app.routes)
    )
    return app
