"""Pre-copy: passes while the guest runs, a short pause, and the destination goes on.

Pages taken from the dirty log are on loan (`Pages`) until the destination runs. A failure before that has
one answer: every bit goes back, the throttle goes, the guest runs. From GO on the guest stays paused until something
that can't be wrong says that the destination never ran: its own ERROR, or the end of its process.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import (
    CancelledMigrationError,
    ConvergenceError,
    DigestError,
    HandoverError,
    PeerError,
    SampleError,
    StaleLeaseError,
    StreamError,
    in_words,
    printable,
)
from hwdbm.forecast import RULES, Sample, Verdict, from_samples
from hwdbm.forecast.rules import Throttle, pace
from hwdbm.memslot import Memslot
from hwdbm.migration.channel import Channel
from hwdbm.migration.converge import Progress, Settings
from hwdbm.migration.report import Pass, Report, folded
from hwdbm.migration.sender import Limiter, PageSender
from hwdbm.migration.staging import SocketStaging, staging
from hwdbm.migration.wire import ACK, PASS, PROVING, READY, RUNNING, SHARING, VERIFIED, Hello, Kind
from hwdbm.vm import Client, MemoryMap, Pages, Provable, Source, client_of
from hwdbm.vm.still import turn_of

_TELL = 0.1  # seconds between two calls of on_progress
_POPULATE = 128 << 20  # bytes a second that a destination gets its memory ready at, or faster
_DIGEST = 4  # times as long as here that the digest may take at the destination
_DYING = 2000  # milliseconds between the end of a process's sockets and its own
_WORTH = 5  # times as long as the last forecast took that a pass must take for another
_OVERTIME = 0.5  # seconds over the downtime's limit, after which the guest goes on for another pass

_log = logging.getLogger(__name__)


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
        Called with the report now and then, and after each pass. What it raises ends the migration, unless the guest
        is at the destination already: then it is logged.

    Returns
    -------
    Report
        The source is paused then, and its pages committed: the VM is elsewhere.

    Raises
    ------
    OSError
        `StreamError` and its kin if it failed, `CancelledMigrationError` if it was cancelled, `ConvergenceError` if the
        guest dirties too much, or what the source raised: EBUSY if another migration of it goes on. The source runs on
        if it ran before, but for `HandoverError`: then it is paused. Its log stays on. The migration is a client of it,
        so that others miss nothing; of a source without clients, every bit that was taken is put back. To have the
        report of a failure, use `Precopy`.
    """
    return Precopy(source, channel, settings, cancel=cancel, on_progress=on_progress).run()


