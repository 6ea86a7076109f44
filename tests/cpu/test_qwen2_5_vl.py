# SPDX-License-Identifier: Apache-2.0
"""What images of their own size, M-RoPE and videos beside images bring along, beyond test_parity.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

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
from tests.cpu.videos import check_videos_pass_untouched
from tests.families import QWEN2_5_VL
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.eviction.decoder import _gather_positions
from vllm_crop.planning.geometry import TokenGrid

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(QWEN2_5_VL, "pool")


@pytest.fixture
def evicting(engine_of: EngineOf) -> Engine:
    found = engine_of(QWEN2_5_VL, "evicting")
    assert found.llm.reset_prefix_cache()
    return found


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(QWEN2_5_VL, "pool")


def test_tokens_before_are_those_of_the_image(pool: Engine) -> None:
    sizes = {
        (500, 400): 18 * 14,
        (300, 420): 11 * 15,
        (28, 28): 4,
        (2000, 100): 71 * 4,
        (3000, 3000): 25 * 25,
    }
    for size, tokens in sizes.items():
        decision = decided(pool.processor, noise_image(0, *size), {"regions": [FIRST]})
        assert decision.plan.grid.num_tokens == tokens, size


def test_the_smallest_and_the_narrowest_image(pool: Engine, reference_for: ReferenceFor) -> None:
    right(pool, reference_for, about(noise_image(300, 20, 20), FIRST))
    right(pool, reference_for, about(noise_image(301, 1400, 30), FIRST))


def test_another_region_of_the_same_image_is_not_taken_from_the_prefix_cache(
    pool: Engine, reference_for: ReferenceFor
) -> None:
    image = noise_image(302, 500, 400)
    assert difference(*(reference_for(about(image, r), pool.config) for r in (FIRST, SECOND))) > NOTICEABLE
    (fresh,) = right(pool, reference_for, about(image, FIRST))
    (again,) = right(pool, reference_for, about(image, FIRST))
    (other,) = right(pool, reference_for, about(image, SECOND))
    assert (fresh.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens == (fresh.num_prompt_tokens - 1) // 32 * 32


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
def test_a_resend_with_eviction_hits_all_but_the_last_block(
    evicting: Engine, reference_for: ReferenceFor, method: str
) -> None:
    image = noise_image(303, 500, 400)
    asked, other = (Question((image,), {"regions": [region], "method": method}) for region in (FIRST, SECOND))
    (fresh,) = right(evicting, reference_for, asked)
    (again,) = right(evicting, reference_for, asked)
    (elsewhere,) = right(evicting, reference_for, other)
    assert again.num_cached_tokens == (fresh.num_prompt_tokens - 1) // 32 * 32
    assert elsewhere.num_cached_tokens < again.num_cached_tokens


def test_images_too_long_are_refused_as_in_stock_vllm(pool: Engine, engine_of: EngineOf) -> None:
    image = noise_image(304, 2020, 10)
    with pytest.raises(ValueError, match="Failed to apply Qwen2_5_VLProcessor"):
        engine_of(QWEN2_5_VL, "stock").ask(Question((image,)))
    for crop, said in ((None, "Failed to apply"), ({"regions": [FIRST]}, "absolute aspect ratio")):
        with pytest.raises(ValueError, match=said):
            pool.ask(Question((image,), crop))


def test_regions_beside_a_request_for_another_resolution_are_refused(pool: Engine) -> None:
    prompt = about(noise_image(305), FIRST).prompt(pool.image)
    prompt["mm_processor_kwargs"]["max_pixels"] = 50176
    with pytest.raises(VLLMValidationError, match="max_pixels"):
        pool.llm.generate([prompt], use_tqdm=False)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_pixels": 100352},
        {"size": {"shortest_edge": 3136, "longest_edge": 200704}},
        {"images_kwargs": {"max_pixels": 150528}},
        {"min_pixels": 200704},
    ],
)
def test_the_servers_processor_settings_are_followed(
    pool: Engine, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --mm-processor-kwargs; an unpruned request shows what the image processor does with them."""
    model_config = pool.llm.model_config
    monkeypatch.setattr(model_config.multimodal_config, "mm_processor_kwargs", kwargs)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    for size in ((500, 400), (100, 900), (90, 60)):
        items = processor.info.parse_mm_data({"image": noise_image(0, *size)})
        grids = []
        for crop in ({}, {"regions": [FIRST]}):
            served = processor(f"{pool.image}\n", items, hf_processor_mm_kwargs={"crop": crop})
            (item,) = served["mm_kwargs"]["image"]
            grids.append(item["image_grid_thw"].data.tolist())
        rows, cols = grids[0][1] // 2, grids[0][2] // 2
        assert processor.geometry.grid(*size) == TokenGrid(rows, cols)
        assert grids[0] == grids[1]
        assert len(item["crop_assignment"].data) == rows * cols


