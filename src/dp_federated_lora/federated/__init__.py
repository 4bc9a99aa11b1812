"""One federated round and what a crash leaves of it, the same for every engine."""

from dp_federated_lora.federated.checkpoint import (
    RoundKeyFile,
    ServerState,
    checkpoint_head,
    read_checkpoint,
    write_checkpoint,
)
from dp_federated_lora.federated.client import Client, Purpose, Request, contributions, handle, report
from dp_federated_lora.federated.defence import Defence
from dp_federated_lora.federated.memory import ClientMemory
from dp_federated_lora.federated.round import Exchange, RoundReport, Server, Sites
from dp_federated_lora.federated.secure import noise_of, rotation_of, share, size_of, terms_of
from dp_federated_lora.federated.stacked import Piece, pieces
from dp_federated_lora.federated.staleness import SYNCHRONOUS, Delays

__all__ = (
    "SYNCHRONOUS",
    "Client",
    "ClientMemory",
    "Defence",
    "Delays",
    "Exchange",
    "Piece",
    "Purpose",
    "Request",
    "RoundKeyFile",
    "RoundReport",
    "Server",
    "ServerState",
    "Sites",
    "checkpoint_head",
    "contributions",
    "handle",
    "noise_of",
    "pieces",
    "read_checkpoint",
    "report",
    "rotation_of",
    "share",
    "size_of",
    "terms_of",
    "write_checkpoint",
)
