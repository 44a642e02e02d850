"""Leaves that are easily taken for what they are not, and remedies that do what they say."""

from __future__ import annotations

import collections
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optree
import pytest
import torch
from peers import Peer, PeerConnection
from torch._subclasses import FakeTensorMode

from echo_torch import EchoSink, SpecMismatchError, TcpClient
from echo_torch.samples.leaf import how_to_cast
from echo_torch.samples.spec import SampleSpec

EXAMPLE = {"pair": (np.zeros(2, np.float32), 0)}


def local_batch() -> dict[str, Any]:
    """A batch of a type that nobody can import, and so cannot be pickled."""
    local = collections.namedtuple("local", "x y")
    return {"pair": local(np.ones((3, 2), np.float32), np.arange(3))}


def test_a_spec_pickles_whatever_it_has_met() -> None:
    spec = SampleSpec(EXAMPLE)
    assert spec.match(local_batch()).rows == 3
    copy = pickle.loads(pickle.dumps(spec))
    assert copy.leaves == spec.leaves
    assert copy.match(local_batch()).rows == spec.match(local_batch()).rows == 3


def test_a_sink_pickles_whatever_it_has_sent() -> None:
    def acking(conn: PeerConnection) -> None:
        conn.send_handshake({"pair": (np.zeros(2, np.float32), np.zeros((), np.int64))})
        conn.receive_all(ack_every=16)

    with Peer(acking) as peer:
        sink = EchoSink(peer.host, peer.port, EXAMPLE, resend_at_close=False)
        sink.send(local_batch())
        copy = pickle.loads(pickle.dumps(sink))
        copy.send(local_batch())
        sink.close()
        copy.close()
    assert [len(conn.received) for conn in peer.connections] == [48, 48]


MASKED = np.ma.masked_array(np.zeros(3, np.float32), [False, True, False])


def test_a_masked_array_is_no_example() -> None:
    with pytest.raises(TypeError, match=r"example\['x'\]: got a masked array.*\.filled"):
        SampleSpec({"x": MASKED})
    with pytest.raises(TypeError, match="masked array"):
        TcpClient("127.0.0.1", 1, {"x": MASKED})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [MASKED, np.ma.masked_array(np.zeros((5, 3), np.float32))], ids=["sample", "batch"])
def test_a_masked_array_is_no_batch(masked: Any, dtype: torch.dtype) -> None:
    spec = SampleSpec({"x": torch.zeros(3, dtype=dtype)})
    with pytest.raises(TypeError, match=r"batch\['x'\]: got a masked array.*\.filled"):
        spec.match({"x": masked})
    assert spec.try_fast_numpy_leaves({"x": masked}) is None


class Rows(Mapping[str, Any]):
    """As a TensorDict: a mapping that iterates over its rows."""

    def __init__(self, items: dict[str, Any], rows: int = 2) -> None:
        self._items = items
        self._rows = rows

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(Rows({key: value[row] for key, value in self._items.items()}) for row in range(self._rows))

    def __len__(self) -> int:
        return self._rows

    def keys(self) -> Any:
        return self._items.keys()


def test_a_mapping_is_opened_by_its_keys_and_not_by_what_it_iterates_over() -> None:
    arrays = {"a": np.arange(2), "b": np.zeros((2, 3), np.float32)}
    spec = SampleSpec({"a": 0, "b": np.zeros(3, np.float32)})
    assert [leaf.path for leaf in SampleSpec(Rows(arrays)).leaves] == ["['a']", "['b']"]
    for batch in (Rows(arrays), Rows({"b": arrays["b"], "a": arrays["a"]})):
        match = spec.match(batch)
        assert match.rows == 2
        np.testing.assert_array_equal(match.arrays[0], arrays["a"])
    nested = SampleSpec({"inner": {"a": 0}}).match({"inner": Rows({"a": np.arange(2)})})
    assert nested.rows == 2


