// The gradients by their definition (attention.h), in double, one sum at a time: each element of dq, dk, dv,
// dbias, dalibi and dsinks is the work of one item, which recomputes P and dS of all the pairs in its sum. So
// nothing is added up across items, and a pair that a row may not attend is never read.
#include "reference/backward.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "core/broadcast.h"
#include "core/entry_view.h"
#include "core/padding.h"
#include "reference/row.h"
#include "reference/schedule.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

// What the pairs of a row share: P = share * exp(s - top), delta - dlse.
struct RowState {
    double top, share, delta;
};

template <class T>
class Backward {
public:
    Backward(const BackwardProblem& problem, const ReferenceSchedule& entries, double* query, RowState* rows,
             Executor& executor)
        : b_(problem),
          p_(problem.forward),
          entries_(entries),
          query_(query),
          rows_(rows),
          executor_(executor) {}

    void prepare(Index b, Index h, Index i) const {
        const ReferenceRow<T> row = row_of(b, h, i);
        RowState& state = state_of(row);
        state = {};
        if (!row.exists) return;
        const T *dout = features<T>(b_.dout, b, i, h), *out = features<T>(p_.out, b, i, h);
        for (Index d = 0; d < p_.value_dim; ++d)
            state.delta += to_double(dout[d * b_.dout.dim]) * to_double(out[d * p_.out.dim]);
        if (!std::isfinite(state.delta)) {  // of a row that may attend nothing it is the sum of nothing
            bool any = false;
            row.for_attended_keys(executor_, [&](Index, double) { any = true; });
            if (!any) state.delta = 0.0;
        }
        if (b_.dlse.data != nullptr)
            state.delta -= load_real(b_.dlse.data, b_.dlse.dtype, score_index(b_.dlse, b, h, i, 0));
        state.top = load_real(p_.lse.data, p_.lse.dtype, score_index(p_.lse, b, h, i, 0));
        state.share = 1.0;
        // From some size on lse says too little of the sum of the weights; beside a bias of -1e9 nothing. It
        // is found anew, and used where it agrees with lse as far as that tells (it may be of more keys than
        // these).
        const bool wide = p_.lse.dtype == DType::f64;
        const double epsilon =
            wide ? std::numeric_limits<double>::epsilon() : double(std::numeric_limits<float>::epsilon());
        const double most =
            wide ? std::numeric_limits<double>::max() : double(std::numeric_limits<float>::max());
        const double size = std::abs(state.top);
        if (!(size * epsilon * 1024 > 1.0) || size > most) return;
        double max = row.sink, sum = 0.0;
        row.for_attended_keys(executor_,
                              [&](Index j, double bias) { max = std::max(max, row.score(j, bias)); });
        row.for_attended_keys(executor_,
                              [&](Index j, double bias) { sum += row.weight(row.score(j, bias), max); });
        sum += row.sink_weight(max);
        if (std::abs(max + std::log(sum) - state.top) > 4 * epsilon * size && size < most) return;
        state.top = max;
        state.share = 1.0 / sum;
    }

    // One pair that the row may attend.
    struct Pair {
        double kept, ds, ds_product;  // r P, dS, and dS before softcap: by scale * q.k
    };
    Pair pair(const ReferenceRow<T>& row, Index j, double bias) const {
        const RowState& state = state_of(row);
        const double s = row.capped(j);
        const double weight = state.share * std::exp(row.placed(s, j, bias) - state.top);
        const double keep = row.dropped(j) ? 0.0 : 1.0 / (1.0 - p_.dropout);
        const T *dout = features<T>(b_.dout, row.b, row.i, row.h), *v = row.values[j];
        double dp = 0.0;
        for (Index d = 0; d < p_.value_dim; ++d)
            dp += to_double(dout[d * b_.dout.dim]) * to_double(v[d * row.values.number_stride()]);
        const double ds = weight * (keep * dp - state.delta);
        const double slope = score_slope(p_, s);
        return {keep * weight, ds, ds * slope};
    }

    void query_row(Index b, Index h, Index i, double* acc) const {
        std::fill(acc, acc + p_.head_dim, 0.0);
        const ReferenceRow<T> row = row_of(b, h, i);
        if (row.exists) {
            row.for_attended_keys(executor_, [&](Index j, double bias) {
                const double ds = pair(row, j, bias).ds_product;
                const T* k = row.keys[j];
                for (Index d = 0; d < p_.head_dim; ++d)
                    acc[d] += ds * to_double(k[d * row.keys.number_stride()]);
            });
        }
        store_row(b_.dq, b, i, h, p_.head_dim, acc, p_.scale);
    }

