// The public C++ API of fastattn: plain C++20, no Python and no CUDA types.
//
//   out[b,i,h,:] = sum_j softmax_j(score[b,h,i,j]) * v[b,j,h/G,:],   G = q_heads / kv_heads
//   score = mask(bias + alibi + softcap(scale * q.k))
//
// Use: fill AttentionParams, make_problem() checks everything once, attention_forward() computes; for
// gradients BackwardParams, make_backward_problem(), attention_backward().
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <fastattn/tensor_view.h>

namespace fastattn {

// ---- errors -----------------------------------------------------------------------------------
// Every message names the argument, what came and what was expected.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct TypeError : Error {  // wrong or mixed dtypes
    using Error::Error;
};
struct ValueError : Error {  // wrong rank, shape, range, overlap
    using Error::Error;
};
struct UnsupportedError : ValueError {  // a forced kernel or device that cannot do it
    using ValueError::ValueError;
};
struct OutOfMemory : Error {  // names the bytes asked for
    explicit OutOfMemory(const char* what_for, std::size_t bytes);
    std::size_t bytes;
};
struct CudaError : Error {  // a failure of CUDA; after a sticky one the process must restart
    CudaError(const std::string& what, bool is_sticky) : Error(what), sticky(is_sticky) {}
    bool sticky;
};
struct Cancelled : Error {  // RunOptions::poll asked to stop; outputs are incomplete
    Cancelled() : Error("fastattn: the computation was cancelled") {}
};

// ---- what the caller fills --------------------------------------------------------------------
enum class Layout : std::uint8_t { bshd, bhsd };

// One condition of a mask without a place for every pair (fastattn.masks of Python), in memory of the host
// that nobody writes to during a call. Positions are p = i + q_offset.
struct MaskCondition {
    enum class Kind : std::uint8_t {
        lists,  // j is in the list of the row
        prefix,  // j < length or j <= p
        chunks,  // floor(j / size) == floor(p / size)
        sinks_window,  // j < keep or p - left <= j <= p
    };
    Kind kind = Kind::lists;
    // List n has the intervals [starts[n], starts[n + 1]) of `spans`, ascending and disjoint; the keys of
    // each are [begin, end). int64, all: index (B or 1, heads or 1, blocks of rows or 1), starts (lists +
    // 1,), spans (n, 2); the last two contiguous.
    TensorView index, starts, spans;
    std::int64_t row_block = 1;  // rows that have one list
    bool kv_heads = false;  // the heads of index are those of k
    bool from_end = false;  // keys count from the entry's kv_len: the last one is -1
    bool exact = false;  // a key that the entry has no place for is an error, but within the last `size`
    std::int64_t least_keys = 0, most_keys = INT64_MAX;  // Sk; of packed entries most_keys alone counts
    TensorView lengths;  // int64 () or (B,)
    std::int64_t size = 1, keep = 0, left = 0;
};

struct AttentionParams {
    TensorView q, k, v;  // rank 4, 3 (no batch) or 2 (no batch, no heads); axes as in layout
    TensorView out;  // q's rank and layout, last axis Dv
    TensorView lse;  // optional (B,Hq,Sq): f64 for f64, else f32
    TensorView weights;  // optional (B,Hq,Sq,Sk): lse's dtype
    Layout layout = Layout::bshd;
    std::optional<double> scale;  // default 1/sqrt(D)
    bool causal = false;
    std::optional<std::int64_t> window_left;  // keys from p - left on
    std::optional<std::int64_t> window_right;  // keys up to p + right
    std::optional<std::int64_t> q_offset;  // position of query row 0; default kv_len - q_len
    TensorView q_offsets;  // the same per batch entry, integer (B,); at most one of the two
    TensorView mask;  // bool, broadcastable to (B,Hq,Sq,Sk); true: may attend
    const char* mask_as_bool = "mask.astype(bool)";  // for the message about a mask of another dtype
    // A pair must satisfy all of them, beside the mask. They must outlive the problem. On the CPU.
    std::vector<MaskCondition> conditions;
    TensorView bias;  // q's or lse's dtype, broadcastable to (B,Hq,Sq,Sk)
    TensorView alibi_slopes;  // any float dtype, (Hq,) or (B,Hq)
    TensorView sinks;  // any float dtype, (Hq,)
    TensorView q_lens;  // integer (B,)
    TensorView kv_lens;  // integer (B,)
    // Packed entries: q (Tq,Hq,D), k, v (Tk,Hkv,D) without a batch axis, integer (B + 1,) bounds. Entry b has
    // the rows [cu_q[b], cu_q[b + 1]) and the keys of cu_kv, by default cu_q. Above, B is the number of
    // entries where it stands alone or before Hq, and the axes of mask, bias and results are (Hq,Tq,Tk);
    // q_lens and weights must not be given.
    TensorView cu_q, cu_kv;
    // Keys in pages: k, v (P,page,Hkv,D) and (P,page,Hkv,Dv) in the layout, table (B,N) of int64: entry b has
    // its keys in the pages table[b, 0], table[b, 1], ..., kv_lens[b] of them. kv_lens must be given, cu_kv
    // must not; Sk is the longest entry's. Nobody writes to the table during a call. On the CPU, forward.
    TensorView block_table;
    std::optional<double> softcap;
    double dropout = 0.0;
    std::uint64_t seed = 0;
    // Of out in the forward: q's, or lse's, which leaves results unrounded for merge_states().
    std::optional<DType> out_dtype;
};