@pytest.mark.parametrize(
    "name", ["bool", "uint8", "uint16", "int8", "int32", "int64", "float16", "float32", "complex64"]
)
@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.ones(2, np.float64), torch.ones(2)], ids=repr)
def test_the_remedy_makes_what_is_expected(value: Any, name: str) -> None:
    dtype = getattr(torch, name)
    remedy = how_to_cast(value, dtype)
    assert remedy.startswith("convert with ")
    expression = remedy.removeprefix("convert with ")
    converted = eval(expression if "(x" in expression else f"x{expression}", {"np": np, "torch": torch, "x": value})
    assert SampleSpec(converted).leaves[0].dtype == dtype
    assert SampleSpec(converted).leaves[0].shape == np.shape(value)


def test_the_remedy_for_booleans_is_known_to_numpy_1_too() -> None:
    assert how_to_cast(1, torch.bool) == "convert with np.bool_(x)"


def fake(dtype: torch.dtype) -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(4, 3, dtype=dtype)


def sparse(layout: torch.layout) -> torch.Tensor:
    dense = torch.ones(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are in beta
        return dense.to_sparse(layout=layout, blocksize=(2, 1) if layout is torch.sparse_bsr else None)


def ragged(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=layout)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are deprecated
        return torch.quantize_per_tensor(torch.zeros(4, 3), 1.0, 0, torch.quint8)


def masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.masked.masked_tensor(torch.ones(4, 3), torch.ones(4, 3) > 0)


NO_VALUES: dict[str, tuple[Any, str, str]] = {
    # name: what makes the tensor, what it is called, remedy
    "fake": (lambda: fake(torch.float32), "torch.float32 FakeTensor on cpu", "plain torch.Tensor"),
    "fake bfloat16": (lambda: fake(torch.bfloat16), "torch.bfloat16 FakeTensor on cpu", "plain torch.Tensor"),
    "fake float64": (lambda: fake(torch.float64), "torch.float64 FakeTensor on cpu", "plain torch.Tensor"),
    "meta": (lambda: torch.zeros(4, 3, device="meta"), "torch.float32 Tensor on meta", "torch.empty(x.shape"),
    "coo": (lambda: sparse(torch.sparse_coo), "torch.sparse_coo torch.float32", ".to_dense()"),
    "csr": (lambda: sparse(torch.sparse_csr), "torch.sparse_csr torch.float32", ".to_dense()"),
    "bsr": (lambda: sparse(torch.sparse_bsr), "torch.sparse_bsr torch.float32", ".to_dense()"),
    "nested": (lambda: ragged(torch.strided), "nested torch.float32", "to_padded_tensor(x, 0.0, output_size)"),
    "jagged": (lambda: ragged(torch.jagged), "nested torch.jagged", "to_padded_tensor(x, 0.0, output_size)"),
    "quantised": (quantised, "torch.quint8", ".int_repr()"),
    "masked": (masked, "MaskedTensor", "plain torch.Tensor"),
    "uninitialised": (torch.nn.UninitializedParameter, "UninitializedParameter", "plain torch.Tensor"),
}


@pytest.mark.parametrize(("make", "got", "remedy"), NO_VALUES.values(), ids=NO_VALUES)
def test_tensors_without_dense_values_are_refused(make: Callable[[], torch.Tensor], got: str, remedy: str) -> None:
    """As an example, and in the middle of a batch that is right otherwise; with path, got, expected and remedy."""
    parts = ["['m']['x']: got ", got, ", expected a dense tensor that holds values; ", remedy]
    with pytest.raises(TypeError) as as_example:
        SampleSpec({"a": 0, "m": {"x": make()}, "z": 0})
    assert all(part in str(as_example.value) for part in ["example", *parts])
    for dtype in (torch.float32, torch.bfloat16):
        spec = SampleSpec({"a": 0, "m": {"x": torch.zeros(3, dtype=dtype)}, "z": 0})
        with pytest.raises(TypeError) as in_batch:
            spec.match({"a": torch.arange(4), "m": {"x": make()}, "z": torch.arange(4)})
        assert all(part in str(in_batch.value) for part in ["batch", *parts])


def test_real_tensors_under_a_fake_mode_are_refused() -> None:
    spec = SampleSpec({"x": torch.zeros(3)})
    batch = {"x": torch.zeros(4, 3)}
    with FakeTensorMode(), pytest.raises(TypeError, match=r"batch\['x'\]: got .*not a fake or wrapped one"):
        spec.match(batch)
    assert spec.match(batch).rows == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize], ids=lambda f: f.__name__
)
def test_tensors_of_a_transform_are_refused(transform: Callable[..., Any], dtype: torch.dtype) -> None:
    """Those of ``functionalize`` look as if they had memory; what is in it is not what was computed."""
    spec = SampleSpec({"x": torch.zeros(3, dtype=dtype)})
    seen: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        for refuse in (spec.match, SampleSpec):
            with pytest.raises(TypeError) as caught:
                refuse({"x": x})
            seen.append(str(caught.value))
        return x.sum()

    transform(function)(torch.ones(4, 3, dtype=dtype))
    for name, message in zip(["batch", "example"], seen, strict=True):
        assert all(part in message for part in [f"{name}['x']: got", "expected", "outside of torch.func transforms"])


