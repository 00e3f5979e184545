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

"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from typing import Any

from nova_pmt import exception


def figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of so many inches; the same figures make the same file.

    :raises nova_pmt.exception.ConfigError: there is no matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise exception.ConfigError(
            "plots need matplotlib, which is not installed", cure="pip install matplotlib"
        ) from error
    mpl.rcParams["svg.hashsalt"] = "nova-pmt"
    return Figure(figsize=(width, height), layout="constrained")
