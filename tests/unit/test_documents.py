# SPDX-License-Identifier: Apache-2.0
"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    *sorted((ROOT / "docker").rglob("*.md")),
    *sorted((ROOT / "lab").rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)", document.read_text()):
        found = document.parent / target if target else document
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor[1:] in headings(found), f"{target}{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(
        r"`((?:vllm_crop|server|lab|tests|docs|deploy|docker)/[\w./-]*\w)`", document.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_documents() -> None:
    assert len(DOCUMENTS) > 8
