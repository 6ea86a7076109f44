# SPDX-License-Identifier: Apache-2.0
"""A small vision-language model that really answers, the scenes it knows, and how it was trained."""
