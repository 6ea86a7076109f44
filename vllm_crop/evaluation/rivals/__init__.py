# SPDX-License-Identifier: Apache-2.0
"""Other ways to prune visual tokens, each from its paper's formulas; same model, same budgets."""
