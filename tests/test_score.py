"""python -m ray_jobs.score: a table of answers, the same as the network's own, whatever happens on the way."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import dataeff
from dataeff.data import Preprocess, open_splits
from dataeff.data.scores import Scores, ScoreTable, write_scores
from ray_jobs.score import PartsFolder, main, plan_parts
from tests.ray_helpers import running, wait_until

STAGE = {"iterations": 20, "batch": 32, "lr": 0.1}
SETTINGS = {"arm": "base", "gate": "none", "depth": 8, "widths": [2, 3, 4], "augment": "none", "stage1": STAGE}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("score") / "net"
    dataeff.train("skipnet", "digits", out, SETTINGS, report=lambda row, total: None)
    return out / "artifact"


def arguments(artifact: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "ray_jobs.score", str(artifact), "--data", "digits", "--out", str(out), *more]


def assert_answers(path: Path, artifact: Path) -> None:
    """The table holds the predictor's answers to every image of every split, in order."""
    predictor, splits, table = dataeff.load(artifact), open_splits("digits"), ScoreTable(path)
    preprocess = Preprocess.from_dict(predictor.card.preprocess)
    for split in ("train", "val", "test"):
        source = getattr(splits, split)
        scores = table.read(split)
        assert scores.indices.tolist() == list(range(len(source)))
        assert (scores.labels == source.labels).all()
        own = predictor.predict(preprocess(source.images(np.arange(len(source)))))
        assert torch.allclose(torch.from_numpy(scores.probabilities), own.probabilities, atol=1e-5)
        assert scores.macs.tolist() == own.macs.tolist()
    assert table.about["classes"] == [str(digit) for digit in range(10)]
    assert table.about["full_macs"] == predictor.card.cost["full_macs"]


@pytest.mark.ray
def test_a_killed_job_goes_on_and_the_table_holds_the_networks_answers(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    more = ("--part", "150", "--workers", "1")
    parts = tmp_path / "scores.parquet.parts"
    with running(arguments(artifact, out, *more)) as command:
        wait_until(lambda: len(list(parts.glob("*.parquet"))) >= 1, command)
        command.clean_up()
    assert not out.exists()
    with pytest.raises(FileExistsError, match="go on with --resume"):
        main(arguments(artifact, out, *more)[2:])
    with pytest.raises(ValueError, match="another artifact, data set or --part"):
        main(arguments(artifact, out, "--part", "100", "--resume")[2:])
    with running(arguments(artifact, out, *more, "--resume")) as command:
        command.finish()
        first = next(line for line in command.stderr.splitlines() if " images  " in line)
        assert int(first.split()[0].split("/")[1]) < 1797
    assert not parts.exists()
    assert_answers(out, artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--part", "0"], "--part 0: must be at least 1"),
        (["--gpus", "-1"], "--gpus -1"),
        (["--data", "digitz"], "did you mean 'digits'"),
        (["--data", "letters"], "has classes"),
    ],
)
def test_mistakes_are_named_before_a_cluster_is_asked(
    artifact: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main([*arguments(artifact, tmp_path / "out.parquet")[2:], *changes])


def test_an_existing_file_is_not_replaced_unasked(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        main(arguments(artifact, tmp_path / "out.parquet")[2:])
    with pytest.raises(ValueError, match="is a folder"):
        main(arguments(artifact, tmp_path)[2:])


def test_parts_cover_every_image_once_and_in_order() -> None:
    splits = open_splits("digits")
    plan = plan_parts(splits, ["test", "val"], 100)
    assert [name for name, _, _ in plan] == ["val"] * 2 + ["test"] * 6
    assert plan[2:4] == [("test", 0, 100), ("test", 100, 200)] and plan[-1] == ("test", 500, 540)


def answers(count: int, first: int = 0) -> Scores:
    values = torch.rand(count, 3, generator=torch.Generator().manual_seed(first)).softmax(1).numpy()
    return Scores(values, np.arange(count) % 3, np.arange(first, first + count), np.ones(count))


def test_parts_are_joined_in_the_order_of_the_images(tmp_path: Path) -> None:
    folder = PartsFolder(tmp_path / "out.parquet", {"a": 1}, resume=False)
    for number in (1, 0):
        folder.write(number, answers(10, 10 * number).table("test"))
    assert folder.join(tmp_path / "out.parquet", 2) == 20
    assert pq.read_table(tmp_path / "out.parquet")["index"].to_pylist() == list(range(20))


def test_a_table_is_read_in_chunks_of_any_size_and_by_index(tmp_path: Path) -> None:
    whole = answers(1000)
    write_scores(tmp_path / "t.parquet", {"val": answers(7, 5000), "test": whole})
    table = ScoreTable(tmp_path / "t.parquet")
    chunks = list(table.chunks("test", 64))
    assert [len(chunk) for chunk in chunks] == [64] * 15 + [40]
    assert np.concatenate([chunk.probabilities for chunk in chunks]).tolist() == whole.probabilities.tolist()
    some = table.read("test", np.array([3, 500, 999]))
    assert some.indices.tolist() == [3, 500, 999]
    with pytest.raises(ValueError, match="no rows of split 'train'"):
        table.read("train")


def test_a_table_of_another_program_needs_probabilities_and_labels_only(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"probabilities": [[0.2, 0.8], [0.5, 0.5]], "label": [1, 0]}), tmp_path / "t.parquet")
    scores = ScoreTable(tmp_path / "t.parquet").read("test")
    assert scores.probabilities.tolist() == np.float32([[0.2, 0.8], [0.5, 0.5]]).tolist()
    assert scores.indices.tolist() == [0, 1] and np.isnan(scores.macs).all()
    pq.write_table(pa.table({"probabilities": [[0.2, 0.8], [1.0]], "label": [1, 0]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="differ in length"):
        ScoreTable(tmp_path / "bad.parquet").read("test")
    pq.write_table(pa.table({"label": [1, 0]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no column probabilities"):
        ScoreTable(tmp_path / "none.parquet")
