# SPDX-License-Identifier: Apache-2.0
"""Compression by learned queries: what the paper calls PLC (CROP, arXiv 2505.21233, section 3.2)."""
