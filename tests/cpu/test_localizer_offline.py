# SPDX-License-Identifier: Apache-2.0
"""The offline `LLM` that finds regions itself, in the midst of other requests."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import REGISTRY

from lab.evaluation.questions import TestScene, make_test_set
from lab.tinyvqa import words
from lab.tinyvqa.drawing import thumbnail
from tests.conftest import CheckpointOf
from tests.cpu.conftest import Engine, Question
from tests.families import FAMILIES, LLAVA, LLAVA_ONEVISION, QWEN2_5_VL, Family
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT, ENGINE
from vllm_crop.client import data_url
from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.frontend.own_request import ServingEngine
from vllm_crop.localizers.base import LocalizerAnswer
from vllm_crop.localizers.dialects import DIALECTS, read_cells
from vllm_crop.localizers.thumbnails import as_picture, shrink
from vllm_crop.planning.geometry import Region

pytestmark = pytest.mark.vllm_runtime

SCENES = make_test_set(4, seed=5)
ASKED = [(scene, question) for scene in SCENES for question in scene.questions]


@pytest.fixture(scope="module")
def engine() -> Engine:
    crop = {"pruning_rate": 0.889, "localizer": ENGINE}
    return Engine(CHECKPOINT, crop, QWEN2_5_VL, enable_prefix_caching=False)


def conversation(picture: Any, text: str) -> list[Any]:
    content = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def chat(
    engine: Engine, conversations: list[Any], crop: Any = None, **sampling: Any
) -> list[tuple[str, int]]:
    """Texts and prompt lengths."""
    from vllm import SamplingParams

    outputs = engine.llm.chat(
        conversations,
        SamplingParams(**{"temperature": 0, "max_tokens": 5, **sampling}),
        use_tqdm=False,
        mm_processor_kwargs=None if crop is None else {"crop": crop},
    )
    return [(output.outputs[0].text, len(output.prompt_token_ids)) for output in outputs]


def said_of(engine: Engine, picture: Image.Image, text: str, crop: Any) -> Region | None:
    from vllm.sampling_params import StructuredOutputsParams

    legal = StructuredOutputsParams(regex=DIALECTS["cells"].regex)
    ((said, _),) = chat(engine, [conversation(picture, text)], crop, max_tokens=12, structured_outputs=legal)
    return read_cells(said)


def said_of_thumbnail(engine: Engine, scene: TestScene, text: str) -> Region | None:
    return said_of(engine, thumbnail(scene.picture()), words.LOCATE + text, {"method": "off"})


def outcomes() -> dict[str, float]:
    """Localizations so far, also those of other tests' engines."""
    return {
        " ".join(sample.labels[name] for name in ("model_name", "localizer", "outcome")): sample.value
        for metric in REGISTRY.collect()
        if metric.name == "crop:localizations"
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def test_answers_are_those_with_the_region_the_model_names(engine: Engine) -> None:
    together = chat(engine, [conversation(scene.picture(), q.text) for scene, q in ASKED])
    for (scene, question), answer in zip(ASKED, together, strict=True):
        region = said_of_thumbnail(engine, scene, question.text)
        crop = {"method": "off"} if region is None else {"regions": [region.as_lists()]}
        assert chat(engine, [conversation(scene.picture(), question.text)], crop) == [answer], question.text
    lengths = {question.family: length for (_, question), (_, length) in zip(ASKED, together, strict=True)}
    assert lengths["read"] < 100 < 576 < lengths["count"]


def test_outputs_of_other_requests_are_not_lost(engine: Engine) -> None:
    before = Question(
        (SCENES[0].picture(),), {"method": "off"}, "<|im_start|>{images}how many?<|answer|>", ""
    )
    added = [engine.add(f"other-{index}", before, steps=2) for index in range(3)]
    picture = SCENES[1].picture()
    picture.putpixel((0, 0), (1, 2, 3))  # not known: it is localized while the others run
    prompt = engine.llm._preprocess_chat_one(conversation(picture, SCENES[1].questions[0].text))
    assert len(prompt["prompt_token_ids"]) < 576
    finished: set[str] = set()
    while engine.llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id for output in engine.llm.llm_engine.step()}
    assert finished == {f"other-{index}" for index in range(3)}, added


