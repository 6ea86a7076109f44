# SPDX-License-Identifier: Apache-2.0
"""What becomes of an image's features before the language model gets them: what the paper calls PLC."""
