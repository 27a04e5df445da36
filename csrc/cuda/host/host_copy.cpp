#include "cuda/host/host_copy.h"

#include <algorithm>
#include <cstring>

namespace fastattn::cuda {
namespace {

using Index = std::int64_t;

constexpr Index kBytesPerItem = Index{256} << 10;  // of work handed to a thread

template <class T>
void copy_elements(const char* source, Index source_stride, char* target, Index target_stride, Index count) {
    for (Index i = 0; i < count; ++i)
        std::memcpy(target + i * target_stride, source + i * source_stride, sizeof(T));
}

void copy_row(const char* source, Index source_stride, char* target, Index target_stride, Index count,
              Index item) {
    if (source_stride == item && target_stride == item) {
        std::memcpy(target, source, static_cast<std::size_t>(count * item));
        return;
    }
    switch (item) {
        case 1: return copy_elements<std::uint8_t>(source, source_stride, target, target_stride, count);
        case 2: return copy_elements<std::uint16_t>(source, source_stride, target, target_stride, count);
        case 4: return copy_elements<std::uint32_t>(source, source_stride, target, target_stride, count);
        default: return copy_elements<std::uint64_t>(source, source_stride, target, target_stride, count);
    }
}

}  // namespace

void copy_host(const HostArray& source, const HostArray& target, const std::array<Index, 4>& size, Index item,
               Executor& executor) {
    const Index rows = size[0] * size[1] * size[2];
    if (rows == 0 || size[3] == 0) return;
    const Index rows_per_item = std::max<Index>(1, kBytesPerItem / (size[3] * item));
    auto copy = [&](Index first, int) {
        const Index end = std::min(rows, (first + 1) * rows_per_item);
        for (Index r = first * rows_per_item; r < end; ++r) {
            const Index at[3] = {r / size[2] / size[1], r / size[2] % size[1], r % size[2]};
            const auto address = [&](const HostArray& x) {
                return x.data + at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2];
            };
            copy_row(address(source), source.stride[3], address(target), target.stride[3], size[3], item);
        }
    };
    executor.for_each((rows + rows_per_item - 1) / rows_per_item, copy);
}

}  // namespace fastattn::cuda
