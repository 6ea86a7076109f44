# SPDX-License-Identifier: Apache-2.0
"""The training loop: a frozen model, a compressor, and what the answers say about it."""

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from lab.resampling.frozen import FrozenModel, Prompt, Shown
from lab.resampling.items import Item, TrainingDataError
from lab.resampling.lessons import Course, plan_lesson
from vllm_crop.compression.files import read_card
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.settings import ResamplerShape
from vllm_crop.compression.weights import read_resampler
from vllm_crop.families.model_shape import ModelShape
from vllm_crop.models.plan_fields import assignment, places
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.plan import TokenPlan

WARMUP = 50  # steps
REPORT_EVERY = 25  # steps
SAVE_EVERY = 120.0  # seconds
MOST_SAID = 16  # tokens of an answer that nobody has given


@dataclass(frozen=True)
class Lesson:
    """One question of a step."""

    plan: TokenPlan
    features: Tensor
    prompt: Prompt


class Trainer:
    """Holds the compressor, the optimizer and where the training stands; `out/state.pt` keeps them."""

    def __init__(
        self, model: FrozenModel, items: Sequence[Item], shape: ResamplerShape, course: Course, out: Path
    ) -> None:
        torch.manual_seed(course.seed)
        self.model, self.items, self.course, self.out = model, items, course, out
        self.shape = shape
        self.resampler = Resampler(shape).to(model.device)
        self.optimizer = torch.optim.AdamW(
            self.resampler.parameters(), lr=course.learning_rate, weight_decay=0.01
        )
        self.step = 0
        self.started_from: dict[str, Any] | None = None
        # Features by picture, and what the unpruned model thinks by item, as logarithms of probabilities.
        self._kept: LRUCache[str | int, Tensor] = LRUCache(
            int(course.cache_gib * 2**30), getsizeof=lambda part: part.nbytes
        )
        self._said: dict[int, list[int]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._window: dict[str, list[float]] = defaultdict(list)
        self._load()

    def start_from(self, folder: Path) -> None:
        """Begin with a compressor's weights; a training that has been saved goes on instead.

        Raises:
            ResamplerError: it cannot be read.
            TrainingDataError: it is of other sizes.
        """
        if self.step:
            return
        card = read_card(folder)
        if card.shape != self.shape:
            raise TrainingDataError(f"{folder} has other sizes: give its --width, --heads and --mlp")
        self.resampler.load_state_dict(read_resampler(folder).state_dict())
        self.started_from = card.training

    def run(self, minutes: float) -> bool:
        """Train until done or so many minutes have passed, then save.

        Returns:
            Whether it is done.
        """
        end, saved = time.monotonic() + 60 * minutes, time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            bar = progress.add_task("steps", total=self.course.steps, completed=self.step)
            while self.step < self.course.steps and time.monotonic() < end:
                self.train_step()
                progress.update(bar, completed=self.step)
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.step >= self.course.steps

    def train_step(self) -> None:
        """One step, the same whenever it is run."""
        chance = random.Random(self.course.seed + 1_000_003 * self.step)
        rate = chance.choice(self.course.rates)
        chosen = chance.sample(range(len(self.items)), min(self.course.batch, len(self.items)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.learning_rate * self._falling()
        targets = [self._target(index) for index in chosen]
        lessons = [
            self._lesson(self.items[index], rate, chance, ids)
            for index, (ids, _) in zip(chosen, targets, strict=True)
        ]
        shown = [self._compressed(lesson) for lesson in lessons]
        logits = self.model.logits([lesson.prompt for lesson in lessons], shown)
        losses = [self._loss(row, ids, thought) for row, (ids, thought) in zip(logits, targets, strict=True)]
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.resampler.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._note(rate, loss, logits, targets)

    def _lesson(self, item: Item, rate: float, chance: random.Random, ids: Sequence[int]) -> Lesson:
        features, (width, height) = self._seen(item)
        grid, view = self.model.geometry.grid(width, height), self.model.geometry.view(width, height)
        resizes = bool(self.model.geometry.small(width, height, retained_count(grid.num_tokens, rate)))
        plan = plan_lesson(item.region, grid, view, rate, chance, resizes)
        return Lesson(plan, features, self.model.prompt(item.question, ids))

    def _compressed(self, lesson: Lesson) -> Shown:
        plan = lesson.plan
        rows = self.resampler(lesson.features.float(), assignment(plan), places(plan))
        return Shown.planned(rows.to(self.model.model.dtype), plan)

    def _loss(self, logits: Tensor, ids: Sequence[int], thought: Tensor | None) -> Tensor:
        if thought is None:
            return functional.cross_entropy(logits, torch.tensor(list(ids), device=logits.device))
        return functional.kl_div(
            logits.log_softmax(-1), thought.to(logits.device), reduction="batchmean", log_target=True
        )

    def _target(self, index: int) -> tuple[list[int], Tensor | None]:
        """What is to be said of an item, and for recipe "match" what the unpruned model thinks of it."""
        item = self.items[index]
        if self.course.recipe == "answers":
            assert item.answer is not None
            return self.model.answer_ids(item.answer), None
        known = self._kept.get(index)
        if known is not None:
            return self._said[index], known
        features, size = self._seen(item)
        whole = Shown.whole(features, self.model.geometry.grid(*size))
        ids = self._said.get(index) or self.model.say(item.question, whole, MOST_SAID)
        with torch.inference_mode():
            (logits,) = self.model.logits([self.model.prompt(item.question, ids)], [whole])
        self._said[index] = ids
        return ids, self._keep(index, logits.log_softmax(-1))

    def _seen(self, item: Item) -> tuple[Tensor, tuple[int, int]]:
        known = self._kept.get(item.picture)
        if known is not None:
            return known.to(self.model.device), self._sizes[item.picture]
        image = item.open()
        self._sizes[item.picture] = image.size
        features = self.model.features(image).clone()
        self._keep(item.picture, features)
        return features, image.size

    def _keep(self, key: str | int, part: Tensor) -> Tensor:
        """Keep a tensor for the next time it is wanted, in the CPU's memory."""
        if part.nbytes <= self._kept.maxsize:
            self._kept[key] = part.cpu()
        return part

    def _falling(self) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * self.step / self.course.steps))
        return (0.02 + 0.98 * falling) * min(1.0, (self.step + 1) / WARMUP)

    def _note(
        self, rate: float, loss: Tensor, logits: Sequence[Tensor], targets: Sequence[tuple[list[int], Any]]
    ) -> None:
        right = [
            logit.argmax(-1).tolist() == list(ids) for logit, (ids, _) in zip(logits, targets, strict=True)
        ]
        self._window[f"loss {rate:g}"].append(float(loss.detach()))
        self._window[f"right {rate:g}"].append(sum(right) / len(right))
        if self.step % REPORT_EVERY == 0:
            means = {name: round(sum(of) / len(of), 4) for name, of in sorted(self._window.items())}
            self._window.clear()
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": self.step, "time": round(time.time()), **means}) + "\n")

    def save(self) -> None:
        """Write the state, so that a run can go on."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "resampler": self.resampler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "started_from": self.started_from,
            "what": self._what(),
        }
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").replace(self.out / "state.pt")

    def _what(self) -> dict[str, Any]:
        """What a training that goes on must share with what was before."""
        asked = [(one.picture, one.question, one.answer, one.region) for one in self.items]
        return {
            **asdict(self.course),
            "sizes": self.shape.model_dump(),
            "questions": sha256(repr(asked).encode()).hexdigest(),
            "model": ModelShape.of(self.model.config).model_dump(),
        }

    def _forget_log_after(self, step: int) -> None:
        """Of steps that were taken after the last state was saved, and will be taken again."""
        log = self.out / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def _load(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.model.device)
        before, now = state.get("what", {}), self._what()
        if others := sorted(name for name, value in now.items() if before.get(name) != value):
            raise TrainingDataError(
                f"{path} was trained otherwise ({', '.join(others)}): give its settings again, or another "
                "--out with --start to train on"
            )
        self.started_from = state["started_from"]
        self._forget_log_after(state["step"])
        self.resampler.load_state_dict(state["resampler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
