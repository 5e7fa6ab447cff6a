"""A VM's state beside its memory, as bytes: which guest it is, and every register of its vCPUs.

They are JSON: ``{"format": 1, "machine": "x86_64", "guest": {...}, "vcpus": [{...}, ...]}``. A vCPU has a base64 text
for each structure of `abi.REGISTERS` that its architecture has; on x86_64 ``msrs``, and on arm64 ``one_regs``, each
a list of numbers and values. State comes from another machine, so nothing of it is used before it was checked.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hwdbm import check
from hwdbm.kvm import abi
from hwdbm.kvm.task import KINDS
from hwdbm.kvm.vcpu import VcpuFd, reg_size

_FORMAT = 1
MOST_VCPUS = 4096

# Setting one of them has KVM write guest memory there and then (kvm_write_wall_clock), which has arrived already.
_WRITES_MEMORY = frozenset({0x11, abi.MSR_KVM_WALL_CLOCK_NEW})


@dataclass(frozen=True, slots=True)
class Guest:
    """Which guest it is.

    Parameters
    ----------
    kind : str
        ``counting``, ``random`` or ``idle``.
    rate : float or None
        Pages a second that all vCPUs may write together; None for no limit.

    Raises
    ------
    ValueError
        If there is no such guest, or the rate isn't a positive number.
    """

    kind: str = "idle"
    rate: float | None = None

    def __post_init__(self) -> None:
        check.one_of(self.kind, KINDS, "a guest")
        if self.rate is not None:
            object.__setattr__(self, "rate", _rate(self.rate))


@dataclass(frozen=True, slots=True)
class VmState:
    """A VM's state, checked.

    Parameters
    ----------
    guest : Guest
        Which guest it is.
    vcpus : tuple of dict
        The registers of each vCPU: structures by name, as bytes, and lists of (number, value) for single registers.
    """

    guest: Guest
    vcpus: tuple[dict[str, Any], ...]

    def to_bytes(self) -> bytes:
        """Return it as bytes."""
        vcpus = [{name: _text(value) for name, value in vcpu.items()} for vcpu in self.vcpus]
        state = {"format": _FORMAT, "machine": abi.arch().machine, "guest": asdict(self.guest), "vcpus": vcpus}
        return json.dumps(state, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> "VmState":
        """Return the state that `to_bytes` wrote.

        Raises
        ------
        ValueError
            If `raw` can't be one, or is of another format or another architecture.
        """
        raw = bytes(check.octets(raw, "a state"))
        try:
            found = json.loads(raw)
            form, machine, guest, vcpus = found["format"], found["machine"], found["guest"], found["vcpus"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a state of a KVM guest: {error!r}") from None
        if form != _FORMAT:
            raise ValueError(f"a state of format {form!r}, not {_FORMAT}")
        if machine != abi.arch().machine:
            raise ValueError(f"a state of {machine!r}, and this machine is {abi.arch().machine}")
        if not isinstance(vcpus, list) or not 1 <= len(vcpus) <= MOST_VCPUS:
            raise ValueError(f"a state has 1 to {MOST_VCPUS} vCPUs")
        return cls(_guest(guest), tuple(_vcpu(number, vcpu) for number, vcpu in enumerate(vcpus)))


def capture(vcpu: VcpuFd, msrs: Sequence[int]) -> dict[str, Any]:
    """Return the state of a vCPU that is outside of KVM_RUN, and has no instruction to finish.

    Parameters
    ----------
    vcpu : VcpuFd
        The vCPU.
    msrs : sequence of int
        The MSRs that belong to it, `Kvm.msr_indices`; those that can't be read are left out.
    """
    state: dict[str, Any] = {name: vcpu.get(name) for name in abi.arch().registers}
    if abi.arch().msrs:
        found = vcpu.get_msrs([index for index in msrs if index not in _WRITES_MEMORY])
        state["msrs"] = list(found.items())
    else:
        ids = vcpu.reg_list()
        state["one_regs"] = [(each, int.from_bytes(vcpu.get_one_reg(each), "little")) for each in ids]
    return state


def restore(vcpu: VcpuFd, state: dict[str, Any]) -> None:
    """Set a vCPU's state.

    MSRs that the kernel refuses are passed over if they have the value already.

    Raises
    ------
    ValueError
        If the kernel refuses something: the text says what. The vCPU has some of the state then.
    """
    what = ""
    try:
        if not abi.arch().msrs:
            for register, value in state["one_regs"]:
                what = f"register {register:#x}"
                vcpu.set_one_reg(register, value.to_bytes(reg_size(register), "little"))
        for name in abi.arch().registers:
            what = name
            vcpu.set(name, state[name])
        for index, value in state.get("msrs", ()):
            what = f"MSR {index:#x} = {value:#x}"
            if index not in _WRITES_MEMORY:
                _set_msr(vcpu, index, value)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"the kernel refuses the state's {what}: {error}") from error


def _set_msr(vcpu: VcpuFd, index: int, value: int) -> None:
    try:
        vcpu.set_msr(index, value)
    except OSError:
        if vcpu.get_msrs([index]).get(index) != value:
            raise


def _rate(value: Any) -> float:
    return check.real(value, "a rate in pages a second", 1e-9, 1e12)


def _text(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _guest(found: object) -> Guest:
    names = {field.name for field in fields(Guest)}
    if not isinstance(found, dict) or found.keys() != names:
        raise ValueError(f"a state's guest has {' and '.join(sorted(names))}, not {found!r}")
    try:
        return Guest(**found)
    except TypeError:
        raise ValueError(f"a state's guest can't be {found!r}") from None


def _vcpu(number: int, found: object) -> dict[str, Any]:
    """Return a vCPU's state with bytes for texts, each of the right size, and pairs of numbers."""
    arch = abi.arch()
    singles = "msrs" if arch.msrs else "one_regs"
    if not isinstance(found, dict) or found.keys() != {*arch.registers, singles}:
        raise ValueError(f"vCPU {number} of a state has {', '.join(arch.registers)} and {singles}, and no more")
    state: dict[str, Any] = {}
    for name in arch.registers:
        size = abi.STRUCTS[abi.REGISTERS[name][2]].size
        try:
            state[name] = base64.b64decode(found[name], validate=True)
        except (ValueError, TypeError) as error:
            raise ValueError(f"vCPU {number} of a state: {name} is no base64: {error}") from None
        if len(state[name]) != size:
            raise ValueError(f"vCPU {number} of a state: {name} has {size} bytes, got {len(state[name])}")
    try:
        state[singles] = [(_number(index), _number(value)) for index, value in found[singles]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"vCPU {number} of a state: {singles} are no pairs of numbers: {error}") from None
    return state


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is none")
    return value
