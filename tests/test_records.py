"""Each field of the records that are read from files: missing, of another type, at its edges, and beyond."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fieldtools import changed
from seen import as_seen

from hwdbm.errors import HwdbmError
from hwdbm.fleet import read_plan
from hwdbm.snapshot.manifest import parse

PAGE = 4096
VALUES = (
    *(None, 0, 1, 1.5, -1, PAGE, 1 << 53, True, "", "x", "..", "0x1000", "0x1001", "4K", "a" * 32),
    *([], {}, ["a" * 32] * 2),
)
MANIFEST = {
    "format": "hwdbm-snapshot", "version": 1, "id": "1" * 32, "parent": "2" * 32, "time": 1_700_000_000_000, "epoch": 3,
    "source": "kvm 1 vCPU", "mechanism": "GET", "page-size": PAGE,
    "slots": [
        {"id": 0, "flags": 0, "gpa": "0x1000", "size": 2 * PAGE, "offset": 0},
        {"id": 3, "flags": 2, "gpa": "0x10000", "size": PAGE, "offset": 2 * PAGE},
    ],
    "memory": {"file": "a.memory", "size": 3 * PAGE, "pages-sha256": "3" * 64, "sha256": "4" * 64},
    "bitmap": {"file": "a.bitmap", "sha256": "5" * 64}, "state": {"file": "a.state", "sha256": "6" * 64},
    "merged": ["7" * 32],
}  # fmt: skip
PLAN = {
    "format": "hwdbm-fleet", "version": 1, "engine": "hwdbm", "links": [{"name": "a", "bandwidth": "1.25G"}],
    "racks": [{"name": "r0", "uplink": "a"}],
    "hosts": [{"name": "h0", "memory": "64G", "link": "a", "rack": "r0"}, {"name": "h1", "memory": PAGE, "link": "a"}],
    "vms": [
        {"name": "v0", "host": "h0", "memory": "8G", "max-downtime": 300, "trace": "t", "start": 500, "rate": 2},
        {"name": "v1", "host": "h1", "memory": PAGE, "max-downtime": 0.5, "samples": "/v1", "pinned": "a GPU"},
    ],
}  # fmt: skip


def plan(raw: bytes, folder: Path) -> Any:
    (folder / "plan.json").write_bytes(raw)
    return read_plan(folder / "plan.json")


READERS: dict[str, tuple[dict[str, Any], Callable[[bytes, Path], Any]]] = {
    "manifest": (MANIFEST, lambda raw, folder: parse(raw, folder / "a.json")),
    "plan": (PLAN, plan),
}


@pytest.mark.parametrize("name", READERS)
def test_what_each_field_may_be_was_looked_at(name: str, tmp_path: Path) -> None:
    record, read = READERS[name]
    usual = read(json.dumps(record).encode(), tmp_path)
    lines = [repr(usual)]
    for where, what, each in changed(record, VALUES):
        try:
            found = read(json.dumps(each).encode(), tmp_path)
            answer = "as it was" if found == usual else "is taken"
        except HwdbmError as error:
            answer = str(error)
        lines.append(f"{where} {what}: {answer}")
    as_seen(f"records/{name}.txt", "\n".join(lines).replace(str(tmp_path), "FOLDER") + "\n")
