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

"""The sample configuration that is checked in has our options as they are."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from oslo_config import cfg, generator

from nova_pmt.conf import opts

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "etc/nova_pmt/nova-pmt.conf.sample"
OURS = [group if isinstance(group, str) else group.name for group, _ in opts.list_opts()]


def blocks(text: str) -> dict[str, list[str]]:
    """Group to its paragraphs, without the titles of namespaces."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^(?=\[)", text, flags=re.MULTILINE):
        head, _, body = section.partition("\n")
        found[head.strip("[]")] = [
            part.strip("\n")
            for part in re.split(r"\n\n+", body)
            if part.strip() and not part.startswith("#\n# From ")
        ]
    return found


@pytest.fixture(scope="module")
def generated() -> dict[str, list[str]]:
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(["--namespace", "nova_pmt", "--wrap-width", "80"], default_config_files=[])
    output = io.StringIO()
    generator.generate(conf, output_file=output)
    return blocks(output.getvalue())


@pytest.mark.parametrize("group", OURS)
def test_the_sample_is_current(generated: dict[str, list[str]], group: str) -> None:
    sample = blocks(SAMPLE.read_text()).get(group, [])
    assert generated[group]
    if group == "DEFAULT":  # shared with oslo.log and oslo.messaging
        assert [block for block in generated[group] if block not in sample] == [], "make genconfig"
    else:
        assert sample == generated[group], "make genconfig"


def test_nothing_in_the_sample_is_set() -> None:
    lines = SAMPLE.read_text().splitlines()
    assert [line for line in lines if line and line[0] not in "#["] == []
