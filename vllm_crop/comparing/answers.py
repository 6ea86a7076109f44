# SPDX-License-Identifier: Apache-2.0
"""Answers without what does not matter in them. Pure: no server is asked, no model judges."""

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(answer: str) -> str:
    """An answer without what does not matter: case, punctuation, white space, English articles.

    A sign that stands between two digits stays (1.5 is not 15), and so does one that is all there is.
    """
    text = unicodedata.normalize("NFKC", answer).casefold()
    kept = [
        char if _counts(text, at) else " " if unicodedata.category(char)[0] in "PZC" else char
        for at, char in enumerate(text)
    ]
    plain = "".join(kept)
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split()) or " ".join(text.split())


def _counts(text: str, at: int) -> bool:
    """Whether the sign at a place is part of a number: between two digits, or a minus before one."""
    char, after = text[at], text[at + 1 : at + 2]
    before = text[at - 1] if at else ""
    if char in ".,:/-" and before.isdigit() and after.isdigit():
        return True
    return char in "-\u2212" and after.isdigit() and not before.isalnum()


def is_same(one: str, other: str) -> bool:
    """Whether two answers are equal once normalised."""
    return normalise(one) == normalise(other)


def is_right(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of those that are right, once normalised."""
    return normalise(answer) in {normalise(right) for right in answers}
