"""A cascade behind HTTP without Ray: early exit, preferences, versions, token, drift, strange pictures, fuzzing."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import PIL.Image
import pytest
import torch

from dataeff.core.artifact import Prediction
from serve.batching import Batcher, whole
from serve.cascade import Calibrated, early_exit
from serve.drift import DriftAlarm
from serve.http import create_app
from serve.human import HumanQueue
from serve.human_http import HumanDesk
from serve.limits import Limits, RequestError, Wishes
from serve.metrics import Metrics
from serve.models import ServedCascade
from serve.versions import Version, Versions, parse_versions
from tests.serve_fakes import CLASSES, STAGE_MACS, FakeCascade, FakePredictor, FakeStage, encoded, fake_cascade, picture

T = TypeVar("T")
PNG = {"Content-Type": "image/png"}
LIMITS = Limits(max_body_bytes=2_000_000, max_pixels=100_000, max_rows=8, max_queue=16, timeout_s=5)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return 0.15 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def served(cascade: FakeCascade, metrics: Metrics, version: str = "1") -> ServedCascade:
    def run(rows: torch.Tensor, thresholds: torch.Tensor) -> Prediction:
        prediction = early_exit(cascade, rows, thresholds)
        metrics.batch(prediction, cascade.costs[-1], version)
        model.observe(prediction, thresholds)
        return prediction

    batcher, alarm = Batcher(whole(run), 8, 0.002), DriftAlarm(cascade.calibrated, least=20)
    model = ServedCascade(cascade, batcher.predict, alarm=alarm)
    return model


async def app_of(
    cascades: Sequence[FakeCascade], weights: Sequence[float] = (1.0,), **options: Any
) -> tuple[Any, Versions]:
    metrics = Metrics("r1")
    table = {str(n): served(cascade, metrics, str(n)) for n, cascade in enumerate(cascades, 1)}

    async def load(name: str, source: Version) -> ServedCascade:
        return table[name]

    versions = Versions("fake", load)
    await versions.apply({name: Version(artifact=name, weight=w) for name, w in zip(table, weights, strict=True)})
    human = options.pop("queue", None)
    desk = HumanDesk(human, lambda: CLASSES, **options.pop("desk", {})) if human else None
    return create_app(versions, LIMITS, metrics, desk, **options), versions


def with_client(
    scenario: Callable[[httpx.AsyncClient], Awaitable[T]], cascades: Sequence[FakeCascade] = (), **options: Any
) -> T:
    async def main() -> T:
        app, _ = await app_of(cascades or [new_cascade()], **options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(main())


def new_cascade(thresholds: Sequence[float] = (0.3, 0.3), seed: int = 0, **options: Any) -> FakeCascade:
    return FakeCascade([FakeStage(number, seed) for number in range(3)], thresholds, **options)


def test_a_stage_sees_only_the_images_that_the_one_before_passed_on() -> None:
    cascade, rows = new_cascade(), images(64)
    prediction = cascade.predict(rows)
    alone = [FakeStage(number).predict(rows) for number in range(3)]
    unsure = [1 - answer.probabilities.amax(1).double() > 0.3 for answer in alone]
    expected = torch.where(~unsure[0], 0, torch.where(~unsure[1], 1, 2))
    assert len(expected.unique()) == 3, "every stage must answer some image, else this test shows nothing"
    assert prediction.stage.equal(expected)
    assert [stage.asked for stage in cascade.stages] == [64, int(unsure[0].sum()), int((unsure[0] & unsure[1]).sum())]
    for number, answer in enumerate(alone):
        torch.testing.assert_close(
            prediction.probabilities[expected == number], answer.probabilities[expected == number]
        )
    macs = torch.tensor(STAGE_MACS).cumsum(0)[expected] + torch.tensor([1.0, 2.0, 2.0])[expected]
    torch.testing.assert_close(prediction.macs, macs.double())


def test_weights_of_a_stage_that_nobody_reaches_may_be_nan() -> None:
    cascade = new_cascade((1.0, 1.0))
    cascade.stages[1].fails = cascade.stages[2].fails = True
    assert cascade.predict(images(4)).stage.tolist() == [0] * 4


def test_every_image_of_a_batch_has_thresholds_of_its_own() -> None:
    thresholds = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert early_exit(new_cascade(), images(3), thresholds).stage.tolist() == [0, 1, 2]


def test_the_answer_says_which_stage_how_sure_and_what_it_cost() -> None:
    async def scenario(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return [(await client.post("/predict", content=encoded(picture(n)), headers=PNG)).json() for n in range(12)]

    answers = with_client(scenario)
    for seed, answer in enumerate(answers):
        offline = new_cascade().predict(FakePredictor().preprocess([picture(seed)]))
        stage = int(offline.stage[0])
        assert (answer["stage"], answer["model"]) == (stage + 1, ["small", "medium", "large"][stage])
        assert answer["label"] == int(offline.probabilities[0].argmax())
        assert answer["macs"] == offline.macs[0].item()
        assert answer["relative_cost"] == answer["macs"] / STAGE_MACS[-1]
        assert [step["idk"] for step in answer["path"]] == [True] * stage + [False]
        assert answer["path"][0]["uncertainty"] == pytest.approx(offline.score[0, 0].item())
        assert answer["uncertainty"] == answer["path"][-1]["uncertainty"]
    assert len({answer["stage"] for answer in answers}) > 1


@pytest.mark.parametrize(
    "query, stage",
    [
        ("accuracy_goal=0.5", 1),
        ("accuracy_goal=0.95", 3),
        ("accuracy_goal=1", 3),
        ("cost_goal=0.06", 1),
        ("cost_goal=9", 3),
        ("accuracy_goal=0.95&max_stage=2", 2),
        ("accuracy_goal=0.95&budget=0.2", 2),
        ("accuracy_goal=0.95&budget=0.01", 1),
        ("accuracy_goal=0.95&budget=1", 3),
    ],
)
def test_a_request_may_choose_a_point_of_the_calibration_curve(query: str, stage: int) -> None:
    body = encoded(picture(3))
    answer = with_client(lambda client: client.post(f"/predict?{query}", content=body, headers=PNG)).json()
    assert answer["stage"] == stage


@pytest.mark.parametrize(
    "query, word",
    [
        ("accuracy_goal=0", "accuracy_goal"),
        ("accuracy_goal=nan", "accuracy_goal"),
        ("accuracy_goal=1.1", "accuracy_goal"),
        ("cost_goal=-1", "cost_goal"),
        ("cost_goal=inf", "cost_goal"),
        ("max_stage=4", "stages 1 to 3"),
        ("max_stage=0", "max_stage"),
        ("max_stage=1.5", "max_stage"),
        ("timeout_s=0", "timeout_s"),
        ("accuracy=0.9", "unknown query parameter"),
        ("allow_human=true", "unknown query parameter"),
    ],
)
def test_a_preference_out_of_range_is_refused(query: str, word: str) -> None:
    response = with_client(lambda client: client.post(f"/predict?{query}", content=encoded(picture(3)), headers=PNG))
    assert response.status_code == 400 and word in response.json()["error"]


def test_a_goal_needs_a_calibration_curve() -> None:
    cascade = new_cascade()
    cascade.curve = []
    with pytest.raises(RequestError, match="no calibration curve"):
        ServedCascade(cascade, predict=None).settings(Wishes(accuracy_goal=0.5))  # type: ignore[arg-type]


def test_tensors_carry_a_goal_for_each_image_and_come_back_with_stages() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    request = {
        "inputs": [
            {"name": "images", "datatype": "UINT8", "shape": [3, 3, 8, 8], "data": pixels.ravel().tolist()},
            {"name": "accuracy_goal", "datatype": "FP64", "shape": [3], "data": [0.5, 0.95, 0.95]},
            {"name": "budget", "datatype": "FP64", "shape": [3], "data": [1.0, 1.0, 0.2]},
        ]
    }
    answer = with_client(lambda client: client.post("/v2/models/fake/infer", json=request)).json()
    found = {output["name"]: output["data"] for output in answer["outputs"]}
    assert found["stage"] == [1, 3, 2]
    assert found["score"][1] == -1.0, "the second stage was not asked about the first image"
    assert found["macs"] == [101.0, 2502.0, 502.0]


def test_requests_are_split_between_versions_and_a_key_keeps_its_version() -> None:
    cascades = [new_cascade(seed=1), new_cascade(seed=2)]

    async def scenario(client: httpx.AsyncClient) -> None:
        async def version(**headers: str) -> str:
            response = await client.post("/predict", content=encoded(picture(0)), headers=PNG | headers)
            return str(response.json()["version"])

        seen = [await version() for _ in range(200)]
        assert 10 < seen.count("2") < 80, "a fifth of 200 requests is far from that"
        keys = {f"key-{number}": await version(**{"Idempotency-Key": f"key-{number}"}) for number in range(20)}
        assert set(keys.values()) == {"1", "2"}
        for key, chosen in keys.items():
            assert await version(**{"Idempotency-Key": key}) == chosen
        for name in ("1", "2"):
            asked = await client.post(f"/predict?version={name}", content=encoded(picture(0)), headers=PNG)
            offline = cascades[int(name) - 1].predict(FakePredictor().preprocess([picture(0)]))
            assert asked.json()["label"] == int(offline.probabilities[0].argmax())
        assert (await client.post("/predict?version=3", content=encoded(picture(0)), headers=PNG)).status_code == 404
        assert (await client.get("/v2/models/fake")).json()["versions"] == ["1", "2"]
        assert (await client.get("/v2/models/fake/versions/2/ready")).status_code == 200

    with_client(scenario, cascades, weights=(0.8, 0.2))


def test_a_swap_fails_no_request_and_a_broken_version_changes_nothing() -> None:
    async def main() -> None:
        metrics = Metrics("r1")

        async def load(name: str, source: Version) -> ServedCascade:
            await asyncio.sleep(0.05)
            return served(fake_cascade(source), metrics, name)

        versions = Versions("fake", load, linger_s=0.1)
        await versions.apply(parse_versions({"versions": {"1": {"artifact": "slow1"}}}))
        app = create_app(versions, LIMITS, metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answers: list[httpx.Response] = []
            stop = asyncio.Event()

            async def load_on() -> None:
                while not stop.is_set():
                    answers.append(await client.post("/predict", content=encoded(picture(0)), headers=PNG))

            clients = [asyncio.create_task(load_on()) for _ in range(4)]
            await asyncio.sleep(0.1)
            await versions.apply({"2": Version(artifact="slow2")})
            await asyncio.sleep(0.2)
            await versions.apply({"3": Version(artifact="missing")})
            assert list(versions) == ["2"] and "no such directory" in versions.failed["3"]
            await asyncio.sleep(0.1)
            stop.set()
            await asyncio.gather(*clients)
        assert {answer.status_code for answer in answers} == {200}
        seen = [answer.json()["version"] for answer in answers]
        assert set(seen) == {"1", "2"} and seen[-1] == "2"

    asyncio.run(main())


@pytest.mark.parametrize(
    "table, word",
    [
        ({}, "versions"),
        ({"versions": {}}, "versions"),
        ({"versions": {"1": {}}}, "artifact or stages"),
        ({"versions": {"1": {"artifact": "a", "weight": 0}}}, "weights"),
        ({"versions": {"1": {"artifact": "a", "weight": -1}}}, "-1"),
        ({"versions": {"1": {"artefact": "a"}}}, "artefact"),
    ],
)
def test_a_wrong_version_table_is_refused(table: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_versions(table)


def test_a_token_guards_everything_but_health_and_the_empty_pages() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/v2", "/v2/models/fake", "/metrics", "/stats"):
            response = await client.get(path)
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer"), path
            assert (await client.get(path, headers={"Authorization": "Bearer secret"})).status_code == 200, path
        wrong = PNG | {"Authorization": "Bearer secreT"}
        assert (await client.post("/predict", content=encoded(picture(0)), headers=wrong)).status_code == 401
        assert (await client.get("/v2/health/ready")).status_code == 200
        page = (await client.get("/")).text
        assert "fake" in page and CLASSES[0] not in page

    with_client(scenario, token="secret")


def test_logs_have_fields_and_no_image_content(caplog: pytest.LogCaptureFixture) -> None:
    body = encoded(picture(0))
    with caplog.at_level("INFO", "ray.serve"):
        with_client(lambda client: client.post("/predict", content=body, headers=PNG | {"X-Secret": "hush"}))
    (line,) = [record for record in caplog.records if record.getMessage() == "answered"]
    fields = line.__dict__
    assert (fields["endpoint"], fields["status"], fields["version"]) == ("predict", 200, "1")
    assert fields["milliseconds"] > 0 and fields["stage"] in (1, 2, 3) and fields["macs"] > 0
    assert "hush" not in str(fields) and repr(body[:20])[2:-1] not in str(fields)


def test_metrics_count_exits_and_idk_of_every_stage() -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[list[int], str]:
        answers = [await client.post("/predict", content=encoded(picture(n)), headers=PNG) for n in range(12)]
        return [answer.json()["stage"] for answer in answers], (await client.get("/metrics")).text

    stages, text = with_client(scenario)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for stage in (1, 2, 3):
        tags = f'{{replica="r1",stage="{stage}",version="1"}}'
        assert float(values[f"dataeff_exits_total{tags}"]) == stages.count(stage)
        assert float(values[f"dataeff_idk_total{tags}"]) == sum(found > stage for found in stages)
        assert float(values[f"dataeff_stage_images_total{tags}"]) == sum(found >= stage for found in stages)


CALIBRATED = Calibrated((0.5, 0.2), (0.6, 0.8), (0.3, 0.3))


def test_the_drift_alarm_hears_rates_and_entropies_and_not_chance() -> None:
    def answers(rates: tuple[float, float], mean: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        first = generator.random(600) < rates[0]
        second = first & (generator.random(600) < rates[1] / rates[0])
        entropy = np.stack([generator.normal(mean, 0.3, 600), generator.normal(0.8, 0.3, 600)], 1)
        entropy[~first, 1] = np.nan
        return np.stack([first, second], 1), entropy

    for seed in range(20):
        calm = DriftAlarm(CALIBRATED)
        calm.add(*answers((0.5, 0.2), 0.6, seed))
        assert not calm.alarm(), calm.check()
        for rates, mean in (((0.7, 0.2), 0.6), ((0.5, 0.45), 0.6), ((0.5, 0.2), 0.9), ((0.3, 0.2), 0.6)):
            loud = DriftAlarm(CALIBRATED)
            loud.add(*(part[:100] for part in answers(rates, mean, seed)))
            assert not loud.alarm(), "100 images are too few to tell"
            loud.add(*answers(rates, mean, seed))
            assert loud.alarm(), (rates, mean)


def test_drift_is_shown_and_leaves_requests_with_their_own_goal_out() -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[dict[str, Any], dict[str, Any]]:
        for number in range(30):
            await client.post("/predict?accuracy_goal=0.95", content=encoded(picture(number)), headers=PNG)
        before = (await client.get("/stats")).json()
        for number in range(30):
            await client.post("/predict", content=encoded(picture(number)), headers=PNG)
        return before, (await client.get("/stats")).json()

    # Rates of 0 and 0 with tight entropies: the fake's real rates are far from that.
    calibrated = Calibrated((0.0, 0.0), (0.0, 0.0), (0.01, 0.01))
    before, after = with_client(scenario, [new_cascade(calibrated=calibrated)])
    assert before["versions"]["1"]["drift"] is False
    assert before["versions"]["1"]["add_ons"][0]["idk_rate"]["now"] is None
    assert after["versions"]["1"]["drift"] is True
    assert after["versions"]["1"]["add_ons"][0]["idk_rate"]["now"] > 0.2


# A person behind the cascade.


def queue(folder: Path, **options: Any) -> HumanQueue:
    return HumanQueue(folder / "queue.db", **options)


HUMAN = (0.0, 0.0, -1.0)  # every image is passed on by every stage


def test_an_image_that_nobody_is_sure_of_becomes_a_ticket_and_a_retry_the_same_one(tmp_path: Path) -> None:
    body = encoded(picture(0))

    async def scenario(client: httpx.AsyncClient) -> None:
        headers = PNG | {"Idempotency-Key": "once"}
        first = await client.post("/predict", content=body, headers=headers)
        again = await client.post("/predict", content=body, headers=headers)
        assert (first.status_code, again.status_code) == (202, 202)
        ticket = first.json()["ticket"]
        assert again.json()["ticket"] == ticket and first.json()["provisional_label"] == first.json()["label"]
        other = await client.post("/predict", content=encoded(picture(1)), headers=headers)
        assert other.status_code == 409
        listed = (await client.get("/tickets")).json()
        assert [item["ticket"] for item in listed["tickets"]] == [ticket] and listed["counts"]["open"] == 1
        leased = (await client.post("/leases", json={"worker": "ada"})).json()
        assert leased["ticket"] == ticket and len(leased["path"]) == 3
        assert (await client.post("/leases", json={"worker": "bob"})).status_code == 204
        assert (await client.get(f"/tickets/{ticket}/image")).content == body
        stolen = await client.post(f"/tickets/{ticket}", json={"label": 2, "worker": "bob"})
        assert stolen.status_code == 409
        answered = (await client.post(f"/tickets/{ticket}", json={"label": 2, "worker": "ada"})).json()
        assert (answered["state"], answered["label"], answered["class"]) == ("answered", 2, CLASSES[2])
        assert (await client.get(f"/tickets/{ticket}")).json() == answered
        alone = await client.post("/predict?allow_human=false", content=body, headers=PNG)
        assert alone.status_code == 200 and "ticket" not in alone.json()
        assert "dataeff_tickets" in (await client.get("/metrics")).text
        assert "Which one" in (await client.get("/human")).text

    with_client(scenario, [new_cascade(HUMAN)], queue=queue(tmp_path))


@pytest.mark.parametrize(
    "path, body, status, word",
    [
        ("/leases", b"{", 400, "JSON"),
        ("/leases", b"{}", 400, "worker"),
        ("/leases", b'{"worker": ""}', 400, "worker"),
        ("/tickets/" + "0" * 32, b'{"label": 1}', 404, "no ticket"),
        ("/tickets/short", b'{"label": 1}', 400, "ticket"),
        ("/tickets/" + "0" * 32, b'{"label": 6}', 400, "0 to 5"),
        ("/tickets/" + "0" * 32, b'{"label": true}', 400, "label"),
        ("/tickets/" + "0" * 32, b'{"label": 1, "wroker": "x"}', 400, "wroker"),
    ],
)
def test_a_wrong_ticket_request_is_refused(path: str, body: bytes, status: int, word: str, tmp_path: Path) -> None:
    headers = {"Content-Type": "application/json"}
    response = with_client(
        lambda client: client.post(path, content=body, headers=headers),
        [new_cascade(HUMAN)],
        queue=queue(tmp_path),
    )
    assert response.status_code == status and word in response.json()["error"], response.text


def test_a_full_queue_gives_the_networks_answer_and_says_so(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/predict", content=encoded(picture(n)), headers=PNG) for n in range(3)]

    responses = with_client(scenario, [new_cascade(HUMAN)], queue=queue(tmp_path, max_open=2))
    assert [response.status_code for response in responses] == [202, 202, 200]
    assert responses[2].json()["degraded"] is True and "try again" in responses[2].json()["human"]


def test_a_webhook_goes_only_to_allowed_hosts_and_arrives(tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        heard.append((head.decode(), json.loads(await reader.readexactly(length))))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        app, _ = await app_of([new_cascade(HUMAN)], queue=queue(tmp_path), desk={"webhook_hosts": [host]})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for address in (
                "http://169.254.169.254/",
                f"ftp://{host}/",
                f"http://{host}@evil.example/",
                "http://[",
                "x",
            ):
                response = await client.post(
                    "/predict", params={"webhook": address}, content=encoded(picture(0)), headers=PNG
                )
                assert response.status_code == 400 and "hosts" in response.json()["error"], address
            asked = await client.post(
                "/predict", params={"webhook": f"http://{host}/done"}, content=encoded(picture(0)), headers=PNG
            )
            ticket = asked.json()["ticket"]
            await client.post(f"/tickets/{ticket}", json={"label": 4})
            async with asyncio.timeout(10):
                while not heard:
                    await asyncio.sleep(0.05)
        server.close()
        (head, body), *more = heard
        assert head.startswith("POST /done ") and (body["ticket"], body["label"]) == (ticket, 4) and not more

    asyncio.run(main())


# Pictures that somebody made to do harm, or that are merely unusual.


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """A picture that is stored lying on its side and says so."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    return saved(picture(5).transpose(PIL.Image.Transpose.ROTATE_90), "PNG", exif=exif)


