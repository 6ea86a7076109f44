# SPDX-License-Identifier: Apache-2.0
"""Finds the field `crop` in a JSON body without parsing the rest.

vLLM parses the body itself, pictures included; doing so twice would stop the event loop twice. Most bodies
are done with after one look for the field's name. In the others brackets are counted, step by step, so that a
large one can be read in a thread beside the event loop.
"""

import json
import re
from typing import Any

from vllm_crop.crop_params import MAX_FIELD_BYTES, MAX_FIELD_DEPTH, MISPLACED_IN, InvalidCropError, misplaced

FIELD = "crop"
LONGEST_NAME = 26  # bytes: every letter may be written as an escape

# "crop" as a JSON string, in every spelling that JSON has for it.
_NAME = re.compile(rb'"(?:c|\\u0063)(?:r|\\u0072)(?:o|\\u006[fF])(?:p|\\u0070)"')
_PLAIN, _ESCAPE = b'"crop"', b"\\u00"
# Short strings whole, of others the beginning; within values, where no name counts, many at once. No `)++`:
# before Python 3.11.5 such a repeat keeps what its last, failed round has matched (gh-106052), and the rest
# of the body is misread. A bounded one needs as little memory.
_TOKEN = re.compile(rb'[{}\[\]]|"[^"\\]{0,64}+"|"')
_WITHIN = re.compile(rb'[{}\[\]]|(?:"[^"\\]{0,64}+"[\s,:]*+){1,256}|"')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_PARENT = re.compile(rb'"(%s)"' % "|".join(MISPLACED_IN).encode())
_OPENS = re.compile(rb"\s*+:\s*+\{")
_VALUE = re.compile(rb"\s*+:\s*+")
_SET = re.compile(rb"\s*+:\s*+(?!null)")
_SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^,\]}\s]++', re.DOTALL)
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*+\{")


def may_have_field(body: bytes) -> bool:
    """Whether the field's name occurs in a part of a body, at any place."""
    # Plain, or with an escape: to look for these runs through a picture several times as fast.
    return _PLAIN in body or (_ESCAPE in body and _NAME.search(body) is not None)


def is_utf8(body: bytes) -> bool:
    """Whether a body is in the encoding that nearly all are in; JSON may be in five."""
    return json.detect_encoding(body[:4]).startswith("utf-8")


def find_field(body: bytes) -> Any:
    """The value of the body's own field `crop`; None if there is none, or if the body is no JSON object.

    Of several the last one counts, as everywhere in JSON.

    Raises:
        InvalidCropError: it is longer or more deeply nested than it can have a reason to be, or stands where
            nobody looks for it.
    """
    if not is_utf8(body):
        try:
            text = body.decode(json.detect_encoding(body[:4]), "surrogatepass")
        except UnicodeDecodeError:
            return None  # the route answers bodies that are not JSON
        body = text.encode("utf-8", "surrogatepass")
        if not may_have_field(body):
            return None
    found = _find_bytes(body)
    if found is None:
        return None
    try:
        return json.loads(found)
    except ValueError:
        return None
    except RecursionError:
        raise _too_deep() from None


def _find_bytes(body: bytes) -> bytes | None:
    start = _START.match(body)
    if start is None:
        return None
    found: bytes | None = None
    depth, position = 1, start.end()
    value_from: int | None = None  # of the field's value, while we are within it
    parent: str | None = None  # where the field does not belong, while we are within it
    while (token := (_TOKEN if depth == 1 + bool(parent) else _WITHIN).search(body, position)) is not None:
        position = token.end()
        kind = body[token.start()]
        if kind in b"{[":
            depth += 1
            if value_from is not None and depth > MAX_FIELD_DEPTH + 1:
                raise _too_deep()
        elif kind in b"}]":
            depth -= 1
            if depth == 1 and value_from is not None:
                found, value_from = body[value_from:position], None
            if depth == 1:
                parent = None
            if depth == 0:
                break
        elif position - token.start() == 1 and not (position := _end_of_string(body, token.start())):
            return None  # a string that does not end
        elif depth == 1 and (named := _PARENT.fullmatch(body, token.start(), position)):
            if (opens := _OPENS.match(body, position)) is not None:
                parent, depth, position = named.group(1).decode(), depth + 1, opens.end()
        elif depth == 2 and parent and _NAME.fullmatch(body, token.start(), position):
            if _SET.match(body, position) is not None:
                raise misplaced(parent)
        elif depth == 1 and _NAME.fullmatch(body, token.start(), position):
            colon = _VALUE.match(body, position)
            if colon is None:
                continue  # a value that reads like the name
            if body[colon.end() : colon.end() + 1] in (b"{", b"["):
                value_from, position = colon.end(), colon.end()
            elif (scalar := _SCALAR.match(body, colon.end())) is not None:
                found, position = scalar.group(), scalar.end()
        if value_from is not None and position - value_from > MAX_FIELD_BYTES:
            raise InvalidCropError(FIELD, f"longer than {MAX_FIELD_BYTES >> 10} KiB")
    if depth:
        return None  # not closed: the route says that this is no JSON
    if found is not None and len(found) > MAX_FIELD_BYTES:
        raise InvalidCropError(FIELD, f"longer than {MAX_FIELD_BYTES >> 10} KiB")
    return found


def _end_of_string(body: bytes, start: int) -> int:
    """Behind the closing quote of the string that begins at `start`, 0 if it does not end.

    Most are pictures, without escapes: the next quote is found at the speed of memory.
    """
    end = body.find(b'"', start + 1)
    if end < 0 or body[end - 1] != ord("\\"):
        return end + 1
    string = _STRING.match(body, start)
    return 0 if string is None else string.end()


def _too_deep() -> InvalidCropError:
    return InvalidCropError(FIELD, f"nested too deeply, at most {MAX_FIELD_DEPTH} levels")
