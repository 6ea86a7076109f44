# SPDX-License-Identifier: Apache-2.0
"""Runs the demo; `--serve` leaves the server running instead."""

import json
import os
import shlex
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from lab.demo.client import Client
from lab.demo.report import report
from lab.demo.rows import measure
from lab.demo.setting import BUILD, MODEL, SERVER_ENVIRONMENT, SERVER_OPTIONS, plugins_with_page
from lab.evaluation.questions import make_test_set
from vllm_crop.client import question_about
from vllm_crop.measuring.server import Server, ServerError, serve

console = Console()


def main(
    leave_running: Annotated[
        bool, typer.Option("--serve", help="Leave the server running until Ctrl-C.")
    ] = False,
) -> None:
    """Serve tinyvqa with `vllm serve --plugin crop`, ask about a few scenes and show what regions save."""
    if not (MODEL / "model.safetensors").exists():
        console.print(f"[red]There is no {MODEL}: run this in the root of a checkout.[/red]")
        raise typer.Exit(1)
    log_path, env = BUILD / "server.log", dict(SERVER_ENVIRONMENT)
    if leave_running:
        env["VLLM_PLUGINS"] = plugins_with_page(os.environ.get("VLLM_PLUGINS"))
    try:
        with serve(str(MODEL), *SERVER_OPTIONS, log_path=log_path, env=env) as server:
            if leave_running:
                wait_for_interrupt(server, env)
                return
            measured = measure(Client(server.base_url, server.model), console)
    except ServerError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    report(measured, console)


def wait_for_interrupt(server: Server, env: Mapping[str, str]) -> None:
    """Tell how to ask, then wait for Ctrl-C."""
    request, scene = BUILD / "request.json", make_test_set(2)[0]
    request.write_text(json.dumps(example_request(server.model)))
    scene.picture().save(BUILD / "scene.png")
    url = f"{server.base_url}/v1/chat/completions"
    console.print(f"Serving at {server.base_url} (log: {server.log_path}).")
    console.print(f"The playground is at {server.base_url}/plugins/crop/", soft_wrap=True)
    started = shlex.join([*(f"{name}={value}" for name, value in env.items()), *server.command])
    console.print(f"Started with:\n\n  {started}\n", soft_wrap=True, markup=False)
    console.print("Ask it there, or for example with:\n")
    console.print(f"  curl -i {url} -H 'Content-Type: application/json' -d @{request}\n", soft_wrap=True)
    console.print(
        f"asks {scene.questions[0].text!r} about {BUILD / 'scene.png'}. It knows these kinds of questions:"
    )
    for question in scene.questions:
        console.print(f"  {question.text}  ({question.answer})")
    console.print("Ctrl-C stops it.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("stopping")


def example_request(model: str) -> dict[str, Any]:
    """A chat completion about the first scene; the server finds the region."""
    scene = make_test_set(2)[0]
    return {
        "model": model,
        "messages": question_about(scene.picture(), scene.questions[0].text),
        "max_tokens": 5,
        "temperature": 0,
    }


if __name__ == "__main__":
    typer.run(main)
