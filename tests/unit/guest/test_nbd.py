#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""The NBD client: with the servers that it is for, and with ones that talk nonsense."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt.guest import nbd

needs_qemu = pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-img", "qemu-io", "qemu-storage-daemon"))),
    reason="needs qemu-utils and qemu-storage-daemon",
)

MIB = 1 << 20
Nodes = list[dict[str, object]]


def image(path: Path, kind: str, size: int, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *options, path, str(size)], check=True)
    return path


def nodes(path: Path, kind: str) -> Nodes:
    """The block nodes of an image; the one to export is ``disk``. Nothing waits for the disk."""
    common = {"discard": "unmap", "cache": {"no-flush": True}}
    return [
        {"driver": "file", "node-name": "file", "filename": str(path), **common},
        {"driver": kind, "node-name": "disk", "file": "file", **common},
    ]


@contextlib.contextmanager
def server(directory: Path, blocks: Nodes, *bitmaps: str, writable: bool = True) -> Iterator[str]:
    """A storage daemon that exports node ``disk`` as ``vda``; its socket's path."""
    path = str(directory / "nbd.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        stack.callback(os.unlink, path)
        listener.listen(8)
        command = ["qemu-storage-daemon"]
        for block in blocks:
            command += ["--blockdev", json.dumps(block)]
        command += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        export: dict[str, object] = {"type": "nbd", "id": "export", "node-name": "disk"}
        export |= {"name": "vda", "writable": writable, "bitmaps": list(bitmaps)}
        command += ["--export", json.dumps(export)]
        daemon = stack.enter_context(
            subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
        )
        stack.callback(daemon.kill)
        listener.close()
        yield path


def random_changes(size: int, seed: int, count: int = 200) -> list[nbd.Operation]:
    """Changes that do not overlap, at sector boundaries, in any order."""
    chance = random.Random(seed)
    edges = sorted(chance.sample(range(size // 512 + 1), 2 * count))
    changes = []
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        offset, length = first * 512, (last - first) * 512
        kind = chance.randrange(4)
        if kind == 0:
            changes.append(nbd.zero(offset, length, punch=chance.random() < 0.5))
        elif kind == 1 and chance.random() < 0.5:
            changes.append(nbd.trim(offset, length))
        else:
            changes.append(nbd.write(offset, chance.randbytes(length)))
    chance.shuffle(changes)
    return changes


# -- the real thing ---------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_written_is_read_again(tmp_path: Path, kind: str) -> None:
    size = 64 * MIB
    model = bytearray(size)
    chance = random.Random(3)
    with server(tmp_path, nodes(image(tmp_path / "i", kind, size), kind)) as path:
        with nbd.Export(path, "vda") as export:
            assert export.size == size
            assert not export.readonly
            for seed in range(3):
                changes = random_changes(size, seed)
                export.write_many(changes)
                for change in changes:
                    end = change.offset + change.length
                    if change.command == nbd.trim(0, 1).command:
                        found = bytearray(change.length)  # anything may be there now
                        export.read_into(change.offset, memoryview(found))
                        model[change.offset : end] = found
                    else:
                        model[change.offset : end] = change.data or bytes(change.length)
            export.flush()
        with nbd.Export(path, "vda") as export:
            found = bytearray(size)
            at = 0
            while at < size:
                length = min(chance.choice((1, 511, 4096, 1 << 20, 32 << 20)), size - at)
                export.read_into(at, memoryview(found)[at : at + length])
                at += length
            assert found == model


@needs_qemu
def test_a_write_may_be_larger_than_one_request(tmp_path: Path) -> None:
    size = 80 * MIB
    data = random.Random(1).randbytes(size - 1024)
    with server(tmp_path, nodes(image(tmp_path / "i", "raw", size), "raw")) as path:
        with nbd.Export(path, "vda") as export:
            export.write(512, data)
            export.zero(0, 512)
            export.flush()
    assert (tmp_path / "i").read_bytes() == bytes(512) + data + bytes(512)


@needs_qemu
def test_zeros_take_no_space_unless_wanted(tmp_path: Path) -> None:
    disk = image(tmp_path / "i", "raw", 8 * MIB)
    with server(tmp_path, nodes(disk, "raw")) as path, nbd.Export(path, "vda") as export:
        export.write(0, os.urandom(4 * MIB))
        export.zero(0, MIB)
        export.zero(MIB, MIB, punch=False)
        export.trim(2 * MIB, MIB)
        export.flush()
    assert disk.stat().st_blocks * 512 == 2 * MIB
    assert disk.read_bytes()[: 2 * MIB] == bytes(2 * MIB)


@needs_qemu
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_extents_tell_what_is_allocated(tmp_path: Path, kind: str) -> None:
    with server(tmp_path, nodes(image(tmp_path / "i", kind, 64 * MIB), kind)) as path:
        with nbd.Export(path, "vda") as export:
            export.write(MIB, os.urandom(MIB))
            export.write(32 * MIB, os.urandom(MIB))
            hole = nbd.HOLE | nbd.ZERO_READS
            export.zero(0, MIB)
            assert export.extents(0, export.size) == [
                (0, MIB, hole),
                (MIB, MIB, 0),
                (2 * MIB, 30 * MIB, hole),
                (32 * MIB, MIB, 0),
                (33 * MIB, 31 * MIB, hole),
            ]
            assert export.extents(MIB + 4096, 8192) == [(MIB + 4096, 8192, 0)]
            assert export.extents(0, 0) == []


@needs_qemu
def test_extents_of_many_pieces_come_in_several_replies(tmp_path: Path) -> None:
    pieces = 20_000  # QEMU tells of a few thousand at a time
    with server(tmp_path, nodes(image(tmp_path / "i", "raw", pieces * 8192), "raw")) as path:
        with nbd.Export(path, "vda") as export:
            data = os.urandom(4096)
            export.write_many(nbd.write(n * 8192, data) for n in range(pieces))
            found = export.extents(0, export.size)
    assert [(offset, length) for offset, length, flags in found if not flags] == [
        (n * 8192, 4096) for n in range(pieces)
    ]


@needs_qemu
def test_a_dirty_bitmap_tells_what_was_changed_since(tmp_path: Path) -> None:
    disk = image(tmp_path / "i", "qcow2", 64 * MIB)
    options = ["--add", "-g", "65536", disk, "since"]
    subprocess.run(["qemu-img", "bitmap", *options], check=True)
    writes = ["-c", "write 1M 64k", "-c", "write -z 3M 4k", "-c", "discard 8M 1M"]
    subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "qcow2", *writes, disk], check=True, capture_output=True
    )
    context = "qemu:dirty-bitmap:since"
    with server(tmp_path, nodes(disk, "qcow2"), "since") as path:
        with nbd.Export(path, "vda", ["since"]) as export:
            found = export.extents(0, export.size, context)
            allocation = export.extents(0, 2 * MIB)
        with nbd.Export(path, "vda") as export, pytest.raises(nbd.NbdError) as other:
            export.extents(0, export.size, context)
        with pytest.raises(nbd.NbdError, match="no qemu:dirty-bitmap:before"):
            nbd.Export(path, "vda", ["since", "before"])
    assert [(offset, length) for offset, length, flags in found if flags & nbd.DIRTY] == [
        (MIB, 65536),
        (3 * MIB, 65536),
        (8 * MIB, MIB),
    ]
    assert (MIB, 65536, 0) in allocation
    assert other.value.errno == errno.ENOENT


@needs_qemu
def test_what_a_server_refuses_is_told(tmp_path: Path) -> None:
    disk = image(tmp_path / "i", "raw", MIB)
    with server(tmp_path, nodes(disk, "raw"), writable=False) as path:
        with pytest.raises(nbd.NbdError, match="export 'vdz'"):
            nbd.Export(path, "vdz")
        with nbd.Export(path, "vda") as export:
            assert export.readonly
            with pytest.raises(nbd.NbdError, match=r"write of 512 bytes at 1024 failed.*read-only"):
                export.write(1024, bytes(512))
            assert export.extents(0, MIB)  # and it goes on
            target = memoryview(bytearray(512))
            for offset in (-1, MIB - 511, 1 << 62):
                with pytest.raises(nbd.NbdError, match="none at"):
                    export.read_into(offset, target)


@needs_qemu
def test_a_failure_among_many_is_told_and_the_connection_goes_on(tmp_path: Path) -> None:
    blocks = nodes(image(tmp_path / "i", "raw", MIB), "raw")
    fault = {"event": "pwritev", "iotype": "write", "errno": 28, "sector": 1024}
    blocks[1]["node-name"] = "below"
    blocks.append(
        {
            "driver": "blkdebug",
            "node-name": "disk",
            "image": "below",
            "inject-error": [{**fault, "event": "none", "once": True, "immediately": True}],
        }
    )
    data = os.urandom(4096)
    with server(tmp_path, blocks) as path, nbd.Export(path, "vda") as export:
        with pytest.raises(nbd.NbdError, match="write of 4096 bytes at 524288 failed") as full:
            export.write_many(nbd.write(at, data) for at in range(0, MIB, 4096))
        assert full.value.errno == errno.ENOSPC
        assert os.strerror(errno.ENOSPC) in full.value.message
        export.write_many(nbd.write(at, data) for at in range(0, MIB, 4096))
        found = bytearray(MIB)
        export.read_into(0, memoryview(found))
        assert found == data * 256
        with pytest.raises(nbd.NbdError, match="none at"):  # in the midst of good ones
            export.write_many(nbd.write(at, data) for at in range(0, 2 * MIB, 4096))
        export.flush()


@needs_qemu
def test_a_server_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    with server(tmp_path, nodes(image(tmp_path / "i", "raw", MIB), "raw")) as path:
        export = nbd.Export(path, "vda", timeout_s=60)
    with pytest.raises(nbd.NbdError) as gone:
        export.write(0, bytes(4096))
    assert gone.value.errno == errno.ECONNRESET
    with pytest.raises(nbd.NbdError):
        export.flush()
    export.close()
    with pytest.raises(nbd.NbdError):
        nbd.Export(path, "vda")


# -- servers that talk nonsense ---------------------------------------------------------

INIT = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
Talk = Callable[[socket.socket], None]


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def chunk(
    flags: int, kind: int, cookie: int, data: bytes = b"", length: int | None = None
) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, size) + data


def greet(sock: socket.socket, size: int = MIB) -> None:
    """The handshake, as it should be."""
    sock.sendall(INIT)
    exactly(sock, 4)
    while True:
        _, option, length = struct.unpack(">8sII", exactly(sock, 16))
        exactly(sock, length)
        if option == 10:
            sock.sendall(reply(10, 4, struct.pack(">I", 7) + b"base:allocation"))
        if option == 7:
            sock.sendall(reply(7, 3, struct.pack(">HQH", 0, size, 0x65)))
        sock.sendall(reply(option, 1))
        if option == 7:
            return


def request(sock: socket.socket) -> tuple[int, int, int, int]:
    """The next request: command, cookie, offset, length."""
    _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", exactly(sock, 28))
    if command == 1:
        exactly(sock, length)
    return command, cookie, offset, length


@contextlib.contextmanager
def fake(directory: Path, talk: Talk) -> Iterator[str]:
    """A server that talks as it is told, once."""
    path = str(directory / "fake.sock")

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError, EOFError):
            talk(sock)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)  # in case that nobody came
            thread.join(20)
            os.unlink(path)
    assert not thread.is_alive()


