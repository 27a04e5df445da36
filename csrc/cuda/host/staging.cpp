#include "cuda/host/staging.h"

#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/host/errors.h"
#include "cuda/host/lane.h"
#include "cuda/host/unit_arrays.h"

namespace fastattn::cuda {
namespace {

Index item_of(DType dtype) noexcept { return static_cast<Index>(item_size(dtype)); }

void copy_in(const AttentionProblem& p, const Chunk& unit, const AttentionProblem& pinned,
             Executor& executor) {
    copy_queries(p, unit, p.q, pinned.q, p.head_dim, executor);
    for (const auto side : {&AttentionProblem::mask, &AttentionProblem::bias}) {
        const ScoreOperand& from = p.*side;
        if (from.data != nullptr && !is_shared(p, from))
            copy_scores(p, unit, from, pinned.*side, stored_size(p, from, unit), executor);
    }
}

void copy_out(const AttentionProblem& p, const Chunk& unit, const AttentionProblem& pinned,
              Executor& executor) {
    copy_queries(p, unit, pinned.out, p.out, p.value_dim, executor);
    const Index heads = unit.kv_heads * p.group;
    if (p.lse.data != nullptr)
        copy_scores(p, with_keys(unit, 1), pinned.lse, p.lse, {unit.batches, heads, unit.rows, 1}, executor);
    if (p.weights.data != nullptr)
        copy_scores(p, with_keys(unit, p.kv_size), pinned.weights, p.weights,
                    {unit.batches, heads, unit.rows, p.kv_size}, executor);
}

}  // namespace

// ---- units --------------------------------------------------------------------------------------------------
Units::Units(const AttentionProblem& p, std::size_t unit_bytes) noexcept : p_(p), all_(whole(p)) {
    if (is_empty(p)) {
        batch_ = p.batch;
        return;
    }
    const auto limit = static_cast<Index>(unit_bytes);
    const auto stored = static_cast<Index>(compact_bytes(p.dtype, 1, 1, 1, p.head_dim) +
                                           compact_bytes(p.dtype, 1, 1, 1, p.value_dim));
    const Index keys = all_.keys * stored;
    Index row = stored + item_of(p.lse_dtype);
    if (p.weights.data != nullptr) row += p.kv_size * item_of(p.lse_dtype);
    if (p.mask.data != nullptr && p.mask.query != 0 && !is_shared(p, p.mask)) row += all_.keys;
    if (p.bias.data != nullptr && p.bias.query != 0 && !is_shared(p, p.bias))
        row += all_.keys * item_of(p.bias.dtype);
    row *= p.group;  // of one kv head
    rows_ = p.q_size;
    if (row * rows_ > 2 * limit) {
        rows_ = std::clamp<Index>(limit / row, 1, p.q_size);
        return;
    }
    const Index head = std::max<Index>(1, keys + row * rows_);
    kv_heads_ = std::clamp<Index>(limit / head, 1, p.kv_heads);
    if (kv_heads_ == p.kv_heads) batches_ = std::clamp<Index>(limit / (head * kv_heads_), 1, p.batch);
}

Index Units::count() const noexcept {
    if (is_empty(p_)) return 0;
    const auto pieces = [](Index n, Index of) { return (n + of - 1) / of; };
    return pieces(p_.batch, batches_) * pieces(p_.kv_heads, kv_heads_) * pieces(p_.q_size, rows_);
}

bool Units::next(Chunk& unit, bool& same_keys) noexcept {
    if (batch_ >= p_.batch) return false;
    unit = {
        batch_, std::min(batches_, p_.batch - batch_), kv_head_, std::min(kv_heads_, p_.kv_heads - kv_head_),
        row_,   std::min(rows_, p_.q_size - row_),     all_.key, all_.keys};
    same_keys = row_ > 0;
    row_ += unit.rows;
    if (row_ < p_.q_size) return true;
    row_ = 0;
    kv_head_ += unit.kv_heads;
    if (kv_head_ < p_.kv_heads) return true;
    kv_head_ = 0;
    batch_ += unit.batches;
    return true;
}

UnitLayout lay_out_unit(const AttentionProblem& p, const Chunk& unit) noexcept {
    UnitLayout layout;
    const Index heads = unit.kv_heads * p.group;
    const auto compact = [&](Index n, Index rows, Index dims) {
        return compact_bytes(p.dtype, unit.batches, n, rows, dims);
    };
    const auto at = [](Carver& carver, std::size_t bytes) {
        const std::size_t offset = carver.used();
        carver.take(bytes);
        return offset;
    };
    Carver keys(nullptr), in(nullptr), out(nullptr);
    keys.take(compact(unit.kv_heads, unit.keys, p.head_dim));
    layout.v = at(keys, compact(unit.kv_heads, unit.keys, p.value_dim));
    layout.keys_bytes = keys.used();
    in.take(compact(heads, unit.rows, p.head_dim));
    layout.mask = at(in, is_shared(p, p.mask) ? 0 : stored_bytes(p, p.mask, unit));
    layout.bias = at(in, is_shared(p, p.bias) ? 0 : stored_bytes(p, p.bias, unit));
    layout.in_bytes = in.used();
    out.take(compact(heads, unit.rows, p.value_dim));
    layout.lse = at(out, stored_bytes(p, full(p.lse, 1), with_keys(unit, 1)));
    layout.weights = at(out, stored_bytes(p, full(p.weights, p.kv_size), with_keys(unit, p.kv_size)));
    layout.out_bytes = out.used();
    return layout;
}

AttentionProblem place_unit(const AttentionProblem& p, const Chunk& unit, const UnitLayout& layout,
                            std::byte* keys, std::byte* in, std::byte* out) noexcept {
    AttentionProblem to = p;
    const Index q_head = unit.kv_head * p.group, q_heads = unit.kv_heads * p.group;
    const auto query = [&](std::byte* data, Index dims) {
        return compact_operand(data, p.dtype, unit, q_head, q_heads, unit.row, unit.rows, dims);
    };
    const auto key = [&](std::byte* data, Index dims) {
        return compact_operand(data, p.dtype, unit, unit.kv_head, unit.kv_heads, unit.key, unit.keys, dims);
    };
    to.k = key(keys, p.head_dim);
    to.v = key(keys + layout.v, p.value_dim);
    to.q = query(in, p.head_dim);
    to.out = query(out, p.value_dim);
    if (!is_shared(p, p.mask)) to.mask = placed(p, p.mask, unit, in + layout.mask);
    if (!is_shared(p, p.bias)) to.bias = placed(p, p.bias, unit, in + layout.bias);
    to.lse = placed(p, full(p.lse, 1), with_keys(unit, 1), out + layout.lse);
    to.weights = placed(p, full(p.weights, p.kv_size), with_keys(unit, p.kv_size), out + layout.weights);
    return to;
}

// ---- side arrays ----------------------------------------------------------------------------------------------
namespace {

bool on_host(const void* data, DeviceType place) noexcept {
    return data != nullptr && place == DeviceType::cpu;
}

constexpr HeadOperand AttentionProblem::* kHeadSides[] = {
    &AttentionProblem::alibi_slopes, &AttentionProblem::sinks, &AttentionProblem::q_lens,
    &AttentionProblem::kv_lens, &AttentionProblem::q_offsets};
constexpr ScoreOperand AttentionProblem::* kScoreSides[] = {&AttentionProblem::mask, &AttentionProblem::bias};

// A side array over (batch, head) as one over all four axes.
ScoreOperand widened(const HeadOperand& x) noexcept {
    return {const_cast<void*>(x.data), x.dtype, x.batch, x.head, 0, 0, x.place};
}

}  // namespace

std::size_t side_bytes(const AttentionProblem& p, bool with_scores) noexcept {
    Carver carver(nullptr);
    const Chunk all = whole(p);
    for (const auto side : kHeadSides)
        if (on_host((p.*side).data, (p.*side).place))
            carver.take(stored_bytes(p, widened(p.*side), with_keys(all, 1)));
    for (const auto side : kScoreSides)
        if ((with_scores || is_shared(p, p.*side)) && on_host((p.*side).data, (p.*side).place))
            carver.take(stored_bytes(p, p.*side, all));
    return carver.used();
}

void upload_sides(const AttentionProblem& p, bool with_scores, std::byte* block, AttentionProblem& device,
                  Stream stream, Executor& executor) {
    Carver carver(block);
    const Chunk all = whole(p);
    const auto upload = [&](const ScoreOperand& from, const Chunk& region) {
        const std::size_t bytes = stored_bytes(p, from, region);
        std::byte* to = carver.take(bytes);
        if (bytes > 0) {
            std::unique_ptr<void, decltype(&std::free)> compact(std::malloc(bytes), &std::free);
            if (compact == nullptr) throw OutOfMemory("a copy of a side array", bytes);
            const ScoreOperand local = placed(p, from, region, compact.get());
            copy_scores(p, region, from, local, stored_size(p, from, region), executor);
            throw_on_error(runtime::copy(to, compact.get(), bytes, Copy::to_device, stream),
                           "copying to the device");
            // A copy from pageable memory may be read from after the call returns.
            if (const int status = runtime::free_host_after(compact.get(), stream)) {
                if (runtime::synchronize(stream) != 0) compact.release();  // nobody knows who still reads it
                throw_on_error(status, "freeing after a copy");
            }
            compact.release();
        }
        return placed(p, from, region, to);
    };
    for (const auto side : kHeadSides) {
        const HeadOperand& from = p.*side;
        if (!on_host(from.data, from.place)) continue;
        const ScoreOperand to = upload(widened(from), with_keys(all, 1));
        device.*side = {to.data, to.dtype, to.batch, to.head, DeviceType::cuda};
    }
    for (const auto side : kScoreSides)
        if ((with_scores || is_shared(p, p.*side)) && on_host((p.*side).data, (p.*side).place)) {
            device.*side = upload(p.*side, all);
            (device.*side).place = DeviceType::cuda;
        }
}

// ---- the pipeline -----------------------------------------------------------------------------------------------
namespace {

// One slot's blocks on the device.
struct DeviceSlot {
    std::byte *keys = nullptr, *in = nullptr, *out = nullptr;
};

struct DeviceBlocks {
    DeviceSlot slots[kSlots];
    std::byte *sides = nullptr, *workspace = nullptr;
    std::size_t bytes = 0;
};

DeviceBlocks lay_out_blocks(const AttentionProblem& p, std::size_t workspace_bytes,
                            std::byte* block) noexcept {
    const UnitLayout layout = lay_out_unit(p, Units(p).largest());
    DeviceBlocks blocks;
    Carver carver(block);
    for (DeviceSlot& slot : blocks.slots) {
        slot.keys = carver.take(layout.keys_bytes);
        slot.in = carver.take(layout.in_bytes);
        slot.out = carver.take(layout.out_bytes);
    }
    blocks.sides = carver.take(side_bytes(p, false));
    blocks.workspace = carver.take(workspace_bytes);
    blocks.bytes = carver.used();
    return blocks;
}

class StagedCall {
public:
    StagedCall(const AttentionProblem& p, const DeviceContext& context, std::size_t workspace_bytes,
               const DeviceKernel& kernel, Executor& executor)
        : p_(p),
          kernel_(kernel),
          executor_(executor),
          borrowed_(context.index),
          lane_(*borrowed_),
          memory_(context, lay_out_blocks(p, workspace_bytes, nullptr).bytes, lane_.compute,
                  "the device's workspace"),
          blocks_(lay_out_blocks(p, workspace_bytes, memory_.data())) {
        const UnitLayout layout = lay_out_unit(p, Units(p).largest());
        for (int slot = 0; slot < kSlots; ++slot) {
            lane_.keys[slot].reserve(layout.keys_bytes);
            lane_.in[slot].reserve(layout.in_bytes);
            lane_.out[slot].reserve(layout.out_bytes);
        }
        device_ = p;
        upload_sides(p, false, blocks_.sides, device_, lane_.compute, executor);
        // The memory is there, and the side arrays in it, for the other streams too.
        throw_on_error(runtime::record(lane_.ready, lane_.compute), "recording an event");
        for (const Stream stream : {lane_.up, lane_.down})
            throw_on_error(runtime::wait(stream, lane_.ready), "waiting for an event");
    }

