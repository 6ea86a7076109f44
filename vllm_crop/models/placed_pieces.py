# SPDX-License-Identifier: Apache-2.0
"""Where pieces of a picture are, for a vision tower of the Qwen-VL line: the place they have in all of it.

The towers number the patches of what they are given from the top left, and Qwen3-VL's and GLM-4V's also
stretch a table of learned embeddings over it. A piece keeps the numbers and the part of the table that it has
in the whole picture at its scale. Everything else of a tower's metadata (sequences, windows) is that of
separate images: pieces are cut where windows begin.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_crop.planning.foveation import Piece

COS, SIN, EMBEDDINGS = "rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds"
WINDOW_INDEX = "window_index"


def metadata_of_pieces(tower: Any, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The tower's `encoder_metadata` for a batch of pieces.

    Args:
        tower: a vision tower with `prepare_encoder_metadata` (vllm/model_executor/models/qwen2_vl.py,
            qwen2_5_vl.py, qwen3_vl.py, glm4_1v.py).
    """
    merge = tower.spatial_merge_size
    grids = [[1, piece.rows * merge, piece.cols * merge] for piece in pieces]
    metadata: dict[str, Any] = dict(tower.prepare_encoder_metadata(grids))
    if all(piece.is_whole for piece in pieces):
        return metadata
    places = [_places(piece, merge) for piece in pieces]  # [patches, 2] each
    at = torch.cat(places)
    # What is whole stays as the tower has it, to the bit, whatever is beside it.
    moved = torch.cat(
        [torch.full((len(of),), not piece.is_whole) for piece, of in zip(pieces, places, strict=True)]
    )
    if WINDOW_INDEX in metadata:
        # The tower runs windows one after another: whole tokens in another order.
        order = metadata[WINDOW_INDEX].to(at.device)
        at, moved = (one.unflatten(0, (-1, merge**2))[order].flatten(0, 1) for one in (at, moved))
    longest = max(max(piece.scale.rows, piece.scale.cols) for piece in pieces) * merge
    for name, table in zip((COS, SIN), tower.rotary_pos_emb.get_cos_sin(longest), strict=True):
        rows = metadata[name].clone()  # the tower may keep its own for the next picture of this size
        rows[moved.to(rows.device)] = table[at[moved].to(table.device)].flatten(1).to(rows)
        metadata[name] = rows
    if EMBEDDINGS in metadata:
        stock = metadata[EMBEDDINGS].split([len(of) for of in places])
        metadata[EMBEDDINGS] = torch.cat(
            [
                own if piece.is_whole else _learned(tower, piece, of).to(own)
                for own, piece, of in zip(stock, pieces, places, strict=True)
            ]
        )
    return metadata


def _places(piece: Piece, merge: int) -> torch.Tensor:
    """Row and column of each patch in the whole picture, token by token, `[patches, 2]`."""
    row0, row1, col0, col1 = (side * merge for side in piece.window)
    rows, cols = torch.meshgrid(torch.arange(row0, row1), torch.arange(col0, col1), indexing="ij")
    places = torch.stack([rows, cols], dim=-1)
    return places.unflatten(0, (-1, merge)).unflatten(2, (-1, merge)).transpose(1, 2).reshape(-1, 2)


def _learned(tower: Any, piece: Piece, places: torch.Tensor) -> torch.Tensor:
    """The tower's learned embeddings where a piece is, `[patches, hidden]`."""
    if not hasattr(tower, "embeddings"):
        return _stretched(tower, piece, places)
    # GLM-4V's module adds them to what it is given, of any patches of a picture of some size.
    nothing = torch.zeros(len(places), tower.hidden_size, device=tower.device, dtype=tower.dtype)
    merge = tower.spatial_merge_size
    shape = [1, piece.scale.rows * merge, piece.scale.cols * merge]
    rows: torch.Tensor = tower.embeddings(nothing, [len(places)], [shape], *places.unbind(-1))
    return rows


def _stretched(tower: Any, piece: Piece, places: torch.Tensor) -> torch.Tensor:
    """Stretch the tower's table of embeddings over the picture, `[patches, hidden]` where a piece is.

    The corners of the picture have those of the table; between them four neighbours are weighed.
    """
    table, side, merge = tower.pos_embed.weight, tower.num_grid_per_side, tower.spatial_merge_size
    cells = table.view(side, side, -1)
    ends = torch.tensor([piece.scale.rows * merge - 1, piece.scale.cols * merge - 1]).clamp(min=1)
    at = places.to(torch.float32) * (side - 1) / ends
    low = at.floor().long().clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    share = (at - low).to(table.device)
    (y0, x0), (y1, x1) = low.to(table.device).unbind(-1), high.to(table.device).unbind(-1)
    down, right = share[:, :1], share[:, 1:]
    top = cells[y0, x0] * (1 - right) + cells[y0, x1] * right
    bottom = cells[y1, x0] * (1 - right) + cells[y1, x1] * right
    return top * (1 - down) + bottom * down
