"""The registers that belong to an image of tables."""

from dataclasses import dataclass

from hwdbm.check import instance, integer
from hwdbm.errors import ImageError
from hwdbm.granule import Granule
from hwdbm.vtcr import Vtcr, Vttbr, pa_range


@dataclass(frozen=True, slots=True)
class Registers:
    """The values of the registers when the image was taken.

    Parameters
    ----------
    vttbr, vtcr : int
        VTTBR_EL2 and VTCR_EL2: where the tables are, and their shape.
    hcr, mmfr0, mmfr1 : int or None
        HCR_EL2, ID_AA64MMFR0_EL1 and ID_AA64MMFR1_EL1, where they are known.

    Raises
    ------
    TypeError
        If one of them is no integer.
    ImageError
        If one of them doesn't fit into 64 bits.
    """

    vttbr: int
    vtcr: int
    hcr: int | None = None
    mmfr0: int | None = None
    mmfr1: int | None = None

    def __post_init__(self) -> None:
        for name in ("vttbr", "vtcr", "hcr", "mmfr0", "mmfr1"):
            value = getattr(self, name)
            if value is not None or name in ("vttbr", "vtcr"):
                number = integer(value, name.upper(), high=(1 << 64) - 1, error=ImageError)
                object.__setattr__(self, name, number)

    def decode(self) -> tuple[Vtcr, Vttbr]:
        """Return the fields of VTCR_EL2 and VTTBR_EL2.

        Raises
        ------
        ImageError
            If they are reserved, or don't go together.
        """
        try:
            vtcr = Vtcr.decode(self.vtcr)
            return vtcr, Vttbr.decode(self.vttbr, vtcr)
        except ValueError as error:
            raise ImageError(f"VTCR_EL2 = {self.vtcr:#018x}, VTTBR_EL2 = {self.vttbr:#018x}: {error}") from error

    def large_blocks(self, vtcr: Vtcr) -> bool:
        """Return whether the levels that 52-bit addresses add have blocks.

        With 4K and 16K granules that is for VTCR_EL2.DS to say. With 64K it depends on the CPU: as
        far as its ID register isn't known, on whether VTCR_EL2 uses its 52 bits.
        """
        instance(vtcr, Vtcr, "vtcr")
        if vtcr.granule is not Granule.K64:
            return vtcr.ds
        try:
            return vtcr.pa_bits == 52 or (self.mmfr0 is not None and pa_range(self.mmfr0) == 52)
        except ValueError:  # 56 bits, and more to come
            return True
