# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: a budget for each image, exactly what stock vLLM and transformers make of that budget.

In published models the tokens of an image see each other in some layers, which vLLM's CPU kernels do not
compute: here they are causal, in the engine and in the reference.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError

from tests.checkpoints.gemma4 import FRAME, IMAGE, TINY, make_checkpoint
from tests.cpu.conftest import Answer, Engine, Question
from tests.families import Family
from tests.pictures import noise_image
from tests.reference import HfLlava
from vllm_crop.config import CropConfig
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.gemma4 import BUDGETS, Gemma4Geometry

pytestmark = pytest.mark.vllm_runtime

TOLERANCE, NOTICEABLE = 1e-5, 1e-2
WIDE, TALL, SQUARE = noise_image(1, 500, 400), noise_image(2, 300, 420), noise_image(3)
TEXT = "USER: {images}What is the time, and where?\nASSISTANT:"
STEPS = 4


class HfGemma4(HfLlava):
    """Only how an image is written is asked of it."""

    image = IMAGE


GEMMA4 = Family("gemma4", make_checkpoint, TINY, TINY, HfGemma4, of_module="gemma4_mm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gemma4"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint, {"detail_low_tokens": 100}, GEMMA4, max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Engine:
    return Engine(checkpoint, None, GEMMA4, max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def geometry(checkpoint: Path) -> Gemma4Geometry:
    found = load_geometry(str(checkpoint))
    assert isinstance(found, Gemma4Geometry)
    return found


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    """Images, each with its budget -> logprobs `[STEPS, vocab]` of plain transformers."""
    from transformers import AutoProcessor, Gemma4ForConditionalGeneration

    model: Any = Gemma4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)

    @torch.no_grad()
    def ask(images: Sequence[Image.Image], budgets: Sequence[int]) -> torch.Tensor:
        made = [
            processor.image_processor(image.convert("RGB"), max_soft_tokens=budget, return_tensors="pt")
            for image, budget in zip(images, budgets, strict=True)
        ]
        counts = [int(one["num_soft_tokens_per_image"][0]) for one in made]
        # One batch: patches of smaller budgets are filled up like those of small images.
        most = max(one["pixel_values"].shape[1] for one in made)
        pixels = torch.cat([_filled(one["pixel_values"], most, 0) for one in made])
        positions = torch.cat([_filled(one["image_position_ids"], most, -1) for one in made])
        places = "".join(f"{FRAME[0]}{IMAGE * count}{FRAME[1]}\n" for count in counts)
        ids = processor.tokenizer(TEXT.format(images=places), return_tensors="pt")["input_ids"]
        found = []
        for _ in range(STEPS):
            kinds = (ids == model.config.image_token_id).long()
            logits = model(
                input_ids=ids, pixel_values=pixels, image_position_ids=positions, mm_token_type_ids=kinds
            ).logits[0, -1]
            found.append(logits.float().log_softmax(-1))
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        return torch.stack(found)

    return ask


def _filled(rows: torch.Tensor, most: int, value: int) -> torch.Tensor:
    missing = most - rows.shape[1]
    return torch.cat([rows, rows.new_full((1, missing, rows.shape[2]), value)], dim=1)


def ask(
    engine: Engine, images: tuple[Image.Image, ...], crop: dict[str, Any] | None, **settings: Any
) -> Answer:
    (answer,) = engine.ask(Question(images, crop, TEXT, settings=settings), steps=STEPS)
    return answer


def off_by(answer: Answer, wanted: torch.Tensor) -> float:
    return float((answer.logprobs - wanted).abs().max())


def test_tokens_are_counted_as_upstream_counts_them(engine: Engine, geometry: Gemma4Geometry) -> None:
    info, chance = engine.processor.info, random.Random(0)
    sizes = [(chance.randint(1, 3000), chance.randint(1, 3000)) for _ in range(300)]
    # Round shapes come out whole: one operation in another order, and a row or column is missing.
    round_shapes = [
        (step * x, step * y) for x in range(1, 65) for y in range(1, 65) for step in (1, 7, 10, 14, 34, 70)
    ]
    for width, height in [*sizes, *round_shapes, (1, 3000), (3000, 1), (1, 1)]:
        for budget in BUDGETS:
            wanted = info._compute_num_soft_tokens(width, height, max_soft_tokens=budget)
            assert geometry._grid(width, height, budget).num_tokens == wanted, (width, height, budget)


@pytest.mark.parametrize(
    ("images", "max_tokens", "budgets"),
    [
        ((WIDE,), 70, (70,)),
        ((WIDE,), 129, (70,)),
        ((WIDE,), 130, (140,)),  # of which it fills 130
        ((TALL,), [140], (140,)),
        ((WIDE, TALL), [70, 140], (70, 140)),
        ((WIDE, TALL), [None, 100], (280, 70)),
        ((WIDE, TALL, SQUARE), [140, None, 70], (140, 280, 70)),
        ((WIDE, WIDE), [70, 280], (70, 280)),
        ((SQUARE,), 100_000, (280,)),
        ((noise_image(4, 170, 238),), 140, (140,)),
        ((noise_image(5, 448, 640),), 140, (140,)),
        ((noise_image(6, 490, 350), WIDE), [140, None], (140, 280)),
    ],
)
def test_each_image_has_the_budget_below_its_bound(
    engine: Engine, geometry: Gemma4Geometry, reference: Any, images: Any, max_tokens: Any, budgets: Any
) -> None:
    answer = ask(engine, images, {"max_tokens": max_tokens})
    assert off_by(answer, reference(images, budgets)) <= TOLERANCE
    for other in BUDGETS[:3]:
        if budgets != (other,) * len(images):
            assert off_by(answer, reference(images, (other,) * len(images))) > NOTICEABLE
    text = ask(engine, (), None).num_prompt_tokens
    taken = sum(
        geometry._grid(*image.size, budget).num_tokens for image, budget in zip(images, budgets, strict=True)
    )
    assert answer.num_prompt_tokens > text + taken
    assert answer.num_prompt_tokens - taken == len(ask(engine, images, None).prompt_token_ids) - sum(
        geometry.grid(*image.size).num_tokens for image in images
    )


@pytest.mark.parametrize("budget", [70, 140])
def test_one_budget_is_bitwise_stock_vllms(engine: Engine, stock: Engine, budget: int) -> None:
    answer = ask(engine, (WIDE, TALL), {"max_tokens": budget})
    wanted = ask(stock, (WIDE, TALL), None, max_soft_tokens=budget)
    assert answer.token_ids == wanted.token_ids
    assert (answer.logprobs == wanted.logprobs).all()


def test_without_a_bound_it_is_stock_vllm(engine: Engine, stock: Engine) -> None:
    fresh = noise_image(17, 333, 444)
    whole, wanted = ask(engine, (fresh,), {"method": "off"}), ask(stock, (fresh,), None)
    assert (whole.logprobs == wanted.logprobs).all()


def test_an_image_is_kept_for_each_budget(engine: Engine, reference: Any) -> None:
    """Of one image, at once and one after the other: caches keep them apart."""
    image = noise_image(20, 320, 500)
    for budget in (70, 280, 140, 70):
        answer = ask(engine, (image,), {"max_tokens": budget})
        assert off_by(answer, reference((image,), (budget,))) <= TOLERANCE


def test_what_cannot_be_is_said(engine: Engine) -> None:
    with pytest.raises(VLLMValidationError, match=r"crop\.max_tokens: 60 tokens are too few.* in 63"):
        ask(engine, (WIDE,), {"max_tokens": 60})
    with pytest.raises(VLLMValidationError, match=r"crop\.regions: not possible with this model"):
        ask(engine, (WIDE,), {"regions": [[[0.1, 0.1, 0.5, 0.5]]]})
    with pytest.raises(VLLMValidationError, match=r"crop\.pruning_rate: not possible .* Send `max_tokens`"):
        ask(engine, (WIDE,), {"pruning_rate": 0.5})
    with pytest.raises(VLLMValidationError, match="mm_processor_kwargs"):
        ask(engine, (WIDE,), {"max_tokens": 70}, max_soft_tokens=140)


@pytest.mark.parametrize(
    ("crop", "said"),
    [
        ({"method": "ilp"}, "method is about parts of an image"),
        ({"eviction_layers": [2]}, "eviction_layers is about parts"),
        ({"pruning_rate": 0.5}, "pruning_rate is about parts"),
        ({"localizer": {"kind": "attention"}}, "localizer.kind is about parts"),
        ({"compression": "foveate"}, "compression is about parts"),
        ({"max_tokens": 64}, "max_tokens 64 is too few for this model"),
        ({"history": {"keep": 1, "max_tokens": 30}}, "history.max_tokens 30 is too few"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_regions_is_refused_at_start(checkpoint: Path, crop: dict[str, Any], said: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    CropConfig.from_mapping(crop)
    with pytest.raises(ValueError, match=said):
        EngineArgs(model=str(checkpoint), additional_config={"crop": crop}).create_engine_config()