def test_prompts_that_are_text_name_their_question(engine: Engine) -> None:
    scene, question = ASKED[0]
    text = f"<|im_start|>{{images}}{question.text}<|answer|>"
    known = said_of_thumbnail(engine, scene, question.text)
    assert known is not None
    wanted, *others = engine.ask(
        Question((scene.picture(),), {"regions": [known.as_lists()]}, text, ""),
        Question((scene.picture(),), {"question": question.text}, text, ""),
        Question((scene.picture(),), None, text, ""),
        steps=2,
    )
    assert others[0].prompt_token_ids == wanted.prompt_token_ids
    assert (
        others[0].logprobs.equal(wanted.logprobs)
        or float((others[0].logprobs - wanted.logprobs).abs().max()) < 1e-5
    )
    assert others[1].num_prompt_tokens > 576  # nobody says what is asked


def test_a_localizer_that_fails_costs_the_saving_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    localizer = engine.llm.llm_engine.renderer._localizing.localizer
    scene, question = ASKED[0]
    picture = scene.picture()
    picture.putpixel((0, 0), (3, 2, 1))
    before = outcomes()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(localizer, "_read", fail)
    ((_, length),) = chat(engine, [conversation(picture, question.text)])
    assert length > 576
    failed = {name for name, count in outcomes().items() if count > before.get(name, 0)}
    assert [name.rpartition(" ")[2] for name in failed] == ["error"]
    monkeypatch.undo()
    ((_, length),) = chat(engine, [conversation(picture, question.text)])
    assert length < 100  # a failure is not remembered


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_answers_with_the_region_it_names(checkpoint_of: CheckpointOf, family: Family) -> None:
    """A thumbnail where smaller images cost less, else the image with its tokens averaged."""
    localizer = {"kind": "engine", "prompt": "{question}"}
    engine = Engine(
        checkpoint_of(family, family.deep), {"localizer": localizer, "pruning_rate": 0.889}, family
    )
    geometry, before = engine.processor.geometry, outcomes()
    regions = []
    for seed in range(5):
        picture, text = noise_image(seed, 500, 400), f"What is it, {seed}?"
        answer = chat(engine, [conversation(picture, text)])
        if (size := size_for_tokens(geometry, *picture.size, 64)) is not None:
            region = said_of(engine, shrink(picture, size), text, {"method": "off"})
        else:
            rate = 1 - 64 / geometry.grid(*picture.size).num_tokens
            glance = {"regions": [Region.whole().as_lists()], "pruning_rate": rate, "method": "plc"}
            region = said_of(engine, picture, text, glance)
        if region is not None:  # places in what the model sees, which may be the middle of the picture
            region = geometry.view(*picture.size).unproject(region)
        crop = {"method": "off"} if region is None else {"regions": [region.as_lists()]}
        assert chat(engine, [conversation(picture, text)], crop) == answer
        regions.append(region)
    new = {name: count - before.get(name, 0) for name, count in outcomes().items()}
    whole = regions.count(None)
    assert sum(count for name, count in new.items() if name.endswith(" region")) == 5 - whole > 0
    assert sum(count for name, count in new.items() if name.endswith(" global")) == whole


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Requests and prompt lengths as engines get them."""
    from vllm.v1.engine.llm_engine import LLMEngine

    seen: list[tuple[str, int]] = []
    add_request = LLMEngine.add_request

    def noted(self: Any, request_id: str, prompt: Any, params: Any, **kwargs: Any) -> str:
        seen.append((request_id, len(prompt["prompt_token_ids"])))
        return add_request(self, request_id, prompt, params, **kwargs)

    monkeypatch.setattr(LLMEngine, "add_request", noted)
    return seen


def test_a_picture_of_many_tiles_is_localized_whatever_clients_may_ask_for(
    checkpoint_of: CheckpointOf, added: list[tuple[str, int]]
) -> None:
    """Averaging a large picture to 64 tokens removes more than the limit for clients allows."""
    crop = {"localizer": {"kind": "engine", "prompt": "{question}"}, "limits": {"max_pruning_rate": 0.8}}
    engine = Engine(checkpoint_of(LLAVA_ONEVISION, LLAVA_ONEVISION.deep), crop, LLAVA_ONEVISION)
    picture, before = noise_image(901, 1152, 1152), outcomes()
    assert 1 - 64 / engine.processor.geometry.grid(*picture.size).num_tokens > 0.8
    chat(engine, [conversation(picture, "What is it?")])
    new = {name.rpartition(" ")[2] for name, count in outcomes().items() if count > before.get(name, 0)}
    assert new <= {"region", "global"}
    assert new
    assert added[0][0].startswith("crop-localizer-")


def test_one_image_that_cannot_be_pruned_takes_no_other_along(engine: Engine) -> None:
    """The request's own settings can move an image under a region that the server would find."""
    scenes = [conversation(scene.picture(), q.text) for scene, q in ASKED[:2]]
    outputs = engine.llm.chat(
        scenes, use_tqdm=False, mm_processor_kwargs={"max_pixels": 128 * 128, "do_sample_frames": False}
    )
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * 2 or all(
        output.outputs[0].token_ids for output in outputs
    )


