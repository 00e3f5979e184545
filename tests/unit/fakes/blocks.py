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

"""The block layer of a QEMU: nodes, the devices on them, logs, bitmaps and an NBD server."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from nova_pmt import exception
from nova_pmt.guest.disk.discover import COMMANDS
from nova_pmt.guest.monitor import Monitor, QmpCommandError

SECTOR = 512
MIB = 1 << 20

DISKS = """\
<domain type='kvm' id='1'>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/images/a.qcow2' index='3'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/images/b.raw' index='2'/>
      <backingStore/>
      <target dev='sda' bus='scsi'/>
      <alias name='scsi0-0-0-0'/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/images/config.iso' index='1'/>
      <target dev='hda' bus='ide'/>
      <readonly/>
      <alias name='ide0-0-0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='hdb' bus='ide'/>
      <readonly/>
      <alias name='ide0-0-1'/>
    </disk>
    <controller type='scsi' index='0' model='virtio-scsi'/>
  </devices>
</domain>
"""


class FakeBlocks(Monitor):
    """What QEMU would do, as far as the modules of disks can tell.

    :ivar fails: command to the error it answers with.
    :ivar devices: what ``query-block`` calls a device, to the node that it works on.
    """

    def __init__(self) -> None:
        self.fails: dict[str, str] = {}
        self.commands: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.version = (7, 2, 22)
        self.nodes: dict[str, dict[str, Any]] = {}
        self.bitmaps: dict[str, dict[str, dict[str, Any]]] = {}
        self.devices: dict[str, str] = {}
        self.exports: dict[str, dict[str, Any]] = {}
        self.server: socket.socket | None = None
        for number, name, form, path, size, ro in (
            (3, "vda", "qcow2", "/images/a.qcow2", 64 * MIB, False),
            (2, "sda", "raw", "/images/b.raw", 16 * MIB, False),
            (1, "hda", "raw", "/images/config.iso", 2 * MIB, True),
        ):
            file, node = f"libvirt-{number}-storage", f"libvirt-{number}-format"
            self.add_node(file, drv="file", file=path, size=size, ro=ro)
            self.add_node(node, drv=form, file=path, size=size, ro=ro, children={"file": file})
            if form == "qcow2":
                self.nodes[node]["cluster"] = 65536
            self.devices[
                {
                    "vda": "/machine/peripheral/virtio-disk0/virtio-backend",
                    "sda": "scsi0-0-0-0",
                    "hda": "ide0-0-0",
                }[name]
            ] = node
        self.devices["ide0-0-1"] = ""

    def add_node(self, name: str, **facts: Any) -> None:
        self.nodes[name] = {"children": {}, "ro": False, "compat": "1.1", **facts}

    # -- what the guest does ------------------------------------------------------------

    def write(self, node: str, sector: int, data: bytes) -> None:
        """A write of the guest to the device that is on this node."""
        facts = self.nodes[node]
        if facts["drv"] == "blklogwrites":
            path = self.nodes[facts["children"]["log"]]["file"]
            header = struct.pack("<QQQQ", sector, len(data) // SECTOR, 0, 0)
            with open(path, "r+b") as file:
                end = max(SECTOR, file.seek(0, os.SEEK_END))
                file.seek(end)
                file.write(header.ljust(SECTOR, b"\0") + data)

    # -- the monitor --------------------------------------------------------------------

    def execute(self, command: str, **arguments: Any) -> Any:
        self.commands.append(command)
        if command in self.fails:
            raise self._error(command, self.fails[command])
        handler: Callable[..., Any] = getattr(self, "_" + command.replace("-", "_"))
        return handler(**{name.replace("-", "_"): value for name, value in arguments.items()})

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        for event in self.events:
            data = event["data"]
            if event["event"] == name and all(data.get(k) == v for k, v in match.items()):
                self.events.remove(event)
                return event
        raise exception.GuestError(f"no event {name}")

    def saw_event(self, name: str) -> bool:
        return any(event["event"] == name for event in self.events)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()

    @staticmethod
    def _error(command: str, text: str) -> QmpCommandError:
        return QmpCommandError(command, {"class": "GenericError", "desc": text})

    def _parents(self, node: str) -> list[str]:
        found = [name for name, facts in self.nodes.items() if node in facts["children"].values()]
        return found + [path for path, used in self.devices.items() if used == node]

    def _describe(self, name: str) -> dict[str, Any]:
        facts = self.nodes[name]
        image: dict[str, Any] = {"virtual-size": facts["size"], "format": facts["drv"]}
        if "cluster" in facts:
            image["cluster-size"] = facts["cluster"]
            image["format-specific"] = {"type": "qcow2", "data": {"compat": facts["compat"]}}
        answer = {
            "node-name": name,
            "drv": facts["drv"],
            "file": facts["file"],
            "ro": facts["ro"],
            "image": image,
        }
        if self.bitmaps.get(name):
            answer["dirty-bitmaps"] = [
                {"name": bitmap, **facts} for bitmap, facts in self.bitmaps[name].items()
            ]
        return answer

    def _query_version(self) -> Any:
        major, minor, micro = self.version
        return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""}

    def _query_commands(self) -> Any:
        return [{"name": name} for name in COMMANDS]

    def _query_block(self) -> Any:
        return [
            {"qdev": path, "device": "", **({"inserted": self._describe(node)} if node else {})}
            for path, node in self.devices.items()
        ]

    def _query_named_block_nodes(self, flat: bool) -> Any:
        return [self._describe(name) for name in self.nodes]

    def _stats(self, name: str) -> dict[str, Any]:
        children = self.nodes[name]["children"]
        answer: dict[str, Any] = {"node-name": name, "stats": {}}
        if "file" in children:
            answer["parent"] = self._stats(children["file"])
        if "backing" in children:
            answer["backing"] = self._stats(children["backing"])
        return answer

    def _query_blockstats(self, query_nodes: bool) -> Any:
        return [self._stats(name) for name in self.nodes]

    def _blockdev_add(self, node_name: str, driver: str, **options: Any) -> None:
        if node_name in self.nodes or len(node_name) > 31:
            raise self._error("blockdev-add", f"Node name '{node_name}' cannot be used")
        children = {}
        size, path = 0, options.get("filename", "")
        for role in ("file", "log"):
            child = options.get(role)
            if isinstance(child, str):
                if child not in self.nodes:
                    raise self._error("blockdev-add", f"Cannot find node '{child}'")
                children[role] = child
        if driver == "file" and not os.path.exists(path):
            raise self._error("blockdev-add", f"Could not open '{path}'")
        if "file" in children:
            size = self.nodes[children["file"]]["size"]
        self.add_node(
            node_name, drv=driver, file=path, size=size, children=children, options=options
        )

    def _blockdev_del(self, node_name: str) -> None:
        if node_name not in self.nodes:
            raise self._error("blockdev-del", f"Failed to find node with '{node_name}'")
        if self._parents(node_name) or any(
            export["node_name"] == node_name for export in self.exports.values()
        ):
            raise self._error("blockdev-del", f"Node {node_name} is in use")
        del self.nodes[node_name]

    def _block_resize(self, node_name: str, size: int) -> None:
        self.nodes[node_name]["size"] = size

    def _qom_set(self, path: str, property: str, value: str) -> None:
        short = path.removeprefix("/machine/peripheral/")
        device = path if path in self.devices else short
        if property != "drive" or device not in self.devices or value not in self.nodes:
            raise self._error("qom-set", f"no '{path}' or '{value}'")
        self.devices[device] = value

    # -- bitmaps and exports ------------------------------------------------------------

    def _block_dirty_bitmap_add(
        self, node: str, name: str, granularity: int, persistent: bool, disabled: bool
    ) -> None:
        assert not persistent
        if name in self.bitmaps.setdefault(node, {}):
            raise self._error("block-dirty-bitmap-add", f"Bitmap already exists: {name}")
        self.bitmaps[node][name] = {"recording": not disabled, "granularity": granularity}

    def _block_dirty_bitmap_remove(self, node: str, name: str) -> None:
        if name not in self.bitmaps.get(node, {}):
            raise self._error("block-dirty-bitmap-remove", f"Dirty bitmap '{name}' not found")
        del self.bitmaps[node][name]

    def _block_dirty_bitmap_merge(self, node: str, target: str, bitmaps: list[str]) -> None:
        if target not in self.bitmaps[node] or bitmaps[0] not in self.bitmaps[node]:
            raise self._error("block-dirty-bitmap-merge", "Dirty bitmap not found")

    def _nbd_server_start(self, addr: dict[str, Any]) -> None:
        if self.server is not None:
            raise self._error("nbd-server-start", "NBD server already running")
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(addr["data"]["path"])
        self.server.listen(8)

    def _nbd_server_stop(self) -> None:
        if self.server is None:
            raise self._error("nbd-server-stop", "NBD server not running")
        path = self.server.getsockname()
        self.server.close()
        self.server = None
        self.exports.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _block_export_add(self, id: str, **options: Any) -> None:
        if self.server is None or id in self.exports:
            raise self._error("block-export-add", "NBD server not running")
        self.exports[id] = options
