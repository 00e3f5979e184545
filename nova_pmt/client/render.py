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

"""What operators see: tables made from what agents answered. Pure functions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

_STYLES = {
    "protected": "green",
    "syncing": "cyan",
    "reprotecting": "cyan",
    "waiting": "cyan",
    "starting": "cyan",
    "checking": "cyan",
    "standby_active": "magenta",
    "failing_over": "magenta",
    "primary_alone": "yellow",
    "undecided": "bold red",
    "error": "bold red",
}
_MIB = 1 << 20


def clean(value: Any) -> str:
    """Text that cannot steer the terminal: names and reasons come from elsewhere."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def cell(value: Any, style: str = "") -> Text:
    """Text as it is: square brackets are no markup."""
    return Text(clean("-" if value is None or value == "" else value), style=style)


def state(name: str) -> Text:
    return cell(name, _STYLES.get(name, ""))


def moment(at: float) -> str:
    """Local time of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def number(data: Mapping[str, Any] | None, *path: str, digits: int = 1) -> str:
    """A number inside nested dictionaries, ``-`` when it is not there."""
    found: Any = data
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return "-"
    return f"{found:.{digits}f}" if isinstance(found, float) else str(found)


def rate(stats: Mapping[str, Any] | None) -> str:
    """MB/s on the wire."""
    found = (stats or {}).get("bytes_per_s")
    return f"{found / 1e6:.1f}" if isinstance(found, (int, float)) else "-"


def short_table(pairs: Iterable[Mapping[str, Any]]) -> Table:
    """``nova-pmt list``."""
    table = _table("SERVER", "UUID", "HOST", "ROLE", "STATE", "PRIMARY", "STANDBY", "SINCE")
    for pair in pairs:
        table.add_row(
            cell(pair["name"]),
            cell(pair["uuid"]),
            cell(pair["host"]),
            cell(pair["role"]),
            state(pair["state"]),
            cell(pair["primary_host"]),
            cell(pair["standby_host"]),
            cell(moment(pair["since"])),
        )
    return table


def pairs_table(pairs: Iterable[Mapping[str, Any]]) -> Table:
    """``nova-pmt pairs``: as the managers remember them. Who has won has no standby."""
    table = _table("SERVER", "UUID", "STATE", "RUNS ON", "STANDBY", "SINCE", "REASON")
    for pair in pairs:
        table.add_row(
            cell(pair["name"]),
            cell(pair["uuid"]),
            state(pair["state"]),
            cell(pair["active_host"]),
            cell(None if pair["winner"] else pair["standby_host"]),
            cell(moment(pair["changed_at"])),
            cell(_why(pair)),
        )
    return table


def _why(pair: Mapping[str, Any]) -> str:
    """Also what managers say of a server of Nova: the step of its failover, or what it lacks."""
    nova = pair.get("nova") or {}
    step = nova.get("step")
    said = (pair["reason"], f"Nova is told of it: {step}" if step else "", nova.get("reason"))
    return "; ".join(dict.fromkeys(str(one) for one in said if one))


def hosts_table(hosts: Iterable[Mapping[str, Any]]) -> Table:
    """``nova-pmt hosts``."""
    table = _table("HOST", "STATE", "GUESTS", "STANDBYS", "FREE MiB", "CPU", "HEARD", "REMARK")
    for host in hosts:
        facts = host.get("facts") or {}
        shown = cell("alive", "green") if host["alive"] else cell("dead", "bold red")
        if host["maintenance"]:
            shown.append(" maintenance", "yellow")
        free = facts.get("memory_free_bytes")
        table.add_row(
            cell(host["name"]),
            shown,
            cell(host["primaries"]),
            cell(host["standbys"]),
            cell(int(free) // _MIB if isinstance(free, (int, float)) else None),
            cell(facts.get("cpu_model")),
            cell(moment(host["seen_at"])),
            cell(facts.get("error")),
        )
    return table


def events_table(events: Iterable[Mapping[str, Any]]) -> Table:
    """``nova-pmt events``."""
    table = _table("AT", "SERVER", "GENERATION", "HOST", "WHAT", "CHANGE", "REASON")
    for event in events:
        table.add_row(*(cell(value) for value in _event(event)))
    return table


def event_line(event: Mapping[str, Any]) -> str:
    """``nova-pmt events --watch``."""
    return "  ".join(str(value) for value in _event(event) if value)


def _event(event: Mapping[str, Any]) -> tuple[Any, ...]:
    change = f"{event['old']} -> {event['new']}" if event["old"] else event["new"]
    return (
        moment(event["at"]),
        event["pair_uuid"],
        event["generation"] or None,
        event["host"],
        event["kind"],
        change,
        event["reason"],
    )


def status_table(pair: Mapping[str, Any]) -> Table:
    """One pair in full, as its host sees it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(pair):
        table.add_row(cell(name), value if isinstance(value, Text) else cell(value))
    return table


