"""The guests that are judged, made here: ``python -P tests/forecast/guests.py`` (`make forecast-guests`).

One is a small kernel that writes by streams (pattern.c). The other is Debian's kernel with an initramfs of Debian's
packages that does real work: compression, databases, a build, nothing. Both are kept in build/forecast.
"""

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "forecast"

# --- the small one -----------------------------------------------------------------------------------------

_FLAGS = (
    *("-m32", "-march=i686", "-mgeneral-regs-only", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic"),
    *("-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-nostdlib"),
    *("-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
)


def pattern() -> Path:
    """Return the small guest, compiled if this version of it never was."""
    sources = [HERE / "pattern.c", HERE / "pattern.ld"]
    target = _named("pattern", sources, ".elf")
    if not target.exists():
        with _scratch() as folder:
            made = Path(folder) / "pattern.elf"
            _run("gcc", *_FLAGS, f"-Wl,-T,{sources[1]}", "-o", str(made), str(sources[0]))
            made.replace(target)
    return target


# --- Linux -------------------------------------------------------------------------------------------------

KERNEL = "linux-image-cloud-amd64"
PACKAGES = ("busybox-static", "sqlite3", "zstd", "xz-utils", "tcc", "libc6-dev", "redis-server", "redis-tools")
WORKS = ("idle", "gzip", "zstd", "xz", "sqlite", "redis", "build")
_PROGRAMS = ("sqlite3", "zstd", "xz", "tcc", "redis-server", "redis-benchmark")
_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_DEVELOPMENT = ("crt1.o", "crti.o", "crtn.o", "libc.so", "libc_nonshared.a", "libm.so", "libmvec.so.1", "libm.so.6")


def linux() -> tuple[Path, Path]:
    """Return the kernel and the initramfs, made of Debian's packages if they never were."""
    init = HERE / "init.sh"
    target = _named("initramfs", [init, Path(__file__)], ".cpio.gz")
    kernel = CACHE / "vmlinuz"
    if not (target.exists() and kernel.exists()):
        with _scratch() as name:
            folder = Path(name)
            _unpack(_download(folder, PACKAGES), folder / "root")
            (package,) = (each for each in _download(folder, [_newest_kernel()], alone=True))
            _unpack([package], folder / "kernel")
            (found,) = (folder / "kernel" / "boot").glob("vmlinuz-*")
            files = _chosen(folder / "root")
            files["init"] = init.read_bytes(), 0o755
            made = folder / "initramfs"
            with gzip.GzipFile(made, "wb", compresslevel=1, mtime=0) as archive:
                archive.write(_cpio(files))
            shutil.copyfile(found, folder / "vmlinuz")
            (folder / "vmlinuz").replace(kernel)
            made.replace(target)
    return kernel, target


def _newest_kernel() -> str:
    """Return the package that the metapackage stands for."""
    text = _run("apt-cache", "depends", KERNEL)
    return next(line.split()[1] for line in text.splitlines() if line.strip().startswith("Depends: linux-image"))


def _download(folder: Path, packages: Iterable[str], *, alone: bool = False) -> list[Path]:
    """Fetch packages of Debian's with all that they need, or `alone`; none is installed."""
    there = folder / ("alone" if alone else "archives")
    (there / "partial").mkdir(parents=True)
    status = folder / "status"  # nothing is installed, so that all is fetched
    status.touch()
    if alone:
        _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages, cwd=there)
    else:
        options = (f"Dir::State::status={status}", f"Dir::Cache::archives={there}", "APT::Sandbox::User=root")
        chosen = [word for option in options for word in ("-o", option)]
        what = ["install", "--download-only", "--no-install-recommends", "-qq", "-y"]
        _run("apt-get", *chosen, *what, *packages)
    return sorted(there.glob("*.deb"))


def _unpack(packages: Iterable[Path], root: Path) -> None:
    for package in packages:
        _run("dpkg-deb", "-x", str(package), str(root))


def _chosen(root: Path) -> dict[str, tuple[bytes, int]]:
    """Return the files of a small system: by path, the bytes and the mode."""
    files: dict[str, tuple[bytes, int]] = {}

    def find(name: str) -> Path:
        for folder in ("usr/bin", "bin", *_LIBRARIES, "lib64"):
            path = root / folder / name
            if path.is_symlink() or path.is_file():
                return resolved(path)
        raise FileNotFoundError(f"none of the packages has {name}")

    def resolved(path: Path) -> Path:
        while path.is_symlink():  # it may be absolute, and means the guest's root
            to = path.readlink()
            path = root / str(to).lstrip("/") if to.is_absolute() else path.parent / to
        return path

    def add(name: str, folder: str) -> None:
        where = f"{folder}/{name}"
        if where in files:
            return
        path = find(name)
        files[where] = path.read_bytes(), 0o755
        for line in _run("readelf", "-d", str(path)).splitlines():
            if "(NEEDED)" in line:
                needed = line.rpartition("[")[2].rstrip("]")
                if not needed.startswith("ld-linux"):
                    add(needed, "lib/x86_64-linux-gnu")

    for program in _PROGRAMS:
        add(program, "usr/bin")
    files["bin/busybox"] = find("busybox").read_bytes(), 0o755
    files["lib64/ld-linux-x86-64.so.2"] = find("ld-linux-x86-64.so.2").read_bytes(), 0o755
    for name in _DEVELOPMENT:
        files[f"usr/lib/x86_64-linux-gnu/{name}"] = find(name).read_bytes(), 0o644
    for tree in ("usr/include", "usr/lib/x86_64-linux-gnu/tcc"):
        for path in sorted((root / tree).rglob("*")):
            if path.is_file():
                files[str(path.relative_to(root))] = resolved(path).read_bytes(), 0o644
    return files


def _cpio(files: dict[str, tuple[bytes, int]]) -> bytes:
    """Return a cpio archive in the form "newc", with the folders that the files need, and a console."""
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    folders |= {"dev", "proc", "sys", "tmp"}
    out, number = bytearray(), 0

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal number
        number += 1
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    for name in sorted(folders):
        entry(name, stat.S_IFDIR | 0o755)
    entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, (data, mode) in sorted(files.items()):
        entry(name, stat.S_IFREG | mode, data)
    entry("TRAILER!!!", 0)
    return bytes(out)


# --- what both need ----------------------------------------------------------------------------------------


def _named(name: str, sources: Iterable[Path], suffix: str) -> Path:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return CACHE / f"{name}-{digest.hexdigest()[:12]}{suffix}"


def _scratch() -> tempfile.TemporaryDirectory[str]:
    CACHE.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=CACHE)


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ...: status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> None:
    for path in (pattern(), *linux()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    sys.exit(main())
