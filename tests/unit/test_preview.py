# SPDX-License-Identifier: Apache-2.0
"""The preview's picture, the command that writes it, and the sample picture."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import typer
from checkpoint_json import write_llava
from PIL import Image
from typer.testing import CliRunner

from tests.sample_picture import draw_sample_picture, sample_boxes
from tests.slow_plan import embeddings_of
from vllm_crop.commands.preview import assumed_llava, preview
from vllm_crop.drawing.looks import PIECE_COLOUR, Swatch, legend_of
from vllm_crop.drawing.preview import LONG_SIDE, as_rgb, draw_preview
from vllm_crop.drawing.tokens import draw_tokens, shaded
from vllm_crop.families.llava_next import LLAVA_NEXT, AnyResolution
from vllm_crop.planning.budget import Method
from vllm_crop.planning.foveation import Piece, whole_piece
from vllm_crop.planning.geometry import Box, GridPart, ImageView, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import Compression, TokenPlan, make_plan, whole_image_plan
from vllm_crop.planning.summary import PlanSummary

GRID = TokenGrid(24, 24)
WHOLE = ImageView(Box(0, 0, 1, 1))
CORNER = Region((Box(0, 0, 0.25, 0.25),))
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")


app = typer.Typer()
app.command()(preview)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, options, env={"COLUMNS": "200"})


@pytest.fixture
def street(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    draw_sample_picture().save(path)
    return path


def plan_of(compression: Compression, region: Region = CORNER, rate: float = 0.8) -> TokenPlan:
    return make_plan(GRID, region, rate, compression)


def test_kept_tokens_stay_sharp() -> None:
    picture = draw_sample_picture(size=(480, 480))
    drawing = draw_tokens(picture, plan_of("pool"))
    inner = (2, 2, 18, 18)  # of the first cell, between the lines
    assert drawing.crop(inner).tobytes() == picture.crop(inner).tobytes()


def test_pooled_tokens_take_the_colour_of_their_patch() -> None:
    # Left half black, right half white: a patch across the middle is grey.
    picture = Image.new("RGB", (480, 480))
    picture.paste((255, 255, 255), (240, 0, 480, 480))
    plan = plan_of("pool", rate=0.99)
    drawing = draw_tokens(picture, plan)
    for embedding in embeddings_of(plan):
        if len(embedding.tokens) == 1:
            continue
        share = sum(token % 24 >= 12 for token in embedding.tokens) / len(embedding.tokens)
        for token in embedding.tokens:
            row, col = divmod(token, 24)
            red, _, _ = drawing.getpixel((col * 20 + 10, row * 20 + 10))
            own = 255 if col >= 12 else 0
            assert abs(red - (0.86 * 255 * share + 0.14 * own)) < 3


def test_left_out_tokens_fade() -> None:
    picture = Image.new("RGB", (480, 480), (255, 0, 0))
    plan = plan_of("prune")
    drawing = draw_tokens(picture, plan)
    left_out = plan.assignment.tolist().index(-1)
    kept = embeddings_of(plan)[0].tokens[0]
    red, green, blue = drawing.getpixel((left_out % 24 * 20 + 10, left_out // 24 * 20 + 10))
    assert max(red, green, blue) - min(red, green, blue) < 10
    assert drawing.getpixel((kept % 24 * 20 + 10, kept // 24 * 20 + 10)) == (255, 0, 0)


def test_evicted_tokens_lie_in_a_shade_that_lightens_stage_by_stage() -> None:
    picture = Image.new("RGB", (480, 480), (150, 150, 150))
    plan = make_plan(GRID, CORNER, 0.8, "pool", "ilp", 32, (2, 8, 16, 24))
    drawing = draw_tokens(picture, plan)
    colours: dict[int | None, set[Any]] = {}
    for embedding in embeddings_of(plan):
        row, col = divmod(embedding.position, 24)
        colour = drawing.getpixel((col * 20 + 10, row * 20 + 10))
        colours.setdefault(embedding.evicted_from_layer, set()).add(colour)
    assert colours.pop(None) == {(150, 150, 150)}
    assert set(colours) == {2, 8, 16, 24}
    shades = [colours[layer].pop() for layer in (2, 8, 16, 24)]
    assert not any(colours.values())
    for (red, green, blue), (next_red, next_green, next_blue) in itertools.pairwise(shades):
        assert next_red + next_green + next_blue >= red + green + blue + 60
    assert all(blue > red and blue > green for red, green, blue in shades)


def test_an_evicted_patch_is_shaded_in_its_colour() -> None:
    picture = Image.new("RGB", (480, 480), (255, 255, 255))
    plan = make_plan(GRID, CORNER, 0.9, "pool", "plc+ilp", 32, (2,))
    patch = next(e for e in embeddings_of(plan) if len(e.tokens) > 1 and e.evicted_from_layer == 2)
    row, col = divmod(patch.position, 24)
    pixel = draw_tokens(picture, plan).getpixel((col * 20 + 10, row * 20 + 10))
    assert pixel == shaded(Image.new("RGB", (1, 1), "white"), 0, 1).getpixel((0, 0))


def test_the_legend_has_an_entry_per_stage_and_for_what_occurs_only() -> None:
    both = make_plan(GRID, CORNER, 0.6, "prune", "plc+ilp", 32, (2, 16))
    legend = legend_of(PlanSummary.of(both, CORNER, 32), outlined=True, cut_away=False)
    assert [entry.label for entry in legend] == [
        "region",
        "kept: one token per cell",
        "evicted: seen below layer 2",
        "evicted: seen below layer 16",
        "left out",
    ]
    assert [(e.stage, e.num_stages) for e in legend if e.swatch is Swatch.EVICTED] == [(0, 2), (1, 2)]
    whole = legend_of(PlanSummary.of(whole_image_plan(GRID), None, 32), outlined=False, cut_away=True)
    assert [entry.swatch for entry in whole] == [Swatch.KEPT, Swatch.UNSEEN]


def test_a_drawing_of_four_stages_has_room_for_its_caption() -> None:
    plan = make_plan(GRID, CORNER, 0.778, "pool", "plc+ilp", 32, (2, 8, 16, 24))
    drawing = draw_preview(draw_sample_picture(), assumed_llava().view(640, 480), plan, CORNER, 32)
    last_lines = drawing.crop((0, drawing.height - 10, drawing.width, drawing.height))
    assert len(last_lines.getcolors() or []) == 1  # nothing runs out at the bottom


def test_a_plan_of_a_deeper_model_is_not_summarized() -> None:
    plan = make_plan(GRID, CORNER, 0.778, "pool", "ilp", 32, (2, 16))
    with pytest.raises(ValueError, match="evicts from layer 16, beyond 16 layers"):
        draw_preview(draw_sample_picture(), WHOLE, plan, CORNER, 16)


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (32, 32), (4000, 3000), (1600, 20), (3, 900), (1, 1)]
)
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    view = assumed_llava().view(*size)
    drawing = draw_preview(Image.new("RGB", size, "teal"), view, whole_image_plan(GRID), None)
    assert drawing.mode == "RGB"
    assert drawing.width <= 2400
    assert drawing.height <= 2700
    if max(size) < 2 * min(size):
        assert max(drawing.width, drawing.height) >= LONG_SIDE


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode(mode: str) -> None:
    picture = Image.new(mode, (64, 48))
    assert draw_preview(picture, WHOLE, plan_of("pool"), CORNER).mode == "RGB"


def test_sixteen_bits_keep_their_shades() -> None:
    picture = Image.new("I;16", (4, 4), 32768)
    assert as_rgb(picture).getpixel((0, 0)) == (127, 127, 127)


def test_transparent_is_white_as_in_vllm() -> None:
    assert as_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.getexif()[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=picture.getexif())
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert as_rgb(turned).size == (40, 80)
    result = run(str(tmp_path / "turned.jpg"), "--region", "0,0.4,1,0.6", "-o", str(tmp_path / "out.png"))
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.height > drawn.width


def test_every_grid_of_an_image_is_drawn() -> None:
    """The tiles' grid in the lower half, where a wide picture leaves room; the whole image above it."""
    tiles = GridPart(TokenGrid(30, 48), first=576, newlines=True)
    plan = make_plan(TokenGrids((GridPart(GRID), tiles)), CORNER, 0.8, "prune")
    picture = Image.new("RGB", (640, 400), (255, 0, 0))
    drawing = draw_preview(picture, WHOLE, plan, None)
    assert drawing.width == LONG_SIDE
    assigned = plan.assignment.tolist()
    for part, top in zip(plan.grid.parts, (0, 625 + 12), strict=True):
        rows, cols = part.grid.rows, part.grid.cols
        for row, col in itertools.product(range(rows), range(cols)):
            at = int((col + 0.5) * 1000 / cols), top + int((row + 0.5) * 625 / rows)
            red, _, blue = drawing.getpixel(at)
            assert (red - blue > 200) == (assigned[part.token(row, col)] >= 0)


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (300, 310), (1500, 20)])
def test_every_shape_of_several_grids(size: tuple[int, int]) -> None:
    plan = make_plan(
        AnyResolution.from_settings({}, LLAVA_NEXT, 336, 24, None).tokens(*size), CORNER, 0.5, "pool"
    )
    drawing = draw_preview(Image.new("RGB", size), WHOLE, plan, CORNER)
    assert max(drawing.size) <= 2 * 2400 + 400


