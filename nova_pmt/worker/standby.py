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

"""The standby worker: a waiting domain, its image, and the decision to go on.

One thread. It listens for its primary, takes checkpoints in, and when the primary is lost asks the
arbiter: won, it loads the last committed state into its QEMU and runs; lost, it ends its domain.

Its disks' images are written by a qemu-storage-daemon of ours while the waiting QEMU has them open
but inactive; it is ended before the state is loaded, because that makes them QEMU's. Images of a
pair that broke stay, with a record of the checkpoint that they are at.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

import libvirt
from oslo_log import log

from nova_pmt import exception, faultpoint
from nova_pmt.agent.control import Lines, StandbySpec
from nova_pmt.arbiter.load import load as load_arbiter
from nova_pmt.checkpoint.cache import SlabCache
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.layout import Layout, TrackedBlock
from nova_pmt.guest.vmstate import check_device_state
from nova_pmt.replication import packing, protocol, tls
from nova_pmt.replication.link import Buffers, Link, RawFrame, read_frame
from nova_pmt.replication.protocol import Header, Type
from nova_pmt.replication.receiver import PARTS, Disks, Receiver
from nova_pmt.standby import activation, domainxml
from nova_pmt.standby.disks import StandbyDisks
from nova_pmt.standby.image import StandbyImage
from nova_pmt.standby.images import standby_disks
from nova_pmt.standby.journal import Journal, NoDisks
from nova_pmt.standby.settle import settle
from nova_pmt.worker import io
from nova_pmt.worker.side import Side

LOG = log.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
STATS_EVERY_S = 0.5
ARBITER_RETRY_S = 0.5
STAGING_EXTRA_BYTES = 64 << 20


class _Cancelled(Exception):
    """The primary goes on without us.

    :param keep: the images are of use for the next synchronisation.
    """

    def __init__(self, reason: str, *, keep: bool = True) -> None:
        super().__init__(reason)
        self.keep = keep


class _GoOn(Exception):
    """This side may have to go on.

    :param certain: nobody waits for a primary that lives to claim first.
    :param stopped: the primary said itself that its guest is gone, or stands still.
    """

    def __init__(self, reason: str, *, certain: bool, stopped: bool) -> None:
        super().__init__(reason)
        self.certain, self.stopped = certain, stopped


class Standby(Side):
    """See the module's text."""

    def __init__(self, conf: Any, spec: StandbySpec, agent: socket.socket, lines: Lines) -> None:
        self._conf = conf
        self._spec = spec
        self._pair = spec.pair
        self._layout = Layout(tuple(TrackedBlock.from_dict(block) for block in spec.layout))
        self._selector = selectors.DefaultSelector()
        self.agent = io.AgentChannel(agent, lines, self._on_command, self._on_agent_gone)
        self._arbiter = load_arbiter(conf)
        self._link: Link | None = None
        self._receiver: Receiver | None = None
        self._disk_specs = [DiskSpec.from_dict(disk) for disk in spec.disks]
        self._disks: StandbyDisks | None = None
        self._head = b""
        self._protected = False

    # -- frames from the primary --------------------------------------------------------

    def buffers(self, header: Header) -> Buffers:
        """Where a payload goes."""
        assert self._receiver is not None
        if header.type in PARTS:
            return self._receiver.buffers(header)
        return [memoryview(bytearray(header.length))]

    def frame(self, header: Header, payload: Buffers) -> None:
        """A frame from the primary is complete."""
        assert self._receiver is not None
        kind = header.type
        if kind in PARTS:
            self._receiver.frame(header, payload)
        elif kind is Type.COMMIT:
            if not self._head:
                raise exception.ProtocolMismatch("primary sent a commit before the prelude")
            self._receiver.commit(header, payload[0])
            if not self._protected:
                self._protected = True
                self._state("protected", "first checkpoint committed", epoch=header.epoch)
        elif kind is Type.PRELUDE:
            self._head = bytes(payload[0])
        elif kind is Type.BYE:
            data = protocol.unpack_json(payload[0])
            raise _Cancelled(
                str(data.get("reason", "no reason")), keep=data.get("keep", True) is True
            )
        elif kind is Type.COPY:
            self._begin_copy(protocol.unpack_json(payload[0]).get("full") is not False)
        elif kind is Type.GUEST_DIED:
            reason = str(protocol.unpack_json(payload[0]).get("reason", ""))
            raise _GoOn(reason, certain=True, stopped=True)
        elif kind is Type.SWITCHOVER:
            if header.epoch != self._receiver.committed:
                raise exception.ProtocolMismatch(
                    f"switchover at checkpoint {header.epoch}, have {self._receiver.committed}"
                )
            raise _GoOn("planned switchover", certain=True, stopped=True)
        elif kind is not Type.HEARTBEAT:
            raise exception.ProtocolMismatch(f"primary sent a {kind.name} frame")

    def _begin_copy(self, full: bool) -> None:
        if self._disks is None or self._receiver is None or self._receiver.committed:
            raise exception.ProtocolMismatch("primary sent a COPY frame at the wrong time")
        if full:
            self._disks.recreate()
        else:
            self._disks.reuse()
        self._disks.open()

    def _acknowledge(self, epoch: int, receipt: int) -> None:
        assert self._link is not None
        self._link.in_earnest()
        self._link.send(RawFrame(Header(Type.COMMITTED, 0, epoch, receipt).pack()))
        self._link.flush()

    # -- the agent ----------------------------------------------------------------------

    def _on_command(self, message: dict[str, Any]) -> None:
        command = message.get("command")
        if command == "unprotect":
            raise _Cancelled("on request", keep=False)
        if command == "takeover":
            raise _GoOn("ordered by the operator", certain=True, stopped=False)
        LOG.warning("%s: agent sent unknown command %r", self._pair.uuid, command)

    def _on_agent_gone(self) -> None:
        if self._link is not None:
            with contextlib.suppress(exception.PeerError):
                self._link.send(
                    RawFrame(
                        protocol.pack_json(Type.BYE, {"reason": "the standby's agent has ended"})
                    )
                )
                self._link.flush()
        raise _Cancelled("nova-pmt-agent has ended")

    # -- life ---------------------------------------------------------------------------

    def run(self) -> int:
        """Wait, and go on or end. Returns the process's exit status."""
        with contextlib.ExitStack() as stack:
            try:
                connection = guest_domain.connect(self._conf.guest.libvirt_uri)
                stack.callback(connection.close)
                self._create_disks(stack)
                self._domain = self._create_domain(connection)
            except exception.PmtError as error:
                self._put_away_disks(keep=True)
                self._end_with_error(error)
                return 0
            try:
                self._wait(stack)
            except _Cancelled as reason:
                self._cancel(str(reason), "cancelled", keep=reason.keep)
            except _GoOn as order:
                self._go_on(order)
            except exception.PeerError as error:
                if self._receiver is not None and self._receiver.committed and _silent(error):
                    self._go_on(_GoOn(error.message, certain=False, stopped=False))
                else:
                    self._refuse(error)
            except Exception as error:
                LOG.exception("%s: standby failed", self._pair.uuid)
                self._refuse(
                    error
                    if isinstance(error, exception.PmtError)
                    else exception.GuestError(f"{type(error).__name__}: {error}")
                )
        return 0

    def _refuse(self, error: exception.PmtError) -> None:
        """Tell the primary what was wrong, and end; it claims and goes on alone."""
        if self._link is not None:
            with contextlib.suppress(exception.PeerError):
                self._link.send(RawFrame(protocol.pack_json(Type.ERROR, error.to_dict())))
                self._link.flush()
        self.agent.tell("error", error=error.to_dict())
        self._cancel(error.message, "cancelled")

    def _cancel(self, reason: str, state: str, *, keep: bool = True) -> None:
        with contextlib.suppress(exception.GuestError):
            self._domain.destroy()
        if self._link is not None:
            with contextlib.suppress(exception.PeerError):
                self._link.send(RawFrame(protocol.pack_json(Type.BYE, {"reason": reason})))
                self._link.flush()
        self._put_away_disks(keep)  # may wait for the disk below, for seconds
        self._state(state, reason)

    def _create_disks(self, stack: contextlib.ExitStack) -> None:
        """Images for the domain to start with: those of last time, or empty ones.

        :raises nova_pmt.exception.PmtError: they cannot be made; what was there is untouched.
        """
        if not self._disk_specs:
            return
        disks = standby_disks(self._conf, self._pair.uuid, self._disk_specs)
        for refusal in disks.check():
            raise refusal
        disks.create()
        self._disks = stack.enter_context(disks)

    def _put_away_disks(self, keep: bool) -> None:
        """The images stay, with a note of what they hold, or go."""
        if self._disks is None:
            return
        committed = self._receiver.committed if self._receiver is not None else 0
        try:
            if keep and committed:
                self._disks.close(self._pair.generation, committed)
            elif not keep or not self._disks.kept:
                self._disks.remove()
        except (exception.PmtError, OSError) as error:
            LOG.warning("%s: images of its disks: %s", self._pair.uuid, error)

    def _create_domain(self, connection: libvirt.virConnect) -> guest_domain.Domain:
        path = domainxml.monitor_path(guest_domain.qmp_directory(self._conf), self._pair.uuid)
        mark = domainxml.read_mark(self._spec.domain_xml)
        xml = domainxml.standby_xml(
            self._spec.domain_xml,
            path,
            domainxml.Mark(
                self._pair.generation,
                self._pair.primary_host,
                mark.persistent if mark else False,
            ),
        )
        try:
            handle = connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        except libvirt.libvirtError as error:
            raise exception.GuestError(
                f"libvirt cannot start the standby domain: {error}",
                code="STANDBY_NOT_STARTED",
                cure="Look at the log of QEMU on the standby host; both hosts need the same QEMU "
                "machine types, CPU features and networks.",
            ) from error
        return guest_domain.Domain(connection, handle)

    def _wait(self, stack: contextlib.ExitStack) -> None:
        """Serve the primary. Left by an exception that says how it ended."""
        conf = self._conf
        pid = self._domain.pid()
        self._directory = guest_domain.guest_directory(
            conf.guest.runtime_directory, self._pair.uuid, pid
        )
        self._monitor = stack.enter_context(self._domain.monitor(conf.guest.runtime_directory))
        status = self._monitor.execute("query-status")["status"]
        if status != "inmigrate":
            raise exception.GuestError(f"the standby's QEMU is '{status}', not 'inmigrate'")
        image = stack.enter_context(StandbyImage(self._layout, pid))
        self._image = image
        staging = SlabCache(self._layout.page_count * 4096 + STAGING_EXTRA_BYTES)
        stack.callback(staging.close)
        self._receiver = Receiver(
            image, self._journal(), staging, self._acknowledge, check_device_state, self._breathe
        )
        listener = stack.enter_context(self._listen())
        self.agent.tell(
            "ready",
            address=conf.replication.listen_address,
            port=listener.getsockname()[1],
        )
        # Here and not when the primary is lost: a first question to it may take a connection.
        threading.Thread(target=self._arbiter.warm, name="warm-arbiter", daemon=True).start()
        sock = self._accept(listener)
        listener.close()
        self._link = Link(
            sock,
            self,
            peer=self._pair.primary_host,
            heartbeat_s=conf.replication.heartbeat_ms / 1e3,
            timeout_s=conf.replication.peer_timeout_ms / 1e3,
        )
        stack.callback(self._link.close)
        self._link.register(self._selector)
        self.agent.register(self._selector)
        io.watch_process(self._selector, pid, self._on_qemu_end)
        self._state("syncing", f"first synchronisation from {self._pair.primary_host}")
        next_stats = time.monotonic() + STATS_EVERY_S
        while True:
            io.dispatch(self._selector, max(0.001, min(0.1, self._link.tick())))
            if time.monotonic() >= next_stats:
                next_stats = time.monotonic() + STATS_EVERY_S
                self._tell_stats()

    def _journal(self) -> Disks:
        if self._disks is None:
            return NoDisks()
        return Journal(self._disks, self._disk_specs, self._breathe)

    def _breathe(self) -> None:
        """Say that we live, in the middle of other work, which a lost peer must not cut short."""
        if self._link is not None:
            with contextlib.suppress(exception.PeerError):
                self._link.tick()
                self._link.flush(0.0)

    def _tell_stats(self) -> None:
        if self._link is not None and self._receiver is not None:
            self.agent.tell(
                "stats", received_bytes=self._link.received_bytes, **self._receiver.summary()
            )

    def _on_qemu_end(self) -> None:
        raise exception.GuestError("the standby's QEMU has ended")

    def _listen(self) -> socket.socket:
        address = self._conf.replication.listen_address
        first, _, last = self._conf.replication.port_range.partition(":")
        error: OSError | None = None
        for port in range(int(first), int(last or first) + 1):
            try:
                return socket.create_server((address, port), backlog=4)
            except OSError as reason:
                error = reason
        raise exception.ConfigError(
            f"no port of [replication] port_range {first}:{last} is free on {address}: {error}"
        )

    def _accept(self, listener: socket.socket) -> socket.socket:
        """Wait for our primary; whoever else comes is told why not, and we wait on."""
        deadline = time.monotonic() + self._conf.replication.connect_timeout_s
        self.agent.register(self._selector)
        self._selector.register(listener, selectors.EVENT_READ, None)
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise exception.PeerLost("the primary did not connect in time")
                for key, mask in self._selector.select(left):
                    if key.fileobj is not listener:
                        key.data(mask)
                        continue
                    sock, peer = listener.accept()
                    try:
                        return self._handshake(sock)
                    except exception.PeerError as error:
                        LOG.warning("%s: refused %s: %s", self._pair.uuid, peer, error)
                        self.agent.tell("error", error=error.to_dict())
                        sock.close()
        finally:
            self._selector.unregister(listener)
            self.agent.unregister()

    def _handshake(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = tls.accept(self._conf, sock, self._pair.primary_host)
        try:
            header, payload = read_frame(sock)
            if header.type is not Type.HELLO:
                raise exception.ProtocolMismatch(f"first frame is {header.type.name}, not HELLO")
            hello = protocol.unpack_json(payload)
            protocol.check_hello(
                hello,
                asdict(self._pair),
                [block.to_dict() for block in self._layout.blocks],
                self._spec.disks,
            )
            codec = packing.first_of(protocol.offered_codecs(hello))
            assert self._receiver is not None
            self._receiver.codec = codec[1] if codec is not None else None
            answer = {
                "protocol": protocol.VERSION,
                "images": self._kept_images(),
                "codec": codec[0] if codec is not None else None,
            }
            sock.sendall(protocol.pack_json(Type.WELCOME, answer))
        except exception.PeerError as error:
            with contextlib.suppress(OSError):
                sock.sendall(protocol.pack_json(Type.ERROR, error.to_dict()))
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise tls.refused(error, self._pair.primary_host) from error
        return sock

    def _kept_images(self) -> dict[str, int] | None:
        """Which checkpoint the images of last time are at."""
        if self._disks is None or self._disks.kept is None:
            return None
        generation, epoch = self._disks.kept
        return {"generation": generation, "epoch": epoch}

    # -- going on -----------------------------------------------------------------------

    def _go_on(self, order: _GoOn) -> None:
        """Claim, load the last committed state, run."""
        reason = str(order)
        assert self._receiver is not None
        assert self._link is not None
        detected = time.monotonic()
        faultpoint.reach("failover.detected")
        self._receiver.discard()
        if not self._receiver.committed:
            self._cancel(f"{reason}; nothing was committed yet", "cancelled")
            return
        self._state("failing_over", reason, detected_at=detected)
        planned = reason == "planned switchover"
        try:
            faultpoint.reach("failover.disks")
            if self._disks is not None:
                self._disks.release()
            released = time.monotonic()
            # Loading takes a few ms and decides nothing: do it while a living primary may claim.
            activation.load(
                self._monitor,
                self._directory,
                self._head,
                self._image.side,
                self._receiver.device_state,
            )
            loaded = time.monotonic()
            faultpoint.reach("failover.loaded")
        except (exception.GuestError, exception.PeerError) as error:
            self._refuse(error)
            return
        if not order.certain:
            left = self._conf.replication.claim_delay_ms / 1e3 - (time.monotonic() - detected)
            time.sleep(max(0.0, left))
        if not self._claim(order):
            self._cancel(f"{reason}; but the primary goes on", "cancelled")
            return
        claimed = time.monotonic()
        faultpoint.reach("failover.claimed")
        try:
            self._resume()
        except exception.GuestError as error:
            # We won, so nobody else may run. The agent tries again; the domain stays for it.
            self._end_with_error(error)
            return
        running = time.monotonic()
        faultpoint.reach("failover.resumed")
        if self._disks is not None:
            self._disks.became_primary()
        times = {
            "epoch": self._receiver.committed,
            "planned": planned,
            "detected_at": detected,
            "running_at": running,
            "disks_ms": round((released - detected) * 1e3, 2),
            "load_ms": round((loaded - released) * 1e3, 2),
            "claim_ms": round((claimed - loaded) * 1e3, 2),
            "resume_ms": round((running - claimed) * 1e3, 2),
            "failover_ms": round((running - detected) * 1e3, 2),
        }
        with contextlib.suppress(exception.PeerError):
            self._link.send(RawFrame(protocol.pack_json(Type.ACTIVATED, times)))
            self._link.flush()
        try:
            settle(self._domain, self._monitor)
        except exception.GuestError as error:
            LOG.warning("%s: %s", self._pair.uuid, error)
        self._state("standby_active", reason, **times)
        if self._disks is not None:
            try:
                self._disks.sync()
            except exception.DiskImageError as error:
                LOG.error("%s: %s", self._pair.uuid, error)

    def _resume(self) -> None:
        """Through libvirt; but a libvirtd that is away must not keep the guest from going on."""
        try:
            self._domain.resume()
        except exception.GuestError as error:
            LOG.warning("%s: %s; asking QEMU itself", self._pair.uuid, error)
            self._monitor.execute("cont")

    def _claim(self, order: _GoOn) -> bool:
        """Ask the arbiter until it answers: a side that cannot ask does not go on."""
        told = False
        while True:
            try:
                return self._arbiter.claim(
                    self._pair.uuid,
                    self._pair.generation,
                    "standby",
                    reason=str(order),
                    other_stopped=order.stopped,
                )
            except exception.ArbiterUnavailable as error:
                if not told:
                    told = True
                    LOG.error("%s: cannot go on: %s", self._pair.uuid, error)
                    self.agent.tell("error", error=error.to_dict())
                self._tell_stats()  # so that the agent knows that we live
                time.sleep(ARBITER_RETRY_S)


def _silent(error: exception.PeerError) -> bool:
    """Whether the primary was lost, rather than found to be talking nonsense."""
    return isinstance(error, exception.PeerLost)
