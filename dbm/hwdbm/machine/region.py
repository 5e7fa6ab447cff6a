"""Region: a memslot of the machine with what is behind it."""

from dataclasses import dataclass

from hwdbm.machine.frames import Frames
from hwdbm.vm.memory import GuestMemory

__all__ = ["Region"]


@dataclass(frozen=True, slots=True)
class Region:
    """A memslot, its bytes and its frames.

    Parameters
    ----------
    id : int
        The slot's id.
    gpa, size : int
        Where the guest sees it, in bytes.
    hva : int
        Where the VMM sees it, in bytes: an opaque number, of which the alignment matters.
    readonly : bool
        Whether the guest may only read.
    memory : GuestMemory
        The bytes.
    frames : Frames
        The host's page table.
    """

    id: int
    gpa: int
    size: int
    hva: int
    readonly: bool
    memory: GuestMemory
    frames: Frames

    @property
    def end(self) -> int:
        """The guest physical address after the last byte."""
        return self.gpa + self.size
