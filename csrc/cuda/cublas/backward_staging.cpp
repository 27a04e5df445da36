#include "cuda/cublas/backward_staging.h"

#include <algorithm>

#include "cuda/host/lane.h"
#include "cuda/host/staging.h"

namespace fastattn::cuda {
namespace {

Index pieces(Index n, Index of) { return of == 0 ? 0 : (n + of - 1) / of; }

std::size_t take(Carver& carver, std::size_t bytes) noexcept {
    const std::size_t offset = carver.used();
    carver.take(bytes);
    return offset;
}

Chunk one_head(const Chunk& all) noexcept {
    Chunk head = all;
    head.batches = head.kv_heads = 1;
    return head;
}

constexpr ScoreOperand AttentionProblem::* kScoreSides[] = {&AttentionProblem::mask, &AttentionProblem::bias};

// ---- results of the whole call --------------------------------------------------------------------------------------
constexpr ScoreOperand BackwardProblem::* kCallResults[] = {&BackwardProblem::dbias, &BackwardProblem::dalibi,
                                                            &BackwardProblem::dsinks};

// dbias with all axes comes back unit by unit.
bool is_of_call(const BackwardProblem& b, ScoreOperand BackwardProblem::* result) noexcept {
    return (b.*result).data != nullptr &&
           !(result == &BackwardProblem::dbias && has_all_axes(b.dbias, b.forward));
}

Chunk all_of(const AttentionProblem& p) noexcept {
    return {0, p.batch, 0, p.kv_heads, 0, p.q_size, 0, p.kv_size};
}

// Compact arrays at `block` in their place; returns how many bytes they have.
std::size_t place_call_results(const BackwardProblem& b, std::byte* block, BackwardProblem& to) noexcept {
    Carver carver(block);
    for (const auto result : kCallResults)
        if (is_of_call(b, result))
            to.*result = placed(b.forward, b.*result, all_of(b.forward),
                                carver.take(stored_bytes(b.forward, b.*result, all_of(b.forward))));
    return carver.used();
}

// ---- the device's memory ---------------------------------------------------------------------------------------------
struct Blocks {
    std::byte *in = nullptr, *out = nullptr, *sides = nullptr, *sums = nullptr, *results = nullptr,
              *workspace = nullptr;
    BackwardLayout largest;
    std::size_t results_bytes = 0, bytes = 0;
};

Blocks lay_out_blocks(const BackwardProblem& b, const CublasBackward& kernel, std::byte* block) noexcept {
    const Chunk unit = BackwardUnits(b).largest();
    Blocks blocks;
    blocks.largest = lay_out_unit(b, unit);
    BackwardProblem unused = b;
    blocks.results_bytes = place_call_results(b, nullptr, unused);
    Carver carver(block);
    blocks.in = carver.take(blocks.largest.in_bytes);
    blocks.out = carver.take(blocks.largest.out_bytes);
    blocks.sides = carver.take(side_bytes(b.forward, false));
    blocks.sums = carver.take(sums_bytes(b));
    blocks.results = carver.take(blocks.results_bytes);
    // Of a unit only sizes are known before it is there.
    blocks.workspace =
        carver.take(kernel.workspace_bytes(b, place_unit(b, unit, blocks.largest, nullptr, nullptr), unit));
    blocks.bytes = carver.used();
    return blocks;
}

class StagedBackward {
public:
    StagedBackward(const BackwardProblem& b, const DeviceContext& context, const CublasBackward& kernel,
                   Executor& executor)
        : b_(b),
          kernel_(kernel),
          executor_(executor),
          borrowed_(context.index),
          lane_(*borrowed_),
          memory_(context, lay_out_blocks(b, kernel, nullptr).bytes, lane_.compute, "the device's workspace"),
          blocks_(lay_out_blocks(b, kernel, memory_.data())),
          device_(b) {
        for (int slot = 0; slot < kSlots; ++slot) {
            lane_.in[slot].reserve(blocks_.largest.in_bytes);
            lane_.out[slot].reserve(blocks_.largest.out_bytes);
        }
        lane_.keys[0].reserve(blocks_.results_bytes);
        upload_sides(b.forward, false, blocks_.sides, device_.forward, lane_.compute, executor);
        place_call_results(b, blocks_.results, device_);
    }
    ~StagedBackward() { lane_.drain(); }  // before the memory goes
    StagedBackward(const StagedBackward&) = delete;
    StagedBackward& operator=(const StagedBackward&) = delete;

