// The backward pass, with P recomputed from lse (Dao et al., FlashAttention, arXiv:2205.14135, algorithm 4). For each
// block of keys of a (batch, kv head), packed once: for each block of rows of each query head of the group
//
//   x = score * log2 e   P = 2^(x - lse * log2 e)   dP = dout . v   dS = P (dP - delta)    tiles of mr rows, panels of nr keys
//   dv += P^T dout   dk += dS^T q                                                           tiles of mr keys
//   dq += dS k                                                                              tiles of mr rows
//
// dk and dv of a block of keys are sums over all rows, complete before the next block. dq is summed over the blocks of
// a chunk of keys, and the chunks are added in order. Softcap turns dS into the derivative by scale * q.k for dq and dk.
//
//   k, v (panels, D or Dv units, nr)      k rows (panels of D, keys, nr)       P, dS (rows, keys)
//   q, dout rows (rows, D or Dv units)    q, dout panels (panels, rows, nr)
#pragma once

#include "core/broadcast.h"
#include "cpu/backward_tiling.h"
#include "cpu/flash_gemm.h"
#include "cpu/flash_item.h"
#include "cpu/flash_pack.h"

namespace fastattn::cpu {
namespace {

// x - shift is the exponent of P / factor: shift is lse in powers of two, rounded to an integer.
template <class Acc>
struct BackwardRow {
    Acc shift, factor, delta;  // delta = dout . out - dlse
};

template <class E, class S>
class Backward {
    using V = typename E::V;
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using State = BackwardRow<Acc>;
    static constexpr int w = V::width;

public:
    Backward(const BackwardCall& call, std::byte* workspace)
        : call_(call), b_(call.problem), p_(b_.forward), plan_(call.plan), x_(make_block<E>(p_, 0)) {
        const BackwardOffsets at = backward_offsets(b_, plan_, tile_shape<E>());
        auto units = [&](std::size_t offset) { return reinterpret_cast<Unit*>(workspace + offset); };
        auto accs = [&](std::size_t offset) { return reinterpret_cast<Acc*>(workspace + offset); };
        auto bytes = [&](std::size_t offset) { return reinterpret_cast<std::uint8_t*>(workspace + offset); };
        k_panels_ = units(at.k_panels), v_panels_ = units(at.v_panels), k_rows_ = units(at.k_rows);
        q_rows_ = units(at.q_rows), dout_rows_ = units(at.dout_rows);
        q_panels_ = units(at.q_panels), dout_panels_ = units(at.dout_panels);
        weights_ = units(at.weights), ds_ = units(at.ds), ds_rows_ = units(at.ds_rows);
        x_tile_ = accs(at.x), p_tile_ = accs(at.p), kept_tile_ = accs(at.kept);
        dp_tile_ = accs(at.dp), cap_tile_ = accs(at.cap);
        dk_ = accs(at.dk), dv_ = accs(at.dv), dq_ = accs(at.dq), dq_chunk_ = accs(at.dq_chunk);
        dbias_ = accs(at.dbias);
        rows_ = reinterpret_cast<State*>(workspace + at.states);
        x_.info = reinterpret_cast<RowInfo*>(workspace + at.info);
        tiles_ = reinterpret_cast<TileColumns*>(workspace + at.tiles);
        bad_k_ = bytes(at.bad_k), bad_q_ = bytes(at.bad_q), bad_dout_ = bytes(at.bad_dout);
        shared_states_ = reinterpret_cast<State*>(call.shared + plan_.states);
        shared_slopes_ = reinterpret_cast<Acc*>(call.shared + plan_.slopes);
        d_units_ = (p_.head_dim + E::scalars - 1) / E::scalars;
        v_units_ = (p_.value_dim + E::scalars - 1) / E::scalars;
        keep_factor_ = Acc(1.0 / (1.0 - p_.dropout));
        alibi_ = b_.dalibi.data != nullptr;
    }

    // ---- lse and delta of some rows of a head ----------------------------------------------------------
    void prepare(std::int64_t item) {
        const std::int64_t blocks = (p_.q_size + kRowsPerPreparation - 1) / kRowsPerPreparation;
        const std::int64_t begin = item % blocks * kRowsPerPreparation;
        const std::int64_t h = item / blocks % p_.q_heads, b = item / blocks / p_.q_heads;
        const std::int64_t most = begin + kRowsPerPreparation, end = most < p_.q_size ? most : p_.q_size;
        x_.batch = b;
        for (std::int64_t i = begin; i < end && !call_.executor.stop_requested(); ++i) {
            State& state = shared_states_[row_index(b, h, i)];
            state = {};
            if (i < p_.q_len(b)) state = find_state(b, h, i);
        }
    }

