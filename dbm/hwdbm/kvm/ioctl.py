"""Requests of the kernel: ``ioctl`` on a file descriptor, and a barrier.

They go through the C library by `ctypes`, which lets go of the interpreter's lock, and which doesn't repeat a call that
a signal interrupted, as `fcntl` may: that interruption is how a vCPU is stopped.
"""

import ctypes
import os
import struct
from types import TracebackType
from typing import Self

from hwdbm import check
from hwdbm.kvm import abi
from hwdbm.kvm.abi import Ioctl

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
"""The largest numbers of the kernel's fields."""

_CLOSED = -1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)  # the last is a number for some requests
_libc.ioctl.restype = ctypes.c_int

_SYS_MEMBARRIER = 283  # of arm64, as of every architecture with the generic table
_MEMBARRIER_PRIVATE_EXPEDITED, _MEMBARRIER_REGISTER_PRIVATE_EXPEDITED = 1 << 3, 1 << 4


class KvmFile:
    """A file descriptor of the kernel's.

    Parameters
    ----------
    fd : int
        The file descriptor; -1 once it is closed.
    """

    fd = _CLOSED

    def __init__(self, fd: int) -> None:
        self.fd = check.integer(fd, "fd", 0, (1 << 31) - 1)

    def _call(self, request: Ioctl, arg: int | bytearray = 0, about: str = "") -> int:
        given = arg if isinstance(arg, int) else (ctypes.c_char * len(arg)).from_buffer(arg)
        result: int = _libc.ioctl(self.fd, request, given)
        if result < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"{request.name}{about and f' of {about}'}: {os.strerror(errno)}")
        return result

    def check_extension(self, cap: int) -> int:
        """Return what the kernel says of a capability: 0 if it hasn't it, otherwise 1 or a number with a meaning."""
        return self._call(Ioctl.KVM_CHECK_EXTENSION, check.integer(cap, "cap", 0, U32))

    def close(self) -> None:
        """Close the file. A second time does nothing; other calls then are EBADF."""
        fd, self.fd = self.fd, _CLOSED
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # An interrupt may come before anybody has it to close.
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def packed(name: str, *fields: int) -> bytearray:
    """Return a structure of `abi.STRUCTS`, with its fields.

    Raises
    ------
    ValueError
        If a number doesn't fit in its field.
    """
    try:
        return bytearray(abi.STRUCTS[name].pack(*fields))
    except struct.error as error:
        raise ValueError(f"struct {name} can't hold {', '.join(map(hex, fields))}: {error}") from None


def fence() -> None:
    """Order this thread's loads before the loads and stores that follow.

    Nothing is to be done where the processor keeps them in order. Elsewhere it is ``membarrier(2)``, whose caller goes
    through a full barrier.

    Raises
    ------
    OSError
        ENOSYS where the kernel has none.
    """
    if abi.arch().total_store_order:
        return
    if _membarrier(_MEMBARRIER_PRIVATE_EXPEDITED):  # EPERM: this process hasn't said yet that it wants them
        _membarrier(_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED)
        if _membarrier(_MEMBARRIER_PRIVATE_EXPEDITED):
            raise OSError(ctypes.get_errno(), f"membarrier: {os.strerror(ctypes.get_errno())}")


def _membarrier(command: int) -> int:
    result: int = _libc.syscall(_SYS_MEMBARRIER, command, 0, 0)
    return result
