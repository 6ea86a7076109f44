# SPDX-License-Identifier: Apache-2.0
"""Rivals that choose before the language model, on hand-made images and kernels with a known right choice."""

import math

import pytest
import torch

from lab.evaluation.rivals import (
    cdpruner,
    chance,
    dart,
    even_grid,
    fopru,
    holov,
    ivc_prune,
    lvlm_csp,
    mmtok,
    novelty,
    ptp,
    scope,
    vflowopt,
    visionzip,
    vispruner,
    vscan,
)
from lab.evaluation.rivals.cdpruner import most_likely, relevance
from lab.evaluation.rivals.divprune import most_diverse
from lab.evaluation.runner.method import Kept, squares_of, top
from tests.hand_made import image_of, sight_of, view_of
from vllm_crop.planning.budget import BudgetError
from vllm_crop.planning.geometry import TokenGrid


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


def test_cdpruners_relevance_by_sign_and_theta() -> None:
    features, words = torch.eye(3), torch.tensor([[0.1, 0.9, 0.4]])
    assert relevance(features, words, sign=-1).argmax() == 0
    assert torch.equal(relevance(features, words, theta=0.0), torch.ones(3))
    strong = relevance(features, words, theta=0.8)  # alpha is 2
    assert float(strong[1] / strong[0]) == pytest.approx(math.exp(2), rel=1e-4)
    # Two tokens to keep of three that differ alike: the relevant ones, by either sign.
    for sign, expected in ((1, [1, 2]), (-1, [0, 2])):
        kept = cdpruner.choose(sight_of(image_of(features), words), 2, sign, None, False)
        assert kept.tokens.tolist() == [expected]
    # The tower sees two of them as one.
    seen = sight_of(image_of(features, tower=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])), words)
    for tower, expected in ((False, [1, 2]), (True, [0, 1])):
        assert cdpruner.choose(seen, 2, 1, 0.5, tower).tokens.tolist() == [expected]


def test_visionzip_keeps_dominant_tokens_and_merges_the_rest() -> None:
    count, kept = 64, 13
    torch.manual_seed(0)
    received = torch.rand(count)
    image = image_of(torch.randn(count, 4), received, TokenGrid(8, 8), torch.randn(count, 4))
    zipped = visionzip.zip_tokens(image, kept)
    dominant = set(received.argsort(descending=True)[:11].tolist())
    assert zipped.tokens.shape == (1, kept)
    assert dominant < set(zipped.tokens[0].tolist())
    for token, feature in zip(zipped.tokens[0].tolist(), zipped.features[0], strict=True):
        if token in dominant:
            assert torch.equal(feature, image.features[token])
    twins = image_of(torch.tensor([[9.0], [0.0], [2.0]]), torch.tensor([1.0, 0, 0]), keys=torch.ones(3, 1))
    merged = visionzip.zip_tokens(twins, 3)
    assert merged.features.tolist() == [[[9.0], [0.0], [2.0]]]


def test_visionzip_averages_each_group() -> None:
    keys = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3)
    received = torch.tensor([1.0] + [0.0] * 6)
    image = image_of(torch.arange(7.0)[:, None], received, keys=keys)
    merged = visionzip._merge(image, torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 4]), False)
    assert merged.tolist() == [[2.0], [5.0]]
    # The authors add the mean of the others, (2 + 3) / 2 and (5 + 6) / 2, to the target.
    added = visionzip._merge(image, torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 4]), True)
    assert added.tolist() == [[3.5], [9.5]]


def test_novelty_keeps_what_differs_from_its_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0]] * 9)
    features[4] = torch.tensor([0.0, 1.0])
    image = image_of(features, grid=TokenGrid(3, 3))
    # The first token is new, the odd one differs, and so do those right of it and below it.
    assert sorted(top(novelty.scores(image), 4).tolist()) == [0, 4, 5, 7]


def test_random_tokens_depend_on_the_picture_alone() -> None:
    one, other = (image_of(torch.zeros(36, 1), fingerprint=of) for of in (1, 2))
    assert chance.drawn(one, 9).tolist() == chance.drawn(one, 18)[:9].tolist()
    assert set(chance.drawn(one, 9).tolist()) != set(chance.drawn(other, 9).tolist())
    assert sorted(chance.drawn(one, 36).tolist()) == list(range(36))


@pytest.mark.parametrize("size", [(24, 24), (6, 40), (1, 7)])
def test_an_even_grid_has_exactly_the_count(size: tuple[int, int]) -> None:
    grid = TokenGrid(*size)
    for count in range(1, grid.num_tokens + 1):
        kept = even_grid.even_tokens(grid, count)
        assert len(kept.unique()) == count
        assert 0 <= int(kept.min()) <= int(kept.max()) < grid.num_tokens


