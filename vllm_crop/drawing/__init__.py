# SPDX-License-Identifier: Apache-2.0
"""Pictures of what pruning leaves of an image."""
