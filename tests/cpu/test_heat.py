# SPDX-License-Identifier: Apache-2.0
"""Heat maps of a served model equal the attention of plain transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CheckpointOf
from tests.cpu.conftest import STEPS, TEXT, Engine, Question, _answer, decided
from tests.families import FAMILIES, LLAVA, Family
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.heat.request import NOWHERE, RING, NoHeatError, extra_args, read, token_ids
from vllm_crop.planning.geometry import ImageTokens

pytestmark = pytest.mark.vllm_runtime

LAYERS = list(LLAVA.looking)
LOCALIZER = {"kind": "attention", "layers": LAYERS, "timeout_s": 60}
EVICTING = {
    **{"method": "plc+ilp", "eviction_layers": [2, 5], "pruning_rate": 2 / 3},
    **{"compression": "prune", "position_ids": "original", "localizer": LOCALIZER},
}
PLAIN = {"pruning_rate": 5 / 6, "localizer": LOCALIZER}
PICTURE, OTHER = noise_image(70, 330, 250), noise_image(71, 250, 330)
BOX = [0.2, 0.1, 0.6, 0.5]
OFF: dict[str, Any] = {"method": "off"}
COMPRESSED = {"method": "plc", "regions": [[BOX]], "pruning_rate": 0.8}
EVICTED = {"method": "ilp", "regions": [[BOX]]}
OTHER_TEXT = "USER: {images}Where is the ship on its way to tonight?\nASSISTANT:"
TOLERANCE = 1e-5  # of the hottest cell
NOTICEABLE = 1e-2
NUM_CELLS = 90

Start = Callable[[Family, bool], Engine]


@pytest.fixture(scope="module")
def engine_of(checkpoint_of: CheckpointOf) -> Start:
    """With or without eviction; 256 tokens a step, so that long prompts come in chunks."""
    known: dict[tuple[Family, bool], Engine] = {}

    def start(family: Family, evicts: bool) -> Engine:
        if (family, evicts) not in known:
            checkpoint = checkpoint_of(family, family.deep)
            localizer = {**LOCALIZER, "layers": list(family.looking)}
            crop = {**(EVICTING if evicts else PLAIN), "localizer": localizer}
            known[family, evicts] = Engine(checkpoint, crop, family, max_num_batched_tokens=256)
        return known[family, evicts]

    return start


def cells_of(engine: Engine, picture: Image.Image, crop: Any) -> list[int]:
    """Each embedding in some cell, a few in none."""
    decision = decided(engine.processor, picture, crop)
    grid = engine.processor.geometry.grid(*picture.size)
    count = decision.compression.num_embeddings if decision.compression else len(embedded(engine, grid))
    places = np.random.default_rng(0).integers(RING, NUM_CELLS, count)
    return [int(place) for place in places]


def embedded(engine: Engine, grid: ImageTokens) -> np.ndarray[Any, Any]:
    """The tokens of an unpruned image that take an embedding."""
    assignment = engine.processor.unpruned_assignment(grid)
    return np.arange(grid.num_tokens) if assignment is None else np.flatnonzero(assignment >= 0)


def sampling(
    cells: Sequence[int] | None,
    layers: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    leaves: bool = False,
) -> Any:
    from vllm import SamplingParams

    if cells is None:
        return SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        logprob_token_ids=token_ids(NUM_CELLS),
        skip_reading_prefix_cache=True,
        extra_args=extra_args(cells, NUM_CELLS, layers, weights, leaves),
    )


def ask(engine: Engine, *asked: tuple[Question, list[int] | None]) -> list[Any]:
    """All in one batch: heat by cell for who comes with cells, answers for others."""
    outputs = engine.llm.generate(
        [question.prompt(engine.image) for question, _ in asked],
        [sampling(cells) for _, cells in asked],
        use_tqdm=False,
    )
    return [
        _answer(output) if cells is None else read(output.outputs[0].logprobs[0], NUM_CELLS)
        for output, (_, cells) in zip(outputs, asked, strict=True)
    ]


def expected(
    hf: HfReference,
    engine: Engine,
    question: Question,
    cells: Sequence[int],
    layers: Sequence[int] = LAYERS,
    weights: Sequence[float] | None = None,
) -> np.ndarray[Any, Any]:
    """By the definition, from transformers' attention."""
    (picture,) = question.images
    plan = decided(engine.processor, picture, question.crop).compression
    ids = hf.processor.tokenizer.encode(question.prompt(hf.image)["prompt"], add_special_tokens=False)
    original = True if engine.config.position_ids == "original" else None
    prompt = hf.embed(ids, [picture], [plan], original)
    start = hf.framed(ids).index(hf.image_token_id)
    rows = np.arange(len(cells)) if plan else embedded(engine, engine.processor.geometry.grid(*picture.size))
    attention = hf.attention(prompt)[list(layers)][:, start + rows]
    where = torch.tensor(cells)
    shares = attention / attention[:, where != NOWHERE].sum(-1, keepdim=True)
    heat = shares.amax(0)
    if weights is not None:
        heat = shares.double().pow(torch.tensor(weights, dtype=torch.float64)[:, None]).prod(0)
        heat = torch.where(where >= 0, heat, 0.0)
        heat = heat / heat.sum()
    return np.array(
        [float(heat[where == cell].mean()) if (where == cell).any() else 0.0 for cell in range(NUM_CELLS)]
    )