    // ---- dq, dk, dv ------------------------------------------------------------------------------------
    // Items: (chunk, batch, kv head) with split, else (batch, kv head).
    void gradients(std::int64_t item) {
        const std::int64_t heads = p_.batch * p_.kv_heads, head = item % heads;
        start_head(head / p_.kv_heads, head % p_.kv_heads);
        const std::int64_t head_rows = p_.group * p_.q_size, dq_size = head_rows * plan_.d_stride;
        if (plan_.split) {
            auto* partials = reinterpret_cast<Acc*>(call_.shared + plan_.partials);
            chunk_dq_ = partials + (head * plan_.chunks + item / heads) * dq_size;
            add_chunk(item / heads);
            return;
        }
        for (std::int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
            chunk_dq_ = chunk == 0 ? dq_ : dq_chunk_;
            add_chunk(chunk);
            if (call_.executor.stop_requested()) return;
            if (chunk > 0) add_to(dq_, dq_chunk_, dq_size);
        }
        for (std::int64_t g = 0; g < p_.group; ++g) {
            for (std::int64_t i = 0; i < p_.q_size; ++i) {
                store_row(b_.dq, i, kv_head_ * p_.group + g, p_.head_dim,
                          dq_ + (g * p_.q_size + i) * plan_.d_stride, x_.scale);
            }
        }
    }

    // With split: adds the chunks of some rows of dq in order.
    void merge(std::int64_t item) {
        const std::int64_t begin = item % plan_.row_blocks * plan_.row_block,
                           h = item / plan_.row_blocks % p_.q_heads;
        batch_ = item / plan_.row_blocks / p_.q_heads;
        const std::int64_t head_rows = p_.group * p_.q_size, dq_size = head_rows * plan_.d_stride;
        auto* partials = reinterpret_cast<Acc*>(call_.shared + plan_.partials) +
                         (batch_ * p_.kv_heads + h / p_.group) * plan_.chunks * dq_size;
        for (std::int64_t i = begin; i < begin + plan_.row_block && i < p_.q_size; ++i) {
            Acc* row = partials + (h % p_.group * p_.q_size + i) * plan_.d_stride;
            for (std::int64_t chunk = 1; chunk < plan_.chunks; ++chunk)
                add_to(row, row + chunk * dq_size, plan_.d_stride);
            store_row(b_.dq, i, h, p_.head_dim, row, x_.scale);
        }
    }

    // ---- dalibi_slopes and dsinks of a head -------------------------------------------------------------
    void head_gradients(std::int64_t h) {
        double sink_sum = 0, slope_sum = 0;
        const double sink = b_.dsinks.data == nullptr ? 0.0 : read_head(p_.sinks, 0, h);
        for (std::int64_t b = 0; b < p_.batch; ++b) {
            if (b_.dalibi.batch != 0) slope_sum = 0;
            for (std::int64_t i = 0; i < p_.q_len(b); ++i) {
                const std::int64_t row = row_index(b, h, i);
                if (b_.dsinks.data != nullptr) sink_sum += sink_gradient(sink, shared_states_[row]);
                for (std::int64_t c = 0; alibi_ && c < plan_.chunks; ++c)
                    slope_sum += double(shared_slopes_[row * plan_.chunks + c]);
            }
            if (alibi_ && b_.dalibi.batch != 0) store_head(b_.dalibi, b, h, slope_sum);
        }
        if (alibi_ && b_.dalibi.batch == 0) store_head(b_.dalibi, 0, h, slope_sum);
        if (b_.dsinks.data != nullptr) store_head(b_.dsinks, 0, h, sink_sum);
    }

    // ---- dbias -------------------------------------------------------------------------------------------
    // One block of dbias: dS anew for all heads, rows and keys that the bias of the block served. Rows and keys that
    // the bias does not tell apart are first summed at their places in their blocks.
    void bias(std::int64_t item) {
        const ScoreOperand& out = b_.dbias;
        const AxisSizes own = own_sizes(out, p_);
        const std::int64_t key_blocks = out.key == 0 ? 1 : plan_.key_blocks;
        const std::int64_t row_blocks = out.query == 0 ? 1 : plan_.row_blocks;
        const std::int64_t kb = item % key_blocks, rb = item / key_blocks % row_blocks;
        const std::int64_t h = item / key_blocks / row_blocks % own.head,
                           b = item / key_blocks / row_blocks / own.head;
        const std::int64_t size = plan_.row_block * plan_.key_block;
        for (std::int64_t c = 0; c < size; c += w) V::zero().store(dbias_ + c);
        into_bias_ = true;
        for (std::int64_t bb = b; bb < (out.batch == 0 ? p_.batch : b + 1); ++bb) {
            for (std::int64_t hh = h; hh < (out.head == 0 ? p_.q_heads : h + 1); ++hh) {
                start_head(bb, hh / p_.group);
                for (std::int64_t j = kb; j < (out.key == 0 ? plan_.key_blocks : kb + 1); ++j) {
                    start_keys(j * plan_.key_block);
                    for (std::int64_t i = rb; i < (out.query == 0 ? plan_.row_blocks : rb + 1); ++i) {
                        if (call_.executor.stop_requested()) return;
                        if (start_rows(hh % p_.group, i * plan_.row_block) && !find_ds()) return;
                    }
                }
            }
        }
        store_bias(b, h, rb * plan_.row_block, kb * plan_.key_block);
    }

private:
    struct TileColumns {
        std::int64_t first, last;  // columns of the block of keys in which a tile of rows has weights
    };

    std::int64_t row_index(std::int64_t b, std::int64_t h, std::int64_t i) const {
        return (b * p_.q_heads + h) * p_.q_size + i;
    }

    RowInfo row_of(std::int64_t h, std::int64_t i) const {
        RowInfo row = row_info(p_, x_.batch, h / p_.group, i * p_.group + h % p_.group);
        find_features(x_, row);
        return row;
    }

