# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the API process: its CPU time from a chat request with a picture to the last token.

Three `vllm serve` side by side, two of them stock and one with the plugin, are asked in turn, several
requests at a time: under load a process has its code in the caches, and the first request after another
server's does not. What the two stock ones differ by is no plugin's. The API process reads the request,
decodes and preprocesses the picture, hashes, plans, sends it to the engine and streams the answer; what the
engine's processes do meanwhile is not counted. Linux counts CPU time of threads in nanoseconds.
"""

import base64
import io
import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.measuring.server import Server, serve

# Pictures, how many blocks of requests about one in each mode, and of how many: long ones, as the first
# requests after another server's turn find none of a process's code in the caches. A model as small as this
# one still takes seconds for the largest.
SIZES = {(336, 336): (6, 32), (1280, 720): (5, 16), (3840, 2160): (2, 2)}
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12845056}  # Qwen2.5-VL's limits of a picture
OUTPUT_TOKENS = 16
SETTLED_S = 0.05  # after the last token, until the API process has nothing left to do for it
CROP = {"method": "plc+ilp", "eviction_layers": [1]}  # what the server is prepared for
RATE = 0.5
REGION = [0.375, 0.375, 0.625, 0.625]
CONTROL = "stock again"
MODES: dict[str, Mapping[str, Any]] = {
    "no region": {},
    "off": {"method": "off"},
    "plc": {"method": "plc", "regions": [REGION], "pruning_rate": RATE},
    "ilp": {"method": "ilp", "regions": [REGION], "pruning_rate": RATE},
    "plc+ilp": {"method": "plc+ilp", "regions": [REGION], "pruning_rate": RATE},
}
SERVED = (
    *("--served-model-name", "m", "--dtype", "float32", "--load-format", "dummy", "--enforce-eager"),
    *("--max-model-len", "20000", "--max-num-batched-tokens", "16384", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--skip-mm-profiling", "--max-num-seqs", "4"),
)


@dataclass(frozen=True)
class ApiTimes:
    """CPU milliseconds of a request for pictures of one size, by mode.

    Attributes:
        block: how many requests each number is the mean of.
        pairs_ms: each block beside its neighbour on stock vLLM.
    """

    size: tuple[int, int]
    block: int
    pairs_ms: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def stock_ms(self) -> list[float]:
        """Of all blocks on stock vLLM, the first of the two."""
        return [stock for stock, _ in self.pairs_ms[CONTROL]]

    def added(self, mode: str) -> list[float]:
        """What each block of a mode took beyond its neighbour, as a share, ascending."""
        return sorted(other / stock - 1 for stock, other in self.pairs_ms[mode])


def measure_api_cpu(sizes: Mapping[tuple[int, int], tuple[int, int]] = SIZES) -> Iterator[ApiTimes]:
    """Ask about a new picture each time, in every mode in turn.

    Args:
        sizes: of pictures, width and height; for each how many blocks of requests, and of how many.

    Raises:
        ServerError: a server did not start.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        model = str(make_checkpoint(folder / "model"))
        plugin = ("--plugin", "crop", "--crop-config", json.dumps(CROP))
        without = {"VLLM_PLUGINS": ""}
        stock = servers.enter_context(serve(model, *SERVED, log_path=folder / "stock.log", env=without))
        again = servers.enter_context(serve(model, *SERVED, log_path=folder / "again.log", env=without))
        ours = servers.enter_context(serve(model, *SERVED, *plugin, log_path=folder / "crop.log"))
        for size, (blocks, block) in sizes.items():
            pairs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in (CONTROL, *MODES)}
            seeds, random = count(), Random(0)
            for run in range(-1, blocks):  # one to warm up
                for mode, crop in MODES.items():
                    # In turn, or the server asked less often would have forgotten more: of memory, caches.
                    asked = deque([(stock, None), (again, None), (ours, crop)])
                    asked.rotate(run)
                    if run % 2:  # each is before and behind each
                        asked.reverse()
                    took = {}
                    for server, wanted in asked:
                        requests = [
                            (new_picture(size, next(seeds)), wanted and elsewhere(wanted, random))
                            for _ in range(block)
                        ]
                        took[server.base_url] = _ask_ms(server, requests)
                    if run >= 0:
                        base, control, other = (took[one.base_url] for one in (stock, again, ours))
                        pairs[CONTROL].append((base, control))
                        pairs[mode].append((base, other))
            yield ApiTimes(size, block, pairs)


