"""A QMP monitor for tests, and what it answers while a VM migrates."""

import contextlib
import json
import socket
import threading
from pathlib import Path

MIB = 1 << 20


class Monitor:
    """A QMP monitor that gives answers in turn, the last one for ever, and keeps what it was asked."""

    def __init__(self, path: Path, answers: list[object], greeting: str = '{"QMP": {}}', limit: object = 200) -> None:
        self.path, self.asked = path, []
        self._answers, self._greeting, self._limit = answers, greeting, limit
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._socket.accept()
            with client, client.makefile("rw") as file:
                print(self._greeting, file=file, flush=True)
                for line in file:
                    command = json.loads(line)["execute"]
                    self.asked.append(command)
                    print('{"event": "MIGRATION_PASS", "data": {"pass": 1}}', file=file)
                    answer: object = {}
                    if command == "query-migrate-parameters":
                        answer = {"downtime-limit": self._limit}
                    elif command == "query-migrate":
                        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                    if answer is None:
                        return
                    said = answer if isinstance(answer, str) else json.dumps({"return": answer})
                    print(said, file=file, flush=True)

    def close(self) -> None:
        self._socket.close()
        self._thread.join(5)


def active(time_: float, sync: int, left: float) -> dict[str, object]:
    ram = {"total": 1 << 30, "remaining": left, "transferred": 5, "mbps": 800.0, "dirty-sync-count": sync}
    return {"status": "active", "total-time": time_, "ram": ram | {"page-size": 4096, "duplicate": 0}}


ANSWERS = [
    {},
    {"status": "setup"},
    active(100, 1, 1 << 30),
    active(10_000, 1, 20 * MIB),
    active(10_800, 2, 80 * MIB),
    active(11_200, 2, 40 * MIB),
    active(11_600, 3, 15 * MIB),
    {"status": "completed", "total-time": 11_900, "downtime": 170},
]
