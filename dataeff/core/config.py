"""One schema for a method's settings, whether they come from YAML, from `--set a.b=c` or from a search space.

A method declares its settings as a subclass of `Config`, each field with its range, meaning, unit and source; the
functions below turn mappings, overrides and search spaces into checked configs and every mistake into one sentence.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

C = TypeVar("C", bound="Config")

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


class Config(BaseModel):
    """Base of every settings class: immutable, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExperimentConfig(Config):
    """Settings that every method has."""

    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="decides initial weights, data order, augmentation and sampling"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """`name` is not one of `known`: say which it probably meant, and list them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def parse_config(schema: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """Build `schema` from nested `values`.

    Raises:
        ValueError: one line that names each wrong field, the value seen, the range allowed, and for an unknown key the
            nearest known one.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_explain(schema, dict(problem)) for problem in error.errors()))
        raise ValueError(f"{where}: {problems}") from None


def field_names(schema: type[Config], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below `schema`."""
    for name, field in schema.model_fields.items():
        nested = _nested(field)
        if nested:
            yield from field_names(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nested(field: FieldInfo) -> type[Config] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _find(schema: type[Config], path: Sequence[Any]) -> tuple[list[str], FieldInfo | None]:
    """The longest beginning of `path` that names a setting, and that setting."""
    names: list[str] = []
    field: FieldInfo | None = None
    current: type[Config] | None = schema
    for part in path:
        if current is None or part not in current.model_fields:
            break
        names.append(part)
        field = current.model_fields[part]
        current = _nested(field)
    return names, field


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [repr(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _member_metadata(annotation: Any) -> list[Any]:
    """Limits that stand at a member of a union, such as `Literal["auto"] | Annotated[float, Field(ge=0)]`."""
    members = [part for part in get_args(annotation) if get_origin(part) is Annotated]
    return [item for member in members for info in member.__metadata__ for item in getattr(info, "metadata", [info])]


def describe_range(field: FieldInfo) -> str:
    """The values that `field` takes, in words: its choices and its limits."""
    limits = [
        f"{sign} {getattr(item, name):g}"
        for item in [*field.metadata, *_member_metadata(field.annotation)]
        for name, sign in _LIMITS.items()
        if getattr(item, name, None) is not None
    ]
    choices = _choices(field.annotation)
    if choices:
        return f"one of {', '.join(choices)}" + (f" or a number {' and '.join(limits)}" if limits else "")
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    return f"{kind} {' and '.join(limits)}".strip()


def _explain(schema: type[Config], problem: dict[str, Any]) -> str:
    names, field = _find(schema, problem["loc"])
    name = ".".join(names)
    if problem["type"] == "extra_forbidden":
        unknown = ".".join(map(str, problem["loc"]))
        return f"unknown key {unknown!r} ({nearest(unknown, field_names(schema))})"
    if problem["type"] == "missing":
        return f"{'.'.join(map(str, problem['loc']))} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" or field is None:
        return f"{name}: {message}" if name else message
    return f"{name} = {problem['input']!r} is not allowed (allowed: {describe_range(field)})"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or holds something other than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes` laid over it; neither argument is altered."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def unflatten(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in dotted.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`["stage1.lr=0.1", "gate=rnn"]` as a nested mapping; values are read as YAML.

    Raises:
        ValueError: an entry is not of the form key=value.
    """
    nested: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {assignment!r}: expected key=value, such as --set seed=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {assignment!r}: {text!r} is not a YAML value; put quotes around a text") from None
        nested = merge(nested, unflatten({key.strip(): value}))
    return nested


@dataclass(frozen=True)
class Range:
    """A numeric setting to search: `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Choice:
    """A setting to search among `values`."""

    values: tuple[Any, ...]


def parse_space(
    schema: type[Config], space: Mapping[str, Any], base: Mapping[str, Any], where: str
) -> dict[str, Range | Choice]:
    """A search space such as `{"alpha": {"low": 0, "high": 4}, "gate": {"choices": [...]}}`, checked against `schema`.

    Args:
        base: the settings that stay fixed; every end point and every choice must be valid together with them.

    Raises:
        ValueError: an unknown setting, a malformed entry, or a bound that the setting does not allow.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"{where}: the space is empty; name at least one setting to search")
    known = set(field_names(schema))
    parsed: dict[str, Range | Choice] = {}
    for name, entry in space.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r} ({nearest(name, known)})")
        dimension = _parse_dimension(name, entry, where)
        parsed[name] = dimension
        values = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        for value in values:
            parse_config(schema, merge(base, unflatten({name: value})), where)
    return parsed


def _parse_dimension(name: str, entry: Any, where: str) -> Range | Choice:
    form = f"{where}: {name}: expected {{low, high[, log][, integer]}} or {{choices: [...]}}, found {entry!r}"
    if not isinstance(entry, Mapping):
        raise ValueError(form)
    if set(entry) == {"choices"} and isinstance(entry["choices"], list) and entry["choices"]:
        return Choice(tuple(entry["choices"]))
    if not {"low", "high"} <= set(entry) <= {"low", "high", "log", "integer"}:
        raise ValueError(form)
    try:
        low, high = float(entry["low"]), float(entry["high"])
    except (TypeError, ValueError):
        raise ValueError(form) from None
    log = bool(entry.get("log", False))
    if not low < high or (log and low <= 0):
        raise ValueError(
            f"{where}: {name}: low = {low:g} must be below high = {high:g}" + (" and above 0" if log else "")
        )
    return Range(low, high, log, bool(entry.get("integer", False)))
