"""The server's side of a secure sum: it carries messages, and learns the sum or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from dp_federated_lora.errors import SecureSumAborted
from dp_federated_lora.secagg.crypto import PrivateKey, add_mask, combine
from dp_federated_lora.secagg.messages import (
    VERSION,
    Advertised,
    Cohort,
    Consent,
    Consents,
    Delivered,
    Kind,
    Masked,
    Message,
    Revealed,
    Shares,
    Survivors,
    decode,
    encode,
)
from dp_federated_lora.secagg.terms import Terms

KINDS: Final[tuple[type[Message], ...]] = (Advertised, Shares, Masked, Consent, Revealed)


class SecureTotal(NamedTuple):
    """What a secure sum gives: the sum modulo 2^b `(size,)`, and whose integers are in it."""

    integers: NDArray[np.uint32]
    names: tuple[str, ...]


@final
class ServerSession:
    """One secure sum at the server: `receive` answers, then `advance` to the next messages; four times, and a fifth for the sum.

    Who has not answered when the server advances is out of the round. The sum so far, not the clients' integers, is kept. A
    secret is opened as soon as enough shares of it are there, so that little is left to do after the last answer.

    Args:
        terms: of the round.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._stage = 0
        self._received: dict[str, Message] = {}
        self._expected: set[str] = set(terms.roster)
        self._places: dict[str, int] = {}
        self._near: dict[str, list[str]] = {}
        self._advertised: dict[str, Advertised] = {}
        self._shares: dict[str, Shares] = {}
        self._total = np.zeros(terms.size, dtype=np.uint32)
        self._seeds: dict[str, dict[int, bytes]] = {}  # shares of survivors' seeds, by place
        self._keys: dict[str, dict[int, bytes]] = {}  # shares of the masking keys of those who dropped out
        self._wrong: SecureSumAborted | None = None
        self.result: SecureTotal | None = None

    def receive(self, sender: str, data: bytes) -> None:
        """Take a client's answer to the last message.

        Args:
            sender: who sent it, as the transport knows it.
            data: the answer.

        Raises:
            SecureSumAborted: if it is not one that is due, or malformed. Nothing has changed: the client may send a right one.
        """
        if self.result is not None or sender not in self._expected or sender in self._received:
            raise SecureSumAborted(f"nothing is due from {sender}: it has answered, or is not in this round")
        message = decode(data, KINDS[self._stage], context=self.terms.context, limit=self.terms.limit)
        if isinstance(message, Advertised) and message.name != sender:
            raise SecureSumAborted(f"{sender} advertised keys as {message.name}")
        if isinstance(message, Shares) and message.sealed.keys() != set(self._near[sender]):
            raise SecureSumAborted(
                f"{sender} sealed shares for others than its neighbours: masks with them would stay in the sum"
            )
        if isinstance(message, Masked):
            self._total += self.terms.unpack(message.integers)
            message = Masked(VERSION, self.terms.context, b"")
        self._received[sender] = message
        if isinstance(message, Revealed):
            self._reveal(sender, message)

    @property
    def total(self) -> SecureTotal:
        """The opened sum.

        Raises:
            SecureSumAborted: if it is not open yet.
        """
        if self.result is None:
            raise SecureSumAborted("the sum is not open yet")
        return self.result

    def waiting_for(self) -> set[str]:
        """Who has not answered yet."""
        return self._expected - self._received.keys()

    def advance(self) -> dict[str, bytes]:
        """The next message for each client that is still in the round; empty once `result` is there.

        Raises:
            SecureSumAborted: if too few have answered, or what they revealed opens nothing. The sum is not opened.
        """
        steps: tuple[Callable[[], dict[str, bytes]], ...] = (
            self._introduce,
            self._deliver,
            self._announce,
            self._exchange_consents,
            self._open,
        )
        if self.result is not None:
            raise SecureSumAborted("this sum is open already: it is opened once")
        if len(self._received) < self.terms.min_cohort:
            raise SecureSumAborted(
                f"{len(self._received)} clients answered where {self.terms.min_cohort} are the fewest to go on with"
            )
        if self._wrong is not None:
            raise self._wrong
        messages = steps[self._stage]()
        self._stage, self._received, self._expected = self._stage + 1, {}, set(messages)
        return messages

    def _of(self, kind: type[Kind]) -> dict[str, Kind]:
        """What was received, by sender."""
        return {name: message for name, message in self._received.items() if isinstance(message, kind)}

    def _introduce(self) -> dict[str, bytes]:
        self._advertised = self._of(Advertised)
        cohort = tuple(sorted(self._advertised))
        self._places = {name: number for number, name in enumerate(cohort, 1)}
        self._near = {name: self.terms.neighbours(name, cohort) for name in cohort}
        return {
            name: self._message(Cohort, cohort, tuple(self._advertised[other] for other in near))
            for name, near in self._near.items()
        }

    def _deliver(self) -> dict[str, bytes]:
        self._shares = self._of(Shares)
        messages = {}
        for name in self._shares:
            near = [other for other in self._near[name] if other in self._shares]
            sealed = {other: self._shares[other].sealed[name] for other in near if name in self._shares[other].sealed}
            messages[name] = self._message(Delivered, sealed)
        return messages

    def _announce(self) -> dict[str, bytes]:
        survivors = tuple(sorted(self._received))
        self._seeds = {name: {} for name in survivors}
        gone = self._shares.keys() - self._seeds.keys()
        self._keys = {name: {} for name in gone if self._masked_by(name)}
        return dict.fromkeys(survivors, self._message(Survivors, survivors))

    def _masked_by(self, name: str) -> list[str]:
        """Survivors whose integers have a mask in common with `name`."""
        return [other for other in self._near[name] if other in self._seeds]

    def _exchange_consents(self) -> dict[str, bytes]:
        consents, messages = self._of(Consent), dict[str, bytes]()
        for name in consents:
            enough = self._threshold(name) - 1  # more would only take the client time to check
            near = [other for other in self._near[name] if other in consents and name in consents[other].tags][:enough]
            messages[name] = self._message(Consents, {other: consents[other].tags[name] for other in near})
        return messages

    def _reveal(self, sender: str, message: Revealed) -> None:
        """Take a client's shares; a secret whose shares do not belong together is noted, for `advance` to say."""
        place = self._places[sender]
        kinds = ((message.seeds, self._seeds, self._take_off_seed), (message.keys, self._keys, self._take_off_common))
        for shares, known, take_off in kinds:
            for name in shares.keys() & known.keys():
                if sender != name and sender not in self._near[name]:
                    continue
                known[name][place] = shares[name]
                if len(known[name]) == self._threshold(name):
                    try:
                        take_off(name, self._combined(name, known[name]))
                    except SecureSumAborted as error:
                        self._wrong = error

    def _take_off_seed(self, name: str, seed: bytes) -> None:
        if hashlib.sha256(seed).digest() != self._shares[name].seed_digest:
            raise SecureSumAborted(f"shares of {name}'s seed do not belong together: somebody revealed a wrong one")
        add_mask(self._total, seed, adds=False)

    def _take_off_common(self, name: str, key: bytes) -> None:
        private = PrivateKey.from_private_bytes(key)
        if private.public_key().public_bytes_raw() != self._advertised[name].masking:
            raise SecureSumAborted(f"shares of {name}'s key do not belong together: somebody revealed a wrong one")
        for other in self._masked_by(name):
            self.terms.add_common_mask(self._total, private, self._advertised[other].masking, adds=name < other)

    def _open(self) -> dict[str, bytes]:
        for name, shares in (self._seeds | self._keys).items():
            if len(shares) < self._threshold(name):
                raise SecureSumAborted(f"{len(shares)} shares of a secret of {name} where {self._threshold(name)} open it")
        self.result = SecureTotal(self._total & np.uint32((1 << self.terms.bits) - 1), tuple(self._seeds))
        return {}

    def _threshold(self, name: str) -> int:
        return self.terms.threshold(len(self._near[name]) + 1)

    def _combined(self, name: str, shares: dict[int, bytes]) -> bytes:
        secret = combine(shares)
        if secret is None:
            raise SecureSumAborted(f"shares of a secret of {name} are of no secret: somebody revealed a wrong one")
        return secret

    def _message(self, kind: Callable[..., Message], *fields: object) -> bytes:
        return encode(kind(VERSION, self.terms.context, *fields))
