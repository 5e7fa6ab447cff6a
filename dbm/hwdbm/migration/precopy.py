"""Pre-copy: passes while the guest runs, a short pause, and the destination goes on.

What is taken from the dirty log is lent (`Pages`), and stays so until the destination runs. Whatever happens before is
answered in one way: every bit goes back, the throttle goes, the guest runs.
"""

import contextlib
import struct
import threading
import time
from collections.abc import Callable

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import StaleLeaseError
from hwdbm.memslot import Memslot
from hwdbm.migration.channel import Channel
from hwdbm.migration.converge import Settings, Throttle
from hwdbm.migration.errors import CancelledMigrationError, DigestError, HandoverError, StreamError
from hwdbm.migration.limiter import Limiter
from hwdbm.migration.report import Pass, Report, folded
from hwdbm.migration.sender import PageSender
from hwdbm.migration.staging import Staging, staging
from hwdbm.migration.wire import ACK, PASS, PROVING, RUNNING, SHARING, VERIFIED, VERSION, Kind
from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.source import Pages, Provable, Source

__all__ = ["Precopy", "migrate"]

_TELL = 0.1  # seconds between two calls of on_progress


def migrate(
    source: Source,
    channel: Channel,
    settings: Settings | None = None,
    *,
    cancel: threading.Event | None = None,
    on_progress: Callable[[Report], object] | None = None,
) -> Report:
    """Migrate a VM over a channel.

    Parameters
    ----------
    source : Source
        The VM.
    channel : Channel
        Connected with a `receive`. It is left open.
    settings : Settings, optional
        How.
    cancel : threading.Event, optional
        Set by another thread, or a signal handler, to cancel.
    on_progress : callable
        Called with the report now and then, and after each pass.

    Returns
    -------
    Report
        The source is paused then, and its pages committed: the VM is elsewhere.

    Raises
    ------
    OSError
        `StreamError` and its kin if it failed, `CancelledMigrationError` if it was cancelled, or what the source
        raised. The source runs on if it ran before, but for `HandoverError`: then it is paused. Its log stays on, with
        every bit that was taken put back, those of acknowledged passes too: the next attempt begins anew, and others
        may wait for them. To have the report of a failure, use `Precopy`.
    """
    return Precopy(source, channel, settings or Settings(), cancel=cancel, on_progress=on_progress).run()


