#include "cuda/cublas/backward.h"

#include <algorithm>

#include "core/broadcast.h"
#include "cuda/cublas/products.h"
#include "cuda/host/errors.h"
#include "cuda/host/operands.h"
#include "cuda/host/unit_arrays.h"
#include "cuda/simt/launch_backward.h"

namespace fastattn::cuda {
namespace {

void check_launch(const char* kernel) { throw_on_error(runtime::last_error(), kernel); }

// ---- sums over a call -------------------------------------------------------------------------------------
struct Sums {
    ScoreOperand bias;  // compact, in the accumulator's type; or dbias itself, when it has all axes
    bool bias_whole = false;
    double *slopes = nullptr, *sinks = nullptr;
};

Sums take_sums(const BackwardProblem& b, Carver& carver) noexcept {
    const AttentionProblem& p = b.forward;
    Sums sums;
    if (b.dbias.data != nullptr) {
        sums.bias_whole = has_all_axes(b.dbias, p);
        sums.bias = b.dbias;
        if (!sums.bias_whole) {
            const AxisSizes own = own_sizes(b.dbias, p);
            const auto stride = [](Index axis, Index inner) { return axis == 0 ? 0 : inner; };
            ScoreOperand& x = sums.bias;
            x.dtype = p.lse_dtype;
            x.key = stride(x.key, 1);
            x.query = stride(x.query, own.key);
            x.head = stride(x.head, own.query * own.key);
            x.batch = stride(x.batch, own.head * own.query * own.key);
            x.data = carver.take(static_cast<std::size_t>(own.count()) * item_size(x.dtype));
        }
    }
    const auto doubles = [&](const ScoreOperand& x, Index count) -> double* {
        if (x.data == nullptr) return nullptr;
        return reinterpret_cast<double*>(carver.take(static_cast<std::size_t>(count) * sizeof(double)));
    };
    sums.slopes = doubles(b.dalibi, (b.dalibi.batch == 0 ? 1 : p.batch) * p.q_heads);
    sums.sinks = doubles(b.dsinks, p.q_heads);
    return sums;
}

// ---- the memory of a region -------------------------------------------------------------------------------
// A side of the second products, with zeros in place of NaN and Inf, and which rows had some.
struct Clean {
    Operand array;
    std::uint8_t *bad = nullptr, *any = nullptr;
};

struct RegionMemory {
    Operand q, k, v, dout;  // as a product can read them
    Clean clean_q, clean_k, clean_dout;
    bool careful =
        false;  // some pairs are masked: the second products read `clean`, else the same as the first ones
    BackwardArgs args;
    ZeroArgs sums;  // dq, dk, dv
    std::byte *gemm = nullptr, *pointers = nullptr;

