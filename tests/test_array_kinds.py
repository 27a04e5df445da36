"""Arrays of other libraries come back as their own kind: the array API standard, PyTorch, JAX."""

from __future__ import annotations

import gc
import importlib.util
import textwrap
import weakref
from typing import Any

import numpy as np
import pytest
from dlpack_producer import Producer
from inputs import DTYPES, qkv, stats_dtype
from subproc import run

import fastattn

torch = pytest.importorskip("torch")


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def test_out_overlaps_through_another_library(arrays):
    q = torch.from_numpy(arrays[0].copy())
    k = torch.from_numpy(arrays[0])[:, :, :2]
    with pytest.raises(ValueError, match=r"^out: .* q\b"):
        fastattn.mha(q, k, k, out=q.numpy())


# ---- results of the kind of q -----------------------------------------------------------------------
class Namespace:
    """An array library of the array API standard, in small."""

    @staticmethod
    def from_dlpack(buffer: Any) -> Any:
        return "adopted", buffer


class Standard(Producer):
    def __array_namespace__(self) -> Any:
        return Namespace


def test_result_by_the_array_api(dtype):
    arrays = qkv(dtype, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)
    (tag, out), (_, lse) = fastattn.mha(Standard(arrays[0]), *arrays[1:], return_lse=True)
    assert tag == "adopted"
    assert out.dtype == dtype.name
    assert lse.dtype == stats_dtype(dtype).name
    assert out.__dlpack_device__() == (1, 0)
    expected, expected_lse = fastattn.mha(*arrays, return_lse=True)
    assert same(np.from_dlpack(lse), expected_lse)
    if dtype.name != "bfloat16":
        assert same(np.from_dlpack(out), expected)
    through_torch = torch.from_dlpack(out)
    assert torch.equal(through_torch, to_torch(expected))


