# SPDX-License-Identifier: Apache-2.0
"""The study of compressors: which regions are asked with, and what is compared with what."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lab.evaluation.asking import Answer
from lab.evaluation.compressing import app, tasks_of
from lab.evaluation.compressing_report import (
    EVENLY,
    SOURCES,
    WHOLE,
    compare,
    markdown,
    print_report,
    summarize,
    with_localizer,
)
from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.questions import make_split
from lab.evaluation.store import ConditionResult
from lab.tinyvqa.questions import LOCAL
from vllm_crop.planning.geometry import Region

SCENES = make_split("dev", 4)
QUESTIONS = [question for scene in SCENES for question in scene.questions]


def result(condition: Condition, right: bool) -> ConditionResult:
    texts = [question.answer if right else "nothing" for question in QUESTIONS]
    return ConditionResult(condition, "transformers", tuple(Answer(text, 1.0, 1.0, 1) for text in texts))


def test_every_source_asks_with_its_own_regions() -> None:
    regions = {
        source: [
            region
            for task in tasks_of(Condition("plc", source, 0.9, "pool"), SCENES)
            for region in task.regions
        ]
        for source in SOURCES
    }
    local = [question.family in LOCAL for question in QUESTIONS]
    assert [region is not None for region in regions["exact"]] == local
    assert regions["exact, rim"] == regions["exact"]
    assert regions["shifted, rim"] == regions["shifted"]
    for exact, shifted in zip(regions["exact"], regions["shifted"], strict=True):
        assert (exact is None) == (shifted is None)
        assert exact is None or exact != shifted
    assert set(regions[WHOLE]) == {Region.whole()}
    assert set(regions[EVENLY]) == {None}


def test_gains_are_paired_at_one_rate_or_at_equal_cost() -> None:
    rival, costly = Condition("scope", None, 0.95), Condition("scope", None, with_localizer(0.95))
    results = [
        result(OFF, True),
        result(Condition("plc", "exact", 0.95, "resampler"), True),
        result(Condition("plc", "exact", 0.95, "pool"), False),
        result(Condition("plc", WHOLE, 0.95, "resampler"), False),
        result(Condition("plc", WHOLE, 0.95, "pool"), False),
        result(Condition("plc", WHOLE, 0.97, "pool"), True),
        result(rival, True),
        result(costly, True),
    ]
    gains = {(gain.ours, gain.other, gain.group): gain for gain in compare(SCENES, results)}
    assert {key: gain.gained.value for key, gain in gains.items()} == {
        ("resampler, exact at 0.95", "pool, exact at 0.95", "local"): 1.0,
        ("resampler, exact at 0.95", "SCOPE at 0.95", "local"): 0.0,
        ("resampler, exact at 0.95", "SCOPE at 0.839", "local"): 0.0,
        ("resampler, whole at 0.95", "pool, whole at 0.95", "local"): 0.0,
        ("resampler, whole at 0.95", "pool, whole at 0.95", "all"): 0.0,
        ("resampler, whole at 0.95", "SCOPE at 0.95", "local"): -1.0,
        ("resampler, whole at 0.95", "SCOPE at 0.95", "all"): -1.0,
    }
    chance = gains["resampler, exact at 0.95", "pool, exact at 0.95", "local"].chance
    assert chance == pytest.approx(2 * 0.5 ** sum(q.family in LOCAL for q in QUESTIONS) * 6, rel=0.5)
    rows = summarize(SCENES, results)
    told = markdown(rows, list(gains.values()), 4, "dev")
    assert "| resampler, exact |  | 100.0 |  |" in told
    assert "| pool, whole | 0.95 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in told
    console = Console(file=io.StringIO(), record=True, width=120)
    print_report(console, rows, list(gains.values()), len(SCENES))
    assert "corrected by Holm for all 7" in " ".join(console.export_text().split())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sources", "shfted"),
        ("--compressions", "mean"),
        ("--rivals", "foo"),
        ("--rates", "abc"),
        ("--rates", "1.5"),
    ],
)
def test_what_is_unknown_is_not_measured(option: str, value: str) -> None:
    ran = CliRunner().invoke(app, [option, value])
    assert ran.exit_code == 2
    assert value in ran.output