    RegionMemory(const BackwardProblem& b, const Chunk& region, std::size_t limit, Carver& carver) noexcept {
        const AttentionProblem& p = b.forward;
        const Index heads = region.kv_heads * p.group, pairs = region.batches * region.kv_heads;
        const auto rows = static_cast<std::size_t>(region.batches * heads * region.rows);
        const std::size_t acc = item_size(p.lse_dtype);
        args.problem = b;
        args.region = region;

        const auto readable = [&](const Operand& x, Index count, Index dims, auto take) {
            return is_gemm_operand(x, p.dtype, count, dims) ? x : take(p, region, p.dtype, dims, carver);
        };
        q = readable(p.q, region.rows, p.head_dim, take_queries);
        k = readable(p.k, region.keys, p.head_dim, take_keys);
        v = readable(p.v, region.keys, p.value_dim, take_keys);
        dout = readable(b.dout, region.rows, p.value_dim, take_queries);
        careful = is_restricted(p);
        if (careful) {
            const auto clean = [&](Index dims, Index n_heads, Index count, auto take) {
                Clean x;
                x.array = take(p, region, p.dtype, dims, carver);
                x.bad = bytes(carver, static_cast<std::size_t>(region.batches * n_heads * count));
                x.any = bytes(carver, static_cast<std::size_t>(region.batches * n_heads));
                return x;
            };
            clean_q = clean(p.head_dim, heads, region.rows, take_queries);
            clean_k = clean(p.head_dim, region.kv_heads, region.keys, take_keys);
            clean_dout = clean(p.value_dim, heads, region.rows, take_queries);
            args.bad_q = clean_q.bad, args.bad_k = clean_k.bad, args.bad_dout = clean_dout.bad;
            args.any_bad_q = clean_q.any, args.any_bad_k = clean_k.any, args.any_bad_dout = clean_dout.any;
        } else {
            clean_q.array = q, clean_k.array = k, clean_dout.array = dout;
        }

        const std::size_t first = carver.used();
        sums.data = carver.take(0);
        args.dq = take_queries(p, region, p.lse_dtype, p.head_dim, carver);
        args.dk = take_keys(p, region, p.lse_dtype, p.head_dim, carver);
        args.dv = take_keys(p, region, p.lse_dtype, p.value_dim, carver);
        sums.bytes = static_cast<Index>(carver.used() - first);
        if (p.dtype == DType::f16) {
            args.dk_part = take_keys(p, region, p.lse_dtype, p.head_dim, carver);
            args.units = carver.take(static_cast<std::size_t>(pairs) * acc);
        }
        args.states = carver.take(rows * sizeof(RowState<double>) / sizeof(double) * acc);
        if (b.dalibi.data != nullptr) args.slopes = carver.take(rows * acc);

        // A chunk's scores stay within the limit, or are those of one row of one kv head, or of all there is.
        Chunk row = region;
        row.batches = row.kv_heads = row.rows = 1;
        const std::size_t matrix = std::min(score_bytes(p, region), std::max(limit, score_bytes(p, row)));
        args.scores = carver.take(matrix);
        args.gradients = carver.take(matrix);
        if (b.dbias.data != nullptr) args.bias_gradients = carver.take(matrix);
        gemm = carver.take(kGemmWorkspaceBytes);
        pointers = carver.take(3 * sizeof(void*) * static_cast<std::size_t>(pairs * p.group));
    }

private:
    static std::uint8_t* bytes(Carver& carver, std::size_t count) noexcept {
        return reinterpret_cast<std::uint8_t*>(carver.take(count));
    }
};

// ---- what is queued around the chunks ---------------------------------------------------------------------
void queue_clean(const Clean& to, const CopyArgs& copy, DType dtype, Stream stream) {
    launch_clean({copy, dtype, to.bad}, stream);
    check_launch("launching clean_rows");
    launch_any_bad({to.bad, to.any, copy.batches * copy.heads, copy.rows}, stream);
    check_launch("launching any_bad");
}

void queue_operands(const RegionMemory& m, Stream stream) {
    const BackwardProblem& b = m.args.problem;
    const AttentionProblem& p = b.forward;
    const Chunk& region = m.args.region;
    const auto copy = [&](const Operand& from, const Operand& to, Index dims, auto args_of) {
        if (from.data != to.data) queue_copy(args_of(p, region, from, to, dims), stream);
    };
    copy(p.q, m.q, p.head_dim, copy_of_queries);
    copy(p.k, m.k, p.head_dim, copy_of_keys);
    copy(p.v, m.v, p.value_dim, copy_of_keys);
    copy(b.dout, m.dout, p.value_dim, copy_of_queries);
    if (!m.careful) return;
    queue_clean(m.clean_q, copy_of_queries(p, region, p.q, m.clean_q.array, p.head_dim), p.dtype, stream);
    queue_clean(m.clean_k, copy_of_keys(p, region, p.k, m.clean_k.array, p.head_dim), p.dtype, stream);
    queue_clean(m.clean_dout, copy_of_queries(p, region, b.dout, m.clean_dout.array, p.value_dim), p.dtype,
                stream);
}

void queue_store(const RegionMemory& m, Stream stream) {
    const BackwardProblem& b = m.args.problem;
    const AttentionProblem& p = b.forward;
    const Chunk& region = m.args.region;
    StoreArgs args;
    args.dtype = p.dtype;
    args.batches = region.batches;
    const auto store = [&](const Operand& sum, const Operand& to, Index row, Index head) {
        args.source = sum;
        args.target = to;
        args.source.data = element(sum, p.lse_dtype, region.batch, row, head);
        args.target.data = element(to, p.dtype, region.batch, row, head);
        launch_store(args, stream);
        check_launch("launching store_rows");
    };
    args.heads = region.kv_heads * p.group;
    args.rows = args.end = region.rows;
    args.dims = p.head_dim;
    args.factor = p.scale;
    args.states = m.args.states;
    store(m.args.dq, b.dq, region.row, region.kv_head * p.group);
    args.states = nullptr;
    args.heads = region.kv_heads;
    args.rows = p.kv_size;  // those of no pair, too
    args.begin = region.key, args.end = region.key + region.keys;
    store(m.args.dk, b.dk, 0, region.kv_head);
    args.dims = p.value_dim;
    args.factor = 1.0;
    store(m.args.dv, b.dv, 0, region.kv_head);
}

void queue_bias_store(const ScoreOperand& sums, const ScoreOperand& to, const AttentionProblem& p,
                      const Chunk& region, Stream stream) {
    const Index heads = region.kv_heads * p.group;
    StoreBiasArgs args{sums, to, {}, {1, 1, 1, 1}};
    const auto axis = [&](int n, Index stride, Index first, Index size) {
        if (stride != 0) args.first[n] = first, args.size[n] = size;
    };
    axis(0, to.batch, region.batch, region.batches);
    axis(1, to.head, region.kv_head * p.group, heads);
    axis(2, to.query, region.row, region.rows);
    axis(3, to.key, 0, p.kv_size);
    launch_store_bias(args, stream);
    check_launch("launching store_bias");
}

}  // namespace

const char* CublasBackward::refuses(const BackwardProblem& b) {
    if (const char* why = refuses_packed(b)) return why;
    if (const char* why = refuses_conditions(b.forward)) return why;
    // cuBLAS counts the columns of a matrix in 32 bits, and so do the kernels the keys of a row.
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(b.forward).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

std::size_t CublasBackward::limit(const BackwardProblem& b) const noexcept {
    return score_limit(context_.properties.l2_bytes) / (b.dbias.data == nullptr ? 2 : 3);
}

std::size_t CublasBackward::workspace_bytes(const BackwardProblem& host, const BackwardProblem& device,
                                            const Chunk& region) const {
    Carver carver(nullptr);
    const RegionMemory memory(device, region, limit(host), carver);
    return carver.used();
}

std::size_t CublasBackward::sums_bytes(const BackwardProblem& b) const {
    Carver carver(nullptr);
    take_sums(b, carver);
    return carver.used();
}

void CublasBackward::queue_start(const BackwardProblem& device, std::byte* block, Stream stream) const {
    launch_zero({block, static_cast<Index>(sums_bytes(device))}, stream);
    check_launch("launching zero");
}

void CublasBackward::queue(const BackwardProblem& host, const BackwardProblem& device, const Chunk& region,
                           const KernelMemory& blocks, Stream stream) const {
    Carver carver(blocks.workspace), sums_carver(blocks.sums);
    const RegionMemory memory(device, region, limit(host), carver);
    const Sums sums = take_sums(device, sums_carver);
    const AttentionProblem& p = device.forward;
    BackwardArgs args = memory.args;
    args.bias_sums = sums.bias;
    args.bias_whole = sums.bias_whole;
    args.slope_sums = sums.slopes;
    args.sink_sums = sums.sinks;

    launch_zero(memory.sums, stream);
    check_launch("launching zero");
    queue_operands(memory, stream);
    launch_row_states(args, stream);
    check_launch("launching row_states");
    if (sums.bias_whole) queue_bias_store({}, device.dbias, p, region, stream);

    const bool scaled = p.dtype == DType::f16;
    const GemmPlans::Place place{stream, memory.gemm, reinterpret_cast<void**>(memory.pointers)};
    const Operand &q = memory.clean_q.array, &dout = memory.clean_dout.array;
    Chunks walk(host.forward, region, limit(host));
    while (walk.next(args.chunk)) {
        const Chunk& chunk = args.chunk;
        const Fold fold = fold_of(p.group, chunk,
                                  {{memory.q, p.head_dim},
                                   {memory.dout, p.value_dim},
                                   {q, p.head_dim},
                                   {dout, p.value_dim},
                                   {args.dq, p.head_dim}});
        args.group_inner = fold == Fold::inner;
        args.ld = score_stride(chunk.keys);
        const ScoreMatrix scores{args.scores, args.ld}, gradients{args.gradients, args.ld};
        const bool has_keys = chunk.keys > 0;
        if (has_keys) {
            gemm_.run(scores_from(p, chunk, fold, memory.q, memory.k, p.head_dim, scores, tf32_), place);
            gemm_.run(scores_from(p, chunk, fold, memory.dout, memory.v, p.value_dim, gradients, tf32_),
                      place);
        }
        launch_score_gradients(args, stream);
        check_launch("launching score_gradients");
        if (scaled) {
            launch_row_units(args, stream);
            check_launch("launching row_units");
            launch_scale_rows(args, stream);
            check_launch("launching scale_rows");
        }
        if (!has_keys) continue;
        // Heads of a group that are no rows of one matrix follow each other.
        for (Index member = 0; member < (fold == Fold::none ? p.group : 1); ++member) {
            gemm_.run(keys_from(p, chunk, fold, member, scores, dout, p.value_dim,
                                weight_unit(p.dtype, p.dropout), args.dv, tf32_),
                      place);
            Gemm dk = keys_from(p, chunk, fold, member, gradients, q, p.head_dim, 1.0,
                                scaled ? args.dk_part : args.dk, tf32_);
            if (scaled) dk.accumulate = member > 0;
            gemm_.run(dk, place);
        }
        gemm_.run(rows_from(p, chunk, fold, gradients, memory.clean_k.array, p.head_dim, 1.0, args.dq,
                            p.lse_dtype, tf32_),
                  place);
        if (scaled) {
            launch_add_keys(args, stream);
            check_launch("launching add_keys");
        }
        if (memory.careful) {
            launch_repair(args, stream);
            check_launch("launching repair");
        }
        if (args.bias_gradients != nullptr) {
            launch_bias_sums(args, stream);
            check_launch("launching bias_sums");
        }
    }
    queue_store(memory, stream);
    if (sums.slopes != nullptr || sums.sinks != nullptr) {
        launch_head_sums(args, stream);
        check_launch("launching head_sums");
    }
}

void CublasBackward::queue_finish(const BackwardProblem& device, std::byte* block, Stream stream) const {
    Carver carver(block);
    const Sums sums = take_sums(device, carver);
    const AttentionProblem& p = device.forward;
    if (sums.bias.data != nullptr && !sums.bias_whole)
        queue_bias_store(sums.bias, device.dbias, p, whole(p), stream);
    if (sums.slopes == nullptr && sums.sinks == nullptr) return;
    StoreHeadsArgs args{device.dalibi, device.dsinks, sums.slopes, sums.sinks, 0, p.q_heads};
    if (sums.slopes != nullptr) args.batches = device.dalibi.batch == 0 ? 1 : p.batch;
    launch_store_heads(args, stream);
    check_launch("launching store_heads");
}

std::string CublasBackward::describe(const BackwardProblem& b, bool) const {
    const Chunk all = whole(b.forward);
    Index chunks = 0;
    Chunks walk(b.forward, all, limit(b));
    for (Chunk chunk; walk.next(chunk);) ++chunks;
    std::string text = "cuBLAS, scores and their gradients in " + std::to_string(chunks) + " chunk" +
                       (chunks == 1 ? "" : "s");
    if (tf32_ && b.forward.dtype == DType::f32) text += ", TF32";
    return text;
}

}  // namespace fastattn::cuda
