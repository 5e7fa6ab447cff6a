"""A migration's passes, simulated on what a guest writes."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np

from hwdbm.forecast.rules import Throttle, Verdict, pace
from hwdbm.forecast.samples import Sample
from hwdbm.forecast.terms import Terms
from hwdbm.forecast.writes import Dirty, GuestWrites

_PROGRESS = 0.95  # of what remained: less is progress
_MOST = 10_000  # passes that are followed
_FLAT, _PATIENCE = 1000, 3600.0  # passes without progress, and seconds of the guest, after which it is called flat
_SHORTEST = 1e-3  # seconds of a pass: no harvest is quicker, however little there is to send
_OVERTIME = 0.5  # seconds over the limit, after which the guest of our own migrations goes on for another pass
_SURE = (0.05, 1 << 20)  # seconds and bytes of a pass that says what the bandwidth is
_QUEUE = 1e-9
_TURNS = 2_000  # turns of a pass that are followed; where there are more they are longer
_FEW_TURNS = 16  # turns of a pass while far more is left than may be, where they needn't be told apart

Decide = Callable[[list[Sample]], Verdict]


@dataclass(frozen=True, slots=True)
class Course:
    """How a migration is to go; times in seconds, sizes in bytes."""

    terms: Terms
    bandwidth: float
    max_downtime: float
    start: float = 0.0  # of the guest's time
    timeout: float = inf
    max_iterations: int = 30
    on_limit: str = "abort"
    throttle: float = 0.0  # percent, all the time
    auto_converge: bool = False
    horizon: float = 0.0  # seconds of the guest that are followed before it is called flat, where nothing gives up
    decide: Decide | None = None  # in place of the rule of the terms' structure
    begun: "Begun | None" = None  # where it is by now
    held: float = 0.5  # how full QEMU's sockets are when the guest is stopped: 0 to 1


@dataclass(frozen=True, slots=True)
class Begun:
    """A migration that goes on: how far it is. Times are in seconds, sizes in bytes.

    `since` is how long ago the log was harvested; a pass that is about to begin was harvested just now. `history` has
    the pass and what it left of each harvest, the last one among them.
    """

    time: float
    number: int
    remaining: float
    since: float
    transferred: float
    history: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulated migration went; times in seconds, sizes in bytes."""

    converges: bool
    flat_from: int | None
    passes: int
    total_time: float
    downtime: float
    transferred: float
    guest: float  # where the guest's time ended
    least: float  # bytes: the least that a pass left
    verdict: Verdict | None
    samples: tuple[Sample, ...]


def run(guest: GuestWrites, plan: Course) -> Outcome:
    """Simulate a migration."""
    return _Migration(guest, plan).run()


