# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM around the supported ones, for tests of what is said of them."""

from packaging.version import Version

from vllm_crop.compat.supported import SUPPORTED_VERSIONS

_BOUNDS = {one.operator: Version(one.version) for one in SUPPORTED_VERSIONS}
FIRST = str(_BOUNDS[">="])
PREVIOUS = f"{_BOUNDS['>='].major}.{_BOUNDS['>='].minor - 1}.9"
NEXT = f"{_BOUNDS['<']}.0"
LAST = f"{_BOUNDS['<'].major}.{_BOUNDS['<'].minor - 1}.0"
# A build between releases is called by the patch release that would come next.
NIGHTLY = f"{_BOUNDS['<'].major}.{_BOUNDS['<'].minor - 1}.1.dev412+g0123abc"
NEWER = (NEXT, f"{NEXT}.dev7+g1", NIGHTLY, f"{LAST.rpartition('.')[0]}.1rc1")
