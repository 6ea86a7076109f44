# SPDX-License-Identifier: Apache-2.0
"""The options `plan` and `preview` share, and the plan that follows from them.

A server plans with the same Planner.
"""

import math
import re
from typing import Annotated, Literal

import typer

from vllm_crop.config import DEFAULT_STAGES, CropConfig, FoveationConfig
from vllm_crop.crop_params import MAX_BOXES, CropParams, InvalidCropError, parse_region
from vllm_crop.errors import CropError, UnsupportedImageError
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.registry import VisionGeometry, check_layers_that_evict
from vllm_crop.planner import ImagePlan, Planner
from vllm_crop.planning.budget import BudgetError, Method
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import Compression
from vllm_crop.request import ImageRequest, image_requests

DEFAULTS = CropConfig()
_OPTIONS = {"crop.regions": "--region", "crop.max_tokens": "--max-tokens"}

RegionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="X0,Y0,X1,Y1",
        help="A box, as fractions of the image as sent; repeat it for several boxes.",
    ),
]
CellsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cells",
        metavar="X0,Y0,X1,Y1",
        help="A box in cells of the 8x8 grid, 0..7, both ends included, as in the CROP paper.",
    ),
]
PruningRateOption = Annotated[
    float | None,
    typer.Option(
        metavar="RATE",
        help="Fraction of the visual tokens to remove, averaged over layers, in [0, 1). "
        f"{DEFAULTS.pruning_rate:g} where neither this nor --max-tokens is given.",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Most visual tokens of the image, in place of a pruning rate; with or without a region. (With 0 "
        "a request takes an image out of its prompt: there is nothing to show.)",
    ),
]
CompressionOption = Annotated[
    Compression,
    typer.Option(
        help="Tokens outside the region: averaged in groups, or one of each group kept; foveate averages and "
        "shows the vision tower only the region at full size."
    ),
]
RimOption = Annotated[
    float,
    typer.Option(
        help="How far around the region the context keeps more than elsewhere, as a fraction of the image's "
        "sides, at most 0.5."
    ),
]
ViewTokensOption = Annotated[
    int | None,
    typer.Option(
        min=4,
        help="With --compression foveate: visual tokens that all of the image is seen in, as the server's "
        "foveation.view_tokens.",
    ),
]
HaloOption = Annotated[
    int, typer.Option(min=0, max=1024, help="With --compression foveate: as the server's foveation.halo.")
]
RimSizeOption = Annotated[
    Literal["half", "full"],
    typer.Option(help="With --compression foveate: as the server's foveation.rim_size."),
]
UnseenTilesOption = Annotated[
    Literal["from_whole", "left_out"],
    typer.Option(help="With --compression foveate: as the server's foveation.unseen_tiles."),
]
MethodOption = Annotated[
    Method,
    typer.Option(help="Compress before the language model (plc), evict inside it (ilp), both, or neither."),
]
EvictionLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="K1,K2,...",
        help="Decoder layers from which on ilp sees fewer tokens, ascending. "
        f"{','.join(map(str, DEFAULT_STAGES))} where left out.",
    ),
]


def parse_regions(regions: list[str] | None, cells: list[str] | None) -> Region | None:
    """The region that `--region` and `--cells` describe together; None without any.

    Raises:
        typer.BadParameter: a box that is none.
    """
    boxes = [box for text in regions or [] for box in _parse_fractions(text).boxes]
    boxes += [box for text in cells or [] for box in _parse_cells(text).boxes]
    return Region(tuple(boxes)) if boxes else None


