"""Types of the compiled module. Users see its parts through the package."""

from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypedDict, TypeVar, overload

import numpy as np
from typing_extensions import Unpack

from fastattn._attention import Explanation, Gradients
from fastattn.masks import Mask

__version__: str

class UnsupportedError(ValueError): ...
class CudaError(RuntimeError): ...

class _Array(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

_Q = TypeVar("_Q", bound=_Array)
_Layout = Literal["bshd", "bhsd"]
_Number = SupportsFloat | SupportsIndex
_Side = SupportsIndex | None
_DType = str | type | np.dtype[Any]
_Window = tuple[_Side, _Side] | list[_Side] | list[int] | list[None]

def cuda_build() -> str: ...
def limit_threads(n: int) -> int: ...
def device_speeds() -> dict[str, float]: ...
def set_device_speeds(**speeds: float) -> None: ...

class Buffer:
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: object = None,
        dl_device: object = None,
        copy: object = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    @property
    def dtype(self) -> str: ...

# The arguments that the functions on attention share (csrc/core/arguments.inc).
class _Shared(TypedDict, total=False):
    layout: _Layout
    scale: _Number | None
    causal: bool
    window: _Window | None
    q_offset: SupportsIndex | _Array | None
    mask: _Array | Mask | None
    bias: _Array | None
    alibi_slopes: _Array | None
    softcap: _Number | None
    sinks: _Array | None
    kv_lens: _Array | None
    dropout: _Number
    seed: SupportsIndex
    device: str | None
    kernel: str | None

class _Options(_Shared, total=False):
    q_lens: _Array | None

@overload
def mha(
    q: _Q,
    k: _Array,
    v: _Array,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> _Q: ...
@overload
def mha(
    q: _Q,
    k: _Array,
    v: _Array,
    *,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> tuple[_Q, Any]: ...
@overload
def mha(
    q: _Q,
    k: _Array,
    v: _Array,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[True],
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> tuple[_Q, Any]: ...
@overload
def mha(
    q: _Q,
    k: _Array,
    v: _Array,
    *,
    return_lse: Literal[True],
    return_weights: Literal[True],
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> tuple[_Q, Any, Any]: ...
@overload
def mha(
    q: _Q,
    k: _Array,
    v: _Array,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> Any: ...
@overload
def mha_varlen(
    q: _Q,
    k: _Array,
    v: _Array,
    cu_q: _Array,
    cu_kv: _Array | None = None,
    *,
    return_lse: Literal[False] = False,
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Shared],
) -> _Q: ...
@overload
def mha_varlen(
    q: _Q,
    k: _Array,
    v: _Array,
    cu_q: _Array,
    cu_kv: _Array | None = None,
    *,
    return_lse: Literal[True],
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Shared],
) -> tuple[_Q, Any]: ...
@overload
def mha_varlen(
    q: _Q,
    k: _Array,
    v: _Array,
    cu_q: _Array,
    cu_kv: _Array | None = None,
    *,
    return_lse: bool = False,
    out: _Q | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Shared],
) -> Any: ...
def explain(
    q: _Array,
    k: _Array,
    v: _Array,
    *,
    cu_q: _Array | None = None,
    cu_kv: _Array | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out: _Array | None = None,
    out_dtype: _DType | None = None,
    **options: Unpack[_Options],
) -> Explanation: ...
def mha_backward(
    dout: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    lse: _Array,
    *,
    dlse: _Array | None = None,
    need_dbias: bool = True,
    **options: Unpack[_Options],
) -> Gradients: ...
def mha_varlen_backward(
    dout: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    lse: _Array,
    cu_q: _Array,
    cu_kv: _Array | None = None,
    *,
    dlse: _Array | None = None,
    need_dbias: bool = True,
    **options: Unpack[_Shared],
) -> Gradients: ...
def merge_states(outs: tuple[Any, ...], lses: tuple[Any, ...], layout: str, out: Any, /) -> tuple[Any, Any]: ...
def argument_rows() -> tuple[tuple[str, str, str, str, str], ...]: ...
def kernel_rows() -> list[tuple[str, str, tuple[str, ...], bool, str]]: ...
def cpu_features() -> dict[str, str | None]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: SupportsIndex) -> None: ...
def build_info() -> str: ...
def xla_ffi_targets() -> dict[str, Any]: ...
def measure_fma_peak(kernel: str, dtype: str, threads: int, seconds: float = 0.2) -> float: ...
def measure_read_bandwidth(bytes: int, threads: int, seconds: float = 0.3) -> float: ...
