# SPDX-License-Identifier: Apache-2.0
"""`make demo`: this repository's trained checkpoint, served by vLLM and asked with every method."""