def api_cpu_table(one: ApiTimes) -> Table:
    """A row per mode."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        caption=f"Blocks of {one.block} requests in a row; {len(one.pairs_ms[CONTROL])} of stock.",
    )
    for title in ("picture", "request"):
        table.add_column(title, no_wrap=True)
    for title in ("CPU ms\nmedian", "min", "max", "added\nmedian", "quartiles"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = {"stock": one.stock_ms} | {
        mode: [other for _, other in pairs] for mode, pairs in one.pairs_ms.items()
    }
    for mode, times in rows.items():
        numbers = [f"{value:.1f}" for value in (median(times), min(times), max(times))]
        more = ("", "")
        if mode in one.pairs_ms:
            added = one.added(mode)
            low, high = added[len(added) // 4], added[-1 - len(added) // 4]
            more = (f"{median(added):+.1%}", f"{low:+.1%} to {high:+.1%}")
        table.add_row("" if mode in one.pairs_ms else "{}x{}".format(*one.size), mode, *numbers, *more)
    return table


def make_checkpoint(folder: Path) -> Path:
    """A tiny Qwen2.5-VL whose pictures may be as large as the published one's; it sees windows only."""
    from vllm_crop.benchmarking import dummy_qwen2_5_vl
    from vllm_crop.benchmarking.dummy_llava import DummySize

    dummy_qwen2_5_vl.make_checkpoint(folder, DummySize(layers=4, max_positions=40_000))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["vision_config"]["fullatt_block_indexes"] = []
    config_path.write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            settings = json.loads(path.read_text())
            settings.get("image_processor", settings)["size"] = PUBLISHED_PIXELS
            path.write_text(json.dumps(settings))
    return folder


def elsewhere(crop: Mapping[str, Any], random: Random) -> Mapping[str, Any]:
    """The same with a region of its size anywhere: plans of one that was seen before are remembered."""
    if "regions" not in crop:
        return crop
    x0, y0, x1, y1 = REGION
    left, top = random.uniform(0, 1 + x0 - x1), random.uniform(0, 1 + y0 - y1)
    return {**crop, "regions": [[left, top, left + x1 - x0, top + y1 - y0]]}


def new_picture(size: tuple[int, int], seed: int) -> str:
    """A JPEG as the data URL of a request."""
    picture = Image.effect_mandelbrot(size, (-2.0, -1.0, 1.0, 1.0), 100).convert("RGB")
    for place in range(4):  # in steps that JPEG keeps: no two are the same
        digit = seed >> 4 * place & 15
        picture.paste((16 * digit,) * 3, (16 * place, 0, 16 * place + 16, 16))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _ask_ms(server: Server, requests: Sequence[tuple[str, Mapping[str, Any] | None]]) -> float:
    """CPU milliseconds of the API process for a streamed answer, mean of some requests."""
    before = cpu_ms(server.process_id)
    for url, crop in requests:
        ask(server, url, crop, OUTPUT_TOKENS)
    time.sleep(SETTLED_S)
    return (cpu_ms(server.process_id) - before) / len(requests)


def ask(server: Server, url: str, crop: Mapping[str, Any] | None, max_tokens: int) -> None:
    """Wait for a streamed answer about a picture; `crop` is None for a server without the plugin."""
    import openai

    content: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is written on the sign?"},
    ]
    body = {"ignore_eos": True} if crop is None else {"ignore_eos": True, "crop": dict(crop)}
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0) as client:
        for _ in client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body=body,
        ):
            pass


def cpu_ms(process_id: int) -> float:
    """CPU milliseconds that all threads of a process have run; 0 of one that has ended."""
    spent = 0
    for thread in Path(f"/proc/{process_id}/task").glob("*/schedstat"):
        with suppress(OSError):  # ended meanwhile
            spent += int(thread.read_text().split()[0])
    return spent / 1e6
