# SPDX-License-Identifier: Apache-2.0
"""What the demo prints and writes."""

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lab.demo.rows import WRONG, Asked, Measured, rows, shares
from lab.demo.setting import BUILD, EVICTION_LAYERS, MODEL, PRUNING_RATE, SERVER_OPTIONS
from lab.tinyvqa.checkpoint import LAYERS
from lab.tinyvqa.questions import FAMILIES
from vllm_crop.config import CropConfig
from vllm_crop.drawing.preview import draw_preview
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.measuring.provenance import provenance
from vllm_crop.planner import Planner
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.request import ImageRequest

_SHOWN = ("off", "plc", WRONG)  # what fits a terminal; summary.json has all


def report(measured: Measured, console: Console) -> None:
    """Print the tables, write summary.json and preview.png."""
    first = [one for one in measured.asked if one.scene == measured.asked[0].scene]
    console.print(answers_table(first))
    console.print(shares_table(measured))
    console.print(costs_table(rows(measured)))
    console.print(
        f"Pruning rate {PRUNING_RATE}; ilp evicts from layer {EVICTION_LAYERS[0]} of {LAYERS} on. The model "
        "found every region itself, in a small view of the image; its time is part of the time to first "
        "token (median and range over the local questions, a new picture each time, on this machine), and "
        "in the row of wrong regions they were sent on purpose. Search and count need "
        "the whole image: there the localizer says so and nothing is pruned."
    )
    summary = {
        "rows": rows(measured),
        "right": shares(measured),
        "answers": [answer_json(one) for one in measured.asked],
        "server_options": list(SERVER_OPTIONS),
        "provenance": provenance(),
    }
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_preview(first[0])
    console.print(f"Wrote {BUILD / 'summary.json'} and {BUILD / 'preview.png'}")


def answers_table(asked: Sequence[Asked]) -> Table:
    """What was answered about one scene; wrong answers in red."""
    shown = Table(title="One scene, found by the model itself", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("question")
    for heading in ("truth", *_SHOWN):
        shown.add_column(heading, overflow="fold")
    for one in asked:
        cells = [_marked(one, column) if column in one.answers else "" for column in _SHOWN]
        shown.add_row(one.question.text, one.question.answer, *cells)
    return shown


def shares_table(measured: Measured) -> Table:
    """Right answers by family."""
    table = shares(measured)
    shown = Table(title="Right answers", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("")
    for family in FAMILIES:
        shown.add_column(family, justify="right")
    for column, families in table.items():
        shown.add_row(
            column, *("/".join(map(str, families[each])) if each in families else "" for each in FAMILIES)
        )
    return shown


def costs_table(lines: Sequence[dict[str, Any]]) -> Table:
    """A line per method, with what it saves against the first one."""
    full = lines[0]
    shown = Table(
        title="What a question about a part of the image costs", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown.add_column("method", no_wrap=True)
    for heading in (
        "image\ntokens",
        "a layer,\naverage",
        "prompt\ntokens",
        "KV MiB",
        "TTFT ms",
        "region\nms",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        low, high = line["ttft_ms_range"]
        wait = line["localizer_ms_median"]
        shown.add_row(
            line["method"],
            f"{line['image_tokens']:.0f}",
            f"{line['tokens_avg']:.0f}",
            f"{line['prompt_tokens']:.0f}",
            f"{line['kv_mib']:.1f}" + ("" if line is full else _share(line, full, "kv_mib")),
            f"{line['ttft_ms_median']:.0f} ({low:.0f}-{high:.0f})"
            + ("" if line is full else _share(line, full, "ttft_ms_median")),
            "" if wait is None else f"{wait:.0f}",
        )
    return shown


def answer_json(one: Asked) -> dict[str, Any]:
    """A question with all its answers, for scripts."""
    return {
        "family": one.question.family,
        "question": one.question.text,
        "truth": one.question.answer,
        "scene": one.scene.scene.seed,
        "answers": {column: answer.text for column, answer in one.answers.items()},
        "found": one.answers["plc"].facts["images"][0],
    }


def save_preview(one: Asked) -> None:
    """Draw what "plc" leaves of the first picture, with the region the model found."""
    found = one.answers["plc"].facts["images"][0]["region"]
    region = Region(tuple(Box(*box) for box in found)) if found else Region.whole()
    geometry, picture = load_geometry(str(MODEL)), one.scene.picture()
    request = ImageRequest(region, PRUNING_RATE, "pool", "plc", rim=CropConfig().rim)
    planned = Planner(CropConfig(), geometry).plan_image(request, *picture.size)
    view = geometry.view(*picture.size)
    draw_preview(picture, view, planned.tokens, region, geometry.num_layers).save(BUILD / "preview.png")


def _marked(one: Asked, column: str) -> str:
    text = one.answers[column].text
    return f"[green]{text}[/green]" if one.right(column) else f"[red]{text} ✗[/red]"


def _share(line: dict[str, Any], full: dict[str, Any], key: str) -> str:
    return f" {line[key] / full[key]:.2f}x"
