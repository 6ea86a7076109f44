# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens the layers of the language model see: regions, grids, budgets, plans. numpy only."""
