"""Secure sums among participants of one process: the real messages, as bytes, through both state machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from secrets import token_hex
from typing import final

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from dp_federated_lora.federated import Request, terms_of
from dp_federated_lora.privacy import PrivacyPlan, SecureRandom
from dp_federated_lora.runtime.wire import encode_request
from dp_federated_lora.secagg import STAGES, ClientSession, ServerSession
from dp_federated_lora.signing import SigningKey

Contributions = Callable[[bytes, Sequence[str]], Iterator[Tensor]]
"""Integers `(d,)` of some members, in order, from the request as bytes and their names."""


@final
class SecureSums:
    """Signing keys of all participants, and who of them falls silent when.

    Args:
        names: all participants.
        dropout_rate: chance that a member of a sum falls silent before one of its five steps, each as likely.
    """

    def __init__(self, names: Sequence[str], *, dropout_rate: float = 0.0) -> None:
        self._run = token_hex(16)
        self._keys = {name: SigningKey(Ed25519PrivateKey.generate()) for name in names}
        self._dropout_rate = dropout_rate

    def open(
        self,
        request: Request,
        plan: PrivacyPlan,
        streams: Mapping[str, SecureRandom],
        contributions: Contributions,
        *,
        size: int,
    ) -> Tensor:
        """The sum modulo 2^b, `(d,)` int64, of what the members in `streams` contribute, `size` coordinates each.

        Contributions are asked for one by one, when masks are agreed on, so that memory does not grow with the number of members.

        Args:
            request: to all of them.
            plan: that all agreed to.
            streams: the members' streams of this round; who drops out follows from them, so that a repeated round is the same.
            contributions: what members put in.
            size: coordinates.

        Raises:
            SecureSumAborted: if fewer stay than noise was sized for; then nothing was opened.
        """
        sent = encode_request(request)
        roster = {name: self._keys[name].public for name in streams}
        terms = terms_of(request, plan, size=size, sum_id=self._run, sent=sent, roster=roster)
        silent = {name: self._silent_before(stream) for name, stream in streams.items()}
        server = ServerSession(terms)
        sessions = {name: ClientSession(name, terms, self._keys[name]) for name in streams}
        messages = dict.fromkeys(streams, b"")
        for number, stage in enumerate(STAGES):
            left = [name for name in messages if silent[name] > number]
            integers = contributions(sent, left) if stage == "mask" else None
            for name in left:
                own = None if integers is None else next(integers).numpy()
                server.receive(name, sessions[name].answer(messages[name], own))
            messages = server.advance()
        return torch.from_numpy(server.total.integers.astype("int64"))

    def _silent_before(self, stream: SecureRandom) -> int:
        """The step before which a member falls silent; one that does not exist for who does not."""
        coins = stream.derive("dropout")
        if not coins.bernoulli(self._dropout_rate, 1)[0]:
            return len(STAGES)
        return int(coins.derive("step").uint64(1)[0] % len(STAGES))
