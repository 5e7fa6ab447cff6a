"""What the tests of migration share."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from migrationvm import FakeVm, ReceiverProcess

from hwdbm.migration import Channel, receive
from hwdbm.vm import PlainGuest


@pytest.fixture
def vm() -> Iterator[FakeVm]:
    """Return a VM that writes."""
    vm = FakeVm()
    yield vm
    vm.close()


class Inside:
    """A receiver in a thread of this process."""

    def __init__(self, build: Callable[..., object] = PlainGuest) -> None:
        here, there = socket.socketpair()
        self.channel, self.other = Channel(here), Channel(there)
        self.received, self.error = None, None
        self._build = build
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.received = receive(self.other, self._build)
        except Exception as error:  # noqa: BLE001  # for the test to look at
            self.error = error
        finally:
            self.other.close()

    def join(self) -> "Inside":
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.channel.close()
        return self


@pytest.fixture
def inside() -> Iterator[Callable[..., Inside]]:
    """Return a function that makes a receiver in a thread."""
    made: list[Inside] = []

    def make(build: Callable[..., object] = PlainGuest) -> Inside:
        made.append(Inside(build))
        return made[-1]

    yield make
    for each in made:
        each.channel.close()
        each.join()


@pytest.fixture
def process(tmp_path) -> Iterator[Callable[..., ReceiverProcess]]:
    """Return a function that makes a receiver in a process."""
    made: list[ReceiverProcess] = []

    def make(*args: object) -> ReceiverProcess:
        made.append(ReceiverProcess(tmp_path, *args))
        return made[-1]

    yield make
    for each in made:
        with suppress(ProcessLookupError):
            each.kill()
        if not each.process.stdout.closed:
            each.done()
