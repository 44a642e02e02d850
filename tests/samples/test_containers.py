"""Containers of other packages, the real ones: opened as the dicts that they stand for, or refused by path.

echo_torch imports none of these packages; it goes by what their containers do.
"""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optree
import pytest
import torch
from compare import assert_same, to_numpy
from learner_process import Learner
from tensordict import (
    LazyStackedTensorDict,
    MemoryMappedTensor,
    MetaData,
    NonTensorData,
    TensorClass,
    TensorDict,
    TensorDictParams,
    TypedTensorDict,
    UnbatchedTensor,
    tensorclass,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from echo_torch import EchoSink, SpecMismatchError, numpy_example
from echo_torch.samples.spec import SampleSpec

ROWS = 64


def values(rows: int = ROWS) -> dict[str, Any]:
    """A batch in plain dicts, whose keys are not in their order."""
    generator = torch.Generator().manual_seed(rows)
    return {
        "reward": torch.randn(rows, generator=generator),
        "obs": {
            "state": torch.randn(rows, 3, generator=generator).to(torch.bfloat16),
            "camera": torch.randint(0, 256, (rows, 2, 3), generator=generator, dtype=torch.uint8),
        },
        "act": torch.arange(rows),
    }


def sample() -> dict[str, Any]:
    return optree.tree_map(lambda leaf: leaf[0], values())


@tensorclass
class Obs:
    state: torch.Tensor
    camera: torch.Tensor


@tensorclass
class Step:
    reward: torch.Tensor
    obs: Obs
    act: torch.Tensor
    info: torch.Tensor | None = None


class Inherited(TensorClass):
    reward: torch.Tensor
    obs: Obs
    act: torch.Tensor


class Typed(TypedTensorDict):
    reward: torch.Tensor
    obs: TensorDict
    act: torch.Tensor


@dataclasses.dataclass
class Plain:
    reward: Any
    obs: Any
    act: Any
    info: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    reward: Any
    obs: Any
    act: Any


@dataclasses.dataclass(slots=True)
class Slots:
    state: Any
    camera: Any


@dataclasses.dataclass
class Output(ModelOutput):
    """A user's ModelOutput; None is left out."""

    reward: Any = None
    info: Any = None
    obs: Any = None
    act: Any = None


def tensordict(batch: dict[str, Any], size: list[int]) -> TensorDict:
    return TensorDict(batch, size)


def lazy(batch: dict[str, Any], size: list[int]) -> Any:
    whole = tensordict(batch, size)
    return LazyStackedTensorDict(*whole.unbind(0)) if size else whole


def stacked(batch: dict[str, Any], size: list[int]) -> Any:
    whole = tensordict(batch, size)
    return torch.stack(list(whole.unbind(0))) if size else whole


def step(batch: dict[str, Any], size: list[int]) -> Any:
    return Step(batch["reward"], Obs(**batch["obs"], batch_size=size), batch["act"], batch_size=size)


MAKE: dict[str, Callable[[dict[str, Any], list[int]], Any]] = {
    "dict": lambda batch, size: batch,
    "TensorDict": tensordict,
    "TensorDict without batch size": lambda batch, size: TensorDict(batch, []),
    "locked TensorDict": lambda batch, size: tensordict(batch, size).lock_(),
    "named TensorDict": lambda batch, size: TensorDict(batch, size, names=["time"] if size else None),
    "nested TensorDict": lambda batch, size: TensorDict({**batch, "obs": TensorDict(batch["obs"], size)}, size),
    "stacked TensorDict": stacked,
    "LazyStackedTensorDict": lazy,
    "memory-mapped TensorDict": lambda batch, size: tensordict(batch, size).memmap_(),
    "shared TensorDict": lambda batch, size: tensordict(batch, size).clone().share_memory_(),
    "TensorDictParams": lambda batch, size: TensorDictParams(tensordict(batch, size), no_convert=True),
    "TypedTensorDict": lambda batch, size: Typed(
        reward=batch["reward"], obs=TensorDict(batch["obs"], size), act=batch["act"], batch_size=size
    ),
    "tensorclass": step,
    "TensorClass": lambda batch, size: Inherited(
        batch["reward"], Obs(**batch["obs"], batch_size=size), batch["act"], batch_size=size
    ),
    "lazy tensorclass": lambda batch, size: (
        LazyStackedTensorDict.lazy_stack(list(step(batch, size).unbind(0))) if size else step(batch, size)
    ),
    "TensorDict of a tensorclass": lambda batch, size: TensorDict(
        {**batch, "obs": Obs(**batch["obs"], batch_size=size)}, size
    ),
    "dict of a TensorDict": lambda batch, size: {**batch, "obs": TensorDict(batch["obs"], size)},
    "dataclass": lambda batch, size: Plain(**batch),
    "frozen dataclass of slots": lambda batch, size: Frozen(batch["reward"], Slots(**batch["obs"]), batch["act"]),
    "dataclass of a TensorDict": lambda batch, size: Plain(**{**batch, "obs": TensorDict(batch["obs"], size)}),
    "ModelOutput": lambda batch, size: Output(**batch),
    "BatchEncoding": lambda batch, size: BatchEncoding(batch),
    "UserDict": lambda batch, size: collections.UserDict(batch),
    "mappingproxy": lambda batch, size: types.MappingProxyType({**batch, "obs": types.MappingProxyType(batch["obs"])}),
}


def payload(arrays: list[Any]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("name", MAKE)
def test_a_container_is_the_dict_that_it_stands_for(name: str) -> None:
    """As the example and as what is sent, each interchangeable with plain dicts; keys sorted, None left out."""
    make = MAKE[name]
    expected = SampleSpec(sample())
    ours = SampleSpec(make(sample(), []))
    assert ours.leaves == expected.leaves
    assert [leaf.path for leaf in ours.leaves] == ["['act']", "['obs']['camera']", "['obs']['state']", "['reward']"]
    want = payload(expected.match(values()).arrays)
    for spec, batch in [(ours, make(values(), [ROWS])), (ours, values()), (expected, make(values(), [ROWS]))]:
        match = spec.match(batch)
        assert (match.rows, match.batched) == (ROWS, True)
        assert payload(match.arrays) == want
    for spec in (ours, expected):
        assert spec.match(make(sample(), []))[1:3] == (1, False)
    assert optree.tree_paths(numpy_example(make(sample(), []))) == optree.tree_paths(sample())


@pytest.mark.parametrize("name", ["TensorDict", "LazyStackedTensorDict", "tensorclass", "memory-mapped TensorDict"])
def test_one_row_of_a_batch_is_an_example_for_it(name: str) -> None:
    """``batch[0]`` and slices, the empty one included."""
    batch = MAKE[name](values(), [ROWS])
    spec = SampleSpec(batch[0])
    assert spec.leaves == SampleSpec(sample()).leaves
    assert spec.match(batch).rows == ROWS
    assert spec.match(batch[5:12]).rows == 7
    assert spec.match(batch[3])[1:3] == (1, False)
    if name != "LazyStackedTensorDict":  # its rows hold the keys; before tensordict 0.15 none are left without a row
        assert spec.match(batch[:0])[1:3] == (0, True)


def test_further_batch_dimensions_belong_to_the_sample() -> None:
    """A TensorDict of batch size [B, T] is B samples of T steps, if its row is the example."""
    batch = TensorDict({"x": torch.arange(24).reshape(4, 3, 2), "n": {"y": torch.zeros(4, 3)}}, [4, 3])
    spec = SampleSpec(batch[0])
    assert [leaf.shape for leaf in spec.leaves] == [(3,), (3, 2)]
    assert spec.match(batch).rows == 4
    single = SampleSpec(batch[0, 0])
    assert single.match(batch.reshape(-1)).rows == 12
    with pytest.raises(SpecMismatchError, match=r"batch\['x'\]: got .* \[4, 3, 2\].*x\.reshape\(-1, 2\)"):
        single.match(batch)


def test_a_memory_mapped_tensor_is_a_tensor() -> None:
    tensor = MemoryMappedTensor.from_tensor(torch.arange(12).reshape(4, 3))
    match = SampleSpec(tensor[0]).match(tensor)
    assert match.arrays[0].tobytes() == np.arange(12).tobytes()


@pytest.mark.parametrize("name", ["TensorDict", "tensorclass", "BatchEncoding", "ModelOutput"])
def test_from_batch_takes_any_container(name: str) -> None:
    sink = EchoSink.from_batch("nowhere", 1, MAKE[name](values(), [ROWS]))
    assert repr(EchoSink("nowhere", 1, sample())) == repr(sink)


# What holds no tensors.


@tensorclass
class Named:
    x: torch.Tensor
    name: str | None


def named(name: Any) -> Any:
    return Named(torch.ones(4, 3), name, batch_size=[4])


def in_rows(first: Any, second: Any) -> Any:
    return torch.stack([TensorDict({"x": torch.ones(3), "name": NonTensorData(name)}, []) for name in (first, second)])


NO_TENSORS: dict[str, Callable[[], Any]] = {
    "str in a TensorDict": lambda: TensorDict({"x": torch.ones(4, 3), "name": "text"}, [4]),
    "NonTensorData": lambda: TensorDict({"x": torch.ones(4, 3), "name": NonTensorData("text")}, [4]),
    "NonTensorData in a dict": lambda: {"x": torch.ones(4, 3), "name": NonTensorData(3)},
    "MetaData in a dict": lambda: {"x": torch.ones(4, 3), "name": MetaData(3)},
    "NonTensorStack in a dict": lambda: {
        "x": torch.ones(2, 3), "name": torch.stack([NonTensorData(3), NonTensorData(4)]),
    },
    "strings of rows": lambda: in_rows("a", "b"),
    "numbers of rows": lambda: in_rows(1, 2),
    "str in a tensorclass": lambda: named("text"),
    "object in a tensorclass": lambda: named(object()),
    "strings of rows of a tensorclass": lambda: LazyStackedTensorDict.lazy_stack([named("a")[0], named("b")[0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TENSORS)
def test_data_that_is_no_tensor_is_refused_by_path(name: str) -> None:
    """As an example, in place of a number, and beside what the example has."""
    with pytest.raises(TypeError, match=r"example\['name'\]: got .*, expected a tensor.*leave it out with select="):
        SampleSpec(NO_TENSORS[name]())
    with pytest.raises(TypeError, match=r"batch\['name'\]: got .*, expected a tensor.*leave it out with select="):
        SampleSpec({"x": torch.ones(3), "name": 1}).match(NO_TENSORS[name]())
    with pytest.raises(SpecMismatchError, match=r"batch\['name'\]: unexpected(?s:.*)select="):
        SampleSpec({"x": torch.ones(3)}).match(NO_TENSORS[name]())


@pytest.mark.parametrize(
    "batch",
    [named(NonTensorData(3)), TensorDict({"x": torch.ones(4, 3), "name": MetaData(3)}, [4])],
    ids=["tensorclass", "TensorDict"],
)
def test_a_number_of_the_whole_batch_is_refused_beside_batched_leaves(batch: Any) -> None:
    with pytest.raises(SpecMismatchError, match=r"batch\['name'\]: got .*\[B\].*torch.full\(\(B,\), x, .*, B = 4"):
        SampleSpec({"x": torch.ones(3), "name": 1}).match(batch)


def test_a_tensor_of_the_whole_batch_is_refused_beside_batched_leaves() -> None:
    batch = TensorDict({"x": torch.ones(4, 3), "y": UnbatchedTensor(torch.ones(7))}, [4])
    with pytest.raises(SpecMismatchError, match=r"batch\['y'\]: got .*\[7\], expected .*\[B, 7\].*x\.expand\(B, 7\)"):
        SampleSpec(batch[0]).match(batch)


@pytest.mark.parametrize(
    "make", [lambda x: TensorDict({"x": x}, []), lambda x: Named(x, None, batch_size=[])], ids=["TensorDict", "class"]
)
def test_a_stack_of_samples_of_different_shapes_is_refused_by_path(make: Callable[[torch.Tensor], Any]) -> None:
    batch = LazyStackedTensorDict.lazy_stack([make(torch.ones(3)), make(torch.ones(2))])
    with pytest.raises(TypeError, match=r"batch\['x'\]: got .*, expected a dense tensor; .*pad them to one length"):
        SampleSpec({"x": torch.ones(3)}).match(batch)


def test_a_key_that_some_rows_have_not_is_missing() -> None:
    """A lazy stack has the keys that all of its rows have."""
    batch = LazyStackedTensorDict(
        TensorDict({"x": torch.ones(3), "y": torch.ones(1)}, []), TensorDict({"x": torch.ones(3)}, [])
    )
    assert SampleSpec({"x": torch.ones(3)}).match(batch).rows == 2
    with pytest.raises(SpecMismatchError, match=r"batch\['y'\]: torch.float32 \[1\]: missing"):
        SampleSpec({"x": torch.ones(3), "y": torch.ones(1)}).match(batch)


def test_a_model_output_with_another_field_set_is_refused() -> None:
    spec = SampleSpec(CausalLMOutput(logits=torch.ones(3, 5)))
    assert [leaf.path for leaf in spec.leaves] == ["['logits']"]
    with pytest.raises(SpecMismatchError, match=r"batch\['loss'\]: unexpected"):
        spec.match(CausalLMOutput(loss=torch.tensor(1.0), logits=torch.ones(2, 3, 5)))
    with pytest.raises(SpecMismatchError, match=r"batch\['hidden_states'\]: unexpected tuple of 2"):
        spec.match(CausalLMOutput(logits=torch.ones(2, 3, 5), hidden_states=(torch.ones(2), torch.ones(2))))


# A tokenizer.

LENGTH = 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "to": 2, "be": 3, "or": 4, "not": 5}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = ["to be", "or not to be", "be", "not or"] * (ROWS // 4)


def encode(tokenizer: Any, text: Any, **options: Any) -> Any:
    return tokenizer(text, padding="max_length", max_length=LENGTH, **options)


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_a_tokenizers_batch_matches_its_tensors(tokenizer: Any, kind: str) -> None:
    """Whether the example is one of them, or one text in tensors."""
    batch = encode(tokenizer, TEXTS, return_tensors=kind)
    assert isinstance(batch, BatchEncoding)
    one = encode(tokenizer, TEXTS[0]).convert_to_tensors("pt")
    assert isinstance(one, BatchEncoding)
    for example in (one, {key: value[0] for key, value in batch.items()}):
        assert SampleSpec(example).match(batch).rows == ROWS


def test_a_tokenizers_lists_are_told_to_become_tensors(tokenizer: Any) -> None:
    """On either side; tokens in a list are a leaf each."""
    listed, batch = encode(tokenizer, TEXTS[0]), encode(tokenizer, TEXTS, return_tensors="pt")
    with pytest.raises(SpecMismatchError, match=r"batch\['input_ids'\]: unexpected leaf(?s:.*)torch\.tensor\(x\)"):
        SampleSpec(listed).match(batch)
    with pytest.raises(SpecMismatchError, match=r"batch\['input_ids'\]: got list of 5(?s:.*)torch\.tensor\(x\)"):
        SampleSpec(listed.convert_to_tensors("pt")).match(encode(tokenizer, TEXTS[0]))


def test_padding_to_the_longest_is_refused(tokenizer: Any) -> None:
    spec = SampleSpec(encode(tokenizer, TEXTS[0]).convert_to_tensors("pt"))
    with pytest.raises(
        SpecMismatchError, match=r"\['input_ids'\]: got .* \[2, 4\].*one length: dimension 1 is 4, 5 in"
    ):
        spec.match(tokenizer(TEXTS[:2], padding=True, return_tensors="pt"))


# What arrives.


@pytest.fixture(scope="module")
def learner() -> Iterator[Learner]:
    with Learner(numpy_example(TensorDict(sample(), []))) as learner:
        yield learner


def arrive(learner: Learner, sink: EchoSink, *batches: Any) -> Any:
    """What arrives of ``batches``, and nothing else."""
    before = learner.received()
    with sink:
        for batch in batches:
            sink.send(batch)
        sink.wait()
        return optree.tree_map(lambda leaf: leaf[before:], learner.take(before + ROWS))


@pytest.mark.parametrize("name", [name for name in MAKE if name != "dict"])
def test_what_a_container_holds_arrives(learner: Learner, name: str) -> None:
    """Bit for bit, with a row of it as the example."""
    make = MAKE[name]
    sink = EchoSink("127.0.0.1", learner.port, make(sample(), []), resend_at_close=False)
    assert_same(arrive(learner, sink, make(values(), [ROWS])), to_numpy(values()))


def test_containers_of_all_types_arrive_through_one_sink(learner: Learner) -> None:
    """Rows one by one in one type after the other, and refused ones between them."""
    sink = EchoSink.from_batch("127.0.0.1", learner.port, TensorDict(values(), [ROWS]), resend_at_close=False)
    kinds = list(MAKE.values())
    rows = [
        kinds[index % len(kinds)](optree.tree_map(lambda leaf, index=index: leaf[index], values()), [])
        for index in range(ROWS)
    ]
    with sink:
        for name in NO_TENSORS:
            with pytest.raises((SpecMismatchError, TypeError)):
                sink.send(NO_TENSORS[name]())
        assert_same(arrive(learner, sink, *rows), to_numpy(values()))


def test_what_a_tokenizer_makes_arrives(tokenizer: Any) -> None:
    batch = encode(tokenizer, TEXTS, return_tensors="pt")
    one = encode(tokenizer, TEXTS[0]).convert_to_tensors("pt")
    with Learner(numpy_example(one)) as learner:
        got = arrive(learner, EchoSink("127.0.0.1", learner.port, one, resend_at_close=False), batch)
        assert_same(got, to_numpy(dict(batch)))


def test_what_a_model_gives_arrives() -> None:
    """Logits with a gradient, a tuple of hidden states, and None for the loss."""
    logits = torch.randn(ROWS, 3, 5, requires_grad=True)
    batch = CausalLMOutput(logits=logits * 2, hidden_states=(torch.randn(ROWS, 4), torch.randn(ROWS, 2)))
    with Learner(
        numpy_example(CausalLMOutput(logits=torch.zeros(3, 5), hidden_states=(torch.zeros(4), torch.zeros(2))))
    ) as learner:
        sink = EchoSink.from_batch("127.0.0.1", learner.port, batch, resend_at_close=False)
        assert_same(arrive(learner, sink, batch), to_numpy(dict(batch)))
