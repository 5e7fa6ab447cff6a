"""Stop rules side by side: the same guest under each, and what becomes of it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from hwdbm import check
from hwdbm.forecast.rules import RULES
from hwdbm.forecast.simulate import Course, Outcome, run
from hwdbm.forecast.terms import OWN, QEMU, Terms
from hwdbm.forecast.writes import TraceWrites, Writes, start_of

_QEMUS = {"qemu", "qemu-auto-converge", "kubevirt"}  # what runs under these is QEMU


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What a rule makes of a migration. Times are in seconds here, and in ms in `to_dict`.

    Parameters
    ----------
    rule : str
        Its name in `RULES`.
    action : {"switch", "abort", "goes on"}
        What it does in the end; "goes on" where it would never do anything, or not within the timeout.
    time : float
        Seconds until it does that, or until it was followed no longer.
    passes : int
        Passes until then.
    downtime : float, optional
        Seconds that the guest stands still, where it switches.
    transferred : float
        Bytes sent, those in the pause among them.
    why : str
        The reason, for people.
    """

    rule: str
    action: Literal["switch", "abort", "goes on"]
    time: float
    passes: int
    downtime: float | None
    transferred: float
    why: str = ""

    def __post_init__(self) -> None:
        check.one_of(self.rule, RULES, "rule")
        check.one_of(self.action, ("switch", "abort", "goes on"), "action")
        object.__setattr__(self, "time", check.real(self.time, "time", 0))
        object.__setattr__(self, "passes", check.integer(self.passes, "passes"))
        if self.downtime is not None:
            object.__setattr__(self, "downtime", check.real(self.downtime, "downtime", 0))
        object.__setattr__(self, "transferred", check.real(self.transferred, "transferred", 0))
        check.instance(self.why, str, "why")

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON: times in ms, bytes; a downtime that isn't there is None."""
        return {
            "rule": self.rule,
            "action": self.action,
            "time": round(self.time * 1e3, 3),
            "passes": self.passes,
            "downtime": None if self.downtime is None else round(self.downtime * 1e3, 3),
            "transferred": round(self.transferred),
            "why": self.why,
        }


def compare_rules(
    writes: Writes,
    *,
    bandwidth: float,
    max_downtime: float | None = None,
    terms: Terms | None = None,
    timeout: float | None = None,
    start_ns: int = 0,
    now: bool = False,
) -> list[RuleOutcome]:
    """Replay a trace under each rule, and return when each would switch or abort, and what the pause would be.

    QEMU's passes run under QEMU's rules and KubeVirt's, ours under the others.

    Parameters
    ----------
    writes : Writes
        The trace.
    bandwidth : float
        Bytes a second, 1 or more.
    max_downtime : float, optional
        Seconds, for all rules; by default each has its own default.
    terms : Terms, optional
        For the rules with the passes of their structure; the others have the defaults.
    timeout : float, optional
        Seconds that a rule is followed; by default two hours.
    start_ns : int
        Where in the trace the migration begins, in nanoseconds.
    now : bool
        Whether it begins where the trace ends, as for `replay`: at the moment of the trace that is most like its end.

    Examples
    --------
    >>> import numpy as np
    >>> from hwdbm.forecast import MemoryWrites, compare_rules
    >>> words = np.zeros((50, 4096), dtype=np.uint64)  # 1 GiB, of which 50 MiB are hot
    >>> words[:, :200] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    >>> for each in compare_rules(MemoryWrites(words, 0.1), bandwidth=100e6):
    ...     print(each.rule, each.action)
    ours abort
    qemu goes on
    qemu-auto-converge switch
    kubevirt switch
    cloud-hypervisor abort
    """
    check.instance(writes, Writes, "writes")
    speed = check.real(bandwidth, "bandwidth", 1)
    limit = None if max_downtime is None else check.real(max_downtime, "max_downtime", 0)
    if terms is not None:
        check.instance(terms, Terms, "terms")
    most = 7200.0 if timeout is None else check.real(timeout, "timeout", 0)
    start = start_of(start_ns, now)
    guest = TraceWrites(writes)
    (begin,) = guest.moments(start, 1)
    course = Course(OWN, speed, 0.3 if limit is None else limit, begin, most, horizon=guest.period)
    return [_outcome(guest, course, name, limit, terms) for name in RULES]


def _outcome(guest: TraceWrites, course: Course, name: str, limit: float | None, terms: Terms | None) -> RuleOutcome:
    structure = "qemu" if name in _QEMUS else "own"
    mine = terms if terms is not None and terms.structure == structure else QEMU if structure == "qemu" else OWN
    course = replace(course, terms=mine)
    rule = RULES[name] if limit is None else partial(RULES[name], max_downtime=limit)
    if name == "ours":
        done = run(guest, course)
        action: Any = "switch" if done.converges else "abort"
        why = "the rest fits into the limit" if done.converges else "30 passes in a row left no less"
    elif name.startswith("qemu"):  # it never gives up
        done = run(guest, replace(course, on_limit="wait", auto_converge=name == "qemu-auto-converge"))
        action = "switch" if done.converges else "goes on"
        why = "less than bandwidth times limit is left" if done.converges else "no pass leaves notably less"
    else:
        done = run(guest, replace(course, decide=rule))
        action = done.verdict.action if done.verdict is not None else "continue"
        action = action if action in {"switch", "abort"} else "switch" if done.converges else "goes on"
        why = "" if done.verdict is None else done.verdict.why
    if done.total_time > course.timeout:
        action = "goes on"
        why = f"nothing is decided after {course.timeout:g} s"
    return _told(name, action, done, why)


def _told(name: str, action: Literal["switch", "abort", "goes on"], done: Outcome, why: str) -> RuleOutcome:
    switched = action == "switch"
    time = done.total_time - done.downtime if switched else done.total_time
    downtime = done.downtime if switched else None
    return RuleOutcome(name, action, max(time, 0.0), done.passes, downtime, done.transferred, why)
