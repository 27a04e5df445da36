#include "cpu/padding.h"

#include <cstring>
#include <limits>

#include "core/scalar_access.h"

namespace fastattn::cpu {
namespace {

using Index = std::int64_t;

constexpr Index kRowsPerStopCheck = 64;

// Rows [first, end) of head h: all numbers 0, whose bits are 0 in every dtype.
void clear_rows(const Operand& x, DType dtype, Index b, Index h, Index first, Index end, Index dim,
                Executor& executor) {
    const auto size = static_cast<Index>(item_size(dtype));
    for (Index i = first; i < end; ++i) {
        if (i % kRowsPerStopCheck == 0 && executor.stop_requested()) return;
        char* row = static_cast<char*>(x.data) + (b * x.batch + i * x.seq + h * x.head) * size;
        if (x.dim == 1) {
            std::memset(row, 0, static_cast<std::size_t>(dim * size));
        } else {
            for (Index d = 0; d < dim; ++d)
                std::memset(row + d * x.dim * size, 0, static_cast<std::size_t>(size));
        }
    }
}

void store_rows(const ScoreOperand& x, Index b, Index h, Index first, Index end, Index keys, double value,
                Executor& executor) {
    if (x.data == nullptr) return;
    for (Index i = first; i < end; ++i) {
        if (i % kRowsPerStopCheck == 0 && executor.stop_requested()) return;
        for (Index j = 0; j < keys; ++j)
            store_real(x.data, x.dtype, b * x.batch + h * x.head + i * x.query + j * x.key, value);
    }
}

// f(b, head, lengths) for the heads of entries that have fewer rows or keys than the arrays.
template <class Planned, class F>
void for_padded(const AttentionProblem& p, const EntryTable<Planned>& entries, bool keys_too, Index heads,
                Executor& executor, F&& f) {
    const auto padded = [&](const Planned& entry) {
        return entry.lengths.q_len < p.q_size || (keys_too && entry.lengths.kv_len < p.kv_size);
    };
    bool any = false;
    for (Index row = 0; row < entries.count && !any; ++row) any = padded(entries.rows[row]);
    if (!any || heads == 0) return;
    auto clear = [&](Index item, int) {
        const Planned& entry = entry_at(entries, item / heads);
        if (padded(entry)) f(item / heads, item % heads, entry.lengths);
    };
    executor.for_each(p.batch * heads, clear);
}

}  // namespace

void clear_padding(const AttentionProblem& p, const EntryTable<FlashEntry>& entries, Executor& executor) {
    if (!p.has_q_lens) return;
    for_padded(p, entries, false, p.q_heads, executor, [&](Index b, Index h, const Entry& entry) {
        clear_rows(p.out, p.dtype, b, h, entry.q_len, p.q_size, p.value_dim, executor);
        constexpr double none = -std::numeric_limits<double>::infinity();
        store_rows(p.lse, b, h, entry.q_len, p.q_size, 1, none, executor);
        store_rows(p.weights, b, h, entry.q_len, p.q_size, p.kv_size, 0.0, executor);
    });
}

void clear_padding(const BackwardProblem& problem, const EntryTable<BackwardEntry>& entries,
                   Executor& executor) {
    const AttentionProblem& p = problem.forward;
    if (!p.has_q_lens && !p.has_kv_lens) return;
    for_padded(p, entries, true, p.q_heads, executor, [&](Index b, Index h, const Entry& entry) {
        clear_rows(problem.dq, p.dtype, b, h, entry.q_len, p.q_size, p.head_dim, executor);
    });
    for_padded(p, entries, true, p.kv_heads, executor, [&](Index b, Index h, const Entry& entry) {
        clear_rows(problem.dk, p.dtype, b, h, entry.kv_len, p.kv_size, p.head_dim, executor);
        clear_rows(problem.dv, p.dtype, b, h, entry.kv_len, p.kv_size, p.value_dim, executor);
    });
}

}  // namespace fastattn::cpu
