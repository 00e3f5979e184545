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

"""Brings a database's tables to what this release needs."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from nova_pmt import exception

_SCRIPTS = Path(__file__).with_name("migrations")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    return config


def head() -> str:
    """The revision that this release needs."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def current(engine: sa.Engine) -> str | None:
    """The database's revision; None before the first :func:`upgrade`."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Make or change the tables. Nothing happens when they are as needed.

    :raises nova_pmt.exception.ConfigError: they are newer.
    """
    config = _config()
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    except CommandError as error:
        raise exception.ConfigError(
            f"the database is at a revision that this release does not know: {error}",
            cure="Install the release that made it, or a newer one; tables do not go back.",
        ) from error


def check(engine: sa.Engine) -> None:
    """Refuse to work on other tables than this release's.

    :raises nova_pmt.exception.ConfigError: they are older or newer.
    """
    found, needed = current(engine), head()
    if found != needed:
        raise exception.ConfigError(
            f"the database is at revision {found or 'none'}, and this release needs {needed}",
            cure="Run 'nova-pmt-manage db sync' with this release, once, then start the managers.",
        )
