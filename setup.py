"""The optional part of the build: shared-memory collectives in C. Everything else is in pyproject.toml.

Without a C compiler, or on a system other than Linux, the package installs without it and uses gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("src/colrow/transport/native")
SOURCES = [
    "arena.c",
    "exchange.c",
    "group.c",
    "kernels.c",
    "kernels_x86.c",
    "module.c",
    "reduce.c",
    "waiting.c",
]

native = Extension(
    "colrow.transport._native",
    [str(NATIVE / name) for name in SOURCES],
    depends=[str(header) for header in sorted(NATIVE.glob("*.h"))],
    # -O3 vectorises, also what is computed on one side of a condition if nobody looks at the flags that
    # operations raise; contraction into fused operations would make sums depend on the processor
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-g0",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
    ],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[native] if sys.platform == "linux" else [])
