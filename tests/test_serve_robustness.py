"""The application of attacks without Ray, called in process: the library's own answers, and bad requests."""

import asyncio
import base64
import json
import time
import warnings
from collections.abc import Awaitable, Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import httpx
import numpy as np
import PIL.Image
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from torch import Tensor, nn

import dataeff
from dataeff.core.artifact import Card
from dataeff.core.config import merge, parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import open_splits
from dataeff.metrics.robustness import harmonic_robustness_score, per_parameter_hrs
from dataeff.nas import attackable
from dataeff.nas.attackable import AttackableNetwork
from dataeff.nas.attacks import attack
from dataeff.nas.experiment_robustness import RobustnessConfig, RobustnessExperiment, genotypes, make_network
from dataeff.nas.experiment_train import NasTrainConfig, NasTrainExperiment
from dataeff.nas.fgsm_curve import EPS_GRID, fgsm_probability_curve
from dataeff.nas.genotype import named_genotype, structure_stats
from dataeff.nas.random_cells import random_cells
from dataeff.nas.threat import AttackConfig, AttackName, LossName
from serve.app import parse_robustness_options
from serve.app import robustness as serve_robustness
from serve.limits import RobustnessLimits
from serve.loading import Attackable, load_attackable
from serve.metrics import Metrics
from serve.robustness import AttackRequest, create_robustness_app
from tests.serve_fakes import encoded, picture
from tests.serve_fuzz import pictures
from tests.test_robustness_experiment import DATA
from tests.test_robustness_experiment import TINY as TINY_STUDY
from tests.test_serve_labelling import answered, refused

T = TypeVar("T")
Client = httpx.AsyncClient

ATTACKS = get_args(AttackName)
PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}
LIMITS = RobustnessLimits(
    max_body_bytes=60_000, max_pixels=5_000, max_budgets=12, max_steps=30, max_restarts=4, timeout_s=20
)
CHAIN = {"stem": 4, "layers": [{"block": "mb3_3", "channels": 8, "stride": 2}, {"block": "identity", "channels": 8}]}
TINY_TRAINING: dict[str, Any] = {
    "cells": 3, "channels": 4, "cutout": 2, "augment": "shift", "report_every": 20,
    "stage": {"iterations": 20, "batch": 16},
}  # fmt: skip


def exported(experiment: Experiment, directory: Path) -> Path:
    while experiment.steps_done < experiment.total_steps:
        experiment.step()
    experiment.export(directory)
    return directory


def study(**changes: Any) -> RobustnessExperiment:
    short = {"attacks": ["fgsm"], "images": 4, "report_every": 40}
    return RobustnessExperiment(
        parse_config(RobustnessConfig, merge(TINY_STUDY, short | changes)), DATA, Runtime("cpu")
    )


def training(**changes: Any) -> NasTrainExperiment:
    return NasTrainExperiment(parse_config(NasTrainConfig, TINY_TRAINING | changes), DATA, Runtime("cpu"))


