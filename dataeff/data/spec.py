"""The one-string data description: `KIND[:LOCATION][?option=value&...]`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    "digits",
    "digits-easy-hard",
    "digit-pairs",
    "letters",
    "rendered-digits",
    "parquet",
    "folder",
    "torchvision",
    "labelling",
    "shapes",
)
_EXAMPLES = {
    "parquet": "parquet:DIR (a folder with train*.parquet)",
    "folder": "folder:DIR (a folder with train/CLASS/*.png or CLASS/*.png)",
    "torchvision": "torchvision:NAME?root=DIR (NAME as in torchvision.datasets)",
    "labelling": "labelling:DIR (a folder of python -m ray_jobs.label)",
}


@dataclass(frozen=True)
class DataSpec:
    """A parsed and validated data string; `given` holds the options that the string itself names.

    See `open_splits` for the meaning of each option.
    """

    text: str
    kind: str
    location: str
    given: frozenset[str] = frozenset()
    labels: int | None = None
    rate: float | None = None
    longtail: float | None = None
    seed: int = 0
    val: float = 0.1
    test: float = 0.2
    size: int | None = None
    channels: int | None = None
    cache: Path | None = None
    on_bad_image: str = "error"
    root: Path | None = None
    download: bool = False

    def selection(self) -> dict[str, Any]:
        """The options that change which images, or which pixels, the splits hold (for the fingerprint)."""
        names = ("labels", "longtail", "seed", "val", "test", "size", "channels", "on_bad_image")
        chosen = {name: getattr(self, name) for name in names}
        return chosen if self.rate is None else {**chosen, "rate": self.rate}


def parse_spec(text: str) -> DataSpec:
    """Read a data string such as `parquet:DIR?labels=500&seed=1`.

    Raises:
        ValueError: unknown kind or option (names the known ones and the nearest), a missing location, a repeated
            option, or a value out of range (states the value and the range).
    """
    source, _, query = text.partition("?")
    kind, _, location = source.partition(":")
    if kind not in KINDS:
        raise ValueError(f"unknown data set '{kind}' in '{text}'{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    if kind in _EXAMPLES and not location:
        raise ValueError(f"'{text}' names no location: write {_EXAMPLES[kind]}")
    if kind not in _EXAMPLES and location:
        raise ValueError(f"'{kind}' takes no location, got '{location}': write '{kind}' alone")
    known = [name for name in _OPTIONS if kind == "torchvision" or name not in ("root", "download")]
    values: dict[str, Any] = {}
    for item in query.split("&") if query else []:
        name, equals, value = item.partition("=")
        if name not in known:
            raise ValueError(
                f"unknown option '{name}' in '{text}'{nearest(name, known)}; options of {kind}: {', '.join(known)}"
            )
        if not equals or name in values:
            raise ValueError(f"option '{name}' in '{text}' must be written once, as {name}=VALUE")
        values[name] = _OPTIONS[name](name, value)
    if "labels" in values and "rate" in values:
        raise ValueError(f"'{text}': labels= and rate= both say how many images to keep; give one of them")
    if kind == "torchvision" and "root" not in values:
        raise ValueError(f"'{text}' needs root=DIR, the folder that holds the torchvision files")
    return DataSpec(text=text, kind=kind, location=location, given=frozenset(values), **values)


def absolute_spec(text: str) -> str:
    """The same data string with absolute folders, for processes that start elsewhere.

    Raises:
        ValueError: as `parse_spec`.
    """
    spec = parse_spec(text)
    source, _, query = text.partition("?")
    if spec.kind in ("parquet", "folder", "labelling"):
        source = f"{spec.kind}:{Path(spec.location).expanduser().resolve()}"
    items = [item.partition("=") for item in query.split("&") if item]
    paths = {name: path.resolve() for name, path in (("cache", spec.cache), ("root", spec.root)) if path is not None}
    options = [f"{name}={paths.get(name, value)}" for name, _, value in items]
    return "?".join([source, "&".join(options)] if options else [source])


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean '{by_lower[match[0]]}'?)" if match else ""


def _number(kind: type, low: float, high: float) -> Callable[[str, str], Any]:
    def read(name: str, value: str) -> Any:
        bounds = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name}={value}: must be {what} {bounds}")
        return number

    return read


def _percent(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= 100:
        raise ValueError(f"{name}={value}: must be a percentage above 0 and up to 100")
    return number


def _choice(choices: dict[str, Any]) -> Callable[[str, str], Any]:
    def read(name: str, value: str) -> Any:
        if value not in choices:
            raise ValueError(f"{name}={value}: must be {' or '.join(choices)}{nearest(value, choices)}")
        return choices[value]

    return read


def _path(name: str, value: str) -> Path:
    if not value:
        raise ValueError(f"{name}= needs a folder")
    return Path(value).expanduser()


_OPTIONS: dict[str, Callable[[str, str], Any]] = {
    "labels": _number(int, 1, math.inf),
    "rate": _percent,
    "longtail": _number(float, 1, 1e6),
    "seed": _number(int, 0, 2**32 - 1),
    "val": _number(float, 0, 0.5),
    "test": _number(float, 0.01, 0.5),
    "size": _number(int, 4, 2048),
    "channels": _choice({"1": 1, "3": 3}),
    "cache": _path,
    "on_bad_image": _choice({"error": "error", "skip": "skip"}),
    "root": _path,
    "download": _choice({"0": False, "1": True}),
}
