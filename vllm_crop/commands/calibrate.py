# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop calibrate`: which layers of a model look at what a question is about."""

import asyncio
import json
import shlex
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from vllm_crop.config import describe_errors
from vllm_crop.errors import CropError

if TYPE_CHECKING:
    from vllm_crop.calibrating.data import Pictured
    from vllm_crop.calibrating.outcome import Outcome, Plan
    from vllm_crop.localizers.calibration import Calibration
    from vllm_crop.localizers.dialects import DialectName
    from vllm_crop.localizers.settings import LocalizerConfig

DIALECTS: "tuple[DialectName, ...]" = ("cells", "pixels", "thousandths")
VIEWS = [64, 144, 300]


def calibrate(
    model: Annotated[str, typer.Option(help="The checkpoint: a folder, or its name on the Hub.")],
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Your own pictures: a JSONL file of questions, or a folder of pictures with --question. "
            "Left out: scenes are generated.",
        ),
    ] = None,
    question: Annotated[
        list[str],
        typer.Option(help="What to ask about every picture of a folder; repeat it: two or more are needed."),
    ] = [],  # noqa: B006
    pictures: Annotated[
        int | None, typer.Option(min=2, help="Pictures at most. 40 scenes, or all of the data, if left out.")
    ] = None,
    questions: Annotated[
        int,
        typer.Option(min=1, help="Questions about places of a generated scene; one more is about all of it."),
    ] = 4,
    side: Annotated[
        int, typer.Option(min=256, max=8192, help="Pixels of a generated scene's longer side.")
    ] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated scenes.")] = 0,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help='The layers to look into, such as "8-27" or "3,7". All with full attention if left out.',
        ),
    ] = None,
    view_tokens: Annotated[
        list[int],
        typer.Option(min=4, help="Also try the chosen layers with a view of so many tokens; repeat it."),
    ] = VIEWS,
    engine: Annotated[
        list[str],
        typer.Option(
            metavar="|".join(DIALECTS),
            help="Also let the model say where it is (localizer kind 'engine'), in this dialect; repeat it.",
        ),
    ] = [],  # noqa: B006
    engine_prompt: Annotated[
        str | None, typer.Option(help="What it is asked then, with {question}. The dialect's if left out.")
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=1,
            help="How much of what is needed pruned images shall show in the mean: sets whole_below.",
        ),
    ] = 0.8,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Also fit a weight for each layer to the boxes, and serve that: needs ten questions "
            "with boxes in the deciding half, better a hundred.",
        ),
    ] = False,
    localizer_config: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="The server's other `localizer` settings that places depend on, kept in the file: "
            "thumbnail_tokens, prompt, window, max_windows, further_window, chat_template_kwargs.",
        ),
    ] = "{}",
    serve_args: Annotated[
        str,
        typer.Option(metavar="ARGS", help="Options of `vllm serve` for the engine, as one quoted string."),
    ] = "",
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="The file that is written; a PNG of the same name beside it.")
    ] = Path("build/calibrate/calibration.json"),
) -> None:
    """Learn on your own machine which layers of a model look at what a question is about.

    Needs no labels: layers that look elsewhere for another question are taken. Scenes are generated, street
    signs, price labels, forms, lists and clocks whose letters a thumbnail does not show; they come with
    boxes, so that hits, coverage and a threshold for the confidence are counted too. Half of the pictures
    decide, the other half judge. 40 scenes are about 200 short requests for each layer.

    \b
    A line of your own data; boxes (fractions of the picture) are optional, [] if all of it is needed:
      {"image": "photos/1.jpg", "question": "What does the sign say?", "boxes": [[0.5, 0.1, 0.8, 0.4]]}
    \b
    Generated scenes, then a server with what was learned:
      vllm-crop calibrate --model Qwen/Qwen3-VL-2B-Instruct --out qwen3.json
      vllm serve Qwen/Qwen3-VL-2B-Instruct --plugin crop \\
        --crop-config '{"localizer": {"kind": "attention", "calibration": "qwen3.json"}}'
    Your own pictures, and against what the model says itself:
      vllm-crop calibrate --model M --data questions.jsonl --engine thousandths --engine cells
    Weights fitted to the boxes of the scenes:
      vllm-crop calibrate --model M --fit
    A folder, asked the same twice; a model that needs room:
      vllm-crop calibrate --model M --data photos --question "What is written?" --question "Who is there?" \\
        --serve-args "--max-model-len 8192 --gpu-memory-utilization 0.8"
    """
    missing = {"vllm": "vllm-crop[vllm]", "matplotlib": "vllm-crop[calibrate]"}
    for package, extra in missing.items():
        if find_spec(package) is None:
            typer.echo(f"vllm-crop calibrate needs {package}: pip install '{extra}'", err=True)
            raise typer.Exit(1)
    if wrong := set(engine).difference(DIALECTS):
        raise typer.BadParameter(f"{', '.join(sorted(wrong))}: not of {DIALECTS}", param_hint="--engine")
    if engine_prompt is not None and "{question}" not in engine_prompt:
        raise typer.BadParameter("must contain {question}", param_hint="--engine-prompt")
    settings = _parse_settings(localizer_config)
    console = Console(highlight=False)
    # Late, as all of the calibration: the other commands start without it.
    from vllm_crop.calibrating.data import generated, halves, read_pictures
    from vllm_crop.calibrating.fitting import FEWEST
    from vllm_crop.calibrating.outcome import FEWEST_JUDGED, Plan
    from vllm_crop.calibrating.picture import draw_outcome
    from vllm_crop.calibrating.report import print_outcome, write_calibration
    from vllm_crop.families.checkpoint import load_geometry, load_model_config
    from vllm_crop.families.text_layers import full_attention_layers

    try:
        num_layers = load_geometry(model).num_layers
        looking = full_attention_layers(load_model_config(model), num_layers)
        watched = _parse_layers(layers, num_layers) or looking
        if not watched:
            raise CropError(
                f"no layer of {model} has full attention, which maps are made of: localizer kind 'attention' "
                "cannot be used with it, kind 'engine' can"
            )
        if data is None:
            if question:
                raise typer.BadParameter("belongs to --data with a folder", param_hint="--question")
            chosen = generated(pictures or 40, questions, side, seed)
        else:
            chosen = read_pictures(data, question, pictures)
        deciding = [one for picture, decides in halves(chosen) if decides for one in picture.questions]
        if fit and (boxes := sum(one.is_local for one in deciding)) < FEWEST:
            raise CropError(
                f"--fit needs {FEWEST} questions with boxes in the deciding half (every other picture), "
                f"there are {boxes}: write more boxes, use more --pictures, or leave --fit out"
            )
        config = _localizer(settings, watched)
        by_default = config.model_copy(update={"layers": None}).layers_of(num_layers, looking)
        plan = Plan(
            layers=tuple(watched),
            uncalibrated=tuple(by_default) if set(by_default) <= set(watched) else (),
            views=tuple(view_tokens),
            dialects=tuple(one for one in DIALECTS if one in engine),
            prompt=engine_prompt,
            wanted=coverage,
            fit=fit,
        )
        about = {"data": str(data)} if data is not None else {"data": "generated", "seed": seed, "side": side}
        outcome, calibration = asyncio.run(
            _measure(model, config, settings, shlex.split(serve_args), chosen, plan, about, console)
        )
    except CropError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.")
        raise typer.Exit(130) from None
    picture = out.with_suffix(".png")
    draw_outcome(outcome, picture)
    print_outcome(console, outcome)
    if outcome.too_few or outcome.beats_chance() is False:
        why = (
            f"{len(outcome.rows[outcome.served].hits)} places that were judged are too few to tell anything: "
            f"ask for more (--pictures, --questions), at least {FEWEST_JUDGED} are needed."
            if outcome.too_few
            else f"{outcome.served} do not hit more often than random places do. The model may not "
            "understand such pictures (try your own with --data), the view may be too small "
            "(thumbnail_tokens in --localizer-config), or there were too few questions to tell."
        )
        console.print(f"No file was written: {why}", style="red", markup=False)
        console.print(f"The picture: {picture}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    write_calibration(out, calibration)
    for what, path in (("The picture", picture), ("What was learned", out)):
        console.print(f"{what}: {path}", markup=False, soft_wrap=True)
    crop = json.dumps({"localizer": {"kind": "attention", "calibration": str(out)}})
    console.print(
        f"Serve with it: vllm serve {model} --plugin crop --crop-config '{crop}'",
        markup=False,
        soft_wrap=True,
    )


async def _measure(
    model: str,
    config: "LocalizerConfig",
    settings: dict[str, Any],
    serve_args: list[str],
    pictures: "list[Pictured]",
    plan: "Plan",
    about: dict[str, Any],
    console: Console,
) -> "tuple[Outcome, Calibration]":
    from vllm_crop.calibrating import run
    from vllm_crop.calibrating.looking import looking_model
    from vllm_crop.calibrating.report import make_calibration
    from vllm_crop.measuring.provenance import describe_machine, provenance

    origin = {**provenance(), **asdict(describe_machine()), **about}
    console.print(f"Starting {model} ...", markup=False)
    async with looking_model(model, config, serve_args) as looking:
        outcome = await run.calibrate(looking, pictures, plan, console)
        return outcome, make_calibration(outcome, settings, model, looking.model, origin)


def _parse_layers(text: str | None, num_layers: int) -> list[int]:
    """Such as "3,8-10"; empty where none are named."""
    found: set[int] = set()
    for part in () if text is None else text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or not (last or first).strip().isdecimal():
            raise typer.BadParameter(f"{part!r}: a layer or a range such as 8-27", param_hint="--layers")
        found.update(range(int(first), int(last or first) + 1))
    if found and max(found) >= num_layers:
        raise typer.BadParameter(
            f"the model's decoder layers are 0 to {num_layers - 1}", param_hint="--layers"
        )
    return sorted(found)


def _parse_settings(text: str) -> dict[str, Any]:
    from vllm_crop.localizers.calibration import SETTINGS

    kept = [name for name in SETTINGS if name not in ("layers", "weights", "whole_below")]
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}", param_hint="--localizer-config") from None
    if not isinstance(settings, dict) or set(settings).difference(kept):
        raise typer.BadParameter(
            f"a JSON object with some of {', '.join(kept)}", param_hint="--localizer-config"
        )
    return settings


def _localizer(settings: dict[str, Any], layers: list[int]) -> "LocalizerConfig":
    from vllm_crop.localizers.settings import LocalizerConfig

    try:
        return LocalizerConfig.model_validate({"kind": "attention", "layers": layers, **settings})
    except ValidationError as error:
        said = describe_errors(error, "localizer", LocalizerConfig)
        raise typer.BadParameter(said, param_hint="--localizer-config") from None
