"""The labelling application without Ray, called in process: what it chooses, and labels that people send."""

import asyncio
import base64
import csv
import json
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import httpx
import numpy as np
import pytest

from dataeff.active.coreset import textbook_k_centre
from dataeff.active.initial import choose_pool
from dataeff.active.mc_dropout import McPrediction
from dataeff.active.scores import entropy, least_confidence, margin
from dataeff.core.run import replace_text
from dataeff.core.runtime import Runtime
from dataeff.data import label_file
from dataeff.data.label_file import Request, write_csv
from dataeff.data.labelling import Manifest
from ray_jobs.label import main
from ray_jobs.label_files import read_labels
from serve import labelling
from serve.app import labelling as serve_labelling
from serve.app import parse_labelling_options
from serve.labelling import create_labelling_app
from serve.limits import LabellingLimits
from serve.metrics import Metrics
from tests.active_helpers import config
from tests.serve_fakes import FakePredictor, encoded, picture
from tests.test_label import SMALL, photo

T = TypeVar("T")
Client = httpx.AsyncClient

CLASSES = ["dark", "bright", "grey"]
IMAGES = ["a b.png", "c,d.png", "é.png", "f.png"]
LIMITS = LabellingLimits(
    max_body_bytes=50_000, max_rows=4, max_pixels=5_000, max_values=500, max_classes=20, timeout_s=5
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A labelling that asks for four images; a fifth is answered."""
    manifest = Manifest(source="folder:x", files=["x.png"], count=10, check=[0], classes=CLASSES, size=8)
    (tmp_path / "labelling.json").write_text(manifest.model_dump_json())
    (tmp_path / "request.json").write_text(Request(cycle=1, images=IMAGES).model_dump_json())
    write_csv(tmp_path / "to_label.csv", [(image, "") for image in IMAGES])
    write_csv(tmp_path / "answers.csv", [("old.png", "grey")])
    return tmp_path


def with_client(folder: Path, scenario: Callable[[Client], Awaitable[T]], **settings: Any) -> T:
    async def run() -> T:
        app = create_labelling_app(folder, **({"limits": LIMITS, "metrics": Metrics("r1")} | settings))
        async with Client(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(run())


def post(folder: Path, path: str, body: Any, **settings: Any) -> httpx.Response:
    return with_client(folder, lambda client: client.post(path, json=body), **settings)


def get(folder: Path, path: str, **settings: Any) -> httpx.Response:
    return with_client(folder, lambda client: client.get(path), **settings)


def answered(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]
    assert "\n" not in response.json()["error"]


def rows_of(folder: Path) -> dict[str, str]:
    with (folder / "to_label.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["label"] for row in csv.DictReader(file)}


def probabilities(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])


# --- which images next -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "score"),
    [
        ({"strategy": "lc"}, least_confidence),
        ({"strategy": "me"}, entropy),
        ({"strategy": "mm"}, margin),
        ({"strategy": "dbal"}, lambda p: entropy(p.mean(0))),
        ({"strategy": "dbal", "dbal_score": "bald"}, lambda p: McPrediction.from_passes(p).mutual_information),
        ({"strategy": "ens_me"}, lambda p: entropy(p.mean(0))),
    ],
)
def test_uncertain_images_are_chosen_as_the_scores_say_and_labelled_ones_never(
    folder: Path, more: dict[str, Any], score: Callable[[np.ndarray], np.ndarray]
) -> None:
    p = probabilities(4, 12, 3) if more["strategy"] in ("dbal", "ens_me") else probabilities(12, 3)
    best = np.argsort(-score(p))
    labelled = sorted(best[[0, 2]].tolist())
    found = answered(post(folder, "/select", {"k": 3, "labelled": labelled, "probabilities": p.tolist()} | more))
    assert found["indices"] == best[[1, 3, 4]].tolist()
    assert found["scores"] == pytest.approx(score(p)[best[[1, 3, 4]]])
    assert found["strategy"] == more["strategy"]


def test_coreset_is_the_textbooks_and_an_infinite_first_score_is_null(folder: Path) -> None:
    features, labelled = np.random.default_rng(0).normal(size=(30, 4)), [3, 8]
    left = np.setdiff1d(np.arange(30), labelled)
    rows, distances = textbook_k_centre(features[left], 5, np.arange(28), features[labelled])
    body = {"strategy": "coreset", "k": 5, "features": features.tolist()}
    found = answered(post(folder, "/select", body | {"labelled": labelled}))
    assert found["indices"] == left[rows].tolist() and found["scores"] == pytest.approx(distances)
    scores = answered(post(folder, "/select", body))["scores"]
    assert scores[0] is None and all(score > 0 for score in scores[1:])


def test_random_follows_the_seed_and_takes_what_is_left(folder: Path) -> None:
    body = {"strategy": "random", "k": 5, "count": 12, "labelled": [0, 1, 1]}
    same, again, other = (answered(post(folder, "/select", body | {"seed": seed}))["indices"] for seed in (1, 1, 2))
    assert same == again != other and len(set(same)) == 5 and not {0, 1} & set(same)
    everything = answered(post(folder, "/select", body | {"k": 100}))["indices"]
    assert sorted(everything) == list(range(2, 12))
    assert answered(post(folder, "/select", body | {"labelled": list(range(12))}))["indices"] == []


def test_images_are_chosen_by_what_the_network_says_of_them(folder: Path) -> None:
    predictor, pictures = FakePredictor(), [picture(seed) for seed in range(4)]
    p = predictor.predict(predictor.preprocess(pictures)).probabilities.double().numpy()
    images = [base64.b64encode(encoded(image, "PNG")).decode() for image in pictures]
    body = {"strategy": "lc", "k": 2, "images": images}
    found = answered(post(folder, "/select", body, predictor=predictor))
    assert found["indices"] == np.argsort(-least_confidence(p))[:2].tolist()
    refused(post(folder, "/select", body), 400, "artifact=DIR")
    refused(post(folder, "/select", body | {"images": images * 2}, predictor=predictor), 400, "8 images")
    few = LIMITS.model_copy(update={"max_pixels": 2 * pictures[0].width * pictures[0].height})
    refused(post(folder, "/select", body, predictor=predictor, limits=few), 413, "pixels")
    damaged = [images[0], base64.b64encode(b"no image").decode()]
    refused(post(folder, "/select", body | {"images": damaged}, predictor=predictor), 400, "image 1", "not a readable")
    refused(post(folder, "/select", body | {"images": ["?"]}, predictor=predictor), 400, "image 0: not base64")


GOOD = [[0.5, 0.5], [0.9, 0.1]]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"probabilities": [[0.5, 0.5], [0.9, 0.3]]}, 400, ["image 1", "1 in sum"]),
        ({"probabilities": [[0.5, 0.5], [1.5, -0.5]]}, 400, ["image 1", "not negative"]),
        ({"probabilities": [GOOD, [[0.5, 0.5], [0.5, 0.6]]], "strategy": "dbal"}, 400, ["image 1"]),
        ({"probabilities": [[0.5, 0.5], [1.0]]}, 400, ["different lengths"]),
        ({"probabilities": [[1.0], [1.0]]}, 400, ["1 classes", "2 to 20"]),
        ({"probabilities": [[0.04] * 25]}, 400, ["25 classes"]),
        ({"probabilities": [[0.5, 0.5]] * 251}, 413, ["502 numbers", "500"]),
        ({"probabilities": []}, 400, ["no numbers"]),
        ({"probabilities": [["0.5", "0.5"]]}, 400, ["probabilities"]),
        ({"probabilities": [[10**400, 1]]}, 400, ["probabilities"]),
        ({"probabilities": [GOOD]}, 400, ["[N][K]"]),
        ({"probabilities": GOOD, "strategy": "dbal"}, 400, ["[T][N][K]"]),
        ({"probabilities": [GOOD], "strategy": "ens_varr"}, 400, ["ens_varr", "at least 2"]),
        ({"features": GOOD}, 400, ["'me' needs probabilities or images, not features"]),
        ({"probabilities": GOOD, "strategy": "coreset"}, 400, ["'coreset' needs features"]),
        ({"probabilities": GOOD, "features": GOOD}, 400, ["probabilities and features"]),
        ({}, 400, ["not nothing"]),
        ({"features": [[1e16, 0.0]], "strategy": "coreset"}, 400, ["row 0", "1e+15"]),
        ({"probabilities": GOOD, "labelled": [2]}, 400, ["index 2 with 2 images"]),
        ({"probabilities": GOOD, "labelled": [-1]}, 400, ["labelled"]),
        ({"probabilities": GOOD, "k": 0}, 400, ["k"]),
        ({"probabilities": GOOD, "k": True}, 400, ["k"]),
        ({"probabilities": GOOD, "k": 10_001}, 400, ["10000"]),
        ({"probabilities": GOOD, "strategy": "vaal"}, 400, ["strategy", "'coreset'"]),
        ({"probabilities": GOOD, "sed": 1}, 400, ["sed"]),
    ],
)
def test_a_wrong_selection_gets_one_sentence(folder: Path, body: dict[str, Any], status: int, words: list[str]) -> None:
    refused(post(folder, "/select", {"strategy": "me", "k": 1} | body), status, *words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(folder: Path, number: str) -> None:
    for name, strategy in (("probabilities", "me"), ("features", "coreset")):
        text = f'{{"strategy": "{strategy}", "k": 1, "{name}": [[0.5, 0.5], [{number}, 1]]}}'
        ask = partial(Client.post, url="/select", content=text, headers={"Content-Type": "application/json"})
        response = with_client(folder, ask)
        refused(response, 400, name, "finite")


def test_a_million_wrong_numbers_are_one_error(folder: Path) -> None:
    limits = LIMITS.model_copy(update={"max_body_bytes": 2**24})
    counts: list[int] = []

    async def scenario(client: Client) -> httpx.Response:
        return await client.post("/select", json={"strategy": "me", "k": 1, "probabilities": [[""] * 300_000]})

    real = labelling.handle_errors

    def counting(app: Any) -> None:
        real(app)
        handlers = app.exception_handlers
        kind = next(key for key in handlers if getattr(key, "__name__", "") == "RequestValidationError")
        before = handlers[kind]

        async def count(request: Any, error: Any) -> Any:
            counts.append(len(error.errors()))
            return await before(request, error)

        handlers[kind] = count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "handle_errors", counting)
        refused(with_client(folder, scenario, limits=limits), 400, "probabilities")
    assert counts and counts[0] < 5


# --- which images first ----------------------------------------------------------------------------------------------


def test_a_random_pool_is_the_one_that_a_run_of_that_seed_begins_with(folder: Path) -> None:
    class Images:
        def __len__(self) -> int:
            return 40

    run, _ = choose_pool(config(pool="random", budget=7, seed=5), Images(), 3, "-", Runtime("cpu"))  # type: ignore[arg-type]
    body = {"strategy": "random", "budget": 7, "count": 40, "seed": 5}
    assert answered(post(folder, "/initial_pool", body)) == {"indices": run.tolist()}


def test_a_kmeans_pool_takes_as_many_of_every_cluster_or_in_proportion(folder: Path) -> None:
    rng = np.random.default_rng(0)
    cluster = np.repeat([0, 1, 2], [40, 10, 10])
    features = np.array([[0.0, 0], [9, 0], [0, 9]])[cluster] + rng.normal(0, 0.1, (60, 2))
    body = {"strategy": "kmeans", "budget": 6, "features": features.tolist()}
    equal = answered(post(folder, "/initial_pool", body))["indices"]  # as many clusters as the labelling has classes
    assert np.bincount(cluster[equal]).tolist() == [2, 2, 2]
    shares = answered(post(folder, "/initial_pool", body | {"allocation": "proportional", "n_clusters": 3}))["indices"]
    assert np.bincount(cluster[shares]).tolist() == [4, 1, 1] and len(set(shares)) == 6


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"count": 5}, 400, ["budget = 6 with 5 unlabelled images"]),
        ({"count": 501}, 413, ["501", "500"]),
        ({}, 400, ["'random' needs count"]),
        ({"count": 9, "features": [[1.0]] * 9}, 400, ["no features"]),
        ({"strategy": "kmeans", "count": 9}, 400, ["'kmeans' needs features"]),
        ({"strategy": "kmeans", "features": [[1.0], [2.0]]}, 400, ["n_clusters = 3", "1 to 2"]),
        ({"strategy": "kmeans", "features": [[1.0]] * 9, "n_clusters": 21}, 413, ["21 clusters"]),
        ({"strategy": "kmeans", "features": [[1.0]] * 400, "n_clusters": 20}, 413, ["400 numbers for 20 clusters"]),
        ({"strategy": "kmeans", "features": [1.0, 2.0]}, 400, ["features"]),
        ({"strategy": "vae", "count": 9}, 400, ["strategy"]),
    ],
)
def test_a_wrong_pool_gets_one_sentence(folder: Path, body: dict[str, Any], status: int, words: list[str]) -> None:
    refused(post(folder, "/initial_pool", {"strategy": "random", "budget": 6} | body), status, *words)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_fill_in_the_csv_and_again_change_nothing(folder: Path) -> None:
    found = answered(get(folder, "/request"))
    assert found == {"cycle": 1, "images": IMAGES, "classes": CLASSES, "labels": {}}
    labels = {"c,d.png": "DARK", "é.png": " bright "}
    assert answered(post(folder, "/label", {"labels": labels})) == {"missing": 2}
    assert rows_of(folder) == {"a b.png": "", "c,d.png": "dark", "é.png": "bright", "f.png": ""}
    assert answered(get(folder, "/request"))["labels"] == {"c,d.png": "dark", "é.png": "bright"}
    before = (folder / "to_label.csv").stat()
    assert answered(post(folder, "/label", {"labels": labels | {"old.png": "grey"}})) == {"missing": 2}
    assert (folder / "to_label.csv").stat().st_ino == before.st_ino, "the file was not written again"
    assert answered(post(folder, "/label", {"labels": {"a b.png": "grey", "f.png": "dark"}})) == {"missing": 0}
    taken = read_labels(folder / "to_label.csv", IMAGES, CLASSES, {})
    assert taken == {"a b.png": "grey", "c,d.png": "dark", "é.png": "bright", "f.png": "dark"}


@pytest.mark.parametrize(
    ("labels", "status", "words"),
    [
        ({"f.png": "brigt"}, 400, ["'brigt' of 'f.png'", "did you mean 'bright'"]),
        ({"g.png": "dark"}, 400, ["'g.png' was not asked for"]),
        ({"old.png": "dark"}, 409, ["'old.png' was labelled 'grey' before"]),
        ({"a b.png": "bright"}, 409, ["'a b.png' was labelled 'dark' before"]),
        ({"f.png": ""}, 400, ["f.png"]),
        ({"f.png": 1}, 400, ["f.png"]),
    ],
)
def test_a_wrong_label_names_its_image_and_nothing_is_taken(
    folder: Path, labels: dict[str, Any], status: int, words: list[str]
) -> None:
    answered(post(folder, "/label", {"labels": {"a b.png": "dark"}}))
    before = (folder / "to_label.csv").read_bytes()
    refused(post(folder, "/label", {"labels": {"c,d.png": "dark"} | labels}), status, *words)
    assert (folder / "to_label.csv").read_bytes() == before


def test_what_a_person_wrote_into_the_file_stays(folder: Path) -> None:
    lines = ["Image;remark;Label", "a b.png;blurred;bright", "f.png;?;", "é.png"]
    (folder / "to_label.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert answered(post(folder, "/label", {"labels": {"c,d.png": "grey", "é.png": "dark"}})) == {"missing": 1}
    written = (folder / "to_label.csv").read_text(encoding="utf-8").splitlines()
    assert written == [*lines[:3], "é.png;;dark", "c,d.png;;grey"]
    refused(post(folder, "/label", {"labels": {"a b.png": "dark"}}), 409, "'a b.png' was labelled 'bright' before")


def test_a_file_that_cannot_be_read_is_left_to_its_owner(folder: Path) -> None:
    (folder / "to_label.csv").write_text("file,class\n")
    refused(post(folder, "/label", {"labels": {"f.png": "dark"}}), 409, "no column image and label")
    refused(get(folder, "/request"), 409, "no column image and label")
    assert (folder / "to_label.csv").read_text() == "file,class\n"
    (folder / "to_label.csv").unlink()  # people may keep theirs elsewhere
    assert answered(post(folder, "/label", {"labels": {"f.png": "dark"}})) == {"missing": 3}
    assert rows_of(folder) == dict.fromkeys(IMAGES, "") | {"f.png": "dark"}


def test_nothing_is_asked_between_two_requests(folder: Path) -> None:
    (folder / "request.json").unlink()
    assert answered(get(folder, "/request")) == {"cycle": None, "images": [], "classes": CLASSES, "labels": {}}
    refused(post(folder, "/label", {"labels": {"f.png": "dark"}}), 400, "'f.png' was not asked for")
    assert answered(post(folder, "/label", {"labels": {"old.png": "grey"}})) == {"missing": 0}


def test_requests_at_once_lose_no_label(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.png" for number in range(24)]
    (folder / "request.json").write_text(Request(cycle=1, images=names).model_dump_json())
    write_csv(folder / "to_label.csv", [(name, "") for name in names])
    real = label_file.LabelTable.fill_in

    def slow(table: Any, labels: Any) -> Any:
        threading.Event().wait(0.01)  # time for another to read what this one is about to replace
        return real(table, labels)

    monkeypatch.setattr(label_file.LabelTable, "fill_in", slow)

    async def scenario(client: Client) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/label", json={"labels": {name: "dark"}}) for name in names))

    missing = sorted(answered(response)["missing"] for response in with_client(folder, scenario))
    assert missing == list(range(24)) and set(rows_of(folder).values()) == {"dark"}


def test_a_label_is_on_disk_before_it_is_answered_and_a_failed_write_keeps_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(label_file, "replace_text", lambda path, text, durable=False: synced.append(durable))
    answered(post(folder, "/label", {"labels": {"f.png": "dark"}}))
    assert synced == [True]
    before, flushed = (folder / "to_label.csv").read_bytes(), []

    def full(handle: int) -> None:
        flushed.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_file, "replace_text", replace_text)
    monkeypatch.setattr("dataeff.core.run.os.fsync", full)
    refused(post(folder, "/label", {"labels": {"f.png": "dark"}}), 500, "the server failed")
    assert flushed and (folder / "to_label.csv").read_bytes() == before


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_token_guards_all_but_health(folder: Path) -> None:
    for path in ("/request", "/curve", "/metrics"):
        refused(get(folder, path, token="secret"), 401, "bearer token")
        headers = {"Authorization": "Bearer secret"}
        assert with_client(folder, partial(Client.get, url=path, headers=headers), token="secret").status_code == 200
    for path in ("/label", "/select", "/initial_pool"):
        assert post(folder, path, {}, token="secret").status_code == 401
    assert answered(get(folder, "/v2/health/live", token="secret")) == {"live": True}
    assert answered(get(folder, "/v2/health/ready", token="secret")) == {"ready": True}


def test_a_large_body_is_refused_as_too_large(folder: Path) -> None:
    refused(post(folder, "/label", {"labels": {"f.png": "x" * 60_000}}), 413, "50000 bytes")


def test_slow_work_ends_in_504_and_others_are_answered_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(*arguments: Any) -> dict[str, Any]:
        release.wait(10)
        return {}

    monkeypatch.setattr(labelling, "select", slow)

    async def scenario(client: Client) -> tuple[httpx.Response, httpx.Response]:
        body = {"strategy": "random", "k": 1, "count": 2}
        waiting = asyncio.create_task(client.post("/select", json=body))
        await asyncio.sleep(0.05)
        other = await client.get("/request")
        try:
            return await waiting, other
        finally:
            release.set()

    limits = LIMITS.model_copy(update={"timeout_s": 0.5})
    late, other = with_client(folder, scenario, limits=limits)
    refused(late, 504, "0.5 seconds")
    assert answered(other)["cycle"] == 1


def test_the_page_shows_every_route_and_400_in_place_of_422(folder: Path) -> None:
    page = answered(get(folder, "/openapi.json"))
    wanted = {"/select", "/initial_pool", "/request", "/label", "/curve", "/metrics"}
    assert wanted <= set(page["paths"])
    answers = page["paths"]["/label"]["post"]["responses"]
    assert {"200", "400", "409", "413", "503", "504"} <= set(answers) and "422" not in answers
    assert "HTTPValidationError" not in page["components"]["schemas"]
    assert page["components"]["schemas"]["Selected"]["required"] == ["indices", "scores", "strategy"]


def test_the_arguments_are_checked_and_folders_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_labelling_options({"out": "runs/pets", "timeout_s": "3"})
    assert options.out == str(tmp_path / "runs/pets") and options.artifact == "" and options.timeout_s == 3
    with pytest.raises(ValueError, match="out"):
        parse_labelling_options({})
    with pytest.raises(ValueError, match="max_batch"):
        parse_labelling_options({"out": "x", "max_batch": "3"})


def test_a_folder_without_a_labelling_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    for args, message in (
        ({"out": str(tmp_path / "nowhere")}, "begin with python -m ray_jobs.label"),
        ({"out": str(folder), "artifact": str(folder)}, "artifact/ folder of a finished run"),
    ):
        with pytest.raises(click.UsageError, match=message) as caught:
            serve_labelling(args)
        assert "\n" not in caught.value.message
    assert serve_labelling({"out": str(folder), "replicas": "2"})._bound_deployment.name == "LabellingServer"


def test_a_labelling_goes_on_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Request, half of the labels, the rest, a trained network, the next request."""
    monkeypatch.setattr("dataeff.core.run.plot_curves", lambda rows, path: None)
    truth = {}
    (tmp_path / "photos").mkdir()
    for number in range(40):
        image, truth[f"{number:02d}.png"] = photo(number)
        image.save(tmp_path / "photos" / f"{number:02d}.png")
    out = tmp_path / "out"
    arguments = ["--data", f"folder:{tmp_path / 'photos'}", "--classes", "dark,bright", "--out", str(out)]
    arguments += ["--budget", "8", "--check", "6", "--query", "mm", *SMALL]
    main(arguments)
    request = answered(get(out, "/request"))
    names = request["images"]
    assert request["cycle"] == 0 and len(names) == 14 and answered(get(out, "/curve")) == []
    labels = {name: truth[name] for name in names}
    half = dict(list(labels.items())[:7])
    assert answered(post(out, "/label", {"labels": half})) == {"missing": 7}
    assert answered(post(out, "/label", {"labels": labels})) == {"missing": 0}
    late = threading.Thread(target=label_file.add_labels, args=(out, half))

    def read_meanwhile(*given: Any) -> Any:
        late.start()
        late.join(0.2)
        assert late.is_alive(), "labels wait while a request is taken"
        return read_labels(*given)

    monkeypatch.setattr("ray_jobs.label.read_labels", read_meanwhile)
    main(arguments)
    late.join()
    (row,) = answered(get(out, "/curve"))
    assert row["cycle"] == 0 and row["n_labelled"] == 8 and 0 <= row["test_accuracy"] <= 1
    following = answered(get(out, "/request"))
    assert following["cycle"] == 1 and len(following["images"]) == 8 and not set(following["images"]) & set(names)
    assert answered(post(out, "/label", {"labels": half})) == {"missing": 8}, "a late retry changes nothing"
    assert json.loads((out / "request.json").read_text())["images"] == following["images"]
