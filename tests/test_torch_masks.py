"""A Mask of fastattn.masks in fastattn.torch: the numbers and gradients of the core, compiled and checked."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn
from fastattn import masks

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastattn.torch")

SQ, SK = 20, 33
IDS = np.random.default_rng(0).integers(0, 3, (2, SK))
MASKS = {
    "documents": masks.documents(IDS[:, -SQ:], IDS),
    "joined": masks.sinks_window(2, 9) & masks.documents(IDS[0, -SQ:], IDS[0]),
    "keys": masks.keys(np.random.default_rng(1).integers(-1, SK, (2, 2, SQ, 5))),
}


def tensors(dtype=torch.float32, D=8):
    torch.manual_seed(0)
    shapes = ((2, SQ, 4, D), (2, SK, 2, D), (2, SK, 2, D))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("name", list(MASKS))
def test_is_the_call_of_numpy(name):
    q, k, v = tensors()
    out, lse = ft.mha(q, k, v, mask=MASKS[name], causal=True, return_lse=True)
    given = [x.detach().numpy() for x in (q, k, v)]
    want, want_lse = fastattn.mha(*given, mask=MASKS[name], causal=True, return_lse=True)
    assert np.array_equal(out.detach().numpy(), want)
    assert np.array_equal(lse.detach().numpy(), want_lse)
    dout = torch.randn_like(out)
    out.backward(dout)
    grads = fastattn.mha_backward(dout.numpy(), *given, want, want_lse, mask=MASKS[name], causal=True)
    for x, grad in zip((q, k, v), grads, strict=False):
        assert np.array_equal(x.grad.numpy(), grad)


def test_gradcheck():
    q, k, v = tensors(torch.float64, D=3)
    cap = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, scale, softcap):
        return ft.mha(q, k, v, mask=MASKS["joined"], scale=scale, softcap=softcap)

    assert torch.autograd.gradcheck(function, (q, k, v, scale, cap), fast_mode=True)


def test_compiled_without_a_break():
    q, k, v = tensors()

    def function(q, k, v):
        return ft.mha(q, k, v, mask=MASKS["documents"], causal=True).sum()

    got = torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v)
    assert torch.equal(function(q, k, v), got)
    got.backward()
    grad = q.grad.clone()
    q.grad = None
    function(q, k, v).backward()
    assert torch.equal(q.grad, grad)


def test_opcheck_and_vmap():
    from fastattn.torch._ops import _DEFAULTS, mha

    q, k, v = tensors()
    words = torch.tensor(np.array(MASKS["joined"]._fastattn_words))
    torch.library.opcheck(mha, tuple((_DEFAULTS | {"q": q, "k": k, "v": v, "mask_lists": words}).values()))
    mask = masks.chunks(7)
    mapped = torch.vmap(lambda q, k, v: ft.mha(q, k, v, mask=mask))(q, k, v)
    assert torch.equal(mapped, torch.stack([ft.mha(*x, mask=mask) for x in zip(q, k, v, strict=True)]))


def test_packed_entries():
    q, k, v = (x.detach()[0] for x in tensors())
    cu_q, cu_kv = torch.tensor([0, 6, 20]), torch.tensor([0, 11, 33])
    mask = masks.sinks_window(1, 3) & masks.prefix_lm([2, 5])
    want = fastattn.mha_varlen(*(x.numpy() for x in (q, k, v)), cu_q.numpy(), cu_kv.numpy(), mask=mask)
    assert np.array_equal(ft.mha_varlen(q, k, v, cu_q, cu_kv, mask=mask).numpy(), want)


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match="mask: expected Sk = 9 as the Mask has, got 33"):
        ft.mha(*tensors(), mask=masks.documents(np.zeros(SQ, int), np.zeros(9, int)))
