# SPDX-License-Identifier: Apache-2.0
"""Do answers survive pruning: CROP against rivals and controls, at a budget of visual tokens."""
