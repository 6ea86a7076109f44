# SPDX-License-Identifier: Apache-2.0
"""Names that clients give images (`uuid`) never decide what a request is answered from."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache

from tests.conftest import CheckpointOf
from tests.cpu.conftest import (
    SETTINGS,
    Answer,
    Engine,
    EngineOf,
    Question,
    ReferenceFor,
    ReferenceOf,
    _answer,
)
from tests.cpu.test_parity import TOLERANCE, difference
from tests.families import QWEN2_5_VL
from tests.pictures import noise_image

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]
# Of more and fewer tokens: what is taken for the other is noticed, or would end the engine.
SMALL, LARGE = (168, 168), (448, 336)
STEPS = 3  # of which the first would show another image already
METHODS = ["plc", "ilp", "plc+ilp", "off"]
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def engine(engine_of: EngineOf) -> Engine:
    return engine_of(QWEN2_5_VL, "staged")


@pytest.fixture(scope="module")
def engine_without_cache(checkpoint_of: CheckpointOf) -> Engine:
    """Nothing but the encoder cache and ours is there to mix images up."""
    setting = SETTINGS["staged"]
    checkpoint = checkpoint_of(QWEN2_5_VL, QWEN2_5_VL.deep)
    options = {**setting.options, "mm_processor_cache_gb": 0, "enable_prefix_caching": False}
    return Engine(checkpoint, setting.crop, QWEN2_5_VL, **options)


@pytest.fixture(scope="module")
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(QWEN2_5_VL, "staged")


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    return noise_image(number).resize(size)


def named(
    engine: Engine, question: Question, names: Sequence[str | None], sent: Sequence[bool], **options: Any
) -> Answer:
    """Ask with names for the images, some of which are not sent."""
    prompt = question.prompt(engine.image)
    images = [image if is_sent else None for image, is_sent in zip(question.images, sent, strict=True)]
    prompt |= {"multi_modal_data": {"image": images}, "multi_modal_uuids": {"image": list(names)}, **options}
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)
    (output,) = engine.llm.generate([prompt], sampling, use_tqdm=False)
    return _answer(output)


def check(engine: Engine, reference_for: ReferenceFor, question: Question, answer: Answer) -> None:
    reference = reference_for(question, engine.config, steps=STEPS)
    assert answer.token_ids == reference.token_ids
    assert difference(answer, reference) <= TOLERANCE


def crop_of(method: str, regions: list[Any]) -> dict[str, Any]:
    return {"regions": regions, "method": method, "pruning_rate": 0.5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(SMALL, LARGE), (LARGE, SMALL)], ids=["small first", "large first"])
def test_one_name_for_two_images_of_a_request_is_refused(
    engine: Engine, reference_for: ReferenceFor, sizes: tuple[Any, Any], method: str
) -> None:
    images = tuple(picture(80 + index, size) for index, size in enumerate(sizes))
    question = Question(images, crop_of(method, [FIRST, SECOND]))
    with pytest.raises(VLLMValidationError, match="uuid: 'twice' stands for two different images") as caught:
        named(engine, question, ["twice"] * 2, [True] * 2)
    assert caught.value.parameter == "uuid"
    check(engine, reference_for, question, named(engine, question, ["one", "other"], [True] * 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_name_given_to_another_image_later_is_the_later_image(
    engine: Engine, reference_for: ReferenceFor, method: str
) -> None:
    name = f"moves-{method}"
    for number, size in ((90, SMALL), (91, LARGE), (90, SMALL), (92, SMALL)):
        question = Question((picture(number, size),), crop_of(method, [FIRST]))
        check(engine, reference_for, question, named(engine, question, [name], [True]))
        check(engine, reference_for, question, named(engine, question, [name], [False]))


@pytest.mark.parametrize("method", METHODS)
def test_without_vllms_cache_names_decide_nothing_either(
    engine_without_cache: Engine, reference_for: ReferenceFor, method: str
) -> None:
    small, large = picture(85, SMALL), picture(86, LARGE)
    for images in ((small, large), (large, small)):
        question = Question(images, crop_of(method, [FIRST, SECOND]))
        with pytest.raises(VLLMValidationError, match="stands for two different images"):
            named(engine_without_cache, question, ["twice"] * 2, [True] * 2)
    for image in (small, large, small):
        question = Question((image,), crop_of(method, [FIRST]))
        answer = named(engine_without_cache, question, ["moves"], [True])
        check(engine_without_cache, reference_for, question, answer)


def test_the_same_image_twice_under_one_name_is_no_contradiction(
    engine: Engine, reference_for: ReferenceFor
) -> None:
    image = picture(93, LARGE)
    question = Question((image, image), crop_of("plc", [FIRST, SECOND]))
    check(engine, reference_for, question, named(engine, question, ["same"] * 2, [True] * 2))
    check(engine, reference_for, question, named(engine, question, ["same"] * 2, [True, False]))
    check(engine, reference_for, question, named(engine, question, ["same"] * 2, [False] * 2))


def test_a_name_alone_can_ask_about_every_region(engine: Engine, reference_for: ReferenceFor) -> None:
    """vLLM's cache has the image with one region only: the image is supplied again."""
    image, name = picture(94, LARGE), "any-region"
    first = Question((image,), crop_of("plc", [FIRST]))
    check(engine, reference_for, first, named(engine, first, [name], [True]))
    for method in METHODS:
        for region in (SECOND, None, FIRST):
            question = Question((image,), crop_of(method, [region]))
            check(engine, reference_for, question, named(engine, question, [name], [False]))