def sixteen_bit() -> bytes:
    grey = np.asarray(picture(5).convert("L")).astype(np.uint16) * 257
    return saved(PIL.Image.fromarray(grey), "PNG")


AS_SHOWN: dict[str, tuple[Callable[[], bytes], Callable[[], PIL.Image.Image]]] = {
    "EXIF rotation": (rotated, lambda: picture(5)),
    "animated WebP": (
        lambda: saved(picture(5), "WEBP", save_all=True, append_images=[picture(6)], lossless=True),
        lambda: picture(5),
    ),
    "animated PNG": (lambda: saved(picture(5), "PNG", save_all=True, append_images=[picture(6)]), lambda: picture(5)),
    "palette": (
        lambda: saved(picture(5).quantize(16), "PNG"),
        lambda: picture(5).quantize(16).convert("RGB"),
    ),
    "1 x 1": (lambda: encoded(PIL.Image.new("RGB", (1, 1), "red")), lambda: PIL.Image.new("RGB", (8, 8), "red")),
    "20,000 x 1": (
        lambda: encoded(PIL.Image.new("RGB", (20_000, 1), "blue")),
        lambda: PIL.Image.new("RGB", (8, 8), "blue"),
    ),
}


@pytest.mark.parametrize("name", AS_SHOWN)
def test_an_unusual_picture_is_classified_as_a_viewer_shows_it(name: str) -> None:
    body, shown = (make() for make in AS_SHOWN[name])
    headers = {"Content-Type": "application/octet-stream"}
    answer = with_client(lambda client: client.post("/predict?max_stage=1", content=body, headers=headers))
    offline = FakeStage(0).predict(FakePredictor().preprocess([shown]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["probability"] == pytest.approx(offline.probabilities.max().item(), abs=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        saved(picture(5).convert("CMYK"), "JPEG"),
        sixteen_bit(),
        saved(picture(5).convert("1"), "PNG"),
        saved(picture(5).convert("LA"), "PNG"),
        saved(picture(5).convert("RGBA"), "PNG"),
        saved(PIL.Image.new("RGB", (1, 20_000)), "JPEG"),
        saved(picture(5), "JPEG", progressive=True),
    ],
    ids=["CMYK", "16 bits", "1 bit", "grey alpha", "alpha", "1 x 20,000", "progressive"],
)
def test_every_kind_of_picture_is_classified(body: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    assert with_client(lambda client: client.post("/predict", content=body, headers=headers)).status_code == 200


def test_a_cut_picture_is_refused_wherever_it_is_cut() -> None:
    bodies = [saved(picture(5), kind) for kind in ("PNG", "JPEG", "WEBP")]

    async def scenario(client: httpx.AsyncClient) -> None:
        for body in bodies:
            for end in range(0, len(body) - 8, max(1, len(body) // 20)):
                headers = {"Content-Type": "application/octet-stream"}
                response = await client.post("/predict", content=body[:end], headers=headers)
                assert response.status_code in (200, 400), (end, response.text)
                assert response.status_code == 400 or end > len(body) // 2

    with_client(scenario)


def test_a_strip_costs_no_more_memory_than_its_pixels() -> None:
    import tracemalloc

    body = encoded(PIL.Image.new("L", (100_000, 1)))
    tracemalloc.start()
    response = with_client(lambda client: client.post("/predict", content=body, headers=PNG))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 200 and peak < 20e6


def test_wishes_start_as_the_server_is_set() -> None:
    model = served(new_cascade((0.3, 0.2, 0.1)), Metrics("r1"))
    assert model.settings(Wishes()).tolist() == [0.3, 0.2, float("inf")]
    assert model.settings(Wishes(allow_human=True)).tolist() == [0.3, 0.2, 0.1]
    assert model.settings(Wishes(allow_human=True, max_stage=1)).tolist() == [float("inf")] * 3