def request_for_image(
    region: Region | None,
    pruning_rate: float | None,
    compression: Compression,
    method: Method,
    eviction_layers: str | None,
    rim: float = DEFAULTS.rim,
    max_tokens: int | None = None,
) -> ImageRequest:
    """What a server makes of these settings for one image.

    Raises:
        typer.BadParameter: a setting is out of range.
    """
    if pruning_rate is not None and max_tokens is not None:
        raise typer.BadParameter(
            "and --pruning-rate are two ways to say one thing: give one of them", param_hint="--max-tokens"
        )
    settings = {
        "method": method,
        "pruning_rate": DEFAULTS.pruning_rate if pruning_rate is None else pruning_rate,
        "compression": compression,
        "rim": rim,
        "eviction_layers": parse_layers(eviction_layers) if eviction_layers is not None else None,
        # Plans are the same whatever the weights.
        "resampler": {"weights": "any"} if compression == "resampler" else {},
        # No operator has set limits here.
        "limits": {"max_boxes_per_image": MAX_BOXES, "max_pruning_rate": math.nextafter(1, 0)},
    }
    try:
        config = CropConfig.from_mapping(settings)
    except CropError as error:
        place, _, reason = str(error).partition(": ")
        field = place.removeprefix("additional_config.crop.").partition("[")[0]
        raise typer.BadParameter(reason, param_hint=f"--{field.replace('_', '-')}") from None
    try:
        asked = CropParams(regions=[region], max_tokens=max_tokens, method=method)
        return image_requests(asked, config, num_images=1)[0]
    except InvalidCropError as error:
        raise typer.BadParameter(str(error), param_hint="--region") from None


def plan_for_image(
    geometry: VisionGeometry,
    width: int,
    height: int,
    request: ImageRequest,
    foveation: FoveationConfig = DEFAULTS.foveation,
) -> ImagePlan:
    """The plan a server makes for an image of this size in pixels.

    Args:
        foveation: the server's.

    Raises:
        typer.BadParameter: the model cannot evict at these layers, or they leave too little of the budget, or
            it takes no image of this size, or cannot be shown parts of one.
    """
    if request.compression == "foveate" and geometry.why_no_foveation:
        raise typer.BadParameter(
            f"'foveate' is not possible with this model: {geometry.why_no_foveation}",
            param_hint="--compression",
        )
    for name, field in type(foveation).model_fields.items():
        if request.compression != "foveate" and getattr(foveation, name) != field.default:
            raise typer.BadParameter("needs --compression foveate", param_hint=f"--{name.replace('_', '-')}")
    planner = Planner(DEFAULTS.model_copy(update={"foveation": foveation}), geometry)
    try:
        if request.eviction_layers:
            check_layers_that_evict(geometry, request.eviction_layers)
        return planner.plan_image(request, width, height)
    except BudgetError as error:
        raise typer.BadParameter(str(error), param_hint="--eviction-layers") from None
    except UnsupportedImageError as error:
        raise typer.BadParameter(str(error)) from None
    except InvalidCropError as error:
        option = _OPTIONS.get(error.parameter, "--pruning-rate")
        raise typer.BadParameter(error.reason, param_hint=option) from None


def geometry_of(model: str) -> VisionGeometry:
    """The geometry of `--model`.

    Raises:
        typer.BadParameter: the checkpoint cannot be read or pruned.
    """
    try:
        return load_geometry(model)
    except CropError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None


def why_whole(request: ImageRequest, region: Region | None) -> str:
    """Why an image is served whole."""
    if request.method == "off":
        return "the method is off"
    if region is None:
        return "it has no more tokens than that" if request.max_tokens else "no region is given"
    if request.max_tokens is not None:
        return "it has no more tokens than that"
    if request.region is None:
        return "the pruning rate is 0"
    return "the model sees nothing of the region"


def _parse_fractions(text: str) -> Region:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"four fractions x0,y0,x1,y1 needed, got {text!r}", param_hint="--region"
        ) from None
    try:
        region = parse_region(numbers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--region") from None
    assert region is not None  # only None gives None
    return region


def parse_layers(text: str) -> list[int]:
    """Eviction layers as an option names them.

    Raises:
        typer.BadParameter: no numbers.
    """
    if not re.fullmatch(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*", text):
        raise typer.BadParameter(
            f"layer numbers such as 2 or 2,16 needed, got {text!r}", param_hint="--eviction-layers"
        )
    return [int(number) for number in text.split(",")]


def _parse_cells(text: str) -> Region:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){3}", text):
        raise typer.BadParameter(f"four cell numbers x0,y0,x1,y1 needed, got {text!r}", param_hint="--cells")
    try:
        return Region.from_grid_cells(*(int(number) for number in text.split(",")))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cells") from None
