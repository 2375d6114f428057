"""A Serve config file for `serve deploy`, generated from the same arguments as `serve run` takes:

    python -m serve.config cascade artifact=runs/cascade/artifact layout=distributed > serve.yaml
    serve deploy serve.yaml

Everything that can be changed later stands in it: replicas, resources, autoscaling, limits, and under `user_config` the
versions with their shares of the traffic. `serve deploy` with another `user_config` swaps versions without a restart.
"""

import sys
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from serve import RAY_SETTINGS
from serve.app import parse_cascade_options, parse_options
from serve.loading import load_cascade
from serve.options import CascadeOptions, ServerOptions, deployment_settings, stage_settings

USAGE = "usage: python -m serve.config model|cascade key=value ...  (keys as for serve run; the YAML goes to stdout)"


def serve_config(kind: str, args: Mapping[str, str]) -> dict[str, Any]:
    """The content of a Serve config file; `kind` is "model" or "cascade".

    Raises:
        ValueError, OSError: unknown or bad arguments, or no usable artifact.
    """
    options: ServerOptions = parse_cascade_options(args) if kind == "cascade" else parse_options(args)
    settings = _deployments(options)
    table = settings[0]["user_config"]
    for deployment in settings:
        deployment["user_config"] = table  # one table: YAML shows it once and refers to it
    absolute = {name: getattr(options, name) for name in options.paths if name in args}
    environment = {"env_vars": dict(RAY_SETTINGS)}  # of the controller, of the proxies that it starts, and of replicas
    return {
        "controller_options": {"runtime_env": environment},
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": options.timeout_s + 5},
        "applications": [
            {
                "name": options.name or kind,
                "route_prefix": "/",
                "import_path": f"serve.app:{kind}",
                "runtime_env": environment,
                "args": dict(args) | absolute,
                "deployments": settings,
            }
        ],
    }


def _deployments(options: ServerOptions) -> list[dict[str, Any]]:
    if not isinstance(options, CascadeOptions):
        return [_plain(deployment_settings("ModelServer", options))]
    stages = options.stage_count(load_cascade)
    if options.layout == "colocated":
        return [_plain(deployment_settings("CascadeServer", options))]
    front = deployment_settings("CascadeServer", options, cpus=options.router_cpus)
    return [_plain(front), *(_plain(stage_settings(options, number)) for number in range(stages))]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
        for name, value in settings.items()
    }


def main(arguments: list[str]) -> None:
    kind, *rest = arguments or [""]
    pairs = [argument.partition("=") for argument in rest]
    if kind not in ("model", "cascade") or not all(equals for _, equals, _ in pairs):
        raise SystemExit(USAGE)
    try:
        config = serve_config(kind, {key: value for key, _, value in pairs})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    yaml.safe_dump(config, sys.stdout, sort_keys=False)


if __name__ == "__main__":
    main(sys.argv[1:])
