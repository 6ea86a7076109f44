# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of each family turn an image into visual tokens, and what these are made of."""
