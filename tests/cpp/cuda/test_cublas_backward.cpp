// The backward pass of cuda-cublas on the emulated GPU against cpu-reference: host arrays (staged) and device
// arrays. Both get out and lse of the reference's forward.
#include <limits>

#include "core/kernel.h"
#include "cuda/cublas/backward.h"
#include "cuda/host/staging.h"
#include "emulator.h"
#include "training.h"

namespace fastattn {
namespace {

using cuda::Chunk;
using cuda::Travel;
using cuda::Units;
using testing::AnyArray;
using testing::expect_close;
using testing::kFeatures;
using testing::message_of;
using testing::Sizes;
using testing::Training;
using Index = std::int64_t;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;  // each of a block's 256 threads is one of the machine's
#else
constexpr bool kThreadSanitizer = false;
#endif

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
const std::vector<DType> kAllDtypes{DType::f64, DType::f32, DType::f16, DType::bf16};
// float16 has all that the others have.
const std::vector<DType> kDtypes = kThreadSanitizer ? std::vector{DType::f16} : kAllDtypes;
const std::vector<DType> kTwoDtypes = kThreadSanitizer ? kDtypes : std::vector{DType::f32, DType::f16};
const Sizes kSmall{2, 5, 9, 4, 2, 8, 16};

enum class Where { host, device, device_with_host_sides };
const std::vector<Where> kEverywhere =
    kThreadSanitizer ? std::vector{Where::device}
                     : std::vector{Where::host, Where::device, Where::device_with_host_sides};

void place(BackwardParams& b, Where where) {
    if (where == Where::host) return;
    AttentionParams& f = b.forward;
    for (TensorView* view : {&f.q, &f.k, &f.v, &f.out, &f.lse, &b.dout, &b.dlse, &b.dq, &b.dk, &b.dv,
                             &b.dbias, &b.dalibi_slopes, &b.dsinks})
        view->device = {DeviceType::cuda, 0};
    for (TensorView* view :
         {&f.mask, &f.bias, &f.alibi_slopes, &f.sinks, &f.q_lens, &f.kv_lens, &f.q_offsets})
        if (where == Where::device) view->device = {DeviceType::cuda, 0};
}

void mark(Training& t) {
    for (AnyArray* x : {&t.dq, &t.dk, &t.dv, &t.dbias, &t.dslopes, &t.dsinks}) x->fill(-7.0);
}

void forward(Training& t) {
    RunOptions options;
    options.kernel = "cpu-reference";
    attention_forward(make_problem(t.params), options);
}

void backward(Training& t, Where where, const RunOptions& options) {
    mark(t);
    BackwardParams b = t.backward;
    b.forward = t.params;
    place(b, where);
    attention_backward(make_backward_problem(b), options);
    emulator::synchronize_all();
}

RunOptions on_gpu() {
    RunOptions options;
    options.kernel = "cuda-cublas";
    return options;
}

RunOptions on_cpu() {
    RunOptions options;
    options.kernel = "cpu-reference";
    return options;
}

using Set = std::function<void(Training&)>;

void check(DType dtype, const Sizes& n, const Set& set, const std::string& what,
           const std::vector<Where>& places = kEverywhere, double slack = 1.0) {
    Training got(dtype, n), want(dtype, n);
    set(got), set(want);
    forward(want);
    got.out = want.out, got.lse = want.lse;
    backward(want, Where::host, on_cpu());
    for (const Where where : places) {
        // Assignment has moved the data of vectors; the views are made again.
        got.params.out.data = got.out.data(), got.params.lse.data = got.lse.data();
        backward(got, where, on_gpu());
        expect_close(got, want,
                     what + " " + dtype_name(dtype) + " place " + std::to_string(static_cast<int>(where)),
                     slack);
        EXPECT_EQ(emulator::live_allocations(), 0u);
        if (::testing::Test::HasFailure()) return;
    }
}

// The first and the last, none and all of them, where time is short.
std::vector<testing::Feature> features() {
    return kThreadSanitizer ? std::vector{kFeatures.front(), kFeatures.back()} : kFeatures;
}

class Backward : public ::testing::Test {
protected:
    void SetUp() override { emulator::reset(); }
};

// ---- arguments --------------------------------------------------------------------------------------------
TEST_F(Backward, EveryFeatureInEveryDtype) {
    const Sizes sizes[] = {kSmall, {2, 1, 13, 6, 2, 16, 8}, {3, 17, 17, 4, 1, 24, 40}, {1, 3, 1, 4, 2, 1, 3}};
    for (const Sizes& n : sizes)
        for (const auto& feature : features())
            for (const DType dtype : kDtypes)
                check(dtype, n, feature.set, std::string(feature.name) + " Sq=" + std::to_string(n.Sq));
}

TEST_F(Backward, PairsOfFeatures) {
    if (kThreadSanitizer) GTEST_SKIP() << "too slow";
    for (std::size_t a = 1; a + 1 < kFeatures.size(); ++a)
        for (std::size_t b = a + 1; b + 1 < kFeatures.size(); ++b)
            for (const DType dtype : kTwoDtypes)
                check(dtype, kSmall, [&](Training& t) { kFeatures[a].set(t), kFeatures[b].set(t); },
                      std::string(kFeatures[a].name) + " and " + kFeatures[b].name,
                      {Where::host, Where::device});
}

TEST_F(Backward, WithoutDlseOrDbias) {
    check(
        DType::f32, kSmall, [](Training& t) { t.backward.dlse = {}, t.add_bias(), t.backward.dbias = {}; },
        "without");
}

TEST_F(Backward, PositionsOfTheirOwn) {
    for (const Index offset : {Index{0}, Index{7}, Index{-3}, INT64_MIN, INT64_MAX})
        check(
            DType::f32, kSmall, [&](Training& t) { t.params.causal = true, t.params.q_offset = offset; },
            "offset");
}

// Every way of being broadcast, with the gradient of a softcap, which is not that of the bias.
TEST_F(Backward, AxesOfBias) {
    for (int axes = 0; axes < 16; axes += kThreadSanitizer ? 5 : 1) {
        for (const DType dtype : kTwoDtypes) {
            const Sizes n{3, 5, 40, 4, 2, 8, 8};
            const testing::Shape all{n.B, n.Hq, n.Sq, n.Sk};
            testing::Shape shape;
            for (int axis = 0; axis < 4; ++axis)
                shape.push_back((axes >> axis & 1) != 0 ? all[static_cast<std::size_t>(axis)] : 1);
            check(
                dtype, n,
                [&](Training& t) {
                    t.bias = AnyArray(dtype, shape, 3), t.dbias = AnyArray(dtype, shape, 0, false);
                    t.add_bias();
                    t.params.causal = true;
                    if (axes % 3 == 0) t.params.softcap = 1.5;
                },
                "axes " + std::to_string(axes));
        }
    }
}

TEST_F(Backward, SlopesOfEachEntry) {
    check(
        DType::f32, kSmall,
        [](Training& t) {
            t.slopes = AnyArray(DType::f16, {2, 4}, 3), t.dslopes = AnyArray(DType::f16, {2, 4}, 0, false);
            t.add_slopes();
            t.sinks = AnyArray(DType::f64, {4}, 5), t.dsinks = AnyArray(DType::f64, {4}, 0, false);
            t.sinks.f64[1] = -INFINITY;
            t.add_sinks();
        },
        "slopes");
}

// ---- shapes and layouts -----------------------------------------------------------------------------------
// Scores of some KiB at a time: tiles of rows, one head after another.
TEST_F(Backward, ManyChunks) {
    for (const std::size_t bytes : {std::size_t{64} << 10, std::size_t{6} << 10, std::size_t{1}}) {
        if (kThreadSanitizer && bytes != std::size_t{6} << 10) continue;
        emulator::set_l2_bytes(bytes);
        const Sizes n = bytes > 10000 ? Sizes{2, 150, 90, 4, 2, 8, 8} : Sizes{2, 21, 30, 4, 2, 8, 8};
        for (const auto& feature : features()) {
            const std::string name = feature.name;
            if (bytes < 10000 || name == "plain" || name == "causal" || name == "all")
                for (const DType dtype : kTwoDtypes)
                    check(dtype, n, feature.set, name + " in chunks", {Where::device_with_host_sides});
        }
    }
}

// Rows that are the work of a block.
TEST_F(Backward, LongRows) {
    const Index keys = kThreadSanitizer ? 1025 : 1500;
    for (const DType dtype : kTwoDtypes) {
        check(dtype, {1, 3, keys, 2, 1, 4, 4}, kFeatures.front().set, "long", {Where::device});
        check(dtype, {1, 3, keys, 2, 1, 4, 4}, kFeatures.back().set, "long with all", {Where::device});
    }
}

// Queries grouped in each of the ways: heads of a position side by side, positions of a head, neither.
TEST_F(Backward, LayoutBhsd) {
    for (const Sizes n :
         {Sizes{2, 5, 7, 4, 2, 8, 8}, Sizes{2, 5, 7, 6, 1, 8, 8}, Sizes{1, 9, 7, 4, 2, 16, 8}}) {
        for (const DType dtype : kDtypes) {
            check(dtype, n, [](Training&) {}, "bshd");
            check(
                dtype, n,
                [](Training& t) {
                    t.params.layout = Layout::bhsd;
                    for (TensorView* x : {&t.params.q, &t.params.k, &t.params.v, &t.params.out,
                                          &t.backward.dout, &t.backward.dq, &t.backward.dk, &t.backward.dv}) {
                        // The same memory, read as (B, H, S, D).
                        std::swap(x->shape[1], x->shape[2]);
                        x->strides[1] = x->shape[2] * x->shape[3];
                        x->strides[2] = x->shape[3];
                    }
                },
                "bhsd");
        }
    }
}

TEST_F(Backward, NegativeStrides) {
    for (const int axis : {0, 1, 2, 3}) {
        for (const DType dtype : kTwoDtypes) {
            check(
                dtype, kSmall,
                [&](Training& t) {
                    t.params.causal = axis == 1;
                    for (TensorView* x : {&t.params.q, &t.params.k, &t.params.v, &t.backward.dout,
                                          &t.backward.dq, &t.backward.dk, &t.backward.dv}) {
                        auto* const data = static_cast<std::byte*>(x->data);
                        x->data = data + (x->shape[axis] - 1) * x->strides[axis] *
                                             static_cast<Index>(item_size(dtype));
                        x->strides[axis] = -x->strides[axis];
                    }
                },
                "axis " + std::to_string(axis));
        }
    }
}

TEST_F(Backward, EmptyAxes) {
    for (const Sizes n : {Sizes{0, 3, 3, 2, 1, 4, 4}, Sizes{2, 0, 3, 2, 1, 4, 4}, Sizes{2, 3, 0, 2, 1, 4, 4},
                          Sizes{2, 3, 3, 0, 0, 4, 4}})
        for (const DType dtype : kDtypes) {
            check(dtype, n, [](Training& t) { t.add_bias(), t.add_slopes(), t.add_sinks(); }, "empty");
            check(
                dtype, n,
                [&](Training& t) {
                    t.bias = AnyArray(dtype, {1, 1, 1, 1}, 3),
                    t.dbias = AnyArray(dtype, {1, 1, 1, 1}, 0, false);
                    t.add_bias();
                },
                "empty with a bias that is not");
        }
}

// ---- numbers ----------------------------------------------------------------------------------------------
// dS of float16 around and beyond what it can hold: without its unit it would be 0, or Inf. dq and dk are of
// usual size.
TEST_F(Backward, GradientsBeyondTheRangeOfFloat16) {
    const Sizes n{1, 7, 20, 2, 1, 16, 16};
    const auto sized = [&](double q, double k, double v, double dout) {
        return [=](Training& t) {
            const auto scaled = [](AnyArray& x, double by) {
                for (std::size_t i = 0; i < x.bits.size(); ++i) x.bits[i] = f64_to_f16(x[i] * by);
            };
            scaled(t.q, q), scaled(t.k, k), scaled(t.v, v), scaled(t.dout, dout);
            t.params.scale = 1.0, t.backward.dlse = {};
        };
    };
    const auto largest_error = [&](const Set& set, AnyArray Training::* which) {
        Training got(DType::f16, n), want(DType::f16, n);
        set(got), set(want);
        forward(want);
        got.out = want.out, got.lse = want.lse;
        got.params.out.data = got.out.data(), got.params.lse.data = got.lse.data();
        backward(want, Where::host, on_cpu());
        backward(got, Where::device, on_gpu());
        double top = 0, error = 0;
        for (std::size_t i = 0; i < (want.*which).size(); ++i) {
            const double y = (want.*which)[i], at = std::abs((got.*which)[i] - y);
            EXPECT_TRUE(std::isfinite(y));
            top = std::max(top, std::abs(y));
            error = at <= error || std::isnan(error) ? error : at;
        }
        EXPECT_GT(top, 1e-3);
        return error / top;
    };
    EXPECT_LE(largest_error(sized(1e-4, 3e3, 1e-3, 1e-3), &Training::dq), 4e-3);  // dS of 1e-8
    EXPECT_LE(largest_error(sized(1e-4, 1e2, 30, 1e4), &Training::dk), 4e-3);  // dS of 1e5
}

TEST_F(Backward, MaskedNanAndInf) {
    for (const double poison : {kNan, double(INFINITY)}) {
        if (kThreadSanitizer && !std::isnan(poison)) continue;
        for (const DType dtype : kDtypes) {
            const auto put = [&](AnyArray& x, Index row, Index rows, Index heads, Index dims) {
                for (Index b = 0; b < x.shape[0]; ++b)
                    for (Index e = 0; e < heads * dims; ++e) {
                        const auto at = static_cast<std::size_t>((b * rows + row) * heads * dims + e);
                        if (dtype == DType::f64) x.f64[at] = poison;
                        if (dtype == DType::f32) x.f32[at] = static_cast<float>(poison);
                        if (dtype == DType::f16) x.bits[at] = f64_to_f16(poison);
                        if (dtype == DType::bf16) x.bits[at] = f64_to_bf16(poison);
                    }
            };
            const Sizes n{2, 6, 9, 4, 2, 8, 8};
            const Set masked = [&](Training& t) {
                put(t.k, 8, n.Sk, n.Hkv, n.D), put(t.v, 8, n.Sk, n.Hkv, n.Dv);
                put(t.q, 5, n.Sq, n.Hq, n.D), put(t.dout, 5, n.Sq, n.Hq, n.Dv);
                std::fill(t.q_lens.data.begin(), t.q_lens.data.end(), 5);
                std::fill(t.kv_lens.data.begin(), t.kv_lens.data.end(), 8);
                t.params.q_lens = t.q_lens.view(), t.params.kv_lens = t.kv_lens.view();
            };
            check(dtype, n, masked, "padding");
            check(dtype, n, [&](Training& t) { masked(t), kFeatures.back().set(t); }, "padding with all");
            // Some rows attend what holds it: one array at a time, as from each it goes its own way.
            for (int which = 0; which < 4; ++which)
                check(
                    dtype, n,
                    [&](Training& t) {
                        if (which == 0) put(t.k, 7, n.Sk, n.Hkv, n.D);
                        if (which == 1) put(t.v, 6, n.Sk, n.Hkv, n.Dv);
                        if (which == 2) put(t.q, 2, n.Sq, n.Hq, n.D);
                        if (which == 3) put(t.dout, 3, n.Sq, n.Hq, n.Dv);
                        t.params.causal = true;
                    },
                    "causal, array " + std::to_string(which));
        }
    }
}

// Rows whose lse says nothing of their weights.
TEST_F(Backward, LseAtTheLimit) {
    for (const double value : {-3e38, -3.4028234663852886e38}) {
        for (const DType dtype : {DType::f32, DType::bf16}) {
            check(
                dtype, {2, 5, 20, 4, 2, 8, 8},
                [&](Training& t) {
                    t.add_bias(), t.add_sinks();
                    t.bias.fill(value);
                    t.sinks.fill(-INFINITY);
                },
                "bias of " + std::to_string(value));
        }
    }
    check(
        DType::f64, {2, 5, 20, 4, 2, 8, 8},
        [&](Training& t) { t.add_bias(), t.bias.fill(-std::numeric_limits<double>::max()); }, "of float64");
}

// A barrier that is missing shows in one order of a block's threads or the other.
TEST_F(Backward, ThreadsFromTheLastOne) {
    emulator::set_threads_reversed(true);
    for (const DType dtype : kDtypes) {
        check(dtype, {2, 9, 1100, 2, 1, 8, 8}, kFeatures.back().set, "reversed", {Where::device});
        check(dtype, kSmall, kFeatures.back().set, "reversed", {Where::device});
    }
}

TEST_F(Backward, SameBitsTwice) {
    for (const DType dtype : kDtypes) {
        Training t(dtype, {2, 33, 65, 4, 2, 16, 16});
        kFeatures.back().set(t);
        forward(t);
        std::vector<double> first;
        for (int round = 0; round < 2; ++round) {
            backward(t, Where::device, on_gpu());
            std::vector<double> all;
            for (const AnyArray* x : t.gradients())
                for (std::size_t i = 0; i < x->size(); ++i) all.push_back((*x)[i]);
            if (round == 0) first = all;
            EXPECT_EQ(first, all);
        }
    }
}

// 2 GiB of scores for each head.
TEST_F(Backward, MemoryGrowsWithRowsAndKeysNotTheirProduct) {
    static char something;
    const auto bytes = [](Index size) {
        BackwardProblem b;
        AttentionProblem& p = b.forward;
        p.batch = 1, p.q_heads = p.kv_heads = 8, p.q_size = p.kv_size = size;
        p.head_dim = p.value_dim = 64, p.causal = true;
        p.bias = b.dbias = {&something, DType::f32, 0, 0, 0, 1};  // of the keys alone
        const cuda::CublasBackward kernel(cuda::context(0), false);
        return kernel.workspace_bytes(b, b, cuda::whole(p)) + kernel.sums_bytes(b);
    };
    const std::size_t small = bytes(1 << 13), large = bytes(1 << 15), row = 8 * 64 * 4;
    // Copies of q, k, v and dout, three of them a second time, sums of dq, dk and dv; what is left is small
    // beside a row.
    EXPECT_LE(large - small, (12 * row) * ((1 << 15) - (1 << 13)));
    EXPECT_LE(small, (12 * row) * (1 << 13) + (std::size_t{64} << 20));
}

TEST_F(Backward, Tf32OnlyWhenAskedFor) {
    Training t(DType::f32, {1, 5, 9, 1, 1, 8, 8});
    forward(t);
    emulator::take_matmuls();
    backward(t, Where::device, on_gpu());
    std::size_t products = 0;
    for (const auto& product : emulator::take_matmuls()) {
        EXPECT_EQ(product.compute, cuda::cublas::kCompute32F);
        ++products;
    }
    EXPECT_EQ(products, 5u);
}

// ---- host arrays ------------------------------------------------------------------------------------------
TEST(BackwardUnits, CoverEveryHeadOnce) {
    for (const std::size_t aim : {std::size_t{1}, std::size_t{4} << 10, std::size_t{32} << 20}) {
        Training t(DType::f32, {3, 5, 9, 8, 4, 16, 8});
        t.add_bias();
        const BackwardProblem b = t.problem();
        Units units(b, aim);
        const Chunk largest = units.largest();
        std::vector<int> seen(12);
        Index n = 0;
        bool same_keys = true;
        for (Chunk unit; units.next(unit, same_keys); ++n) {
            EXPECT_FALSE(same_keys);
            EXPECT_LE(unit.batches, largest.batches);
            EXPECT_LE(unit.kv_heads, largest.kv_heads);
            EXPECT_EQ(unit.rows, 5);
            EXPECT_EQ(unit.keys, 9);
            if (unit.batches > 1) {
                EXPECT_EQ(unit.kv_heads, 4);
            }
            const cuda::BlockLayout layout = cuda::lay_out(b, unit);
            if (unit.batches * unit.kv_heads > 1) {
                EXPECT_LE(layout.bytes(Travel::keys) + layout.bytes(Travel::in) + layout.bytes(Travel::out),
                          aim);
            }
            for (Index e = unit.batch; e < unit.batch + unit.batches; ++e)
                for (Index h = unit.kv_head; h < unit.kv_head + unit.kv_heads; ++h)
                    ++seen[static_cast<std::size_t>(e * 4 + h)];
        }
        EXPECT_EQ(seen, std::vector<int>(12, 1));
        EXPECT_EQ(n, units.count());
    }
}

// 32 MiB and more for each head.
const Sizes kBig{1, 3, 5, 6, 3, 560000, 8};

void several_units(Training& t) {
    kFeatures.back().set(t);
    t.params.scale = 1e-3;
}

TEST_F(Backward, SeveralUnits) {
    for (const bool whole_bias : {false, true}) {
        check(
            DType::f32, kBig,
            [&](Training& t) {
                if (whole_bias) {
                    t.bias = AnyArray(DType::f32, {1, 6, 3, 5}, 3);
                    t.dbias = AnyArray(DType::f32, {1, 6, 3, 5}, 0, false);
                }
                several_units(t);
                EXPECT_EQ(Units(t.problem()).count(), 3);
            },
            "units", {Where::host}, 10);  // sums of half a million terms
    }
}

struct Polls {
    int calls = 0, stop_at = 1;
    static bool poll(void* context) {
        auto& self = *static_cast<Polls*>(context);
        return ++self.calls >= self.stop_at;
    }
};

TEST_F(Backward, Cancelled) {
    Training t(DType::f32, kBig);
    forward(t);
    for (const int stop_at : {1, 2}) {
        Polls polls;
        polls.stop_at = stop_at;
        RunOptions options = on_gpu();
        options.poll = Polls::poll;
        options.poll_context = &polls;
        EXPECT_THROW(backward(t, Where::host, options), Cancelled);
        EXPECT_EQ(polls.calls, stop_at);
        EXPECT_EQ(emulator::pending(), 0u);
        EXPECT_EQ(emulator::live_allocations(), 0u);
    }
}

// ---- what can go wrong ------------------------------------------------------------------------------------
TEST_F(Backward, TooLittleMemory) {
    for (const Where where : kEverywhere) {
        Training t(DType::f32, kSmall);
        kFeatures.back().set(t);
        forward(t);
        emulator::set_memory_limit(std::size_t{1} << 20);
        const std::string message = message_of<OutOfMemory>([&] { backward(t, where, on_gpu()); });
        EXPECT_NE(message.find("no memory for the device's workspace: "), std::string::npos) << message;
        EXPECT_EQ(emulator::live_allocations(), 0u);
        emulator::reset();
        backward(t, where, on_gpu());
    }
}

// Every call of a function fails once, one after another.
TEST_F(Backward, FailuresEverywhere) {
    if (kThreadSanitizer) GTEST_SKIP() << "too slow";
    for (const Where where : kEverywhere) {
        Training t(DType::f16, kSmall), want(DType::f16, kSmall);
        for (Training* x : {&t, &want}) kFeatures.back().set(*x), forward(*x);
        backward(want, Where::host, on_cpu());
        for (const char* function :
             {"allocate", "copy", "launch", "record", "wait", "query", "Matmul", "free_host_after"}) {
            emulator::reset();
            backward(t, where, on_gpu());
            const std::size_t calls = emulator::calls(function);
            for (std::size_t n = 0; n < calls; ++n) {
                SCOPED_TRACE(::testing::Message() << function << ", call " << n << " of " << calls);
                emulator::fail_next(function, std::string(function) == "Matmul" ? 13 : 700, n);
                EXPECT_THROW(backward(t, where, on_gpu()), CudaError);
                emulator::synchronize_all();
                EXPECT_EQ(emulator::live_allocations(), 0u);
                EXPECT_EQ(emulator::pending(), 0u);
                ASSERT_FALSE(HasFailure());
            }
        }
        backward(t, where, on_gpu());
        expect_close(t, want, "after failures");
    }
}

TEST_F(Backward, CapturedCallsNeedTheirSideArraysOnTheDevice) {
    Training t(DType::f32, kSmall);
    kFeatures.back().set(t);
    forward(t);
    emulator::set_capturing(true);
    const std::string message =
        message_of<UnsupportedError>([&] { backward(t, Where::device_with_host_sides, on_gpu()); });
    EXPECT_NE(message.find("CUDA graph"), std::string::npos) << message;
    EXPECT_NO_THROW(backward(t, Where::device, on_gpu()));
}

TEST_F(Backward, TheFusedKernelSaysThatItHasNone) {
    Training t(DType::f16, kSmall);
    forward(t);
    RunOptions options;
    options.kernel = "cuda-flash-sm80";
    EXPECT_EQ(message_of<UnsupportedError>([&] { backward(t, Where::host, options); }),
              "kernel: \"cuda-flash-sm80\" cannot compute this call: it has no backward pass");
}

}  // namespace
}  // namespace fastattn
