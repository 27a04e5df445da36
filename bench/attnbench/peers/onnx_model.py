"""A one-node ONNX model as bytes, so that ONNX Runtime can be timed without the `onnx` package.

Only what such a model needs of protobuf's wire format: varints, floats and length-delimited fields.
Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ELEMENT_TYPES = {"float32": 1, "int32": 6, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16}


class Tensor(NamedTuple):
    """An input or output; an input without a name is an optional one that is left out."""

    name: str
    dtype: str  # a key of ELEMENT_TYPES
    shape: Sequence[int]


def one_node_model(
    op_type: str,
    *,
    domain: str,
    opset: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attributes: Mapping[str, int | float],
) -> bytes:
    """A serialised ModelProto whose graph is one node.

    Parameters
    ----------
    op_type, domain, opset : str, str, int
        The operator, its domain ("" for the standard one) and that domain's version.
    inputs, outputs : sequence of Tensor
        In the operator's order.
    attributes : mapping of name to int or float
    """
    node = b"".join(_text(1, x.name) for x in inputs) + b"".join(_text(2, x.name) for x in outputs)
    node += _text(4, op_type) + b"".join(_message(5, _attribute(n, x)) for n, x in attributes.items())
    node += _text(7, domain)
    graph = _message(1, node) + _text(2, "attention")
    graph += b"".join(_message(11, _value_info(x)) for x in inputs if x.name)
    graph += b"".join(_message(12, _value_info(x)) for x in outputs)
    opsets = {"": 23} | {domain: opset}
    imports = b"".join(_message(8, _text(1, name) + _integer(2, version)) for name, version in opsets.items())
    return _integer(1, 10) + _message(7, graph) + imports


def _attribute(name: str, value: int | float) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _tag(2, 5) + struct.pack("<f", value) + _integer(20, 1)
    return _text(1, name) + _integer(3, value) + _integer(20, 2)


def _value_info(x: Tensor) -> bytes:
    dims = b"".join(_message(1, _integer(1, size)) for size in x.shape)
    tensor = _integer(1, ELEMENT_TYPES[x.dtype]) + _message(2, dims)
    return _text(1, x.name) + _message(2, _message(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _message(field: int, payload: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(payload)) + payload


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
