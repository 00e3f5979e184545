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

"""QMP over a socket of our own: replies, events, and everything that can go wrong with them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.guest import monitor as monitor_module
from nova_pmt.guest.execution import DirectExecution, LibvirtExecution, make_execution
from nova_pmt.guest.monitor import DirectMonitor, Monitor, QmpCommandError, encode
from tests.unit.fakes.qmp import FakeQmp, done, event


def answering(*messages: Any) -> Any:
    """Each command gets these messages; an Ellipsis stands for its reply."""
    return lambda command: [done(command) if m is ... else m for m in messages]


# -- commands and replies ---------------------------------------------------------------


def test_a_command_gets_its_result(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, lambda c: [done(c, {"running": True})]) as server:
        with DirectMonitor(server.path) as monitor:
            assert monitor.execute("query-status") == {"running": True}
            assert monitor.fileno() > 0
    assert [command["execute"] for command in server.commands] == [
        "qmp_capabilities",
        "query-status",
    ]


def test_arguments_go_along(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, answering(...)) as server, DirectMonitor(server.path) as monitor:
        monitor.execute("migrate", uri="unix:/x")
        monitor.human("info ramblock")
    assert server.commands[1]["arguments"] == {"uri": "unix:/x"}
    assert server.commands[2]["arguments"] == {"command-line": "info ramblock"}


def test_events_between_replies_are_kept_in_their_order(tmp_path: Path) -> None:
    chatter = answering(event("STOP"), event("MIGRATION", status="setup"), ..., event("RESUME"))
    with FakeQmp(tmp_path, chatter) as server, DirectMonitor(server.path) as monitor:
        monitor.execute("stop")
        assert monitor.saw_event("RESUME")
        assert monitor.wait_event("MIGRATION", 1.0, status="setup")["data"] == {"status": "setup"}
        assert monitor.saw_event("STOP")
        assert not monitor.saw_event("SHUTDOWN")


def test_replies_to_commands_that_were_given_up_are_dropped(tmp_path: Path) -> None:
    stale = {"return": {"running": "old"}, "id": "x1"}
    nameless = {"error": {"class": "GenericError", "desc": "nobody asked"}}

    def answer(command: dict[str, Any]) -> list[Any]:
        return [{**stale, "id": "x99"}, stale, nameless, done(command, {"running": "new"})]

    with FakeQmp(tmp_path, answer) as server, DirectMonitor(server.path) as monitor:
        assert monitor.execute("query-status") == {"running": "new"}


def test_a_refusal_of_qemu_is_typed_and_names_the_command(tmp_path: Path) -> None:
    refusal = {"class": "CommandNotFound", "desc": "no such thing"}
    with FakeQmp(tmp_path, lambda c: [{"error": refusal, "id": c["id"]}]) as server:
        with DirectMonitor(server.path) as monitor:
            with pytest.raises(QmpCommandError, match="refused 'fly': no such thing") as caught:
                monitor.execute("fly")
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.code == "QMP_COMMAND_FAILED"
    assert caught.value.details == {"command": "fly"}
    assert isinstance(caught.value, exception.GuestError)


def test_messages_may_come_in_pieces_and_several_at_once(tmp_path: Path) -> None:
    import json

    def answer(command: dict[str, Any]) -> list[Any]:
        threading.Thread(target=later, args=(command,)).start()
        return []

    def later(command: dict[str, Any]) -> None:
        data = (json.dumps(event("A")) + "\r\n" + json.dumps(done(command, "x" * 300_000))).encode()
        for at in range(0, len(data), 50_000):
            server.say(data[at : at + 50_000])
            time.sleep(0.001)
        server.say(b"\r\n", event("B"))

    with FakeQmp(tmp_path, answer) as server, DirectMonitor(server.path) as monitor:
        assert monitor.execute("big") == "x" * 300_000
        assert monitor.wait_event("B", 2.0)
        assert monitor.saw_event("A")


# -- what goes wrong --------------------------------------------------------------------


def test_qemu_that_ends_is_gone(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, lambda _: None) as server, DirectMonitor(server.path) as monitor:
        with pytest.raises(exception.GuestGone):
            monitor.execute("query-status")
        with pytest.raises(exception.GuestGone):
            monitor.execute("query-status")
        assert not monitor.saw_event("SHUTDOWN")


def test_what_qemu_said_before_it_ended_is_known(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, lambda _: None) as server, DirectMonitor(server.path) as monitor:
        server.say(event("SHUTDOWN", guest=True))
        with pytest.raises(exception.GuestGone):
            monitor.execute("query-status")
        assert monitor.saw_event("SHUTDOWN")


@contextlib.contextmanager
def impatient(monitor: DirectMonitor) -> Iterator[None]:
    """It soon gives up; not before, since a busy machine may be slow to greet it."""
    patience = monitor._timeout_s

    def wait(seconds: float) -> None:
        monitor._timeout_s = seconds
        monitor._sock.settimeout(seconds)

    wait(0.1)
    try:
        yield
    finally:
        wait(patience)


def test_qemu_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, lambda _: []) as server, DirectMonitor(server.path) as monitor:
        with (
            impatient(monitor),
            pytest.raises(exception.GuestError, match="did not answer") as caught,
        ):
            monitor.execute("stop")
    assert caught.value.code == "QMP_TIMEOUT"


def test_a_late_answer_does_not_pass_for_that_of_the_next_command(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []

    def answer(command: dict[str, Any]) -> list[Any]:
        kept.append(command)
        return [] if len(kept) == 1 else [done(kept[0], "late"), done(command, "mine")]

    with FakeQmp(tmp_path, answer) as server, DirectMonitor(server.path) as monitor:
        with impatient(monitor), pytest.raises(exception.GuestError):
            monitor.execute("first")
        assert monitor.execute("second") == "mine"


@pytest.mark.parametrize(
    "line", [b"this is no JSON\n", b"[1, 2]\n", b"\xff\xfe\n", b"[" * 9999 + b"\n"]
)
def test_garbage_is_a_typed_error(tmp_path: Path, line: bytes) -> None:
    with FakeQmp(tmp_path, answering(line)) as server, DirectMonitor(server.path) as monitor:
        with pytest.raises(exception.GuestError):
            monitor.execute("query-status")


def test_an_endless_message_is_not_collected_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "MAX_MESSAGE_BYTES", 100_000)
    with FakeQmp(tmp_path, answering(b"x" * 500_000)) as server:
        with DirectMonitor(server.path) as monitor:
            with pytest.raises(exception.GuestError, match="longer than any"):
                monitor.execute("query-status")


def test_no_socket_means_no_guest(tmp_path: Path) -> None:
    with pytest.raises(exception.GuestGone, match="cannot use QMP socket"):
        DirectMonitor(str(tmp_path / "nothing.sock"))


def test_what_is_no_qmp_at_all_is_refused(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, answering(...), greeting=b"SSH-2.0-OpenSSH\r\n") as server:
        with pytest.raises(exception.GuestError):
            DirectMonitor(server.path, 1.0)


# -- events -----------------------------------------------------------------------------


def test_waiting_takes_the_event_that_matches_and_no_other(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, answering(...)) as server, DirectMonitor(server.path) as monitor:
        server.say(
            event("MIGRATION", status="active"),
            event("JOB", status="cancelled"),
            event("MIGRATION", status="cancelled"),
        )
        monitor.wait_event("MIGRATION", 1.0, status="cancelled")
        monitor.wait_event("MIGRATION", 1.0, status="active")
        with pytest.raises(exception.GuestError, match="no event MIGRATION"):
            monitor.wait_event("MIGRATION", 0.02)


def test_an_event_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, answering(...)) as server, DirectMonitor(server.path) as monitor:
        timer = threading.Timer(0.05, lambda: server.say(event("STOP")))
        timer.start()
        assert monitor.wait_event("STOP", 5.0)["event"] == "STOP"
        timer.join()


def test_rounds_do_not_pile_up_events(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, answering(...)) as server, DirectMonitor(server.path) as monitor:
        for _ in range(40):
            server.say(*[event("STOP"), event("RESUME")] * 10)
            monitor.execute("query-status")
        server.say(event("SHUTDOWN"))
        assert monitor.wait_event("SHUTDOWN", 5.0)
        monitor.forget_events({"STOP", "RESUME"})
        assert not monitor.saw_event("STOP")
        monitor.forget_events({"STOP"})


# -- pausing over it --------------------------------------------------------------------


class Qemu:
    """Stops, saves into the file that it is told, and goes on."""

    def __init__(self, state: bytes = b"devices") -> None:
        self.running = True
        self.saves = 0
        self.state = state
        self.refuse = ""

    def __call__(self, command: dict[str, Any]) -> list[Any]:
        name = command["execute"]
        if name == self.refuse:
            return [{"error": {"class": "GenericError", "desc": "no"}, "id": command["id"]}]
        if name == "stop":
            told = [event("STOP")] if self.running else []
            self.running = False
            return [*told, done(command)]
        if name == "xen-save-devices-state":
            assert not self.running
            assert command["arguments"]["live"] is False
            self.saves += 1
            Path(command["arguments"]["filename"]).write_bytes(self.state)
        if name == "cont":
            self.running = True
            return [event("RESUME"), done(command)]
        if name == "query-status":
            return [done(command, {"running": self.running})]
        return [done(command)]


def test_a_pause_is_one_write_and_brings_the_device_state(tmp_path: Path) -> None:
    qemu = Qemu()
    with FakeQmp(tmp_path, qemu) as server, DirectMonitor(server.path) as monitor:
        execution = make_execution(monitor, str(tmp_path))
        assert type(execution) is DirectExecution
        reads = server.reads
        execution.pause()
        execution.saved()
        assert server.reads == reads + 1
        assert not qemu.running and qemu.saves == 1
        execution.resume()
        assert qemu.running
        assert execution.device_state() == b"devices"
        assert execution.running()
        assert not monitor.saw_event("STOP")
        execution.close()
        execution.close()
        assert not (tmp_path / "devices.state").exists()


def test_what_was_begun_is_finished_by_what_starts_with_it(tmp_path: Path) -> None:
    qemu = Qemu()
    with FakeQmp(tmp_path, qemu) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        for _ in range(3):
            assert execution.running()
            execution.prepare()
            execution.prepare()
            time.sleep(0.01)
            assert qemu.running
            pause_whole(execution)
            time.sleep(0.01)
            assert not qemu.running  # all of its cont but the last byte is there
            execution.resume()
            assert qemu.running
    names = [command["execute"] for command in server.commands[1:]]
    assert names == ["query-status", "stop", "xen-save-devices-state", "cont"] * 3


def test_what_was_begun_is_not_done_when_something_else_comes(tmp_path: Path) -> None:
    qemu = Qemu()
    with FakeQmp(tmp_path, qemu) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        execution.prepare()
        assert monitor.execute("query-status") == {"running": True}
        execution.resume()
        pause_whole(execution)
        assert monitor.execute("query-status") == {"running": False}  # its cont was begun
        execution.resume()
        assert qemu.running
        execution.hold()
        execution.resume()
        assert qemu.running
    refused = [c for c in server.commands if "spoiled" in c.get("arguments", {})]
    assert [command["execute"] for command in refused] == ["stop", "cont"]


@pytest.mark.parametrize("refused", ["stop", "xen-save-devices-state"])
def test_resume_works_in_whatever_state_the_pause_was_left(tmp_path: Path, refused: str) -> None:
    qemu = Qemu()
    qemu.refuse = refused
    if refused == "stop":
        qemu.running = False  # it is stopped by somebody: the save does not mind
    with FakeQmp(tmp_path, qemu) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        with pytest.raises(QmpCommandError):
            pause_whole(execution)
        execution.resume()
        assert qemu.running
        qemu.refuse = ""
        pause_whole(execution)
        execution.resume()


def test_a_guest_that_somebody_resumes_in_the_pause_makes_no_checkpoint(tmp_path: Path) -> None:
    with FakeQmp(tmp_path, Qemu()) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        pause_whole(execution)
        execution.resume()
        execution.pause()
        server.say(event("RESUME"))
        with pytest.raises(exception.GuestError, match="somebody resumed") as caught:
            execution.saved()
        assert caught.value.code == "RESUMED_IN_PAUSE"
        execution.resume()
        pause_whole(execution)  # the next one is whole again
        execution.resume()


def test_a_guest_that_somebody_pauses_just_before_us_stays_paused(tmp_path: Path) -> None:
    """``virsh suspend`` between our look at it and our stop: no cont of ours undoes it."""
    qemu = Qemu()
    with FakeQmp(tmp_path, qemu) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        assert execution.running()
        execution.prepare()
        qemu.running = False
        pause_whole(execution)
        execution.resume()
        assert not execution.running()
        execution.resume()  # told so: as an operator's unprotect is
        assert execution.running()
        execution.prepare()
        pause_whole(execution)
        execution.resume()
        assert execution.running()


def test_a_guest_that_was_reset_has_not_ended(tmp_path: Path) -> None:
    """``virsh reboot``: QEMU tells of a SHUTDOWN, and libvirt lets it run again."""
    with FakeQmp(tmp_path, Qemu()) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        server.say(event("SHUTDOWN"), event("RESUME"))
        assert monitor.saw_event("SHUTDOWN")
        assert execution.running()
        assert not monitor.saw_event("SHUTDOWN")


def pause_whole(execution: Any) -> None:
    execution.pause()
    execution.saved()


def test_a_device_state_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_pmt.guest.execution.MAX_DEVICE_STATE_BYTES", 100)
    with FakeQmp(tmp_path, Qemu(b"x" * 101)) as server, DirectMonitor(server.path) as monitor:
        execution = DirectExecution(monitor, str(tmp_path))
        pause_whole(execution)
        execution.resume()
        with pytest.raises(exception.GuestError, match="larger than 100"):
            execution.device_state()


class SlowMonitor(Monitor):
    """Stands for libvirt's passthrough: commands of several threads, one after the other.

    :param gate: a save of the devices waits until it is set.
    """

    def __init__(self, qemu: Qemu, gate: threading.Event | None = None) -> None:
        self.qemu, self.gate = qemu, gate
        self.log: list[str] = []
        self._lock = threading.Lock()

    def execute(self, command: str, **arguments: Any) -> Any:
        with self._lock:
            if self.gate is not None and command == "xen-save-devices-state":
                self.gate.wait(30)
            self.log.append(command)
            message = {"execute": command, "arguments": arguments, "id": "1"}
            reply = self.qemu(message)[-1]
            if "error" in reply:
                raise QmpCommandError(command, reply["error"])
            return reply["return"]

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        raise NotImplementedError

    def saw_event(self, name: str) -> bool:
        return False

    def close(self) -> None:
        """Nothing is open."""


def test_through_libvirt_the_save_runs_while_memory_is_copied(tmp_path: Path) -> None:
    qemu = Qemu()
    gate = threading.Event()
    execution = make_execution(SlowMonitor(qemu, gate), str(tmp_path))
    assert type(execution) is LibvirtExecution
    execution.pause()
    assert qemu.saves == 0  # under way
    gate.set()
    execution.saved()
    assert qemu.saves == 1
    execution.resume()
    assert qemu.running and execution.running()
    assert execution.device_state() == b"devices"
    execution.close()


def test_through_libvirt_a_save_that_fails_is_told_and_the_guest_goes_on(tmp_path: Path) -> None:
    qemu = Qemu()
    qemu.refuse = "xen-save-devices-state"
    execution = LibvirtExecution(SlowMonitor(qemu), str(tmp_path))
    execution.pause()
    with pytest.raises(QmpCommandError):
        execution.saved()
    execution.resume()
    assert qemu.running
    # also when nobody asked for the result: resume waits for the save, then goes on
    execution.pause()
    execution.resume()
    assert qemu.running
    execution.saved()
    execution.close()


def test_commands_are_as_short_as_they_can_be() -> None:
    assert encode("stop", {}) == b'{"execute":"stop"}'
    assert encode("x", {"a": "\n"}, "7") == b'{"execute":"x","arguments":{"a":"\\n"},"id":"7"}'
