"""Sources, tables, tokenised examples, batches and partitions: everything between a file and a client."""

from dp_federated_lora.data.batching import collate, length_batches
from dp_federated_lora.data.datasets import (
    Example,
    Examples,
    Tokenizer,
    load_tokenizer,
    tokenize_causal,
    tokenize_classification,
)
from dp_federated_lora.data.partition import by_column, dirichlet, iid
from dp_federated_lora.data.sources import Source, parse_source, resolve
from dp_federated_lora.data.tables import Table, read_table

__all__ = [
    "Example",
    "Examples",
    "Source",
    "Table",
    "Tokenizer",
    "by_column",
    "collate",
    "dirichlet",
    "iid",
    "length_batches",
    "load_tokenizer",
    "parse_source",
    "read_table",
    "resolve",
    "tokenize_causal",
    "tokenize_classification",
]
