"""Triton's interpreter, which replaces the language of a kernel at each call of each helper, doing so once a launch.

That takes a third and more of its time. A launch puts the language back when it ends, so the next one replaces it anew.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def patch_once(monkeypatch) -> None:
    patch = interpreter._patch_lang

    def patch_if_needed(function):
        languages = [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", patch_if_needed)
