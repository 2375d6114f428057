"""A Serve config file for `serve deploy`, generated from the same arguments as `serve run` takes:

    python -m serve.config cascade artifact=runs/cascade/artifact layout=distributed > serve.yaml
    serve deploy serve.yaml

Everything that can be changed later stands in it: replicas, resources, autoscaling, limits, and under `user_config` the
versions with their shares of the traffic. `serve deploy` with another `user_config` swaps versions without a restart.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from serve import RAY_SETTINGS
from serve.app import parse_cascade_options, parse_labelling_options, parse_options, parse_robustness_options
from serve.loading import load_cascade
from serve.options import CascadeOptions, HostOptions, deployment_settings, stage_settings

# Of each application: what reads its arguments, and the deployment that answers HTTP.
APPLICATIONS: Mapping[str, tuple[Callable[[Mapping[str, str]], HostOptions], str]] = {
    "model": (parse_options, "ModelServer"),
    "cascade": (parse_cascade_options, "CascadeServer"),
    "labelling": (parse_labelling_options, "LabellingServer"),
    "robustness": (parse_robustness_options, "RobustnessServer"),
}
KINDS = "|".join(APPLICATIONS)
USAGE = f"usage: python -m serve.config {KINDS} key=value ...  (keys as for serve run; the YAML goes to stdout)"


def serve_config(kind: str, args: Mapping[str, str]) -> dict[str, Any]:
    """The content of a Serve config file; `kind` is one of `APPLICATIONS`.

    Raises:
        ValueError, OSError: unknown or bad arguments, or no usable cascade.
    """
    parse, deployment = APPLICATIONS[kind]
    options = parse(args)
    settings = _deployments(options, deployment)
    for other in settings[1:]:
        other["user_config"] = settings[0]["user_config"]  # one table: YAML shows it once and refers to it
    absolute = {name: getattr(options, name) for name in options.paths if name in args}
    environment = {"env_vars": dict(RAY_SETTINGS)}  # of the controller, of the proxies that it starts, and of replicas
    return {
        "controller_options": {"runtime_env": environment},
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": options.timeout_s + 5},
        "applications": [
            {
                "name": getattr(options, "name", "") or kind,
                "route_prefix": "/",
                "import_path": f"serve.app:{kind}",
                "runtime_env": environment,
                "args": dict(args) | absolute,
                "deployments": settings,
            }
        ],
    }


def _deployments(options: HostOptions, name: str) -> list[dict[str, Any]]:
    stages = options.stage_count(load_cascade) if isinstance(options, CascadeOptions) else 0
    if not isinstance(options, CascadeOptions) or options.layout == "colocated":
        return [_plain(deployment_settings(name, options))]
    front = deployment_settings(name, options, cpus=options.router_cpus)
    return [_plain(front), *(_plain(stage_settings(options, number)) for number in range(stages))]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
        for name, value in settings.items()
    }


def main(arguments: list[str]) -> None:
    kind, *rest = arguments or [""]
    pairs = [argument.partition("=") for argument in rest]
    if kind not in APPLICATIONS or not all(equals for _, equals, _ in pairs):
        raise SystemExit(USAGE)
    try:
        config = serve_config(kind, {key: value for key, _, value in pairs})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    yaml.safe_dump(config, sys.stdout, sort_keys=False)


if __name__ == "__main__":
    main(sys.argv[1:])
