// Host arrays through the emulated GPU: how a call is cut into units, whole calls of many units against
// cpu-reference, and what is left after failures. Units are 32 MiB, so arrays here are long in D: bytes
// without much to compute.
#include "cuda/host/staging.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "arrays.h"
#include "child_process.h"
#include "core/half.h"
#include "core/kernel.h"
#include "core/scalar_access.h"
#include "emulator.h"

namespace fastattn {
namespace {

using cuda::Chunk;
using cuda::Travel;
using cuda::Units;
using testing::message_of;
using Index = std::int64_t;

// Hundreds of calls of one thread with much to copy: minutes under this sanitizer, which has nothing to see
// there.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

constexpr std::size_t kMiB = std::size_t{1} << 20;

// ---- units ------------------------------------------------------------------------------------------
struct Cut {
    Chunk unit;
    bool same_keys;
};

std::vector<Cut> cut(const AttentionProblem& p, std::size_t unit_bytes) {
    std::vector<Cut> all;
    Units units(p, unit_bytes);
    Chunk unit;
    bool same_keys = false;
    while (units.next(unit, same_keys)) all.push_back({unit, same_keys});
    EXPECT_EQ(units.count(), static_cast<Index>(all.size()));
    return all;
}

// Anything with all axes; nothing is read.
AttentionProblem random_problem(std::mt19937& rng) {
    const auto pick = [&](std::initializer_list<Index> from) { return from.begin()[rng() % from.size()]; };
    static char something;
    AttentionProblem p;
    p.dtype = pick({0, 1}) != 0 ? DType::f32 : DType::f16;
    p.batch = pick({1, 2, 5}), p.kv_heads = pick({1, 2, 4}), p.group = pick({1, 3, 8});
    p.q_heads = p.kv_heads * p.group;
    p.q_size = pick({1, 2, 9, 100}), p.kv_size = pick({0, 1, 8, 200});
    p.head_dim = pick({8, 64}), p.value_dim = pick({8, 64});
    const Index q = p.q_size, k = p.kv_size, h = p.q_heads;
    if (pick({0, 1}) != 0) p.weights = {&something, DType::f32, h * q * k, q * k, k, 1};
    if (pick({0, 1}) != 0) p.mask = {&something, DType::boolean, q * k, 0, k, 1};
    if (pick({0, 1}) != 0) p.bias = {&something, p.dtype, 0, q * k, k, 1};
    if (pick({0, 1}) != 0) p.window_left = 20, p.has_q_offset = true, p.q_offset = 50;  // some keys only
    if (pick({0, 1}) != 0) p.lse = {&something, DType::f32, h * q, q, 1, 0};
    return p;
}

TEST(Units, CoverEverythingOnceAndRespectTheAim) {
    std::mt19937 rng(1);
    for (int round = 0; round < 500; ++round) {
        SCOPED_TRACE(round);
        const AttentionProblem p = random_problem(rng);
        for (const std::size_t aim : {std::size_t{1}, std::size_t{2} << 10, 32 * kMiB / 1024, 32 * kMiB}) {
            std::vector<int> seen(static_cast<std::size_t>(p.batch * p.kv_heads * p.q_size));
            const Chunk largest = Units(p, aim).largest();
            Chunk before;
            for (const auto& [u, same_keys] : cut(p, aim)) {
                ASSERT_GE(std::min({u.batches, u.kv_heads, u.rows}), 1);
                ASSERT_TRUE(u.batches <= largest.batches && u.kv_heads <= largest.kv_heads &&
                            u.rows <= largest.rows);
                ASSERT_EQ(u.key, cuda::whole(p).key);
                ASSERT_EQ(u.keys, cuda::whole(p).keys);
                for (Index b = u.batch; b < u.batch + u.batches; ++b)
                    for (Index h = u.kv_head; h < u.kv_head + u.kv_heads; ++h)
                        for (Index i = u.row; i < u.row + u.rows; ++i)
                            ++seen.at(static_cast<std::size_t>((b * p.kv_heads + h) * p.q_size + i));
                ASSERT_EQ(same_keys,
                          before.batches > 0 && before.batch == u.batch && before.kv_head == u.kv_head);
                if (u.batches > 1) {
                    ASSERT_EQ(u.kv_heads, p.kv_heads);
                }
                if (u.kv_heads > 1) {
                    ASSERT_EQ(u.rows, p.q_size);
                }
                // A head's keys are never divided, nor a row; up to twice the aim is not worth dividing rows
                // for.
                const cuda::BlockLayout layout = cuda::lay_out(p, u);
                const std::size_t rows = layout.bytes(Travel::in) + layout.bytes(Travel::out),
                                  slack = 8 * 256;
                if (u.batches * u.kv_heads > 1) {
                    ASSERT_LE(layout.bytes(Travel::keys) + rows, aim + slack);
                } else if (u.rows > 1) {
                    ASSERT_LE(rows, 2 * aim + slack);
                }
                before = u;
            }
            ASSERT_EQ(std::count(seen.begin(), seen.end(), 1), static_cast<std::ptrdiff_t>(seen.size()));
        }
    }
}

TEST(Units, AreNotSmallerThanNeeded) {
    AttentionProblem p;
    p.batch = 6, p.kv_heads = p.q_heads = 2, p.q_size = p.kv_size = 64, p.head_dim = p.value_dim = 64;
    const std::size_t head = 4 * 64 * 64 * 4 + 64 * 4;  // q, k, v, out, lse
    EXPECT_EQ(cut(p, 12 * head).size(), 1u);
    EXPECT_EQ(cut(p, 4 * head).size(), 3u);
    EXPECT_EQ(cut(p, head).size(), 12u);
    EXPECT_EQ(cut(p, head / 2).size(), 12u);
    EXPECT_EQ(cut(p, head / 8).size(), 12u * 5);  // rows of 12 at a time
}

TEST(Units, KeysThatNobodyMayAttendStayBehind) {
    AttentionProblem p;
    p.batch = p.kv_heads = p.q_heads = 1, p.q_size = 4, p.kv_size = 1000, p.head_dim = p.value_dim = 64;
    p.causal = true, p.window_left = 10;
    const std::vector<Cut> all = cut(p, 32 * kMiB);
    ASSERT_EQ(all.size(), 1u);
    EXPECT_EQ(all[0].unit.key, 984);  // of 986, by which rows of 16 bytes stay where they were
    EXPECT_EQ(all[0].unit.keys, 16);
    EXPECT_EQ(cuda::lay_out(p, all[0].unit).bytes(Travel::keys), 2u * 16 * 64 * 4);
}

TEST(Units, WhatIsBroadcastTravelsOnce) {
    static char something;
    AttentionProblem p;
    p.batch = 4, p.kv_heads = 2, p.group = 3, p.q_heads = 6, p.q_size = 64, p.kv_size = 256;
    p.head_dim = p.value_dim = 64;
    const auto bytes = [&](const testing::Shape& strides) {
        p.bias = {&something, DType::f32, strides[0], strides[1], strides[2], strides[3]};
        const Chunk unit{1, 2, 1, 1, 16, 32, 0, 256};
        const std::size_t with_bias = cuda::lay_out(p, unit).bytes(Travel::in);
        p.bias.data = nullptr;
        return (with_bias - cuda::lay_out(p, unit).bytes(Travel::in)) / 4;
    };
    EXPECT_EQ(bytes({5, 5, 5, 5}), 2u * 3 * 32 * 256);
    EXPECT_EQ(bytes({0, 5, 5, 5}), 3u * 32 * 256);
    EXPECT_EQ(bytes({5, 0, 5, 5}), 2u * 32 * 256);
    EXPECT_EQ(bytes({5, 5, 0, 5}), 2u * 3 * 256);
    EXPECT_EQ(bytes({5, 5, 5, 0}), 2u * 3 * 32);
    EXPECT_EQ(bytes({0, 0, 5, 5}), 0u);  // of no unit: it goes with the small arrays
}

TEST(Units, EmptyProblems) {
    for (const auto axis :
         {&AttentionProblem::batch, &AttentionProblem::kv_heads, &AttentionProblem::q_size}) {
        AttentionProblem p;
        p.batch = p.kv_heads = p.q_heads = p.q_size = p.kv_size = p.head_dim = p.value_dim = 4;
        p.*axis = 0;
        EXPECT_TRUE(cut(p, 1000).empty());
    }
}

// Who owns which byte of a block.
class Claims {
public:
    explicit Claims(std::size_t bytes) : block_(bytes + 256), owned_(bytes) {}
    std::byte* data() {
        return reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(block_.data()) + 255) / 256 *
                                            256);
    }
    // Whether the element lies in the block and nobody has been there.
    bool claim(const void* base, Index offset, std::size_t item) {
        const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(base) +
                                  static_cast<std::uintptr_t>(offset) * item -
                                  reinterpret_cast<std::uintptr_t>(data());
        if (at > owned_.size() || item > owned_.size() - at) return false;
        bool free = true;
        for (std::size_t n = at; n < at + item; ++n) free &= std::exchange(owned_[n], char{1}) == 0;
        return free;
    }

private:
    std::vector<std::byte> block_;
    std::vector<char> owned_;
};

