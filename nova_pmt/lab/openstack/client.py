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
"""openstacksdk for a process outside of the lab: its connections start in ctl."""

from __future__ import annotations

import socket
from typing import Any

import openstack
import openstack.connection
from keystoneauth1 import session as sessions
from keystoneauth1.identity import v3
from requests import Session
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, PoolManager
from urllib3.connection import HTTPConnection

from nova_pmt.lab.host import LabHost
from nova_pmt.lab.openstack import settings
from nova_pmt.lab.openstack.settings import Account


class _Adapter(HTTPAdapter):
    """Lets a host of the lab make the connections."""

    def __init__(self, host: LabHost) -> None:
        self._host = host
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        host = self._host

        class Connection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return host.dial(self.host, self.port, 120)

        class Pool(HTTPConnectionPool):
            ConnectionCls = Connection

        self.poolmanager = PoolManager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": Pool}


def connect(host: LabHost, account: Account) -> openstack.connection.Connection:
    """A connection to all services as ``account``, from inside ``host``."""
    requests = Session()
    requests.trust_env = False  # no proxies
    requests.mount("http://", _Adapter(host))
    options = account.options()
    auth = v3.Password(
        auth_url=options["auth_url"],
        username=account.name,
        password=account.password,
        project_name=options["project_name"],
        user_domain_id="default",
        project_domain_id="default",
    )
    return openstack.connection.Connection(
        session=sessions.Session(auth=auth, session=requests),
        region_name=settings.REGION,
        compute_default_microversion="2.94",
    )