def says(*parts: bytes) -> Talk:
    def talk(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)
        while sock.recv(4096):
            pass

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        says(b"NBDMAGIC" + struct.pack(">QQ", 0x420281861253, 1 << 40) + bytes(128)),  # oldstyle
        says(b"NBDMAGICIHAVEOPT\0\0"),
        says(INIT, reply(8, 0x80000001)),  # no structured replies
        says(INIT, reply(7, 1)),
        says(INIT, struct.pack(">QIII", 0x3E889045565A9, 8, 1, 1 << 31)),
        says(INIT, reply(8, 3, b"x") * 1000),
        says(INIT, reply(8, 1), reply(10, 1), reply(7, 1)),  # no export
        says(INIT, reply(8, 1), reply(10, 1), reply(7, 3, bytes(11)), reply(7, 1)),
        says(
            INIT,
            reply(8, 1),
            reply(10, 1),
            reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 0)),
            reply(7, 1),
        ),
        says(INIT, reply(8, 1), reply(10, 1), reply(7, 0x80000006, b"\xffno")),
        lambda sock: sock.sendall(INIT),
    ],
)
def test_a_handshake_that_is_none_is_refused(tmp_path: Path, talk: Talk) -> None:
    with fake(tmp_path, talk) as path, pytest.raises(nbd.NbdError):
        nbd.Export(path, "vda", timeout_s=5)


