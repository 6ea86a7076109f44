# SPDX-License-Identifier: Apache-2.0
"""The most memory that the API process takes while huge pictures come in, stock and with the plugin.

Each server in turn gets the same requests, a picture each that nobody has sent before, several in flight.
Linux keeps the peak of what a process has in memory, and begins anew when told to.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.benchmarking.api_cpu import REGION, SERVED, ask, make_checkpoint, new_picture
from vllm_crop.measuring.server import Server, serve

SIZE, NUM_PICTURES, IN_FLIGHT = (5472, 3648), 20, 4  # of 20 megapixels
WARM_UPS = 2
RATE = 0.889
SERVERS: Mapping[str, Mapping[str, Any] | None] = {
    "stock": None,
    "pool": {"compression": "pool"},
    "foveate": {"compression": "foveate"},
}


@dataclass(frozen=True)
class ApiMemory:
    """MiB that the API process had in memory, before the pictures came and at most while they did."""

    server: str
    before: float
    peak: float


def measure_api_memory(
    size: tuple[int, int] = SIZE, num_pictures: int = NUM_PICTURES, in_flight: int = IN_FLIGHT
) -> Iterator[ApiMemory]:
    """Send `num_pictures` to one server after another.

    Raises:
        ServerError: one did not start.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(make_checkpoint(folder / "model"))
        for called, crop in SERVERS.items():
            plugin = () if crop is None else ("--plugin", "crop", "--crop-config", json.dumps(crop))
            env = {"VLLM_PLUGINS": ""} if crop is None else {}
            log = folder / f"{called}.log"
            with serve(model, *SERVED, *plugin, log_path=log, env=env) as server:
                asked = None if crop is None else {"regions": [REGION], "pruning_rate": RATE}
                for seed in range(WARM_UPS):
                    _ask_new(server, asked, (336, 336), seed)
                # Anew: loading takes more than serving.
                Path(f"/proc/{server.process_id}/clear_refs").write_text("5")
                before = _mib(server, "VmRSS")
                with ThreadPoolExecutor(in_flight) as clients:
                    seeds = range(WARM_UPS, WARM_UPS + num_pictures)
                    list(clients.map(partial(_ask_new, server, asked, size), seeds))
                yield ApiMemory(called, before, _mib(server, "VmHWM"))


def api_memory_table(measured: Sequence[ApiMemory]) -> Table:
    """A row per server."""
    title = "{} pictures of {}x{}, {} in flight".format(NUM_PICTURES, *SIZE, IN_FLIGHT)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1), title=title)
    table.add_column("API process, MiB")
    for heading in ("before", "peak", "of stock's"):
        table.add_column(heading, justify="right")
    stock = measured[0].peak
    for one in measured:
        table.add_row(one.server, f"{one.before:.0f}", f"{one.peak:.0f}", f"{one.peak / stock:.2f}x")
    return table


def _ask_new(server: Server, crop: Mapping[str, Any] | None, size: tuple[int, int], seed: int) -> None:
    ask(server, new_picture(size, seed), crop, max_tokens=1)


def _mib(server: Server, counter: str) -> float:
    """A counter of /proc/PID/status, which are in KiB."""
    status = Path(f"/proc/{server.process_id}/status").read_text()
    return int(status.split(f"{counter}:")[1].split()[0]) / 1024
