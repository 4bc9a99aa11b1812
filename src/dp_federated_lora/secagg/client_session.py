"""A client's side of a secure sum: five messages out, four in, each in its turn and once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self, final

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from dp_federated_lora.errors import SecureSumAborted
from dp_federated_lora.secagg.crypto import (
    KEY_BYTES,
    SHARE_BYTES,
    PrivateKey,
    add_mask,
    agree,
    seal,
    split,
    unseal,
)
from dp_federated_lora.secagg.messages import (
    VERSION,
    Advertised,
    Cohort,
    Consent,
    Consents,
    Delivered,
    Masked,
    Revealed,
    Shares,
    Survivors,
    decode,
    encode,
)
from dp_federated_lora.secagg.terms import Terms
from dp_federated_lora.signing import SigningKey, signature_holds

STAGES: Final = ("advertise", "share", "mask", "consent", "reveal")


class _State(msgspec.Struct):
    """All that a session remembers. It holds the secrets of the round."""

    name: str
    sealing: bytes
    masking: bytes
    seed: bytes
    stage: int = 0
    cohort: tuple[str, ...] = ()
    public_keys: dict[str, tuple[bytes, bytes]] = {}
    own_shares: tuple[bytes, bytes] = (b"", b"")
    received: dict[str, tuple[bytes, bytes]] = {}
    survivors: tuple[str, ...] = ()


@final
class ClientSession:
    """One client in one secure sum (Bonawitz et al. 2017, CCS; neighbours by Bell et al. 2020, CCS).

    Each method takes the server's message and gives the answer. One that raises `SecureSumAborted` ends the session: what comes
    after is refused. Between messages the session can be stored (`to_bytes`), secrets included.

    Args:
        name: of the client in the roster.
        terms: that the client agrees to, from its own configuration and what it was sent to compute with.
        key: its signing key.
    """

    def __init__(self, name: str, terms: Terms, key: SigningKey) -> None:
        if terms.roster.get(name) != key.public:
            raise SecureSumAborted(f"{name} is not in the roster with this key")
        self.terms, self._key = terms, key
        sealing, masking, seed = (secrets.token_bytes(KEY_BYTES) for _ in range(3))
        self._begin(_State(name, sealing, masking, seed))

    def _begin(self, state: _State) -> None:
        self._state = state
        self._sealing, self._masking = (PrivateKey.from_private_bytes(key) for key in (state.sealing, state.masking))
        self._public = tuple(key.public_key().public_bytes_raw() for key in (self._sealing, self._masking))
        self._sealing_keys: dict[str, bytes] = {}

    def to_bytes(self) -> bytes:
        """The session as it is, as secret as the client's data.

        Store it before an answer is sent: a client that forgot what it answered could be made to answer twice.
        """
        return msgspec.msgpack.encode(self._state)

    @classmethod
    def from_bytes(cls, data: bytes, terms: Terms, key: SigningKey) -> Self:
        """The session that `to_bytes` stored.

        Raises:
            SecureSumAborted: if it is damaged or another client's.
        """
        try:
            state = msgspec.msgpack.decode(data, type=_State)
        except msgspec.MsgspecError as error:
            raise SecureSumAborted(f"a stored session is damaged: {error}; this round is lost for the client") from error
        session = cls(state.name, terms, key)
        session._begin(state)
        return session

    def answer(self, message: bytes, integers: ArrayLike | None = None) -> bytes:
        """The answer of the step that is due, of those below.

        Args:
            message: the server's; empty for the first step.
            integers: as `mask` takes them; for that step alone.

        Raises:
            SecureSumAborted: as that step does, or if the session is over.
        """
        if self.stage == "mask":
            return self.mask(message, () if integers is None else integers)
        steps = {"share": self.share, "consent": self.consent, "reveal": self.reveal}
        return steps[self.stage](message) if self.stage in steps else self.advertise()

    @property
    def stage(self) -> str | None:
        """The step that is due; None once the session is over."""
        return STAGES[self._state.stage] if self._state.stage < len(STAGES) else None

    def advertise(self) -> bytes:
        """Public keys of this round, signed."""
        with self._step("advertise") as state:
            sealing, masking = self._public
            signature = self._key.sign("secure sum keys", advertised_content(self.terms.context, state.name, sealing, masking))
            return encode(Advertised(VERSION, self.terms.context, state.name, sealing, masking, signature))

    def share(self, cohort: bytes) -> bytes:
        """Shares of this client's secrets for its neighbours, sealed.

        Raises:
            SecureSumAborted: if the cohort is too small, not of the roster, without this client, or if a neighbour's keys are
                missing, repeated or not signed by it.
        """
        with self._step("share") as state:
            message = decode(cohort, Cohort, context=self.terms.context, limit=self.terms.limit)
            names, terms = message.names, self.terms
            if list(names) != sorted(set(names)) or not terms.roster.keys() >= set(names) or state.name not in names:
                raise SecureSumAborted("a cohort names each client of the roster once, in order, and whom it is sent to")
            if len(names) < terms.min_cohort:
                raise SecureSumAborted(f"a cohort of {len(names)} where {terms.min_cohort} are the fewest that hide a client")
            neighbours = {each.name: each for each in message.neighbours}
            if sorted(neighbours) != terms.neighbours(state.name, names) or len(neighbours) != len(message.neighbours):
                raise SecureSumAborted("the keys are not those of this client's neighbours in the cohort")
            keys = [key for each in neighbours.values() for key in (each.sealing, each.masking)]
            if len({*keys, *self._public}) != len(keys) + len(self._public):
                raise SecureSumAborted("a public key appears twice: somebody stands in for somebody else")
            for name, each in neighbours.items():
                content = advertised_content(terms.context, name, each.sealing, each.masking)
                if not signature_holds(terms.roster[name], "secure sum keys", content, each.signature):
                    raise SecureSumAborted(f"the keys of {name} are not signed by it for this round, plan and model")
            state.cohort = names
            state.public_keys = {name: (each.sealing, each.masking) for name, each in neighbours.items()}
            place = {name: number for number, name in enumerate(names, 1) if name in neighbours or name == state.name}
            threshold = terms.threshold(len(place))
            seeds, masking = (split(secret, [*place.values()], threshold) for secret in (state.seed, state.masking))
            state.own_shares = seeds[place[state.name]], masking[place[state.name]]
            sealed = {
                name: seal(
                    self._sealing_key(name), seeds[place[name]] + masking[place[name]], between(terms.context, state.name, name)
                )
                for name in neighbours
            }
            return encode(Shares(VERSION, terms.context, hashlib.sha256(state.seed).digest(), sealed))

    def mask(self, delivered: bytes, integers: ArrayLike) -> bytes:
        """The client's integers under its own mask and those that it has in common with neighbours.

        Args:
            delivered: the neighbours' sealed shares.
            integers: `(size,)` in [0, 2^b), noise included.

        Raises:
            SecureSumAborted: if too few neighbours are left, a share does not open, or an integer is out of range.
        """
        with self._step("mask") as state:
            terms = self.terms
            message = decode(delivered, Delivered, context=terms.context, limit=terms.limit)
            if not message.sealed.keys() <= state.public_keys.keys():
                raise SecureSumAborted("shares were delivered of clients that are no neighbours")
            if len(message.sealed) + 1 < terms.threshold(len(state.public_keys) + 1):
                raise SecureSumAborted(f"{len(message.sealed)} neighbours sent shares: too few to open a secret with")
            for name, sealed in message.sealed.items():
                shares = unseal(self._sealing_key(name), sealed, between(terms.context, name, state.name))
                if len(shares) != 2 * SHARE_BYTES:
                    raise SecureSumAborted(f"the shares of {name} have the wrong length")
                state.received[name] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]
            values = np.asarray(integers)
            if values.shape != (terms.size,) or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >> terms.bits:
                raise SecureSumAborted(f"a contribution is ({terms.size},) integers in [0, 2^{terms.bits})")
            total = values.astype(np.uint32)
            add_mask(total, state.seed)
            for name in state.received:
                terms.add_common_mask(total, self._masking, state.public_keys[name][1], adds=state.name < name)
            return encode(Masked(VERSION, terms.context, terms.pack(total)))

    def consent(self, survivors: bytes) -> bytes:
        """Tags of who is in the sum, one for each neighbour that is, under the keys that the two have in common.

        A tag convinces the neighbour as a signature would, of which checking is most of what this step would cost.

        Raises:
            SecureSumAborted: if they are too few, not of the cohort, or without this client.
        """
        with self._step("consent") as state:
            names = decode(survivors, Survivors, context=self.terms.context, limit=self.terms.limit).names
            if list(names) != sorted(set(names)) or not set(state.cohort) >= set(names) or state.name not in names:
                raise SecureSumAborted("survivors are clients of the cohort, once each, in order, and whom they are sent to")
            if not state.received.keys() >= set(names) & state.public_keys.keys():
                raise SecureSumAborted("a survivor sent no shares: its mask could never be taken off")
            if len(names) < self.terms.min_cohort:
                raise SecureSumAborted(f"{len(names)} survivors where {self.terms.min_cohort} are the fewest that hide a client")
            state.survivors = names
            context, digest = self.terms.context, self._survivor_digest()
            near = self._near_survivors()
            tags = {name: seal(self._sealing_key(name), b"", between(context, state.name, name, digest)) for name in near}
            return encode(Consent(VERSION, context, tags))

    def reveal(self, consents: bytes) -> bytes:
        """Shares that open survivors' own masks and the common masks of neighbours that dropped out: one kind of each client.

        Raises:
            SecureSumAborted: if fewer neighbours than open a secret were told the same survivors as this client.
        """
        with self._step("reveal") as state:
            terms = self.terms
            tags = decode(consents, Consents, context=terms.context, limit=terms.limit).tags
            told, digest = self._near_survivors(), self._survivor_digest()
            if not tags.keys() <= told:
                raise SecureSumAborted("somebody consents who is no surviving neighbour")
            for name, tag in tags.items():
                try:
                    unseal(self._sealing_key(name), tag, between(terms.context, name, state.name, digest))
                except SecureSumAborted as error:
                    raise SecureSumAborted(f"{name} was told other survivors than this client") from error
            if len(tags) + 1 < terms.threshold(len(state.public_keys) + 1):
                raise SecureSumAborted(f"{len(tags)} neighbours were told the same survivors: too few")
            seeds = {name: state.received[name][0] for name in told} | {state.name: state.own_shares[0]}
            keys = {name: shares[1] for name, shares in state.received.items() if name not in told}
            return encode(Revealed(VERSION, terms.context, seeds, keys))

    @contextmanager
    def _step(self, stage: str) -> Iterator[_State]:
        """The state for one step; if that fails, the session is over."""
        state, over = self._state, len(STAGES)
        due, state.stage = state.stage, over
        if due == over or STAGES[due] != stage:
            raise SecureSumAborted(
                f"asked to {stage}, but a client takes each step of a round once, in order: the round is over for it"
            )
        yield state
        state.stage = due + 1

    def _sealing_key(self, name: str) -> bytes:
        if name not in self._sealing_keys:
            public, _ = self._state.public_keys[name]
            self._sealing_keys[name] = agree(self._sealing, public, "secure sum shares", self.terms.context)
        return self._sealing_keys[name]

    def _near_survivors(self) -> set[str]:
        return set(self._state.survivors) & self._state.received.keys()

    def _survivor_digest(self) -> bytes:
        return hashlib.sha256(msgspec.msgpack.encode(self._state.survivors)).digest()


def between(context: bytes, sender: str, receiver: str, *facts: bytes) -> bytes:
    """What is sealed by one client for another is bound to."""
    return context + msgspec.msgpack.encode((sender, receiver, *facts))


def advertised_content(context: bytes, name: str, sealing: bytes, masking: bytes) -> bytes:
    """What a client signs of its keys."""
    return context + msgspec.msgpack.encode((name, sealing, masking))