@pytest.mark.parametrize("size", [(500, 400), (384, 384), (31, 97), (1000, 90)])
def test_pixels_are_those_of_the_picture_that_the_model_sees(engine: Engine, size: tuple[int, int]) -> None:
    """A thumbnail is resized once more, to whole tokens, by the model's own image processor."""
    localizer = engine.llm.llm_engine.renderer._localizing.localizer
    glance = localizer.requests.glance_now(as_picture(noise_image(7, *size)))
    processor = engine.processor.info.get_hf_processor().image_processor
    ((_, rows, cols),) = processor(images=[glance.item], return_tensors="pt")["image_grid_thw"].tolist()
    assert glance.pixels == (cols * processor.patch_size, rows * processor.patch_size)


def test_arrays_are_localized_as_pictures_are(engine: Engine) -> None:
    scene, question = ASKED[0]
    text = f"<|im_start|>{{images}}{question.text}<|answer|>"
    from_picture, from_array = (
        Question((image,), {"question": question.text}, text, "")  # type: ignore[arg-type]
        for image in (scene.picture(), np.asarray(scene.picture()))
    )
    first, second = engine.ask(from_picture, from_array, steps=2)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert len(first.prompt_token_ids) < 200


def test_prompt_logprobs_take_evictions_that_the_server_chose_away() -> None:
    """Nobody has asked for a region: the request is answered as if there had been none."""
    from vllm import SamplingParams

    crop = {"pruning_rate": 0.5, "method": "ilp", "eviction_layers": [1], "localizer": ENGINE}
    engine = Engine(CHECKPOINT, crop, QWEN2_5_VL, enable_prefix_caching=False)
    scene, question = ASKED[0]
    plain, asked = (
        engine.llm.chat(
            conversation(scene.picture(), question.text),
            SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=logprobs),
            use_tqdm=False,
        )[0]
        for logprobs in (None, 1)
    )
    markers = set(engine.processor.eviction_settings.marker_ids)
    assert markers & set(plain.prompt_token_ids)
    assert not markers & set(asked.prompt_token_ids)
    assert asked.outputs[0].text == plain.outputs[0].text == question.answer


