"""Model versions side by side: which one answers a request, and how one is swapped for another while requests run."""

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from dataeff.core.config import Config, parse_config
from serve.limits import RequestError
from serve.models import ServedModel

logger = logging.getLogger("ray.serve")


class Version(Config):
    """Where a version comes from, and its share of the requests that name no version."""

    artifact: str = Field("", description="folder of an exported network or fitted cascade")
    stages: tuple[str, ...] = Field((), description="instead: folders of a cascade's stages, cheapest first")
    thresholds: tuple[float, ...] = Field(
        (), description="with `stages`: uncertainty (1 - largest probability) above which the next one is asked"
    )
    weight: float = Field(1.0, ge=0, description="share of the traffic, relative to the other versions'")

    @model_validator(mode="after")
    def _one_source(self) -> "Version":
        if bool(self.artifact) == bool(self.stages):
            raise ValueError("a version needs either artifact or stages")
        return self

    @property
    def key(self) -> str:
        """Names the model, whatever the version is called and however much traffic it gets."""
        return hashlib.sha256(self.model_dump_json(exclude={"weight"}).encode()).hexdigest()[:16]


class VersionTable(Config):
    """The `user_config` of a deployment: the versions that it serves. A changed one is applied without a restart."""

    versions: dict[str, Version] = Field(min_length=1)

    @model_validator(mode="after")
    def _some_traffic(self) -> "VersionTable":
        if not sum(version.weight for version in self.versions.values()) > 0:
            raise ValueError("the versions' weights must not all be 0")
        return self


def parse_versions(values: Mapping[str, Any]) -> dict[str, Version]:
    """The versions in a `user_config`.

    Raises:
        ValueError: one line that says what is wrong.
    """
    return parse_config(VersionTable, values, "user_config").versions


class Versions:
    """The versions of one model that a replica serves.

    Args:
        name: of the model, in URLs; empty: its method's.
        load: a version's source to what is served, warmed up; awaited.
        linger_s: how long a version that was taken away still finishes its requests.
    """

    def __init__(
        self, name: str, load: Callable[[str, Version], Awaitable[ServedModel]], linger_s: float = 30.0
    ) -> None:
        self._name = name
        self.failed: dict[str, str] = {}
        self._load = load
        self._linger_s = linger_s
        self._sources: dict[str, Version] = {}
        self._models: dict[str, ServedModel] = {}
        self._loaded: dict[str, ServedModel] = {}  # by key, with those that are going
        self._applying = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._name or self.any().predictor.card.method

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __bool__(self) -> bool:
        return bool(self._models)

    def weights(self) -> dict[str, float]:
        return {version: source.weight for version, source in self._sources.items()}

    def get(self, version: str) -> ServedModel:
        if version not in self._models:
            known = ", ".join(repr(known) for known in self._models)
            raise RequestError(404, f"model {self.name!r} has no version {version[:20]!r}; it has {known}")
        return self._models[version]

    def any(self) -> ServedModel:
        """The version with the most traffic."""
        return self._models[max(self._sources, key=lambda version: self._sources[version].weight)]

    def choose(self, key: str | None = None) -> str:
        """A version by the traffic split; one `key` always gets the same one, so that a retry does."""
        share = random.random() if key is None else int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
        place = share * sum(source.weight for source in self._sources.values())
        for version, source in self._sources.items():
            place -= source.weight
            if place < 0:
                return version
        return max(self._sources, key=lambda version: self._sources[version].weight)

    async def apply(self, wanted: Mapping[str, Version]) -> None:
        """Serve `wanted`: load what is new, then switch at once, then let what is gone finish.

        A version that cannot be loaded is named in `failed` and changes nothing: what was served goes on.

        Raises:
            ValueError, OSError: it cannot be loaded and nothing was served before.
        """
        async with self._applying:
            models: dict[str, ServedModel] = {}
            for version, source in wanted.items():
                if version in self._sources and source.key == self._sources[version].key:
                    models[version] = self._models[version]
                    continue
                try:
                    models[version] = await self._load(version, source)
                except Exception as error:
                    if not self._models:
                        raise
                    logger.exception("version %s cannot be loaded; the versions before it go on", version)
                    self.failed[version] = str(error)[:500]
                    return
            keys = {source.key: models[version] for version, source in wanted.items()}
            gone = [key for key in self._loaded if key not in keys]
            self._loaded |= keys
            self._models, self._sources, self.failed = models, dict(wanted), {}
            logger.info("serving versions %s", self.weights())
            for key in gone:
                asyncio.get_running_loop().call_later(self._linger_s, self._drop, key)

    def _drop(self, key: str) -> None:
        if key in self._loaded and key not in {source.key for source in self._sources.values()}:
            self._loaded.pop(key).close()

    def find(self, key: str) -> ServedModel | None:
        """The model with that key, also while it finishes its requests; None if it is not loaded here."""
        return self._loaded.get(key)

    def check(self) -> None:
        for model in self._models.values():
            model.check()
