# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.resampling.memory`: what training a compressor takes, without the machine it takes it on.

Shapes run through the model and no numbers: torch's fake tensors. What is held for the backward pass is
counted tensor by tensor; weights and the optimizer's states are their sizes. Not counted: what single
operations need for a moment, and the allocator's gaps.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from lab.resampling.lessons import RATES
from vllm_crop.compression.settings import ResamplerShape
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import TokenGrid
from vllm_crop.planning.plan import even_plan

GIB = 2**30
app = typer.Typer(add_completion=False)


@app.command()
def memory(
    model: Annotated[
        str | None,
        typer.Option(help="A folder with a config.json, or a name on the Hub. Left out: LLaVA-1.5-7B."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 16,
    visual: Annotated[int, typer.Option(min=1, help="Visual tokens of a picture.")] = 576,
    text: Annotated[int, typer.Option(min=1, help="Tokens of a question with its answer.")] = 60,
) -> None:
    """Print what a training step in bfloat16 takes, at the rate that leaves the most tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = retained_count(visual, min(RATES))
    with FakeTensorMode():
        whole, language, head = _model(model)
        hidden = language.config.hidden_size
        shape = ResamplerShape.suited_to(hidden)
        held = _held(language, head, batch, kept + text)
        weights = sum(part.nbytes for part in whole.parameters())
    from vllm_crop.compression.resampler import Resampler

    compressor = Resampler(shape)
    learned = sum(part.numel() for part in compressor.parameters())
    own = _held_by(compressor, visual, kept)
    console = Console(highlight=False)
    rows = {
        "the model, bfloat16, frozen": weights,
        f"held for the backward pass, {batch} prompts of {kept} + {text} tokens": held,
        f"the compressor, {learned / 1e6:.1f} M parameters: weights, gradients, Adam": 16 * learned,
        "what it holds for its own backward pass": batch * own,
    }
    for what, size in rows.items():
        console.print(f"{size / GIB:6.1f} GiB  {what}")
    console.print(f"{sum(rows.values()) / GIB:6.1f} GiB  together")
    picture = visual * hidden * 2 / 2**20
    console.print(f"{picture:6.1f} MiB  for each picture whose features are kept, in the CPU's memory")


def _model(name: str | None) -> tuple[Any, Any, Any]:
    """The whole model, its language model and its head, of no numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig

    config = AutoConfig.from_pretrained(name) if name else LlavaConfig()  # whose defaults are those of 7B
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    return whole, whole.model.language_model, whole.lm_head


def _held(language: Any, head: Any, batch: int, tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward one, the model's own weights aside."""
    import torch

    rows = torch.randn(batch, tokens, language.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        states = language(inputs_embeds=rows, use_cache=False).last_hidden_state
        head(states[:, -1]).float().log_softmax(-1).mean()

    return _saved_by(step, [*language.parameters(), *head.parameters()])


def _held_by(compressor: Any, visual: int, kept: int) -> int:
    """The same for one picture in the compressor."""
    import torch

    from vllm_crop.models.plan_fields import assignment, places

    plan = even_plan(TokenGrid(1, visual), kept, "resampler")
    features = torch.zeros(visual, compressor.norm.normalized_shape[0])

    def step() -> None:
        compressor(features, assignment(plan), places(plan))

    return _saved_by(step, [*compressor.parameters(), features])


def _saved_by(step: Callable[[], None], own: Sequence[Any]) -> int:
    """Bytes that are saved for the backward pass, but for those of some tensors."""
    import torch

    known = {part.untyped_storage()._cdata for part in own}
    held: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage  # kept, or another may get its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in held.values())


if __name__ == "__main__":
    app()
