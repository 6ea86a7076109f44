# SPDX-License-Identifier: Apache-2.0
"""Manifests and values of deploy/kubernetes, as far as can be told without a cluster."""

import copy
import functools
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

from tests.kserve_models import KServeModels
from tests.wheels import kubectl
from vllm_crop import register
from vllm_crop.compat.patches.cli_flags import apply_options
from vllm_crop.compat.refusals import REFUSED
from vllm_crop.config import CONFIG_KEY, CropConfig
from vllm_crop.eviction.refusals import refused_with_eviction

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
CHART = FOLDER / "production-stack"
KUBERNETES = "1.36"  # whose schemas are judged by
# Of custom resources Kubernetes' schemas know nothing.
CUSTOM: dict[str, Any] = {
    "ScaledObject": ScaledObject,
    "ServiceMonitor": ServiceMonitor,
    "PrometheusRule": PrometheusRule,
}
Manifest = dict[str, Any]

COMPONENTS = [f"components/{path.name}" for path in sorted((FOLDER / "components").iterdir())]
VARIANTS = {
    "cpu": ["overlays/cpu"],
    "gpu": ["overlays/gpu"],
    "cpu behind a router": ["overlays/cpu", "components/router"],
    "gpu with everything": ["overlays/gpu", *COMPONENTS],
}
packages = pytest.mark.package_index
everywhere = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def built(variant: str) -> tuple[Manifest, ...]:
    """What an overlay with components comes to, named by a kustomization as a user would write it."""
    overlay, *components = (f"../{name}" for name in VARIANTS[variant])
    kustomization = {"resources": [overlay], "components": components}
    return kustomized(variant.replace(" ", "-"), yaml.safe_dump(kustomization))


def kustomized(name: str, kustomization: str) -> tuple[Manifest, ...]:
    """What `kubectl kustomize` makes of a kustomization in a folder beside overlays/."""
    # Elsewhere in fact, and not in /tmp: kustomize wants relative paths.
    folder = ROOT / "build" / "kustomize" / name
    folder.mkdir(parents=True, exist_ok=True)
    text = kustomization.replace("../", f"{os.path.relpath(FOLDER, folder)}/")
    (folder / "kustomization.yaml").write_text(text)
    (folder / "serve.yaml").write_text("model: yours")
    finished = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return tuple(yaml.safe_load_all(finished.stdout))


def of_kind(variant: str, kind: str) -> dict[str, Manifest]:
    """The manifests of one kind by name."""
    return {m["metadata"]["name"]: m for m in built(variant) if m["kind"] == kind}


def server_of(variant: str) -> Manifest:
    return of_kind(variant, "Deployment")["vllm-crop"]


def pod(deployment: Manifest) -> Manifest:
    return deployment["spec"]["template"]["spec"]


def container(deployment: Manifest) -> Manifest:
    (only,) = pod(deployment)["containers"]
    return only


def written(path: Path) -> Manifest:
    return yaml.safe_load(path.read_text())


def require_valid(manifest: Manifest) -> None:
    """Refuse what an API server would: unknown keys, wrong types."""
    custom = CUSTOM.get(manifest["kind"])
    if custom is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    # Keys that these models do not know they leave out.
    kept = custom.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert kept == manifest


@functools.cache
def serve_parser() -> Any:
    """vLLM's own, with our options in it."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tests.upstream import make_arg_parser

    register()
    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
    return parser


def options(*args: str) -> Any:
    """What `vllm serve` makes of a command line; `crop` are its settings, judged."""
    parsed = serve_parser().parse_args(["serve", *args])
    apply_options(parsed)
    parsed.crop = CropConfig.from_mapping(parsed.additional_config[CONFIG_KEY])
    parsed.model = parsed.model_tag or parsed.model
    return parsed


def served(variant: str, folder: Path) -> Any:
    """The options of a variant's container: the file it names lies where the ConfigMap is mounted."""
    args = container(server_of(variant))["args"]
    (mount,) = (m for m in container(server_of(variant))["volumeMounts"] if m["name"] == "config")
    (volume,) = (v for v in pod(server_of(variant))["volumes"] if v["name"] == "config")
    for name, text in of_kind(variant, "ConfigMap")[volume["configMap"]["name"]]["data"].items():
        (folder / name).write_text(text)
    return options(*(arg.replace(mount["mountPath"], str(folder)) for arg in args))


