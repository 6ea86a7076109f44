# SPDX-License-Identifier: Apache-2.0
"""Boxes, regions and grids against exact rational arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, exact, grids, regions

from vllm_crop.planning.geometry import GRID_CELLS, Box, ImageView, Region, TokenGrid

WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def overlaps(start: Fraction, end: Fraction, other_start: Fraction, other_end: Fraction) -> bool:
    """Whether two intervals share more than a point."""
    return min(end, other_end) > max(start, other_start)


def touched(grid: TokenGrid, region: Region) -> tuple[int, ...]:
    """The tokens marked by the grid's mask of a region."""
    return tuple(grid.mask(region).nonzero()[0].tolist())


def tokens_seen(grid: TokenGrid, region: Region, window: Box = WHOLE) -> tuple[int, ...]:
    """Tokens of the grid laid over `window` whose area overlaps the region, in exact arithmetic."""
    left, top = exact(window.x0), exact(window.y0)
    width, height = exact(window.x1) - left, exact(window.y1) - top
    seen = []
    for row, col in itertools.product(range(grid.rows), range(grid.cols)):
        x0, x1 = left + width * Fraction(col, grid.cols), left + width * Fraction(col + 1, grid.cols)
        y0, y1 = top + height * Fraction(row, grid.rows), top + height * Fraction(row + 1, grid.rows)
        if any(
            overlaps(x0, x1, exact(box.x0), exact(box.x1)) and overlaps(y0, y1, exact(box.y0), exact(box.y1))
            for box in region.boxes
        ):
            seen.append(row * grid.cols + col)
    return tuple(seen)


@given(grids(24), regions())
def test_the_mask_marks_the_tokens_whose_area_the_region_overlaps(grid: TokenGrid, region: Region) -> None:
    assert touched(grid, region) == tokens_seen(grid, region)


@given(grids(48), st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2), st.floats(0, 1))
def test_a_box_of_any_size_touches_at_least_one_token(
    grid: TokenGrid, corner: tuple[float, float], size: float
) -> None:
    x0, y0 = corner
    x1 = max(math.nextafter(x0, 2), min(1.0, x0 + size))
    y1 = max(math.nextafter(y0, 2), min(1.0, y0 + size))
    row0, row1, col0, col1 = grid.span(Box(x0, y0, x1, y1))
    assert 0 <= row0 < row1 <= grid.rows
    assert 0 <= col0 < col1 <= grid.cols


@pytest.mark.parametrize("count", [3, 6, 7, 12, 24, 27, 48])
def test_token_edges_written_as_decimals_do_not_spill_into_the_neighbours(count: int) -> None:
    grid = TokenGrid(count, count)
    for first, last in itertools.combinations(range(count + 1), 2):
        start, end = round(first / count, 9), round(last / count, 9)
        assert grid.span(Box(start, start, end, end)) == (first, last, first, last)


def test_rows_follow_y_and_columns_follow_x() -> None:
    grid = TokenGrid(rows=2, cols=4)
    assert grid.num_tokens == 8
    assert grid.span(Box(0.5, 0.0, 1.0, 0.5)) == (0, 1, 2, 4)
    assert touched(grid, Region((Box(0.5, 0.0, 1.0, 0.5),))) == (2, 3)
    assert touched(grid, Region((Box(0.0, 0.5, 0.25, 1.0),))) == (4,)


@given(grids())
def test_the_whole_region_is_every_token(grid: TokenGrid) -> None:
    assert touched(grid, Region.whole()) == tuple(range(grid.num_tokens))


@given(grids(), regions())
def test_tokens_of_a_union_are_the_union_of_its_boxes_tokens(grid: TokenGrid, region: Region) -> None:
    separate = {token for box in region.boxes for token in touched(grid, Region((box,)))}
    assert touched(grid, region) == tuple(sorted(separate))


def test_grid_cells_round_trip_for_every_rectangle_of_the_papers_grid() -> None:
    spans = [(first, last) for first in range(GRID_CELLS) for last in range(first, GRID_CELLS)]
    for (x0, x1), (y0, y1) in itertools.product(spans, spans):
        assert Region.from_grid_cells(x0, y0, x1, y1).to_grid_cells() == (x0, y0, x1, y1)


