"""The costs of a migration that a replay counts in, as they were measured."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from hwdbm import check

Structure = Literal["own", "qemu"]
_GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a migration costs beside its bytes. Times are in seconds; each is 0 or more.

    Parameters
    ----------
    structure : {"own", "qemu"}
        Whose passes they are. Ours sends all of a pass before it harvests again. QEMU harvests as soon as less than
        bandwidth times downtime limit is left of a pass, and goes on with both.
    setup : float
        Until the other side is ready.
    setup_gib : float
        More of that for each GiB of memory.
    sync_gib : float
        A harvest of the dirty log, for each GiB of memory.
    zero_page : float
        To find that a page is zero.
    pass_time : float
        For each pass: until the other side says that it has it.
    pause : float
        From the decision until the guest stands still.
    handover : float
        From the last page until the guest runs at the destination.
    verify_gib : float
        The digests, for each GiB of memory; a part of the total time, not of the downtime.
    page_overhead, zero_bytes : float
        Bytes sent with each page, and for each page of zeros.
    burst : float
        Seconds of the bandwidth by which what was sent may be ahead of the link. Ours makes up for so long a gap
        between two passes. For QEMU it is what the sockets hold at most: it takes that for sent, and the guest waits
        for what is in them.
    tick : float
        The time that QEMU has a share of the bandwidth for: it sends it, waits for the end, and looks at what is left.
    look : float
        The time after which it looks, though its share isn't used up.
    last_bandwidth : float, optional
        Bytes a second while the guest is paused. QEMU lifts max-bandwidth then. None for no difference.
    spread : float
        Standard deviation of the bandwidth, as a part of it.
    last_spread : float
        Standard deviation of `last_bandwidth`, as a part of it: by how much it differs from one migration to the next.
    """

    structure: Structure = "own"
    setup: float = 0.0
    setup_gib: float = 0.0
    sync_gib: float = 0.0
    zero_page: float = 0.0
    pass_time: float = 0.0
    pause: float = 0.0
    handover: float = 0.0
    verify_gib: float = 0.0
    page_overhead: float = 0.0
    zero_bytes: float = 0.0
    burst: float = 0.0
    tick: float = 0.0
    look: float = 0.0
    last_bandwidth: float | None = None
    spread: float = 0.0
    last_spread: float = 0.0

    def __post_init__(self) -> None:
        check.one_of(self.structure, get_args(Structure), "structure")
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if each.name == "last_bandwidth" and value is None:
                continue
            low = 1.0 if each.name == "last_bandwidth" else 0.0
            high = 1.0 if each.name in {"spread", "last_spread"} else float("inf")
            object.__setattr__(self, each.name, check.real(value, each.name, low, high))

    def sync(self, size: float) -> float:
        """Return the seconds of one harvest of `size` bytes of memory."""
        return self.sync_gib * check.real(size, "size", 0) / _GIB

    def prepare(self, size: float) -> float:
        """Return the seconds until the other side is ready for `size` bytes of memory."""
        return self.setup + self.setup_gib * check.real(size, "size", 0) / _GIB

    def verify(self, size: float) -> float:
        """Return the seconds of the digests of `size` bytes of memory."""
        return self.verify_gib * check.real(size, "size", 0) / _GIB


# Round numbers, of the size that migrations over a Unix socket show on two cores; the judge (tests/forecast/judge.py)
# measures its own. An address and a length go with a run of pages, 16 bytes; most runs are short.
OWN = Terms(
    "own", setup=0.02, setup_gib=0.1, sync_gib=0.002, zero_page=0.7e-6, pass_time=0.001, pause=0.001, handover=0.003,
    verify_gib=0.7, page_overhead=8, zero_bytes=2, burst=0.04, spread=0.06,
)  # fmt: skip
"""The terms of this project's stream."""

# 8 bytes of address and flags go before each page, and 9 are all that goes for a page of zeros (QEMU, migration/ram.c,
# save_page_header and save_zero_page_to_file); BUFFER_DELAY is 100 ms (migration/migration.c), and MAX_WAIT 50 ms, as
# long as ram_save_iterate goes on at most. The spreads are what the judge found (tests/forecast/judge.py): with that of
# the bandwidth the interval has the total time of nine migrations in ten; last passes had 0.4 to 1.6 GB/s.
QEMU = Terms(
    "qemu", setup=0.02, sync_gib=0.002, zero_page=0.6e-6, pause=0.003, handover=0.01, page_overhead=8, zero_bytes=9,
    tick=0.1, look=0.05, spread=0.06, last_spread=0.35,
)  # fmt: skip
"""The terms of QEMU's stream without multifd. Its default for `last_bandwidth` is none: give it the link's."""