def test_host_buffer_exports(arrays):
    buffer = fastattn.mha(Standard(arrays[0]), *arrays[1:])[1]
    expected = fastattn.mha(*arrays)
    assert "dltensor_versioned" in repr(buffer.__dlpack__(max_version=(1, 0)))
    for old in ({}, {"max_version": None}, {"max_version": (0, 8)}):
        assert '"dltensor"' in repr(buffer.__dlpack__(**old))
    shared, other = np.asarray(buffer), np.asarray(buffer)
    assert same(shared, expected)
    assert np.shares_memory(shared, other)
    assert shared.ctypes.data % 64 == 0
    assert np.shares_memory(shared, np.from_dlpack(buffer))
    copied = torch.from_dlpack(buffer, copy=True)
    assert copied.data_ptr() != shared.ctypes.data
    shared[...] = 0
    assert torch.equal(copied, torch.from_numpy(expected))
    for bad in ({"stream": 1}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            buffer.__dlpack__(**bad)
    buffer.__dlpack__(stream=-1, dl_device=(1, 0), copy=False)
    del buffer
    gc.collect()
    assert (other == 0).all()  # the views keep the memory


def test_unused_capsules_of_a_host_buffer_free_the_memory():
    # 200 times 32 MiB; if a capsule that nobody took kept its memory, this would need 6 GiB.
    code = """
    import resource
    class Lent:
        def __init__(self, x): self.x = x
        def __dlpack_device__(self): return self.x.__dlpack_device__()
        def __dlpack__(self, **kw): return self.x.__dlpack__(**kw)
        def __array_namespace__(self):
            class N:
                from_dlpack = staticmethod(lambda buffer: buffer)
            return N
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    q = np.zeros((1, 2**20, 1, 8), np.float32)
    k = np.zeros((1, 1, 1, 8), np.float32)
    fastattn.set_num_threads(1)
    for n in range(200):
        buffer = fastattn.mha(Lent(q), k, k, causal=True)
        buffer.__dlpack__(); buffer.__dlpack__(max_version=(1, 0)); np.asarray(buffer)
    print("fine")
    """
    assert run(code)[0].strip() == "fine"


def test_from_dlpack_of_the_root_module(arrays, monkeypatch):
    module = importlib.import_module(Producer.__module__.partition(".")[0])
    monkeypatch.setattr(module, "from_dlpack", lambda buffer: ["adopted", buffer], raising=False)
    assert fastattn.mha(Producer(arrays[0]), *arrays[1:])[0] == "adopted"


# ---- PyTorch ------------------------------------------------------------------------------------------
def to_torch(x: np.ndarray) -> Any:
    if x.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(x: Any) -> np.ndarray:
    return x.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if x.dtype == torch.bfloat16 else x.numpy()


def test_torch(dtype):
    arrays = qkv(dtype, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)
    mask = np.random.default_rng(0).random((2, 1, 5, 7)) > 0.3
    expected = fastattn.mha(*arrays, mask=mask, return_lse=True, return_weights=True)
    tensors = [to_torch(x) for x in arrays]
    for side in (mask, torch.from_numpy(mask)):
        got = fastattn.mha(*tensors, mask=side, return_lse=True, return_weights=True)
        for a, b in zip(got, expected, strict=True):
            assert type(a) is torch.Tensor
            assert same(from_torch(a), b)


def test_result_follows_q(arrays):
    tensors = [torch.from_numpy(x) for x in arrays]
    expected = fastattn.mha(*arrays)
    assert type(fastattn.mha(arrays[0], *tensors[1:])) is np.ndarray
    out = fastattn.mha(tensors[0], *arrays[1:])
    assert type(out) is torch.Tensor
    assert same(out.numpy(), expected)


def test_torch_results_are_torchs_own(arrays):
    out = fastattn.mha(*(torch.from_numpy(x) for x in arrays))
    assert out.is_contiguous()
    assert not out.requires_grad
    out.resize_(3)  # refused for memory that is borrowed from somebody else
    assert out.untyped_storage().resizable()


def test_torch_strides(dtype):
    arrays = qkv(dtype, B=2, Sq=6, Sk=6, Hq=4)
    q, k, v = (to_torch(x) for x in arrays)
    cases = {
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "expanded": [q, k[:, :, :1].expand(-1, -1, 4, -1), v[:1].expand(2, -1, -1, -1)],
        "sliced": [q[:, ::2], k[..., ::2].repeat_interleave(2, -1)[..., ::1], v[:, :, [0, 2, 1, 3]]],
        "offset": [torch.cat([q, q])[2:], k, v],
    }
    for name, tensors in cases.items():
        dense = [from_torch(x.contiguous()) for x in tensors]
        assert same(from_torch(fastattn.mha(*tensors)), fastattn.mha(*dense)), name


@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16", "float64"])
def test_torch_memory_is_not_copied(type_name):
    dtype = getattr(torch, type_name)
    one = torch.randn(1, 1, 1, 8).to(dtype)
    k = one.expand(1, 2**40, 1, 8)  # a copy would need 2**43 elements
    out = fastattn.mha(one, k, k, kv_lens=torch.tensor([3]), kernel="cpu-reference")
    assert torch.equal(out, one)


def test_torch_out(dtype):
    arrays = qkv(dtype, B=2, Sq=6, Hq=4)
    tensors = [to_torch(x) for x in arrays]
    expected = fastattn.mha(*arrays)
    out = torch.zeros(2, 4, 6, 16, dtype=tensors[0].dtype).transpose(1, 2)
    before = out._version
    assert fastattn.mha(*tensors, out=out) is out
    assert same(from_torch(out.contiguous()), expected)
    assert out._version > before
    mine = np.zeros_like(expected)
    assert fastattn.mha(*tensors, out=mine) is mine
    assert same(mine, expected)
    with torch.inference_mode():
        inside = torch.zeros(expected.shape, dtype=tensors[0].dtype)
        assert fastattn.mha(*tensors, out=inside) is inside
        assert torch.equal(inside, out)
        assert torch.equal(fastattn.mha(*tensors), out)


def test_autograd_notices_that_out_was_overwritten(arrays):
    tensors = [torch.from_numpy(x) for x in arrays]
    weight = torch.ones(3, requires_grad=True)
    out = fastattn.mha(*tensors)
    loss = (out * weight).sum()  # saves out for the backward pass
    fastattn.mha(*tensors, causal=True, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "out"])