def test_a_server_that_is_silent_is_given_up(tmp_path: Path) -> None:
    with fake(tmp_path, says()) as path, pytest.raises(nbd.NbdError) as error:
        nbd.Export(path, "vda", timeout_s=0.1)
    assert error.value.errno == errno.ETIMEDOUT

    for use in USES.values():
        with fake(tmp_path, says_then(greet)) as path:
            with nbd.Export(path, "vda") as export:
                export._timeout_s = 0.1  # only now: a busy machine may be slow to greet
                export._sock.settimeout(0.1)
                with pytest.raises(nbd.NbdError) as error:
                    use(export)
                assert error.value.errno == errno.ETIMEDOUT
                with pytest.raises(nbd.NbdError):
                    use(export)  # the late answer must not be taken for this one's


def says_then(greeting: Talk) -> Talk:
    def talk(sock: socket.socket) -> None:
        greeting(sock)
        while sock.recv(4096):
            pass

    return talk


def answers(make: Callable[[int, int, int], bytes]) -> Talk:
    """Answers the first request by cookie, offset and length."""

    def talk(sock: socket.socket) -> None:
        greet(sock)
        _, cookie, offset, length = request(sock)
        sock.sendall(make(cookie, offset, length))
        while sock.recv(4096):
            pass

    return talk


