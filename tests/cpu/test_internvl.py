# SPDX-License-Identifier: Apache-2.0
"""What tiles one after another, framed by text, bring along in both formats, beyond test_parity.py."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import GotOcr2ImageProcessor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.internvl import calculate_internvl_targets, get_internvl_target_ratios

from tests.conftest import CheckpointOf
from tests.cpu.conftest import EngineOf, Question, ReferenceOf, decided
from tests.cpu.test_caches import about, right
from tests.cpu.test_parity import NOTICEABLE, cells, difference
from tests.cpu.videos import check_videos_pass_untouched
from tests.families import INTERNVL, INTERNVL_CHAT, Family
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.benchmarking.dummy_internvl import TILE, VIDEO
from vllm_crop.crop_params import CropParams
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.internvl import InternVLGeometry
from vllm_crop.frontend.unseen_images import without_unseen
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.planning.image_budgets import ImageBudget
from vllm_crop.request import CropRequest

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)
each_format = pytest.mark.parametrize("family", [INTERNVL, INTERNVL_CHAT], ids=str)
TOKEN = 28  # pixels of its side: two patches


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (4, 9), (1, 1)])
def test_images_have_as_many_tiles_as_both_processors_cut(fewest: int, most: int) -> None:
    geometry = InternVLGeometry(16, 448, fewest, most, thumbnail=True, num_layers=8)
    processor = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, min_patches=fewest, max_patches=most, crop_to_patches=True
    )
    ratios = get_internvl_target_ratios(fewest, most)
    chance = random.Random(0)
    for _ in range(3000):
        width, height = (int(2 ** chance.uniform(0, 12.5)) for _ in range(2))
        tokens = geometry.grid(width, height).num_tokens
        assert tokens == 256 * processor.get_number_of_image_patches(height, width), (width, height)
        tiles, *_ = calculate_internvl_targets(
            orig_width=width,
            orig_height=height,
            target_ratios=ratios,
            image_size=448,
            use_thumbnail=True,
        )
        assert tokens == 256 * tiles, (width, height)
        assert tokens <= geometry.max_tokens


@each_format
@pytest.mark.parametrize("size", [(500, 400), (300, 420), (336, 336), (1200, 100), (90, 90)])
def test_tokens_show_what_their_windows_say(
    hf_of: Callable[..., HfReference], family: Family, size: tuple[int, int]
) -> None:
    """A white box on black: the pixels of each token say whether it shows some of it."""
    hf: Any = hf_of(family, family.shallow)
    box = Box(0.3, 0.2, 0.62, 0.55)
    width, height = size
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    left, top, right_, bottom = (
        round(side * edge)
        for side, edge in ((width, box.x0), (height, box.y0), (width, box.x1), (height, box.y1))
    )
    picture[top:bottom, left:right_] = 255
    tiles = hf.tiles(Image.fromarray(picture)).mean(1).numpy()
    lowest, highest = tiles.min(), tiles.max()
    per_side = TILE // TOKEN
    lit = (tiles - lowest).reshape(len(tiles), per_side, TOKEN, per_side, TOKEN).mean((2, 4)).reshape(-1)
    lit /= highest - lowest
    mask = hf.geometry.grid(*size).mask(Region((box,)))
    assert len(mask) == len(lit)
    assert mask[lit > 0.1].all()  # a resized edge reaches a little further than the box
    assert (lit[mask] > 0).mean() > 0.9
    assert mask.any()
    assert not mask.all()


@each_format
@pytest.mark.parametrize("size", [(1, 1), (20, 20), (900, 30), (10, 1500)])
def test_tiny_and_narrow_images(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, size: tuple[int, int]
) -> None:
    image = noise_image(800, *size)
    pool, reference_for = engine_of(family, "pool"), reference_of(family, "pool")
    right(pool, reference_for, about(image, None))
    right(pool, reference_for, about(image, FIRST))


@each_format
def test_another_region_of_the_same_image_is_not_taken_from_the_prefix_cache(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family
) -> None:
    image, pool, reference_for = (
        noise_image(810, 500, 400),
        engine_of(family, "pool"),
        reference_of(family, "pool"),
    )
    assert difference(*(reference_for(about(image, r), pool.config) for r in (FIRST, SECOND))) > NOTICEABLE
    (fresh,) = right(pool, reference_for, about(image, FIRST))
    (again,) = right(pool, reference_for, about(image, FIRST))
    (other,) = right(pool, reference_for, about(image, SECOND))
    assert (fresh.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens == (fresh.num_prompt_tokens - 1) // 32 * 32


@each_format
def test_counts_are_without_the_frame(engine_of: EngineOf, family: Family) -> None:
    """What a client bounds is visual tokens; the two of the frame are text."""
    pool = engine_of(family, "pool")
    image = noise_image(820, 500, 400)
    (bare,) = pool.ask(Question())
    asked = Question((image,), {"max_tokens": 20}, after_image="")
    (answer,) = pool.ask(asked)
    assert answer.num_prompt_tokens == bare.num_prompt_tokens + 20 + 2
    assert decided(pool.processor, image, {"max_tokens": 20}).plan.num_embeddings == 20


@each_format
def test_an_image_without_a_place_is_refused(engine_of: EngineOf, family: Family) -> None:
    pool = engine_of(family, "pool")
    prompt = Question((noise_image(830),), {"regions": [FIRST]}).prompt(pool.image)
    prompt["prompt"] = "USER: What?\nASSISTANT:"
    with pytest.raises(VLLMValidationError, match=r"0 place\(s\) for 1 image\(s\)"):
        pool.llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)


@each_format
def test_videos_pass_untouched(engine_of: EngineOf, family: Family) -> None:
    pool = engine_of(family, "pool")
    frames = np.random.default_rng(1).integers(0, 256, (3, 84, 112, 3), dtype=np.uint8)
    prompt = {
        "prompt": f"USER: {VIDEO if family is INTERNVL else '<video>'} and {pool.image} what?\nASSISTANT:",
        "multi_modal_data": {"image": [noise_image(840, 500, 400)], "video": [frames]},
    }
    check_videos_pass_untouched(engine_of(family, "stock"), pool, prompt)


def test_an_image_that_is_text_cannot_be_taken_out(engine_of: EngineOf) -> None:
    """What the server wants itself fails no request: such an image costs a token."""
    pool, image = engine_of(INTERNVL_CHAT, "pool"), noise_image(850, 500, 400)
    with pytest.raises(VLLMValidationError, match=r"0 is not possible with this model.*send 1"):
        pool.ask(Question((image,), {"max_tokens": 0}))
    (least,) = pool.ask(Question((image,), {"max_tokens": 1}))
    (whole,) = pool.ask(Question((image,), {"method": "off"}))
    full = pool.processor.geometry.grid(500, 400).num_tokens
    assert whole.num_prompt_tokens - least.num_prompt_tokens == full - 1
    prompt = {"prompt_token_ids": [5, 6], "multi_modal_data": {"image": [image]}}
    servers_own = CropRequest(CropParams(), budgets=(ImageBudget(0, "server"),))
    left, _ = without_unseen(prompt, servers_own, [], pool.processor.info.get_hf_config(), {})
    assert left.budgets == (ImageBudget(1, "server"),)


def test_a_server_without_tiles_is_refused(checkpoint_of: CheckpointOf) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(checkpoint_of(INTERNVL, INTERNVL.shallow)),
        mm_processor_kwargs={"crop_to_patches": False},
        additional_config={"crop": {}},
    ).create_model_config()
    with pytest.raises(UnsupportedModelError, match="say max_patches=1 instead"):
        _ = MULTIMODAL_REGISTRY.create_processor(config).geometry