def test_where_all_images_cost_the_same_the_glance_is_averaged(
    checkpoint_of: CheckpointOf, added: list[tuple[str, int]]
) -> None:
    checkpoint: Path = checkpoint_of(LLAVA, LLAVA.deep)
    localizer = {"kind": "engine", "prompt": "{question}"}
    llava = Engine(checkpoint, {"localizer": localizer, "pruning_rate": 0.8333}, LLAVA)
    encoder, picture = llava.model.crop_encoder, noise_image(900)
    parts = [
        {"type": "image_pil", "image_pil": picture},
        {"type": "image_url", "image_url": {"url": data_url(noise_image(901))}},
    ]
    for part in parts:
        encoded = encoder.num_encoded
        content = [part, {"type": "text", "text": "What is it?"}]
        ((_, length),) = chat(llava, [[{"role": "user", "content": content}]])
        assert encoder.num_encoded == encoded + 1  # the vision tower ran once for both
        (glance_id, glance), (_, answered) = added
        added.clear()
        assert glance_id.startswith("crop-localizer-")
        assert answered == length
        # The same words about an image of 64 tokens, of 96, or of all 576 where the model names no region.
        assert answered - glance in (96 - 64, 576 - 64)


def test_a_client_who_asks_what_a_view_is_asked_gets_all_layers(checkpoint_of: CheckpointOf) -> None:
    """Keys and values of a view end half way up: the prefix cache must not give them to anybody."""
    from vllm import SamplingParams

    localizer = {"kind": "attention", "prompt": "{question}", "whole_below": 0.0}
    engine = Engine(checkpoint_of(LLAVA, LLAVA.deep), {"localizer": localizer, "pruning_rate": 5 / 6}, LLAVA)
    part = {"type": "image_pil", "image_pil": noise_image(902)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=-1)
    view = {"method": "plc", "regions": [[[0, 0, 1, 1]]], "pruning_rate": 5 / 6}

    def asked(crop: Any) -> Any:
        output = engine.llm.chat(
            messages, sampling, use_tqdm=False, mm_processor_kwargs={"crop": crop} if crop else None
        )[0]
        first = output.outputs[0].logprobs[0]
        return output, [first[token].logprob for token in range(len(first))]

    left = engine.model.heat.steps_left
    asked(None)
    assert engine.model.heat.steps_left > left
    same, after = asked(view)
    engine.llm.reset_prefix_cache()
    fresh, alone = asked(view)
    assert same.prompt_token_ids == fresh.prompt_token_ids
    assert after == pytest.approx(alone, abs=1e-5)


def test_images_are_processed_while_their_regions_are_sought(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the API server's renderer, with all that it asks but the localizer, which takes its time here."""
    from vllm.renderers.params import ChatParams

    renderer = engine.llm.llm_engine.renderer
    processor, localizer = renderer.mm_processor, renderer._localizing.localizer
    events: list[str] = []
    process = processor._call_hf_processor

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append("processed")
        return process(*args, **kwargs)

    async def locate(
        picture: Any, question: str, salt: str | None, waiting: Callable[[], None]
    ) -> LocalizerAnswer:
        events.append("asked")
        if question != "not ahead":
            waiting()
            waiting()
        await asyncio.sleep(0.3)
        events.append("answered")
        return LocalizerAnswer(Region.from_grid_cells(1, 1, 2, 2), 1.0)

    monkeypatch.setattr(processor, "_call_hf_processor", noted)
    monkeypatch.setattr(localizer, "locate", locate)
    parameters = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})

    def processed(*pictures: Image.Image, question: str) -> Any:
        events.clear()
        renderer.clear_mm_cache()
        parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
        content = [*parts, {"type": "text", "text": question}]
        _, (prompt,) = asyncio.run(
            renderer.render_chat_async([[{"role": "user", "content": content}]], parameters)
        )
        return prompt["mm_kwargs"].get_data()

    first, second = noise_image(910, 500, 400), noise_image(911, 400, 500)
    ahead = processed(first, question="where?")
    assert events == ["asked", "processed", "answered"]
    later = processed(first, question="not ahead")
    assert events == ["asked", "answered", "processed"]
    assert ahead.keys() == later.keys()
    for name, value in ahead.items():
        pairs = zip(value, later[name], strict=True) if isinstance(value, list) else [(value, later[name])]
        assert all(torch.equal(one, other) for one, other in pairs), name
    processed(first, second, question="where?")  # the first one's region is known, and maybe its pixels
    assert events == ["asked", "answered", "processed"]


