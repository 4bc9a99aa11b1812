"""Proof that an event is in the ledger: for one release, or for one release of every site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn, final

from dp_federated_lora.errors import DuplicateContribution, PermitMismatch, PermitSpent, PrivacyError
from dp_federated_lora.privacy.accounting import DpEvent
from dp_federated_lora.privacy.bounded import UnitId
from dp_federated_lora.privacy.rng import SecureRandom

_SEAL: Final = object()


@final
class Permit:
    """Proof that an event is charged; buys one release. Made by `Ledger.reserve` and `divide` only."""

    __slots__ = ("_spent", "_units", "commitment", "event", "round", "serial")

    def __init__(self, seal: object, serial: int, number: int, charged: DpEvent, commitment: str) -> None:
        if seal is not _SEAL:
            raise PrivacyError("a permit is issued by Ledger.reserve, never made by hand")
        self.serial, self.round, self.event, self.commitment = serial, number, charged, commitment
        self._spent = False
        self._units: set[UnitId] = set()  # in releases under this charge; the permits of all sites share it

    def burn(self, charged: DpEvent, commitment: str, units: frozenset[UnitId] = frozenset()) -> None:
        """Use the permit up; called before noise is drawn.

        Raises:
            PermitSpent: if it was used before.
            PermitMismatch: if the release is of another event or from another stream than charged.
            DuplicateContribution: if a unit is in another site's release under the same charge.
        """
        if self._spent:
            raise PermitSpent(f"the permit of round {self.round} has bought its release; reserve the next round")
        if charged != self.event or commitment != self.commitment:
            raise PermitMismatch(
                f"the permit of round {self.round} is for {self.event} from stream {self.commitment[:12]}, the release is "
                f"{charged} from {commitment[:12]}: nothing was released"
            )
        if twice := self._units & units:
            raise DuplicateContribution(
                f"unit {sorted(twice)[0]!r} is in the sums of two sites in round {self.round}, and one charge covers it once: "
                "sites hold distinct units"
            )
        self._units |= units
        self._spent = True

    def divide(self, rng: SecureRandom, sites: Sequence[str]) -> dict[str, tuple[Permit, SecureRandom]]:
        """Use the permit up for one of every site, with the stream that its noise comes from.

        A unit is in the sum of one site, so one event covers it (parallel composition, McSherry 2009, Theorem 4).

        Raises:
            PermitSpent, PermitMismatch: as `burn`; `rng` is the stream that the permit was issued for.
            PrivacyError: if a site is named twice.
        """
        if len(set(sites)) != len(sites):
            raise PrivacyError("a site is named twice: two releases would have the same noise")
        self.burn(self.event, rng.commitment)
        streams = {site: rng.derive("site", site) for site in sites}
        permits = [issue(self.serial, self.round, self.event, stream.commitment) for stream in streams.values()]
        for permit in permits:
            permit._units = self._units
        return dict(zip(sites, zip(permits, streams.values(), strict=True), strict=True))

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a permit cannot be pickled or copied: it buys one release")


def issue(serial: int, number: int, charged: DpEvent, commitment: str) -> Permit:
    """A permit for a charge that is durable (ledger only)."""
    return Permit(_SEAL, serial, number, charged, commitment)
