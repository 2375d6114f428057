"""A local Ray Serve instance: existing clients, offline answers, batches, and bad requests that leave it running."""

import json
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import click
import httpx
import numpy as np
import PIL.Image
import pytest
import torch
import tritonclient.http as triton
from ray import serve

from benchmarks.local_serve import local_serve
from dataeff.nas.fgsm_curve import fgsm_probability_curve
from serve.app import build, labelling, model, parse_options, robustness
from serve.loading import load_attackable
from tests.serve_fakes import CLASSES, FULL_MACS, FakePredictor, encoded, load_fake, picture
from tests.test_serve_labelling import IMAGES, folder, rows_of
from tests.test_serve_robustness import GREY, MAKERS, exported

__all__ = ["folder"]  # the fixture

pytestmark = pytest.mark.ray

PNG = {"Content-Type": "image/png"}
INFER = "/v2/models/fake/infer"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """host:port of a server whose fake network takes 50 ms for each batch."""
    with local_serve(num_cpus=2) as port:
        serve.run(build(parse_options({"artifact": "slow"}), load_fake), name="fake", route_prefix="/")
        yield f"127.0.0.1:{port}"


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
        yield client


def check_good_answer(client: httpx.Client, body: bytes) -> None:
    """`/predict` answers `body` as the predictor does offline."""
    response = client.post("/predict", content=body, headers=PNG)
    assert response.status_code == 200, response.text
    answer, predictor = response.json(), FakePredictor()
    with PIL.Image.open(BytesIO(body)) as image:
        offline = predictor.predict(predictor.preprocess([image]))
    label = int(offline.probabilities[0].argmax())
    assert (answer["label"], answer["class"]) == (label, CLASSES[label])
    assert answer["probability"] == pytest.approx(offline.probabilities[0, label].item(), abs=1e-5)
    assert answer["macs"] == offline.macs[0].item()


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_sixteen_clients_share_batches_and_get_their_own_offline_answers(client: httpx.Client) -> None:
    client.get("/v2/health/ready").raise_for_status()
    names = ("dataeff_batch_rows_sum", "dataeff_batch_rows_count")
    before = [metric(client, name) for name in names]
    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(check_good_answer, client, encoded(picture(seed))) for seed in range(16)]:
            done.result()
    rows, batches = (metric(client, name) - start for name, start in zip(names, before, strict=True))
    assert rows == 16
    assert batches <= 8


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_a_triton_client_gets_offline_answers(address: str, binary: bool) -> None:
    predictor = FakePredictor()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 8, 8), dtype=np.uint8)
    inputs = predictor.preprocess([PIL.Image.fromarray(row.transpose(1, 2, 0)) for row in pixels])
    offline = predictor.predict(inputs)
    client = triton.InferenceServerClient(address)
    try:
        for data, datatype in ((pixels, "UINT8"), (inputs.numpy(), "FP32")):
            images = triton.InferInput("images", list(data.shape), datatype)
            images.set_data_from_numpy(data, binary_data=binary)
            names = ("probabilities", "label", "macs", "path")
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
            answer = client.infer("fake", [images], outputs=wanted, request_id="7")
            np.testing.assert_allclose(answer.as_numpy("probabilities"), offline.probabilities, atol=1e-5)
            np.testing.assert_array_equal(answer.as_numpy("label"), offline.probabilities.argmax(1))
            np.testing.assert_array_equal(answer.as_numpy("macs"), offline.macs)
            np.testing.assert_array_equal(answer.as_numpy("path"), offline.path)
            assert answer.get_response()["id"] == "7"
    finally:
        client.close()


def test_a_triton_client_can_set_budgets_and_read_metadata(address: str) -> None:
    client = triton.InferenceServerClient(address)
    try:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("fake", "1")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("fake")
        assert [output["name"] for output in metadata["outputs"]] == ["probabilities", "label", "macs", "path"]
        images = triton.InferInput("images", [2, 3, 8, 8], "UINT8")
        images.set_data_from_numpy(np.full((2, 3, 8, 8), 255, np.uint8))
        budget = triton.InferInput("budget", [2], "FP64")
        budget.set_data_from_numpy(np.array([1.0, 0.8]))
        macs = client.infer("fake", [images, budget]).as_numpy("macs")
        assert macs.tolist() == [FULL_MACS, 1000]
        with pytest.raises(triton.InferenceServerException, match="budget = 7"):
            budget.set_data_from_numpy(np.array([1.0, 7.0]))
            client.infer("fake", [images, budget])
    finally:
        client.close()


def fifty_megapixels() -> bytes:
    return encoded(PIL.Image.new("1", (10_000, 5_000)))


