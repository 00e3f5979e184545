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

"""Loading of plug-ins (stevedore), with errors that name the option to correct."""

from __future__ import annotations

from typing import TypeVar

from stevedore import driver

from nova_pmt import exception

T = TypeVar("T")


def load_class(namespace: str, name: str, contract: type[T]) -> type[T]:
    """The class that a plug-in brings.

    :param contract: what it must be a subclass of.
    :raises nova_pmt.exception.ConfigError: there is none, or it is something else.
    """
    try:
        found = driver.DriverManager(namespace, name).driver
    except Exception as error:  # stevedore raises its own, and whatever the import raises
        raise exception.ConfigError(
            f"plug-in '{name}' of {namespace} cannot be loaded: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, contract)):
        raise exception.ConfigError(f"plug-in '{name}' of {namespace} is not a {contract.__name__}")
    return found
