// One query row at a time, two passes over its keys:
//   pass 1  m = max_j s_j,             s_j = alibi + bias + softcap(scale * q.k_j)
//   pass 2  l = sum_j exp(s_j - m),    acc = sum_j keep_j * exp(s_j - m) * v_j
//   out = acc / l,  lse = m + log l    (a sink is one more s_j without a v_j)
// Scores are computed anew in each pass, so a row needs memory for q (D) and acc (Dv) only. A key that
// the row may not attend is skipped before k or v is read.
#include "cpu/reference_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/philox.h"
#include "core/scalar_access.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Index kRowsPerItem = 16;
constexpr Index kKeysPerStopCheck = 64;

struct F16 {
    std::uint16_t bits;
};
struct BF16 {
    std::uint16_t bits;
};

double to_double(double x) { return x; }
double to_double(float x) { return static_cast<double>(x); }
double to_double(F16 x) { return static_cast<double>(f16_to_f32(x.bits)); }
double to_double(BF16 x) { return static_cast<double>(bf16_to_f32(x.bits)); }

// One row of the output: query i of head h in batch entry b. T is the dtype of q, k and v.
template <class T>
class Row {
public:
    Row(const AttentionProblem& problem, Executor& exec, double* scratch, Index batch, Index head, Index row)
        : p(problem),
          executor(exec),
          query(scratch),
          acc(scratch + problem.head_dim),
          b(batch),
          h(head),
          i(row),
          kv_head(head / problem.group) {
        position = static_cast<double>(p.offset(b)) + static_cast<double>(i);
        if (p.alibi_slopes.data != nullptr)
            slope = load_real(p.alibi_slopes.data, p.alibi_slopes.dtype,
                              b * p.alibi_slopes.batch + h * p.alibi_slopes.head);
        if (p.sinks.data != nullptr) sink = load_real(p.sinks.data, p.sinks.dtype, h * p.sinks.head);
    }

    void compute() {
        std::fill(acc, acc + p.value_dim, 0.0);
        if (i >= p.q_len(b)) return store(1.0, -kInfinity);  // no such row: the sink does not count

        const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch + i * p.q.seq + h * p.q.head;
        for (Index d = 0; d < p.head_dim; ++d) query[d] = to_double(q[d * p.q.dim]);
        range = p.key_range(b, i);

        double max = sink;
        Index attended = 0;
        const bool done = for_attended_keys([&](Index, double s) {
            max = s > max ? s : max;
            ++attended;
        });
        if (!done) return;
        if (attended == 0) return store(1.0, sink);

        double sum = sink_weight(max);
        for_attended_keys([&](Index j, double s) {
            const double e = weight(s, max);
            sum += e;
            const double kept = dropped(j) ? 0.0 : e;
            const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch + j * p.v.seq + kv_head * p.v.head;
            for (Index d = 0; d < p.value_dim; ++d) acc[d] += kept * to_double(v[d * p.v.dim]);
        });
        store(sum * (1.0 - p.dropout), max + std::log(sum));
        if (p.weights.data != nullptr) {
            for_attended_keys([&](Index j, double s) {
                store_real(p.weights.data, p.weights.dtype, weights_row() + j * p.weights.key,
                           weight(s, max) / sum);
            });
        }
    }

private:
    // exp(s - max), but 0 and not NaN where nothing above -inf is attended.
    static double weight(double s, double max) { return s == -kInfinity ? 0.0 : std::exp(s - max); }

    // The same, but a sink of +inf takes all the weight instead of giving NaN.
    double sink_weight(double max) const { return sink == kInfinity ? 1.0 : weight(sink, max); }

    // f(j, score) for every key that the row may attend; false when asked to stop.
    template <class F>
    bool for_attended_keys(F f) {
        for (Index j = range.begin; j < range.end; ++j) {
            if ((j - range.begin) % kKeysPerStopCheck == 0 && executor.stop_requested()) return false;
            if (p.mask.data != nullptr && load_as<std::uint8_t>(p.mask.data, score_index(p.mask, j)) == 0)
                continue;
            double bias = 0.0;
            if (p.bias.data != nullptr) {
                bias = load_real(p.bias.data, p.bias.dtype, score_index(p.bias, j));
                if (bias == -kInfinity) continue;
            }
            f(j, score(j, bias));
        }
        return true;
    }

