# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.foveation`: what answers lose where the vision tower sees only the region large.

The same questions, regions and counts of visual tokens with compression pool, prune, and foveate with several
halos; differences to pool are paired.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab.evaluation.offline_answers import LOCAL, UNPRUNED, OfflineAnswers, shown
from lab.evaluation.questions import make_test_set
from lab.evaluation.rim_regions import SOURCES, Asked, Regions
from lab.evaluation.stats import difference, wilson
from vllm_crop.config import FoveationConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.measuring.shares import Estimate
from vllm_crop.planner import Planner
from vllm_crop.planning.plan import Compression
from vllm_crop.request import CropRequest, Found

FROM = ("exact", "shifted", "attention", "random")
SCENES_AT_ONCE = 8
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Way:
    """A way of making visual tokens: how they are compressed, and how they are foveated."""

    compression: Compression
    halo: int = 0
    rim_size: Literal["half", "full"] = "half"

    def __str__(self) -> str:
        if self.compression != "foveate":
            return self.compression
        return f"halo {self.halo}" + (", full rim" if self.rim_size == "full" else "")


@dataclass(frozen=True)
class Key:
    """One condition."""

    source: str
    rate: float
    rim: float
    way: Way


@app.command()
def foveation(
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each of the five families.")] = 170,
    seed: Annotated[int, typer.Option(help="Of the scenes; choose on one, report another.")] = 0,
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = "0.778,0.889",
    rims: Annotated[str, typer.Option(help="Widths of the rim.")] = "0,0.125",
    halos: Annotated[str, typer.Option(help="Halos of compression foveate, in tokens.")] = "0,1,2,4",
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("build/foveation"),
) -> None:
    """Ask tinyvqa with regions from several sources, its vision tower seeing more or less of the picture."""
    console = Console(highlight=False)
    widths = [int(halo) for halo in halos.split(",")]
    ways = [Way("pool"), Way("prune"), *(Way("foveate", halo) for halo in widths)]
    ways += [Way("foveate", halo, "full") for halo in widths]
    study = _Study([float(rate) for rate in rates.split(",")], [float(rim) for rim in rims.split(",")], ways)
    scenes = make_test_set(n, seed)
    chunks = [scenes[start : start + SCENES_AT_ONCE] for start in range(0, len(scenes), SCENES_AT_ONCE)]
    for chunk in track(chunks, "scenes", console=console):
        study.ask([(scene, one) for scene in chunk for one in scene.questions if one.family in LOCAL])
    study.print(console, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "foveation.json").write_text(json.dumps({"seed": seed, **study.to_json()}, indent=1) + "\n")
    console.print(f"Numbers: {out}", markup=False)


class _Study:
    """Answers by source, rate, rim and way; and how many tokens the vision tower makes."""

    def __init__(self, rates: Sequence[float], rims: Sequence[float], ways: Sequence[Way]) -> None:
        self.engine = OfflineAnswers(eviction_layer=7, compression="foveate")
        self.regions = Regions(self.engine.llm, self.engine.localizer)
        self.rates, self.rims, self.ways = rates, rims, ways
        self.right: dict[Key, list[bool]] = {}
        self.tower: dict[Key, list[int]] = {}
        self.unpruned: list[bool] = []

    def ask(self, asked: Sequence[Asked]) -> None:
        """Ask about some scenes in every way."""
        found = self.regions.of(asked)
        self.unpruned += self.engine(asked, [UNPRUNED] * len(asked))
        for source in FROM:
            for rate in self.rates:
                for rim in self.rims:
                    for way in self.ways:
                        if not rim and way.rim_size == "full":
                            continue
                        self._ask(Key(source, rate, rim, way), asked, found[source])

    def _ask(self, key: Key, asked: Sequence[Asked], regions: Sequence[Found]) -> None:
        planner = self._plan_by(key.way)
        params = CropParams(pruning_rate=key.rate, rim=key.rim, method="plc")
        crops = [CropRequest(params, found=(Found(one.region),), limited=False) for one in regions]
        sizes = [[scene.picture().size] for scene, _ in asked]
        decisions = [planner.plan(crop, size)[0] for crop, size in zip(crops, sizes, strict=True)]
        full = planner.geometry.grid(*sizes[0][0]).num_tokens
        self.tower.setdefault(key, []).extend(
            sum(piece.num_tokens for piece in one.pieces) or full for one in decisions
        )
        self.right.setdefault(key, []).extend(self.engine(asked, crops))

    def _plan_by(self, way: Way) -> Planner:
        """Let the engine plan in another way than it was started with."""
        processor = self.engine.llm.llm_engine.renderer.mm_processor
        foveation = FoveationConfig(halo=way.halo, rim_size=way.rim_size)
        changed = {"compression": way.compression, "foveation": foveation}
        config = processor.crop_config.model_copy(update=changed)
        processor.planner = Planner(config, processor.geometry, processor.planner.room)
        planner: Planner = processor.planner
        return planner

    def _against_pool(self, key: Key) -> Estimate | None:
        pool = Key(key.source, key.rate, key.rim, Way("pool"))
        return None if key == pool else difference(self.right[key], self.right[pool])

    def to_json(self) -> Mapping[str, Any]:
        """Every number of the table."""
        return {
            "n": len(self.unpruned),
            "unpruned": fmean(self.unpruned),
            "rows": [
                {
                    **{"source": key.source, "rate": key.rate, "rim": key.rim, "way": str(key.way)},
                    **{"right": fmean(answers), "tower_tokens": fmean(self.tower[key])},
                }
                for key, answers in self.right.items()
            ],
        }

    def print(self, console: Console, seed: int) -> None:
        """A row per source, rate and rim, a column per way."""
        n = len(self.unpruned)
        whole = shown(wilson(sum(self.unpruned), n))
        table = Table(title=f"right answers in % (95 %), n = {n}, seed {seed}; unpruned {whole}")
        for name in ("region", "rate", "rim"):
            table.add_column(name)
        for way in self.ways:
            table.add_column(str(way), justify="right")
        for source in FROM:
            for rate in self.rates:
                for rim in self.rims:
                    keys = [Key(source, rate, rim, way) for way in self.ways]
                    table.add_row(source, f"{rate:g}", f"{rim:g}", *map(self._cell, keys))
        console.print(table)
        for source in FROM:
            console.print(f"- {source}: {SOURCES[source]}.", markup=False)

    def _cell(self, key: Key) -> str:
        if key not in self.right:
            return ""
        answers, against = self.right[key], self._against_pool(key)
        text = f"{shown(wilson(sum(answers), len(answers)))}\ntower {fmean(self.tower[key]):.0f}"
        if against is None:
            return text
        return f"{text}\n{100 * against.value:+.1f} ({100 * against.low:+.1f} to {100 * against.high:+.1f})"


if __name__ == "__main__":
    app()
