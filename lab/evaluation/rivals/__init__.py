# SPDX-License-Identifier: Apache-2.0
"""Other ways to prune visual tokens, each after its paper; same model, same visual tokens."""
