# SPDX-License-Identifier: Apache-2.0
"""deploy/compose: what containers are told, as far as it can be told without running them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_crop.config import CropConfig

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
SERVICES: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]


def aliases(service: dict[str, Any]) -> list[str]:
    networks = service.get("networks")
    return networks["default"]["aliases"] if isinstance(networks, dict) else []


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [volume.rsplit(":ro", 1)[0].rsplit(":", 1) for volume in service.get("volumes", ())]
    return [(source, target) for source, target in pairs]


@pytest.fixture(scope="module")
def dclint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which brings dclint and with it compose's schema")
    folder = tmp_path_factory.mktemp("dclint")
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, "dclint@3"], check=True)
    return folder / "node_modules" / ".bin" / "dclint"


def test_it_is_what_composes_schema_allows(dclint: Path, tmp_path: Path) -> None:
    done = subprocess.run([dclint, "compose.yaml"], cwd=COMPOSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = (COMPOSE / "compose.yaml").read_text().replace("stop_grace_period:", "stop_grace:")
    (tmp_path / "compose.yaml").write_text(wrong)
    assert subprocess.run([dclint, "compose.yaml"], cwd=tmp_path, capture_output=True).returncode == 1


def test_one_server_of_each_profile_is_the_one_that_is_scraped() -> None:
    servers = {name: service for name, service in SERVICES.items() if "server" in aliases(service)}
    profiles = [profile for service in servers.values() for profile in service["profiles"]]
    assert sorted(profiles) == ["cpu", "gpu", "localizer"]
    (job,) = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    for service in servers.values():
        assert service["ports"] == ["127.0.0.1:8000:8000"], "nobody from elsewhere gets in unasked"


def test_what_is_mounted_is_there() -> None:
    named = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["volumes"]
    for name, service in SERVICES.items():
        for source, _ in mounts(service):
            if source not in named and not source.startswith("${"):
                assert (COMPOSE / source).exists(), (name, source)
    (dashboards,) = yaml.safe_load((COMPOSE / "grafana" / "dashboards.yaml").read_text())["providers"]
    targets = {target: source for source, target in mounts(SERVICES["grafana"])}
    folder = COMPOSE / targets[dashboards["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()


def test_images_can_be_built_here() -> None:
    built = [service for service in SERVICES.values() if "build" in service]
    assert {service["image"] for service in built} == {"vllm-crop:cpu", "vllm-crop:gpu"}
    for service in built:
        assert (COMPOSE / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_servers_are_told_what_they_understand() -> None:
    asking = yaml.safe_load((COMPOSE / "asking.yaml").read_text())
    localizer = CropConfig.from_mapping(asking["crop-config"]).localizer
    command = SERVICES["localizer"]["command"]
    assert localizer.base_url == "http://localizer:8000/v1"
    assert localizer.model == command[command.index("--served-model-name") + 1]
    CropConfig.from_mapping(yaml.safe_load((COMPOSE / "gpu.yaml").read_text())["crop-config"])
    for name in ("gpu", "cpu-asking"):
        command, targets = SERVICES[name]["command"], [target for _, target in mounts(SERVICES[name])]
        assert command[command.index("--config") + 1] in targets


@pytest.mark.parametrize(
    ("service", "settings"),
    [
        ("cpu", "docker/tinyvqa.yaml"),
        ("cpu-asking", "deploy/compose/asking.yaml"),
        ("gpu", "deploy/compose/gpu.yaml"),
    ],
)
def test_requests_that_run_are_finished_within_the_grace_period(service: str, settings: str) -> None:
    waits = yaml.safe_load((ROOT / settings).read_text())["shutdown-timeout"]
    assert 0 < waits < int(SERVICES[service]["stop_grace_period"].removesuffix("s"))


def test_weights_are_mounted_without_the_login_beside_them() -> None:
    (source, target) = mounts(SERVICES["gpu"])[0]
    assert source.endswith("/hub")
    assert SERVICES["gpu"]["environment"]["HF_HUB_CACHE"] == target


def test_defaults_within_braces_have_none_of_their_own() -> None:
    """Older composes end `${NAME:-default}` at the first closing brace."""
    text = (COMPOSE / "compose.yaml").read_text()
    assert not [found for found in re.findall(r"\$\{[^}\n]*", text) if "{" in found[2:]]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus: apt-get install prometheus")
def test_prometheus_reads_its_settings_and_our_rules(tmp_path: Path) -> None:
    for source, target in mounts(SERVICES["prometheus"]):
        if (COMPOSE / source).is_file():
            shutil.copy(COMPOSE / source, tmp_path / Path(target).name)
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout
