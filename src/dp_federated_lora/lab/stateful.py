"""What cannot be had of local schedules, and where participants keep state from round to round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dp_federated_lora.lab.config import Config

_CONTROLLED: Final = ("ffa", "fedavg", "rolora", "fedsb")


def state_problems(config: Config) -> list[str]:
    """What is wrong with a configuration's local schedule, "fedsa" and local_control, each with its reason and a fix."""
    training, method, problems = config.training, config.method.name, []
    if training.local_steps_end is not None and training.local_schedule == "constant":
        problems.append('training.local_steps_end: is reached along a curve; set local_schedule to "linear" or "cosine"')
    if method == "fedsa":
        problems += _fedsa_problems(config)
    if training.local_control and method not in _CONTROLLED:
        problems.append(
            f'training.local_control: with "{method}" coordinates do not each get every local step of a round, or change their '
            f"meaning, so control variates do not fit; use one of {', '.join(_CONTROLLED)}"
        )
    if training.local_control and (training.local_optimizer != "sgd" or training.local_proximal or training.local_steps_end):
        problems.append(
            "training.local_control: reads mean gradients off the change of plain SGD steps, as many in each round; remove "
            "local_optimizer, local_proximal and local_steps_end"
        )
    if training.local_control and config.robust:
        problems.append(
            "training.local_control: c follows the plain mean of clipped changes, which [robust] replaces; remove one of them"
        )
    if method == "fedsa" or training.local_control:
        problems += _keeping_problems(config)
    return problems


def _fedsa_problems(config: Config) -> list[str]:
    training, problems = config.training, []
    if config.privacy.unit == "example":
        problems.append(
            'method.name: "fedsa" trains each client\'s own B on its examples without noise, so one example would move all '
            'gradients of its client; use unit = "client", or "ffa"'
        )
    elif min(training.local_steps or 1, training.local_steps_end or training.local_steps or 1) < 2:
        problems.append(
            'method.name: "fedsa" starts each client from B = 0, where A has no gradient: with one local step its first report '
            "holds nothing of A; set training.local_steps (and local_steps_end) >= 2"
        )
    if training.patience and config.evaluation is None:
        problems.append(
            'training.patience: with "fedsa" public test data score the shared part alone, without the clients\' B; add '
            "[evaluation], which scores what each client uses, or remove it"
        )
    return problems


def _keeping_problems(config: Config) -> list[str]:
    federation, problems = config.federation, []
    if federation.max_staleness:
        problems.append(
            'federation.max_staleness: with "fedsa" or local_control a participant begins from what its last contribution left; '
            "one that is late would begin the next before that; set it to 0"
        )
    if federation.ranks:
        problems.append('federation.ranks: what is kept with "fedsa" or local_control is of the whole adapter; give all one rank')
    if config.privacy.correlated or config.privacy.shuffler:
        problems.append(
            "privacy.correlated, shuffler: what clients keep depends on earlier rounds, and has not been analysed with noise "
            'that does so too or with mixed reports; remove them, or use a method other than "fedsa" and no local_control'
        )
    return problems