def test_torch_requires_grad(name):
    given = {key: torch.randn(1, 4, 2, 8) for key in ("q", "k", "v", "out")}
    given |= {"bias": torch.zeros(4, 4), "sinks": torch.zeros(2)}
    fastattn.mha(given["q"], given["k"], given["v"], **{key: given[key] for key in ("bias", "sinks", "out")})
    given[name] = torch.nn.Parameter(given[name]) if name == "v" else given[name].requires_grad_()
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=rf"^{name}: .* requires grad.*use {name}\.detach\(\)"),
    ):
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_torch_tensors_that_have_no_memory(arrays):
    k, v = arrays[1:]
    strange = {
        "meta": (torch.zeros(2, 5, 4, 16, device="meta"), TypeError),
        "sparse": (torch.zeros(2, 5, 4, 16).to_sparse(), TypeError),
        "int": (torch.zeros(2, 5, 4, 16, dtype=torch.int32), TypeError),
        "complex": (torch.zeros(2, 5, 4, 16, dtype=torch.complex64), TypeError),
        "float8": (torch.zeros(2, 5, 4, 16).to(torch.float8_e4m3fn), TypeError),
    }
    for tensor, exception in strange.values():
        with pytest.raises(exception, match=r"^q: "):
            fastattn.mha(tensor, k, v)


def test_torch_scalar_offset(arrays):
    q, k, v = (torch.from_numpy(x) for x in arrays)
    expected = fastattn.mha(q, k, v, causal=True, q_offset=1)
    for offset in (torch.tensor(1), torch.tensor([1, 1]), torch.tensor([1, 1], dtype=torch.uint8)):
        assert torch.equal(fastattn.mha(q, k, v, causal=True, q_offset=offset), expected)
    for name in ("scale", "softcap"):
        assert torch.equal(
            fastattn.mha(q, k, v, **{name: torch.tensor(0.5)}), fastattn.mha(q, k, v, **{name: 0.5})
        )


def test_torch_tensors_are_let_go(arrays):
    def call(bad: bool) -> weakref.ref[Any]:
        tensors = [torch.from_numpy(x.copy()) for x in arrays]
        ref = weakref.ref(tensors[0])
        if bad:
            with pytest.raises(ValueError, match=r"^bias"):
                fastattn.mha(*tensors, bias=torch.zeros(9, 9))
        else:
            fastattn.mha(*tensors, return_lse=True)
        return ref

    for bad in (False, True):
        ref = call(bad)
        gc.collect()
        assert ref() is None


def test_no_library_is_imported():
    code = """
    class Lent:
        def __init__(self, x): self.x = x
        def __dlpack_device__(self): return self.x.__dlpack_device__()
        def __dlpack__(self, **kw): return self.x.__dlpack__(**kw)
    q, k, v = qkv(np.float32, 1, 4, 2, 8)
    before = set(sys.modules)
    assert type(fastattn.mha(Lent(q), k, v)) is np.ndarray
    print(sorted(name for name in set(sys.modules) - before if not name.startswith("fastattn")))
    """
    assert run(code)[0].strip() == "[]"


# ---- JAX ----------------------------------------------------------------------------------------------
JAX = """
import jax, jax.numpy as jnp, ml_dtypes
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
def same(a, b):
    return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
"""


def with_jax(code: str) -> str:
    return JAX + textwrap.dedent(code)


