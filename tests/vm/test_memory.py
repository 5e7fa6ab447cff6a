"""Guest memory: real bytes, holes, images."""

import hashlib
import mmap
import os
from contextlib import nullcontext
from errno import EINVAL, ENOMEM

import numpy as np
import pytest

from hwdbm.errors import shown
from hwdbm.vm import memory as memories
from hwdbm.vm.memory import GuestMemory

PAGE = mmap.PAGESIZE


@pytest.fixture
def memory():
    made = GuestMemory(1 << 20)
    yield made
    made.close()


def test_the_words_are_the_bytes(memory):
    memory.words[3] = 0x0102_0304_0506_0708
    assert memory.view[24:32].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert memory.digest() == hashlib.sha256(memory.view.tobytes()).hexdigest()


def test_another_mapping_sees_it(memory):
    with mmap.mmap(memory.fd, 1 << 20) as other:
        memory.view[4096] = 9
        assert other[4096] == 9
        other[5] = 7
    assert memory.view[5] == 7


def test_what_isnt_touched_costs_nothing(memory):
    big = GuestMemory(1 << 40)
    big.view[-1] = 1
    assert os.fstat(big.fd).st_blocks * 512 <= 1 << 21
    big.close()


def test_populate_backs_it_all_and_changes_nothing(memory):
    memory.view[77] = 5
    memory.populate()
    assert os.fstat(memory.fd).st_blocks * 512 >= 1 << 20
    assert memory.view.nonzero()[0].tolist() == [77]


