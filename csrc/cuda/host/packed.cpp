#include "cuda/host/packed.h"

#include <cstdint>

#include "core/entries.h"
#include "core/entry_view.h"
#include "cuda/host/unit_arrays.h"

namespace fastattn::cuda {
namespace {

using Index = std::int64_t;

HeadOperand of_entry(HeadOperand x, Index b) noexcept {
    x.data = moved(const_cast<void*>(x.data), x.dtype, b * x.batch);
    x.batch = 0;
    return x;
}

void take_slopes(AttentionProblem&, Index) noexcept {}
void take_slopes(BackwardProblem& view, Index b) noexcept {
    ScoreOperand& x = view.dalibi;
    x.data = moved(x.data, x.dtype, b * x.batch);
}

template <class Problem>
Problem alone(const Problem& packed, const Entry& entry, Index b) noexcept {
    Problem view = view_of(packed, entry);
    AttentionProblem& p = forward_of(view);
    p.batch = 1;
    p.cu_q = p.cu_kv = {};
    p.kv_lens = of_entry(p.kv_lens, b);
    p.q_offsets = of_entry(p.q_offsets, b);
    p.alibi_slopes = of_entry(p.alibi_slopes, b);
    take_slopes(view, b);
    return view;
}

void forget_gradients(AttentionProblem&) noexcept {}
void forget_gradients(BackwardProblem& view) noexcept { view.dbias = view.dalibi = view.dsinks = {}; }
bool has_gradients(const AttentionProblem&) noexcept { return false; }
bool has_gradients(const BackwardProblem&) noexcept { return true; }

// Rows without keys have out 0 and lse -inf, also where there are sinks, and keys without rows no gradient.
template <class Problem>
Problem outside(const Problem& packed, const Entry& gap) noexcept {
    Problem view = view_of(packed, gap);
    AttentionProblem& p = forward_of(view);
    p.batch = 1;
    p.cu_q = p.cu_kv = p.kv_lens = p.q_offsets = p.alibi_slopes = p.sinks = {};
    p.mask = p.bias = {};
    p.has_kv_lens = p.has_q_offset = false;
    forget_gradients(view);
    return view;
}

template <class Problem>
std::vector<Problem> problems_of(const Problem& packed) {
    const AttentionProblem& p = forward_of(packed);
    std::vector<Problem> all;
    Index row = 0, key = 0;  // the first ones that no entry had so far
    const auto add_gap = [&](Index row_end, Index key_end) {
        const Entry rows{row_end - row, 0, 0, row_end - row, 0, row, 0},
            keys{0, key_end - key, 0, 0, key_end - key, 0, key};
        if (rows.q_size > 0) all.push_back(outside(packed, rows));
        if (keys.kv_size > 0 && has_gradients(packed)) all.push_back(outside(packed, keys));
    };
    for (Index b = 0; b < p.batch; ++b) {
        const Entry entry = read_entry(p, b);
        add_gap(entry.first_row, entry.first_key);
        all.push_back(alone(packed, entry, b));
        row = entry.first_row + entry.q_size;
        key = entry.first_key + entry.kv_size;
    }
    add_gap(p.q_size, p.kv_size);
    return all;
}

}  // namespace

const char* refuses_packed(const AttentionProblem& p) noexcept {
    if (!p.packed()) return nullptr;
    if (p.cu_q.place != DeviceType::cpu || p.cu_kv.place != DeviceType::cpu)
        return "takes bounds of packed entries (cu_q, cu_kv) from the host alone";
    return p.dropout > 0 ? "takes no packed entries (cu_q) with dropout" : nullptr;
}

// What entries share would be a sum over calls.
const char* refuses_packed(const BackwardProblem& b) noexcept {
    if (const char* why = refuses_packed(b.forward)) return why;
    if (!b.forward.packed()) return nullptr;
    if (b.dbias.data != nullptr) return "has no dbias of packed entries (cu_q)";
    if (b.dsinks.data != nullptr) return "has no dsinks of packed entries (cu_q)";
    return b.dalibi.data != nullptr && b.dalibi.batch == 0 && b.forward.batch > 1
               ? "has no dalibi_slopes that packed entries (cu_q) share"
               : nullptr;
}

std::vector<AttentionProblem> entry_problems(const AttentionProblem& packed) { return problems_of(packed); }
std::vector<BackwardProblem> entry_problems(const BackwardProblem& packed) { return problems_of(packed); }

}  // namespace fastattn::cuda
