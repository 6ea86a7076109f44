# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the API process: CPU time from a chat request with a picture to the engine's input.

Two renderers in one process, stock vLLM's and the plugin's, take turns; no engine is started. What they do is
what the API server does with a parsed request: decode the picture, preprocess, hash, plan, expand the prompt.
"""

import base64
import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.planning.groups import use_compiled

SIZES = ((336, 336), (1280, 720), (3840, 2160))
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12845056}  # Qwen2.5-VL's limits of a picture
CROP = {"method": "plc+ilp", "eviction_layers": [2]}  # what the server is prepared for
RATE = 0.778
REGION = [0.375, 0.375, 0.625, 0.625]
STOCK = "stock"
MODES: dict[str, Mapping[str, Any] | None] = {
    STOCK: None,
    "no region": {},
    "off": {"method": "off"},
    "plc": {"method": "plc", "regions": [REGION]},
    "ilp": {"method": "ilp", "regions": [REGION]},
    "plc+ilp": {"method": "plc+ilp", "regions": [REGION]},
}


@dataclass(frozen=True)
class ApiTimes:
    """CPU milliseconds of requests with pictures of one size, by mode; runs of equal index are neighbours."""

    size: tuple[int, int]
    times_ms: Mapping[str, tuple[float, ...]]

    def added(self, mode: str) -> list[float]:
        """What each run of a mode took beyond its neighbour on stock vLLM, as a share, ascending."""
        pairs = zip(self.times_ms[mode], self.times_ms[STOCK], strict=True)
        return sorted(run / stock - 1 for run, stock in pairs)


def measure_api_cpu(repeats: int = 15) -> Iterator[ApiTimes]:
    """Render requests of every size and mode, a new picture each time, modes in turn."""
    use_compiled()  # as a renderer does when it gets an engine
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _make_checkpoint(Path(folder))
        stock, ours = _renderer(checkpoint, {}), _renderer(checkpoint, {"crop": CROP})
        for size in SIZES:
            times: dict[str, list[float]] = {mode: [] for mode in MODES}
            for run in range(-1, repeats):
                modes = list(MODES.items())
                for index, (mode, crop) in enumerate(modes if run % 2 else reversed(modes)):
                    url = _picture(size, seed=len(modes) * (run + 1) + index)
                    if crop and "regions" in crop:  # a digit that changes no plan, or one would be remembered
                        crop = {**crop, "pruning_rate": RATE + run * 1e-9}
                    took = _render_ms(stock if crop is None else ours, url, crop)
                    if run >= 0:  # one to warm up
                        times[mode].append(took)
            yield ApiTimes(size, {mode: tuple(values) for mode, values in times.items()})


def api_cpu_table(measured: Iterator[ApiTimes]) -> Table:
    """A row per size and mode."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for title in ("picture", "request"):
        table.add_column(title, no_wrap=True)
    for title in ("CPU ms\nmedian", "min", "max", "added\nmedian", "quartiles"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in measured:
        for mode, times in one.times_ms.items():
            numbers = [f"{value:.1f}" for value in (median(times), min(times), max(times))]
            added = one.added(mode)
            low, high = added[len(added) // 4], added[-1 - len(added) // 4]
            more = ("", "") if mode == STOCK else (f"{median(added):+.1%}", f"{low:+.1%} to {high:+.1%}")
            table.add_row("{}x{}".format(*one.size) if mode == STOCK else "", mode, *numbers, *more)
        table.add_section()
    return table


def _make_checkpoint(folder: Path) -> Path:
    """A tiny Qwen2.5-VL whose pictures may be as large as the published one's."""
    from vllm_crop.benchmarking.dummy_llava import DummySize
    from vllm_crop.benchmarking.dummy_qwen2_5_vl import make_checkpoint

    make_checkpoint(folder, DummySize(layers=28, max_positions=40_000))
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            settings = json.loads(path.read_text())
            settings.get("image_processor", settings)["size"] = PUBLISHED_PIXELS
            path.write_text(json.dumps(settings))
    return folder


def _renderer(checkpoint: Path, additional_config: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    args = EngineArgs(
        model=str(checkpoint),
        dtype="float32",
        max_model_len=20_000,
        enforce_eager=True,
        additional_config=additional_config,
    )
    return renderer_from_config(args.create_engine_config())


def _picture(size: tuple[int, int], seed: int) -> str:
    """A JPEG as the data URL of a request."""
    picture = Image.effect_mandelbrot(size, (-2.0, -1.0, 1.0, 1.0), 100).convert("RGB")
    for place in range(4):  # in steps that JPEG keeps: no two are the same
        digit = seed >> 4 * place & 15
        picture.paste((16 * digit,) * 3, (16 * place, 0, 16 * place + 16, 16))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _render_ms(renderer: Any, url: str, crop: Mapping[str, Any] | None) -> float:
    from vllm.renderers import ChatParams

    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is written on the sign?"},
    ]
    extras = {} if crop is None else {"mm_processor_kwargs": {"crop": dict(crop)}}
    start = time.process_time()
    renderer.render_chat([[{"role": "user", "content": content}]], ChatParams(), prompt_extras=extras)
    return 1000 * (time.process_time() - start)
