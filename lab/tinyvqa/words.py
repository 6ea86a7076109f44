# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: byte-level, so that any text can be written, with a token for each word of the scenes."""

from collections.abc import Iterator, Sequence
from typing import Any

from lab.tinyvqa.scenes import COLOURS, SHAPES
from vllm_crop.localizers.dialects import WHOLE

START, END = "<|im_start|>", "<|im_end|>"
ANSWER = "<|answer|>"  # between a question and its answer
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    *("<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SPECIAL_TOKENS = (START, END, ANSWER, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, "<|pad|>")
VOCAB_SIZE = 448  # a multiple of 64
PADDED_IDS = 32
MAX_POSITIONS = 8192
LOCATE = "where:"  # before a question: where to look for the answer

# The model was trained on an image and one question, in this order. More turns are written the same way.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|answer|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>"
    "{% else %}<|im_start|>"
    "{% if message['content'] is string %}{{ message['content'] | lower }}{% else %}"
    "{% for part in message['content'] if part['type'] != 'text' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | lower }}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def _sentences() -> Iterator[str]:
    colours, shapes = " ".join(COLOURS), " ".join(SHAPES)
    yield from (f"x {colours} {shapes}", f"{WHOLE} none", LOCATE)
    yield from (*COLOURS, *SHAPES)  # as an answer begins
    yield "what number is on the x? what number is left of right of above below the x?"
    yield "which number is larger, on the x or the x? what colour has the number? what shape has the number?"
    yield "how many x shapes? how many circles? how many squares? how many triangles? how many crosses?"


def make_tokenizer() -> Any:
    """A transformers tokenizer; each word is one token, with and without the space before it as it occurs."""
    return learn_tokenizer([*_sentences()] * 2, VOCAB_SIZE - PADDED_IDS)


def learn_tokenizer(sentences: Sequence[str], num_ids: int) -> Any:
    """A transformers tokenizer of pairs of bytes learned from sentences; digits one by one.

    Args:
        num_ids: at most so many tokens, special ones among them.
    """
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
        vocab_size=num_ids,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )
