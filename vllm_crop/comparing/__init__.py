# SPDX-License-Identifier: Apache-2.0
"""What `vllm-crop compare` is made of: questions of your own, asked unpruned and pruned, and what differs."""