@given(st.data(), st.integers(1, 64))
def test_grid_cells_round_trip_for_grids_of_any_size(data: st.DataObject, cells: int) -> None:
    x0, x1, y0, y1 = (data.draw(st.integers(0, cells - 1)) for _ in range(4))
    named = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    assert Region.from_grid_cells(*named, cells=cells).to_grid_cells(cells) == named


def test_grid_cells_include_both_ends() -> None:
    assert Region.from_grid_cells(0, 0, 7, 7) == Region.whole()
    assert Region.from_grid_cells(1, 2, 1, 3) == Region((Box(0.125, 0.25, 0.25, 0.5),))


@given(regions())
def test_grid_cells_of_a_region_are_the_smallest_rectangle_that_covers_it(region: Region) -> None:
    cells = [divmod(token, GRID_CELLS) for token in tokens_seen(TokenGrid(GRID_CELLS, GRID_CELLS), region)]
    rows, cols = [row for row, _ in cells], [col for _, col in cells]
    assert region.to_grid_cells() == (min(cols), min(rows), max(cols), max(rows))


@pytest.mark.parametrize("cells", [(-1, 0, 1, 1), (0, 0, 8, 1), (0, 0, 1, 8), (3, 0, 2, 1), (0, 3, 1, 2)])
def test_cells_outside_the_grid_or_in_the_wrong_order_are_refused(cells: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"cells must be 0\.\.7"):
        Region.from_grid_cells(*cells)


@pytest.mark.parametrize(
    "coordinates",
    [
        (0.5, 0, 0.5, 1),
        (0, 0.5, 1, 0.5),
        (0.6, 0, 0.5, 1),
        (0, 0.6, 1, 0.5),
        (math.nan, 0, 1, 1),
        (0, 0, 1, math.nan),
    ],
)
def test_empty_inverted_and_undefined_boxes_are_refused(coordinates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="x0 < x1 and y0 < y1"):
        Box(*coordinates)


def test_a_region_without_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one box"):
        Region(())


def test_regions_become_lists_of_their_boxes() -> None:
    region = Region((Box(0.0, 0.1, 0.2, 0.3), Box(0.5, 0.5, 1.0, 1.0)))
    assert region.as_lists() == [[0.0, 0.1, 0.2, 0.3], [0.5, 0.5, 1.0, 1.0]]


@given(grids(), regions(), boxes(low=-50, high=150))
def test_a_projected_region_covers_the_tokens_that_show_it(
    grid: TokenGrid, region: Region, window: Box
) -> None:
    projected = ImageView(window).project(region)
    seen = tokens_seen(grid, region, window)
    assert (projected is None) == (not seen)
    if projected is not None:
        assert touched(grid, projected) == seen
        assert all(0 <= edge <= 1 for box in projected.boxes for edge in box.as_list())


@given(regions())
def test_a_view_of_the_whole_image_leaves_regions_as_they_are(region: Region) -> None:
    assert ImageView(WHOLE).project(region) == region


@given(box=boxes(), window=boxes())
def test_what_is_projected_comes_back(box: Box, window: Box) -> None:
    view, region = ImageView(window), Region((box,))
    projected = view.project(region)
    if projected is None:
        return
    back = view.unproject(projected)
    if back is None:  # thinner than numbers are exact
        return
    expected = (
        max(box.x0, window.x0),
        max(box.y0, window.y0),
        min(box.x1, window.x1),
        min(box.y1, window.y1),
    )
    assert back.boxes[0].as_list() == pytest.approx(expected, abs=1e-9)


def test_places_in_the_padding_around_an_image_are_none_in_it() -> None:
    padded = ImageView(Box(-0.5, 0.0, 1.5, 1.0))
    assert padded.unproject(Region((Box(0.0, 0.0, 0.25, 1.0),))) is None
    assert padded.unproject(Region((Box(0.0, 0.0, 0.5, 1.0),))) == Region((Box(0.0, 0.0, 0.5, 1.0),))


def test_boxes_out_of_view_are_left_out_of_the_projection() -> None:
    centre = ImageView(Box(0.25, 0.0, 0.75, 1.0))
    outside, inside = Box(0.0, 0.0, 0.25, 1.0), Box(0.5, 0.0, 1.0, 0.5)
    assert centre.project(Region((outside, inside))) == Region((Box(0.5, 0.0, 1.0, 0.5),))
    assert centre.project(Region((outside,))) is None
