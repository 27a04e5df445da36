"""`fastattn.torch.mha_varlen`: results, gradients, torch.compile, checks by PyTorch itself."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastattn.torch")

CU_Q, CU_KV = [0, 3, 3, 40, 41], [0, 5, 9, 60, 100]


def tensors(dtype=torch.float32, Hq=4, Hkv=2, D=16, Dv=24):
    torch.manual_seed(0)
    shapes = ((CU_Q[-1], Hq, D), (CU_KV[-1], Hkv, D), (CU_KV[-1], Hkv, Dv))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def bounds(**kw):
    return torch.tensor(CU_Q, **kw), torch.tensor(CU_KV, **kw)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_entry_is_mha(kind):
    q, k, v = tensors(kind)
    cu_q, cu_kv = bounds(dtype=torch.int32)
    out, lse = ft.mha_varlen(q, k, v, cu_q, cu_kv, causal=True, return_lse=True)
    assert out.dtype == kind
    assert lse.shape == (4, CU_Q[-1])
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.autograd.backward((out, lse), (dout, dlse))
    got = [x.grad for x in (q, k, v)]
    for b in range(len(CU_Q) - 1):
        rows, keys = slice(*CU_Q[b : b + 2]), slice(*CU_KV[b : b + 2])
        own = [x.detach()[None, part].requires_grad_() for x, part in ((q, rows), (k, keys), (v, keys))]
        one, one_lse = ft.mha(*own, causal=True, return_lse=True)
        assert torch.equal(out[rows], one[0])
        assert torch.equal(lse[:, rows], one_lse[0])
        torch.autograd.backward((one, one_lse), (dout[None, rows], dlse[None, :, rows]))
        for x, whole, part in zip(own, got, (rows, keys, keys), strict=True):
            assert torch.equal(x.grad[0], whole[part])


def test_gradcheck_with_what_entries_share():
    q, k, v = tensors(torch.float64, Hq=2, Hkv=2, D=3, Dv=2)
    cu_q, cu_kv = torch.tensor([0, 3, 3, 7, 8]), torch.tensor([0, 4, 5, 9, 10])
    q, k, v = (x.detach()[:n].clone().requires_grad_() for x, n in ((q, 8), (k, 10), (v, 10)))
    bias = torch.randn(2, 1, 10, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, bias, sinks, scale):
        return ft.mha_varlen(q, k, v, cu_q, cu_kv, bias=bias, sinks=sinks, scale=scale, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sinks, scale))


def test_compiled_without_a_break():
    q, k, v = tensors()

    def function(q, k, v, cu_q, cu_kv):
        return ft.mha_varlen(q, k, v, cu_q, cu_kv, causal=True).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    want, got = function(q, k, v, *bounds()), compiled(q, k, v, *bounds())
    assert torch.equal(want, got)
    got.backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    want.backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip((q, k, v), grads, strict=True))


def test_opcheck():
    from fastattn.torch._ops import _DEFAULTS, mha

    q, k, v = tensors(D=8, Dv=8)
    cu_q, cu_kv = bounds()
    arguments = _DEFAULTS | {"q": q, "k": k, "v": v, "cu_q": cu_q, "cu_kv": cu_kv, "causal": True}
    torch.library.opcheck(mha, tuple(arguments.values()))


def test_of_numpy_the_same():
    q, k, v = (x.detach() for x in tensors())
    cu_q, cu_kv = bounds()
    want = fastattn.mha_varlen(q.numpy(), k.numpy(), v.numpy(), cu_q.numpy(), cu_kv.numpy(), window=(7, 0))
    assert np.array_equal(ft.mha_varlen(q, k, v, cu_q, cu_kv, window=(7, 0)).numpy(), want)
    heads_first = ft.mha_varlen(
        *(x.transpose(0, 1) for x in (q, k, v)), cu_q, cu_kv, window=(7, 0), layout="bhsd"
    )
    assert np.array_equal(heads_first.transpose(0, 1).numpy(), want)


def test_refusals():
    q, k, v = tensors()
    cu_q, cu_kv = bounds()
    with pytest.raises(TypeError, match=r"cu_q: expected a torch.Tensor, got list"):
        ft.mha_varlen(q, k, v, CU_Q, CU_KV)
    with pytest.raises(TypeError, match=r"cu_q: expected a torch.Tensor, got NoneType"):
        ft.mha_varlen(q, k, v, None)
    with pytest.raises(ValueError, match=r"cu_q: .* do not decrease"):
        ft.mha_varlen(q, k, v, cu_q.flip(0), cu_kv)
    cap = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(NotImplementedError, match="softcap: there is no gradient of it for packed entries"):
        ft.mha_varlen(q, k, v, cu_q, cu_kv, softcap=cap).sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_unrounded_results(packed):
    q, k, v = tensors(torch.bfloat16)

    def attend(**kw):
        if packed:
            return ft.mha_varlen(q, k, v, *bounds(), causal=True, **kw)
        return ft.mha(q, k, v, causal=True, **kw)

    out = attend(out_dtype=torch.float32)
    assert out.dtype == torch.float32
    plain = attend()
    assert torch.equal(out.to(torch.bfloat16), plain)
    assert not torch.equal(out, plain.float())
    dout = torch.randn_like(plain)
    got = torch.autograd.grad(out, (q, k, v), dout.float())
    want = torch.autograd.grad(plain, (q, k, v), dout)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    compiled = torch.compile(lambda: attend(out_dtype=torch.float32), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), out)
    with pytest.raises(TypeError, match="out_dtype: expected bfloat16 or float32, got float64"):
        attend(out_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"out_dtype: expected a torch.dtype, got str"):
        attend(out_dtype="float32")
