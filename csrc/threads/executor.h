// How kernels run in parallel: items are handed to threads in any order, each thread has a slot of
// the workspace. Which thread runs an item never changes what the item computes.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastattn {

class Executor {
public:
    using ItemFn = void (*)(void* context, std::int64_t item, int slot);

    virtual ~Executor() = default;
    virtual int threads() const noexcept = 0;  // slots are 0 .. threads()-1
    // Runs fn(context, item, slot) for every item in [0, items); returns when all are done. Throws
    // Cancelled when stopped, and rethrows the first exception of an item. groups > 1: the items are so many
    // equal groups, and neighbours' data share cache lines or pages; threads begin far apart and each goes on
    // from where it is.
    virtual void parallel_for(std::int64_t items, ItemFn fn, void* context, std::int64_t groups) = 0;
    // Items call this between tiles (microseconds apart) and return early when it says true.
    // On the calling thread it also polls the caller (rate limited).
    virtual bool stop_requested() noexcept = 0;

    // The item that this thread will probably get after its present one, or some number from `items` on: for
    // prefetching only. To be asked late in an item, as it may set the next one aside for this thread.
    virtual std::int64_t next_item() noexcept = 0;

    template <class F>
    void for_each(std::int64_t items, F& f, std::int64_t groups = 1) {
        parallel_for(
            items, [](void* c, std::int64_t item, int slot) { (*static_cast<F*>(c))(item, slot); }, &f,
            groups);
    }
};

}  // namespace fastattn
