// A packed entry as kernels see it: the problem with its arrays begun at the entry's own rows and keys. The
// number of the entry stays what it was: per-entry arguments and the dropout mask go by it.
#pragma once

#include <cstddef>
#include <cstdint>

#include <fastattn/attention.h>

#include "core/entry.h"

namespace fastattn {

// Elements on from x.data, in bytes.
inline void* moved(void* data, DType dtype, std::int64_t elements) noexcept {
    if (data == nullptr) return nullptr;
    return static_cast<std::byte*>(data) + elements * static_cast<std::int64_t>(item_size(dtype));
}

inline Operand from_row(Operand x, DType dtype, std::int64_t first) noexcept {
    x.data = moved(x.data, dtype, first * x.seq);
    return x;
}

inline ScoreOperand from_pair(ScoreOperand x, const Entry& entry) noexcept {
    x.data = moved(x.data, x.dtype, entry.first_row * x.query + entry.first_key * x.key);
    return x;
}

inline AttentionProblem view_of(const AttentionProblem& p, const Entry& entry) noexcept {
    AttentionProblem view = p;
    view.q = from_row(p.q, p.dtype, entry.first_row);
    view.out = from_row(p.out, p.out_dtype, entry.first_row);
    view.k = from_row(p.k, p.k_dtype, entry.first_key);
    view.v = from_row(p.v, p.v_dtype, entry.first_key);
    view.lse = from_pair(p.lse, entry);
    view.mask = from_pair(p.mask, entry);
    view.bias = from_pair(p.bias, entry);
    view.q_size = entry.q_size;
    view.kv_size = entry.kv_size;
    return view;
}

inline BackwardProblem view_of(const BackwardProblem& b, const Entry& entry) noexcept {
    const AttentionProblem& p = b.forward;
    BackwardProblem view = b;
    view.forward = view_of(p, entry);
    view.dout = from_row(b.dout, p.dtype, entry.first_row);
    view.dq = from_row(b.dq, p.dtype, entry.first_row);
    view.dk = from_row(b.dk, p.k_dtype, entry.first_key);
    view.dv = from_row(b.dv, p.v_dtype, entry.first_key);
    view.dlse = from_pair(b.dlse, entry);
    view.dbias = from_pair(b.dbias, entry);
    return view;
}

}  // namespace fastattn
