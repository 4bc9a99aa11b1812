"""An adapted model together with how examples are batched into it.

Blocks below the lowest adapted one are frozen and have no dropout, so their output for an example never changes. With
`last_layers` set it is computed once per example and replayed: exactly the same numbers, without the work. While the head
alone is trained, the same holds for the features that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dp_federated_lora.data import Examples, ImageFormat, collate, length_batches
from dp_federated_lora.errors import ModelError
from dp_federated_lora.lora import AdaptedModel, Classifier, Factor, Task, block_list
from dp_federated_lora.training.kept import Kept, fingerprint
from dp_federated_lora.training.parallel import in_parallel

_FEATURE_TOKENS: Final = 16
"""An example's kept features in tokens: what the gradient of a head takes in memory, roughly."""

T = TypeVar("T")
R = TypeVar("R")


@final
class Learner:
    """Runs examples through an adapted model in length-bucketed batches, where the model computes.

    Args:
        model: the adapted model; its parameters may be exchanged between calls.
        pad_id: token id for padding.
        batch_tokens: most tokens of one forward pass, padding included.
        last_layers: number of adapted blocks at the top if the others may be cached; None for no cache.
        keep_features: whether there will be rounds that train the head alone.
        images: how the model takes images; None for one of texts alone.
        cache: folder for what never changes, so that later runs on the same model and examples find it; None for memory.
        threads: how many of the machine's cores `spread` uses.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        pad_id: int,
        batch_tokens: int,
        last_layers: int | None,
        keep_features: bool = False,
        images: ImageFormat | None = None,
        cache: Path | None = None,
        threads: int = 1,
    ) -> None:
        self.model = model
        self.threads = threads
        self._twins: list[Learner] = []
        self._pad_id = pad_id
        self._images = images
        self._batch_tokens = batch_tokens
        blocks = block_list(model.module) if last_layers else None
        depth = len(blocks) - last_layers if blocks and last_layers else 0
        self._trunk = _Trunk(blocks, depth) if blocks and depth else None
        self._keep_features = keep_features
        self._kept = Kept(cache)
        self._factors = model.parameters(frozenset(Factor) - {Factor.HEAD})
        self._factors_of_features = {name: p.detach().clone() for name, p in self._factors.items()}

    def spread(self, work: Callable[[Learner, T], R], items: Iterable[T]) -> Iterator[R]:
        """`work(learner, item)` of each item, in their order, on `threads` cores.

        Each call has a learner of its own at this one's adapter, with the same frozen tensors, and computes on one core: nothing
        depends on the number of threads, to the bit. (One core for each of several batches of a few hundred tokens is faster
        than all cores for one after the other.) A few results are waiting at most, whatever the number of items.

        Args:
            work: may change its learner's adapter and which of its parameters train, as nobody else uses it meanwhile. It runs
                in another thread, where gradients are on at first.
            items: taken one by one, in the calling thread.
        """
        if self.threads == 1:
            yield from (work(self, item) for item in items)
            return
        self._twins = self._twins or [self._twin() for _ in range(self.threads)]
        for twin in self._twins:
            twin.model.load(self.model.state())
        yield from in_parallel(self._twins, work, items)

    def _twin(self) -> Learner:
        """A copy that shares all frozen tensors and what is kept."""
        own = {id(p) for p in self.model.parameters(frozenset(Factor)).values()}
        module = self.model.module
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own]
        shared: list[object] = [*tensors, self._kept, self._factors_of_features]
        twin = deepcopy(self, {id(each): each for each in shared})
        twin.threads = 1
        return twin

    def batches(self, examples: Examples, indices: Sequence[int]) -> Iterator[list[int]]:
        """Split `indices` into batches of similar length; where the head alone runs, all are alike."""
        known = self._features_serve([examples.content(i) for i in indices])
        lengths = [_FEATURE_TOKENS if known else len(examples.tokens[i]) for i in indices]
        for batch in length_batches(lengths, max_tokens=self._batch_tokens):
            yield [indices[i] for i in batch]

    def prepare(self, *sets: Examples, on_progress: Callable[[float], None] = lambda _: None) -> None:
        """Compute what never changes for all examples of `sets`, set by set, in batches that depend on nothing else.

        Doing it once, up front and in a fixed order keeps a resumed run equal to the bit. Call it before the model's
        adapter changes for the first time. Nothing is done for sets that are known.

        Args:
            sets: examples to prepare.
            on_progress: called with the share that is done.

        Raises:
            StorageError: if the cache refuses a file, or holds a damaged one.
        """
        if self._trunk is None and not self._keep_features:
            return
        known = self._kept.states if self._trunk else self._kept.features
        wanted = [examples for examples in sets if any(examples.content(i) not in known for i in range(len(examples)))]
        plans = [(examples, length_batches([*map(len, examples.tokens)], max_tokens=self._batch_tokens)) for examples in wanted]
        if self._trunk and wanted and not self._trunk.ready:
            self._trunk.record(partial(self._forward, self._inputs(wanted[0], [0])))
        todo = [plan for plan in plans if not self._kept.find(plan[0], [*chain(*plan[1])], key=lambda: self._key)]
        parts = self.spread(lambda twin, part: twin._frozen_of(*part), ((e, batch) for e, batches in todo for batch in batches))
        done, total = 0, sum(len(examples) for examples, _ in todo)
        for examples, batches in todo:
            on_progress(done / total)
            tensors = self._gathered(examples, islice(parts, len(batches)))
            self._kept.put(examples, [*chain(*batches)], tensors, key=lambda: self._key)
            done += len(examples)

    def _gathered(self, examples: Examples, parts: Iterable[tuple[list[Tensor], Tensor | None]]) -> dict[str, Tensor]:
        """States `(tokens of all, h)` and features `(n, h)` of what `_frozen_of` gave for batch after batch."""
        tensors: dict[str, Tensor] = {}

        def put(name: str, rows: int, first: int, values: Tensor) -> None:
            # One block each: thousands of small ones, each left between large short-lived ones, would spread over three times
            # the memory.
            if name not in tensors:
                tensors[name] = values.new_empty(rows, values.shape[-1])
            tensors[name][first : first + len(values)] = values

        tokens, done, seen = sum(map(len, examples.tokens)), 0, 0
        for states, features in parts:
            for own in states:
                put("states", tokens, done, own)
                done += len(own)
            if features is not None:
                put("features", len(examples), seen, features)
                seen += len(features)
        return tensors

    def _frozen_of(self, examples: Examples, batch: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        """States `(T, h)` of each example and features `(B, h)` of a batch, as far as they are kept."""
        inputs, own = self._inputs(examples, batch), list[Tensor]()
        start: AbstractContextManager[None] = nullcontext()
        if self._trunk:
            states = self._trunk.record(partial(self._forward, inputs))
            start = self._trunk.replay(states)
            own = [state[: len(examples.tokens[index])] for state, index in zip(states.cpu(), batch, strict=True)]
        if not self._keep_features:
            return own, None
        with torch.no_grad(), start:
            return own, self._classifier.features(**inputs).cpu()

    @cached_property
    def _key(self) -> str:
        """What decides the kept tensors beside the examples: the model at its start, and how batches are made and computed."""
        module = self.model.module
        tensors = {name: tensor for name, tensor in module.state_dict().items() if Factor.of(name) is None}
        facts: list[object] = [part.config for part in module.modules() if hasattr(part, "config")]
        depth = self._trunk.depth if self._trunk else 0
        facts += [depth, self._pad_id, self._batch_tokens, self._images]
        if self._keep_features:
            tensors |= self._factors_of_features
            facts.append(self._classifier.pooling)
        if self.model.device.type != "cpu":
            facts.append(self.model.device.type)  # whose numbers are rounded in another way
        return fingerprint(tensors, *facts)

    def logits(self, examples: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, token ids `(B, T)` and mask `(B, T)` of a batch: 1 on tokens of text, 0 on padding and where an image is."""
        inputs, contents = self._inputs(examples, indices), [examples.content(i) for i in indices]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self._images is not None:
            mask = mask * (ids != self._images.token)
        if self._features_serve(contents):
            features = torch.stack([self._kept.features[content] for content in contents])
            return self._classifier.head(features.to(self.model.device)), ids, mask
        states = [self._kept.states.get(content) for content in contents]
        known = [state for state in states if state is not None]
        if self._trunk is None or len(known) < len(contents):
            return self._forward(inputs), ids, mask
        if self.model.task is Task.IMAGE_TEXT:
            del inputs["pixel_values"]  # what the image became is in the stored states
        with self._trunk.replay(nn.utils.rnn.pad_sequence(known, batch_first=True).to(self.model.device)):
            return self._forward(inputs), ids, mask

    def losses(self, examples: Examples, indices: Sequence[int]) -> Tensor:
        """Loss of each example `(B,)`: cross-entropy, for language models averaged over the example's tokens."""
        return losses_of(examples, indices, *self.logits(examples, indices))

    @property
    def _classifier(self) -> Classifier:
        return cast(Classifier, self.model.module)  # the configuration allows head rounds for classifiers only

    def _features_serve(self, contents: Sequence[object]) -> bool:
        """Whether features of all these are kept and those of the adapter as it is, and no gradient has to pass through them."""
        if not self._kept.features or (torch.is_grad_enabled() and any(p.requires_grad for p in self._factors.values())):
            return False
        same = all(torch.equal(p, self._factors_of_features[name]) for name, p in self._factors.items())
        return same and all(content in self._kept.features for content in contents)

    def _inputs(self, examples: Examples, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes, by the names that transformers gives it."""
        ids, mask = collate([examples.tokens[i] for i in indices], pad_id=self._pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._images is not None:
            inputs["pixel_values"] = self._images.pixels([examples.images[i] for i in indices])
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        output: Any = self.model.module(**inputs)
        logits: Tensor = output if self.model.task is Task.CLASSIFICATION else output.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def losses_of(examples: Examples, indices: Sequence[int], logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Loss of each example `(B,)` as `Learner.losses`, from what `Learner.logits` gave for these `indices`."""
    if examples.labels is not None:
        labels = torch.tensor([examples.labels[i] for i in indices], device=logits.device)
        return cross_entropy(logits, labels, reduction="none")
    tokens = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
    weight = mask[:, 1:]
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


class _Replay(nn.Module):
    """Stands in for a frozen block: gives back a stored state, or lets the state through."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self._as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        state = hidden_states if self.state is None else self.state
        return (state,) if self._as_tuple else state


class _Recorded(Exception):
    """The output of the trunk."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


@final
class _Trunk:
    """The first `depth` blocks of a model, recorded once and replayed."""

    def __init__(self, blocks: nn.ModuleList, depth: int) -> None:
        self._blocks = blocks
        self._originals = list(blocks)[:depth]
        self._stand_ins: list[_Replay] = []
        self.depth = depth

    @property
    def ready(self) -> bool:
        """Whether a forward pass was recorded, so that replay knows what blocks give back."""
        return bool(self._stand_ins)

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """Hidden states `(B, T, h)` after the trunk in the forward pass `forward`, which ends there."""

        def stop(_: nn.Module, __: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            as_tuple = isinstance(output, tuple)
            self._stand_ins = self._stand_ins or [_Replay(as_tuple) for _ in self._originals]
            raise _Recorded(output[0] if isinstance(output, tuple) else output)

        handle = self._originals[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                forward()
        except _Recorded as recorded:
            return recorded.state
        finally:
            handle.remove()
        raise ModelError("the backbone did not run its own blocks; leave lora.last_layers out for this model")

    @contextmanager
    def replay(self, state: Tensor) -> Iterator[None]:
        """While open, a forward pass starts from the stored `state` `(B, T, h)` instead of running the trunk."""
        try:
            self._stand_ins[0].state = state
            self._place(self._stand_ins)
            yield
        finally:
            self._place(self._originals)
            self._stand_ins[0].state = None

    def _place(self, blocks: Sequence[nn.Module]) -> None:
        for index, block in enumerate(blocks):
            self._blocks[index] = block
