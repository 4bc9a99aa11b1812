"""Tokenised examples, with real tokenizers small enough to be built here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dp_federated_lora.data import (
    Example,
    Examples,
    load_tokenizer,
    tokenize_causal,
    tokenize_classification,
)
from dp_federated_lora.errors import ConfigError, DataError, ModelError

UNTIMED = settings(deadline=None)  # a busy machine is no failure

WORDS = ["<pad>", "<unk>", "<cls>", "<sep>", "<eos>", "zero", "one", "two", "three", "four"]
PAD, UNK, CLS, SEP, EOS, ZERO, ONE, TWO, THREE, FOUR = range(len(WORDS))


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a word; adds <cls> and <sep> as an encoder does."""
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", CLS), ("<sep>", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(eos_token="<eos>")


def test_classification_adds_special_tokens_and_numbers_labels_by_the_public_list(tokenizer) -> None:
    examples = tokenize_classification(
        ["one two", "three"], ["b", "a"], label_names=["a", "b", "c"], tokenizer=tokenizer, max_tokens=8
    )
    assert examples == Examples(((CLS, ONE, TWO, SEP), (CLS, THREE, SEP)), (1, 0))
    assert examples[0] == Example((CLS, ONE, TWO, SEP), 1, 0)


def test_classification_cuts_long_texts_and_keeps_the_special_tokens(tokenizer) -> None:
    examples = tokenize_classification(["one two three four"], ["a"], label_names=["a"], tokenizer=tokenizer, max_tokens=4)
    assert examples.tokens == ((CLS, ONE, TWO, SEP),)


def test_a_label_outside_the_public_list_is_refused_by_name(tokenizer) -> None:
    with pytest.raises(DataError, match=r"row 1 has label 'secret', which is not in the public label list"):
        tokenize_classification(["one", "two"], ["a", "secret"], label_names=["a"], tokenizer=tokenizer, max_tokens=8)


def test_duplicate_public_labels_and_unequal_lengths_are_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="duplicates"):
        tokenize_classification(["one"], ["a"], label_names=["a", "a"], tokenizer=tokenizer, max_tokens=8)
    with pytest.raises(DataError, match="2 texts came with 1 labels"):
        tokenize_classification(["one", "two"], ["a"], label_names=["a"], tokenizer=tokenizer, max_tokens=8)


def test_a_client_without_rows_has_no_examples_but_keeps_its_kind(tokenizer) -> None:
    empty = tokenize_classification([], [], label_names=["a"], tokenizer=tokenizer, max_tokens=8)
    assert len(empty) == 0
    assert empty.labels == ()
    assert tokenize_causal([], tokenizer=tokenizer, max_tokens=8) == Examples(())


@UNTIMED
@given(
    st.lists(st.lists(st.sampled_from(WORDS[5:]), max_size=12), max_size=6),
    st.integers(2, 7),
)
def test_causal_chunks_rejoin_to_the_documents_each_ended_by_the_end_token(documents: list[list[str]], max_tokens: int) -> None:
    examples = tokenize_causal(
        [" ".join(words) for words in documents],
        tokenizer=word_tokenizer(eos_token="<eos>"),
        max_tokens=max_tokens,
    )
    assert examples.labels is None
    assert all(2 <= len(chunk) <= max_tokens for chunk in examples.tokens)
    expected = []
    for words in documents:
        ids = [WORDS.index(word) for word in words] + [EOS]
        # Only a last chunk of a lone end token predicts nothing.
        expected += ids[:-1] if len(ids) % max_tokens == 1 else ids
    assert [token for chunk in examples.tokens for token in chunk] == expected


def test_causal_examples_never_cross_documents(tokenizer) -> None:
    examples = tokenize_causal(["one two", "three"], tokenizer=tokenizer, max_tokens=100)
    assert examples.tokens == ((ONE, TWO, EOS), (THREE, EOS))


def test_a_tokenizer_without_end_token_cannot_prepare_causal_examples() -> None:
    with pytest.raises(ModelError, match="end-of-text"):
        tokenize_causal(["one"], tokenizer=word_tokenizer(), max_tokens=8)


@pytest.mark.parametrize("max_tokens", [1, 0, -3])
def test_fewer_than_two_tokens_are_refused(tokenizer, max_tokens: int) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        tokenize_causal(["one"], tokenizer=tokenizer, max_tokens=max_tokens)
    with pytest.raises(ConfigError, match="at least 2"):
        tokenize_classification(["one"], ["a"], label_names=["a"], tokenizer=tokenizer, max_tokens=max_tokens)


def test_a_subset_keeps_unit_ids_through_any_number_of_subsets() -> None:
    examples = Examples(((1,), (2, 2), (3,), (4,)), (0, 1, 0, 1))
    part = examples.subset([3, 1, 2])
    assert part == Examples(((4,), (2, 2), (3,)), (1, 1, 0), (3, 1, 2))
    assert part.subset([1]) == Examples(((2, 2),), (1,), (1,))


def test_an_empty_subset_is_allowed() -> None:
    assert len(Examples(((1,),), (0,)).subset([])) == 0
    assert Examples(((1,),)).subset([]).labels is None


@pytest.mark.parametrize("indices", [[2], [-1], [0, 0]])
def test_a_subset_out_of_range_or_with_repetition_is_refused(indices: list[int]) -> None:
    with pytest.raises(DataError):
        Examples(((1,), (2,))).subset(indices)


def test_inconsistent_examples_cannot_be_made() -> None:
    with pytest.raises(DataError, match="2 labels"):
        Examples(((1,),), (0, 1))
    with pytest.raises(DataError, match="distinct unit ids"):
        Examples(((1,), (2,)), None, (5, 5))
    with pytest.raises(DataError, match="distinct unit ids"):
        Examples(((1,), (2,)), None, (5,))
    with pytest.raises(DataError, match="example 1 has no token"):
        Examples(((1,), ()))


def test_examples_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Examples(((1,),)).labels = (3,)  # type: ignore[misc]


def test_a_tokenizer_directory_loads_and_encodes_as_the_saved_one(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_id == EOS
    assert loaded(["one four"])["input_ids"] == tokenizer(["one four"])["input_ids"]


def write_gguf(path: Path) -> None:
    """A GGUF file with a byte-level vocabulary and no weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_vocab_size(len(alphabet) + 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, "he", "<eos>"])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(alphabet) + 1)
    writer.add_eos_token_id(len(alphabet) + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_a_gguf_file_gives_its_tokenizer_by_path_or_by_folder_and_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    by_path = load_tokenizer(tmp_path / "tiny.gguf")
    by_name = load_tokenizer(tmp_path, "tiny.gguf")
    assert by_path(["hehe"])["input_ids"] == by_name(["hehe"])["input_ids"] == [[256, 256]]
    assert by_path.eos_token_id == 257


def test_a_missing_or_unusable_tokenizer_is_a_model_error_that_names_the_path(tmp_path: Path) -> None:
    for path, name in [(tmp_path / "absent", None), (tmp_path, "absent.gguf"), (tmp_path, None)]:
        with pytest.raises(ModelError, match=r"tokenizer") as caught:
            load_tokenizer(path, name)
        assert str(tmp_path) in str(caught.value)
