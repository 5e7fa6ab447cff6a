"""Turn and LogClient: one consumer of a log at a time."""

import gc
import os
from errno import EBUSY
from threading import RLock

import pytest

from hwdbm import DirtyBitmap
from hwdbm.dirtylog import LogClient, Turn


def take(slot: int) -> DirtyBitmap:
    return DirtyBitmap.from_pages([slot], 65)


def test_while_one_has_the_log_others_are_refused_by_its_name() -> None:
    turn = Turn(RLock())
    turn.check("dirty")
    with turn.client("migration", take) as client:
        assert client.take(64).pages().tolist() == [64]
        for refused in (lambda: turn.check("stop_log"), lambda: turn.client("snapshot", take)):
            with pytest.raises(OSError, match=r"(stop_log|'snapshot'): the dirty log .* client 'migration'") as raised:
                refused()
            assert raised.value.errno == EBUSY
    turn.check("dirty")
    client.close()
    with pytest.raises(ValueError, match="'migration', closed> takes nothing"):
        client.take(0)
    other = turn.client("other", take)
    client.close()  # of a log that is another's by now
    with pytest.raises(OSError, match="'other'"):
        turn.check("dirty")
    other.close()


def test_a_name_is_a_text() -> None:
    turn = Turn(RLock())
    with pytest.raises(ValueError, match="empty"):
        turn.client("", take)
    for name in (None, 1, b"backup"):
        with pytest.raises(TypeError, match="a client's name is a text"):
            turn.client(name, take)
    turn.check("dirty")


def test_a_client_that_was_forgotten_holds_nothing() -> None:
    turn = Turn(RLock())

    def forget() -> None:
        turn.client("backup", take)
        gc.collect()

    with pytest.warns(ResourceWarning, match="<LogClient 'backup', open> was never closed"):
        forget()
    turn.check("dirty")


def test_a_child_ends_no_turn_of_its_parent() -> None:
    turn = Turn(RLock())
    with turn.client("backup", take) as client:
        child = os.fork()
        if child == 0:
            client.close()
            os._exit(client.closed)
        assert os.waitpid(child, 0)[1] == 0


def test_it_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    client: LogClient = Turn(RLock()).client("a", take)
    assert repr(client) == "<LogClient 'a', open>"
    client.close()
    assert repr(client) == "<LogClient 'a', closed>"
    assert not recwarn