@packages
@everywhere
def test_each_variant_is_valid(variant: str) -> None:
    manifests = built(variant)
    assert {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget"} <= {m["kind"] for m in manifests}
    for manifest in manifests:
        require_valid(manifest)


@packages
@pytest.mark.parametrize(
    ("kind", "path", "key", "value"),
    [
        ("Deployment", ["spec", "template", "spec", "containers", 0, "startupProbe"], "failureTreshold", 180),
        ("Deployment", ["spec", "template", "spec", "containers", 0], "args", "--config"),
        ("PodDisruptionBudget", ["spec"], "maxUnavailible", 1),
        ("ScaledObject", ["spec"], "minReplicas", 2),
        ("ServiceMonitor", ["spec", "endpoints", 0], "scrapeIntervall", "15s"),
        ("PrometheusRule", ["spec", "groups", 0, "rules", 0], "expression", "up"),
    ],
)
def test_what_is_mistyped_is_refused(kind: str, path: list[Any], key: str, value: Any) -> None:
    manifest = copy.deepcopy(of_kind("gpu with everything", kind)["vllm-crop"])
    functools.reduce(lambda inner, step: inner[step], path, manifest)[key] = value
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        require_valid(manifest)


@packages
def test_the_kustomization_of_the_page_names_images_and_options() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    manifests = kustomized("page", block)
    images = [container(m)["image"] for m in manifests if m["kind"] == "Deployment"]
    assert images == ["registry.example.com/vllm-crop:gpu", "registry.example.com/vllm-router:0.1.17"]
    (config,) = (m for m in manifests if m["kind"] == "ConfigMap")
    assert config["data"] == {"serve.yaml": "model: yours"}


@packages
@everywhere
def test_the_file_in_the_config_map_is_what_is_served(variant: str, tmp_path: Path) -> None:
    parsed = served(variant, tmp_path)
    assert parsed.crop.pruning_rate in (0.778, 0.889)
    assert parsed.model == ("/models/tinyvqa" if variant.startswith("cpu") else "llava-hf/llava-1.5-7b-hf")


@packages
def test_a_mistyped_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = written(FOLDER / "overlays" / "gpu" / "serve.yaml")
    settings["crop-config"]["prunning_rate"] = 0.5
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        options("--config", str(tmp_path / "serve.yaml"))
    assert "prunning_rate" in capsys.readouterr().err


@packages
@everywhere
def test_a_pod_may_start_slowly_and_ends_gently(variant: str, tmp_path: Path) -> None:
    server, deployment = container(server_of(variant)), server_of(variant)["spec"]
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] == 1800
    assert deployment["progressDeadlineSeconds"] > 1800
    require_gentle_end(server, pod(server_of(variant)), served(variant, tmp_path))


