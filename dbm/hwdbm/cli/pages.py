"""What a message about an error ends with: the limit that it met, the page of the documentation that helps."""

import resource
from errno import EFBIG, EMFILE, ENOMEM

PAGES = {
    "ArmUnavailableError": "live#the-arm-machine",
    "BitmapError": "formats#the-dirty-bitmap",
    "CancelledMigrationError": "",  # as it was asked for
    "ClosedError": "errors#what-the-library-raises",
    "ConvergenceError": "migration#when-it-doesnt-converge",
    "DigestError": "errors#exit-status-3",
    "GuestExitError": "kvm",
    "HandoverError": "migration#one-guest",
    "ImageError": "formats#memory-images",
    "KvmUnavailableError": "kvm",
    "LayoutError": "howto/migrate-tls#when-it-fails",
    "ModuleNotFoundError": "start#install",
    "NoTablesError": "live",
    "PlanError": "formats#the-plan-of-a-fleet",
    "PeerError": "howto/migrate-tls#when-it-fails",
    "SampleError": "howto/will-it-converge#samples",
    "SnapshotError": "howto/snapshots#when-it-fails",
    "StaleLeaseError": "errors#what-the-library-raises",
    "TraceError": "howto/traces#when-it-fails",
    "StreamError": "howto/migrate-tls#when-it-fails",
    "UnreadError": "races",
    "ConnectionRefusedError": "howto/migrate-tls#when-it-fails",
    "HwdbmError": "errors#what-the-library-raises",
}
"""A page, and a heading of it, by the name of the error's class or of the nearest class above it; empty: none."""


_LIMITS = {
    EMFILE: (resource.RLIMIT_NOFILE, 1, "open files", "n"),
    EFBIG: (resource.RLIMIT_FSIZE, 1 << 10, "KiB in a file", "f"),
    ENOMEM: (resource.RLIMIT_AS, 1 << 10, "KiB of address space", "v"),
}
"""The limit of a process by the errno of what is beyond it: its number, a unit of it, and the option of ulimit."""


def see(error: BaseException) -> str:
    """Return what a message about `error` ends with, or nothing where nothing helps.

    Examples
    --------
    >>> from hwdbm.errors import ImageError
    >>> see(ImageError("a loop"))
    ' (docs: formats#memory-images)'
    >>> see(PermissionError())
    ''
    """
    page = next((PAGES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in PAGES), "")
    return _limit(error) + (f" (docs: {page})" if page else "")


def _limit(error: BaseException) -> str:
    errno = ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if errno not in _LIMITS:
        return ""
    limit, size, unit, option = _LIMITS[errno]
    most, _ = resource.getrlimit(limit)
    return (
        "" if most == resource.RLIM_INFINITY else f" (the limit is {most // size} {unit}: ulimit -{option} raises it)"
    )
