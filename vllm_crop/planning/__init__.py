# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens the language model sees: regions, grids, budgets, plans. No torch, no vLLM."""