    void run() {
        kernel_.queue_start(device_, blocks_.sums, lane_.compute);
        BackwardUnits units(b_);
        Index n = 0;
        for (Chunk unit; units.next(unit); ++n) {
            if (executor_.stop_requested()) throw Cancelled();
            finish(n - kSlots);
            stage(n, unit);
        }
        if (blocks_.results_bytes > 0) {
            kernel_.queue_finish(device_, blocks_.sums, lane_.compute);
            copy(lane_.keys[0].data(), blocks_.results, blocks_.results_bytes, Copy::to_host);
        }
        throw_on_error(runtime::record(lane_.ready, lane_.compute), "recording an event");
        for (Index left = n - kSlots; left < n; ++left) finish(left);
        await(lane_.ready, executor_);
        copy_call_results();
    }

private:
    // All of the device is one stream's, so its blocks are free again when the next unit gets there; those of the
    // host are waited for.
    void stage(Index n, const Chunk& unit) {
        const auto slot = static_cast<int>(n % kSlots);
        const BackwardLayout layout = lay_out_unit(b_, unit);
        units_[slot] = unit;
        pinned_[slot] = place_unit(b_, unit, layout, lane_.in[slot].data(), lane_.out[slot].data());
        BackwardProblem device = place_unit(device_, unit, layout, blocks_.in, blocks_.out);
        device.forward.mask.place = device.forward.bias.place = DeviceType::cuda;
        copy_in(unit, pinned_[slot]);
        copy(blocks_.in, lane_.in[slot].data(), layout.in_bytes, Copy::to_device);
        kernel_.queue(b_, device, unit, blocks_.workspace, blocks_.sums, lane_.compute);
        copy(lane_.out[slot].data(), blocks_.out, layout.out_bytes, Copy::to_host);
        throw_on_error(runtime::record(lane_.downloaded[slot], lane_.compute), "recording an event");
    }

    // Waits for unit n and hands its results to the caller's arrays.
    void finish(Index n) {
        if (n < 0) return;
        const auto slot = static_cast<int>(n % kSlots);
        await(lane_.downloaded[slot], executor_);
        const AttentionProblem& p = b_.forward;
        const BackwardProblem& from = pinned_[slot];
        const Chunk& unit = units_[slot];
        const Chunk with_all = with_keys(unit, p.kv_size);
        copy_queries(p, unit, from.dq, b_.dq, p.head_dim, executor_);
        copy_keys(p, with_all, from.dk, b_.dk, p.head_dim, executor_);
        copy_keys(p, with_all, from.dv, b_.dv, p.value_dim, executor_);
        if (b_.dbias.data != nullptr && has_all_axes(b_.dbias, p))
            copy_scores(p, with_all, from.dbias, b_.dbias, stored_size(p, b_.dbias, with_all), executor_);
    }