TEST(Units, PlacedArraysLieApartInTheirBlocks) {
    std::mt19937 rng(2);
    for (int round = 0; round < 60; ++round) {
        SCOPED_TRACE(round);
        const AttentionProblem p = random_problem(rng);
        for (const auto& [u, same_keys] : cut(p, 8 << 10)) {
            const cuda::BlockLayout layout = cuda::lay_out(p, u);
            Claims keys(layout.bytes(Travel::keys)), in(layout.bytes(Travel::in)),
                out(layout.bytes(Travel::out));
            const AttentionProblem placed = cuda::placed(
                p, p, u, layout,
                {{Travel::keys, keys.data()}, {Travel::in, in.data()}, {Travel::out, out.data()}},
                DeviceType::cuda);
            const auto operand = [&](Claims& block, const Operand& x, Index heads_per, Index row, Index rows,
                                     Index dims) {
                EXPECT_TRUE(cuda::is_gemm_operand(x, p.dtype, rows, dims));
                for (Index b = u.batch; b < u.batch + u.batches; ++b)
                    for (Index h = u.kv_head * heads_per; h < (u.kv_head + u.kv_heads) * heads_per; ++h)
                        for (Index s = row; s < row + rows; ++s)
                            for (Index d = 0; d < dims; ++d) {
                                const Index at = b * x.batch + h * x.head + s * x.seq + d * x.dim;
                                if (!block.claim(x.data, at, item_size(p.dtype))) return false;
                            }
                return true;
            };
            // What a zero stride repeats is there once.
            const auto scores = [&](Claims& block, const ScoreOperand& x, Index first_key, Index n) {
                if (x.data == nullptr) return true;
                const Index first_head = u.kv_head * p.group;
                for (Index b = u.batch; b < (x.batch == 0 ? u.batch + 1 : u.batch + u.batches); ++b)
                    for (Index h = first_head; h < first_head + (x.head == 0 ? 1 : u.kv_heads * p.group); ++h)
                        for (Index i = u.row; i < (x.query == 0 ? u.row + 1 : u.row + u.rows); ++i)
                            for (Index j = first_key; j < first_key + n; ++j) {
                                const Index at = b * x.batch + h * x.head + i * x.query + j * x.key;
                                if (!block.claim(x.data, at, item_size(x.dtype))) return false;
                            }
                return true;
            };
            EXPECT_TRUE(operand(keys, placed.k, 1, u.key, u.keys, p.head_dim));
            EXPECT_TRUE(operand(keys, placed.v, 1, u.key, u.keys, p.value_dim));
            EXPECT_TRUE(operand(in, placed.q, p.group, u.row, u.rows, p.head_dim));
            EXPECT_TRUE(scores(in, placed.mask, u.key, u.keys));
            EXPECT_TRUE(scores(in, placed.bias, u.key, u.keys));
            EXPECT_TRUE(operand(out, placed.out, p.group, u.row, u.rows, p.value_dim));
            EXPECT_TRUE(scores(out, placed.lse, 0, 1));
            EXPECT_TRUE(scores(out, placed.weights, 0, p.kv_size));
            if (HasFailure()) return;
        }
    }
}

