// Arrays for the C++ tests: a buffer with a shape, and strided views of it.
#pragma once

#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <fastattn/attention.h>

namespace fastattn::testing {

using Shape = std::vector<std::int64_t>;

inline TensorView make_view(void* data, DType dtype, const Shape& shape, const Shape& strides) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    for (std::size_t axis = 0; axis < shape.size() && axis < kMaxRank; ++axis) {
        view.shape[axis] = shape[axis];
        view.strides[axis] = strides[axis];
    }
    return view;
}

inline Shape contiguous_strides(const Shape& shape) {
    Shape strides(shape.size());
    std::int64_t stride = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
        strides[axis] = stride;
        stride *= shape[axis];
    }
    return strides;
}

template <class T>
constexpr DType dtype_of() {
    if constexpr (std::is_same_v<T, double>) return DType::f64;
    if constexpr (std::is_same_v<T, float>) return DType::f32;
    if constexpr (std::is_same_v<T, std::uint8_t>) return DType::boolean;
    if constexpr (std::is_same_v<T, std::int32_t>) return DType::i32;
    if constexpr (std::is_same_v<T, std::int64_t>) return DType::i64;
}

template <class T>
struct Array {
    Shape shape;
    std::vector<T> data;

    explicit Array(Shape sizes, T fill = T{}) : shape(std::move(sizes)) {
        data.assign(static_cast<std::size_t>(
                        std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>{})),
                    fill);
    }
    Array(Shape sizes, std::vector<T> values) : shape(std::move(sizes)), data(std::move(values)) {}

    T& operator[](std::size_t n) { return data[n]; }
    TensorView view(DType dtype = dtype_of<T>()) {
        return make_view(data.data(), dtype, shape, contiguous_strides(shape));
    }
};

template <class T>
Array<T> random_array(Shape shape, unsigned seed) {
    Array<T> array(std::move(shape));
    std::mt19937 rng(seed);
    std::normal_distribution<double> normal;
    for (T& x : array.data) x = static_cast<T>(normal(rng));
    return array;
}

// q, k, v, out in bshd float32, contiguous, with the parameters that use them.
struct Call {
    Array<float> q, k, v, out;
    AttentionParams params;

    Call(std::int64_t B, std::int64_t Sq, std::int64_t Sk, std::int64_t Hq, std::int64_t Hkv, std::int64_t D,
         std::int64_t Dv)
        : q(random_array<float>({B, Sq, Hq, D}, 1)),
          k(random_array<float>({B, Sk, Hkv, D}, 2)),
          v(random_array<float>({B, Sk, Hkv, Dv}, 3)),
          out({B, Sq, Hq, Dv}, -7.0f) {
        params.q = q.view();
        params.k = k.view();
        params.v = v.view();
        params.out = out.view();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
};

// The message of the exception of exactly this kind that f throws; else a note that no test expects.
template <class E, class F>
std::string message_of(F f) {
    try {
        f();
    } catch (const E& error) {
        return typeid(error) == typeid(E) ? error.what() : std::string("a derived error: ") + error.what();
    } catch (const std::exception& error) {
        return std::string("another error: ") + error.what();
    }
    return "no error";
}

}  // namespace fastattn::testing
