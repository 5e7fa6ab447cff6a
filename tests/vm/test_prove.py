"""A guest is found to run by what it writes; one that writes nothing is given some seconds."""

from errno import ETIMEDOUT

import pytest
from clocks import Clock

from hwdbm.vm import base


class Guest:
    """It writes a page when it is told to, and says what was called."""

    def __init__(self, *, wrong: bool = False) -> None:
        self.pages, self.called, self._wrong = 7, list[str](), wrong

    def write(self) -> None:
        self.pages += 1

    def pause(self) -> None:
        self.called.append("pause")

    def check(self) -> None:
        self.called.append("check")
        if self._wrong:
            raise OSError("a page is wrong")

    def resume(self) -> None:
        self.called.append("resume")


@pytest.fixture
def time(monkeypatch):
    def goes(clock: Clock) -> Clock:
        monkeypatch.setattr(base, "monotonic", clock.monotonic)
        monkeypatch.setattr(base, "sleep", clock.sleep)
        return clock

    return goes


def test_a_guest_that_writes_is_checked_and_runs_on(time):
    guest = Guest()
    clock = time(Clock(after=base._PROOF - 0.1, done=guest.write))
    base.prove(guest, lambda: "", idle=False)
    assert guest.called == ["pause", "check", "resume"]
    assert clock.passed == pytest.approx(base._PROOF - 0.1, abs=0.05)


def test_an_idle_guest_is_checked_at_once(time):
    guest, clock = Guest(), time(Clock())
    base.prove(guest, lambda: "", idle=True)
    assert (guest.called, clock.passed) == (["pause", "check", "resume"], 0)


def test_a_guest_that_writes_nothing(time):
    guest, clock = Guest(), time(Clock())
    with pytest.raises(OSError, match=r"the guest wrote no page in 10 s: it sleeps$") as raised:
        base.prove(guest, lambda: ": it sleeps", idle=False)
    assert (raised.value.errno, guest.called) == (ETIMEDOUT, [])
    assert clock.passed == pytest.approx(base._PROOF, abs=0.05)


def test_a_guest_that_is_wrong_runs_on():
    guest = Guest(wrong=True)
    with pytest.raises(OSError, match="a page is wrong"):
        base.prove(guest, lambda: "", idle=True)
    assert guest.called == ["pause", "check", "resume"]
