"""The numbers and layouts are the kernel's: those that a C compiler makes of its headers, where there are some."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from hwdbm.kvm import abi
from hwdbm.kvm.abi import Cap, Exit, Ioctl

ARM64 = {"KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_INIT", "kvm_vcpu_init"}
X86 = {"kvm_regs", "kvm_segment", "kvm_dtable", "kvm_sregs", "kvm_fpu", "kvm_xsave", "kvm_xcrs", "kvm_debugregs"}
X86 |= {"kvm_msrs", "kvm_msr_entry", "kvm_msr_list"}
X86 |= {ioctl.name for ioctl in Ioctl if "MSR" in ioctl.name}
X86 |= {name for name in Ioctl.__members__ if name.endswith(("REGS", "FPU", "XSAVE", "XCRS"))}

# From Linux 6.1's headers, by the compiler.
GOLDEN = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_ARM_PREFERRED_TARGET": 0x8020AEAF,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_RESET_DIRTY_RINGS": 0xAEC7,
    "KVM_RUN": 0xAE80,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_GET_ONE_REG": 0x4010AEAB,
    "KVM_SET_ONE_REG": 0x4010AEAC,
    "KVM_ARM_VCPU_INIT": 0x4020AEAE,
    "KVM_GET_REG_LIST": 0xC008AEB0,
}


def test_the_requests_are_those_of_the_kernel() -> None:
    assert {ioctl.name: int(ioctl) for ioctl in Ioctl} == GOLDEN


def asserts(foreign: set[str]) -> str:
    """Return C that doesn't compile if anything differs."""
    checks = [(ioctl.name, int(ioctl)) for ioctl in Ioctl if ioctl.name not in foreign]
    checks += [(f"KVM_CAP_{cap.name}", int(cap)) for cap in Cap]
    checks += [(f"KVM_EXIT_{exit_.name}", int(exit_)) for exit_ in Exit]
    checks += [
        ("KVM_API_VERSION", abi.API_VERSION),
        ("KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE),
        ("KVM_DIRTY_LOG_INITIALLY_SET", abi.DIRTY_LOG_INITIALLY_SET),
        ("KVM_DIRTY_GFN_F_DIRTY", abi.DIRTY_GFN_F_DIRTY),
        ("KVM_DIRTY_GFN_F_RESET", abi.DIRTY_GFN_F_RESET),
    ]
    if "KVM_ARM_VCPU_INIT" in foreign:
        checks.append(("KVM_DIRTY_LOG_PAGE_OFFSET", abi.ARCHES["x86_64"].ring_page_offset))
    lines = ["#include <stddef.h>", "#include <linux/kvm.h>"]
    for name, value in checks:  # what a header is too old for is not there
        lines += [f"#ifdef {name}", f'_Static_assert({name} == {value}, "{name}");', "#endif"]
    for name, layout in abi.STRUCTS.items():
        if name not in foreign:
            lines.append(f'_Static_assert(sizeof(struct {name}) == {layout.size}, "{name}");')
    for name, (offset, _) in abi.RUN.items():
        lines.append(f'_Static_assert(offsetof(struct kvm_run, {name}) == {offset}, "{name}");')
    return "\n".join(lines)


def compiled(compiler: str, source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "abi.c").write_text(source)
    return subprocess.run([compiler, "-fsyntax-only", "abi.c"], cwd=folder, capture_output=True, text=True, check=False)


def compilers(folder: Path) -> list[tuple[str, set[str]]]:
    """Return the compilers that have the headers, each with what its architecture hasn't."""
    own = {"x86_64": ("gcc", ARM64), "aarch64": ("gcc", X86)}[platform.machine()]
    found = [each for each in (own, ("aarch64-linux-gnu-gcc", X86)) if shutil.which(each[0])]
    return [each for each in found if compiled(each[0], "#include <linux/kvm.h>", folder).returncode == 0]


def test_compilers_agree(tmp_path: Path) -> None:
    for compiler, foreign in compilers(tmp_path):
        right = asserts(foreign)
        result = compiled(compiler, right, tmp_path)
        assert result.returncode == 0, result.stderr
        wrong = right.replace("== 16,", "== 17,", 1)
        assert wrong != right
        assert compiled(compiler, wrong, tmp_path).returncode != 0


def test_unknown_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(NotImplementedError, match="this machine is vax"):
        abi.arch()
