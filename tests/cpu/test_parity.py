# SPDX-License-Identifier: Apache-2.0
"""The served model computes what plain transformers computes from the same compressed embeddings."""

import pytest
import torch

from tests.cpu.conftest import Answer, Engine, EngineOf, Question, ReferenceFor, ReferenceOf
from tests.families import FAMILIES, Family
from tests.pictures import noise_image
from tests.reference import Reference
from vllm_crop.models.encoder import CompressingEncoder
from vllm_crop.planning.geometry import Region

pytestmark = pytest.mark.vllm_runtime
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)

TOLERANCE = 1e-5  # nats, float32, over the full vocabulary
NOTICEABLE = 1e-2  # what a wrong plan or wrong positions must change at least

WIDE, TALL, SQUARE = noise_image(1, 500, 400), noise_image(2, 300, 420), noise_image(3)


def cells(*corners: int) -> list[list[float]]:
    """One region as 8x8 cells, both ends included."""
    return Region.from_grid_cells(*corners).as_lists()


TWO_BOXES = [*cells(0, 0, 1, 1), *cells(5, 5, 6, 7)]
SCENARIOS = {
    "none": Question((WIDE,), {"regions": [None]}),
    "field left out": Question((WIDE,)),
    "1x1 cell": Question((WIDE,), {"regions": [cells(3, 4, 3, 4)]}),
    "2x2 cells": Question((SQUARE,), {"regions": [cells(2, 3, 3, 4)]}),
    "4x4 cells": Question((TALL,), {"regions": [cells(1, 2, 4, 5)], "pruning_rate": 0.667}),
    "region larger than the budget": Question((SQUARE,), {"regions": [cells(0, 0, 7, 7)]}),
    "two boxes": Question((SQUARE,), {"regions": [TWO_BOXES]}),
    "two images": Question((WIDE, TALL), {"regions": [cells(2, 3, 3, 4), cells(4, 1, 5, 2)]}),
    "one of two images": Question((WIDE, TALL), {"regions": [None, cells(4, 1, 5, 2)]}),
    "same image, two regions": Question(
        (SQUARE, SQUARE), {"regions": [cells(0, 0, 1, 1), cells(6, 6, 7, 7)]}
    ),
    "region out of view": Question((WIDE,), {"regions": [[0.0, 0.4, 0.05, 0.6]]}),
    "off": Question((WIDE,), {"regions": [cells(3, 4, 3, 4)], "method": "off"}),
    "text only": Question(text="USER: {images}What is the time?\nASSISTANT:"),
}
UNPRUNED = {"none", "field left out", "region out of view", "off", "text only"}


def difference(answer: Answer | Reference, reference: Reference) -> float:
    """Largest absolute difference of logprobs over all steps and the whole vocabulary."""
    return float((answer.logprobs - reference.logprobs).abs().max())


def control_for(name: str, question: Question) -> Question:
    """The mistake to be noticed: pruned questions answered unpruned, unpruned ones pruned."""
    if name in UNPRUNED:
        crop = {"regions": [cells(2, 3, 3, 4) for _ in question.images]}
        return Question(question.images, crop, question.text)
    return Question(question.images, {"method": "off"}, question.text)


def check(engine: Engine, question: Question, reference_for: ReferenceFor, name: str) -> None:
    (answer,) = engine.ask(question)
    reference = reference_for(question, engine.config)
    error = difference(answer, reference)
    sensitivity = difference(reference_for(control_for(name, question), engine.config), reference)
    print(
        f"{name}: {answer.num_prompt_tokens} prompt tokens, max |delta logprob| {error:.1e}; "
        f"control {sensitivity:.1e}"
    )
    assert answer.num_prompt_tokens == reference.num_prompt_tokens
    assert answer.token_ids == reference.token_ids
    assert error <= TOLERANCE
    assert sensitivity > NOTICEABLE or not question.images


@each_family
@pytest.mark.parametrize("name", SCENARIOS)
def test_pooling_equals_transformers(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, name: str
) -> None:
    check(engine_of(family, "pool"), SCENARIOS[name], reference_of(family, "pool"), name)


@each_family
@pytest.mark.parametrize("name", SCENARIOS)
def test_sampling_with_original_positions_equals_transformers(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, name: str
) -> None:
    check(engine_of(family, "original"), SCENARIOS[name], reference_of(family, "original"), name)


@each_family
@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - UNPRUNED))
def test_original_positions_change_the_answer(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, name: str
) -> None:
    """The control: an engine that renumbered would be noticed."""
    question, config, reference_for = (
        SCENARIOS[name],
        engine_of(family, "original").config,
        reference_of(family, "original"),
    )
    original = reference_for(question, config)
    renumbered = reference_for(question, config, original_positions=False)
    change = difference(renumbered, original)
    print(f"{family}, {name}: renumbered positions change {change:.1e}")
    assert change > NOTICEABLE


@each_family
def test_all_scenarios_in_one_batch(engine_of: EngineOf, reference_of: ReferenceOf, family: Family) -> None:
    engine = engine_of(family, "pool")
    answers = engine.ask(*SCENARIOS.values())
    for (name, question), answer in zip(SCENARIOS.items(), answers, strict=True):
        reference = reference_of(family, "pool")(question, engine.config)
        assert answer.token_ids == reference.token_ids, name
        assert difference(answer, reference) <= TOLERANCE, name


@each_family
def test_vision_tower_batches_hold_no_more_tokens_than_profiled(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family
) -> None:
    """One to ten images of all sizes: pruned they fit into one step, but not into one batch."""
    engine, reference_for = engine_of(family, "pool"), reference_of(family, "pool")
    images = [noise_image(310 + index, 250 + 60 * index, 400) for index in range(14)]
    questions = [
        Question(tuple(some), {"regions": [cells(1, 1, 2, 2)] * len(some), "pruning_rate": 0.96})
        for some in (images[:1], images[1:4], images[4:])
    ]
    encoder = engine.model.crop_encoder
    encoder.peak_tokens, before = 0, encoder.num_encoded
    for question, answer in zip(questions, engine.ask(*questions), strict=True):
        assert difference(answer, reference_for(question, engine.config)) <= TOLERANCE
    counts = [engine.processor.geometry.grid(*image.size).num_tokens for image in images]
    assert encoder.num_encoded == before + len(images)
    assert max(counts) <= encoder.peak_tokens <= encoder.max_tokens < sum(counts)
    # Made where vLLM makes a model's weights, which is no place that numpy can read.
    with torch.device("meta"):
        elsewhere = CompressingEncoder(engine.llm.llm_engine.vllm_config)
    assert elsewhere.max_tokens == encoder.max_tokens


@each_family
def test_off_is_bitwise_stock_vllm(engine_of: EngineOf, family: Family) -> None:
    pool_engine, stock_engine = engine_of(family, "pool"), engine_of(family, "stock")
    assert type(stock_engine.model).__module__ == f"vllm.model_executor.models.{family.module}"
    assert type(pool_engine.model).__module__ == f"vllm_crop.models.{family.module}"
    fresh = noise_image(17, 400, 400)
    (off,) = pool_engine.ask(Question((fresh,), {"method": "off"}))
    (stock,) = stock_engine.ask(Question((fresh,)))
    assert off.token_ids == stock.token_ids
    assert (off.logprobs == stock.logprobs).all()
