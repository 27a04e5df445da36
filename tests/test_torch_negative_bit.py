"""PyTorch's views of other numbers than their memory holds: negative and conjugate bit, zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import normal

import fastattn

torch = pytest.importorskip("torch")

import fastattn.torch as ft  # noqa: E402

Tensor = torch.Tensor
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensor(*shape: int, of: Any, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.asarray(normal(shape, np.float64, seed))).to(of)


def negated(x: Tensor) -> Tensor:
    """x, as a view with the bit of memory that holds -x."""
    view = torch._neg_view(x.neg())
    assert view.is_neg()
    return view


def arguments(of: Any) -> dict[str, Tensor]:
    return {
        "q": tensor(2, 5, 4, 8, of=of, seed=1), "k": tensor(2, 7, 2, 8, of=of, seed=2),
        "v": tensor(2, 7, 2, 6, of=of, seed=3), "bias": tensor(4, 5, 7, of=of, seed=4),
        "alibi_slopes": tensor(4, of=of, seed=5), "sinks": tensor(4, of=of, seed=6),
        "q_lens": torch.tensor([5, 3]), "kv_lens": torch.tensor([4, 7]), "q_offset": torch.tensor([0, 2]),
    }  # fmt: skip


ARGUMENTS = list(arguments(torch.float32))


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_input_has_its_sign(name, of):
    given = arguments(of)
    changed = given | {name: negated(given[name])}
    for function in (fastattn.mha, ft.mha):
        want = function(**given, causal=True, return_lse=True)
        got = function(**changed, causal=True, return_lse=True)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert not got[0].is_neg()


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ARGUMENTS, "dout", "out", "lse", "dlse"])
def test_every_input_of_the_backward_has_its_sign(name, of):
    given = arguments(of) | {"causal": True}
    given["out"], given["lse"] = fastattn.mha(**given, return_lse=True)
    given |= {"dout": tensor(2, 5, 4, 6, of=of, seed=7), "dlse": given["lse"].nan_to_num(0, 0, 0).sin()}
    want = fastattn.mha_backward(**given)
    got = fastattn.mha_backward(**given | {name: negated(given[name])})
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_out_is_refused(of):
    q = tensor(2, 5, 4, 8, of=of)
    memory = torch.zeros_like(q)
    with pytest.raises(ValueError, match=r"^out: .*negative bit"):
        fastattn.mha(q, q, q, out=torch._neg_view(memory))
    assert not memory.any()  # neither read nor written


def test_parts_of_complex_numbers():
    z = torch.complex(
        tensor(2, 5, 4, 8, of=torch.float32), tensor(2, 5, 4, 8, of=torch.float32, seed=1)
    ).conj()
    imag = z.imag
    assert imag.is_neg()
    want = fastattn.mha(imag.clone(), imag.clone(), z.real)
    assert torch.equal(fastattn.mha(imag, imag, z.real), want)
    assert torch.equal(ft.mha(imag, imag, z.real), want)
    heads_first = [x.transpose(1, 2) for x in (imag, imag, z.real)]
    assert torch.equal(ft.scaled_dot_product_attention(*heads_first), want.transpose(1, 2))
    with pytest.raises(TypeError, match=r"^k: .*conjugate bit"):
        fastattn.mha(z.real, z, z.real)
    with pytest.raises(TypeError, match=r"^k: .*complex64"):
        ft.mha(z.real, z, z.real)


def test_a_bool_mask_is_named():
    q = tensor(2, 5, 4, 8, of=torch.float32)
    with pytest.raises(TypeError, match=r"^mask: "):  # PyTorch cannot negate it either
        fastattn.mha(q, q, q, mask=torch._neg_view(torch.ones(5, dtype=torch.bool)))


@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_gradients_that_come_with_the_bit(of):
    """What autograd hands to the backward pass."""
    results = []
    for hand_over in (negated, torch.clone):
        q = tensor(2, 5, 4, 8, of=of).requires_grad_()
        ft.mha(q, q, q).backward(hand_over(tensor(2, 5, 4, 8, of=of, seed=3)))
        results.append(q.grad)
    assert torch.equal(*results)


def test_zeros_without_memory():
    q = tensor(2, 5, 4, 8, of=torch.float32)
    zeros = torch._efficientzerotensor(q.shape)
    assert torch.equal(ft.mha(zeros, q, q), ft.mha(torch.zeros_like(q), q, q))
    with pytest.raises(TypeError, match=r"^q: .*no data"):
        fastattn.mha(zeros, q, q)


def test_numbers():
    """Scalars are read by PyTorch itself."""
    q = tensor(2, 5, 4, 8, of=torch.float32)
    for scale in (
        negated(torch.tensor(0.3)),
        torch.complex(torch.tensor(0.0), torch.tensor(-0.3)).conj().imag,
    ):
        assert scale.is_neg()
        for function in (fastattn.mha, ft.mha):
            assert torch.equal(function(q, q, q, scale=scale), function(q, q, q, scale=scale.item()))