// ---- whole calls --------------------------------------------------------------------------------------
void store_real(void* data, DType dtype, std::size_t n, double x) {
    switch (dtype) {
        case DType::f64: static_cast<double*>(data)[n] = x; break;
        case DType::f32: static_cast<float*>(data)[n] = static_cast<float>(x); break;
        case DType::f16: static_cast<std::uint16_t*>(data)[n] = f64_to_f16(x); break;
        default: static_cast<std::uint16_t*>(data)[n] = f64_to_bf16(x); break;
    }
}

// Random numbers or an output, in any float dtype.
struct Numbers {
    DType dtype;
    std::vector<std::uint64_t> memory;

    Numbers(DType type, Index count, unsigned seed = 0)
        : dtype(type), memory(static_cast<std::size_t>(count) * item_size(type) / 8 + 1) {
        if (seed == 0) return;
        std::mt19937 rng(seed);
        for (std::size_t n = 0; n < static_cast<std::size_t>(count); ++n)
            store_real(memory.data(), dtype, n, static_cast<double>(rng() % 4001) / 1000.0 - 2.0);
    }
    TensorView view(const testing::Shape& shape, const testing::Shape& strides, Index first = 0) {
        auto* const bytes = reinterpret_cast<std::byte*>(memory.data());
        return testing::make_view(bytes + first * static_cast<Index>(item_size(dtype)), dtype, shape,
                                  strides);
    }
    TensorView view(const testing::Shape& shape) { return view(shape, testing::contiguous_strides(shape)); }
    double at(std::size_t n) const { return load_real(memory.data(), dtype, static_cast<Index>(n)); }
    void mark() { std::fill(memory.begin(), memory.end(), 0x4242424242424242u); }
};

