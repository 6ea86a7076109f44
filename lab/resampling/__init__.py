# SPDX-License-Identifier: Apache-2.0
"""Trains compressors for compression "resampler": see docs/compressing.md."""
