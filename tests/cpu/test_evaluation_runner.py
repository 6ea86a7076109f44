# SPDX-License-Identifier: Apache-2.0
"""The evaluation's runner against plain transformers, on a small random checkpoint of tinyvqa's shape."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lab.evaluation.asking import Answer, SceneTask
from lab.evaluation.conditions import LOCATE, OFF, Condition
from lab.evaluation.covipal.module import PruningModule
from lab.evaluation.crop_pruning import crop_pruning
from lab.evaluation.prefill_work import PrefillWork
from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.regions import regions_for
from lab.evaluation.rivals import covipal, ivc_prune
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.runner.method import Kept, Pruning, Seen, Sight
from lab.evaluation.runner.qwen import QwenRunner, Reply
from lab.evaluation.transformers_answers import TransformersAnswers
from lab.tinyvqa import words
from tests.slow_plan import embeddings_of
from tests.untrained_tinyvqa import make_untrained
from vllm_crop.benchmarking.prefill import ModelShape
from vllm_crop.planning.budget import BudgetError, retained_count
from vllm_crop.planning.plan import TokenPlan, make_plan

RATES = (0.667, 0.889, 0.926)
CLOSE = 2e-5  # nats, in float32; a mistake changes tenths
LAYERS = 12
WORK = PrefillWork(ModelShape(LAYERS, 128, 384), (1,))
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "btp", "lvlm-csp")  # in every configuration
CONFIGURED = [
    (name, configuration)
    for name, rival in RIVALS.items()
    for configuration in rival.configurations
    if name != "vtw"
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained(tmp_path_factory.mktemp("tiny"), LAYERS)


@pytest.fixture(scope="module", autouse=True)
def narrow_module() -> Iterator[None]:
    """CoViPAL's module is trained for another width: one of this width, untrained."""
    torch.manual_seed(0)
    module = PruningModule(64).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covipal, "read_module", lambda: module)
        yield


@pytest.fixture(scope="module")
def answers(tiny: Path) -> TransformersAnswers:
    return TransformersAnswers(tiny, (1,))


@pytest.fixture(scope="module")
def runner(answers: TransformersAnswers) -> QwenRunner:
    return answers.runner


@pytest.fixture(scope="module")
def scene() -> TestScene:
    return make_test_set(2)[0]


@pytest.fixture(scope="module")
def seen(runner: QwenRunner, scene: TestScene) -> Seen:
    return runner.see(scene.picture())


@pytest.fixture(scope="module")
def texts(scene: TestScene) -> list[str]:
    return [question.text for question in scene.questions]


@pytest.fixture(scope="module")
def unpruned(runner: QwenRunner, seen: Seen, texts: list[str]) -> list[Reply]:
    return runner.answer([seen], texts)


@pytest.fixture(scope="module")
def plans(scene: TestScene, seen: Seen) -> dict[str, list[TokenPlan]]:
    """Of the local questions, by method, at 0.889."""
    regions = [question.region(8) for question in scene.questions if question.boxes]
    return {
        method: [make_plan(seen.grid, region, 0.889, "pool", method, LAYERS, layers) for region in regions]
        for method, layers in (("plc", ()), ("ilp", (1,)), ("plc+ilp", (1, 5)))
    }


def worst(found: list[Reply], expected: list[Reply]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one.logprobs - other.logprobs).abs().max()) for one, other in pairs)


