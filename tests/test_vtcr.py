"""VTCR_EL2 and VTTBR_EL2: decoding, what goes together, and what KVM would write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Geometry, geometries

from hwdbm import Granule
from hwdbm.pte import AddressBits
from hwdbm.vtcr import Vtcr, Vttbr, hafdbs, pa_range

QEMU_MMFR1 = 0x0000_0110_1021_1122
GRANULES = {12: Granule.K4, 14: Granule.K16, 16: Granule.K64}


def test_every_geometry() -> None:
    for g in geometries():
        v = Vtcr.decode(g.vtcr)
        assert v.granule is GRANULES[g.page]
        assert (v.ipa_bits, v.start_level, v.root_tables, v.pa_bits) == (g.ipa, g.start, g.roots, g.pa)
        assert v.hw_dbm
        assert v.encode() == g.vtcr
        bits = AddressBits.LPA2 if g.ds else AddressBits.LPA if g.pa == 52 else AddressBits.PA48
        assert v.address_bits is bits


def test_nothing_else_is_taken() -> None:
    """Of all values of the fields that make a shape, just those of `geometries` decode."""
    good = {g.vtcr & 0x3_0000_C0FF for g in geometries()}
    for tg0 in range(4):
        for sl in range(8):
            for t0sz in range(64):
                for ds in range(2):
                    value = t0sz | (sl & 3) << 6 | tg0 << 14 | (sl >> 2) << 33 | ds << 32
                    sl2_counts = ds and tg0 == 0
                    ds_counts = tg0 != 1
                    shape = value & ~(0 if sl2_counts else 1 << 33) & ~(0 if ds_counts else 1 << 32)
                    register = value | 6 << 16 | 1 << 31
                    if shape in good:
                        assert Vtcr.decode(register).encode() == register
                    else:
                        with pytest.raises(ValueError, match="VTCR_EL2"):
                            Vtcr.decode(register)


@given(g=st.sampled_from(geometries()), rest=st.integers(0, (1 << 64) - 1))
def test_decode_then_encode_is_the_identity(g: Geometry, rest: int) -> None:
    """Whatever the other bits are that may be 0 or 1: those that aren't decoded are kept."""
    shape = 0x0000_0003_0007_C0FF  # T0SZ, SL0, TG0, PS, DS, SL2
    refused = 0b111 << 36
    res0 = 1 << 20 | 0b11 << 23 | 1 << 39 | 0b11 << 42 | (1 << 64) - (1 << 46)
    value = rest & ~shape & ~refused & ~res0 & ~(1 << 12) | g.vtcr & shape | 1 << 31
    v = Vtcr.decode(value)
    assert v.encode() == value
    assert v.hw_dbm == (rest >> 21 & 0b11 == 0b11)
    assert 2 <= v.root_entries
    assert 1 <= v.root_tables <= 16


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (0x806A_F558, "TG0"),
        (0x806A_3518, "T0SZ.*SL0"),
        (0x806A_75D8, "SL0"),
        (0x806A_350F, "T0SZ"),
        (0x3_806E_358C, "SL0 = 0b10, SL2 = 1, DS = 1"),
        (0x806F_3558, "PS"),
        (0x10_806A_3558, "S2PIE"),
        (0x20_806A_3558, "S2POE"),
        (0x006A_3558, "bit 31 clear, which is RES1"),
        (0x807A_3558, "0x100000 set, where bits are RES0"),
        (0x818A_3558, "RES0"),
        (0x80_806A_3558, "RES0"),
        (0xC00_806A_3558, "RES0"),
        (0x4000_806A_3558, "0x400000000000 set"),
        (0x8000_0000_806A_3558, "RES0"),
        (0x806A_1558, "SH0 = 0b01"),
        (0x40_806A_3558, "D128"),
        (1 << 64, "VTCR_EL2 is 0 to 0xffffffffffffffff, not 0x10000000000000000"),
        (-1, "VTCR_EL2 is 0 to 0xffffffffffffffff, not -1"),
    ],
)
def test_error_names_the_fields(value: int, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Vtcr.decode(value)


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match=r"VTCR_EL2\.SL0, of 2 bits, is 0 to 3, not 4"):
        Vtcr(granule=Granule.K4, t0sz=24, sl0=4, ps=5)
    with pytest.raises(ValueError, match="bits of the fields that have names"):
        Vtcr(granule=Granule.K4, t0sz=24, sl0=1, ps=5, other=1 << 21)


def test_what_is_in_effect() -> None:
    v = Vtcr.decode(0x806A_3558)
    assert (v.hw_af, v.hw_dbm) == (True, True)
    assert not Vtcr.decode(0x804A_3558).hw_dbm  # HD without HA
    assert Vtcr.decode(0x802A_3558).hw_af
    assert v.with_hw_dbm(False).encode() == 0x802A_3558
    assert Vtcr.decode(0x800A_3558).with_hw_dbm(True) == v
    assert Vtcr.decode(0x806E_3558).pa_bits == 48  # a 4K granule has 52 bits with DS only
    assert Vtcr.decode(0x1_806E_3558).pa_bits == 52


