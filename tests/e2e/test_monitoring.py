# SPDX-License-Identifier: Apache-2.0
"""What dashboard and alerts ask for is what servers export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from lab.evaluation.questions import make_test_set
from tests.e2e.conftest import API_KEY
from tests.tinyvqa import ask
from vllm_crop.localizers.decision import FALLBACKS
from vllm_crop.measuring.server import Server, get_text

pytestmark = pytest.mark.e2e

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "vllm-crop.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "vllm-crop.rules.yml").read_text())


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
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 15
    for expression in expressions:
        require_exported(expression, exported)
    outcomes = next(re.findall(r'outcome=~"([^"]*)"', e) for e in expressions if "outcome=~" in e)
    assert outcomes == ["|".join(FALLBACKS)]


def test_panels_have_ids_of_their_own_and_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_alerts_watch_what_servers_export(exported: str) -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in rules] == ["CropAnswersDiffer"]
    for rule in rules:
        require_exported(rule["expr"], exported)
        assert set(rule["annotations"]) == {"summary", "description"}