def test_what_the_model_does_not_see_is_dark() -> None:
    picture = Image.new("RGB", (640, 480), "white")
    view = assumed_llava().view(640, 480)
    drawing = draw_preview(picture, view, whole_image_plan(GRID), None)
    assert sum(drawing.getpixel((20, 400))) < 0.6 * 3 * 255  # cut away by the centre crop
    assert drawing.getpixel((500 + 10, 375 + 10)) == (255, 255, 255)


def test_padding_is_part_of_the_drawing() -> None:
    padded = ImageView(Box(0, -0.25, 1, 1.25))
    drawing = draw_preview(Image.new("RGB", (600, 400), "white"), padded, whole_image_plan(GRID), None)
    assert drawing.getpixel((510, 50)) == (127, 127, 127)


def test_a_region_out_of_view_is_outlined_all_the_same() -> None:
    corner = Region((Box(0, 0, 0.1, 0.5),))
    picture, view = Image.new("RGB", (640, 480), "white"), assumed_llava().view(640, 480)
    without = draw_preview(picture, view, whole_image_plan(GRID), None)
    outlined = draw_preview(picture, view, whole_image_plan(GRID), corner)
    assert outlined.getpixel((101, 100)) == (255, 45, 120)
    assert outlined.getpixel((500, 500)) == without.getpixel((500, 500))


