# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop plan`: the TokenPlan a server would use for one image, without a server."""

import json
import re
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_crop.commands.region_options import (
    DEFAULTS,
    CellsOption,
    CompressionOption,
    PruningRateOption,
    RegionOption,
    geometry_of,
    parse_regions,
    request_for_image,
    why_whole,
)
from vllm_crop.geometry import Region
from vllm_crop.image_plan import plan_image
from vllm_crop.plan import TokenPlan
from vllm_crop.plan_summary import PlanSummary

Cell = tuple[str, str]

# Character and colour of a cell; the character is what is left where the terminal shows no colours.
_REGION_CELL, _KEPT_CELL, _LEFT_OUT_CELL = ("#", "magenta"), ("o", "bright_white"), (".", "bright_black")
_PATCH_CELLS = (("+", "blue"), ("-", "cyan"), ("=", "green"), ("~", "yellow"), (":", "red"))


def plan(
    model: Annotated[str, typer.Option(help="Directory of a checkpoint, or its name on the Hub.")],
    image_size: Annotated[str, typer.Option(metavar="WxH", help="Size of the image in pixels, as sent.")],
    region: RegionOption = None,
    cells: CellsOption = None,
    pruning_rate: PruningRateOption = DEFAULTS.pruning_rate,
    compression: CompressionOption = DEFAULTS.compression,
    method: Annotated[str, typer.Option(metavar="plc|off", help="What is done to the image.")] = "plc",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show which visual tokens of an image are kept, pooled or left out: what the server would do."""
    width, height = _parse_size(image_size)
    asked = parse_regions(region, cells)
    request = request_for_image(asked, pruning_rate, compression, method)
    geometry = geometry_of(model)
    planned = plan_image(geometry, width, height, request)
    if as_json:
        typer.echo(json.dumps(planned.tokens.to_json(geometry.num_layers)))
        return
    console = Console(highlight=False)
    console.print(_summary(planned.tokens, planned.region, pruning_rate, geometry.num_layers))
    if planned.region is None:
        console.print(f"Served whole: {why_whole(request, asked, method)}.")
    else:
        console.print(_drawing(planned.tokens, planned.region))


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text.strip())
    if match is None:
        raise typer.BadParameter(
            f"width and height in pixels needed, such as 640x480, got {text!r}", param_hint="--image-size"
        )
    return int(match[1]), int(match[2])


def _summary(token_plan: TokenPlan, region: Region | None, asked: float, num_layers: int) -> Table:
    counts = PlanSummary.of(token_plan, region)
    grid = token_plan.grid
    table = Table.grid(padding=(0, 2))
    table.add_row("visual tokens", f"{counts.tokens} -> {counts.embeddings}  ({counts.change})")
    table.add_row("grid", f"{grid.rows} x {grid.cols}, {num_layers} decoder layers")
    if counts.region_tokens is not None:
        table.add_row("region", f"{counts.region_kept} of {counts.region_tokens} tokens kept")
        table.add_row(
            "context",
            f"{counts.pooled} embeddings pooled from {counts.pooled_tokens} tokens, "
            f"{counts.others_kept} tokens kept, {counts.left_out} left out",
        )
    table.add_row("pruning rate", f"{asked:g} asked, {token_plan.pruning_rate_got(num_layers):.4f} got")
    return table


def _drawing(token_plan: TokenPlan, region: Region) -> Text:
    """The grid, two characters a token, and what they mean."""
    grid = token_plan.grid
    inside = set(grid.tokens_in(region))
    patches = _patch_cells(token_plan)
    drawing, shown = Text(), set()
    for token, embedding in enumerate(token_plan.assignment()):
        kept_cell = _REGION_CELL if token in inside else _KEPT_CELL
        cell = patches.get(embedding, kept_cell) if embedding >= 0 else _LEFT_OUT_CELL
        shown.add(cell)
        _append(drawing, cell)
        if (token + 1) % grid.cols == 0:
            drawing.append("\n")
    meanings = {_REGION_CELL: "region, kept", _KEPT_CELL: "kept", _LEFT_OUT_CELL: "left out"}
    for cell, meaning in meanings.items():
        if cell in shown:
            _append(drawing, cell)
            drawing.append(f" {meaning}  ")
    for cell in _PATCH_CELLS:
        if cell in shown:
            _append(drawing, cell)
    return drawing.append(" pooled, one embedding per patch" if patches else "")


def _append(drawing: Text, cell: Cell) -> None:
    character, colour = cell
    drawing.append(character * 2, style=f"{colour} on {colour}")


def _patch_cells(token_plan: TokenPlan) -> dict[int, Cell]:
    """A cell for each pooled embedding, another one than its neighbours have where that is possible."""
    grid, assigned = token_plan.grid, token_plan.assignment()
    chosen: dict[int, Cell] = {}
    for index, embedding in enumerate(token_plan.embeddings):
        if len(embedding.tokens) == 1:
            continue
        taken = set()
        for token in embedding.tokens:
            row, col = divmod(token, grid.cols)
            for near_row, near_col in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
                if 0 <= near_row < grid.rows and 0 <= near_col < grid.cols:
                    taken.add(chosen.get(assigned[near_row * grid.cols + near_col]))
        free = [cell for cell in _PATCH_CELLS if cell not in taken]
        chosen[index] = free[0] if free else _PATCH_CELLS[index % len(_PATCH_CELLS)]
    return chosen
