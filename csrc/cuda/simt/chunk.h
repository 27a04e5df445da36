// A piece of a problem whose scores exist at once: ranges of the problem's own indices.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

struct Chunk {
    std::int64_t batch = 0, batches = 0;    // batch entries
    std::int64_t kv_head = 0, kv_heads = 0; // key/value heads, each with its G query heads
    std::int64_t row = 0, rows = 0;         // query rows of each head
    std::int64_t key = 0, keys = 0;         // keys that some row may attend by lengths, causal and window
};

}  // namespace fastattn::cuda
