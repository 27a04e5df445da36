// The backward pass, with P recomputed from lse (Dao et al., FlashAttention, arXiv:2205.14135, algorithm 4).
// For each block of keys of a (batch, kv head), packed once: for each block of rows of each query head of the
// group
//
//   x = score * log2 e   P = 2^(x - lse * log2 e)   dP = dout . v   dS = P (dP - delta)      panel.h
//   dv += P^T dout   dk += dS^T q   dq += dS k                                               products.h
//
// dk and dv of a block of keys are sums over all rows, complete before the next block. dq is summed over the
// blocks of a chunk of keys, and the chunks are added in order. Softcap turns dS into the derivative by scale
// * q.k for dq and dk.
#pragma once

#include "cpu/backward/bias.h"
#include "cpu/backward/pack.h"
#include "cpu/backward/panel.h"
#include "cpu/backward/products.h"
#include "cpu/backward/rows.h"

namespace fastattn::cpu {
namespace {

template <class V>
void add_to(typename V::value_type* sum, const typename V::value_type* part, std::int64_t n) {
    for (std::int64_t c = 0; c < n; c += V::width) (V::load(sum + c) + V::load(part + c)).store(sum + c);
}

// Row i of a head of dq, dk or dv, rounded once.
template <class V, class S>
void store_row(const Operand& x, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t dim,
               const typename V::value_type* row, typename V::value_type factor) {
    const V scale = V::set1(factor);
    S* to = row_pointer<S>(x, b, i, h);
    for (std::int64_t d = 0; d < dim; d += V::width)
        store_strided(V::load(row + d) * scale, to + d * x.dim, x.dim, dim - d);
}

// The totals take the place of n sums.
template <class Acc>
void take_totals(Acc* sums, const double* totals, std::int64_t n) {
    for (std::int64_t c = 0; c < n; ++c) sums[c] = static_cast<Acc>(totals[c] + double(sums[c]));
}

// dk and dv of a block of keys, and what it adds to dq of all rows of the kv head.
template <class E, class S, class K, class W>
void add_keys(BackwardBlock<E>& block, std::int64_t kv_head, std::int64_t j, typename E::Acc* dq) {
    using V = typename E::V;
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const BackwardBuffers<E>& at = block.at;
    start_keys(block, kv_head, j, block.x.entry.kv_len);
    const std::int64_t dk_size = plan.key_block * plan.d_stride, dv_size = plan.key_block * plan.v_stride;
    clear_vectors<V>(at.dk, dk_size);
    clear_vectors<V>(at.dv, dv_size);
    for (std::int64_t c = 0; plan.sections && c < dk_size + dv_size; ++c) at.dk_total[c] = 0;
    std::int64_t blocks = 0;
    const std::int64_t q_len = block.x.entry.q_len;
    for (std::int64_t g = 0; g < p.group; ++g) {
        for (std::int64_t i = 0; i < q_len; i += plan.row_block) {
            if (block.executor.stop_requested()) return;
            if (plan.sections && blocks++ == kSectionBlocks) {
                end_section(at.dk, at.dk_total, dk_size);
                end_section(at.dv, at.dv_total, dv_size);
                blocks = 1;
            }
            if (!start_rows<E, S, K, W>(block, kv_head * p.group + g, i)) continue;
            if (!find_ds(block)) return;
            auto* const dq_rows = dq + (g * q_len + i) * plan.d_stride;
            add_key_products(block);
            add_query_products(block, dq_rows);
            if (block.careful) add_bad_products<E, S, K>(block, dq_rows);
        }
    }
    if (plan.sections) {
        take_totals(at.dk, at.dk_total, dk_size);
        take_totals(at.dv, at.dv_total, dv_size);
    }
    const Operand &dk = block.problem.dk, &dv = block.problem.dv;
    for (std::int64_t c = 0; c < block.keys.size; ++c) {
        store_row<V, K>(dk, block.x.batch, j + c, kv_head, p.head_dim, at.dk + c * plan.d_stride,
                        block.x.scale);
        store_row<V, W>(dv, block.x.batch, j + c, kv_head, p.value_dim, at.dv + c * plan.v_stride,
                        block.keep_factor);
    }
}

// All blocks of keys of a chunk; dq is what the chunk gives to it.
template <class E, class S, class K, class W>
void add_chunk(BackwardBlock<E>& block, std::int64_t kv_head, std::int64_t chunk, typename E::Acc* dq) {
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const std::int64_t q_len = block.x.entry.q_len, dq_size = plan.dq_size;
    double* const total = block.at.dq_total;
    block.chunk = chunk;
    clear_vectors<typename E::V>(dq, dq_size);
    for (std::int64_t c = 0; plan.dq_sections && c < dq_size; ++c) total[c] = 0;
    if (block.alibi) {
        for (std::int64_t h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h) {
            const std::int64_t first = row_number(p, block.x.batch, block.x.entry, h, 0);
            for (std::int64_t i = 0; i < q_len; ++i)
                block.slopes[(first + i) * block.schedule.most_chunks + chunk] = 0;
        }
    }
    const std::int64_t begin = chunk * plan.chunk_blocks, end = begin + plan.chunk_blocks;
    for (std::int64_t kb = begin; kb < end && kb < plan.key_blocks; ++kb) {
        if (plan.dq_sections && kb > begin && (kb - begin) % kSectionBlocks == 0)
            end_section(dq, total, dq_size);
        add_keys<E, S, K, W>(block, kv_head, kb * plan.key_block, dq);
        if (block.executor.stop_requested()) return;
    }
    if (plan.dq_sections) take_totals(dq, total, dq_size);
}

// dq, dk, dv of an entry. Items: (chunk, kv head) with split, else kv heads.
template <class E, class S, class K, class W>
void find_gradients(BackwardBlock<E>& block, std::int64_t item, typename E::Acc* partials) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const std::int64_t kv_head = item % p.kv_heads, q_len = block.x.entry.q_len;
    if (plan.split) {
        const std::int64_t chunk = item / p.kv_heads;
        add_chunk<E, S, K, W>(block, kv_head, chunk,
                              partials + (kv_head * plan.chunks + chunk) * plan.dq_size);
        return;
    }
    Acc* const dq = block.at.dq;
    for (std::int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        add_chunk<E, S, K, W>(block, kv_head, chunk, chunk == 0 ? dq : block.at.dq_chunk);
        if (block.executor.stop_requested()) return;
        if (chunk > 0) add_to<V>(dq, block.at.dq_chunk, plan.dq_size);
    }
    for (std::int64_t g = 0; g < p.group; ++g) {
        for (std::int64_t i = 0; i < q_len; ++i) {
            store_row<V, S>(block.problem.dq, block.x.batch, i, kv_head * p.group + g, p.head_dim,
                            dq + (g * q_len + i) * plan.d_stride, block.x.scale);
        }
    }
}

// With split: adds the chunks of some rows of dq in order. Items of an entry: (query head, block of rows).
template <class E, class S>
void merge_chunks(const BackwardBlock<E>& block, std::int64_t item, typename E::Acc* partials) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const std::int64_t begin = item % plan.row_blocks * plan.row_block, h = item / plan.row_blocks;
    const std::int64_t q_len = block.x.entry.q_len;
    partials += h / p.group * plan.chunks * plan.dq_size;
    for (std::int64_t i = begin; i < begin + plan.row_block && i < q_len; ++i) {
        Acc* row = partials + (h % p.group * q_len + i) * plan.d_stride;
        for (std::int64_t chunk = 1; chunk < plan.chunks; ++chunk)
            add_to<V>(row, row + chunk * plan.dq_size, plan.d_stride);
        store_row<V, S>(block.problem.dq, block.x.batch, i, h, p.head_dim, row, block.x.scale);
    }
}