def require_gentle_end(server: Manifest, its_pod: Manifest, parsed: Any) -> None:
    """Traffic stops before SIGTERM, requests that run may end, and SIGKILL comes after both."""
    program, pause = server["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, int(pause)) == ("sleep", 15)
    assert parsed.shutdown_timeout >= 30
    assert 15 + parsed.shutdown_timeout < its_pod["terminationGracePeriodSeconds"]


@packages
@everywhere
def test_services_budget_and_router_find_their_pods(variant: str) -> None:
    deployments = of_kind(variant, "Deployment")
    for name, service in of_kind(variant, "Service").items():
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        ports = {port["name"] for port in container(deployments[name])["ports"]}
        assert service["spec"]["selector"] == labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    labels = server_of(variant)["spec"]["template"]["metadata"]["labels"]
    assert of_kind(variant, "PodDisruptionBudget")["vllm-crop"]["spec"]["selector"]["matchLabels"] == labels


@packages
def test_the_router_takes_its_options_and_looks_for_the_servers() -> None:
    launch = pytest.importorskip("vllm_router.launch_router", reason="vllm-router is for x86-64 alone")
    router = container(of_kind("cpu behind a router", "Deployment")["vllm-crop-router"])
    asked = launch.parse_router_args(router["args"])
    server = server_of("cpu behind a router")
    assert asked.selector == server["spec"]["template"]["metadata"]["labels"]
    assert asked.service_discovery_port == container(server)["ports"][0]["containerPort"]
    assert asked.port in {port["containerPort"] for port in router["ports"]}


@packages
def test_the_autoscaler_asks_for_series_that_exist() -> None:
    everything = "gpu with everything"
    scaled = of_kind(everything, "ScaledObject")["vllm-crop"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in of_kind(everything, "Deployment")
    assert "replicas" not in server_of(everything)["spec"]
    monitor = of_kind(everything, "ServiceMonitor")["vllm-crop"]["spec"]
    watched = of_kind(everything, "Service")["vllm-crop"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= watched.items()
    require_exported(scaled["triggers"], f'job="{watched[monitor["jobLabel"]]}"')


def require_exported(triggers: Sequence[Manifest], selector: str) -> None:
    """Each trigger asks for one number, of a metric that vLLM has."""
    spec = importlib.util.find_spec("vllm.v1.metrics.loggers")
    assert spec is not None
    metrics = Path(str(spec.origin)).read_text()
    for trigger in triggers:
        found = re.fullmatch(r"sum\((vllm:\w+)\{(.*)\}\)", trigger["metadata"]["query"])
        assert found, trigger
        assert found[2] == selector
        assert f'name="{found[1]}"' in metrics


def test_the_operator_has_the_same_alerts() -> None:
    head, _, rules = (FOLDER / "components/monitoring/prometheusrule.yaml").read_text().partition("\nspec:\n")
    source = (ROOT / "deploy" / "prometheus" / "vllm-crop.rules.yml").read_text()
    assert rules == re.sub(r"^(?=.)", "  ", source, flags=re.MULTILINE), head


def test_a_cpu_serves_what_the_image_serves() -> None:
    source = ROOT / "docker" / "tinyvqa.yaml"
    if not source.exists():
        pytest.skip("without images")
    ours = written(FOLDER / "overlays" / "cpu" / "serve.yaml")
    assert ours["shutdown-timeout"]
    assert ours == written(source)


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
def test_pods_run_as_the_user_of_the_images_on_their_port(dockerfile: str) -> None:
    if not (ROOT / "docker" / dockerfile).exists():
        pytest.skip("without images")
    text = (ROOT / "docker" / dockerfile).read_text()
    runtime = written(FOLDER / "kserve" / "servingruntime.yaml")["spec"]["containers"][0]
    deployment = written(FOLDER / "base" / "deployment.yaml")
    security = [
        pod(deployment)["securityContext"],
        runtime["securityContext"],
        written(CHART / "values.yaml")["servingEngineSpec"]["securityContext"],
    ]
    for context in security:
        assert re.search(
            rf"^(?:USER|ARG SERVE_AS=) ?{context['runAsUser']}:{context['runAsGroup']}$", text, re.M
        )
    # The entrypoint is vllm serve: no command takes its place, and the arguments do not repeat it.
    for server in (container(deployment), runtime):
        assert "command" not in server
        assert server["args"][0] != "serve"
        assert server["ports"][0]["containerPort"] == 8000
        assert {entry["name"]: entry.get("value") for entry in server["env"]}["HOME"] == "/home/vllm"
    assert "VLLM_PLUGINS=crop" in text  # so that no manifest has to


class TestChart:
    """The chart itself is not here: what it makes of the values is said again, as its templates were read."""

    @staticmethod
    def known() -> set[str]:
        lines = (ROOT / "tests" / "production_stack_keys.txt").read_text().splitlines()
        return {line for line in lines if not line.startswith("#")}

    @classmethod
    def unknown(cls, values: Manifest) -> list[str]:
        known = cls.known()
        inner = [key.removesuffix("**") for key in known if key.endswith("**")]
        return [path for path in paths(values) if path not in known and not path.startswith(tuple(inner))]

    @staticmethod
    def deployment(values: Manifest) -> Manifest:
        engine = values["servingEngineSpec"]
        (model,) = engine["modelSpec"]
        quantities = {"cpu": str(model["requestCPU"]), "memory": model["requestMemory"]}
        labels = {"model": model["name"]}
        server = {
            "name": "vllm",
            "image": f"{model['repository']}:{model['tag']}",
            "securityContext": engine["containerSecurityContext"],
            "imagePullPolicy": engine["imagePullPolicy"],
            "env": model["env"],
            "resources": {
                "requests": quantities | {"nvidia.com/gpu": str(model["requestGPU"])},
                "limits": {"memory": model["limitMemory"]},
            },
            **{probe: engine[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe")},
        }
        spec = {
            "containers": [server],
            "securityContext": engine["securityContext"],
            "runtimeClassName": engine["runtimeClassName"],
        }
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": model["name"]},
            "spec": {
                "replicas": model["replicaCount"],
                "strategy": engine["strategy"],
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": spec},
            },
        }

    def test_keys_and_what_kubernetes_is_given(self) -> None:
        values = written(CHART / "values.yaml")
        assert self.unknown(values) == []
        require_valid(self.deployment(values))

    @pytest.mark.parametrize(
        ("path", "key"),
        [
            (["servingEngineSpec", "modelSpec", 0], "replicas"),
            (["servingEngineSpec", "modelSpec", 0, "vllmConfig"], "enablePrefixCacheing"),
            (["servingEngineSpec", "startupProbe", "httpGet"], "url"),
            (["routerSpec"], "routinglogic"),
            ([], "routerspec"),
        ],
    )
    def test_a_mistyped_key_is_refused(self, path: list[Any], key: str) -> None:
        values = written(CHART / "values.yaml")
        functools.reduce(lambda inner, step: inner[step], path, values)[key] = 1
        assert [found.rpartition(".")[2] for found in self.unknown(values)] == [key]

    def test_options(self) -> None:
        engine = written(CHART / "values.yaml")["servingEngineSpec"]
        (model,) = engine["modelSpec"]
        config = model["vllmConfig"]
        parsed = options(model["modelURL"], "--port", "8000", *config["extraArgs"])
        assert parsed.crop.pruning_rate == 0.778
        # Kubernetes' grace period is 30 s, and the chart has no setting for it.
        assert 0 < parsed.shutdown_timeout < 30
        assert config["enablePrefixCaching"] is True
        # The templates mount shared memory where tensorParallelSize is set, of whatever size.
        assert "shmSize" in model
        assert config["tensorParallelSize"] == 1

    def test_the_autoscaler_finds_deployment_and_series(self) -> None:
        (model,) = written(CHART / "values.yaml")["servingEngineSpec"]["modelSpec"]
        scaled = written(CHART / "scaledobject.yaml")
        require_valid(scaled)
        release = re.search(r"helm install (\S+)", (CHART / "values.yaml").read_text())
        assert release
        target = f"{release[1]}-{model['name']}-deployment-vllm"
        assert scaled["spec"]["scaleTargetRef"]["name"] == target
        require_exported(scaled["spec"]["triggers"], f'model="{model["name"]}"')


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Where scalars stand: "a.b[].c"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f"{at}[]")
    else:
        yield at


@pytest.fixture(scope="module")
def models() -> KServeModels:
    return KServeModels()


@packages
class TestKServe:
    @pytest.mark.parametrize("name", ["servingruntime", "inferenceservice"])
    def test_the_resources_are_valid(self, models: KServeModels, name: str) -> None:
        assert models.errors(written(FOLDER / "kserve" / f"{name}.yaml")) == []

    def test_what_is_mistyped_is_refused(self, models: KServeModels) -> None:
        service = written(FOLDER / "kserve" / "inferenceservice.yaml")
        service["spec"]["predictor"] |= {"minReplica": 1, "maxReplicas": "2"}
        service["spec"]["predictor"]["model"]["modelFormat"] = "vllm-crop"
        assert models.errors(service) == [
            "InferenceService.spec.predictor.minReplica: unknown",
            "InferenceService.spec.predictor.maxReplicas: no int",
            "InferenceService.spec.predictor.model.modelFormat: no mapping",
        ]

    def test_what_kubernetes_is_given_of_them(self) -> None:
        runtime, predictor = self.parts()
        resources = predictor["model"]["resources"]
        require_valid(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "predictor"},
                "spec": {
                    "containers": [{**runtime["containers"][0], "resources": resources}],
                    "volumes": runtime["volumes"],
                },
            }
        )

    def test_the_service_names_the_runtime_and_ends_gently(self) -> None:
        runtime, predictor = self.parts()
        (format_,) = runtime["supportedModelFormats"]
        assert predictor["model"]["runtime"] == "vllm-crop"
        assert predictor["model"]["modelFormat"].items() <= format_.items()
        server = runtime["containers"][0]
        parsed = options(*server["args"])
        assert (parsed.model, parsed.port) == ("/mnt/models", server["ports"][0]["containerPort"])
        assert parsed.crop.pruning_rate == 0.778
        require_gentle_end(server, predictor, parsed)

    @staticmethod
    def parts() -> tuple[Manifest, Manifest]:
        runtime = written(FOLDER / "kserve" / "servingruntime.yaml")["spec"]
        return runtime, written(FOLDER / "kserve" / "inferenceservice.yaml")["spec"]["predictor"]


def test_what_the_page_calls_refused_is_refused() -> None:
    text = (FOLDER / "README.md").read_text()
    refused = re.findall(r"\| `([^`|]+)` \| refused", text)
    assert len(refused) >= 3
    known = json.dumps([*REFUSED, *refused_with_eviction()])
    for flags in refused:
        assert flags in known
