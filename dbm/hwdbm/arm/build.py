"""The firmware, compiled when it is first needed: a cross compiler is all that it takes."""

import hashlib
import logging
import os
import shutil
import subprocess
from contextlib import suppress
from errno import ENOENT
from functools import cache
from importlib.resources import files as resources
from pathlib import Path

from hwdbm import files
from hwdbm.errors import HwdbmError, in_words
from hwdbm.process import child

_log = logging.getLogger("hwdbm")
_SOURCES = ("start.S", "firmware.c", "guest.c")
_REST = ("abi.h", "firmware.ld")
COMPILERS = ("aarch64-linux-gnu-gcc", "aarch64-none-elf-gcc", "aarch64-elf-gcc")
# Neither may use floating point, whose registers aren't saved, nor accesses that memory without an MMU doesn't allow.
# Without symbols, among which are names of temporary files: who compiles it twice has the same firmware.
_FLAGS = (
    *("-march=armv8.4-a", "-mgeneral-regs-only", "-mstrict-align", "-mno-outline-atomics", "-O2", "-Wall", "-Wextra"),
    *("-Werror", "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-pie", "-fno-stack-protector", "-nostdlib"),
    *("-static", "-no-pie", "-s", "-Wl,--build-id=none"),
)


class ArmUnavailableError(HwdbmError, OSError):
    """There is no QEMU here, or no cross compiler, for an emulated Arm machine; the text says what to install."""


def tool(names: tuple[str, ...], package: str, why: str) -> str:
    """Return the path of the first of some programs that is there.

    Raises
    ------
    ArmUnavailableError
        If none is; the text names the Debian package that brings it.
    """
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ArmUnavailableError(
        ENOENT, f"there is no {' or '.join(names)}, which {why}: install {package} (Debian: apt-get install {package})"
    )


def build() -> bytes:
    """Compile the firmware, and return it: an ELF file.

    Raises
    ------
    ArmUnavailableError
        If there is no cross compiler, or it fails.
    """
    compiler = tool(COMPILERS, "gcc-aarch64-linux-gnu", "compiles the firmware of the Arm machine")
    with files.scratch() as folder:
        for name, source in _sources().items():
            (folder / name).write_bytes(source)
        command = [compiler, *_FLAGS, "-Wl,-T,firmware.ld", "-o", "firmware.elf", *_SOURCES]
        environment = os.environ | {"TMPDIR": str(folder)}
        log = folder / "log"
        with (
            log.open("wb") as output,
            child(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment) as process,
        ):
            status = process.wait()
        if status:
            text = log.read_text(errors="replace").strip()[-500:]
            raise ArmUnavailableError(ENOENT, f"{compiler} can't compile the firmware (status {status}): {text}")
        return (folder / "firmware.elf").read_bytes()


@cache
def firmware() -> bytes:
    """Return the firmware, an ELF file, compiling it if this version of its sources never was.

    It is kept under ``$XDG_CACHE_HOME/hwdbm``, by default ``~/.cache/hwdbm``, in a file whose name has its digest: what
    was cut or altered isn't used. Where it can't be kept, which is logged, each process compiles it.

    Raises
    ------
    ArmUnavailableError
        If there is no cross compiler, or it fails.
    """
    sources = _digest(" ".join(_FLAGS).encode() + b"".join(_sources().values()))
    caches = files.caches()
    folder = None if caches is None else caches / "hwdbm"
    for kept in () if folder is None else _listed(folder, f"firmware-{sources}-*.elf"):
        with suppress(OSError):
            image = kept.read_bytes()
            if kept.stem.endswith(_digest(image)):
                return image
    image, why = build(), "this user has no home, and XDG_CACHE_HOME names no folder"
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write(folder / f"firmware-{sources}-{_digest(image)}.elf", image)
        except OSError as error:
            why = in_words(error)
        else:
            return image
    _log.warning("the Arm machine's firmware isn't kept, and is compiled at each start: %s", why)
    return image


def _listed(folder: Path, pattern: str) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.glob(pattern))
    return []


def _sources() -> dict[str, bytes]:
    return {name: (resources("hwdbm.arm") / "firmware" / name).read_bytes() for name in (*_SOURCES, *_REST)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