// ---- the validated problem ----------------------------------------------------------------------
// Axes are always (batch, sequence, head, feature), whatever the caller's layout was; strides in
// elements. Absent optional arrays have data == nullptr.
struct Operand {
    void* data = nullptr;
    std::int64_t batch = 0, seq = 0, head = 0, dim = 0;  // batch: from page to page where keys lie in pages
    // Key j of entry b is row j % page of page pages[b * entry_pages + j / page].
    const std::int64_t* pages = nullptr;
    std::int64_t entry_pages = 0, page = 0;
};
// An array over (batch, head, query, key); broadcast axes have stride 0.
struct ScoreOperand {
    void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t batch = 0, head = 0, query = 0, key = 0;
    DeviceType place = DeviceType::cpu;
};
// An array over (batch, head); batch stride 0 when it has no batch axis.
struct HeadOperand {
    const void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t batch = 0, head = 0;
    DeviceType place = DeviceType::cpu;
};
struct KeyRange {
    std::int64_t begin = 0, end = 0;  // begin <= end
};

struct AttentionProblem {
    DType dtype = DType::f32;  // of q
    DType out_dtype = DType::f32;  // of out: dtype or lse_dtype; of the backward dtype
    DType k_dtype = DType::f32, v_dtype = DType::f32;  // make_problem() wants q's
    DType lse_dtype = DType::f32;  // of lse and weights
    Device device{};
    std::int64_t batch = 0, q_heads = 0, kv_heads = 0;  // batch: entries, packed ones too
    std::int64_t group = 1;  // q_heads / kv_heads: 0 without query heads, 1 without any
    std::int64_t q_size = 0, kv_size = 0;  // Sq, Sk; Tq, Tk of packed entries
    std::int64_t head_dim = 0, value_dim = 0;  // D, Dv
    Operand q, k, v, out;
    ScoreOperand lse;  // key stride unused
    ScoreOperand weights, mask, bias;
    HeadOperand alibi_slopes, sinks;
    HeadOperand q_lens, kv_lens, q_offsets;  // head stride unused
    HeadOperand cu_q, cu_kv;  // bounds of packed entries, batch + 1 each
    bool has_q_lens = false, has_kv_lens = false, has_q_offset = false;
    std::int64_t q_offset = 0;  // used when has_q_offset and q_offsets.data == nullptr
    double scale = 1.0;
    double softcap = 0.0;  // 0: none
    bool causal = false;
    std::int64_t window_left = -1, window_right = -1;  // -1: unbounded
    double dropout = 0.0;
    std::uint64_t seed = 0;
    const MaskCondition* conditions = nullptr;  // those of the params
    std::int64_t condition_count = 0;

    bool packed() const noexcept { return cu_q.data != nullptr; }
    bool paged() const noexcept { return k.pages != nullptr; }
    // Entries that the arrays have an axis for.
    std::int64_t array_batch() const noexcept { return packed() ? 1 : batch; }
    // Where the rows and keys of an entry begin and end in the arrays, padding too.
    KeyRange rows_of(std::int64_t b) const noexcept;
    KeyRange keys_of(std::int64_t b) const noexcept;
    // How many of `size` rows or keys that an entry has place for are there.
    std::int64_t q_len_among(std::int64_t b, std::int64_t size) const noexcept;
    std::int64_t kv_len_among(std::int64_t b, std::int64_t size) const noexcept;

    // Whether the host can read the lengths and offsets. Where it cannot, the functions below know only the
    // sizes, and key_range() may be too wide.
    bool ranges_known() const noexcept;
    // Valid lengths and row-0 position of one batch entry.
    std::int64_t q_len(std::int64_t b) const noexcept;
    std::int64_t kv_len(std::int64_t b) const noexcept;
    std::int64_t offset(std::int64_t b) const noexcept;
    // Keys that row i of batch entry b may attend by kv_len, causal and window alone (mask and bias
    // can only take keys away). Saturating, so any q_offset is safe.
    KeyRange key_range(std::int64_t b, std::int64_t i) const noexcept;
};

