"""Record a run, replay it on a neighbouring data set, and compare everything that left (the idea of arXiv 2602.17454).

Both runs use one insecure seed, so cohorts and noise are the same. The replayed run notes its own releases but continues from the
recorded ones: each round is compared given the same past, as the definition of adaptive composition has it. Then a release may
differ by what one unit can change, clip norm over divisor, and everything else must be equal.

Put the unit in which the data differ last (the last client, or the last example of a client): the coins of all others are then
the same in both runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from dp_federated_lora.errors import AuditError
from dp_federated_lora.federated import Exchange, Request, RoundReport, Server, Sites
from dp_federated_lora.privacy import BoundedSum, PrivacyPlan, Released, SecureRandom

# Examples in one forward pass change each other's gradients in the last bits of float32 (padding, order of summation), so
# releases differ by the influence of one unit and that rounding. Whatever exceeds this is no rounding.
ROUNDING: Final = 1e-4


@final
@dataclass(slots=True)
class Transcript:
    """What left a run.

    Args:
        replay: the transcript of the run to repeat; None for the first.
        requests: the message of each round to its clients, as plain values.
        released: the released mean of each round `(d,)`.
        reports: the public report of each round.
    """

    replay: Transcript | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    released: list[Tensor] = field(default_factory=list)
    reports: list[RoundReport] = field(default_factory=list)

    def wrap(self, exchange: Exchange, server: Server) -> tuple[Exchange, Server]:
        """The same engine, written down here; a replay continues from the releases of the first run.

        Raises:
            AuditError: if there is a defence against liars, or contributions are sketched: then what is stepped on is no release
                any more.
        """
        if server.defence.active or server.method.sketch.ratio > 1.0:
            raise AuditError(
                "a replay compares releases, and [robust] and [compression] make something else of them: audit without either"
            )
        return _Recorded(exchange, self), replace(server, optimizer=_Replayed(server, self))


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """What sets two transcripts of neighbouring data sets apart.

    Args:
        influence: largest L2 distance of two releases of one round, over clip norm / divisor; at most 1 for a correct build.
        leaks: what differs and is neither a release nor computed from one.
    """

    influence: float
    leaks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether one unit changed no more than the plan says; not a number is more."""
        return self.influence <= 1 + ROUNDING and not self.leaks


def compare(first: Transcript, second: Transcript, plan: PrivacyPlan) -> Difference:
    """Compare a run with its replay on neighbouring data.

    Args:
        first: a run.
        second: its replay, `Transcript(replay=first)`.
        plan: of both.
    """
    leaks = []
    for name in ("requests", "released", "reports"):
        count, other = len(getattr(first, name)), len(getattr(second, name))
        if count != other:
            leaks.append(f"number of {name}: {count} and {other}")
    leaks += [
        f"round {a['round']}: request {key}"
        for a, b in zip(first.requests, second.requests, strict=False)
        for key in a
        if a[key] != b[key]
    ]
    leaks += [
        f"round {a.round}: report {key}"
        for a, b in zip(first.reports, second.reports, strict=False)
        for key, value in asdict(a).items()
        if key != "update_norm" and value != asdict(b)[key]  # the norm of the release is computed from it
    ]
    distances = [float(torch.linalg.vector_norm(a - b)) for a, b in zip(first.released, second.released, strict=False)]
    unit = plan.clip_norm / plan.divisor
    finite = all(math.isfinite(distance) for distance in distances)
    return Difference(max(distances, default=0.0) / unit if finite else math.inf, tuple(leaks))


@final
class _Recorded:
    """An exchange whose requests are written down."""

    def __init__(self, inner: Exchange, transcript: Transcript) -> None:
        self._inner, self._transcript = inner, transcript

    @property
    def names(self) -> Sequence[str]:
        """All participants."""
        return self._inner.names

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Replies of the inner exchange."""
        self._note(request)
        return self._inner(request, clients, rng)

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Noised replies of the inner exchange."""
        self._note(request)
        return self._inner.reports(request, sites, size=size)

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """Secure sum of the inner exchange."""
        self._note(request)
        return self._inner.opened(request, sites, members, size=size)

    def _note(self, request: Request) -> None:
        tensors = {"": request.adapter, "control of ": request.control}
        values = {f"{kind}{name}": tensor.tolist() for kind, each in tensors.items() for name, tensor in each.items()}
        self._transcript.requests.append(asdict(replace(request, adapter={}, control={})) | values)


@final
class _Replayed:
    """A server optimiser that writes releases down, and steps on the recorded ones in a replay."""

    def __init__(self, server: Server, transcript: Transcript) -> None:
        self._inner, self._transcript = server.optimizer, transcript

    def init(self, size: int) -> Mapping[str, Tensor]:
        """State of the inner optimiser."""
        return self._inner.init(size)

    def update(self, mean: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Step of the inner optimiser."""
        released, replay = self._transcript.released, self._transcript.replay
        released.append(mean)
        return self._inner.update(mean if replay is None else replay.released[len(released) - 1], state)
