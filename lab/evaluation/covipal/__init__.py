# SPDX-License-Identifier: Apache-2.0
"""CoViPAL's pruning module, trained here: `python -m lab.evaluation.covipal`."""
