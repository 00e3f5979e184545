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

"""Buffers and logs together: put on in order, and taken off whatever fails of it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

from nova_pmt import exception
from nova_pmt.client import render
from nova_pmt.exception import Refusal
from nova_pmt.guest.disk import bitmap
from nova_pmt.guest.network import choose
from nova_pmt.guest.network.base import EgressBuffer, Nic
from nova_pmt.guest.network.plug import PlugBuffer
from nova_pmt.guest.network.redirector import RedirectorBuffer
from nova_pmt.unsafe import AT_ONCE, UNBUFFERED, VARIABLE
from nova_pmt.worker import outputs as outputs_module
from nova_pmt.worker import trace
from nova_pmt.worker.outputs import Outputs
from tests.unit.fakes.blocks import DISKS, SECTOR, FakeBlocks

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"
MACS = ["52:54:00:00:00:0a", "52:54:00:00:00:0b"]
INTERFACES = "".join(
    f"<interface type='bridge'><mac address='{mac}'/><target dev='vnet{n}'/>"
    f"<alias name='net{n}'/></interface>"
    for n, mac in enumerate(MACS)
)
XML = DISKS.replace("<devices>", f"<devices>{INTERFACES}")


class Qemu(FakeBlocks):
    """Blocks, and a guest that is stopped and let run; what happens is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.status = "running"
        self.happened: list[str] = []

    def execute(self, command: str, **arguments: Any) -> Any:
        if not command.startswith("query-"):
            self.happened.append(command)
        return super().execute(command, **arguments)

    def _query_status(self) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def _stop(self) -> None:
        self.status = "paused"

    def resume(self) -> None:
        """What the execution does for its caller."""
        self.happened.append("resume")
        self.status = "running"


class Buffer(EgressBuffer):
    """Holds nothing, and says what is done with it."""

    name: ClassVar[str] = "test"
    fails: ClassVar[dict[str, str]]  # alias of the NIC to what fails of it
    made: ClassVar[list[Buffer]]

    def __init__(self, nic: Nic, monitor: Any, directory: str, limit_bytes: int) -> None:
        self.nic, self.limit = nic, limit_bytes
        self.directory = directory
        self.last_cut = 0
        self.closed = False
        self._qemu: Qemu = monitor
        self.made.append(self)

    def _do(self, what: str) -> None:
        self._qemu.happened.append(f"{what} {self.nic.alias}")
        if self.fails.get(self.nic.alias) == what:
            raise exception.GuestError("QEMU refused", code="QMP_ERROR")

    @classmethod
    def problems(cls, nic: Nic, monitor: Any) -> list[Refusal]:
        return []

    def attach(self) -> None:
        self._do("attach")

    def cut(self, epoch: int) -> None: ...

    def release(self, epoch: int) -> float | None: ...

    def watch(self, on_output: Callable[[], None]) -> None:
        self.on_output = on_output

    @property
    def waiting_since(self) -> float:
        return 7.5

    def detach(self) -> None:
        assert self._qemu.status != "running", "the guest is paused meanwhile"
        self._do("detach")

    def close(self) -> None:
        self.closed = True

    @classmethod
    def recover(cls, nic: Nic, monitor: Any) -> bool:
        monitor.happened.append(f"recover {nic.alias}")
        return True

    @property
    def pressure(self) -> float:
        return 0.0

    def summary(self) -> dict[str, Any]:
        return {"nic": self.nic.alias}


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    made = Qemu()
    yield made
    made.close()


@pytest.fixture
def conf(tmp_path: Path) -> Any:
    return SimpleNamespace(
        network=SimpleNamespace(egress_buffer="auto", buffer_limit_mib=3),
        disk=SimpleNamespace(log_limit_mib=64, log_directory=str(tmp_path / "logs")),
        guest=SimpleNamespace(runtime_directory=str(tmp_path / "run")),
        state_path=str(tmp_path / "state"),
    )


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(trace.VARIABLE, raising=False)
    Buffer.fails, Buffer.made = {}, []
    monkeypatch.setattr(choose, "_load", lambda _name: Buffer)


Make = Callable[..., Outputs]


@pytest.fixture
def make(qemu: Qemu, conf: Any, tmp_path: Path) -> Iterator[Make]:
    made: list[Outputs] = []

    def build(xml: str = XML) -> Outputs:
        made.append(Outputs(conf, UUID, xml, os.getpid(), qemu, str(tmp_path)))
        return made[-1]

    yield build
    for found in made:
        found.close()


def protected(make: Make, qemu: Qemu) -> Outputs:
    """Logs and buffers are on, and checkpoint 1 is committed; then the guest writes."""
    found = make()
    found.start_logs(7)
    found.arm()
    for log in found.logs.values():
        log.cut(1)
        log.release(1)
    qemu.write(found.disks[0].filter_node, 7, b"x" * SECTOR)
    qemu.happened.clear()
    return found


