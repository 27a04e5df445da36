// cuda-cublas on the emulated GPU against cpu-reference: every argument, host arrays (staged) and device
// arrays. Numbers are compared here with a plain tolerance; the error gate is the Python tests' matter.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "arrays.h"
#include "core/kernel.h"
#include "emulator.h"

namespace fastattn {
namespace {

using testing::Array;
using testing::Call;
using testing::random_array;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A call with every optional array at hand; a case switches on what it tests.
struct FullCall : Call {
    Array<float> lse, weights, bias, slopes, sinks;
    Array<std::uint8_t> mask;
    Array<std::int64_t> q_lens, kv_lens;

    FullCall(std::int64_t B, std::int64_t Sq, std::int64_t Sk, std::int64_t Hq, std::int64_t Hkv,
             std::int64_t D, std::int64_t Dv)
        : Call(B, Sq, Sk, Hq, Hkv, D, Dv),
          lse({B, Hq, Sq}, -7.0f),
          weights({B, Hq, Sq, Sk}, -7.0f),
          bias(random_array<float>({B, Hq, Sq, Sk}, 4)),
          slopes(random_array<float>({B, Hq}, 5)),
          sinks(random_array<float>({Hq}, 6)),
          mask({B, 1, Sq, Sk}),
          q_lens({B}),
          kv_lens({B}) {
        for (std::size_t n = 0; n < mask.data.size(); ++n) mask[n] = (n * 7 + n / 5) % 3 != 0;
        for (std::int64_t b = 0; b < B; ++b) {
            q_lens[static_cast<std::size_t>(b)] = Sq - b % (Sq + 1);
            kv_lens[static_cast<std::size_t>(b)] = Sk - (3 * b) % (Sk + 1);
        }
        params.lse = lse.view();
    }
};

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, double tolerance,
                 const char* what) {
    ASSERT_EQ(got.size(), expected.size());
    for (std::size_t n = 0; n < got.size(); ++n) {
        const double g = got[n], e = expected[n];
        if (std::isnan(e)) {
            EXPECT_TRUE(std::isnan(g)) << what << " " << n << " is " << g << ", expected NaN";
        } else if (std::isinf(e)) {
            EXPECT_EQ(g, e) << what << " " << n;
        } else {
            EXPECT_NEAR(g, e, tolerance * std::max(1.0, std::abs(e))) << what << " " << n;
        }
        if (::testing::Test::HasFailure()) return;
    }
}

struct Outputs {
    std::vector<float> out, lse, weights;
};

// Runs the call where asked and takes its outputs away, leaving them marked as unwritten.
Outputs run(FullCall& call, const RunOptions& options, AttentionParams params) {
    std::fill(call.out.data.begin(), call.out.data.end(), -7.0f);
    std::fill(call.lse.data.begin(), call.lse.data.end(), -7.0f);
    std::fill(call.weights.data.begin(), call.weights.data.end(), -7.0f);
    attention_forward(make_problem(params), options);
    emulator::synchronize_all();
    return {call.out.data, call.lse.data, call.weights.data};
}

AttentionParams on_device(AttentionParams p, bool sides) {
    for (TensorView* view : {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.weights})
        view->device = {DeviceType::cuda, 0};
    for (TensorView* view :
         {&p.mask, &p.bias, &p.alibi_slopes, &p.sinks, &p.q_lens, &p.kv_lens, &p.q_offsets})
        if (sides) view->device = {DeviceType::cuda, 0};
    return p;
}

void check(FullCall& call, double tolerance = 2e-5) {
    RunOptions reference, staged;
    reference.kernel = "cpu-reference";
    staged.device = "cuda";
    const Outputs expected = run(call, reference, call.params);
    const auto compare = [&](const Outputs& got) {
        expect_near(got.out, expected.out, tolerance, "out");
        expect_near(got.lse, expected.lse, tolerance, "lse");
        expect_near(got.weights, expected.weights, tolerance, "weights");
    };
    {
        SCOPED_TRACE("host arrays");
        compare(run(call, staged, call.params));
    }
    for (const bool sides : {false, true}) {
        SCOPED_TRACE(sides ? "device arrays" : "device arrays, side arrays on the host");
        compare(run(call, {}, on_device(call.params, sides)));
    }
    EXPECT_EQ(emulator::live_allocations(), 0u);
}

struct Feature {
    const char* name;
    std::function<void(FullCall&)> set;
};

const std::vector<Feature>& features() {
    static const std::vector<Feature> all{
        {"plain", [](FullCall&) {}},
        {"causal", [](FullCall& c) { c.params.causal = true; }},
        {"top_left", [](FullCall& c) { c.params.causal = true, c.params.q_offset = 0; }},
        {"window", [](FullCall& c) { c.params.window_left = 3, c.params.window_right = 1; }},
        {"far_offset", [](FullCall& c) { c.params.causal = true, c.params.q_offset = INT64_MIN; }},
        {"mask", [](FullCall& c) { c.params.mask = c.mask.view(DType::boolean); }},
        {"bias", [](FullCall& c) { c.params.bias = c.bias.view(); }},
        {"infinite_bias",
         [](FullCall& c) {
             for (std::size_t n = 0; n < c.bias.data.size(); n += 3) c.bias[n] = -INFINITY;
             c.params.bias = c.bias.view();
         }},
        {"alibi", [](FullCall& c) { c.params.alibi_slopes = c.slopes.view(); }},
        {"softcap", [](FullCall& c) { c.params.softcap = 1.5; }},
        {"sinks", [](FullCall& c) { c.params.sinks = c.sinks.view(); }},
        {"lens", [](FullCall& c) { c.params.q_lens = c.q_lens.view(), c.params.kv_lens = c.kv_lens.view(); }},
        {"causal_lens",
         [](FullCall& c) {
             c.params.causal = true;
             c.params.kv_lens = c.kv_lens.view();
         }},
        {"dropout", [](FullCall& c) { c.params.dropout = 0.3, c.params.seed = 7; }},
        {"weights", [](FullCall& c) { c.params.weights = c.weights.view(); }},
        {"all",
         [](FullCall& c) {
             c.params.causal = true;
             c.params.window_left = 9;
             c.params.mask = c.mask.view(DType::boolean);
             c.params.bias = c.bias.view();
             c.params.alibi_slopes = c.slopes.view();
             c.params.sinks = c.sinks.view();
             c.params.softcap = 2.0;
             c.params.kv_lens = c.kv_lens.view();
             c.params.dropout = 0.2;
             c.params.weights = c.weights.view();
         }},
        {"masked_nan",
         [](FullCall& c) {
             c.params.causal = true;
             c.params.q_offset = 2;
             const auto last = c.v.data.size();
             for (std::size_t n = last - 3; n < last; ++n) c.v[n] = static_cast<float>(kNan);
             c.k[c.k.data.size() - 1] = static_cast<float>(kNan);
         }},
        {"padding_nan",
         [](FullCall& c) {
             c.params.kv_lens = c.kv_lens.view();
             const std::int64_t B = c.k.shape[0], keys = c.k.shape[1];
             const auto per_key = static_cast<std::size_t>(c.k.shape[2] * c.k.shape[3]);
             const auto per_value = static_cast<std::size_t>(c.v.shape[2] * c.v.shape[3]);
             for (std::int64_t b = 0; b < B; ++b)
                 for (std::int64_t j = c.kv_lens[static_cast<std::size_t>(b)]; j < keys; ++j) {
                     const auto at = static_cast<std::size_t>(b * keys + j);
                     std::fill_n(c.k.data.begin() + static_cast<std::ptrdiff_t>(at * per_key), per_key, NAN);
                     std::fill_n(c.v.data.begin() + static_cast<std::ptrdiff_t>(at * per_value), per_value,
                                 NAN);
                 }
         }},
        {"all_masked",
         [](FullCall& c) {
             std::fill(c.mask.data.begin(), c.mask.data.end(), std::uint8_t{0});
             c.params.mask = c.mask.view(DType::boolean);
             c.params.weights = c.weights.view();
         }},
    };
    return all;
}

struct Sizes {
    std::int64_t B, Sq, Sk, Hq, Hkv, D, Dv;
};
constexpr Sizes kSizes[] = {
    {2, 5, 9, 2, 2, 8, 8},  // small, odd
    {2, 1, 13, 6, 2, 16, 8},  // decode, GQA
    {3, 17, 17, 4, 1, 24, 40},  // MQA, Dv above D
    {1, 3, 1, 4, 2, 1, 3},  // one key, D 1
};

class Features : public ::testing::TestWithParam<std::tuple<int, int>> {
protected:
    void SetUp() override { emulator::reset(); }
};

TEST_P(Features, MatchTheReference) {
    const Sizes s = kSizes[std::get<0>(GetParam())];
    const Feature& feature = features()[static_cast<std::size_t>(std::get<1>(GetParam()))];
    FullCall call(s.B, s.Sq, s.Sk, s.Hq, s.Hkv, s.D, s.Dv);
    feature.set(call);
    check(call);
}

INSTANTIATE_TEST_SUITE_P(
    All, Features,
    ::testing::Combine(::testing::Range(0, 4), ::testing::Range(0, static_cast<int>(features().size()))),
    [](const auto& chosen) {
        return std::string(features()[static_cast<std::size_t>(std::get<1>(chosen.param))].name) + "_" +
               std::to_string(std::get<0>(chosen.param));
    });

class Attention : public ::testing::Test {
protected:
    void SetUp() override { emulator::reset(); }
};

// Scores of 64 KiB at a time: several chunks of rows and of heads.
TEST_F(Attention, ManyChunks) {
    emulator::set_l2_bytes(64 << 10);
    for (const bool causal : {false, true}) {
        FullCall call(2, 300, 200, 4, 2, 8, 8);
        call.params.causal = causal;
        call.params.kv_lens = call.kv_lens.view();
        check(call);
    }
}

// Rows beyond what a warp takes, and beyond what a block keeps in registers.
TEST_F(Attention, LongRows) {
#if defined(__SANITIZE_THREAD__)
    // Each of a block's 256 threads is one of the machine's: the others take minutes.
    const std::vector<std::int64_t> sizes{1025};
#else
    const std::vector<std::int64_t> sizes{1025, 1500, 8193};
#endif
    for (const std::int64_t keys : sizes) {
        FullCall call(1, 2, keys, 2, 1, 4, 4);
        check(call);
        call.params.causal = true;
        call.params.alibi_slopes = call.slopes.view();
        call.params.weights = call.weights.view();
        call.params.dropout = 0.1;
        check(call);
    }
}

TEST_F(Attention, LayoutBhsd) {
    FullCall call(2, 5, 7, 4, 2, 8, 8);
    const auto swapped = [](TensorView view) {
        std::swap(view.shape[1], view.shape[2]);
        std::swap(view.strides[1], view.strides[2]);
        return view;
    };
    call.params.layout = Layout::bhsd;
    for (TensorView* view : {&call.params.q, &call.params.k, &call.params.v, &call.params.out})
        *view = swapped(*view);
    check(call);
}

TEST_F(Attention, EmptyAxes) {
    for (const Sizes s :
         {Sizes{0, 3, 3, 2, 1, 4, 4}, Sizes{2, 0, 3, 2, 1, 4, 4}, Sizes{2, 3, 0, 2, 1, 4, 4}}) {
        FullCall call(s.B, s.Sq, s.Sk, s.Hq, s.Hkv, s.D, s.Dv);
        check(call);
    }
}

TEST_F(Attention, SameBitsTwice) {
    FullCall call(2, 33, 65, 4, 2, 16, 16);
    call.params.causal = true;
    RunOptions options;
    options.device = "cuda";
    const Outputs first = run(call, options, call.params), second = run(call, options, call.params);
    EXPECT_EQ(first.out, second.out);
    EXPECT_EQ(first.lse, second.lse);
}

TEST_F(Attention, PointerArraysAndTheirAbsenceAgree) {
    FullCall call(7, 4, 6, 6, 2, 8, 8);  // BSHD, GQA: neither heads nor entries follow each other
    check(call);
    emulator::take_matmuls();
    const AttentionParams device = on_device(call.params, true);
    run(call, {}, device);
    bool used = false;
    for (const auto& product : emulator::take_matmuls()) used |= product.pointer_array;
    EXPECT_TRUE(used);
    emulator::reset();
    emulator::set_pointer_arrays_supported(false);
    FullCall other(8, 4, 6, 6, 2, 8, 8);  // another batch: plans are kept
    check(other);
}

TEST_F(Attention, FullAttentionNeedsNoRestoring) {
    FullCall call(1, 8, 8, 2, 2, 8, 8);
    const std::size_t before = emulator::calls("launch");
    run(call, {}, on_device(call.params, true));
    EXPECT_EQ(emulator::calls("launch") - before, 1u);  // softmax
    EXPECT_EQ(emulator::take_matmuls().size(), 2u);
}

// Heads and entries that lie backwards, which cuBLAS's batches cannot say.
TEST_F(Attention, NegativeStrides) {
    for (const int axis : {0, 1, 2}) {
        FullCall call(2, 5, 7, 4, 2, 8, 8);
        for (TensorView* view : {&call.params.q, &call.params.k, &call.params.v}) {
            auto* data = static_cast<float*>(view->data) + (view->shape[axis] - 1) * view->strides[axis];
            view->data = data;
            view->strides[axis] = -view->strides[axis];
        }
        check(call);
    }
}

TEST_F(Attention, BatchesBeyondWhatOneProductTakes) {
    FullCall call(40000, 1, 2, 1, 1, 4, 4);
    check(call);
}

// A mask for all heads goes to the device once, whatever the number of units.
TEST_F(Attention, SharedMaskOfSeveralUnits) {
    FullCall call(2, 4, 6, 2, 1, 8, 8);
    call.mask = Array<std::uint8_t>({4, 6});
    for (std::size_t n = 0; n < call.mask.data.size(); ++n) call.mask[n] = n % 4 != 1;
    call.params.mask = call.mask.view(DType::boolean);
    check(call);
}

// The library may take back what its heuristic promised.
TEST_F(Attention, PointerArraysThatFailWhenCalled) {
    FullCall call(9, 4, 6, 6, 2, 8, 8);
    RunOptions reference;
    reference.kernel = "cpu-reference";
    const Outputs expected = run(call, reference, call.params);
    emulator::fail_next("Matmul", cuda::cublas::kNotSupported);
    expect_near(run(call, {}, on_device(call.params, true)).out, expected.out, 2e-5, "out");
}

TEST_F(Attention, CapturedCallsNeedTheirSideArraysOnTheDevice) {
    FullCall call(1, 4, 6, 2, 2, 8, 8);
    call.params.sinks = call.sinks.view();
    emulator::set_capturing(true);
    const std::string message = testing::message_of<UnsupportedError>(
        [&] { attention_forward(make_problem(on_device(call.params, false))); });
    EXPECT_NE(message.find("CUDA graph"), std::string::npos) << message;
    EXPECT_NO_THROW(attention_forward(make_problem(on_device(call.params, true))));
    emulator::synchronize_all();
}

}  // namespace
}  // namespace fastattn