    ~StagedCall() { lane_.drain(); }  // before the memory goes
    StagedCall(const StagedCall&) = delete;
    StagedCall& operator=(const StagedCall&) = delete;

    void run() {
        Units units(p_);
        Chunk unit;
        bool same_keys = false;
        Index n = 0;
        for (; units.next(unit, same_keys); ++n) {
            if (executor_.stop_requested()) throw Cancelled();
            finish(n - kSlots);
            stage(n, unit, same_keys);
        }
        for (Index left = n - kSlots; left < n; ++left) finish(left);
    }

private:
    // Copies unit n to its slot and queues upload, computation and download.
    void stage(Index n, const Chunk& unit, bool same_keys) {
        const auto slot = static_cast<int>(n % kSlots);
        units_[slot] = unit;
        if (!same_keys) ++key_sets_;
        const auto key_slot = static_cast<int>(key_sets_ % kSlots);
        const UnitLayout layout = lay_out_unit(p_, unit);
        pinned_[slot] = place_unit(p_, unit, layout, lane_.keys[key_slot].data(), lane_.in[slot].data(),
                                   lane_.out[slot].data());
        const DeviceSlot& to = blocks_.slots[slot];
        std::byte* const device_keys = blocks_.slots[key_slot].keys;
        AttentionProblem device = place_unit(device_, unit, layout, device_keys, to.in, to.out);
        device.mask.place = device.bias.place = DeviceType::cuda;

        if (!same_keys) {
            // The slot's last set was that before the last, whose units finish() has waited for.
            copy_keys(p_, unit, p_.k, pinned_[slot].k, p_.head_dim, executor_);
            copy_keys(p_, unit, p_.v, pinned_[slot].v, p_.value_dim, executor_);
            upload(device_keys, lane_.keys[key_slot], layout.keys_bytes);
        }
        copy_in(p_, unit, pinned_[slot], executor_);
        // finish(n - kSlots) has waited for the download of this slot's last unit: its blocks are free.
        upload(to.in, lane_.in[slot], layout.in_bytes);
        throw_on_error(runtime::record(lane_.uploaded[slot], lane_.up), "recording an event");
        throw_on_error(runtime::wait(lane_.compute, lane_.uploaded[slot]), "waiting for an event");
        kernel_.queue(p_, device, unit, blocks_.workspace, lane_.compute);
        throw_on_error(runtime::record(lane_.computed[slot], lane_.compute), "recording an event");
        throw_on_error(runtime::wait(lane_.down, lane_.computed[slot]), "waiting for an event");
        throw_on_error(
            runtime::copy(lane_.out[slot].data(), to.out, layout.out_bytes, Copy::to_host, lane_.down),
            "copying from the device");
        throw_on_error(runtime::record(lane_.downloaded[slot], lane_.down), "recording an event");
    }

