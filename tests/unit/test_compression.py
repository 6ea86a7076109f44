# SPDX-License-Identifier: Apache-2.0
"""Compression against means written out, and the cache of vision features."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, regions

from tests.slow_plan import embeddings_of
from vllm_crop.compression.pooling import compress
from vllm_crop.models.features import FeatureCache
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import Compression, make_plan, whole_image_plan


def naive_compress(features: torch.Tensor, assignment: list[int]) -> torch.Tensor:
    """One mean per embedding, token by token, in float64."""
    rows = []
    for embedding in range(max(assignment) + 1):
        members = [features[t].double() for t, index in enumerate(assignment) if index == embedding]
        rows.append(sum(members, torch.zeros(features.shape[1], dtype=torch.double)) / len(members))
    return torch.stack(rows)


def random_features(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[num_tokens, 5]`, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 5, generator=generator).to(dtype)


@given(
    grids(12),
    regions(),
    st.floats(0, 0.99),
    st.sampled_from(["pool", "prune"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10),
)
def test_compression_is_the_mean_of_each_planned_embedding(
    grid: TokenGrid,
    region: Region,
    pruning_rate: float,
    compression: Compression,
    dtype: torch.dtype,
    seed: int,
) -> None:
    plan = make_plan(grid, region, pruning_rate, compression)
    features = random_features(grid.num_tokens, seed, dtype)
    rows = compress(features, torch.tensor(plan.assignment.tolist(), dtype=torch.int32))

    assert rows.shape == (plan.num_embeddings, 5)
    assert rows.dtype == dtype
    expected = naive_compress(features, plan.assignment.tolist()).to(dtype)
    torch.testing.assert_close(rows, expected)
    for row, embedding in zip(rows, embeddings_of(plan), strict=True):
        if len(embedding.tokens) == 1:
            assert torch.equal(row, features[embedding.position])


@given(st.data(), st.integers(1, 40))
def test_any_assignment_in_any_order_is_compressed(data: st.DataObject, num_tokens: int) -> None:
    count = data.draw(st.integers(1, num_tokens))
    spare = data.draw(
        st.lists(st.integers(-1, count - 1), min_size=num_tokens - count, max_size=num_tokens - count)
    )
    assignment = data.draw(st.permutations([*range(count), *spare]))
    features = random_features(num_tokens)
    rows = compress(features, torch.tensor(assignment, dtype=torch.int32))
    torch.testing.assert_close(rows, naive_compress(features, assignment).float())


def test_an_image_left_as_it_is_comes_back_bit_for_bit() -> None:
    features = random_features(12)
    assignment = torch.tensor(whole_image_plan(TokenGrid(3, 4)).assignment.tolist(), dtype=torch.int32)
    assert torch.equal(compress(features, assignment), features)


def test_means_of_half_precision_features_are_taken_in_float32() -> None:
    # In bfloat16 the sum of 256 ones and a small value would be stuck at 256.
    features = torch.ones(512, 1, dtype=torch.bfloat16)
    assert compress(features, torch.zeros(512, dtype=torch.int32)).item() == 1.0
    large = torch.full((4, 1), 60_000.0, dtype=torch.float16)
    assert compress(large, torch.zeros(4, dtype=torch.int32)).item() == large[0].item()


def test_the_result_is_the_same_every_time() -> None:
    plan = make_plan(TokenGrid(24, 24), Region.from_grid_cells(1, 1, 2, 2), 0.889, "pool")
    features = random_features(576)
    assignment = torch.tensor(plan.assignment.tolist(), dtype=torch.int32)
    first = compress(features, assignment)
    assert all(torch.equal(compress(features, assignment), first) for _ in range(5))


ROW_BYTES = 4 * 5


def cache_of(num_rows: int) -> FeatureCache:
    """A cache with room for this many rows of `random_features`."""
    return FeatureCache(num_rows * ROW_BYTES, "cpu")


def test_cached_features_come_back_and_hits_are_counted() -> None:
    cache = cache_of(10)
    features = random_features(4)
    assert cache.find((1, 2)) is None
    cache.store((1, 2), features)
    found = cache.find((1, 2))
    assert found is not None
    assert torch.equal(found, features)
    assert cache.find((2, 1)) is None
    assert (len(cache), cache.num_hits) == (1, 1)


def test_the_least_recently_used_features_make_room() -> None:
    cache = cache_of(3)
    for key in range(3):
        cache.store((key,), random_features(1, seed=key))
    assert cache.find((0,)) is not None
    cache.store((3,), random_features(1, seed=3))
    assert [key for key in range(4) if cache.find((key,)) is not None] == [0, 2, 3]


def test_a_large_entry_displaces_as_many_as_it_needs() -> None:
    cache = cache_of(4)
    for key in range(4):
        cache.store((key,), random_features(1))
    cache.store((9,), random_features(3))
    assert [key for key in (0, 1, 2, 3, 9) if cache.find((key,)) is not None] == [3, 9]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=40), st.integers(0, 12))
def test_the_bytes_stored_never_exceed_the_bound(puts: list[tuple[int, int]], num_rows: int) -> None:
    cache = cache_of(num_rows)
    for key, rows in puts:
        cache.store((key,), random_features(rows))
        stored = [entry for other in range(7) if (entry := cache.find((other,))) is not None]
        assert len(stored) == len(cache)
        assert sum(entry.numel() * entry.element_size() for entry in stored) <= num_rows * ROW_BYTES
        assert rows > num_rows or cache.find((key,)) is not None


def test_features_too_large_for_the_cache_leave_it_as_it_was() -> None:
    cache = cache_of(2)
    cache.store((1,), random_features(2))
    cache.store((2,), random_features(3))
    assert cache.find((1,)) is not None
    assert cache.find((2,)) is None


def test_an_empty_key_and_a_cache_of_no_bytes_store_nothing() -> None:
    cache = cache_of(2)
    cache.store((), random_features(1))
    assert len(cache) == 0
    none = cache_of(0)
    none.store((1,), random_features(1))
    assert len(none) == 0


def test_features_stored_under_a_key_stay() -> None:
    cache = cache_of(4)
    first, second = random_features(1, seed=1), random_features(1, seed=2)
    cache.store((1,), first)
    cache.store((1,), second)
    found = cache.find((1,))
    assert found is not None
    assert torch.equal(found, first)


def test_a_copy_is_stored_not_a_view_of_the_batch() -> None:
    batch = torch.zeros(8, 2, 5)
    cache = cache_of(4)
    cache.store((1,), batch[3])
    batch.fill_(1)
    found = cache.find((1,))
    assert found is not None
    assert found.untyped_storage().nbytes() == 2 * ROW_BYTES
    assert not found.any()


def test_clearing_forgets_everything_and_frees_its_room() -> None:
    cache = cache_of(2)
    cache.store((1,), random_features(2))
    cache.clear()
    assert len(cache) == 0
    assert cache.find((1,)) is None
    cache.store((2,), random_features(2))
    assert cache.find((2,)) is not None


@pytest.mark.parametrize("num_rows", [0, 3])
def test_the_bound_is_held_in_memory_until_the_first_entry_replaces_it(num_rows: int) -> None:
    cache = cache_of(num_rows)
    reserved = [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
    assert [tensor.nbytes for tensor in reserved] == [num_rows * ROW_BYTES]
    cache.store((1,), random_features(1))
    held = [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
    assert len(held) == (0 if num_rows else 1)


def test_a_window_is_cut_out_of_a_larger_one_of_the_same_picture() -> None:
    cache, features = cache_of(64), random_features(6 * 5)
    stored = (1, 2, 10, 16, 20, 25)  # rows 10 to 16, columns 20 to 25
    cache.store(stored, features)
    found = cache.find_larger((1, 2, 11, 13, 22, 25))
    assert found is not None
    assert torch.equal(found, features.view(6, 5, -1)[1:3, 2:5].reshape(6, -1))
    for other in ((1, 3, 11, 13, 22, 25), (1, 2, 9, 13, 22, 25), (1, 2, 11, 13, 22, 26)):
        assert cache.find_larger(other) is None
    cache.clear()
    assert cache.find_larger(stored) is None
    assert not cache._windows


def test_windows_that_made_room_are_not_found() -> None:
    cache = cache_of(8)
    for start in range(0, 40, 4):
        cache.store((1, 2, start, start + 2, 0, 2), random_features(4, seed=start))
    assert len(cache._windows[1, 2]) == 2
    assert cache.find_larger((1, 2, 0, 1, 0, 1)) is None
    assert cache.find_larger((1, 2, 36, 37, 0, 1)) is not None
