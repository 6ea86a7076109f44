# SPDX-License-Identifier: Apache-2.0
"""No cache ever answers with another region's tokens; what can be shared is shared."""

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError

from tests.cpu.conftest import STEPS, Answer, Engine, Question, ReferenceFor, ReferenceOf
from tests.cpu.test_parity import TOLERANCE, cells, difference
from tests.families import LLAVA
from tests.pictures import noise_image

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)


def right(engine: Engine, reference_for: ReferenceFor, *questions: Question) -> list[Answer]:
    """Ask all at once and compare each answer with the reference for its own regions."""
    answers = engine.ask(*questions)
    for question, answer in zip(questions, answers, strict=True):
        reference = reference_for(question, engine.config)
        assert answer.token_ids == reference.token_ids
        assert difference(answer, reference) <= TOLERANCE
    return answers


def about(image: Image.Image, region: list[list[float]] | None, text: str | None = None) -> Question:
    question = Question((image,), {"regions": [region]})
    return question if text is None else Question(question.images, question.crop, text)


def test_regions_of_one_image_differ(reference_for: ReferenceFor, pool_engine: Engine) -> None:
    """The control for this file: an answer for the wrong region would be noticed."""
    image = noise_image(30)
    first, second, whole = (
        reference_for(about(image, region), pool_engine.config) for region in (FIRST, SECOND, None)
    )
    assert difference(first, second) > 0.1
    assert difference(first, whole) > 0.1


@pytest.mark.parametrize("batched", [True, False], ids=["in one batch", "one after another"])
def test_another_region_of_the_same_image(
    pool_engine: Engine, reference_for: ReferenceFor, batched: bool
) -> None:
    image = noise_image(31 + batched)
    questions = [about(image, region) for region in (FIRST, SECOND, None, FIRST, SECOND)]
    if batched:
        right(pool_engine, reference_for, *questions)
    else:
        for question in questions:
            right(pool_engine, reference_for, question)


def test_one_image_twice_with_two_regions(pool_engine: Engine, reference_for: ReferenceFor) -> None:
    image = noise_image(33)
    for regions in ([FIRST, SECOND], [SECOND, FIRST], [FIRST, FIRST], [None, SECOND], [SECOND, None]):
        right(pool_engine, reference_for, Question((image, image), {"regions": regions}))


def test_partial_processor_cache_hits_in_another_order(
    pool_engine: Engine, reference_for: ReferenceFor
) -> None:
    one, two, three = (noise_image(seed) for seed in (34, 35, 36))
    right(pool_engine, reference_for, about(one, FIRST))
    right(pool_engine, reference_for, Question((two, one), {"regions": [SECOND, FIRST]}))
    right(pool_engine, reference_for, Question((one, three, two), {"regions": [FIRST, None, SECOND]}))
    right(pool_engine, reference_for, Question((three, two, one), {"regions": [FIRST, SECOND, SECOND]}))


def test_without_processor_cache_the_prompt_is_the_same(pool_engine: Engine) -> None:
    processor = pool_engine.processor
    images = [noise_image(37), noise_image(37), noise_image(38)]
    crop = {"regions": [FIRST, SECOND, None]}
    uncached = processor(
        "<image>\n<image>\n<image>\nhello",
        processor.info.parse_mm_data({"image": images}),
        hf_processor_mm_kwargs={"crop": crop},
    )
    placeholders = uncached["mm_placeholders"]["image"]
    assert [placeholder.length for placeholder in placeholders] == [96, 96, 576]
    hashes = uncached["mm_hashes"]["image"]
    assert len(set(hashes)) == 3


def test_prefix_cache_serves_the_same_region_only(pool_engine: Engine, reference_for: ReferenceFor) -> None:
    image = noise_image(39)
    (fresh,) = right(pool_engine, reference_for, about(image, FIRST))
    (again,) = right(pool_engine, reference_for, about(image, FIRST))
    (other,) = right(pool_engine, reference_for, about(image, SECOND))
    assert fresh.num_cached_tokens == 0
    assert again.num_cached_tokens >= 96  # the image, in blocks of 32
    assert other.num_cached_tokens == 0


def test_prefix_cache_serves_a_new_question_about_the_same_region(
    pool_engine: Engine, reference_for: ReferenceFor
) -> None:
    image = noise_image(40)
    right(pool_engine, reference_for, about(image, FIRST))
    (answer,) = right(pool_engine, reference_for, about(image, FIRST, "USER: {images}Who?\nASSISTANT:"))
    assert answer.num_cached_tokens == 96


def test_vision_tower_runs_once_per_image(pool_engine: Engine, reference_for: ReferenceFor) -> None:
    image = noise_image(41)
    encoder = pool_engine.model.crop_encoder
    before, hits = encoder.num_encoded, encoder.cache.num_hits
    for region in (FIRST, SECOND, cells(3, 3, 4, 4), None):
        right(pool_engine, reference_for, about(image, region))
    assert encoder.num_encoded == before + 1
    assert encoder.cache.num_hits == hits + 3


def test_profiling_is_not_answered_from_the_feature_cache(pool_engine: Engine) -> None:
    """All dummy items must reach the vision tower, or too little memory would be profiled."""
    dummy = pool_engine.processor.get_dummy_mm_inputs({"image": 1})
    (item,) = dummy["mm_kwargs"]["image"]
    assert len(item["crop_image_key"].data) == 0


