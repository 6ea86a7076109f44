# SPDX-License-Identifier: Apache-2.0
"""The border to vLLM: supported versions, signature checks, patches."""