struct Sizes {
    Index B, Sq, Sk, Hq, Hkv, D, Dv;
};

// The inputs are overlapping views of a few numbers, so that many bytes to transfer need little memory; all
// strides of theirs are odd ones.
struct BigCall {
    Sizes s;
    Numbers q, k, v, out, lse, weights, bias, slopes, sinks;
    std::vector<std::uint8_t> mask;
    std::vector<std::int64_t> q_lens, kv_lens, offsets;
    AttentionParams params;

    explicit BigCall(const Sizes& sizes, DType dtype = DType::f32)
        : s(sizes),
          q(dtype, s.D + 2000 * (s.B + s.Hq + s.Sq), 1),
          k(dtype, s.D + 2000 * (s.B + s.Hkv + s.Sk), 2),
          v(dtype, s.Dv + 2000 * (s.B + s.Hkv + s.Sk), 3),
          out(dtype, 2 * s.B * s.Sq * s.Hq * s.Dv),
          lse(dtype == DType::f64 ? dtype : DType::f32, s.B * s.Hq * s.Sq),
          weights(lse.dtype, s.B * s.Hq * s.Sq * s.Sk),
          bias(dtype, s.B * s.Hq * s.Sq * s.Sk, 4),
          slopes(dtype, s.B * s.Hq, 5),
          sinks(dtype, s.Hq, 6),
          mask(static_cast<std::size_t>(s.B * s.Hq * s.Sq * s.Sk)) {
        params.q = q.view({s.B, s.Sq, s.Hq, s.D}, {1009, 307, 113, 1});
        params.k = k.view({s.B, s.Sk, s.Hkv, s.D}, {1511, 211, 127, 1});
        params.v = v.view({s.B, s.Sk, s.Hkv, s.Dv}, {1301, 401, 97, 1});
        params.out = out.view({s.B, s.Sq, s.Hq, s.Dv});
        params.lse = lse.view({s.B, s.Hq, s.Sq});
        for (std::size_t n = 0; n < mask.size(); ++n) mask[n] = (n * 7 + n / 5) % 3 != 0;
        for (Index b = 0; b < s.B; ++b) {
            q_lens.push_back(s.Sq - b % (s.Sq + 1));
            kv_lens.push_back(s.Sk - b % (s.Sk + 1));
            offsets.push_back(b + 1);
        }
    }
    BigCall(const BigCall&) = delete;
    BigCall& operator=(const BigCall&) = delete;

    TensorView mask_of(const testing::Shape& shape) {
        return testing::make_view(mask.data(), DType::boolean, shape, testing::contiguous_strides(shape));
    }
    static TensorView integers(std::vector<std::int64_t>& x) {
        return testing::make_view(x.data(), DType::i64, {static_cast<Index>(x.size())}, {1});
    }
    void run(const RunOptions& options) {
        for (Numbers* x : {&out, &lse, &weights}) x->mark();
        attention_forward(make_problem(params), options);
    }
};

RunOptions on(std::string_view device) {
    RunOptions options;
    options.device = device;
    return options;
}

RunOptions reference() {
    RunOptions options;
    options.kernel = "cpu-reference";
    return options;
}

::testing::AssertionResult same(const Numbers& got, const Numbers& expected, double tolerance,
                                const char* what) {
    const std::size_t count = expected.memory.size() * 8 / item_size(expected.dtype);
    for (std::size_t n = 0; n < count; ++n) {
        const double g = got.at(n), e = expected.at(n);
        if (!(g == e || std::abs(g - e) <= tolerance * std::max(1.0, std::abs(e))))
            return ::testing::AssertionFailure() << what << " " << n << " is " << g << ", expected " << e;
    }
    return ::testing::AssertionSuccess();
}

