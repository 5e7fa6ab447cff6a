"""A short soak: a few migrations back and forth. ``python tests/kvm/soak.py`` makes a hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

from hwdbm.kvm import Kvm

SOAK = Path(__file__).with_name("soak.py")
SMALL = ["--memory", "32", "--stay", "0.01"]


def soak(script: Path, *options: str) -> tuple[int, list[str], str]:
    command = [sys.executable, "-P", "-W", "error", str(script), *SMALL, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_a_few_migrations_back_and_forth(kvm: Kvm) -> None:
    status, said, err = soak(SOAK, "--migrations", "4")
    assert (status, said[-1]) == (0, "no mismatch, and too few migrations to see growth"), err


LEAK = """
import os, sys
sys.path.insert(0, {folder!r})
import soak

real, kept = soak.Peer.receive, []

def receive(*args):
    kept.append((os.dup(0), bytes(1 << 20).replace(b"\\0", b"x")))
    return real(*args) | ({{"sha256": "none"}} if len(kept) == 3 else {{}})

soak.Peer.receive, soak.__file__ = receive, __file__
sys.exit(soak.main())
"""


@pytest.mark.slow
def test_a_mismatch_and_growth_are_found(kvm: Kvm, tmp_path: Path) -> None:
    """Mutant: with each guest, a process keeps a descriptor and a mebibyte; the third digest that it tells is wrong."""
    script = tmp_path / "leak.py"
    script.write_text(LEAK.format(folder=str(SOAK.parent)))
    status, said, err = soak(script, "--migrations", "14", "--warm-up", "2")
    assert status == 1, err
    text = "\n".join(said)
    assert "none there" in text
    for name in "AB":
        assert f"{name} has " in text
        assert f"{name} grew from " in text
