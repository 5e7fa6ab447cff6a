"""A guest that is asked, at the destination, whether it goes on right."""

import pytest
from migrationvm import FakeVm

from hwdbm.migration import Settings, migrate
from hwdbm.vm import PlainGuest

SOON = Settings(max_downtime=0.02)


class Asked(FakeVm):
    """A VM that can be asked."""

    wrong: BaseException | None = None

    def prove(self) -> None:
        assert self.running
        if self.wrong is not None:
            raise self.wrong


class Wrong(Asked):
    wrong = AssertionError("page 7 counts 3 after page 6's 9")


class Gone(Asked):
    wrong = OSError(5, "vCPU 0 stopped")


@pytest.fixture
def asked():
    vm = Asked()
    yield vm
    vm.close()


class Odd(Asked):
    """It fails in a way that nobody has thought of."""

    wrong = ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Odd, "by zero"),
        (Asked, ""),
        (Wrong, "page 7 counts 3 after page 6's 9"),
        (Gone, "[Errno 5] vCPU 0 stopped"),
        (PlainGuest, "it is memory, and doesn't run"),
    ],
)
def test_what_is_said(asked, inside, build, said):
    asked.resume()
    other = inside(build)
    report = migrate(asked, other.channel, SOON)
    other.join()
    assert (report.status, asked.running) == ("completed", False)
    assert report.guest_resumed is (not said)
    assert report.to_dict()["guest-resumed"] is report.guest_resumed
    assert report.error == (said and f"the guest at the destination: {said}")
    assert other.received.proved is report.guest_resumed
    assert other.received.destination.running  # right or wrong: nobody else has it
    other.received.destination.close()


def test_nobody_says(asked, inside):
    """The destination runs, and the link breaks before it was asked: the source doesn't run again."""

    class Cut(Asked):
        def prove(self):
            other.channel.sock.shutdown(2)

    asked.resume()
    other = inside(Cut)
    report = migrate(asked, other.channel, SOON)
    other.join()
    assert (report.status, asked.running, report.guest_resumed) == ("completed", False, False)
    assert "the stream ends" in report.error
    assert other.error is None
    assert other.received.destination.running
    other.received.destination.close()


def test_a_paused_guest_is_not_asked(asked, inside):
    other = inside(Wrong)
    report = migrate(asked, other.channel, SOON)
    other.join()
    assert report.guest_resumed is None
    assert "guest-resumed" not in report.to_dict()
    other.received.destination.close()
