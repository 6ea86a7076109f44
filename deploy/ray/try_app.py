# SPDX-License-Identifier: Apache-2.0
"""`make ray-test`: serve.yaml with a small model on this machine, asked, with a replica killed, asked on.

With direct streaming and two replicas everything must arrive at a client; with Ray's own ingress and one,
all but the facts. Ends with 1 if anything is not as it should be.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import yaml
from local_cluster import RayError, run_ray
from mixed_requests import AT_ONCE, MODEL_NAME, NOWHERE, PRUNED, WHOLE, ask_all, questions
from rich.console import Console
from traffic import kill_one
from typer.testing import CliRunner

from lab.demo.setting import LOCALIZER, MODEL, PRUNING_RATE
from lab.findings import Findings, seconds
from vllm_crop.client import CropClient
from vllm_crop.commands.app import app
from vllm_crop.measuring.server import HOST, free_port

BUILD = Path("build/ray")
CONFIG = Path(__file__).with_name("serve.yaml")
REQUESTS = 60
DIRECT = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
# Several processes share few cores: no thread is bound to one.
ENVIRONMENT = {
    **{"PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'server'}", "HF_HUB_OFFLINE": "1"},
    **{"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Try both ways of serving, print what was found."""
    findings = Findings()
    try:
        try_direct_streaming(findings)
        try_own_ingress(findings)
    except (RayError, openai.OpenAIError) as error:
        findings.note("could not go on", error, False)
    Console(width=140).print(findings.table)
    if not findings.right:
        sys.exit(f"not everything is right: see above, and {BUILD}")


def try_direct_streaming(findings: Findings) -> None:
    """Two replicas: the mix, `vllm-crop check`, a replica killed in the middle of traffic."""
    config, base_url = write_config(replicas=2)
    with run_ray({**ENVIRONMENT, **DIRECT}, BUILD / "direct.log") as cluster:
        findings.note("direct streaming, two replicas: start", seconds(cluster.deploy(config)))
        begin = time.monotonic()
        answers = list(ask_all(base_url, REQUESTS))
        findings.note(f"{REQUESTS} requests, {AT_ONCE} at once", seconds(time.monotonic() - begin))
        wrong = Counter(one.wrong for one in answers if one.wrong)
        findings.note("counts, facts, refusals", dict(wrong) or "as they should be", not wrong)
        judged = [one.true for one in answers if one.true is not None]
        share = f"{sum(judged)} of {len(judged)}"
        findings.note(f"true answers from {PRUNED} of {WHOLE} tokens", share, sum(judged) > 0.8 * len(judged))
        checked = CliRunner().invoke(app, ["check", "--base-url", base_url])
        lines = [line.strip() for line in checked.stdout.splitlines()]
        working = [line.startswith("works ") for line in lines]
        findings.note("vllm-crop check --base-url", f"{sum(working)} of {len(lines)} work", all(working))
        for line in lines:
            if not line.startswith("works "):
                findings.note("", line, False)
        kill_one(cluster, base_url, findings)


def try_own_ingress(findings: Findings) -> None:
    """One replica behind Ray's own ingress: the field is honoured or refused, and no facts come back."""
    config, base_url = write_config(replicas=1)
    with run_ray(ENVIRONMENT, BUILD / "ingress.log") as cluster:
        findings.note("Ray's own ingress, one replica: start", seconds(cluster.deploy(config)))
        client, asked = CropClient(base_url), questions()[0]
        whole = client.ask(asked.picture, asked.text, {"method": "off"}).prompt_tokens
        for what, crop in (("a region", {"regions": [asked.box]}), ("found by the server", None)):
            answer = client.ask(asked.picture, asked.text, crop)
            found = f"{whole} prompt tokens to {answer.prompt_tokens}, facts {answer.facts or 'absent'}"
            right = whole - answer.prompt_tokens == WHOLE - PRUNED and not answer.facts
            findings.note(what, found, right)
        try:
            client.ask(asked.picture, asked.text, {"regions": [NOWHERE]})
            findings.note("a bad box", "was answered", False)
        except openai.APIStatusError as error:
            refused = error.status_code == 400 and "crop.regions" in error.message
            body = error.body if isinstance(error.body, dict) else {}
            said = str(body.get("message", error.message)).partition(" (parameter")[0]
            findings.note("a bad box", f"HTTP {error.status_code}: {said}", refused)


def write_config(replicas: int) -> tuple[Path, str]:
    """serve.yaml with the repository's model on CPUs instead; the file, and where it will answer."""
    port = free_port()
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": HOST, "port": port}
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    llm["model_loading_config"] = {"model_id": MODEL_NAME, "model_source": str(MODEL.absolute())}
    llm["accelerator_config"] = {"kind": "cpu"}
    llm["deployment_config"]["num_replicas"] = replicas
    llm["engine_kwargs"] |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    llm["engine_kwargs"]["kv_cache_memory_bytes"] = 256 << 20
    crop = {"pruning_rate": PRUNING_RATE, "localizer": LOCALIZER}
    llm["engine_kwargs"]["additional_config"]["crop"] = crop
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"serve-{replicas}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, f"http://{HOST}:{port}/v1"


if __name__ == "__main__":
    main()
