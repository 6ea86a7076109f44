# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process whose decode steps can be timed. Runs in a process of its own per engine."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_crop.benchmarking.options import IMAGE_SIDE

# One process for scheduler and model, so that a step can be timed from outside. The model is too small for a
# second thread, and threads that wait for each other would hide the rest.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KV_BYTES = 512 << 20
QUESTION = "\nWhat does the sign say?"  # the dummy's tokenizer makes a token of every byte

_engines: list[Any] = []  # the one of this process


def start(model: Path, is_cpu: bool, max_running: int, crop_config: Mapping[str, Any] | None) -> None:
    """Load the model; without `crop_config` the plugin is not asked for."""
    from vllm import LLM

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": 32} if is_cpu else {}
    if crop_config is not None:
        options["additional_config"] = {"crop": crop_config}
    engine = LLM(
        model=str(model),
        load_format="dummy",
        max_model_len=2048,
        max_num_seqs=max_running,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        **options,
    )
    _engines.append(engine)


def time_steps(prompts: list[dict[str, Any]], output_len: int) -> list[float]:
    """Seconds of every engine step in which all of these requests generate a token."""
    from vllm import SamplingParams

    (llm,) = _engines
    sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    llm.enqueue(prompts, sampling, use_tqdm=False)
    engine = llm.llm_engine
    times = []
    while engine.has_unfinished_requests():
        running = engine.engine_core.engine_core.scheduler.running
        decoding = len(running) == len(prompts) and all(request.num_output_tokens for request in running)
        begin = time.perf_counter()
        engine.step()
        if decoding:
            times.append(time.perf_counter() - begin)
    return times


def image_prompt(crop: Mapping[str, Any]) -> dict[str, Any]:
    """A question about some picture."""
    return {
        "prompt": f"<image>{QUESTION}",
        "multi_modal_data": {"image": Image.effect_noise((IMAGE_SIDE, IMAGE_SIDE), 64).convert("RGB")},
        "mm_processor_kwargs": {"crop": dict(crop)},
    }


def text_prompt(num_tokens: int) -> dict[str, Any]:
    """As many tokens of no meaning."""
    return {"prompt_token_ids": [100] * num_tokens}
