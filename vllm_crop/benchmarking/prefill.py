# SPDX-License-Identifier: Apache-2.0
"""How much less prefill work and KV memory a pruned prompt takes, on paper."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_crop.benchmarking.runs import Mode


@dataclass(frozen=True)
class ModelShape:
    """The language model: L layers of width d with an MLP of width m."""

    layers: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}, MLP {self.intermediate}"


def read_shape(model: str) -> ModelShape:
    """The shape of a checkpoint's language model (this imports transformers)."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model).get_text_config()
    return ModelShape(text.num_hidden_layers, text.hidden_size, text.intermediate_size)


def prefill_flops(shape: ModelShape, tokens_per_layer: Iterable[float]) -> float:
    """Multiply-adds of one prefill, text included: 4nd^2 + 2n^2d + 3ndm for a layer that sees n tokens.

    That is the four projections of attention, attention itself, and a gated MLP. Leaves out the vision
    tower, which runs on the whole image either way, and counts grouped-query attention as full.
    """
    d, m = shape.hidden, shape.intermediate
    return sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in tokens_per_layer)


@dataclass(frozen=True)
class Ideal:
    """What one mode takes of what the unpruned prompt takes, at best.

    Attributes:
        image_tokens_per_layer: embeddings of the image that each decoder layer runs with.
        prefill_flops: in the language model.
        kv_tokens: of the prompt, without rounding up to blocks.
    """

    image_tokens_per_layer: tuple[int, ...]
    prefill_flops: float
    kv_tokens: float


def ideals(
    shape: ModelShape, image_tokens: Mapping[Mode, Sequence[int]], text_tokens: float
) -> dict[Mode, Ideal]:
    """Of each mode against "off".

    Args:
        shape: the language model.
        image_tokens: per mode the image's embeddings by layer.
        text_tokens: the rest of the prompt.
    """
    totals = {mode: [count + text_tokens for count in counts] for mode, counts in image_tokens.items()}
    full = totals["off"]
    return {
        mode: Ideal(
            tuple(image_tokens[mode]),
            prefill_flops(shape, tokens) / prefill_flops(shape, full),
            fmean(tokens) / fmean(full),
        )
        for mode, tokens in totals.items()
    }
