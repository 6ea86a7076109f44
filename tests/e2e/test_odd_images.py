# SPDX-License-Identifier: Apache-2.0
"""Images as people have them, on a server of every family that sees them in its own way.

Right as transformers has it, or a clear 400.
"""

import base64
import io
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from vllm.multimodal.media.image import ImageMediaIO

from tests.conftest import CheckpointOf
from tests.e2e.conftest import FAMILY_CROP, MODEL, compression_of
from tests.e2e.test_serve import EVERY_TOKEN, FIRST, STEPS, TEXT, chat, expected
from tests.families import Family
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.client import facts_of
from vllm_crop.errors import UnsupportedImageError
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.measuring.server import Server, get_text

pytestmark = pytest.mark.e2e

NOISE, OTHER = noise_image(90, 330, 250), noise_image(91, 330, 250)
ORIENTATION = 0x0112  # EXIF


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """Lies on its side in the file, and says so."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(NOISE, "JPEG", exif=exif, quality=95)


def translucent() -> bytes:
    picture = NOISE.convert("RGBA")
    picture.putalpha(OTHER.convert("L"))
    return encoded(picture)


ODD = {
    "28x28": encoded(noise_image(92, 28, 28)),
    "2x2": encoded(noise_image(93, 2, 2)),
    "1x2000": encoded(noise_image(94, 1, 2000)),
    "4000x30": encoded(noise_image(95, 4000, 30)),
    "grey": encoded(NOISE.convert("L")),
    "grey with alpha": encoded(OTHER.convert("LA")),
    "one bit": encoded(NOISE.convert("1")),
    "16 bits": encoded(NOISE.convert("I;16")),
    "alpha": translucent(),
    "palette": encoded(NOISE.convert("P")),
    "cmyk": encoded(NOISE.convert("CMYK"), "JPEG"),
    "animated": encoded(NOISE, "GIF", save_all=True, append_images=[OTHER], duration=100),
    "turned": turned(),
    "20 megapixels": encoded(noise_image(96, 125, 100).resize((5000, 4000)), "JPEG"),
}


@pytest.fixture(scope="module")
def checkpoint(family: Family, checkpoint_of: CheckpointOf) -> Path:
    return checkpoint_of(family, family.deep)


@pytest.fixture(scope="module")
def client(family_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{family_server.base_url}/v1", api_key="unused", max_retries=0)


def ask(client: openai.OpenAI, file: bytes) -> Any:
    url = "data:application/octet-stream;base64," + base64.b64encode(file).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
    return client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],  # type: ignore[typeddict-item, misc, list-item]
        max_tokens=STEPS,
        temperature=0,
        extra_body={**EVERY_TOKEN, "crop": {"regions": FIRST.as_lists()}},
    )


@pytest.mark.parametrize("name", ODD)
def test_it_is_pruned_as_transformers_has_it_or_refused(
    name: str,
    client: openai.OpenAI,
    family: Family,
    family_server: Server,
    checkpoint: Path,
    family_hf: HfReference,
) -> None:
    picture = ImageMediaIO().load_bytes(ODD[name]).media  # upright, RGB: what the model sees
    try:
        grid = load_geometry(str(checkpoint)).grid(*picture.size)
    except UnsupportedImageError as error:
        with pytest.raises(openai.BadRequestError, match=str(error).split(",")[0]):
            ask(client, ODD[name])
    else:
        response = ask(client, ODD[name])
        (image,) = facts_of(response.headers)["images"]
        assert image["tokens"] == grid.num_tokens
        completion = response.parse()
        answer = completion.choices[0].message.content, completion.usage.prompt_tokens
        stages = dict(method="plc+ilp", eviction_layers=(2,))
        compression, rate = compression_of(family), FAMILY_CROP["pruning_rate"]
        assert answer == expected(family_hf, [picture], [FIRST], rate, compression, **stages)  # type: ignore[arg-type]
    assert get_text(f"{family_server.base_url}/health") == ""


def test_the_region_follows_the_upright_picture(client: openai.OpenAI, family_hf: HfReference) -> None:
    """The same pixels without the note that they lie on their side are another question."""
    upright = ImageMediaIO().load_bytes(ODD["turned"]).media
    assert upright.size == NOISE.size[::-1]
    answers = [
        ask(client, file).parse().choices[0].message.content for file in (ODD["turned"], encoded(upright))
    ]
    assert answers[0] == answers[1]
    lying = Image.open(io.BytesIO(ODD["turned"]))
    lying.getexif().clear()
    sideways = chat(client, [lying.convert("RGB")], {"regions": FIRST.as_lists()})
    assert sideways.parse().choices[0].message.content != answers[0]


def test_what_is_no_image_is_named(client: openai.OpenAI, family_server: Server) -> None:
    for broken in (b"", b"no image", ODD["grey"][:500]):
        with pytest.raises(openai.BadRequestError):
            ask(client, broken)
    assert get_text(f"{family_server.base_url}/health") == ""
