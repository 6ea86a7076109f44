# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop preview`: a picture of what pruning leaves of an image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_crop.client import CropClient, facts_of
from vllm_crop.commands.region_options import (
    DEFAULTS,
    CellsOption,
    CompressionOption,
    EvictionLayersOption,
    HaloOption,
    MaxTokensOption,
    MethodOption,
    PruningRateOption,
    RegionOption,
    RimOption,
    RimSizeOption,
    UnseenTilesOption,
    ViewTokensOption,
    geometry_of,
    parse_regions,
    plan_for_image,
    request_for_image,
    why_whole,
)
from vllm_crop.config import FoveationConfig
from vllm_crop.errors import CropError
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.registry import VisionGeometry, geometry_from_configs
from vllm_crop.planner import ImagePlan
from vllm_crop.planning.foveation import Piece, describe_pieces
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.planning.summary import PlanSummary

ANSWER_TOKENS = 64
_OPTION = "--base-url"


@dataclass(frozen=True)
class ServerAnswer:
    """What a server made of a question about one image.

    Attributes:
        checkpoint: the model's name or folder as the server knows it.
        tokens: visual tokens unpruned.
        tokens_avg: embeddings a decoder layer runs with, averaged over layers.
        region: None where the image was served whole.
        source: where the region came from.
        localizer: what the server's localizer did; None if it was not asked.
        settings: how the server pruned: method, pruning rate, compression, eviction layers.
        pieces: what its vision tower sees instead of the whole image.
    """

    text: str
    checkpoint: str
    tokens: int
    tokens_avg: float
    region: Region | None
    source: str
    localizer: dict[str, Any] | None
    settings: dict[str, Any]
    pieces: tuple[Piece, ...] = ()
    max_tokens: int | None = None

    def describe(self) -> str:
        """A sentence on the region."""
        if self.localizer is None:
            return f"region: {self.source}"
        confidence = self.localizer["confidence"]
        sure = "" if confidence is None else f", confidence {confidence:.2f}"
        found = "region found" if self.region is not None else "no region found"
        took = f"{self.localizer['ms']:.0f} ms"
        return f"{found} by {self.source}: {self.localizer['outcome']}{sure}, {took}"


def ask_server(base_url: str, picture: Image.Image, question: str, crop: dict[str, Any]) -> ServerAnswer:
    """One chat completion about a picture.

    Args:
        base_url: with `/v1`; the key is taken from OPENAI_API_KEY.
        crop: the request's field.

    Raises:
        typer.BadParameter: the server cannot be asked, refuses, or does not prune.
    """
    try:
        import openai
    except ImportError:
        raise typer.BadParameter(
            "needs the package openai: pip install 'vllm-crop[openai]'", param_hint=_OPTION
        ) from None
    client = CropClient(base_url)
    try:
        model = client.openai.models.list().data[0]
        response = client.send(picture.convert("RGB"), question, crop, max_tokens=ANSWER_TOKENS)
    except openai.APIStatusError as error:
        raise typer.BadParameter(f"{base_url} refuses: {error.message}", param_hint=_OPTION) from None
    except openai.OpenAIError as error:
        raise typer.BadParameter(f"{base_url} cannot be asked: {error}", param_hint=_OPTION) from None
    facts = facts_of(response.headers)
    if facts is None:
        raise typer.BadParameter(
            f"{base_url} does not prune: start it with vllm serve ... --plugin crop", param_hint=_OPTION
        )
    (image,) = facts["images"]
    boxes = image["region"]
    return ServerAnswer(
        text=response.parse().choices[0].message.content or "",
        checkpoint=getattr(model, "root", None) or model.id,
        tokens=image["tokens"],
        tokens_avg=image["tokens_avg"],
        region=Region(tuple(Box(*box) for box in boxes)) if boxes else None,
        source=image["source"],
        localizer=image.get("localizer"),
        settings=facts,
        pieces=tuple(Piece.from_json(piece) for piece in image.get("pieces", ())),
        max_tokens=image.get("max_tokens"),
    )


