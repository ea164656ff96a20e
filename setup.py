"""Builds the optional kernels; everything else stands in pyproject.toml.

Without a C compiler, or on another processor family, the build goes on without them and pronk runs
on PyTorch alone. The file is a plain shared library for ctypes, not a Python extension. It links no
OpenMP runtime: it uses the one torch brings into the process.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = ("f", "bw", "dq", "vl", "bf16", "vnni")
FLAGS = ["-O3", "-fopenmp", "-mfma", *(f"-mavx512{name}" for name in INSTRUCTION_SETS)]

kernels = Extension(
    "model.kernels._kernels",
    sources=[
        "model/kernels/linear.c",
        "model/kernels/attention.c",
        "model/kernels/lora.c",
        "model/kernels/sampling.c",
    ],
    depends=["model/kernels/vectors.h"],
    extra_compile_args=FLAGS,
    optional=True,
)


class BuildKernels(build_ext):
    """A missing compiler is a warning, not an error."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.warn(f"the optional kernels were not built: {error}")

    def copy_extensions_to_source(self) -> None:
        """A running server has the old library mapped: replace the file, never write into it."""
        for old in Path("model/kernels").glob("_kernels*.so"):
            old.unlink()
        super().copy_extensions_to_source()


on_x86 = platform.machine() in {"x86_64", "AMD64"} and platform.system() == "Linux"
setup(ext_modules=[kernels] if on_x86 else [], cmdclass={"build_ext": BuildKernels})
