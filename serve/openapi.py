"""The OpenAPI page of a server: what FastAPI cannot see in routes that read their bodies themselves."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve import protocol
from serve.limits import IMAGE_TYPES, LEAST_TIMEOUT_S, MAX_KEY
from serve.models import ServedCascade, ServedModel
from serve.versions import Versions

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "one sentence"}},
    "required": ["error"],
}
_MEANINGS = {
    400: "The request is wrong; the sentence says what would be right",
    401: "The bearer token is missing or wrong",
    404: "No such model, version or ticket",
    409: "In conflict with an earlier request",
    413: "Too large",
    415: "A content type that is not understood",
    429: "The human queue is full",
    500: "The server failed on this request",
    503: "The server is busy; Retry-After says when to come back",
    504: "No answer in time",
}
_NUMBER, _WHOLE, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}


def error_responses(*statuses: int) -> dict[int | str, Any]:
    """Entries for FastAPI's `responses`."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def complete(app: FastAPI, versions: Versions, human: bool, webhooks: bool) -> Callable[[], dict[str, Any]]:
    """A replacement of `app.openapi` that describes the model of now."""

    def openapi() -> dict[str, Any]:
        page = get_openapi(title=f"dataeff: {versions.name}", version=app.version, routes=app.routes)
        served = versions.any()
        predict, infer = page["paths"]["/predict"]["post"], page["paths"]["/v2/models/{name}/infer"]["post"]
        for operation in (predict, page["paths"]["/segment"]["post"]):
            operation["parameters"] = predict_parameters(served, list(versions), human, webhooks)
            operation["requestBody"] = {
                "required": True,
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES},
            }
        if not served.segments:
            del page["paths"]["/segment"]
        infer["requestBody"] = {"required": True, "content": {protocol.JSON: {"schema": infer_schema(served)}}}
        without_422(page)
        for path in page["paths"].values():
            for operation in path.values():
                for parameter in operation.get("parameters", []):
                    if parameter["name"] == "name":
                        parameter["schema"]["enum"] = [versions.name]
        if human:
            page["components"]["schemas"]["LabelRequest"]["properties"]["label"]["maximum"] = (
                len(served.predictor.card.classes) - 1
            )
        return page

    return openapi


def without_422(page: dict[str, Any]) -> dict[str, Any]:
    """The page without the answer that FastAPI gives to wrong fields: such requests get 400 here."""
    for path in page["paths"].values():
        for operation in path.values():
            operation.get("responses", {}).pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        page.get("components", {}).get("schemas", {}).pop(unused, None)
    return page


def predict_parameters(model: ServedModel, versions: list[str], human: bool, webhooks: bool) -> list[dict[str, Any]]:
    """What `/predict` takes besides its body."""
    fraction = _NUMBER | {"exclusiveMinimum": 0, "maximum": 1}
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "budget": ("fraction of the full network's multiply-adds", fraction),
        "version": ("model version; without it, the traffic split decides", _TEXT | {"enum": versions}),
        "timeout_s": ("seconds to wait, at most the server's own limit", _NUMBER | {"minimum": LEAST_TIMEOUT_S}),
    }
    if isinstance(model, ServedCascade):
        stages = _WHOLE | {"minimum": 1, "maximum": len(model.cascade.costs)}
        known["max_stage"] = ("last stage that may run", stages)
        if model.cascade.curve:
            known["accuracy_goal"] = ("the cheapest point of the calibration curve that reaches it", fraction)
            known["cost_goal"] = (
                "the most accurate point within this relative cost",
                _NUMBER | {"exclusiveMinimum": 0},
            )
    if human:
        known["allow_human"] = ("false: answer at once, also where a person would be asked", {"type": "boolean"})
        if webhooks:
            known["webhook"] = ("address to call once a person has answered", _TEXT)
    query = [
        {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
        for name, (text, schema) in known.items()
    ]
    key = _TEXT | {"minLength": 1, "maxLength": MAX_KEY, "pattern": "^[A-Za-z0-9_-]+$"}
    text = "the same key gets the same version and the same ticket: send it again when you retry"
    return [*query, {"name": "Idempotency-Key", "in": "header", "required": False, "description": text, "schema": key}]


def infer_schema(model: ServedModel) -> dict[str, Any]:
    """The simplest JSON form of an inference request, one raw image; the protocol allows more."""
    images = model.inputs()[0]
    datatype, shape = next(iter(images.shapes.items()))
    channels, height, width = model.predictor.input_shape
    values = _WHOLE | {"minimum": 0, "maximum": 255} if datatype == "UINT8" else _NUMBER
    size = channels * height * width
    properties = {
        "name": {"const": images.name},
        "datatype": {"const": datatype},
        "shape": {"const": [1, channels, height, width]},
        "data": {"type": "array", "items": values, "minItems": size, "maxItems": size},
    }
    tensor = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "object",
        "properties": {
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "id": _TEXT,
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"enum": [output.name for output in model.outputs()]}},
                    "required": ["name"],
                },
            },
        },
        "required": ["inputs"],
    }


_RANKED = {
    "type": "object",
    "properties": {"label": _WHOLE, "class": _TEXT, "probability": _NUMBER},
    "required": ["label", "class", "probability"],
}
PREDICTED = {
    "description": "The class, its probability and what was spent; a cascade adds stage, uncertainty and path",
    "content": {
        "application/json": {
            "schema": {
                "allOf": [_RANKED],
                "type": "object",
                "properties": {
                    "top": {"type": "array", "items": _RANKED},
                    "macs": _NUMBER,
                    "full_macs": _NUMBER,
                    "reduction": _NUMBER,
                    "version": _TEXT,
                },
                "required": ["top", "macs", "full_macs", "reduction", "version"],
            }
        }
    },
}
QUEUED = {
    "description": "A person is asked: ask `/tickets/{ticket}` again later",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"ticket": _TEXT, "provisional_label": _WHOLE},
                "required": ["ticket", "provisional_label"],
            }
        }
    },
}


SEGMENTED = {
    "description": "The class of every pixel as a PNG in base64, at the network's own size, and what was spent",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "class_map": _TEXT | {"contentEncoding": "base64", "contentMediaType": "image/png"},
                    "classes": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"label": _WHOLE, "class": _TEXT, "share": _NUMBER},
                            "required": ["label", "class", "share"],
                        },
                    },
                    "active_share": _NUMBER,
                    "macs": _NUMBER,
                    "full_macs": _NUMBER,
                    "reduction": _NUMBER,
                    "version": _TEXT,
                },
                "required": ["class_map", "classes", "active_share", "macs", "full_macs", "reduction", "version"],
            }
        }
    },
}
INFERRED = {
    "description": "Tensors by name; as binary data where the request asks for it",
    "content": {
        protocol.JSON: {
            "schema": {
                "type": "object",
                "properties": {"model_name": _TEXT, "model_version": _TEXT, "outputs": {"type": "array"}},
                "required": ["model_name", "model_version", "outputs"],
            }
        },
        protocol.BINARY: {"schema": {"type": "string", "format": "binary"}},
    },
}