MAKERS: dict[str, Callable[[], Experiment]] = {
    "ensemble": lambda: study(network="ensemble", stage={"iterations": 160}),
    "resnet": lambda: study(),
    "cells": lambda: training(),
    "chain": lambda: training(genotype=CHAIN),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks of every kind; the ensemble has learned something."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: exported(make(), folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def networks(artifacts: dict[str, Path]) -> dict[str, Attackable]:
    return {name: load_attackable(str(folder)) for name, folder in artifacts.items()}


@pytest.fixture(scope="module")
def ensemble(networks: dict[str, Attackable]) -> Attackable:
    return networks["ensemble"]


@pytest.fixture(scope="module")
def right(ensemble: Attackable) -> list[tuple[np.ndarray, int]]:
    """Digits that the ensemble knows: uint8 [1, 8, 8] and label."""
    test = open_splits(DATA).test
    images = test.images(np.arange(len(test)))
    labels = torch.from_numpy(test.labels)
    known = (ensemble.probabilities(images.float() / 255).argmax(1) == labels).nonzero()[:, 0]
    assert len(known) > 60
    return [(images[row].numpy(), int(labels[row])) for row in known[:6]]


def with_client(network: Attackable, scenario: Callable[[Client], Awaitable[T]], **settings: Any) -> T:
    async def run() -> T:
        app = create_robustness_app(network, **({"limits": LIMITS, "metrics": Metrics("r1")} | settings))
        async with Client(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(run())


def post(network: Attackable, path: str, body: Any, **settings: Any) -> httpx.Response:
    return with_client(network, lambda client: client.post(path, json=body), **settings)


def post_text(network: Attackable, path: str, text: str | bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    return with_client(network, lambda client: client.post(path, content=text, headers=headers))


def get(network: Attackable, path: str, **settings: Any) -> httpx.Response:
    return with_client(network, lambda client: client.get(path), **settings)


def png(image: np.ndarray) -> bytes:
    return encoded(PIL.Image.fromarray(image[0]))


def in_base64(image: np.ndarray) -> str:
    return base64.b64encode(png(image)).decode()


def decoded(text: str) -> np.ndarray:
    with PIL.Image.open(BytesIO(base64.b64decode(text))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def tensors(image: np.ndarray, label: int) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(image)[None].float() / 255, torch.tensor([label])


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_predict_answers_as_the_artifacts_own_predictor(
    artifacts: dict[str, Path], networks: dict[str, Attackable], name: str
) -> None:
    predictor, digit = dataeff.load(artifacts[name]), open_splits(DATA).test.images(np.arange(1))[0].numpy()
    for body in (png(digit), encoded(picture(1, (30, 20)), "JPEG"), encoded(picture(2, (8, 9)), "WEBP")):
        with PIL.Image.open(BytesIO(body)) as image:
            expected = predictor.predict(predictor.preprocess([image])).probabilities[0]
        found = answered(post_text(networks[name], "/predict", body, {"Content-Type": "application/octet-stream"}))
        assert found["label"] == int(expected.argmax()) and found["class"] == predictor.card.classes[found["label"]]
        top = {item["label"]: item["probability"] for item in found["top"]}
        assert list(top.values()) == sorted(top.values(), reverse=True) and len(top) == 5
        assert found["probability"] == found["top"][0]["probability"]
        for label, probability in top.items():
            assert probability == pytest.approx(float(expected[label]), abs=1e-4)
        assert ("members" in found) == (name == "ensemble")


def test_members_of_an_ensemble_answer_for_themselves(
    ensemble: Attackable, right: list[tuple[np.ndarray, int]]
) -> None:
    image, _ = right[0]
    found = answered(post_text(ensemble, "/predict", png(image), PNG))["members"]
    assert isinstance(ensemble, AttackableNetwork)
    members: Any = ensemble.model.model
    x = ensemble.model.normalize(tensors(image, 0)[0])
    alone = [member(x).softmax(1)[0] for member in members.members]
    assert [item["label"] for item in found] == [int(p.argmax()) for p in alone] and len(found) == 2
    assert [item["probability"] for item in found] == pytest.approx([float(p.max()) for p in alone], abs=1e-5)


@pytest.mark.parametrize("name", ["ensemble", "cells"])
def test_fgsm_gives_the_librarys_curve(
    networks: dict[str, Attackable], right: list[tuple[np.ndarray, int]], name: str
) -> None:
    (image, label), network = right[1], networks[name]
    for grid, more in ((EPS_GRID, {}), ((0.0, 0.3), {"eps_list": [0, 0.3]}), (EPS_GRID, {"eps_list": None})):
        found = answered(post(network, "/fgsm", {"image": in_base64(image), "label": label} | more))
        expected = fgsm_probability_curve(network.model, *tensors(image, label), grid)
        assert found["eps"] == list(grid) and set(found) == {"eps", "p_true", "pred", "p_pred"}
        assert found["pred"] == expected["pred"][:, 0].tolist()
        for key in ("p_true", "p_pred"):
            assert found[key] == pytest.approx(expected[key][:, 0].tolist(), abs=1e-6)
    clean = answered(post_text(network, "/predict", png(image), PNG))
    assert (found["pred"][0], found["p_pred"][0]) == (clean["label"], pytest.approx(clean["probability"], abs=1e-5))


@pytest.mark.parametrize("more", [{}, {"eps": 0.1, "steps": 4, "seed": 3}], ids=["defaults", "settings"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_the_librarys(
    ensemble: Attackable, right: list[tuple[np.ndarray, int]], name: AttackName, more: dict[str, Any]
) -> None:
    image, label = right[2]
    eps = more.get("eps", 8 / 255)
    steps = {"alpha": eps / 4, "ffgsm_alpha": 1.25 * eps}
    x, y = tensors(image, label)
    moved = attack(ensemble.model, x, y, AttackConfig(name=name, **(more | steps))).as_subclass(Tensor)
    found = answered(
        post(ensemble, "/robustness/attack", {"image": in_base64(image), "label": label, "attack": name} | more)
    )
    p = ensemble.probabilities(torch.cat([x, moved]))
    assert [found["clean_label"], found["adv_label"]] == p.argmax(1).tolist()
    assert [found["clean_prob"], found["adv_prob"]] == pytest.approx(p.amax(1).tolist(), abs=1e-5)
    assert found["linf"] == pytest.approx(float((moved - x).abs().max())) and found["linf"] <= eps + 1e-6
    assert found["success"] == (found["adv_label"] != label) and found["clean_label"] == label
    adversarial = decoded(found["adv_image"])
    np.testing.assert_array_equal(adversarial, (255 * moved[0, 0]).round().numpy())
    change = np.abs(adversarial.astype(float) - image[0]).max() / 255
    assert found["png_linf"] == pytest.approx(change, abs=1e-6) and abs(change - found["linf"]) <= 0.5 / 255 + 1e-6


def test_a_large_budget_fools_where_none_does_not_and_wrong_answers_are_no_success(
    ensemble: Attackable, right: list[tuple[np.ndarray, int]]
) -> None:
    async def scenario(client: Client) -> list[list[dict[str, Any]]]:
        async def ask(image: np.ndarray, label: int, eps: float) -> dict[str, Any]:
            body = {"image": in_base64(image), "label": label, "attack": "apgd", "eps": eps}
            return answered(await client.post("/robustness/attack", json=body))  # type: ignore[no-any-return]

        return [[await ask(image, (label + shift) % 10, eps) for image, label in right]
                for shift, eps in ((0, 0.4), (0, 0), (1, 0.4))]  # fmt: skip

    strong, none, wrong = with_client(ensemble, scenario)
    assert sum(found["success"] for found in strong) >= 5
    assert not any(found["success"] or found["linf"] for found in none)
    assert all(found["adv_label"] == found["clean_label"] for found in none)
    assert not any(found["success"] for found in wrong), "those labels were wrong before the attack"


def test_numbers_and_pictures_are_the_same_image(ensemble: Attackable, right: list[tuple[np.ndarray, int]]) -> None:
    image, label = right[3]
    for path, more in (("/fgsm", {}), ("/robustness/attack", {"attack": "pgd"})):
        body = {"label": float(label)} | more  # JSON has one kind of number
        numbers = (image.astype(np.float64) / 255).tolist()
        first, second = (answered(post(ensemble, path, body | {"image": i})) for i in (in_base64(image), numbers))
        assert first == second


def test_random_starts_follow_the_seed(ensemble: Attackable, right: list[tuple[np.ndarray, int]]) -> None:
    image, label = right[4]
    body = {"image": in_base64(image), "label": label, "attack": "noise", "eps": 0.2}
    same, again, other = (answered(post(ensemble, "/robustness/attack", body | {"seed": seed})) for seed in (1, 1, 2))
    assert same == again and same["adv_image"] != other["adv_image"]


def test_colour_images_come_back_in_colour() -> None:
    card = Card(
        method="x", classes=["a", "b", "c"], input_shape=(3, 6, 5), metrics={}, cost={}, data={}, versions={},
        preprocess={"channels": 3, "size": (6, 5), "mean": (0.5,) * 3, "std": (0.2, 0.3, 0.4)},
    )  # fmt: skip
    torch.manual_seed(0)
    network = AttackableNetwork(card, nn.Sequential(nn.Flatten(), nn.Linear(90, 3)), [])
    numbers = np.random.default_rng(0).random((3, 6, 5))
    body = {"image": numbers.tolist(), "label": 1, "attack": "fgsm", "eps": 0.25}
    found = answered(post(network, "/robustness/attack", body))
    adversarial = decoded(found["adv_image"])
    assert adversarial.shape == (6, 5, 3)
    assert np.abs(adversarial.transpose(2, 0, 1) / 255 - numbers).max() <= 0.25 + 0.5 / 255 + 1e-6


def test_the_requests_defaults_and_names_are_the_librarys() -> None:
    fields, library = AttackRequest.model_fields, AttackConfig.model_fields
    assert get_args(fields["attack"].annotation) == ATTACKS and get_args(fields["loss"].annotation) == get_args(
        LossName
    )
    for name in ("eps", "steps", "restarts", "loss", "seed"):
        assert fields[name].default == library[name].default


def test_steps_reach_the_budget_without_a_warning_and_are_the_librarys_at_its_budget(
    ensemble: Attackable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[AttackConfig] = []

    def note(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig) -> Tensor:
        seen.append(cfg)
        return x

    monkeypatch.setattr(attackable, "attack", note)
    x, y = torch.zeros(1, 1, 8, 8), torch.tensor([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in range(1, 201):
            for eps in (0.0, 1e-300, 1 / 3, 8 / 255, 0.1, 1.0):
                ensemble.attack(x, y, "pgd", eps, steps)
                assert steps * seen[-1].alpha >= eps
    ensemble.attack(x, y, "bim", 8 / 255, 10)
    assert (seen[-1].alpha, seen[-1].ffgsm_alpha) == (AttackConfig(name="bim").alpha, pytest.approx(10 / 255))
    ensemble.attack(x, y, "bim", 8 / 255, 10, 0.02)
    assert seen[-1].alpha == seen[-1].ffgsm_alpha == 0.02
    ensemble.attack(x, y, "fgsm", 5e-324, 1)


def test_scores_are_the_librarys(ensemble: Attackable) -> None:
    body = {"clean": 94.5, "pgd": 30}
    hrs = harmonic_robustness_score(94.5, 30)
    assert answered(post(ensemble, "/robustness/score", body)) == {"hrs": pytest.approx(hrs), "pp_hrs": None}
    found = answered(post(ensemble, "/robustness/score", body | {"params": 7.98, "baseline_params": 5.29}))
    assert found == {"hrs": pytest.approx(hrs), "pp_hrs": pytest.approx(per_parameter_hrs(hrs, 7.98, 5.29))}
    assert answered(post(ensemble, "/robustness/score", {"clean": 0, "pgd": 0}))["hrs"] == 0
    huge = {"params": 1e-6, "baseline_params": 1e12}
    assert answered(post(ensemble, "/robustness/score", body | huge))["pp_hrs"] == pytest.approx(hrs * 1e18)


def test_the_genotype_is_shown_as_edges_of_every_member(networks: dict[str, Attackable]) -> None:
    expected = {"ensemble": [random_cells(0, 0), random_cells(0, 1)], "cells": [named_genotype("darts_v2")]}
    for name, wanted in expected.items():
        members = answered(get(networks[name], "/genotype"))["members"]
        assert len(members) == len(wanted)
        for member, genotype in zip(members, wanted, strict=True):
            for kind in ("normal", "reduce"):
                cell, pairs = member[kind], getattr(genotype, kind)
                assert [(edge["operation"], edge["from"]) for edge in cell["edges"]] == list(pairs)
                assert [edge["to"] for edge in cell["edges"]] == [2, 2, 3, 3, 4, 4, 5, 5]
                assert cell["concat"] == [2, 3, 4, 5] and cell["stats"] == structure_stats(pairs)
    (chain,) = answered(get(networks["chain"], "/genotype"))["members"]
    assert chain["stem"] == 4 and [block["block"] for block in chain["blocks"]] == ["mb3_3", "identity"]
    refused(get(networks["resnet"], "/genotype"), 404, "not made of cells")


# --- bad requests ----------------------------------------------------------------------------------------------------

GREY = [[[0.5] * 8] * 8]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"label": 10}, 400, ["label = 10", "0 to 9"]),
        ({"label": -1}, 400, ["label"]),
        ({"label": 2**70}, 400, ["label"]),
        ({"label": 1.5}, 400, ["label"]),
        ({"label": True}, 400, ["label"]),
        ({"label": None}, 400, ["label"]),
        ({"image": None}, 400, ["image"]),
        ({"image": ""}, 400, ["empty"]),
        ({"image": "?"}, 400, ["not base64"]),
        ({"image": "é"}, 400, ["not base64"]),
        ({"image": base64.b64encode(b"no image").decode()}, 400, ["not a readable"]),
        ({"image": base64.b64encode(encoded(picture(0))[:200]).decode()}, 400, ["not a readable"]),
        ({"image": base64.b64encode(encoded(PIL.Image.new("1", (100, 51)))).decode()}, 413, ["5100 pixels"]),
        ({"image": []}, 400, ["shape [0]", "[1, 8, 8]"]),
        ({"image": GREY * 3}, 400, ["shape [3, 8, 8]", "[1, 8, 8]"]),
        ({"image": GREY[0]}, 400, ["image"]),
        ({"image": [GREY]}, 400, ["image"]),
        ({"image": [[[0.5] * 8] * 7 + [[0.5]]]}, 400, ["different lengths"]),
        ({"image": [[[0.5] * 7 + [1.01]] * 8]}, 400, ["0.5 to 1.01"]),
        ({"image": [[[0.5] * 7 + [-1e-9]] * 8]}, 400, ["-1e-09"]),
        ({"image": [[[0.5] * 7 + [10**400]] * 8]}, 400, ["image"]),
        ({"image": [[["0.5"] * 8] * 8]}, 400, ["image"]),
        ({"image": [[[128] * 8] * 8]}, 400, ["128 to 128", "0 to 1"]),
        ({"imag": GREY}, 400, ["imag"]),
    ],
)
@pytest.mark.parametrize("path", ["/fgsm", "/robustness/attack"])
def test_a_wrong_image_or_label_gets_one_sentence(
    ensemble: Attackable, path: str, body: dict[str, Any], status: int, words: list[str]
) -> None:
    asked = {"image": GREY, "label": 1} | ({} if path == "/fgsm" else {"attack": "noise"})
    refused(post(ensemble, path, asked | body), status, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"attack": "cw"}, ["attack", "'apgd'"]),
        ({"attack": None}, ["attack"]),
        ({"eps": -0.1}, ["eps", "0"]),
        ({"eps": 1.1}, ["eps", "1"]),
        ({"eps": "8/255"}, ["eps"]),
        ({"steps": 0}, ["steps"]),
        ({"steps": 31}, ["31 steps", "at most 30"]),
        ({"steps": 10**30}, ["steps"]),
        ({"steps": 2.5}, ["steps"]),
        ({"restarts": 0}, ["restarts"]),
        ({"restarts": 5}, ["5 restarts", "at most 4"]),
        ({"attack": "fgsm", "restarts": 2}, ["restarts = 2", "use 1"]),
        ({"attack": "bim", "restarts": 2}, ["restarts = 2", "use 1"]),
        ({"alpha": 0}, ["alpha"]),
        ({"alpha": 0.001}, ["10 steps cannot reach eps = 0.03"]),
        ({"loss": "mse"}, ["loss", "'dlr'"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**31}, ["seed"]),
        ({"space": "model_input"}, ["space"]),
    ],
)
def test_a_wrong_attack_gets_one_sentence(ensemble: Attackable, body: dict[str, Any], words: list[str]) -> None:
    asked = {"image": GREY, "label": 1, "attack": "pgd"}
    refused(post(ensemble, "/robustness/attack", asked | body), 400, *words)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([], ["eps_list"]),
        ([0.1] * 13, ["13 budgets", "at most 12"]),
        ([0.1, -0.1], ["eps_list"]),
        ([1.01], ["eps_list"]),
        (["0.1"], ["eps_list"]),
        (0.1, ["eps_list"]),
        ([None], ["eps_list"]),
    ],
)
def test_wrong_budgets_get_one_sentence(ensemble: Attackable, grid: Any, words: list[str]) -> None:
    refused(post(ensemble, "/fgsm", {"image": GREY, "label": 1, "eps_list": grid}), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"clean": 101}, ["clean", "100"]),
        ({"clean": -1}, ["clean"]),
        ({"pgd": None}, ["pgd"]),
        ({"clean": 0.9, "pgd": 0.4}, ["0.9 and 0.4 look like fractions"]),
        ({"params": 3}, ["params without baseline_params"]),
        ({"params": 0, "baseline_params": 3}, ["params"]),
        ({"params": 3, "baseline_params": -3}, ["baseline_params"]),
        ({"params": 1e-300, "baseline_params": 1e300}, ["params"]),
        ({"hrs": 3}, ["hrs"]),
    ],
)
def test_wrong_accuracies_get_one_sentence(ensemble: Attackable, body: dict[str, Any], words: list[str]) -> None:
    refused(post(ensemble, "/robustness/score", {"clean": 90, "pgd": 30} | body), 400, *words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(ensemble: Attackable, number: str) -> None:
    image = json.dumps(GREY).replace("0.5", number, 1)
    for path, text, word in (
        ("/fgsm", f'{{"image": {image}, "label": 1}}', "finite"),
        ("/fgsm", f'{{"image": {json.dumps(GREY)}, "label": 1, "eps_list": [{number}]}}', "eps_list"),
        ("/fgsm", f'{{"image": {json.dumps(GREY)}, "label": {number}}}', "label"),
        ("/robustness/attack", f'{{"image": {image}, "label": 1, "attack": "fgsm"}}', "finite"),
        ("/robustness/attack", f'{{"image": {image}, "label": 1, "attack": "fgsm", "eps": {number}}}', "eps"),
        ("/robustness/attack", f'{{"image": {image}, "label": 1, "attack": "pgd", "alpha": {number}}}', "alpha"),
        ("/robustness/score", f'{{"clean": {number}, "pgd": 1}}', "clean"),
        ("/robustness/score", f'{{"clean": 90, "pgd": 30, "params": {number}, "baseline_params": 1}}', "params"),
    ):
        refused(post_text(ensemble, path, text), 400, word)


@pytest.mark.parametrize("text", ["", "{", "[" * 30_000, "1" * 5_000, '"x"', "\ud800".encode("utf-8", "surrogatepass")])
def test_bodies_that_are_no_request_are_refused(ensemble: Attackable, text: str | bytes) -> None:
    for path in ("/fgsm", "/robustness/attack", "/robustness/score"):
        refused(post_text(ensemble, path, text), 400)


@pytest.mark.parametrize(
    ("body", "headers", "status", "word"),
    [
        (b"no image", PNG, 400, "not a readable"),
        (b"", PNG, 400, "empty"),
        (encoded(picture(0)), {"Content-Type": "text/plain"}, 415, "Content-Type"),
        (encoded(PIL.Image.new("1", (100, 51))), PNG, 413, "5100 pixels"),
        (bytes(60_001), PNG, 413, "60000 bytes"),
    ],
)
def test_a_wrong_picture_is_refused(
    ensemble: Attackable, body: bytes, headers: dict[str, str], status: int, word: str
) -> None:
    refused(post_text(ensemble, "/predict", body, headers), status, word)


class Steps(nn.Module):
    """Looks at bits, which have no gradient; or cuts the gradient off."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x.detach() if self.cut else x.sign()).flatten(1))
        return logits


def digits_network(network: nn.Module) -> AttackableNetwork:
    card = Card(
        method="x", classes=list("0123456789"), input_shape=(1, 8, 8), metrics={}, cost={}, data={}, versions={},
        preprocess={"channels": 1, "size": (8, 8), "mean": (0.5,), "std": (0.5,)},
    )  # fmt: skip
    return AttackableNetwork(card, network, [])


@pytest.mark.parametrize("cut", [False, True], ids=["zero", "cut off"])
def test_a_network_without_a_gradient_is_a_refusal_that_says_so(cut: bool) -> None:
    network = digits_network(Steps(cut))
    label = answered(post_text(network, "/predict", png(np.full((1, 8, 8), 128, np.uint8)), PNG))["label"]
    body = {"image": GREY, "label": label}
    refused(post(network, "/fgsm", body), 400, "no gradient to follow")
    for name in ATTACKS:
        response = post(network, "/robustness/attack", body | {"attack": name})
        if name == "noise":  # follows none
            assert 0 < answered(response)["linf"] <= 8 / 255 + 1e-6
        else:
            refused(response, 400, "no gradient to follow", "100.0% of the images")


def test_two_classes_have_no_ratio_of_logits() -> None:
    card = digits_network(nn.Identity()).card.model_copy(update={"classes": ["a", "b"]})
    network = AttackableNetwork(card, nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), [])
    body = {"image": GREY, "label": 1, "attack": "pgd", "loss": "dlr"}
    refused(post(network, "/robustness/attack", body), 400, "at least 3 classes")


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_token_guards_all_but_health(ensemble: Attackable) -> None:
    for path in ("/genotype", "/metrics"):
        refused(get(ensemble, path, token="secret"), 401, "bearer token")
        headers = {"Authorization": "Bearer secret"}
        assert with_client(ensemble, partial(Client.get, url=path, headers=headers), token="secret").status_code == 200
    for path in ("/predict", "/fgsm", "/robustness/attack", "/robustness/score"):
        assert post(ensemble, path, {}, token="secret").status_code == 401
    assert answered(get(ensemble, "/v2/health/live", token="secret")) == {"live": True}
    assert answered(get(ensemble, "/v2/health/ready", token="secret")) == {"ready": True}


def test_a_large_body_is_refused_as_too_large(ensemble: Attackable) -> None:
    for path in ("/fgsm", "/robustness/attack"):
        refused(post(ensemble, path, {"image": "A" * 60_000, "label": 1, "attack": "fgsm"}), 413, "60000 bytes")


class Slow(nn.Module):
    """Counts its passes, each of 30 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        time.sleep(0.03)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_an_attack_that_takes_too_long_ends_in_504_and_stops_its_thread() -> None:
    slow = Slow()
    network = digits_network(slow)
    label = int(network.probabilities(torch.tensor([GREY])).argmax())
    limits = LIMITS.model_copy(update={"timeout_s": 0.4})

    async def scenario(client: Client) -> None:
        body = {"image": GREY, "label": label, "attack": "bim", "eps": 0.001, "steps": 30}
        waiting = [asyncio.create_task(client.post("/robustness/attack", json=body)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert answered(await client.get("/v2/health/live")) == {"live": True}
        assert answered(await client.post("/robustness/score", json={"clean": 90, "pgd": 30}))["pp_hrs"] is None
        for response in await asyncio.gather(*waiting):
            refused(response, 504, "0.4 seconds")
        picture_body = png(np.zeros((1, 8, 8), np.uint8))
        answered(await client.post("/predict", content=picture_body, headers=PNG))
        passes = slow.passes
        assert passes < 30, "three attacks take 90 and more"
        await asyncio.sleep(0.2)
        assert slow.passes == passes

    with_client(network, scenario, limits=limits)
    assert not slow.training and not network.model._forward_pre_hooks


def test_a_flood_is_refused_at_once() -> None:
    limits = LIMITS.model_copy(update={"max_queue": 2})

    async def scenario(client: Client) -> list[int]:
        body = {"image": GREY, "label": 1, "attack": "pgd"}
        responses = await asyncio.gather(*(client.post("/robustness/attack", json=body) for _ in range(5)))
        assert all("Retry-After" in response.headers for response in responses if response.status_code == 503)
        return sorted(response.status_code for response in responses)

    assert with_client(digits_network(Slow()), scenario, limits=limits) == [200, 200, 503, 503, 503]


def test_requests_at_once_get_the_answers_of_one_by_one_and_leave_the_network_as_it_was(
    ensemble: Attackable, right: list[tuple[np.ndarray, int]]
) -> None:
    before = {name: value.clone() for name, value in ensemble.model.state_dict().items()}
    bodies = [
        ("/robustness/attack", {"image": in_base64(image), "label": label, "attack": name})
        for name, (image, label) in zip(ATTACKS, right, strict=True)
    ] + [("/fgsm", {"image": in_base64(image), "label": label}) for image, label in right]

    async def together(client: Client) -> list[Any]:
        responses = await asyncio.gather(*(client.post(path, json=body) for path, body in bodies))
        return [answered(response) for response in responses]

    async def alone(client: Client) -> list[Any]:
        return [answered(await client.post(path, json=body)) for path, body in bodies]

    assert with_client(ensemble, together, threads=4) == with_client(ensemble, alone)
    after = ensemble.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in ensemble.model.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.model.parameters())


def test_answers_are_counted(ensemble: Attackable) -> None:
    async def scenario(client: Client) -> str:
        await client.post("/robustness/score", json={"clean": 90, "pgd": 30})
        await client.post("/robustness/attack", json={"image": GREY, "label": 10, "attack": "fgsm"})
        return (await client.get("/metrics")).text

    text = with_client(ensemble, scenario)
    assert 'endpoint="score",replica="r1",status="200"} 1.0' in text
    assert 'endpoint="attack",replica="r1",status="400"} 1.0' in text


def test_the_page_shows_every_route_and_400_in_place_of_422(ensemble: Attackable) -> None:
    page = answered(get(ensemble, "/openapi.json"))
    routes = {"/predict", "/fgsm", "/robustness/attack", "/robustness/score", "/genotype", "/metrics"}
    assert set(page["paths"]) == routes | {"/v2/health/live", "/v2/health/ready"}
    answers = page["paths"]["/robustness/attack"]["post"]["responses"]
    assert {"200", "400", "413", "500", "503", "504"} == set(answers)
    assert "HTTPValidationError" not in page["components"]["schemas"]
    fields = page["components"]["schemas"]["AttackRequest"]["properties"]
    assert (fields["label"]["maximum"], fields["steps"]["maximum"], fields["restarts"]["maximum"]) == (9, 30, 4)
    assert answered(get(ensemble, "/openapi.json")) == page


def test_the_arguments_are_checked_and_folders_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_robustness_options({"artifact": "runs/net/artifact", "max_steps": "3"})
    assert options.artifact == str(tmp_path / "runs/net/artifact") and options.max_steps == 3
    for args, word in (({}, "artifact"), ({"artifact": "x", "max_step": "3"}, "max_steps")):
        with pytest.raises(ValueError, match=word):
            parse_robustness_options(args)


def test_an_artifact_that_cannot_be_attacked_is_refused_in_one_line(artifacts: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in artifacts["resnet"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps(card | {"method": "skipnet"}))
    for args, words in (
        ({"artifact": str(tmp_path / "nowhere")}, ["no such directory"]),
        ({"artifact": str(other)}, ["a skipnet", "robustness, nas_train or nas_search", "serve.app:model"]),
    ):
        with pytest.raises(click.UsageError) as caught:
            serve_robustness(args)
        assert all(word in caught.value.message for word in words) and "\n" not in caught.value.message
    assert serve_robustness({"artifact": str(artifacts["cells"])})._bound_deployment.name == "RobustnessServer"


# --- requests that nobody would think of -----------------------------------------------------------------------------


def untrained() -> AttackableNetwork:
    config = parse_config(RobustnessConfig, TINY_STUDY | {"network": "ensemble"})
    card = digits_network(nn.Identity()).card
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_network(config, 10, (1, 8, 8))
    return AttackableNetwork(card, network.eval(), genotypes(config))


schemathesis.openapi.format("base64-image", pictures("PNG").map(lambda body: base64.b64encode(body).decode()))
SHORT = LIMITS.model_copy(update={"max_steps": 11, "max_restarts": 2})
PAGE = schemathesis.openapi.from_asgi("/openapi.json", create_robustness_app(untrained(), SHORT, Metrics("r1")))
# What the page cannot say of a request that fits it otherwise.
UNSAID = ("not base64", "not a readable", "the body is empty", "cannot reach", "look like fractions")


@PAGE.parametrize()
@hypothesis_settings(
    max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
def test_odd_requests_get_the_answers_that_the_page_promises(case: Any) -> None:
    response = case.call()
    unsaid = response.status_code == 400 and any(words in response.text for words in UNSAID)
    case.validate_response(response, excluded_checks=[positive_data_acceptance] if unsaid else [])