def logged(qemu: Qemu) -> list[str]:
    """Nodes of logs that QEMU has."""
    return [name for name in qemu.nodes if name.startswith("pmt-")]


def note(conf: Any) -> bitmap.Note | None:
    return bitmap.Note.read(os.path.join(conf.disk.log_directory, UUID))


# -- putting on -------------------------------------------------------------------------


def test_before_anything_is_put_on_nothing_has_changed(make: Make, qemu: Qemu) -> None:
    found = make()
    assert qemu.happened == []
    assert [spec["name"] for spec in found.specs] == ["vda", "sda", "hda"]
    assert list(found.logs) == [0, 1]  # the third is only read
    assert found.summary()["output_commit"] is False
    assert found.summary()["network"] == []


def test_logs_are_put_on_and_have_their_generation(make: Make, qemu: Qemu) -> None:
    found = make()
    found.start_logs(7)
    assert logged(qemu) == ["pmt-file-vda", "pmt-log-vda", "pmt-file-sda", "pmt-log-sda"]
    assert {log.generation for log in found.logs.values()} == {7}


def test_buffers_are_put_on_each_with_the_limit(make: Make, qemu: Qemu, tmp_path: Path) -> None:
    found = make()
    armed = found.arm()
    assert [buffer.nic.mac for buffer in armed] == MACS  # type: ignore[attr-defined]
    assert {buffer.limit for buffer in armed} == {3 << 20}  # type: ignore[attr-defined]
    assert {buffer.directory for buffer in armed} == {str(tmp_path)}  # type: ignore[attr-defined]
    assert qemu.happened == ["attach net0", "attach net1"]
    assert found.summary()["output_commit"] is True


def test_a_nic_that_nothing_can_hold_is_refused_before_anything_is_changed(
    make: Make, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = exception.NoEgressBuffer("vhost")
    monkeypatch.setattr(Buffer, "problems", classmethod(lambda *_: [refusal]))
    with pytest.raises(exception.NoEgressBuffer, match=MACS[0]):
        make()
    assert qemu.happened == []


def test_a_buffer_that_cannot_be_put_on_does_not_keep_the_others(make: Make, qemu: Qemu) -> None:
    found = make()
    Buffer.fails["net1"] = "attach"
    with pytest.raises(exception.GuestError):
        found.arm()
    found.open(qemu.resume, keep=False)
    assert "detach net0" in qemu.happened
    assert found.armed is False


def test_a_log_that_cannot_be_put_on_does_not_keep_the_others(make: Make, qemu: Qemu) -> None:
    before = dict(qemu.nodes), dict(qemu.devices)
    found = make()
    real = qemu._blockdev_add

    def add(node_name: str, driver: str, **options: Any) -> None:
        if node_name == "pmt-log-sda":
            raise qemu._error("blockdev-add", "no")
        real(node_name, driver, **options)

    qemu._blockdev_add = add  # type: ignore[method-assign]
    with pytest.raises(exception.DiskLogError):
        found.start_logs(7)
    found.open(qemu.resume, keep=True)
    assert (dict(qemu.nodes), dict(qemu.devices)) == before
    assert qemu.status == "running"


def test_without_buffers_it_says_that_output_is_not_held(
    make: Make, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, UNBUFFERED)
    found = make()
    assert list(found.arm()) == []
    assert qemu.happened == []
    assert found.summary()["output_commit"] is False
    monkeypatch.setenv(VARIABLE, "yes")  # any other value does nothing
    assert len(found.arm()) == 2


def test_what_is_armed_can_be_traced(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path / "trace"))
    found = make()
    armed = found.arm()
    armed[0].cut(1)
    armed[0].release(1)
    assert '"nic": "net0"' in (tmp_path / "trace").read_text()
    armed[0].watch(print)
    assert Buffer.made[0].on_output is print
    assert armed[0].waiting_since == 7.5
    assert found.summary()["network"] == [{"nic": "net0"}, {"nic": "net1"}]


