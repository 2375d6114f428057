"""Attacks on a network over HTTP (spec nas_adversarial_robustness section 9, spec ss_pcp_darts section 9).

A plain FastAPI application; it knows nothing of Ray. Attacks switch the network's modules, so that it has one thread of
its own, in which requests run one after another, none of them longer than a request may take.
"""

import asyncio
import base64
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import torch
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Discriminator, Field, Tag
from torch import Tensor, nn

import dataeff
from dataeff.metrics.robustness import harmonic_robustness_score, per_parameter_hrs
from serve.http import Answers, BodyLimit, add_health, bearer, handle_errors, token_check
from serve.human_http import Strict, Whole
from serve.limits import (
    IMAGE_TYPES,
    RequestError,
    RobustnessLimits,
    Ticket,
    check_image_type,
    decode_image,
    read_body,
    refusing,
)
from serve.loading import Attackable
from serve.metrics import Metrics
from serve.models import TOP
from serve.openapi import error_responses, without_422

# `fail_fast`: a body of a million wrong entries is one error, not a million.
Row = Annotated[list[float], Field(fail_fast=True)]
Plane = Annotated[list[Row], Field(fail_fast=True)]
Values = Annotated[list[Plane], Field(fail_fast=True)]
Image = Annotated[
    Annotated[str, Tag("base64")] | Annotated[Values, Tag("values")],
    Discriminator(lambda value: "base64" if isinstance(value, str) else "values"),
]
Eps = Annotated[float, Field(ge=0, le=1)]
Parameters = Annotated[float, Field(ge=1e-6, le=1e12)]


class ImageRequest(Strict):
    image: Image = Field(
        description="base64 of a PNG, JPEG or WebP, or values [C][H][W] from 0 to 1 of the network's input"
    )
    label: Whole = Field(ge=0, lt=2**31, description="number of the true class")


class FgsmRequest(ImageRequest):
    eps_list: Annotated[list[Eps], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="budgets; null: from 0 to 32/255"
    )


class AttackRequest(ImageRequest):
    attack: Literal["fgsm", "ffgsm", "pgd", "apgd", "bim", "noise"]
    eps: Eps = Field(8 / 255, description="largest change of a value")
    steps: Whole = Field(10, ge=1, description="iterations of pgd, bim and apgd")
    restarts: Whole = Field(1, ge=1, description="random starts; fgsm and bim have none")
    alpha: float | None = Field(
        None,
        gt=0,
        le=1,
        examples=[2 / 255],
        description="step of pgd, bim and ffgsm; null: eps / 4, more where too few steps follow, of ffgsm 1.25 eps",
    )
    loss: Literal["ce", "dlr"] = Field("ce", description="cross-entropy, or difference of logits ratio")
    seed: Whole = Field(0, ge=0, lt=2**31, description="of the random starts")


class ScoreRequest(Strict):
    clean: float = Field(ge=0, le=100, description="accuracy without attack, percent")
    pgd: float = Field(ge=0, le=100, description="accuracy under PGD, percent")
    params: Parameters | None = Field(None, description="the network's parameters, millions")
    baseline_params: Parameters | None = Field(None, description="those of its family's baseline, millions")


class Named(BaseModel):
    label: int
    class_: str = Field(alias="class")
    probability: float


class Classified(Named):
    top: list[Named]
    members: list[Named] = Field([], description="of an ensemble: what each member says alone")


class Curve(BaseModel):
    """One entry for each budget."""

    eps: list[float]
    p_true: list[float] = Field(description="probability of the true class")
    pred: list[int] = Field(description="the predicted class")
    p_pred: list[float] = Field(description="its probability")


class Attacked(BaseModel):
    clean_label: int
    clean_prob: float = Field(description="of clean_label")
    adv_label: int
    adv_prob: float = Field(description="of adv_label")
    linf: float = Field(description="largest change of a value, up to eps")
    success: bool = Field(description="the network was right and is not any more")
    adv_image: str = Field(description="PNG in base64, of the network's input size; rounded to 255ths")
    png_linf: float = Field(description="largest change of a value in adv_image")


class Scores(BaseModel):
    hrs: float = Field(description="harmonic robustness score, percent")
    pp_hrs: float | None = Field(description="per parameter, percent; null without params")


class Edge(BaseModel):
    from_: int = Field(alias="from", description="0 and 1 are the outputs of the two cells before")
    to: int
    operation: str


class Cell(BaseModel):
    edges: list[Edge]
    concat: list[int] = Field(description="nodes that make the cell's output")
    stats: dict[str, float]


class Cells(BaseModel):
    normal: Cell
    reduce: Cell


class Blocks(BaseModel):
    stem: int = Field(description="channels")
    blocks: list[dict[str, Any]]


class Genotypes(BaseModel):
    members: list[Cells | Blocks] = Field(description="one for each member of an ensemble, else one")


