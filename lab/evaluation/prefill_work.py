# SPDX-License-Identifier: Apache-2.0
"""The language model's work on paper, the localizer's pass included, as a share of the unpruned prompt's.

Answers say how many visual tokens they took on average over layers. That is enough for all that grows with
them evenly, but attention among a prompt's tokens grows with their square: where a method lets tokens leave
inside the model, its stages say how the average came about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

from lab.evaluation.asking import Answer
from lab.evaluation.conditions import CROP_METHODS, Condition
from vllm_crop.benchmarking.prefill import ModelShape, prefill_flops
from vllm_crop.planning.budget import Method, method_evicts, retained_per_stage


@dataclass(frozen=True)
class PrefillWork:
    """Counts multiply-adds; see `prefill_flops` for what they are.

    No vision tower is in them, neither the picture's pass nor the localizer's view's.

    Attributes:
        eviction_layers: of CROP's ilp and plc+ilp.
    """

    shape: ModelShape
    eviction_layers: tuple[int, ...]

    def of_answer(self, condition: Condition, answer: Answer, full: Answer) -> float:
        """Of a prompt; `full` answers the same question unpruned."""
        text = answer.kv_tokens - answer.visual_tokens
        counts = self.layer_counts(condition, answer.visual_tokens, round(full.visual_tokens))
        return prefill_flops(self.shape, (count + text for count in counts))

    def of_localizing(self, located: Answer) -> float:
        """Of a prompt that asks where to look, and of every token that is said: each sees all before it."""
        layers, hidden = self.shape.layers, self.shape.hidden
        said = prefill_flops(self.shape, [1.0] * layers) + 2 * located.prompt_tokens * hidden * layers
        prompt = prefill_flops(self.shape, [float(located.prompt_tokens)] * layers)
        # The first token comes with the prompt.
        return prompt + max(0, (located.steps or 1) - 1) * said

    def layer_counts(self, condition: Condition, average: float, num_tokens: int) -> list[float]:
        """Visual tokens of every layer.

        Args:
            average: of them.
            num_tokens: of the unpruned image.
        """
        layers = self.shape.layers
        if average == num_tokens:
            return [average] * layers
        later = _stages(condition, num_tokens, layers, self.eviction_layers)
        if not later:
            return [average] * layers
        bounds = [*later, layers]
        widths = [end - start for start, end in zip(later, bounds[1:], strict=True)]
        taken = sum(width * count for width, count in zip(widths, later.values(), strict=True))
        counts = [(average * layers - taken) / bounds[0]] * bounds[0]
        for width, count in zip(widths, later.values(), strict=True):
            counts += [float(count)] * width
        return counts


@cache
def _stages(
    condition: Condition, num_tokens: int, layers: int, eviction_layers: tuple[int, ...]
) -> Mapping[int, int]:
    """Visual tokens from each layer on at which some leave or come back; the same for every question."""
    method, rate = condition.method, condition.pruning_rate
    if rate is None:
        return {}
    if method in CROP_METHODS and method_evicts(cast(Method, method)):
        _, *left = retained_per_stage(num_tokens, rate, cast(Method, method), layers, eviction_layers)
        return dict(zip(eviction_layers, left, strict=True))
    if not condition.chooses_tokens:
        return {}
    from lab.evaluation.rivals.registry import RIVALS

    pruning = RIVALS[method](num_tokens, layers, rate, condition.configuration)
    back = {} if pruning.rejoin is None else {pruning.rejoin: num_tokens}
    return dict(sorted({**back, **pruning.stages}.items()))


def share_of_unpruned(
    work: PrefillWork,
    condition: Condition,
    answers: Sequence[Answer],
    unpruned: Sequence[Answer],
    located: Sequence[Answer] | None,
) -> float | None:
    """Of the same questions; `located`: the localizer's answers, None where nobody knows them."""
    if located is None:
        return None
    pairs = list(zip(answers, unpruned, strict=True))
    spent = sum(work.of_answer(condition, answer, full) for answer, full in pairs)
    spent += sum(map(work.of_localizing, located))
    return spent / sum(prefill_flops(work.shape, [full.kv_tokens] * work.shape.layers) for _, full in pairs)
