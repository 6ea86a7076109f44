# SPDX-License-Identifier: Apache-2.0
"""What breaks between rows, and a token that ends an image, bring along, beyond test_parity.py."""

import json
import random
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.checkpoints.mistral3 import END
from tests.conftest import CheckpointOf
from tests.cpu.conftest import STEPS, Engine, EngineOf, Question, ReferenceFor, ReferenceOf, decided
from tests.cpu.test_caches import about, right
from tests.cpu.test_parity import NOTICEABLE, cells, difference
from tests.families import MISTRAL3
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.errors import UnsupportedFlagError, UnsupportedImageError
from vllm_crop.families.mistral3 import Mistral3Geometry

pytestmark = pytest.mark.vllm_runtime

# The least that mistral_common takes for a tokenizer.
TEKKEN = {
    "config": {
        **{"pattern": r"[\s\S]", "num_vocab_tokens": 256, "version": "v3"},
        **{"default_vocab_size": 276, "default_num_special_tokens": 20},
    },
    "vocab": [
        {"rank": byte, "token_bytes": b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ],
}
FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)


@pytest.fixture
def pool(engine_of: EngineOf) -> Engine:
    return engine_of(MISTRAL3, "pool")


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(MISTRAL3, "pool")


def test_sizes_are_those_of_the_image_processor() -> None:
    geometry = Mistral3Geometry(28, 1540, 40)
    chance = random.Random(0)
    for _ in range(20000):
        width, height = (int(2 ** chance.uniform(0, 12.5)) for _ in range(2))
        if max(width, height) > 1540 * min(width, height):
            with pytest.raises(UnsupportedImageError, match="nothing left of its short side"):
                geometry.grid(width, height)
            continue
        picture = np.broadcast_to(np.uint8(0), (height, width, 3))
        found = get_resize_output_image_size(picture, (1540, 1540), (28, 28), "channels_last")
        rows, cols = found[0] // 28, found[1] // 28
        assert geometry.pixels(width, height) == (cols * 28, rows * 28), (width, height)
        grid = geometry.grid(width, height)
        assert grid.num_tokens == rows * cols + rows - 1 <= geometry.max_tokens
        assert (grid.places().part % 2).sum() == rows - 1


@pytest.mark.parametrize("size", [(30, 1), (1, 60), (900, 30), (10, 500), (504, 504)])
def test_tiny_and_narrow_images(pool: Engine, reference_for: ReferenceFor, size: tuple[int, int]) -> None:
    image = noise_image(900, *size)
    right(pool, reference_for, about(image, None))
    right(pool, reference_for, about(image, FIRST))


@pytest.mark.parametrize("crop", [{"regions": [FIRST]}, {"max_tokens": 1}, {"regions": [None]}], ids=str)
def test_what_ends_an_image_stays(pool: Engine, crop: dict[str, Any]) -> None:
    vocabulary = pool.llm.get_tokenizer().get_vocab()
    (answer,) = pool.ask(Question((noise_image(910, 500, 400),), crop))
    assert answer.prompt_token_ids.count(vocabulary[END]) == 1
    decision = decided(pool.processor, noise_image(910, 500, 400), crop)
    (bare,) = pool.ask(Question(text="USER: \nWhat is the time, and where?\nASSISTANT:"))
    whole = pool.processor.geometry.grid(500, 400).num_tokens
    count = decision.plan.num_embeddings if decision.plan else whole
    assert answer.num_prompt_tokens == bare.num_prompt_tokens + count + 1


def test_what_becomes_of_breaks_matters(
    pool: Engine, reference_for: ReferenceFor, hf_of: Callable[..., HfReference]
) -> None:
    """The control: a model that mixed up breaks and what is beside them would be noticed."""
    hf = hf_of(MISTRAL3, MISTRAL3.shallow)
    image = noise_image(920, 500, 400)
    asked = about(image, FIRST)
    (answer,) = right(pool, reference_for, asked)
    plan = decided(pool.processor, image, asked.crop).plan
    breaks = np.flatnonzero(plan.grid.places().part % 2)
    mixed_up = plan.assignment.copy()
    mixed_up[breaks], mixed_up[breaks - 1] = plan.assignment[breaks - 1], plan.assignment[breaks]
    assert (mixed_up != plan.assignment).any()
    prompt = hf.processor.tokenizer.encode(asked.prompt(hf.image)["prompt"], add_special_tokens=False)
    wrong = hf.generate(prompt, [image], [replace(plan, assignment=mixed_up)], STEPS)
    assert difference(answer, wrong) > NOTICEABLE


@pytest.mark.parametrize("setting", ["pool", "evicting"])
def test_a_resend_is_found_in_the_prefix_cache_and_another_region_is_not(
    engine_of: EngineOf, reference_of: ReferenceOf, setting: str
) -> None:
    engine, reference_for = engine_of(MISTRAL3, setting), reference_of(MISTRAL3, setting)
    assert engine.llm.reset_prefix_cache()
    image = noise_image(930, 500, 400)
    whole, first, second = about(image, None), about(image, FIRST), about(image, SECOND)
    for asked in (whole, first, second):  # whole and evicted prompts have different rows under equal ids
        (fresh,) = right(engine, reference_for, asked)
        assert fresh.num_cached_tokens == 0
    for asked in (whole, first, second):
        (again,) = right(engine, reference_for, asked)
        assert again.num_cached_tokens > 0


def test_an_image_without_a_place_is_refused(pool: Engine) -> None:
    prompt = Question((noise_image(940),), {"regions": [FIRST]}).prompt(pool.image)
    prompt["prompt"] = "USER: What?\nASSISTANT:"
    with pytest.raises(VLLMValidationError, match=r"0 place\(s\) for 1 image\(s\)"):
        pool.llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_tokenizer_whose_renderer_knows_no_crop_is_refused(
    checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """vLLM takes Mistral's own tokenizer by itself where its files are."""
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoint_of(MISTRAL3, MISTRAL3.shallow).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tekken.json").write_text(json.dumps(TEKKEN))
    (folder / "consolidated.safetensors").symlink_to(folder / "model.safetensors")
    arguments: dict[str, Any] = {"model": str(folder), "config_format": "hf", "load_format": "safetensors"}
    with pytest.raises(UnsupportedFlagError, match="say --tokenizer-mode hf"):
        EngineArgs(**arguments, additional_config={"crop": {}}).create_model_config()
    EngineArgs(**arguments, additional_config={"crop": {}}, tokenizer_mode="hf").create_model_config()
