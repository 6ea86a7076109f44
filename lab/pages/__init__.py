# SPDX-License-Identifier: Apache-2.0
"""Documents and screens, drawn by a real browser, with questions and the exact boxes of what answers them.

From what a document says (`documents`) over how it looks (`looks`, `layouts/`) to a picture (`browser`) and
questions about it (`asking`).
"""
