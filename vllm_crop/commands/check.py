# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop check`: would pruning start here, and with which settings."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vllm_crop.measuring.endpoint import Finding


def check(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint to judge too: a directory, or its name on the Hub.")
    ] = None,
    crop_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Settings to judge too, as of vllm serve --crop-config, a calibration in them included; "
            "with --model also whether they suit the checkpoint. What other flags decide (--max-model-len, "
            "--enable-lora) is judged by the server.",
        ),
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Only list the settings of --crop-config, with their defaults.")
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask a running endpoint, such as http://localhost:8000/v1, whatever is in front of it, what "
            "of pruning arrives at a client; --model is then the name to ask for, the key OPENAI_API_KEY.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that each question to --base-url may take, in all.")
    ] = 20.0,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also list what of vLLM this builds on and what it changes there, which flags are refused, "
            "and all settings.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check this installation, or a running endpoint, and list settings and limits.

    Exits with 1 if pruning would not start, or does not reach a client.

    \b
    Does pruning work through my router?
      vllm-crop check --base-url http://router:8000/v1
    Which settings are there, and which flags of vLLM are refused beside them?
      vllm-crop check --settings
      vllm-crop check --all
    Does a calibration fit a checkpoint? Do a compressor's weights?
      vllm-crop check --model M \\
        --crop-config '{"localizer": {"kind": "attention", "calibration": "file.json"}}'
      vllm-crop check --model M \\
        --crop-config '{"compression": "resampler", "resampler": {"weights": "folder"}}'
    """
    from vllm_crop.compat.diagnosis import describe_config, describe_installation
    from vllm_crop.config import CropConfig

    if settings:
        described = describe_config(CropConfig)
        if as_json:
            typer.echo(json.dumps(described, indent=2))
        else:
            _print_settings(Console(highlight=False), described)
        return
    if base_url is not None:
        if crop_config is not None:
            raise typer.BadParameter(
                "is not judged with --base-url, which asks what a server does: leave one of them out",
                param_hint="--crop-config",
            )
        raise typer.Exit(_check_endpoint(base_url, model, timeout, as_json))
    report = describe_installation(model, crop_config)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(Console(highlight=False), report, everything)
    raise typer.Exit(0 if report["ok"] else 1)


def _check_endpoint(base_url: str, model: str | None, timeout: float, as_json: bool) -> int:
    """Print what was found, one thing after the other; the exit status."""
    console = Console(highlight=False)
    findings: list[Finding] = []
    for finding in _found(base_url, model, timeout):
        findings.append(finding)
        if not as_json:
            mark = _MARKS[finding.state]
            console.print(f"{mark} {finding.what:28}{escape(finding.detail)}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([finding.to_json() for finding in findings], indent=2))
    return int(any(finding.state == "fails" for finding in findings))


def _found(base_url: str, model: str | None, timeout: float) -> "Iterator[Finding]":
    """What was found; why nothing more can be is the last."""
    from vllm_crop.measuring.bounded_client import EndpointError
    from vllm_crop.measuring.endpoint import Finding, probe

    try:
        yield from probe(base_url, model, timeout_s=timeout)
    except EndpointError as error:
        yield Finding("endpoint", "fails", str(error))
    except ImportError:
        raise typer.BadParameter(
            "needs the package openai: pip install 'vllm-crop[openai]'", param_hint="--base-url"
        ) from None


_MARKS = {
    "works": "[green]  works[/green]",
    "fails": "[red]  fails[/red]",
    "absent": "[yellow] absent[/yellow]",
}


def _print_report(console: Console, report: Mapping[str, Any], everything: bool) -> None:
    from vllm_crop.compat.diagnosis import ENDPOINT_GROUP, ENTRY_POINT_GROUP

    _print_rows(console, "Versions", report["versions"].items())
    console.print(f"  vllm-crop supports vllm{report['supported_vllm']}")
    _print_rows(console, f"Entry points of {ENTRY_POINT_GROUP}", report["entry_points"].items())
    _print_rows(console, f"Entry points of {ENDPOINT_GROUP}", report["endpoint_plugins"].items())
    selected = report["vllm_plugins"]
    unset = "VLLM_PLUGINS is not set: vLLM adds no endpoint plugin"
    console.print(f"  {unset if selected is None else f'VLLM_PLUGINS={escape(selected)}'}")
    if everything:
        _print_lists(console, report)
    else:
        _print_problems_of_points(console, report["upstream_points"])
        console.print("  --all lists them, what is changed there, refused flags and all settings")
    if report["model"]:
        _print_model(console, report["model"])
    if report["calibration"]:
        _print_rows(console, "Calibration", report["calibration"].items())
    if report["compressor"]:
        _print_rows(console, "Compressor", report["compressor"].items())
    _print_verdict(console, report["problems"], report["warnings"], _command(report))


def _print_lists(console: Console, report: Mapping[str, Any]) -> None:
    _print_upstream_points(console, report["upstream_points"])
    changes = [(one["kind"], one["when"], one["where"], one["why"]) for one in report["changes"]]
    _print_rows(console, "What is different in vLLM: kind, when, where, why", changes)
    _print_heading(console, "Supported architectures")
    for architecture in report["architectures"]:
        console.print(f"  {architecture}")
    _print_rows(console, "Flags that are refused with --plugin crop", report["refused"].items())
    _print_rows(console, "Refused with eviction too", report["refused_with_eviction"].items())
    attention = report["refused_with_attention"]
    _print_rows(console, "Refused with localizer kind 'attention' too", attention.items())
    _print_settings(console, report["config"])


def _print_problems_of_points(console: Console, points: Sequence[Mapping[str, Any]]) -> None:
    _print_heading(console, "Functions of vLLM this builds on")
    if not points:
        console.print("  not checked, see the problems below")
        return
    problems = [point for point in points if point["problem"]]
    console.print(f"  {len(points) - len(problems)} of {len(points)} are as they should be")
    for point in problems:
        console.print(f"  [red]problem[/red]  {escape(point['name'])}", soft_wrap=True)


def _print_settings(console: Console, described: Sequence[Mapping[str, Any]]) -> None:
    rows = [(one["key"], json.dumps(one["default"]), one["description"]) for one in described]
    _print_rows(console, "Settings of --crop-config, with defaults", rows)


def _print_heading(console: Console, title: str) -> None:
    console.print(f"\n[bold]{escape(title)}[/bold]")


def _print_rows(console: Console, title: str, rows: Iterable[Sequence[str]]) -> None:
    _print_heading(console, title)
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row("", *(escape(cell) for cell in row))
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def _print_upstream_points(console: Console, points: Sequence[Mapping[str, Any]]) -> None:
    _print_heading(console, "Functions of vLLM this builds on")
    if not points:
        console.print("  not checked, see the problems below")
    for point in points:
        mark = "[red]problem[/red]" if point["problem"] else "[green]ok[/green]"
        console.print(f"  {mark}  {escape(point['name'])}", soft_wrap=True)
        console.print(f"      [dim]{escape(point['reason'])}[/dim]", soft_wrap=True)


def _print_model(console: Console, model: Mapping[str, Any]) -> None:
    from vllm_crop.eviction.report import BLOCK_SIZE, TEXT_TOKENS

    _print_heading(console, model["name"])
    if not model["supported"]:
        console.print(f"  [red]not supported[/red]: {escape(model['reason'])}", soft_wrap=True)
        return
    width, height = model["image_size"]
    console.print(
        f"  [green]supported[/green]: {model['tokens_per_image']} tokens for an image of {width}x{height} "
        f"({model['layout']}), {model['num_layers']} decoder layers",
        soft_wrap=True,
    )
    if "budgets" in model:
        _print_budgets(console, model)
        return
    layers = ",".join(map(str, model["eviction_layers"]))
    console.print(
        f"  to begin with: eviction_layers [{layers}], which makes {model['kv_groups']} KV cache groups",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2))
    for title in ("pruning_rate", "method", "image tokens by stage", "KV of the prompt"):
        table.add_column(title)
    for saving in model["savings"]:
        tokens = ", ".join(map(str, saving["image_tokens"]))
        table.add_row(f"{saving['pruning_rate']}", saving["method"], tokens, f"{saving['kv']:.2f}x")
    console.print(table)
    console.print(
        f"  KV: of such an image with {TEXT_TOKENS} text tokens, in blocks of {BLOCK_SIZE}, on a server "
        "prepared for this eviction, against vLLM without the plugin",
        soft_wrap=True,
    )


def _print_budgets(console: Console, model: Mapping[str, Any]) -> None:
    console.print(f"  no regions: {model['why_no_regions']}. All of an image can be bounded:", soft_wrap=True)
    table = Table(box=None, padding=(0, 2))
    for title in ("max_tokens", "image tokens"):
        table.add_column(title)
    for budget in model["budgets"]:
        table.add_row(str(budget["max_tokens"]), str(budget["image_tokens"]))
    console.print(table)


def _command(report: Mapping[str, Any]) -> str:
    """How what was judged is served."""
    model = report["model"]["name"] if report["model"] else "MODEL"
    settings = report["crop_config"]
    crop = ["--crop-config", settings] if settings else []
    return shlex.join(["vllm", "serve", model, "--plugin", "crop", *crop, *report["serve_options"]])


def _print_verdict(console: Console, problems: Sequence[str], warnings: Sequence[str], command: str) -> None:
    for warning in warnings:
        console.print(f"\n[yellow]Not tested:[/yellow] {escape(warning)}", soft_wrap=True)
    if not problems:
        console.print(f"\n[bold green]Pruning can start:[/bold green] {escape(command)}", soft_wrap=True)
        return
    console.print("\n[bold red]Pruning would not start:[/bold red]")
    for problem in problems:
        console.print(f"  - {escape(problem)}", soft_wrap=True)
