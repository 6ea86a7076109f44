# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.covipal`: train the pruning module of the rival CoViPAL."""

from pathlib import Path
from typing import Annotated

import typer

from lab.evaluation.covipal.module import WEIGHTS


def main(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint, which stays as it is.")] = Path(
        "lab/checkpoints/tinyvqa"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the weights and the log.")] = WEIGHTS.parent,
    attention_steps: Annotated[int, typer.Option(min=1, help="Steps of foretelling attention.")] = 1500,
    answer_steps: Annotated[int, typer.Option(min=1, help="Steps of answering behind gates.")] = 300,
) -> None:
    """Train the module on scenes of the training split, 24 questions a step."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from lab.evaluation.covipal.training import Stage, Training

    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    training = Training(loaded, AutoTokenizer.from_pretrained(model))
    training.run((Stage("attention", attention_steps, 4e-3), Stage("answers", answer_steps, 1e-3)), out)


typer.run(main)
