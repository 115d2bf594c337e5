"""Makes the brokers let the publishers of apps in, and no further: users, access control lists and quotas."""

from __future__ import annotations

import secrets
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from topics.access import ITERATIONS, Access, salted
from topics.access_protocol import AlterUserCredentials, AlterUserQuota
from topics.apply import ApplyError

_ALLOW, _ANY = 3, 1


async def apply_access(admin: AIOKafkaAdminClient, access: Access) -> None:
    """Give an app's user what it may do, and its quota; take all away from one that has nothing to publish.

    Raises `ApplyError` where the brokers refuse, as those do that ask nobody who they are.
    """
    principal = f"User:{access.user}"
    if not access.given:
        await _send(admin, DeleteAclsRequest(_ANY, None, _ANY, principal, None, _ANY, _ANY), "filter_responses", access)
    for acl in access.acls if access.given else ():
        request = CreateAclsRequest(acl.resource, acl.name, acl.pattern, principal, "*", acl.operation, _ALLOW)
        await _send(admin, request, "creation_responses", access)
    await _send(
        admin,
        AlterUserQuota(access.user, "producer_byte_rate", access.byte_rate if access.given else None),
        "entries",
        access,
    )


async def new_password(admin: AIOKafkaAdminClient, access: Access) -> str:
    """Give an app's user a new password, and return it. Raises `ApplyError`."""
    password, salt = secrets.token_urlsafe(24), secrets.token_bytes(24)
    request = AlterUserCredentials(access.user, ITERATIONS, salt, salted(password, salt))
    await _send(admin, request, "results", access)
    return password


async def _send(admin: AIOKafkaAdminClient, request: Any, results: str, access: Access) -> None:
    # aiokafka has no public way to send a request that it has no method for.
    response = await admin._send_to_controller(request)
    for result in response.to_object()[results]:
        if result["error_code"]:
            reason = result["error_message"] or for_code(result["error_code"]).__name__
            raise ApplyError(f"user {access.user}: {reason}")