    void copy_in(const Chunk& unit, const BackwardProblem& to) {
        const AttentionProblem& p = b_.forward;
        copy_queries(p, unit, p.q, to.forward.q, p.head_dim, executor_);
        copy_keys(p, unit, p.k, to.forward.k, p.head_dim, executor_);
        copy_keys(p, unit, p.v, to.forward.v, p.value_dim, executor_);
        copy_queries(p, unit, b_.dout, to.dout, p.value_dim, executor_);
        copy_queries(p, unit, p.out, to.forward.out, p.value_dim, executor_);
        const Chunk rows = with_keys(unit, 1);
        const auto copy_rows = [&](const ScoreOperand& x, const ScoreOperand& placed_x) {
            if (x.data != nullptr)
                copy_scores(p, rows, x, placed_x, stored_size(p, full(x, 1), rows), executor_);
        };
        copy_rows(p.lse, to.forward.lse);
        copy_rows(b_.dlse, to.dlse);
        for (const auto side : kScoreSides) {
            const ScoreOperand& x = p.*side;
            if (x.data != nullptr && !is_shared(p, x))
                copy_scores(p, unit, x, to.forward.*side, stored_size(p, x, unit), executor_);
        }
    }

    void copy_call_results() {
        BackwardProblem from = b_;
        place_call_results(b_, lane_.keys[0].data(), from);
        const AttentionProblem& p = b_.forward;
        const Chunk all = all_of(p);
        for (const auto result : kCallResults)
            if (is_of_call(b_, result))
                copy_scores(p, all, from.*result, b_.*result, stored_size(p, b_.*result, all), executor_);
    }

    void copy(void* to, const void* from, std::size_t bytes, Copy kind) {
        if (bytes == 0) return;
        throw_on_error(runtime::copy(to, from, bytes, kind, lane_.compute),
                       kind == Copy::to_device ? "copying to the device" : "copying from the device");
    }

