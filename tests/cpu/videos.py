# SPDX-License-Identifier: Apache-2.0
"""Videos beside images, which pass untouched."""

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams

from tests.cpu.conftest import Engine
from vllm_crop.planning.geometry import Region

REGION = Region.from_grid_cells(0, 0, 1, 1).as_lists()


def check_videos_pass_untouched(stock: Engine, pool: Engine, prompt: Mapping[str, Any]) -> int:
    """Compare answers to a prompt with one image and videos: unpruned as stock vLLM's, pruned to a sixth.

    Returns:
        Tokens of the unpruned prompt.
    """
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=5)

    def ask(engine: Engine, crop: Mapping[str, Any] | None) -> Any:
        settings = {} if crop is None else {"mm_processor_kwargs": {"crop": crop}}
        (output,) = engine.llm.generate([{**prompt, **settings}], sampling, use_tqdm=False)
        logprobs = [sorted((t, e.logprob) for t, e in step.items()) for step in output.outputs[0].logprobs]
        return len(output.prompt_token_ids), logprobs

    (image,) = prompt["multi_modal_data"]["image"]
    full = pool.processor.geometry.grid(*image.size).num_tokens
    num_tokens, answered = ask(stock, None)
    assert ask(pool, {"method": "off"}) == (num_tokens, answered)
    num_pruned, answered_pruned = ask(pool, {"regions": [REGION]})
    assert num_pruned == num_tokens - full + round(full / 6)
    assert answered_pruned != answered
    return int(num_tokens)
