# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop bench`: throughput, time to first token and KV use, full against pruned."""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_crop.benchmarking.machine import provenance
from vllm_crop.benchmarking.report import print_report, write_report
from vllm_crop.benchmarking.session import Options, run_benchmark
from vllm_crop.commands.region_options import parse_regions
from vllm_crop.errors import CropError
from vllm_crop.geometry import Region

DEFAULT_REGION = ["0.375,0.375,0.625,0.625"]  # the four cells in the middle of the 8x8 grid
DEFAULT_CONCURRENCY = [1, 4, 8]


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of your own checkpoint, served with vLLM's defaults and --serve-args. "
            "Without it a dummy LLaVA is made."
        ),
    ] = None,
    region: Annotated[
        list[str],
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="The box pruned requests ask for, as fractions of the image; repeat it for several.",
        ),
    ] = DEFAULT_REGION,
    pruning_rate: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Fraction of the visual tokens that pruned requests remove."),
    ] = 5 / 6,
    concurrency: Annotated[
        list[int], typer.Option(min=1, help="Requests in flight; repeat it for several.")
    ] = DEFAULT_CONCURRENCY,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Requests per run: mode, concurrency, repeat.")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs per concurrency.")] = 3,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens each request generates.")] = 8,
    seed: Annotated[int, typer.Option(help="First seed of the random images and questions.")] = 0,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="Measure a server without the plugin too, after the others."),
    ] = False,
    serve_args: Annotated[
        str, typer.Option(metavar="ARGS", help="More options for `vllm serve`, as one quoted string.")
    ] = "",
    result_file: Annotated[
        Path, typer.Option(help="Where the JSON goes; logs are written beside it.")
    ] = Path("build/bench/result.json"),
) -> None:
    """Measure what pruning saves: requests/s, time to first token and KV blocks, full against pruned.

    Starts one `vllm serve --plugin crop` on this machine and loads it with vLLM's own `vllm bench serve`: a
    random image per request, never the same one twice. Full ("off") and pruned ("plc") runs take turns on
    that server, so a machine that is busy with other things slows both alike. Takes five to eight minutes on
    two CPU cores.

    \b
    A quick look, in two minutes:
      vllm-crop bench --concurrency 1 --repeats 1
    Is "off" as fast as vLLM without the plugin?
      vllm-crop bench --stock
    Your own model; its speed needs no weights:
      vllm-crop bench --model llava-hf/llava-1.5-7b-hf \\
        --serve-args "--load-format dummy" --concurrency 32 --num-prompts 128
    """
    if find_spec("vllm") is None:
        typer.echo(
            "vllm-crop bench measures vLLM, which is not installed here: pip install vllm==0.32.0", err=True
        )
        raise typer.Exit(1)
    if num_prompts < max(concurrency):
        raise typer.BadParameter(
            f"{num_prompts} requests cannot keep {max(concurrency)} in flight", param_hint="--num-prompts"
        )
    console = Console(highlight=False)
    options = Options(
        model=model,
        region=parse_regions(region, None) or Region.whole(),
        pruning_rate=pruning_rate,
        concurrencies=tuple(dict.fromkeys(concurrency)),
        num_prompts=num_prompts,
        repeats=repeats,
        output_len=output_len,
        seed=seed,
        stock=stock,
        serve_args=tuple(shlex.split(serve_args)),
        folder=result_file.parent,
    )
    origin = provenance()
    try:
        outcome = run_benchmark(options, console)
    except CropError as error:
        console.print(f"The benchmark failed: {error}", style="red", markup=False)
        console.print("Options for the server go into --serve-args; they win over the benchmark's own.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped, and the server with it.")
        raise typer.Exit(130) from None
    write_report(result_file, options, outcome, origin)
    print_report(console, options, outcome, origin)
    console.print(f"Every single run: {result_file}", markup=False)
