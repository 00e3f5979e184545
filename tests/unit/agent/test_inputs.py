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

"""What comes in from outside is bounded and of the right kind, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from nova_pmt.agent import inputs
from nova_pmt.exception import InvalidInput
from tests.unit.agent.rig import DISK, NAME, UUID, Rig

PAIR = {
    "uuid": UUID, "name": NAME, "generation": 1, "primary_host": "b", "standby_host": "a",
}  # fmt: skip


@pytest.mark.parametrize("value", ["web1", "instance-00000001", "ü name", UUID, "a" * 255])
def test_domains_are_names_or_uuids(value: str) -> None:
    assert inputs.domain(value) == value


def test_uuids_are_lower_case_everywhere() -> None:
    assert inputs.domain(UUID.upper()) == UUID
    assert inputs.uuid(UUID.upper()) == UUID


@pytest.mark.parametrize("value", ["", "a" * 256, "a/b", "a\nb", "\x1b[2J", None, 7, ["a"]])
def test_other_domains_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.domain(value)


@pytest.mark.parametrize("value", ["", "-a", "a b", "a/..", "a" * 254, "host\n", None, "[::1]"])
def test_other_host_names_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.host(value)


@pytest.mark.parametrize("value", ["compute1", "compute-1.example.org", "A", "node_7"])
def test_host_names(value: str) -> None:
    assert inputs.host(value) == value


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        (None, {}),
        ({"interval_ms": 20}, {"interval_ms": 20}),
        ({"interval_ms": 20.0, "passes": 0}, {"interval_ms": 20, "passes": 0}),
        ({"max_pause_ms": 3}, {"max_pause_ms": 3.0}),
    ],
)
def test_options_are_taken_in_their_own_type(options: Any, checked: Any) -> None:
    found = inputs.options(options)
    assert found == checked
    assert [type(v) for v in found.values()] == [type(v) for v in checked.values()]


@pytest.mark.parametrize(
    "options",
    [
        {"interval_ms": 4},
        {"interval_ms": 10_001},
        {"interval_ms": 20.5},
        {"interval_ms": "20"},
        {"interval_ms": True},
        {"max_pause_ms": float("nan")},
        {"max_pause_ms": float("inf")},
        {"cache_limit_mib": 7},
        {"passes": 9},
        {"pipeline_depth": 2},
        {7: 7},
        "interval_ms=20",
        [1],
    ],
)
def test_other_options_are_refused(options: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.options(options)


def test_an_unknown_strategy_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidInput) as refused:
        inputs.strategy("kemari", frozenset({"pmt"}))
    assert "pmt" in refused.value.cure


@pytest.mark.parametrize("value", [0, -1, 1 << 60, 1.5, "7", True, None])
def test_generations_are_bounded_whole_numbers(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.generation(value)


@pytest.mark.parametrize("value", [[], {}, [1], [{}] * 5000, None])
def test_layouts_are_lists_of_blocks(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.layout(value)


def disk(**changes: Any) -> dict[str, Any]:
    return {**DISK, **changes}


@pytest.mark.parametrize("value", [None, []])
def test_a_guest_may_have_no_disks(value: Any) -> None:
    assert inputs.disks(value) == []


def test_disks_are_taken_as_they_are_and_in_their_order() -> None:
    given = [
        disk(),
        disk(name="sda", path="/b c.qcow2", format="qcow2", size=512, cluster_bytes=65536),
        disk(name="hda", path="/c", readonly=True, size=1 << 60),
    ]
    assert inputs.disks(given) == given
    without = {key: value for key, value in DISK.items() if key != "readonly"}
    assert inputs.disks([without]) == [DISK]
    many = [disk(name=f"vd{n}", path=f"/{n}") for n in range(inputs.MAX_DISKS)]
    assert inputs.disks(many) == many


@pytest.mark.parametrize(
    "value",
    [
        {},
        "vda",
        7,
        [7],
        ["vda"],
        [None],
        [{}],
        [[]],
        [disk(surprise=1)],
        [{**disk(), 7: 7}],
        [disk(name=None)],
        [disk(name=7)],
        [disk(path="vda.raw")],
        [disk(path="")],
        [disk(path=None)],
        [disk(path=["/a"])],
        [disk(format="vmdk")],
        [disk(format=["raw"])],
        [disk(size=0)],
        [disk(size=-512)],
        [disk(size=(1 << 60) + 1)],
        [disk(size="512")],
        [disk(size=512.0)],
        [disk(size=None)],
        [disk(cluster_bytes=1000)],
        [disk(cluster_bytes=1 << 30)],
        [disk(cluster_bytes=None)],
        [disk(readonly="no")],
        [disk(readonly=None)],
        [disk(), disk()],
        [disk(), disk(path="/other")],
        [disk(), disk(name="vdb")],
        [disk(name=f"vd{n}", path=f"/{n}") for n in range(inputs.MAX_DISKS + 1)],
    ],
)
def test_other_disks_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.disks(value)


@pytest.mark.parametrize(
    "value",
    [
        disk(path="/a\0b"),
        disk(path="/a\nb"),
        disk(path="/" + "a" * 5000),
        disk(name=""),
        disk(name="a" * 5000),
        disk(name="v/da"),
        disk(name="vd\x1b[2Ja"),
        disk(size=True),
    ],
    ids=["NUL", "newline", "long path", "no name", "long name", "slash", "escape", "bool"],
)
def test_names_and_paths_of_disks_are_bounded_and_clean(value: Any) -> None:
    """They go to files, terminals and logs; a path with a NUL is no typed error otherwise."""
    with pytest.raises(InvalidInput):
        inputs.disks([value])


def test_a_refusal_does_not_repeat_what_was_sent_at_length() -> None:
    with pytest.raises(InvalidInput) as refused:
        inputs.disks([disk(format="x" * 100_000)])
    assert len(refused.value.message) < 2000


@pytest.mark.parametrize("value", ["", "x" * ((1 << 20) + 1), None, 7])
def test_the_xml_is_bounded(value: Any) -> None:
    with pytest.raises(InvalidInput):
        inputs.domain_xml(value)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("protect", {"domain": "a/b", "standby_host": "b"}),
        ("protect", {"domain": "web1", "standby_host": "b c"}),
        ("protect", {"domain": "web1", "standby_host": "b", "strategy": "none"}),
        ("protect", {"domain": "web1", "standby_host": "b", "options": {"x": 1}}),
        ("protect", {"domain": "web1", "standby_host": "b", "surprise": 1}),
        ("protect", {"domain": "web1"}),
        ("failover", {"domain": "web1", "force": "yes"}),
        ("status", {"domain": 7}),
        ("release_standby", {"uuid": "x", "generation": 1}),
        ("release_standby", {"uuid": UUID, "generation": "1"}),
        ("prepare_standby", {"pair": 7, "domain_xml": "<domain/>", "layout": [{}]}),
        ("prepare_standby", {"pair": {}, "domain_xml": "<domain/>", "layout": [{}]}),
        ("prepare_standby", {"pair": PAIR, "domain_xml": "<domain/>", "layout": [{}],
                             "disks": [{"name": "vda"}]}),
        ("check_standby", {"uuid": UUID, "memory_bytes": 1, "arbiter_token": "t",
                           "primary_host": "a", "disks": ["vda"]}),
        ("check_standby", {"uuid": UUID, "memory_bytes": -1, "arbiter_token": "t",
                           "primary_host": "a"}),
    ],
)  # fmt: skip
def test_an_agent_refuses_bad_input_over_rpc_and_changes_nothing(
    rig: Rig, method: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput):
        rig.api._call("a", method, 2, **arguments)
    assert rig.a.state() is None
    assert rig.a.recorder.events == []