class Precopy:
    """One attempt to migrate a VM; see `migrate` for the parameters.

    Attributes
    ----------
    report : Report
        What it did, also if it failed.
    failure : OSError or None
        For whoever keeps what `run` raised beside the report.
    """

    failure: OSError | None = None

    def __init__(
        self,
        source: Source,
        channel: Channel,
        settings: Settings,
        *,
        cancel: threading.Event | None = None,
        on_progress: Callable[[Report], object] | None = None,
    ) -> None:
        self._source, self._channel, self._settings = source, channel, settings
        self._cancel, self._tell = cancel or threading.Event(), on_progress or (lambda _: None)
        self._layout = MemoryMap.of(source)
        self.report = Report(source.page_size, self._layout.total, settings.max_downtime)
        self._throttle = Throttle()
        self._lent: list[Pages] = []
        self._collected = self._told = 0.0
        self._ran = source.running
        self._gone = False  # whether the destination may be running

    def run(self) -> Report:
        """Migrate; once."""
        start = self._start = time.perf_counter()
        try:
            with staging(self._channel) as stage:
                self._run(stage)
        except BaseException as error:
            self.report.total_time = time.perf_counter() - start
            self._undo(error)
            raise
        self._settle()
        self.report.total_time = time.perf_counter() - start
        self.report.status = "completed"
        if isinstance(self._source, Provable) and self._ran:
            self._await_proof()
        self._tell(self.report)
        return self.report

    def _run(self, stage: Staging) -> None:
        limiter = Limiter(self._settings.bandwidth)
        self._sender = PageSender(self._source, self._channel, stage, limiter, self._check)
        self._setup(stage.descriptors)
        if not all(slot.logging for slot in self._source.slots):
            self._source.start_log()
        self._precopy()
        self._hand_over()

    # --- passes --------------------------------------------------------------------------------------------

    def _setup(self, descriptors: tuple[int, ...]) -> None:
        """Agree on the version and the memory, and wait until there is room for it."""
        self.report.status = "setup"
        flags = VERIFIED * self._settings.verify | RUNNING * self._ran | SHARING * bool(descriptors)
        if isinstance(self._source, Provable) and self._ran:
            flags |= PROVING
        hello = struct.pack("<II", VERSION, flags) + self._layout.to_bytes()
        self._channel.send(Kind.HELLO, hello, descriptors=descriptors)
        self._channel.expect(Kind.READY)
        self.report.setup_time = time.perf_counter() - self._start
        self.report.status = "active"

    def _precopy(self) -> None:
        self._send_all()
        while True:
            began, pages = self._collected, self._collect()
            one = self._begin(pages, began)
            if self._source.running and not self._enough(one):
                self._slow_down(one, self.report.passes[-2])
                self._send(one, pages, last=False)
                continue
            self._source.pause()
            self.report.status = "device"
            self._paused = time.perf_counter()
            for slot_id, late in self._collect().items():  # what was written until the pause
                pages[slot_id] |= late
            self._describe(one, pages)
            self._send(one, pages, last=True)
            return

    def _send_all(self) -> None:
        """Send every page, whatever the log says: only now are they all needed."""
        pages = {slot.id: DirtyBitmap(slot.npages) for slot in self._source.slots}
        for bitmap in pages.values():
            bitmap.fill()
        # What is dirty already needs no second pass. It is lent, too, for whoever else waits for these bits.
        self._collect()
        one = Pass(1, 0, 0)
        self._describe(one, pages)
        self.report.passes.append(one)
        self._send(one, pages, last=False)

    def _collect(self) -> dict[int, DirtyBitmap]:
        """Return what was dirtied since the last time."""
        now = time.perf_counter()
        pages = {}
        for slot in self._source.slots:
            lease = self._source.dirty(slot.id)
            self._lent.append(lease)
            pages[slot.id] = lease.bitmap.copy()
        self._collected, self._collect_time = now, time.perf_counter() - now
        return pages

    def _begin(self, pages: dict[int, DirtyBitmap], began: float) -> Pass:
        one = Pass(len(self.report.passes) + 1, 0, 0, throttle=self._throttle.percent)
        self._describe(one, pages)
        one.dirty_rate = one.dirty / max(self._collected - began, 1e-9)
        one.collect_time = self._collect_time
        if self.report.bandwidth:
            one.expected_downtime = one.remaining / self._bandwidth()
        self.report.passes.append(one)
        return one

    def _describe(self, one: Pass, pages: dict[int, DirtyBitmap]) -> None:
        one.dirty = sum(bitmap.weight() for bitmap in pages.values())
        one.remaining = self.report.remaining = one.dirty * self._source.page_size
        one.cells = folded(list(pages.values()))

    def _bandwidth(self) -> float:
        """Bytes a second: the last pass's that was long enough to say, and else that of all."""
        for one in reversed(self.report.passes):
            if one.time >= 0.05 and one.transferred >= 1 << 20:
                return one.transferred / one.time
        return self.report.bandwidth

    def _enough(self, one: Pass) -> bool:
        if one.expected_downtime is not None and one.expected_downtime <= self._settings.max_downtime:
            return True
        return len(self.report.passes) > self._settings.max_iterations

    def _slow_down(self, one: Pass, before: Pass) -> None:
        if self._settings.auto_converge:
            percent = self._throttle.next(one.remaining, before.transferred)
            if percent != one.throttle:
                one.throttle = percent
                self._source.throttle(percent)

    def _send(self, one: Pass, pages: dict[int, DirtyBitmap], *, last: bool) -> None:
        start, sent = time.perf_counter(), self._channel.sent
        self._one, self._pass_start, self._pass_sent = one, start, sent
        self._sender.normal = self._sender.duplicate = 0
        for slot in self._source.slots:
            self._send_slot(slot, pages[slot.id])
        body = PASS.pack(one.number, last, self._sender.normal, self._sender.duplicate)
        self._channel.send(Kind.PASS, body)
        (acknowledged,) = self._channel.unpack(ACK, self._channel.expect(Kind.ACK))
        if acknowledged != one.number:
            raise StreamError(f"pass {acknowledged} was acknowledged, and not pass {one.number}")
        self._count()
        self.report.remaining = 0
        if last:
            self.report.downtime_bytes = self._channel.sent - sent
        self._tell(self.report)

    def _send_slot(self, slot: Memslot, pages: DirtyBitmap) -> None:
        weight = pages.weight()
        if weight:
            self._sender.send(slot, None if weight == slot.npages else pages)

    def _count(self) -> None:
        """Bring the numbers of the pass that goes on up to date."""
        one = self._one
        one.normal, one.duplicate = self._sender.normal, self._sender.duplicate
        one.time = time.perf_counter() - self._pass_start
        one.transferred = self._channel.sent - self._pass_sent
        self.report.transferred = self._channel.sent
        done = (one.normal + one.duplicate) * self._source.page_size
        self.report.remaining = max(one.remaining - done, 0)

    def _check(self) -> None:
        """Between two frames: go on, or raise."""
        if self._cancel.is_set():
            raise CancelledMigrationError("the migration was cancelled")
        if self._channel.pending():  # nothing is due, so it is an error, or the end
            kind, _ = self._channel.receive()
            raise StreamError(f"{kind.name} came, and nothing was due")
        now = time.perf_counter()
        if now - self._told > _TELL:
            self._told = now
            self._count()
            self.report.total_time = now - self._start
            self._tell(self.report)

    # --- the end -------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        channel, verify = self._channel, 0.0
        channel.send(Kind.STATE, self._source.state())
        digest = b""
        if self._settings.verify:
            start = time.perf_counter()
            channel.send(Kind.VERIFY)
            self.report.source_sha256 = self._source.digest()  # meanwhile the other side does the same
            self.report.destination_sha256 = channel.expect(Kind.DIGEST).hex()
            digest = bytes.fromhex(self.report.source_sha256)
            verify = self.report.verify_time = time.perf_counter() - start
            if self.report.source_sha256 != self.report.destination_sha256:
                raise DigestError(
                    f"SHA-256 {self.report.source_sha256} here, {self.report.destination_sha256} at the destination"
                )
        if self._cancel.is_set():
            raise CancelledMigrationError("the migration was cancelled")
        channel.send(Kind.GO, digest)
        self._gone = True
        self._await_resumed()
        self.report.downtime = time.perf_counter() - self._paused - verify
        self.report.transferred = channel.sent

    def _await_resumed(self) -> None:
        """Wait until the destination runs.

        It says so before it does. So if the stream ends without that, it never will, and the source may go on; only
        silence leaves the question open.
        """
        try:
            self._channel.expect(Kind.RESUMED)
        except StreamError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise HandoverError(
                    f"{error}: whether the destination runs is unknown, so the source is paused"
                ) from error
            self._gone = False
            raise

    def _await_proof(self) -> None:
        """Wait until the destination has seen whether its guest goes on. It does have it, whatever comes now."""
        try:
            said = self._channel.expect(Kind.PROVED).decode("utf-8", "replace")
        except StreamError as error:
            said = str(error)
        self.report.guest_resumed = not said
        self.report.error = said and f"the guest at the destination: {said}"

    def _settle(self) -> None:
        for lease in self._lent:
            with contextlib.suppress(StaleLeaseError):  # a slot that went has no more bits to lose
                lease.commit()
        self._lent.clear()
        self._source.throttle(0)

    def _undo(self, error: BaseException) -> None:
        """Put everything back, and let the guest run; then tell the other side, which may take its time."""
        try:
            for lease in reversed(self._lent):
                with contextlib.suppress(StaleLeaseError):
                    lease.rollback()
        finally:
            self._lent.clear()
            self._source.throttle(0)
            if self._ran and not self._gone and not self._source.running:
                try:
                    self._source.resume()
                except OSError as stuck:  # a vCPU that died, say: why the migration failed is the news still
                    error.add_note(f"and the source doesn't run: {stuck}")
        cancelled = isinstance(error, CancelledMigrationError | KeyboardInterrupt)
        self.report.status = "cancelled" if cancelled else "failed"
        self.report.error = str(error) or type(error).__name__
        self.report.transferred = self._channel.sent
        self._channel.fail(self.report.error)
