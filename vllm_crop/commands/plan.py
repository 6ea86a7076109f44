# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop plan`: the TokenPlan a server would use for one image, without a server."""

import json
import re
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_crop.commands.region_options import (
    DEFAULTS,
    CellsOption,
    CompressionOption,
    EvictionLayersOption,
    HaloOption,
    MaxTokensOption,
    MethodOption,
    PruningRateOption,
    RegionOption,
    RimOption,
    RimSizeOption,
    UnseenTilesOption,
    ViewTokensOption,
    geometry_of,
    parse_regions,
    plan_for_image,
    request_for_image,
    why_whole,
)
from vllm_crop.config import FoveationConfig
from vllm_crop.planner import ImagePlan
from vllm_crop.planning.foveation import describe_pieces
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import NEVER, TokenPlan
from vllm_crop.planning.summary import PlanSummary

Cell = tuple[str, str]

# Character and colour of a cell; the character is what is left where the terminal shows no colours.
_REGION_CELL, _KEPT_CELL, _LEFT_OUT_CELL = ("#", "magenta"), ("o", "bright_white"), (".", "bright_black")
_EVICTED_CELLS = ("1", "blue_violet"), ("2", "slate_blue1"), ("3", "medium_purple1"), ("4", "plum1")
_GROUP_CELLS = (("+", "blue"), ("-", "cyan"), ("=", "green"), ("~", "yellow"), (":", "red"))