double tolerance_of(DType dtype) {
    switch (dtype) {
        case DType::f64: return 1e-9;
        case DType::f32: return 3e-4;
        case DType::f16: return 3e-3;
        default: return 2e-2;
    }
}

struct Expected {
    Numbers out, lse, weights;
    double tolerance;
    // Gaps of the outputs, too: nobody may write there.
    void check(const BigCall& call) const {
        EXPECT_TRUE(same(call.out, out, tolerance, "out"));
        const double of_float = std::min(tolerance, 1e-3);
        EXPECT_TRUE(same(call.lse, lse, of_float, "lse"));
        EXPECT_TRUE(same(call.weights, weights, of_float, "weights"));
    }
};

Expected expected_of(BigCall& call) {
    call.run(reference());
    return {call.out, call.lse, call.weights, tolerance_of(call.out.dtype)};
}

void expect_nothing_left() {
    EXPECT_EQ(emulator::pending(), 0u);
    EXPECT_EQ(emulator::live_allocations(), 0u);
}

void check(BigCall& call, Index units) {
    EXPECT_EQ(Units(make_problem(call.params)).count(), units);
    const Expected expected = expected_of(call);
    call.run(on("cuda"));
    expected.check(call);
    expect_nothing_left();
}

constexpr Sizes kByHeads{2, 3, 5, 4, 2, 390000, 16};  // a kv head at a time
constexpr Sizes kByValues{2, 3, 5, 4, 2, 16, 390000};
constexpr Sizes kByRows{1, 9, 7, 6, 3, 950000, 8};  // four rows of a kv head, four, one
constexpr Sizes kByEntries{5, 2, 2, 1, 1, 875000, 8};  // two entries, two, one
constexpr Sizes kSmall{2, 3, 5, 4, 2, 16, 8};  // one unit

class Staging : public ::testing::Test {
protected:
    void SetUp() override { emulator::reset(); }
};

TEST_F(Staging, UnitsOfHeads) {
    for (const Sizes& sizes : {kByHeads, kByValues}) {
        BigCall call(sizes);
        call.params.weights = call.weights.view({2, 4, 3, 5});
        check(call, 4);
    }
}

TEST_F(Staging, UnitsOfHeadsRestricted) {
    BigCall call(kByHeads);
    call.params.causal = true;
    call.params.window_left = 2;
    call.params.q_lens = BigCall::integers(call.q_lens);
    call.params.kv_lens = BigCall::integers(call.kv_lens);
    check(call, 4);
}

// Of twelve keys two, then ten: what is uploaded does not begin where the caller's arrays do.
TEST_F(Staging, UnitsWithoutTheKeysThatNobodyMayAttend) {
    BigCall call({2, 2, 12, 4, 2, 600000, 16});
    call.params.window_left = call.params.window_right = 0;
    call.params.q_offset = 8;
    call.params.mask = call.mask_of({2, 1, 2, 12});
    call.params.bias = call.bias.view({4, 2, 12});
    call.params.weights = call.weights.view({2, 4, 2, 12});
    EXPECT_EQ(Units(make_problem(call.params)).largest().key, 8);
    EXPECT_EQ(Units(make_problem(call.params)).largest().keys, 2);
    check(call, 2);
    call.params.bias = call.bias.view({12});
    call.params.window_left = 2;
    EXPECT_EQ(Units(make_problem(call.params)).largest().key, 0);
    EXPECT_EQ(Units(make_problem(call.params)).largest().keys, 10);
    check(call, 4);
}

// Each array has its own way of being broadcast, and its own place in a unit.
TEST_F(Staging, UnitsOfHeadsWithSideArrays) {
    BigCall call(kByHeads);
    call.params.mask = call.mask_of({2, 1, 3, 5});
    call.params.bias = call.bias.view({4, 1, 5});
    call.params.alibi_slopes = call.slopes.view({2, 4});
    call.params.sinks = call.sinks.view({4});
    check(call, 4);
    call.params.mask = call.mask_of({1, 4, 3, 1});
    call.params.bias = call.bias.view({2, 1, 1, 5});
    check(call, 4);
    call.params.mask = call.mask_of({5});
    call.params.bias = call.bias.view({2, 4, 3, 5}, {0, 15, -5, -1}, 15 - 1);
    check(call, 4);
}

TEST_F(Staging, UnitsOfRows) {
    BigCall call(kByRows);
    call.params.weights = call.weights.view({1, 6, 9, 7});
    check(call, 9);
}