    // ---- rows, before the blocks --------------------------------------------------------------------------
    State find_state(std::int64_t b, std::int64_t h, std::int64_t i) {
        const S* dout = row_pointer<const S>(b_.dout, b, i, h);
        const S* out = row_pointer<const S>(p_.out, b, i, h);
        V sum = V::zero();
        for (std::int64_t d = 0; d < p_.value_dim; d += w) {
            const std::int64_t left = p_.value_dim - d;
            sum = V::fma(load_strided<V>(dout + d * b_.dout.dim, b_.dout.dim, left),
                         load_strided<V>(out + d * p_.out.dim, p_.out.dim, left), sum);
        }
        State state{};
        state.delta = V::reduce_add(sum);
        if (!(state.delta - state.delta == 0) && !attends_any(x_, row_of(h, i))) state.delta = 0;
        if (b_.dlse.data != nullptr)
            state.delta -= Acc(load_real(b_.dlse.data, b_.dlse.dtype, score_offset(b_.dlse, b, h, i, 0)));
        const double lse = load_real(p_.lse.data, p_.lse.dtype, score_offset(p_.lse, b, h, i, 0));
        if (lse == -kInf<double>) return state;  // nothing attended, or only scores of -inf: no weights
        const double t = lse * kLog2E, whole = ::rint(t);
        state.shift = to_finite<Acc>(whole);
        const bool finite = t - t == 0;  // in powers of two too

        // Beyond 2^31 the shift may be further from lse than the type's exponents reach; such weights are 0 or wrong.
        const double rest = double(state.shift) - t;
        state.factor = finite ? Acc(::exp2(rest > 126 ? 126 : (rest < -126 ? -126 : rest))) : Acc(1);
        if (!finite) state.shift = Acc(t);
        if (lse - lse == 0 && magnitude(t) > kCoarse) refine_weights(h, i, lse, state);
        return state;
    }

    static double magnitude(double x) { return x < 0 ? -x : x; }

    // From this size on lse says too little of the sum of the weights, which is up to the number of keys: beside a
    // bias of -1e9, that some use as a mask, nothing.
    static constexpr double kCoarse = 1.0 / 1024 / double(std::numeric_limits<Acc>::epsilon());

    // The row's largest score and its sum of weights anew, as the panels compute them; used where they agree with lse
    // as far as that tells (it may be of more keys than these).
    void refine_weights(std::int64_t h, std::int64_t i, double lse, State& state) {
        const RowInfo row = row_of(h, i);
        const S* k = row_pointer<const S>(p_.k, x_.batch, 0, h / p_.group);
        pack_row<E>(q_rows_, row_pointer<const S>(p_.q, x_.batch, i, h), p_.q.dim, p_.head_dim);
        const bool sink = p_.sinks.data != nullptr;
        double top = sink ? read_head(p_.sinks, 0, h) * kLog2E : -kInf<double>,
               sum = top > -kInf<double> ? 1.0 : 0.0;
        x_.info[0] = row;
        for (key_ = row.begin / E::nr * E::nr; key_ < row.end; key_ += E::nr) {
            const std::int64_t left = p_.kv_size - key_;
            pack_keys<E>(k_panels_, k + key_ * p_.k.seq, p_.k.seq, p_.k.dim, left < E::nr ? left : E::nr,
                         p_.head_dim);
            V acc[1][E::nv];
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n) acc[0][n] = V::zero();
            gemm_tile<E, 1, E::nv>(acc, q_rows_, 0, k_panels_, E::nr, 0, d_units_);
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n) acc[0][n].store(x_tile_ + n * w);
            find_scores(0, x_tile_, cap_tile_, 0);
            for (int c = 0; c < E::nr; ++c) {
                const double x = double(x_tile_[c]);
                if (x == -kInf<double>) continue;
                if (x > top) {
                    sum *= ::exp2(top - x);
                    top = x;
                }
                sum += ::exp2(x - top);
            }
        }
        const double found = (top + ::log2(sum)) / kLog2E;
        const bool agree =
            magnitude(found - lse) <= 4 * double(std::numeric_limits<Acc>::epsilon()) * magnitude(lse);
        // At its type's largest number lse says nothing but that.
        const bool at_limit = magnitude(lse) >= double(std::numeric_limits<Acc>::max());
        if (!agree && !at_limit) return;
        state.shift = Acc(top);
        state.factor = Acc(1.0 / sum);
    }

    // d/dsink of one row: its weight times -(delta); of a sink of +inf all the weight.
    double sink_gradient(double sink, const State& state) const {
        if (sink == -kInf<double>) return 0.0;
        if (sink == kInf<double>) return -double(state.delta);
        // A row without weights (factor 0) has lse = sink.
        const double share =
            state.factor == 0 ? 1.0 : ::exp2(sink * kLog2E - double(state.shift)) * double(state.factor);
        return -share * double(state.delta);
    }

    // ---- blocks of keys -----------------------------------------------------------------------------------
    void start_head(std::int64_t b, std::int64_t kv_head) {
        batch_ = x_.batch = b;
        kv_head_ = kv_head;
    }

