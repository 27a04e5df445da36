#include "cuda/host/unit_arrays.h"

#include "cuda/host/context.h"
#include "cuda/host/host_copy.h"

namespace fastattn::cuda {
namespace {

// What of an array belongs to a region; the axes are those of StagedArray::strides.
struct Box {
    std::array<Index, 4> first, size;
};

Box box_of(const StagedArray& x, const AttentionProblem& p, const Chunk& region) noexcept {
    const bool is_result = x.travel == Travel::out || x.travel == Travel::summed;
    const Index key = is_result ? 0 : region.key, keys = is_result ? p.kv_size : region.keys;
    const Index head = region.kv_head * p.group, heads = region.kv_heads * p.group;
    Box box{{region.batch, head, region.row, key}, {region.batches, heads, region.rows, keys}};
    switch (x.axes) {
        case Axes::queries: box.first[3] = 0, box.size[3] = x.features; break;
        case Axes::keys:
            box = {{region.batch, region.kv_head, key, 0},
                   {region.batches, region.kv_heads, keys, x.features}};
            break;
        case Axes::scores:
            for (std::size_t axis = 0; axis < 4; ++axis)
                if (x.strides[axis] == nullptr || *x.strides[axis] == 0) box.size[axis] = 1;
            break;
        case Axes::weights: break;
        case Axes::rows: box.first[3] = 0, box.size[3] = 1; break;
    }
    return box;
}

// Elements from one row of a compact array to the next.
Index pitch_of(const StagedArray& x, const Box& box) noexcept {
    const bool has_features = x.axes == Axes::queries || x.axes == Axes::keys;
    return has_features ? row_stride(x.dtype, x.features) : box.size[3];
}

std::size_t bytes_of(const StagedArray& x, const Box& box) noexcept {
    return static_cast<std::size_t>(box.size[0] * box.size[1] * box.size[2] * pitch_of(x, box)) *
           item_size(x.dtype);
}

void place_array(const StagedArray& x, const StagedArray& to, const Box& box, std::uintptr_t at,
                 DeviceType place) noexcept {
    const Index pitch = pitch_of(x, box);
    const std::array<Index, 4> compact{box.size[1] * box.size[2] * pitch, box.size[2] * pitch, pitch, 1};
    Index skipped = 0;
    for (std::size_t axis = 0; axis < 4; ++axis) {
        if (to.strides[axis] == nullptr) continue;
        Index& stride = *to.strides[axis];
        const bool is_absent = (x.axes == Axes::scores && stride == 0) || (x.axes == Axes::rows && axis == 3);
        stride = is_absent ? 0 : compact[axis];
        skipped += box.first[axis] * stride;
    }
    *to.data = reinterpret_cast<void*>(at - static_cast<std::uintptr_t>(skipped) * item_size(x.dtype));
    if (to.place != nullptr) *to.place = place;
}

HostArray host_array(const StagedArray& x, const Box& box) noexcept {
    const auto item = static_cast<Index>(item_size(x.dtype));
    HostArray array{static_cast<char*>(*x.data)};
    for (std::size_t axis = 0; axis < 4; ++axis) {
        if (x.strides[axis] == nullptr) continue;
        array.stride[axis] = *x.strides[axis] * item;
        array.data += box.first[axis] * array.stride[axis];
    }
    return array;
}

Travel travel_of(const AttentionProblem& p, const ScoreOperand& x) noexcept {
    if (x.place != DeviceType::cpu) return Travel::never;
    return p.device.type != DeviceType::cpu || is_shared(p, x) ? Travel::side : Travel::in;
}

}  // namespace

// ---- the table --------------------------------------------------------------------------------------------
StagedArray::StagedArray(Operand& x, DType type, Index n, Axes has, Travel how) noexcept
    : data(&x.data),
      strides{&x.batch, &x.head, &x.seq, &x.dim},
      dtype(type),
      axes(has),
      travel(how),
      features(n) {}

StagedArray::StagedArray(ScoreOperand& x, Axes has, Travel how) noexcept
    : data(&x.data),
      strides{&x.batch, &x.head, &x.query, &x.key},
      place(&x.place),
      dtype(x.dtype),
      axes(has),
      travel(x.data == nullptr ? Travel::never : how) {}

StagedArray::StagedArray(HeadOperand& x) noexcept
    : data(const_cast<void**>(&x.data)),
      strides{&x.batch, &x.head, nullptr, nullptr},
      place(&x.place),
      dtype(x.dtype),
      axes(Axes::scores),
      travel(x.data == nullptr || x.place != DeviceType::cpu ? Travel::never : Travel::side) {}

std::array<StagedArray, 13> arrays_of(AttentionProblem& p) noexcept {
    return {{{p.k, p.dtype, p.head_dim, Axes::keys, Travel::keys},
             {p.v, p.dtype, p.value_dim, Axes::keys, Travel::keys},
             {p.q, p.dtype, p.head_dim, Axes::queries, Travel::in},
             {p.mask, Axes::scores, travel_of(p, p.mask)},
             {p.bias, Axes::scores, travel_of(p, p.bias)},
             {p.out, p.dtype, p.value_dim, Axes::queries, Travel::out},
             {p.lse, Axes::rows, Travel::out},
             {p.weights, Axes::weights, Travel::out},
             StagedArray(p.alibi_slopes),
             StagedArray(p.sinks),
             StagedArray(p.q_lens),
             StagedArray(p.kv_lens),
             StagedArray(p.q_offsets)}};
}

std::array<StagedArray, 20> arrays_of(BackwardProblem& b) noexcept {
    AttentionProblem& p = b.forward;
    const Travel dbias = has_all_axes(b.dbias, p) ? Travel::out : Travel::summed;
    return {{{p.k, p.dtype, p.head_dim, Axes::keys, Travel::keys},
             {p.v, p.dtype, p.value_dim, Axes::keys, Travel::keys},
             {p.q, p.dtype, p.head_dim, Axes::queries, Travel::in},
             {b.dout, p.dtype, p.value_dim, Axes::queries, Travel::in},
             {p.out, p.dtype, p.value_dim, Axes::queries, Travel::in},
             {p.lse, Axes::rows, Travel::in},
             {b.dlse, Axes::rows, Travel::in},
             {p.mask, Axes::scores, travel_of(p, p.mask)},
             {p.bias, Axes::scores, travel_of(p, p.bias)},
             {b.dq, p.dtype, p.head_dim, Axes::queries, Travel::out},
             {b.dk, p.dtype, p.head_dim, Axes::keys, Travel::out},
             {b.dv, p.dtype, p.value_dim, Axes::keys, Travel::out},
             {b.dbias, Axes::scores, dbias},
             {b.dalibi, Axes::scores, Travel::summed},
             {b.dsinks, Axes::scores, Travel::summed},
             StagedArray(p.alibi_slopes),
             StagedArray(p.sinks),
             StagedArray(p.q_lens),
             StagedArray(p.kv_lens),
             StagedArray(p.q_offsets)}};
}

bool is_shared(const AttentionProblem& p, const ScoreOperand& x) noexcept {
    constexpr double most = 8.0 * kUnitBytes;
    const double elements = (x.query == 0 ? 1.0 : static_cast<double>(p.q_size)) *
                            (x.key == 0 ? 1.0 : static_cast<double>(p.kv_size));
    return x.data != nullptr && x.batch == 0 && x.head == 0 &&
           elements * static_cast<double>(item_size(x.dtype)) <= most;
}

bool has_all_axes(const ScoreOperand& x, const AttentionProblem& p) noexcept {
    return (x.batch != 0 || p.batch == 1) && (x.head != 0 || p.q_heads == 1) &&
           (x.query != 0 || p.q_size == 1) && (x.key != 0 || p.kv_size == 1);
}

// ---- arrays of a region in blocks -------------------------------------------------------------------------
template <class Problem>
BlockLayout lay_out(Problem p, const Chunk& region) noexcept {
    BlockLayout layout;
    std::size_t row = 0;
    for (const StagedArray& x : arrays_of(p)) {
        const auto block = static_cast<std::size_t>(x.travel);
        if (x.travel != Travel::never) {
            layout.offset[row] = layout.used[block];
            layout.used[block] += carved(bytes_of(x, box_of(x, forward_of(p), region)));
        }
        ++row;
    }
    return layout;
}

template <class Problem>
Problem placed(Problem p, Problem to, const Chunk& region, const BlockLayout& layout,
               std::initializer_list<Block> blocks, DeviceType place) noexcept {
    const auto from = arrays_of(p), target = arrays_of(to);
    for (const Block& block : blocks)
        for (std::size_t row = 0; row < from.size(); ++row)
            if (from[row].travel == block.travel)
                place_array(from[row], target[row], box_of(from[row], forward_of(p), region),
                            reinterpret_cast<std::uintptr_t>(block.data) + layout.offset[row], place);
    return to;
}

template <class Problem>
void copy_arrays(Problem p, Problem there, const Chunk& region, Travel travel, Executor& executor) {
    const auto ours = arrays_of(p), theirs = arrays_of(there);
    const bool is_result = travel == Travel::out || travel == Travel::summed;
    for (std::size_t row = 0; row < ours.size(); ++row) {
        const StagedArray& x = ours[row];
        if (x.travel != travel) continue;
        const Box box = box_of(x, forward_of(p), region);
        const HostArray here = host_array(x, box), away = host_array(theirs[row], box);
        copy_host(is_result ? away : here, is_result ? here : away, box.size,
                  static_cast<Index>(item_size(x.dtype)), executor);
    }
}

#define FASTATTN_FOR(Problem)                                                   \
    template BlockLayout lay_out(Problem, const Chunk&) noexcept;               \
    template Problem placed(Problem, Problem, const Chunk&, const BlockLayout&, \
                            std::initializer_list<Block>, DeviceType) noexcept; \
    template void copy_arrays(Problem, Problem, const Chunk&, Travel, Executor&)
FASTATTN_FOR(AttentionProblem);
FASTATTN_FOR(BackwardProblem);
#undef FASTATTN_FOR

}  // namespace fastattn::cuda