def plan(
    model: Annotated[str, typer.Option(help="Directory of a checkpoint, or its name on the Hub.")],
    image_size: Annotated[str, typer.Option(metavar="WxH", help="Size of the image in pixels, as sent.")],
    region: RegionOption = None,
    cells: CellsOption = None,
    pruning_rate: PruningRateOption = None,
    max_tokens: MaxTokensOption = None,
    compression: CompressionOption = DEFAULTS.compression,
    rim: RimOption = DEFAULTS.rim,
    method: MethodOption = DEFAULTS.method,
    eviction_layers: EvictionLayersOption = None,
    view_tokens: ViewTokensOption = None,
    halo: HaloOption = DEFAULTS.foveation.halo,
    rim_size: RimSizeOption = DEFAULTS.foveation.rim_size,
    unseen_tiles: UnseenTilesOption = DEFAULTS.foveation.unseen_tiles,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show which visual tokens of an image are kept, pooled, evicted or left out by a server."""
    width, height = _parse_size(image_size)
    asked = parse_regions(region, cells)
    request = request_for_image(asked, pruning_rate, compression, method, eviction_layers, rim, max_tokens)
    geometry = geometry_of(model)
    foveation = FoveationConfig(
        view_tokens=view_tokens, halo=halo, rim_size=rim_size, unseen_tiles=unseen_tiles
    )
    planned = plan_for_image(geometry, width, height, request, foveation)
    if as_json:
        typer.echo(json.dumps(planned.to_json(geometry.num_layers)))
        return
    console = Console(highlight=False)
    asked_for = f"{request.pruning_rate:g}" if max_tokens is None else f"at most {max_tokens} tokens"
    console.print(_summary(planned, asked_for, geometry.num_layers))
    if not planned.prunes and planned.region is None:
        console.print(f"Served whole: {why_whole(request, asked)}.")
    else:
        longest = max(part.row_length for part in planned.tokens.grid.parts)
        console.print(_drawing(planned.tokens, planned.region, 2 if 2 * longest <= console.width else 1))


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text.strip())
    if match is None:
        raise typer.BadParameter(
            f"width and height in pixels needed, such as 640x480, got {text!r}", param_hint="--image-size"
        )
    return int(match[1]), int(match[2])


def _summary(planned: ImagePlan, asked: str, num_layers: int) -> Table:
    token_plan = planned.tokens
    counts = PlanSummary.of(token_plan, planned.region, num_layers)
    table = Table.grid(padding=(0, 2))
    table.add_row("visual tokens", f"{counts.tokens} -> {counts.after}  ({counts.change})")
    table.add_row("grid", f"{token_plan.grid.describe()}, {num_layers} decoder layers")
    if counts.region_tokens is not None:
        table.add_row("region", f"{counts.region_kept} of {counts.region_tokens} tokens kept")
    if counts.region_tokens is not None or planned.prunes:
        table.add_row(
            "context",
            f"{counts.pooled} embeddings pooled from {counts.pooled_tokens} tokens, "
            f"{counts.others_kept} tokens kept, {counts.left_out} left out",
        )
        if counts.evicted:
            stages = [f"{count} from layer {layer} on" for layer, count in counts.evicted]
            table.add_row("evicted", ", ".join(stages))
            table.add_row("embeddings", counts.describe_layers())
    if planned.pieces:
        table.add_row("vision tower", f"{planned.tower_tokens} tokens: {describe_pieces(planned.pieces)}")
    table.add_row("pruning rate", f"{asked} asked, {token_plan.pruning_rate_got(num_layers):.4f} got")
    return table


def _drawing(token_plan: TokenPlan, region: Region | None, width: int) -> Text:
    """The grids, `width` characters a token, newlines at the end of their rows, and what they mean."""
    nowhere = np.zeros(token_plan.grid.num_tokens, dtype=bool)
    inside = (nowhere if region is None else token_plan.grid.mask(region)).tolist()
    assigned = token_plan.assignment.tolist()
    stages, leaves_at = token_plan.eviction_layers, token_plan.evicted_from_layer.tolist()
    groups = _group_cells(token_plan)
    drawing, shown = Text(), set()

    def cell_of(token: int) -> Cell:
        index = assigned[token]
        if index < 0:
            return _LEFT_OUT_CELL
        if leaves_at[index] != NEVER:
            return _EVICTED_CELLS[stages.index(leaves_at[index])]
        return groups.get(index, _REGION_CELL if inside[token] else _KEPT_CELL)

    for part in token_plan.grid.parts:
        if part.first:
            drawing.append("\n")
        for row in range(part.grid.rows):
            for col in range(part.row_length):
                cell = cell_of(part.token(row, col))
                shown.add(cell)
                _append(drawing, cell, width)
            drawing.append("\n")
    meanings = {_REGION_CELL: "region, kept", _KEPT_CELL: "kept", _LEFT_OUT_CELL: "left out"}
    evicted = [f"evicted from layer {layer}" for layer in stages]
    meanings |= dict(zip(_EVICTED_CELLS, evicted, strict=False))
    for cell, meaning in meanings.items():
        if cell in shown:
            _append(drawing, cell)
            drawing.append(f" {meaning}  ")
    if not shown.isdisjoint(_GROUP_CELLS):
        for cell in _GROUP_CELLS:
            if cell in shown:
                _append(drawing, cell)
        drawing.append(" pooled, one embedding per group")
    return drawing


def _append(drawing: Text, cell: Cell, width: int = 2) -> None:
    character, colour = cell
    drawing.append(character * width, style=f"{colour} on {colour}")


def _group_cells(token_plan: TokenPlan) -> dict[int, Cell]:
    """A cell for each pooled embedding, another one than its neighbours have where that is possible."""
    group, row, col = (axis.tolist() for axis in token_plan.grid.places())
    held = dict(zip(zip(group, row, col, strict=True), token_plan.assignment.tolist(), strict=True))
    chosen: dict[int, Cell] = {}
    for index, tokens in enumerate(token_plan.members()):
        if len(tokens) == 1:
            continue
        taken = set()
        for token in tokens:
            for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                near = group[token], row[token] + down, col[token] + right
                taken.add(chosen.get(held.get(near, -1)))
        free = [cell for cell in _GROUP_CELLS if cell not in taken]
        chosen[index] = free[0] if free else _GROUP_CELLS[index % len(_GROUP_CELLS)]
    return chosen
