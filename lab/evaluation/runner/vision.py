# SPDX-License-Identifier: Apache-2.0
"""What the vision tower makes of an image, and what its last attention over the whole image says."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb_vision,
    get_vision_window_index,
)

from lab.evaluation.runner.method import Seen
from vllm_crop.planning.geometry import TokenGrid


def see(visual: Any, image_processor: Any, image: Image.Image, attention: bool = True) -> Seen:
    """Run the tower; `attention` also works out what it attends to (empty tensors without)."""
    inputs = image_processor(images=[image], return_tensors="pt")
    merge, patches = visual.spatial_merge_size, inputs["image_grid_thw"]
    grid = TokenGrid(int(patches[0, 1]) // merge, int(patches[0, 2]) // merge)
    caught: dict[str, Any] = {}

    def catch(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])

    block = visual.blocks[visual.fullatt_block_indexes[-1]]
    hook = block.attn.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        features = visual(inputs["pixel_values"], grid_thw=patches).pooler_output
    finally:
        hook.remove()
    if not attention:
        return Seen(features, grid, torch.empty(0), torch.empty(0))
    keys, received = _attention(block.attn, caught["hidden_states"], caught["position_embeddings"])
    order, _ = get_vision_window_index(patches, merge, visual.window_size, visual.patch_size)
    raster = torch.argsort(order)
    by_token = keys.view(grid.num_tokens, merge**2, -1).mean(1), received.view(-1, merge**2).mean(1)
    return Seen(features, grid, by_token[0][raster], by_token[1][raster])


def _attention(attention: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys before rotation `[patches, width]`, and the attention each patch receives `[patches]`."""
    count = len(hidden)
    query, key, _ = attention.qkv(hidden).view(count, 3, attention.num_heads, -1).unbind(1)
    turned_query, turned_key = apply_rotary_pos_emb_vision(query, key, *rotation)
    scores = turned_query.transpose(0, 1) @ turned_key.permute(1, 2, 0) * attention.scaling
    return key.flatten(1), scores.softmax(dim=-1).mean(dim=(0, 1))
