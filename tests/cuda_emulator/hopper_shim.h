// The names of csrc/cuda/fused/sm90/hopper.h for the emulated GPU. Everything asynchronous happens as late as
// its waits allow: a copy when somebody waits for its barrier, a product when its warp group waits for it. So
// a wait too few reads old data here; and with set_copies_eager(), a stage given back too early is
// overwritten. Fences, pin() and the numbers of registers do nothing.
//
// An address of shared memory is the distance from begin_shared()'s.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <vector>

#include "emulator.h"

#include "cuda/fused/sm90/hopper_layout.h"
#include "cuda/fused/tensor_core.h"
#include "cuda/simt/tile_map.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kWarpGroup = 128;

// What a GPU would do silently, or not do.
[[noreturn]] inline void misuse(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s, block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
    std::abort();
}

// ---- shared memory ----------------------------------------------------------------------------------------
inline const unsigned char*& shared_base() {
    static const unsigned char* base = nullptr;
    return base;
}
inline std::uint32_t shared_address(const void* data) {
    return static_cast<std::uint32_t>(static_cast<const unsigned char*>(data) - shared_base());
}
inline unsigned char* shared_byte(std::uint32_t address) {
    return const_cast<unsigned char*>(shared_base()) + address;
}

// ---- barriers ---------------------------------------------------------------------------------------------
struct Barrier {
    std::uint64_t state;  // which phase this is
};

struct BoxCopy {
    unsigned char* target;
    TileMapLayout from;
    std::int64_t at[4];  // element of each axis
    bool done = false;

    std::int64_t bytes() const { return std::int64_t{from.rows} * kChunkRowBytes; }
    void run() const {
        for (std::uint32_t r = 0; r < from.rows; ++r) {
            for (int c = 0; c < kChunkColumns; ++c) {
                const std::int64_t index[4] = {at[0] + c, at[1] + r, at[2], at[3]};
                std::int64_t offset = 2 * index[0];
                bool inside = true;
                for (int axis = 0; axis < 4; ++axis) {
                    inside = inside && index[axis] >= 0 &&
                             index[axis] < static_cast<std::int64_t>(from.size[axis]);
                    if (axis > 0) offset += index[axis] * static_cast<std::int64_t>(from.stride[axis - 1]);
                }
                std::uint16_t x = 0;
                if (inside) std::memcpy(&x, static_cast<const char*>(from.data) + offset, sizeof x);
                const std::uint32_t to =
                    shared_address(target) + tile_offset(static_cast<int>(from.rows), static_cast<int>(r), c);
                std::memcpy(shared_byte(swizzled_128(to)), &x, sizeof x);
            }
        }
    }
};

struct BarrierState {
    int count = 0, missing = 0;  // arrivals of a phase, and those that it still waits for
    std::int64_t expected = 0;  // bytes
    std::vector<BoxCopy> copies;
};
inline std::map<const Barrier*, BarrierState>& barrier_states() {
    static std::map<const Barrier*, BarrierState> states;
    return states;
}

struct NamedBarrier {
    int arrived = 0;
    std::uint64_t phase = 0;
};
inline NamedBarrier (&named_barriers())[16] {
    static NamedBarrier barriers[16];
    return barriers;
}

// ---- products ---------------------------------------------------------------------------------------------
// A thread's products, group by group; the last group is open.
using ProductQueue = std::deque<std::vector<std::function<void()>>>;
inline ProductQueue& product_queue() {
    static ProductQueue queues[1024];
    return queues[threadIdx.x];
}

inline void begin_shared(const void* data) {
    product_queue() = ProductQueue(1);
    if (threadIdx.x == 0) {
        shared_base() = static_cast<const unsigned char*>(data);
        barrier_states().clear();
        for (NamedBarrier& barrier : named_barriers()) barrier = {};
    }
    __syncthreads();
    if (reinterpret_cast<std::uintptr_t>(data) % kSwizzleBytes != 0)
        misuse("shared memory does not begin at a multiple of 1024");
}

inline void init_barrier(Barrier* barrier, int count) {
    barrier->state = 0;
    barrier_states()[barrier] = {count, count, 0, {}};
}
inline void publish_barriers() {}

// Whether a phase ended. Copies whose bytes were expected are made then, if `somebody_waits`.
inline bool end_phase(Barrier* barrier, BarrierState& state, bool somebody_waits) {
    if (state.missing > 0) return false;
    if (!state.copies.empty()) {
        if (!somebody_waits) return false;
        std::int64_t bytes = 0;
        for (const BoxCopy& copy : state.copies) bytes += copy.bytes();
        if (bytes != state.expected) return false;  // the rest may still be asked for
        for (const BoxCopy& copy : state.copies)
            if (!copy.done) copy.run();
    } else if (state.expected != 0) {
        return false;
    }
    state.copies.clear();
    state.expected = 0;
    state.missing = state.count;
    ++barrier->state;
    return true;
}

inline void arrive_and_expect(Barrier* barrier, int bytes) {
    emulator::atomically([&] {
        BarrierState& state = barrier_states().at(barrier);
        end_phase(barrier, state, true);  // hardware does not need somebody who waits
        if (state.missing == 0) misuse("an arrival too many at a barrier");
        state.expected += bytes;
        --state.missing;
        end_phase(barrier, state, false);
    });
}
inline void arrive(Barrier* barrier) { arrive_and_expect(barrier, 0); }

inline void wait(Barrier* barrier, int parity) {
    emulator::wait_until([barrier, parity] {
        const auto over = [&] { return static_cast<int>(barrier->state % 2) != parity; };
        if (!over()) end_phase(barrier, barrier_states().at(barrier), true);
        return over();
    });
}

