# SPDX-License-Identifier: Apache-2.0
"""What is measured and shown with a small trained model; part of the repository, not of the package."""
