# SPDX-License-Identifier: Apache-2.0
"""What deepstack, its own pixel settings and videos with timestamps bring along, beyond test_parity.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.conftest import CheckpointOf
from tests.cpu.conftest import (
    EVICT,
    STEPS,
    TEXT,
    Answer,
    Engine,
    EngineOf,
    Question,
    ReferenceFor,
    ReferenceOf,
    _answer,
)
from tests.cpu.test_caches import about, right
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.cpu.test_qwen2_5_vl import FIRST, SECOND, positions_beside_videos, prompt_with_video
from tests.cpu.test_reference import brute_force
from tests.cpu.videos import check_videos_pass_untouched
from tests.families import QWEN2_5_VL, QWEN3_VL, Family
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.crop_params import CropParams
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.request import CropRequest

pytestmark = pytest.mark.vllm_runtime

GRID, LEVELS = TokenGrid(12, 16), 2  # of an image of 500 x 400 pixels, of the tiny checkpoint
HIDDEN = QWEN3_VL.shallow.hidden
FIRST_REGION = Region.from_grid_cells(0, 0, 1, 1)


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(QWEN3_VL, "pool")


@pytest.fixture
def evicting(engine_of: EngineOf) -> Engine:
    return engine_of(QWEN3_VL, "evicting")


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(QWEN3_VL, "pool")


@pytest.fixture
def hf(hf_of: Callable[..., HfReference]) -> HfReference:
    return hf_of(QWEN3_VL, QWEN3_VL.deep)


def embed(hf: HfReference, plans: list[TokenPlan | None]) -> Any:
    text = TEXT.format(images=f"{hf.image}\n" * len(plans))
    ids = hf.processor.tokenizer.encode(text, add_special_tokens=False)
    return hf.embed(ids, [noise_image(400, 500, 400), noise_image(401, 300, 420)][: len(plans)], plans)


def test_the_reference_prunes_nothing_as_transformers_does(hf: HfReference) -> None:
    """Its own embeddings, positions and additions against the model called with pixels."""
    images = [noise_image(400, 500, 400), noise_image(401, 300, 420)]
    inputs = hf.processor(text=[TEXT.format(images=f"{hf.image}\n" * 2)], images=images, return_tensors="pt")
    with torch.inference_mode():
        stock = hf.model(**inputs).logits[0, -1].double().log_softmax(-1)
    prompt = embed(hf, [None, None])
    assert prompt.added.shape == (LEVELS, inputs["input_ids"].shape[1], HIDDEN)
    for answer in (hf.decode(prompt, 2), hf.decode_by_layer(prompt, 2)):
        assert float((answer.logprobs[0] - stock).abs().max()) <= TOLERANCE
    without = prompt.added.new_zeros(prompt.added.shape)
    changed = hf.decode(replace(prompt, added=without), 1)
    assert float((changed.logprobs[0] - stock).abs().max()) > NOTICEABLE


def test_the_reference_evicts_as_if_keys_were_hidden(hf: HfReference) -> None:
    """All rows run through all layers there, and all get their additions."""
    plan = hf.plan(noise_image(400, 500, 400), FIRST_REGION, 0.5, "pool", "plc+ilp", (2, 5))
    prompt = embed(hf, [plan, None])
    answer = hf.decode_by_layer(prompt, 2)
    assert len(set(answer.prompt_rows_per_layer)) == 3
    assert difference(answer, brute_force(hf, prompt, 2)) <= TOLERANCE
    assert difference(answer, hf.decode(prompt, 2)) > NOTICEABLE


@pytest.mark.parametrize("setting", ["pool", "evicting"])
def test_deepstack_rows_go_with_their_embeddings(
    engine_of: EngineOf, reference_for: ReferenceFor, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: deepstack rows of other tokens than those that are left would be noticed."""
    engine = engine_of(QWEN3_VL, setting)
    right(engine, reference_for, about(noise_image(402, 500, 400), FIRST))
    encode = type(engine.model).embed_stock

    def shuffled(self: Any, **kwargs: Any) -> Any:
        for features in encode(self, **kwargs):
            order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
            yield torch.cat([features[:, :HIDDEN], features[order][:, HIDDEN:]], dim=1)

    monkeypatch.setattr(type(engine.model), "embed_stock", shuffled)
    asked = about(noise_image(403, 500, 400), FIRST)
    (answer,) = engine.ask(asked)
    assert difference(answer, reference_for(asked, engine.config)) > NOTICEABLE
    engine.model.crop_encoder.cache.clear()


