# SPDX-License-Identifier: Apache-2.0
"""Where the time to the first token goes, part by part, in one process: no HTTP, nothing beside it."""

import argparse
import copy
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.benchmarking.decode_engine import ENVIRONMENT, QUESTION
from vllm_crop.benchmarking.load import Client
from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.targets import MAX_MODEL_LEN, ROOM_FOR_TEXT, own_localizer, what_to_serve
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.measuring.provenance import Machine, describe_machine
from vllm_crop.planning.geometry import Box, ImageTokens, Region
from vllm_crop.planning.plan import make_plan

# In the order they happen; "view" is the localizer's part of the work.
PARTS = {
    "decode": "image decoded",
    "view picture": "view: picture made",
    "view process": "view: HF processor",
    "view tower": "view: vision tower",
    "view model": "view: language model",
    "process": "HF processor and plan",
    "tower": "vision tower",
    "compressor": "compressor",
    "model": "language model",
    "rest": "the rest: prompt, scheduler, sampler",
}
AGAIN = "again"
MODES = ("off", "region", AGAIN, "attention")
TITLES = {
    "off": "unpruned",
    "region": "client's region",
    AGAIN: "another region of it",
    "attention": "kind attention",
}
WARM_UPS = 2


@dataclass(frozen=True)
class WhereOutcome:
    """Medians over questions, by mode.

    Attributes:
        parts: milliseconds, by part.
        totals: of whole requests.
        spans: the shortest and the longest of them.
        cpu: CPU milliseconds of the process, all of its threads.
        tower_tokens: visual tokens that the vision tower made, a view's among them.
        prompt_tokens: of the request itself.
        compressor: MiB of its weights, and of what it works with at most on such a picture; None without one.
    """

    machine: Machine
    questions: int
    parts: Mapping[str, Mapping[str, float]]
    totals: Mapping[str, float]
    spans: Mapping[str, tuple[float, float]]
    cpu: Mapping[str, float]
    tower_tokens: Mapping[str, float]
    prompt_tokens: Mapping[str, float]
    compressor: tuple[float, float] | None = None


def measure_where(options: Options) -> WhereOutcome:
    """Ask the dummy model, or the options' own, about pictures that nobody has seen, modes in turn."""
    with Client(options.folder / "where.log", ENVIRONMENT) as client:
        machine = client.call(describe_machine)
        served = what_to_serve(options, machine, client)
        crop = {
            **{"pruning_rate": options.pruning_rate, "localizer": own_localizer("attention", options)},
            **{"compression": options.compression, **served.crop},
        }
        crops: dict[str, dict[str, Any]] = {
            "off": {"method": "off"},
            "region": {"method": "plc", "regions": [options.region.as_lists()]},
            AGAIN: {"method": "plc", "regions": [_beside(options.region).as_lists()]},
            "attention": {"method": "plc", "question": QUESTION.strip()},
        }
        longest = load_geometry(served.model).grid(options.image_side, options.image_side).num_tokens
        runs, compressor = client.call(
            ask_in_turn,
            Path(served.model),
            crop,
            crops,
            options.num_prompts,
            options.image_side,
            max(MAX_MODEL_LEN, longest + ROOM_FOR_TEXT),
            machine.is_cpu,
            options.serve_args,
        )
    parts = {
        mode: {part: median(run.parts.get(part, 0.0) for run in of_mode) for part in PARTS}
        for mode, of_mode in runs.items()
    }

    def medians(number: Callable[[_Run], float]) -> dict[str, float]:
        return {mode: median(map(number, of_mode)) for mode, of_mode in runs.items()}

    return WhereOutcome(
        machine,
        options.num_prompts,
        parts,
        medians(lambda run: run.total),
        {
            mode: (min(run.total for run in of_mode), max(run.total for run in of_mode))
            for mode, of_mode in runs.items()
        },
        medians(lambda run: run.cpu),
        medians(lambda run: run.tower_tokens),
        medians(lambda run: run.prompt_tokens),
        compressor,
    )


