"""The page of the documentation that helps with an error."""

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


def see(error: BaseException) -> str:
    """Return what a message about `error` ends with: the page that helps, or nothing where there is none.

    Examples
    --------
    >>> from hwdbm.errors import ImageError
    >>> see(ImageError("a loop"))
    ' (docs: formats#memory-images)'
    >>> see(PermissionError())
    ''
    """
    page = next((PAGES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in PAGES), "")
    return f" (docs: {page})" if page else ""
