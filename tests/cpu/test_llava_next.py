# SPDX-License-Identifier: Apache-2.0
"""What images in two grids with newlines bring along, beyond test_parity.py."""

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaNextConfig
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

from tests.conftest import CheckpointOf
from tests.cpu.conftest import (
    EVICT,
    STEPS,
    Answer,
    Engine,
    EngineOf,
    Question,
    ReferenceFor,
    ReferenceOf,
    _answer,
    decided,
)
from tests.cpu.test_caches import about, right
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.families import LLAVA_NEXT
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.planning.geometry import TokenGrid

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NINE = [[336 * rows, 336 * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)]


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(LLAVA_NEXT, "pool")


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(LLAVA_NEXT, "pool")


@pytest.fixture
def hf(hf_of: Callable[..., HfReference]) -> HfReference:
    return hf_of(LLAVA_NEXT, LLAVA_NEXT.shallow)


@pytest.mark.parametrize("pinpoints", [PUBLISHED, NINE], ids=["published", "nine"])
def test_tokens_are_as_many_as_vllm_counts(pinpoints: list[list[int]]) -> None:
    config = LlavaNextConfig(architectures=["LlavaNextForConditionalGeneration"])
    config.image_grid_pinpoints = pinpoints
    geometry = geometry_from_configs(config.to_dict(), {})
    info = LlavaNextProcessingInfo(SimpleNamespace(get_hf_config=lambda _: config))
    assert geometry.max_tokens == info.get_max_image_tokens()
    chance = random.Random(0)
    for _ in range(20000):
        width, height = (int(2 ** chance.uniform(0, 12.5)) for _ in range(2))
        found = geometry.grid(width, height).num_tokens
        assert found == info.get_num_image_tokens(image_width=width, image_height=height), (width, height)


def test_the_grids_of_the_tests_checkpoint(pool: Engine) -> None:
    """Unpadded across, down and not at all; control for the pictures of test_parity.py."""
    for size, tiles in {(500, 400): (16, 20), (300, 420): (20, 14), (336, 336): (20, 20)}.items():
        whole, found = pool.processor.geometry.grid(*size).parts
        assert (whole.grid, found.grid) == (TokenGrid(10, 10), TokenGrid(*tiles))


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((1, 1), 100 + 10 * 11),  # the smallest resolution, of which half is padding
        ((20, 20), 100 + 10 * 11),
        ((900, 30), 100 + 2 * 31),
        ((1500, 10), 100),  # the tiles are padding, and all rows are cut away
        ((10, 1500), 100 + 30),  # all columns: newlines are left
    ],
)
def test_tiny_and_narrow_images(
    pool: Engine, reference_for: ReferenceFor, size: tuple[int, int], tokens: int
) -> None:
    assert pool.processor.geometry.grid(*size).num_tokens == tokens
    image = noise_image(400, *size)
    right(pool, reference_for, about(image, None))
    right(pool, reference_for, about(image, FIRST))


def test_images_of_many_shapes_in_one_request(
    engine_of: EngineOf, reference_of: ReferenceOf, pool: Engine, reference_for: ReferenceFor
) -> None:
    """The image processor fills their tiles up to the same number; the vision tower sees some of them."""
    one, two, three = (
        noise_image(410 + i, *size) for i, size in enumerate(((400, 90), (90, 400), (300, 310)))
    )
    right(pool, reference_for, about(two, FIRST))
    for images in ((one, two, three), (three, one, two, one)):
        right(pool, reference_for, Question(images, {"regions": [FIRST, SECOND, None, FIRST][: len(images)]}))
    staged = engine_of(LLAVA_NEXT, "staged")
    asked = Question((one, two, three), {"regions": [SECOND, None, FIRST]})
    right(staged, reference_of(LLAVA_NEXT, "staged"), asked)


def test_what_becomes_of_newlines_matters(pool: Engine, reference_for: ReferenceFor, hf: HfReference) -> None:
    """The control: a model that mixed up newlines and what is beside them would be noticed."""
    image = noise_image(420, 500, 400)
    asked = about(image, FIRST)
    (answer,) = right(pool, reference_for, asked)
    plan = decided(pool.processor, image, asked.crop).plan
    tiles = plan.grid.parts[1]
    ends = np.array([tiles.token(row, tiles.grid.cols) for row in range(tiles.grid.rows)])
    mixed_up = plan.assignment.copy()
    mixed_up[ends], mixed_up[ends - 1] = plan.assignment[ends - 1], plan.assignment[ends]
    assert (mixed_up != plan.assignment).any()
    prompt = hf.processor.tokenizer.encode(asked.prompt(hf.image)["prompt"], add_special_tokens=False)
    wrong = hf.generate(prompt, [image], [replace(plan, assignment=mixed_up)], STEPS)
    assert difference(answer, wrong) > NOTICEABLE


def test_another_region_of_the_same_image_is_not_taken_from_the_prefix_cache(
    pool: Engine, reference_for: ReferenceFor
) -> None:
    image = noise_image(430, 500, 400)
    assert difference(*(reference_for(about(image, r), pool.config) for r in (FIRST, SECOND))) > NOTICEABLE
    (fresh,) = right(pool, reference_for, about(image, FIRST))
    (again,) = right(pool, reference_for, about(image, FIRST))
    (other,) = right(pool, reference_for, about(image, SECOND))
    assert (fresh.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens == (fresh.num_prompt_tokens - 1) // 32 * 32


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
def test_a_resend_with_eviction_hits_all_but_the_last_block(
    engine_of: EngineOf, reference_of: ReferenceOf, method: str
) -> None:
    engine, reference_for = engine_of(LLAVA_NEXT, "evicting"), reference_of(LLAVA_NEXT, "evicting")
    assert engine.llm.reset_prefix_cache()
    asked = Question((noise_image(431, 500, 400),), {"regions": [FIRST], "method": method})
    (fresh,) = right(engine, reference_for, asked)
    (again,) = right(engine, reference_for, asked)
    assert again.num_cached_tokens == (fresh.num_prompt_tokens - 1) // 32 * 32


def test_the_vision_tower_runs_once_per_image(pool: Engine, reference_for: ReferenceFor) -> None:
    image = noise_image(432, 300, 420)
    encoder = pool.model.crop_encoder
    before, hits = encoder.num_encoded, encoder.cache.num_hits
    for region in (FIRST, SECOND, None):
        right(pool, reference_for, about(image, region))
    assert (encoder.num_encoded, encoder.cache.num_hits) == (before + 1, hits + 2)


def test_image_embeddings_of_the_client_are_served_whole(
    checkpoint_of: CheckpointOf, hf: HfReference, reference_for: ReferenceFor
) -> None:
    checkpoint = checkpoint_of(LLAVA_NEXT, LLAVA_NEXT.deep)
    engine = Engine(checkpoint, EVICT, LLAVA_NEXT, enable_mm_embeds=True)
    image = noise_image(450, 300, 420)
    with torch.inference_mode():
        embedded = hf.features(image)[None]
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)

    def ask(asked: Question) -> Answer:
        prompt: dict[str, Any] = asked.prompt(engine.image) | {"multi_modal_data": {"image": embedded}}
        return _answer(*engine.llm.generate([prompt], sampling, use_tqdm=False))

    whole = about(image, None)
    assert difference(ask(whole), reference_for(whole, engine.config)) <= TOLERANCE
    with pytest.raises(VLLMValidationError, match="not possible for image embeddings"):
        ask(about(image, FIRST))
