# SPDX-License-Identifier: Apache-2.0
"""The field is found in a body as a JSON parser would find it, without the cost of one."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_crop_server import body as reader
from vllm_crop_server.body import LONGEST_NAME, find_field, may_have_field

from vllm_crop.crop_params import MAX_FIELD_BYTES, MAX_FIELD_DEPTH, InvalidCropError

NAMES = [
    '"crop"',
    '"\\u0063rop"',
    '"c\\u0072op"',
    '"cr\\u006fp"',
    '"cr\\u006Fp"',
    '"\\u0063\\u0072\\u006f\\u0070"',
]
texts = st.text(max_size=6) | st.sampled_from(
    ["crop", '"crop":', "{", "}", "[", "\\", '\\"', "{crop:1}", "é\U0001f600"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.just("crop"), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(texts | st.just("crop"), values, max_size=6)
parents = st.sampled_from(["extra_body", "vllm_xargs"])


@given(body=bodies | values, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_it_is_what_a_parser_finds(body: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only, indent=indent)
    expected = body.get("crop") if isinstance(body, dict) else None
    assert find_field(text.encode("utf-8", "surrogatepass")) == expected


@given(body=st.dictionaries(texts | st.just("crop") | parents, values, max_size=6))
def test_it_is_refused_in_objects_where_nobody_looks_for_it_and_there_alone(body: dict[str, Any]) -> None:
    wrong = [
        name
        for name in ("extra_body", "vllm_xargs")
        if isinstance(body.get(name), dict) and body[name].get("crop") is not None
    ]
    if wrong:
        with pytest.raises(InvalidCropError, match="nobody reads it there"):
            find_field(json.dumps(body).encode())
    else:
        assert find_field(json.dumps(body).encode()) == body.get("crop")


@given(body=bodies, encoding=st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"]))
def test_in_every_encoding_that_json_has(body: dict[str, Any], encoding: str) -> None:
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert find_field(text.encode(encoding)) == json.loads(text).get("crop")


@given(body=bodies, cut=st.floats(0, 1))
def test_a_body_that_is_cut_off_has_none(body: dict[str, Any], cut: float) -> None:
    text = json.dumps({"crop": {"method": "plc"}, **body}).encode()
    assert find_field(text[: int(cut * (len(text) - 1))]) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", ["", " \n\t"])
def test_every_spelling_of_the_name_is_known(name: str, space: str) -> None:
    body = f'{{{space}{name}{space}:{space}{{"method": "off"}}{space}}}'.encode()
    assert find_field(body) == {"method": "off"} == json.loads(body)["crop"]
    assert len(name.encode()) <= LONGEST_NAME


def test_the_last_of_several_counts_and_nested_ones_do_not() -> None:
    assert find_field(b'{"crop": 1, "tools": [{"crop": 2}], "crop": {"a": {"crop": 3}}}') == {
        "a": {"crop": 3}
    }
    assert find_field(b'{"tools": [{"crop": 2}], "x": {"crop": 3}}') is None
    assert find_field(b'{"a": "crop", "b": "x\\"crop\\": 5"}') is None
    assert find_field(b'["crop", 1]') is None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"}", b'{"crop"', b'{"crop":', b'{"crop":}', b'"crop": 1', b"\xff\xfe"]
)
def test_what_is_no_json_is_left_to_the_route(body: bytes) -> None:
    assert find_field(body) is None


def test_no_pattern_needs_a_newer_python() -> None:
    # gh-106052, mended in 3.11.5: Debian 12's 3.11.2 found no field in a body with a picture. The other
    # patterns repeat what cannot fail half-way.
    repeats_keeping_all = re.compile(rb"\)[*+?]\+")
    assert not any(repeats_keeping_all.search(one.pattern) for one in (reader._TOKEN, reader._WITHIN))


@pytest.mark.parametrize("parent", ["extra_body", "vllm_xargs"])
@pytest.mark.parametrize(
    "body",
    [
        '{"model": "m", "PARENT": {"a": [{}, "b"], "crop": {"method": "off"}}}',
        '{"PARENT" : { "\\u0063rop" :1',
    ],
)
def test_where_nobody_looks_for_it_is_said(parent: str, body: str) -> None:
    words = "nobody reads it there: it belongs into the body itself"
    with pytest.raises(InvalidCropError, match=words) as said:
        find_field(body.replace("PARENT", parent).encode())
    assert said.value.parameter == f"{parent}.crop"


@pytest.mark.parametrize(
    "body",
    [
        {"extra_body": {"a": 1}, "crop": {"method": "off"}},
        {"extra_body": {"crop": None, "a": {"crop": 1}, "b": "crop"}, "crop": {"method": "off"}},
        {"extra_body": ["crop", {"crop": 1}], "crop": {"method": "off"}},
        {"extra_body": "crop", "x": {"extra_body": {"crop": 1}}, "crop": {"method": "off"}},
        {"crop": {"method": "off"}, "vllm_xargs": {}, "y": {"crop": 1}},
    ],
)
def test_what_is_only_called_like_it_elsewhere_is_nobodys_mistake(body: Any) -> None:
    assert find_field(json.dumps(body).encode()) == {"method": "off"}


def test_the_field_is_bounded() -> None:
    fits, too_long = (b'{"crop": "%s"}' % (b"x" * size) for size in (MAX_FIELD_BYTES - 2, MAX_FIELD_BYTES))
    assert find_field(fits)
    for body in (
        too_long,
        b'{"crop": {"a": "%s"}}' % (b"x" * MAX_FIELD_BYTES),
        b'{"crop": [%s0]}' % (b"0," * 10**6),
    ):
        with pytest.raises(InvalidCropError, match="longer than 256 KiB"):
            find_field(body)
    with pytest.raises(InvalidCropError, match="nested too deeply"):
        find_field(b'{"crop": %s%s}' % (b"[" * (MAX_FIELD_DEPTH + 2), b"]" * (MAX_FIELD_DEPTH + 2)))


def test_a_large_picture_costs_little() -> None:
    """Neither a look for the name nor a search beside a picture of 16 MB."""
    picture = b"A" * (16 << 20)
    without, beside = (
        b'{"url": "%s", %s}' % (picture, more)
        for more in (b'"x": 1', b'"x": "\\u0041", "crop": {"method": "plc"}')
    )
    start = time.process_time()
    assert not may_have_field(without)
    assert find_field(beside) == {"method": "plc"}
    assert time.process_time() - start < 1
