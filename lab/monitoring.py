# SPDX-License-Identifier: Apache-2.0
"""The dashboard with real data: a real Prometheus scrapes a real server while it is asked.

    python -m lab.monitoring --minutes 3

Needs `prometheus` on the PATH (Debian: apt-get install prometheus). Grafana draws the same queries.
"""

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.progress import Progress

from lab.demo.setting import LOCALIZER, PRUNING_RATE
from lab.tinyvqa.drawing import draw_scene
from lab.tinyvqa.questions import ask
from lab.tinyvqa.scenes import make_scene, test_seed
from vllm_crop.client import CropClient
from vllm_crop.measuring.server import HOST, free_port, get_text, serve, wait_until_ready

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "lab" / "checkpoints" / "tinyvqa"
DASHBOARD = ROOT / "deploy" / "grafana" / "vllm-crop.json"
RULES = ROOT / "deploy" / "prometheus" / "vllm-crop.rules.yml"
READY_S = 30.0
_SERVER = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", "512M", "--plugin", "crop", "--crop-config"),
    json.dumps({"pruning_rate": PRUNING_RATE, "localizer": LOCALIZER, "shadow": {"rate": 0.3}}),
)


@dataclass(frozen=True)
class Prometheus:
    """One that runs; `base_url` is without a path."""

    base_url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of its API.

        Raises:
            OSError: it refuses, as for an expression that is none.
        """
        return json.loads(get_text(f"{self.base_url}/api/v1/{path}?{urlencode(parameters)}"))["data"]

    def wait_for(self, expression: str, timeout_s: float = READY_S) -> None:
        """Wait until an expression has a value.

        Raises:
            TimeoutError: it has none.
        """
        deadline = time.monotonic() + timeout_s
        while not self.get("query", query=expression)["result"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} has no value after {timeout_s:.0f} s")
            time.sleep(0.5)


@contextmanager
def scraping(base_urls: Sequence[str], folder: Path, interval: str = "1s") -> Iterator[Prometheus]:
    """Run Prometheus with our rules on servers' /metrics until the block ends.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    targets = [url.removeprefix("http://") for url in base_urls]
    settings = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML too
    port, log_path = free_port(), folder / "prometheus.log"
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={HOST}:{port}"),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            running = Prometheus(f"http://{HOST}:{port}")
            wait_until_ready(process, "Prometheus", f"{running.base_url}/-/ready", log_path)
            yield running
        finally:
            process.terminate()
            process.wait()


def panels() -> list[dict[str, Any]]:
    """The dashboard's, rows (which have no queries) included."""
    return list(json.loads(DASHBOARD.read_text())["panels"])


def as_query(expression: str, interval: str) -> str:
    """An expression of the dashboard with Grafana's variables filled in."""
    return expression.replace("$model", ".*").replace("$__rate_interval", interval)


def keep_asking(base_url: str, seconds: float, console: Console) -> None:
    """Ask about scenes, some twice, some with a region, some with a bound."""
    client, chance, end = CropClient(f"{base_url}/v1"), random.Random(0), time.monotonic() + seconds
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("asking", total=seconds)
        while (left := end - time.monotonic()) > 0:
            scene = make_scene(test_seed(11, chance.randrange(200)))
            question = ask(scene, chance.choice(["read", "relation", "compare"]), chance)
            if question is not None:
                own = {"regions": [question.region(scene.side).as_lists()]}
                crop: Any = chance.choice([None, None, None, own, {"max_tokens": 96}, {"method": "off"}])
                client.ask(draw_scene(scene), question.text, crop, max_tokens=4)
            progress.update(task, completed=seconds - left)


def draw(prometheus: Prometheus, start: float, end: float, output: Path) -> None:
    """Plot every panel where the dashboard has it, over seconds since `start`."""
    from matplotlib import pyplot as plt

    columns, height = 24, max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels())
    figure = plt.figure(figsize=(16, height * 0.42))
    for panel in panels():
        place = panel["gridPos"]
        left, bottom = place["x"] / columns, 1 - (place["y"] + place["h"]) / height
        if not panel.get("targets"):
            figure.text(left + 0.01, bottom + 0.4 / height, panel["title"], fontsize=14, weight="bold")
            continue
        axes = figure.add_axes(
            (left + 0.03, bottom + 1.3 / height, place["w"] / columns - 0.045, (place["h"] - 2.9) / height)
        )
        for target in panel["targets"]:
            found = prometheus.get(
                "query_range", query=as_query(target["expr"], "30s"), start=start, end=end, step=2
            )
            for series in found["result"]:
                points = [(float(at) - start, float(value)) for at, value in series["values"]]
                if len(found["result"]) > 1 and not any(value for _, value in points):
                    continue  # an outcome that has not come up
                axes.plot(*zip(*points, strict=True), label=_legend(target, series["metric"]))
        axes.set_title(panel["title"], fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, loc="best")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=70)


def _legend(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    text = str(target.get("legendFormat") or target["expr"][:30])
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="How long the server is asked.")] = 3.0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the picture.")] = ROOT
    / "deploy"
    / "compose"
    / "dashboard.png",
) -> None:
    """Draw the dashboard of a server of the repository's model."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serve(str(CHECKPOINT), *_SERVER, log_path=folder / "server.log") as server,
            scraping([server.base_url], folder) as prometheus,
        ):
            start = time.time()
            keep_asking(server.base_url, 60 * minutes, console)
            draw(prometheus, start, time.time(), output)
    console.print(f"{output}: {minutes:g} minutes of a server of {CHECKPOINT.name}")


if __name__ == "__main__":
    typer.run(main)