@pytest.fixture(scope="module")
def jax_installed() -> None:
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")


@pytest.mark.usefixtures("jax_installed")
def test_jax():
    # In a process of its own: jax starts threads, after which other tests may not fork.
    code = """
    for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
        arrays = qkv(dtype, 2, 5, 4, 16, Sk=7)
        mine = [jnp.asarray(x) for x in arrays]
        mask = np.random.default_rng(0).random((5, 7)) > 0.3
        expected = fastattn.mha(*arrays, mask=mask, return_lse=True, return_weights=True)
        for side in (mask, jnp.asarray(mask)):
            got = fastattn.mha(*mine, mask=side, return_lse=True, return_weights=True)
            for a, b in zip(got, expected):
                assert isinstance(a, jax.Array) and same(a, b), dtype
                assert a.devices() == mine[0].devices()
        assert same(fastattn.mha(mine[0], *arrays[1:]), expected[0]) is False  # that one had no mask
        assert type(fastattn.mha(arrays[0], *mine[1:])) is np.ndarray
        # The result is a plain array of jax: usable in jit, and other results do not change it.
        first = fastattn.mha(*mine)
        copy = np.array(first)
        for _ in range(20):
            fastattn.mha(*[2 * x for x in mine])
        assert same(first, copy)
        assert jax.jit(lambda x: x + x)(first).shape == first.shape
    """
    run(with_jax(code))


@pytest.mark.usefixtures("jax_installed")
def test_jax_waits_for_values_that_are_not_there_yet():
    code = """
    x = jnp.ones((1500, 1500), jnp.float32) / 1500
    slow = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64)[:256, :64].reshape(1, 256, 1, 64) + 1)
    slow(x).block_until_ready()
    for _ in range(5):
        q = slow(x)
        got = fastattn.mha(q, q, q)
        assert np.allclose(got, 1 + 1 / 1500, rtol=1e-5), got
    """
    run(with_jax(code))


@pytest.mark.usefixtures("jax_installed")
def test_jax_result_is_not_copied_and_stays_alive():
    code = """
    import gc, weakref
    from fastattn import _arrays
    seen = []
    adopt = _arrays.adopt
    def spy(q, buffer):
        seen.append(buffer.__array_interface__["data"][0])
        return adopt(q, buffer)
    _arrays.adopt = spy
    q = jnp.asarray(qkv(np.float32, 1, 64, 4, 64)[0])
    out = fastattn.mha(q, q, q)
    assert out.unsafe_buffer_pointer() == seen[0]
    expected = np.array(out)
    gc.collect()
    junk = [np.full(out.shape, 7, np.float32) for _ in range(50)]
    assert same(out, expected)
    """
    run(with_jax(code))


@pytest.mark.usefixtures("jax_installed")
def test_jax_arrays_are_immutable_and_tracers_are_no_arrays():
    code = """
    q, k, v = map(jnp.asarray, qkv(np.float32, 1, 4, 2, 8))
    before = np.array(q)
    try:
        fastattn.mha(k, k, v, out=q)
    except TypeError as error:
        assert str(error).startswith("out: ") and "immutable" in str(error), error
    else:
        raise AssertionError("wrote into an immutable array")
    assert same(q, before)
    try:
        jax.jit(lambda q: fastattn.mha(q, k, v))(q)
    except TypeError as error:
        assert str(error).startswith("q: "), error
    else:
        raise AssertionError("computed with a tracer")
    """
    run(with_jax(code))


@pytest.mark.usefixtures("jax_installed")
def test_jax_second_device():
    code = """
    device = jax.devices()[1]
    q, k, v = (jax.device_put(x, device) for x in qkv(np.float32, 1, 4, 2, 8))
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    assert out.devices() == lse.devices() == {device}
    assert same(out, fastattn.mha(*map(np.asarray, (q, k, v))))
    assert (out + q).devices() == {device}
    """
    run(with_jax(code), env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