def test_at_a_ninth_an_even_grid_is_the_middle_of_every_field() -> None:
    expected = [row * 24 + col for row in range(1, 24, 3) for col in range(1, 24, 3)]
    assert even_grid.even_tokens(TokenGrid(24, 24), 64).tolist() == expected


def test_ivc_anchors_are_nearest_to_no_turn_and_to_a_quarter_turn() -> None:
    angles = torch.tensor([1.0, 0.0, torch.pi, torch.pi / 2])[:, None] * torch.tensor([1.0, 1.0])
    assert ivc_prune.anchors(angles.cos(), angles.sin(), 2).tolist() == [1, 3]
    # A token that is both counts for both, as in the authors' code.
    once = torch.tensor([[0.7], [0.0]])
    assert ivc_prune.anchors(once, once, 2).tolist() == [0]


def test_ivc_values_attend_by_head() -> None:
    """A token that is long in one head beats one that is like the text in direction only."""
    image = torch.tensor([[[4.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])  # two heads, two tokens
    text = torch.tensor([[[2.0, 0.0]], [[0.1, 0.0]]])
    heads = [torch.tensor([8.0, 2.0]) / 2**0.5, torch.tensor([0.0, 0.1]) / 2**0.5]
    expected = torch.stack([scores.softmax(0) for scores in heads]).mean(0)
    assert torch.allclose(ivc_prune.likeness(text, image)[0], expected)
    joined = torch.nn.functional.normalize(image.transpose(0, 1).flatten(1), dim=-1)
    assert (joined @ text.flatten())[1] > (joined @ text.flatten())[0]  # the cosine would say otherwise


def test_ivc_scores_by_text_and_seeds_and_keeps_what_is_fixed() -> None:
    # One head. The text names token 0, the only seed; 3 is like the seed, 1 a little like the text.
    image = torch.tensor([[[3.0, 3.0], [1.5, 0.0], [0.0, -3.0], [0.0, 9.0], [-3.0, 0.0]]])
    text = torch.tensor([[[2.0, 0.0]]])
    assert ivc_prune.select(image, text, torch.tensor([], dtype=torch.long), 2).tolist() == [0, 3]
    assert ivc_prune.select(image, text, torch.tensor([4]), 3).tolist() == [0, 3, 4]
    # Every row of the text counts as much as a seed: three of them outvote it.
    close = torch.tensor([[[2.0, 4.0], [1.9, 0.0], [0.0, -3.0], [0.0, 9.0], [-3.0, 0.0]]])
    none = torch.tensor([], dtype=torch.long)
    assert ivc_prune.select(close, text, none, 2).tolist() == [0, 3]
    assert ivc_prune.select(close, text.repeat(1, 3, 1), none, 2).tolist() == [0, 1]


def test_fopru_keeps_ranks_or_rows() -> None:
    received = torch.tensor([0.30, 0.00, 0.00, 0.11, 0.12, 0.13, 0.14, 0.10, 0.10])
    image = image_of(torch.zeros(9, 1), received, TokenGrid(3, 3))
    assert fopru.significant(image, 4, "rank").tolist() == [0, 4, 5, 6]
    # Sums of rows are 0.30, 0.36, 0.34: all of the second, and the best of the third.
    assert fopru.significant(image, 4, "row").tolist() == [3, 4, 5, 6]


def test_vispruner_drops_what_has_a_twin() -> None:
    received = torch.arange(20.0).flip(0)
    features = torch.eye(20)
    features[4] = features[5]  # 4 is even among those left behind the first two, and its twin is odd
    kept = vispruner.prune(received, features, 19, 0.106)
    assert sorted(set(range(20)) - set(kept.tolist())) == [4]
    # More than eight leave in rounds, and what was odd may be even in the next.
    assert len(set(vispruner.prune(received, torch.rand(20, 3), 4, 0.5).tolist())) == 4
    assert vispruner.prune(received, features, 4, 0.5)[:2].tolist() == [0, 1]


def test_holov_gives_chunks_their_part() -> None:
    received = torch.tensor([0.40, 0.30, 0.02, 0.02, 0.10, 0.10, 0.10, 0.10])
    # Chunk means are 0.185 and 0.1: three of four and one of four, by attention inside.
    assert holov.holistic(received, 4, 2).tolist() == [0, 1, 2, 4]
    # By attention alone, or two and two, the second chunk had one more.
    assert top(received, 4).tolist() == [0, 1, 4, 5]
    assert holov.allotted(torch.tensor([3.0, 2.0, 1.0]), 7) == [4, 2, 1]


def test_holov_spends_what_a_chunk_cannot_hold() -> None:
    received = torch.tensor([0.9, 0.8, 0.01, 0.02, 0.015, 0.0])
    kept = holov.holistic(received, 4, 3)
    assert kept.tolist() == [0, 1, 3, 4]


def test_scope_weighs_gain_in_coverage_by_saliency() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.2]])
    salient = torch.tensor([0.6, 0.9, 0.3, 0.1])
    chosen = scope.covering(features, salient, 3, 1.0).tolist()
    assert chosen[:2] == [1, 2]  # not 0, the second most salient: 1 covers it
    assert scope.covering(features, salient, 1, 0.0).tolist() == [1]
    many = torch.cat([features, features[2:3].repeat(4, 1)])
    flat = torch.cat([salient, torch.full((4,), 0.3)])
    assert scope.covering(many, flat, 1, 0.0).tolist() != scope.covering(many, flat, 1, 4.0).tolist()


