# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop eval`: do answers survive pruning, against rivals and controls, at a budget of visual tokens."""