def skip_unless_it_says_more(family: Family, evicts: bool) -> None:
    if not evicts and family is not LLAVA:
        pytest.skip("the layers run as upstream has them for every family")


def differs(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """As a fraction of the hottest cell."""
    return float(np.abs(got - want).max() / want.max())


@pytest.mark.parametrize("evicts", [True, False], ids=["evicting", "plain"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_map_is_the_attention_of_transformers(
    family: Family, evicts: bool, engine_of: Start, hf_of: Callable[..., HfReference]
) -> None:
    skip_unless_it_says_more(family, evicts)
    engine, hf = engine_of(family, evicts), hf_of(family, family.deep)
    questions = [
        Question((PICTURE,), OFF),
        Question((OTHER,), COMPRESSED, OTHER_TEXT),
        Question((PICTURE,), OFF, OTHER_TEXT),
    ]
    cells = [cells_of(engine, question.images[0], question.crop) for question in questions]
    others = [Question((OTHER,), EVICTED if evicts else COMPRESSED), Question((), None)]
    batch = [
        (others[0], None),
        (questions[0], cells[0]),
        (others[1], None),
        (questions[1], cells[1]),
        (questions[2], cells[2]),
    ]
    first = ask(engine, *batch)
    layers = family.looking
    wanted = [expected(hf, engine, *one, layers) for one in zip(questions, cells, strict=True)]
    for got, want in zip((first[1], first[3], first[4]), wanted, strict=True):
        assert differs(got, want) < TOLERANCE
    # Alone, and with the prefix in the cache.
    for question, where, want in zip(questions, cells, wanted, strict=True):
        assert differs(ask(engine, (question, where))[0], want) < TOLERANCE
    # Another question, another layer, a map of other cells: each would be noticed.
    assert differs(wanted[2], wanted[0]) > NOTICEABLE
    assert differs(expected(hf, engine, questions[0], cells[0], layers[:-1]), wanted[0]) > NOTICEABLE
    assert differs(np.roll(wanted[0], 1), wanted[0]) > NOTICEABLE


def test_each_request_of_a_batch_names_its_layers(
    engine_of: Start, hf_of: Callable[..., HfReference]
) -> None:
    engine, hf = engine_of(LLAVA, True), hf_of(LLAVA, LLAVA.deep)
    # The second prompt is cut by the step's 256 tokens.
    questions = [Question((PICTURE,), COMPRESSED), Question((OTHER,), OFF, OTHER_TEXT)]
    subsets: list[list[int] | None] = [[3], [6, 1], None, [1, 3, 6], [6]]
    asked = [(question, layers) for layers in subsets for question in questions]
    cells = [cells_of(engine, question.images[0], question.crop) for question, _ in asked]
    outputs = engine.llm.generate(
        [question.prompt(engine.image) for question, _ in asked],
        [sampling(where, layers) for where, (_, layers) in zip(cells, asked, strict=True)],
        use_tqdm=False,
    )
    got = [read(output.outputs[0].logprobs[0], NUM_CELLS) for output in outputs]
    for heat, where, (question, layers) in zip(got, cells, asked, strict=True):
        assert differs(heat, expected(hf, engine, question, where, layers or LAYERS)) < TOLERANCE
    assert differs(got[0], got[4]) > NOTICEABLE
    assert differs(got[6], got[4]) == 0


def test_layers_may_be_weighted(engine_of: Start, hf_of: Callable[..., HfReference]) -> None:
    engine, hf = engine_of(LLAVA, True), hf_of(LLAVA, LLAVA.deep)
    question, layers, weights = Question((PICTURE,), OFF), [1, 3, 6], [0.7, -0.25, 1.5]
    cells = cells_of(engine, PICTURE, OFF)
    (output,) = engine.llm.generate(
        question.prompt(engine.image), sampling(cells, layers, weights), use_tqdm=False
    )
    got = read(output.outputs[0].logprobs[0], NUM_CELLS)
    want = expected(hf, engine, question, cells, layers, weights)
    assert differs(got, want) < 10 * TOLERANCE  # a logarithm and back
    assert differs(expected(hf, engine, question, cells, layers, weights[::-1]), want) > NOTICEABLE


def test_a_layer_that_nobody_watches_gives_no_map(engine_of: Start) -> None:
    engine = engine_of(LLAVA, True)
    question = Question((PICTURE,), OFF)
    named = sampling(cells_of(engine, PICTURE, OFF), [3, 4])
    (output,) = engine.llm.generate(question.prompt(engine.image), named, use_tqdm=False)
    with pytest.raises(NoHeatError):
        read(output.outputs[0].logprobs[0], NUM_CELLS)


@pytest.mark.parametrize("evicts", [True, False], ids=["evicting", "plain"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_of_views_alone_ends_at_the_last_layer_that_is_read(
    family: Family, evicts: bool, engine_of: Start
) -> None:
    skip_unless_it_says_more(family, evicts)
    engine = engine_of(family, evicts)
    heat = engine.model.heat
    looked, other = Question((PICTURE,), OFF), Question((OTHER,), OFF, OTHER_TEXT)
    cells = cells_of(engine, PICTURE, OFF)
    (wanted,), (before,) = ask(engine, (looked, cells)), ask(engine, (other, None))
    prompt = looked.prompt(engine.image) | {"cache_salt": "apart"}
    left = heat.steps_left
    output = engine.llm.generate(prompt, sampling(cells, leaves=True), use_tqdm=False)[0]
    assert differs(read(output.outputs[0].logprobs[0], NUM_CELLS), wanted) < TOLERANCE
    num_steps = -(-len(output.prompt_token_ids) // 256)
    assert heat.steps_left - left == num_steps
    # Nothing of it stays behind: neither in the model nor in the prefix cache.
    (after,), (same,) = ask(engine, (other, None)), ask(engine, (looked, None))
    assert torch.equal(after.logprobs, before.logprobs)
    engine.llm.reset_prefix_cache()
    (fresh,) = ask(engine, (looked, None))
    assert float((same.logprobs - fresh.logprobs).abs().max()) < TOLERANCE
    # Beside a request that needs the other layers, all rows go through them.
    left = heat.steps_left
    together = engine.llm.generate(
        [prompt, other.prompt(engine.image)], [sampling(cells, leaves=True), sampling(None)], use_tqdm=False
    )
    assert differs(read(together[0].outputs[0].logprobs[0], NUM_CELLS), wanted) < TOLERANCE
    assert float((_answer(together[1]).logprobs - before.logprobs).abs().max()) < TOLERANCE
    assert heat.steps_left - left < num_steps or num_steps == 1  # too short to be cut where the other begins


@pytest.mark.parametrize("evicts", [True, False], ids=["evicting", "plain"])
def test_others_are_answered_to_the_bit_as_beside_any_request(evicts: bool, engine_of: Start) -> None:
    engine = engine_of(LLAVA, evicts)
    others = [Question((OTHER,), EVICTED if evicts else COMPRESSED), Question((PICTURE,), OFF, OTHER_TEXT)]
    looked = Question((PICTURE,), OFF)
    mapped = sampling(cells_of(engine, PICTURE, OFF))
    # It ends as soon as the map does, so that every step has the same tokens: a kernel may round otherwise.
    answered = sampling(None)
    answered.max_tokens = 1
    answers = []
    for asked in (answered, mapped, answered):
        engine.llm.reset_prefix_cache()
        prompts = [question.prompt(engine.image) for question in (others[0], looked, others[1])]
        got = engine.llm.generate(prompts, [sampling(None), asked, sampling(None)], use_tqdm=False)
        answers.append([_answer(output) for output in (got[0], got[2])])
    for before, beside_map, after in zip(*answers, strict=True):
        assert torch.equal(before.logprobs, after.logprobs), "equal batches already differ"
        assert torch.equal(beside_map.logprobs, before.logprobs)
        assert beside_map.token_ids == before.token_ids


def test_beside_a_client_that_names_ids_both_get_theirs(engine_of: Start) -> None:
    from vllm import SamplingParams

    engine = engine_of(LLAVA, True)
    looked, named = Question((PICTURE,), OFF), Question((OTHER,), OFF, OTHER_TEXT)
    cells = cells_of(engine, PICTURE, OFF)
    ids = [300, 3, 250]
    # It is still answered when the map is made.
    names = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprob_token_ids=ids)
    alone = engine.llm.generate(named.prompt(engine.image), names, use_tqdm=False)[0].outputs[0].logprobs[0]
    (wanted,) = ask(engine, (looked, cells))
    prompts = [named.prompt(engine.image), looked.prompt(engine.image)]
    beside, mapped = engine.llm.generate(prompts, [names, sampling(cells)], use_tqdm=False)
    assert differs(read(mapped.outputs[0].logprobs[0], NUM_CELLS), wanted) < TOLERANCE
    for token in ids:
        assert abs(beside.outputs[0].logprobs[0][token].logprob - alone[token].logprob) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"cells": [0] * 3, "num_cells": 90},
        {"cells": "all", "num_cells": 90},
        {"cells": [0] * 576, "num_cells": 10**9},
        {"cells": [99] * 576, "num_cells": 90},
        {"cells": [None] * 576, "num_cells": 90},
        {"cells": [0] * 576, "num_cells": 90, "layers": []},
        {"cells": [0] * 576, "num_cells": 90, "layers": 3},
        {"cells": [0] * 576, "num_cells": 90, "weights": [1.0]},
        {"cells": [0] * 576, "num_cells": 90, "layers": [3], "weights": [1e9]},
        {"cells": [0] * 576, "num_cells": 90, "layers": [[3]]},
        [],
        7,
    ],
    ids=str,
)
def test_what_is_no_request_for_a_map_is_answered(wrong: Any, engine_of: Start) -> None:
    from vllm import SamplingParams

    engine = engine_of(LLAVA, True)
    prompt = Question((PICTURE,), OFF).prompt(engine.image)
    asked = SamplingParams(temperature=0, max_tokens=2, logprobs=3, extra_args={"crop_heat": wrong})
    plain = SamplingParams(temperature=0, max_tokens=2, logprobs=3)
    outputs = [engine.llm.generate(prompt, one, use_tqdm=False)[0].outputs[0] for one in (asked, plain)]
    assert outputs[0].token_ids == outputs[1].token_ids
    with pytest.raises(NoHeatError):
        read(outputs[0].logprobs[0], NUM_CELLS)


def test_text_alone_has_no_map(engine_of: Start) -> None:
    with pytest.raises(NoHeatError):
        ask(engine_of(LLAVA, True), (Question((), None, TEXT), [0, 1, 2]))
