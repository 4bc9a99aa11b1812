"""One secure sum of a round, as server and clients see it: what all agree on, and what a client puts in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, SecureSumAborted
from dp_federated_lora.federated.client import Client, Purpose, Request, handle
from dp_federated_lora.privacy import DpEvent, Permit, PrivacyPlan, SecureRandom
from dp_federated_lora.secagg import SharedNoise, Terms, circle_for
from dp_federated_lora.training import Learner
from dp_federated_lora.vector import Layout

EVERYBODY_UP_TO = 100
"""Members of a sum in which each is everybody's neighbour; more sit on a circle."""


def noise_of(plan: PrivacyPlan, purpose: Purpose) -> tuple[SharedNoise, DpEvent]:
    """The noise shares of a sum, and what it costs.

    Raises:
        IncompatiblePlan: if the plan has no noise in shares, or no evaluation where one is asked for.
    """
    source = plan if purpose is Purpose.TRAINING else plan.evaluation
    mechanism = None if source is None else source.mechanism
    if source is None or not isinstance(mechanism, SharedNoise):
        raise IncompatiblePlan(f"the plan has no noise in shares for {purpose.value}: it is not one of trust = distributed")
    return mechanism, source.event


def terms_of(request: Request, plan: PrivacyPlan, *, size: int, sum_id: str, sent: bytes, roster: Mapping[str, str]) -> Terms:
    """What all agree on before the sum of `size` coordinates; each derives it from its own plan and from what it was sent.

    Args:
        request: to everybody in the sum.
        plan: that they agreed to.
        size: coordinates of a contribution.
        sum_id: public, and unique among all sums of these participants.
        sent: the request as bytes; who was sent others shares no mask.
        roster: public keys of the members of this sum, by name.

    Raises:
        SecureSumAborted: if there are more or fewer members than noise and modulus were sized for.
    """
    noise, _ = noise_of(plan, request.purpose)
    if len(roster) != noise.max_cohort:
        raise SecureSumAborted(
            f"{len(roster)} members of a sum that is planned for {noise.max_cohort}: too little noise, or too few bits"
        )
    degree, corrupt = None, noise.colluders
    if len(roster) > EVERYBODY_UP_TO:
        degree, corrupt = circle_for(len(roster), corrupt=noise.colluders, dropped=len(roster) - noise.min_cohort)
    return Terms(
        run=sum_id,
        number=request.round,
        size=noise.of_size(size).total.padded_size,
        bits=noise.bits,
        roster=roster,
        model=hashlib.sha256(sent).digest(),
        min_cohort=noise.min_cohort,
        corrupt=corrupt,
        degree=degree,
    )


def rotation_of(request: Request) -> bytes:
    """The public rotation of a sum, 32 bytes; the same when an interrupted round is repeated, as its noise is."""
    return hashlib.sha256(f"dpfl rotation {request.plan_id} {request.purpose.value} {request.round}".encode()).digest()


def size_of(request: Request, client: Client, learner: Learner) -> int:
    """Coordinates of a client's contribution to what `request` asks for."""
    plan = client.plan
    if request.purpose is Purpose.EVALUATION:
        return 0 if plan.evaluation is None else plan.evaluation.SIZE
    layout = Layout.of(learner.model.parameters(client.method.factors_in(request.round)))
    return client.method.sketch.size(layout.size) + plan.extra_coordinates


def share(request: Request, client: Client, learner: Learner, *, permit: Permit, rng: SecureRandom) -> Tensor:
    """What a client hands to secure aggregation: integers `(d,)` modulo 2^b, with its share of noise.

    Args:
        request: from the server.
        client: the participant.
        learner: as `handle`.
        permit: proof that the sum is charged.
        rng: this client's stream for this round; coins, rounding and noise come from it.

    Raises:
        IncompatiblePlan: as `handle`, or if the plan has another noise.
    """
    noise, charged = noise_of(client.plan, request.purpose)
    total = handle(request, client, learner, rng)
    return noise.release(total, charged=charged, permit=permit, rng=rng, rotation=rotation_of(request))