TEST_F(Staging, UnitsOfRowsWithEverything) {
    BigCall call(kByRows);
    call.params.causal = true;
    call.params.q_offsets = BigCall::integers(call.offsets);
    call.kv_lens[0] = 6;
    call.params.kv_lens = BigCall::integers(call.kv_lens);
    call.params.mask = call.mask_of({1, 1, 9, 7});
    call.params.bias = call.bias.view({6, 9, 1});
    call.params.dropout = 0.4;
    call.params.seed = 11;
    call.params.weights = call.weights.view({1, 6, 9, 7});
    check(call, 9);
}

TEST_F(Staging, UnitsOfEntries) {
    BigCall call(kByEntries);
    call.params.kv_lens = BigCall::integers(call.kv_lens);
    call.params.mask = call.mask_of({5, 1, 1, 2});
    check(call, 3);
}

// The pattern of dropout follows the problem's indices, not the unit's.
TEST_F(Staging, Dropout) {
    BigCall call(kByHeads);
    call.params.dropout = 0.5;
    call.params.seed = 3;
    check(call, 4);
}

TEST_F(Staging, StridesOfEveryKind) {
    BigCall call(kByHeads);
    const auto [B, Sq, Sk, Hq, Hkv, D, Dv] = call.s;
    call.params.q = call.q.view({B, Sq, Hq, D}, {0, -307, 113, 1}, 2 * 307);
    call.params.k = call.k.view({B, Sk, Hkv, D}, {1511, 211, 127, -1}, D - 1);
    call.params.v = call.v.view({B, Sk, Hkv, Dv}, {1301, -401, 97, 3}, 4 * 401);
    call.params.out =
        call.out.view({B, Sq, Hq, Dv}, {Sq * Hq * Dv, -Hq * Dv, Dv, -1}, Sq * Hq * Dv - Hq * Dv + Dv - 1);
    call.params.lse = call.lse.view({B, Hq, Sq}, {1, B * Sq, B});
    check(call, 4);
    call.params.out = call.out.view({B, Sq, Hq, Dv}, {2 * Sq * Hq * Dv, 2 * Hq * Dv, 2 * Dv, 2});
    check(call, 4);
}

TEST_F(Staging, LayoutBhsd) {
    BigCall call(kByHeads);
    const auto [B, Sq, Sk, Hq, Hkv, D, Dv] = call.s;
    call.params.layout = Layout::bhsd;
    call.params.q = call.q.view({B, Hq, Sq, D}, {1009, 307, 113, 1});
    call.params.k = call.k.view({B, Hkv, Sk, D}, {1511, 211, 127, 1});
    call.params.v = call.v.view({B, Hkv, Sk, Dv}, {1301, 401, 97, 1});
    call.params.out = call.out.view({B, Hq, Sq, Dv});
    check(call, 4);
}

TEST_F(Staging, OtherDtypes) {
    for (const DType dtype : {DType::f64, DType::f16, DType::bf16}) {
        SCOPED_TRACE(dtype_name(dtype));
        Sizes sizes = kByHeads;
        sizes.D = 390000 * 4 / static_cast<Index>(item_size(dtype));
        BigCall call(sizes, dtype);
        call.params.causal = true;
        call.params.bias = call.bias.view({2, 1, 3, 5});
        call.params.weights = call.weights.view({2, 4, 3, 5});
        check(call, 4);
    }
}

TEST_F(Staging, NoKeys) {
    BigCall call({2, 3, 0, 4, 2, 700000, 8});
    call.params.sinks = call.sinks.view({4});
    check(call, 4);
}

// ---- what can go wrong -----------------------------------------------------------------------------------
TEST_F(Staging, TooLittleMemoryNamesTheBytesThatExplainNames) {
    BigCall call(kByHeads);
    const Expected expected = expected_of(call);
    const auto bytes =
        static_cast<std::size_t>(explain(make_problem(call.params), on("cuda")).workspace_bytes);
    emulator::set_memory_limit(bytes - 1);
    EXPECT_EQ(
        message_of<OutOfMemory>([&] { call.run(on("cuda")); }),
        "fastattn: no memory for the device's workspace: " + std::to_string(bytes) + " bytes asked for");
    expect_nothing_left();
    emulator::set_memory_limit(bytes);
    call.run(on("cuda"));
    expected.check(call);
}

struct Polls {
    int calls = 0, stop_at = 1;
    static bool poll(void* context) {
        auto& self = *static_cast<Polls*>(context);
        return ++self.calls >= self.stop_at;
    }
};

