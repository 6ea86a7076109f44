# SPDX-License-Identifier: Apache-2.0
"""The training loop: phase by phase, step by step, each step with a seed of its own."""

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from lab.pages import checkpoint
from lab.pages.tokenizer import make_tokenizer
from lab.pages.training.batches import LENGTH, Batch, Pages, Steps
from lab.pages.training.fewer import fewer_tokens
from lab.pages.training.letters import IGNORED, LetterHeads
from lab.pages.training.names import BEFORE_LAYER, NameHeads
from lab.pages.training.phases import PHASES, Phase, share_of
from lab.tinyvqa.checkpoint import TOKEN, make_processor, save
from lab.tinyvqa.training.batches import moved
from lab.tinyvqa.training.forward import (
    Layout,
    Probes,
    compiled_steps,
    image_patches,
    language_states,
    make_layout,
    vision_features,
)
from lab.tinyvqa.training.optimizers import Optimizers
from lab.tinyvqa.words import START, VISION_START

SEED = 20261127
WARMUP = 100  # steps
REPORT_EVERY = 50  # steps
SAVE_EVERY = 180.0  # seconds


class Trainer:
    """Holds the model, the optimizer and where the training stands; `out/state.pt` keeps them."""

    def __init__(
        self,
        pages: Path,
        out: Path,
        device: str,
        batch_scale: float = 1.0,
        workers: int = 0,
        within: float | None = None,
        compiled: bool = True,
    ) -> None:
        """Go on with what `out` has, else begin.

        Args:
            batch_scale: how many times as many visual tokens a step has as `phases` says.
            workers: processes that make batches ahead.
            within: minutes for all phases; without it each has as many steps as `phases` says.
            compiled: whether layers are compiled; worth it from some hundred steps on.
        """
        torch.manual_seed(SEED)
        self.out, self.device, self.batch_scale = out, torch.device(device), batch_scale
        self.workers, self.within = workers, within
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = make_tokenizer()
        self.model: Any = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(self.tokenizer))
        heads = {"letters": LetterHeads(checkpoint.HIDDEN), "names": NameHeads(checkpoint.HIDDEN)}
        self.heads: Any = nn.ModuleDict(heads)
        self.model.to(self.device)
        self.heads.to(self.device)
        self.pages = Pages(pages, self.tokenizer)
        self.phase, self.step, self.spent = 0, 0, 0.0
        self.optimizer = Optimizers(self.model, self.heads)
        self._batches: Iterator[Batch] | None = None
        self._layers = compiled_steps() if compiled else None
        self._seen: dict[int, Tensor] = {}  # by page: what the tower says of it while it is not trained
        # Read when a report is due: reading a number waits for the device.
        self._window: dict[str, list[Tensor]] = defaultdict(list)
        self._answered: list[tuple[str, Tensor, list[list[str]]]] = []
        if (out / "state.pt").exists():
            self._load()

    def run(self, minutes: float) -> None:
        """Train until done or so many minutes have passed, then save state and checkpoint."""
        end, saved = time.monotonic() + 60 * minutes, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            bars = [
                progress.add_task(phase.name, total=1.0, completed=int(index < self.phase))
                for index, phase in enumerate(PHASES)
            ]
            while self.phase < len(PHASES) and time.monotonic() < end:
                bar, phase = bars[self.phase], PHASES[self.phase]
                self.train_step()
                progress.update(bar, completed=self._done(phase) if self.step else 1.0)
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()
        save(self.out / "checkpoint", self.model, make_processor(self.tokenizer, checkpoint.LEAST_SIDE))

    def train_step(self) -> None:
        """One step; the last one of a phase begins the next."""
        began, phase = time.monotonic(), PHASES[self.phase]
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, self._done(phase))))
        rate = phase.final_rate + (1 - phase.final_rate) * falling
        self.optimizer.set_rate(phase.learning_rate * rate * min(1.0, (self.step + 1) / WARMUP))
        seed = SEED + 1_000_003 * self.phase
        if self._batches is None:
            steps = Steps(self.pages, phase, seed, self.batch_scale)
            self._batches = steps.ahead(self.step, self.workers)
        batch = moved(next(self._batches), self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self._loss(phase, batch, random.Random(seed + self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        self.spent += time.monotonic() - began
        if self.step % REPORT_EVERY == 0:
            self._report(phase)
        if self._done(phase) >= 1:
            self.phase, self.step, self.spent, self._batches = self.phase + 1, 0, 0.0, None
            self._seen.clear()

    def _done(self, phase: Phase) -> float:
        """Which part of a phase is done, 1 or more when it is over."""
        if self.within is None:
            return self.step / phase.steps
        return self.spent / (60 * self.within * share_of(phase))

    def _loss(self, phase: Phase, batch: Batch, chance: random.Random) -> Tensor:
        height, width = batch.images.shape[1:3]
        rows, cols = height // TOKEN, width // TOKEN
        if not phase.tower:
            features = self._known_features(batch, rows, cols)
        else:
            visual, patches = self.model.model.visual, image_patches(batch.images)
            features = vision_features(visual, patches, rows, cols, self._layers)
        loss: Tensor
        loss, right = self.heads["letters"].loss(features, batch.letters)
        self._window["letters loss"].append(loss.detach())
        self._window["letters"].append(right)
        if not phase.questions:
            return loss
        layout = _layout(rows, cols, phase.questions, self.device)
        if chance.random() < phase.fewer:
            features, layout = fewer_tokens(features, layout, rows, cols, chance)
            return self._answer_loss(features, layout, batch, "fewer ") + phase.letters * loss
        return self._answer_loss(features, layout, batch, "", phase.names) + phase.letters * loss

    def _known_features(self, batch: Batch, rows: int, cols: int) -> Tensor:
        new = [at for at, number in enumerate(batch.numbers) if number not in self._seen]
        if new:
            visual, patches = self.model.model.visual, image_patches(batch.images[new])
            with torch.no_grad():
                features = vision_features(visual, patches, rows, cols)
            for at, each in zip(new, features, strict=True):
                self._seen[batch.numbers[at]] = each.to(torch.bfloat16)
        return torch.stack([self._seen[number] for number in batch.numbers])

    def _answer_loss(
        self, features: Tensor, layout: Layout, batch: Batch, kind: str, names: float = 0.0
    ) -> Tensor:
        """The loss of answers, and where `names` is its weight, that of names."""
        ids = self.tokenizer.convert_tokens_to_ids([START, VISION_START])
        prefix = torch.tensor(ids, device=self.device)
        probed = (BEFORE_LAYER,) if names else ()
        probes = Probes(probed, torch.zeros(batch.questions.shape[:2], dtype=torch.long, device=self.device))
        language = self.model.model.language_model
        steps = None if kind else self._layers  # each part of the tokens would be a new shape
        states = language_states(language, prefix, features, batch.questions, layout, probes, steps)
        asked = batch.targets != IGNORED
        logits = self.model.lm_head(states.last[asked]).float()
        targets = batch.targets[asked]
        loss = functional.cross_entropy(logits, targets)
        self._window[f"{kind}loss"].append(loss.detach())
        right = torch.ones_like(asked)
        right[asked] = logits.argmax(-1) == targets
        self._answered.append((kind, right.all(-1), batch.families))
        if names:
            embeddings = language.embed_tokens.weight
            named, right = self.heads["names"].loss(states.image[0], batch.names, embeddings)
            for name, share in right.items():
                self._window[f"name of {name}"].append(share)
            loss = loss + names * named
        return loss

    def _report(self, phase: Phase) -> None:
        seen = {name: [float(value) for value in values] for name, values in self._window.items()}
        for kind, right, families in self._answered:
            for page, asked in zip(right.tolist(), families, strict=True):
                for is_right, family in zip(page, asked, strict=True):
                    seen.setdefault(kind + family, []).append(is_right)
        self._window.clear()
        self._answered.clear()
        means = {name: round(sum(values) / len(values), 4) for name, values in sorted(seen.items())}
        line = {"phase": phase.name, "step": self.step, "time": round(time.time()), **means}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state, so that a run can go on."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "phase": self.phase, "step": self.step}
        state["spent"] = self.spent
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").replace(self.out / "state.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.phase, self.step, self.spent = state["phase"], state["step"], state["spent"]


@cache
def _layout(rows: int, cols: int, questions: int, device: torch.device) -> Layout:
    """The layout of batches of one size, made once."""
    return make_layout(rows, cols, questions, LENGTH, device)
