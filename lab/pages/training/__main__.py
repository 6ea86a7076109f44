# SPDX-License-Identifier: Apache-2.0
"""Trains: `python -m lab.pages.training --pages build/pages/train --out build/pages/model`. Can go on."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from lab.pages.training.trainer import Trainer


def main(
    pages: Annotated[Path, typer.Option(help="Folder of drawn pages of the split `train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the log, the state and the checkpoint.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_scale: Annotated[float, typer.Option(help="Larger steps, for a GPU.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that make batches; 0: none.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long; the next run goes on.")] = 1e6,
    within: Annotated[
        float | None, typer.Option(help="Minutes for the whole curriculum, phases getting their shares.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Half the time of a step, minutes at the start.")
    ] = True,
) -> None:
    """Train letters, then answers."""
    torch.set_num_threads(threads)
    Trainer(pages, out, device, batch_scale, workers, within, compiled).run(minutes)


typer.run(main)
