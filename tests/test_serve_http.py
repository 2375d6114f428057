"""The HTTP application without Ray, called in process through its ASGI interface."""

import asyncio
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import PIL.Image
import pytest
import torch

from dataeff.core.artifact import Prediction
from serve import RAY_SETTINGS
from serve.batching import Batcher, whole
from serve.client import Client, ServerError
from serve.http import create_app
from serve.limits import Limits
from serve.metrics import Metrics
from serve.models import ServedModel
from serve.versions import Version, Versions
from tests.serve_fakes import BASE_MACS, CLASSES, FULL_MACS, POISON, FakePredictor, encoded, picture

T = TypeVar("T")

PNG = {"Content-Type": "image/png"}
INFER = "/v2/models/fake/infer"
SMALL = Limits(max_body_bytes=200_000, max_pixels=5_000, max_rows=8, max_queue=16, timeout_s=5)


def with_client(
    scenario: Callable[[httpx.AsyncClient], Awaitable[T]],
    predictor: FakePredictor | None = None,
    limits: Limits = SMALL,
    wait_s: float = 0.002,
) -> T:
    """Run `scenario` with a client of an application over a fake network with batches of up to 4 images."""
    predictor = predictor or FakePredictor()
    metrics = Metrics("r1")

    def run(images: torch.Tensor, budgets: torch.Tensor) -> Prediction:
        prediction = predictor.predict(images, budgets)
        metrics.batch(prediction, FULL_MACS)
        return prediction

    async def main() -> T:
        async def load(version: str, source: Version) -> ServedModel:
            return ServedModel(predictor, Batcher(whole(run), 4, wait_s).predict)

        versions = Versions("fake", load)
        await versions.apply({"1": Version(artifact="-")})
        app = create_app(versions, limits, metrics)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(main())


def post(path: str, content: bytes, headers: dict[str, str], **settings: Any) -> httpx.Response:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, content=content, headers=headers)

    return with_client(scenario, **settings)


def get(path: str) -> httpx.Response:
    return with_client(lambda client: client.get(path))


def tensor(data: np.ndarray, datatype: str, name: str = "images") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(data.shape), "data": data.ravel().tolist()}


def infer(*inputs: dict[str, Any], **request: Any) -> httpx.Response:
    return post(INFER, json.dumps({"inputs": inputs} | request).encode(), {"Content-Type": "application/json"})


