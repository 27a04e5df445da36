#include "cuda_timing.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace bench::cuda {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Event {
    Event() { check(cudaEventCreate(&handle), "cudaEventCreate"); }
    ~Event() { cudaEventDestroy(handle); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    cudaEvent_t handle = nullptr;
};

}  // namespace

void use_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaFree(nullptr), "the device cannot be used");  // cudaSetDevice alone may put that off
}

Memory::Memory(const void* source, std::size_t bytes) {
    check(cudaMalloc(&data_, bytes), "cudaMalloc");
    const cudaError_t error = cudaMemcpy(data_, source, bytes, cudaMemcpyHostToDevice);
    if (error != cudaSuccess) {
        cudaFree(data_);
        check(error, "cudaMemcpy");
    }
}

Memory::~Memory() { cudaFree(data_); }

double seconds(const std::function<void()>& queue) {
    const Event start, end;
    check(cudaEventRecord(start.handle, nullptr), "cudaEventRecord");
    queue();
    check(cudaEventRecord(end.handle, nullptr), "cudaEventRecord");
    check(cudaEventSynchronize(end.handle), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, start.handle, end.handle), "cudaEventElapsedTime");
    return milliseconds / 1e3;
}

}  // namespace bench::cuda
