# SPDX-License-Identifier: Apache-2.0
"""Runs the demo; `--serve` leaves the server running instead."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_crop.benchmarking.machine import provenance
from vllm_crop.benchmarking.server import Server, ServerError, serve
from vllm_crop.commands.preview import assumed_llava
from vllm_crop.demo.client import QUESTION, Answer, Client, question_about
from vllm_crop.geometry import Box, Region
from vllm_crop.image_plan import plan_image
from vllm_crop.params import ImageRequest
from vllm_crop.preview import draw_preview
from vllm_crop.sample_picture import draw_sample_picture

BUILD = Path("build/demo")
PICTURE_SIZE = (672, 672)
# The sign: 6x6 of the model's 24x24 tokens, as much as 2x2 cells of CROP's 8x8 grid.
SIGN = Region((Box(13 / 24, 4 / 24, 19 / 24, 10 / 24),))
PRUNING_RATE = 5 / 6
SERVER_OPTIONS = (
    *("--plugin", "crop", "--crop-config", json.dumps({"pruning_rate": PRUNING_RATE})),
    *("--dtype", "float32", "--max-model-len", "2048", "--block-size", "32", "--enforce-eager"),
)
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
REPEATS = 7
ANSWER_TOKENS = 12

console = Console()


def main(
    leave_running: Annotated[
        bool, typer.Option("--serve", help="Leave the server running until Ctrl-C.")
    ] = False,
) -> None:
    """Serve a small random LLaVA with `vllm serve --plugin crop` and show what a region saves."""
    model = make_model()
    log_path = BUILD / "server.log"
    try:
        with serve(str(model), *SERVER_OPTIONS, log_path=log_path, env=SERVER_ENVIRONMENT) as server:
            if leave_running:
                wait_for_interrupt(server)
            else:
                rows = measure(Client(server.base_url, server.model))
    except ServerError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    if not leave_running:
        report(rows)


def make_model() -> Path:
    """The demo checkpoint under build/, made once."""
    folder = BUILD / "model"
    if not (folder / "model.safetensors").exists():
        with console.status("making a small LLaVA with random weights"):
            from vllm_crop.dummy_llava import DEMO, make_checkpoint

            make_checkpoint(folder, DEMO)
    return folder


def crop_fields() -> list[dict[str, Any]]:
    """The body fields compared, the stock path first."""
    regions = [SIGN.as_lists()]
    return [
        {"method": "off"},
        {"regions": regions, "pruning_rate": PRUNING_RATE},
        {"regions": regions, "pruning_rate": 0.889},
    ]


def measure(client: Client) -> list[dict[str, Any]]:
    """Ask everything once to warm up, then several times in turn, each time about a picture of its own."""
    fields = crop_fields()
    picture = draw_sample_picture(size=PICTURE_SIZE)
    answers = [client.ask(picture, field, ANSWER_TOKENS, look_at_kv=True) for field in fields]
    times: list[list[float]] = [[] for _ in fields]
    for repeat in track(range(REPEATS), "asking", console=console, transient=True):
        for index, field in enumerate(fields):
            # Another pixel each time: no cache may answer.
            fresh = marked(picture, repeat * len(fields) + index)
            times[index].append(client.ask(fresh, field).ttft_ms)
    return [
        row(field, answer, measured) for field, answer, measured in zip(fields, answers, times, strict=True)
    ]


def marked(picture: Image.Image, number: int) -> Image.Image:
    """The picture with one pixel that tells it from all others."""
    copy = picture.copy()
    copy.putpixel((0, 0), (number % 256, 1 + number // 256, 7))
    return copy


def row(field: dict[str, Any], answer: Answer, ttft_ms: list[float]) -> dict[str, Any]:
    """One line of summary.json."""
    return {
        "method": field.get("method", "plc"),
        "regions": field.get("regions"),
        "pruning_rate": field.get("pruning_rate"),
        "image_tokens": answer.facts["tokens_after_plc"],
        "prompt_tokens": answer.prompt_tokens,
        "kv_blocks": answer.kv_blocks,
        "ttft_ms_median": round(median(ttft_ms), 1),
        "ttft_ms_range": [round(min(ttft_ms), 1), round(max(ttft_ms), 1)],
        "answer": answer.text,
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, write summary.json and preview.png."""
    full = rows[0]
    table = Table(title=f"One picture, one question: {QUESTION!r}", box=SIMPLE_HEAD)
    for heading in ("method", "pruned", "image tokens", "prompt tokens", "KV blocks", "TTFT ms"):
        table.add_column(heading, justify="right")
    for line in rows:
        low, high = line["ttft_ms_range"]
        fewer = full["image_tokens"] / line["image_tokens"]
        table.add_row(
            line["method"],
            "-" if line is full else f"{line['pruning_rate']:.1%}",
            str(line["image_tokens"]) if line is full else f"{line['image_tokens']} ({fewer:.3g}x fewer)",
            str(line["prompt_tokens"]),
            str(line["kv_blocks"]),
            f"{line['ttft_ms_median']:.0f} ({low:.0f}-{high:.0f})",
        )
    console.print(table)
    console.print(
        f"TTFT, time to first token: median (range) of {REPEATS} pictures each, asked in turn, on this "
        "machine. The weights are random, so the answers mean nothing; see summary.json."
    )
    summary = {
        "rows": rows,
        "server_options": list(SERVER_OPTIONS),
        "ttft_repeats": REPEATS,
        "provenance": provenance(),
    }
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    geometry = assumed_llava()
    planned = plan_image(geometry, *PICTURE_SIZE, ImageRequest(SIGN, PRUNING_RATE, "pool"))
    picture = draw_sample_picture(size=PICTURE_SIZE)
    drawing = draw_preview(picture, geometry.view(*PICTURE_SIZE), planned.tokens, SIGN)
    drawing.save(BUILD / "preview.png")
    console.print(f"Wrote {BUILD / 'summary.json'} and {BUILD / 'preview.png'}")


def wait_for_interrupt(server: Server) -> None:
    """Tell how to ask, then wait for Ctrl-C."""
    request = BUILD / "request.json"
    request.write_text(json.dumps(example_request(server.model)))
    url = f"{server.base_url}/v1/chat/completions"
    console.print(f"Serving at {server.base_url} (log: {server.log_path}). Ask it, for example:\n")
    console.print(f"  curl -i {url} -H 'Content-Type: application/json' -d @{request}\n", soft_wrap=True)
    console.print("Ctrl-C stops it.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("stopping")


def example_request(model: str) -> dict[str, Any]:
    """A chat completion about the demo's picture, with the region of the sign."""
    return {
        "model": model,
        "messages": question_about(draw_sample_picture(size=PICTURE_SIZE)),
        "max_tokens": ANSWER_TOKENS,
        "crop": {"regions": [SIGN.as_lists()]},
    }


if __name__ == "__main__":
    typer.run(main)
