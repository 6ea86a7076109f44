# SPDX-License-Identifier: Apache-2.0
"""Rivals on hand-made images, attentions and kernels, where the right choice is known."""

import pytest
import torch
from torch import Tensor

from lab.evaluation.rivals import fastv, ivc_prune, novelty, pyramiddrop, sparsevlm, visionzip, vtw
from lab.evaluation.rivals.budgets import latest_first_layer, pyramid
from lab.evaluation.rivals.cdpruner import most_likely, relevance
from lab.evaluation.rivals.divprune import most_diverse
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.runner.method import Kept, LayerView, Seen, Sight, top
from vllm_crop.planning.budget import BudgetError, retained_per_stage, target_average
from vllm_crop.planning.geometry import TokenGrid

TOKENS, LAYERS = 576, 12
RATES = (0.667, 0.778, 0.889)


def view_of(
    scores: Tensor, lengths: list[int], others: float = 0.0, coming: Tensor | None = None
) -> LayerView:
    """A view whose attention scores `[questions, heads, length, visual]` are these: keys are unit vectors."""
    questions, heads, length, visual = scores.shape
    keys = torch.eye(visual).expand(1, heads, -1, -1)
    rest = torch.full((questions, heads, length, 1), others)
    words = torch.arange(length) < torch.tensor(lengths)[:, None]

    def next_view() -> LayerView:
        assert coming is not None, "nobody may look at the next layer"
        return view_of(coming, lengths, others)

    return LayerView(1, scores * visual**0.5, keys, rest, torch.tensor(lengths), words, next_view)


def test_attention_is_the_softmax_over_all_tokens_in_sight() -> None:
    scores = torch.tensor([[[[0.0, 1.0]], [[2.0, 0.0]]]])  # one question, two heads, one word, two tokens
    attention = view_of(scores, [1]).attention()
    by_head = [torch.tensor([0.0, 1.0, 0.0]).softmax(0), torch.tensor([2.0, 0.0, 0.0]).softmax(0)]
    assert torch.allclose(attention[0, 0], torch.stack(by_head).mean(0)[:2])


def test_fastv_keeps_what_the_last_word_attends_to() -> None:
    scores = torch.zeros(2, 1, 3, 5)
    scores[0, 0, 2] = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0])  # the last word of a question of three
    scores[0, 0, 0] = torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0])  # the first word does not count
    scores[1, 0, 1] = torch.tensor([3.0, 0.0, 0.0, 0.0, 2.0])  # a question of two words
    scores[1, 0, 2] = torch.tensor([0.0, 9.0, 9.0, 0.0, 0.0])  # padding
    assert fastv.choose(view_of(scores, [3, 2]), 2).tolist() == [[1, 3], [0, 4]]


def test_pyramiddrop_asks_the_layer_to_come() -> None:
    before, coming = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    before[..., 0], coming[..., 2] = 5.0, 5.0
    assert pyramiddrop.choose(view_of(before, [1], coming=coming), 1).tolist() == [[2]]


def test_sparsevlm_asks_words_that_are_close_to_the_image() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.1]])
    close, far = torch.tensor([5.0, 0.0]), torch.tensor([-5.0, 0.0])
    assert sparsevlm.rated_words(features, torch.stack([far, close])).tolist() == [False, True]
    image = Seen(features, TokenGrid(1, 3), torch.empty(0), torch.empty(0))
    raters = sparsevlm.Raters()
    kept = raters.appoint(Sight(image, (torch.stack([far, close]),), torch.empty(0), None))
    assert kept.tokens.tolist() == [[0, 1, 2]]
    scores = torch.zeros(1, 1, 2, 3)
    scores[0, 0, 0, 0], scores[0, 0, 1, 1] = 5.0, 5.0  # the far word looks at 0, the close one at 1
    assert raters.choose(view_of(scores, [2]), 1).tolist() == [[1]]


def test_vtw_withdraws_everything() -> None:
    assert vtw.choose(view_of(torch.zeros(2, 1, 1, 3), [1, 1]), 0).shape == (2, 0)
    assert vtw.vtw(TOKENS, LAYERS, 0.667).stages == {4: 0}
    assert vtw.vtw(TOKENS, LAYERS, 0.778).stages == {3: 0}  # 2.7 layers' worth
    assert vtw.vtw(TOKENS, LAYERS, 0.926).stages == {1: 0}
    assert vtw.vtw(TOKENS, LAYERS, 0.0).stages == {}


def test_divprune_is_the_greedy_max_min_solution() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 1.6, 3.1])
    features = torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([1, 5, 1, 2, 1.0])[:, None]
    # 3.1 and 1.6 are about as far from their neighbours; then what is farthest from both, and so on.
    chosen = most_diverse(features, 5).tolist()
    assert sorted(chosen) == [0, 1, 2, 3, 4]
    assert set(chosen[:3]) == {4, 3, 0}
    directions = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - directions @ directions.T
    for size in range(1, 5):
        left = [token for token in range(5) if token not in chosen[:size]]
        nearest = {token: float(distance[token, chosen[:size]].min()) for token in left}
        assert nearest[chosen[size]] == max(nearest.values())


