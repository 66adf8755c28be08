"""Plug-in for SGLang's split into encoders and language servers; ``docs/sglang.md`` shows how to start it.

``plugin`` is what SGLang calls. Only the modules in ``inside/`` import SGLang; the others run without it.
"""
