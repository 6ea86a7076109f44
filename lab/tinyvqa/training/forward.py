# SPDX-License-Identifier: Apache-2.0
"""The model's forward pass over images of one size with many questions each.

transformers would run the language model over the image once per question. Here the questions of an image
share it: each sees the image and itself, at the positions it would have alone. Same weights, same result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
    get_vision_position_ids,
    get_vision_window_index,
)

from lab.tinyvqa.checkpoint import MERGE, PATCH

PREFIX = 2  # tokens before the image: <|im_start|><|vision_start|>


def image_patches(images: Tensor) -> Tensor:
    """Patches as Qwen2VLImageProcessor orders them.

    Args:
        images: `[batch, height, width, 3]`, 0 to 255.

    Returns:
        `[batch, patches, 2 * 3 * PATCH * PATCH]`: the four patches of a visual token follow each other.
    """
    batch, height, width, _ = images.shape
    pixels = images.float().div(127.5).sub(1).permute(0, 3, 1, 2)
    rows, cols = height // (PATCH * MERGE), width // (PATCH * MERGE)
    pixels = pixels.reshape(batch, 3, rows, MERGE, PATCH, cols, MERGE, PATCH)
    patches = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, 3, 1, PATCH * PATCH)
    return patches.expand(-1, -1, -1, 2, -1).flatten(2)


def vision_features(
    visual: Any, patches: Tensor, rows: int, cols: int, steps: "LayerSteps | None" = None
) -> Tensor:
    """Embeddings `[batch, rows * cols, hidden]` of images of `rows` x `cols` tokens, in raster order.

    Args:
        steps: how a layer runs; as it is written here without it.
    """
    run = vision_layer if steps is None else steps.vision
    batch, count, _ = patches.shape
    grid = torch.tensor([[1, rows * MERGE, cols * MERGE]], device=patches.device)
    order, bounds = get_vision_window_index(grid, MERGE, visual.window_size, visual.patch_size)
    by_patch = (order[:, None] * MERGE**2 + torch.arange(MERGE**2, device=order.device)).flatten()
    # A convolution over one patch is a product; its gradient takes a tenth of the time so on a CPU.
    hidden = functional.linear(patches[:, by_patch], visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(hidden, get_vision_position_ids(grid, MERGE))
    cos, sin = cos[by_patch], sin[by_patch]
    lengths = (bounds[1:] - bounds[:-1]).unique_consecutive()
    for index, block in enumerate(visual.blocks):
        everywhere = index in visual.fullatt_block_indexes
        windows = None if everywhere else (bounds if len(lengths) > 1 else int(lengths[0]))
        hidden = run(block, hidden, cos, sin, windows)
    merged: Tensor = visual.merger(hidden.reshape(batch * count, -1)).view(batch, count // MERGE**2, -1)
    return merged[:, torch.argsort(order)]


def vision_layer(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, windows: Any) -> Tensor:
    """A layer of the vision tower.

    Args:
        windows: None, the size of all windows, or their bounds.
    """
    hidden = hidden + _vision_attention(block.attn, block.norm1(hidden), cos, sin, windows)
    after: Tensor = hidden + block.mlp(block.norm2(hidden))
    return after


def _vision_attention(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, windows: Any) -> Tensor:
    batch, count, width = hidden.shape
    qkv = attention.qkv(hidden).view(batch, count, 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    if isinstance(windows, int):
        query, key, value = (part.reshape(-1, windows, *part.shape[2:]) for part in (query, key, value))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if isinstance(windows, int):
        # Written out: of many small windows the fused kernel's gradient takes several times as long.
        scores = query / query.shape[-1] ** 0.5 @ key.transpose(2, 3)
        mixed = scores.softmax(-1).to(value.dtype) @ value
    else:
        mask = None
        if windows is not None:
            window = torch.bucketize(torch.arange(count, device=hidden.device), windows[1:], right=True)
            mask = window[:, None] == window
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, count, width))
    return projected


@dataclass(frozen=True)
class Layout:
    """Where tokens stand: for images of one size with questions of one length.

    Attributes:
        positions: `[3, batch or 1, tokens]`.
        image: tokens of the image, the prefix counted too.
    """

    positions: Tensor
    image: int


def make_layout(rows: int, cols: int, questions: int, length: int, device: torch.device) -> Layout:
    """For `questions` of `length` tokens each about an image of `rows` x `cols` tokens."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    grid = torch.stack([torch.zeros_like(row), row, col]).flatten(1) + PREFIX
    text = PREFIX + max(rows, cols) + torch.arange(length).repeat(questions)
    positions = torch.cat([torch.arange(PREFIX).expand(3, -1), grid, text.expand(3, -1)], dim=1)
    return Layout(positions[:, None].to(device), PREFIX + rows * cols)


def keep_tokens(layout: Layout, kept: Tensor) -> Layout:
    """The layout of what is left of images; `kept`: `[batch, left]` tokens, whose places stay theirs."""
    before, after = layout.positions[..., :PREFIX], layout.positions[..., layout.image :]
    image = layout.positions[..., PREFIX : layout.image]
    batch = len(kept)
    parts = [before.expand(-1, batch, -1), image[:, 0, kept], after.expand(-1, batch, -1)]
    return Layout(torch.cat(parts, dim=2), PREFIX + kept.shape[1])


