#include "core/padding.h"

#include <cstring>
#include <limits>
#include <vector>

#include "core/broadcast.h"
#include "core/scalar_access.h"

namespace fastattn {
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

// Rows or keys [begin, end) of an array, without a batch axis where entries are packed.
struct Gap {
    Index batch, begin, end;
};

// What lies beyond the entries' own in an array of `size` rows or keys. Entry: (b) -> {first, there, place
// for}.
template <class Own>
std::vector<Gap> find_gaps(const AttentionProblem& p, Index size, Own own) {
    std::vector<Gap> gaps;
    const auto add = [&](Index b, Index begin, Index end) {
        if (begin < end) gaps.push_back({b, begin, end});
    };
    Index end = 0;  // of the entry before
    for (Index b = 0; b < p.batch; ++b) {
        const auto [first, length, place] = own(b);
        if (p.packed()) add(0, end, first);
        add(p.packed() ? 0 : b, first + length, first + place);
        end = first + place;
    }
    if (p.packed()) add(0, end, size);
    return gaps;
}

struct Own {
    Index first, length, place;
};

std::vector<Gap> row_gaps(const AttentionProblem& p, const EntryAt& entry_at) {
    if (!p.has_q_lens && !p.packed()) return {};
    return find_gaps(p, p.q_size, [&](Index b) -> Own {
        const Entry& entry = entry_at(b);
        return {entry.first_row, entry.q_len, entry.q_size};
    });
}

std::vector<Gap> key_gaps(const AttentionProblem& p, const EntryAt& entry_at) {
    if (!p.has_kv_lens && !p.packed()) return {};
    return find_gaps(p, p.kv_size, [&](Index b) -> Own {
        const Entry& entry = entry_at(b);
        return {entry.first_key, entry.kv_len, entry.kv_size};
    });
}

// f(gap, head)
template <class F>
void for_gaps(const std::vector<Gap>& gaps, Index heads, Executor& executor, F&& f) {
    if (gaps.empty() || heads == 0) return;
    auto clear = [&](Index item, int) { f(gaps[static_cast<std::size_t>(item / heads)], item % heads); };
    executor.for_each(static_cast<Index>(gaps.size()) * heads, clear);
}

}  // namespace

void clear_padding(const AttentionProblem& p, const EntryAt& entry_at, Executor& executor) {
    for_gaps(row_gaps(p, entry_at), p.q_heads, executor, [&](const Gap& gap, Index h) {
        clear_rows(p.out, p.out_dtype, gap.batch, h, gap.begin, gap.end, p.value_dim, executor);
        constexpr double none = -std::numeric_limits<double>::infinity();
        store_rows(p.lse, gap.batch, h, gap.begin, gap.end, 1, none, executor);
        store_rows(p.weights, gap.batch, h, gap.begin, gap.end, p.kv_size, 0.0, executor);
    });
}

void clear_padding(const BackwardProblem& problem, const EntryAt& entry_at, Executor& executor) {
    const AttentionProblem& p = problem.forward;
    for_gaps(row_gaps(p, entry_at), p.q_heads, executor, [&](const Gap& gap, Index h) {
        clear_rows(problem.dq, p.dtype, gap.batch, h, gap.begin, gap.end, p.head_dim, executor);
    });
    for_gaps(key_gaps(p, entry_at), p.kv_heads, executor, [&](const Gap& gap, Index h) {
        clear_rows(problem.dk, p.k_dtype, gap.batch, h, gap.begin, gap.end, p.head_dim, executor);
        clear_rows(problem.dv, p.v_dtype, gap.batch, h, gap.begin, gap.end, p.value_dim, executor);
    });
}

void clear_bias_gradient(const BackwardProblem& problem, Executor& executor) {
    const ScoreOperand& x = problem.dbias;
    const AxisSizes own = own_sizes(x, problem.forward);
    auto clear = [&](Index item, int) {
        store_rows(x, 0, item / own.query, item % own.query, item % own.query + 1, own.key, 0.0, executor);
    };
    if (own.count() > 0) executor.for_each(own.head * own.query, clear);
}

void store_bias_sums(const BackwardProblem& problem, const double* sums, const EntryAt& entry_at) {
    const AttentionProblem& p = problem.forward;
    const ScoreOperand& x = problem.dbias;
    if (x.data == nullptr || x.query != 0 || x.key != 0) return;
    const Index heads = own_sizes(x, p).head;
    for (Index h = 0; h < heads; ++h) {
        double sum = 0;
        for (Index b = 0; b < p.batch; ++b) {
            const Entry& entry = entry_at(b);
            if (entry.q_size > 0 && entry.kv_size > 0) sum += sums[b * heads + h];
        }
        store_real(x.data, x.dtype, h * x.head, sum);
    }
}

}  // namespace fastattn