def test_salts_keep_names_apart(engine: Engine, reference_for: ReferenceFor) -> None:
    ours, theirs = (
        Question((picture(number, size),), crop_of("plc", [FIRST]))
        for number, size in ((95, SMALL), (96, LARGE))
    )
    for question, salt in ((ours, "us"), (theirs, "them")):
        named(engine, question, ["shared"], [True], cache_salt=salt)
    for question, salt in ((ours, "us"), (theirs, "them")):
        answer = named(engine, question, ["shared"], [False], cache_salt=salt)
        check(engine, reference_for, question, answer)


@pytest.mark.parametrize("region", [FIRST, None])
def test_a_name_nobody_knows_is_vllms_cache_miss(engine: Engine, region: Any) -> None:
    image = picture(97 if region else 98, SMALL)
    question = Question((image,), crop_of("plc", [region]))
    known = engine.processor.known_images(engine.llm.llm_engine.renderer.mm_processor_cache)
    before = set(known._data)
    named(engine, question, [f"known-{region}"], [True])
    (key,) = set(known._data) - before
    # What vLLM's cache knows the image by is no name either.
    for name in ("never seen", key):
        with pytest.raises(ValueError, match="data is not provided"):
            named(engine, question, [name], [False])


def test_what_is_refused_late_is_not_taken_for_sent(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache that vLLM has where its engine is another process: it remembers what the engine has."""
    renderer, own = engine.llm.llm_engine.renderer, engine.llm.llm_engine.input_processor
    cache = LruKeyReplicatedSenderCache(engine.llm.model_config)
    monkeypatch.setattr(renderer, "_mm_processor_cache", cache)
    prompt = Question((picture(140, LARGE),), crop_of("ilp", [FIRST])).prompt(engine.image)

    def comes_with_data(**refused_for: int) -> bool:
        processed = engine.llm._preprocess_cmpl_one(copy.deepcopy(prompt))
        sampling = SamplingParams(temperature=0, max_tokens=1, **refused_for)
        with pytest.raises(VLLMValidationError) if refused_for else nullcontext():
            own.process_inputs("late", processed, sampling, supported_tasks=("generate",))
        return bool(processed["mm_kwargs"]["image"] != [None])

    assert comes_with_data(prompt_logprobs=1)
    assert comes_with_data(prompt_logprobs=1), "it was not sent"
    assert comes_with_data()
    assert not comes_with_data(prompt_logprobs=1), "the engine has it"
    assert not comes_with_data(), "and keeps it"