    double score(Index j, double bias) const {
        const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch + j * p.k.seq + kv_head * p.k.head;
        double s = 0.0;
        for (Index d = 0; d < p.head_dim; ++d) s += query[d] * to_double(k[d * p.k.dim]);
        s *= p.scale;
        if (p.softcap > 0) s = p.softcap * std::tanh(s / p.softcap);
        if (p.alibi_slopes.data != nullptr) s -= slope * std::abs(position - static_cast<double>(j));
        return s + bias;
    }

    bool dropped(Index j) const {
        if (p.dropout == 0.0) return false;
        const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
        const PhiloxBlock block = philox4x32(word(j / 4), word(i), word(h), word(b), p.seed);
        return block.word[j % 4] < dropout_threshold(p.dropout);
    }

    // out = acc / divisor; every weight 0 until the attended ones are written over it.
    void store(double divisor, double lse) {
        const Index out = b * p.out.batch + i * p.out.seq + h * p.out.head;
        for (Index d = 0; d < p.value_dim; ++d)
            store_real(p.out.data, p.dtype, out + d * p.out.dim, acc[d] / divisor);
        if (p.lse.data != nullptr) store_real(p.lse.data, p.lse.dtype, score_index(p.lse, 0), lse);
        if (p.weights.data != nullptr)
            for (Index j = 0; j < p.kv_size; ++j)
                store_real(p.weights.data, p.weights.dtype, weights_row() + j * p.weights.key, 0.0);
    }

    Index score_index(const ScoreOperand& x, Index j) const {
        return b * x.batch + h * x.head + i * x.query + j * x.key;
    }
    Index weights_row() const { return score_index(p.weights, 0); }

    const AttentionProblem& p;
    Executor& executor;
    double* query;  // (D,)
    double* acc;    // (Dv,)
    const Index b, h, i, kv_head;
    KeyRange range;
    double position = 0.0, slope = 0.0, sink = -kInfinity;
};

Index row_blocks(const AttentionProblem& p) { return (p.q_size + kRowsPerItem - 1) / kRowsPerItem; }

KernelPlan plan(const AttentionProblem& p, Device, int, bool describe) {
    KernelPlan plan;
    plan.per_thread_bytes = static_cast<std::size_t>(p.head_dim + p.value_dim) * sizeof(double);
    plan.work_items = p.batch * p.q_heads * row_blocks(p);
    if (describe) plan.algorithm = "row by row in double, two passes over the keys";
    return plan;
}

template <class T>
void run_as(const AttentionProblem& p, const Workspace& workspace, Executor& executor) {
    const Index blocks = row_blocks(p);
    auto item_fn = [&](Index item, int slot) {
        auto* scratch = reinterpret_cast<double*>(workspace.per_thread + static_cast<std::size_t>(slot) *
                                                                             workspace.per_thread_stride);
        const Index block = item % blocks, h = item / blocks % p.q_heads, b = item / blocks / p.q_heads;
        const Index end = std::min(p.q_size, (block + 1) * kRowsPerItem);
        for (Index i = block * kRowsPerItem; i < end && !executor.stop_requested(); ++i)
            Row<T>(p, executor, scratch, b, h, i).compute();
    };
    executor.for_each(p.batch * p.q_heads * blocks, item_fn);
}

void run(const AttentionProblem& p, const Target&, const Workspace& workspace, Executor& executor) {
    switch (p.dtype) {
        case DType::f64: return run_as<double>(p, workspace, executor);
        case DType::f32: return run_as<float>(p, workspace, executor);
        case DType::f16: return run_as<F16>(p, workspace, executor);
        case DType::bf16: return run_as<BF16>(p, workspace, executor);
        default: return;
    }
}

constexpr DType kDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};

}  // namespace

constinit const Kernel cpu_reference_kernel = {
    .name = "cpu-reference",
    .device = DeviceType::cpu,
    .dtypes = kDtypes,
    .unavailable = []() -> const char* { return nullptr; },
    .refuses = [](const AttentionProblem&) -> const char* { return nullptr; },
    .plan = plan,
    .run = run,
};

}  // namespace fastattn