    void key_row(Index b, Index kv_head, Index j, double* acc) const {
        double *dk = acc, *dv = acc + p_.head_dim;
        std::fill(acc, dv + p_.value_dim, 0.0);
        for (Index h = kv_head * p_.group; h < (kv_head + 1) * p_.group; ++h) {
            for_attending_rows(b, h, j, [&](const ReferenceRow<T>& row, double bias) {
                const Pair x = pair(row, j, bias);
                const T *q = features<T>(p_.q, b, row.i, h), *dout = features<T>(b_.dout, b, row.i, h);
                for (Index d = 0; d < p_.head_dim; ++d) dk[d] += x.ds_product * to_double(q[d * p_.q.dim]);
                for (Index d = 0; d < p_.value_dim; ++d) dv[d] += x.kept * to_double(dout[d * b_.dout.dim]);
            });
        }
        store_row(b_.dk, b, j, kv_head, p_.head_dim, dk, p_.scale);
        store_row(b_.dv, b, j, kv_head, p_.value_dim, dv, 1.0);
    }

    // The element of dbias that belongs to (b, h, i, j): the sum over the axes that it does not have.
    void bias_element(Index b, Index h, Index i, Index j) {
        const ScoreOperand& x = b_.dbias;
        const auto last = [](Index stride, Index at, Index size) { return stride == 0 ? size : at + 1; };
        double sum = 0.0;
        for (Index bb = b; bb < last(x.batch, b, p_.batch); ++bb) {
            const Entry& entry = entries_[bb];
            const Index row_begin = std::max<Index>(i - entry.first_row, 0),
                        row_end = std::min(last(x.query, i, p_.q_size) - entry.first_row, entry.q_size),
                        key_begin = std::max<Index>(j - entry.first_key, 0),
                        key_end = std::min(last(x.key, j, p_.kv_size) - entry.first_key, entry.kv_size);
            if (row_begin >= row_end || key_begin >= key_end) continue;
            in_entry(bb, [&](const Backward& mine) {
                for (Index hh = h; hh < last(x.head, h, p_.q_heads); ++hh)
                    for (Index ii = row_begin; ii < row_end && !executor_.stop_requested(); ++ii)
                        sum += mine.row_bias(mine.row_of(bb, hh, ii), key_begin, key_end);
            });
        }
        store_real(x.data, x.dtype, score_index(x, b, h, i, j), sum);
    }

    void slope_element(Index b, Index h) {
        double sum = 0.0;
        for_rows(b_.dalibi, b, h, [&](const Backward& mine, const ReferenceRow<T>& row) {
            row.for_attended_keys(executor_, [&](Index j, double bias) {
                sum -= mine.pair(row, j, bias).ds * row.distance(j);
            });
        });
        store_real(b_.dalibi.data, b_.dalibi.dtype, score_index(b_.dalibi, b, h, 0, 0), sum);
    }

    void sink_element(Index h) {
        double sum = 0.0;
        for_rows(b_.dsinks, 0, h, [&](const Backward&, const ReferenceRow<T>& row) {
            const RowState& state = state_of(row);
            if (row.sink == -row.kInfinity) return;
            // A sink of +inf has all the weight.
            const double weight = row.sink == row.kInfinity ? 1.0 : std::exp(row.sink - state.top);
            sum -= state.share * weight * state.delta;
        });
        store_real(b_.dsinks.data, b_.dsinks.dtype, score_index(b_.dsinks, 0, h, 0, 0), sum);
    }

    // f(the same for the arrays of entry b alone, where entries are packed).
    template <class F>
    void in_entry(Index b, F f) const {
        if (!p_.packed()) return f(*this);
        const BackwardProblem view = view_of(b_, entries_[b]);
        f(Backward(view, entries_, query_, rows_, executor_));
    }

private:
    // The row's dS, summed over some keys.
    double row_bias(const ReferenceRow<T>& row, Index begin, Index end) const {
        double sum = 0.0, bias = 0.0;
        for (Index j = begin; j < end && row.exists; ++j) {
            if (sees_key(row.range.begin, row.range.end, j) && row.attends(j, bias))
                sum += pair(row, j, bias).ds;
        }
        return sum;
    }
    ReferenceRow<T> row_of(Index b, Index h, Index i) const { return {p_, entries_[b], query_, b, h, i}; }
    RowState& state_of(const ReferenceRow<T>& row) const {
        return rows_[row_number(p_, row.b, entries_[row.b], row.h, row.i)];
    }

    // The existing rows of head h, of batch entry b or, where the result has no batch axis, of all.
    template <class F>
    void for_rows(const ScoreOperand& result, Index b, Index h, F f) const {
        for (Index bb = b; bb < (result.batch == 0 ? p_.batch : b + 1); ++bb) {
            in_entry(bb, [&](const Backward& mine) {
                for (Index i = 0; i < entries_[bb].q_len && !executor_.stop_requested(); ++i)
                    f(mine, mine.row_of(bb, h, i));
            });
        }
    }

