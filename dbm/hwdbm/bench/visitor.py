"""The C walker that the kernels are compared with, compiled when it is asked for."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import as_file
from importlib.resources import files as resources

import numpy as np
from numpy.typing import NDArray

from hwdbm import files, pte
from hwdbm.process import child

Array = NDArray[np.uint64]


class _Harvest(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("words", ctypes.c_void_p),
    )


def load() -> Callable[[Array, Array], None] | None:
    """Return a harvest that calls a C function for each descriptor, or None where no C compiler can make it.

    The function takes level-3 descriptors, which it re-protects, and the words of their bitmap.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with files.scratch() as folder, as_file(resources("hwdbm.bench") / "visitor.c") as source:
        target = folder / "visitor.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(source)]
        environment = os.environ | {"TMPDIR": str(folder)}  # what it leaves when it is killed goes with the folder
        with child(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
            status = process.wait()
        if status:
            return None
        library = ctypes.CDLL(str(target))  # stays loaded when the file goes
    walk, visit = library.walk, library.harvest_visitor
    walk.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(_Harvest))
    update = pte.clean(3)

    def harvest(entries: Array, words: Array) -> None:
        order = _Harvest(update.where.mask, update.where.value, update.clears, words.ctypes.data)
        walk(entries.ctypes.data, entries.size, visit, ctypes.byref(order))

    return harvest
