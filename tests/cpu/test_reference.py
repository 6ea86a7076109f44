# SPDX-License-Identifier: Apache-2.0
"""The reference itself: its layer-by-layer answer against transformers' own forward pass, no vLLM."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.llama import modeling_llama

from tests.cpu.conftest import TEXT
from tests.pictures import noise_image
from tests.reference import HfLlava, HfReference, Prompt, Reference
from tests.slow_plan import embeddings_of, plan_of
from vllm_crop.benchmarking.dummy_llava import DEEP, PADDED_IDS, VOCAB_SIZE, make_checkpoint
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import TokenPlan, whole_image_plan

EXACT = 1e-6  # nats over the full vocabulary
NOTICEABLE = 1e-2
HIDDEN = -1e30  # no share in a softmax; unlike infinity, it leaves rows that see nothing finite
STEPS = 4
TEXTS = {
    "one image": TEXT.format(images="<image>\n"),
    "two images": TEXT.format(images="<image>\n<image>\n"),
    "image first": "<image>What is it?",
    "image last": "What is it?<image>",
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> HfLlava:
    """Eight layers in double precision, so that the order of sums does not matter."""
    hf = HfLlava(make_checkpoint(tmp_path_factory.mktemp("deep"), DEEP))
    hf.model.double()
    return hf


def evicting(hf: HfLlava, seed: int, layers: Sequence[int | None], step: int = 1) -> TokenPlan:
    """Every `step`-th token of an image, each evicted from one of `layers` on."""
    whole = whole_image_plan(hf.geometry.token_grid)
    choose = random.Random(seed).choice
    left = [replace(e, evicted_from_layer=choose(layers)) for e in embeddings_of(whole)[::step]]
    return plan_of(whole.grid, whole.pruning_rate, left)


def embed(
    hf: HfLlava, text: str, plans: Sequence[TokenPlan | None], original_positions: bool = False
) -> Prompt:
    ids = hf.processor.tokenizer.encode(text, add_special_tokens=False)
    images: list[Image.Image] = [noise_image(index, 400 + index) for index in range(len(plans))]
    return hf.embed(ids, images, plans, original_positions)


def brute_force(hf: HfReference, prompt: Prompt, steps: int) -> Reference:
    """All rows run through all layers, but no row sees a key where it is evicted."""

    def hide(layer: int) -> Callable[..., Any]:
        def before_layer(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[..., (prompt.num_layers <= layer).nonzero().flatten()] = HIDDEN
            return args, {**kwargs, "attention_mask": mask}

        return before_layer

    with ExitStack() as hooks:
        for index, layer in enumerate(hf.model.model.language_model.layers):
            hook = layer.register_forward_pre_hook(hide(index), with_kwargs=True)
            hooks.callback(hook.remove)
        return hf.decode(prompt, steps)


def double_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Eager attention without the float32 softmax, whose rounding depends on how many keys there are."""
    scores = query @ key.transpose(2, 3) * scaling + (0 if mask is None else mask)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def difference(one: Reference, other: Reference) -> float:
    return float((one.logprobs - other.logprobs).abs().max())


def assert_same(one: Reference, other: Reference) -> None:
    error = difference(one, other)
    print(f"max |delta logprob| {error:.1e}")
    assert one.token_ids == other.token_ids
    assert error <= EXACT


@pytest.mark.parametrize("original_positions", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_without_eviction_it_is_the_stock_forward_pass(
    deep: HfLlava, name: str, original_positions: bool
) -> None:
    plans = [evicting(deep, 0, [None], step=5), None][: TEXTS[name].count("<image>")]
    prompt = embed(deep, TEXTS[name], plans, original_positions)
    answer = deep.decode_by_layer(prompt, STEPS)
    assert_same(answer, deep.decode(prompt, STEPS))
    assert answer.prompt_rows_per_layer == [answer.num_prompt_tokens] * DEEP.layers


@pytest.mark.parametrize("original_positions", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_evicting_is_hiding_keys(
    deep: HfLlava, name: str, original_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", double_attention)
    plans = [evicting(deep, 1, [None, 1, 3, 6], step=3), evicting(deep, 2, [None, 6])]
    prompt = embed(deep, TEXTS[name], plans[: TEXTS[name].count("<image>")], original_positions)
    answer = deep.decode_by_layer(prompt, STEPS)
    assert_same(answer, brute_force(deep, prompt, STEPS))
    assert difference(answer, deep.decode(prompt, STEPS)) > NOTICEABLE


def test_tokens_keep_the_positions_they_have_without_eviction(deep: HfLlava) -> None:
    for original_positions in (False, True):
        evicted, kept = (
            embed(deep, TEXTS["two images"], [evicting(deep, 3, layers, step=3), None], original_positions)
            for layers in ([2], [None])
        )
        assert evicted.positions.equal(kept.positions)
        assert evicted.next_position == kept.next_position


def test_the_last_row_stays(deep: HfLlava) -> None:
    """It gives the first answer token, also if it belongs to an image."""
    prompt = embed(deep, TEXTS["image last"], [evicting(deep, 4, [2])])
    num_text = len(prompt.rows) - 576
    assert prompt.num_layers[-2:].tolist() == [2, DEEP.layers]
    rows = deep.decode_by_layer(prompt, 1).prompt_rows_per_layer
    assert rows == [num_text + 576] * 2 + [num_text + 1] * 6


def test_which_tokens_are_evicted_matters(deep: HfLlava) -> None:
    """512 of 576 tokens, from a late layer on."""
    whole = embed(deep, TEXTS["one image"], [None])
    stock = deep.decode(whole, 1)
    entropy = float(-(stock.logprobs.exp() * stock.logprobs).sum())
    answers = []
    for seed in range(4):
        plan = evicting(deep, seed, [None, *8 * [3]])
        answers.append(deep.decode_by_layer(embed(deep, TEXTS["one image"], [plan]), 1))
    effects = [difference(answer, stock) for answer in answers]
    mutual = [difference(one, other) for one, other in combinations(answers, 2)]
    print(f"effects {effects}, mutual {mutual}, entropy {entropy}")
    assert min(effects) > 0.1
    assert min(mutual) > NOTICEABLE
    assert 0.1 < entropy < 5


def test_generate_answers_by_the_plan(deep: HfLlava) -> None:
    image, steps = noise_image(5), 2
    ids = deep.processor.tokenizer.encode(TEXTS["one image"], add_special_tokens=False)
    region = Region.from_grid_cells(2, 3, 3, 4)
    plan = deep.plan(image, region, 0.5, "pool", "ilp", (2, 5))
    assert plan is not None
    answer = deep.generate(ids, [image], [plan], steps)
    assert_same(answer, deep.decode_by_layer(deep.embed(ids, [image], [plan]), steps))
    num_text = len(ids) - 1
    assert [rows - num_text for rows in answer.prompt_rows_per_layer] == plan.tokens_per_layer(DEEP.layers)
    assert len(set(answer.prompt_rows_per_layer)) == 3


def test_vocabulary_has_ids_that_stand_for_no_token(deep: HfLlava) -> None:
    """As published checkpoints have; eviction markers are taken from them."""
    assert len(deep.processor.tokenizer) == VOCAB_SIZE - PADDED_IDS
    assert len(deep.model.lm_head.weight) == deep.model.config.text_config.vocab_size == VOCAB_SIZE
