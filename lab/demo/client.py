# SPDX-License-Identifier: Apache-2.0
"""Asks the demo's server, and looks at the KV memory it takes meanwhile."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from lab.demo.setting import KV_ATTEMPTS, KV_TOKENS
from vllm_crop.benchmarking.kv import KVCapacity, blocks_in_use
from vllm_crop.client import CropClient
from vllm_crop.errors import CropError


class Client(CropClient):
    """One server, on this machine."""

    def __init__(self, base_url: str, model: str) -> None:
        """`base_url`: without `/v1`."""
        super().__init__(f"{base_url}/v1", model)
        self.base_url = base_url
        self.capacity = KVCapacity.of_server(base_url)

    def kv_blocks(self, picture: Image.Image, question: str, crop: Mapping[str, Any]) -> int:
        """The most KV blocks in use while an answer is generated, from /metrics.

        Raises:
            CropError: every answer was finished before the server said what it took.
        """
        for _ in range(KV_ATTEMPTS):
            extra = {"ignore_eos": True}
            response = self.send(picture, question, crop, extra, max_tokens=KV_TOKENS, stream=True)
            if most := max(blocks_in_use(self.base_url, self.capacity) for _ in response.parse()):
                return most
        raise CropError(f"{self.base_url}/metrics never showed a running request")