def where_table(outcome: WhereOutcome) -> Table:
    """A row per part, a column per mode."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"milliseconds to the first token, medians of {outcome.questions}",
        caption=f"{outcome.machine.device}. Parts are medians of their own and need not add up.",
    )
    table.add_column("")
    for mode in MODES:
        table.add_column(TITLES[mode], justify="right")
    for part, title in PARTS.items():
        shown = [outcome.parts[mode][part] for mode in MODES]
        table.add_row(title, *(f"{value:.1f}" if value >= 0.05 else "-" for value in shown))
    table.add_section()
    table.add_row("together", *(f"{outcome.totals[mode]:.1f}" for mode in MODES))
    table.add_row("least to most", *("{:.0f} to {:.0f}".format(*outcome.spans[mode]) for mode in MODES))
    for title, times in (("of unpruned", outcome.totals), ("CPU time of unpruned", outcome.cpu)):
        table.add_row(title, *(f"{times[mode] / times['off']:.2f}x" for mode in MODES))
    table.add_section()
    for title, counts in (
        ("tokens of the vision tower", outcome.tower_tokens),
        ("tokens of the prompt", outcome.prompt_tokens),
    ):
        full = counts["off"]
        cells = [f"{counts[mode]:.0f} ({counts[mode] / full:.2f}x)" for mode in MODES]
        table.add_row(title, *cells)
    if outcome.compressor is not None:
        weights, working = outcome.compressor
        table.caption = (
            f"{table.caption} The compressor's weights take {weights:.1f} MiB, its work on such a picture "
            f"{working:.1f} MiB at most."
        )
    return table


@dataclass
class _Run:
    """One request."""

    total: float = 0.0
    cpu: float = 0.0
    tower_tokens: int = 0
    prompt_tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)


def ask_in_turn(
    model: Path,
    crop: Mapping[str, Any],
    crops: Mapping[str, Mapping[str, Any]],
    questions: int,
    side: int,
    max_model_len: int,
    is_cpu: bool,
    serve_args: Sequence[str] = (),
) -> tuple[dict[str, list[_Run]], tuple[float, float] | None]:
    """Ask `questions` times in each mode, after some to warm up. Called in a process that keeps its engine.

    Args:
        crop: the plugin's settings, with a localizer of kind 'attention'.
        crops: per mode the field `crop` of its requests; "again" is about the picture of the one before.
        side: of the square pictures, in pixels.
        max_model_len: of the engine.
        serve_args: options of `vllm serve` that are the engine's; they win over the benchmark's own.

    Returns:
        The requests by mode, and WhereOutcome.compressor.
    """
    from vllm import LLM, SamplingParams
    from vllm.multimodal.media.image import ImageMediaIO

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": 32} if is_cpu else {}
    given = _engine_options(serve_args)
    options |= {
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        **given,
        "additional_config": {**given.get("additional_config", {}), "crop": dict(crop)},
    }
    llm: Any = LLM(model=str(model), **options)
    clock = _Clock(llm)
    template, sampling = _template(llm), SamplingParams(temperature=0, max_tokens=1)
    random = np.random.default_rng(0)
    runs: dict[str, list[_Run]] = {mode: [] for mode in crops}
    sent = b""
    for number in range(WARM_UPS + questions):
        for mode, asked in crops.items():
            if mode != AGAIN:
                sent = _encoded(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
            with clock.request() as run:
                with clock.part("decode"):
                    image = ImageMediaIO().load_bytes(sent)
                prompt = {
                    "prompt": template,
                    "multi_modal_data": {"image": [image]},
                    "mm_processor_kwargs": {"crop": dict(asked)},
                }
                (output,) = llm.generate(prompt, sampling, use_tqdm=False)
                run.prompt_tokens = len(output.prompt_token_ids)
            if number >= WARM_UPS:
                runs[mode].append(run)
    return runs, clock.compressor_memory(load_geometry(str(model)).grid(side, side))


class _Clock:
    """Times the parts of an engine in this process, the localizer's apart."""

    def __init__(self, llm: Any) -> None:
        import torch

        engine = llm.llm_engine
        worker = engine.model_executor.driver_worker
        model = getattr(worker, "worker", worker).model_runner.get_model()
        renderer = engine.renderer
        requests = renderer._localizing.localizer.requests
        self._on_device = torch.cuda.is_available()
        self._encoder = model.crop_encoder
        self._run = _Run()
        self._of_view = False
        self._wrap(renderer.mm_processor, "apply", "process")
        self._wrap(model, "embed_multimodal", "tower")
        if self._encoder.resampler is not None:
            self._wrap(self._encoder.resampler.module, "forward", "compressor")
        self._wrap(model, "forward", "model")
        self._wrap(requests, "glance_now", "view picture")
        ask_now = requests.ask_now

        def of_view(*args: Any, **kwargs: Any) -> Any:
            self._of_view = True
            try:
                return ask_now(*args, **kwargs)
            finally:
                self._of_view = False

        requests.ask_now = of_view

    def compressor_memory(self, grid: ImageTokens) -> tuple[float, float] | None:
        """MiB of the compressor's weights, and of what it works with at most; None without one."""
        if self._encoder.resampler is None:
            return None
        import torch
        from torch.distributed._tools.mem_tracker import MemTracker

        from vllm_crop.models.plan_fields import assignment, places

        # A copy, as what is tracked must be able to learn, and without the clock.
        module = copy.deepcopy(self._encoder.resampler.module).requires_grad_(True)
        module.__dict__.pop("forward", None)
        weights = list(module.parameters())
        plan = make_plan(grid, Region.whole(), 0.1, "resampler")  # most tokens are queries
        features = weights[0].new_zeros(grid.num_tokens, module.norm.normalized_shape[0])
        tracker = MemTracker()
        tracker.track_external(module, features)
        with torch.no_grad(), tracker:
            module(features, assignment(plan), places(plan))
        peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
        own = sum(part.nbytes for part in weights)
        return own / 2**20, (peak - own - features.nbytes) / 2**20

    @contextmanager
    def request(self) -> Iterator[_Run]:
        """One request; what no part accounts for is the rest."""
        self._run = _Run()
        before, cpu, start = self._encoder.tokens_encoded, time.process_time(), time.perf_counter()
        yield self._run
        self._run.tower_tokens = self._encoder.tokens_encoded - before
        self._run.total = 1e3 * (time.perf_counter() - start)
        self._run.cpu = 1e3 * (time.process_time() - cpu)
        parts = self._run.parts
        parts["tower"] = parts.get("tower", 0.0) - parts.get("compressor", 0.0)  # which runs within it
        parts["rest"] = self._run.total - sum(parts.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the request."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        parts = self._run.parts
        parts[name] = parts.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        """Until the device has done what it was told."""
        import torch

        if self._on_device:
            torch.cuda.synchronize()

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        stock: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(f"view {name}" if self._of_view else name):
                return stock(*args, **kwargs)

        setattr(owner, method, timed)


def _beside(region: Region) -> Region:
    """Every box moved by its width, to the left where there is room."""
    boxes = []
    for x0, y0, x1, y1 in region.as_lists():
        by = x0 - x1 if x0 >= x1 - x0 else min(x1 - x0, 1 - x1)
        boxes.append(Box(x0 + by, y0, x1 + by, y1))
    return Region(tuple(boxes))


def _engine_options(serve_args: Sequence[str]) -> dict[str, Any]:
    """What a command line says about the engine, by the names that `LLM` has for it; nothing else."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return dict(vars(parser.parse_args(list(serve_args))))


def _template(llm: Any) -> str:
    """A question by the model's own chat template."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.strip()}]
    processor = llm.llm_engine.renderer.mm_processor.info.get_hf_processor()
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