_LLAVA_CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": {"image_size": 336, "patch_size": 14},
}
_LLAVA_PROCESSOR = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def preview(
    ctx: typer.Context,
    image: Annotated[Path, typer.Argument(help="The picture, in any format Pillow reads.")],
    question: Annotated[
        str | None, typer.Argument(help="What to ask the server at --base-url about it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory of a checkpoint, or its name on the Hub. Left out: what the server at --base-url "
            "serves, else LLaVA-1.5."
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Ask this server, such as http://localhost:8000/v1, and draw the region it finds; its key "
            "from OPENAI_API_KEY."
        ),
    ] = None,
    region: RegionOption = None,
    cells: CellsOption = None,
    pruning_rate: PruningRateOption = None,
    max_tokens: MaxTokensOption = None,
    compression: CompressionOption = DEFAULTS.compression,
    rim: RimOption = DEFAULTS.rim,
    method: MethodOption = DEFAULTS.method,
    eviction_layers: EvictionLayersOption = None,
    view_tokens: ViewTokensOption = None,
    halo: HaloOption = DEFAULTS.foveation.halo,
    rim_size: RimSizeOption = DEFAULTS.foveation.rim_size,
    unseen_tiles: UnseenTilesOption = DEFAULTS.foveation.unseen_tiles,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the PNG.")] = Path(
        "preview.png"
    ),
) -> None:
    """Draw which parts of an image the model keeps, pools, evicts and never sees, and print the counts.

    \b
    For a region you know, without a server:
      vllm-crop preview photo.jpg --region 0.54,0.17,0.79,0.42
    For the region a server finds, with its answer:
      vllm-crop preview photo.jpg "What does the sign say?" --base-url http://localhost:8000/v1
    """
    from vllm_crop.drawing.preview import draw_preview

    if (question is None) != (base_url is None):
        raise typer.BadParameter("a question and --base-url need each other", param_hint="QUESTION")
    asked, picture, answer = parse_regions(region, cells), _open(image), None
    foveation = FoveationConfig(
        view_tokens=view_tokens, halo=halo, rim_size=rim_size, unseen_tiles=unseen_tiles
    )
    if base_url is not None and question is not None:
        given = {name: value for name, value in ctx.params.items() if _is_given(ctx, name)}
        crop: dict[str, Any] = {
            name: given[name] for name in ("method", "pruning_rate", "max_tokens", "rim") if name in given
        }
        crop |= {"regions": [asked.as_lists()]} if asked else {}
        answer = ask_server(base_url, picture, question, crop)
        asked, model = answer.region, model or answer.checkpoint
        # What is not asked for the server decides, and it says what.
        served = answer.settings
        method, rim, max_tokens = served["method"], served["rim"], answer.max_tokens
        pruning_rate = served["pruning_rate"] if max_tokens is None else None
        if compression != served["compression"] and "compression" in given:
            raise typer.BadParameter(
                f"the server's is {served['compression']}, and requests cannot choose",
                param_hint="--compression",
            )
        compression = served["compression"]
        if eviction_layers is None and "eviction_layers" in served:
            eviction_layers = ",".join(map(str, served["eviction_layers"]))
        foveation = FoveationConfig(**served.get("foveation", {}))
    request = request_for_image(asked, pruning_rate, compression, method, eviction_layers, rim, max_tokens)
    geometry = assumed_llava() if model is None else _served(model) if answer else geometry_of(model)
    planned = plan_for_image(geometry, *picture.size, request, foveation)
    if answer is not None:
        planned = replace(planned, pieces=answer.pieces)
    view, num_layers = geometry.view(*picture.size), geometry.num_layers
    if answer is not None:
        _check(answer, planned, num_layers)
        typer.echo(f"{answer.text}\n({answer.describe()})")
    drawing = draw_preview(picture, view, planned.tokens, asked, num_layers, planned.pieces)
    try:
        drawing.save(output, format="PNG")
    except OSError as error:
        raise typer.BadParameter(
            f"{output} cannot be written: {error.strerror or error}", param_hint="--output"
        ) from None
    if model is None:
        typer.echo("No --model: LLaVA-1.5 assumed, a 24 x 24 grid on the 336-pixel centre crop.")
    counts = PlanSummary.of(planned.tokens, planned.region, num_layers)
    why = why_whole(request, asked)
    if answer is not None and answer.localizer is not None:
        why = _why_not_localized(answer.localizer)
    reason = "" if planned.region or planned.prunes else f": {why}"
    typer.echo(f"{counts.tokens} -> {counts.after} ({counts.change})  {counts.describe()}{reason}")
    if counts.evicted:
        typer.echo(counts.describe_layers())
    if planned.pieces:
        typer.echo(f"The vision tower sees {planned.tower_tokens} tokens: {describe_pieces(planned.pieces)}")
    typer.echo(f"Written to {output}")


def _served(model: str) -> VisionGeometry:
    """The geometry of what a server serves, maybe from a folder of another machine."""
    try:
        return load_geometry(model)
    except CropError as error:
        raise typer.BadParameter(
            f"the server's, {model!r}, is needed here to draw its tokens: name its folder or its name on the "
            f"Hub ({error})",
            param_hint="--model",
        ) from None


def _why_not_localized(localizer: Mapping[str, Any]) -> str:
    """Why an image that a localizer was asked about is served whole."""
    outcome, reason = localizer["outcome"], localizer.get("reason")
    if outcome == "global":
        return "the localizer says that the question needs all of it"
    if outcome == "low_confidence":
        return f"the localizer is not sure enough{f', {reason}' if reason else ''}"
    return f"no region from the localizer, {outcome}{f': {reason}' if reason else ''}"


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands in the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check(answer: ServerAnswer, planned: ImagePlan, num_layers: int) -> None:
    """Refuse to draw another plan than the server's."""
    average = fmean(planned.tokens.tokens_per_layer(num_layers))
    if planned.tokens.grid.num_tokens != answer.tokens:
        raise typer.BadParameter(
            f"the server counts {answer.tokens} visual tokens, this checkpoint has "
            f"{planned.tokens.grid.num_tokens}: give the one it serves",
            param_hint="--model",
        )
    if abs(average - answer.tokens_avg) > 0.01:
        raise typer.BadParameter(
            f"the server's layers run with {answer.tokens_avg} tokens on average, and not {average:.2f}: "
            "give the layers it evicts at",
            param_hint="--eviction-layers",
        )


def assumed_llava() -> VisionGeometry:
    """LLaVA-1.5's: 24 x 24 tokens on the centre crop of 336 pixels."""
    return geometry_from_configs(_LLAVA_CONFIG, _LLAVA_PROCESSOR)


def _open(path: Path) -> Image.Image:
    """The picture upright, so that its size is the one the server sees."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        reason = f"there is no file {path}"
    except UnidentifiedImageError:
        reason = f"{path} is no image that Pillow can read"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"{path} cannot be read: {error}"
    raise typer.BadParameter(reason, param_hint="IMAGE")