def outputs_of(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return {item["name"]: np.array(item["data"]).reshape(item["shape"]) for item in response.json()["outputs"]}


def refused(response: httpx.Response, status: int, word: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert word in body["error"]
    assert "\n" not in body["error"]


def raw_images(rows: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 256, (rows, 3, size, size), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("declared", [True, False])
def test_an_image_body_gets_the_offline_answer(kind: str, declared: bool) -> None:
    predictor, body = FakePredictor(), encoded(picture(3), kind)
    with PIL.Image.open(BytesIO(body)) as image:
        offline = predictor.predict(predictor.preprocess([image]))
    content_type = f"image/{kind.lower()}" if declared else "application/octet-stream"
    answer = post("/predict", body, {"Content-Type": content_type}).json()
    label = int(offline.probabilities[0].argmax())
    assert (answer["label"], answer["class"]) == (label, CLASSES[label])
    assert answer["probability"] == pytest.approx(offline.probabilities[0, label].item(), abs=1e-5)
    assert answer["macs"] == offline.macs[0].item()
    assert answer["reduction"] == pytest.approx(1 - answer["macs"] / FULL_MACS)
    assert answer["blocks"] == {"executed": int(offline.path.sum()), "total": 3}
    assert len(answer["path"]) == answer["blocks"]["executed"]
    probabilities = [item["probability"] for item in answer["top"]]
    assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)


def test_a_budget_bounds_the_multiply_adds_of_a_picture() -> None:
    body = encoded(PIL.Image.new("RGB", (8, 8), "white"))
    spent = {text: post(f"/predict{text}", body, PNG).json()["macs"] for text in ("", "?budget=1", "?budget=0.85")}
    assert spent == {"": FULL_MACS, "?budget=1": FULL_MACS, "?budget=0.85": BASE_MACS + 100}


@pytest.mark.parametrize("text", ["0", "-1", "1.01", "nan", "inf", "half", ""])
def test_a_budget_that_is_no_fraction_is_refused(text: str) -> None:
    refused(post(f"/predict?budget={text}", encoded(picture(0)), PNG), 400, "budget")


def test_a_misspelt_query_parameter_is_refused() -> None:
    refused(post("/predict?budjet=0.5", encoded(picture(0)), PNG), 400, "budjet")


@pytest.mark.parametrize("content_type", ["text/plain", "image/gif", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(content_type: str) -> None:
    refused(post("/predict", encoded(picture(0)), {"Content-Type": content_type}), 415, "Content-Type")


def test_a_compressed_body_is_refused() -> None:
    refused(post("/predict", b"x", PNG | {"Content-Encoding": "gzip"}), 415, "gzip")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no image",
        encoded(picture(0))[:200],
        encoded(picture(0), "JPEG")[:300],
        encoded(picture(0), "GIF"),
        png(0, 5),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "GIF", "no width"],
)
def test_a_body_that_is_no_whole_image_is_refused(body: bytes) -> None:
    refused(post("/predict", body, {"Content-Type": "application/octet-stream"}), 400, "body")


def test_a_body_over_the_limit_is_refused_whether_or_not_it_declares_its_length() -> None:
    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        async def pieces() -> Any:
            for _ in range(30):
                yield b"x" * 10_000

        return [await client.post("/predict", content=content, headers=PNG) for content in (b"x" * 200_001, pieces())]

    for response in with_client(scenario):
        refused(response, 413, "200000 bytes")


@pytest.mark.parametrize("width, height", [(71, 71), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: PIL.Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    refused(post("/predict", png(width, height), PNG), 413, "pixels")


def test_a_huge_compressed_text_in_a_small_picture_is_refused() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 8_000_000, 9))
    refused(post("/predict", png(8, 8, bomb), PNG), 400, "body")


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_tensors_get_the_offline_answer_whatever_batches_they_fall_into(rows: int) -> None:
    predictor, pixels = FakePredictor(), raw_images(rows)
    inputs = predictor.preprocess([PIL.Image.fromarray(row.transpose(1, 2, 0)) for row in pixels])
    offline = predictor.predict(inputs)
    for images in (tensor(pixels, "UINT8"), tensor(inputs.numpy(), "FP32")):
        answer = outputs_of(infer(images))
        np.testing.assert_allclose(answer["probabilities"], offline.probabilities, atol=1e-5)
        np.testing.assert_array_equal(answer["label"], offline.probabilities.argmax(1))
        np.testing.assert_array_equal(answer["macs"], offline.macs)
        np.testing.assert_array_equal(answer["path"], offline.path)


def test_each_row_has_its_own_budget() -> None:
    images = tensor(np.full((3, 3, 8, 8), 255, np.uint8), "UINT8")
    for datatype in ("FP64", "FP32"):
        answer = outputs_of(infer(images, tensor(np.array([1.0, 0.5, 0.93]), datatype, "budget")))
        assert answer["macs"].tolist() == [FULL_MACS, BASE_MACS, BASE_MACS + 200]


def test_raw_pixels_may_have_any_size_and_nested_data() -> None:
    pixels = raw_images(2, size=12)
    nested = {"name": "images", "datatype": "UINT8", "shape": [2, 3, 12, 12], "data": pixels.tolist()}
    flat = outputs_of(infer(tensor(pixels, "UINT8")))
    np.testing.assert_array_equal(outputs_of(infer(nested))["probabilities"], flat["probabilities"])


def test_only_the_outputs_asked_for_come_back_with_the_request_id() -> None:
    response = infer(tensor(raw_images(1), "UINT8"), outputs=[{"name": "label"}, {"name": "macs"}], id="q7")
    assert [item["name"] for item in response.json()["outputs"]] == ["label", "macs"]
    assert response.json()["id"] == "q7" and response.json()["model_version"] == "1"


def changed(**changes: Any) -> dict[str, Any]:
    return tensor(raw_images(2), "UINT8") | changes


FLOATS = np.zeros((1, 3, 8, 8))
NAN, HUGE = FLOATS.copy(), FLOATS.copy()
NAN[0, 1, 2, 3], HUGE[0, 1, 2, 3] = np.nan, 1e300


@pytest.mark.parametrize(
    "inputs, word",
    [
        ([], "missing"),
        ([changed(name="image")], "unknown input"),
        ([changed(), changed()], "twice"),
        ([changed(datatype="INT32")], "UINT8 or FP32"),
        ([changed(datatype=None)], "datatype"),
        ([changed(shape=[2, 3, 8])], "shape"),
        ([changed(shape=[2, 1, 8, 24])], "[-1, 3, -1, -1]"),
        ([changed(shape=[2, 3, 8, -8])], "shape"),
        ([changed(shape=[2, 3, 8, True])], "shape"),
        ([changed(shape=[3, 3, 8, 8])], "does not fill"),
        ([changed(shape=[0, 3, 8, 8], data=[])], "0 images"),
        ([changed(shape=[2, 3, 0, 8], data=[])], "at least 1 x 1"),
        ([tensor(raw_images(9), "UINT8")], "send 1 to 8"),
        ([tensor(np.zeros((1, 3, 9, 9)), "FP32")], "[-1, 3, 8, 8]"),
        ([changed(data=[256] * 384)], "does not fit"),
        ([changed(data=[-1] * 384)], "does not fit"),
        ([changed(data=[0.5] * 384)], "UINT8 numbers"),
        ([changed(data=[10**400] * 384)], "UINT8 numbers"),
        ([changed(data=["a"] * 384)], "UINT8 numbers"),
        ([changed(data=[None] * 384)], "UINT8 numbers"),
        ([changed(data=[[1], [1, 2]])], "UINT8 numbers"),
        ([changed(data="abc")], "UINT8 numbers"),
        ([changed(parameters=3)], "parameters"),
        ([changed(parameters={"shared_memory_region": "x"})], "shared memory"),
        ([tensor(NAN, "FP32")], "NaN"),
        ([tensor(HUGE, "FP32")], "infinity"),
        ([changed(), tensor(np.array([0.5]), "FP64", "budget")], "1 values for 2 images"),
        ([changed(), tensor(np.array([0.5, 0.0]), "FP64", "budget")], "budget = 0"),
        ([changed(), tensor(np.array([0.5, 2.0]), "FP64", "budget")], "budget = 2"),
        ([changed(), tensor(np.array([[0.5, 1.0]]), "FP64", "budget")], "shape"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_with_what_would(inputs: list[dict[str, Any]], word: str) -> None:
    refused(infer(*inputs), 400, word)


def test_too_many_pixels_in_a_tensor_are_refused() -> None:
    images = np.zeros((1, 3, 71, 71), np.uint8)
    refused(infer(tensor(images, "UINT8")), 413, "pixels")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": 3}',
        b'{"inputs": [3]}',
        b'{"inputs": [], "id": 3}',
        b"[" * 5000,
        b"\xff\xfe{",
    ],
)
def test_a_malformed_request_is_refused(body: bytes) -> None:
    response = post(INFER, body, {"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]


@pytest.mark.parametrize("outputs", [[{"name": "labels"}], [{}], [3], {"name": "label"}])
def test_an_unknown_output_is_refused(outputs: Any) -> None:
    refused(infer(changed(), outputs=outputs), 400, "output")


@pytest.mark.parametrize("length", ["-1", "x", "100000", "1" * 30, "²"])
def test_a_false_header_length_is_refused(length: str) -> None:
    headers = [(b"Inference-Header-Content-Length", length.encode("latin-1"))]

    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(INFER, content=b"{}", headers=headers)

    refused(with_client(scenario), 400, "Inference-Header-Content-Length")


@pytest.mark.parametrize(
    "size, sent, word", [(384, 100, "announced"), (384, 400, "400 bytes"), (100, 100, "is not that")]
)
def test_binary_data_of_another_size_than_announced_is_refused(size: int, sent: int, word: str) -> None:
    images = {"name": "images", "datatype": "UINT8", "shape": [2, 3, 8, 8], "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [images]}).encode()
    response = post(INFER, header + b"\1" * sent, {"Inference-Header-Content-Length": str(len(header))})
    refused(response, 400, word)


def test_binary_outputs_follow_their_header() -> None:
    response = infer(changed(), parameters={"binary_data_output": True}, outputs=[{"name": "path"}, {"name": "macs"}])
    length = int(response.headers["Inference-Header-Content-Length"])
    header, data = json.loads(response.content[:length]), response.content[length:]
    assert [item["parameters"]["binary_data_size"] for item in header["outputs"]] == [6, 16]
    assert len(data) == 22
    assert np.frombuffer(data[6:], "<f8").tolist() == outputs_of(infer(changed()))["macs"].tolist()


def test_the_protocol_describes_server_and_model() -> None:
    assert get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/fake/ready", "/v2/models/fake/versions/1/ready"):
        assert get(path).status_code == 200
    metadata = get("/v2/models/fake").json()
    assert metadata == get("/v2/models/fake/versions/1").json()
    images, budget = metadata["inputs"]
    assert (images["datatype"], images["shape"]) == ("UINT8", [-1, 3, -1, -1])
    assert images["parameters"]["also_accepted"] == [{"datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert budget["parameters"]["optional"] is True
    assert [output["name"] for output in metadata["outputs"]] == ["probabilities", "label", "macs", "path"]


def test_unknown_models_versions_routes_and_methods_say_so() -> None:
    for path in ("/v2/models/none", "/v2/models/none/ready", "/v2/models/fake/versions/2", "/nowhere"):
        response = get(path)
        assert response.status_code == 404 and response.json()["error"]
    refused(post("/v2/models/none/infer", b"{}", {}), 404, "'fake'")
    refused(post("/v2/models/fake/versions/2/infer", b"{}", {}), 404, "version")
    refused(get("/predict"), 405, "GET /predict")


def test_the_page_escapes_what_the_card_says() -> None:
    page = get("/").text
    assert "name &lt;none&gt;" in page and "<none>" not in page


def test_a_failing_image_fails_alone_and_the_server_goes_on() -> None:
    good = FakePredictor().preprocess([picture(1)]).numpy()
    bad = good.copy()
    bad[0, 0, 0, 0] = POISON
    bodies = [json.dumps({"inputs": [tensor(images, "FP32")]}).encode() for images in (good, bad, good)]

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        together = await asyncio.gather(*(client.post(INFER, content=body) for body in bodies))
        return [*together, await client.post(INFER, content=bodies[0])]

    responses = with_client(scenario, wait_s=0.05)
    assert [response.status_code for response in responses] == [200, 500, 200, 200]
    assert "poison" not in responses[1].text


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    body = encoded(picture(0))

    async def scenario(client: httpx.AsyncClient) -> tuple[list[httpx.Response], float, httpx.Response]:
        async def one() -> tuple[httpx.Response, float]:
            started = time.perf_counter()
            response = await client.post("/predict", content=body, headers=PNG)
            return response, time.perf_counter() - started

        answers = await asyncio.gather(*(one() for _ in range(40)))
        slowest = max(seconds for response, seconds in answers if response.status_code == 503)
        return [response for response, _ in answers], slowest, await client.post("/predict", content=body, headers=PNG)

    responses, slowest, later = with_client(scenario, FakePredictor(seconds=0.1))
    busy = [response for response in responses if response.status_code == 503]
    assert len(busy) == 40 - SMALL.max_queue
    assert {response.headers["Retry-After"] for response in busy} == {"1"}
    assert slowest < 0.2
    assert later.status_code == 200


def test_the_queue_counts_images_and_not_requests() -> None:
    body = json.dumps({"inputs": [tensor(raw_images(8), "UINT8")]}).encode()

    async def scenario(client: httpx.AsyncClient) -> list[int]:
        responses = await asyncio.gather(*(client.post(INFER, content=body) for _ in range(3)))
        return sorted(response.status_code for response in responses)

    assert with_client(scenario, FakePredictor(seconds=0.1)) == [200, 200, 503]


def test_a_request_that_takes_too_long_ends_with_504_and_frees_its_place() -> None:
    body = encoded(picture(0))
    limits = SMALL.model_copy(update={"timeout_s": 0.1})

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        responses = list(
            await asyncio.gather(*(client.post("/predict", content=body, headers=PNG) for _ in range(limits.max_queue)))
        )
        return [*responses, await client.post("/predict", content=body, headers=PNG)]

    responses = with_client(scenario, FakePredictor(seconds=0.25), limits)
    for response in responses:
        refused(response, 504, "0.1 seconds")


def test_health_answers_while_the_model_is_busy() -> None:
    async def scenario(client: httpx.AsyncClient) -> float:
        work = asyncio.create_task(client.post("/predict", content=encoded(picture(0)), headers=PNG))
        await asyncio.sleep(0.1)
        started = time.perf_counter()
        assert (await client.get("/v2/health/live")).status_code == 200
        seconds = time.perf_counter() - started
        assert not work.done()
        await work
        return seconds

    assert with_client(scenario, FakePredictor(seconds=0.5)) < 0.2


def test_metrics_add_up_to_the_requests_and_work_of_the_answers() -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[float, int, str]:
        body = json.dumps({"inputs": [tensor(raw_images(6), "UINT8")]}).encode()
        answer = (await client.post(INFER, content=body)).json()["outputs"]
        await client.post("/predict", content=b"x", headers=PNG)
        by_name = {output["name"]: output["data"] for output in answer}
        return sum(by_name["macs"]), sum(by_name["path"]), (await client.get("/metrics")).text

    macs, executed, text = with_client(scenario)
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    values = {key: float(value) for key, value in samples.items()}
    assert values['dataeff_requests_total{endpoint="infer",replica="r1",status="200"}'] == 1
    assert values['dataeff_requests_total{endpoint="predict",replica="r1",status="400"}'] == 1
    assert values['dataeff_macs_spent_total{replica="r1",version="1"}'] == macs
    assert values['dataeff_macs_saved_total{replica="r1",version="1"}'] == 6 * FULL_MACS - macs
    assert values['dataeff_blocks_executed_total{replica="r1",version="1"}'] == executed
    assert values['dataeff_blocks_total{replica="r1",version="1"}'] == 18
    assert values['dataeff_batch_rows_sum{replica="r1",version="1"}'] == 6
    assert values['dataeff_request_seconds_count{endpoint="infer",replica="r1"}'] == 1


def test_the_short_way_to_predict_works_below_a_route_prefix_and_leaves_other_methods_to_the_router() -> None:
    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        app = client._transport.app  # type: ignore[attr-defined]
        transport = httpx.ASGITransport(app, root_path="/models")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as below:
            body = encoded(picture(3))
            return [
                await below.post("/models/predict", content=body, headers=PNG),
                await below.post("/models/predict/", content=body, headers=PNG),
                await client.get("/predict"),
                await client.post("/predict", content=body, headers=PNG),
            ]

    good, slash, get, plain = with_client(scenario)
    assert good.status_code == plain.status_code == 200 and good.json() == plain.json()
    assert slash.status_code in (307, 404)
    refused(get, 405, "GET")


def test_the_image_and_the_generated_config_have_the_settings_of_ray_that_local_servers_get() -> None:
    text = (Path(__file__).parents[1] / "cluster" / "Dockerfile").read_text()
    in_image = dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", text))
    assert in_image == RAY_SETTINGS
    assert {name: os.environ[name] for name in RAY_SETTINGS}  # importing `serve` has set them


@pytest.mark.parametrize(
    ("body", "tries"), [(b"Path '/' not found. Ping http://.../-/routes", 3), (b'{"error": "no"}', 1)]
)
def test_the_client_tries_again_where_a_proxy_does_not_know_the_server_yet(body: bytes, tries: int) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["idempotency-key"])
        return httpx.Response(200, json={"label": 1}) if len(seen) == 3 else httpx.Response(404, content=body)

    with Client("http://test", deadline_s=5) as client:
        client._client = httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))
        if tries == 1:
            with pytest.raises(ServerError, match="no"):
                client.predict(b"picture")
        else:
            assert client.predict(b"picture") == {"label": 1}
    assert len(seen) == tries and len(set(seen)) == 1