@pytest.mark.parametrize(
    ("region", "rate", "compression", "sentence"),
    [
        (Box(0, 0, 0.25, 0.25), 0.8333, "pool", "region 36 kept, 60 pooled"),
        (Box(0, 0, 0.25, 0.25), 0.8333, "prune", "region 36 kept, 60 others kept, 480 left out"),
        (Box(0, 0, 1, 1), 0.75, "pool", "region 144 of 576 kept, 432 left out"),
        (Box(0, 0, 0.25, 0.25), 0.25, "pool", "region 36 kept, 252 others kept, 144 pooled"),
    ],
)
def test_summary_of_a_plan(region: Box, rate: float, compression: Compression, sentence: str) -> None:
    summary = PlanSummary.of(plan_of(compression, Region((region,)), rate), Region((region,)), 32)
    counted = summary.region_kept + summary.others_kept + summary.pooled
    assert counted == summary.embeddings
    assert summary.describe() == sentence
    assert summary.after == f"{summary.embeddings} tokens"
    assert summary.describe_layers() == f"layers 0-31: {summary.embeddings}"


@pytest.mark.parametrize(
    ("method", "layers", "sentence", "runs"),
    [
        (
            "ilp",
            (2,),
            "region 36 kept, 62 others kept, 478 evicted from layer 2",
            "layers 0-1: 576, layers 2-31: 98",
        ),
        (
            "ilp",
            (1, 31),
            "region 36 kept, 21 others kept, 394 evicted from layer 1, 125 evicted from layer 31",
            "layer 0: 576, layers 1-30: 182, layer 31: 57",
        ),
    ],
)
def test_summary_of_an_eviction(method: Method, layers: tuple[int, ...], sentence: str, runs: str) -> None:
    rate = 7 / 9 if layers == (2,) else 0.67
    plan = make_plan(GRID, CORNER, rate, "pool", method, 32, layers)
    summary = PlanSummary.of(plan, CORNER, 32)
    assert summary.describe() == sentence
    assert summary.describe_layers() == runs
    average = sum(plan.tokens_per_layer(32)) / 32
    assert summary.average == pytest.approx(average)
    assert summary.after == f"{round(average, 1):g} tokens per layer"
    assert summary.change == f"-{100 * plan.pruning_rate_got(32):.1f} %"


