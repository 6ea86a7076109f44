# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a small model served by vLLM, the same question asked with every method."""
