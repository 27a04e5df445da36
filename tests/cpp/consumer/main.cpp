#include <fastattn/attention.h>

#include <cstdio>

int main() {
    float q[4] = {1, 0, 0, 1}, k[4] = {1, 0, 0, 1}, v[4] = {1, 2, 3, 4}, out[4] = {};
    const auto matrix = [](float* data) {  // (2, 2): two rows of two features
        return fastattn::TensorView{.data = data, .rank = 2, .shape = {2, 2}, .strides = {2, 1}};
    };
    fastattn::AttentionParams params;
    params.q = matrix(q), params.k = matrix(k), params.v = matrix(v), params.out = matrix(out);
    fastattn::attention_forward(fastattn::make_problem(params));
    std::printf("%s %.6f %.6f %.6f %.6f\n", fastattn::version(), out[0], out[1], out[2], out[3]);
}
