# SPDX-License-Identifier: Apache-2.0
"""What GLM-4V's pixel settings and videos with frames like images bring along, beyond test_parity.py."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata
from vllm import SamplingParams
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.cpu.conftest import (
    STEPS,
    TEXT,
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
from tests.families import GLM4V, GLM4V_MOE, Family
from tests.pictures import noise_image
from tests.reference import HfReference, Prompt, naive_compress
from tests.slow_plan import embeddings_of
from vllm_crop.crop_params import CropParams
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import TokenPlan, whole_image_plan
from vllm_crop.request import image_requests

pytestmark = pytest.mark.vllm_runtime

# vLLM calls its processor otherwise, which writes times as "1.0 seconds".
GLM46V = replace(
    GLM4V_MOE, name="glm46v_moe", make_checkpoint=partial(GLM4V_MOE.make_checkpoint, processor="Glm46V")
)
FIRST = cells(0, 0, 1, 1)
IMAGE, VIDEO = GLM4V.reference.image, "<|begin_of_video|><|video|><|end_of_video|>"
ORDERS = {
    "video, image": f"USER: {VIDEO} and {IMAGE} what?\nASSISTANT:",
    "image, video": f"USER: {IMAGE} and {VIDEO} what?\nASSISTANT:",
}
METADATA: dict[str, Any] = {
    **{"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]},
    "video_backend": "opencv",
}


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(GLM4V, "pool")


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(GLM4V, "pool")


def test_tokens_before_are_those_of_the_image(pool: Engine) -> None:
    sizes = {
        (500, 400): 18 * 14,
        (300, 420): 11 * 15,
        (28, 28): 4,
        (20, 20): 4,
        (9, 1000): 1 * 111,
        (2000, 100): 71 * 4,
        (3000, 3000): 25 * 25,
    }
    for size, tokens in sizes.items():
        decision = decided(pool.processor, noise_image(0, *size), {"regions": [FIRST]})
        assert decision.plan.grid.num_tokens == tokens, size


def test_the_smallest_and_the_narrowest_image(pool: Engine, reference_for: ReferenceFor) -> None:
    right(pool, reference_for, about(noise_image(800, 20, 20), FIRST))
    right(pool, reference_for, about(noise_image(801, 1400, 9), FIRST))


def test_an_image_that_may_cost_nothing_takes_its_frame_along(pool: Engine) -> None:
    asked = Question((noise_image(805, 500, 400),), {"max_tokens": 0})
    (unseen,) = pool.ask(asked, steps=1)
    (text,) = pool.ask(Question(text=TEXT.replace("{images}", "{images}\n")), steps=1)
    assert unseen.prompt_token_ids == text.prompt_token_ids


def test_the_reference_prunes_nothing_as_transformers_does(hf_of: Callable[..., HfReference]) -> None:
    """Its own embeddings and positions against the model called with pixels."""
    for family in (GLM4V, GLM46V):
        hf = hf_of(family, family.deep)
        images = [noise_image(802, 500, 400), noise_image(803, 300, 420)]
        text = TEXT.format(images=f"{hf.image}\n" * 2)
        inputs = hf.processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            stock = hf.model(**inputs).logits[0, -1].double().log_softmax(-1)
        ids = hf.processor.tokenizer.encode(text, add_special_tokens=False)
        prompt = hf.embed(ids, images, [None, None])
        for answer in (hf.decode(prompt, 1), hf.decode_by_layer(prompt, 1)):
            assert float((answer.logprobs[0] - stock).abs().max()) <= TOLERANCE


def test_images_too_long_are_refused_as_in_stock_vllm(pool: Engine) -> None:
    image = noise_image(804, 2020, 10)
    for crop, said in ((None, "Failed to apply"), ({"regions": [FIRST]}, "absolute aspect ratio")):
        with pytest.raises(ValueError, match=said):
            pool.ask(Question((image,), crop))


SIZE = {"shortest_edge": 6272, "longest_edge": 401408}


@pytest.mark.parametrize("kwargs", [{"size": SIZE}, {"images_kwargs": {"size": SIZE}}])
def test_the_servers_processor_settings_are_followed(
    pool: Engine, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --mm-processor-kwargs; an unpruned request shows what the image processor does with them."""
    processor = processor_with(pool, kwargs, monkeypatch)
    for size in ((500, 400), (100, 900), (90, 60)):
        items = processor.info.parse_mm_data({"image": noise_image(0, *size)})
        grids = []
        for crop in ({}, {"regions": [FIRST]}):
            served = processor(f"{pool.image}\n", items, hf_processor_mm_kwargs={"crop": crop})
            (item,) = served["mm_kwargs"]["image"]
            grids.append(item["image_grid_thw"].data.tolist())
        assert grids[0] == grids[1]
        assert processor.geometry.grid(*size) == TokenGrid(grids[0][1] // 2, grids[0][2] // 2)


def test_settings_that_the_image_processor_ignores_are_refused(
    pool: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_with(pool, {"max_pixels": 50176}, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="max_pixels=50176 means nothing"):
        processor(f"{pool.image}\n", processor.info.parse_mm_data({"image": noise_image(0)}))


def processor_with(engine: Engine, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    model_config = engine.llm.model_config
    monkeypatch.setattr(model_config.multimodal_config, "mm_processor_kwargs", kwargs)
    return MULTIMODAL_REGISTRY.create_processor(model_config)


def test_the_rotary_table_is_as_long_as_positions_may_be(pool: Engine) -> None:
    rotary = pool.model.language_model.model.layers[0].self_attn.rotary_emb
    positions = pool.llm.model_config.hf_text_config.max_position_embeddings
    assert rotary.cos_sin_cache.shape[0] == positions * pool.processor.geometry.rotary_room


def frames() -> Any:
    return np.random.default_rng(1).integers(0, 256, (4, 84, 112, 3), dtype=np.uint8)


@torch.inference_mode()
def beside_a_video(hf: HfReference, text: str, image: Any, plan: TokenPlan | None) -> Prompt:
    """What the language model is fed: transformers' whole prompt, and of the image what the plan leaves."""
    inputs = hf.processor(
        text=[text],
        images=[image],
        videos=[frames()],
        video_metadata=[VideoMetadata(**METADATA)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    model = hf.model.model
    positions, _ = model.get_rope_index(ids, kinds, **grids)
    rows = hf.model.get_input_embeddings()(ids[0])
    seen = model.get_video_features(inputs["pixel_values_videos"], grids["video_grid_thw"])
    rows[kinds[0] == 2] = torch.cat(list(seen.pooler_output))
    plan = plan or whole_image_plan(hf.geometry.grid(*image.size))
    left = embeddings_of(plan)
    start = int((kinds[0] == 1).nonzero()[0])
    stop = start + plan.grid.num_tokens
    assert int((kinds == 1).sum()) == stop - start
    places = torch.tensor([start + one.position for one in left])
    depth = hf.geometry.num_layers
    layers = torch.full((len(kinds[0]),), depth)
    layers[places] = torch.tensor([min(one.evicted_from_layer or depth, depth) for one in left])
    rows[places] = naive_compress(hf.features(image), plan)
    kept = torch.cat([torch.arange(start), places, torch.arange(stop, len(rows))])
    return Prompt(
        rows=rows[kept],
        positions=positions[:, 0, kept],
        num_layers=layers[kept],
        next_position=int(positions.max()) + 1,
        added=rows.new_empty(0, len(kept), rows.shape[1]),
    )


@pytest.mark.parametrize("family", [GLM4V, GLM46V], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_beside_a_video_is_pruned_and_the_video_is_not(
    engine_of: EngineOf, hf_of: Callable[..., HfReference], family: Family, order: str
) -> None:
    """Under the same token id. Against transformers' own numbering of the prompt with both."""
    engine, hf = engine_of(family, "staged"), hf_of(family, family.deep)
    image, text = noise_image(806, 500, 400), ORDERS[order]
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)
    expected = {}
    for method in ("off", "plc", "ilp", "plc+ilp"):
        crop = {"regions": [FIRST], "method": method}
        video = frames(), {**METADATA, "do_sample_frames": False}
        asked = {
            "prompt": text,
            "multi_modal_data": {"image": [image], "video": [video]},
            "mm_processor_kwargs": {"crop": crop},
        }
        answer = _answer(*engine.llm.generate([asked], sampling, use_tqdm=False))
        (wish,) = image_requests(CropParams.parse(crop), engine.config, num_images=1)
        plan = None
        if method != "off":
            assert isinstance(wish.region, Region)
            plan = hf.plan(
                image,
                wish.region,
                wish.pruning_rate,
                wish.compression,
                wish.method,
                wish.eviction_layers,
                wish.rim,
            )
        reference = hf.decode_by_layer(beside_a_video(hf, text, image, plan), STEPS)
        error = difference(answer, reference)
        print(f"{family}, {order}, {method}: {reference.prompt_rows_per_layer}, {error:.1e}")
        assert answer.num_prompt_tokens == reference.num_prompt_tokens
        assert error <= TOLERANCE
        assert all(difference(reference, other) > NOTICEABLE for other in expected.values())
        expected[method] = reference
