// Times the forward or the backward over shapes from the command line, through the public API alone.
//
//   bench_attention                                        the default list
//   bench_attention --sq 512,1024 --dtype f32,bf16 --q_heads 12
//                                                          every combination of the lists
//   bench_attention --backward true --sq 1024              the gradients alone, after the forward
// Flags of Google Benchmark (--benchmark_filter=..., --benchmark_format=json, ...) work as well. Counters:
// GFLOP/s, GB/s of K and V, and the fraction of the FMA peak and, for a forward of up to 8 query rows, of the
// read bandwidth that were measured in this process. With --device cuda arrays are in the GPU's memory, times
// are those between two events, and there are no such fractions.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fastattn/attention.h>
#include <fastattn/limits.h>

#include "cuda_timing.h"

namespace {

using fastattn::DType;
using fastattn::TensorView;

struct Shape {
    std::string name;  // only of the default list
    std::int64_t batch = 1, q_heads = 8, kv_heads = 0, sq = 512, sk = 0, d = 64,
                 dv = 0;  // 0: as q_heads, sq, d
    DType dtype = DType::f32;
    bool causal = false;
    bool backward = false;  // the gradients alone; the forward has run before
    int threads = 0;  // 0: fastattn's default
    std::string kernel;  // empty: fastattn's choice
    fastattn::Device device{};
};

bool on_gpu(const Shape& s) { return s.device.type == fastattn::DeviceType::cuda; }

void fill_defaults(Shape& s) {
    if (s.kv_heads == 0) s.kv_heads = s.q_heads;
    if (s.sk == 0) s.sk = s.sq;
    if (s.dv == 0) s.dv = s.d;
    if (s.threads == 0) s.threads = fastattn::get_num_threads();
}

std::string title(const Shape& s) {
    std::ostringstream t;
    if (!s.name.empty()) t << s.name << "/";
    t << "B" << s.batch << "_H" << s.q_heads << "/" << s.kv_heads << "_S" << s.sq << "x" << s.sk << "_D"
      << s.d;
    if (s.dv != s.d) t << "x" << s.dv;
    t << "/" << fastattn::dtype_name(s.dtype) << (s.causal ? "/causal" : "")
      << (s.backward ? "/backward" : "");
    if (!s.kernel.empty()) t << "/" << s.kernel;
    if (on_gpu(s)) {
        t << "/cuda:" << s.device.index;
    } else {
        t << "/threads:" << s.threads;
    }
    return t.str();
}

// ---- arrays -----------------------------------------------------------------------------------------
// The upper half of a float is a bfloat16; float16 has 5 exponent bits, enough for 2^-13 < |x| < 2^16.
std::uint16_t half_bits(float x, DType dtype) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == DType::bf16) return static_cast<std::uint16_t>(bits >> 16);
    const std::uint32_t sign = bits >> 16 & 0x8000u, exponent = (bits >> 23 & 0xffu) - 112u;
    return static_cast<std::uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ffu));
}

class Array {
public:
    // (B,S,H,D), C order; random numbers of either sign with magnitude in [0.25, 1.5).
    Array(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, const Shape& shape, unsigned seed)
        : bytes_(static_cast<std::size_t>(b * s * h * d) * fastattn::item_size(shape.dtype)) {
        const DType dtype = shape.dtype;
        view.data = bytes_.data();
        view.dtype = dtype;
        view.rank = 4;
        const std::int64_t sizes[4] = {b, s, h, d}, strides[4] = {s * h * d, h * d, d, 1};
        std::copy(sizes, sizes + 4, view.shape);
        std::copy(strides, strides + 4, view.strides);
        std::minstd_rand random(seed);
        for (std::size_t i = 0; i < bytes_.size(); i += fastattn::item_size(dtype)) {
            const auto word = static_cast<std::uint32_t>(random());
            const float x = (word & 1u ? 1.0f : -1.0f) *
                            (0.25f + 1.25f * static_cast<float>(word >> 8 & 0xffffu) / 65536.0f);
            if (dtype == DType::f64) {
                const double wide = x;
                std::memcpy(&bytes_[i], &wide, 8);
            } else if (dtype == DType::f32) {
                std::memcpy(&bytes_[i], &x, 4);
            } else {
                const std::uint16_t half = half_bits(x, dtype);
                std::memcpy(&bytes_[i], &half, 2);
            }
        }
        if (on_gpu(shape)) {
            there_.emplace(bytes_.data(), bytes_.size());
            view.data = there_->data();
            view.device = shape.device;
        }
    }
    TensorView view;

private:
    std::vector<unsigned char> bytes_;
    std::optional<bench::cuda::Memory> there_;
};