@pytest.mark.parametrize(("engine_name", "most"), [("pool_engine", 1), ("original_engine", 3)])
def test_vision_tower_batches_are_no_larger_than_profiled(
    engine_name: str, most: int, reference_for: ReferenceFor, request: pytest.FixtureRequest
) -> None:
    """Many pruned images fit into one scheduler step by their tokens, but not into one vision batch."""
    engine = request.getfixturevalue(engine_name)
    images = [noise_image(50 + index) for index in range(12)]
    crop = {"regions": [FIRST] * 3, "pruning_rate": 0.96}
    questions = [Question(tuple(images[start : start + 3]), crop) for start in range(0, 12, 3)]
    encoder = engine.model.crop_encoder
    encoder.peak_tokens, before = 0, encoder.num_encoded
    right(engine, reference_for, *questions)
    assert encoder.num_encoded == before + 12
    assert encoder.peak_tokens == most * 576 <= encoder.max_tokens


def test_an_image_known_by_its_uuid_is_the_same_prompt(pool_engine: Engine) -> None:
    def ask(image: Image.Image | None, region: list[list[float]]) -> list[int]:
        prompt = about(noise_image(42), region).prompt()
        prompt |= {"multi_modal_data": {"image": [image]}, "multi_modal_uuids": {"image": ["picture-42"]}}
        (output,) = pool_engine.llm.generate([prompt], use_tqdm=False)
        return list(output.prompt_token_ids)

    sent = ask(noise_image(42), FIRST)
    assert ask(None, FIRST) == sent
    assert ask(None, SECOND) == ask(noise_image(42), SECOND)


@pytest.mark.parametrize(
    ("crop", "field"),
    [
        ({"regions": []}, "crop.regions"),
        ({"regions": [FIRST, FIRST]}, "crop.regions"),
        ({"regions": [[0.1, 0.1, 0.1, 0.2]]}, "crop.regions"),
        ({"pruning_rate": 0.995}, "crop.pruning_rate"),
        ({"regions": [[[0.0, 0.0, 0.5, 0.5]] * 17]}, "crop.regions"),
        ({"boxes": 1}, "crop.boxes"),
    ],
)
def test_offline_requests_are_validated(pool_engine: Engine, crop: dict[str, object], field: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        pool_engine.ask(Question((noise_image(43),), crop))
    assert caught.value.parameter == field


def test_pruning_rate_zero_is_the_unpruned_image(pool_engine: Engine) -> None:
    image = noise_image(44)
    whole, zero = pool_engine.ask(
        Question((image,)), Question((image,), {"regions": [FIRST], "pruning_rate": 0})
    )
    assert zero.token_ids == whole.token_ids
    assert (zero.logprobs == whole.logprobs).all()


def test_original_positions_end_the_answer_with_the_model(
    original_engine: Engine, reference_of: ReferenceOf
) -> None:
    """Seven images of 576 tokens and the text take 4,088 of 4,096 positions, however few tokens are left."""
    question = Question(tuple(noise_image(60 + index) for index in range(7)), {"regions": [FIRST] * 7})
    (answer,) = original_engine.ask(question, steps=STEPS)
    room = original_engine.processor.positions - (answer.num_prompt_tokens + 7 * (576 - 128))
    assert STEPS <= room < 64
    reference = reference_of(LLAVA, "original")(question, original_engine.config)
    assert difference(answer, reference) <= TOLERANCE
    (long,) = original_engine.ask(question, steps=64)
    assert len(long.token_ids) == room


def test_original_positions_that_run_past_the_model_are_refused(original_engine: Engine) -> None:
    said = r"crop\.regions: what is left of images keeps its position ids.* room for 512 tokens"
    images = tuple(noise_image(60 + index) for index in range(8))
    with pytest.raises(VLLMValidationError, match=said):
        original_engine.ask(Question(images, {"regions": [FIRST] * 8}))


def test_original_positions_count_images_known_by_uuid(original_engine: Engine) -> None:
    """What a cached plan removed counts as much as what a new one removes."""
    for index in range(8):
        prompt = about(noise_image(70 + index), FIRST).prompt()
        prompt["multi_modal_uuids"] = {"image": [f"picture-{70 + index}"]}
        original_engine.llm.generate([prompt], use_tqdm=False)
    known = Question((noise_image(70),) * 8, {"regions": [FIRST] * 8}).prompt()
    known["multi_modal_data"] = {"image": [None] * 8}
    known["multi_modal_uuids"] = {"image": [f"picture-{70 + index}" for index in range(8)]}
    with pytest.raises(VLLMValidationError, match="keeps its position ids"):
        original_engine.llm.generate([known], use_tqdm=False)


def test_regions_beside_other_processor_settings_are_refused(pool_engine: Engine) -> None:
    """They could move the image under the region."""
    prompt = about(noise_image(45), FIRST).prompt()
    prompt["mm_processor_kwargs"]["do_center_crop"] = False
    with pytest.raises(VLLMValidationError, match="do_center_crop"):
        pool_engine.llm.generate([prompt], use_tqdm=False)
