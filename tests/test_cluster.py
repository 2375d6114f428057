"""The files of cluster/ against Ray's own schemas, and a job on a real cluster that asks for a token."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.autoscaler._private import util as autoscaler
from ray.scripts.scripts import start as ray_start
from ray.serve.schema import ServeDeploySchema

import dataeff
from dataeff.core.config import parse_config
from dataeff.core.registry import get_method
from ray_jobs.cli import read_settings
from ray_jobs.train import parse_arguments
from serve.app import parse_options

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"{PROJECT['name']}:{PROJECT['version']}"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


# the cluster launcher


def launcher() -> dict[str, Any]:
    config = autoscaler.prepare_config(read("cluster.yaml"))
    config["cluster_synced_files"] = []
    return config


def test_the_launcher_file_passes_rays_own_validation() -> None:
    autoscaler.validate_config(launcher())


def test_rays_validation_would_see_a_mistake_in_the_launcher_file() -> None:
    config = launcher()
    config["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        autoscaler.validate_config(config)


def test_the_launcher_scales_between_bounds_and_keeps_training_off_the_head() -> None:
    config = launcher()
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    workers = {name: node for name, node in types.items() if name != config["head_node_type"]}
    assert any(node["min_workers"] < node["max_workers"] for node in workers.values())
    assert all(0 <= node["min_workers"] <= node["max_workers"] <= config["max_workers"] for node in workers.values())
    assert sum(node["min_workers"] for node in workers.values()) <= config["max_workers"]


def test_the_launched_cluster_uses_the_projects_image_and_asks_for_a_token() -> None:
    config = launcher()
    assert config["docker"]["image"] == IMAGE
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_the_launchers_ray_commands_are_ones_that_ray_knows() -> None:
    config = launcher()
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    known = start_options()
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "ray" and words[1] in ("start", "stop")
        assert {word.split("=")[0] for word in words[2:]} <= known


def start_options() -> set[str]:
    return {option for parameter in ray_start.params for option in parameter.opts}


# Kubernetes


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = template["spec"]["containers"]
    return found


def pod_templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    extra = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    return [group["template"] for group in groups] + extra


MANIFESTS = {
    "rayjob-train.yaml": ("RayJob", "rayClusterSpec"),
    "rayservice-model.yaml": ("RayService", "rayClusterConfig"),
}

# Fields of the ray.io/v1 resources (KubeRay's API reference) that the manifests may use.
SPEC_FIELDS = {
    "RayJob": {
        "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "submitterPodTemplate", "rayClusterSpec",
    },
    "RayService": {"serveConfigV2", "rayClusterConfig"},
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
CONTAINER_FIELDS = {"name", "image", "ports", "resources", "volumeMounts"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_fields_of_its_kind_and_no_others(name: str) -> None:
    manifest, (kind, cluster_key) = read(name), MANIFESTS[name]
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    assert manifest["spec"].keys() == SPEC_FIELDS[kind]
    cluster = manifest["spec"][cluster_key]
    assert cluster.keys() == CLUSTER_FIELDS
    assert cluster["headGroupSpec"].keys() == HEAD_FIELDS
    assert cluster["workerGroupSpecs"]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == WORKER_FIELDS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_runs_the_installed_ray_with_a_token(name: str) -> None:
    cluster = read(name)["spec"][MANIFESTS[name][1]]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_has_the_projects_image_and_bounded_resources(name: str) -> None:
    for template in pod_templates(read(name)["spec"]):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        for container in containers(template):
            assert container.keys() <= CONTAINER_FIELDS
            assert container["image"] == IMAGE
            for side in ("requests", "limits"):
                amounts = container["resources"][side]
                assert re.fullmatch(r"\d+m?", amounts["cpu"]) and re.fullmatch(r"\d+[MG]i", amounts["memory"])
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for port in container.get("ports", []):
                assert port.keys() == {"name", "containerPort"} and isinstance(port["containerPort"], int)


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_start_parameters_are_texts_that_ray_start_knows(name: str) -> None:
    cluster = read(name)["spec"][MANIFESTS[name][1]]
    known = start_options()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for key, value in group["rayStartParams"].items():
            assert f"--{key}" in known and isinstance(value, str)


def job_arguments() -> Any:
    words = shlex.split(read("rayjob-train.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "ray_jobs.train"]
    return parse_arguments(words[3:])


def test_the_jobs_entrypoint_is_a_valid_training_command() -> None:
    args = job_arguments()
    settings = read_settings(args.method, args.config, args.set, "cpu")
    parse_config(get_method(args.method).config_schema, settings)


def test_the_job_can_lose_its_cluster_and_go_on() -> None:
    args, spec = job_arguments(), read("rayjob-train.yaml")["spec"]
    assert "://" in args.storage and args.resume and spec["backoffLimit"] > 0
    for template in pod_templates({"rayClusterSpec": spec["rayClusterSpec"]}):
        mounts = [Path(mount["mountPath"]) for mount in containers(template)[0]["volumeMounts"]]
        assert any(args.out.is_relative_to(mount) for mount in mounts)


def test_the_jobs_cluster_can_grow_to_what_the_job_asks_for() -> None:
    args, cluster = job_arguments(), read("rayjob-train.yaml")["spec"]["rayClusterSpec"]
    cpus = sum(
        group["maxReplicas"] * int(containers(group["template"])[0]["resources"]["limits"]["cpu"])
        for group in cluster["workerGroupSpecs"]
    )
    assert args.workers * args.cpus_per_worker <= cpus
    assert args.wait > 0


def serve_config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(read("rayservice-model.yaml")["spec"]["serveConfigV2"])
    return loaded


def test_the_service_passes_rays_own_schema_and_its_arguments_ours() -> None:
    schema = ServeDeploySchema.model_validate(serve_config())
    (application,) = schema.applications
    assert application.import_path == "serve.app:model"
    options = parse_options(application.args)
    assert options.artifact == str(job_arguments().out / "artifact")
    assert options.replicas >= 1


def test_the_services_config_has_no_field_that_ray_would_ignore() -> None:
    config = serve_config()
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    fields = ServeDeploySchema.model_validate(config).applications[0].model_fields_set
    assert config["applications"][0].keys() == fields
    assert fields <= type(ServeDeploySchema.model_validate(config).applications[0]).model_fields.keys()


def test_the_services_replicas_fit_its_largest_cluster() -> None:
    options = parse_options(serve_config()["applications"][0]["args"])
    (group,) = read("rayservice-model.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    cpus = int(containers(group["template"])[0]["resources"]["limits"]["cpu"])
    assert options.num_cpus <= cpus
    assert options.replicas * options.num_cpus <= cpus * group["maxReplicas"]


# the image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_consists_of_known_instructions_and_begins_with_from() -> None:
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM"
    assert set(words) <= {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV"}
    assert all(rest for _, rest in instructions())


def test_everything_that_the_dockerfile_copies_exists() -> None:
    sources = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    packages = {pattern.rstrip("*") for pattern in _packages()}
    metadata = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert packages | metadata == set(sources)


def _packages() -> list[str]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    found: list[str] = tool["setuptools"]["packages"]["find"]["include"]
    return found


def test_the_image_has_the_projects_python_and_its_pinned_dependencies() -> None:
    (base,) = [rest for word, rest in instructions() if word == "FROM"]
    minimum = PROJECT["requires-python"].removeprefix(">=")
    assert base == f"python:{minimum}-slim"
    assert any("pip install" in rest and '-c constraints.txt ".[ray]"' in rest for _, rest in instructions())


def test_the_constraints_are_exact_and_name_no_index_and_no_folder() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.!]+", line)] == []
    assert f"ray=={ray.__version__}" in lines


# a real cluster


class LocalCluster:
    """A head node with a dashboard, in a folder of its own, which asks for a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = folder / "token"
        self.token.write_text("correct-horse-battery-staple")
        self.ports = free_ports(8)
        self.address = f"http://127.0.0.1:{self.ports[1]}"

    def environment(self, token: Path | None = None) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token or self.token),
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def start(self) -> None:
        gcs, dashboard, agent, agent_grpc, runtime_env, client, metrics, _ = self.ports
        command = [
            *RAY, "start", "--head", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000",
            f"--temp-dir={self.folder / 'ray'}", f"--port={gcs}", f"--dashboard-port={dashboard}",
            "--include-dashboard=true", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
            f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--disable-usage-stats",
        ]  # fmt: skip
        with (self.folder / "start.log").open("w") as log:
            done = subprocess.run(command, env=self.environment(), stdout=log, stderr=log, timeout=120)
        assert done.returncode == 0, (self.folder / "start.log").read_text()

    def submit(self, *entrypoint: str, token: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [*RAY, "job", "submit", "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(token), capture_output=True, text=True, timeout=300
        )

    def stop(self) -> None:
        """End this cluster's processes and no other's: those that name its folder, and what they started."""
        ours = [process for process in psutil.process_iter() if process.pid != os.getpid() and self._names_us(process)]
        ours += [child for process in ours for child in _children(process)]
        for process in set(ours):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(set(ours), timeout=10)

    def _names_us(self, process: psutil.Process) -> bool:
        try:
            return any(str(self.folder / "ray") in word for word in process.cmdline())
        except psutil.Error:
            return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.Error:
        return []
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    # Ray puts sockets below its folder, whose paths may have 107 characters: pytest's own folders are too long.
    with tempfile.TemporaryDirectory(prefix="de-", ignore_cleanup_errors=True) as folder:
        local = LocalCluster(Path(folder))
        try:
            local.start()
            yield local
        finally:
            local.stop()


TRAIN = ("python", "-m", "ray_jobs.train")


@pytest.mark.ray
def test_a_submitted_job_trains_on_a_cluster_that_asks_for_a_token(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = [
        "depth=8", "widths=[4,8,16]", "report_every=2", "augment=none", "stage1.iterations=4", "stage1.batch=16",
        "stage2.iterations=4", "stage2.batch=16",
    ]  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = cluster.submit(*TRAIN, "skipnet", "--data", "digits", "--out", str(tmp_path / "run"), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4" in done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["depth"] == 8 and summary["data"] == "digits"
    assert dataeff.load(tmp_path / "run" / "artifact").card.method == "skipnet"


@pytest.mark.ray
def test_a_users_mistake_in_a_submitted_job_is_one_line_in_its_log(cluster: LocalCluster, tmp_path: Path) -> None:
    done = cluster.submit(*TRAIN, "skipnt", "--data", "digits", "--out", str(tmp_path / "run"))
    log = done.stdout + done.stderr
    assert done.returncode == 1
    assert "error: unknown method 'skipnt' (did you mean 'skipnet'?" in log
    assert "Traceback" not in log


@pytest.mark.ray
def test_another_token_is_refused_and_runs_nothing(cluster: LocalCluster, tmp_path: Path) -> None:
    other, mark = tmp_path / "other", tmp_path / "mark"
    other.write_text("guessed")
    done = cluster.submit("touch", str(mark), token=other)
    assert done.returncode != 0
    assert re.search(r"token|unauthorized|unauthenticated|forbidden|401|403", done.stdout + done.stderr, re.IGNORECASE)
    time.sleep(2)
    assert not mark.exists()
