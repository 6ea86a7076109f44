# SPDX-License-Identifier: Apache-2.0
"""What the V1 model runner's part of eviction and of heat maps builds on, for CPUs without Triton."""

from vllm_crop.compat.points.point import UpstreamPoint

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"


def _v1_runner(method: str, parameters: str, reason: str, given: tuple[str, ...] = ()) -> UpstreamPoint:
    return UpstreamPoint(_V1_RUNNER, f"GPUModelRunner.{method}", tuple(parameters.split()), reason, given)


CPU_RUNNER_POINTS = (
    UpstreamPoint(
        "vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",), "makes the model runner ours"
    ),
    UpstreamPoint(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner.load_model",
        ("self",),
        "tells the model whose runner it has",
        passes_on=True,
    ),
    UpstreamPoint(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner._zero_block_ids",
        ("self", "block_ids"),
        "clears the blocks of later stages where states share their memory",
        passes_on=True,
    ),
    _v1_runner("_update_states", "self scheduler_output", "notices requests that come and go"),
    _v1_runner(
        "_build_attention_metadata",
        "self num_tokens num_reqs max_query_len",
        "builds attention metadata of later layers",
        ("num_scheduled_tokens", "slot_mappings"),
    ),
    _v1_runner(
        "_model_forward",
        "self input_ids positions intermediate_tensors inputs_embeds",
        "hands the rows to drop and to watch to the model",
    ),
    _v1_runner("_sample", "self logits spec_decode_metadata", "reads maps as top log-probabilities"),
)
