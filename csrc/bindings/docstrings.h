// Docstrings of the C functions, without the signature in front (signature_text()).
#pragma once

namespace fastattn::bindings {

inline constexpr const char* kMhaDoc =
    R"doc(Exact multi-head attention, fused: ``softmax(scale * q @ k.T + ...) @ v`` in O(S) memory.

B is the batch, Hq and Hkv are query and key/value heads (Hq a multiple of Hkv: GQA, MQA), Sq and Sk
sequence lengths, D and Dv the head dimensions of q, k and of v. A score is computed in this order:
scale, softcap, alibi and bias, mask (all restrictions intersect), softmax with sinks, dropout.

Parameters
----------
q : array of float64, float32, float16 or bfloat16
    (B, Sq, Hq, D); without a batch (Sq, Hq, D); a plain matrix (Sq, D). With ``layout="bhsd"``
    (B, Hq, Sq, D), (Hq, Sq, D). NumPy (bfloat16 through ml_dtypes), or anything with ``__dlpack__``
    in memory of the CPU or of a CUDA device: PyTorch, CuPy, JAX, ... Any strides are fine.
k : array of q's dtype
    (B, Sk, Hkv, D): q's rank and layout.
v : array of q's dtype
    (B, Sk, Hkv, Dv): q's rank and layout.
layout : {"bshd", "bhsd"}
    Order of the axes of q, k, v and out.
scale : float, optional
    Finite; zero and negative too. Default 1/sqrt(D).
causal : bool
    Row i sees key j when j <= p, where p = i + q_offset.
window : tuple of (left, right), optional
    Each an int >= 0 or None (unbounded): p - left <= j <= p + right.
q_offset : int or integer array (B,), optional
    Position of query row 0 among the keys. Default: kv_len - q_len of the batch entry, so that the
    last row stands at the last key; 0 aligns the first row with the first key.
mask : bool array or fastattn.masks.Mask, optional
    Broadcastable to (B, Hq, Sq, Sk); True: may attend. A padding mask (B, Sk) goes in as
    ``mask[:, None, None, :]``: as it is, NumPy's rules take its B for queries. A Mask says the same in O(S)
    memory.
bias : array of q's or lse's dtype, optional
    Broadcastable to (B, Hq, Sq, Sk); added to the scaled and softcapped scores. -inf counts as masked.
alibi_slopes : float array (Hq,) or (B, Hq), optional
    Adds -slope * abs(p - j).
softcap : float, optional
    c > 0: a score s becomes c * tanh(s / c).
sinks : float array (Hq,), optional
    One more logit per head in the denominator of the softmax, with no value.
q_lens, kv_lens : integer array (B,), optional
    Valid lengths. Keys from kv_len on are masked; rows from q_len on have out 0 and lse -inf.
dropout : float
    0 <= p < 1; kept weights are scaled by 1 / (1 - p).
seed : int
    0 <= seed < 2**64. The dropout mask depends on (seed, b, h, i, j) alone.
return_lse : bool
    Return the logarithm of the softmax's denominator too.
return_weights : bool
    Return the softmax, before dropout, too. This makes the Sq x Sk array.
out : array, optional
    Written in place and returned. The result's shape and dtype; may not overlap an input.
out_dtype : dtype or str, optional
    Of the result: q's, or "float32" (of float64 "float64"), which leaves out unrounded for `merge_states`.
device : str, optional
    "cpu", "cuda" or "cuda:N". Default: the environment variable FASTATTN_DEVICE, else where the arrays
    are; host arrays go to a GPU when the whole call, transfers counted, is estimated faster there.
kernel : str, optional
    A name from `kernels`, which is then used or UnsupportedError raised. Default: FASTATTN_KERNEL, else
    the first that supports the call.

Returns
-------
out : array
    q's kind, dtype and layout, with Dv as its last axis. A row that may attend nothing is 0.
lse : array (B, Hq, Sq), only with ``return_lse``
    q's kind; float64 for float64, else float32. Axes that q lacks are dropped. -inf for a row that may
    attend nothing (with sinks: the sink).
weights : array (B, Hq, Sq, Sk), only with ``return_weights``
    As lse. With either of the two the result is a tuple.

Raises
------
TypeError
    Not an array, a wrong dtype, dtypes that differ, foreign byte order, a tensor that requires grad.
ValueError
    A rank, shape, head ratio, length or number out of range, or `out` overlapping an input.
UnsupportedError
    The forced kernel or device cannot do it. A ValueError.
CudaError
    A failure of CUDA or cuBLAS; the message says when the process must restart.
MemoryError
    Names the bytes that were asked for.

Notes
-----
Arrays on a CUDA device are read, and the result written, in the current stream of q's library; the call
does not wait for it. Libraries whose stream is not known (JAX) get a result that is there.

The GIL is released. Ctrl-C raises KeyboardInterrupt within 0.2 s; `out` is then incomplete. The result
has the same bits whatever the number of threads and whatever else is in the batch.

The algorithm is the online softmax over blocks of keys [1]_ [2]_; GQA [3]_, ALiBi [4]_, sinks [5]_, and
Philox random numbers for dropout [6]_.

References
----------
.. [1] Milakov, Gimelshein: Online normalizer calculation for softmax, 2018.
.. [2] Dao et al.: FlashAttention, NeurIPS 2022; Dao: FlashAttention-2, ICLR 2024.
.. [3] Ainslie et al.: GQA, EMNLP 2023.
.. [4] Press et al.: Train short, test long, ICLR 2022.
.. [5] Xiao et al.: Efficient streaming language models with attention sinks, ICLR 2024.
.. [6] Salmon et al.: Parallel random numbers: as easy as 1, 2, 3, SC 2011.

Examples
--------
>>> import numpy as np, fastattn
>>> q = np.random.rand(1, 128, 8, 64).astype(np.float32)
>>> fastattn.mha(q, q, q, causal=True).shape
(1, 128, 8, 64)
)doc";