inline void arrive_named(int id, int threads) {
    emulator::atomically([&] {
        NamedBarrier& barrier = named_barriers()[id];
        if (++barrier.arrived < threads) return;
        barrier.arrived = 0;
        ++barrier.phase;
    });
}
inline void wait_named(int id, int threads) {
    std::uint64_t phase = 0;
    emulator::atomically([&] { phase = named_barriers()[id].phase; });
    arrive_named(id, threads);
    emulator::wait_until([id, phase] { return named_barriers()[id].phase != phase; });
}

// ---- copies -----------------------------------------------------------------------------------------------
inline void copy_box(void* target, const TensorMap* map, int column, int row, int head, int batch,
                     Barrier* barrier) {
    BoxCopy copy{static_cast<unsigned char*>(target), {}, {column, row, head, batch}, false};
    std::memcpy(static_cast<void*>(&copy.from), map, sizeof copy.from);
    if (shared_address(target) % kSwizzleBytes != 0)
        misuse("a box that does not begin at a multiple of 1024");
    emulator::atomically([&] {
        copy.done = emulator::copies_eager();
        if (copy.done) copy.run();
        barrier_states().at(barrier).copies.push_back(copy);
    });
}
inline void publish_to_products() {}

template <int count>
void shrink_registers() {}
template <int count>
void grow_registers() {}

// ---- products ---------------------------------------------------------------------------------------------
inline void begin_products() {}
inline void commit_products() { product_queue().emplace_back(); }
template <int pending>
void wait_products() {
    ProductQueue& queue = product_queue();
    while (queue.size() > 1 + pending) {
        for (const auto& product : queue.front()) product();
        queue.pop_front();
    }
    __syncwarp();  // the warp waits as one: after it, all of its lanes have read their operands
}
template <int nt>
void pin(float (&)[nt][4]) {}

// What a descriptor of hopper_layout.h says, read back from its bits.
struct SharedMatrix {
    std::uint32_t address, leading, stride;

    explicit SharedMatrix(std::uint64_t descriptor)
        : address(static_cast<std::uint32_t>(descriptor & 0x3FFFu) << 4),
          leading(static_cast<std::uint32_t>(descriptor >> 16 & 0x3FFFu) << 4),
          stride(static_cast<std::uint32_t>(descriptor >> 32 & 0x3FFFu) << 4) {
        if (descriptor >> 62 != 1) misuse("a matrix without the 128-byte swizzle");
    }
    template <class T>
    static float load(std::uint32_t at) {
        T x;
        std::memcpy(&x, shared_byte(swizzled_128(at)), sizeof x);
        return widen(x);
    }
    // Rows of 128 bytes, eight of them 1024 bytes or `stride` from the next eight; element (n, k).
    template <class T>
    float of_rows(unsigned n, unsigned k) const {
        return load<T>(address + n / 8 * stride + n % 8 * kChunkRowBytes + 2 * k);
    }
    // Transposed: element (n, k) is in row k; 64 columns n are `leading` from the next.
    template <class T>
    float of_columns(unsigned n, unsigned k) const {
        return load<T>(address + n / kChunkColumns * leading + n % kChunkColumns * 2 + k / 8 * stride +
                       k % 8 * kChunkRowBytes);
    }
};

template <class T, int nt>
void multiply_rows(float (&c)[nt][4], std::uint64_t a_rows, std::uint64_t b_rows, int add) {
    product_queue().back().push_back([&c, a_rows, b_rows, add] {
        const SharedMatrix a(a_rows), b(b_rows);
        const unsigned row = threadIdx.x % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float left[2][16];
        for (unsigned k = 0; k < 16; ++k) {
            left[0][k] = a.of_rows<T>(row, k);
            left[1][k] = a.of_rows<T>(row + 8, k);
        }
        for (unsigned j = 0; j < nt; ++j) {
            for (unsigned e = 0; e < 4; ++e) {
                float sum = 0;
                for (unsigned k = 0; k < 16; ++k)
                    sum += left[e / 2][k] * b.of_rows<T>(8 * j + 2 * t + e % 2, k);
                c[j][e] = add != 0 ? c[j][e] + sum : sum;
            }
        }
    });
}

template <class T, int nt>
void multiply_columns(float (&c)[nt][4], const std::uint32_t (&a)[4], std::uint64_t b_columns) {
    product_queue().back().push_back([&c, &a, b_columns] {
        struct Operand {
            std::uint32_t a[4];
        };
        const SharedMatrix b(b_columns);
        float left[2][16];
        exchange(Operand{{a[0], a[1], a[2], a[3]}}, [&](const Operand* of) {
            const unsigned g = threadIdx.x % 32 / 4;
            for (unsigned k = 0; k < 16; ++k) {
                for (unsigned lower = 0; lower < 2; ++lower) {
                    const std::uint32_t pair = of[4 * g + k % 8 / 2].a[lower + 2 * (k / 8)];
                    left[lower][k] = widen(T{static_cast<std::uint16_t>(pair >> (16 * (k % 2)))});
                }
            }
        });
        const unsigned t = threadIdx.x % 4;
        for (unsigned j = 0; j < nt; ++j) {
            for (unsigned e = 0; e < 4; ++e) {
                float sum = 0;
                for (unsigned k = 0; k < 16; ++k)
                    sum += left[e / 2][k] * b.of_columns<T>(8 * j + 2 * t + e % 2, k);
                c[j][e] += sum;
            }
        }
    });
}

}  // namespace
}  // namespace fastattn::cuda
