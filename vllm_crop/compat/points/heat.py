# SPDX-License-Identifier: Apache-2.0
"""What localizer kind 'attention' builds on."""

from vllm_crop.compat.points.model_state import MODEL_STATE_POINTS
from vllm_crop.compat.points.point import UpstreamPoint

HEAT_POINTS = (
    UpstreamPoint(
        "vllm.model_executor.layers.attention.attention",
        "unified_attention_with_output",
        ("query", "key", "value", "output", "layer_name"),
        "calls a layer's attention outside compiled code, where queries and keys are seen",
    ),
    UpstreamPoint(
        "vllm.v1.attention.backend",
        "AttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "is wrapped in the layers that are watched",
    ),
    UpstreamPoint(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor.from_new_request",
        ("tokenizer", "request"),
        "brings back the log-probabilities of the ids that a request names, which carry the map",
    ),
    *MODEL_STATE_POINTS,
)
