# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU image, serves what it serves by itself, asks it and stops it: `make image-test`.

Also what only an image can get wrong: its user, another user's caches, its health check, counters of a run
that crashed. Ends with 1 if anything is not as it should be.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from build_image import build, tag_of
from containers import Container, make_container, run_once
from image_tools import Tool, fail, find_tool
from openai import BadRequestError
from rich.console import Console

from lab.evaluation.questions import make_test_set
from lab.findings import Findings, seconds
from vllm_crop.client import CropAnswer, CropClient
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.server import free_port, get_text, log_tail

LOG = Path("build/image/server.log")
START_S = 600.0
ANOTHER_USER = "54321:0"  # of group 0, as OpenShift's are
WHOLE = 576  # visual tokens of a scene
BOX = {"regions": [[0.25, 0.5, 0.5, 0.75]]}
NONE_OF_THESE = {"regions": [[2, 0, 0, 0]]}


def main() -> None:
    """Build unless told not to, try everything, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to the tool's build.")
    parser.add_argument("--no-build", action="store_true", help="try the image that is there")
    options, build_args = parser.parse_known_args()
    tool, tag, findings = find_tool(), tag_of("cpu"), Findings()
    findings.note("machine", f"{os.cpu_count()} cores, {platform.machine()}, {tool.name}")
    if not options.no_build:
        begin = time.monotonic()
        build(tool, "cpu", build_args)
        findings.note("build", seconds(time.monotonic() - begin))
    findings.note("size", tool.size(tag))
    checked = run_once(tool, tag, ANOTHER_USER, "vllm-crop", "check", "--model", "/models/tinyvqa")
    said = checked.stdout.strip().splitlines() or [checked.stderr]
    findings.note(f"vllm-crop check as user {ANOTHER_USER}", said[-1], not checked.returncode)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    container = make_container(tool, tag, port, LOG)
    try:
        try_container(tool, tag, container, f"http://127.0.0.1:{port}", findings)
    finally:
        LOG.write_text(container.log())
        container.remove()
    Console(width=120).print(findings.table)
    if not findings.right:
        fail(f"not everything is right, see above and {LOG}")


def try_container(tool: Tool, tag: str, container: Container, base_url: str, findings: Findings) -> None:
    """Serve, ask, crash, serve again, stop."""
    findings.note("start, until /health", seconds(start(container, base_url)))
    user = container.run("id", "-u").stdout.strip()
    findings.note("user", user, user not in ("", "0"))
    health = container.run(*tool.settings(tag)["Healthcheck"]["Test"][1:])
    findings.note(
        "its own health check", "healthy" if health.returncode == 0 else health.stderr, not health.returncode
    )

    ask(base_url, findings)
    counted = visual_tokens(base_url)
    findings.note("/metrics: crop:visual_tokens_total", f"{counted:.0f}", counted > 0)
    page = get_text(f"{base_url}/plugins/crop/")
    findings.note("/plugins/crop/", f"{len(page)} characters of HTML", "<html" in page)

    container.kill()
    findings.note("start after a crash", seconds(start(container, base_url)))
    counted = visual_tokens(base_url)
    findings.note("crop:visual_tokens_total of the run before", f"{counted:.0f}", counted == 0)
    begin = time.monotonic()
    code = container.stop()
    findings.note("stop, after SIGTERM", seconds(time.monotonic() - begin))
    findings.note("exit code", code, code == 0)


def start(container: Container, base_url: str) -> float:
    """Seconds until the server is healthy."""
    begin = time.monotonic()
    container.start()
    while (elapsed := time.monotonic() - begin) < START_S and container.is_running():
        try:
            get_text(f"{base_url}/health")
            return elapsed
        except OSError:
            time.sleep(0.2)
    LOG.write_text(container.log())
    fail(f"the server was not ready after {elapsed:.0f} s. The end of {LOG}:\n{log_tail(LOG)}")


def ask(base_url: str, findings: Findings) -> None:
    """One question: where the server looks, in a box, unpruned, and in a box that must be refused."""
    client, scene = CropClient(f"{base_url}/v1"), make_test_set(2)[0]
    picture, question = scene.picture(), scene.questions[0]
    findings.note("question", question.text)
    for what, crop, most in (
        ("crop left out", None, 64),
        ("crop: a box", BOX, 64),
        ('crop: {"method": "off"}', {"method": "off"}, WHOLE),
    ):
        answer = client.ask(picture, question.text, crop)
        right = answer.text == question.answer and tokens(answer) == most
        found = f"{answer.text!r}, {tokens(answer):.0f} of {WHOLE} tokens, prompt {answer.prompt_tokens}"
        findings.note(what, found, right)
    try:
        answer = client.ask(picture, question.text, NONE_OF_THESE)
        findings.note(f"crop: {json.dumps(NONE_OF_THESE)}", answer.text, False)
    except BadRequestError as error:
        findings.note(f"crop: {json.dumps(NONE_OF_THESE)}", f"HTTP {error.status_code}")


def tokens(answer: CropAnswer) -> float:
    """Visual tokens that the answer was made of, averaged over layers."""
    return float(answer.facts.get("tokens_avg", WHOLE))


def visual_tokens(base_url: str) -> float:
    """What /metrics says has been asked about."""
    return metric_sum(get_text(f"{base_url}/metrics"), "crop:visual_tokens_total")


if __name__ == "__main__":
    main()
