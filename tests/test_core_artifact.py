"""An artifact is whole or refused, and nothing in it is ever executed."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

import dataeff
from dataeff.core import registry
from dataeff.core.artifact import (
    CARD,
    SCHEMA_VERSION,
    SETTINGS,
    WEIGHTS,
    Artifact,
    Card,
    _sha256,
    read_artifact,
    save_artifact,
    versions,
)
from dataeff.core.config import ExperimentConfig

STATE = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "steps": torch.tensor(7)}


class FakeConfig(ExperimentConfig):
    width: int = Field(4, ge=1)


class FakeMethod:
    """Enough of a method for `dataeff.load`."""

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> tuple[Artifact, str]:
        return artifact, device


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "method": "fake",
        "classes": ["zero", "one"],
        "input_shape": (1, 8, 8),
        "preprocess": {"mean": [0.5]},
        "metrics": {"accuracy": 0.75},
        "cost": {"macs": 10.0, "full_macs": 20.0, "params": 6.0},
        "data": {"name": "digits", "fingerprint": "abc"},
        "versions": versions(),
    }
    return Card(**(values | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", card(), FakeConfig(width=9), STATE)
    return tmp_path / "artifact"


def edit_card(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(values | changes))


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_artifact(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_an_artifact_comes_back_as_it_was_saved(folder: Path) -> None:
    artifact = read_artifact(folder)
    assert artifact.config == {"seed": 0, "width": 9}
    assert artifact.card.model_copy(update={"files": {}}) == card()
    assert artifact.state.keys() == STATE.keys()
    assert all(torch.equal(artifact.state[name], tensor) for name, tensor in STATE.items())


def test_an_artifact_is_three_plain_files_and_nothing_is_left_beside_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD, SETTINGS, WEIGHTS])
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_saving_again_replaces_the_older_artifact(folder: Path) -> None:
    (folder / "old.txt").write_text("left over")
    save_artifact(folder, card(), FakeConfig(width=2), {"weight": torch.zeros(1)})
    assert read_artifact(folder).config["width"] == 2
    assert not (folder / "old.txt").exists()


def test_a_failed_save_leaves_the_older_artifact_in_place(folder: Path) -> None:
    with pytest.raises(AttributeError):
        save_artifact(folder, card(), FakeConfig(), {"weight": "no tensor"})  # type: ignore[dict-item]
    assert read_artifact(folder).config["width"] == 9
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_a_view_of_a_tensor_is_saved_with_its_own_values(tmp_path: Path) -> None:
    view = torch.arange(12.0).reshape(3, 4).t()
    save_artifact(tmp_path / "a", card(), FakeConfig(), {"view": view})
    assert torch.equal(read_artifact(tmp_path / "a").state["view"], view)


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: no such directory"):
        read_artifact(tmp_path / "gone")


@pytest.mark.parametrize("name", [CARD, SETTINGS, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} missing"):
        read_artifact(folder)


@pytest.mark.parametrize("name", [SETTINGS, WEIGHTS])
def test_a_truncated_file_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    assert f"{name} is not the file that was exported" in refused(folder)


def test_a_truncated_card_is_refused(folder: Path) -> None:
    content = (folder / CARD).read_bytes()
    (folder / CARD).write_bytes(content[: len(content) // 2])
    assert f"{CARD} is not valid JSON" in refused(folder)


def test_an_edited_setting_is_refused(folder: Path) -> None:
    text = (folder / SETTINGS).read_text()
    (folder / SETTINGS).write_text(text.replace("9", "8"))
    assert f"{SETTINGS} is not the file that was exported" in refused(folder)


def test_one_changed_bit_of_the_weights_is_refused(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS} is not the file that was exported" in refused(folder)


def test_a_card_without_checksums_is_refused(folder: Path) -> None:
    edit_card(folder, files={})
    assert "is not the file that was exported" in refused(folder)


@pytest.mark.parametrize("content", ["{}", "[]", '"text"', '{"format": "other.model", "schema_version": 1}'])
def test_a_card_of_another_program_is_refused(folder: Path, content: str) -> None:
    (folder / CARD).write_text(content)
    assert "was not written by dataeff" in refused(folder)


def test_a_card_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / CARD).write_bytes(b"\x80\x04\xff")
    assert "is not valid JSON" in refused(folder)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, "1", None])
def test_a_newer_or_unreadable_schema_asks_for_an_upgrade(folder: Path, version: object) -> None:
    edit_card(folder, schema_version=version)
    text = refused(folder)
    assert f"schema version {version!r}" in text and f"reads up to {SCHEMA_VERSION}" in text and "upgrade" in text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"classes": []}, "classes = []"),
        ({"input_shape": [1, 8]}, "input_shape"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_card_with_wrong_values_is_refused_by_field(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    edit_card(folder, **changes)
    assert complaint in refused(folder)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("checksum", ["old", "forged"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_place_of_the_weights_is_never_loaded(
    folder: Path, tmp_path: Path, form: str, checksum: str
) -> None:
    mark = tmp_path / "executed"
    if form == "pickle":
        (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(str(mark))))
    else:
        torch.save(Bomb(str(mark)), folder / WEIGHTS)
        assert zipfile.is_zipfile(folder / WEIGHTS)
    if checksum == "forged":
        edit_card(folder, files={name: _sha256(folder / name) for name in (WEIGHTS, SETTINGS)})
    refused(folder)
    assert not mark.exists()
    if form == "pickle":
        pickle.loads((folder / WEIGHTS).read_bytes())
        assert mark.exists()  # the file would have done harm


def test_an_executable_yaml_tag_in_the_settings_is_refused(folder: Path) -> None:
    (folder / SETTINGS).write_text("width: !!python/object/apply:os.getcwd []\n")
    edit_card(folder, files={name: _sha256(folder / name) for name in (WEIGHTS, SETTINGS)})
    with pytest.raises(ValueError, match="not valid YAML"):
        read_artifact(folder)


def test_loading_hands_the_checked_artifact_to_its_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get_method", {"fake": FakeMethod}.__getitem__)
    artifact, device = dataeff.load(folder, device="cpu")  # type: ignore[misc]
    assert artifact.card.method == "fake" and device == "cpu"


def test_loading_an_artifact_of_an_unknown_method_lists_the_known_ones(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", card(method="skipnett"), FakeConfig(), STATE)
    with pytest.raises(ValueError, match="unknown method 'skipnett'.*did you mean 'skipnet'"):
        dataeff.load(tmp_path / "a")


def test_versions_name_what_a_result_depends_on() -> None:
    assert versions()["torch"] == torch.__version__
