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

"""Everything between guest and image, driven through its interleavings.

Whatever the order of guest writes, passes, pauses, frames, commits and failures: after commit
n the image is the guest's memory at the pause of checkpoint n, and the images of its disks are
what they were then, byte for byte.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nova_pmt import exception
from nova_pmt.replication.protocol import HEADER, PACKED, Header, Type
from tests.unit.fakes.world import World, small_slabs

#: Pages of a slab here; the cache has four slabs, the guest has more pages than that.
SLAB = 16
PAGES = 110
#: Little more than the guest has pages: what is sent again must not fill it.
STAGING = 9


class Pair(RuleBasedStateMachine):
    """A pair from its first synchronisation to the end of its link."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.over = True
        self.patch = small_slabs(SLAB)
        self.patch.__enter__()

    def teardown(self) -> None:
        self.patch.__exit__(None, None, None)

    @precondition(lambda self: self.over)
    @rule(
        seed=st.integers(0, 2**32 - 1),
        chaos=st.sampled_from((0.0, 0.01, 0.1)),
        late=st.booleans(),
        written=st.integers(0, PAGES),
        disks=st.sampled_from(((24, 60), (40,), ())),
    )
    def protect(
        self, seed: int, chaos: float, late: bool, written: int, disks: tuple[int, ...]
    ) -> None:
        self.world = World(
            PAGES,
            9,
            staging_slabs=STAGING,
            seed=seed,
            chaos=chaos,
            late_commits=late,
            disk_sectors=disks,
        )
        self.world.guest.write(range(written))
        self.world.guest.write(range(0, written, 7), zeros=True)
        self.world.synchronise()
        self.over = False

    @precondition(lambda self: not self.over)
    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), zeros=st.booleans())
    def guest_writes(self, first: int, count: int, zeros: bool) -> None:
        self.world.guest.write(range(first, min(PAGES, first + count)), zeros=zeros)

    @precondition(lambda self: not self.over)
    @rule(pages=st.lists(st.integers(0, PAGES - 1), max_size=20))
    def guest_writes_here_and_there(self, pages: list[int]) -> None:
        self.world.guest.write(sorted(set(pages)))

    @precondition(lambda self: not self.over)
    @rule(requests=st.integers(1, 4))
    def guest_writes_to_its_disks(self, requests: int) -> None:
        for _ in range(requests):
            self.world.write_disk()

    @precondition(lambda self: not self.over)
    @rule()
    def copy_pass(self) -> None:
        self.world.checkpointer.copy_pass()

    @precondition(lambda self: not self.over)
    @rule(prepared=st.booleans())
    def pause(self, prepared: bool) -> None:
        if prepared:
            self.world.checkpointer.prepare()
        checkpoint = self.world.checkpointer.capture()
        if checkpoint is not None:
            assert self.world.output.cuts[-1] == checkpoint.epoch
            self.world.checkpointer.transfer(checkpoint)

    @precondition(lambda self: not self.over)
    @rule(passes=st.integers(0, 3))
    def whole_round(self, passes: int) -> None:
        self.world.round(passes)

    @precondition(lambda self: not self.over)
    @rule(steps=st.integers(1, 40))
    def wire_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.progress()

    @precondition(lambda self: not self.over)
    @rule()
    def commit_arrives(self) -> None:
        self.world.tell_commit()
        self.world.checkpointer.pump()

    @precondition(lambda self: not self.over)
    @rule()
    def all_is_quiet(self) -> None:
        self.world.settle()
        assert self.world.checkpointer.in_flight == 0

    @precondition(lambda self: not self.over)
    @rule(keep=st.integers(0, 60_000))
    def link_breaks(self, keep: int) -> None:
        """A cut anywhere, within a frame too: what is staged is thrown away."""
        if keep:
            self.world.link.step(keep)
        self.world.link.broken = True
        self.world.standby.receiver.discard()
        assert self.world.standby.staging.used_slabs == 0
        self.over = True

    def round_and_commit(self) -> None:
        self.world.round()
        self.world.settle()

    @precondition(lambda self: not self.over)
    @rule(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), skip=st.integers(0, 5))
    def bit_flips(self, where: float, bit: int, skip: int) -> None:
        """One bit of one PAGES, LOG or COMMIT payload; no TLS."""
        flipped = []

        def flip(header: Header, frame: bytearray) -> None:
            nonlocal skip
            if flipped or header.type not in (Type.PAGES, Type.LOG, Type.COMMIT):
                return
            if skip and header.type is not Type.COMMIT:
                skip -= 1
                return
            flipped.append(header)
            frame[HEADER.size + int(where * header.length)] ^= 1 << bit

        # Another link may have begun a frame already: end it first.
        self.world.settle()
        committed = self.world.standby.receiver.committed
        self.world.link.flip = flip
        self.world.guest.write((5, 6, PAGES - 1))
        self.world.write_disk()
        try:
            self.round_and_commit()
        except exception.CheckpointCorrupt:
            assert flipped
        else:
            # Not every bit of what is compressed means something.
            assert flipped[0].flags & PACKED
            self.world.link.flip = None
            return
        assert self.world.standby.receiver.committed == committed
        self.world.link.broken = True
        self.world.standby.receiver.discard()
        self.over = True

    @invariant()
    def image_is_the_last_commit(self) -> None:
        if self.world is None:
            return
        if self.over:
            self.world.check_image()
        else:
            self.world.check()


Pair.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestPair = Pair.TestCase
