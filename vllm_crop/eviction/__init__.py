# SPDX-License-Identifier: Apache-2.0
"""Inner-LLM pruning: later layers run without evicted tokens, whose KV blocks are never allocated."""
