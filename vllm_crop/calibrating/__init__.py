# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model look at what a question is about, learned from pictures and questions."""
