# SPDX-License-Identifier: Apache-2.0
"""tinyvqa's questions as a task of lmms-eval, and whether it gets the answers of our own evaluation."""