def test_plain_tensors_inside_a_transform_are_sent() -> None:
    outer = torch.arange(12.0).reshape(4, 3)
    rows = []

    def function(x: torch.Tensor) -> torch.Tensor:
        rows.append(SampleSpec(torch.zeros(3)).match(outer).arrays[0].tobytes())
        return x

    torch.func.vmap(function)(torch.ones(2))
    assert rows == [outer.numpy().tobytes()]


class Mine(torch.Tensor):
    """A user's subclass."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [torch.nn.Parameter, torch.nn.Buffer, lambda tensor: tensor.as_subclass(Mine)],
    ids=["Parameter", "Buffer", "subclass"],
)
def test_subclasses_of_tensors_are_sent_as_tensors(wrap: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    values = torch.arange(12.0).reshape(4, 3).to(dtype)
    for spec in (SampleSpec(values[0]), SampleSpec(wrap(values[0]))):
        (array,) = spec.match(wrap(values)).arrays
        assert array.tobytes() == values.view(torch.uint8).numpy().tobytes()


def test_from_batch_does_not_depend_on_the_default_device() -> None:
    batch = {"x": torch.zeros(4, 3)}
    with torch.device("meta"):
        sink = EchoSink.from_batch("nowhere", 1, batch)
    assert "['x']: torch.float32 [3]" in repr(sink)


@dataclasses.dataclass
class Late:
    """A dataclass with a field that is set later."""

    x: Any
    y: Any = dataclasses.field(init=False)


def test_a_field_without_a_value_is_refused_by_path() -> None:
    with pytest.raises(TypeError, match=r"batch\['y'\]: got Late that cannot give it, expected"):
        SampleSpec({"x": 0, "y": 0}).match(Late(0))


def refusal(example: Any, batch: Any, **how: Any) -> str:
    with pytest.raises(SpecMismatchError) as caught:
        SampleSpec(example).match(batch, **how)
    return str(caught.value)


def test_a_wrong_dtype_alone_is_no_reason_to_doubt_the_example() -> None:
    message = refusal({"x": torch.zeros(3)}, {"x": torch.zeros(3, dtype=torch.int32)})
    assert "convert with .to(torch.float32)" in message
    assert "example is a batch" not in message


@pytest.mark.parametrize("rows", [(4,), (4, 5)], ids=str)
def test_a_batch_where_one_sample_is_expected_is_told_so(rows: tuple[int, ...]) -> None:
    message = refusal({"x": torch.zeros(3)}, {"x": torch.zeros(*rows, 3)}, batched=False)
    assert "one sample is expected: send those of a batch one by one" in message


def test_the_remedy_for_a_leaf_without_elements_can_be_pasted() -> None:
    example = {"x": torch.zeros(2, 0), "y": 0}
    message = refusal(example, {"x": torch.zeros(4, 5, 2, 0), "y": torch.zeros(4, 5, dtype=torch.int64)})
    assert "x.reshape(20, 2, 0)" in message
    assert "x.reshape(-1)" in message


def test_the_remedy_for_a_scalar_that_torch_lacks_is_numpys() -> None:
    message = refusal({"x": np.zeros((), "g"), "y": 0}, {"x": 1.5, "y": torch.zeros(4, dtype=torch.int64)})
    assert f"np.full((B,), x, '{np.dtype('g')}')" in message


@pytest.mark.parametrize(
    ("example", "batch", "remedy"),
    [((1,), (5,), "x.reshape(-1, 1)"), ((), (5, 1), "x.reshape(-1)"), ((3, 1), (5, 3), "x.reshape(-1, 3, 1)")],
    ids=str,
)
def test_dimensions_of_size_one_are_put_right_by_reshaping(example: Any, batch: Any, remedy: str) -> None:
    """And not by padding, or repeating one sample, which would send other data."""
    message = refusal(
        {"x": torch.zeros(4), "y": torch.zeros(example)}, {"x": torch.zeros(5, 4), "y": torch.zeros(batch)}
    )
    assert message.endswith(f"; {remedy}")


def test_transposed_samples_are_not_told_to_be_reshaped() -> None:
    message = refusal({"x": torch.zeros(3, 2)}, {"x": torch.zeros(5, 2, 3)})
    assert "permute" in message
    assert "reshape" not in message


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_samples_is_told_to_be_stacked(kind: Any) -> None:
    sample = {"x": torch.zeros(4), "y": 1}
    assert "default_collate(samples)" in refusal(sample, kind([sample, sample]))
    assert "default_collate" not in refusal(sample, kind([{"z": 1}, {"z": 1}]))


def test_a_sparse_leaf_in_another_structure_is_refused_with_what_is_wrong() -> None:
    """Its bytes cannot be counted for the words of the stock client."""
    with Peer(lambda conn: (conn.send_handshake({"x": np.zeros(2)}), conn.receive_all())) as peer:  # type: ignore[func-returns-value]
        client = TcpClient(peer.host, peer.port, {"x": np.zeros(2)})
        with pytest.raises(SpecMismatchError, match=r"data\['y'\]: unexpected"):
            client.send({"x": np.zeros(2), "y": torch.eye(2).to_sparse()})
        client.close()


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_real_tensors_are_not_read_under_a_fake_mode(allow: bool, grad: bool) -> None:
    """Their memory shows something, but not what is in them."""
    spec = SampleSpec({"x": torch.zeros(3)})
    batch = {"x": torch.ones(4, 3, requires_grad=grad)}
    with FakeTensorMode(allow_non_fake_inputs=allow), pytest.raises(TypeError, match=r"batch\['x'\]: got .*fake"):
        spec.match(batch)
    assert spec.match(batch).rows == 4


class Fields:
    """A container of which optree is told the names by its entries alone."""

    def __init__(self, **items: Any) -> None:
        self.items = items


optree.register_pytree_node(
    Fields,
    lambda fields: (tuple(fields.items.values()), None, tuple(fields.items)),
    lambda _, children: children,
    namespace=getattr(optree.registry, "__GLOBAL_NAMESPACE"),
)


def test_containers_that_users_told_optree_of_are_matched_by_key_path() -> None:
    """Though their treespecs compare equal whatever their keys are."""
    spec = SampleSpec(Fields(a=0, b=1))
    for batch in (Fields(a=1, b=2), Fields(b=2, a=1), {"a": 1, "b": 2}, Fields(b=2, a=1)):
        if isinstance(batch, dict):
            with pytest.raises(SpecMismatchError):
                spec.match(batch)
        else:
            assert [array.item() for array in spec.match(batch).arrays] == [1, 2]
    with pytest.raises(SpecMismatchError, match="unexpected"):
        spec.match(Fields(x=1, y=2))


def test_batches_that_settle_on_one_structure_take_the_fast_path_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of others; the long way flattens a batch, and the short one knows how it will be flat."""
    spec = SampleSpec({"x": torch.zeros(3)})
    flattened: list[Any] = []
    flatten = optree.tree_flatten
    monkeypatch.setattr(optree, "tree_flatten", lambda tree: (flattened.append(tree), flatten(tree))[1])
    for _ in range(20):
        spec.match(collections.UserDict(x=torch.zeros(2, 3)))
    steady = {"x": torch.zeros(4, 3)}
    for _ in range(3):
        spec.match(steady)
    flattened.clear()
    spec.match(steady)
    assert not flattened
