"""One participant's own adapter, where participants keep a part of it to themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dp_federated_lora.errors import ConfigError, RunError
from dp_federated_lora.federated import ClientMemory
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.workbench import Workbench, participant_names

SHARED_PART: Final = "This is the shared part: its B is zero, so only the head does anything until a participant adds its own B."
_PERSONAL: Final = (
    "This is the adapter of one participant alone. Its B was trained on that participant's data without noise: no privacy "
    "statement covers it, so it must not leave the participant."
)


def personal_adapter(run: str | Path, client: str, out: str | Path) -> Path:
    """Write the shared A and head of a finished run with the B that `client` kept, readable by their owner alone.

    Nothing protects this B: it is for the participant whose data it was trained on. One that never took part has B = 0.

    Args:
        run: run directory.
        client: name of the participant.
        out: the new folder.

    Returns:
        The folder.

    Raises:
        ConfigError: if the run's method keeps nothing at participants, or nobody has that name.
        RunError: if there is no run, or `out` exists.
        ModelError: if the run has no readable adapter yet.
        CheckpointError: if the participant's state is missing or damaged.
    """
    directory, folder = RunDirectory.existing(Path(run)), Path(out)
    config = directory.load_config()
    if client not in (names := participant_names(config)):
        raise ConfigError(f"{run} has no participant {client!r}; they are called {names[0]} to {names[-1]}")
    bench = Workbench.of(config)
    if not bench.method.kept:
        raise ConfigError(
            f"method {config.method.name!r} keeps nothing at participants: {directory.adapter} is everybody's adapter"
        )
    bench.model.load_saved(directory.adapter)
    bench.model.load(ClientMemory(directory.clients).before(client, config.privacy.rounds + 1))
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; name another folder") from error
    bench.model.save(folder, source=config.model.source, note=_PERSONAL)
    return folder
