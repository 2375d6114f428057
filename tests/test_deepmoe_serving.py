"""DeepMoE and HydraNet behind HTTP: a request's budget picks channels or branches, and equal choices run together."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import dataeff
from dataeff.core.artifact import Prediction, Predictor, SegmentedPrediction
from dataeff.core.config import parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import open_splits
from dataeff.dynamic.deepmoe.experiment import DeepMoEConfig, DeepMoEExperiment
from dataeff.dynamic.deepmoe.inference import Pattern
from dataeff.dynamic.deepmoe.segmentation import SegmentationConfig, SegmentationExperiment
from dataeff.dynamic.hydranet.experiment import HydraNetConfig, HydraNetExperiment
from dataeff.dynamic.hydranet.inference import HydraInference
from serve.batching import Batcher, whole
from serve.http import create_app
from serve.limits import Limits
from serve.metrics import Metrics
from serve.models import ServedModel
from serve.versions import Version, Versions
from tests.serve_fakes import encoded

pytestmark = pytest.mark.filterwarnings(
    "ignore:embedding network and heads cost", "ignore:static gating", "ignore:dead"
)

STAGE = {"iterations": 2, "batch": 16}
DEEPMOE = {"arch": "vgg6", "width": 1, "embedding_widths": [4, 4, 4, 4], "gate_init": "kaiming", "joint": STAGE}
HYDRANET = {"base": "mini", "depth": 1, "n_branches": 5, "k": 3, "strategy": "random", "w_gate": 1.0, "joint": STAGE}


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    """Networks whose choices differ between images, through their artifacts."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    moe = DeepMoEExperiment(parse_config(DeepMoEConfig, DEEPMOE | {"finetune": STAGE}), "digits", Runtime("cpu"))
    hydra = HydraNetExperiment(parse_config(HydraNetConfig, HYDRANET), "digits", Runtime("cpu"))
    for experiment in (moe, hydra):
        experiment.step()
    assert hydra.gated is not None and hydra.gated.gate is not None
    embedding: Any = moe.model.embedding
    for layer in (embedding.output, hydra.gated.gate.output):
        nn.init.normal_(layer.weight, 0, 3)
    return {name: exported(experiment, folder / name) for name, experiment in (("deepmoe", moe), ("hydranet", hydra))}


def exported(experiment: Experiment, folder: Path) -> Predictor:
    experiment.export(folder)
    return dataeff.load(folder)


def digits(predictor: Predictor, count: int) -> Tensor:
    test = open_splits("digits").test
    images: Any = predictor
    return images._preprocess(test.images(np.arange(count)))  # type: ignore[no-any-return]


