# SPDX-License-Identifier: Apache-2.0
"""Compression by learned queries, served: against transformers, in caches, in batches, across weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CheckpointOf
from tests.cpu.conftest import CHUNKED, STEPS, Engine, Question, ReferenceFor, decided, reference_by
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, TWO_BOXES, cells, difference
from tests.families import FAMILIES, LLAVA, LLAVA_NEXT, QWEN2_5_VL, Family
from tests.pictures import noise_image
from tests.resampler_reference import random_resampler, resampling, weights_of, write_random_resampler
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.settings import ResamplerCard, ResamplerError, ResamplerShape
from vllm_crop.compression.weights import write_resampler
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.families.checkpoint import load_model_config
from vllm_crop.families.model_shape import feature_size
from vllm_crop.request import CropRequest

pytestmark = pytest.mark.vllm_runtime

CROP: dict[str, Any] = {
    **{"compression": "resampler", "pruning_rate": 0.8, "method": "plc+ilp", "eviction_layers": [2]},
}
HERE, THERE = cells(2, 3, 3, 4), cells(5, 1, 6, 2)
FIRST, SECOND = noise_image(700, 500, 400), noise_image(701, 300, 420)
SCENARIOS = {
    "region": Question((FIRST,), {"regions": [HERE]}),
    "compressed, nothing evicted": Question((FIRST,), {"regions": [HERE], "method": "plc"}),
    "evicted alone": Question((FIRST,), {"regions": [HERE], "method": "ilp", "pruning_rate": 0.6}),
    "without a rim": Question((SECOND,), {"regions": [THERE], "rim": 0, "method": "plc"}),
    "two boxes": Question((SECOND,), {"regions": [TWO_BOXES], "method": "plc"}),
    "two images": Question((FIRST, SECOND), {"regions": [HERE, THERE]}),
    "same image, two regions": Question((FIRST, FIRST), {"regions": [HERE, THERE], "method": "plc"}),
    "larger than the budget": Question((FIRST,), {"regions": [cells(0, 0, 7, 7)], "method": "plc"}),
    "very few": Question((FIRST,), {"regions": [HERE], "pruning_rate": 0.97, "method": "plc"}),
    "off": Question((FIRST,), {"regions": [HERE], "method": "off"}),
    "none": Question((SECOND,)),
}
POOLED = {"off", "none", "evicted alone"}


@pytest.fixture(scope="module")
def weights_for(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder of random weights for a family."""

    @cache
    def write(family: Family, seed: int = 0) -> Path:
        model = load_model_config(str(checkpoint_of(family, family.deep)))
        columns = feature_size(model)
        assert columns is not None
        folder = tmp_path_factory.mktemp("resampler") / f"{family}-{seed}"
        return write_random_resampler(folder, columns, model, seed)

    return write


def crop_of(folder: Path, **settings: Any) -> dict[str, Any]:
    return {**CROP, "resampler": {"weights": str(folder)}, **settings}


@pytest.fixture(scope="module")
def resampling_engine_of(
    checkpoint_of: CheckpointOf, weights_for: Callable[..., Path]
) -> Callable[[Family], Engine]:
    @cache
    def start(family: Family) -> Engine:
        checkpoint = checkpoint_of(family, family.deep)
        return Engine(checkpoint, crop_of(weights_for(family)), family, **CHUNKED)

    return start


@pytest.fixture(scope="module")
def hf_of(checkpoint_of: CheckpointOf) -> Callable[..., Any]:
    """transformers with the weights of `weights_for`."""

    @cache
    def make(family: Family, seed: int = 0) -> Any:
        checkpoint = checkpoint_of(family, family.deep)
        columns = feature_size(load_model_config(str(checkpoint)))
        assert columns is not None
        return resampling(family.reference, checkpoint, weights_of(random_resampler(columns, seed)))

    return make


@pytest.fixture(scope="module")
def reference_of(hf_of: Callable[..., Any]) -> Callable[..., ReferenceFor]:
    return cache(lambda family, seed=0: reference_by(hf_of(family, seed)))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_scenarios_in_one_batch(
    resampling_engine_of: Callable[[Family], Engine],
    reference_of: Callable[..., ReferenceFor],
    family: Family,
) -> None:
    engine, reference_for = resampling_engine_of(family), reference_of(family)
    pooled = CropConfig.from_mapping({**CROP, "compression": "pool"})
    answers = engine.ask(*SCENARIOS.values())
    for (name, question), answer in zip(SCENARIOS.items(), answers, strict=True):
        reference, control = reference_for(question, engine.config), reference_for(question, pooled)
        error, change = difference(answer, reference), difference(control, reference)
        print(f"{family}, {name}: {answer.num_prompt_tokens} tokens, {error:.1e}; pooled: {change:.1e}")
        assert answer.num_prompt_tokens == control.num_prompt_tokens, name
        assert error <= TOLERANCE, name
        assert (change <= TOLERANCE) if name in POOLED else (change > NOTICEABLE), name


def test_beside_others_and_from_the_cache_it_is_the_same_to_the_bit(
    resampling_engine_of: Callable[[Family], Engine],
) -> None:
    engine = resampling_engine_of(LLAVA)
    question = Question((noise_image(710, 500, 400),), {"regions": [HERE], "method": "plc"})
    (alone,) = engine.ask(question)
    hits = engine.model.crop_encoder.cache.num_hits
    engine.llm.reset_prefix_cache()
    other = Question(question.images, {"regions": [THERE], "method": "plc"})
    beside, answer = engine.ask(other, question)
    assert engine.model.crop_encoder.cache.num_hits > hits  # what the tower saw serves every region
    assert torch.equal(answer.logprobs, alone.logprobs)
    assert difference(beside, alone) > NOTICEABLE


