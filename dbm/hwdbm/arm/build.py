"""The firmware, compiled when it is first needed: a cross compiler is all that it takes."""

import hashlib
import os
import shutil
import subprocess
from errno import ENOENT
from importlib.resources import files as resources
from pathlib import Path

from hwdbm import files
from hwdbm.errors import HwdbmError
from hwdbm.process import child

_SOURCES = ("start.S", "firmware.c", "guest.c")
_REST = ("abi.h", "firmware.ld")
COMPILERS = ("aarch64-linux-gnu-gcc", "aarch64-none-elf-gcc", "aarch64-elf-gcc")
# Neither may use floating point, whose registers aren't saved, nor accesses that memory without an MMU doesn't allow.
_FLAGS = (
    *("-march=armv8.4-a", "-mgeneral-regs-only", "-mstrict-align", "-mno-outline-atomics", "-O2", "-Wall", "-Wextra"),
    *("-Werror", "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-pie", "-fno-stack-protector", "-nostdlib"),
    *("-static", "-no-pie", "-Wl,--build-id=none"),
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


def build(target: Path) -> None:
    """Compile the firmware to `target`, an ELF file.

    Raises
    ------
    ArmUnavailableError
        If there is no cross compiler, or it fails.
    """
    compiler = tool(COMPILERS, "gcc-aarch64-linux-gnu", "compiles the firmware of the Arm machine")
    with files.scratch() as folder:
        for name in (*_SOURCES, *_REST):
            (folder / name).write_bytes((resources("hwdbm.arm") / "firmware" / name).read_bytes())
        made = folder / "firmware.elf"
        command = [compiler, *_FLAGS, "-Wl,-T,firmware.ld", "-o", str(made), *_SOURCES]
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
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once, and all make the same.
        copy = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            copy.write_bytes(made.read_bytes())
            copy.replace(target)
        finally:
            copy.unlink(missing_ok=True)


def firmware() -> Path:
    """Return the firmware, compiling it if this version of its sources never was.

    It is kept under ``$XDG_CACHE_HOME/hwdbm``, by default ``~/.cache/hwdbm``.

    Raises
    ------
    ArmUnavailableError
        If there is no cross compiler, or it fails.
    OSError
        If it can't be kept.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in (*_SOURCES, *_REST):
        digest.update((resources("hwdbm.arm") / "firmware" / name).read_bytes())
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    target = folder / "hwdbm" / f"firmware-{digest.hexdigest()[:16]}.elf"
    if not target.is_file():
        build(target)
    return target
