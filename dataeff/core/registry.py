"""Methods by name. A method is imported only when it is asked for."""

from importlib import import_module

from dataeff.core.config import nearest
from dataeff.core.experiment import Experiment

METHODS: dict[str, str] = {
    "skipnet": "dataeff.dynamic.skipnet.experiment:SkipNetExperiment",
}


def get_method(name: str) -> type[Experiment]:
    """The Experiment class registered as `name`.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r} ({nearest(name, METHODS)})")
    module, attribute = METHODS[name].split(":")
    method: type[Experiment] = getattr(import_module(module), attribute)
    return method
