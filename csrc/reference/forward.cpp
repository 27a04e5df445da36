// One query row at a time, two passes over its keys:
//   pass 1  m = max_j s_j,             s_j = alibi + bias + softcap(scale * q.k_j)
//   pass 2  l = sum_j exp(s_j - m),    acc = sum_j keep_j * exp(s_j - m) * v_j
//   out = acc / l,  lse = m + log l    (a sink is one more s_j without a v_j)
// Scores are computed anew in each pass, so a row needs memory for q (D) and acc (Dv) only. A key that
// the row may not attend is skipped before k or v is read.
#include "reference/forward.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "core/entry_view.h"
#include "core/padding.h"
#include "reference/backward.h"
#include "reference/row.h"
#include "reference/schedule.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

constexpr Index kRowsPerItem = 16;

// One row of the output; acc holds Dv doubles.
template <class T>
class Forward {
public:
    Forward(const ReferenceRow<T>& row, Executor& executor, double* acc)
        : row_(row), p_(row.p), executor_(executor), acc_(acc) {}

    void compute() {
        std::fill(acc_, acc_ + p_.value_dim, 0.0);
        if (!row_.exists) return store(1.0, -row_.kInfinity);  // no such row: the sink does not count

        double max = row_.sink;
        Index attended = 0;
        const bool done = row_.for_attended_keys(executor_, [&](Index j, double bias) {
            const double s = row_.score(j, bias);
            max = s > max ? s : max;
            ++attended;
        });
        if (!done) return;
        if (attended == 0) return store(1.0, row_.sink);

        double sum = row_.sink_weight(max);
        row_.for_attended_keys(executor_, [&](Index j, double bias) {
            const double e = row_.weight(row_.score(j, bias), max);
            sum += e;
            const double kept = row_.dropped(j) ? 0.0 : e;
            const T* v = row_.values[j];
            for (Index d = 0; d < p_.value_dim; ++d)
                acc_[d] += kept * to_double(v[d * row_.values.number_stride()]);
        });
        store(sum * (1.0 - p_.dropout), max + std::log(sum));
        if (p_.weights.data != nullptr) {
            row_.for_attended_keys(executor_, [&](Index j, double bias) {
                store_weight(j, row_.weight(row_.score(j, bias), max) / sum);
            });
        }
    }

private:
    // out = acc / divisor; every weight 0 until the attended ones are written over it.
    void store(double divisor, double lse) {
        const Index out = row_.b * p_.out.batch + row_.i * p_.out.seq + row_.h * p_.out.head;
        for (Index d = 0; d < p_.value_dim; ++d)
            store_real(p_.out.data, p_.out_dtype, out + d * p_.out.dim, acc_[d] / divisor);
        if (p_.lse.data != nullptr)
            store_real(p_.lse.data, p_.lse.dtype, score_index(p_.lse, row_.b, row_.h, row_.i, 0), lse);
        if (p_.weights.data != nullptr)
            for (Index j = 0; j < p_.kv_size; ++j) store_weight(j, 0.0);
    }
    void store_weight(Index j, double weight) {
        store_real(p_.weights.data, p_.weights.dtype, score_index(p_.weights, row_.b, row_.h, row_.i, j),
                   weight);
    }

    const ReferenceRow<T>& row_;
    const AttentionProblem& p_;
    Executor& executor_;
    double* acc_;  // (Dv,)
};

Index row_blocks(const ReferenceSchedule& entries) {
    return (entries.most_rows() + kRowsPerItem - 1) / kRowsPerItem;
}

KernelPlan plan(const AttentionProblem& p, Device, int, bool describe) {
    KernelPlan plan;
    plan.per_thread_bytes = static_cast<std::size_t>(p.head_dim + p.value_dim) * sizeof(double);
    auto entries = std::make_unique<const ReferenceSchedule>(p);
    plan.work_items = p.batch * p.q_heads * row_blocks(*entries);
    plan.schedule = std::move(entries);
    if (describe) plan.algorithm = "row by row in double, two passes over the keys";
    return plan;
}

void run(const AttentionProblem& p, const Target&, const Workspace& workspace, Executor& executor) {
    const ReferenceSchedule& entries = ReferenceSchedule::of(workspace);
    const Index blocks = row_blocks(entries);
    with_element_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        auto item_fn = [&](Index item, int slot) {
            auto* scratch = reinterpret_cast<double*>(workspace.per_thread + static_cast<std::size_t>(slot) *
                                                                                 workspace.per_thread_stride);
            const Index block = item % blocks, h = item / blocks % p.q_heads, b = item / blocks / p.q_heads;
            const Entry& entry = entries[b];
            const Index end = std::min(entry.q_size, (block + 1) * kRowsPerItem);
            const AttentionProblem view = p.packed() ? view_of(p, entry) : p;
            for (Index i = block * kRowsPerItem; i < end && !executor.stop_requested(); ++i) {
                const ReferenceRow<T> row(view, entry, scratch, b, h, i);
                Forward<T>(row, executor, scratch + p.head_dim).compute();
            }
        };
        executor.for_each(p.batch * p.q_heads * blocks, item_fn);
    });
    if (p.packed()) clear_padding(p, [&](Index b) -> const Entry& { return entries[b]; }, executor);
}

constexpr DType kDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};

}  // namespace

constinit const Kernel cpu_reference_kernel = {
    .name = "cpu-reference",
    .device = DeviceType::cpu,
    .dtypes = kDtypes,
    .unavailable = []() -> const char* { return nullptr; },
    .forward = {.refuses = [](const AttentionProblem&) -> const char* { return nullptr; },
                .plan = plan,
                .run = run},
    .backward = {.refuses = [](const BackwardProblem&) -> const char* { return nullptr; },
                 .plan = plan_reference_backward,
                 .run = run_reference_backward},
};

}  // namespace fastattn
