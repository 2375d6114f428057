"""Every mistake in settings becomes one sentence that says what was seen and what is allowed."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from dataeff.core.config import (
    Choice,
    Config,
    ExperimentConfig,
    Range,
    describe_range,
    field_names,
    merge,
    nearest,
    parse_config,
    parse_overrides,
    parse_space,
    read_yaml,
    unflatten,
)
from dataeff.core.registry import METHODS, get_method


class Schedule(Config):
    lr: float = Field(0.1, gt=0, le=10)
    iterations: int = Field(100, ge=1)
    milestones: tuple[float, ...] = (0.5,)

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value):
            raise ValueError(f"milestones must ascend, got {list(value)}")
        return value


class Settings(ExperimentConfig):
    gate: Literal["rnn", "none"] = "rnn"
    beta: Literal["auto"] | float = Field("auto", ge=0)
    widths: list[int] = Field([8], min_length=1)
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.gate == "none" and self.beta != "auto":
            raise ValueError("beta needs a gate")
        return self


class Named(Config):
    name: str


def message(values: dict[str, Any], schema: type[Config] = Settings) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(schema, values)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_and_nested_values_are_parsed() -> None:
    settings = parse_config(Settings, {"seed": 3, "schedule": {"lr": 1}})
    assert (settings.seed, settings.schedule.lr, settings.schedule.iterations, settings.gate) == (3, 1.0, 100, "rnn")


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_settings_written_out_in_full_are_read_back_the_same(method: str) -> None:
    schema = get_method(method).config_schema
    required = {"adaskips": {"source": "letters"}, "idk": {"stages": ["a", "b"]}}
    settings = parse_config(schema, required.get(method, {}))
    assert parse_config(schema, settings.model_dump(mode="json")) == settings


def test_settings_cannot_be_changed_after_parsing() -> None:
    settings = parse_config(Settings, {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]


def test_an_unknown_key_names_the_nearest_known_one_and_all_others() -> None:
    text = message({"gates": "rnn"})
    assert "unknown key 'gates'" in text and "did you mean 'gate'?" in text
    assert all(name in text for name in field_names(Settings))


def test_an_unknown_nested_key_is_named_with_its_path() -> None:
    text = message({"schedule": {"iteration": 5}})
    assert "unknown key 'schedule.iteration'" in text and "did you mean 'schedule.iterations'?" in text


def test_a_key_unlike_any_other_gets_no_guess() -> None:
    text = message({"zzzzqqqq": 1})
    assert "did you mean" not in text and "known: beta, gate" in text


@pytest.mark.parametrize(
    ("values", "field", "seen", "allowed"),
    [
        ({"seed": -1}, "seed", "-1", "int >= 0 and <= 2.14748e+09"),
        ({"seed": 1.5}, "seed", "1.5", "int >= 0"),
        ({"seed": "many"}, "seed", "'many'", "int >= 0"),
        ({"schedule": {"lr": 0}}, "schedule.lr", "0", "float > 0 and <= 10"),
        ({"schedule": {"lr": float("nan")}}, "schedule.lr", "nan", "float > 0 and <= 10"),
        ({"schedule": {"lr": float("inf")}}, "schedule.lr", "inf", "float > 0 and <= 10"),
        ({"schedule": {"iterations": 0}}, "schedule.iterations", "0", "int >= 1"),
        ({"gate": "mlp"}, "gate", "'mlp'", "one of 'rnn', 'none'"),
        ({"widths": []}, "widths", "[]", "length >= 1"),
        ({"beta": -1}, "beta", "-1", "one of 'auto' or a number >= 0"),
        ({"beta": "none"}, "beta", "'none'", "one of 'auto' or a number >= 0"),
    ],
)
def test_a_value_out_of_range_says_the_value_and_the_range(
    values: dict[str, Any], field: str, seen: str, allowed: str
) -> None:
    text = message(values)
    assert f"{field} = {seen} is not allowed" in text
    assert allowed in text


def test_a_scalar_where_a_group_belongs_is_refused_by_name() -> None:
    assert "schedule = 5 is not allowed" in message({"schedule": 5})


def test_the_methods_own_checks_keep_their_words() -> None:
    text = message({"schedule": {"milestones": [0.7, 0.2]}})
    assert "schedule.milestones: milestones must ascend, got [0.7, 0.2]" in text
    assert "config: beta needs a gate" in message({"gate": "none", "beta": 1.0})


def test_a_missing_setting_is_named() -> None:
    assert "name is required" in message({}, Named)


def test_all_mistakes_are_reported_at_once_and_where_they_were_made() -> None:
    with pytest.raises(ValueError, match=r"^runs\.yaml: .*seed = -1.*; .*unknown key 'gat'"):
        parse_config(Settings, {"seed": -1, "gat": 1}, "runs.yaml")


def test_a_range_is_described_in_words() -> None:
    assert describe_range(Schedule.model_fields["lr"]) == "float > 0 and <= 10"
    assert describe_range(Settings.model_fields["beta"]) == "one of 'auto' or a number >= 0"


def test_nearest_lists_what_is_known_in_order() -> None:
    assert nearest("digit", ["shapes", "digits"]) == "did you mean 'digits'? known: digits, shapes"


# overrides


def test_overrides_are_read_as_yaml_and_nested() -> None:
    parsed = parse_overrides(["schedule.lr=0.5", "schedule.iterations=7", "widths=[4, 8]", "gate=none", "beta=null"])
    assert parsed == {"schedule": {"lr": 0.5, "iterations": 7}, "widths": [4, 8], "gate": "none", "beta": None}


def test_the_last_override_of_a_key_wins_and_a_value_may_hold_an_equals_sign() -> None:
    assert parse_overrides(["seed=1", "seed=2", "start=a=b"]) == {"seed": 2, "start": "a=b"}


@pytest.mark.parametrize("assignment", ["seed", "=1", " =1", ""])
def test_an_override_without_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError, match="expected key=value"):
        parse_overrides([assignment])


def test_an_override_that_is_not_yaml_is_refused_with_its_text() -> None:
    with pytest.raises(ValueError, match=r"--set 'widths=\[4, 8': '\[4, 8' is not a YAML value"):
        parse_overrides(["widths=[4, 8"])


def test_merging_lays_changes_over_and_alters_neither_side() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    changes = {"a": {"b": 9}, "d": {"e": 4}}
    assert merge(base, changes) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3} and changes == {"a": {"b": 9}, "d": {"e": 4}}


def test_dotted_names_become_nested_groups() -> None:
    assert unflatten({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


# files


def test_a_yaml_file_gives_its_mapping_and_an_empty_one_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 4\nschedule: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("# nothing set\n")
    assert read_yaml(tmp_path / "a.yaml") == {"seed": 4, "schedule": {"lr": 0.5}}
    assert read_yaml(tmp_path / "b.yaml") == {}


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml: no such file"):
        read_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00bad", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping of settings, found list"),
        (b"just text", "expected a mapping of settings, found str"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


# search spaces


def test_a_space_of_ranges_and_choices_is_parsed() -> None:
    space = {
        "schedule.lr": {"low": "1e-3", "high": 1, "log": True},
        "schedule.iterations": {"low": 1, "high": 9, "integer": True},
        "gate": {"choices": ["rnn", "none"]},
    }
    assert parse_space(Settings, space, {}, "sweep") == {
        "schedule.lr": Range(0.001, 1.0, log=True),
        "schedule.iterations": Range(1.0, 9.0, integer=True),
        "gate": Choice(("rnn", "none")),
    }


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({}, "the space is empty"),
        ([1], "the space is empty"),
        ({"schedule.rl": {"low": 1, "high": 2}}, "unknown key 'schedule.rl'.*did you mean 'schedule.lr'"),
        ({"schedule": {"choices": [1]}}, "unknown key 'schedule'"),
        ({"seed": 5}, "seed: expected .*found 5"),
        ({"seed": {"low": 1}}, "seed: expected"),
        ({"seed": {"low": 1, "high": 2, "step": 1}}, "seed: expected"),
        ({"seed": {"low": "a", "high": 2}}, "seed: expected"),
        ({"seed": {"low": None, "high": 2}}, "seed: expected"),
        ({"gate": {"choices": []}}, "gate: expected"),
        ({"gate": {"choices": "rnn"}}, "gate: expected"),
        ({"gate": {"choices": ["rnn"], "low": 1}}, "gate: expected"),
        ({"schedule.lr": {"low": 2, "high": 1}}, "low = 2 must be below high = 1$"),
        ({"schedule.lr": {"low": 1, "high": 1}}, "low = 1 must be below high = 1$"),
        ({"schedule.lr": {"low": 0, "high": 1, "log": True}}, "low = 0 must be below high = 1 and above 0"),
        ({"schedule.lr": {"low": 0, "high": 1}}, "schedule.lr = 0.0 is not allowed"),
        ({"schedule.lr": {"low": 1, "high": 11}}, "schedule.lr = 11.0 is not allowed"),
        ({"schedule.lr": {"low": 1, "high": float("nan")}}, "must be below"),
        ({"schedule.lr": {"low": 1, "high": float("inf")}}, "schedule.lr = inf is not allowed"),
        ({"schedule.iterations": {"low": 1, "high": 2.5, "integer": True}}, "schedule.iterations = 2.5 is not allowed"),
        ({"gate": {"choices": ["rnn", "mlp"]}}, "gate = 'mlp' is not allowed"),
    ],
)
def test_a_bad_space_says_which_entry_is_wrong_and_why(space: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_space(Settings, space, {}, "sweep.yaml")
    assert str(caught.value).startswith("sweep.yaml: ")


def test_a_space_is_checked_together_with_the_fixed_settings() -> None:
    space = {"gate": {"choices": ["rnn", "none"]}}
    assert parse_space(Settings, space, {}, "sweep")
    with pytest.raises(ValueError, match="beta needs a gate"):
        parse_space(Settings, space, {"beta": 1.0}, "sweep")
