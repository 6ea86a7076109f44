# SPDX-License-Identifier: Apache-2.0
"""The evaluation asks a real engine what it asks plain transformers, and gets the same answers and counts."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from lab.evaluation.asking import SceneTask, ask
from lab.evaluation.conditions import CROP_METHODS, LOCATE, OFF, Condition
from lab.evaluation.questions import make_test_set
from lab.evaluation.regions import regions_for
from lab.evaluation.served.accounting import Accounting, CountError
from lab.evaluation.served.offline import EngineAnswers
from lab.evaluation.transformers_answers import TransformersAnswers
from tests.cpu import conftest
from tests.untrained_tinyvqa import make_untrained
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import InvalidCropError
from vllm_crop.families.qwen_vl import SmartResize

pytestmark = pytest.mark.vllm_runtime

CELLS = (
    OFF,
    Condition(LOCATE),
    Condition("no-image"),
    Condition("resize", None, 0.889),
    Condition("two-images", "oracle", 0.889),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained(tmp_path_factory.mktemp("served"), layers=4)


def start(tiny: Path, crop: dict[str, Any] | None) -> EngineAnswers:
    processor = AutoProcessor.from_pretrained(tiny)
    config = None if crop is None else CropConfig.from_mapping(crop)
    engine = EngineAnswers(
        Accounting(str(tiny), processor, SmartResize.of_processor(processor.image_processor), config), crop
    )
    conftest._KEPT.append(engine.llm)
    return engine


@pytest.fixture(scope="module")
def engine(tiny: Path) -> EngineAnswers:
    """Stock vLLM."""
    return start(tiny, None)


@pytest.fixture(scope="module")
def crop_engine(tiny: Path) -> EngineAnswers:
    """Prepared for every method."""
    return start(tiny, {"method": "plc", "eviction_layers": [1], "position_ids": "original"})


@pytest.mark.parametrize("condition", CELLS, ids=lambda condition: condition.slug)
def test_the_engine_answers_as_transformers_does(
    condition: Condition, tiny: Path, engine: EngineAnswers
) -> None:
    check(condition, tiny, engine)


@pytest.mark.parametrize("method", CROP_METHODS)
def test_crop_is_served_as_transformers_runs_its_plans(
    method: str, tiny: Path, crop_engine: EngineAnswers
) -> None:
    check(Condition(method, "oracle", 0.667), tiny, crop_engine)


def test_a_rate_that_cannot_be_met_is_refused_before_anything_is_sent(crop_engine: EngineAnswers) -> None:
    scene = make_test_set(1)[0]
    regions = regions_for("oracle", [scene])[0]
    with pytest.raises(InvalidCropError, match="pruning_rate"):
        crop_engine.answer(Condition("ilp", "oracle", 0.926), [SceneTask(scene, tuple(regions))])


def check(condition: Condition, tiny: Path, engine: EngineAnswers) -> None:
    scenes = make_test_set(2)
    regions = (
        regions_for("oracle", scenes) if condition.region else [[None] * len(s.questions) for s in scenes]
    )
    tasks = [SceneTask(scene, tuple(row)) for scene, row in zip(scenes, regions, strict=True)]
    expected = TransformersAnswers(tiny, (1,)).answer(condition, tasks)
    for served, plain in zip(engine.answer(condition, tasks), expected, strict=True):
        for one, other in zip(served, plain, strict=True):
            assert one.text == other.text
            counts = [(a.visual_tokens, a.kv_tokens, a.prompt_tokens) for a in (one, other)]
            assert counts[0] == pytest.approx(counts[1])
    assert engine.first_token_ms(condition, tasks[0]) > 0


def test_a_prompt_of_another_length_than_planned_is_an_error(engine: EngineAnswers) -> None:
    scene = make_test_set(1)[0]
    (asked, *_) = ask(OFF, SceneTask(scene, (None,) * len(scene.questions)), engine.accounting.resize)
    with pytest.raises(CountError, match="planned are 576"):
        engine.accounting.answer(asked, "7", 400)