// ---- one benchmark ----------------------------------------------------------------------------------
double fma_peak(const std::string& kernel, DType dtype, int threads) {
    static std::map<std::tuple<std::string, DType, int>, double> known;
    auto [entry, fresh] = known.try_emplace({kernel, dtype, threads}, 0.0);
    if (fresh) entry->second = fastattn::measure_fma_peak(kernel, dtype, threads, 0.2);
    return entry->second;
}

double read_bandwidth(std::size_t bytes, int threads) {
    static std::map<std::pair<std::size_t, int>, double> known;
    auto [entry, fresh] = known.try_emplace({bytes, threads}, 0.0);
    if (fresh) entry->second = fastattn::measure_read_bandwidth(bytes, threads, 0.3);
    return entry->second;
}

template <class Call>
double wall_seconds(const Call& call) {
    const auto start = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What the gradients need beside the forward's arrays; out and lse are computed here.
struct Backward {
    Backward(const Shape& s, fastattn::AttentionParams forward, const fastattn::RunOptions& options)
        : dout(s.batch, s.sq, s.q_heads, s.dv, s, 5),
          dq(s.batch, s.sq, s.q_heads, s.d, s, 6),
          dk(s.batch, s.sk, s.kv_heads, s.d, s, 7),
          dv(s.batch, s.sk, s.kv_heads, s.dv, s, 8),
          lse(s.batch, s.q_heads, s.sq, 1, lse_shape(s), 9) {
        lse.view.rank = 3;
        forward.lse = lse.view;
        fastattn::attention_forward(fastattn::make_problem(forward), options);
        fastattn::BackwardParams params;
        params.forward = forward;
        params.dout = dout.view;
        params.dq = dq.view;
        params.dk = dk.view;
        params.dv = dv.view;
        problem = fastattn::make_backward_problem(params);
    }
    const Array dout;
    Array dq, dk, dv, lse;
    fastattn::BackwardProblem problem;

private:
    static Shape lse_shape(Shape s) {
        if (s.dtype != DType::f64) s.dtype = DType::f32;
        return s;
    }
};

void run(benchmark::State& state, const Shape& s) {
    try {
        if (on_gpu(s)) bench::cuda::use_device(s.device.index);
        const Array q(s.batch, s.sq, s.q_heads, s.d, s, 1), k(s.batch, s.sk, s.kv_heads, s.d, s, 2),
            v(s.batch, s.sk, s.kv_heads, s.dv, s, 3);
        Array out(s.batch, s.sq, s.q_heads, s.dv, s, 4);
        fastattn::AttentionParams params;
        params.q = q.view;
        params.k = k.view;
        params.v = v.view;
        params.out = out.view;
        params.causal = s.causal;
        const fastattn::AttentionProblem problem = fastattn::make_problem(params);
        fastattn::RunOptions options;
        options.kernel = s.kernel;
        options.num_threads = s.threads;
        const fastattn::Explanation plan = fastattn::explain(problem, options);

        std::optional<Backward> gradients;
        if (s.backward) {
            options.kernel = plan.kernel;  // the one that the label and the peak are of
            gradients.emplace(s, params, options);
        }
        const auto call = [&] {
            if (gradients)
                fastattn::attention_backward(gradients->problem, options);
            else
                fastattn::attention_forward(problem, options);
        };
        double total = 0.0;
        if (on_gpu(s)) call();  // loads kernels, chooses algorithms, fills the pool
        for (auto _ : state) {
            const double seconds = on_gpu(s) ? bench::cuda::seconds(call) : wall_seconds(call);
            state.SetIterationTime(seconds);
            total += seconds;
        }
        const double calls_per_second = static_cast<double>(state.iterations()) / total;
        const auto kv_bytes = static_cast<std::size_t>(s.batch * s.kv_heads * s.sk * (s.d + s.dv)) *
                              fastattn::item_size(s.dtype);
        // Per pair D + Dv; with gradients 3 D + 2 Dv: the scores again, dP, and what enters dq, dk and dv.
        const double products =
            s.backward ? static_cast<double>(3 * s.d + 2 * s.dv) / static_cast<double>(s.d + s.dv) : 1.0;
        const double flops = products * plan.flops * calls_per_second;
        const double bytes = static_cast<double>(kv_bytes) * calls_per_second;
        state.counters["GFLOP/s"] = flops / 1e9;
        state.counters["GB/s"] = bytes / 1e9;
        if (!on_gpu(s)) state.counters["of_peak"] = flops / fma_peak(plan.kernel, s.dtype, s.threads);
        if (!on_gpu(s) && !s.backward && s.sq <= 8 && kv_bytes >= 1 << 20)
            state.counters["of_bandwidth"] = bytes / read_bandwidth(kv_bytes, s.threads);
        state.SetLabel(plan.kernel);
    } catch (const std::exception& error) {
        state.SkipWithError(error.what());
    }
}

// ---- the command line -------------------------------------------------------------------------------
std::vector<Shape> default_list() {
    std::vector<Shape> list;
    const auto add = [&](const char* name, std::int64_t batch, std::int64_t q_heads, std::int64_t kv_heads,
                         std::int64_t sq, std::int64_t sk, std::int64_t d, DType dtype = DType::f32,
                         bool causal = false) {
        list.push_back({name, batch, q_heads, kv_heads, sq, sk, d, d, dtype, causal, false, 0, {}, {}});
    };
    add("bert", 4, 12, 12, 512, 512, 64);
    add("vit", 8, 12, 12, 197, 197, 64);
    add("whisper", 1, 20, 20, 1500, 1500, 64);
    add("gpt2", 1, 12, 12, 1024, 1024, 64, DType::f32, true);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        add("llama", 1, 32, 8, 2048, 2048, 128, dtype, true);
    for (const std::int64_t keys : {4096, 32768})
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
            add("decode", 1, 32, 8, 1, keys, 128, dtype);
    add("tiny", 1, 1, 1, 8, 8, 16);
    const std::size_t forward = list.size();
    add("bert", 4, 12, 12, 512, 512, 64);
    add("gpt2", 1, 12, 12, 1024, 1024, 64, DType::f32, true);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        add("llama", 1, 32, 8, 2048, 2048, 128, dtype, true);
    for (std::size_t i = forward; i < list.size(); ++i) list[i].backward = true;
    return list;
}

[[noreturn]] void fail(const std::string& message) {
    std::cerr << "bench_attention: " << message << "\n";
    std::exit(2);
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::size_t begin = 0;
    while (true) {
        const std::size_t comma = text.find(',', begin);
        parts.push_back(text.substr(begin, comma - begin));
        if (comma == std::string::npos) return parts;
        begin = comma + 1;
    }
}

std::int64_t number(const std::string& flag, const std::string& text) {
    std::size_t used = 0;
    std::int64_t n = 0;
    try {
        n = std::stoll(text, &used);
    } catch (const std::exception&) {
    }
    if (text.empty() || used != text.size() || n < 1)
        fail(flag + ": expected a number from 1 on, got '" + text + "'");
    return n;
}

DType dtype_of(const std::string& text) {
    static const std::map<std::string, DType> short_names = {
        {"f64", DType::f64}, {"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}};
    for (const auto& [name, dtype] : short_names)
        if (text == name || text == fastattn::dtype_name(dtype)) return dtype;
    fail("--dtype: expected f64, f32, f16 or bf16, got '" + text + "'");
}

fastattn::Device device_of(const std::string& text) {
    if (text == "cpu") return {};
    if (text == "cuda") return {fastattn::DeviceType::cuda, 0};
    if (text.rfind("cuda:", 0) == 0 && text.size() > 5 && text.size() < 9 &&
        text.find_first_not_of("0123456789", 5) == std::string::npos)
        return {fastattn::DeviceType::cuda, std::stoi(text.substr(5))};
    fail("--device: expected cpu, cuda or cuda:N, got '" + text + "'");
}

bool truth(const std::string& flag, const std::string& text) {
    if (text == "true" || text == "1") return true;
    if (text == "false" || text == "0") return false;
    fail(flag + ": expected true or false, got '" + text + "'");
}

constexpr const char* kUsage =
    "bench_attention [--batch N] [--q_heads N] [--kv_heads N] [--sq N] [--sk N] [--d N] [--dv N]\n"
    "                [--dtype f64|f32|f16|bf16] [--causal true|false] [--backward true|false]\n"
    "                [--threads N] [--kernel NAME|all] [--device cpu|cuda|cuda:N] [--benchmark_...]\n"
    "Each takes a comma-separated list; every combination is timed. Without any, a default list.\n"
    "Defaults: batch 1, q_heads 8, kv_heads as q_heads, sq 512, sk as sq, d 64, dv as d, f32, not causal, "
    "forward.\n"
    "--threads, --kernel and --device alone apply to the default list. Kernels: see fastattn::kernels().\n";

using Setter = std::function<void(Shape&, const std::string&)>;

const std::map<std::string, Setter>& setters() {
    const auto size = [](std::int64_t Shape::* member, const char* flag) {
        return [member, flag](Shape& s, const std::string& text) { s.*member = number(flag, text); };
    };
    static const std::map<std::string, Setter> table = {
        {"--batch", size(&Shape::batch, "--batch")},
        {"--q_heads", size(&Shape::q_heads, "--q_heads")},
        {"--kv_heads", size(&Shape::kv_heads, "--kv_heads")},
        {"--sq", size(&Shape::sq, "--sq")},
        {"--sk", size(&Shape::sk, "--sk")},
        {"--d", size(&Shape::d, "--d")},
        {"--dv", size(&Shape::dv, "--dv")},
        {"--dtype", [](Shape& s, const std::string& text) { s.dtype = dtype_of(text); }},
        {"--causal", [](Shape& s, const std::string& text) { s.causal = truth("--causal", text); }},
        {"--backward", [](Shape& s, const std::string& text) { s.backward = truth("--backward", text); }},
        {"--threads",
         [](Shape& s, const std::string& text) { s.threads = static_cast<int>(number("--threads", text)); }},
        {"--kernel", [](Shape& s, const std::string& text) { s.kernel = text; }},
        {"--device", [](Shape& s, const std::string& text) { s.device = device_of(text); }},
    };
    return table;
}

bool supports(const fastattn::KernelInfo& kernel, const Shape& s) {
    return kernel.usable && kernel.device == (on_gpu(s) ? "cuda" : "cpu") &&
           std::find(kernel.dtypes.begin(), kernel.dtypes.end(), s.dtype) != kernel.dtypes.end();
}

// "--kernel all": every usable kernel with the dtypes that it has.
std::vector<Shape> on_all_kernels(const std::vector<Shape>& shapes) {
    std::vector<Shape> longer;
    for (const Shape& shape : shapes)
        for (const fastattn::KernelInfo& kernel : fastattn::kernels())
            if (supports(kernel, shape)) {
                longer.push_back(shape);
                longer.back().kernel = kernel.name;
            }
    return longer;
}

// Takes our flags, "--flag value" or "--flag=value", out of argv.
std::vector<Shape> parse(std::vector<std::string>& arguments) {
    std::vector<std::pair<Setter, std::vector<std::string>>> lists;
    std::vector<std::string> rest;
    bool shapes_given = false, all_kernels = false;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& text = arguments[i];
        if (text == "--help" || text == "-h") {
            std::cout << kUsage;
            std::exit(0);
        }
        const std::size_t equals = text.find('=');
        const std::string flag = text.substr(0, equals);
        const auto setter = setters().find(flag);
        if (setter == setters().end()) {
            if (text.rfind("--benchmark", 0) != 0 && text.rfind("--v=", 0) != 0)
                fail("unknown argument '" + text + "'\n" + kUsage);
            rest.push_back(text);
            continue;
        }
        if (equals == std::string::npos && i + 1 == arguments.size()) fail(flag + ": expected a value");
        std::vector<std::string> values =
            split(equals == std::string::npos ? arguments[++i] : text.substr(equals + 1));
        if (flag == "--kernel" && values == std::vector<std::string>{"all"}) {
            all_kernels = true;
            continue;
        }
        lists.emplace_back(setter->second, std::move(values));
        shapes_given = shapes_given || (flag != "--threads" && flag != "--kernel" && flag != "--device");
    }
    std::vector<Shape> shapes = shapes_given ? std::vector<Shape>{Shape{}} : default_list();
    for (const auto& [set, values] : lists) {
        std::vector<Shape> longer;
        for (const Shape& shape : shapes)
            for (const std::string& value : values) {
                longer.push_back(shape);
                set(longer.back(), value);
            }
        shapes = std::move(longer);
    }
    if (all_kernels) shapes = on_all_kernels(shapes);
    for (Shape& shape : shapes) fill_defaults(shape);
    arguments = std::move(rest);
    return shapes;
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> arguments(argv + 1, argv + argc);
    const std::vector<Shape> shapes = parse(arguments);
    std::vector<char*> pointers = {argv[0]};
    for (std::string& text : arguments) pointers.push_back(text.data());
    int count = static_cast<int>(pointers.size());
    pointers.push_back(nullptr);
    benchmark::Initialize(&count, pointers.data());
    if (benchmark::ReportUnrecognizedArguments(count, pointers.data())) return 2;
    benchmark::AddCustomContext("fastattn", fastattn::version());
    for (const Shape& shape : shapes)
        benchmark::RegisterBenchmark(title(shape).c_str(),
                                     [shape](benchmark::State& state) { run(state, shape); })
            ->UseManualTime()
            ->Unit(benchmark::kMicrosecond);
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