class Precopy:
    """One attempt to migrate a VM; see `migrate` for the parameters.

    Attributes
    ----------
    report : Report
        The report, also of a failed migration.
    failure : OSError or None
        A place for the caller to keep what `run` raised, beside the report.
    """

    failure: OSError | None = None

    def __init__(
        self,
        source: Source,
        channel: Channel,
        settings: Settings | None = None,
        *,
        cancel: threading.Event | None = None,
        on_progress: Callable[[Report], object] | None = None,
    ) -> None:
        settings = Settings() if settings is None else settings
        cancel = threading.Event() if cancel is None else cancel
        on_progress = (lambda _: None) if on_progress is None else on_progress
        check.instance(source, Source, "source")
        check.instance(channel, Channel, "channel")
        check.instance(settings, Settings, "settings")
        check.instance(cancel, threading.Event, "cancel")
        check.instance(on_progress, Callable, "on_progress")
        self._source, self._channel, self._settings = source, channel, settings
        self._cancel, self._on_progress = cancel, on_progress
        self._layout = MemoryMap.of(source)
        self.report = Report(source.page_size, self._layout.total, settings.max_downtime)
        self._throttle, self._progress = Throttle(), Progress(settings)
        self._client: Client | None = None  # until there is one the source is another migration's, perhaps
        self._samples: list[Sample] = []
        self._forecast_cost = 0.0  # seconds that the last forecast took
        self._lent: list[Pages] = []
        self._paused: float | None = None  # since when the guest stands still for the last pass
        self._one: Pass | None = None  # the pass that goes on
        self._peer: int | None = None  # a pidfd of the receiver's process
        self._ran = source.running
        self._gone = False  # whether the destination may be running
        self._begun = False

    def run(self) -> Report:
        """Migrate; once."""
        if self._begun:
            raise ValueError("an attempt runs once: make another Precopy")
        self._begun = True
        self._start = time.perf_counter()
        self._told = -inf  # the first report is told at once
        try:
            with ExitStack() as stack:
                try:
                    self._run(stack)
                except BaseException as error:
                    self._undo(error)
                    raise
                self._settle()
        finally:
            self.report.total_time = time.perf_counter() - self._start
            self._channel.check = lambda: None
            self._close_peer()
        # The guest is at the destination: nothing that happens from here on may look like a failure.
        if isinstance(self._source, Provable) and self._ran:
            self._await_proof()
        self._tell()
        return self.report

    def _run(self, stack: ExitStack) -> None:
        stage = stack.enter_context(staging(self._channel))
        self._channel.check = self._tick
        if not self._setup(stage.descriptors):
            stage = stack.enter_context(SocketStaging(self._channel))
        limiter = Limiter(self._settings.bandwidth)
        self._sender = PageSender(self._source, self._channel, stage, limiter, self._check)
        if not all(slot.logging for slot in self._source.slots):
            self._source.start_log()
        self._client = stack.enter_context(client_of(self._source, "migration"))
        self._precopy()
        self._hand_over()

    # --- passes --------------------------------------------------------------------------------------------

    def _setup(self, descriptors: tuple[int, ...]) -> bool:
        """Agree on the version, the kind of VM and the memory, and wait until there is room for it.

        Return whether the other side has the memory of the descriptors.
        """
        self.report.status = "setup"
        flags = VERIFIED * self._settings.verify | RUNNING * self._ran | SHARING * bool(descriptors)
        if isinstance(self._source, Provable) and self._ran:
            flags |= PROVING
        hello = Hello(flags, kind_of(self._source), self._layout)
        self._channel.send(Kind.HELLO, hello.to_bytes(), descriptors=descriptors)
        with self._channel.within(2 * self._channel.timeout + self._layout.total / _POPULATE, "getting ready there"):
            (flags,) = self._channel.unpack(READY, self._channel.expect(Kind.READY, descriptors=True))
        self._keep_peer(self._channel.descriptors())
        self.report.setup_time = time.perf_counter() - self._start
        self.report.status = "active"
        return bool(flags & SHARING)

    def _precopy(self) -> None:
        self._send_all()
        while True:
            began, pages = self._collected, self._collect()
            one = self._begin(pages, began)
            with turn_of(self._source):  # one who has it paused for a moment, for a snapshot, has no say
                running = self._source.running
            if running and not self._enough(one):
                self._slow_down(one, self.report.passes[-2])
                self._foresee(one)
                self._send(one, pages, last=False)
                continue
            self.report.converged |= not self._ran
            self._pause()
            for slot_id, late in self._collect().items():  # what was written until the pause
                pages[slot_id] |= late
            one.dirty, one.remaining, one.cells = self._described(pages)
            if self._send(one, pages, last=True):
                return

    def _pause(self) -> None:
        # Set first: whatever happens meanwhile, `_undo` sees that the guest has to go on.
        self._paused = time.perf_counter()
        with turn_of(self._source):
            self._source.pause()
        self.report.status = "device"

    def _send_all(self) -> None:
        """Send every page, whatever the log says: only now are they all needed."""
        pages = {slot.id: DirtyBitmap(slot.npages) for slot in self._source.slots}
        for bitmap in pages.values():
            bitmap.fill()
        # What is dirty already needs no second pass. It is lent, too, so that a failure returns these bits.
        self._collect()
        one = self._new(pages)
        self._sample(one)
        self._send(one, pages, last=False)

    def _collect(self) -> dict[int, DirtyBitmap]:
        """Return what was dirtied since the last time."""
        now = time.perf_counter()
        pages = {}
        for slot in self._source.slots:
            lease = self._take(slot)
            pages[slot.id] = lease.bitmap.copy()
        self._collected, self._collect_time = now, time.perf_counter() - now
        return pages

    def _take(self, slot: Memslot) -> Pages:
        """Take a slot's pages; one that was changed since the first pass isn't the one that the destination has."""
        assert self._client is not None  # noqa: S101 - passes begin when there is one
        lease = self._client.take(slot.id)
        self._lent.append(lease)
        if broken := getattr(lease, "broken", ""):
            raise StreamError(f"slot {slot.id} of the source was changed meanwhile: {broken}")
        return lease

    def _begin(self, pages: dict[int, DirtyBitmap], began: float) -> Pass:
        one = self._new(pages)
        one.dirty_rate = one.remaining / max(self._collected - began, 1e-9)
        one.collect_time = self._collect_time
        one.expected_downtime = one.remaining / self._bandwidth()
        self._progress.add(one.number, one.remaining, one.expected_downtime)
        self._sample(one)
        return one

    def _sample(self, one: Pass) -> None:
        """Take note of what is known when a pass begins."""
        report, self._asked = self.report, time.perf_counter()  # when a rule of others was asked last
        self._samples.append(
            Sample(
                time.perf_counter() - self._start,
                one.number,
                one.remaining,
                report.total,
                self._channel.sent,
                None if one.number == 1 else self._bandwidth(),
                None if one.number == 1 else one.dirty_rate,
                report.duplicate,
                report.page_size,
                self._settings.max_downtime,
                one.throttle,
                source="hwdbm",
            )
        )

    def _foresee(self, one: Pass) -> None:
        """Renew the forecast, unless that takes a good part of the pass: the guest writes meanwhile."""
        if (one.expected_downtime or 0.0) < _WORTH * self._forecast_cost:
            return
        began, settings = time.perf_counter(), self._settings
        with contextlib.suppress(SampleError):  # they say too little
            one.forecast = from_samples(
                self._samples,
                max_downtime=settings.max_downtime,
                max_iterations=settings.max_iterations,
                on_limit=settings.on_limit,
                auto_converge=settings.auto_converge,
                needs=False,
            )
        self._forecast_cost = time.perf_counter() - began

    def _new(self, pages: dict[int, DirtyBitmap]) -> Pass:
        """Return the next pass, which is in the report then."""
        dirty, remaining, cells = self._described(pages)
        one = Pass(len(self.report.passes) + 1, dirty, remaining, throttle=self._throttle.percent, cells=cells)
        self.report.passes.append(one)
        return one

    def _described(self, pages: dict[int, DirtyBitmap]) -> tuple[int, int, NDArray[np.float32]]:
        """Return how many pages a pass is to send, how many bytes these are, and where they lie."""
        dirty = sum(bitmap.weight() for bitmap in pages.values())
        self.report.remaining = dirty * self._source.page_size
        return dirty, self.report.remaining, folded(list(pages.values()))

    def _bandwidth(self) -> float:
        """Bytes of pages a second: as in the last pass that sent enough to say, and else as in all of them."""
        for one in reversed(self.report.passes):
            if one.time - one.zero_time >= 0.05 and one.transferred >= 1 << 20:
                return one.bandwidth
        if self.report.transferred >= 1 << 20:
            return self.report.bandwidth
        # They were all of zeros: what is known is how fast pages are looked at, and what the link may carry.
        seconds = sum(one.time for one in self.report.passes)
        rate = sum(one.normal + one.duplicate for one in self.report.passes) * self._source.page_size / seconds
        return min(rate, self._settings.bandwidth or rate)

    def _enough(self, one: Pass) -> bool:
        """Return whether the guest is to be paused now."""
        if self._settings.rule != "ours":
            return self._ruled(one)
        if one.expected_downtime is not None and one.expected_downtime <= self._settings.max_downtime:
            self.report.converged = True
            return True
        if self._progress.flat < self._settings.max_iterations or self._settings.on_limit == "wait":
            return False
        if self._settings.on_limit == "pause":
            return True
        raise ConvergenceError(f"{self._progress.why()} (in {len(self.report.passes) - 1} passes)")

    def _ruled(self, one: Pass) -> bool:
        """Return what a rule of others says, and do the rest of it."""
        verdict = self._verdict(f"in {one.number - 1} passes")
        self.report.converged = verdict.action == "switch"
        if verdict.throttle is not None and verdict.throttle != one.throttle:
            one.throttle = self._throttle.percent = verdict.throttle
            self._source.throttle(verdict.throttle)
        return self.report.converged

    def _verdict(self, where: str) -> Verdict:
        """Return what the rule says by now, unless it gives up."""
        verdict = RULES[self._settings.rule](self._samples, max_downtime=self._settings.max_downtime)
        if verdict.action == "abort":
            raise ConvergenceError(f"by the rule {self._settings.rule}: {verdict.why} ({where})")
        return verdict

    def _ask_within(self, one: Pass, now: float) -> None:
        """Within a pass a rule of others can only give up: the guest is paused, or slowed down, when a pass is over."""
        if self._settings.rule != "ours" and now - self._asked >= pace(now - self._start):
            self._count()
            known, elapsed, self._asked = self._samples[-1], now - self._start, now
            self._samples.append(
                replace(known, time=elapsed, remaining=self.report.remaining, transferred=self._channel.sent)
            )
            self._verdict(f"within pass {one.number}")

    def _slow_down(self, one: Pass, before: Pass) -> None:
        if self._settings.auto_converge and self._settings.rule == "ours":
            percent = self._throttle.next(one.remaining, before.transferred)
            if percent != one.throttle:
                one.throttle = percent
                self._source.throttle(percent)

    def _send(self, one: Pass, pages: dict[int, DirtyBitmap], *, last: bool) -> bool:
        """Send a pass; return whether it was the last."""
        start, sent = time.perf_counter(), self._channel.sent
        self._one, self._pass_start, self._pass_sent = one, start, sent
        self._sender.restart()
        for slot in self._source.slots:
            self._send_slot(slot, pages[slot.id])
        last = last and self._paused is not None  # and not too long ago
        if last:
            self._count()
            self._one = None  # from here on it is the last
        patience = self._channel.timeout + 2 * (one.expected_downtime or 0) if last else inf
        with self._channel.within(patience, "the last pass"):
            self._channel.send(Kind.PASS, PASS.pack(one.number, last, self._sender.normal, self._sender.duplicate))
            (acknowledged,) = self._channel.unpack(ACK, self._channel.expect(Kind.ACK))
        if acknowledged != one.number:
            raise StreamError(f"pass {acknowledged} was acknowledged, and not pass {one.number}")
        self._one = one
        self._count()
        self._one = None
        if last:
            self.report.downtime_bytes = self._channel.sent - sent
        self._tell()
        return last

    def _send_slot(self, slot: Memslot, pages: DirtyBitmap) -> None:
        weight = pages.weight()
        if weight:
            self._sender.send(slot, None if weight == slot.npages else pages)

    def _count(self) -> None:
        """Bring the numbers of the pass that goes on up to date."""
        if (one := self._one) is None:
            return
        one.normal, one.duplicate = self._sender.normal, self._sender.duplicate
        one.time, one.zero_time = time.perf_counter() - self._pass_start, self._sender.zero_time
        one.transferred = self._channel.sent - self._pass_sent
        self.report.transferred = self._channel.sent
        done = (one.normal + one.duplicate) * self._source.page_size
        self.report.remaining = max(one.remaining - done, 0)

    def _check(self) -> None:
        """Between two frames: go on, or raise."""
        self._channel.heed()
        self._channel.keep_alive()
        self._tick()

    def _tick(self) -> None:
        """Also while an answer is awaited: go on, or raise."""
        self._check_cancel()
        now = time.perf_counter()
        if self._one is not None:
            if self._paused is not None:
                self._limit_pause(self._one, now - self._paused)
            else:
                self._ask_within(self._one, now)
        if now - self._told > _TELL:
            self._count()
            self.report.total_time = now - self._start
            self._tell()

    def _limit_pause(self, one: Pass, paused: float) -> None:
        """While the last pass is sent: let the guest go on if that takes too long, and end it if that can't be."""
        limit = self._settings.max_downtime
        if paused > limit + self._channel.timeout + 2 * (one.expected_downtime or 0):
            raise StreamError(f"the last pass isn't over after {paused:.1f} s")
        if self._ran and self._settings.on_limit != "pause" and paused > limit + max(limit, _OVERTIME):
            with turn_of(self._source):
                self._source.resume()
            one.paused = paused
            self._paused, self.report.status, self.report.converged = None, "active", False

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise CancelledMigrationError("the migration was cancelled")

    def _tell(self) -> None:
        """Call on_progress. Once the destination runs, no error of it may be taken for one of the migration."""
        self._told = time.perf_counter()
        try:
            self._on_progress(self.report)
        except Exception:
            if not self._gone:
                raise
            _log.exception("on_progress failed after the handover")

    # --- the end -------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        channel, verify = self._channel, 0.0
        with channel.within(channel.timeout, "taking the state"):
            channel.send(Kind.STATE, self._source.state())
        digest = b""
        if self._settings.verify:
            start = time.perf_counter()
            channel.send(Kind.VERIFY)
            with channel.alive():
                self.report.source_sha256 = self._source.digest()  # meanwhile the other side does the same
            patience = channel.timeout + _DIGEST * (time.perf_counter() - start)
            with channel.within(patience, "the digest there"):
                self.report.destination_sha256 = channel.expect(Kind.DIGEST).hex()
            digest = bytes.fromhex(self.report.source_sha256)
            verify = self.report.verify_time = time.perf_counter() - start
            if self.report.source_sha256 != self.report.destination_sha256:
                raise DigestError(
                    f"SHA-256 {self.report.source_sha256} here, {self.report.destination_sha256} at the destination"
                )
        self._renew()
        self._check_cancel()
        channel.check = self._check_cancel
        self._gone = True  # from before the first byte of GO, so that no interrupt comes between
        with channel.within(channel.timeout, "starting the guest there"):
            self._say_go(digest)
            self._await_resumed()
        if self._paused is not None:
            self.report.downtime = time.perf_counter() - self._paused - verify
        self.report.transferred = channel.sent
        self.report.status = "completed"

    def _renew(self) -> None:
        """Give all pages back and take them anew, as one lease a slot: a lease that went stale shows here."""
        while self._lent:
            try:
                self._lent[-1].rollback()
            except StaleLeaseError as error:
                raise StreamError(f"the log was lost while it was used: {error.strerror or error}") from error
            finally:
                self._lent.pop()
        for slot in self._source.slots:
            self._take(slot)

    def _say_go(self, digest: bytes) -> None:
        try:
            self._channel.send(Kind.GO, digest)
        except (StreamError, CancelledMigrationError):
            self._gone = False  # the socket didn't take all of it, and half a GO is none
            raise

    def _await_resumed(self) -> None:
        """Wait until the destination runs: it says so after it does, and ERROR if it never will."""
        try:
            self._channel.expect(Kind.RESUMED)
        except PeerError:
            self._gone = False
            raise
        except (StreamError, CancelledMigrationError) as error:
            if isinstance(error, StreamError) and self._peer_is_gone():
                self._gone = False
                raise StreamError(f"{error}; the receiver's process is gone, and a guest in it too") from error
            raise HandoverError(
                f"{error}: whether the guest runs at the destination is unknown, so it is paused here; "
                "if it doesn't run there, and never will, resume the source by hand"
            ) from error

    def _keep_peer(self, descriptors: list[int]) -> None:
        """Keep the pidfd that came with READY, if that is what came."""
        for fd in descriptors:
            try:
                signal.pidfd_send_signal(fd, 0)
                self._close_peer()
                self._peer = fd
            except (OSError, AttributeError):  # it is none, or one that can't be seen from here
                os.close(fd)

    def _close_peer(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            os.close(peer)

    def _peer_is_gone(self) -> bool:
        """Return whether the process that received has ended, and so can't run anything."""
        if self._peer is None:
            return False
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        return bool(poll.poll(_DYING))

    def _await_proof(self) -> None:
        """Wait until the destination has seen whether its guest goes on. It does have it, whatever comes now."""
        self._channel.check = self._check_cancel
        try:
            with self._channel.within(2 * self._channel.timeout, "looking at the guest there"):
                said = printable(self._channel.expect(Kind.PROVED).decode("utf-8", "replace"))
        except (StreamError, CancelledMigrationError) as error:
            said = str(error)
        finally:
            self._channel.check = lambda: None
        self.report.guest_resumed = not said
        self.report.error = said and f"the guest at the destination: {said}"

    def _settle(self) -> None:
        """Commit what was lent. The destination runs: what fails here is no failure of the migration."""
        try:
            for lease in self._lent:
                with contextlib.suppress(StaleLeaseError):  # a slot that went has no more bits to lose
                    lease.commit()
            self._lent.clear()
            self._source.throttle(0)
        except Exception:  # noqa: BLE001  # whatever it is, a caller must not take it for a reason to try again
            _log.exception("the source couldn't be put away after the handover")

    def _undo(self, error: BaseException) -> None:
        """Put everything back, and let the guest run; then tell the other side, which may take its time."""
        try:
            for lease in reversed(self._lent):
                with contextlib.suppress(StaleLeaseError):
                    lease.rollback()
        finally:
            self._lent.clear()
            if self._client is not None:
                self._let_go_on(error)
        cancelled = isinstance(error, CancelledMigrationError | KeyboardInterrupt)
        self.report.status = "cancelled" if cancelled else "failed"
        self.report.handover_unknown = self._gone
        self.report.error = in_words(error)
        self.report.transferred = self._channel.sent
        if self._gone:
            if not isinstance(error, HandoverError):
                error.add_note("whether the guest runs at the destination is unknown, so it is paused here")
        else:
            self._channel.fail(self.report.error)

    def _let_go_on(self, error: BaseException) -> None:
        self._source.throttle(0)
        with turn_of(self._source):
            if self._ran and not self._gone and not self._source.running:
                try:
                    self._source.resume()
                except OSError as stuck:  # a vCPU that died, say: why the migration failed is the news still
                    error.add_note(f"and the source doesn't run: {stuck}")


def kind_of(vm: Source) -> str:
    """Return the kind of a VM, 16 letters at most: its state only fits into one of the same kind."""
    return str(getattr(vm, "kind", ""))
