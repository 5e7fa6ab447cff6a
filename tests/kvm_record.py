"""What a kernel answered to random calls: `record` asks this machine's again, `counts` says what there is.

    python tests/kvm_record.py record
    python tests/kvm_record.py counts

A file a mode of PROTECT2. Its first line says whose answers they are; each other line is a VM, a list of calls with the
answer last. The model has no part in it. The same seed makes the same calls, as long as the kernel answers the same.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from kvm_calls import Answer, Call, Drawing, Get, Limits, Tally, from_json, to_json
from kvm_sides import MODES, KernelSide, Memory, Mode, limits_of

from hwdbm.kvm import Kvm

DATA = Path(__file__).parent / "data" / "kvm"
SEED, VMS, CALLS = 4, 50, 60

Sequence = list[tuple[Call, Answer]]


@dataclass(frozen=True)
class Recording:
    """A mode's file."""

    mode: Mode
    kernel: str
    seed: int
    limits: Limits
    sequences: list[Sequence]


def load(mode: Mode, folder: Path = DATA) -> Recording:
    head, *lines = (json.loads(line) for line in (folder / f"{mode.name}.jsonl").read_text().splitlines())
    sequences = [[from_json(call) for call in line] for line in lines]
    return Recording(mode, head["kernel"], head["seed"], Limits(**head["limits"]), sequences)


def save(recording: Recording, folder: Path = DATA) -> None:
    head = {
        "kernel": recording.kernel,
        "seed": recording.seed,
        "protect2": recording.mode.bits,
        "limits": asdict(recording.limits),
    }
    lines = [head, *([to_json(*asked) for asked in sequence] for sequence in recording.sequences)]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / f"{recording.mode.name}.jsonl").write_text(text)


def calls(limits: Limits, mode: Mode, seed: int, vm: int) -> Iterator[tuple[Drawing, Call]]:
    """Yield the calls of one VM, the last of them a GET of each slot; whoever asks them lets the drawing learn."""
    random, drawing = Random(f"{mode.name} {seed} {vm}"), Drawing(limits)
    for _ in range(CALLS):
        yield drawing, drawing.draw(random)
    for slot in sorted(drawing.slots):
        yield drawing, Get(slot)


def record(kvm: Kvm, mode: Mode, seed: int = SEED, vms: int = VMS) -> Recording:
    limits, memory, sequences = limits_of(kvm), Memory(), []
    for vm in range(vms):
        kernel, sequence = KernelSide(kvm, mode, memory), []
        for drawing, call in calls(limits, mode, seed, vm):
            sequence.append((call, kernel.answer(call)))
            drawing.learn(*sequence[-1])
        kernel.close()
        sequences.append(sequence)
    return Recording(mode, f"{platform.system()} {platform.release()}", seed, limits, sequences)


def count(recordings: list[Recording]) -> Tally:
    tally = Tally(recordings[0].limits)
    for recording in recordings:
        for sequence in recording.sequences:
            tally.begin()
            for asked in sequence:
                tally.add(*asked)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "counts"])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--vms", type=int, default=VMS, help="how many, in each mode")
    parser.add_argument("--folder", type=Path, default=DATA)
    args = parser.parse_args()
    if args.what == "record":
        args.folder.mkdir(parents=True, exist_ok=True)
        with Kvm() as kvm:
            for mode in MODES:
                save(record(kvm, mode, args.seed, args.vms), args.folder)
    print(count([load(mode, args.folder) for mode in MODES]).table())


if __name__ == "__main__":
    main()
