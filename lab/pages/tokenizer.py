# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: byte-level pairs learned from the words of pages; digits one by one."""

from typing import Any

from lab.pages.documents import texts
from lab.tinyvqa.words import CHAT_TEMPLATE, END, SPECIAL_TOKENS

VOCAB_SIZE = 1536
PADDED_IDS = 32
MAX_POSITIONS = 8192


def make_tokenizer() -> Any:
    """A transformers tokenizer; common words are one token, others some."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - PADDED_IDS,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [word.lower() for word in texts()]
    asked = "what is the of in which has the higher or does stand for how many have the highest read continue"
    tokenizer.train_from_iterator([*(f"x {word}" for word in words), *([f"x {asked}"] * 20)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )
