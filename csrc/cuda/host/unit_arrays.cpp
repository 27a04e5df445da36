#include "cuda/host/unit_arrays.h"

#include "cuda/host/host_copy.h"

namespace fastattn::cuda {
namespace {

Index item_of(DType dtype) noexcept { return static_cast<Index>(item_size(dtype)); }

void* shifted(void* data, Index bytes) noexcept {
    return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(data) -
                                   static_cast<std::uintptr_t>(bytes));
}

HostArray host_array(const ScoreOperand& x, const AttentionProblem& p, const Chunk& unit) noexcept {
    const Index item = item_of(x.dtype);
    const Index first =
        unit.batch * x.batch + unit.kv_head * p.group * x.head + unit.row * x.query + unit.key * x.key;
    return {static_cast<char*>(x.data) + first * item,
            {x.batch * item, x.head * item, x.query * item, x.key * item}};
}

HostArray host_array(const Operand& x, DType dtype, Index batch, Index head, Index row) noexcept {
    const Index item = item_of(dtype);
    const Index first = batch * x.batch + head * x.head + row * x.seq;
    return {static_cast<char*>(x.data) + first * item,
            {x.batch * item, x.head * item, x.seq * item, x.dim * item}};
}

}  // namespace

bool is_shared(const AttentionProblem& p, const ScoreOperand& x) noexcept {
    constexpr double most = 8.0 * kUnitBytes;
    const double elements = (x.query == 0 ? 1.0 : static_cast<double>(p.q_size)) *
                            (x.key == 0 ? 1.0 : static_cast<double>(p.kv_size));
    return x.data != nullptr && x.batch == 0 && x.head == 0 &&
           elements * static_cast<double>(item_size(x.dtype)) <= most;
}

std::array<Index, 4> stored_size(const AttentionProblem& p, const ScoreOperand& x,
                                 const Chunk& unit) noexcept {
    return {x.batch == 0 ? 1 : unit.batches, x.head == 0 ? 1 : unit.kv_heads * p.group,
            x.query == 0 ? 1 : unit.rows, x.key == 0 ? 1 : unit.keys};
}

Chunk with_keys(const Chunk& unit, Index keys) noexcept {
    Chunk changed = unit;
    changed.key = 0;
    changed.keys = keys;
    return changed;
}

std::size_t stored_bytes(const AttentionProblem& p, const ScoreOperand& x, const Chunk& unit) noexcept {
    if (x.data == nullptr) return 0;
    const auto n = stored_size(p, x, unit);
    return static_cast<std::size_t>(n[0] * n[1] * n[2] * n[3]) * item_size(x.dtype);
}

ScoreOperand placed(const AttentionProblem& p, const ScoreOperand& x, const Chunk& unit,
                    void* data) noexcept {
    if (x.data == nullptr) return x;
    const auto n = stored_size(p, x, unit);
    ScoreOperand to = x;
    to.key = x.key == 0 ? 0 : 1;
    to.query = x.query == 0 ? 0 : n[3];
    to.head = x.head == 0 ? 0 : n[2] * n[3];
    to.batch = x.batch == 0 ? 0 : n[1] * n[2] * n[3];
    const Index skipped =
        unit.batch * to.batch + unit.kv_head * p.group * to.head + unit.row * to.query + unit.key * to.key;
    to.data = shifted(data, skipped * item_of(x.dtype));
    return to;
}

ScoreOperand full(const ScoreOperand& x, Index keys) noexcept {
    ScoreOperand all = x;
    all.batch = all.head = all.query = 1;
    all.key = keys > 1 ? 1 : 0;
    return all;
}

void copy_queries(const AttentionProblem& p, const Chunk& unit, const Operand& from, const Operand& to,
                  Index dims, Executor& executor) {
    const Index head = unit.kv_head * p.group;
    copy_host(host_array(from, p.dtype, unit.batch, head, unit.row),
              host_array(to, p.dtype, unit.batch, head, unit.row),
              {unit.batches, unit.kv_heads * p.group, unit.rows, dims}, item_of(p.dtype), executor);
}

void copy_keys(const AttentionProblem& p, const Chunk& unit, const Operand& from, const Operand& to,
               Index dims, Executor& executor) {
    copy_host(host_array(from, p.dtype, unit.batch, unit.kv_head, unit.key),
              host_array(to, p.dtype, unit.batch, unit.kv_head, unit.key),
              {unit.batches, unit.kv_heads, unit.keys, dims}, item_of(p.dtype), executor);
}

void copy_scores(const AttentionProblem& p, const Chunk& unit, const ScoreOperand& from,
                 const ScoreOperand& to, const std::array<Index, 4>& size, Executor& executor) {
    copy_host(host_array(from, p, unit), host_array(to, p, unit), size, item_of(from.dtype), executor);
}

}  // namespace fastattn::cuda