inline constexpr const char* kExplainDoc =
    R"doc(The plan of a call of `mha` with these arguments, without running it.

Parameters
----------
q, k, v, layout, ...
    As for `mha`; nothing is allocated for the results.
cu_q, cu_kv : integer array (B + 1,), optional
    As for `mha_varlen`, whose call is meant then.

Returns
-------
Explanation
    The kernel and device that would run it, workspace bytes, FLOPs, bytes of inputs and outputs, and for
    every other kernel the reason why it was not taken.

Raises
------
TypeError, ValueError, UnsupportedError
    As `mha`.

Examples
--------
>>> import numpy as np, fastattn
>>> q = np.zeros((1, 128, 8, 64), np.float32)
>>> fastattn.explain(q, q, q).device
'cpu'
)doc";

inline constexpr const char* kBackwardDoc =
    R"doc(Gradients of `mha`, with the weights recomputed from lse: O(S) memory.

Parameters
----------
dout : array
    Gradient of the loss by out: out's shape and dtype.
q, k, v : array
    As given to `mha`.
out, lse : array
    What ``mha(..., return_lse=True)`` returned for them.
dlse : array (B, Hq, Sq), optional
    Gradient of the loss by lse: lse's shape and dtype.
layout, scale, causal, window, q_offset, mask, bias, alibi_slopes, softcap, sinks, q_lens, kv_lens
    As given to `mha`.
dropout, seed
    As given to `mha`; the same dropout and seed draw the same mask.
need_dbias : bool
    False: dbias is None, which saves two of seven matrix products where there is a bias.
device, kernel : str, optional
    As for `mha`.

Returns
-------
Gradients
    A named tuple (dq, dk, dv, dbias, dalibi_slopes, dsinks) of arrays of q's kind, each in the shape and
    dtype of its argument, None where that was not given. dk and dv are summed over the query heads of a key
    head, dbias over the axes that bias broadcasts, dalibi_slopes of shape (Hq,) and dsinks over the batch.

Raises
------
TypeError, ValueError, UnsupportedError, CudaError, MemoryError
    As `mha`. UnsupportedError also for a forced kernel that has no backward pass.

Notes
-----
With P = exp(score - lse) and r = 1 / (1 - dropout) for kept weights, 0 for dropped ones (FlashAttention [1]_,
algorithm 4)::

    dv = r P^T dout     dP = r (dout v^T)     dS = P (dP - delta + dlse)     delta = sum of dout * out by row
    dq = scale dS' k    dk = scale dS'^T q    dS' = dS (1 - tanh(score/softcap)^2)

Pairs that a row may not attend contribute nothing, whatever their arrays hold. The result has the same bits
whatever the number of threads and whatever else is in the batch.

References
----------
.. [1] Dao et al.: FlashAttention, NeurIPS 2022.

