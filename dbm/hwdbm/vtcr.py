"""VTCR_EL2 and VTTBR_EL2 as values: the shape of a VM's stage-2 tables, and whether hardware records writes.

Arm ARM DDI0487, D24.2 (the registers) and D8.2.2 (the geometry; AArch64.S2InvalidSL and
AArch64.S2InconsistentSL in pseudocode). What KVM writes: arch/arm64/kvm/hyp/pgtable.c,
kvm_get_vtcr().
"""

from dataclasses import dataclass, replace
from typing import Self

from hwdbm.check import flag, instance, integer
from hwdbm.granule import Granule
from hwdbm.pte import AddressBits

__all__ = ["Vtcr", "Vttbr", "hafdbs", "pa_range"]

_U64 = 1 << 64
_FIELDS = {"t0sz": (0, 6), "sl0": (6, 2), "ps": (16, 3)}  # lowest bit, width
_SH0 = 12
_TG0 = 14
_FLAGS = {"vs": 19, "ha": 21, "hd": 22, "ds": 32, "sl2": 33, "haft": 44, "hdbss": 45}
_REFUSED = {"S2PIE": 36, "S2POE": 37, "D128": 38}  # they change what a descriptor means
_RES1 = 1 << 31
_RES0 = 1 << 20 | 0b11 << 23 | 1 << 39 | 0b11 << 42 | ((1 << 64) - (1 << 46))
_OTHER = ((1 << 64) - 1) & ~(
    sum(((1 << width) - 1) << low for low, width in _FIELDS.values())
    | 0b11 << _TG0
    | sum(1 << bit for bit in _FLAGS.values())
)

_TG0_CODES = {Granule.K4: 0b00, Granule.K64: 0b01, Granule.K16: 0b10}  # not in order of size
_PS_BITS = (32, 36, 40, 42, 44, 48, 52)
_START_LEVELS = {  # by SL0
    Granule.K4: (2, 1, 0, 3),
    Granule.K16: (3, 2, 1, 0),
    Granule.K64: (3, 2, 1),
}
_CONCATENATED = 4  # address bits that up to 16 concatenated tables resolve

_WALKS = 0x8000_3500
"""KVM's VTCR_EL2_COMMON_BITS: RES1, and walks that are write-back and inner shareable."""


def hafdbs(mmfr1: int) -> int:
    """Return ID_AA64MMFR1_EL1.HAFDBS: what the CPU's MMU can update by itself.

    Parameters
    ----------
    mmfr1 : int
        The register's value.

    Returns
    -------
    int
        0 nothing, 1 the access flag, 2 the dirty state too (hardware DBM), 3 adds the access flag
        of tables (FEAT_HAFT), 4 adds the log of dirty pages (FEAT_HDBSS). More includes less.

    Examples
    --------
    >>> hafdbs(0x0000_0110_1021_1122)
    2
    """
    return integer(mmfr1, "ID_AA64MMFR1_EL1", high=_U64 - 1) & 0xF