    void add_chunk(std::int64_t chunk) {
        chunk_ = chunk;
        const std::int64_t head_rows = p_.group * p_.q_size;
        for (std::int64_t c = 0; c < head_rows * plan_.d_stride; c += w) V::zero().store(chunk_dq_ + c);
        if (alibi_) {
            for (std::int64_t r = 0; r < head_rows; ++r)
                shared_slopes_[(row_index(batch_, kv_head_ * p_.group, 0) + r) * plan_.chunks + chunk] = 0;
        }
        const std::int64_t end = (chunk + 1) * plan_.chunk_blocks;
        for (std::int64_t kb = chunk * plan_.chunk_blocks; kb < end && kb < plan_.key_blocks; ++kb) {
            add_keys(kb * plan_.key_block);
            if (call_.executor.stop_requested()) return;
        }
    }

    void add_keys(std::int64_t j) {
        start_keys(j);
        for (std::int64_t c = 0; c < plan_.key_block * plan_.d_stride; c += w) V::zero().store(dk_ + c);
        for (std::int64_t c = 0; c < plan_.key_block * plan_.v_stride; c += w) V::zero().store(dv_ + c);
        for (std::int64_t g = 0; g < p_.group; ++g) {
            for (std::int64_t i = 0; i < p_.q_size; i += plan_.row_block) {
                if (call_.executor.stop_requested()) return;
                if (!start_rows(g, i)) continue;
                if (!find_ds()) return;
                add_key_products();
                add_query_products(chunk_dq_ + (g * p_.q_size + i) * plan_.d_stride);
                if (careful_) add_bad_products(chunk_dq_ + (g * p_.q_size + i) * plan_.d_stride);
            }
        }
        for (std::int64_t c = 0; c < keys_; ++c) {
            store_row(b_.dk, j + c, kv_head_, p_.head_dim, dk_ + c * plan_.d_stride, x_.scale);
            store_row(b_.dv, j + c, kv_head_, p_.value_dim, dv_ + c * plan_.v_stride, keep_factor_);
        }
    }

    void start_keys(std::int64_t j) {
        key_ = j;
        const std::int64_t left = p_.kv_size - j;
        keys_ = left < plan_.key_block ? left : plan_.key_block;
        keys_packed_ = false;
    }

    void pack_key_block() {
        const S* k = row_pointer<const S>(p_.k, batch_, key_, kv_head_);
        const S* v = row_pointer<const S>(p_.v, batch_, key_, kv_head_);
        pack_keys<E>(k_panels_, k, p_.k.seq, p_.k.dim, keys_, p_.head_dim);
        pack_keys<E>(v_panels_, v, p_.v.seq, p_.v.dim, keys_, p_.value_dim);
        bad_key_ = pack_values<E>(k_rows_, bad_k_, k, p_.k.seq, p_.k.dim, keys_, (keys_ + w - 1) / w * w,
                                  plan_.key_block, p_.head_dim);
        V check = V::zero();
        for (std::int64_t c = 0; c < keys_; ++c) {
            for (std::int64_t d = 0; d < p_.value_dim; d += w)
                check = V::fma(load_strided<V>(v + c * p_.v.seq + d * p_.v.dim, p_.v.dim, p_.value_dim - d),
                               V::zero(), check);
        }
        bad_value_ = !(V::reduce_add(check) == 0);
        keys_packed_ = true;
    }

    // ---- blocks of rows -----------------------------------------------------------------------------------
    // Rows from i on of head g of the group. False when none of them has weights in the block of keys.
    bool start_rows(std::int64_t g, std::int64_t i) {
        const std::int64_t size = p_.q_size - i < plan_.row_block ? p_.q_size - i : plan_.row_block;
        const std::int64_t left = p_.q_len(batch_) - i;
        live_ = left < size ? left : size;
        if (live_ <= 0) return false;
        // Both ends of the ranges rise with the row.
        if (p_.key_range(batch_, i).begin >= key_ + keys_ || p_.key_range(batch_, i + live_ - 1).end <= key_)
            return false;
        if (!keys_packed_) pack_key_block();
        head_ = kv_head_ * p_.group + g;
        row_ = i;
        padded_ = (live_ + plan_unit - 1) / plan_unit * plan_unit;
        const S* q = row_pointer<const S>(p_.q, batch_, i, head_);
        const S* dout = row_pointer<const S>(b_.dout, batch_, i, head_);
        bool finite = true;
        for (std::int64_t r = 0; r < padded_; ++r) {
            RowInfo info{};
            rows_[r] = {};
            if (r < live_) {
                info = row_info(p_, batch_, kv_head_, (i + r) * p_.group + g);
                if (x_.elementwise || alibi_) find_features(x_, info);
                rows_[r] = shared_states_[row_index(batch_, head_, i + r)];
                pack_row<E>(q_rows_ + r * plan_.q_units, q + r * p_.q.seq, p_.q.dim, p_.head_dim);
                pack_row<E>(dout_rows_ + r * plan_.v_units, dout + r * b_.dout.seq, b_.dout.dim,
                            p_.value_dim);
            } else {
                clear(q_rows_ + r * plan_.q_units, plan_.q_units);
                clear(dout_rows_ + r * plan_.v_units, plan_.v_units);
            }
            const Acc sum = rows_[r].shift + rows_[r].factor + rows_[r].delta;
            finite = finite && sum - sum == 0;
            x_.info[r] = info;
        }
        bad_query_ = bad_gradient_ = false;
        if (!into_bias_) {
            bad_query_ = pack_values<E>(q_panels_, bad_q_, q, p_.q.seq, p_.q.dim, live_, padded_,
                                        plan_.row_block, p_.head_dim);
            bad_gradient_ = pack_values<E>(dout_panels_, bad_dout_, dout, b_.dout.seq, b_.dout.dim, live_,
                                           padded_, plan_.row_block, p_.value_dim);
        }
        careful_ = !finite || bad_key_ || bad_value_ || bad_query_ || bad_gradient_;
        return true;
    }

