"""What the broker's subjects are called, and which of them each member may use: nothing else is allowed.

    dpfl.site.S.in           coordinators to site S
    dpfl.site.S.out          site S to coordinators
    dpfl.admin.A.in.VERB     administrator A to coordinators
    dpfl.admin.A.out         coordinators to administrator A
    dpfl.coordinator.>       among coordinators

The broker lets only the holder of its certificate publish as S or A, so these subjects say who the sender is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from dp_federated_lora.network.project import Member, Right

VERBS: Final[Mapping[Right, tuple[str, ...]]] = {
    "submit": ("submit",),
    "stop": ("stop",),
    "view": ("runs", "status", "sites", "results"),
}

FROM_SITES: Final = "dpfl.site.*.out"
FROM_ADMINISTRATORS: Final = "dpfl.admin.*.in.*"
AMONG_COORDINATORS: Final = "dpfl.coordinator.>"


@final
@dataclass(frozen=True, slots=True)
class Grants:
    """The subjects that a member may use.

    Args:
        publish: to send to.
        subscribe: to listen to.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox_of(member: Member) -> str:
    """Where a site or an administrator listens."""
    return f"dpfl.{member.role}.{member.name}.{'in' if member.role == 'site' else 'out'}"


def outbox_of(member: Member, verb: str = "") -> str:
    """Where a site sends what it has to say, or an administrator what belongs to `verb`."""
    return f"dpfl.site.{member.name}.out" if member.role == "site" else f"dpfl.admin.{member.name}.in.{verb}"


def grants_of(member: Member, rights: tuple[Right, ...] = ()) -> Grants:
    """What a member may send to and listen to; `rights` are an administrator's."""
    if member.role == "coordinator":
        return Grants(
            publish=("dpfl.site.*.in", "dpfl.admin.*.out", AMONG_COORDINATORS),
            subscribe=(FROM_SITES, FROM_ADMINISTRATORS, AMONG_COORDINATORS),
        )
    verbs = [""] if member.role == "site" else [verb for right in rights for verb in VERBS[right]]
    return Grants(publish=tuple(outbox_of(member, verb) for verb in verbs), subscribe=(inbox_of(member),))


def sender_of(subject: str) -> Member | None:
    """Who alone can have published on `subject`; None where it may be any coordinator."""
    match subject.split("."):
        case ["dpfl", "site", name, "out"]:
            return Member("site", name)
        case ["dpfl", "admin", name, "in", _]:
            return Member("admin", name)
        case _:
            return None