def video(seed: int) -> Any:
    frames = np.random.default_rng(seed).integers(0, 256, (4, 84, 112, 3), dtype=np.uint8)
    metadata = {
        "fps": 2.0,
        "duration": 2.0,
        "total_num_frames": 4,
        "frames_indices": [0, 1, 2, 3],
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return frames, metadata


def prompt_with_video(image: Any) -> dict[str, Any]:
    text = f"USER: {VIDEO} and {QWEN2_5_VL.reference.image} and {VIDEO} what?\nASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"image": [image], "video": [video(1), video(2)]}}


def test_videos_pass_untouched(pool: Engine, engine_of: EngineOf) -> None:
    check_videos_pass_untouched(
        engine_of(QWEN2_5_VL, "stock"), pool, prompt_with_video(noise_image(306, 500, 400))
    )


def test_image_embeddings_of_the_client_are_served_whole(
    checkpoint_of: CheckpointOf, hf_of: Callable[..., HfReference], reference_for: ReferenceFor
) -> None:
    """They come with their grid, and cannot be pruned."""
    checkpoint, hf = (of(QWEN2_5_VL, QWEN2_5_VL.deep) for of in (checkpoint_of, hf_of))
    engine = Engine(checkpoint, EVICT, QWEN2_5_VL, enable_mm_embeds=True)
    image = noise_image(320, 300, 420)
    with torch.inference_mode():
        embedded = {"image_embeds": hf.features(image), "image_grid_thw": torch.tensor([[1, 30, 22]])}
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)

    def ask(asked: Question) -> Answer:
        prompt = asked.prompt(engine.image) | {"multi_modal_data": {"image": embedded}}
        return _answer(*engine.llm.generate([prompt], sampling, use_tqdm=False))

    whole = about(image, None)
    assert difference(ask(whole), reference_for(whole, engine.config)) <= TOLERANCE
    with pytest.raises(VLLMValidationError, match="not possible for image embeddings"):
        ask(about(image, FIRST))


def test_what_is_left_beside_videos_keeps_its_position(pool: Engine) -> None:
    positions_beside_videos(pool, noise_image(307, 500, 400), 18 * 14)


def positions_beside_videos(pool: Engine, image: Any, num_tokens: int) -> None:
    """Compare the ids of a pruned prompt with those of the whole one; the image has `num_tokens` there."""
    positions = {}
    for name, crop in (("whole", {}), ("pruned", {"regions": [FIRST]})):
        prompt = prompt_with_video(image)
        processor = pool.processor
        served = processor(
            prompt["prompt"],
            processor.info.parse_mm_data(prompt["multi_modal_data"]),
            hf_processor_mm_kwargs={"crop": crop},
        )
        features = [
            MultiModalFeatureSpec(data=item, modality=modality, identifier="", mm_position=place)
            for modality, items in served["mm_kwargs"].items()
            for item, place in zip(items, served["mm_placeholders"][modality], strict=True)
        ]
        ids = served["prompt_token_ids"]
        found, beyond = pool.model.get_mrope_input_positions(ids, features)
        assert found.shape == (3, len(ids))
        positions[name] = found, beyond + len(ids), served
    whole, next_whole, _ = positions["whole"]
    pruned, next_pruned, served = positions["pruned"]
    offset = served["mm_placeholders"]["image"][0].offset
    kept = served["mm_kwargs"]["image"][0]["crop_positions"].data.long()
    survivors = torch.cat(
        [torch.arange(offset), offset + kept, torch.arange(offset + num_tokens, whole.shape[1])]
    )
    assert pruned.equal(whole[:, survivors])
    assert next_pruned == next_whole


def test_gathered_positions_lie_in_memory_like_all() -> None:
    for positions in (torch.arange(3 * 65).view(3, 65)[:, :40], torch.arange(40)):
        rows = torch.tensor([0, 7, 39])
        gathered = _gather_positions(positions, rows)
        assert gathered.equal(positions[..., rows])
        assert gathered.stride() == positions.stride()
