# SPDX-License-Identifier: Apache-2.0
"""What layers with a state bring along: vLLM's own kernels in bfloat16, the prefix cache, refusals.

In float32 the other tests compare this family to 1e-5, with tests/float32_deltanet.py in the place of vLLM's
CPU kernels, which take bfloat16 only. Here these kernels run.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import CheckpointOf
from tests.cpu.conftest import EVICT, Engine, EngineOf, Question, ReferenceOf, reference_by
from tests.cpu.test_caches import right
from tests.cpu.test_parity import NOTICEABLE, SCENARIOS, UNPRUNED, cells, control_for, difference
from tests.cpu.test_qwen2_5_vl import positions_beside_videos, prompt_with_video
from tests.cpu.videos import check_videos_pass_untouched
from tests.families import QWEN3_5
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.config import CropConfig

pytestmark = pytest.mark.vllm_runtime

FIRST, SECOND = cells(0, 0, 1, 1), cells(6, 6, 7, 7)
TOKENS = 12 * 16  # of an image of 500 x 400 pixels
# Of two computations in bfloat16 neither is exact: how much further from it than the other one may be.
AS_ROUGH = 2.0


def off_by(answer: Any, exact: Any) -> float:
    """Mean absolute difference of the first step's logprobs, over the whole vocabulary."""
    return float((answer.logprobs[0] - exact.logprobs[0]).abs().mean())


@pytest.mark.parametrize("method", ["plc", "ilp"])
def test_in_bfloat16_it_is_as_exact_as_transformers(
    checkpoint_of: CheckpointOf, hf_of: Callable[..., HfReference], method: str
) -> None:
    """Against float32 neither is further off than twice the other, and a wrong plan five times as far."""
    checkpoint = checkpoint_of(QWEN3_5, QWEN3_5.deep)
    crop = {"pruning_rate": 5 / 6, "method": method, "eviction_layers": [1] if method == "ilp" else []}
    engine = Engine(checkpoint, crop, QWEN3_5, dtype="bfloat16", max_num_batched_tokens=256)
    exact = reference_by(hf_of(QWEN3_5, QWEN3_5.deep))
    rough = reference_by(QWEN3_5.reference(checkpoint, torch.bfloat16))
    errors, yardsticks, controls = [], [], []
    names = [name for name in SCENARIOS if name not in UNPRUNED]
    for name, answer in zip(names, engine.ask(*(SCENARIOS[name] for name in names), steps=1), strict=True):
        question = SCENARIOS[name]
        wanted = exact(question, engine.config, steps=1)
        assert answer.num_prompt_tokens == wanted.num_prompt_tokens
        errors.append(off_by(answer, wanted))
        yardsticks.append(off_by(rough(question, engine.config, steps=1), wanted))
        controls.append(off_by(exact(control_for(name, question), engine.config, steps=1), wanted))
    error, yardstick, control = (sum(some) / len(names) for some in (errors, yardsticks, controls))
    print(
        f"{method}: mean |delta logprob| to float32 over {len(names)} prompts: vLLM {error:.4f}, "
        f"transformers {yardstick:.4f}, unpruned instead {control:.4f}; "
        f"worst {max(errors):.4f}, {max(yardsticks):.4f}"
    )
    assert error <= AS_ROUGH * yardstick
    assert max(errors) <= AS_ROUGH * max(yardsticks)
    assert control > 5 * error


def test_states_in_the_prefix_cache_belong_to_a_region(
    checkpoint_of: CheckpointOf, reference_of: ReferenceOf
) -> None:
    """A state holds all of the prompt before it: that of another region of an image would be noticed."""
    engine = Engine(
        checkpoint_of(QWEN3_5, QWEN3_5.shallow), {"pruning_rate": 0.25}, QWEN3_5, enable_prefix_caching=True
    )
    reference_for = reference_of(QWEN3_5, "pool")
    images = tuple(noise_image(seed, 500, 400) for seed in range(700, 708))

    def asked(region: list[list[float]], text: str) -> Question:
        return Question(images, {"regions": [region] * len(images)}, f"USER: {{images}}{text}\nASSISTANT:")

    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    (fresh,) = right(engine, reference_for, asked(FIRST, "What is it?"))
    assert fresh.num_cached_tokens == 0
    assert fresh.num_prompt_tokens > block
    (again,) = right(engine, reference_for, asked(FIRST, "And where?"))
    assert again.num_cached_tokens >= block
    (other,) = right(engine, reference_for, asked(SECOND, "What is it?"))
    assert other.num_cached_tokens == 0
    assert difference(other, fresh) > NOTICEABLE


def test_videos_pass_untouched(engine_of: EngineOf) -> None:
    pool = engine_of(QWEN3_5, "pool")
    check_videos_pass_untouched(
        engine_of(QWEN3_5, "stock"), pool, prompt_with_video(noise_image(406, 500, 400))
    )
    positions_beside_videos(pool, noise_image(407, 500, 400), TOKENS)


@pytest.mark.parametrize(
    ("crop", "said"),
    [
        (EVICT, "leave it off by --no-enable-prefix-caching"),  # vLLM has it on by itself
        ({"localizer": {"kind": "attention", "layers": [3, 4]}}, r"only \[3, 7\] have full attention"),
    ],
    ids=["eviction with prefix caching", "a layer that does not look"],
)
def test_what_its_layers_cannot_do_is_refused_at_start(
    checkpoint_of: CheckpointOf, crop: dict[str, Any], said: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = checkpoint_of(QWEN3_5, QWEN3_5.shallow)
    with pytest.raises(ValueError, match=said):
        EngineArgs(model=str(checkpoint), additional_config={"crop": crop}).create_engine_config()


def test_layers_that_look_are_read_by_default(engine_of: EngineOf) -> None:
    geometry = engine_of(QWEN3_5, "pool").processor.geometry
    assert list(geometry.looking_layers) == [3, 7]
    localizer = CropConfig.from_mapping({"localizer": {"kind": "attention"}}).localizer
    assert localizer.layers_of(geometry.num_layers, geometry.looking_layers) == [3]
    assert localizer.layers_of(32, range(3, 32, 4)) == [11, 15, 19]
    assert localizer.layers_of(3, [2]) == [2]
