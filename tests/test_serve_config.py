"""The file for `serve deploy`, generated from the arguments of `serve run`: Ray's schema, our options, refusals."""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from serve import RAY_SETTINGS, config
from serve.app import parse_cascade_options, parse_options, parse_robustness_options
from serve.config import APPLICATIONS, main, serve_config

ARGUMENTS = {
    "model": {"artifact": "a,b", "split": "0.9,0.1", "name": "pets", "replicas": "2"},
    "cascade": {"stages": "a,b", "thresholds": "0.2"},
    "labelling": {"out": "runs/pets", "timeout_s": "20"},
    "robustness": {"artifact": "a", "num_cpus": "2"},
}


class ThreeStages(BaseModel):
    costs: list[float] = [1.0, 2.0, 3.0]


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "load_cascade", lambda version, networks: ThreeStages())


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize("kind", APPLICATIONS)
def test_every_application_has_a_file_that_ray_takes_whole(kind: str) -> None:
    content = yaml.safe_load(yaml.safe_dump(serve_config(kind, ARGUMENTS[kind])))
    schema = ServeDeploySchema.model_validate(content)
    (application,) = schema.applications
    assert application.import_path == f"serve.app:{kind}"
    assert content["applications"][0].keys() == application.model_fields_set
    (deployment,) = application.deployments
    assert deployment.name == APPLICATIONS[kind][1]
    assert content["applications"][0]["deployments"][0].keys() <= type(deployment).model_fields.keys()
    assert application.runtime_env["env_vars"] == RAY_SETTINGS
    assert schema.http_options.request_timeout_s == APPLICATIONS[kind][0](ARGUMENTS[kind]).timeout_s + 5


def test_versions_stand_in_the_file_and_folders_are_absolute() -> None:
    (application,) = serve_config("model", ARGUMENTS["model"])["applications"]
    assert application["name"] == "pets" and application["deployments"][0]["num_replicas"] == 2
    versions = application["deployments"][0]["user_config"]["versions"]
    assert [version["weight"] for version in versions.values()] == [0.9, 0.1]
    assert application["args"]["artifact"] == parse_options(ARGUMENTS["model"]).artifact
    assert all(folder.startswith("/") for folder in application["args"]["artifact"].split(","))
    robust = serve_config("robustness", ARGUMENTS["robustness"])["applications"][0]
    assert robust["name"] == "robustness" and "user_config" not in robust["deployments"][0]
    assert robust["args"]["artifact"] == parse_robustness_options(ARGUMENTS["robustness"]).artifact


@pytest.mark.usefixtures("no_networks")
def test_stages_that_are_deployments_share_one_table() -> None:
    arguments = {"artifact": "a", "layout": "distributed", "stage_replicas": "1,1,2"}
    content = serve_config("cascade", arguments)
    front, *stages = content["applications"][0]["deployments"]
    assert front["name"] == "CascadeServer" and [stage["name"] for stage in stages] == ["Stage1", "Stage2", "Stage3"]
    assert front["ray_actor_options"]["num_cpus"] == parse_cascade_options(arguments).router_cpus
    assert stages[2]["num_replicas"] == 2
    assert all(stage["user_config"] is front["user_config"] for stage in stages)
    ServeDeploySchema.model_validate(content)


def test_the_command_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["labelling", "out=runs/pets"])
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    assert printed == serve_config("labelling", {"out": "runs/pets"})


@pytest.mark.parametrize("arguments", [[], ["cascades"], ["model", "artifact"]])
def test_another_kind_or_no_pair_shows_the_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"usage: .* model\|cascade\|labelling\|robustness key=value"):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "artifct=a"], "artifct"),
        (["model", "artifact=a,b", "split=0.5"], "1 shares for 2 versions"),
        (["robustness"], "artifact"),
        (["cascade", "artifact=a", "stages=b"], "give either artifact=DIR"),
        (["cascade", "artifact=nowhere"], "no such directory"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