TEST_F(Staging, CancelledAtOnceAndOnTheWay) {
    BigCall call(kByRows);
    call.params.causal = true;
    const Expected expected = expected_of(call);
    for (const int stop_at : {1, 2, 3}) {  // 20 ms apart
        Polls polls;
        polls.stop_at = stop_at;
        RunOptions options = on("cuda");
        options.poll = Polls::poll;
        options.poll_context = &polls;
        EXPECT_THROW(call.run(options), Cancelled);
        EXPECT_EQ(polls.calls, stop_at);
        expect_nothing_left();
    }
    call.run(on("cuda"));
    expected.check(call);
}

// Every call of a function fails once, one after another. The last `tidying` of a call's are of tidying up,
// whose failure nobody is told.
void fail_everywhere(BigCall& call, const Expected& expected, const char* function, int code,
                     const std::function<void(const char*, const std::string&)>& check_thrown,
                     std::size_t tidying = 0) {
    emulator::reset();
    call.run(on("cuda"));
    const std::size_t calls = emulator::calls(function);
    ASSERT_GT(calls, tidying) << function;
    const std::size_t pinned = emulator::live_pinned(), streams = emulator::live_streams();
    for (std::size_t n = 0; n < calls; ++n) {
        SCOPED_TRACE(::testing::Message() << function << ", call " << n << " of " << calls);
        emulator::fail_next(function, code, n);
        std::string kind = "nothing", message;
        try {
            call.run(on("cuda"));
        } catch (const CudaError& error) {
            kind = error.sticky ? "sticky" : "CudaError";
            message = error.what();
        } catch (const OutOfMemory& error) {
            kind = "OutOfMemory";
            message = error.what();
        }
        if (n < calls - tidying) {
            check_thrown(kind.c_str(), message);
        } else {
            EXPECT_EQ(kind, "nothing") << message;
            expected.check(call);
            emulator::synchronize_all();
        }
        expect_nothing_left();
        EXPECT_EQ(emulator::live_pinned(), pinned);
        EXPECT_EQ(emulator::live_streams(), streams);
        if (::testing::Test::HasFailure()) return;
    }
    call.run(on("cuda"));
    expected.check(call);
}

void expect_sticky(const char* kind, const std::string& message) {
    EXPECT_STREQ(kind, "sticky");
    EXPECT_NE(message.find("cudaErrorIllegalAddress"), std::string::npos) << message;
    EXPECT_NE(message.find("must restart"), std::string::npos) << message;
}

void expect_cublas_error(const char* kind, const std::string& message) {
    EXPECT_STREQ(kind, "CudaError");
    EXPECT_EQ(message, "cuBLAS: a product failed: CUBLAS_STATUS_EXECUTION_FAILED");
}

void expect_no_memory(const char* kind, const std::string& message) {
    EXPECT_STREQ(kind, "OutOfMemory");
    EXPECT_NE(message.find("no memory for"), std::string::npos) << message;
}

TEST_F(Staging, FailuresBetweenUnits) {
    if (kThreadSanitizer) GTEST_SKIP() << "too slow";
    BigCall call({1, 1, 5, 3, 3, 720000, 8});
    ASSERT_EQ(Units(make_problem(call.params)).count(), 3);
    const Expected expected = expected_of(call);
    for (const char* function : {"record", "wait", "copy", "query", "launch", "allocate"})
        fail_everywhere(call, expected, function, 700, expect_sticky);
    fail_everywhere(call, expected, "Matmul", 13, expect_cublas_error);
    fail_everywhere(call, expected, "allocate", 2, expect_no_memory);
}

TEST_F(Staging, FailuresWithSideArrays) {
    BigCall call(kSmall);
    call.params.mask = call.mask_of({2, 1, 3, 5});
    call.params.kv_lens = BigCall::integers(call.kv_lens);
    call.params.sinks = call.sinks.view({4});
    const Expected expected = expected_of(call);
    for (const char* function : {"current_device", "record", "wait", "copy", "query", "launch"}) {
        fail_everywhere(call, expected, function, 700, expect_sticky);
        fail_everywhere(call, expected, function, 2, expect_no_memory);
    }
    fail_everywhere(call, expected, "free_host_after", 700, expect_sticky);
}