// Checks ranks, shapes, dtypes, sizes (64-bit, overflow-checked), ranges and overlap of the outputs.
// Throws TypeError or ValueError. With for_execution == false (explain) out.data may be null.
AttentionProblem make_problem(const AttentionParams& params, bool for_execution = true);

// ---- the backward pass --------------------------------------------------------------------------
// Gradients from out and lse of the forward, with P recomputed (Dao et al., FlashAttention, algorithm 4),
// over the keys that a row may attend; r = keep / (1 - dropout):
//
//   P = exp(score - lse)   dv = sum_i r P dout   dP = r (dout . v)   delta = dout . out
//   dS = P (dP - delta + dlse)   dbias = dS   dalibi = -sum dS |p - j|
//   dsink = sum_i exp(sink - lse) (dlse - delta)
//   dq = scale sum_j dS' k   dk = scale sum_i dS' q     dS' = dS (1 - (s/c)^2) under a softcap c, else dS
struct BackwardParams {
    AttentionParams forward;  // the forward's arguments; its out and lse are read, weights must not be given
    TensorView dout;  // out's shape and dtype
    TensorView dlse;  // optional: lse's shape and dtype
    TensorView dq, dk, dv;  // results: shape and dtype of q, k, v
    TensorView dbias;  // optional result: bias' shape and dtype; summed over the axes that bias broadcasts
    TensorView dalibi_slopes;  // optional result: shape and dtype of alibi_slopes
    TensorView dsinks;  // optional result: shape and dtype of sinks
};

struct BackwardProblem {
    AttentionProblem forward;
    Operand dout, dq, dk, dv;
    ScoreOperand dlse;  // data == nullptr: zeros
    ScoreOperand dbias;  // data == nullptr: not asked for, or empty. Stride 0: summed over that axis
    ScoreOperand dalibi, dsinks;  // the same; query and key strides unused
};

// As make_problem(). With for_execution == false the results' data may be null.
BackwardProblem make_backward_problem(const BackwardParams& params, bool for_execution = true);

// ---- running ------------------------------------------------------------------------------------
struct RunOptions {
    std::string_view kernel{};  // empty: FASTATTN_KERNEL, else the first kernel that supports it
    std::string_view device{};  // empty: FASTATTN_DEVICE, else where the arrays are
    int num_threads = 0;  // 0: get_num_threads()
    int max_threads = 0;  // a further limit, of this call alone; 0: none
    // Arrays on a CUDA device: the cudaStream_t in which they are ready and the call is queued; null: the
    // legacy default stream. The call then returns before the result is there.
    void* stream = nullptr;
    // Called from the calling thread at least every 50 ms; true stops the call with Cancelled.
    bool (*poll)(void*) = nullptr;
    void* poll_context = nullptr;
};

void attention_forward(const AttentionProblem& problem, const RunOptions& options = {});
void attention_backward(const BackwardProblem& problem, const RunOptions& options = {});

// Exact attention over the union of disjoint sets of keys, from out and lse of each: all outs of one shape
// and dtype, the lses (B,Hq,Sq). Sums in f32 (f64), in the order given, rounded once. A part with lse -inf
// counts for nothing, whatever its out holds; of no other ones the result is 0 and -inf. Sinks belong into
// one part alone. On the CPU.
struct MergeParams {
    std::vector<TensorView> outs, lses;
    TensorView out, lse;  // the results: out of outs' dtype or another that is summed alike
    Layout layout = Layout::bshd;
};
void merge_states(const MergeParams& params, const RunOptions& options = {});

struct Refusal {
    std::string kernel, reason;
};
struct Explanation {
    std::string kernel, device;
    std::string device_choice;  // why this device
    std::string algorithm;  // e.g. "prefill" or "decode", block sizes, splits
    std::int64_t workspace_bytes = 0;
    std::int64_t work_items = 0;
    int threads = 0;
    double flops = 0.0;  // 2*(D+Dv) per (row, key) pair inside causal, window, lengths and conditions
    double bytes = 0.0;  // inputs and outputs read or written once
    std::vector<Refusal> refused;  // every other kernel, and why it was not taken
};
Explanation explain(const AttentionProblem& problem, const RunOptions& options = {});

struct KernelInfo {
    std::string name, device;
    std::vector<DType> dtypes;
    bool usable = false;  // on this machine
    std::string reason;  // why not, when not usable
};
std::vector<KernelInfo> kernels();

int get_num_threads() noexcept;
void set_num_threads(int n);  // n >= 1, else ValueError

const char* version() noexcept;

}  // namespace fastattn