def pa_range(mmfr0: int) -> int:
    """Return the CPU's physical address bits: 32 to 52, from ID_AA64MMFR0_EL1.PARange.

    Raises
    ------
    ValueError
        If the field has a value that isn't known, or the one of 56 bits.

    Examples
    --------
    >>> pa_range(0x0000_0323_1020_1126)
    52
    """
    code = integer(mmfr0, "ID_AA64MMFR0_EL1", high=_U64 - 1) & 0xF
    if code >= len(_PS_BITS):
        raise ValueError(f"ID_AA64MMFR0_EL1.PARange = {code:#06b} isn't one of 32 to 52 bits")
    return _PS_BITS[code]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vtcr:
    """The fields of VTCR_EL2, checked against each other.

    Parameters
    ----------
    granule : Granule
        TG0: the size of a page and of a table.
    t0sz : int
        The guest's physical address space (IPA) has ``64 - t0sz`` bits.
    sl0 : int
        With `sl2` and the granule: the level that a walk starts at.
    ps : int
        The size of output addresses, as a code: 0 is 32 bits, 5 is 48, 6 is 52.
    vs : bool
        Whether a VMID has 16 bits and not 8.
    ha, hd : bool
        Whether hardware sets the access flag, and the dirty state: S2AP[1] of leaves with DBM.
        HD without HA does nothing.
    ds : bool
        Whether 4K and 16K descriptors hold 52-bit addresses (FEAT_LPA2).
    sl2 : bool
        Start at level -1: for a 4K granule with DS, and ignored otherwise.
    haft, hdbss : bool
        The access flag of tables, the log of dirty pages. Both need HA, and HDBSS needs HD too.
    other : int
        All other bits, where they lie in the register: how walks are cached, RES1, and so on.

    Raises
    ------
    ValueError
        If no walk could be made with these fields, or if the descriptors would be of a format that
        isn't decoded here (S2PIE, D128). The text names the fields.

    Examples
    --------
    >>> v = Vtcr.decode(0x806A_3558)
    >>> v.granule, v.ipa_bits, v.start_level, v.root_tables, v.pa_bits, v.hw_dbm
    (<Granule.K4: 12>, 40, 1, 2, 40, True)
    >>> hex(v.encode())
    '0x806a3558'
    """

    granule: Granule
    t0sz: int
    sl0: int
    ps: int
    vs: bool = False
    ha: bool = False
    hd: bool = False
    ds: bool = False
    sl2: bool = False
    haft: bool = False
    hdbss: bool = False
    other: int = _WALKS

    def __post_init__(self) -> None:
        instance(self.granule, Granule, "granule")
        for name, (_, width) in _FIELDS.items():
            value = integer(getattr(self, name), f"VTCR_EL2.{name.upper()}, of {width} bits,", high=(1 << width) - 1)
            object.__setattr__(self, name, value)
        for name in _FLAGS:
            object.__setattr__(self, name, flag(getattr(self, name), f"VTCR_EL2.{name.upper()}"))
        object.__setattr__(self, "other", integer(self.other, "other", high=_U64 - 1))
        if self.other & ~_OTHER:
            raise ValueError(f"other = {self.other:#x} has bits of the fields that have names")
        for name, bit in _REFUSED.items():
            if self.other >> bit & 1:
                raise ValueError(
                    f"VTCR_EL2.{name} = 1: its descriptors aren't decoded, only those of 64 bits "
                    "with direct permissions are"
                )
        if wrong := self.other & _RES0:
            raise ValueError(f"VTCR_EL2 has {wrong:#x} set, where bits are RES0: is it the register's value?")
        if not self.other & _RES1:
            raise ValueError("VTCR_EL2 has bit 31 clear, which is RES1: is it the register's value?")
        if self.other >> _SH0 & 0b11 == 0b01:
            raise ValueError("VTCR_EL2.SH0 = 0b01 is reserved")
        if self.ps >= len(_PS_BITS):
            raise ValueError(f"VTCR_EL2.PS = {self.ps:#05b} is of the 128-bit format only")
        self._check_geometry()

    def _check_geometry(self) -> None:
        # FEAT_TTST lets T0SZ exceed 39; the least depends on whether 52 bits can be had.
        least = 12 if self._ds or self.granule is Granule.K64 else 16
        most = 47 if self.granule is Granule.K64 else 48
        fields = f"SL0 = {self.sl0:#04b}, SL2 = {self.sl2:d}, DS = {self.ds:d}"
        if not least <= self.t0sz <= most:
            raise ValueError(
                f"VTCR_EL2.T0SZ = {self.t0sz} isn't in {least}..{most} ({self.granule} granule, DS = {self.ds:d})"
            )
        if (
            (self.granule is Granule.K64 and self.sl0 == 0b11)
            or (self.granule is Granule.K16 and self.sl0 == 0b11 and not self.ds)
            or (self._from_minus_one and self.sl0 != 0b00)
        ):
            raise ValueError(f"VTCR_EL2 has {fields}: reserved for a {self.granule} granule")
        below = self.granule.shift(self.start_level)
        least, most = below + 1, below + self.granule.bits_per_level + _CONCATENATED
        if not least <= self.ipa_bits <= most:
            raise ValueError(
                f"VTCR_EL2.T0SZ = {self.t0sz} (an IPA of {self.ipa_bits} bits) is inconsistent "
                f"with {fields}: from level {self.start_level} of a {self.granule} granule, with "
                f"at most 16 concatenated tables, a walk resolves {least} to {most} bits"
            )

    # --- the register -------------------------------------------------------------------------

    @classmethod
    def decode(cls, value: int) -> Self:
        """Return the fields of the register's 64-bit `value`.

        Raises
        ------
        ValueError
            If the value is reserved or inconsistent: then every access faults, and there is
            nothing to walk.

        Examples
        --------
        >>> Vtcr.decode(0x806A_B518)
        Traceback (most recent call last):
        ValueError: VTCR_EL2.T0SZ = 24 (an IPA of 40 bits) is inconsistent with SL0 = 0b00, \
SL2 = 0, DS = 0: from level 3 of a 16K granule, with at most 16 concatenated tables, a walk \
resolves 15 to 29 bits
        """
        value = integer(value, "VTCR_EL2", high=_U64 - 1)
        code = value >> _TG0 & 0b11
        granule = next((g for g, tg0 in _TG0_CODES.items() if tg0 == code), None)
        if granule is None:
            raise ValueError(f"VTCR_EL2.TG0 = {code:#04b} is reserved")
        flags = {name: bool(value >> bit & 1) for name, bit in _FLAGS.items()}
        t0sz, sl0, ps = (value >> low & (1 << width) - 1 for low, width in _FIELDS.values())
        return cls(granule=granule, t0sz=t0sz, sl0=sl0, ps=ps, **flags, other=value & _OTHER)

    def encode(self) -> int:
        """Return the register's value: equal to what was decoded, bit for bit."""
        value = self.other | _TG0_CODES[self.granule] << _TG0
        for name, (low, _) in _FIELDS.items():
            value |= getattr(self, name) << low
        for name, bit in _FLAGS.items():
            value |= getattr(self, name) << bit
        return value

    @classmethod
    def for_vm(
        cls,
        granule: Granule,
        ipa_bits: int,
        *,
        mmfr1: int,
        pa_bits: int = 48,
        hw_dbm: bool = True,
        ds: bool = False,
    ) -> Self:
        """Return what KVM would write for a VM, with hardware DBM on top.

        As in KVM, two levels or more are walked, and up to 16 tables are concatenated wherever
        that spares a level: even 52 bits with 4K pages start at level 0. HA is set where the CPU
        has it.

        Parameters
        ----------
        granule : Granule
            The host's page size.
        ipa_bits : int
            Bits of the guest's physical address space, 32 or more.
        mmfr1 : int
            ID_AA64MMFR1_EL1: whether there is hardware DBM, and how many bits a VMID has.
        pa_bits : int
            Bits of the host's physical addresses: 32, 36, 40, 42, 44, 48 or 52.
        hw_dbm : bool
            Whether to set HD.
        ds : bool
            Whether to use 52-bit descriptors with a 4K or 16K granule.

        Raises
        ------
        ValueError
            If `hw_dbm` is asked of a CPU without it, or if there is no such geometry.

        Examples
        --------
        Debian's Linux 6.1, which doesn't use hardware DBM:

        >>> v = Vtcr.for_vm(Granule.K4, 40, mmfr1=0x0000_0110_1021_1122, hw_dbm=False)
        >>> hex(v.encode()), v.hw_dbm, v.with_hw_dbm(True).hw_dbm
        ('0x802d3558', False, True)
        """
        instance(granule, Granule, "granule")
        mmfr1, hw_dbm = integer(mmfr1, "ID_AA64MMFR1_EL1", high=_U64 - 1), flag(hw_dbm, "hw_dbm")
        pa_bits, ipa_bits = integer(pa_bits, "pa_bits"), integer(ipa_bits, "ipa_bits", low=32, high=52)
        if hw_dbm and hafdbs(mmfr1) < 2:
            raise ValueError(
                f"this CPU has no hardware DBM: ID_AA64MMFR1_EL1.HAFDBS = {hafdbs(mmfr1)}, and it needs 2 or more"
            )
        if pa_bits not in _PS_BITS:
            raise ValueError(f"a physical address has one of {_PS_BITS} bits, not {pa_bits}")
        levels = max(2, (ipa_bits - _CONCATENATED - 4) // granule.bits_per_level)
        return cls(
            granule=granule,
            t0sz=64 - ipa_bits,
            sl0=_START_LEVELS[granule].index(4 - levels),
            ps=_PS_BITS.index(pa_bits),
            vs=mmfr1 >> 4 & 0xF == 2,
            ha=hafdbs(mmfr1) >= 1,
            hd=hw_dbm,
            ds=ds,
        )

    def with_hw_dbm(self, on: bool) -> Self:
        """Return these fields with hardware DBM on, which needs HA too, or off, which keeps HA.

        A TLB may hold VTCR_EL2: a change can be trusted after a TLBI of the whole VMID.
        """
        on = flag(on, "on")
        return replace(self, ha=self.ha or on, hd=on)

    # --- what the fields mean -----------------------------------------------------------------

    @property
    def _ds(self) -> bool:
        """DS in effect: with a 64K granule it is RES0."""
        return self.ds and self.granule is not Granule.K64

    @property
    def _from_minus_one(self) -> bool:
        """SL2 in effect: RES0 but for a 4K granule with DS."""
        return self.sl2 and self.ds and self.granule is Granule.K4

    @property
    def ipa_bits(self) -> int:
        """Bits of the guest's physical address space."""
        return 64 - self.t0sz

    @property
    def pa_bits(self) -> int:
        """Bits of an output address, in effect: 52 only where descriptors have room for them."""
        bits = _PS_BITS[self.ps]
        return bits if self._ds or self.granule is Granule.K64 else min(bits, 48)

    @property
    def start_level(self) -> int:
        """The level that a walk starts at: -1 to 3."""
        return -1 if self._from_minus_one else _START_LEVELS[self.granule][self.sl0]

    @property
    def root_entries(self) -> int:
        """Entries of the start level, those of all concatenated tables: 2 or more."""
        return 1 << (self.ipa_bits - self.granule.shift(self.start_level))

    @property
    def root_tables(self) -> int:
        """Concatenated tables of the start level, 1 to 16; one alone may be part of a granule."""
        return max(1, self.root_entries // self.granule.entries)

    @property
    def address_bits(self) -> AddressBits:
        """Where descriptors keep the address bits above 47."""
        if self._ds:
            return AddressBits.LPA2
        return AddressBits.LPA if self.pa_bits == 52 else AddressBits.PA48

    @property
    def hw_af(self) -> bool:
        """Whether hardware sets the access flag."""
        return self.ha

    @property
    def hw_dbm(self) -> bool:
        """Whether hardware records writes to leaves with DBM: HD, which needs HA."""
        return self.ha and self.hd


@dataclass(frozen=True, slots=True)
class Vttbr:
    """The fields of VTTBR_EL2.

    Parameters
    ----------
    baddr : int
        The physical address of the start level's tables, in bytes.
    vmid : int
        The VM's tag in the TLB.
    cnp : bool
        Common, not private: whether all CPUs share these translations.

    Examples
    --------
    >>> Vttbr.decode(0x0002_0000_4838_0001, Vtcr.decode(0x802D_3558))
    Vttbr(baddr=1211629568, vmid=2, cnp=True)
    """

    baddr: int
    vmid: int = 0
    cnp: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "baddr", integer(self.baddr, "VTTBR_EL2.BADDR", high=(1 << 52) - 1))
        object.__setattr__(self, "vmid", integer(self.vmid, "VTTBR_EL2.VMID", high=0xFFFF))
        object.__setattr__(self, "cnp", flag(self.cnp, "VTTBR_EL2.CnP"))

    @classmethod
    def decode(cls, value: int, vtcr: Vtcr) -> Self:
        """Return the fields of the register's 64-bit `value`, laid out as `vtcr` has it.

        Raises
        ------
        ValueError
            If the base isn't aligned to the concatenated tables' size, or is beyond PS.
        """
        value = integer(value, "VTTBR_EL2", high=_U64 - 1)
        instance(vtcr, Vtcr, "vtcr")
        baddr = value & 0xFFFF_FFFF_FFFE
        if vtcr.pa_bits == 52:  # then bits 51:48 of the base are in 5:2
            baddr = value & 0xFFFF_FFFF_FFC0 | (value >> 2 & 0xF) << 48
        size = 8 * vtcr.root_entries
        if baddr % size:
            raise ValueError(
                f"VTTBR_EL2.BADDR = {baddr:#018x} isn't aligned to the {size:#x} bytes of its "
                f"{vtcr.root_tables} table(s) of level {vtcr.start_level}"
            )
        if baddr >> vtcr.pa_bits:
            raise ValueError(f"VTTBR_EL2.BADDR = {baddr:#018x} is beyond the {vtcr.pa_bits} bits of PS")
        return cls(baddr, value >> 48 & (0xFFFF if vtcr.vs else 0xFF), bool(value & 1))
