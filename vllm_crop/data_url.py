# SPDX-License-Identifier: Apache-2.0
"""A picture as it travels in a JSON body."""

import base64
import io

from PIL import Image


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
