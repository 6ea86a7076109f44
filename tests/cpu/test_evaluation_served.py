# SPDX-License-Identifier: Apache-2.0
"""The evaluation asks a real engine what it asks plain transformers, and gets the same answers and counts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vllm_crop.evaluation.asking import SceneTask
from vllm_crop.evaluation.cells import LOCATE, OFF, GridCell
from vllm_crop.evaluation.checkpoint_size import token_size
from vllm_crop.evaluation.questions import make_test_set
from vllm_crop.evaluation.regions import regions_for
from vllm_crop.evaluation.served.accounting import Accounting, CountError
from vllm_crop.evaluation.served.offline import EngineAnswers
from vllm_crop.evaluation.transformers_answers import TransformersAnswers
from vllm_crop.tinyvqa import checkpoint, words

pytestmark = pytest.mark.vllm_runtime

CELLS = (
    OFF,
    GridCell(LOCATE),
    GridCell("no-image"),
    GridCell("resize", None, 0.889),
    GridCell("two-images", "oracle", 0.889),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = words.make_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(tokenizer, hidden=64, layers=4))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    folder = tmp_path_factory.mktemp("served")
    checkpoint.save(folder, model, checkpoint.make_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def engine(tiny: Path) -> EngineAnswers:
    """Stock vLLM."""
    processor = AutoProcessor.from_pretrained(tiny)
    return EngineAnswers(Accounting(str(tiny), processor, token_size(processor), None), None)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.slug)
def test_the_engine_answers_as_transformers_does(cell: GridCell, tiny: Path, engine: EngineAnswers) -> None:
    scenes = make_test_set(2)
    regions = regions_for("oracle", scenes) if cell.region else [[None] * len(s.questions) for s in scenes]
    tasks = [SceneTask(scene, tuple(row)) for scene, row in zip(scenes, regions, strict=True)]
    expected = TransformersAnswers(tiny, (1,)).answer(cell, tasks)
    for served, plain in zip(engine.answer(cell, tasks), expected, strict=True):
        for one, other in zip(served, plain, strict=True):
            assert one.text == other.text
            counts = [(a.visual_tokens, a.kv_tokens, a.prompt_tokens) for a in (one, other)]
            assert counts[0] == pytest.approx(counts[1])
    assert engine.ttft_ms(cell, tasks * 2) > 0


def test_a_prompt_of_another_length_than_planned_is_an_error(engine: EngineAnswers) -> None:
    scene = make_test_set(1)[0]
    from vllm_crop.evaluation.asking import ask

    (asked, *_) = ask(OFF, SceneTask(scene, (None,) * len(scene.questions)), engine.accounting.size)
    with pytest.raises(CountError, match="planned are 576"):
        engine.accounting.answer(asked, "7", 400)
