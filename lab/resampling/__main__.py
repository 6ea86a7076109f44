# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.resampling`: trains a compressor for compression "resampler"."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console

from lab.resampling.card import describe
from lab.resampling.items import TrainingDataError, read_items, scene_items
from lab.resampling.lessons import Course, Recipe
from vllm_crop.compression.files import read_card
from vllm_crop.compression.settings import ResamplerCard, ResamplerShape
from vllm_crop.errors import CropError
from vllm_crop.families.model_shape import feature_size
from vllm_crop.measuring.provenance import provenance

app = typer.Typer(add_completion=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the weights, the log and the state.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint to train for: a folder, or a name on the Hub.")
    ] = "lab/checkpoints/tinyvqa",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions to train on, JSONL: `image` (a path beside the file), `question`, and if known "
            "`answer` and `boxes`. Left out: generated scenes, which only tinyvqa knows."
        ),
    ] = None,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="answers: learn to have the right answer said. match: learn to have the model think what it "
            "thinks unpruned, which needs no answers."
        ),
    ] = "answers",
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    width: Annotated[
        int | None, typer.Option(help="Of queries, keys and values. Left out: a quarter of the features.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of attention. Left out: 64 columns each.")] = None,
    mlp: Annotated[int | None, typer.Option(help="Columns within the MLP. Left out: as the width.")] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Folder of a compressor to begin with; its sizes hold if none are said."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Scenes to generate, without --data.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of weights, scenes and steps.")] = 20261128,
    minutes: Annotated[float, typer.Option(help="Stop after so long; the next run goes on.")] = 1e6,
    cache_gib: Annotated[float, typer.Option(help="Memory for features of pictures, GiB.")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the frozen model.")
    ] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Train a compressor, the model itself frozen.

    Every step compresses pictures at one rate (0.889, 0.926, 0.95 or 0.97): around what is asked for, beside
    it, all of it by sampling, and all of it evenly. Run the same command again to go on.

    \b
    The reference checkpoint's, in two parts of about half an hour on two cores:
      python -m lab.resampling -o build/first --width 128 --heads 4 --mlp 256 --pictures 3000 --steps 2500
      python -m lab.resampling -o build/second --start build/first --pictures 800 --steps 1900 --seed 20261129
    For a model of your own on its own answers, on a GPU:
      python -m lab.resampling -o build/resampler --model llava-hf/llava-1.5-7b-hf --data questions.jsonl \\
          --recipe match --device cuda --dtype bfloat16 --batch 16
    Then:
      vllm serve M --plugin crop \\
          --crop-config '{"compression": "resampler", "resampler": {"weights": "build/resampler"}}'
    """
    console = Console(highlight=False)
    course = Course(recipe, steps, batch, learning_rate, seed, cache_gib=cache_gib)
    sizes = {"width": width, "num_heads": heads, "mlp_size": mlp}
    try:
        items = scene_items(pictures, seed) if data is None else read_items(data, recipe == "answers")
        placed = sum(item.region is not None for item in items)
        console.print(
            f"questions: {len(items)}, with a known place {placed}; pictures: "
            f"{len({item.picture for item in items})}"
        )
        _import_torch(threads)
        from lab.resampling.frozen import FrozenModel
        from lab.resampling.trainer import Trainer
        from vllm_crop.compression.weights import write_resampler

        frozen = FrozenModel(model, device, dtype)
        said = {key: value for key, value in sizes.items() if value is not None}
        shape = read_card(start).shape if start and not said else _shape(frozen.config, said)
        trainer = Trainer(frozen, items, shape, course, out)
        if start is not None:
            trainer.start_from(start)
        try:
            done = trainer.run(minutes)
        except KeyboardInterrupt:
            trainer.save()
            done = False
        card = ResamplerCard.untrained(shape, model, frozen.config)
        training = {**asdict(course), "data": data.name if data else None, "pictures": pictures}
        training |= {"done": trainer.step, "provenance": provenance()}
        training |= {"started_from": trainer.started_from}
        card = card.model_copy(update={"training": training})
        write_resampler(out, trainer.resampler, card, describe(card))
    except CropError as error:
        console.print(f"The training failed: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(
        f"{'Done' if done else 'Stopped'} after {trainer.step} of {steps} steps: {out} is what "
        "resampler.weights can name" + ("" if done else "; the same command goes on"),
        markup=False,
    )


def _import_torch(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _shape(model: Mapping[str, Any], sizes: Mapping[str, int]) -> ResamplerShape:
    """The compressor that suits a model, but for sizes that were said."""
    columns = feature_size(model)
    assert columns is not None
    suited = ResamplerShape.suited_to(columns).model_dump()
    wide = {"mlp_size": sizes["width"]} if "width" in sizes else {}
    try:
        return ResamplerShape.model_validate({**suited, **wide, **sizes})
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise TrainingDataError(f"--width and --heads: {told}, whose columns turn in fours") from None


if __name__ == "__main__":
    app()
