"""Models that colrow has cut, trained by the engines of others: one module each, imported where it is used.

``colrow.engines.accelerate``, ``colrow.engines.trainer`` (of transformers), ``colrow.engines.fabric`` (of
Lightning) and ``colrow.engines.deepspeed``. They take meshes of ``dp`` and ``tp``.
"""