    template <class F>
    void for_attending_rows(Index b, Index h, Index j, F f) const {
        for (Index i = 0; i < entries_[b].q_len; ++i) {
            if (i % 16 == 0 && executor_.stop_requested()) return;
            const KeyRange range = entry_keys(p_, entries_[b], i);
            if (!sees_key(range.begin, range.end, j)) continue;
            const ReferenceRow<T> row = row_of(b, h, i);
            double bias;
            if (sees_key(row.range.begin, row.range.end, j) && row.attends(j, bias)) f(row, bias);
        }
    }

    void store_row(const Operand& x, Index b, Index i, Index h, Index dim, const double* acc,
                   double factor) const {
        const Index at = b * x.batch + i * x.seq + h * x.head;
        for (Index d = 0; d < dim; ++d)
            store_real(x.data, p_.dtype, at + d * x.dim, acc[d] == 0 ? 0.0 : factor * acc[d]);
    }

    const BackwardProblem& b_;
    const AttentionProblem& p_;
    const ReferenceSchedule& entries_;
    double* query_;  // (D,)
    RowState* rows_;  // (B, Hq, Sq)
    Executor& executor_;
};

}  // namespace

KernelPlan plan_reference_backward(const BackwardProblem& problem, Device, int, bool describe) {
    const AttentionProblem& p = problem.forward;
    KernelPlan plan;
    const auto rows = static_cast<std::size_t>(p.array_batch() * p.q_heads * p.q_size);
    plan.shared_bytes = rows * sizeof(RowState);
    plan.per_thread_bytes = static_cast<std::size_t>(2 * p.head_dim + p.value_dim) * sizeof(double);
    auto entries = std::make_unique<const ReferenceSchedule>(p);
    plan.work_items = std::max(
        {p.batch * p.q_heads * entries->most_rows(), p.batch * p.kv_heads * entries->most_keys(), Index{1}});
    plan.schedule = std::move(entries);
    if (describe) plan.algorithm = "element by element in double, every sum by itself";
    return plan;
}

void run_reference_backward(const BackwardProblem& problem, const Target&, const Workspace& workspace,
                            Executor& executor) {
    const AttentionProblem& p = problem.forward;
    with_element_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        // f(backward, item, scratch of D + Dv) for every item.
        const auto for_each = [&](Index items, auto f) {
            auto item_fn = [&](Index item, int slot) {
                auto* scratch = reinterpret_cast<double*>(
                    workspace.per_thread + static_cast<std::size_t>(slot) * workspace.per_thread_stride);
                if (executor.stop_requested()) return;
                Backward<T> backward(problem, ReferenceSchedule::of(workspace), scratch,
                                     reinterpret_cast<RowState*>(workspace.shared), executor);
                f(backward, item, scratch + p.head_dim);
            };
            executor.for_each(items, item_fn);
        };
        const ReferenceSchedule& entries = ReferenceSchedule::of(workspace);
        // f(the backward of an entry, b, h, n) for the n-th row, or key, of each of `heads` in each entry.
        const auto for_each_of = [&](Index heads, Index most, Index Entry::* size, auto f) {
            for_each(p.batch * heads * most, [&, f](auto& backward, Index item, double* acc) {
                const Index n = item % most, h = item / most % heads, b = item / most / heads;
                if (n >= entries[b].*size) return;
                backward.in_entry(b, [&](const auto& mine) { f(mine, b, h, n, acc); });
            });
        };
        const auto prepare = [](const auto& mine, Index b, Index h, Index i, double*) {
            mine.prepare(b, h, i);
        };
        const auto query_row = [](const auto& mine, Index b, Index h, Index i, double* acc) {
            mine.query_row(b, h, i, acc);
        };
        const auto key_row = [](const auto& mine, Index b, Index h, Index j, double* acc) {
            mine.key_row(b, h, j, acc);
        };
        for_each_of(p.q_heads, entries.most_rows(), &Entry::q_size, prepare);
        for_each_of(p.q_heads, entries.most_rows(), &Entry::q_size, query_row);
        for_each_of(p.kv_heads, entries.most_keys(), &Entry::kv_size, key_row);
        if (p.packed()) clear_padding(problem, [&](Index b) -> const Entry& { return entries[b]; }, executor);
        const AxisSizes bias = own_sizes(problem.dbias, p), slopes = own_sizes(problem.dalibi, p),
                        sinks = own_sizes(problem.dsinks, p);
        for_each(bias.count(), [&](auto& backward, Index n, double*) {
            const Index j = n % bias.key, i = n / bias.key % bias.query;
            const Index h = n / bias.key / bias.query % bias.head, b = n / bias.key / bias.query / bias.head;
            backward.bias_element(b, h, i, j);
        });
        for_each(slopes.count(), [&](auto& backward, Index n, double*) {
            backward.slope_element(n / slopes.head, n % slopes.head);
        });
        for_each(sinks.count(), [&](auto& backward, Index h, double*) { backward.sink_element(h); });
    });
}

}  // namespace fastattn
