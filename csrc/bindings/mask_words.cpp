#include "bindings/mask_words.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fastattn::bindings {
namespace {

[[noreturn]] void fail() { throw ValueError("mask: expected a Mask of this version of fastattn"); }

class WordReader {
public:
    WordReader(std::int64_t* first, std::int64_t count) : at_(first), left_(count) {}

    std::int64_t* take(std::int64_t n) {
        if (n < 0 || n > left_) fail();
        std::int64_t* const first = at_;
        at_ += n;
        left_ -= n;
        return first;
    }
    std::int64_t number() { return *take(1); }

    TensorView array(std::initializer_list<std::int64_t> shape) {
        TensorView view;
        view.dtype = DType::i64;
        view.rank = static_cast<int>(shape.size());
        std::int64_t size = 1;
        int axis = 0;
        const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
        for (const std::int64_t n : shape) {
            if (n < 0 || (!empty && n > 0 && size > left_ / n)) fail();
            size = empty ? 0 : size * n;
            view.shape[axis++] = n;
        }
        std::int64_t stride = 1;
        while (--axis >= 0) {
            view.strides[axis] = stride;
            stride *= empty ? 1 : view.shape[axis];
        }
        view.data = take(size);
        view.readonly = true;
        return view;
    }

private:
    std::int64_t* at_;
    std::int64_t left_;
};

}  // namespace

void read_mask_words(const TensorView& words, AttentionParams& params) {
    const bool halves = words.dtype == DType::u32;
    if (!(halves || words.dtype == DType::i64) || words.rank != 1 || words.device.type != DeviceType::cpu ||
        (words.shape[0] > 1 && words.strides[0] != 1) ||
        reinterpret_cast<std::uintptr_t>(words.data) % alignof(std::int64_t) != 0)
        fail();
    WordReader reader(static_cast<std::int64_t*>(words.data), halves ? words.shape[0] / 2 : words.shape[0]);
    const std::int64_t count = reader.number();
    for (std::int64_t n = 0; n < count; ++n) {
        MaskCondition& c = params.conditions.emplace_back();
        const std::int64_t kind = reader.number();
        if (kind < 0 || kind > static_cast<std::int64_t>(MaskCondition::Kind::sinks_window)) fail();
        c.kind = static_cast<MaskCondition::Kind>(kind);
        const std::int64_t* const sizes = reader.take(7);
        c.row_block = reader.number();
        c.kv_heads = reader.number() != 0;
        c.from_end = reader.number() != 0;
        c.exact = reader.number() != 0;
        c.least_keys = reader.number();
        c.most_keys = reader.number();
        c.size = reader.number();
        c.keep = reader.number();
        c.left = reader.number();
        c.index = reader.array({sizes[0], sizes[1], sizes[2]});
        c.starts = reader.array({sizes[3]});
        c.spans = reader.array({sizes[4], 2});
        c.lengths = sizes[5] == 0 ? reader.array({}) : reader.array({sizes[6]});
    }
}

}  // namespace fastattn::bindings