def test_cached_features_have_deepstack_beside_them(pool: Engine, reference_for: ReferenceFor) -> None:
    image, encoder = noise_image(404, 500, 400), pool.model.crop_encoder
    right(pool, reference_for, about(image, FIRST))
    before = encoder.num_encoded
    right(pool, reference_for, about(image, SECOND))
    assert encoder.num_encoded == before
    features = list(encoder.cache.values())[-1]
    assert features.shape == (GRID.num_tokens, (1 + LEVELS) * HIDDEN)


@pytest.mark.parametrize("method", ["off", "plc", "ilp", "plc+ilp"])
def test_no_deepstack_rows_are_left_for_the_next_step(
    evicting: Engine, reference_for: ReferenceFor, method: str
) -> None:
    """A step in stages clears them like upstream's own: what follows may have no image."""
    text = Question(text=TEXT)
    asked = Question((noise_image(405, 500, 400),), {"regions": [FIRST], "method": method})
    right(evicting, reference_for, asked, text)
    assert not any(buffer.any() for buffer in evicting.model.deepstack_input_embeds)
    right(evicting, reference_for, text)


def engine_config(checkpoint: Any, crop: dict[str, Any], **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True}
    return EngineArgs(
        model=str(checkpoint), additional_config={"crop": crop}, **{**defaults, **options}
    ).create_engine_config()


def test_eviction_before_the_last_deepstack_layer_is_refused(checkpoint_of: CheckpointOf) -> None:
    checkpoint = checkpoint_of(QWEN3_VL, QWEN3_VL.deep)
    with pytest.raises(
        ValueError,
        match=r"--crop-config eviction_layers .* from 2 to 7, .* first 2, got \[1, 4\]",
    ):
        engine_config(checkpoint, {**EVICT, "eviction_layers": [1, 4]})
    engine_config(checkpoint, {**EVICT, "eviction_layers": [2, 4]})


