# SPDX-License-Identifier: Apache-2.0
"""Why an endpoint cannot be asked, and what to do: for addresses, keys, and whatever a client raises."""

import json
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from vllm_crop.measuring.bounded_client import CONNECT_S, EndpointError

NO_SERVER = "this is no OpenAI-compatible server: is the address right, with /v1?"
_FORM = "an address reads http://host:port/v1"
_ROUTES = ("/chat/completions", "/completions", "/responses", "/models", "/messages")
_MAX_CHARACTERS = 200  # of what a server says
_HUNG_UP = ("RemoteProtocolError", "LocalProtocolError", "ReadError", "WriteError")


def shown(text: str) -> str:
    """What a server says, on one line, not too long and without what steers a terminal."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]} ..."


def checked_address(base_url: str) -> str:
    """The address without blanks around it.

    Raises:
        EndpointError: nothing can be reached by it.
    """
    address = base_url.strip()
    try:
        parts = urlsplit(address)
        if parts.port == 0:
            raise ValueError("port 0")
    except ValueError as error:
        raise EndpointError(f"the address cannot be read ({shown(str(error))}): {_FORM}") from None
    if parts.scheme not in ("http", "https"):
        raise EndpointError(f"the address begins with neither http:// nor https://: {_FORM}")
    if not parts.hostname:
        raise EndpointError(f"the address names no host: {_FORM}")
    if parts.query or parts.fragment:
        raise EndpointError(f"the address goes on with ? or #: leave that out, {_FORM}")
    return address


def public(address: str) -> str:
    """An address as it may be printed: a name and a password in it are left out."""
    parts = urlsplit(address)
    return shown(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def check_key() -> None:
    """Refuse a key that no header can carry.

    Raises:
        EndpointError: it is one.
    """
    key = os.environ.get("OPENAI_API_KEY", "")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise EndpointError(
            "OPENAI_API_KEY has characters that no header can carry (blanks or line ends around it, letters "
            "outside of ASCII): set it again"
        )


def in_words(error: BaseException, address: str, timeout_s: float) -> str:
    """One sentence for what a client of the `openai` package raised."""
    import openai

    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, EndpointError):
            return f"{public(address)}: {one}"
        if isinstance(one, openai.APIStatusError):
            return _status_in_words(one, address) + _by_proxy(address)
    return f"{public(address)}: {_no_answer_in_words(chain, timeout_s)}{_by_proxy(address)}"


def _by_proxy(address: str) -> str:
    """What else may be to blame, and is seldom thought of."""
    parts = urlsplit(address)
    if parts.scheme not in getproxies() or proxy_bypass(parts.hostname or ""):
        return ""
    return f" (asked through the proxy that {parts.scheme}_proxy names; no_proxy leaves hosts out)"


def _no_answer_in_words(chain: Sequence[BaseException], timeout_s: float) -> str:
    import openai

    names = {type(one).__name__ for one in chain}
    if "ConnectTimeout" in names:
        return (
            f"no connection within {min(CONNECT_S, timeout_s):g} s: is the host right, is a firewall between?"
        )
    if any(isinstance(one, TimeoutError | openai.APITimeoutError) for one in chain):
        return (
            f"no whole answer within {timeout_s:g} s: does the server hang? One that is only slow is given "
            "more with --timeout"
        )
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({shown(one.verify_message)}): SSL_CERT_FILE names another "
                "authority"
            )
        if isinstance(one, ssl.SSLError):
            return "no TLS is spoken there: is it http:// instead of https://?"
        if isinstance(one, socket.gaierror):
            return "no host has this name: is it spelt right, and known here?"
        if isinstance(one, ConnectionRefusedError):
            return (
                "nobody listens there: is the server up (a start takes minutes), are host and port right, "
                "does it listen beyond its own machine?"
            )
    if "TooManyRedirects" in names:
        return "it redirects in a circle: ask the server itself, without what is in front of it"
    if names.intersection(_HUNG_UP):
        return "it hangs up or speaks no HTTP: does it want https://, or is it another service's port?"
    if isinstance(chain[0], openai.APIConnectionError):
        return f"no connection ({shown(str(chain[-1]) or type(chain[-1]).__name__)})"
    return NO_SERVER


def said_by(error: Any) -> str:
    """The message in an error of vLLM's or OpenAI's form; else the beginning of the body."""
    text = error.response.text
    try:
        body = json.loads(text)
        text = str(
            body["error"]["message"] if "error" in body else body.get("message", body.get("detail", text))
        )
    except Exception:
        if text.lstrip().startswith("<"):
            return "a web page"
    return shown(text) or "without a word"


def _status_in_words(error: Any, address: str) -> str:
    where, status, said = public(address), error.status_code, said_by(error)
    if status in (401, 403):
        if not os.environ.get("OPENAI_API_KEY"):
            return f"{where} asks for a key: set OPENAI_API_KEY to the server's (HTTP {status})"
        return f"{where} refuses the key in OPENAI_API_KEY (HTTP {status}): is it this server's?"
    if status in (404, 405):
        return f"{where} answers HTTP {status}: {_where_else(address)} ({said})"
    if status in (502, 503, 504):
        return (
            f"{where} answers HTTP {status}: no server is ready behind it, or it is still starting ({said})"
        )
    return f"{where} answers HTTP {status}: {said}"


def _where_else(address: str) -> str:
    path = urlsplit(address).path.rstrip("/")
    base = public(address).rstrip("/")
    for route in _ROUTES:
        if path.endswith(route):
            return f"leave {route} out: {base.removesuffix(route)}"
    if path.endswith("/v1"):
        more = f", which is {path.removesuffix('/v1')} here," if path != "/v1" else ""
        return f"no OpenAI-compatible server is there: is what stands before /v1{more} right?"
    return f"the address lacks /v1 at its end: {base}/v1"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
