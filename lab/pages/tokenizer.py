# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: byte-level pairs learned from the words of pages; digits one by one."""

from typing import Any

from lab.pages.documents import texts
from lab.tinyvqa.words import learn_tokenizer

VOCAB_SIZE = 1536
PADDED_IDS = 32
_ASKED = "what is the of in which has the higher or does stand for how many have the highest read continue"


def make_tokenizer() -> Any:
    """A transformers tokenizer; common words are one token, others some."""
    sentences = [*(f"x {word.lower()}" for word in texts()), *([f"x {_ASKED}"] * 20)]
    return learn_tokenizer(sentences, VOCAB_SIZE - PADDED_IDS)
