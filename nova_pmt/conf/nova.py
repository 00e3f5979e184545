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

"""Options of group ``[nova]``: which servers are protected, and how managers reach Nova."""

from oslo_config import cfg

GROUP = cfg.OptGroup("nova", title="Nova")
OPTS = [
    cfg.BoolOpt(
        "enabled",
        default=False,
        help="""
Whether managers follow Nova: they protect its servers that ask for it, keep standby servers, and
tell Nova of failovers. Needs the credentials of this group: a user with the roles ``admin`` and
``service``, in a project of its own, to which the standby servers belong.
""",
    ),
    cfg.StrOpt(
        "honour_property",
        default="allowed",
        choices=[
            ("allowed", "where the flavor says ``ft:mode=allowed``"),
            ("always", "also where the flavor says nothing of ``ft:mode``"),
            ("never", "nowhere: flavors alone decide"),
        ],
        help="""
Where the property ``ft`` of a server counts, which its owner may set at any time. A protected
server takes the room of two. Must be the same wherever Nova's API, scheduler and compute services
and the managers run.
""",
    ),
    cfg.ListOpt(
        "standby_user_id",
        default=[],
        help="""
IDs of the users whose servers may be standbys: those that the managers have had. On compute hosts
nothing is a standby without it, since anybody can write the mark of a standby to a server.
""",
    ),
    cfg.StrOpt(
        "quota_owner",
        default="service",
        choices=[
            ("service", "the managers' own project"),
            ("owner", "the project of the server, in which the managers' user needs a role"),
        ],
        help="Whose quota a standby counts in.",
    ),
    cfg.IntOpt(
        "reconcile_interval_s",
        default=60,
        min=5,
        help="""
How often managers look at all servers, in seconds. Between that they hear of changes from Nova's
notifications; one that got lost costs so much time.
""",
    ),
    cfg.StrOpt(
        "notification_topic",
        default="pmt_notifications",
        help="""
Topic of Nova's versioned notifications, for the managers alone: one of ``[notifications]
versioned_notifications_topics`` in nova.conf.
""",
    ),
    cfg.StrOpt(
        "notification_exchange",
        default="nova",
        help="``control_exchange`` of Nova.",
    ),
    cfg.StrOpt(
        "notification_transport_url",
        default="",
        secret=True,
        help="Message bus of Nova's notifications; empty: the one of ``[DEFAULT] transport_url``.",
    ),
    cfg.IntOpt(
        "failover_timeout_s",
        default=300,
        min=30,
        help="""
How long Nova may take to follow a failover before it is told of as an error, in seconds. It is
tried on all the same; the server runs meanwhile.
""",
    ),
    cfg.StrOpt("region_name", default="", help="Region of the services; empty: the only one."),
    cfg.StrOpt(
        "endpoint_type",
        default="internal",
        choices=["public", "internal", "admin"],
        help="Which endpoints of Nova, Placement and Neutron are used.",
    ),
]


def list_auth_opts() -> list[cfg.Opt]:
    """keystoneauth's options of the same group."""
    from keystoneauth1 import loading  # a third of a worker's start, which has no use for it

    return [
        *loading.get_session_conf_options(),
        *loading.get_auth_common_conf_options(),
        *loading.get_auth_plugin_conf_options("password"),
    ]


def register_auth(conf: cfg.ConfigOpts) -> None:
    """For who logs in: managers."""
    from keystoneauth1 import loading

    loading.register_session_conf_options(conf, GROUP.name)
    loading.register_auth_conf_options(conf, GROUP.name)
