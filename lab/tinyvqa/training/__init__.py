# SPDX-License-Identifier: Apache-2.0
"""How the checkpoint was trained: first the vision tower on what tokens show, then answers and places."""
