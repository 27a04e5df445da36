"""A producer of DLPack capsules made by hand, with ctypes, that can break every rule of the protocol."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from inputs import DTYPES


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, (ctypes.py_object,)

CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
VERSIONS = ["legacy", "versioned"]


class Producer:
    """Lends a NumPy array through DLPack; every rule can be broken by a keyword."""

    def __init__(
        self,
        array: np.ndarray,
        version: str = "versioned",
        *,
        device: Any = (1, 0),
        knows_version: bool = True,
        **fields: Any,
    ) -> None:
        self.array = array
        self.version = version
        self.device = device
        self.knows_version = knows_version
        self.fields = fields
        self.asked: list[dict[str, Any]] = []
        self.lent: list[Any] = []
        self.capsules: list[Any] = []
        self.deleted = 0

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked.append(keywords)
        if keywords and not self.knows_version:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        x, n = self.array, self.array.ndim
        managed = Versioned() if self.version == "versioned" else Legacy()
        t = managed.tensor
        bf16 = x.dtype == DTYPES["bfloat16"]
        t.data, t.device_type, t.device_id = x.ctypes.data, 1, 0
        t.code, t.bits, t.lanes, t.ndim = 4 if bf16 else CODES[x.dtype.kind], 8 * x.itemsize, 1, n
        t.shape = (ctypes.c_int64 * n)(*x.shape)
        t.strides = (ctypes.c_int64 * n)(*(s // x.itemsize for s in x.strides))
        if self.version == "versioned":
            managed.major, managed.minor = 1, 0
        managed.deleter = DELETER(self._delete)
        for name, value in self.fields.items():
            setattr(managed if hasattr(managed, name) else t, name, value)
        name = b"dltensor_versioned" if self.version == "versioned" else b"dltensor"
        self.lent.append(managed)
        capsule = _new(ctypes.addressof(managed), name, None)
        self.capsules.append(capsule)
        return capsule

    def _delete(self, address: int) -> None:
        assert address == ctypes.addressof(self.lent[self.deleted])
        self.deleted += 1

    def assert_returned(self, times: int = 1) -> None:
        """Every tensor that was taken was given back, once, and the capsules cannot be taken again."""
        assert len(self.capsules) == times
        assert self.deleted == times
        for capsule in self.capsules:
            assert _name(capsule).startswith(b"used_dltensor")
