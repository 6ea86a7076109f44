# SPDX-License-Identifier: Apache-2.0
"""What everything that measures needs: a server of its own, and where and with what it ran."""
