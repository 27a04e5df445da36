// What a staged call borrows for as long as it runs: streams, events and page-locked memory.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "cuda/host/errors.h"
#include "cuda/host/unit_arrays.h"
#include "cuda/simt/runtime.h"
#include "threads/executor.h"

namespace fastattn::cuda {

inline constexpr int kSlots = 2;  // units on their way

// Page-locked memory that grows.
class PinnedBlock {
public:
    PinnedBlock() = default;
    PinnedBlock(const PinnedBlock&) = delete;
    PinnedBlock& operator=(const PinnedBlock&) = delete;
    ~PinnedBlock() { release(); }

    void reserve(std::size_t bytes) {
        if (bytes <= bytes_) return;
        release();
        void* data = nullptr;
        throw_on_error(runtime::allocate_pinned(&data, bytes), "page-locked memory for the transfers", bytes);
        data_ = static_cast<std::byte*>(data);
        bytes_ = bytes;
    }
    void trim(std::size_t most) noexcept {
        if (bytes_ > most) release();
    }
    std::byte* data() const noexcept { return data_; }

private:
    void release() noexcept {
        if (data_ != nullptr) runtime::release_pinned(data_);
        data_ = nullptr;
        bytes_ = 0;
    }
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

// Streams, events and page-locked memory of one staged call; making them costs more than many a call, so they
// are kept.
class Lane {
public:
    Lane() {
        try {
            for (Stream* stream : streams())
                throw_on_error(runtime::create_stream(stream), "making a stream");
            for (Event* event : events()) throw_on_error(runtime::create_event(event), "making an event");
        } catch (...) {
            destroy();
            throw;
        }
    }
    ~Lane() { destroy(); }
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    // All that was queued is done, or failed.
    int drain() noexcept {
        int first = 0;
        for (const Stream stream : {up, compute, down}) {
            const int status = runtime::synchronize(stream);
            if (first == 0) first = status;
        }
        return first;
    }

    Stream up = nullptr, compute = nullptr, down = nullptr;
    Event ready = nullptr, uploaded[kSlots] = {}, computed[kSlots] = {}, downloaded[kSlots] = {};
    PinnedBlock keys[kSlots], in[kSlots], out[kSlots];

    // Gives back page-locked memory that only an unusually large unit needed.
    void trim() noexcept {
        for (int slot = 0; slot < kSlots; ++slot)
            for (PinnedBlock* block : {&keys[slot], &in[slot], &out[slot]}) block->trim(4 * kUnitBytes);
    }

private:
    void destroy() noexcept {
        for (Stream* stream : streams())
            if (*stream != nullptr) runtime::destroy_stream(*stream);
        for (Event* event : events())
            if (*event != nullptr) runtime::destroy_event(*event);
    }
    std::array<Stream*, 3> streams() noexcept { return {&up, &compute, &down}; }
    std::array<Event*, 7> events() noexcept {
        return {&ready,       &uploaded[0],   &uploaded[1],  &computed[0],
                &computed[1], &downloaded[0], &downloaded[1]};
    }
};

// A lane for as long as this lives; whatever happens, nothing is on its way any more when it goes back.
class BorrowedLane {
public:
    explicit BorrowedLane(int device);
    ~BorrowedLane();
    BorrowedLane(const BorrowedLane&) = delete;
    BorrowedLane& operator=(const BorrowedLane&) = delete;
    Lane& operator*() const noexcept { return *lane_; }

private:
    int device_;
    std::unique_ptr<Lane> lane_;
};

// Returns when what was recorded is over; throws CudaError, or Cancelled when the executor says stop.
void await(Event event, Executor& executor);

}  // namespace fastattn::cuda