def test_mmtok_covers_words_and_image() -> None:
    cover = torch.tensor([[0.5, 0.45, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.3]])
    # 0 alone would be second, but 1 covers nearly all of what it covers.
    assert mmtok.covering(cover, 2).tolist() == [1, 2]
    features = torch.eye(4)
    question = torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    sight = sight_of(image_of(features), question, spelled=(" circle", " the"))
    assert mmtok.choose(sight, 1, 0.02, 0.2, 0.5).tokens.tolist() == [[2]]  # "the" does not count
    assert mmtok.worded(question[1:], (" the",)).shape == (1, 4)  # unless there is nothing else
    # Rows sum to one together, so that long questions weigh no more.
    assert float(mmtok.shares(question, features, 0.1).sum()) == pytest.approx(1)
    # Of a crowd of three and one alone, the image wants the crowd's, where no word is heard.
    crowd = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    deaf = sight_of(image_of(crowd), torch.tensor([[0.0, 1.0]]), spelled=(" circle",))
    assert mmtok.choose(deaf, 1, 0.02, 0.2, 1e6).tokens.tolist() == [[1]]
    assert mmtok.choose(deaf, 1, 0.02, 0.2, 0.0).tokens.tolist() == [[0]]


def test_dart_pivots_bring_what_is_least_like_them() -> None:
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.1], [0.1, -1.0]])
    text = torch.tensor([[0.1, 1.0]])
    # The pivot 0 brings 3, that of the text 4; where there is one more to bring, the last one does.
    assert dart.unlike(states, torch.tensor([0]), text, 3).tolist() == [0, 3, 4]
    assert dart.unlike(states, torch.tensor([0]), text, 4).tolist() == [0, 3, 1, 4]
    # Keys are summed over heads, by absolute value.
    keys = torch.tensor([[[3.0, -3.0], [2.0, 2.0]], [[0.0, 0.0], [2.5, 0.0]]])
    assert dart.largest(keys, 1).tolist() == [1]
    loud = image_of(states * torch.tensor([1.0, 1, 5, 1, 1])[:, None])
    assert dart.before(loud, 2, 1).tokens.tolist() == [[2, 4]]


def test_vscan_scans_windows_and_the_whole() -> None:
    grid = TokenGrid(4, 8)  # two windows side by side
    early, late = torch.zeros(32), torch.zeros(32)
    early[[0, 1, 2, 4]] = torch.tensor([0.9, 0.8, 0.7, 0.1])
    late[[0, 31, 30]] = torch.tensor([0.9, 0.5, 0.4])
    image = image_of(torch.rand(32, 3), late, grid, early=early)
    # The best of each window, and of the others the best by the last attention; 0 does not count twice.
    assert vscan.scan(image, 4, 0.5).tolist() == [0, 4, 30, 31]
    assert vscan.scan(image, 3, 1.0).tolist() == [0, 1, 4]
    assert vscan.scan(image, 2, 0.0).tolist() == [0, 31]


def test_vscan_merges_what_leaves_into_the_most_similar() -> None:
    features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert vscan.merged(features, torch.tensor([0, 3])).tolist() == [[3.0, 0.0], [0.0, 2.0]]


def test_vflowopt_asks_only_tokens_that_matter_and_adds_what_there_is_to_see() -> None:
    attention = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    image = image_of(torch.eye(3), attention.mean(0), attention=attention, entropy=torch.zeros(3))
    # Token 2 receives most; alone above the mean it is asked alone, and it looks at 0.
    assert vflowopt.scores_of(image, 1.05, 0.0).tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(vflowopt.scores_of(image, 0.0, 0.0), attention.mean(0))
    assert torch.allclose(vflowopt.scores_of(image, 99.0, 0.0), attention.mean(0))  # nobody: all are asked
    rich = image_of(
        torch.eye(3), attention.mean(0), attention=attention, entropy=torch.tensor([0.0, 9.0, 0.0])
    )
    assert vflowopt.scores_of(rich, 1.05, 10.0).argmax() == 1