def zip_bomb(text_bytes: int) -> bytes:
    """A picture of 8 x 8 pixels with a compressed text of `text_bytes`."""
    whole = encoded(PIL.Image.new("L", (8, 8)))
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(b"\0" * text_bytes, 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return whole[:33] + chunk + whole[33:]  # after the signature and IHDR


def giant() -> bytes:
    """A few bytes that claim 30,000 x 30,000 pixels."""
    whole = encoded(PIL.Image.new("L", (8, 8)))
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def tensor_request(value: float, shape: tuple[int, ...] = (1, 3, 8, 8)) -> bytes:
    size = int(np.prod(shape))
    images = {"name": "images", "datatype": "FP32", "shape": shape, "data": [value] * size}
    return json.dumps({"inputs": [images]}).encode()


@pytest.mark.parametrize(
    "path, content_type, body, status, word",
    [
        ("/predict", "image/png", b"no image", 400, "not a readable"),
        ("/predict", "image/png", b"", 400, "empty"),
        ("/predict", "image/png", encoded(picture(0))[:300], 400, "not a readable"),
        ("/predict", "text/plain", b"hello", 415, "Content-Type"),
        ("/predict", "image/png", bytes(11 * 2**20), 413, "larger than"),
        ("/predict", "image/png", fifty_megapixels(), 413, "50000000 pixels"),
        ("/predict", "image/png", giant(), 413, "more than the 16777216 pixels"),
        ("/predict", "image/png", zip_bomb(200_000_000), 400, "not a readable"),
        ("/predict?budget=2", "image/png", encoded(picture(0)), 400, "budget = 2"),
        (INFER, "application/json", b"{", 400, "JSON"),
        (INFER, "application/json", tensor_request(float("nan")), 400, "NaN"),
        (INFER, "application/json", tensor_request(0.0, (1, 3, 8, 9)), 400, "shape"),
        (INFER, "application/json", tensor_request(0.0, (300, 3, 8, 8)), 400, "send 1 to 256"),
        ("/v2/models/none/infer", "application/json", tensor_request(0.0), 404, "unknown model"),
        (INFER, "application/json", tensor_request(1e6), 500, "failed on this request"),
    ],
    ids=[
        "text", "empty", "cut", "type", "body size", "50 megapixels", "giant", "zip bomb", "budget",
        "JSON", "NaN", "shape", "rows", "model", "failing network",
    ],
)  # fmt: skip
def test_a_bad_request_is_answered_and_the_next_good_one_too(
    client: httpx.Client, path: str, content_type: str, body: bytes, status: int, word: str
) -> None:
    response = client.post(path, content=body, headers={"Content-Type": content_type})
    assert response.status_code == status, response.text
    assert word in response.json()["error"]
    check_good_answer(client, encoded(picture(1)))


def test_labels_sent_to_the_labelling_application_reach_its_folder(address: str, folder: Path) -> None:
    serve.run(labelling({"out": str(folder), "num_cpus": "0.5"}), name="labelling", route_prefix="/labelling")
    try:
        with httpx.Client(base_url=f"http://{address}/labelling", timeout=30) as client:
            assert client.get("/request").json()["images"] == IMAGES
            answer = client.post("/label", json={"labels": {IMAGES[0]: "dark", IMAGES[2]: "bright"}})
            assert (answer.status_code, answer.json()["missing"]) == (200, 2)
            assert client.post("/label", json={"labels": {"not asked.png": "dark"}}).status_code == 400
            chosen = client.post("/select", json={"strategy": "random", "k": 2, "count": 9, "labelled": [0]}).json()
            assert len(set(chosen["indices"])) == 2
    finally:
        serve.delete("labelling")
    assert rows_of(folder) == {IMAGES[0]: "dark", IMAGES[1]: "", IMAGES[2]: "bright", IMAGES[3]: ""}


def test_a_network_is_attacked_by_the_robustness_application(address: str, tmp_path: Path) -> None:
    artifact = exported(MAKERS["cells"](), tmp_path / "artifact")
    serve.run(robustness({"artifact": str(artifact), "num_cpus": "0.5"}), name="robustness", route_prefix="/robustness")
    try:
        with httpx.Client(base_url=f"http://{address}/robustness", timeout=30) as client:
            body = {"image": GREY, "label": 3}
            network = load_attackable(str(artifact)).model
            expected = fgsm_probability_curve(network, torch.tensor([GREY]), torch.tensor([3]))
            curve = client.post("/fgsm", json=body).json()
            assert curve["p_true"] == pytest.approx(expected["p_true"][:, 0].tolist(), abs=1e-5)
            found = client.post("/robustness/attack", json=body | {"attack": "noise"}).json()
            assert found["clean_label"] == curve["pred"][0] and 0 < found["linf"] <= 8 / 255 + 1e-6
            assert client.post("/robustness/attack", json=body | {"attack": "cw"}).status_code == 400
    finally:
        serve.delete("robustness")


def test_a_wrong_argument_is_one_line_for_the_shell(tmp_path: Path) -> None:
    for arguments, word in (
        ({"artifact": "x", "max_bach": "3"}, "max_batch"),
        ({"artifact": "x", "max_batch": "0"}, "max_batch"),
        ({"artifact": "x", "max_rows": "600"}, "max_queue"),
        ({"artifact": str(tmp_path / "none")}, "no such directory"),
        ({}, "artifact"),
    ):
        with pytest.raises(click.UsageError) as caught:
            model(arguments)
        assert word in caught.value.message and "\n" not in caught.value.message