def with_client(predictor: Predictor, scenario: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Run `scenario` with a client of the application that serves `predictor`, in batches of up to 8 images."""

    def run(images: Tensor, budgets: Tensor) -> Prediction:
        return predictor.predict(images, None if budgets.isinf().all() else budgets)

    async def main() -> Any:
        async def load(version: str, source: Version) -> ServedModel:
            batcher = Batcher(whole(run), 8, 0.05)
            return ServedModel(predictor, batcher.predict, batcher.close)

        versions = Versions("net", load)
        await versions.apply({"1": Version(artifact="-")})
        transport = httpx.ASGITransport(create_app(versions, Limits(), Metrics("r1")))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(main())


def png(index: int) -> bytes:
    return encoded(PIL.Image.fromarray(open_splits("digits").test.images([index])[0, 0].numpy()))


@pytest.mark.parametrize(("name", "part"), [("deepmoe", "layer 1 channel"), ("hydranet", "branch")])
def test_a_budget_over_http_picks_the_parts_that_run_and_the_answer_names_them(
    predictors: dict[str, Predictor], name: str, part: str
) -> None:
    predictor = predictors[name]
    full = predictor.card.cost["full_macs"]

    async def scenario(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        answers = []
        for query in ("", "?budget=0.9", "?budget=0.75", "?budget=0.01"):
            answer = await client.post(f"/predict{query}", content=png(0), headers={"Content-Type": "image/png"})
            assert answer.status_code == 200, answer.text
            answers.append(answer.json())
        refused = await client.post("/predict?budget=1.5", content=png(0), headers={"Content-Type": "image/png"})
        assert refused.status_code == 400 and "budget" in refused.json()["error"]
        return answers

    free, *bounded, least = with_client(predictor, scenario)
    for answer in (free, *bounded, least):
        assert answer["blocks"] == {"executed": len(answer["path"]), "total": len(predictor.path_names)}
        assert set(answer["path"]) <= set(predictor.path_names) and answer["path"][0].startswith(part)
    for answer, share in zip(bounded, (0.9, 0.75), strict=True):
        assert least["macs"] <= answer["macs"] <= max(least["macs"], share * full)
        assert set(answer["path"]) <= set(free["path"])
    assert len(least["path"]) < len(free["path"])
    assert least["macs"] < free["macs"]


def test_requests_with_equal_channel_patterns_run_as_one_group(
    predictors: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = predictors["deepmoe"]
    images = digits(predictor, 40)
    paths = predictor.predict(images).path
    first = 0
    second = int((paths != paths[first]).any(1).nonzero()[0])
    groups: list[int] = []
    run = Pattern.run

    def recorded(self: Pattern, x: Tensor, gates: Tensor | None) -> Tensor:
        groups.append(len(x))
        return run(self, x, gates)

    monkeypatch.setattr(Pattern, "run", recorded)

    async def scenario(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        order = [first, second, first, second, second]
        calls = [client.post("/predict", content=png(i), headers={"Content-Type": "image/png"}) for i in order]
        return [answer.json() for answer in await asyncio.gather(*calls)]

    answers = with_client(predictor, scenario)
    assert sorted(groups) == [2, 3]
    assert answers[0]["path"] == answers[2]["path"] != answers[1]["path"] == answers[3]["path"] == answers[4]["path"]


def test_images_of_one_branch_run_together_and_other_branches_not_at_all(
    predictors: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = predictors["hydranet"]
    images = digits(predictor, 24)
    calls: list[tuple[int, int]] = []
    run = HydraInference._run

    def recorded(self: HydraInference, branch: int, h: Tensor) -> Tensor:
        calls.append((branch, len(h)))
        return run(self, branch, h)

    monkeypatch.setattr(HydraInference, "_run", recorded)
    prediction = predictor.predict(images)
    wanted = {branch: count for branch, count in enumerate(prediction.path.sum(0).tolist()) if count}
    assert dict(calls) == wanted and len(calls) == len(wanted)


def test_a_budget_overrides_k_image_by_image(predictors: dict[str, Predictor]) -> None:
    predictor = predictors["hydranet"]
    images = digits(predictor, 4)
    free = predictor.predict(images)
    branch = float(predictor.predict(images, torch.zeros(4).double()).macs[0])
    step = (float(free.macs[0]) - branch) / 2  # k = 3: two branches more than one
    budget = torch.tensor([branch, branch + step, branch + 2 * step, torch.inf], dtype=torch.float64)
    bounded = predictor.predict(images, budget)
    assert bounded.path.sum(1).tolist() == [1, 2, 3, 3]
    assert bool((bounded.macs <= budget).all())
    assert bool((bounded.path & ~free.path).sum() == 0)


def test_a_segmentation_network_gives_the_class_of_every_pixel(tmp_path: Path) -> None:
    settings = {"arch": "drn10", "widths": [4, 8, 8, 8], "embedding_widths": [4, 4, 4, 4], "joint": STAGE}
    config = parse_config(SegmentationConfig, settings)
    experiment = SegmentationExperiment(config, "shapes?size=32&labels=20", Runtime("cpu"))
    experiment.step()
    predictor = exported(experiment, tmp_path / "artifact")
    image = PIL.Image.fromarray(experiment.splits.test.images([0])[0, :3].permute(1, 2, 0).numpy())
    expected = predictor.predict(predictor.preprocess([image]))
    assert isinstance(expected, SegmentedPrediction)

    async def scenario(client: httpx.AsyncClient) -> dict[str, Any]:
        headers = {"Content-Type": "image/png"}
        answer = await client.post("/segment", content=encoded(image), headers=headers)
        assert answer.status_code == 200, answer.text
        least = await client.post("/segment?budget=0.01", content=encoded(image), headers=headers)
        shares = await client.post("/predict", content=encoded(image), headers=headers)
        page = (await client.get("/openapi.json")).json()
        names = [output["name"] for output in (await client.get("/v2/models/net")).json()["outputs"]]
        rows = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 32, 32]}
        rows["data"] = np.asarray(image).transpose(2, 0, 1).ravel().tolist()
        inferred = (await client.post("/v2/models/net/infer", json={"inputs": [rows]})).json()
        return {
            "map": answer.json(),
            "least": least.json(),
            "shares": shares.json(),
            "page": page,
            "names": names,
            "inferred": inferred,
        }

    found = with_client(predictor, scenario)
    png = PIL.Image.open(BytesIO(base64.b64decode(found["map"]["class_map"])))
    assert np.array_equal(np.asarray(png), expected.class_map[0].numpy())
    present = {item["label"]: item["share"] for item in found["map"]["classes"]}
    labels, counts = expected.class_map[0].unique(return_counts=True)
    assert present == pytest.approx(dict(zip(labels.tolist(), (counts / 32**2).tolist(), strict=True)))
    assert found["map"]["active_share"] == pytest.approx(float(expected.path.double().mean()))
    assert found["map"]["macs"] == pytest.approx(float(expected.macs[0]))
    assert found["least"]["macs"] < found["map"]["macs"]
    assert found["shares"]["label"] == int(expected.probabilities[0].argmax())
    assert "budget" in {item["name"] for item in found["page"]["paths"]["/segment"]["post"]["parameters"]}
    assert "class_map" in found["names"]
    tensors = {output["name"]: output["data"] for output in found["inferred"]["outputs"]}
    assert tensors["class_map"] == expected.class_map.ravel().tolist()


def test_a_classifier_refuses_to_segment(predictors: dict[str, Predictor]) -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[httpx.Response, dict[str, Any]]:
        answer = await client.post("/segment", content=png(0), headers={"Content-Type": "image/png"})
        return answer, (await client.get("/openapi.json")).json()

    answer, page = with_client(predictors["deepmoe"], scenario)
    assert answer.status_code == 404 and "/predict" in answer.json()["error"]
    assert "/segment" not in page["paths"]