def test_an_image_with_holes(memory, tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(900_001)
        for at in (0, 300_000, 899_990):
            file.seek(at)
            file.write(b"hello world")
    assert memory.load(image) == 900_001
    assert memory.view[:900_001].tobytes() == image.read_bytes()
    assert not memory.view[900_001:].any()
    memory.view[:] = 0
    assert memory.load(image, offset=300_000) == 600_001
    assert memory.view[:11].tobytes() == b"hello world"


def test_an_image_must_fit(memory, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(OSError, match="1048577 bytes don't fit into 1048576"):
        memory.load(image)
    with pytest.raises(OSError, match="don't fit"):
        memory.load(image, offset=1 << 21)
    with pytest.raises(OSError, match="don't fit"):
        memory.load(image, offset=(1 << 63) - 1)
    with pytest.raises(ValueError, match="offset is 0 to"):
        memory.load(image, offset=1 << 63)
    for offset in (1.0, "1", True):
        with pytest.raises(TypeError, match="offset is an integer"):
            memory.load(image, offset=offset)
    assert not memory.view.any()


def test_an_image_that_gets_shorter(memory, tmp_path, monkeypatch):
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    seek_data = os.lseek

    def cut(fd, start, whence):
        if whence != os.SEEK_END:
            os.truncate(image, 1000)
        return seek_data(fd, start, whence) if whence == os.SEEK_END or start < 1000 else start

    monkeypatch.setattr(os, "lseek", cut)
    with pytest.raises(OSError, match="it ends at byte 1000, and had 4096"):
        memory.load(image)


def test_what_is_no_file_is_not_read(memory, tmp_path):
    """A pipe would keep the caller waiting, and /dev/zero says that it has no bytes."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match=r"is no regular file|Is a directory"):
            memory.load(path)


def test_views_outlive_it():
    memory = GuestMemory(1 << 16)
    view = memory.view
    memory.close()
    memory.close()
    view[:] = 3
    assert int(view.astype(np.int64).sum()) == 3 << 16


@pytest.mark.parametrize("code", [0, EINVAL, ENOMEM])
@pytest.mark.parametrize(("start", "size"), [(0, 8), (1, 8), (0, 3), (100, 0.01), (4095, 1.5), (1, 1), (1, 2), (0, 0)])
def test_what_the_system_is_asked_to_back(start, size, code, monkeypatch):
    """The whole pages inside: with huge ones as far as there are, and then all of them now, by parts of some size."""
    room = np.frombuffer(mmap.mmap(-1, 16 * PAGE), dtype=np.uint8)
    room[::7] = 3
    before, asked = room.copy(), []

    def advise(part, advice):
        asked.append((advice, part.ctypes.data - room.ctypes.data, part.size))
        return code if advice == memories._MADV_POPULATE_WRITE else EINVAL

    monkeypatch.setattr(memories, "_madvise", advise)
    monkeypatch.setattr(memories, "_STEP", 3 * PAGE)
    part = room[start : start + int(size * PAGE)]
    first, last = -(-start // PAGE) * PAGE, (start + part.size) // PAGE * PAGE
    steps = [(at, min(3 * PAGE, last - at)) for at in range(first, last, 3 * PAGE)]
    with pytest.raises(OSError, match=r"no room for .* of guest memory") if code == ENOMEM and steps else nullcontext():
        memories.populate(part)
    assert asked[:1] == ([(memories._MADV_HUGEPAGE, first, last - first)] if steps else [])
    backed = sorted((at, length) for advice, at, length in asked if advice == memories._MADV_POPULATE_WRITE)
    assert set(backed) <= set(steps) if code == ENOMEM else backed == steps
    assert np.array_equal(room, before)


def test_a_close_that_is_cut_in_two_closes_no_other_file(monkeypatch):
    """The interrupt comes as soon as the descriptor is closed; its number is another file's then."""
    made, close = GuestMemory(1 << 20), os.close

    def cut(fd):
        close(fd)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", cut)
        with pytest.raises(KeyboardInterrupt):
            made.close()
    closed = []
    monkeypatch.setattr(os, "close", closed.append)
    made.close()
    made.__del__()
    assert not closed


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, PAGE + 3])
def test_words_are_whole(size):
    for made in (GuestMemory(size), GuestMemory(size, private=True)):
        assert (made.size, made.view.size, made.words.size) == (size, size, size // 8)
        made.close()


def test_a_name_has_200_bytes_at_most():
    for name in ("", "n" * 200, "é" * 100):
        GuestMemory(8, name).close()
    for name in ("n" * 201, "é" * 101, "a\n"):
        with pytest.raises(ValueError, match="200 bytes at most") as raised:
            GuestMemory(8, name)
        assert str(raised.value).endswith(f"unlike {shown(name)}")


def test_a_file_is_no_shorter_than_the_memory(tmp_path):
    """It may be longer, and stays the caller's: what is written to the memory is in it, also after a close."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(100))
    with path.open("r+b") as file:
        for size in (99, 100):
            made = GuestMemory(size, fd=file.fileno())
            assert made.fd == -1
            made.view[-1] = size
            made.sync()
            made.close()
        assert path.read_bytes()[98:] == bytes([99, 100])
        with pytest.raises(OSError, match="0x65 bytes of guest memory") as raised:
            GuestMemory(101, fd=file.fileno())
        assert raised.value.errno == EINVAL


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500])
def test_what_is_done_in_steps_is_done_whole(size, tmp_path, monkeypatch):
    monkeypatch.setattr(memories, "_STEP", 1000)
    data = np.random.default_rng(size).integers(1, 256, size, dtype=np.uint8)
    (tmp_path / "image").write_bytes(b"before" + data.tobytes())
    made = np.zeros(size, dtype=np.uint8)
    assert memories.load(made, tmp_path / "image", 6) == size
    assert np.array_equal(made, data)
    assert memories.digest([made, made[:5]]) == hashlib.sha256(data.tobytes() + data[:5].tobytes()).hexdigest()
    with pytest.raises(OSError, match=f"{size} bytes from 6 on don't fit into {size - 1}") as raised:
        memories.load(made[1:], tmp_path / "image", 6)
    assert (raised.value.errno, raised.value.filename) == (EINVAL, str(tmp_path / "image"))
    with pytest.raises(OSError, match=f"{size + 6} bytes don't fit into {size}"):
        memories.load(made, tmp_path / "image")
    with pytest.raises(OSError, match=f"-1 bytes from {size + 7} on don't fit"):
        memories.load(made, tmp_path / "image", size + 7)
    assert memories.load(made, tmp_path / "image", size + 6) == 0