def data_at(flags: int, cookie: int, offset: int, data: bytes) -> bytes:
    return chunk(flags, 1, cookie, struct.pack(">Q", offset) + data)


@pytest.mark.parametrize(
    "make",
    [
        lambda c, o, n: bytes(64),
        lambda c, o, n: data_at(1, c + 1, o, bytes(n)),
        lambda c, o, n: data_at(1, c, o, bytes(n + 1)),
        lambda c, o, n: data_at(1, c, o - 1, bytes(n)),
        lambda c, o, n: data_at(1, c, o, bytes(n - 1)),
        lambda c, o, n: data_at(0, c, o, bytes(n - 1)) + data_at(1, c, o, b"x"),
        lambda c, o, n: data_at(1, c, o, b""),
        lambda c, o, n: chunk(1, 0, c),
        lambda c, o, n: chunk(1, 0, c, b"x"),
        lambda c, o, n: chunk(1, 1, c, length=1 << 31),
        lambda c, o, n: chunk(1, 2, c, struct.pack(">QI", o, n + 1)),
        lambda c, o, n: chunk(1, 2, c, struct.pack(">QI", o, 0)),
        lambda c, o, n: chunk(1, 2, c, b"x"),
        lambda c, o, n: chunk(1, 5, c, bytes(12)),
        lambda c, o, n: chunk(1, 0x8001, c, length=1 << 30),
        lambda c, o, n: chunk(1, 0x8001, c, b"x"),
        lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c) + bytes(n),
    ],
)
def test_a_read_takes_only_what_was_asked_for(
    tmp_path: Path, make: Callable[[int, int, int], bytes]
) -> None:
    with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=5) as export:
        with pytest.raises(nbd.NbdError) as error:
            export.read_into(4096, memoryview(bytearray(1024)))
        assert error.value.errno == errno.EPROTO
        with pytest.raises(nbd.NbdError):
            export.flush()


def test_a_read_may_come_in_pieces_of_any_kind(tmp_path: Path) -> None:
    def make(cookie: int, offset: int, length: int) -> bytes:
        return (
            data_at(0, cookie, offset + 512, b"b" * 256)
            + chunk(0, 2, cookie, struct.pack(">QI", offset + 768, 256))
            + data_at(0, cookie, offset, b"a" * 512)
            + chunk(1, 0, cookie)
        )

    with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=5) as export:
        found = bytearray(b"x" * 1024)
        export.read_into(4096, memoryview(found))
    assert found == b"a" * 512 + b"b" * 256 + bytes(256)