def _facts(pair: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    stats = pair.get("stats")
    yield "server", f"{pair['name']} ({pair['uuid']})"
    yield "host", f"{pair['host']} ({pair['role']})"
    yield "state", state(pair["state"])
    yield "since", moment(pair["since"])
    if pair.get("reason"):
        yield "reason", pair["reason"]
    yield from (pair.get("details") or {}).items()
    way = f"{pair['primary_host']} -> {pair['standby_host']}"
    yield "pair", f"{way}, generation {pair['generation']}"
    progress = progress_text(pair.get("progress"))
    if progress:
        yield "first synchronisation", progress
    if pair["role"] == "primary":
        yield "strategy", _strategy(pair, stats)
        yield "output commit", "yes" if pair.get("output_commit") else "no"
    if stats:
        yield from _numbers(pair["role"], stats)
    if pair.get("next_attempt_s") is not None:
        yield "next attempt", f"in {pair['next_attempt_s']:g} s ({pair['attempts']} failed)"
    error = pair.get("last_error")
    if error:
        yield "last error", f"{error['code']}: {error['message']}"
        yield "cure", error["cure"]


def _strategy(pair: Mapping[str, Any], stats: Mapping[str, Any] | None) -> str:
    words = [str(pair["strategy"])]
    words += [f"{key}={value:g}" for key, value in (pair.get("options") or {}).items()]
    if stats and stats.get("throttled"):
        words.append("(throttled: the link, or the cache, is at its limit)")
    return " ".join(words)


def _numbers(role: str, stats: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "committed", number(stats, "committed")
    if role == "standby":
        yield "received MiB", _mib(stats, "received_bytes")
        if stats.get("disks"):
            yield "written to disks MiB", _mib(stats, "disk_bytes_applied")
        yield "apply ms p50/p99", _two(stats, "apply_ms", "p50", "p99")
        yield "staging MiB", number(stats, "staging_mib")
        return
    yield "epoch", f"{number(stats, 'epoch')}, in flight {number(stats, 'in_flight')}"
    yield "interval ms", number(stats, "interval_ms")
    yield (
        "pause ms p50/p99/max",
        (f"{_two(stats, 'pause_ms', 'p50', 'p99', digits=2)}/{number(stats, 'pause_ms', 'max')}"),
    )
    yield "pages p50/in pause", _two(stats, "pages", "p50", "in_pause_p50", digits=0)
    yield "commit ms p50/p99", _two(stats, "commit_ms", "p50", "p99")
    yield "output delay ms p50/p99", _two(stats, "output_delay_ms", "p50", "p99")
    yield from _outputs(stats)
    yield "MB/s", rate(stats)
    yield (
        "cache MiB used/backed/limit",
        (f"{_two(stats, 'cache', 'used_mib', 'backed_mib')}/{number(stats, 'cache', 'limit_mib')}"),
    )
    yield "delta cache MiB", number(stats, "delta_cache_mib")
    yield "compression", _compression(stats.get("codec"))
    yield "last commit", f"{number(stats, 'last_commit_age_ms', digits=0)} ms ago"


def _compression(codec: Any) -> str:
    """What a worker's codec does to pages."""
    if not isinstance(codec, Mapping):
        return "none"
    level, left = codec.get("level"), codec.get("left")
    if level is None or not isinstance(left, (int, float)):
        return f"{codec.get('name')}: pages as they are"
    return f"{codec.get('name')} {level}: pages to {left:.0%}"


def _outputs(stats: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """A line for each NIC and each disk."""
    for nic in stats.get("network") or ():
        text = (
            f"{nic['buffer']}, holds {nic['held_bytes'] / _MIB:.2f} of "
            f"{nic['limit_bytes'] / _MIB:.0f} MiB (peak {nic['peak_bytes'] / _MIB:.2f})"
        )
        if nic["dropped_packets"]:
            text += f", full: {nic['dropped_packets']} packets dropped"
        yield f"nic {nic['mac']}", text
    for disk in stats.get("disks") or ():
        yield (
            f"disk {disk['disk']}",
            f"log {disk['log_bytes'] / _MIB:.2f} MiB (peak {disk['log_peak_bytes'] / _MIB:.2f}), "
            f"{disk['written_bytes'] / _MIB:.1f} MiB replicated",
        )


def _two(stats: Mapping[str, Any], group: str, one: str, two: str, digits: int = 1) -> str:
    return f"{number(stats, group, one, digits=digits)}/{number(stats, group, two, digits=digits)}"


def _mib(stats: Mapping[str, Any], key: str) -> str:
    found = stats.get(key)
    return f"{found / _MIB:.1f}" if isinstance(found, (int, float)) else "-"


def progress_text(progress: Mapping[str, Any] | None) -> str:
    """How far the first synchronisation is; empty when nothing is known."""
    if progress and progress.get("total_bytes"):
        done, total = int(progress.get("done_bytes", 0)), int(progress["total_bytes"])
        return (
            f"disks {min(100, 100 * done // total)} % "
            f"({done >> 20} of {total >> 20} MiB of the disks)"
        )
    if not progress or not progress.get("total_pages"):
        return ""
    done, total = int(progress.get("done_pages", 0)), int(progress["total_pages"])
    sent = float(progress.get("sent_bytes", 0)) / _MIB
    return f"{min(100, 100 * done // total)} % ({done} of {total} pages, {sent:.0f} MiB sent)"


def top_table(pairs: Iterable[Mapping[str, Any]]) -> Table:
    """``nova-pmt top``: one line for each primary."""
    table = _table("SERVER", "PRIMARY", "STANDBY", "STATE", "EPOCH")
    titles = ("PAUSE ms p50", "p99", "DELAY ms", "PAGES", "MB/s", "CACHE MiB", "LAG")
    for title in (*titles, "COMMIT ms ago"):
        table.add_column(title, justify="right", no_wrap=True)
    for pair in pairs:
        stats = pair.get("stats")
        percent = progress_text(pair.get("progress")).split(" (")[0]
        shown = state(pair["state"])
        if percent:
            shown.append(f" {percent}")
        if stats and stats.get("throttled"):
            shown.append(" throttled", "yellow")
        if stats and stats.get("dropping"):
            shown.append(" dropping", "yellow")
        table.add_row(
            cell(pair["name"]),
            cell(pair["primary_host"]),
            cell(pair["standby_host"]),
            shown,
            cell(number(stats, "epoch")),
            cell(number(stats, "pause_ms", "p50", digits=2)),
            cell(number(stats, "pause_ms", "p99", digits=2)),
            cell(number(stats, "output_delay_ms", "p50", digits=1)),
            cell(number(stats, "pages", "p50", digits=0)),
            cell(rate(stats)),
            cell(f"{number(stats, 'cache', 'used_mib')}/{number(stats, 'cache', 'limit_mib')}"),
            cell(number(stats, "in_flight")),
            cell(number(stats, "last_commit_age_ms", digits=0)),
        )
    return table


def top_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    """One line of ``top`` for programs."""
    keys = ("uuid", "name", "host", "state", "primary_host", "standby_host", "progress", "stats")
    return {key: pair.get(key) for key in keys}


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table
