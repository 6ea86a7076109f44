# SPDX-License-Identifier: Apache-2.0
"""What the demo prints and writes."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_crop.benchmarking.machine import provenance
from vllm_crop.checkpoint_files import load_geometry
from vllm_crop.demo.client import QUESTION
from vllm_crop.demo.setting import (
    BUILD,
    EVICTION_LAYERS,
    PICTURE_SIZE,
    PRUNING_RATE,
    REPEATS,
    SERVER_OPTIONS,
    SIGN,
)
from vllm_crop.dummy_llava import DEMO
from vllm_crop.image_plan import plan_image
from vllm_crop.params import ImageRequest
from vllm_crop.preview import draw_preview
from vllm_crop.sample_picture import draw_sample_picture


def report(rows: list[dict[str, Any]], model: Path, console: Console) -> None:
    """Print the table, write summary.json and preview.png."""
    console.print(table(rows))
    console.print(
        f"Pruning rate {PRUNING_RATE}; ilp evicts from layer {EVICTION_LAYERS[0]} of {DEMO.layers} on. KV: "
        "what the request held while it was answered. TTFT, time to first token: median (range) of "
        f"{REPEATS} pictures each, asked in turn, on this machine. The weights are random, so the answers "
        "mean nothing; see summary.json."
    )
    summary = {
        "rows": rows,
        "server_options": list(SERVER_OPTIONS),
        "ttft_repeats": REPEATS,
        "provenance": provenance(),
    }
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_preview(model)
    console.print(f"Wrote {BUILD / 'summary.json'} and {BUILD / 'preview.png'}")


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per method, with what it saves against the first one."""
    full = rows[0]
    shown = Table(title=f"One picture, one question: {QUESTION!r}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for heading in (
        "image\ntokens",
        "a layer,\naverage",
        "prompt\ntokens",
        "KV MiB",
        "TTFT ms",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for line in rows:
        low, high = line["ttft_ms_range"]
        shown.add_row(
            line["method"],
            str(line["image_tokens"]),
            f"{line['tokens_avg']:.0f}",
            str(line["prompt_tokens"]),
            f"{line['kv_mib']:.1f}" + ("" if line is full else _share(line, full, "kv_mib")),
            f"{line['ttft_ms_median']:.0f} ({low:.0f}-{high:.0f})"
            + ("" if line is full else _share(line, full, "ttft_ms_median")),
        )
    return shown


def save_preview(model: Path) -> None:
    """Draw what "plc+ilp" leaves of the picture."""
    geometry = load_geometry(str(model))
    request = ImageRequest(SIGN, PRUNING_RATE, "pool", "plc+ilp", EVICTION_LAYERS)
    planned = plan_image(geometry, *PICTURE_SIZE, request)
    picture, view = draw_sample_picture(size=PICTURE_SIZE), geometry.view(*PICTURE_SIZE)
    draw_preview(picture, view, planned.tokens, SIGN, geometry.num_layers).save(BUILD / "preview.png")


def _share(line: dict[str, Any], full: dict[str, Any], key: str) -> str:
    return f" {line[key] / full[key]:.2f}x"
