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

"""The image cache: built once, whole or not at all. No compiler and no apt is needed here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import image


@pytest.fixture
def tools(monkeypatch):
    """apt, dpkg and gcc that leave behind what the real ones would; returns what was called."""
    called: list[str] = []

    def run(argv, cwd=None):
        called.append(argv[0])
        if argv[0] == "apt-cache":
            return "linux-image-cloud-amd64\n  Depends: linux-image-6.1-cloud-amd64\n"
        if argv[0] == "apt-get":
            (cwd / "k.deb").write_text("")
        elif argv[0] == "dpkg":
            (cwd / "boot").mkdir()
            (cwd / "boot" / "vmlinuz-6.1").write_text("kernel")
            modules = cwd / "lib" / "modules" / "6.1"
            modules.mkdir(parents=True)
            (modules / "virtio_net.ko").write_text("net")
            (modules / "virtio.ko").write_text("virtio")
            (modules / "sd_mod.ko").write_text("disk")
            (modules / "scsi_mod.ko").write_text("scsi")
        elif argv[0] == "gcc":
            with open(argv[argv.index("-o") + 1], "wb") as f:
                f.write(b"program")
        return ""

    monkeypatch.setattr(image, "_run", run)
    return called


def test_second_build_comes_from_the_cache(tools, tmp_path):
    first = image.build(tmp_path)
    assert first.kernel.read_text() == "kernel"
    before = list(tools)
    assert image.build(tmp_path) == first
    assert tools == before


def test_two_builds_at_once_make_one_image(tools, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(image.build, [tmp_path, tmp_path])
    assert first == second
    assert tools.count("gcc") == 1


def test_changed_sources_make_a_new_image_of_the_same_kernel(tools, tmp_path, monkeypatch):
    first = image.build(tmp_path)
    monkeypatch.setattr(image, "_RECIPE", 999)
    second = image.build(tmp_path)
    assert second != first
    assert tools.count("apt-get") == 1
    assert tools.count("gcc") == 2


def test_failed_build_leaves_nothing(tools, tmp_path, monkeypatch):
    good = image._run

    def failing(argv, cwd=None):
        if argv[0] == "gcc":
            raise LabError("no compiler")
        return good(argv, cwd)

    monkeypatch.setattr(image, "_run", failing)
    with pytest.raises(LabError, match="no compiler"):
        image.build(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "kernel-linux-image-6.1-cloud-amd64"}


def test_modules_are_listed_in_loading_order(tools, tmp_path):
    data = image.build(tmp_path).initrd.read_bytes()
    assert b"virtio\nvirtio_net\n" in data
    assert b"scsi_mod\nsd_mod\n" in data  # a list of its own: few guests need them


def test_same_input_makes_the_same_archive(tools, tmp_path):
    one = image.build(tmp_path / "a").initrd.read_bytes()
    assert one == image.build(tmp_path / "b").initrd.read_bytes()


def test_archive_has_names_modes_and_data_where_newc_wants_them():
    archive = image._Archive()
    archive.directory("dev")
    archive.file("a", b"12345", 0o755)
    data = archive.finish()
    assert len(data) % 4 == 0
    at = data.index(b"070701", 6)
    fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
    assert fields[1] == 0o100755
    assert fields[6] == 5
    name_at = at + 110
    assert data[name_at : name_at + fields[11]] == b"a\0"
    content_at = (name_at + fields[11] + 3) & ~3
    assert data[content_at : content_at + 5] == b"12345"
    assert data.rstrip(b"\0").endswith(b"TRAILER!!!")


def test_each_host_gets_a_copy_of_its_own(tools, tmp_path):
    built = image.build(tmp_path / "cache")
    image.install(built, tmp_path / "host")
    copy = tmp_path / "host" / "vmlinuz"
    assert copy.read_text() == "kernel"
    assert copy.stat().st_ino != built.kernel.stat().st_ino


def test_a_missing_tool_is_told_with_the_cure():
    with pytest.raises(LabError) as error:
        image._run(["no-such-tool-of-ours"])
    assert "bindep" in error.value.cure