@torch.inference_mode()
def test_unpruned_it_is_plain_transformers(
    runner: QwenRunner, scene: TestScene, texts: list[str], unpruned: list[Reply]
) -> None:
    """Questions of different lengths in one batch, against transformers' forward and generate, one by one."""
    for text, reply in zip(texts, unpruned, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = runner.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = runner.processor(images=[scene.picture()], text=[prompt], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        logprobs = runner.model(**inputs).logits[0, -1].log_softmax(-1)
        assert float((logprobs - reply.logprobs).abs().max()) < CLOSE
        generated = runner.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert runner._text(generated[0, length:].tolist()) == reply.text
        assert reply.prompt_tokens == length


@torch.inference_mode()
def test_several_images_are_plain_transformers(runner: QwenRunner, scene: TestScene) -> None:
    pictures = [scene.picture().resize((128, 96)), scene.picture().crop((0, 0, 64, 80))]
    seen = [runner.see(picture, attention=False) for picture in pictures]
    text = scene.questions[0].text
    (reply,) = runner.answer(seen, [text])
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    prompt = runner.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = runner.processor(images=pictures, text=[prompt], return_tensors="pt")
    logprobs = runner.model(**inputs).logits[0, -1].log_softmax(-1)
    assert float((logprobs - reply.logprobs).abs().max()) < CLOSE
    assert reply.tokens_per_layer == (8 * 6 + 4 * 5,) * LAYERS


@torch.inference_mode()
def test_without_an_image_it_is_plain_transformers(runner: QwenRunner, texts: list[str]) -> None:
    (reply,) = runner.answer([], texts[:1])
    messages = [{"role": "user", "content": [{"type": "text", "text": texts[0]}]}]
    prompt = runner.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = runner.processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    logprobs = runner.model(**ids).logits[0, -1].log_softmax(-1)
    assert float((logprobs - reply.logprobs).abs().max()) < CLOSE
    assert reply.tokens_per_layer == (0,) * LAYERS


@pytest.mark.parametrize("name", RIVALS)
def test_at_rate_zero_every_rival_is_the_unpruned_model(
    name: str, runner: QwenRunner, seen: Seen, texts: list[str], unpruned: list[Reply]
) -> None:
    found = runner.answer([seen], texts, RIVALS[name](576, LAYERS, 0.0))
    assert worst(found, unpruned) < CLOSE
    assert [reply.text for reply in found] == [reply.text for reply in unpruned]


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_run_with_exactly_the_tokens_they_say(
    name: str, runner: QwenRunner, seen: Seen, texts: list[str], unpruned: list[Reply]
) -> None:
    rates = {"vtw": (0.5,), **dict.fromkeys(INSIDE, (0.667, 0.889))}.get(name, RATES)
    for rate in rates:
        pruning = RIVALS[name](576, LAYERS, rate)
        found = runner.answer([seen], texts[:3], pruning)
        check_counts(found, pruning, rate)
        assert worst(found, unpruned[:3]) > 0.01  # it does change something
        for reply in found:  # and the average tells what every layer ran with
            average = sum(reply.tokens_per_layer) / LAYERS
            counts = WORK.layer_counts(Condition(name, None, rate), average, 576)
            assert counts == pytest.approx(reply.tokens_per_layer)


@pytest.mark.parametrize(("name", "configuration"), CONFIGURED)
def test_every_configuration_runs(
    name: str, configuration: str, runner: QwenRunner, seen: Seen, texts: list[str]
) -> None:
    try:
        pruning = RIVALS[name](576, LAYERS, 0.667, configuration)
    except BudgetError:
        pytest.skip("it cannot meet the rate")
    check_counts(runner.answer([seen], texts[:2], pruning, steps=1), pruning, 0.667)


def check_counts(found: list[Reply], pruning: Pruning, rate: float) -> None:
    """Every layer runs with the tokens of its stage, and all layers together with those of the rate."""
    for reply in found:
        counts = reply.tokens_per_layer
        left = counts[0]
        if pruning.before is None:
            assert left == 576
        elif not pruning.stages:
            assert left == retained_count(576, rate)
        for layer, count in enumerate(counts):
            left = 576 if layer == pruning.rejoin else left
            left = pruning.stages.get(layer, left)
            assert count == left
        assert abs(sum(counts) / LAYERS - 576 * (1 - rate)) <= 0.5


def test_a_picture_is_known_by_its_pixels(runner: QwenRunner, seen: Seen, scene: TestScene) -> None:
    picture = scene.picture()
    assert runner.see(picture, attention=False).fingerprint == seen.fingerprint
    picture.putpixel((5, 5), (1, 2, 3))
    assert runner.see(picture, attention=False).fingerprint != seen.fingerprint


def test_what_the_tower_makes_of_a_token_is_what_is_merged_into_its_features(
    runner: QwenRunner, seen: Seen
) -> None:
    """In the order of the features, whatever order the tower works in."""
    merger = runner.model.model.visual.merger
    width = seen.tower.shape[1] // 4
    with torch.inference_mode():
        features = merger(seen.tower.view(-1, width))
    assert torch.allclose(features, seen.features, atol=1e-5)


def test_anchors_are_found_by_the_turns_of_all_axes(runner: QwenRunner, seen: Seen, texts: list[str]) -> None:
    chooser = ivc_prune.Chooser(lambda count: 0)
    runner.answer([seen], texts[:1], Pruning(chooser.look), steps=1)
    positions = runner.prompts.make([seen.grid], texts[:1]).positions[:, -576:].double()
    angles = positions[..., None] * runner.language.rotary_emb.inv_freq.double()
    assert torch.allclose(chooser.cosines.double(), angles.cos().mean(0), atol=1e-4)
    assert torch.allclose(chooser.sines.double(), angles.sin().mean(0), atol=1e-4)


def test_a_method_sees_all_text_behind_the_image(runner: QwenRunner, seen: Seen, texts: list[str]) -> None:
    """With its words spelled, and without its padding."""
    sights: list[Sight] = []

    def look(sight: Sight) -> Kept:
        sights.append(sight)
        return Kept.choose(sight.image.features, torch.arange(576)[None])

    runner.answer([seen], texts, Pruning(look), steps=1)
    (sight,) = sights
    lengths = runner.prompts.make([seen.grid], texts).texts.lengths
    assert [len(text) for text in sight.texts] == lengths.tolist()
    for text, embeddings, spelled in zip(texts, sight.words, sight.spelled, strict=True):
        assert "".join(spelled).strip() == text
        assert len(embeddings) == len(spelled)


@torch.inference_mode()
def test_tokens_that_come_back_are_as_they_were_embedded(
    runner: QwenRunner, seen: Seen, texts: list[str]
) -> None:
    """Against transformers' own layers: two without most tokens, then all of them with all."""
    kept = torch.arange(5, 576, 40)
    method = Pruning(lambda sight: Kept(sight.image.features[kept][None], kept[None]), rejoin=2)
    for text, reply in zip(texts[:2], runner.answer([seen], texts[:2], method), strict=True):
        prompts = runner.prompts.make([seen.grid], [text])
        lead, ids = prompts.lead, prompts.texts.ids[0, : int(prompts.texts.lengths[0])]
        embed = runner.language.embed_tokens
        hidden = torch.cat([embed(prompts.prefix[:lead]), seen.features, embed(ids)])
        after = prompts.next_position + torch.arange(len(ids)).expand(3, -1)
        positions = torch.cat([prompts.positions, after], dim=1)
        few = torch.cat([torch.arange(lead), lead + kept, lead + 576 + torch.arange(len(ids))])
        hidden[few] = through_layers(runner, hidden[few], positions[:, few], range(2))
        hidden = through_layers(runner, hidden, positions, range(2, LAYERS))
        logprobs = runner.model.lm_head(runner.language.norm(hidden[-1])).log_softmax(-1)
        assert float((logprobs - reply.logprobs).abs().max()) < CLOSE
        assert reply.tokens_per_layer == (len(kept),) * 2 + (576,) * (LAYERS - 2)
    # It would notice if they did not come back.
    away = Pruning(method.before)
    assert worst(runner.answer([seen], texts[:2], method), runner.answer([seen], texts[:2], away)) > 0.01


def through_layers(
    runner: QwenRunner, hidden: torch.Tensor, positions: torch.Tensor, layers: range
) -> torch.Tensor:
    """Rows `[tokens, hidden]` after transformers' layers, each seeing what stands before it."""
    count = len(hidden)
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    rotation = runner.language.rotary_emb(hidden[None], positions[:, None])
    rows = hidden[None]
    for index in layers:
        layer = runner.language.layers[index]
        made = layer(rows, attention_mask=mask, position_embeddings=rotation)
        rows = made[0] if isinstance(made, tuple) else made
    return rows[0]


def test_grey_levels_and_attention_stand_where_their_tokens_do(runner: QwenRunner) -> None:
    """One square of noise in an even picture: where it is, entropy and only there; rows sum to one."""
    picture = Image.new("RGB", (384, 384), (90, 120, 30))
    noise = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(0)).numpy()
    picture.paste(Image.fromarray(noise.astype("uint8")), (16 * 7, 16 * 3))
    noisy = runner.see(picture)
    assert int(noisy.entropy.argmax()) == 3 * 24 + 7
    assert int((noisy.entropy > 0.5).sum()) == 1
    assert torch.allclose(noisy.attention.sum(1), torch.ones(576), atol=1e-4)
    assert torch.allclose(noisy.attention.mean(0), noisy.received * 4, atol=1e-6)


def test_questions_do_not_see_each_other(runner: QwenRunner, seen: Seen, texts: list[str]) -> None:
    """Neither in what is kept for them nor in what they answer."""
    for name, make in RIVALS.items():
        rate = 0.5 if name == "vtw" else 0.889
        together = runner.answer([seen], texts, make(576, LAYERS, rate))
        alone = [runner.answer([seen], [text], make(576, LAYERS, rate))[0] for text in texts[:2]]
        assert worst(alone, together[:2]) < CLOSE, name


@pytest.mark.parametrize("method", ["plc", "ilp", "plc+ilp"])
@torch.inference_mode()
def test_crops_plans_run_as_a_mask_over_the_unpruned_model_would(
    method: str, runner: QwenRunner, seen: Seen, scene: TestScene, plans: dict[str, list[TokenPlan]]
) -> None:
    """Against transformers' own decoder layers, which see the rows that the plan leaves them."""
    local = [question.text for question in scene.questions if question.boxes]
    found = runner.answer([seen], local, crop_pruning(plans[method], LAYERS))
    for text, plan, reply in zip(local, plans[method], found, strict=True):
        assert reply.tokens_per_layer == tuple(plan.tokens_per_layer(LAYERS))
        average = sum(reply.tokens_per_layer) / LAYERS
        work = replace(WORK, eviction_layers=(1, 5) if method == "plc+ilp" else (1,))
        counts = work.layer_counts(Condition(method, "oracle", 0.889), average, 576)
        assert counts == pytest.approx(reply.tokens_per_layer)
        logprobs = by_transformers_layers(runner, seen, text, plan)
        assert float((logprobs - reply.logprobs).abs().max()) < CLOSE


def by_transformers_layers(runner: QwenRunner, seen: Seen, text: str, plan: TokenPlan) -> torch.Tensor:
    """One prompt, one layer of transformers after the other, with an additive mask and no sharing."""
    prompts = runner.prompts.make([seen.grid], [text])
    rows = torch.stack([seen.features[list(e.tokens)].mean(0) for e in embeddings_of(plan)])
    ids, lead = prompts.texts.ids[0], prompts.lead
    hidden = torch.cat(
        [runner.language.embed_tokens(prompts.prefix[:lead]), rows, runner.language.embed_tokens(ids)]
    )
    kept = [lead + embedding.position for embedding in embeddings_of(plan)]
    after = prompts.next_position + torch.arange(len(ids)).expand(3, -1)
    positions = torch.cat([prompts.positions[:, :lead], prompts.positions[:, kept], after], dim=1)
    stays = (
        [LAYERS] * lead + [e.evicted_from_layer or LAYERS for e in embeddings_of(plan)] + [LAYERS] * len(ids)
    )
    for index, layer in enumerate(runner.language.layers):
        present = torch.tensor([until > index for until in stays])
        hidden, positions = hidden[present], positions[:, present]
        stays = [until for until in stays if until > index]
        mask = torch.full((len(stays), len(stays)), float("-inf")).triu(1)[None, None]
        rotation = runner.language.rotary_emb(hidden[None], positions[:, None])
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=rotation)[0]
    logits: torch.Tensor = runner.model.lm_head(runner.language.norm(hidden[-1]))
    return logits.log_softmax(-1)