Examples
--------
>>> import numpy as np, fastattn
>>> q = np.random.rand(1, 128, 8, 64).astype(np.float32)
>>> out, lse = fastattn.mha(q, q, q, causal=True, return_lse=True)
>>> fastattn.mha_backward(np.ones_like(out), q, q, q, out, lse, causal=True).dk.shape
(1, 128, 8, 64)
)doc";

inline constexpr const char* kVarlenDoc =
    R"doc(`mha` of packed entries: sequences of any lengths one after another, without padding.

Entry b has the rows ``cu_q[b]:cu_q[b + 1]`` of q and the keys ``cu_kv[b]:cu_kv[b + 1]`` of k and v, and
attends nothing else. On a CPU each has the bits that `mha` gives for it alone. An entry may be empty.

Parameters
----------
q : array of float64, float32, float16 or bfloat16
    (Tq, Hq, D): the rows of all entries. With ``layout="bhsd"`` (Hq, Tq, D). Kinds as in `mha`.
k, v : array of q's dtype
    (Tk, Hkv, D) and (Tk, Hkv, Dv).
cu_q, cu_kv : integer array (B + 1,)
    Bounds that do not decrease, 0 <= cu[0], cu[B] <= T. cu_kv None: cu_q.
q_offset : int or integer array (B,), optional
    Position of an entry's row 0 among its own keys. Default: its keys less its rows, so that its last row
    stands at its last key.
kv_lens : integer array (B,), optional
    Valid keys of each entry, at most those it has; the others are masked.
alibi_slopes : float array (Hq,) or (B, Hq), optional
mask, bias : array, optional
    As in `mha`, broadcastable to (Hq, Tq, Tk); an entry reads its own block of it. Of a Mask the rows are
    the packed ones, the keys are numbered within the entry.
layout, scale, causal, window, softcap, sinks
    As in `mha`; positions are those within an entry.
dropout, seed
    As in `mha`; b is the number of the entry.
return_lse, out, out_dtype, device, kernel
    As in `mha`.

Returns
-------
out : array (Tq, Hq, Dv)
    q's kind, dtype and layout. Rows outside of all entries are 0.
lse : array (Hq, Tq), only with ``return_lse``
    As in `mha`; -inf outside of all entries.

Raises
------
TypeError, ValueError, UnsupportedError, CudaError, MemoryError
    As `mha`. ValueError for bounds names the entry.

Notes
-----
The bounds, lengths and offsets are read once, before anything is computed. No largest length is asked for.

Examples
--------
>>> import numpy as np, fastattn
>>> q = np.random.rand(6, 8, 64).astype(np.float32)  # 1 + 3 + 2 rows
>>> fastattn.mha_varlen(q, q, q, np.array([0, 1, 4, 6]), causal=True).shape
(6, 8, 64)
)doc";

inline constexpr const char* kVarlenBackwardDoc =
    R"doc(Gradients of `mha_varlen`, with the weights recomputed from lse.

Parameters
----------
dout : array
    Gradient of the loss by out: out's shape and dtype.
q, k, v, cu_q, cu_kv
    As given to `mha_varlen`.
out, lse : array
    What ``mha_varlen(..., return_lse=True)`` returned for them.
dlse : array (Hq, Tq), optional
    Gradient of the loss by lse: lse's shape and dtype.
layout, scale, causal, window, q_offset, mask, bias, alibi_slopes, softcap, sinks, kv_lens
    As given to `mha_varlen`.
dropout, seed
    As given to `mha_varlen`; the same dropout and seed draw the same mask.
need_dbias : bool
    False: dbias is None.
device, kernel : str, optional
    As for `mha`.

Returns
-------
Gradients
    As `mha_backward`. Rows and keys outside of all entries, and pairs of two entries in dbias, get 0.

Raises
------
TypeError, ValueError, UnsupportedError, CudaError, MemoryError
    As `mha_backward`.

Examples
--------
>>> import numpy as np, fastattn
>>> q, cu = np.random.rand(6, 8, 64).astype(np.float32), np.array([0, 1, 4, 6])
>>> out, lse = fastattn.mha_varlen(q, q, q, cu, return_lse=True)
>>> fastattn.mha_varlen_backward(np.ones_like(out), q, q, q, out, lse, cu).dq.shape
(6, 8, 64)
)doc";

}  // namespace fastattn::bindings
