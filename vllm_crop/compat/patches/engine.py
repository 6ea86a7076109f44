# SPDX-License-Identifier: Apache-2.0
"""Tells our renderer which engine it renders for, so that the server can ask its own model: for regions, for
checks of what it answers.

Why: an engine makes its renderer without a way back to itself.
Replaces: AsyncLLM.__init__ (vllm/v1/engine/async_llm.py), LLMEngine.__init__ (vllm/v1/engine/llm_engine.py).
Remove when: a renderer knows its engine.
"""

import functools
from collections.abc import Callable
from typing import Any

REASON = "lets the localizer and shadow checks ask the engine that is served"
_MARK = "_vllm_crop_engine_patched"


def patch(engine_class: Any, attach: Callable[[Any], None]) -> None:
    """Call `attach(engine)` with every engine of this class once it is made."""
    if _MARK in vars(engine_class):
        return
    setattr(engine_class, _MARK, True)
    init = engine_class.__init__

    @functools.wraps(init)
    def init_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        attach(self)

    engine_class.__init__ = init_and_attach
