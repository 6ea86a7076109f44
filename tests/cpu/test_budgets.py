# SPDX-License-Identifier: Apache-2.0
"""Images that may cost so many tokens cost so many, and are what transformers makes of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.conftest import CheckpointOf
from tests.cpu.conftest import CHUNKED, STEPS, Engine, Question, decided
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.families import (
    GLM4V,
    INTERNVL,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Family,
)
from tests.foveated_reference import tiled
from tests.pictures import noise_image
from tests.reference import HfReference, Reference
from vllm_crop.crop_params import CropParams
from vllm_crop.localizers.thumbnails import shrink
from vllm_crop.planner import ImageDecision
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.request import CropRequest, Room, request_budgets

pytestmark = pytest.mark.vllm_runtime
QWEN = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, GLM4V)  # and what sees images as they do
FAMILIES = (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, *QWEN, INTERNVL, MISTRAL3)

MOST = 300  # visual tokens of a request
CROP: dict[str, Any] = {
    **{"pruning_rate": 0.8, "fit": "prune", "fit_floor": 5},
    "limits": {"max_tokens_per_request": MOST},
}
HERE = cells(2, 3, 3, 4)
WIDE, TALL, SQUARE = noise_image(701, 500, 380), noise_image(702, 300, 420), noise_image(703, 448, 448)
SCENARIOS = {
    "no region": Question((SQUARE,), {"max_tokens": 20}),
    "one token": Question((WIDE,), {"max_tokens": 1}),
    "with a region": Question((SQUARE,), {"max_tokens": 40, "regions": [HERE]}),
    "one for each": Question((WIDE, TALL), {"max_tokens": [30, 17]}),
    "one of two": Question((WIDE, TALL), {"max_tokens": [None, 17], "regions": [HERE, None]}),
    "same image, two bounds": Question((SQUARE, SQUARE), {"max_tokens": [30, 12]}),
    "same image, one with a region": Question((SQUARE, SQUARE), {"max_tokens": 30, "regions": [None, HERE]}),
    "more than it has": Question((TALL,), {"max_tokens": 100_000, "regions": [HERE]}),
    "first not seen": Question((WIDE, TALL), {"max_tokens": [0, 25], "regions": [HERE, HERE]}),
    "last not seen": Question((WIDE, TALL), {"max_tokens": [25, 0]}),
    "none seen": Question((WIDE, TALL), {"max_tokens": 0}),
    "brought to fit": Question((WIDE, TALL, SQUARE), {"regions": [HERE, None, None]}),
}
WHOLE = {"more than it has"}  # which still has to fit


@pytest.fixture(scope="module")
def engine_of(checkpoint_of: CheckpointOf) -> Callable[[Family], Engine]:
    return cache(
        lambda family: Engine(
            checkpoint_of(family, family.shallow), CROP, family, **CHUNKED, enable_mm_embeds=True
        )
    )


class Expected:
    """Answers with transformers: the planner says which tokens there are, this file what they show."""

    def __init__(self, hf: HfReference, engine: Engine) -> None:
        self.hf, self.planner, self.config = hf, engine.processor.planner, engine.config

    def decisions(self, question: Question) -> list[ImageDecision | None]:
        """None for images that are not seen."""
        params, number = CropParams.parse(question.crop or {}), len(question.images)
        budgets = request_budgets(params, self.config, number)
        seen = [index for index, budget in enumerate(budgets) if budget.max_tokens != 0]
        regions = [(params.regions or [None] * number)[index] for index in seen]
        bounds = tuple(params.tokens_of(number)[index] for index in seen)
        left = params.model_copy(update={"regions": regions, "max_tokens": bounds})
        asked = CropRequest(left, room=Room(MOST, MOST, True))
        planned = iter(self.planner.plan(asked, [question.images[index].size for index in seen]))
        return [next(planned) if index in seen else None for index in range(number)]

    def answer(self, question: Question) -> Reference:
        decisions = self.decisions(question)
        hf, kept = self.hf, [index for index, one in enumerate(decisions) if one is not None]
        without = replace(question, images=tuple(question.images[index] for index in kept))
        # Of an image that is not seen all that frames it is gone, and nothing else.
        first, *parts = question.prompt(hf.image)["prompt"].split(hf.image)
        text = first + "".join(
            ("" if one is None else hf.image) + part for one, part in zip(decisions, parts, strict=True)
        )
        prompt_ids = hf.processor.tokenizer.encode(text, add_special_tokens=False)
        seen = [one for one in decisions if one is not None]
        pieces = {id(one.plan): one for one in seen}

        def features_of(image: Image.Image, plan: TokenPlan) -> torch.Tensor:
            decision = pieces.get(id(plan))
            if decision is None or not decision.pieces:
                return hf.features(image)
            if hf.geometry.overview(*image.size):
                return tiled(hf, image, plan.grid, decision.pieces)
            return self.small(image, decision)

        hf.features_of = features_of  # type: ignore[method-assign]
        return hf.generate(prompt_ids, without.images, [one.plan for one in seen], STEPS)

    def small(self, image: Image.Image, decision: ImageDecision) -> torch.Tensor:
        """Each token of the image is the one of the small image that shows its middle."""
        assert decision.plan is not None
        (part,) = decision.plan.grid.parts
        (piece,), processor = decision.pieces, self.hf.processor.image_processor
        side, scale = processor.patch_size * processor.merge_size, piece.scale
        features = self.hf.features(shrink(image, (scale.cols * side, scale.rows * side)))
        assert len(features) == scale.num_tokens
        rows = [
            int((row + 0.5) / part.grid.rows * scale.rows) * scale.cols
            + int((col + 0.5) / part.grid.cols * scale.cols)
            for row in range(part.grid.rows)
            for col in range(part.grid.cols)
        ]
        return features[rows]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_scenarios_in_one_batch(
    engine_of: Callable[[Family], Engine], checkpoint_of: CheckpointOf, family: Family
) -> None:
    engine = engine_of(family)
    expected = Expected(family.reference(checkpoint_of(family, family.shallow)), engine)
    answers = engine.ask(*SCENARIOS.values())
    for (name, question), answer in zip(SCENARIOS.items(), answers, strict=True):
        reference = expected.answer(question)
        control = expected.answer(replace(question, crop={"method": "off"}))
        error, change = difference(answer, reference), difference(control, reference)
        print(f"{family}, {name}: {answer.num_prompt_tokens} tokens, {error:.1e}; unpruned {change:.1e}")
        assert answer.num_prompt_tokens == reference.num_prompt_tokens, name
        assert error <= TOLERANCE, name
        served_whole = name in WHOLE and all(one and one.plan is None for one in expected.decisions(question))
        assert (change <= TOLERANCE) if served_whole else (change > NOTICEABLE), name


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_counts_are_the_clients_own_arithmetic(engine_of: Callable[[Family], Engine], family: Family) -> None:
    engine = engine_of(family)
    grid = engine.processor.geometry.grid
    text = engine.ask(replace(SCENARIOS["none seen"], images=()))[0].num_prompt_tokens

    def visual(name: str) -> int:
        return engine.ask(SCENARIOS[name])[0].num_prompt_tokens - text

    for name, bound in (("no region", 20), ("with a region", 40)):
        taken = visual(name)
        frame = visual("one token") - 1  # what the chat's text has around an image
        exact = family not in QWEN or name == "with a region"
        assert taken - frame == bound if exact else bound // 2 < taken - frame <= bound, (name, taken, frame)
    assert grid(*SQUARE.size).num_tokens > 40


def test_a_limit_holds_for_embeddings_too(engine_of: Callable[[Family], Engine]) -> None:
    """Nobody can prune them: they are counted when the prompt has been expanded."""
    engine, sampling = engine_of(LLAVA), SamplingParams(max_tokens=1)
    width = engine.llm.model_config.get_hidden_size()

    def ask(rows: int, question: Question) -> int:
        data = {"multi_modal_data": {"image": torch.randn(len(question.images), rows, width)}}
        (answer,) = engine.llm.generate([question.prompt(engine.image) | data], sampling, use_tqdm=False)
        return len(answer.prompt_token_ids or ())

    one, two = Question((SQUARE,)), Question((SQUARE, SQUARE))
    assert ask(MOST, one) - ask(MOST - 50, one) == 50
    assert ask(MOST // 2, two) > MOST
    for rows, question in ((MOST + 1, one), (MOST // 2 + 1, two)):
        with pytest.raises(VLLMValidationError, match=f"room for {MOST} .limits.max_tokens_per_request"):
            ask(rows, question)


def test_a_servers_own_bound(checkpoint_of: CheckpointOf) -> None:
    """Of images that nobody says anything about; with eviction, what layers run with on average."""
    crop = {"max_tokens": 40, "method": "plc+ilp", "eviction_layers": [2]}
    engine = Engine(checkpoint_of(LLAVA, LLAVA.deep), crop, LLAVA)
    text = engine.ask(Question())[0].num_prompt_tokens
    asked: list[dict[str, Any]] = [{"method": "plc"}, {"regions": [HERE]}, {"method": "off"}]
    answers = [engine.ask(Question((SQUARE,), crop))[0] for crop in asked]
    compressed, evicted, off = (answer.num_prompt_tokens - text - 1 for answer in answers)  # a line break
    full = engine.processor.geometry.grid(*SQUARE.size).num_tokens
    assert (compressed, off) == (40, full)
    plan = decided(engine.processor, SQUARE, asked[1]).plan
    assert evicted == plan.num_embeddings > 40
    assert plan.tokens_avg(LLAVA.deep.layers) == pytest.approx(40, abs=0.5)