@dataclass(frozen=True)
class Probes:
    """What to bring back from within the language model.

    Attributes:
        layers: the layers whose attention is asked for; states are taken before each of them.
        tokens: `[batch, questions]` index of the answering token within the question.
    """

    layers: tuple[int, ...]
    tokens: Tensor


@dataclass(frozen=True)
class States:
    """What the language model makes of questions.

    Attributes:
        last: `[batch, questions, length, hidden]`, after the last layer.
        looked: for each probed layer the log attention `[batch, heads, questions, PREFIX + rows * cols]` that
            the answering tokens pay to the prefix and the image's tokens.
        image: for each probed layer `[batch, rows * cols, hidden]`, the image's tokens before it.
        asking: for each probed layer `[batch, questions, hidden]`, the answering tokens before it.
    """

    last: Tensor
    looked: list[Tensor]
    image: list[Tensor]
    asking: list[Tensor]


def language_states(
    language: Any,
    prefix: Tensor,
    image: Tensor,
    questions: Tensor,
    layout: Layout,
    probes: Probes,
    steps: "LayerSteps | None" = None,
    gates: Tensor | None = None,
) -> States:
    """The language model over images and all questions about them.

    Args:
        prefix: `[PREFIX]` token ids.
        image: `[batch, rows * cols, hidden]` embeddings.
        questions: `[batch, questions, length]` token ids.
        steps: how a layer runs; as it is written here without it.
        gates: `[batch, questions, rows * cols]` added to the scores with which questions look at the image.
    """
    run = language_layer if steps is None else steps.language
    batch, count, length = questions.shape
    before = language.embed_tokens(prefix).expand(batch, -1, -1)
    hidden = torch.cat([before, image, language.embed_tokens(questions.flatten(1))], dim=1)
    cos, sin = language.rotary_emb(hidden, layout.positions)
    at = layout.image + torch.arange(count, device=hidden.device) * length + probes.tokens
    looked: list[Tensor] = []
    shown: list[Tensor] = []
    asking: list[Tensor] = []
    for index, layer in enumerate(language.layers):
        if index in probes.layers:
            query, key, _ = _projected(layer.self_attn, layer.input_layernorm(hidden), cos, sin)
            looked.append(_look(query, key, at, layout.image))
            shown.append(hidden[:, PREFIX : layout.image])
            asking.append(hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1])))
        hidden = run(layer, hidden, cos, sin, layout.image, length, gates)
    states = language.norm(hidden[:, layout.image :])
    return States(states.view(batch, count, length, -1), looked, shown, asking)


def language_layer(
    layer: Any,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    image: int,
    length: int,
    gates: Tensor | None = None,
) -> Tensor:
    """A layer of the language model.

    Args:
        image: tokens before the questions.
        length: of a question.
        gates: see `language_states`.
    """
    query, key, value = _projected(layer.self_attn, layer.input_layernorm(hidden), cos, sin)
    mixed = _attend(query, key, value, image, length, gates)
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    after: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return after


@dataclass(frozen=True)
class LayerSteps:
    """How layers run: functions that do what `vision_layer` and `language_layer` do."""

    vision: Callable[..., Tensor]
    language: Callable[..., Tensor]


def compiled_steps() -> LayerSteps:
    """Layers compiled for each shape they meet: half the time of a step on a CPU, seconds for a new shape."""
    torch._dynamo.config.recompile_limit = 64  # sizes of pictures, times kinds of layers
    return LayerSteps(
        torch.compile(vision_layer, dynamic=False), torch.compile(language_layer, dynamic=False)
    )


def _projected(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = hidden.shape
    query, key, value = (
        linear(hidden).view(batch, count, -1, attention.head_dim).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key, value


def _attend(
    query: Tensor, key: Tensor, value: Tensor, image: int, length: int, gates: Tensor | None = None
) -> Tensor:
    """The image sees itself, a question the image and itself; each token only what comes before it."""
    batch, heads, _, width = query.shape
    (looking, asking), (shown, asked), (seen, said) = (
        (part[:, :, :image], part[:, :, image:]) for part in (query, key, value)
    )
    mixed = functional.scaled_dot_product_attention(looking, shown, seen, is_causal=True)
    asking = asking / width**0.5
    own_query, own_key, own_value = (
        part.reshape(batch, heads, -1, length, width) for part in (asking, asked, said)
    )
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    of_image = (asking @ shown.transpose(2, 3)).view(batch, heads, -1, length, image)
    if gates is not None:
        of_image = of_image + functional.pad(gates, (PREFIX, 0))[:, None, :, None]
    of_own = (own_query @ own_key.transpose(3, 4)).masked_fill(later, float("-inf"))
    weights = torch.cat([of_image, of_own], dim=-1).softmax(-1).to(value.dtype)
    to_image = weights[..., :image].reshape(batch, heads, -1, image)
    answered = to_image @ seen + (weights[..., image:] @ own_value).flatten(2, 3)
    return torch.cat([mixed, answered], dim=2)


def _look(query: Tensor, key: Tensor, at: Tensor, image: int) -> Tensor:
    batch, heads, _, width = query.shape
    asking = query.gather(2, at[:, None, :, None].expand(batch, heads, -1, width))
    scores = asking @ key[:, :, :image].transpose(2, 3) / width**0.5
    return functional.log_softmax(scores, dim=-1)
