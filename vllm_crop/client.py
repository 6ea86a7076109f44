# SPDX-License-Identifier: Apache-2.0
"""A picture as it travels in a JSON body."""

import base64
import io
from typing import Any

from PIL import Image


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question_about(picture: Image.Image, question: str) -> list[Any]:
    """The messages of a question."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]
