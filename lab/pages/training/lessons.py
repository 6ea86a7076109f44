# SPDX-License-Identifier: Apache-2.0
"""What is asked in training beside the questions of tests: to read on, and to read a row."""

import random
from collections.abc import Sequence

from lab.pages.asking import FAMILIES, ask
from lab.pages.browser import Letter, Page

ON, ROW = "on", "row"
_TRIES = 8
_BEFORE, _AFTER = 2, 4  # words


def teach(page: Page, words: Sequence[str], family: str, chance: random.Random) -> tuple[str, str] | None:
    """A question and its answer, None where the page has none; `words`: those of the page."""
    if family == ON:
        return _read_on(words, chance)
    if family == ROW:
        return _read_row(page, chance)
    question = ask(page, family, chance)
    return None if question is None else (question.text, question.answer)


LESSONS = (*FAMILIES, ON, ROW)


def _read_on(words: Sequence[str], chance: random.Random) -> tuple[str, str] | None:
    """What follows two words that occur once."""
    for _ in range(_TRIES):
        if len(words) <= _BEFORE + 1:
            return None
        start = chance.randrange(len(words) - _BEFORE)
        said = words[start : start + _BEFORE]
        if sum(words[at : at + _BEFORE] == said for at in range(len(words))) == 1:
            return f"continue {' '.join(said)}", " ".join(words[start + _BEFORE :][:_AFTER])
    return None


def _read_row(page: Page, chance: random.Random) -> tuple[str, str] | None:
    """All values of a row of a table that has no twin."""
    if len(page.document.sheets) > 1:
        return None
    name, values = chance.choice(page.document.sheets[0].rows)
    return f"read {name.lower()}", " ".join(values).lower()


def words_of(letters: Sequence[Letter]) -> list[str]:
    """The words of a page in small letters, in the order of the document."""
    words: list[str] = []
    for each in letters:
        if each.begins:
            words.append("")
        if words:
            words[-1] += each.letter.lower()
    return words
