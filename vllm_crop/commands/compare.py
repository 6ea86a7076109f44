# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop compare`: your own questions, answered with pruning and without."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from vllm_crop.errors import CropError

DEFAULT_TIMEOUT_S = 300.0


def compare(
    base_url: Annotated[
        str,
        typer.Option(help="The server, such as http://localhost:8000/v1; its key from OPENAI_API_KEY."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="A JSONL file of questions or of chat requests, or a folder of pictures with --question.",
        ),
    ],
    question: Annotated[str | None, typer.Option(help="What to ask about every picture of a folder.")] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0, max=0.999, help="A pruning rate; repeat it for several. Left out: the server's."),
    ] = None,
    method: Annotated[
        Literal["plc", "ilp", "plc+ilp"] | None,
        typer.Option(help="How pruned requests are pruned. The server's if left out."),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(help="Ask unpruned twice: how much answers and times differ by themselves."),
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many questions at most.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of a random sample, if --limit leaves questions out. The first if left out."),
    ] = None,
    metric: Annotated[
        Literal["exact", "vqa", "anls", "relaxed", "iou"],
        typer.Option(
            help="How answers are scored where a line names no metric of its own: normalised and equal; "
            "by annotators that agree, as VQA; by edit distance, as DocVQA; numbers within 5 %, as "
            "ChartQA; boxes by overlap."
        ),
    ] = "exact",
    split: Annotated[
        str | None,
        typer.Option(help='Ask only lines that say so: --split dev takes those with "split": "dev".'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 64,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions at once; more than one, and times are of a loaded server.")
    ] = 1,
    model: Annotated[str | None, typer.Option(help="The server's first if left out.")] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until a request counts as failed.")
    ] = DEFAULT_TIMEOUT_S,
    max_cards: Annotated[
        int, typer.Option(min=0, help="Questions shown on the page, of those whose answers differ.")
    ] = 100,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for index.html and result.json.")] = Path(
        "build/compare"
    ),
) -> None:
    """Ask a server your own questions unpruned and pruned: do answers stay the same, what is saved?

    Needs no right answers, and uses those that are there. Pictures are sent as they are.

    \b
    A line of the file is a question or a logged chat request:
      {"image": "photos/1.jpg", "question": "What does the sign say?", "answer": "stop"}
      {"image": "https://...", "question": "...", "regions": [[0.5, 0.1, 0.8, 0.4]], "id": "q7"}
      {"image": "1.png", "question": "...", "answers": ["12 %"], "metric": "relaxed", "split": "test",
       "boxes": [[0.1, 0.2, 0.3, 0.25]], "family": "tables", "group": "report 3"}
      {"messages": [{"role": "user", "content": [{"type": "image_url", ...}, {"type": "text", ...}]}]}
    \b
    Two rates, a hundred questions at random:
      vllm-crop compare --base-url http://localhost:8000/v1 --data questions.jsonl \\
        --rate 0.667 --rate 0.889 --limit 100 --seed 0
    """
    if find_spec("openai") is None:
        typer.echo(
            "vllm-crop compare asks a server, for which a package is missing: "
            "pip install 'vllm-crop[openai]'",
            err=True,
        )
        raise typer.Exit(1)
    # Late, as all of the comparison: the other commands start without it.
    from vllm_crop.client import CropClient
    from vllm_crop.comparing import run
    from vllm_crop.comparing.conditions import make_conditions
    from vllm_crop.comparing.page import write_page
    from vllm_crop.comparing.reading import read_data
    from vllm_crop.comparing.report import make_report, print_report, write_json
    from vllm_crop.measuring.provenance import provenance

    console = Console(highlight=False)
    origin, conditions = provenance(), make_conditions(rate or [], method, control)
    client = CropClient(base_url, model, timeout=timeout)
    try:
        read = read_data(data, question, limit, seed, metric, split)
        setup = run.look_at_server(client, base_url, conditions)
    except CropError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    outcome = run.compare(
        client, setup, conditions, read.questions, max_tokens, concurrency, seed or 0, console
    )
    setting = {
        "data": str(data),
        "question": question,
        "metric": metric,
        "split": split,
        "conditions": {one.name: dict(one.crop) for one in conditions},
        "max_tokens": max_tokens,
        "temperature": 0,
        "concurrency": concurrency,
        "limit": limit,
        "seed": seed,
        "timeout_s": timeout,
    }
    report = make_report(outcome, read, setting, origin)
    write_json(out / "result.json", report)
    write_page(out / "index.html", report, max_cards)
    print_report(console, report)
    for what, path in (("Answers side by side", out / "index.html"), ("Every number", out / "result.json")):
        console.print(f"{what}: {path}", markup=False, soft_wrap=True)
    if outcome.stopped:
        raise typer.Exit(130)
    if not any(one.compared for one in report.summaries):
        console.print("Not one question was answered.", style="red")
        raise typer.Exit(1)
