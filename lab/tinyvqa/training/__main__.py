# SPDX-License-Identifier: Apache-2.0
"""Trains the checkpoint: `python -m lab.tinyvqa.training --out build/tinyvqa`. Can go on."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from lab.tinyvqa.training.trainer import Trainer


def main(
    out: Annotated[Path, typer.Option(help="Folder of the log, the state and the checkpoint.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    phase: Annotated[str, typer.Option(help="With --weights: the phase to begin with.")] = "small",
    minutes: Annotated[float, typer.Option(help="Stop after so long; the next run goes on.")] = 1e6,
) -> None:
    """Train the vision tower, then answers and places; a few hours on two CPU cores."""
    torch.set_num_threads(threads)
    trainer = Trainer(out, device)
    if weights is not None:
        trainer.start_from(weights, phase)
    trainer.run(minutes)


typer.run(main)
