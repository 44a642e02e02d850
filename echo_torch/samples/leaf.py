"""One leaf of a sample: which values can be sent, in which dtype they travel, and how they become numpy arrays.

* No value is ever cast. A Python scalar has the dtype that ``default_collate`` gives it.
* Bytes travel in the machine's own order. Arrays in the other order are swapped on the way.
* dtypes that numpy lacks (bfloat16, complex32, the float8 types) travel as unsigned integers of the same size. The
  numpy dtypes of ``ml_dtypes`` stand for the torch dtypes of the same name.
* Strings, objects, and sparse, nested, quantized and meta tensors hold no dense numbers. They raise a TypeError that
  names the path of the leaf.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.ma import MaskedArray

from echo_torch.support import accelerator
from echo_torch.wire.protocol import WireLeaf

Array = npt.NDArray[Any]
DType = torch.dtype | np.dtype[Any]
# The place of a leaf or container in a tree. Each step is (whether the parent is a mapping, the key or index).
KeyPath = tuple[tuple[bool, Hashable], ...]

# `to_wire_array` returns a view of this for a value of a wrong dtype. No leaf has dtype object, so the caller's
# comparison of dtypes fails.
_WRONG_DTYPE = np.array(None, dtype=object)
# The types that a leaf can have.
ARRAY_TYPES = (torch.Tensor, np.ndarray, np.generic, bool, int, float, complex)
# The dtypes that ``default_collate`` gives to Python scalars and to instances of subclasses, such as an `IntEnum`.
_SCALAR_DTYPES: dict[type, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
}
# The wire dtype of a torch-only dtype, by item size in bytes.
_UNSIGNED_BY_SIZE: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def _make_wire_dtypes() -> dict[torch.dtype, np.dtype[Any]]:
    """Map each torch dtype that can be sent to the numpy dtype in which it travels."""
    pairs: dict[torch.dtype, np.dtype[Any]] = {}
    names = ["bfloat16", "complex32", *(name for name in dir(torch) if name.startswith("float8_"))]
    for name in names:
        dtype: torch.dtype = getattr(torch, name)
        pairs[dtype] = _UNSIGNED_BY_SIZE[dtype.itemsize]
    shared = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
    for name in shared.split():
        pairs[getattr(torch, name)] = np.dtype(name)
    return pairs


_WIRE_DTYPES = _make_wire_dtypes()
# The reverse, for the dtypes that numpy and torch both have.
_TORCH_DTYPES = {dtype: tensor for tensor, dtype in _WIRE_DTYPES.items() if str(tensor) == f"torch.{dtype}"}

# The dtypes that numpy lacks.
TORCH_ONLY_DTYPES = _WIRE_DTYPES.keys() - _TORCH_DTYPES.values()


class Leaf(NamedTuple):
    """One array of a sample."""

    path: str
    """The path as you would write it to index the sample: ``['obs']['camera']``. Empty if the sample is one array."""
    key_path: KeyPath
    """The path as a key; equal for containers that are interchangeable, such as dict and OrderedDict."""
    shape: tuple[int, ...]
    """The shape in one sample, without a batch dimension."""
    dtype: DType
    """The dtype of the values: a torch dtype, or a numpy dtype if torch lacks it."""
    wire_dtype: np.dtype[Any]
    """The numpy dtype of the bytes on the wire and at the learner."""
    offset: int
    """Where the leaf starts in a sample's payload, in bytes."""
    torch_only: bool
    """Whether numpy lacks the dtype, so that the leaf travels as unsigned integers."""

    @property
    def wire(self) -> WireLeaf:
        """What the wire knows of this leaf: item size and shape."""
        return WireLeaf(self.wire_dtype.itemsize, self.shape)

    def __str__(self) -> str:
        return f"{self.path}: {self.dtype} {list(self.shape)}" if self.path else f"{self.dtype} {list(self.shape)}"


class UnreadableLeaf:
    """A stand-in for a leaf whose values cannot be read.

    `checked_dtypes` raises the error later, because only its callers know the path of the leaf.
    """

    def __init__(self, why: str) -> None:
        # The error message, without the path that goes before it.
        self.why = why