def test_vflowopt_recycles_what_leaves_at_the_best_token_of_its_square() -> None:
    features, scores = torch.eye(8), torch.tensor([9.0, 1.0, 3.0, 8.0, 0.0, 2.0, 2.0, 7.0])
    grid = TokenGrid(2, 4)
    squares = squares_of(grid, 2)
    assert squares.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    means, places = vflowopt.recycled(features, scores, torch.tensor([1, 2, 4, 5, 6]), squares)
    assert places.tolist() == [5, 2]
    assert means[0].tolist() == pytest.approx([0, 1 / 3, 0, 0, 0, 2 / 3, 0, 0])
    assert means[1].tolist() == pytest.approx([0, 0, 0.6, 0, 0, 0, 0.4, 0])
    image = image_of(
        features, torch.ones(8), grid, attention=scores.expand(8, -1) / 32, entropy=torch.zeros(8)
    )
    flow = vflowopt.Flow(5, 0.0, 0.0, 2)
    kept = flow.begin(image)
    assert kept.tokens.tolist() == [[0, 2, 3, 5, 7]]
    assert torch.allclose(kept.features[0, 3], means[0])
    assert torch.equal(kept.features[0, 0], features[0])
    # Later the same scores say who leaves, whatever the questions look at; then of those left.
    view = view_of(torch.zeros(2, 1, 1, 5), [1, 1])
    assert flow.choose(view, 3).tolist() == [[0, 2, 4]] * 2
    assert flow.choose(view, 1).tolist() == [[0]] * 2


def test_ptp_shares_the_count_between_regions_and_looks_within_them() -> None:
    """Two regions of eight rows by eight columns; the left one is like the picture."""
    grid, left = TokenGrid(8, 16), torch.arange(128) % 16 < 8
    features = torch.where(left[:, None], torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]))
    features[left] *= 3
    received = torch.arange(128.0)
    image = image_of(features, received, grid)
    region, shares = ptp.parts_of(image, 100.0, 10)
    assert region.tolist() == (~left).long().tolist()
    assert shares.tolist() == [5, 5]
    assert ptp.parts_of(image, 0.05, 10)[1].tolist() == [10, 0]
    assert ptp.parts_of(image, 0.001, 100)[1].tolist() == [64, 36]  # a region holds no more than it has
    kept = ptp.Pyramid(1.0, 0.05).now(sight_of(image, torch.zeros(1, 2)), 3).tokens
    assert kept.tolist() == [[117, 118, 119]]  # the best of the left region, not of all
    scores = torch.zeros(1, 1, 2, 128)
    scores[0, 0, 0, 3], scores[0, 0, 1, 20] = 9.0, 9.0  # both words count
    for alpha, expected in ((0.0, [3, 20]), (0.99, [118, 119])):
        pyramid = ptp.Pyramid(alpha, 0.05)
        assert pyramid.look(sight_of(image, torch.zeros(1, 2))).tokens.tolist() == [list(range(128))]
        assert pyramid.choose(view_of(scores, [2]), 2).tolist() == [expected]


def test_lvlm_csp_begins_small_and_sees_everything_once() -> None:
    pruning = lvlm_csp.lvlm_csp(576, 12, 0.889, 16, 3)
    assert pruning.rejoin == 3
    assert list(pruning.stages) == [4]
    assert (16 * 3 + 576 + pruning.stages[4] * 8) / 12 == pytest.approx(64, abs=0.5)
    image = image_of(torch.eye(9), torch.arange(9.0), TokenGrid(3, 3))
    grid = lvlm_csp.lvlm_csp(9, 12, 0.5, 1, 4)
    tower = lvlm_csp.lvlm_csp(9, 12, 0.5, 2, 4, by="tower")
    assert grid.before is not None
    assert tower.before is not None
    assert grid.before(sight_of(image, torch.zeros(1, 9))).tokens.tolist() == [[4]]
    assert tower.before(sight_of(image, torch.zeros(1, 9))).tokens.tolist() == [[7, 8]]
    with pytest.raises(BudgetError, match="more than a pruning rate of"):
        lvlm_csp.lvlm_csp(576, 12, 0.926)


def test_top_keeps_the_first_of_equals_in_ascending_order() -> None:
    assert top(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_kept_tokens_are_ascending_and_as_they_were() -> None:
    kept = Kept.choose(torch.arange(4.0)[:, None], torch.tensor([[3, 1]]))
    assert kept.tokens.tolist() == [[1, 3]]
    assert kept.features.tolist() == [[[1.0], [3.0]]]
