"""Open Inference Protocol v2 over HTTP: JSON tensors and the binary tensor data extension.

Sources: KServe "Open Inference Protocol" (required REST API); Triton "Binary Tensor Data Extension". Nothing here knows
a model: requests become named NumPy arrays, named arrays become responses.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.limits import RequestError

HEADER_LENGTH = "Inference-Header-Content-Length"
JSON, BINARY = "application/json", "application/octet-stream"

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or gives: `shapes` maps each datatype accepted to its shape, -1 for any length.

    The first datatype is the one that metadata announces.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    optional: bool = False
    description: str = ""

    def metadata(self) -> dict[str, Any]:
        (datatype, shape), *others = self.shapes.items()
        parameters: dict[str, Any] = {"optional": True} if self.optional else {}
        if others:
            parameters["also_accepted"] = [{"datatype": kind, "shape": list(size)} for kind, size in others]
        if self.description:
            parameters["description"] = self.description
        tensor: dict[str, Any] = {"name": self.name, "datatype": datatype, "shape": list(shape)}
        return tensor | ({"parameters": parameters} if parameters else {})

    def check(self, datatype: str, shape: Sequence[int]) -> None:
        allowed = self.shapes.get(datatype)
        if allowed is None:
            raise RequestError(400, f"input {self.name!r}: datatype {datatype[:20]!r}; send {' or '.join(self.shapes)}")
        fits = len(shape) == len(allowed) and all(want in (-1, got) for want, got in zip(allowed, shape, strict=True))
        if not fits:
            raise RequestError(400, f"input {self.name!r}: shape {list(shape)[:8]} as {datatype}; send {list(allowed)}")


@dataclass(frozen=True)
class InferRequest:
    """A decoded request: `inputs` by name; `outputs` maps each output wanted to whether it goes back as binary data."""

    id: str | None
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, bool]


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """JSON part and binary part of a body; without `Inference-Header-Content-Length` it is all JSON."""
    if header_length is None:
        return body, b""
    valid = header_length.isascii() and header_length.isdigit() and len(header_length) < 19
    if not valid or int(header_length) > len(body):
        raise RequestError(400, f"{HEADER_LENGTH} = {header_length[:20]!r}; the body has {len(body)} bytes")
    length = int(header_length)
    return body[:length], body[length:]


def decode_request(
    body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """Decode and check an inference request against a model's inputs and outputs.

    Raises:
        RequestError: 400, for anything that is not a well-formed request for these tensors.
    """
    header, binary = split_body(body, header_length)
    try:
        request = json.loads(header)
    except (ValueError, RecursionError):
        raise RequestError(400, "the request is not valid JSON; see the Open Inference Protocol v2") from None
    if not isinstance(request, dict):
        raise RequestError(400, "the request must be a JSON object with 'inputs'")
    identifier = request.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise RequestError(400, "'id' must be a string")
    arrays, used = _decode_inputs(_objects(request, "inputs"), binary, {spec.name: spec for spec in inputs})
    if used != len(binary):
        raise RequestError(400, f"{len(binary)} bytes of binary data, but the inputs announce {used}")
    missing = [spec.name for spec in inputs if not spec.optional and spec.name not in arrays]
    if missing:
        raise RequestError(400, f"input {missing[0]!r} is missing")
    return InferRequest(identifier, arrays, _wanted_outputs(request, [spec.name for spec in outputs]))


def _objects(request: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = request.get(key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise RequestError(400, f"{key!r} must be a list of objects")
    return found


def _parameters(item: Mapping[str, Any]) -> dict[str, Any]:
    parameters = item.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(400, "'parameters' must be an object")
    return parameters


def _decode_inputs(
    tensors: Sequence[Mapping[str, Any]], binary: bytes, specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, NDArray[Any]], int]:
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for tensor in tensors:
        name, datatype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
        if not isinstance(name, str) or name not in specs:
            raise RequestError(400, f"unknown input {str(name)[:60]!r}; known: {', '.join(specs)}")
        if name in arrays:
            raise RequestError(400, f"input {name!r} appears twice")
        if not isinstance(datatype, str) or not _is_shape(shape):
            raise RequestError(400, f"input {name!r}: needs 'datatype', a string, and 'shape', whole numbers")
        assert isinstance(shape, list)
        specs[name].check(datatype, shape)
        parameters = _parameters(tensor)
        if "shared_memory_region" in parameters:
            raise RequestError(400, f"input {name!r}: shared memory is not supported; send the data in the body")
        size = parameters.get("binary_data_size")
        if size is None:
            array = _from_json(name, datatype, shape, tensor.get("data"))
        else:
            if type(size) is not int or size != math.prod(shape) * _DTYPES[datatype].itemsize:
                raise RequestError(
                    400, f"input {name!r}: binary_data_size {str(size)[:20]} is not that of {datatype} {shape}"
                )
            if offset + size > len(binary):
                raise RequestError(400, f"input {name!r}: {size} bytes announced, {len(binary) - offset} sent")
            array = np.frombuffer(binary, _DTYPES[datatype], count=math.prod(shape), offset=offset).reshape(shape)
            offset += size
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RequestError(400, f"input {name!r} holds NaN or infinity; send finite numbers")
        arrays[name] = array
    return arrays, offset


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)


def _from_json(name: str, datatype: str, shape: Sequence[int], data: object) -> NDArray[Any]:
    dtype = _DTYPES[datatype]
    try:
        # A ragged or over-deep list raises ValueError; texts, nulls and booleans show in the kind of the array.
        values = np.array(data) if isinstance(data, list) else np.array(None)
    except (ValueError, OverflowError, RecursionError):
        values = np.array(None)
    if values.size == 0:
        values = values.astype(dtype)
    if dtype.kind in "ui" and values.dtype.kind == "f" and (values == np.floor(values)).all():
        values = values.clip(-(2.0**53), 2.0**53).astype(np.int64)  # JSON has one kind of number: 98.0 is whole
    kinds = {"b": "b", "u": "ui", "i": "ui", "f": "uif"}[dtype.kind]
    if values.dtype.kind not in kinds:
        raise RequestError(400, f"input {name!r}: 'data' must be {datatype} numbers in a list, flat or nested")
    if values.size != math.prod(shape) or (values.ndim > 1 and values.shape != tuple(shape)):
        raise RequestError(400, f"input {name!r}: data of shape {list(values.shape)} does not fill {list(shape)}")
    limits = np.iinfo(dtype) if dtype.kind in "ui" and values.size else None
    if limits is not None and (values.min() < limits.min or values.max() > limits.max):
        raise RequestError(400, f"input {name!r}: a value does not fit {datatype}")
    with np.errstate(over="ignore"):  # becomes infinite, which the caller refuses
        return values.astype(dtype).reshape(shape)


def _wanted_outputs(request: Mapping[str, Any], known: Sequence[str]) -> dict[str, bool]:
    as_binary = _parameters(request).get("binary_data_output") is True
    if not request.get("outputs"):
        return dict.fromkeys(known, as_binary)
    wanted: dict[str, bool] = {}
    for output in _objects(request, "outputs"):
        name, parameters = output.get("name"), _parameters(output)
        if not isinstance(name, str) or name not in known:
            raise RequestError(400, f"unknown output {str(name)[:60]!r}; known: {', '.join(known)}")
        for unsupported in ("classification", "shared_memory_region"):
            if unsupported in parameters:
                raise RequestError(400, f"output {name!r}: parameter {unsupported!r} is not supported")
        wanted[name] = parameters.get("binary_data", as_binary) is True
    return wanted


def encode_response(
    request: InferRequest, outputs: Mapping[str, tuple[str, NDArray[Any]]], model_name: str, model_version: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer; `outputs` maps each name to its datatype and array."""
    tensors: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, binary in request.outputs.items():
        datatype, array = outputs[name]
        array = np.ascontiguousarray(array, _DTYPES[datatype])
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            blobs.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    answer = {"model_name": model_name, "model_version": model_version, "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    header = json.dumps(answer).encode()
    if not blobs:
        return header, {"Content-Type": JSON}
    return b"".join([header, *blobs]), {"Content-Type": BINARY, HEADER_LENGTH: str(len(header))}
