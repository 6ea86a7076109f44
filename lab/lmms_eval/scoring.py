# SPDX-License-Identifier: Apache-2.0
"""What tinyvqa.yaml calls. It is copied beside the pictures and imports nothing of this repository."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent


def pictures(document: Mapping[str, Any]) -> list[Image.Image]:
    """The document's only picture."""
    return [Image.open(FOLDER / document["image"]).convert("RGB")]


def exact(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is right, word for word: once for all questions and once for those of its family."""
    right = float(results[0].strip() == document["answer"])
    return {"exact": right, document["family"]: right}
