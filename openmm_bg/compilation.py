"""C++ and CUDA text to functions that can be called: compiled once per machine, and kept on disk.

The text is written once for both: what differs between vector registers and a GPU is in the `prelude`, and ``T``, its
type of number, is float or double.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NUMBERS = {torch.float32: "float", torch.float64: "double"}
"""The C++ names of the types of number that kernels are compiled for."""

_FLAGS = {
    "AVX512": ("-DCPU_CAPABILITY_AVX512", "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma"),
    "AVX2": ("-DCPU_CAPABILITY_AVX2", "-mavx2 -mfma -mf16c"),
}


class NoCompiler(Exception):
    """Nothing here can compile a kernel; the message says what was tried."""


def prelude() -> str:
    """What kernels stand on: V, a register of numbers or on a GPU a single one, and its functions."""
    return Path(__file__).with_name("prelude.h").read_text()


def cache_directory() -> Path:
    """Where compiled kernels are kept: $OPENMM_BG_CACHE, or openmm_bg in the user's cache directory."""
    named = os.environ.get("OPENMM_BG_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return Path(home) / "openmm_bg"


@functools.cache
def library(text: str, number: str) -> ctypes.CDLL:
    """The shared library of a C++ text, compiled unless the cache has it; calls release the GIL.

    Parameters
    ----------
    text : str
        Its entry points are ``extern "C"``; a returned value is an int.
    number : str
        What ``T`` means in it, one of `NUMBERS`.

    Raises
    ------
    NoCompiler
        Where there is no C++ compiler, it fails, or the cache cannot be written.
    """
    command = _command()
    text = f"typedef {number} T;\n{text}"
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    identity = "\n".join((text, *command, version, torch.__version__, platform.machine()))
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    target = cache_directory() / f"{name}.so"
    if not target.exists():
        _compile(command, text, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # a damaged file
        _compile(command, text, target)
        return ctypes.CDLL(str(target))


@functools.cache
def gpu_functions(text: str, number: str, names: Sequence[str], device: torch.device) -> list[Callable[..., Any]]:
    """The CUDA kernels of a text, compiled by the NVRTC that torch brings along.

    Parameters
    ----------
    text, number : str
        As for `library`.
    names : tuple of str
        Its ``extern "C" __global__`` functions.
    device : torch.device

    Returns
    -------
    list
        Each takes ``grid``, ``block`` and ``args`` (tensors, and Python ints that arrive as 32 bits), and is started
        on the current stream.

    Raises
    ------
    NoCompiler
        Where torch cannot compile, or the text does not.
    """
    make = getattr(torch.cuda, "compile_kernel", None) or getattr(torch.cuda, "_compile_kernel", None)
    if make is None:
        raise NoCompiler("this version of torch cannot compile CUDA kernels")
    try:
        with torch.cuda.device(device):
            return [make(f"typedef {number} T;\n{text}", name) for name in names]
    except (RuntimeError, OSError) as error:
        raise NoCompiler(f"the CUDA kernel does not compile: {' '.join(str(error).split())[:300]}") from error


def _compile(command: list[str], text: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # compiled aside and moved: several processes may want the same kernel at once
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text)
            libraries = Path(torch.__file__).parent / "lib"
            link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
            done = subprocess.run([*command, str(source), "-o", str(built), *link], capture_output=True, text=True)
            if done.returncode:
                raise NoCompiler(f"{command[0]} failed: {' '.join(done.stderr.split())[:300]}")
            os.replace(built, target)
    except OSError as error:
        raise NoCompiler(f"the cache {target.parent} cannot be written ({error}); set OPENMM_BG_CACHE") from error


@functools.cache
def _command() -> list[str]:
    """The compiler and its options, for the vector registers that torch uses here."""
    compiler = (
        shlex.split(os.environ.get("CXX", "")) or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    )
    if not compiler or not shutil.which(compiler[0]):
        raise NoCompiler("no C++ compiler was found (g++, clang++, or what CXX names)")
    define, machine = _FLAGS.get(torch.backends.cpu.get_cpu_capability(), ("-DCPU_CAPABILITY_DEFAULT", ""))
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-w"]
    options += [define, f"-DCPU_CAPABILITY={define[len('-DCPU_CAPABILITY_') :]}", *machine.split(), f"-I{include}"]
    if sys.platform != "darwin":
        options.append("-fopenmp")
    return [*compiler, *options]
