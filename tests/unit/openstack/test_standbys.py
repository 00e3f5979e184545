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


from __future__ import annotations

from pathlib import Path

from nova_pmt.openstack.nova.standbys import Note, Notes

ONE = Note("standby-1", "server-1", 7, "project", True, [{"id": "port"}])


def test_notes_outlive_the_process(tmp_path: Path) -> None:
    directory = str(tmp_path / "notes")
    Notes(directory).write(ONE)
    again = Notes(directory)
    assert again.get("standby-1") == again.of("server-1") == ONE
    assert again.get("server-1") is None
    again.become(ONE, "adopted")
    found = Notes(directory).get("standby-1")
    assert found is not None
    assert found.state == "adopted"
    again.remove(ONE)
    again.remove(ONE)
    assert list(Notes(directory)) == []


def test_a_standby_that_left_is_no_standby_server_any_more(tmp_path: Path) -> None:
    notes = Notes(str(tmp_path))
    notes.write(ONE)
    notes.become(ONE, "left")
    assert notes.get("standby-1") is None
    found = notes.of("server-1")
    assert found is not None
    assert found.state == "left"


def test_a_broken_note_hides_no_other(tmp_path: Path) -> None:
    notes = Notes(str(tmp_path))
    notes.write(ONE)
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"what": 1}')
    (tmp_path / "c.txt").write_text("")
    assert list(Notes(str(tmp_path))) == [ONE]
