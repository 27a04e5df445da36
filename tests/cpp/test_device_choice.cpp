// Where a call on host arrays is estimated to be faster.
#include "core/device_choice.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "arrays.h"

namespace fastattn {
namespace {

using testing::message_of;

AttentionProblem problem(std::int64_t batch, std::int64_t q_size, std::int64_t kv_size,
                         DType dtype = DType::f32, std::int64_t dim = 64) {
    AttentionProblem p;
    p.dtype = p.out_dtype = p.k_dtype = p.v_dtype = dtype;
    p.lse_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
    p.batch = batch, p.q_heads = p.kv_heads = 8;
    p.q_size = q_size, p.kv_size = kv_size, p.head_dim = p.value_dim = dim;
    p.q = p.out = {nullptr, q_size * 8 * dim, 8 * dim, dim, 1};
    p.k = p.v = {nullptr, kv_size * 8 * dim, 8 * dim, dim, 1};
    return p;
}

// Speeds that make the parts of an estimate easy to tell apart.
DeviceSpeeds round_speeds() {
    DeviceSpeeds s;
    s.cpu_per_thread_f64 = 1e9, s.cpu_per_thread_f32 = 2e9, s.cpu_per_thread_bf16 = 4e9;
    s.gpu_f64 = 1e12, s.gpu_f32 = 2e12, s.gpu_half = 4e12;
    s.to_device = 1e9, s.to_host = 2e9;
    s.cpu_seconds = 1e-6, s.gpu_seconds = 1e-4;
    return s;
}

class DeviceChoice : public ::testing::Test {
protected:
    void TearDown() override { set_device_speeds({}); }
};

TEST_F(DeviceChoice, EstimateIsWorkPlusTransfers) {
    const DeviceSpeeds s = round_speeds();
    struct Case {
        DType dtype;
        double cpu, gpu, item;
    };
    for (const Case& c : {Case{DType::f64, 1e9, 1e12, 8}, Case{DType::f32, 2e9, 2e12, 4},
                          Case{DType::f16, 2e9, 4e12, 2}, Case{DType::bf16, 4e9, 4e12, 2}}) {
        const DeviceEstimate e = estimate_devices(problem(2, 100, 50, c.dtype), 4, s);
        const double flops = 2.0 * 8 * 100 * 50 * 2 * 128;
        const double there = c.item * 2 * 8 * 64 * (100 + 50 + 50), back = c.item * 2 * 8 * 64 * 100;
        EXPECT_NEAR(e.cpu_seconds, 1e-6 + flops / (4 * c.cpu), 1e-12) << dtype_name(c.dtype);
        EXPECT_NEAR(e.gpu_seconds, 1e-4 + flops / c.gpu + there / 1e9 + back / 2e9, 1e-12)
            << dtype_name(c.dtype);
    }
}

TEST_F(DeviceChoice, ManyFlopsFavourTheGpuAndManyBytesTheCpu) {
    const DeviceSpeeds s;
    // The same bytes, ever more work for each.
    EXPECT_FALSE(estimate_devices(problem(64, 8, 8), 4, s).gpu_is_faster());
    EXPECT_TRUE(estimate_devices(problem(1, 8192, 8192), 4, s).gpu_is_faster());
    // Decode reads each key once: the transfer alone takes longer.
    EXPECT_FALSE(estimate_devices(problem(1, 1, 1 << 20), 4, s).gpu_is_faster());
    // Restrictions take work away, not bytes.
    AttentionProblem local = problem(1, 8192, 8192);
    local.window_left = local.window_right = 0;
    EXPECT_FALSE(estimate_devices(local, 4, s).gpu_is_faster());
    // More threads favour the CPU.
    const AttentionProblem middle = problem(1, 1024, 1024);
    EXPECT_TRUE(estimate_devices(middle, 1, s).gpu_is_faster());
    EXPECT_FALSE(estimate_devices(middle, 256, s).gpu_is_faster());
}

TEST_F(DeviceChoice, WeightsComeBackToo) {
    AttentionProblem p = problem(1, 1000, 1000);
    const double without = estimate_devices(p, 1, round_speeds()).gpu_seconds;
    char weights = 0;
    p.weights = {&weights, DType::f32, 8000000, 1000000, 1000, 1};
    EXPECT_NEAR(estimate_devices(p, 1, round_speeds()).gpu_seconds - without, 8 * 1e6 * 4 / 2e9, 1e-9);
}

TEST_F(DeviceChoice, SpeedsInUseCanBeSet) {
    EXPECT_EQ(device_speeds().gpu_half, DeviceSpeeds{}.gpu_half);
    DeviceSpeeds s;
    s.gpu_half = 123e12;
    set_device_speeds(s);
    EXPECT_EQ(device_speeds().gpu_half, 123e12);
}

TEST_F(DeviceChoice, SpeedsMustBeAboveZero) {
    DeviceSpeeds good;
    good.to_host = 77e9;
    set_device_speeds(good);
    double DeviceSpeeds::* const all[] = {&DeviceSpeeds::cpu_per_thread_f64,
                                          &DeviceSpeeds::cpu_per_thread_f32,
                                          &DeviceSpeeds::cpu_per_thread_bf16,
                                          &DeviceSpeeds::gpu_f64,
                                          &DeviceSpeeds::gpu_f32,
                                          &DeviceSpeeds::gpu_half,
                                          &DeviceSpeeds::to_device,
                                          &DeviceSpeeds::to_host,
                                          &DeviceSpeeds::cpu_seconds,
                                          &DeviceSpeeds::gpu_seconds};
    static_assert(sizeof all / sizeof *all * sizeof(double) == sizeof(DeviceSpeeds), "a speed is not tested");
    for (const auto speed : all) {
        for (const double bad : {0.0, -1.0, std::nan("")}) {
            DeviceSpeeds s;
            s.*speed = bad;
            EXPECT_EQ(message_of<ValueError>([&] { set_device_speeds(s); }),
                      "speeds: expected numbers above 0, got " + std::to_string(bad));
        }
    }
    EXPECT_EQ(device_speeds().to_host, 77e9);  // nothing was taken over
}

TEST_F(DeviceChoice, Text) {
    EXPECT_EQ(describe({3.2e-3, 5.1e-3}), "estimated 3.2 ms on the CPU, 5.1 ms on a GPU with transfers");
    EXPECT_EQ(describe({12.34e-6, 2.5}), "estimated 12.3 us on the CPU, 2.5e+03 ms on a GPU with transfers");
}

}  // namespace
}  // namespace fastattn
