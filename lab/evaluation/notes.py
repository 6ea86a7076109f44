# SPDX-License-Identifier: Apache-2.0
"""What a reader must know to read the table. Notes belong to a result and are kept in it."""

from lab.evaluation.questions import Split
from lab.evaluation.tuned import Tuning

_READING = (
    "Exact match of the whole answer. In brackets: 95 % intervals, Wilson for accuracy, paired for retention "
    "(accuracy as a share of the unpruned model's on the same questions) and for margins. Every answer is in "
    "answers.jsonl.gz.",
    "local: read, relation and compare, which can be answered from a region. all: with search and count, "
    "whose honest region is the whole image; where a source says so, the image is served unpruned, and its "
    "tokens count. The same router in front of any other method would give it those answers too.",
    "Tokens are visual tokens of the answering pass, averaged over decoder layers and questions. Where the "
    "model finds the region itself, tokens with localizer add those of that pass through all layers, and the "
    "localizer's steps are what it says, token by token; the question, which it reads once more, is in "
    "neither. Compare such a row with others at as many tokens. KV tokens count the whole prompt of the "
    "answering pass.",
    "Prefill work is on paper: multiply-adds of the language model over prompt and image before it begins to "
    "answer, as a share of the unpruned prompt's, for local and for all questions. The localizer's pass is "
    "in it where it was asked, with its question and its words. Not in it are the vision tower, which the "
    "localizer's thumbnail passes once more (about 0.09x of the unpruned prompt's work), and what a method "
    "takes to choose (CoViPAL's module about 0.05x).",
    "CROP plc, whole, uses no region: the image is pooled evenly. It and the even grid of tokens are the "
    "first to compare with at the same tokens.",
)
_SCENES = (
    "Scenes are aligned with the localizer's grid and, at 0.889, with the pools: a thing fills a cell of "
    "both. Cells of equal tokens are kind to pooling and to keeping every third token; the smallest error "
    "of a region misses all of a thing.",
    "In its last phase of training the checkpoint saw pictures with fewer tokens: half of them as CROP plc "
    "leaves them with the true region, half with all of the true region and a random part of the rest. Other "
    "sizes (iso-token resize) and two images (thumb + crop) it has never seen: the first is no valid "
    "control, the second untrained.",
)
_TIMES = (
    "TTFT is of the engine, one request at a time with the true region, median of 8 rounds in which every "
    "condition has its turn, in brackets as a share of the unpruned model's in the same round. The "
    "localizer's own request is in none of them. Rivals and controls that plain transformers run have none.",
    "What these numbers show and what they do not: docs/accuracy.md in the repository.",
)
_SPLITS: dict[Split, str] = {
    "test": "The questions are of the test split, on which nothing was chosen.",
    "dev": "The questions are of the dev split, on which rivals are tuned: what they get here is too much.",
    "seen": "The questions are those of earlier results and were looked at while the checkpoint was trained.",
}


def notes_of(split: Split, tuning: Tuning | None) -> tuple[str, ...]:
    """The notes of a result."""
    return (*_READING, _rivals(tuning), _SPLITS[split], *_SCENES, *_TIMES)


def _rivals(tuning: Tuning | None) -> str:
    faithful = (
        "Rivals are implemented here; each file in lab/evaluation/rivals says how it departs from them. "
    )
    ours = " Neighbour novelty, and DivPrune followed by attention, are baselines of our own."
    if tuning is None:
        return f"{faithful}Each ran in the first of its configurations that meets the rate, untuned.{ours}"
    counts = [tuning.number_tried(one.method, one.pruning_rate) for one in tuning.methods]
    asked, split = tuning.provenance["asked"], tuning.provenance["settings"]["split"]
    return (
        f"{faithful}Each ran in the configuration that answered most of {asked} local questions of the "
        f"{split} split, of up to {max(counts, default=1)} at a rate; VTW's layer is that of its own "
        f"rule.{ours}"
    )
