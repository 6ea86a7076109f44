# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop bench`: throughput, time to first token and KV memory, pruned against stock vLLM."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from vllm_crop.commands.region_options import (
    DEFAULTS,
    CompressionOption,
    EvictionLayersOption,
    parse_regions,
    request_for_image,
)
from vllm_crop.config import DEFAULT_STAGES
from vllm_crop.errors import CropError
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import Region

if TYPE_CHECKING:
    from vllm_crop.benchmarking.options import Options

DEFAULT_REGION = ["0.375,0.375,0.625,0.625"]  # the four cells in the middle of the 8x8 grid
METHODS: tuple[Method, ...] = ("plc", "ilp", "plc+ilp")
DEFAULT_METHODS: list[str] = list(METHODS)
LOCALIZERS = ("attention", "engine", "remote")
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
    ] = DEFAULTS.pruning_rate,
    method: Annotated[
        list[str],
        typer.Option(metavar="|".join(METHODS), help="A way of pruning to measure; repeat it for several."),
    ] = DEFAULT_METHODS,
    eviction_layers: EvictionLayersOption = None,
    concurrency: Annotated[
        list[int], typer.Option(min=1, help="Requests in flight; repeat it for several.")
    ] = DEFAULT_CONCURRENCY,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Requests per run: mode, concurrency, repeat.")
    ] = 16,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each mode per concurrency, all modes in turn.")
    ] = 3,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens each request generates.")] = 8,
    image_side: Annotated[
        int, typer.Option(min=32, help="Pixels, of the square random images; more of them give more tokens.")
    ] = 336,
    dummy: Annotated[
        Literal["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_5"],
        typer.Option(
            help="Without --model: which family's dummy. Those of Qwen2.5-VL, LLaVA-NeXT and InternVL have "
            "vision towers of their real share of the work: --image-side 1792 has 4,096 tokens on the first, "
            "672 has 2,928 on the second, 896 has 1,280 on the third. Qwen3.5's, in bfloat16 on a CPU, has "
            "1,024 at 1024."
        ),
    ] = "llava",
    compression: CompressionOption = DEFAULTS.compression,
    resampler: Annotated[
        str | None,
        typer.Option(
            help="With --compression resampler: folder or Hub repository of the compressor. Left out: an "
            "untrained one, which takes as long."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed of the random images and questions.")] = 0,
    stock: Annotated[
        bool,
        typer.Option(help="Compare with a server without the plugin, beside the other one."),
    ] = True,
    localizer: Annotated[
        list[str],
        typer.Option(
            metavar="|".join(LOCALIZERS),
            help="Also measure requests without a region, for the first of the methods: the served model "
            "finds it (engine), or another server (remote); repeat it for both.",
        ),
    ] = [],  # noqa: B006
    localizer_config: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="More of the server's `localizer` settings, such as "
            """'{"base_url": "http://host:8000/v1", "model": "M"}' for remote, otherwise asked of the """
            "benchmark's own server.",
        ),
    ] = "{}",
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Measure what eviction costs a decode step instead, in a minute."),
    ] = False,
    where: Annotated[
        bool,
        typer.Option(
            "--where",
            help="Measure where the time to the first token goes instead, part by part: unpruned, with a "
            "client's region, with localizer kind 'attention'.",
        ),
    ] = False,
    planning: Annotated[
        bool,
        typer.Option("--planning", help="Measure what plans cost instead, in CPU time; needs no vLLM."),
    ] = False,
    api_cpu: Annotated[
        bool,
        typer.Option(
            "--api-cpu",
            help="Measure what the plugin adds to the API process instead, in CPU time per request; Linux.",
        ),
    ] = False,
    api_instructions: Annotated[
        bool,
        typer.Option(
            "--api-instructions",
            help="The same in instructions, which a busy machine does not change; needs valgrind, Linux.",
        ),
    ] = False,
    api_memory: Annotated[
        bool,
        typer.Option(
            "--api-memory",
            help="Measure instead what memory the API process takes for pictures of 20 megapixels; Linux.",
        ),
    ] = False,
    conversation: Annotated[
        bool,
        typer.Option(
            "--conversation",
            help="Measure instead what a conversation with a screenshot a turn costs, stock and with "
            "`history`: KV, prefix cache, time to first token. --repeats conversations.",
        ),
    ] = False,
    serve_args: Annotated[
        str, typer.Option(metavar="ARGS", help="More options for `vllm serve`, as one quoted string.")
    ] = "",
    result_file: Annotated[
        Path | None,
        typer.Option(
            help="Where the JSON goes; logs are written beside it. build/bench/result.json where left out, "
            "decode.json with --decode."
        ),
    ] = None,
) -> None:
    """Measure what pruning saves: requests/s, time to first token and KV memory, against stock vLLM.

    Starts two `vllm serve` on this machine, with `--plugin crop` and without, and loads them with vLLM's own
    `vllm bench serve`: a random image per request, never the same one twice. Runs of all modes take turns, so
    a machine that is busy with other things slows them alike. Takes about ten minutes on two CPU cores.

    \b
    A quick look, in three minutes:
      vllm-crop bench --concurrency 1 --repeats 1
    What does eviction cost while answers are generated?
      vllm-crop bench --decode
    Where does the time to the first token go?
      vllm-crop bench --where
    What does the vision tower spare that sees the region alone at full size?
      vllm-crop bench --where --dummy qwen2_5_vl --image-side 1792 --compression foveate --num-prompts 4
    What do learned queries cost?
      vllm-crop bench --where --compression resampler
    What does it cost the API process?
      vllm-crop bench --planning
      vllm-crop bench --api-cpu
      vllm-crop bench --api-instructions
      vllm-crop bench --api-memory
    Is it still faster if the server finds the region itself?
      vllm-crop bench --method plc --localizer engine --localizer remote
    Your own model; its speed needs no weights, but both servers must fit:
      vllm-crop bench --model Qwen/Qwen3-VL-8B-Instruct --image-side 1024 \\
        --serve-args "--load-format dummy" --concurrency 32 --num-prompts 128
    """
    console = Console(highlight=False)
    if planning:
        from vllm_crop.benchmarking.planning import measure_planning, planning_table

        console.print(planning_table(measure_planning()))
        return
    if find_spec("vllm") is None:
        typer.echo(
            "vllm-crop bench measures vLLM, which is not installed here: pip install 'vllm-crop[vllm]'",
            err=True,
        )
        raise typer.Exit(1)
    if api_cpu:
        from vllm_crop.benchmarking.api_cpu import api_cpu_table, measure_api_cpu

        with console.status("two servers start, and are asked in turn: about ten minutes"):
            for measured in measure_api_cpu():  # the largest pictures take most of it
                console.print(api_cpu_table(measured))
        return
    if api_instructions:
        from vllm_crop.benchmarking.api_instructions import (
            CountingError,
            api_instructions_table,
            measure_api_instructions,
        )

        try:
            with console.status("two servers start in valgrind, and are asked in turn: about 20 minutes"):
                for counted in measure_api_instructions():
                    console.print(api_instructions_table(counted))
        except CountingError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
        return
    if api_memory:
        from vllm_crop.benchmarking.api_memory import api_memory_table, measure_api_memory

        with console.status("three servers, one after another, get 20 pictures: about ten minutes"):
            console.print(api_memory_table(list(measure_api_memory())))
        return
    if conversation:
        from vllm_crop.benchmarking.conversation import conversation_table, measure_conversations

        with console.status("four servers start, and hold the same conversations: about ten minutes"):
            console.print(conversation_table(list(measure_conversations(repeats))))
        return
    if not where and num_prompts < max(concurrency):
        raise typer.BadParameter(
            f"{num_prompts} requests cannot keep {max(concurrency)} in flight", param_hint="--num-prompts"
        )
    if wrong := set(localizer).difference(LOCALIZERS):
        raise typer.BadParameter(f"{', '.join(sorted(wrong))}: not of {LOCALIZERS}", param_hint="--localizer")
    if wrong := set(method).difference(METHODS):
        raise typer.BadParameter(f"{', '.join(sorted(wrong))}: not of {METHODS}", param_hint="--method")
    if resampler is not None and compression != "resampler":
        raise typer.BadParameter("needs --compression resampler", param_hint="--resampler")
    settings = _parse_settings(localizer_config)
    _refuse_stray(settings, ["attention"] if where else localizer)
    # Late, as all of the benchmark: the other commands start without it.
    from vllm_crop.benchmarking.options import Options
    from vllm_crop.benchmarking.runs import LOCALIZED_MODES

    if eviction_layers is None and model is not None and not decode:
        eviction_layers = _first_layers(model)
    request = request_for_image(None, pruning_rate, DEFAULTS.compression, "ilp", eviction_layers)
    result_file = result_file or Path("build/bench") / ("decode.json" if decode else "result.json")
    options = Options(
        model=model,
        region=parse_regions(region, None) or Region.whole(),
        pruning_rate=pruning_rate,
        methods=tuple(one for one in METHODS if one in method),
        eviction_layers=request.eviction_layers,
        concurrencies=tuple(dict.fromkeys(concurrency)),
        num_prompts=num_prompts,
        repeats=repeats,
        output_len=output_len,
        image_side=image_side,
        dummy=dummy,
        compression=compression,
        resampler=resampler,
        seed=seed,
        stock=stock,
        serve_args=tuple(shlex.split(serve_args)),
        folder=result_file.parent,
        localizers=tuple(mode for mode in LOCALIZED_MODES if mode.split()[0] in localizer),
        localizer_config=settings,
    )
    try:
        if where:
            from vllm_crop.benchmarking.where import measure_where, where_table

            with console.status("asking, one question at a time"):
                outcome = measure_where(replace(options, localizers=("attention localizer",), stock=False))
            console.print(where_table(outcome))
            return
        (_run_decode if decode else _run_load)(options, result_file, console)
    except CropError as error:
        console.print(f"The benchmark failed: {error}", style="red", markup=False)
        console.print("Options for the server go into --serve-args; they win over the benchmark's own.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped, and the server with it.")
        raise typer.Exit(130) from None
    console.print(f"Every single run: {result_file}", markup=False)


