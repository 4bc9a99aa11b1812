"""Every exception of the package: one class per broken rule.

A message says what is wrong (with the numbers), where, and what to do about it.
"""

from __future__ import annotations


class DpflError(Exception):
    """Base of every error that a user of this package can cause or meet."""


# --- configuration, sources, data, model -------------------------------------------------------


class ConfigError(DpflError):
    """A configuration key is unknown, missing, malformed or impossible in combination."""


class SourceError(DpflError):
    """A `hf:`, `pypi:` or path source cannot be resolved, or its content has the wrong hash."""


class DataError(DpflError):
    """A data file was found but cannot be used: wrong columns, unknown label, no rows."""


class ModelError(DpflError):
    """A base model cannot be loaded or adapted as configured."""


# --- privacy ------------------------------------------------------------------------------------


class PrivacyError(DpflError):
    """A privacy rule would be broken; nothing was released."""


class IncompatiblePlan(PrivacyError):
    """Sampler, clip, mechanism, method or trust do not fit together."""


class UnsupportedEvent(PrivacyError):
    """A privacy event is not in the closed table that the accountants understand."""


class BudgetExhausted(PrivacyError):
    """The next event would take the composed epsilon above the budget."""


class BudgetMismatch(PrivacyError):
    """A ledger was opened with another budget or owner than the one written in it."""


class PermitMismatch(PrivacyError):
    """A release was asked for with a permit of another event or round."""


class PermitSpent(PrivacyError):
    """A permit buys one release; this one has been used."""


class RoundAlreadyReleased(PrivacyError):
    """A round that has been published cannot be released a second time."""


class DuplicateContribution(PrivacyError):
    """One privacy unit appears twice in one sum."""


class ParticipationExceeded(PrivacyError):
    """A unit would take part sooner or more often than the noise was calibrated for."""


class InsecureRandomness(PrivacyError):
    """A seeded generator was used where only operating-system entropy is allowed."""


class LedgerCorrupt(PrivacyError):
    """The ledger's hash chain, schema or file is damaged or was edited."""


class LedgerKeyLost(PrivacyError):
    """The private key of a ledger is missing, damaged or another one: it can be read but not charged."""


class StatementInvalid(PrivacyError):
    """A signed privacy statement was edited, or its run does not bear it out."""


class LedgerLocked(PrivacyError):
    """Another process holds the ledger."""


# --- runs ---------------------------------------------------------------------------------------


class RunError(DpflError):
    """A run directory exists already, is in use, is incomplete, or is not one."""


class StorageError(DpflError):
    """The disk refused a write (full, read-only); what was durable before stays valid."""


class CheckpointError(DpflError):
    """A checkpoint is missing, damaged, of another configuration, or older than the ledger."""


class AggregationError(DpflError):
    """Updates cannot be combined as asked: too many bad ones for the rule, another shape, an unknown rule or parameter."""


class MessageRefused(DpflError):
    """Bytes from the other side are not what may come now: malformed, too large, replayed, or of another run."""


class SecureSumAborted(DpflError):
    """A secure sum cannot go on without telling more than the sum: it ends here, and nothing is opened."""


class AuditError(DpflError):
    """An audit cannot say anything: too few canaries, an impossible confidence or count, or colliding names."""


class PolicyRefused(DpflError):
    """A site's policy does not allow what it was asked for; it does not take part."""


class AuditLogCorrupt(DpflError):
    """An audit log was edited, cut in the middle or signed by another key."""


class KitRefused(DpflError):
    """An invitation, a request or a kit is missing, damaged, expired, readable by others, or of somebody else."""


class BrokerFailed(DpflError):
    """The broker does not start, does not answer, or does not take what it was given."""


class RunInterrupted(DpflError):
    """The run was asked to stop (SIGINT, SIGTERM) and stopped cleanly between two rounds."""
