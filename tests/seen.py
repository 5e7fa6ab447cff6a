"""What was looked at once and found right, kept in files: HWDBM_SEEN=write keeps what there is now, to be looked at."""

import os
from pathlib import Path

DATA = Path(__file__).parent / "data"


def writing() -> bool:
    """Return whether what there is now is to be kept."""
    return os.environ.get("HWDBM_SEEN") == "write"


def as_seen(name: str, text: str) -> None:
    """Hold a text against the one in tests/data."""
    path = DATA / name
    if writing():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name}: HWDBM_SEEN=write keeps what there is now; then look at it"