    void upload(std::byte* to, const PinnedBlock& from, std::size_t bytes) {
        if (bytes == 0) return;
        throw_on_error(runtime::copy(to, from.data(), bytes, Copy::to_device, lane_.up),
                       "copying to the device");
    }

    // Waits for unit n and hands its results to the caller's arrays.
    void finish(Index n) {
        if (n < 0) return;
        const auto slot = static_cast<int>(n % kSlots);
        await(lane_.downloaded[slot], executor_);
        copy_out(p_, units_[slot], pinned_[slot], executor_);
    }

    const AttentionProblem& p_;
    const DeviceKernel& kernel_;
    Executor& executor_;
    BorrowedLane borrowed_;
    Lane& lane_;
    DeviceMemory memory_;
    DeviceBlocks blocks_;
    AttentionProblem device_;  // with the side arrays on the device
    Chunk units_[kSlots];
    AttentionProblem pinned_[kSlots];
    Index key_sets_ = 0;
};

}  // namespace

std::size_t staged_bytes(const AttentionProblem& p) noexcept { return lay_out_blocks(p, 0, nullptr).bytes; }

void run_staged(const AttentionProblem& p, const DeviceContext& context, std::size_t workspace_bytes,
                const DeviceKernel& kernel, Executor& executor) {
    if (is_empty(p)) return;
    StagedCall(p, context, workspace_bytes, kernel, executor).run();
}

}  // namespace fastattn::cuda