def test_pruned_videos_are_refused(checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(ValueError, match="--video-pruning-rate cannot be used"):
        engine_config(checkpoint_of(QWEN3_VL, QWEN3_VL.shallow), {}, video_pruning_rate=0.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_pixels": 102400},
        {"min_pixels": 307200},
        {"size": {"shortest_edge": 65536, "longest_edge": 204800}},
        {"size": {"longest_edge": 204800}},
        {"images_kwargs": {"size": {"shortest_edge": 307200}}},
        {"size": {"longest_edge": 204800}, "images_kwargs": {"max_pixels": 102400}},
    ],
)
def test_the_servers_processor_settings_are_followed(
    pool: Engine, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --mm-processor-kwargs: vLLM completes a `size` of one edge, which Qwen2.5-VL does not take."""
    model_config = pool.llm.model_config
    monkeypatch.setattr(model_config.multimodal_config, "mm_processor_kwargs", kwargs)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    for size in ((500, 400), (100, 900), (90, 60)):
        items = processor.info.parse_mm_data({"image": noise_image(0, *size)})
        served = processor(f"{pool.image}\n", items, hf_processor_mm_kwargs={"crop": {"regions": [FIRST]}})
        (item,) = served["mm_kwargs"]["image"]
        _, height, width = item["image_grid_thw"].data.tolist()
        assert processor.geometry.grid(*size) == TokenGrid(height // 2, width // 2)


def test_videos_pass_untouched(pool: Engine, engine_of: EngineOf) -> None:
    check_videos_pass_untouched(
        engine_of(QWEN3_VL, "stock"), pool, prompt_with_video(noise_image(406, 500, 400))
    )


def test_what_is_left_beside_videos_keeps_its_position(pool: Engine) -> None:
    positions_beside_videos(pool, noise_image(407, 500, 400), GRID.num_tokens)


def test_image_embeddings_of_the_client_are_served_whole(
    checkpoint_of: CheckpointOf, hf: HfReference, reference_for: ReferenceFor
) -> None:
    """They come with deepstack features beside them, and cannot be pruned."""
    checkpoint = checkpoint_of(QWEN3_VL, QWEN3_VL.deep)
    engine = Engine(checkpoint, EVICT, QWEN3_VL, enable_mm_embeds=True)
    image = noise_image(408, 300, 420)
    with torch.inference_mode():
        embedded = {"image_embeds": hf.features(image), "image_grid_thw": torch.tensor([[1, 26, 18]])}
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)

    def ask(asked: Question) -> Answer:
        prompt = asked.prompt(engine.image) | {"multi_modal_data": {"image": embedded}}
        return _answer(*engine.llm.generate([prompt], sampling, use_tqdm=False))

    whole = about(image, None)
    assert difference(ask(whole), reference_for(whole, engine.config)) <= TOLERANCE
    with pytest.raises(VLLMValidationError, match="not possible for image embeddings"):
        ask(about(image, FIRST))


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=str)
def test_the_rotary_table_is_as_long_as_positions_may_be(engine_of: EngineOf, family: Family) -> None:
    engine = engine_of(family, "pool")
    rotary = engine.model.language_model.model.layers[0].self_attn.rotary_emb
    positions = engine.llm.model_config.hf_text_config.max_position_embeddings
    assert rotary.cos_sin_cache.shape[0] == positions * engine.processor.geometry.rotary_room


def test_an_answer_ends_with_the_positions_of_the_model(
    pool: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow image takes more positions than it has tokens left, and the table holds the model's only."""
    narrow = Question((noise_image(310, 5120, 32),), {"regions": [cells(0, 0, 1, 1)], "pruning_rate": 0.9})
    (answer,) = pool.ask(narrow)
    (image,) = pool.processor.planner.plan(CropRequest(CropParams.parse(narrow.crop)), [(5120, 32)])
    assert (image.plan.grid.num_tokens, image.plan.num_embeddings) == (160, 16)
    assert image.mrope_position_delta == 144
    taken = answer.num_prompt_tokens + 144
    for room in (2, 1):
        monkeypatch.setitem(pool.processor.__dict__, "positions", taken + room)
        (short,) = pool.ask(narrow)
        assert short.token_ids == answer.token_ids[:room]
    monkeypatch.setitem(pool.processor.__dict__, "positions", taken)
    said = rf"crop\.regions: what is left .* room for {taken - 144} tokens .* and {taken - 144} are there"
    with pytest.raises(VLLMValidationError, match=said):
        pool.ask(narrow)


def test_a_beam_ends_with_the_positions_of_the_model(pool: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its steps is a request of its own, for one token."""
    from vllm.sampling_params import BeamSearchParams

    narrow = Question((noise_image(310, 5120, 32),), {"regions": [cells(0, 0, 1, 1)], "pruning_rate": 0.9})
    (answer,) = pool.ask(narrow)
    monkeypatch.setitem(pool.processor.__dict__, "positions", answer.num_prompt_tokens + 144 + 3)
    prompt = narrow.prompt(pool.image)

    def beams(tokens: int) -> Any:
        return pool.llm.beam_search(
            [prompt], BeamSearchParams(beam_width=2, max_tokens=tokens, ignore_eos=True)
        )

    (found,) = beams(3)
    assert len(found.sequences[0].tokens) == answer.num_prompt_tokens + 3
    with pytest.raises(VLLMValidationError, match="smaller max_tokens with beams"):
        beams(5)