def test_cdpruner_finds_the_greedy_maximum_of_the_determinant() -> None:
    torch.manual_seed(0)
    roots = torch.randn(2, 6, 6, dtype=torch.float64)
    kernels = roots @ roots.transpose(1, 2)
    for kernel, chosen in zip(kernels, most_likely(kernels, 4).tolist(), strict=True):
        for size in range(4):
            gains = {
                token: float(torch.det(kernel[[*chosen[:size], token]][:, [*chosen[:size], token]]))
                for token in range(6)
                if token not in chosen[:size]
            }
            assert chosen[size] == max(gains, key=lambda token: gains[token])


def test_cdpruner_never_keeps_a_token_twice_beyond_the_rank() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(1, 40, 8, dtype=torch.float64)
    kernel = kernel @ kernel.transpose(1, 2) + 1e-4 * torch.eye(40)
    assert sorted(most_likely(kernel, 40)[0].tolist()) == list(range(40))


def test_relevance_is_the_normalised_cosine_with_the_words() -> None:
    features, words = torch.eye(3) * 4, torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    found = relevance(features, words)
    assert found.argmax() == 1
    assert found.argmin() == 0
    assert float(found.max()) == pytest.approx(1)


def test_visionzip_keeps_dominant_tokens_and_merges_the_rest() -> None:
    count, kept = 64, 13
    torch.manual_seed(0)
    received = torch.rand(count)
    image = Seen(torch.randn(count, 4), TokenGrid(8, 8), torch.randn(count, 4), received)
    zipped = visionzip.zip_tokens(image, kept)
    dominant = set(received.argsort(descending=True)[:11].tolist())
    assert zipped.tokens.shape == (1, kept)
    assert dominant < set(zipped.tokens[0].tolist())
    for token, feature in zip(zipped.tokens[0].tolist(), zipped.features[0], strict=True):
        if token in dominant:
            assert torch.equal(feature, image.features[token])
    twins = Seen(
        torch.tensor([[9.0], [0.0], [2.0]]), TokenGrid(1, 3), torch.ones(3, 1), torch.tensor([1.0, 0, 0])
    )
    merged = visionzip.zip_tokens(twins, 3)
    assert merged.features.tolist() == [[[9.0], [0.0], [2.0]]]


def test_visionzip_averages_each_group() -> None:
    keys = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3)
    received = torch.tensor([1.0] + [0.0] * 6)
    image = Seen(torch.arange(7.0)[:, None], TokenGrid(1, 7), keys, received)
    merged = visionzip._merge(image, torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 4]))
    assert merged.tolist() == [[2.0], [5.0]]


def test_novelty_keeps_what_differs_from_its_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0]] * 9)
    features[4] = torch.tensor([0.0, 1.0])
    image = Seen(features, TokenGrid(3, 3), torch.empty(0), torch.empty(0))
    # The first token is new, the odd one differs, and so do those right of it and below it.
    assert sorted(top(novelty.scores(image), 4).tolist()) == [0, 4, 5, 7]


def test_ivc_anchors_are_nearest_to_no_turn_and_to_a_quarter_turn() -> None:
    angles = torch.tensor([1.0, 0.0, torch.pi, torch.pi / 2])[:, None] * torch.tensor([1.0, 1.0])
    assert sorted(ivc_prune.anchors(angles.cos(), angles.sin(), 2).tolist()) == [1, 3]


def test_ivc_foreground_grows_from_seeds_and_leaves_anchors_out() -> None:
    values = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2], [-1.0, 0.0]])
    words = torch.tensor([[2.0, 0.0]])
    assert ivc_prune.foreground(values, words, torch.tensor([1]), 2).tolist() == [0, 3]


def test_top_keeps_the_first_of_equals_in_ascending_order() -> None:
    assert top(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_kept_tokens_are_ascending_and_as_they_were() -> None:
    kept = Kept.choose(torch.arange(4.0)[:, None], torch.tensor([[3, 1]]))
    assert kept.tokens.tolist() == [[1, 3]]
    assert kept.features.tolist() == [[[1.0], [3.0]]]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_inner_rivals_meet_the_budget_on_average(name: str, rate: float) -> None:
    stages = RIVALS[name](TOKENS, LAYERS, rate).stages
    left, counts = TOKENS, []
    for layer in range(LAYERS):
        left = stages.get(layer, left)
        counts.append(left)
    assert abs(sum(counts) / LAYERS - target_average(TOKENS, rate)) <= 0.5
    assert counts[0] == TOKENS
    assert sorted(counts, reverse=True) == counts


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_a_budget_smaller_than_one_full_layer_is_refused(name: str) -> None:
    with pytest.raises(BudgetError):
        RIVALS[name](TOKENS, LAYERS, 0.926)


def test_stages_begin_where_the_papers_begin_or_as_late_as_the_budget_allows() -> None:
    assert [latest_first_layer(TOKENS, rate, LAYERS, 2) for rate in RATES] == [2, 2, 1]
    assert [sorted(pyramid(TOKENS, rate, LAYERS)) for rate in RATES] == [[3, 6, 9], [2, 5, 9], [1, 5, 8]]
    assert pyramid(TOKENS, 0.667, LAYERS) == dict(
        zip((3, 6, 9), retained_per_stage(TOKENS, 0.667, "ilp", LAYERS, (3, 6, 9))[1:], strict=True)
    )
