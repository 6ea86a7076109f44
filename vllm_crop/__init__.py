# SPDX-License-Identifier: Apache-2.0
"""vllm-crop: question-guided visual token pruning for vLLM (CROP, arXiv 2505.21233).

Importing this package, and registering it with vLLM, imports neither torch nor vLLM's models.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-crop")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Entry point `vllm.general_plugins: crop`; vLLM calls it in every process, possibly twice.

    It adds architecture names and command line options. Nothing changes for a server that does not ask.
    """
    from vllm_crop.compat.hooks import install

    install()
