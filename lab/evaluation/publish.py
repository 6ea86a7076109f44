# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.publish`: a finished evaluation into git, and its tables into README."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from lab.evaluation.headline import equal_cost, same_tokens
from lab.evaluation.published_answers import NAME as ANSWERS
from lab.evaluation.report import Report
from lab.evaluation.tuned import TUNING

PUBLISHED = TUNING.parent
FILES = ("README.md", "results.json", "curves.png", ANSWERS)


def publish(
    folder: Annotated[Path, typer.Option(help="Where the evaluation wrote.")] = Path("build/eval"),
    results: Annotated[Path, typer.Option(help="Where results are kept.")] = PUBLISHED,
    readme: Annotated[Path, typer.Option(help="Whose tables are made anew.")] = Path("README.md"),
) -> None:
    """Copy what people read, and write README's tables anew."""
    for name in FILES:
        shutil.copyfile(folder / name, results / name)
    text = readme.read_text(encoding="utf-8")
    readme.write_text(with_tables(text, tables_of(results)), encoding="utf-8")
    typer.echo(f"wrote {results} and the tables of {readme}")


def tables_of(results: Path) -> dict[str, str]:
    """README's tables by their marks."""
    report = TypeAdapter(Report).validate_json((results / "results.json").read_text())
    return {"equal cost": equal_cost(report), "same tokens": same_tokens(report)}


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A text with its tables replaced, each between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: there is no place for one.
    """
    for name, table in tables.items():
        place = re.compile(f"(<!-- {name} -->\n\n).*?(\n\n<!-- end of {name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for the table {name!r}: <!-- {name} --> ... <!-- end of {name} -->")
        text = place.sub(lambda found, made=table: found[1] + made + found[2], text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    typer.run(publish)
