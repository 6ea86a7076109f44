# SPDX-License-Identifier: Apache-2.0
"""What a limit on the tiles' tokens and videos beside images bring along, beyond test_llava_next.py."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava_onevision import LlavaOnevisionProcessingInfo

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
)
from tests.cpu.test_caches import about, right
from tests.cpu.test_parity import TOLERANCE, cells, difference
from tests.cpu.videos import check_videos_pass_untouched
from tests.families import LLAVA_ONEVISION
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.planning.geometry import TokenGrid

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)
VIDEO_TOKENS = 4 * 5 * 5 + 1  # four frames, 9 x 9 tokens pooled in pairs, a newline


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(LLAVA_ONEVISION, "pool")


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(LLAVA_ONEVISION, "pool")


@pytest.mark.parametrize("patch", [14, 42], ids=["published", "of these tests"])
def test_tokens_are_as_many_as_vllm_counts(patch: int) -> None:
    config = LlavaOnevisionConfig(architectures=["LlavaOnevisionForConditionalGeneration"])
    config.vision_config.patch_size = patch
    geometry = geometry_from_configs(config.to_dict(), {})
    info = LlavaOnevisionProcessingInfo(SimpleNamespace(get_hf_config=lambda _: config))
    chance, most = random.Random(0), geometry.max_tokens
    for _ in range(20000):
        width, height = (int(2 ** chance.uniform(0, 12.5)) for _ in range(2))
        found = geometry.grid(width, height).num_tokens
        assert found == info.get_num_image_tokens(image_width=width, image_height=height), (width, height)
        assert found <= most


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((1153, 944), (27, 32)),  # the one vLLM profiles with: almost too many
        ((1200, 1190), (27, 27)),  # scaled down from 36 x 36
        ((1600, 500), (14, 45)),
        ((20, 20), (9, 9)),
        ((2000, 10), (1, 54)),  # of an odd number of rows of padding, one is left
    ],
)
@pytest.mark.parametrize("setting", ["pool", "staged"])
def test_large_small_and_narrow_images(
    engine_of: EngineOf,
    reference_of: ReferenceOf,
    setting: str,
    size: tuple[int, int],
    tiles: tuple[int, int],
) -> None:
    engine, reference_for = engine_of(LLAVA_ONEVISION, setting), reference_of(LLAVA_ONEVISION, setting)
    whole, others = engine.processor.geometry.grid(*size).parts
    assert (whole.grid, others.grid) == (TokenGrid(9, 9), TokenGrid(*tiles))
    image = noise_image(500, *size)
    right(engine, reference_for, about(image, None))
    right(engine, reference_for, about(image, FIRST))


def test_images_of_many_shapes_in_one_request(pool: Engine, reference_for: ReferenceFor) -> None:
    """Each is tiled, as if it were the only one: vLLM asks the image processor for no other way."""
    one, two, three = (
        noise_image(510 + i, *size) for i, size in enumerate(((400, 90), (90, 800), (300, 310)))
    )
    right(pool, reference_for, about(two, FIRST))
    for images in ((one, two, three), (three, one, two, one)):
        right(pool, reference_for, Question(images, {"regions": [FIRST, SECOND, None, FIRST][: len(images)]}))


def prompt_with_videos(image: Any) -> dict[str, Any]:
    videos = [
        np.random.default_rng(seed).integers(0, 256, (4, 84, 112, 3), dtype=np.uint8) for seed in (1, 2)
    ]
    text = "USER: <video> and <image> and <video> what?\nASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"image": [image], "video": videos}}


def test_videos_pass_untouched(pool: Engine, engine_of: EngineOf) -> None:
    image = noise_image(520, 500, 400)
    full = pool.processor.geometry.grid(500, 400).num_tokens
    whole = check_videos_pass_untouched(engine_of(LLAVA_ONEVISION, "stock"), pool, prompt_with_videos(image))
    assert whole == full + 2 * VIDEO_TOKENS + len("USER:  and  and  what?\nASSISTANT:")


def test_image_embeddings_of_the_client_are_served_whole(
    checkpoint_of: CheckpointOf, hf_of: Callable[..., HfReference], reference_for: ReferenceFor
) -> None:
    checkpoint, hf = (of(LLAVA_ONEVISION, LLAVA_ONEVISION.deep) for of in (checkpoint_of, hf_of))
    engine = Engine(checkpoint, EVICT, LLAVA_ONEVISION, enable_mm_embeds=True)
    image = noise_image(530, 300, 420)
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
