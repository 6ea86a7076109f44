# SPDX-License-Identifier: Apache-2.0
"""What dashboard and alerts ask for is what servers export."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from lab.evaluation.questions import make_test_set
from lab.monitoring import RULES, as_query, panels, scraping
from tests.e2e.conftest import API_KEY
from tests.tinyvqa import ask
from vllm_crop.localizers.decision import FALLBACKS
from vllm_crop.measuring.server import Server, get_text

pytestmark = pytest.mark.e2e

ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs Prometheus: apt-get install prometheus"
)


@pytest.fixture
def exported(localizing_server: Server, checked_server: Server) -> str:
    """What two servers show: one has been asked, the other checks what it is asked."""
    client = openai.OpenAI(base_url=f"{localizing_server.base_url}/v1", api_key=API_KEY)
    (scene,) = make_test_set(1, seed=9)
    for _ in range(3):  # by two API processes, one of which knows the answer then
        ask(client, scene.picture(), scene.questions[0].text)
    return "".join(get_text(f"{one.base_url}/metrics") for one in (localizing_server, checked_server))


def names_with_labels(expression: str) -> Iterator[tuple[str, list[str]]]:
    """The metrics of an expression and the labels that it needs of them."""
    grouped = re.findall(r"sum by \((\w+)\)", expression)
    for name, _, matchers in re.findall(r"((?:crop|vllm):\w+)(\{([^}]*)\})?", expression):
        yield name, [*re.findall(r"(\w+)=~?", matchers), *grouped]


def require_exported(expression: str, exported: str) -> None:
    names = list(names_with_labels(expression))
    assert names, expression
    for name, labels in names:
        samples = re.findall(rf"^{name}\{{(.*)\}} ", exported, re.MULTILINE)
        assert samples, f"{name} is not exported"
        assert all(f'{label}="' in samples[0] for label in labels), (name, labels)


def test_the_dashboard_shows_what_servers_export(exported: str) -> None:
    expressions = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    assert len(expressions) > 15
    for expression in expressions:
        require_exported(expression, exported)
    outcomes = next(re.findall(r'outcome=~"([^"]*)"', e) for e in expressions if "outcome=~" in e)
    assert outcomes == ["|".join(FALLBACKS)]


def test_panels_have_ids_of_their_own_and_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_alerts_watch_what_servers_export(exported: str) -> None:
    for rule in ALERTS:
        require_exported(rule["expr"], exported)
        assert set(rule["annotations"]) == {"summary", "description"}


def test_failures_of_the_localizer_are_fallbacks() -> None:
    (expression,) = (rule["expr"] for rule in ALERTS if rule["alert"] == "CropLocalizerFails")
    (outcomes,) = re.findall(r'outcome=~"([^"]*)"', expression)
    assert set(outcomes.split("|")) < set(FALLBACKS)


@promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    tested = yaml.safe_load(RULES.with_suffix(".test.yml").read_text())
    assert {case["alertname"] for test in tested["tests"] for case in test["alert_rule_test"]} == {
        rule["alert"] for rule in ALERTS
    }
    for command in (["check", "rules", RULES.name], ["test", "rules", RULES.with_suffix(".test.yml").name]):
        done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_a_real_prometheus_answers_every_panel(
    exported: str, localizing_server: Server, checked_server: Server, tmp_path: Path
) -> None:
    with scraping([localizing_server.base_url, checked_server.base_url], tmp_path) as prometheus:
        # A rate takes two scrapes.
        prometheus.wait_for("rate(crop:requests_total[30s])")
        prometheus.wait_for("rate(crop:shadow_first_tokens_total[30s])")
        empty = []
        for panel in panels():
            for target in panel.get("targets", ()):
                query = as_query(target["expr"], "30s")
                if not prometheus.get("query", query=query)["result"]:
                    empty.append(panel["title"])
        # Rates of histograms that nothing was added to meanwhile have no quantiles: NaN, but a value.
        assert not empty
        groups = prometheus.get("rules")["groups"]
        prometheus.wait_for('up{job="vllm"} == 1')
        healths = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        assert set(healths) == {rule["alert"] for rule in ALERTS}
        assert "err" not in healths.values()