def _first_layers(model: str) -> str:
    """The default, or the first layer that this model can evict at.

    Raises:
        typer.BadParameter: the checkpoint cannot be read or pruned.
    """
    from vllm_crop.families.checkpoint import load_geometry

    try:
        first = load_geometry(model).first_eviction_layer
    except CropError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return ",".join(str(max(layer, first)) for layer in DEFAULT_STAGES)


def _parse_settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}", param_hint="--localizer-config") from None
    if not isinstance(settings, dict):
        raise typer.BadParameter("a JSON object is needed", param_hint="--localizer-config")
    return settings


def _refuse_stray(settings: Mapping[str, Any], localizers: Sequence[str]) -> None:
    """Refuse settings that mean nothing to any localizer that is measured."""
    from vllm_crop.localizers.settings import Kind, suits

    kinds: dict[str, Kind] = {"attention": "attention", "engine": "engine", "remote": "openai"}
    for name in settings:
        if not any(suits(name, kinds[one]) for one in localizers):
            measured = ", ".join(localizers) or "none"
            raise typer.BadParameter(
                f"{name!r} means nothing to the localizers that are measured ({measured})",
                param_hint="--localizer-config",
            )


def _run_load(options: "Options", result_file: Path, console: Console) -> None:
    from vllm_crop.benchmarking.report import print_report, write_report
    from vllm_crop.benchmarking.session import run_benchmark
    from vllm_crop.measuring.provenance import provenance

    origin = provenance()
    outcome = run_benchmark(options, console)
    write_report(result_file, options, outcome, origin)
    print_report(console, options, outcome, origin)


def _run_decode(options: "Options", result_file: Path, console: Console) -> None:
    from vllm_crop.benchmarking.decode import measure_decode
    from vllm_crop.benchmarking.decode_report import decode_json, print_decode
    from vllm_crop.benchmarking.report import write_json
    from vllm_crop.measuring.provenance import provenance

    origin = provenance()
    outcome = measure_decode(options, console)
    write_json(result_file, decode_json(outcome, origin))
    print_decode(console, outcome)