def test_prompts_end_where_the_answer_begins(runner: QwenRunner, seen: Seen, texts: list[str]) -> None:
    prompts = runner.prompts.make([seen.grid], texts)
    last = prompts.texts.ids[torch.arange(len(texts)), prompts.texts.lengths - 1]
    assert set(last.tolist()) == {runner.processor.tokenizer.convert_tokens_to_ids(words.ANSWER)}


def test_an_empty_pruning_changes_nothing(
    runner: QwenRunner, seen: Seen, texts: list[str], unpruned: list[Reply]
) -> None:
    assert worst(runner.answer([seen], texts, Pruning()), unpruned) == 0


@pytest.mark.parametrize(
    ("condition", "visual"),
    [
        (OFF, {576.0}),
        (Condition(LOCATE), {64.0}),
        (Condition("no-image"), {0.0}),
        (Condition("resize", None, 0.889), {64.0}),
        (Condition("plc", "oracle", 0.889), {64.0, 576.0}),  # search and count are served whole
        (Condition("ilp", "oracle", 0.667), {2300 / 12, 576.0}),
        (Condition("plc+ilp", "whole", 0.926), {43.0}),
        (Condition("divprune", None, 0.778), {128.0}),
    ],
    ids=lambda value: value.slug if isinstance(value, Condition) else "",
)
def test_cells_take_the_tokens_of_their_budget(
    condition: Condition, visual: set[float], answers: TransformersAnswers, scene: TestScene
) -> None:
    regions = regions_for(condition.region, [scene])[0] if condition.region else [None] * len(scene.questions)
    (row,) = answers.answer(condition, [SceneTask(scene, tuple(regions))])
    assert all(isinstance(answer, Answer) for answer in row)
    assert {round(answer.visual_tokens) for answer in row} == {round(count) for count in visual}
    for answer in row:
        assert answer.steps is not None
        assert 1 <= answer.steps <= (9 if condition.method == LOCATE else 4)
        assert 5 < answer.kv_tokens - answer.visual_tokens < 40