def test_an_image_nobody_is_sure_of_can_be_pruned_late(checkpoint_of: CheckpointOf) -> None:
    """As by a client who asks for all of the image alike, from the late layer on."""
    from vllm import SamplingParams

    localizer = {"kind": "attention", "prompt": "{question}", "whole_below": 1.0, "when_unsure": "late"}
    crop = {"localizer": localizer, "pruning_rate": 0.8, "eviction_layers": [5]}
    engine = Engine(checkpoint_of(LLAVA, LLAVA.deep), crop, LLAVA, enable_prefix_caching=False)
    part = {"type": "image_pil", "image_pil": noise_image(903)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=-1)

    def asked(crop: Any) -> tuple[list[int], list[float]]:
        (output,) = engine.llm.chat(
            messages, sampling, use_tqdm=False, mm_processor_kwargs={"crop": crop} if crop else None
        )
        first = output.outputs[0].logprobs[0]
        return list(output.prompt_token_ids), [first[token].logprob for token in range(len(first))]

    everything, rate = [[[0, 0, 1, 1]]], 0.9 * (1 - 5 / 8)
    prompt, found = asked(None)
    same_prompt, told = asked({"method": "ilp", "regions": everything, "pruning_rate": rate})
    assert prompt == same_prompt
    assert found == pytest.approx(told, abs=1e-6)
    (marker,) = engine.processor.eviction_settings.marker_ids
    assert prompt.count(marker) == 576 - round(0.1 * 576)
    whole_prompt, whole = asked({"method": "off"})
    assert marker not in whole_prompt
    assert whole != pytest.approx(found, abs=1e-3)
    assert asked({"method": "plc"})[0] == whole_prompt  # who asks for no eviction gets none


def test_a_view_that_is_given_up_while_it_is_rendered_is_nobody_elses(
    checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit ends a localization at any point; a client's request of the same image comes next.

    Where the view is the image itself, both have the same key in vLLM's processor cache.
    """
    localizer = {"kind": "attention", "prompt": "{question}", "thumbnail_tokens": 4096}
    engine = Engine(checkpoint_of(QWEN2_5_VL, QWEN2_5_VL.deep), {"localizer": localizer}, QWEN2_5_VL)
    renderer = engine.llm.llm_engine.renderer
    requests, cache = renderer._localizing.localizer.requests, renderer.mm_processor_cache
    processed: list[Any] = []
    apply = renderer.mm_processor.apply

    def noted(*args: Any) -> Any:
        processed.append(apply(*args))
        asking.get_loop().call_soon_threadsafe(asking.cancel)  # before the event loop knows of it
        return processed[-1]

    async def give_up() -> None:
        nonlocal asking
        glance = requests.glance_now(as_picture(noise_image(904, 300, 200)))
        asking = asyncio.ensure_future(requests.ask(glance, "Who?", None, None, lambda: None))
        with pytest.raises(asyncio.CancelledError):
            await asking

    asking: Any = None
    monkeypatch.setattr(renderer, "engine", ServingEngine(None))
    monkeypatch.setattr(renderer.mm_processor, "apply", noted)
    asyncio.run(give_up())
    ((key,),) = processed[0]["mm_hashes"].values()
    assert not cache.is_cached_item(key)
    monkeypatch.undo()
    part = {"type": "image_pil", "image_pil": noise_image(904, 300, 200)}
    content = [part, {"type": "text", "text": "What is it?"}]
    ((text, _),) = chat(engine, [[{"role": "user", "content": content}]], {"method": "off"})
    assert text
    # What has reached the engine stays in both of vLLM's caches: they must forget alike.
    views: list[Any] = []

    def kept(*args: Any) -> Any:
        views.append(apply(*args))
        return views[-1]

    monkeypatch.setattr(renderer.mm_processor, "apply", kept)
    part = {"type": "image_pil", "image_pil": noise_image(905, 300, 200)}
    chat(engine, [[{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]])
    assert len(views) == 2
    assert all(cache.is_cached_item(key) for view in views for key in view["mm_hashes"]["image"])
