# SPDX-License-Identifier: Apache-2.0
"""Where the model looks while it reads a question: the attention of some layers, as a map of the image."""
