#include "cuda/host/lane.h"

#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

namespace fastattn::cuda {
namespace {

// Lanes nobody uses, by device. Never destroyed, as the driver may go first.
struct Lanes {
    std::mutex mutex;
    std::array<std::pair<int, std::unique_ptr<Lane>>, 8> idle;  // more are not kept
};
Lanes& lanes() {
    static auto* const all = new Lanes;
    return *all;
}

}  // namespace

BorrowedLane::BorrowedLane(int device) : device_(device) {
    {
        Lanes& all = lanes();
        const std::lock_guard lock(all.mutex);
        for (auto& [index, lane] : all.idle) {
            if (index == device && lane != nullptr) {
                lane_ = std::move(lane);
                break;
            }
        }
    }
    if (lane_ == nullptr) lane_ = std::make_unique<Lane>();
}

BorrowedLane::~BorrowedLane() {
    lane_->drain();
    lane_->trim();
    Lanes& all = lanes();
    const std::lock_guard lock(all.mutex);
    for (auto& [index, lane] : all.idle) {
        if (lane == nullptr) {
            index = device_;
            lane = std::move(lane_);
            return;
        }
    }
}

// A short wait is spent asking, a long one mostly asleep.
void await(Event event, Executor& executor) {
    constexpr auto patience = std::chrono::microseconds(100);
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
        const int status = runtime::query(event);
        if (status != kNotReady) return throw_on_error(status, "computing on the device");
        if (executor.stop_requested()) throw Cancelled();
        if (std::chrono::steady_clock::now() - start > patience) std::this_thread::sleep_for(patience);
    }
}

}  // namespace fastattn::cuda
