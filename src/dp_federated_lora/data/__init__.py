"""Sources, tables, tokenised examples, batches and partitions: everything between a file and a client."""

from dp_federated_lora.data.batching import collate, length_batches
from dp_federated_lora.data.datasets import (
    Example,
    Examples,
    Tokenizer,
    labelled_images,
    load_tokenizer,
    tokenize_causal,
    tokenize_classification,
    tokenize_image_text,
)
from dp_federated_lora.data.images import ImageFormat
from dp_federated_lora.data.partition import by_column, dirichlet, iid
from dp_federated_lora.data.sources import Source, parse_source, resolve
from dp_federated_lora.data.tables import Table, read_table

__all__ = [
    "Example",
    "Examples",
    "ImageFormat",
    "Source",
    "Table",
    "Tokenizer",
    "by_column",
    "collate",
    "dirichlet",
    "iid",
    "labelled_images",
    "length_batches",
    "load_tokenizer",
    "parse_source",
    "read_table",
    "resolve",
    "tokenize_causal",
    "tokenize_classification",
    "tokenize_image_text",
]