def test_released_at_once_an_epoch_does_not_wait_for_its_commit(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace"
    monkeypatch.setenv(trace.VARIABLE, str(path))
    safe = make().arm()[0]
    safe.cut(1)
    assert "release" not in path.read_text()
    monkeypatch.setenv(VARIABLE, AT_ONCE)
    hasty = make().arm()[0]
    hasty.cut(1)
    assert path.read_text().count('"release"') == 1
    assert hasty.release(1) is None
    assert path.read_text().count('"release"') == 1


# -- taking off -------------------------------------------------------------------------


def in_order(happened: list[str], *wanted: str) -> None:
    places = [happened.index(name) for name in wanted]
    assert places == sorted(places), happened


def test_all_is_taken_off_while_the_guest_stands_still(
    make: Make, qemu: Qemu, conf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(qemu.devices)
    found = protected(make, qemu)
    noted: list[int] = []
    real = bitmap.Note.write

    def write(self: bitmap.Note, directory: str) -> None:
        noted.append(len(qemu.happened))
        real(self, directory)

    monkeypatch.setattr(bitmap.Note, "write", write)
    found.open(qemu.resume, keep=True)
    happened = qemu.happened
    assert (happened[0], happened[-1]) == ("stop", "resume")
    in_order(
        happened, "stop", "block-dirty-bitmap-add", "blockdev-del", "detach net0", "detach net1"
    )
    # The bitmap records from before the filters go, so that no write falls between; the note is
    # there before the packets that depend on those writes go out.
    assert happened.index("block-dirty-bitmap-add") < noted[0] <= happened.index("detach net0")
    assert not [name for name in happened if name.startswith("recover")]
    assert logged(qemu) == []
    assert before.items() <= qemu.devices.items()
    kept = note(conf)
    assert kept is not None
    assert (kept.generation, kept.epoch) == (7, 1)
    assert list(kept.ranges["vda"]) == [(7 * SECTOR, SECTOR)]
    assert found.armed is False
    assert found.summary()["network"] == []


def test_taken_off_twice_it_is_off(make: Make, qemu: Qemu) -> None:
    found = protected(make, qemu)
    found.open(qemu.resume, keep=True)
    qemu.happened.clear()
    found.open(qemu.resume, keep=True)
    assert not [name for name in qemu.happened if name.startswith(("detach", "blockdev"))]
    assert qemu.status == "running"


def test_on_request_nothing_is_kept_in_mind(make: Make, qemu: Qemu, conf: Any) -> None:
    found = protected(make, qemu)
    found.record_images()
    records = Path(conf.state_path) / "images"
    found.open(qemu.resume, keep=False)
    assert note(conf) is None
    assert not any(qemu.bitmaps.values())
    assert not list(records.glob("*.json"))
    assert logged(qemu) == []


@pytest.mark.parametrize(("status", "resumed"), [("paused", False), ("io-error", True)])
def test_a_guest_that_stands_still_is_not_stopped_again(
    make: Make, qemu: Qemu, status: str, resumed: bool
) -> None:
    """Its operator paused it, and it stays paused; or a failed log stopped it."""
    found = protected(make, qemu)
    qemu.status = status
    found.open(qemu.resume, keep=True)
    assert "stop" not in qemu.happened
    assert ("resume" in qemu.happened) == resumed
    assert "detach net1" in qemu.happened


@pytest.mark.parametrize(
    "fails", ["block-dirty-bitmap-add", "qom-set", "blockdev-del", "query-block"]
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_part_that_fails_does_not_keep_the_others(
    make: Make, qemu: Qemu, fails: str, keep: bool
) -> None:
    found = protected(make, qemu)
    qemu.fails[fails] = "no"
    # Without the note of changes the next synchronisation is longer; a log that stays on is told.
    told = (
        contextlib.nullcontext()
        if fails == "block-dirty-bitmap-add"
        else pytest.raises(exception.GuestError, match="not taken off: the write log of disk")
    )
    with told:
        found.open(qemu.resume, keep=keep)
    assert qemu.happened[-3:] == ["detach net0", "detach net1", "resume"]
    if fails == "block-dirty-bitmap-add":
        assert logged(qemu) == []


def test_an_unwritable_note_keeps_nothing_back(
    make: Make, qemu: Qemu, conf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = protected(make, qemu)

    def write(_self: bitmap.Note, _directory: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(bitmap.Note, "write", write)
    found.open(qemu.resume, keep=True)
    assert note(conf) is None
    assert logged(qemu) == []
    assert qemu.happened[-3:] == ["detach net0", "detach net1", "resume"]


def test_a_buffer_that_cannot_be_let_out_is_taken_off_by_force(make: Make, qemu: Qemu) -> None:
    """The guest comes first: it must not stay cut off."""
    found = protected(make, qemu)
    Buffer.fails["net0"] = "detach"
    found.open(qemu.resume, keep=True)
    happened = qemu.happened
    in_order(happened, "detach net0", "recover net0", "resume")
    assert "detach net1" in happened
    assert qemu.status == "running"


def test_a_buffer_that_cannot_be_let_out_costs_the_others_nothing(make: Make, qemu: Qemu) -> None:
    """What recovery takes off is lost: only what cannot be helped may be."""
    found = protected(make, qemu)
    Buffer.fails["net0"] = "detach"
    found.open(qemu.resume, keep=True)
    assert "recover net1" not in qemu.happened


def test_a_buffer_that_cannot_even_be_taken_off_keeps_nothing_back(
    make: Make, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = protected(make, qemu)
    Buffer.fails["net0"] = "detach"

    def recover(nic: Nic, _monitor: Any) -> bool:
        raise exception.GuestError("no")

    monkeypatch.setattr(Buffer, "recover", staticmethod(recover))
    with pytest.raises(exception.GuestError, match="not taken off: the buffer of net0"):
        found.open(qemu.resume, keep=True)
    assert qemu.happened[-2:] == ["detach net1", "resume"]


def test_a_stop_whose_answer_is_lost_does_not_leave_the_guest_stopped(
    make: Make, qemu: Qemu
) -> None:
    """QEMU got it: whatever else, the guest has to run on."""
    found = protected(make, qemu)

    def stop() -> None:
        qemu.status = "paused"
        raise exception.GuestError("no answer", code="QMP_TIMEOUT")

    qemu._stop = stop  # type: ignore[method-assign]
    try:
        found.open(qemu.resume, keep=True)
    except exception.GuestError:
        pass
    assert qemu.status == "running"


# -- what the next synchronisation goes on from -----------------------------------------


def test_changes_are_known_when_the_images_are_those_of_the_note(make: Make, qemu: Qemu) -> None:
    protected(make, qemu).open(qemu.resume, keep=True)
    found = make()
    known = found.changes({"generation": 7, "epoch": 1})
    assert known is not None
    assert (known.generation, known.epoch) == (7, 1)
    assert found.changes({"generation": 7, "epoch": 2}) == known  # acknowledged, but unheard of


@pytest.mark.parametrize(
    "images",
    [
        None,
        {},
        [],
        {"generation": 6, "epoch": 1},
        {"generation": 8, "epoch": 1},
        {"generation": 7, "epoch": 0},
        {"generation": 7, "epoch": None},
        {"generation": 7, "epoch": "1"},
        {"generation": 7},
    ],
)
def test_other_images_are_copied_whole_and_the_note_goes(
    make: Make, qemu: Qemu, conf: Any, images: Any
) -> None:
    protected(make, qemu).open(qemu.resume, keep=True)
    found = make()
    assert found.changes(images) is None
    assert note(conf) is None
    assert not any(qemu.bitmaps.values())


def test_without_its_bitmap_a_disk_is_copied_whole(make: Make, qemu: Qemu, conf: Any) -> None:
    """QEMU was started anew, and knows nothing of what was written."""
    protected(make, qemu).open(qemu.resume, keep=True)
    qemu.bitmaps.popitem()
    found = make()
    assert found.changes({"generation": 7, "epoch": 1}) is None
    assert note(conf) is None


def test_a_pair_that_never_committed_leaves_no_note(make: Make, qemu: Qemu, conf: Any) -> None:
    found = make()
    found.start_logs(7)
    found.open(qemu.resume, keep=True)
    assert note(conf) is None


# -- the end ----------------------------------------------------------------------------


def test_closing_lets_go_of_all_and_leaves_everything_closed(make: Make, qemu: Qemu) -> None:
    found = protected(make, qemu)
    before = len(os.listdir("/proc/self/fd"))
    found.close()
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # the logs
    assert [buffer.closed for buffer in Buffer.made] == [True, True]
    assert qemu.happened == []  # nothing is opened, and disks are logged on
    assert len(logged(qemu)) == 4


def test_nothing_is_left_of_a_guest_that_is_gone(make: Make, qemu: Qemu, conf: Any) -> None:
    found = protected(make, qemu)
    found.abandon()
    assert [buffer.closed for buffer in Buffer.made] == [True, True]
    assert not os.path.exists(os.path.join(conf.disk.log_directory, UUID))
    found.abandon()


# -- the status -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RedirectorBuffer, PlugBuffer])
def test_what_is_told_is_what_the_status_shows(
    make: Make, qemu: Qemu, kind: type[EgressBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = protected(make, qemu)
    found._buffers = [kind(nic, qemu, "/", 3 << 20) for nic, _ in found._kinds]
    summary = found.summary()
    assert set(summary) == {"output_commit", "dropping", "network", "disks"}
    wanted = {"nic", "mac", "buffer", "held_bytes", "peak_bytes", "limit_bytes"}
    for nic in summary["network"]:
        assert set(nic) == wanted | {"dropped_packets", "released_bytes"}
    pair = {
        "name": "web1", "uuid": UUID, "host": "a", "role": "primary", "state": "protected",
        "since": 0, "primary_host": "a", "standby_host": "b", "generation": 7, "strategy": "pmt",
        "output_commit": summary["output_commit"], "stats": summary,
    }  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render.status_table(pair))
    console.print(render.top_table([pair]))
    text = console.export_text()
    for mac in MACS:
        assert f"nic {mac}" in text
    assert f"{kind.name}, holds 0.00 of 3 MiB" in text
    assert "disk vda" in text
    assert "disk sda" in text
    assert "MiB replicated" in text
    assert outputs_module.MIB == 1 << 20
