# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.rims`: what a rim around regions is worth, where they are right and where not."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.regions import regions_for
from lab.tinyvqa.questions import Question
from vllm_crop.measuring.shares import Estimate, wilson
from vllm_crop.planning.geometry import Box, Region

FAMILIES = ("read", "relation", "compare")  # of which a region holds the answer
SOURCES = {
    "exact": "the smallest region that holds the answer",
    "shifted": "every box moved by one of 8x8 cells",
    "padded": "the exact one, a cell wider on every side",
    "attention": "where the served model looks",
    "random": "boxes of the true size, anywhere",
}
RIMS = (0.0, 0.0625, 0.125, 0.1875, 0.25)
ANSWER_TOKENS = 4
SCENES_AT_ONCE = 8  # their features stay in the cache for all conditions
app = typer.Typer(add_completion=False)


@app.command()
def rims(
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each of the three families.")] = 170,
    seed: Annotated[int, typer.Option(help="Of the scenes; choose on one, report another.")] = 0,
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = "0.778,0.889",
    out: Annotated[Path, typer.Option(help="Where the numbers and the picture go.")] = Path("build/rims"),
) -> None:
    """Ask tinyvqa with regions from several sources, with rims of several widths."""
    console = Console(highlight=False)
    scenes = [scene for scene in make_test_set(n, seed) if _asked(scene)]
    right: dict[tuple[str, float, float], list[bool]] = {}
    unpruned: list[bool] = []
    ask = _Engine()
    chunks = [scenes[start : start + SCENES_AT_ONCE] for start in range(0, len(scenes), SCENES_AT_ONCE)]
    for chunk in track(chunks, "scenes", console=console):
        asked = [(scene, question) for scene in chunk for question in _asked(scene)]
        unpruned += ask(asked, [{"method": "off"}] * len(asked))
        regions = {source: _regions(source, chunk) for source in SOURCES}
        for rate in map(float, rates.split(",")):
            for source in SOURCES:
                for rim in RIMS:
                    fields = [
                        {"pruning_rate": rate, "rim": rim, **_where(region, question)}
                        for region, (_, question) in zip(regions[source], asked, strict=True)
                    ]
                    right.setdefault((source, rate, rim), []).extend(ask(asked, fields))
    shares = {key: wilson(sum(answers), len(answers)) for key, answers in right.items()}
    _print(console, shares, wilson(sum(unpruned), len(unpruned)), len(unpruned), seed)
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"source": source, "rate": rate, "rim": rim, "n": len(unpruned), "right": share.value}
        for (source, rate, rim), share in shares.items()
    ]
    (out / "rims.json").write_text(json.dumps({"seed": seed, "rows": rows}, indent=1) + "\n")
    _draw(shares, out / "rims.png")
    console.print(f"Numbers and picture: {out}", markup=False)


class _Engine:
    """Answers questions offline, all of a call at once."""

    def __init__(self) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from transformers import AutoProcessor
        from vllm import LLM

        from lab.demo.setting import LOCALIZER, MODEL
        from lab.evaluation.served.offline import ENGINE

        crop = {"position_ids": "original", "localizer": LOCALIZER}
        self.llm: Any = LLM(model=str(MODEL), **ENGINE, additional_config={"crop": crop})
        self.processor = AutoProcessor.from_pretrained(MODEL)

    def __call__(self, asked: Sequence[tuple[TestScene, Question]], crops: Sequence[Any]) -> list[bool]:
        from vllm import SamplingParams

        pictures = {scene.scene.seed: scene.picture() for scene, _ in asked}
        prompts = [
            {
                "prompt": self._prompt(question.text),
                "multi_modal_data": {"image": [pictures[scene.scene.seed]]},
                "mm_processor_kwargs": {"crop": crop},
            }
            for (scene, question), crop in zip(asked, crops, strict=True)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [
            output.outputs[0].text.strip() == question.answer
            for output, (_, question) in zip(outputs, asked, strict=True)
        ]

    def _prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _asked(scene: TestScene) -> list[Question]:
    return [question for question in scene.questions if question.family in FAMILIES]


def _regions(source: str, scenes: Sequence[TestScene]) -> list[Region | None]:
    """Of every question that is asked; None where the server finds it."""
    if source == "attention":
        return [None for scene in scenes for _ in _asked(scene)]
    told = regions_for("random" if source == "random" else "oracle", scenes)
    found: list[Region | None] = []
    for scene, row in zip(scenes, told, strict=True):
        for question, region in zip(scene.questions, row, strict=True):
            if question.family not in FAMILIES:
                continue
            assert region is not None
            if source == "shifted":
                region = _shifted(
                    region, scene.scene.side, random.Random(f"{scene.scene.seed} {question.text}")
                )
            found.append(region.widened(1 / scene.scene.side) if source == "padded" else region)
    return found


def _shifted(region: Region, side: int, chance: random.Random) -> Region:
    """Every box moved by a cell, in a direction that leaves all of it in the picture."""
    moved = []
    for box in region.boxes:
        ways = [(1, 0), (-1, 0), (0, 1), (0, -1)]
        chance.shuffle(ways)
        for across, down in ways:
            x, y = across / side, down / side
            if min(box.x0 + x, box.y0 + y) > -1e-9 and max(box.x1 + x, box.y1 + y) < 1 + 1e-9:
                moved.append(
                    Box(
                        max(0.0, box.x0 + x), max(0.0, box.y0 + y), min(1.0, box.x1 + x), min(1.0, box.y1 + y)
                    )
                )
                break
    return Region(tuple(moved)) if moved else region


def _where(region: Region | None, question: Question) -> dict[str, Any]:
    return {"question": question.text} if region is None else {"regions": [region.as_lists()]}


def _print(
    console: Console, shares: dict[tuple[str, float, float], Estimate], whole: Estimate, n: int, seed: int
) -> None:
    table = Table(title=f"right answers in %, n = {n}, seed {seed}; unpruned {100 * whole.value:.1f}")
    table.add_column("region")
    table.add_column("rate")
    for rim in RIMS:
        table.add_column(f"rim {rim:g}", justify="right")
    for source in SOURCES:
        for rate in sorted({rate for _, rate, _ in shares}):
            cells = [shares[source, rate, rim] for rim in RIMS]
            shown = [f"{100 * one.value:.1f} ({100 * one.low:.0f}-{100 * one.high:.0f})" for one in cells]
            table.add_row(source, f"{rate:g}", *shown)
    console.print(table)
    for source, meaning in SOURCES.items():
        console.print(f"- {source}: {meaning}.", markup=False)


def _draw(shares: dict[tuple[str, float, float], Estimate], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rates = sorted({rate for _, rate, _ in shares})
    figure, axes = plt.subplots(1, len(rates), figsize=(6 * len(rates), 5), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        for source in SOURCES:
            points = [shares[source, rate, rim] for rim in RIMS]
            (line,) = axis.plot(RIMS, [point.value for point in points], marker="o", label=source)
            bounds = [point.low for point in points], [point.high for point in points]
            axis.fill_between(RIMS, *bounds, color=line.get_color(), alpha=0.12)
        axis.set_title(f"pruning rate {rate:g}")
        axis.set_xlabel("rim, fraction of the image's sides")
    axes[0][0].set_ylabel("right answers")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    app()