class TestForVm:
    def test_debians_kvm(self) -> None:
        """The value in the captures of Linux 6.1."""
        v = Vtcr.for_vm(Granule.K4, 40, mmfr1=QEMU_MMFR1, hw_dbm=False)
        assert v.encode() == 0x802D_3558

    @pytest.mark.parametrize(
        ("granule", "ipa", "ds", "start", "roots"),
        [
            # (ipa - 8) // bits per level, but no less than two levels: stage2_pgtable_levels()
            (Granule.K4, 32, False, 2, 4),
            (Granule.K4, 34, False, 2, 16),
            (Granule.K4, 35, False, 1, 1),
            (Granule.K4, 43, False, 1, 16),
            (Granule.K4, 44, False, 0, 1),
            (Granule.K4, 48, False, 0, 1),
            (Granule.K4, 52, True, 0, 16),
            (Granule.K16, 32, False, 2, 1),
            (Granule.K16, 40, False, 2, 16),
            (Granule.K16, 48, False, 1, 2),
            (Granule.K16, 52, True, 0, 1),
            (Granule.K64, 32, False, 2, 1),
            (Granule.K64, 46, False, 2, 16),
            (Granule.K64, 48, False, 1, 1),
            (Granule.K64, 52, False, 1, 1),
        ],
    )
    def test_start_level(self, granule: Granule, ipa: int, ds: bool, start: int, roots: int) -> None:
        v = Vtcr.for_vm(granule, ipa, mmfr1=QEMU_MMFR1, pa_bits=52, ds=ds)
        assert (v.start_level, v.root_tables) == (start, roots)

    @pytest.mark.parametrize("granule", Granule, ids=str)
    def test_all_sizes(self, granule: Granule) -> None:
        for ipa in range(32, 53):
            ds = ipa > 48 and granule is not Granule.K64
            v = Vtcr.for_vm(granule, ipa, mmfr1=2, pa_bits=52, ds=ds)
            assert v.ipa_bits == ipa
            assert v.start_level < 3

    @pytest.mark.parametrize(("mmfr1", "ha"), [(0, False), (1, True)])
    def test_cpu_without_hardware_dbm(self, mmfr1: int, ha: bool) -> None:
        with pytest.raises(ValueError, match=f"HAFDBS = {mmfr1}, and it needs 2"):
            Vtcr.for_vm(Granule.K4, 40, mmfr1=mmfr1)
        v = Vtcr.for_vm(Granule.K4, 40, mmfr1=mmfr1, hw_dbm=False)
        assert (v.ha, v.hd, v.vs) == (ha, False, False)

    @pytest.mark.parametrize("vmid_bits", range(16))
    def test_vmids_have_16_bits_where_the_cpu_says_so(self, vmid_bits: int) -> None:
        assert Vtcr.for_vm(Granule.K4, 40, mmfr1=vmid_bits << 4 | 2).vs == (vmid_bits == 2)

    @pytest.mark.parametrize("hafdbs_", [2, 3, 4])
    def test_cpu_with_it(self, hafdbs_: int) -> None:
        v = Vtcr.for_vm(Granule.K64, 40, mmfr1=0x20 | hafdbs_)
        assert v.hw_dbm
        assert v.vs

    @pytest.mark.parametrize(
        ("ipa", "how", "why"),
        [
            (31, {}, "ipa_bits is 32 to 52, not 31"),
            (53, {}, "not 53"),
            (49, {}, "T0SZ = 15"),
            (40, {"pa_bits": 41}, "not 41"),
        ],
    )
    def test_no_such_geometry(self, ipa: int, how: dict[str, int], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            Vtcr.for_vm(Granule.K4, ipa, mmfr1=2, **how)


class TestVttbr:
    def test_fields(self) -> None:
        v = Vtcr.decode(0x806A_3558)
        assert Vttbr.decode(0x1234_0000_4100_2001, v) == Vttbr(0x4100_2000, 0x1234, True)
        eight = Vtcr.decode(0x8062_3558)  # VS = 0
        assert Vttbr.decode(0x0034_0000_4100_2000, eight) == Vttbr(0x4100_2000, 0x34, False)
        for vmid in (0x1, 0xFF, 0x8000, 0xFFFF):
            assert Vttbr.decode(vmid << 48 | 0x4100_2001, v) == Vttbr(0x4100_2000, vmid, True)
            assert Vttbr.decode(vmid << 48 | 0x4100_2001, eight) == Vttbr(0x4100_2000, vmid & 0xFF, True)

    def test_52_bits(self) -> None:
        v = Vtcr.for_vm(Granule.K64, 48, mmfr1=2, pa_bits=52)
        for top in range(16):
            for cnp in (False, True):
                baddr = top << 48 | 0xFFFF_FFF8_0000
                assert Vttbr.decode(0xFFFF_FFF8_0000 | top << 2 | cnp, v) == Vttbr(baddr, 0, cnp)

    def test_part_of_a_table(self) -> None:
        v = Vtcr.for_vm(Granule.K4, 36, mmfr1=2)  # 64 entries at level 1
        assert Vttbr.decode(0x4100_0200, v).baddr == 0x4100_0200
        with pytest.raises(ValueError, match="0x200 bytes of its 1 table"):
            Vttbr.decode(0x4100_0100, v)

    def test_misfits(self) -> None:
        v = Vtcr.decode(0x806A_3558)
        with pytest.raises(ValueError, match="isn't aligned to the 0x2000 bytes of its 2"):
            Vttbr.decode(0x4100_1000, v)
        with pytest.raises(ValueError, match="beyond the 40 bits"):
            Vttbr.decode(1 << 40, v)
        with pytest.raises(ValueError, match="VTTBR_EL2 is 0 to 0xffffffffffffffff, not 0x10000000000000000"):
            Vttbr.decode(1 << 64, v)


def test_id_registers() -> None:
    assert [hafdbs(value) for value in (0x20, 0x21, QEMU_MMFR1, 0x13, 0x24)] == [0, 1, 2, 3, 4]
    assert [pa_range(code) for code in range(7)] == [32, 36, 40, 42, 44, 48, 52]
    with pytest.raises(ValueError, match="PARange = 0b0111"):
        pa_range(7)
    assert hafdbs((1 << 64) - 1) == 15
    with pytest.raises(ValueError, match="ID_AA64MMFR1_EL1 is 0 to 0xffffffffffffffff"):
        hafdbs(1 << 64)
