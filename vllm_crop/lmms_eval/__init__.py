# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval finds of this package: a model that sends the boxes of a task's documents."""
