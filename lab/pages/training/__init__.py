# SPDX-License-Identifier: Apache-2.0
"""Trains a small model to read pages: letters first, then answers. No attention is supervised."""