// S, K, W: dtypes of q, k, v and of their gradients.
template <class E, class S, class K, class W>
void flash_backward(const BackwardCall& call, BackwardPhase phase, std::int64_t item, std::byte* workspace) {
    const EntryTable<BackwardEntry>& entries = call.schedule.entries;
    Phase BackwardEntry::* const own = phase_of(call.problem, phase);
    if (own == nullptr) {  // its items go through all entries
        BackwardBlock<E> block(call, call.schedule.whole, 0, entries.rows[0].lengths, workspace);
        if (phase == BackwardPhase::heads) return find_head_gradients(block, item);
        return find_bias_gradient<E, S, K, W>(block, item);
    }
    const Place<BackwardEntry> place = place_of(entries, own, item);
    const BackwardPlan& plan = phase == BackwardPhase::bias ? place.entry->bias_plan : place.entry->plan;
    BackwardBlock<E> block(call, plan, place.batch, place.entry->lengths, workspace);
    auto* const partials = reinterpret_cast<typename E::Acc*>(call.shared + place.shared);
    switch (phase) {
        case BackwardPhase::prepare: return prepare_rows<E, S, K>(block, place.item);
        case BackwardPhase::gradients: return find_gradients<E, S, K, W>(block, place.item, partials);
        case BackwardPhase::merge: return merge_chunks<E, S>(block, place.item, partials);
        default: return find_bias_gradient<E, S, K, W>(block, place.item);
    }
}

}  // namespace
}  // namespace fastattn::cpu
