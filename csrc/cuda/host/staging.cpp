#include "cuda/host/staging.h"

#include <cstdlib>
#include <memory>

#include "cuda/host/errors.h"
#include "cuda/host/lane.h"

namespace fastattn::cuda {

// ---- units ------------------------------------------------------------------------------------------------
Units::Units(const AttentionProblem& p, std::size_t unit_bytes) noexcept
    : p_(p), all_(whole(p)), rows_(p.q_size) {
    if (is_empty(p)) return;
    const auto item_of = [](DType dtype) { return static_cast<Index>(item_size(dtype)); };
    const auto limit = static_cast<Index>(unit_bytes);
    const Index stored =
        (row_stride(p.dtype, p.head_dim) + row_stride(p.dtype, p.value_dim)) * item_of(p.dtype);
    Index row = stored + item_of(p.lse_dtype);
    if (p.weights.data != nullptr) row += p.kv_size * item_of(p.lse_dtype);
    if (p.mask.data != nullptr && p.mask.query != 0 && !is_shared(p, p.mask)) row += all_.keys;
    if (p.bias.data != nullptr && p.bias.query != 0 && !is_shared(p, p.bias))
        row += all_.keys * item_of(p.bias.dtype);
    row *= p.group;  // of one kv head
    if (row * rows_ > 2 * limit) {
        batches_ = kv_heads_ = 1;
        rows_ = std::clamp<Index>(limit / row, 1, p.q_size);
    } else {
        set_heads(all_.keys * stored + row * rows_, unit_bytes);
    }
}

Units::Units(const BackwardProblem& b, std::size_t unit_bytes) noexcept
    : p_(b.forward), all_(whole(b.forward)), rows_(p_.q_size) {
    if (p_.batch == 0 || p_.kv_heads == 0) return;
    const BlockLayout head = lay_out(b, {0, 1, 0, 1, 0, rows_, all_.key, all_.keys});
    set_heads(static_cast<Index>(head.bytes(Travel::keys) + head.bytes(Travel::in) + head.bytes(Travel::out)),
              unit_bytes);
}

void Units::set_heads(Index head, std::size_t unit_bytes) noexcept {
    const auto limit = static_cast<Index>(unit_bytes);
    head = std::max<Index>(1, head);
    kv_heads_ = std::clamp<Index>(limit / head, 1, p_.kv_heads);
    batches_ = kv_heads_ < p_.kv_heads ? 1 : std::clamp<Index>(limit / (head * kv_heads_), 1, p_.batch);
}

Index Units::count() const noexcept {
    if (batches_ == 0) return 0;
    const auto pieces = [](Index n, Index of) { return of == 0 ? 1 : (n + of - 1) / of; };
    return pieces(p_.batch, batches_) * pieces(p_.kv_heads, kv_heads_) * pieces(p_.q_size, rows_);
}

bool Units::next(Chunk& unit, bool& same_keys) noexcept {
    if (batches_ == 0 || batch_ >= p_.batch) return false;
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

// ---- side arrays ------------------------------------------------------------------------------------------
template <class Problem>
void upload_sides(const Problem& p, std::byte* block, Problem& device, Stream stream, Executor& executor) {
    const Chunk all = whole(forward_of(p));
    const BlockLayout layout = lay_out(p, all);
    const std::size_t bytes = layout.bytes(Travel::side);
    if (bytes == 0) return;
    std::unique_ptr<void, decltype(&std::free)> compact(std::malloc(bytes), &std::free);
    if (compact == nullptr) throw OutOfMemory("a copy of the side arrays", bytes);
    const Block local{Travel::side, static_cast<std::byte*>(compact.get())};
    copy_arrays(p, placed(p, p, all, layout, {local}, DeviceType::cpu), all, Travel::side, executor);
    throw_on_error(runtime::copy(block, compact.get(), bytes, Copy::to_device, stream),
                   "copying to the device");
    // A copy from pageable memory may be read from after the call returns.
    if (const int status = runtime::free_host_after(compact.get(), stream)) {
        if (runtime::synchronize(stream) != 0) compact.release();  // nobody knows who still reads it
        throw_on_error(status, "freeing after a copy");
    }
    compact.release();
    device = placed(p, device, all, layout, {{Travel::side, block}}, DeviceType::cuda);
}

// ---- the pipeline -----------------------------------------------------------------------------------------
namespace {

// Slots of a unit's arrays on the device; with one, all is queued in one stream. The backward pass has twice
// as many arrays, and sums of their size beside them, so it takes one.
template <class Problem>
constexpr int kDeviceSlots = std::is_same_v<Problem, BackwardProblem> ? 1 : kSlots;

struct DeviceBlocks {
    struct Slot {
        std::byte *keys = nullptr, *in = nullptr, *out = nullptr;
    };
    Slot slots[kSlots];
    std::byte *sides = nullptr, *summed = nullptr;
    KernelMemory kernel;
    BlockLayout largest, whole;  // of a unit, and of what travels once
    std::size_t bytes = 0;
};

// Of a unit only sizes are known before it is there.
template <class Problem>
std::size_t workspace_bytes(const Problem& p, const DeviceKernel<Problem>& kernel, const Chunk& unit,
                            const BlockLayout& layout) {
    const Problem device =
        placed(p, p, unit, layout, {{Travel::keys, nullptr}, {Travel::in, nullptr}, {Travel::out, nullptr}},
               DeviceType::cuda);
    return kernel.workspace_bytes(p, device, unit);
}

template <class Problem>
DeviceBlocks lay_out_blocks(const Problem& p, const DeviceKernel<Problem>& kernel, std::byte* block) {
    const Chunk unit = Units(p).largest();
    DeviceBlocks blocks;
    blocks.largest = lay_out(p, unit);
    blocks.whole = lay_out(p, whole(forward_of(p)));
    Carver carver(block);
    for (int slot = 0; slot < kSlots; ++slot) {
        blocks.slots[slot] = blocks.slots[0];
        if (slot >= kDeviceSlots<Problem>) continue;
        blocks.slots[slot].keys = carver.take(blocks.largest.bytes(Travel::keys));
        blocks.slots[slot].in = carver.take(blocks.largest.bytes(Travel::in));
        blocks.slots[slot].out = carver.take(blocks.largest.bytes(Travel::out));
    }
    blocks.sides = carver.take(blocks.whole.bytes(Travel::side));
    blocks.summed = carver.take(blocks.whole.bytes(Travel::summed));
    blocks.kernel.sums = carver.take(kernel.sums_bytes(p));
    blocks.kernel.workspace = carver.take(workspace_bytes(p, kernel, unit, blocks.largest));
    blocks.bytes = carver.used();
    return blocks;
}

template <class Problem>
class StagedCall {
public:
    StagedCall(const Problem& p, const DeviceContext& context, const DeviceKernel<Problem>& kernel,
               Executor& executor)
        : p_(p),
          kernel_(kernel),
          executor_(executor),
          borrowed_(context.index),
          lane_(*borrowed_),
          up_(kDeviceSlots<Problem> == 1 ? lane_.compute : lane_.up),
          down_(kDeviceSlots<Problem> == 1 ? lane_.compute : lane_.down),
          memory_(context, lay_out_blocks(p, kernel, nullptr).bytes, lane_.compute, "the device's workspace"),
          blocks_(lay_out_blocks(p, kernel, memory_.data())),
          device_(p) {
        for (int slot = 0; slot < kSlots; ++slot) {
            lane_.keys[slot].reserve(blocks_.largest.bytes(Travel::keys));
            lane_.in[slot].reserve(blocks_.largest.bytes(Travel::in));
            lane_.out[slot].reserve(blocks_.largest.bytes(Travel::out));
        }
        lane_.keys[0].reserve(blocks_.whole.bytes(Travel::summed));
        upload_sides(p, blocks_.sides, device_, lane_.compute, executor);
        device_ = placed(p, device_, whole(forward_of(p)), blocks_.whole, {{Travel::summed, blocks_.summed}},
                         DeviceType::cuda);
        // The memory is there, and the side arrays in it, for the other streams too.
        record(lane_.ready, lane_.compute);
        for (const Stream stream : {up_, down_}) wait(stream, lane_.ready);
    }

    ~StagedCall() { lane_.drain(); }  // before the memory goes
    StagedCall(const StagedCall&) = delete;
    StagedCall& operator=(const StagedCall&) = delete;

    void run() {
        kernel_.queue_start(device_, blocks_.kernel.sums, lane_.compute);
        Units units(p_);
        Chunk unit;
        bool same_keys = false;
        Index n = 0;
        for (; units.next(unit, same_keys); ++n) {
            if (executor_.stop_requested()) throw Cancelled();
            finish(n - kSlots);
            stage(n, unit, same_keys);
        }
        const std::size_t summed = blocks_.whole.bytes(Travel::summed);
        if (summed > 0) {
            kernel_.queue_finish(device_, blocks_.kernel.sums, lane_.compute);
            copy(lane_.keys[0].data(), blocks_.summed, summed, Copy::to_host, lane_.compute);
        }
        record(lane_.ready, lane_.compute);
        for (Index left = n - kSlots; left < n; ++left) finish(left);
        await(lane_.ready, executor_);
        const Chunk all = whole(forward_of(p_));
        copy_arrays(
            p_, placed(p_, p_, all, blocks_.whole, {{Travel::summed, lane_.keys[0].data()}}, DeviceType::cpu),
            all, Travel::summed, executor_);
    }

private:
    // Copies unit n to its slot and queues upload, computation and download.
    void stage(Index n, const Chunk& unit, bool same_keys) {
        const auto slot = static_cast<int>(n % kSlots);
        if (!same_keys) ++key_sets_;
        const auto key_slot = static_cast<int>(key_sets_ % kSlots);
        const BlockLayout layout = lay_out(p_, unit);
        const DeviceBlocks::Slot& to = blocks_.slots[slot];
        std::byte* const device_keys = blocks_.slots[key_slot].keys;
        units_[slot] = unit;
        pinned_[slot] = placed(p_, p_, unit, layout,
                               {{Travel::keys, lane_.keys[key_slot].data()},
                                {Travel::in, lane_.in[slot].data()},
                                {Travel::out, lane_.out[slot].data()}},
                               DeviceType::cpu);
        const Problem device = placed(
            p_, device_, unit, layout,
            {{Travel::keys, device_keys}, {Travel::in, to.in}, {Travel::out, to.out}}, DeviceType::cuda);

        if (!same_keys) {
            // The last keys of this slot were those before the last, whose units finish() has waited for.
            copy_arrays(p_, pinned_[slot], unit, Travel::keys, executor_);
            copy(device_keys, lane_.keys[key_slot].data(), layout.bytes(Travel::keys), Copy::to_device, up_);
        }
        copy_arrays(p_, pinned_[slot], unit, Travel::in, executor_);
        // The blocks of this slot are free: finish(n - kSlots) has waited for its last download. Where the
        // device has one slot, it is free when its one stream gets there.
        copy(to.in, lane_.in[slot].data(), layout.bytes(Travel::in), Copy::to_device, up_);
        record(lane_.uploaded[slot], up_);
        wait(lane_.compute, lane_.uploaded[slot]);
        kernel_.queue(p_, device, unit, blocks_.kernel, lane_.compute);
        record(lane_.computed[slot], lane_.compute);
        wait(down_, lane_.computed[slot]);
        copy(lane_.out[slot].data(), to.out, layout.bytes(Travel::out), Copy::to_host, down_);
        record(lane_.downloaded[slot], down_);
    }

    // Waits for unit n and hands its results to the caller's arrays.
    void finish(Index n) {
        if (n < 0) return;
        const auto slot = static_cast<int>(n % kSlots);
        await(lane_.downloaded[slot], executor_);
        copy_arrays(p_, pinned_[slot], units_[slot], Travel::out, executor_);
    }

    static void copy(void* to, const void* from, std::size_t bytes, Copy kind, Stream stream) {
        if (bytes == 0) return;
        throw_on_error(runtime::copy(to, from, bytes, kind, stream),
                       kind == Copy::to_device ? "copying to the device" : "copying from the device");
    }
    static void record(Event event, Stream stream) {
        throw_on_error(runtime::record(event, stream), "recording an event");
    }
    static void wait(Stream stream, Event event) {
        throw_on_error(runtime::wait(stream, event), "waiting for an event");
    }

    const Problem& p_;
    const DeviceKernel<Problem>& kernel_;
    Executor& executor_;
    BorrowedLane borrowed_;
    Lane& lane_;
    const Stream up_, down_;
    DeviceMemory memory_;
    const DeviceBlocks blocks_;
    Problem device_;  // with the side arrays and the sums on the device
    Chunk units_[kSlots];
    Problem pinned_[kSlots];
    Index key_sets_ = 0;
};

}  // namespace

template <class Problem>
std::size_t staged_bytes(const Problem& p, const DeviceKernel<Problem>& kernel) {
    return lay_out_blocks(p, kernel, nullptr).bytes;
}

template <class Problem>
void run_staged(const Problem& p, const DeviceContext& context, const DeviceKernel<Problem>& kernel,
                Executor& executor) {
    StagedCall<Problem>(p, context, kernel, executor).run();
}

#define FASTATTN_FOR(Problem)                                                            \
    template void upload_sides(const Problem&, std::byte*, Problem&, Stream, Executor&); \
    template std::size_t staged_bytes(const Problem&, const DeviceKernel<Problem>&);     \
    template void run_staged(const Problem&, const DeviceContext&, const DeviceKernel<Problem>&, Executor&)
FASTATTN_FOR(AttentionProblem);
FASTATTN_FOR(BackwardProblem);
#undef FASTATTN_FOR

}  // namespace fastattn::cuda
