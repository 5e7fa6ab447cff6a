"""The commands with an Arm machine: migrate to another process, and harvest the tables of one that runs."""

import json
import subprocess
import sys

import pytest


def hwdbm(*args, status=0):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hwdbm", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize("options", [(), ("--thp", "--workload", "mixed")])
def test_migrate(options):
    done = hwdbm("migrate", "--source", "arm", "--memory", "8M", "--json", *options)
    report = json.loads(done.stdout)
    assert report["status"] == "completed"
    assert report["source-sha256"] == report["destination-sha256"]


def test_options_that_have_no_effect_are_refused():
    for option in (("--mode", "hw-dbm"), ("--kvm-log", "ring"), ("--workload", "nobody")):
        done = hwdbm("migrate", "--source", "arm", "--memory", "8M", *option, status=2)
        assert option[0] in done.stderr or "nobody" in done.stderr
