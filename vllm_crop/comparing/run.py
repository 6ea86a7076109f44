# SPDX-License-Identifier: Apache-2.0
"""A whole comparison: is the server one that prunes as asked, then all questions, until done or stopped."""

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urljoin

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_crop.client import CropClient
from vllm_crop.comparing.asking import Asked, Asker, SeenPictures, Stopped, served_as
from vllm_crop.comparing.conditions import Condition
from vllm_crop.comparing.questions import Question
from vllm_crop.errors import CropError
from vllm_crop.planning.geometry import Region


class ServerRefusalError(CropError):
    """The server cannot be asked like this; the message says what to change."""


@dataclass(frozen=True)
class ServerSetup:
    """The server that is asked.

    Attributes:
        served: per condition how it says that it prunes.
        vllm_version: None where it does not tell.
    """

    base_url: str
    model: str
    root: str | None
    vllm_version: str | None
    served: dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What became of the questions.

    Attributes:
        num_questions: that were to be asked.
        stopped: whether that was ended early; questions that were being asked then are not counted.
    """

    setup: ServerSetup
    conditions: tuple[Condition, ...]
    num_questions: int
    asked: list[Asked] = field(default_factory=list)
    stopped: bool = False


def look_at_server(client: CropClient, base_url: str, conditions: Sequence[Condition]) -> ServerSetup:
    """Ask about a grey picture under every condition: that warms up, and tells what would be refused.

    Raises:
        ServerRefusalError: the server is not there, does not prune, or refuses a rate or method.
    """
    import openai

    try:
        served = client.openai.models.list().data
        model = client.model
    except (openai.OpenAIError, IndexError) as error:
        raise ServerRefusalError(
            f"{base_url} does not answer as an OpenAI-compatible server ({error}): is it up, does the "
            "address end in /v1, is the key in OPENAI_API_KEY?"
        ) from None
    picture, pruned = Image.new("RGB", (448, 448), (128, 128, 128)), {}
    for condition in conditions:
        crop = condition.field_for({"regions": [Region.whole().as_lists()]})
        try:
            answer = client.ask(picture, "What is shown?", crop, max_tokens=2)
        except openai.APIStatusError as error:
            raise ServerRefusalError(f"{base_url} refuses {condition.name!r}: {error.message}") from None
        except openai.OpenAIError as error:
            raise ServerRefusalError(f"{base_url} cannot be asked: {error}") from None
        if not answer.facts:
            raise ServerRefusalError(f"{base_url} does not prune: start it with vllm serve ... --plugin crop")
        pruned[condition.name] = served_as(answer.facts)
    root = next((getattr(one, "root", None) for one in served if one.id == model), None)
    return ServerSetup(base_url, model, root, _vllm_version(client, base_url), pruned)


def compare(
    client: CropClient,
    setup: ServerSetup,
    conditions: Sequence[Condition],
    questions: Sequence[Question],
    max_tokens: int,
    concurrency: int,
    seed: int,
    console: Console,
) -> Outcome:
    """Ask everything; Ctrl-C ends it after the requests in flight, and what is there is returned."""
    stop = threading.Event()
    run = secrets.token_hex(4)
    asker = Asker(client, conditions, max_tokens, run, seed, SeenPictures(), stop.is_set)
    outcome = Outcome(setup, tuple(conditions), len(questions))
    done: dict[int, Asked] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        task = progress.add_task("asking", total=len(questions))
        waiting = iter(enumerate(questions))
        running: dict[Future[Asked], int] = {}
        try:
            while True:
                # As many as are asked at once: a longer queue would have to be emptied on Ctrl-C.
                for index, question in islice(waiting, concurrency - len(running)):
                    running[pool.submit(asker.ask, question, index)] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done[running.pop(future)] = future.result()
                    progress.advance(task)
        except KeyboardInterrupt:
            outcome.stopped = True
            progress.update(task, description="stopping")
        finally:
            stop.set()
            for future, index in running.items():
                with suppress(Stopped):
                    done[index] = future.result()
    outcome.asked = [done[index] for index in sorted(done)]
    return outcome


def _vllm_version(client: CropClient, base_url: str) -> str | None:
    import openai

    try:
        told = client.openai.get(urljoin(base_url, "/version"), cast_to=object)
        return str(told["version"])
    except (openai.OpenAIError, KeyError, TypeError, ValueError):
        return None
