# SPDX-License-Identifier: Apache-2.0
"""How much less prefill work a shorter prompt is, on paper."""

from dataclasses import dataclass


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


def prefill_flops(shape: ModelShape, num_tokens: float) -> float:
    """Multiply-adds of one prefill of n tokens, text included: L (4nd^2 + 2n^2d + 3ndm).

    Per layer the four projections of attention, attention itself, and a gated MLP. Leaves out the vision
    tower, which runs on the whole image either way, and counts grouped-query attention as full.
    """
    n, d, m = num_tokens, shape.hidden, shape.intermediate
    return shape.layers * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m)
