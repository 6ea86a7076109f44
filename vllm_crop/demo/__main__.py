# SPDX-License-Identifier: Apache-2.0
"""Runs the demo; `--serve` leaves the server running instead."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_crop.benchmarking.server import Server, ServerError, serve
from vllm_crop.demo.client import Client, question_about
from vllm_crop.demo.report import report
from vllm_crop.demo.rows import measure
from vllm_crop.demo.setting import (
    ANSWER_TOKENS,
    BUILD,
    PICTURE_SIZE,
    SERVER_ENVIRONMENT,
    SERVER_OPTIONS,
    SIGN,
)
from vllm_crop.sample_picture import draw_sample_picture

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
                rows = measure(Client(server.base_url, server.model), console)
    except ServerError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    if not leave_running:
        report(rows, model, console)


def make_model() -> Path:
    """The demo checkpoint under build/, made once."""
    folder = BUILD / "model"
    if not (folder / "model.safetensors").exists():
        with console.status("making a small LLaVA with random weights"):
            from vllm_crop.dummy_llava import DEMO, make_checkpoint

            make_checkpoint(folder, DEMO)
    return folder


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