def test_command_writes_a_png_and_the_counts(street: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = run(str(street), "--cells", "3,3,4,4", "--pruning-rate", "0.8333", "-o", str(out))
    assert result.exit_code == 0, result.output
    assert "LLaVA-1.5 assumed, a 24 x 24 grid" in result.stdout
    assert "576 -> 96 tokens (-83.3 %)" in result.stdout
    with Image.open(out) as drawn:
        assert drawn.format == "PNG"


def test_command_draws_an_eviction(street: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = ("--cells", "3,3,4,4", "--method", "ilp", "--pruning-rate", "0.7778", "-o", str(out))
    result = run(str(street), *options)
    assert result.exit_code == 0, result.output
    assert "576 -> 127.9 tokens per layer (-77.8 %)" in result.stdout
    assert "layers 0-1: 576, layers 2-31: 98" in result.stdout
    assert out.exists()
    result = run(str(street), *options, "--eviction-layers", "16")
    assert result.exit_code == 2
    assert "begin at layer 7 or earlier" in " ".join(result.output.replace("│", " ").split())


def test_command_uses_the_checkpoint(street: Path, tmp_path: Path) -> None:
    result = run(str(street), "--model", write_llava(tmp_path), "-o", str(tmp_path / "out.png"))
    assert result.exit_code == 0, result.output
    assert "assumed" not in result.stdout
    assert "served whole, all tokens kept: no region is given" in result.stdout


def test_command_refuses_what_it_cannot_read_or_write(street: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    broken = tmp_path / "broken.png"
    broken.write_bytes(street.read_bytes()[:2000])
    for options, message in (
        ([str(tmp_path / "none.png")], "there is no file"),
        ([str(text)], "no image that Pillow can read"),
        ([str(broken)], "cannot be read"),
        ([str(tmp_path)], "cannot be read"),
        ([str(street), "-o", str(tmp_path / "no" / "such" / "out.png")], "cannot be written"),
        ([str(street), "--region", "1,2,3"], "a box must be four fractions"),
    ):
        result = run(*options, *(() if "-o" in options else ("-o", str(tmp_path / "out.png"))))
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())


def test_what_the_vision_tower_sees_larger_is_framed() -> None:
    picture = draw_sample_picture(size=(480, 480))
    pieces = (whole_piece(TokenGrid(6, 6)), Piece(GRID, (0, 10, 0, 10), (0, 6, 0, 6)))

    def framed(*seen: Piece) -> int:
        drawing = draw_preview(picture, WHOLE, plan_of("pool"), CORNER, pieces=seen)
        found = dict((colour, count) for count, colour in drawing.getcolors(1 << 24) or [])
        return found.get(PIECE_COLOUR, 0)

    assert framed() == 0
    assert framed(*pieces) > 100


def test_the_sample_picture_is_the_same_every_time() -> None:
    first, again, other = draw_sample_picture(3), draw_sample_picture(3), draw_sample_picture(4)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert (first.size, first.mode) == ((640, 480), "RGB")


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (672, 672), (1280, 400), (24, 24)])
def test_the_sample_picture_has_its_objects_in_their_boxes(size: tuple[int, int]) -> None:
    picture = draw_sample_picture(size=size)
    assert picture.size == size
    sign = sample_boxes(size)["sign"]
    middle = round((sign.x0 + sign.x1) / 2 * size[0]), round((sign.y0 + 0.1 * (sign.y1 - sign.y0)) * size[1])
    red, green, blue = picture.getpixel(middle)
    assert green > red + 20  # the sign's upper half
    assert green > blue
