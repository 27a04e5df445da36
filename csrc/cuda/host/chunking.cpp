#include "cuda/host/chunking.h"

#include "core/visible.h"

namespace fastattn::cuda {
namespace {

// Rows of a tile when causal or a window leaves keys out: few enough that little is computed in vain.
constexpr Index kRestrictedRows = 128;
constexpr Index kTilesAtMost = 8;
// Below this many keys, ranges of their own for each batch entry are not worth a product of their own.
constexpr Index kKeysToShare = 512;

}  // namespace

Chunk whole(const AttentionProblem& p) noexcept {
    Chunk all{0, p.batch, 0, p.kv_heads, 0, p.q_size, 0, 0};
    const KeyRange keys = p.q_size > 0 ? keys_of(p, all) : KeyRange{};
    all.key = keys.begin;
    all.keys = keys.end - keys.begin;
    return all;
}

bool is_restricted(const AttentionProblem& p) noexcept {
    return p.causal || p.window_left >= 0 || p.window_right >= 0 || p.mask.data != nullptr ||
           p.bias.data != nullptr || p.has_q_lens || p.has_kv_lens;
}

std::size_t score_bytes(const AttentionProblem& p, const Chunk& c) noexcept {
    return static_cast<std::size_t>(c.batches * c.kv_heads * p.group * c.rows * score_stride(c.keys)) *
           score_size(p.dtype);
}

KeyRange keys_of(const AttentionProblem& p, const Chunk& c) noexcept {
    if (!p.ranges_known()) return {0, p.kv_size};
    KeyRange all{p.kv_size, 0};
    for (Index b = c.batch; b < c.batch + c.batches; ++b) {
        // Both ends grow with the row, so the first and the last row say it all.
        const KeyRange first = p.key_range(b, c.row), last = p.key_range(b, c.row + c.rows - 1);
        if (first.begin < last.end) {
            all.begin = std::min(all.begin, first.begin);
            all.end = std::max(all.end, last.end);
        }
    }
    if (all.begin >= all.end) return {0, 0};
    all.begin -= all.begin % 8;
    return all;
}

Chunks::Chunks(const AttentionProblem& p, const Chunk& region, std::size_t limit) noexcept
    : p_(p),
      region_(region),
      limit_(static_cast<Index>(limit / score_size(p.dtype))),
      apart_(p.kv_size > kKeysToShare && p.ranges_known() &&
             (p.has_q_lens || p.has_kv_lens || p.q_offsets.data != nullptr)),
      row_(region.row) {
    if (region_.batches <= 0 || region_.kv_heads <= 0 || p_.group <= 0 || region_.rows <= 0) {
        row_ = region_.row + region_.rows;
        return;
    }
    set_tile();
}

// A tile of r rows computes up to r keys in vain for each of them: an eighth of all, or as many as the window
// has.
Index Chunks::restricted_rows() const noexcept {
    Index rows = region_.rows / kTilesAtMost;
    const Index right = p_.causal ? 0 : p_.window_right;
    if (p_.window_left >= 0 && right >= 0) rows = std::min(rows, saturating_add(p_.window_left, right));
    return std::max(kRestrictedRows, round_up(rows, kRestrictedRows));
}

// Rows of the tile at row_, then heads and entries of its chunks.
void Chunks::set_tile() noexcept {
    const Index left = region_.row + region_.rows - row_;
    rows_ = left;
    if (p_.causal || p_.window_left >= 0 || p_.window_right >= 0) rows_ = std::min(left, restricted_rows());
    const auto keys = [&] {
        const KeyRange range = keys_of(
            p_, {region_.batch, region_.batches, region_.kv_head, region_.kv_heads, row_, rows_, 0, 0});
        return score_stride(range.end - range.begin);
    };
    Index per_head = p_.group * rows_ * keys();
    if (per_head > limit_ && rows_ > 1) {
        rows_ = std::clamp<Index>(limit_ / (p_.group * keys()), 1, rows_);
        if (rows_ > 128) {
            rows_ -= rows_ % 128;
        } else if (rows_ > 16) {
            rows_ -= rows_ % 16;
        }
        per_head = p_.group * rows_ * keys();
    }
    kv_heads_ = std::clamp<Index>(limit_ / per_head, 1, region_.kv_heads);
    batches_ = 1;
    if (kv_heads_ == region_.kv_heads && !apart_)
        batches_ = std::clamp<Index>(limit_ / (per_head * kv_heads_), 1, region_.batches);
    batch_ = region_.batch;
    kv_head_ = region_.kv_head;
}

bool Chunks::next(Chunk& chunk) noexcept {
    if (row_ >= region_.row + region_.rows) return false;
    chunk.batch = batch_;
    chunk.batches = std::min(batches_, region_.batch + region_.batches - batch_);
    chunk.kv_head = kv_head_;
    chunk.kv_heads = std::min(kv_heads_, region_.kv_head + region_.kv_heads - kv_head_);
    chunk.row = row_;
    chunk.rows = rows_;
    const KeyRange range = keys_of(p_, chunk);
    chunk.key = range.begin;
    chunk.keys = range.end - range.begin;
    kv_head_ += chunk.kv_heads;
    if (kv_head_ < region_.kv_head + region_.kv_heads) return true;
    kv_head_ = region_.kv_head;
    batch_ += chunk.batches;
    if (batch_ < region_.batch + region_.batches) return true;
    row_ += rows_;
    if (row_ < region_.row + region_.rows) set_tile();
    return true;
}

Fold fold_of(Index group, const Chunk& chunk, std::initializer_list<QueryRows> arrays) noexcept {
    if (group == 1) return Fold::outer;  // one head: its rows are the matrix
    const auto all = [&](auto holds) {
        return std::all_of(arrays.begin(), arrays.end(),
                           [&](const QueryRows& x) { return holds(x.array, x.dims); });
    };
    if (all([&](const Operand& x, Index dims) {
            return x.head >= dims && (chunk.rows == 1 || x.seq == group * x.head);
        }))
        return Fold::inner;
    if (all([&](const Operand& x, Index dims) { return x.seq >= dims && x.head == chunk.rows * x.seq; }))
        return Fold::outer;
    return Fold::none;
}

bool is_gemm_operand(const Operand& x, DType dtype, Index rows, Index dims) noexcept {
    if (x.dim != 1 && dims > 1) return false;
    if (rows > 1 && x.seq < dims) return false;
    if (x.batch < 0 || x.head < 0) return false;  // the library takes the strides of a batch for sizes
    const auto item = static_cast<Index>(item_size(dtype));
    if (item > 2) return true;
    const auto fits = [&](Index stride) { return stride * item % 16 == 0; };
    return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && fits(x.batch) && fits(x.seq) && fits(x.head);
}

Index row_stride(DType dtype, Index dims) noexcept {
    return round_up(dims, 16 / static_cast<Index>(item_size(dtype)));
}

Operand compact_operand(void* data, DType dtype, const Chunk& region, Index first_head, Index heads,
                        Index first_row, Index rows, Index dims) noexcept {
    Operand x;
    x.dim = 1;
    x.seq = row_stride(dtype, dims);
    x.head = x.seq * rows;
    x.batch = x.head * heads;
    const Index skipped = region.batch * x.batch + first_head * x.head + first_row * x.seq;
    x.data = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(data) -
                                     static_cast<std::uintptr_t>(skipped) * item_size(dtype));
    return x;
}

std::size_t compact_bytes(DType dtype, Index batches, Index heads, Index rows, Index dims) noexcept {
    return static_cast<std::size_t>(batches * heads * rows * row_stride(dtype, dims)) * item_size(dtype);
}

}  // namespace fastattn::cuda