    static void clear(Unit* row, std::int64_t units) {
        for (std::int64_t u = 0; u < units; u += w) V::zero().store(row + u);
    }

    // ---- P and dS -------------------------------------------------------------------------------------------
    // Of all rows and keys of the blocks.
    // False when asked to stop: tiles_ is incomplete then.
    bool find_ds() {
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            if (call_.executor.stop_requested()) return false;
            find_tile(r);
        }
        return true;
    }

    void find_tile(std::int64_t r) {
        std::int64_t begin = keys_, end = 0, all_begin = 0, all_end = keys_;
        for (int m = 0; m < E::mr; ++m) {
            const std::int64_t from = x_.info[r + m].begin - key_, to = x_.info[r + m].end - key_;
            if (to > from && from < begin) begin = from;
            if (to > from && to > end) end = to;
            if (from > all_begin) all_begin = from;
            if (to < all_end) all_end = to;
        }
        if (begin < 0) begin = 0;
        if (end > keys_) end = keys_;
        TileColumns& tile = tiles_[r / E::mr];
        tile = {0, 0};
        const std::int64_t first = begin / E::nr * E::nr;
        for (std::int64_t c = 0; c < keys_; c += E::nr) {
            const std::int64_t left = end - c;
            const bool outside = begin >= end || c < first || left <= 0;
            if (outside || panel_masked(r, c, left < E::nr ? left : E::nr)) {
                if (!into_bias_) clear_panel(r, c);
                continue;
            }
            const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
            if (tile.last == 0) tile.first = c;
            tile.last = c + vectors * w;
            const bool ranged = all_begin > c || all_end < c + vectors * w;
            with_count<E::nv>(vectors, [&](auto count) { find_panel<decltype(count)::value>(r, c, ranged); });
        }
    }

    bool panel_masked(std::int64_t r, std::int64_t c, std::int64_t n) const {
        if (p_.mask.data == nullptr) return false;
        for (std::int64_t m = r; m < r + (p_.mask.query == 0 ? 1 : E::mr) && m < live_; ++m)
            if (mask_any(p_.mask, batch_, x_.info[m], key_ + c, n)) return false;
        return true;
    }

    void clear_panel(std::int64_t r, std::int64_t c) {
        for (std::int64_t m = r; m < r + E::mr; m += E::scalars) {
            clear(weights_ + m / E::scalars * plan_.weight_stride + c, E::nr);
            clear(ds_ + m / E::scalars * plan_.weight_stride + c, E::nr);
        }
        if constexpr (E::scalars > 1) {
            for (std::int64_t m = r; m < r + E::mr; ++m)
                clear(ds_rows_ + m * plan_.ds_stride + c / E::scalars, E::nr / E::scalars);
        }
    }

    // The weights of a row, beside the products of dout with v.
    struct PanelWeights {
        static constexpr int steps = E::mr;
        static constexpr bool vectors = true;
        Backward& self;
        const std::int64_t r;

        FASTATTN_INLINE void operator()(int m) {
            const State& row = self.rows_[r + m];
            const V shift = V::set1(row.shift), factor = V::set1(row.factor);
            const Acc* x = self.x_tile_ + m * E::nr;
            Acc* p = self.p_tile_ + m * E::nr;
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n)
                (exp2<E::accuracy>(V::load(x + n * w) - shift) * factor).store(p + n * w);
        }
    };

    // One tile of rows, NV vectors of keys from column c of the block; `ranged`: some keys are outside of some row's
    // range.
    template <int NV>
    void find_panel(std::int64_t r, std::int64_t c, bool ranged) {
        {
            V acc[E::mr][NV];
            zero(acc);
            gemm_tile<E, E::mr, NV>(acc, q_rows_ + r * plan_.q_units, plan_.q_units, k_panels_ + c * d_units_,
                                    E::nr, 0, d_units_);
            if (x_.elementwise || ranged) {
                store_tile<NV>(x_tile_, acc, V::zero());
                for (int m = 0; m < E::mr; ++m)
                    find_scores(r + m, x_tile_ + m * E::nr, cap_tile_ + m * E::nr, c);
                // What lies beyond NV vectors belongs to keys that no row may attend.
                for (int m = 0; m < E::mr; ++m)
                    for (int n = NV; n < E::nv; ++n) V::set1(-kInf<Acc>).store(x_tile_ + m * E::nr + n * w);
            } else {
                const V scale = V::set1(x_.scale_log2e);
#pragma GCC unroll 8
                for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
                    for (int n = 0; n < NV; ++n) acc[m][n] = acc[m][n] * scale;
                }
                if (careful_) [[unlikely]] {
                    for (int m = 0; m < E::mr; ++m)
                        for (int n = 0; n < NV; ++n)
                            acc[m][n] = V::max(V::set1(std::numeric_limits<Acc>::lowest() / 2), acc[m][n]);
                }
                store_tile<NV>(x_tile_, acc, V::set1(-kInf<Acc>));
            }
        }
        {
            PanelWeights weights{*this, r};
            run_before<E>(weights);
            V acc[E::mr][NV];
            zero(acc);
            gemm_tile_with<E, E::mr, NV>(acc, dout_rows_ + r * plan_.v_units, plan_.v_units,
                                         v_panels_ + c * v_units_, E::nr, v_units_, false, weights);
            store_tile<NV>(dp_tile_, acc, V::zero());
        }
        const bool checked = ranged || x_.elementwise || careful_ || NV < E::nv;
        if (x_.softcap > 0 || alibi_ || p_.dropout > 0 || into_bias_) {
            finish_panel<true, true>(r, c);
        } else if (checked) {
            finish_panel<true, false>(r, c);
        } else {
            finish_panel<false, false>(r, c);
        }
    }

    template <int NV>
    static FASTATTN_INLINE void zero(V (&acc)[E::mr][NV]) {
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = V::zero();
        }
    }

    template <int NV>
    static FASTATTN_INLINE void store_tile(Acc* to, const V (&acc)[E::mr][NV], V fill) {
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n)
                (n < NV ? acc[m][n < NV ? n : 0] : fill).store(to + m * E::nr + n * w);
        }
    }

    // Raw products become x, with all arguments; cap: the derivative of the softcap.
    void find_scores(std::int64_t r, Acc* x, Acc* cap, std::int64_t c) {
        const RowInfo& row = x_.info[r];
        const std::int64_t j = key_ + c;
        // -inf stands for keys that the row may not attend; of others it is a score that has no weight, but whose
        // products may be NaN.
        const V lowest = V::set1(std::numeric_limits<Acc>::lowest() / 2);
        for (int n = 0; n < E::nv; ++n) {
            V t[1] = {V::load(x + n * w)};
            if (x_.elementwise) {
                cap_scores(x_, t);
                if (x_.softcap > 0) {
                    const V share = t[0] * V::set1(x_.inverse_softcap);
                    (V::set1(Acc(1)) - share * share).store(cap + n * w);
                }
                if (careful_) t[0] = V::max(lowest, t[0]);
                place_scores(x_, row, j + n * w, t);
            } else {
                t[0] = t[0] * V::set1(x_.scale_log2e);
                if (careful_) t[0] = V::max(lowest, t[0]);
            }
            keep_range(row, j + n * w, t);
            t[0].store(x + n * w);
        }
    }

    // P and dS of a panel, from x, P and dP in memory, to where the products take them. checked: pairs that a row may
    // not attend are left out, whatever their v holds; featured: softcap, dropout, ALiBi, dbias.
    template <bool checked, bool featured>
    void finish_panel(std::int64_t r, std::int64_t c) {
        for (int m = 0; m < E::mr; m += E::scalars) {
            if (featured && p_.dropout > 0) {
                for (int s = 0; s < E::scalars; ++s) drop(r + m + s, m + s, c);
            }
            V distance[E::scalars];
            for (int s = 0; s < E::scalars; ++s) distance[s] = V::zero();  // sum of dS |p - j|
#pragma GCC unroll 2
            for (int n = 0; n < E::nv; n += E::scalars == 1 ? 1 : 2) {
                // For pairs along the keys two vectors of each row are needed at once.
                constexpr int side = E::scalars == 1 ? 1 : 2;
                V p[side][E::scalars], ds[side][E::scalars];
#pragma GCC unroll 2
                for (int v = 0; v < side; ++v) {
#pragma GCC unroll 2
                    for (int s = 0; s < E::scalars; ++s)
                        finish_vector<checked, featured>(r, c, m + s, n + v, p[v][s], ds[v][s], distance[s]);
                }
                if (featured && into_bias_) continue;
                Unit* const to = weights_ + (r + m) / E::scalars * plan_.weight_stride + c;
                Unit* const ds_to = ds_ + (r + m) / E::scalars * plan_.weight_stride + c;
#pragma GCC unroll 2
                for (int v = 0; v < side; ++v) {
                    E::combine_rounded(p[v]).store(to + (n + v) * w);
                    E::combine_rounded(ds[v]).store(ds_to + (n + v) * w);
                }
                if constexpr (E::scalars > 1) {
                    for (int s = 0; s < E::scalars; ++s)
                        E::store_weights(ds[0][s], ds[1][s], ds_rows_ + (r + m + s) * plan_.ds_stride,
                                         c + n * w);
                }
            }
            if (featured && alibi_ && !into_bias_) {
                for (int s = 0; s < E::scalars && r + m + s < live_; ++s)
                    shared_slopes_[row_index(batch_, head_, row_ + r + m + s) * plan_.chunks + chunk_] -=
                        V::reduce_add(distance[s]);
            }
        }
    }

    template <bool checked, bool featured>
    FASTATTN_INLINE void finish_vector(std::int64_t r, std::int64_t c, int m, int n, V& p, V& ds,
                                       V& distance) {
        const int at = m * E::nr + n * w;
        const V zero = V::zero();
        p = V::load(p_tile_ + at);
        V dp = V::load(dp_tile_ + at);
        V kept = p;
        if constexpr (featured) {
            if (p_.dropout > 0) {
                kept = V::load(kept_tile_ + at);
                dp = dp * V::select(V::eq(kept, zero), zero, V::set1(keep_factor_));
            }
        }
        ds = p * (dp - V::set1(rows_[r + m].delta));
        if constexpr (checked) {
            const auto masked = V::eq(V::load(x_tile_ + at), V::set1(-kInf<Acc>));
            ds = V::select(masked, zero, ds);
            kept = V::select(masked, zero, kept);
        }
        p = kept;
        if constexpr (featured) {
            if (into_bias_) {
                Acc* to = dbias_ + (r + m) * plan_.key_block + c + n * w;
                (V::load(to) + ds).store(to);
            }
            if (alibi_) {
                const V first = V::set1(Acc(x_.info[r + m].position - double(key_ + c + n * w))) - V::iota();
                distance = V::fma(ds, V::max(first, zero - first), distance);
            }
            if (x_.softcap > 0) {  // NaN where a masked key is
                const auto none = V::eq(ds, zero);
                ds = V::select(none, zero, ds * V::load(cap_tile_ + at));
            }
        }
    }

    void drop(std::int64_t r, int m, std::int64_t c) {
        for (int n = 0; n < E::nv; ++n)
            V::load(p_tile_ + m * E::nr + n * w).store(kept_tile_ + m * E::nr + n * w);
        drop_weights(x_, x_.info[r], kept_tile_ + m * E::nr, key_ + c, E::nr);
    }

    // ---- products with dout, q and k --------------------------------------------------------------------------
    // dv += P^T dout, dk += dS^T q, over the rows that have weights at the keys of a tile.
    void add_key_products() {
        const std::int64_t tiles = padded_ / E::mr;
        for (std::int64_t c = 0; c < keys_; c += E::mr) {
            if (call_.executor.stop_requested()) return;
            std::int64_t begin = 0, end = tiles;
            const auto has_weights = [&](std::int64_t t) {
                return tiles_[t].first < c + E::mr && tiles_[t].last > c;
            };
            while (begin < end && !has_weights(begin)) ++begin;
            while (end > begin && !has_weights(end - 1)) --end;
            if (begin == end) continue;
            const std::int64_t first = begin * E::mr / E::scalars, depth = (end - begin) * E::mr / E::scalars;
            const std::int64_t at = first * plan_.weight_stride + c;
            add_product(dv_ + c * plan_.v_stride, plan_.v_stride, p_.value_dim, weights_ + at, 1,
                        plan_.weight_stride, dout_panels_ + first * E::nr, plan_.row_block / E::scalars,
                        depth);
            add_product(dk_ + c * plan_.d_stride, plan_.d_stride, p_.head_dim, ds_ + at, 1,
                        plan_.weight_stride, q_panels_ + first * E::nr, plan_.row_block / E::scalars, depth);
        }
    }

    // dq += dS k
    void add_query_products(Acc* dq) {
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            const TileColumns tile = tiles_[r / E::mr];
            if (tile.last <= tile.first) continue;
            if (call_.executor.stop_requested()) return;
            const std::int64_t first = tile.first / E::scalars, depth = (tile.last - tile.first) / E::scalars;
            const Unit* a = ds_rows_ + r * plan_.ds_stride + first;
            const Unit* b = k_rows_ + first * E::nr;
            if (r + E::mr <= live_) {
                add_product(dq + r * plan_.d_stride, plan_.d_stride, p_.head_dim, a, plan_.ds_stride, 1, b,
                            plan_.key_block / E::scalars, depth);
                continue;
            }
            // The rows beyond the last one have no place in dq.
            with_count<E::mr>(static_cast<int>(live_ - r), [&](auto count) {
                add_product<decltype(count)::value>(dq + r * plan_.d_stride, plan_.d_stride, p_.head_dim, a,
                                                    plan_.ds_stride, 1, b, plan_.key_block / E::scalars,
                                                    depth);
            });
        }
    }

    // out (MR, dim) += a (MR, depth) . b (panels of dim; panel_rows, nr), over the first `depth` of the rows
    template <int MR = E::mr>
    FASTATTN_INLINE void add_product(Acc* out, std::int64_t out_row, std::int64_t dim, const Unit* a,
                                     std::int64_t a_row, std::int64_t a_step, const Unit* b,
                                     std::int64_t panel_rows, std::int64_t depth) {
        for (std::int64_t c = 0; c < dim; c += E::nr) {
            const std::int64_t left = dim - c;
            const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
            with_count<E::nv>(vectors, [&](auto count) {
                gemm_accumulate<E, MR, decltype(count)::value>(out + c, out_row, a, a_row, b + c * panel_rows,
                                                               E::nr, depth, a_step);
            });
        }
    }

    // The NaN and Inf of k, q and dout, which are zeros in the panels, for the pairs that are attended.
    void add_bad_products(Acc* dq) {
        const S* k = row_pointer<const S>(p_.k, batch_, key_, kv_head_);
        const S* q = row_pointer<const S>(p_.q, batch_, row_, head_);
        const S* dout = row_pointer<const S>(b_.dout, batch_, row_, head_);
        for (std::int64_t r = 0; r < live_; ++r) {
            const TileColumns tile = tiles_[r / E::mr];
            const bool bad_q = bad_query_ && bad_q_[r], bad_dout = bad_gradient_ && bad_dout_[r];
            for (std::int64_t c = tile.first; c < tile.last && c < keys_; ++c) {
                const bool bad_k = bad_key_ && bad_k_[c];
                if (!(bad_k || bad_q || bad_dout) || !attends(x_, x_.info[r], key_ + c)) continue;
                const std::int64_t unit = r / E::scalars * plan_.weight_stride + c;
                const Acc p = E::scalar_of(weights_ + unit, r % E::scalars);
                const Acc ds = E::scalar_of(ds_ + unit, r % E::scalars);
                if (bad_k) add_bad_row(dq + r * plan_.d_stride, ds, k + c * p_.k.seq, p_.k.dim, p_.head_dim);
                if (bad_q) add_bad_row(dk_ + c * plan_.d_stride, ds, q + r * p_.q.seq, p_.q.dim, p_.head_dim);
                if (bad_dout)
                    add_bad_row(dv_ + c * plan_.v_stride, p, dout + r * b_.dout.seq, b_.dout.dim,
                                p_.value_dim);
            }
        }
    }

    static void add_bad_row(Acc* to, Acc weight, const S* row, std::int64_t stride, std::int64_t dim) {
        for (std::int64_t d = 0; d < dim; ++d) {
            const Acc value = to_scalar(row[d * stride]);
            if (!(value - value == 0)) to[d] += weight * value;
        }
    }

    // ---- results ------------------------------------------------------------------------------------------------
    static void add_to(Acc* sum, const Acc* part, std::int64_t n) {
        for (std::int64_t c = 0; c < n; c += w) (V::load(sum + c) + V::load(part + c)).store(sum + c);
    }

    void store_row(const Operand& x, std::int64_t i, std::int64_t h, std::int64_t dim, const Acc* row,
                   Acc factor) {
        const V scale = V::set1(factor);
        S* to = row_pointer<S>(x, batch_, i, h);
        for (std::int64_t d = 0; d < dim; d += w)
            store_strided(V::load(row + d) * scale, to + d * x.dim, x.dim, dim - d);
    }

    void store_head(const ScoreOperand& x, std::int64_t b, std::int64_t h, double value) {
        store_real(x.data, x.dtype, score_offset(x, b, h, 0, 0), value);
    }

    // The sums of the block, over rows or keys that the bias does not tell apart.
    void store_bias(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
        const ScoreOperand& out = b_.dbias;
        const auto within = [](std::int64_t left, std::int64_t most) { return left < most ? left : most; };
        const std::int64_t rows = within(out.query == 0 ? p_.q_size : p_.q_size - i, plan_.row_block);
        const std::int64_t keys = within(out.key == 0 ? p_.kv_size : p_.kv_size - j, plan_.key_block);
        for (std::int64_t r = 0; r < (out.query == 0 ? 1 : rows); ++r) {
            for (std::int64_t c = 0; c < (out.key == 0 ? 1 : keys); ++c) {
                double sum = 0;
                for (std::int64_t rr = r; rr < (out.query == 0 ? rows : r + 1); ++rr)
                    for (std::int64_t cc = c; cc < (out.key == 0 ? keys : c + 1); ++cc)
                        sum += double(dbias_[rr * plan_.key_block + cc]);
                store_real(out.data, out.dtype, score_offset(out, b, h, i + r, j + c), sum);
            }
        }
    }

    static constexpr std::int64_t plan_unit =
        E::mr;  // rows are padded to whole tiles; mr is a multiple of scalars

    const BackwardCall& call_;
    const BackwardProblem& b_;
    const AttentionProblem& p_;
    const BackwardPlan& plan_;
    FlashBlock<E> x_;
    Unit *k_panels_, *v_panels_, *k_rows_, *q_rows_, *dout_rows_, *q_panels_, *dout_panels_, *weights_, *ds_,
        *ds_rows_;
    Acc *x_tile_, *p_tile_, *kept_tile_, *dp_tile_, *cap_tile_, *dk_, *dv_, *dq_, *dq_chunk_, *dbias_;
    State *rows_, *shared_states_;
    Acc* shared_slopes_;
    TileColumns* tiles_;
    std::uint8_t *bad_k_, *bad_q_, *bad_dout_;
    std::int64_t d_units_, v_units_;
    Acc keep_factor_;
    bool alibi_;
    bool into_bias_ = false;
    Acc* chunk_dq_ = nullptr;
    std::int64_t batch_ = 0, kv_head_ = 0, chunk_ = 0;
    std::int64_t key_ = 0, keys_ = 0;  // the block of keys
    std::int64_t head_ = 0, row_ = 0, live_ = 0, padded_ = 0;  // the block of rows
    bool keys_packed_ = false, bad_key_ = false, bad_value_ = false;
    bool bad_query_ = false, bad_gradient_ = false, careful_ = false;
};

template <class E, class S>
void flash_backward(const BackwardCall& call, BackwardPhase phase, std::int64_t item, std::byte* workspace) {
    Backward<E, S> backward(call, workspace);
    switch (phase) {
        case BackwardPhase::prepare: return backward.prepare(item);
        case BackwardPhase::gradients: return backward.gradients(item);
        case BackwardPhase::merge: return backward.merge(item);
        case BackwardPhase::heads: return backward.head_gradients(item);
        case BackwardPhase::bias: return backward.bias(item);
    }
}

}  // namespace
}  // namespace fastattn::cpu
