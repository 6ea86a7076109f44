# SPDX-License-Identifier: Apache-2.0
"""Who finds the region a question is about, where the client does not say."""
