// Where keys and values lie: the one place that turns the number of a key into an address, on the host and on
// devices. Kernels that pack ask for single keys, those that read keys where they lie ask for runs.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/host_device.h"

namespace fastattn {
namespace {

// CUDA's kernels refuse keys in pages, and their registers are counted.
#if defined(__CUDACC__)
inline constexpr bool kKeysInPages = false;
#else
inline constexpr bool kKeysInPages = true;
#endif

// Keys one stride apart.
template <class T>
struct KeyRun {
    const T* first;  // number 0 of the first key, of the first head
    std::int64_t count;
    std::int64_t key, head, number;  // strides, in elements
};

// The keys, or the values, of kv head `head` of an entry, and of those after it. T: their dtype.
template <class T>
class KeyRows {
public:
    FASTATTN_HOST_DEVICE KeyRows(const Operand& x, std::int64_t b, std::int64_t head)
        : first_(static_cast<const T*>(x.data) + (kKeysInPages && x.pages != nullptr ? 0 : b) * x.batch +
                 head * x.head),
          key_(x.seq),
          head_(x.head),
          number_(x.dim),
          pages_(kKeysInPages && x.pages != nullptr ? x.pages + b * x.entry_pages : nullptr),
          page_(x.page),
          page_stride_(x.batch) {}

    // Number 0 of key j.
    FASTATTN_HOST_DEVICE const T* operator[](std::int64_t j) const {
        if (!kKeysInPages || pages_ == nullptr) return first_ + j * key_;
        return first_ + pages_[j / page_] * page_stride_ + j % page_ * key_;
    }
    FASTATTN_HOST_DEVICE std::int64_t number_stride() const { return number_; }
    FASTATTN_HOST_DEVICE std::int64_t head_stride() const { return head_; }

    // As many of the keys [j, j + n) as lie one stride apart; key j is there.
    KeyRun<T> run(std::int64_t j, std::int64_t n) const {
        if (pages_ == nullptr) return {(*this)[j], n, key_, head_, number_};
        const std::int64_t left = page_ - j % page_;
        return {n > 0 ? (*this)[j] : first_, n < left ? n : left, key_, head_, number_};
    }

private:
    const T* first_;
    std::int64_t key_, head_, number_;
    const std::int64_t* pages_;
    std::int64_t page_, page_stride_;
};

// A pointer for each of up to `most` keys from key `first` on, for packing: pages are looked up once.
template <class T, int most>
class KeyPointers {
public:
    KeyPointers(const KeyRows<T>& rows, std::int64_t first, std::int64_t n) : number_(rows.number_stride()) {
        for (std::int64_t i = 0; i < n;) {
            const KeyRun<T> run = rows.run(first + i, n - i);
            const T* at = run.first;
            for (const std::int64_t end = i + run.count; i < end; ++i, at += run.key) row_[i] = at;
        }
    }
    const T* operator[](std::int64_t i) const { return row_[i]; }
    std::int64_t number_stride() const { return number_; }

private:
    const T* row_[most];
    std::int64_t number_;
};

// Rows from row i on, counted from 0: what packing takes, be it keys or rows of q.
template <class Rows>
struct RowsFrom {
    Rows rows;  // a copy, so that strides stay in registers
    std::int64_t first;
    auto operator[](std::int64_t i) const { return rows[first + i]; }
    std::int64_t number_stride() const { return rows.number_stride(); }
};

}  // namespace
}  // namespace fastattn
