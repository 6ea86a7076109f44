# SPDX-License-Identifier: Apache-2.0
"""What the vision tower makes of an image, and what its attention over the whole image says."""

from typing import Any
from zlib import crc32

import numpy as np
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
    caught: dict[int, dict[str, Any]] = {}

    def catch(index: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[index] = {**kwargs, "hidden_states": args[0] if args else kwargs["hidden_states"]}

        return visual.blocks[index].attn.register_forward_pre_hook(hook, with_kwargs=True)

    first, last = visual.fullatt_block_indexes[0], visual.fullatt_block_indexes[-1]
    hooks = [catch(index) for index in {first, last}]
    try:
        made = visual(inputs["pixel_values"], grid_thw=patches)
    finally:
        for hook in hooks:
            hook.remove()
    features, none, fingerprint = made.pooler_output, torch.empty(0), crc32(image.tobytes())
    if not attention:
        return Seen(features, grid, none, none, none, none, none, none, fingerprint)
    found = {
        index: _attention(visual.blocks[index].attn, one["hidden_states"], one["position_embeddings"])
        for index, one in caught.items()
    }
    order, _ = get_vision_window_index(patches, merge, visual.window_size, visual.patch_size)
    raster = torch.argsort(order)

    def by_token(part: Tensor) -> Tensor:
        return part.view(grid.num_tokens, merge**2, -1)[raster]

    keys, paid = found[last]
    early = by_token(found[first][1].mean(0)).mean((1, 2))
    tower = by_token(made.last_hidden_state).flatten(1)
    received = by_token(paid.mean(0)).mean((1, 2))
    # First who attends, then to whom, both in raster order.
    looks_at = by_token(by_token(paid).mean(1).T).sum(1).T
    side = visual.patch_size * merge
    entropy = grey_entropy(image, grid, side)
    return Seen(
        features, grid, by_token(keys).mean(1), received, early, looks_at, tower, entropy, fingerprint
    )


def grey_entropy(image: Image.Image, grid: TokenGrid, side: int) -> torch.Tensor:
    """`[tokens]` bits of the grey levels of each square of `side` pixels, as the tower sees them."""
    grey = np.asarray(image.convert("L").resize((grid.cols * side, grid.rows * side)))
    squares = grey.reshape(grid.rows, side, grid.cols, side).swapaxes(1, 2).reshape(grid.num_tokens, -1)
    found = []
    for square in squares:
        shares = np.bincount(square, minlength=256) / square.size
        found.append(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    return torch.tensor(found, dtype=torch.float32)


def _attention(attention: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys before rotation `[patches, width]`, and the attention `[patches, patches]` each pays to each."""
    count = len(hidden)
    query, key, _ = attention.qkv(hidden).view(count, 3, attention.num_heads, -1).unbind(1)
    turned_query, turned_key = apply_rotary_pos_emb_vision(query, key, *rotation)
    scores = turned_query.transpose(0, 1) @ turned_key.permute(1, 2, 0) * attention.scaling
    return key.flatten(1), scores.softmax(dim=-1).mean(dim=0)