// Page-locked memory that could not grow is no reason to lose what was there, or to keep more and more.
TEST_F(Staging, DISABLED_PageLockedMemory) {
    for (std::size_t n = 0; n < 6; ++n) {
        const Index dims = 5000 * static_cast<Index>(n + 1);
        BigCall call({2, 3, 5, 4, 2, dims, dims});
        const Expected expected = expected_of(call);
        emulator::fail_next("allocate_pinned", 2, n);
        const std::string message = message_of<OutOfMemory>([&] { call.run(on("cuda")); });
        EXPECT_NE(message.find("page-locked memory for the transfers"), std::string::npos) << message;
        expect_nothing_left();
        EXPECT_LE(emulator::live_pinned(), 6u);
        for (int again = 0; again < 2; ++again) {
            call.run(on("cuda"));
            expected.check(call);
            EXPECT_EQ(emulator::live_pinned(), 6u);
        }
    }
}

// From the first call of a process on, whatever comes fails once.
TEST_F(Staging, DISABLED_FirstCalls) {
    ASSERT_EQ(cuda_unavailable(), nullptr);
    BigCall call(kSmall);
    call.params.kv_lens = BigCall::integers(call.kv_lens);
    const Expected expected = expected_of(call);
    const auto fails = [&](const char* function, int code, std::size_t after) {
        emulator::fail_next(function, code, after);
        bool thrown = true;
        try {
            call.run(on("cuda:1"));
            thrown = false;
        } catch (const CudaError&) {
        } catch (const OutOfMemory&) {
            EXPECT_EQ(code, 2);
        }
        if (!thrown) expected.check(call);
        emulator::reset();  // a failure that was not reached
        cuda::runtime::set_device(0);  // putting it back may have been what failed
        EXPECT_EQ(emulator::pending(), 0u);
        return thrown;
    };
    for (const char* function : {"set_device", "properties", "create_pool", "Create"})
        EXPECT_TRUE(fails(function, 700, 0)) << function;
    for (std::size_t n = 0; n < 3; ++n) EXPECT_TRUE(fails("create_stream", 700, n));
    for (std::size_t n = 0; n < 7; ++n) EXPECT_TRUE(fails("create_event", 700, n));
    EXPECT_EQ(emulator::live_streams(), 1u);  // the device's own
    EXPECT_EQ(emulator::live_events(), 0u);
    call.run(on("cuda:1"));
    const std::size_t streams = emulator::live_streams();
    int failed = 0, succeeded = 0;
    for (std::size_t n = 0; succeeded < 20; ++n) {  // a failure of tidying up is not told
        SCOPED_TRACE(::testing::Message() << "call " << n);
        (fails("*", n % 2 == 0 ? 700 : 2, n / 2) ? failed : succeeded) += 1;
        EXPECT_LE(emulator::live_pinned(), 6u);
        ASSERT_FALSE(HasFailure());
    }
    EXPECT_GT(failed, 40);
    call.run(on("cuda:1"));
    expected.check(call);
    EXPECT_EQ(emulator::live_streams(), streams);  // one lane serves them all
}

// What shows only while a process has no lanes yet.
TEST(FreshProcess, Passes) {
    for (const char* test : {"Staging.DISABLED_PageLockedMemory", "Staging.DISABLED_FirstCalls"}) {
        const testing::ChildResult child = testing::run_test_in_child(test, {});
        if (!child.started) GTEST_SKIP() << "this binary cannot start itself here";
        EXPECT_TRUE(child.passed) << child.output;
    }
}

// ---- several threads --------------------------------------------------------------------------------------
TEST_F(Staging, ThreadsOnTwoDevices) {
    constexpr int kThreads = 4;
    std::vector<std::string> wrong(kThreads, "did not run");
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            const int current = t / 2;
            cuda::runtime::set_device(current);
            std::string& problem = wrong[static_cast<std::size_t>(t)];
            problem.clear();
            for (int round = 0; round < 6; ++round) {
                Sizes sizes = round == 3 ? kByHeads : kSmall;
                if (round != 3) sizes.Sq += t;
                BigCall call(sizes);
                call.params.causal = round % 2 == 0;
                const Expected expected = expected_of(call);
                call.run(on((t + round) % 2 == 0 ? "cuda:0" : "cuda:1"));
                int after = -1;
                cuda::runtime::current_device(&after);
                if (after != current) problem += " device";
                if (!same(call.out, expected.out, expected.tolerance, "out")) problem += " out";
                if (!same(call.lse, expected.lse, 1e-3, "lse")) problem += " lse";
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, std::vector<std::string>(kThreads));
    expect_nothing_left();
}

}  // namespace
}  // namespace fastattn
