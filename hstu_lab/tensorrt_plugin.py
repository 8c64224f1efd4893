"""Our kernels inside TensorRT 8: compiles the plugin's C++ source, once, and makes it known to the library.

The plugin runs what `hstu_lab.tensorrt_kernels` puts into a graph. It needs a C++ compiler and neither CUDA's nor TensorRT's
headers. Newer libraries have other plugin interfaces, and TensorRT for RTX has none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

from hstu_lab import environment
from hstu_lab.tensorrt_library import EngineError, Library

SOURCES = pathlib.Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-static-libstdc++", "-static-libgcc")


class PluginError(EngineError):
    """The plugin cannot be compiled or this TensorRT takes none; the message names the remedy."""


def compile_plugin() -> pathlib.Path:
    """The shared library, compiled at the first call for this source: about three seconds. Raises PluginError."""
    sources = [SOURCES / name for name in ("tensorrt_abi.h", "tensorrt_plugin.cpp")]
    digest = hashlib.sha256("\0".join([*FLAGS, *(path.read_text() for path in sources)]).encode()).hexdigest()[:16]
    made = environment.kernel_folder() / f"tensorrt_plugin-{digest}.so"
    if not made.exists():
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            raise PluginError("no C++ compiler here: install g++ (apt-get install g++), or set CXX to one")
        partial = made.with_suffix(f".{os.getpid()}.part")
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(f"{made.parent}: cannot be written to ({error.strerror}); set HSTU_LAB_KERNELS") from error
        command = [compiler, *FLAGS, "-o", str(partial), str(sources[-1]), "-ldl"]
        said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": ""})
        if said.returncode != 0:
            raise PluginError(f"{compiler} refuses the plugin: {said.stderr.strip()[-400:]}")
        partial.rename(made)
    return made


def check_library(library: Library) -> None:
    """Raise PluginError where `library` cannot run kernels of ours."""
    if library.is_rtx or not library.version.startswith(("8.5", "8.6")):
        raise PluginError(
            f"{library.label} cannot run compiled kernels of ours; TensorRT 8.5 and 8.6 can, or export without them"
        )
    if sys.platform != "linux":
        raise PluginError("compiled kernels inside an engine are for Linux; export without them")


@functools.cache
def register(library: Library) -> None:
    """Make TensorRT's parser and runtime know the node `CompiledKernel`. Raises PluginError where it takes no such plugin."""
    check_library(library)
    plugin, runtime = ctypes.CDLL(str(compile_plugin())), ctypes.CDLL("libnvinfer.so.8")
    runtime.getPluginRegistry.restype = ctypes.c_void_p
    plugin.hstu_lab_register.argtypes, plugin.hstu_lab_register.restype = [ctypes.c_void_p], ctypes.c_bool
    if not plugin.hstu_lab_register(runtime.getPluginRegistry()):
        raise PluginError(f"{library.label} knows a plugin CompiledKernel already, which is not ours")