def create_robustness_app(
    network: Attackable, limits: RobustnessLimits, metrics: Metrics, token: str | None = None, threads: int = 1
) -> FastAPI:
    """The FastAPI application of one network to attack.

    Args:
        token: asked for as `Authorization: Bearer TOKEN` everywhere but at `/v2/health`.
        threads: images decoded at once; the network has one thread, whatever this says.
    """
    app = FastAPI(title="dataeff: robustness", version=dataeff.__version__, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    guarded = APIRouter(
        dependencies=[Depends(bearer(token_check(token)))] if token else [],
        responses=error_responses(*([401] if token else []), 500, 503, 504),
    )
    answer = Answers(limits, metrics)
    decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    attacking = ThreadPoolExecutor(1, thread_name_prefix="attack")
    refusals, no_cells = error_responses(400, 413), error_responses(404)
    no_cells[404]["description"] = "The network is not made of cells"

    async def on_network(
        image: bytes | str | list[Any], function: Callable[..., dict[str, Any]], *given: Any
    ) -> Response:
        """`function(network, x, *given)` in the network's thread, x the image [1, C, H, W]."""
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + limits.timeout_s
        x = await loop.run_in_executor(decoding, pixels, image, network, limits)

        def run() -> dict[str, Any]:
            with refusing(), _until(deadline, network.model):
                return function(network, x, *given)

        return JSONResponse(await loop.run_in_executor(attacking, run))

    @guarded.post("/predict", summary="Classify one PNG, JPEG or WebP body", response_model=Classified,
                  responses=error_responses(400, 413, 415))  # fmt: skip
    async def post_predict(request: Request) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            check_image_type(request.headers.get("content-type"))
            declared = request.headers.get("content-length")
            return await on_network(await read_body(request.stream(), declared, limits.max_body_bytes), predict)

        return await answer("predict", work)

    @guarded.post("/fgsm", summary="What the network says under FGSM at each budget", response_model=Curve,
                  responses=refusals)  # fmt: skip
    async def post_fgsm(request: FgsmRequest) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            check_label(request.label, network)
            _at_most("budgets in eps_list", len(request.eps_list or ()), limits.max_budgets)
            return await on_network(request.image, fgsm, request)

        return await answer("fgsm", work)

    @guarded.post("/robustness/attack", summary="Attack one image", response_model=Attacked, responses=refusals)
    async def post_attack(request: AttackRequest) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            check_label(request.label, network)
            _at_most("steps", request.steps, limits.max_steps)
            _at_most("restarts", request.restarts, limits.max_restarts)
            notes |= request.model_dump(include={"attack", "steps", "restarts"})
            return await on_network(request.image, attack, request)

        return await answer("attack", work)

    @guarded.post("/robustness/score", summary="Scores of measured accuracies", response_model=Scores,
                  responses=refusals)  # fmt: skip
    async def post_score(request: ScoreRequest) -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            return JSONResponse(score(request))

        return await answer("score", work)

    @guarded.get("/genotype", summary="The cells or blocks of which the network is made", response_model=Genotypes,
                 responses=no_cells)  # fmt: skip
    async def get_genotype() -> Response:
        async def work(ticket: Ticket, notes: dict[str, Any]) -> Response:
            members = network.architectures()
            if not members:
                raise RequestError(404, "this network is not made of cells; it has no genotype")
            return JSONResponse({"members": members})

        return await answer("genotype", work)

    @guarded.get("/metrics", summary="Prometheus metrics of the replica that answers", response_class=Response,
                 responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    async def show_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(guarded)
    add_health(app, "The network is loaded")
    handle_errors(app)
    app.openapi = lambda: complete(  # type: ignore[method-assign]
        get_openapi(title=app.title, version=app.version, routes=app.routes), network, limits
    )
    return app


def predict(network: Attackable, x: Tensor) -> dict[str, Any]:
    """The answer of `/predict`."""
    classes, p = network.card.classes, network.probabilities(x)[0]
    top = [_named(label, p, classes) for label in p.topk(min(TOP, len(p))).indices.tolist()]
    members = [_named(int(alone[0].argmax()), alone[0], classes) for alone in network.member_probabilities(x)]
    return top[0] | {"top": top} | ({"members": members} if members else {})


def _named(label: int, probabilities: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    return {"label": label, "class": classes[label], "probability": float(probabilities[label])}


def fgsm(network: Attackable, x: Tensor, request: FgsmRequest) -> dict[str, Any]:
    """The answer of `/fgsm`."""
    grid = list(request.eps_list or network.eps_grid)
    curve = network.fgsm_curve(x, torch.tensor([request.label]), grid)
    return {"eps": grid} | {name: curve[name][:, 0].tolist() for name in ("p_true", "pred", "p_pred")}


def attack(network: Attackable, x: Tensor, request: AttackRequest) -> dict[str, Any]:
    """The answer of `/robustness/attack`."""
    settings = request.model_dump(exclude={"image", "label", "attack"})
    moved = network.attack(x, torch.tensor([request.label]), request.attack, **settings)
    rounded = (255 * moved[0]).round()
    p = network.probabilities(torch.cat([x, moved])).max(1)
    (clean_prob, adv_prob), (clean_label, adv_label) = p.values.tolist(), p.indices.tolist()
    return {
        "clean_label": clean_label,
        "clean_prob": clean_prob,
        "adv_label": adv_label,
        "adv_prob": adv_prob,
        "linf": float((moved - x).abs().max()),
        "success": clean_label == request.label != adv_label,
        "adv_image": _png(rounded.byte()),
        "png_linf": float((rounded / 255 - x[0]).abs().max()),
    }


def _png(image: Tensor) -> str:
    """uint8 [1 or 3, H, W] as PNG in base64."""
    values = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    file = BytesIO()
    PIL.Image.fromarray(values.contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def score(request: ScoreRequest) -> dict[str, Any]:
    """The answer of `/robustness/score`."""
    if 0 < max(request.clean, request.pgd) <= 1:
        raise RequestError(400, f"{request.clean:g} and {request.pgd:g} look like fractions; send percentages")
    hrs = harmonic_robustness_score(request.clean, request.pgd)
    if request.params is None:
        return {"hrs": hrs, "pp_hrs": None}
    if request.baseline_params is None:
        raise RequestError(400, "params without baseline_params; send both for pp_hrs, or neither")
    return {"hrs": hrs, "pp_hrs": per_parameter_hrs(hrs, request.params, request.baseline_params)}


def pixels(image: bytes | str | list[Any], network: Attackable, limits: RobustnessLimits) -> Tensor:
    """An encoded image, that in base64, or numbers [C][H][W] as the network's pixels [1, C, H, W]."""
    if isinstance(image, list):
        return _numbers(image, network.card.input_shape)
    try:
        body = base64.b64decode(image, validate=True) if isinstance(image, str) else image
    except ValueError:
        raise RequestError(400, "image: not base64; send that of a PNG, JPEG or WebP") from None
    with refusing():
        return network.preprocess([decode_image(body, limits)])


def _numbers(image: list[Any], shape: tuple[int, int, int]) -> Tensor:
    wanted = f"send [C][H][W] = {list(shape)}, the network's input, or a PNG, JPEG or WebP in base64"
    try:
        values = np.array(image, dtype=np.float64)
    except ValueError:
        raise RequestError(400, f"image: rows of different lengths; {wanted}") from None
    if values.shape != shape:
        raise RequestError(400, f"image: numbers of shape {list(values.shape)}; {wanted}")
    if not ((values >= 0) & (values <= 1)).all():  # NaN is not
        raise RequestError(
            400, f"image: values from {values.min():g} to {values.max():g}; send finite ones from 0 to 1"
        )
    return torch.from_numpy(values.astype(np.float32))[None]


def check_label(label: int, network: Attackable) -> None:
    classes = len(network.card.classes)
    if label >= classes:
        raise RequestError(400, f"label = {label}; the classes are 0 to {classes - 1}")


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(400, f"{value} {name}; send at most {most}")


@contextmanager
def _until(deadline: float, model: nn.Module) -> Iterator[None]:
    """Work ends with TimeoutError at the network's first pass after `deadline`, on the monotonic clock."""

    def check(*_: Any) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    hook = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def complete(page: dict[str, Any], network: Attackable, limits: RobustnessLimits) -> dict[str, Any]:
    """The OpenAPI page with what is known of this network and these limits."""
    pictures = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES}
    page["paths"]["/predict"]["post"]["requestBody"] = {"required": True, "content": pictures}
    schemas = page["components"]["schemas"]
    image: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
    for size in reversed(network.card.input_shape):
        image = {"type": "array", "items": image, "minItems": size, "maxItems": size}
    encoded = {"type": "string", "format": "base64-image", "contentEncoding": "base64"}
    for name in ("FgsmRequest", "AttackRequest"):
        fields = schemas[name]["properties"]
        fields["image"] |= {"oneOf": [encoded, image]}
        fields["label"]["maximum"] = len(network.card.classes) - 1
    schemas["FgsmRequest"]["properties"]["eps_list"]["anyOf"][0]["maxItems"] = limits.max_budgets
    fields = schemas["AttackRequest"]["properties"]
    fields["steps"]["maximum"], fields["restarts"]["maximum"] = limits.max_steps, limits.max_restarts
    one_start = {"attack": {"enum": ["ffgsm", "pgd", "apgd", "noise"]}}, {"restarts": {"maximum": 1}}
    schemas["AttackRequest"]["anyOf"] = [{"properties": properties} for properties in one_start]
    both = {"params": {"type": "null"}}, {"baseline_params": {"type": "number"}}
    schemas["ScoreRequest"]["anyOf"] = [
        {"properties": both[0]},
        {"properties": both[1], "required": ["baseline_params"]},
    ]
    return without_422(page)
