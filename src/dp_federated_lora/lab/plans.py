"""From a configuration to its privacy plan; no model and no data are needed, so anybody can check what a run would promise."""

from __future__ import annotations

from collections.abc import Callable

from dp_federated_lora.lab.budgets import Personalisation, personal_tiers
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.factorisation import optimise_bands, optimise_buffers
from dp_federated_lora.privacy import (
    AdaptiveClip,
    Budget,
    Correlation,
    PrivacyPlan,
    PrivacyUnit,
    PrivateEvaluation,
    Tier,
    Trust,
    calibrate_noise_multiplier,
)
from dp_federated_lora.secagg import SharedNoise


def privacy_plan(config: Config) -> PrivacyPlan:
    """The calibrated plan of a configuration."""
    privacy = config.privacy
    return PrivacyPlan.calibrated(
        unit=PrivacyUnit(privacy.unit),
        trust=Trust(privacy.trust),
        sites=1 if privacy.trust == "central" else config.federation.clients,
        budget=Budget(epsilon=privacy.epsilon, delta=privacy.delta),
        population=config.population,
        sampling_rate=privacy.sampling_rate,
        rounds=privacy.rounds,
        clip_norm=privacy.clip_norm,
        adaptive_clip=_adaptive_clip(config),
        evaluation=private_evaluation(config),
        groups=_groups(config),
        correlation=_correlation(config),
        shares=_noise_shares(config),
    )


def _groups(config: Config) -> tuple[float, tuple[Tier, ...]] | None:
    privacy = config.privacy
    if not privacy.groups:
        return None
    return personal_tiers(
        [(Budget(group.epsilon, privacy.delta), group.population or group.clients) for group in privacy.groups],
        variant=Personalisation(privacy.personalisation),
        sampling_rate=privacy.sampling_rate,
        rounds=privacy.rounds,
    )


def participant_tiers(config: Config) -> list[int]:
    """The group of budgets of each simulated participant; public."""
    groups = config.privacy.groups
    return [number for number, group in enumerate(groups) for _ in range(group.clients)] or [0] * config.federation.clients


def private_evaluation(config: Config) -> PrivateEvaluation | None:
    """Scores on held-out data with the noise that [evaluation] pays for; None without it."""
    section, privacy = config.evaluation, config.privacy
    if section is None:
        return None
    times = privacy.rounds // section.every
    shares = _noise_shares(config)
    z = calibrate_noise_multiplier(
        epsilon=section.epsilon, delta=privacy.delta, sampling_rate=1.0, rounds=times, shared=shares is not None
    )
    return PrivateEvaluation(
        noise_multiplier=z, every=section.every, loss_cap=section.loss_cap, shares=None if shares is None else shares(z)
    )


def _noise_shares(config: Config) -> Callable[[float], SharedNoise] | None:
    """What makes noise of a multiplier out of participants' shares, under trust = "distributed"."""
    if config.privacy.trust != "distributed":
        return None
    section = config.secure_sums
    return lambda z: SharedNoise(
        noise_multiplier=z,
        noise=section.noise,
        bits=section.bits,
        max_cohort=config.members_of_a_sum,
        min_cohort=config.fewest_of_a_sum,
        colluders=section.colluders,
        units=config.population if config.privacy.unit == "example" else None,
    )


def _correlation(config: Config) -> tuple[Correlation, int] | None:
    """How noise is correlated, and the rounds from one turn of a unit to the next."""
    section, rounds = config.privacy.correlated, config.privacy.rounds
    if section is None:
        return None
    if section.bands is not None:
        return optimise_bands(rounds, section.bands), section.separation
    return optimise_buffers(rounds, section.separation, rounds, section.buffers or 0), section.separation


def _adaptive_clip(config: Config) -> AdaptiveClip | None:
    """The defaults of Andrew et al. 2021: rate 0.2, and noise of a twentieth of the expected cohort on the count of bits."""
    privacy = config.privacy
    if privacy.clip_quantile is None:
        return None
    cohort = privacy.sampling_rate * config.population
    return AdaptiveClip(quantile=privacy.clip_quantile, learning_rate=0.2, bit_noise=cohort / 20.0)
