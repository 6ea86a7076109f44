# SPDX-License-Identifier: Apache-2.0
"""What a new vLLM changes in what this project relies on, read from two wheels without importing them."""