def test_an_error_is_told_with_the_servers_words(tmp_path: Path) -> None:
    words = b"the disk is on fire"

    def make(cookie: int, offset: int, length: int) -> bytes:
        return chunk(1, 0x8001, cookie, struct.pack(">IH", 5, len(words)) + words)

    for use in USES.values():
        with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=5) as export:
            with pytest.raises(nbd.NbdError, match=words.decode()) as error:
                use(export)
            assert error.value.errno == errno.EIO


@pytest.mark.parametrize(
    "make",
    [
        lambda c, o, n: chunk(1, 5, c, struct.pack(">I", 7)),
        lambda c, o, n: chunk(1, 5, c, struct.pack(">III", 7, 0, 0)),
        lambda c, o, n: chunk(1, 5, c, struct.pack(">III", 8, n, 0)),
        lambda c, o, n: chunk(1, 5, c, struct.pack(">IIIB", 7, n, 0, 0)),
        lambda c, o, n: chunk(1, 5, c, length=1 << 31),
        lambda c, o, n: chunk(1, 1, c, bytes(16)),
        lambda c, o, n: chunk(1, 0, c),
    ],
)
def test_extents_that_are_none_are_refused(
    tmp_path: Path, make: Callable[[int, int, int], bytes]
) -> None:
    with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=5) as export:
        with pytest.raises(nbd.NbdError) as error:
            export.extents(0, MIB)
        assert error.value.errno == errno.EPROTO


def test_an_extent_that_reaches_beyond_the_question_is_cut(tmp_path: Path) -> None:
    def make(cookie: int, offset: int, length: int) -> bytes:
        return chunk(1, 5, cookie, struct.pack(">IIIII", 7, 512, 3, 1 << 20, 0))

    with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=5) as export:
        assert export.extents(0, 4096) == [(0, 512, 3), (512, 3584, 0)]


@pytest.mark.parametrize(
    "make",
    [
        lambda c, o, n: bytes(64),
        lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c + 5),
        lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c) * 2,
        lambda c, o, n: chunk(0, 0, c),
        lambda c, o, n: chunk(1, 1, c, bytes(9)),
        lambda c, o, n: chunk(1, 0x8001, c, b"x"),
        lambda c, o, n: chunk(1, 0x8001, c, length=1 << 30),
    ],
)
def test_replies_to_writes_that_are_none_are_refused(
    tmp_path: Path, make: Callable[[int, int, int], bytes]
) -> None:
    with fake(tmp_path, answers(make)) as path, nbd.Export(path, "vda", timeout_s=2) as export:
        with pytest.raises(nbd.NbdError):
            export.write_many(nbd.write(0, bytes(512)) for _ in range(2))


def test_a_server_that_does_not_read_and_answers_late_blocks_nobody(tmp_path: Path) -> None:
    """It takes all requests before it answers the first, with long errors; out of order."""
    count = 1000
    seen: list[int] = []

    def talk(sock: socket.socket) -> None:
        greet(sock)
        while len(seen) < count:
            batch = []
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                while len(seen) + len(batch) < count:
                    batch.append(request(sock)[1])
            sock.settimeout(None)
            seen.extend(batch)
            text = b"x" * 4000
            error = struct.pack(">IH", 0, len(text)) + text
            sock.sendall(b"".join(chunk(1, 0x8001, c, error) for c in reversed(batch)))

    with fake(tmp_path, talk) as path, nbd.Export(path, "vda", timeout_s=10) as export:
        with pytest.raises(nbd.NbdError, match="xxx"):
            export.write_many(nbd.write(0, bytes(65536)) for _ in range(count))
    assert 0 < len(seen) < count  # after the first error no more were sent


USES: dict[str, Callable[[nbd.Export], object]] = {
    "read": lambda export: export.read_into(0, memoryview(bytearray(4096))),
    "write": lambda export: export.write(0, bytes(4096)),
    "extents": lambda export: export.extents(0, 4096),
}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(USES)))
def test_garbage_is_an_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, what: str
) -> None:
    def talk(sock: socket.socket) -> None:
        greet(sock)
        request(sock)
        sock.sendall(garbage)

    directory = tmp_path_factory.mktemp("garbage")
    with fake(directory, talk) as path, nbd.Export(path, "vda", timeout_s=5) as export:
        with pytest.raises(nbd.NbdError):
            USES[what](export)
