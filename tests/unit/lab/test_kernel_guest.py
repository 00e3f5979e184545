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

"""What is made of a bare guest's end; QEMU is a shell script here."""

from __future__ import annotations

from pathlib import Path

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import kernel_guest
from nova_pmt.lab.image import Image

LOCKED_UP = """\
[   40.1] br0: port 1(vi0) entered blocking state
[   69.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3.11:108]
[   69.2] RIP: 0010:__netif_receive_skb_core.constprop.0+0xe9/0xf00
"""
LAST = "[   69.4] Kernel panic - not syncing: softlockup: hung tasks\n"
ENDED = "program ended: 0\n"
DONE = '{"check": "one"}\n'


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    """Makes a QEMU that writes a console and results, then does one more command."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(console: str, results: str = DONE, then: str = "exit 0") -> Image:
        (tmp_path / "console").write_text(console)
        (tmp_path / "results").write_text(results)
        script = tmp_path / "qemu-system-x86_64"
        files = f"cat {tmp_path}/console >&2; cat {tmp_path}/results"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/argv\n{files}\n{then}\n')
        script.chmod(0o755)
        return Image(Path("/vmlinuz"), Path("/initrd.img"))

    return make


def test_results_and_console_of_a_guest_that_ended(qemu):
    image = qemu("hello\r\n" + ENDED, DONE + "garbage\n")
    lines, console = kernel_guest.run(image, timeout_s=10)
    assert lines == [{"check": "one"}]
    assert console == "hello\n" + ENDED + "\nnot JSON: b'garbage'"


def test_a_kernel_that_gave_up_is_an_error_with_its_backtraces(qemu):
    image = qemu(LOCKED_UP + "[   69.3]  a line of a backtrace\n" * 200 + LAST)
    with pytest.raises(LabError) as caught:
        kernel_guest.run(image, timeout_s=10)
    assert "ended before its program did" in caught.value.message
    assert DONE in caught.value.message
    shown = caught.value.message.split("console: ")[1]
    assert shown.startswith("[   69.1] watchdog: BUG: soft lockup")
    assert "__netif_receive_skb_core" in shown and LAST in shown


def test_a_guest_that_is_late_is_an_error_with_its_backtraces(qemu):
    image = qemu(LOCKED_UP + "[  280.0] and so on\n" * 200, then="exec sleep 60")
    with pytest.raises(LabError) as caught:
        kernel_guest.run(image, timeout_s=0.5)
    assert "was not done after" in caught.value.message
    assert "console: [   69.1] watchdog: BUG: soft lockup" in caught.value.message


def test_of_a_console_without_complaints_the_end_is_shown(qemu):
    image = qemu("first\n" + "." * 20_000 + "last\n", then="exit 1")
    with pytest.raises(LabError) as caught:
        kernel_guest.run(image, timeout_s=10)
    assert "QEMU failed" in caught.value.message
    assert "first" not in caught.value.message and "last" in caught.value.message


def test_the_kernel_panics_when_a_cpu_is_stuck_and_shows_where(qemu, tmp_path):
    kernel_guest.run(qemu(ENDED), timeout_s=10)
    words = (tmp_path / "argv").read_text().split()
    assert {"softlockup_panic=1", "panic=-1", "-no-reboot"} <= set(words)
    assert "quiet" not in words