    const BackwardProblem& b_;
    const CublasBackward& kernel_;
    Executor& executor_;
    BorrowedLane borrowed_;
    Lane& lane_;
    DeviceMemory memory_;
    Blocks blocks_;
    BackwardProblem device_;  // with the side arrays and the results of the call on the device
    Chunk units_[kSlots];
    BackwardProblem pinned_[kSlots];
};

}  // namespace

// ---- units ---------------------------------------------------------------------------------------------------------------
BackwardUnits::BackwardUnits(const BackwardProblem& b, std::size_t unit_bytes) noexcept
    : p_(b.forward), all_(whole(b.forward)) {
    if (p_.batch == 0 || p_.kv_heads == 0) return;
    const BackwardLayout head = lay_out_unit(b, one_head(all_));
    const auto bytes = static_cast<Index>(std::max<std::size_t>(1, head.in_bytes + head.out_bytes));
    const auto limit = static_cast<Index>(unit_bytes);
    kv_heads_ = std::clamp<Index>(limit / bytes, 1, p_.kv_heads);
    batches_ = kv_heads_ < p_.kv_heads ? 1 : std::clamp<Index>(limit / (bytes * kv_heads_), 1, p_.batch);
}

Chunk BackwardUnits::largest() const noexcept {
    Chunk unit = all_;
    unit.batches = batches_, unit.kv_heads = kv_heads_;
    return unit;
}

Index BackwardUnits::count() const noexcept {
    return pieces(p_.batch, batches_) * pieces(p_.kv_heads, kv_heads_);
}

bool BackwardUnits::next(Chunk& unit) noexcept {
    if (batches_ == 0 || batch_ >= p_.batch) return false;
    unit = all_;
    unit.batch = batch_, unit.batches = std::min(batches_, p_.batch - batch_);
    unit.kv_head = kv_head_, unit.kv_heads = std::min(kv_heads_, p_.kv_heads - kv_head_);
    kv_head_ += unit.kv_heads;
    if (kv_head_ < p_.kv_heads) return true;
    kv_head_ = 0;
    batch_ += unit.batches;
    return true;
}

BackwardLayout lay_out_unit(const BackwardProblem& b, const Chunk& unit) noexcept {
    const AttentionProblem& p = b.forward;
    const Index heads = unit.kv_heads * p.group;
    const auto compact = [&](Index n, Index rows, Index dims) {
        return compact_bytes(p.dtype, unit.batches, n, rows, dims);
    };
    const auto rows = [&](const ScoreOperand& x) { return stored_bytes(p, full(x, 1), with_keys(unit, 1)); };
    const auto scores = [&](const ScoreOperand& x) { return is_shared(p, x) ? 0 : stored_bytes(p, x, unit); };
    BackwardLayout layout;
    Carver in(nullptr), out(nullptr);
    in.take(compact(heads, unit.rows, p.head_dim));
    layout.k = take(in, compact(unit.kv_heads, unit.keys, p.head_dim));
    layout.v = take(in, compact(unit.kv_heads, unit.keys, p.value_dim));
    layout.dout = take(in, compact(heads, unit.rows, p.value_dim));
    layout.out = take(in, compact(heads, unit.rows, p.value_dim));
    layout.lse = take(in, rows(p.lse));
    layout.dlse = take(in, rows(b.dlse));
    layout.mask = take(in, scores(p.mask));
    layout.bias = take(in, scores(p.bias));
    layout.in_bytes = in.used();
    out.take(compact(heads, unit.rows, p.head_dim));
    layout.dk = take(out, compact(unit.kv_heads, p.kv_size, p.head_dim));
    layout.dv = take(out, compact(unit.kv_heads, p.kv_size, p.value_dim));
    const bool whole_bias = b.dbias.data != nullptr && has_all_axes(b.dbias, p);
    layout.dbias = take(out, whole_bias ? stored_bytes(p, b.dbias, with_keys(unit, p.kv_size)) : 0);
    layout.out_bytes = out.used();
    return layout;
}

BackwardProblem place_unit(const BackwardProblem& b, const Chunk& unit, const BackwardLayout& layout,
                           std::byte* in, std::byte* out) noexcept {
    const AttentionProblem& p = b.forward;
    BackwardProblem to = b;
    const Chunk with_all = with_keys(unit, p.kv_size);
    const auto queries = [&](std::byte* data, Index dims) {
        return compact_operand(data, p.dtype, unit, unit.kv_head * p.group, unit.kv_heads * p.group, unit.row,
                               unit.rows, dims);
    };
    const auto keys = [&](const Chunk& of, std::byte* data, Index dims) {
        return compact_operand(data, p.dtype, of, of.kv_head, of.kv_heads, of.key, of.keys, dims);
    };
    to.forward.q = queries(in, p.head_dim);
    to.forward.k = keys(unit, in + layout.k, p.head_dim);
    to.forward.v = keys(unit, in + layout.v, p.value_dim);
    to.dout = queries(in + layout.dout, p.value_dim);
    to.forward.out = queries(in + layout.out, p.value_dim);
    to.forward.lse = placed(p, full(p.lse, 1), with_keys(unit, 1), in + layout.lse);
    to.dlse = placed(p, full(b.dlse, 1), with_keys(unit, 1), in + layout.dlse);
    if (!is_shared(p, p.mask)) to.forward.mask = placed(p, p.mask, unit, in + layout.mask);
    if (!is_shared(p, p.bias)) to.forward.bias = placed(p, p.bias, unit, in + layout.bias);
    to.dq = queries(out, p.head_dim);
    to.dk = keys(with_all, out + layout.dk, p.head_dim);
    to.dv = keys(with_all, out + layout.dv, p.value_dim);
    if (b.dbias.data != nullptr && has_all_axes(b.dbias, p))
        to.dbias = placed(p, b.dbias, with_all, out + layout.dbias);
    return to;
}

// ---- the call --------------------------------------------------------------------------------------------------------------
std::size_t staged_backward_bytes(const BackwardProblem& b, const CublasBackward& kernel) noexcept {
    return lay_out_blocks(b, kernel, nullptr).bytes;
}

void run_staged_backward(const BackwardProblem& b, const DeviceContext& context, const CublasBackward& kernel,
                         Executor& executor) {
    StagedBackward(b, context, kernel, executor).run();
}

}  // namespace fastattn::cuda
