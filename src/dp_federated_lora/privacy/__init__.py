"""The privacy kernel's front door: the only names that other packages may import."""

from dp_federated_lora.privacy.accounting import (
    Composition,
    DpEvent,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    epsilon_rdp,
    event_from_json,
    event_to_json,
)
from dp_federated_lora.privacy.bounded import Bounded, BoundedSum, Released, UnitId
from dp_federated_lora.privacy.clipping import AdaptiveClip, clip_examples, clip_to
from dp_federated_lora.privacy.correlated import CorrelatedGaussian, Correlation, NoiseState, inverse, sensitivity
from dp_federated_lora.privacy.evaluation import PrivateEvaluation
from dp_federated_lora.privacy.filters import RenyiFilter
from dp_federated_lora.privacy.ledger import Budget, Ledger, Scope, Spend
from dp_federated_lora.privacy.mechanisms import GaussianMechanism, NoiseShares
from dp_federated_lora.privacy.participation import Participation
from dp_federated_lora.privacy.permits import Permit
from dp_federated_lora.privacy.personal import Tier
from dp_federated_lora.privacy.plan import PrivacyPlan, PrivacyUnit, Trust
from dp_federated_lora.privacy.rng import SecureRandom
from dp_federated_lora.privacy.sampling import CyclicPoissonSampler, FixedSizeSampler, PoissonSampler, TruncatedPoissonSampler
from dp_federated_lora.storage import LedgerRow

__all__ = (
    "AdaptiveClip",
    "Bounded",
    "BoundedSum",
    "Budget",
    "Composition",
    "CorrelatedGaussian",
    "Correlation",
    "CyclicPoissonSampler",
    "DpEvent",
    "FixedSizeSampler",
    "GaussianMechanism",
    "Ledger",
    "LedgerRow",
    "NoiseShares",
    "NoiseState",
    "Participation",
    "Permit",
    "PoissonSampler",
    "PrivacyPlan",
    "PrivacyUnit",
    "PrivateEvaluation",
    "Released",
    "RenyiFilter",
    "Scope",
    "SecureRandom",
    "Spend",
    "Tier",
    "TruncatedPoissonSampler",
    "Trust",
    "UnitId",
    "calibrate_noise_multiplier",
    "calibrate_sampling_rate",
    "clip_examples",
    "clip_to",
    "epsilon_rdp",
    "event_from_json",
    "event_to_json",
    "inverse",
    "sensitivity",
)