def to_wire_array(value: Any, leaf: Leaf, root: str) -> Array:
    """Return ``value`` as a numpy array of its wire dtype, without a copy where possible.

    The shape is not checked. If ``value`` does not have the leaf's dtype, the array does not have the leaf's wire dtype
    either, so comparing dtypes afterwards finds the error.

    Args:
        value: a tensor, numpy array or scalar, one sample's or a batch's.
        leaf: the leaf of the example that ``value`` belongs to.
        root: what error messages call the data.

    Raises:
        TypeError: ``value`` is not a dense array of numbers.
        RuntimeError: the device of a tensor cannot be used here, or not now.
    """
    # What cannot be returned here falls through to the end: it raises, or gets a dtype that no leaf has.
    if isinstance(value, torch.Tensor):
        if value.dtype is leaf.dtype:
            # Outside of the `try`, so that its RuntimeError reaches the caller as it is.
            if not value.is_cpu and value.device.type == accelerator.device_type():
                accelerator.check_usable(value.device)
            try:
                if covers_all_elements(value):
                    return tensor_to_wire_array(value, leaf)
            except Exception as error:  # a subclass of Tensor may raise anything
                checked_dtypes(value, root + leaf.path)  # raises a more precise error, if it knows one
                raise _unreadable_error(value, root + leaf.path, error) from None
            raise uncovered_error(value, root + leaf.path)
    elif isinstance(value, np.ndarray) and not isinstance(value, MaskedArray):
        if leaf.torch_only:
            # An array of unsigned integers must not pass as one of these.
            if _ml_dtype(value.dtype) is leaf.dtype:
                return value.view(leaf.wire_dtype)
        # Returned in any dtype: the caller compares dtypes.
        else:
            return value
    elif not leaf.torch_only and isinstance(value, ARRAY_TYPES):
        try:
            return np.asarray(value, checked_dtypes(value, root + leaf.path)[1])
        except OverflowError as error:
            raise TypeError(f"{root}{leaf.path}: got {value}, expected {leaf.dtype}: {error}") from None
    checked_dtypes(value, root + leaf.path)
    return np.broadcast_to(_WRONG_DTYPE, shape_of(value))


def tensor_to_wire_array(tensor: torch.Tensor, leaf: Leaf) -> Array:
    """Return a tensor of the leaf's dtype as an array of its wire dtype; blocks until it is copied from its device."""
    if not leaf.torch_only:
        return tensor.numpy(force=True)
    # PyTorch refuses to view a lazily conjugated or negated tensor as another dtype, so resolve these first.
    return tensor.detach().resolve_conj().resolve_neg().view(_TORCH_DTYPES[leaf.wire_dtype]).numpy(force=True)