@pytest.mark.parametrize("family", [LLAVA, LLAVA_NEXT], ids=str)
def test_all_of_an_image_is_read_evenly(
    resampling_engine_of: Callable[[Family], Engine], hf_of: Callable[..., Any], family: Family
) -> None:
    """With a bound and no region. Of LLaVA-NeXT's tiles, that of the whole image is seen and read alone."""
    engine, hf = resampling_engine_of(family), hf_of(family)
    question = Question((noise_image(711, 500, 400),), {"max_tokens": 40, "method": "plc"})
    plan = decided(engine.processor, question.images[0], question.crop).plan
    ids = hf.processor.tokenizer.encode(question.prompt(hf.image)["prompt"], add_special_tokens=False)
    reference, control = (
        hf.generate(ids, question.images, [one], STEPS) for one in (plan, replace(plan, zone=None))
    )
    (answer,) = engine.ask(question)
    print(f"{family}: {difference(answer, reference):.1e}; pooled: {difference(control, reference):.1e}")
    assert plan.num_embeddings == 40
    assert difference(answer, reference) <= TOLERANCE
    assert difference(control, reference) > NOTICEABLE


def test_untrained_weights_answer_as_pooling_does(
    checkpoint_of: CheckpointOf, tmp_path: Path, pool_engine: Engine
) -> None:
    checkpoint = checkpoint_of(LLAVA, LLAVA.shallow)
    model = load_model_config(str(checkpoint))
    columns = feature_size(model)
    assert columns is not None
    shape = ResamplerShape.suited_to(columns)
    card = ResamplerCard.untrained(shape, "tiny", model)
    write_resampler(tmp_path, Resampler(shape), card, "# Untrained\n")
    crop = {"compression": "resampler", "pruning_rate": 5 / 6, "resampler": {"weights": str(tmp_path)}}
    engine = Engine(checkpoint, crop, LLAVA, **CHUNKED)
    plain = [Question(one.images, {**(one.crop or {}), "method": "plc"}) for one in SCENARIOS.values()]
    for ours, pool in zip(engine.ask(*plain), pool_engine.ask(*plain), strict=True):
        assert torch.equal(ours.logprobs, pool.logprobs)


def test_its_memory_is_taken_while_vllm_measures(
    checkpoint_of: CheckpointOf, weights_for: Callable[..., Path]
) -> None:
    """Also where vLLM shows the model a video, as the largest item."""
    checkpoint = checkpoint_of(QWEN2_5_VL, QWEN2_5_VL.shallow)
    crop = {"compression": "resampler", "resampler": {"weights": str(weights_for(QWEN2_5_VL))}}
    engine = Engine(checkpoint, crop, QWEN2_5_VL, **CHUNKED)
    encoder = engine.model.crop_encoder
    assert encoder.largest_image == engine.processor.geometry.max_tokens
    encoder.resampler.rehearsed = False
    executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker
    getattr(worker, "worker", worker).model_runner.profile_run()
    assert encoder.resampler.rehearsed


def test_weights_come_back_with_the_models(
    resampling_engine_of: Callable[[Family], Engine], reference_of: Callable[..., ReferenceFor]
) -> None:
    engine = resampling_engine_of(LLAVA)
    question = Question((noise_image(712, 500, 400),), {"regions": [HERE], "method": "plc"})
    with torch.inference_mode():
        for part in engine.model.crop_encoder.resampler.module.parameters():
            part.zero_()  # as sleep mode leaves them
    engine.model.load_weights([])
    (answer,) = engine.ask(question)
    assert difference(answer, reference_of(LLAVA)(question, engine.config)) <= TOLERANCE


def test_other_weights_have_other_cache_keys(
    checkpoint_of: CheckpointOf,
    weights_for: Callable[..., Path],
    resampling_engine_of: Callable[[Family], Engine],
    reference_of: Callable[..., ReferenceFor],
) -> None:
    first = resampling_engine_of(LLAVA)
    second = Engine(checkpoint_of(LLAVA, LLAVA.deep), crop_of(weights_for(LLAVA, 1)), LLAVA, **CHUNKED)
    question = Question((FIRST,), {"regions": [HERE], "method": "plc"})
    # Names of what no engine is sent.
    unsent = Question((noise_image(713, 500, 400),), question.crop)
    assert image_hashes(first, unsent) != image_hashes(second, unsent)
    off = Question(unsent.images, {"method": "off"})
    assert image_hashes(first, off) == image_hashes(second, off)
    (answer,) = second.ask(question)
    assert difference(answer, reference_of(LLAVA, 1)(question, second.config)) <= TOLERANCE
    assert difference(answer, reference_of(LLAVA)(question, first.config)) > NOTICEABLE


def image_hashes(engine: Engine, question: Question) -> list[str]:
    prompt = engine.llm._preprocess_cmpl_one(question.prompt(engine.image))
    return list(prompt["mm_hashes"]["image"])


def test_weights_of_another_model_are_refused(
    checkpoint_of: CheckpointOf, weights_for: Callable[..., Path]
) -> None:
    with pytest.raises(ResamplerError, match="trained for another model"):
        Engine(checkpoint_of(LLAVA, LLAVA.shallow), crop_of(weights_for(LLAVA_NEXT)), LLAVA)


def test_a_localizers_view_is_not_resampled(resampling_engine_of: Callable[[Family], Engine]) -> None:
    processor = resampling_engine_of(LLAVA).processor
    asked = CropRequest(
        CropParams.parse({"regions": [[[0, 0, 1, 1]]], "pruning_rate": 0.9, "method": "plc"}),
        limited=False,
        overview=True,
    )
    (decision,) = processor.planner.plan(asked, [(500, 400)])
    assert decision.plan.compresses
    assert decision.plan.zone is None
