"""Must not compile: each line with an expected error breaks a privacy rule; mypy --strict has to reject every one.

`warn_unused_ignores` turns an ignore that is not needed into an error, so a line that starts to compile fails the check.
"""

from torch import Tensor

from dp_federated_lora.privacy import Bounded, BoundedSum, GaussianMechanism, Permit, Released, SecureRandom


def scale(value: Bounded) -> object:
    """A clipped value cannot be scaled."""
    return value * 2.0  # type: ignore[operator]


def weigh(value: BoundedSum) -> object:
    """A sum cannot be divided, least of all by the number of replies."""
    return value / 10  # type: ignore[operator]


def add(first: BoundedSum, second: BoundedSum) -> object:
    """Sums are merged by the kernel, which checks that their units are disjoint."""
    return first + second  # type: ignore[operator]


def read(total: BoundedSum) -> Tensor:
    """A sum is not a tensor."""
    return total  # type: ignore[return-value]


def release_without_charge(mechanism: GaussianMechanism, total: BoundedSum, rng: SecureRandom) -> Released:
    """A release needs a permit."""
    return mechanism.release(total, charged=mechanism.event, rng=rng)  # type: ignore[call-arg]


def release_raw(mechanism: GaussianMechanism, raw: Tensor, permit: Permit, rng: SecureRandom) -> Released:
    """Only a bounded sum is released."""
    return mechanism.release(raw, charged=mechanism.event, permit=permit, rng=rng)  # type: ignore[arg-type]


def release_one(mechanism: GaussianMechanism, one: Bounded, permit: Permit, rng: SecureRandom) -> Released:
    """A single contribution is not a sum."""
    return mechanism.release(one, charged=mechanism.event, permit=permit, rng=rng)  # type: ignore[arg-type]


class MyBounded(Bounded):  # type: ignore[misc]
    """Sealed types are final."""