def checked_dtypes(value: Any, path: str) -> tuple[DType, np.dtype[Any]]:
    """Return the dtype of a leaf's values, and the numpy dtype in which they travel.

    Args:
        value: the leaf, of one sample or of a batch.
        path: what error messages call it.

    Raises:
        TypeError: ``value`` is not a dense array of numbers.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_meta or value.dtype not in _WIRE_DTYPES:
            raise TypeError(
                f"{path}: got {_describe_tensor(value)}, expected a dense tensor that holds values; "
                f"{_how_to_densify(value)}"
            )
        _check_readable(value, path)
        return value.dtype, _WIRE_DTYPES[value.dtype]
    if isinstance(value, UnreadableLeaf):
        raise TypeError(f"{path}: {value.why}")
    if not isinstance(value, (np.ndarray, np.generic)):
        # `bool` comes first: it is a subclass of `int`.
        for kind, dtype in _SCALAR_DTYPES.items():
            if isinstance(value, kind):
                return dtype, _WIRE_DTYPES[dtype]
        raise TypeError(
            f"{path}: got {type(value).__name__}, expected a tensor, numpy array or number; {_how_to_read(value)}"
        )
    if isinstance(value, MaskedArray):
        raise TypeError(f"{path}: got a masked array, expected values everywhere; send .filled(x)")
    ml_dtype = _ml_dtype(value.dtype)
    if ml_dtype is not None:
        return ml_dtype, _WIRE_DTYPES[ml_dtype]
    if value.dtype.hasobject or value.dtype.kind in "SU":
        raise TypeError(f"{path}: got numpy dtype {value.dtype}, expected numbers; encode it, or leave it out")
    dtype = value.dtype.newbyteorder("=")
    return _TORCH_DTYPES.get(dtype, dtype), dtype


def _ml_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """Return the torch dtype for one of ``ml_dtypes`` with the same bytes, such as bfloat16; None for any other."""
    if dtype.kind not in "Vf" or dtype.type.__module__ != "ml_dtypes":
        return None
    found = getattr(torch, dtype.name, None)
    return found if found in TORCH_ONLY_DTYPES else None


def _how_to_read(value: Any) -> str:
    """Return the remedy for an object that is no array; an array-like can be made one."""
    if hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__"):
        return "it is an array-like: send np.asarray(x)"
    if hasattr(type(value), "__dlpack__"):
        return "it is an array-like: send torch.from_dlpack(x)"
    return "encode it as numbers, or leave it out with select="


def covers_all_elements(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage holds all its elements.

    PyTorch lets a storage be freed or cut under its tensors, as FSDP does between uses. Such a tensor keeps its shape,
    and its elements are whatever lies at that address.
    """
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return not tensor.numel() or (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def uncovered_error(tensor: torch.Tensor, path: str) -> TypeError:
    """Return the error for a tensor whose storage does not hold all its elements."""
    got = f"{_describe_tensor(tensor)} {list(tensor.shape)} with {tensor.untyped_storage().nbytes()} bytes of storage"
    remedy = "its storage was freed or cut (FSDP does that between uses); send a copy made while it was whole"
    return TypeError(f"{path}: got {got}, expected at least {tensor.nbytes}; {remedy}")


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """Return the torch dtype for the same values, or None if PyTorch lacks it."""
    return _TORCH_DTYPES.get(dtype)


def in_native_order(array: Any) -> Any:
    """Return an array in the machine's byte order; anything else, tensors included, as it is."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, array or scalar as a plain tuple."""
    return tuple(np.shape(value))


def _check_readable(tensor: torch.Tensor, path: str) -> None:
    """Raise TypeError for fake tensors and wrappers: they look dense, but have no memory that numpy can read."""
    try:
        # Converting an empty slice fails like the whole tensor does, and copies nothing.
        some = tensor.detach()
        some = (some[:0] if some.ndim else some).resolve_conj().resolve_neg()
        some.view(_TORCH_DTYPES[_WIRE_DTYPES[tensor.dtype]]).numpy(force=True)
    except Exception as error:  # a subclass of Tensor may raise anything
        raise _unreadable_error(tensor, path, error) from None


def _unreadable_error(tensor: torch.Tensor, path: str, error: Exception) -> TypeError:
    remedy = "send a plain torch.Tensor: not a fake or wrapped one, and outside of torch.func transforms"
    why = " ".join(str(error).split())
    return TypeError(
        f"{path}: got {_describe_tensor(tensor)}, expected a dense tensor that holds values; {remedy} ({why})"
    )


def _how_to_densify(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "pad it to one length: torch.nested.to_padded_tensor(x, 0.0, output_size)"
    if tensor.is_quantized:
        return "send .int_repr(), or .dequantize() it"
    if tensor.layout is not torch.strided:
        return "convert with .to_dense()"
    if tensor.is_meta:
        return "send a tensor on a device that stores it; as an example, torch.empty(x.shape, dtype=x.dtype) will do"
    return "send its bytes with .view(torch.uint8)"


def _describe_tensor(tensor: torch.Tensor) -> str:
    nested = "nested " if tensor.is_nested else ""
    layout = "" if tensor.layout is torch.strided else f"{tensor.layout} "
    return f"{nested}{layout}{tensor.dtype} {type(tensor).__name__} on {tensor.device}"


def how_to_cast(value: Any, dtype: DType) -> str:
    """Return the remedy for a wrong dtype, written for the library that the value comes from."""
    if isinstance(dtype, np.dtype):
        return f"convert with np.asarray(x, '{dtype}')"
    if isinstance(value, torch.Tensor):
        return f"convert with .to({dtype})"
    if dtype in TORCH_ONLY_DTYPES:
        return f"send a tensor of {dtype}"
    name = "bool_" if dtype is torch.bool else _WIRE_DTYPES[dtype].name
    return f"convert with .astype('{name}')" if isinstance(value, np.ndarray) else f"convert with np.{name}(x)"


def how_to_expand(value: Any, leaf: Leaf) -> str:
    """Return the code that repeats one sample's value B times, written for the library that the value comes from."""
    shape = ", ".join(["B", *map(str, leaf.shape)])
    if isinstance(value, torch.Tensor):
        return f"x.expand({shape})"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"np.broadcast_to(x, ({shape}{'' if leaf.shape else ','}))"
    if isinstance(leaf.dtype, np.dtype):
        return f"np.full((B,), x, '{leaf.dtype}')"
    return f"torch.full((B,), x, dtype={leaf.dtype})"