class _Migration:
    """The state of a simulated migration: two clocks, what is dirty, and what was measured."""

    def __init__(self, guest: GuestWrites, plan: Course) -> None:
        self._guest, self._plan, self._terms = guest, plan, plan.terms
        self._size = float(guest.npages * guest.page_size)
        self._wall, self._now = 0.0, plan.start
        self._throttle, self._auto = plan.throttle, Throttle()
        self._limit = plan.max_downtime
        self._sent = self._busy = 0.0
        self._before = 0.0  # bytes sent before what is simulated
        self._measured: float | None = None
        # QEMU's turns: it sends its share of the bandwidth at once, and waits for the next one.
        self._turn: float
        self._share, self._rate = 0.0, plan.bandwidth
        self._slack = self._terms.burst  # seconds of the link that can be handed over at once
        self._looked = 0.0  # bytes of all pages over the seconds of all passes
        self._resumed: float  # when the guest went on after a pause that took too long
        self._least, self._best, self._flat = inf, 0, 0
        self._samples: list[Sample] = []
        self._verdict: Verdict | None = None
        self._asked = 0.0  # when a rule was asked last

    def run(self) -> Outcome:
        if self._plan.begun is None:
            self._advance(self._terms.prepare(self._size))
        else:
            self._go_on(self._plan.begun)
        return self._qemu() if self._terms.structure == "qemu" else self._own()

    def _go_on(self, begun: Begun) -> None:
        self._wall = begun.time
        self._sent = self._before = self._looked = begun.transferred
        for number, remaining in begun.history:
            self._note(number, remaining)

    # --- clocks and costs -----------------------------------------------------------------------------------------

    def _advance(self, seconds: float, running: bool = True, idle: bool = True) -> None:
        """Let time pass, in which the link catches up with what was handed over, unless it was busy with more."""
        self._wall += seconds
        if running:
            self._now += seconds * (1 - self._throttle / 100)
        if idle:
            self._slack = min(self._slack + seconds, self._terms.burst)

    def _handed(self, seconds: float) -> float:
        """Hand over what takes the link so long; return how long that takes."""
        taken = max(seconds - self._slack, 0.0)
        self._slack = max(self._slack - seconds, 0.0)
        return taken

    def _bytes(self, dirty: Dirty) -> float:
        normal = max(dirty.pages - dirty.zeros, 0.0)
        return normal * (self._guest.page_size + self._terms.page_overhead) + dirty.zeros * self._terms.zero_bytes

    def _seconds(self, dirty: Dirty, bandwidth: float) -> float:
        return self._bytes(dirty) / bandwidth + dirty.zeros * self._terms.zero_page

    @property
    def _last_bandwidth(self) -> float:
        return self._terms.last_bandwidth or self._plan.bandwidth

    def _remaining(self, dirty: Dirty) -> float:
        return dirty.pages * self._guest.page_size

    def _note(self, number: int, remaining: float) -> None:
        """Take note of what a pass leaves."""
        if remaining < self._least * _PROGRESS:
            self._least, self._best, self._flat = remaining, number, 0
        else:
            self._flat += 1

    def _hopeless(self) -> bool:
        if self._flat < self._plan.max_iterations:
            return False
        if self._plan.on_limit != "wait" or self._flat >= _FLAT:
            return True
        return self._now - self._plan.start >= min(self._plan.horizon, _PATIENCE)

    def _sample(self, number: int, remaining: float, rate: float, bandwidth: float | None, zeros: float) -> None:
        self._samples.append(
            Sample(
                self._wall,
                number,
                remaining,
                self._size,
                self._sent,
                bandwidth,
                rate,
                int(zeros),
                self._guest.page_size,
                self._limit,
                int(self._throttle),
            )
        )

    def _ask(self) -> str:
        """Return what the rule that was given says between two passes, and do the rest of it."""
        self._verdict = verdict = self._decided()
        if verdict.limit is not None:
            self._limit = verdict.limit
        if verdict.throttle is not None:
            self._throttle = max(float(verdict.throttle), self._plan.throttle)
        return verdict.action

    def _decided(self) -> Verdict:
        assert self._plan.decide is not None  # noqa: S101 - it was looked at
        self._asked = self._wall
        return self._plan.decide(self._samples)

    def _until_asked(self) -> float:
        """Return the seconds until a rule is to be asked within a pass."""
        if self._plan.decide is None:
            return inf
        return max(self._asked + pace(self._wall) - self._wall, 0.0)

    def _ask_within(self, left: float, sent: float) -> None:
        """Ask the rule within a pass, of which so many bytes are left and sent.

        It can only give up there: the guest is paused, or slowed down, when a pass is over.
        """
        before = self._samples[-1] if self._samples else None
        known = Sample(self._wall, 1, left, self._size, page_size=self._guest.page_size) if before is None else before
        self._samples.append(
            replace(known, time=self._wall, remaining=left, transferred=self._sent + sent, downtime_limit=self._limit)
        )
        verdict = self._decided()
        if verdict.action == "abort":
            self._verdict = verdict

    @property
    def _gave_up(self) -> bool:
        return self._verdict is not None and self._verdict.action == "abort"

    def _slow_down(self, dirtied: float, sent: float) -> None:
        if self._plan.auto_converge:
            self._throttle = max(float(self._auto.next(dirtied, sent)), self._plan.throttle)

    def _done(self, number: int, downtime: float, *, converges: bool) -> Outcome:
        flat = self._best if self._flat > 1 or not converges else None
        return Outcome(
            converges and self._wall <= self._plan.timeout, flat or None, number, self._wall, downtime, self._sent,
            self._now, self._least, self._verdict, tuple(self._samples),
        )  # fmt: skip

    # --- our own ----------------------------------------------------------------------------------------------------

    def _own(self) -> Outcome:
        terms, plan = self._terms, self._plan
        begun, sent = plan.begun, 0.0
        left: Dirty | None = None  # what is dirty though the log doesn't say so any more
        if begun is None:
            cut, number = self._now, 1
            self._advance(terms.sync(self._size))
            first = self._guest.everything(self._now, self._now)
            dirty = self._guest.everything(self._now, self._now + self._seconds(first, plan.bandwidth))
            sent = self._pass(dirty)
        else:
            number, cut = begun.number, self._now - begun.since
            dirty = Dirty(begun.remaining / self._guest.page_size, 0.0)
            if number == 1 or begun.since:  # a pass that goes on; else the rule comes first
                sent = self._pass(dirty)
            else:
                number, left = number - 1, dirty
        while True:
            if self._gave_up:
                unsent = dirty.part(1 - sent / max(self._bytes(dirty), 1.0))
                return self._given_up(number, self._guest.written(cut, self._now, unsent))
            begin, cut = cut, self._now
            elapsed = cut - begin
            dirty = self._guest.written(begin, cut, left)
            number += 1
            remaining = self._remaining(dirty)
            if left is None:
                self._advance(terms.sync(self._size))
                self._note(number, remaining)
            expected = remaining / self._known()
            self._sample(number, remaining, remaining / elapsed if elapsed else 0.0, self._known(), dirty.zeros)
            fits = expected <= self._limit
            if plan.decide is not None:
                action = self._ask()
                go, lost = action == "switch", action == "abort"
            else:
                go = fits or (self._hopeless() and plan.on_limit == "pause")
                lost = not go and self._hopeless()
            if not go and (lost or self._wall > plan.timeout or number >= _MOST):
                return self._given_up(number, dirty)
            if go:
                done = self._last(number, begin, left, fits=fits)
                if done is not None:
                    return done
                cut, left = self._resumed, None
                if self._hopeless() or self._wall > plan.timeout or number >= _MOST:
                    return self._given_up(number, dirty)
                continue
            left = None
            self._slow_down(remaining, sent)
            sent = self._pass(dirty)

    def _known(self) -> float:
        """Return the bandwidth as our own migration measures it."""
        if self._measured is not None:
            return self._measured
        if self._sent - self._before >= _SURE[1] and self._busy:
            return (self._sent - self._before) / self._busy
        return min(self._looked / max(self._wall, 1e-9), self._plan.bandwidth) or self._plan.bandwidth

    def _pass(self, dirty: Dirty) -> float:
        """Send all of a pass while the guest runs, unless the rule gives up meanwhile; return the bytes."""
        size, zero = self._bytes(dirty), dirty.zeros * self._terms.zero_page
        seconds = self._handed(size / self._plan.bandwidth)
        whole, done = max(seconds + zero, _QUEUE), 0.0
        while done < 1 and not self._gave_up:
            part = min(self._until_asked() / whole, 1 - done)
            self._advance(part * seconds, idle=False)
            self._advance(part * zero)
            done += part
            if done < 1:
                self._ask_within(self._remaining(dirty) * (1 - done), size * done)
        self._advance(self._terms.pass_time)
        self._count(size * done, seconds + self._terms.pass_time, dirty)
        return size * done

    def _count(self, size: float, busy: float, dirty: Dirty) -> None:
        self._sent += size
        self._busy += busy
        self._looked += self._remaining(dirty)
        if busy >= _SURE[0] and size >= _SURE[1]:
            self._measured = size / busy

    def _last(self, number: int, begin: float, left: Dirty | None, *, fits: bool) -> Outcome | None:
        """Pause the guest and send the rest; None if that takes too long, and the guest goes on."""
        terms, plan = self._terms, self._plan
        self._advance(terms.pause)
        dirty = self._guest.written(begin, self._now, left)
        late = terms.sync(self._size)
        self._advance(late, running=False)
        size, zero = self._bytes(dirty), dirty.zeros * terms.zero_page
        seconds = self._handed(size / self._last_bandwidth) + zero
        patience = self._limit + max(self._limit, _OVERTIME)
        paused = terms.pause + late + seconds + terms.pass_time
        if paused > patience and plan.on_limit != "pause" and plan.decide is None:
            self._advance(max(patience - terms.pause - late, 0.0), running=False, idle=False)
            self._resumed = self._now
            self._advance(max(paused - patience, 0.0), idle=False)
            self._count(size, seconds + terms.pass_time - zero, dirty)
            return None
        self._advance(seconds + terms.pass_time + terms.handover, running=False)
        self._sent += size
        self._wall += terms.verify(self._size)
        return self._done(number, paused + terms.handover, converges=fits or plan.decide is not None)

    def _given_up(self, number: int, dirty: Dirty) -> Outcome:
        """Return how it ended, with the downtime that there would have been."""
        terms = self._terms
        self._advance(terms.sync(self._size))
        would = terms.pause + terms.sync(self._size) + terms.pass_time + terms.handover
        would += self._handed(self._seconds(dirty, self._last_bandwidth))
        return self._done(number, would, converges=False)

    # --- QEMU's -----------------------------------------------------------------------------------------------------

    def _qemu(self) -> Outcome:
        terms, plan, page = self._terms, self._plan, self._guest.page_size
        begun, synced, number, at = plan.begun, self._now, 1, 0
        self._turn = self._wall
        if begun is None:
            self._advance(terms.sync(self._size))
            first = self._guest.everything(self._now, self._now)
            dirty = self._guest.everything(self._now, self._now + self._seconds(first, plan.bandwidth))
        else:
            number, synced = begun.number, synced - begun.since
            dirty = Dirty(begun.remaining / page, 0.0)
        while True:
            dirty, at, sent = self._until_few(dirty, at)
            if self._gave_up or self._wall > plan.timeout or number >= _MOST:
                return self._given_up(number, self._guest.written(synced, self._now, dirty))
            self._advance(max(_SHORTEST - (self._now - synced), 0.0))
            before, synced = synced, self._now
            left = dirty
            dirty = self._guest.written(before, synced, left)
            self._advance(terms.sync(self._size))
            number += 1
            remaining, elapsed = self._remaining(dirty), synced - before
            fresh = max(dirty.pages - left.pages, 0.0) * page
            self._note(number, remaining)
            self._sample(number, remaining, fresh / elapsed if elapsed else 0.0, plan.bandwidth, dirty.zeros)
            action = "continue" if plan.decide is None else self._ask()
            if action == "abort":
                return self._given_up(number, dirty)
            if action == "switch" or not remaining or remaining < self._threshold():
                return self._complete(number, dirty, synced)
            if self._hopeless() and plan.decide is None:
                return self._given_up(number, dirty)
            self._slow_down(fresh, sent)

    def _threshold(self) -> float:
        """Return the bytes of which QEMU thinks that they fit into the downtime, by what it sent last."""
        return self._rate * self._limit

    def _until_few(self, dirty: Dirty, at: int) -> tuple[Dirty, int, float]:
        """Send until less than the threshold is left, at one of the looks; return what is left, and the bytes sent."""
        if not dirty.pages:
            self._advance(max(self._terms.tick, 0.01))
            return dirty, at, 0.0
        if dirty.words is None:
            return self._until_few_of(dirty)
        page, terms, bandwidth = self._guest.page_size, self._terms, self._plan.bandwidth
        pages, zeros = dirty.by_word(at)
        size = (pages - zeros) * (page + terms.page_overhead) + zeros * terms.zero_bytes
        work = size / self._last_bandwidth + zeros * terms.zero_page
        sums = np.zeros((3, pages.size + 1))
        np.cumsum((pages, size, work), axis=1, out=sums[:, 1:])
        # A turn looks at few of the words, and one by one, numbers of numpy's take longer.
        gone, sent, clock = (each.data for each in sums)
        end = float(len(gone) - 1)
        short = max(terms.tick, sent[-1] / bandwidth / _TURNS, clock[-1] / _TURNS)
        long = max(sent[-1] / bandwidth, clock[-1]) / _FEW_TURNS
        # While more is left than this, no turn is the last one.
        near = _place_of(gone, max(dirty.pages - bandwidth * (self._limit + terms.burst + short) / page, 0.0))
        near_sent, near_spent = _at(sent, near), _at(clock, near)
        left, done, spent = dirty.pages, 0.0, 0.0
        while True:
            far = max((near_sent - done) / bandwidth, near_spent - spent - self._slack)
            turns = int(min(far / 2, long, self._until_asked()) / max(short, _QUEUE))
            tick = short * max(turns, 1)
            # It goes on until its share is used up, or until it looks, and that before the turn is over.
            look = tick * terms.look / terms.tick if turns <= 1 and terms.tick and terms.look else tick
            used = _place_of(sent, done + max(bandwidth * tick - self._share, 0.0))
            place = min(used, _place_of(clock, spent + look + self._slack))
            before, began = done, spent
            left, done, spent = dirty.pages - _at(gone, place), _at(sent, place), _at(clock, place)
            self._advance(self._handed(spent - began), idle=False)
            self._share += done - before
            if place >= end:  # there is no more, which it sees at once
                self._sent += sent[-1]
                return (*dirty.beyond(0.0, 0.0, at, pages.size), sent[-1])
            if place >= used:
                self._advance(max(tick - (self._wall - self._turn), 0.0))
            if (turn := self._wall - self._turn) >= tick * (1 - _QUEUE):
                self._rate, self._share, self._turn = self._share / max(turn, _QUEUE), 0.0, self._wall
            if not self._until_asked():
                self._ask_within(left * page, done)
            if left * page < self._threshold() or self._gave_up:
                whole = int(place)
                self._sent += done
                rest, at = dirty.beyond(left, min(float(zeros[whole:].sum()), left), at, whole)
                return rest, at, done

    def _until_few_of(self, dirty: Dirty) -> tuple[Dirty, int, float]:
        """Do the same where it isn't known which pages they are: any is as good as any other."""
        each = self._seconds(dirty, self._plan.bandwidth) / dirty.pages
        goal = dirty.pages - self._threshold() / self._guest.page_size
        share = self._terms.tick / each if self._terms.tick else goal
        turns = max(goal / share + _QUEUE, 1.0) if share else inf  # goal is far below 0 where the limit is huge
        send = min(ceil(turns) * share, dirty.pages) if turns * share < dirty.pages else dirty.pages
        size = self._bytes(dirty) * send / dirty.pages
        gone = 0.0
        while gone < send and not self._gave_up:
            part = min(self._until_asked() / each, send - gone) if each else send
            self._advance(part * each)
            gone += part
            if gone < send:
                self._ask_within(self._remaining(dirty) * (1 - gone / dirty.pages), size * gone / send)
        size *= gone / send if send else 1.0
        self._sent += size
        return dirty.part(1 - gone / dirty.pages), 0, size

    def _complete(self, number: int, left: Dirty, synced: float) -> Outcome:
        terms = self._terms
        self._advance(terms.pause)
        dirty = self._guest.written(synced, self._now, left)
        self._advance(terms.sync(self._size), running=False)
        # The guest runs at the destination when all that was handed over has come there. How much that is depends on
        # when in a turn it is stopped, and on who had the processors just then: any part of what the sockets hold.
        held = (terms.burst - self._slack) * self._plan.held
        rest = held + self._seconds(dirty, self._last_bandwidth) + terms.handover
        self._advance(rest, running=False)
        self._sent += self._bytes(dirty)
        return self._done(number + 1, terms.pause + terms.sync(self._size) + rest, converges=True)


def _at(values: Sequence[float], place: float) -> float:
    """Return what a sequence has at a place, which may lie between two of its numbers."""
    at = int(place)
    if at >= len(values) - 1:
        return values[-1]
    return values[at] + (place - at) * (values[at + 1] - values[at])


def _place_of(values: Sequence[float], value: float) -> float:
    """Return the last place at which a sequence that doesn't fall has a value."""
    at = bisect_right(values, value) - 1
    if at >= len(values) - 1:
        return float(len(values) - 1)
    return at + (value - values[at]) / (values[at + 1] - values[at])
