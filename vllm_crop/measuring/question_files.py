# SPDX-License-Identifier: Apache-2.0
"""What people's own questions come as: a JSONL file, or a folder of pictures. Every bad line is named."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vllm_crop.errors import CropError

NAMED = 10  # bad lines; of more, how many


def pictures_in(folder: Path) -> list[Path]:
    """All files below a folder that are named like pictures, sorted."""
    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())


def numbered_lines(path: Path, error: type[CropError]) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers.

    Raises:
        error: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path} cannot be read: {reason}") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def json_object(line: str, error: type[CropError]) -> dict[str, Any]:
    """The object that a line is.

    Raises:
        error: it is none.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as reason:
        raise error(f"no JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error("must be a JSON object")
    return value


def why_unreadable(path: Path) -> str | None:
    """Why a file is no picture; None if it is one."""
    try:
        with Image.open(path):
            return None
    except FileNotFoundError:
        return f"there is no file {path}"
    except UnidentifiedImageError:
        return f"{path} is no image that Pillow can read"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{path} cannot be read: {error}"


def listed(problems: Sequence[str]) -> str:
    """How many are bad, and the first of them."""
    more = len(problems) - NAMED
    lines = [*problems[:NAMED], *([f"... and {more} more"] if more > 0 else [])]
    return "\n".join([f"{len(problems)} bad:", *lines])
