// fastattn.mha, fastattn.mha_backward and fastattn.explain: arguments in, AttentionParams, core, results out.
#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fastattn/attention.h>

#include "bindings/arguments.h"
#include "bindings/arrays.h"
#include "bindings/docstrings.h"
#include "bindings/errors.h"
#include "bindings/gil.h"
#include "bindings/mask_words.h"
#include "bindings/numpy_interop.h"
#include "bindings/places.h"
#include "bindings/register.h"
#include "core/device_choice.h"
#include "core/environment.h"
#include "core/flops.h"

namespace fastattn::bindings {
namespace {

// Below this, releasing and taking back the GIL would be a good part of the call.
constexpr double kFlopsToReleaseGil = 20e3;
constexpr std::int64_t kEntriesToReleaseGil = 256;
// Results up to this are allocated before the arguments are checked, larger ones after.
constexpr std::int64_t kSmallResultBytes = std::int64_t{1} << 20;

// Axes of the caller's q; -1 where q lacks the axis.
struct QAxes {
    int seq, head, batch;
};

QAxes axes_of_q(const AttentionParams& params) noexcept {
    const int rank = params.q.rank;
    if (rank == 2) {
        return {0, -1, -1};
    }
    const bool bshd = params.layout == Layout::bshd;
    return {rank - (bshd ? 3 : 2), rank - (bshd ? 2 : 3), rank == 4 ? 0 : -1};
}

// What limit_threads() set for the calls of this thread.
thread_local int thread_limit = 0;

// One call's arguments, converted.
struct Call {
    AttentionParams params;
    RunOptions options;
    Arrays arrays;
    PyRef mask_words;  // of a Mask
    PyRef pages;  // k, v and table of keys in pages
    bool return_lse = false, return_weights = false;
};

Layout to_layout(const Arguments& arguments) {
    const char* text = to_text(arguments, kLayout);
    const std::string_view layout = text == nullptr ? "bshd" : text;
    if (layout != "bshd" && layout != "bhsd") {
        raise(PyExc_ValueError, "layout: expected 'bshd' or 'bhsd', got %R", arguments[kLayout]);
    }
    return layout == "bshd" ? Layout::bshd : Layout::bhsd;
}

void read_q_offset(const Arguments& arguments, Call& call) {
    PyObject* object = arguments[kQOffset];
    if (is_integer_scalar(object) || !(is_ndarray(object) || has_dlpack(object))) {
        call.params.q_offset = to_int64(object, "q_offset");
        return;
    }
    call.params.q_offsets = call.arrays.input(object, "q_offset");
    if (call.params.q_offsets.rank == 0) {  // a scalar of another library
        call.params.q_offsets = {};
        call.params.q_offset = to_int64(object, "q_offset");
    }
}

// fastattn.masks.Mask; false for anything else.
bool read_mask_lists(PyObject* mask, Call& call) {
    if (is_ndarray(mask)) {
        return false;
    }
    call.mask_words = optional_attribute(mask, "_fastattn_words");
    if (!call.mask_words || !is_ndarray(call.mask_words.get())) {
        return false;
    }
    read_mask_words(call.arrays.input(call.mask_words.get(), "mask"), call.params);
    return true;
}

// Keys in pages: an object with (k, v, table); false for anything else. v is then that object's, too.
bool read_pages(PyObject* keys, Call& call) {
    if (is_ndarray(keys)) {
        return false;
    }
    call.pages = optional_attribute(keys, "_fastattn_pages");
    if (!call.pages || !PyTuple_Check(call.pages.get()) || PyTuple_GET_SIZE(call.pages.get()) != 3) {
        return false;
    }
    call.params.k = call.arrays.input(PyTuple_GET_ITEM(call.pages.get(), 0), "k");
    call.params.v = call.arrays.input(PyTuple_GET_ITEM(call.pages.get(), 1), "v");
    call.params.block_table = call.arrays.input(PyTuple_GET_ITEM(call.pages.get(), 2), "block_table");
    return true;
}

void read_arguments(const Arguments& arguments, Call& call) {
    AttentionParams& params = call.params;
    call.options.max_threads = thread_limit;
    params.layout = to_layout(arguments);
    call.return_lse = to_bool(arguments, kReturnLse, false);
    call.return_weights = to_bool(arguments, kReturnWeights, false);
    for (const auto& [slot, member] : kFlags) {
        params.*member = to_bool(arguments, slot, false);
    }
    for (const auto& [slot, member] : kOptionalNumbers) {
        if (arguments.given(slot)) {
            params.*member = to_double(arguments, slot, 0.0);
        }
    }
    for (const auto& [slot, member] : kNumbers) {
        params.*member = to_double(arguments, slot, params.*member);
    }
    params.seed = to_seed(arguments);
    if (arguments.given(kWindow)) {
        to_window(arguments, params.window_left, params.window_right);
    }
    if (arguments.given(kOutDtype)) {
        params.out_dtype = to_float_dtype(arguments, kOutDtype);
    }
    if (const char* device = to_text(arguments, kDevice)) {
        call.options.device = device;
    }
    if (const char* kernel = to_text(arguments, kKernel)) {
        call.options.kernel = kernel;
    }
    for (const auto& [slot, member] : kArrays) {
        const bool required = slot == kQ || slot == kK || slot == kV;  // None is then no array, not absent
        if ((slot == kV && params.block_table.given()) || (slot == kK && read_pages(arguments[kK], call))) {
            continue;
        }
        if (slot == kMask && arguments.given(kMask) && read_mask_lists(arguments[kMask], call)) {
            continue;
        }
        if (slot != kQOffset && (required || arguments.given(slot))) {
            params.*member = call.arrays.input(arguments[slot], slot_name(slot));
        }
    }
    if (params.mask.given() && params.mask.dtype != DType::boolean &&
        optional_attribute(arguments[kMask], "bool")) {
        params.mask_as_bool = "mask.bool()";  // PyTorch's tensors have no astype()
    }
    if (arguments.given(kQOffset)) {
        read_q_offset(arguments, call);
    }
}

void read_out(const Arguments& arguments, Call& call) {
    AttentionParams& params = call.params;
    if (arguments.given(kOut)) {
        params.out = call.arrays.output(arguments[kOut], "out");
        call.arrays.check_overlap_of_copies(params.out);
        for (const auto& [slot, member] : kArrays) {
            call.arrays.check_overlap_with_copy(slot_name(slot), params.*member);
        }
    }
}

void set_shape(TensorView& view, DType dtype, int rank, const std::int64_t* shape) noexcept {
    view = TensorView{};
    view.dtype = dtype;
    view.rank = rank;
    std::copy_n(shape, rank, view.shape);
    set_compact_strides(view);
}

// Gives the outputs that are still to be made their dtype and shape. False when q, k and v fit together so
// badly that there is none; make_problem() says how.
bool shape_results(Call& call, bool with_out) noexcept {
    AttentionParams& params = call.params;
    const int rank = params.q.rank;
    const int key_rank = params.block_table.given() ? 4 : rank;
    if (rank < 2 || rank > 4 || params.k.rank != key_rank || params.v.rank != key_rank ||
        !is_float(params.q.dtype)) {
        return false;
    }
    std::int64_t shape[kMaxRank] = {};
    if (with_out) {
        std::copy_n(params.q.shape, rank - 1, shape);
        shape[rank - 1] = params.v.shape[key_rank - 1];
        set_shape(params.out, params.out_dtype.value_or(params.q.dtype), rank, shape);
    }
    const QAxes axes = axes_of_q(params);
    const DType lse_dtype = params.q.dtype == DType::f64 ? DType::f64 : DType::f32;
    int score_rank = 0;
    for (const int axis : {axes.batch, axes.head, axes.seq}) {
        if (axis >= 0) {
            shape[score_rank++] = params.q.shape[axis];
        }
    }
    if (call.return_lse) {
        set_shape(params.lse, lse_dtype, score_rank, shape);
    }
    if (call.return_weights) {
        shape[score_rank++] = params.k.shape[axes.seq];
        set_shape(params.weights, lse_dtype, score_rank, shape);
    }
    return true;
}

std::int64_t saturated_bytes(const TensorView& view) {
    try {
        return view.given() ? checked_bytes("", view.dtype, view.rank, view.shape) : 0;
    } catch (const ValueError&) {
        return kSmallResultBytes + 1;
    }
}

// Throws ValueError when the bytes of a result overflow.
void check_result_bytes(const AttentionParams& params) {
    const auto check = [](const char* name, const TensorView& view) {
        if (view.given()) {
            checked_bytes(name, view.dtype, view.rank, view.shape);
        }
    };
    check("out", params.out);
    check("lse", params.lse);
    check("weights", params.weights);
}

struct Results {
    Result out, lse, weights;
};

void allocate_results(PyObject* q, Call& call, bool with_out, Results& results) {
    AttentionParams& params = call.params;
    const auto allocate = [&](Result& result, const char* name, TensorView& view) {
        const TensorView wanted = view;
        result.allocate(q, params.q.device, name, wanted.dtype, wanted.rank, wanted.shape, view,
                        call.arrays.cuda());
    };
    if (with_out) {
        allocate(results.out, "out", params.out);
    }
    if (call.return_lse) {
        allocate(results.lse, "lse", params.lse);
    }
    if (call.return_weights) {
        allocate(results.weights, "weights", params.weights);
    }
}

// Whether host arrays go, or may go, to a GPU. Then the core is told first what Python knows of CUDA.
bool may_use_cuda(const AttentionProblem& problem, const RunOptions& options) {
    const Environment& defaults = environment();
    const auto given = [](std::string_view option, const std::string& fallback) {
        return option.empty() ? std::string_view(fallback) : option;
    };
    const std::string_view device = given(options.device, defaults.device),
                           kernel = given(options.kernel, defaults.kernel);
    if (!device.empty() || !kernel.empty()) {
        return device.starts_with("cuda") || (device.empty() && kernel.starts_with("cuda"));
    }
    if (flops_at_most(problem) < kFlopsForGpu) {
        return false;
    }
    load_device_speeds();
    const int all = get_num_threads(), limit = options.max_threads;
    const int threads = limit > 0 && limit < all ? limit : all;
    return estimate_devices(problem, threads, device_speeds()).gpu_is_faster();
}

const AttentionProblem& forward_of(const AttentionProblem& problem) { return problem; }
const AttentionProblem& forward_of(const BackwardProblem& problem) { return problem.forward; }
void run(const AttentionProblem& problem, const RunOptions& options) { attention_forward(problem, options); }
void run(const BackwardProblem& problem, const RunOptions& options) { attention_backward(problem, options); }

template <class Problem>
void compute(const Problem& problem, Call& call) {
    // Also when the call fails half-way: what other libraries lent must not be given back while it is read.
    const CudaUse::Wait wait(call.arrays.cuda());
    const AttentionProblem& forward = forward_of(problem);
    RunOptions& options = call.options;
    options.stream = call.arrays.cuda().stream();
    bool on_gpu = forward.device.type == DeviceType::cuda;
    if (!on_gpu && may_use_cuda(forward, options)) {
        prepare_cuda();
        on_gpu = true;
    }
    const bool is_short = flops_at_most(forward) < kFlopsToReleaseGil && forward.batch < kEntriesToReleaseGil;
    if ((is_short && !on_gpu) || !may_release_gil()) {
        run(problem, options);
        return;
    }
    WithoutGil detached;
    options.poll = &WithoutGil::poll;
    options.poll_context = &detached;
    run(problem, options);
}

// After computing, with the GIL.
void finish(Call& call) {
    call.arrays.cuda().check();
    if (PyErr_Occurred() != nullptr) {  // a signal handler raised when the work was already done
        throw PythonError{};
    }
}

PyRef pack(PyObject* q, PyObject* given_out, const Call& call, Results& results) {
    PyRef out = given_out != nullptr ? PyRef::borrow(given_out) : results.out.take(q);
    if (!call.return_lse && !call.return_weights) {
        return out;
    }
    PyRef tuple = PyRef::checked(PyTuple_New(1 + int{call.return_lse} + int{call.return_weights}));
    Py_ssize_t next = 0;
    PyTuple_SET_ITEM(tuple.get(), next++, out.release());
    if (call.return_lse) {
        PyTuple_SET_ITEM(tuple.get(), next++, results.lse.take(q).release());
    }
    if (call.return_weights) {
        PyTuple_SET_ITEM(tuple.get(), next++, results.weights.take(q).release());
    }
    return tuple;
}

// Entries without bounds are no packed entries.
void check_bounds(const Signature& signature, const Arguments& arguments) {
    if (signature.taken != &ArgumentRow::explain && signature.takes(kCuQ) && !arguments.given(kCuQ)) {
        raise(PyExc_TypeError, "cu_q: expected an integer array (B + 1,), got None");
    }
}

template <const Signature& signature>
PyRef run_forward(PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    const Arguments arguments = parse_arguments(signature, args, count, keywords);
    check_bounds(signature, arguments);
    Call call;
    read_arguments(arguments, call);
    read_out(arguments, call);
    PyObject* q = arguments[kQ];
    PyObject* given_out = arguments.given(kOut) ? arguments[kOut] : nullptr;
    const bool with_out = given_out == nullptr;
    AttentionParams& params = call.params;
    const bool shaped = shape_results(call, with_out);
    const bool small = shaped && saturated_bytes(params.out) <= kSmallResultBytes &&
                       saturated_bytes(params.lse) + saturated_bytes(params.weights) <= kSmallResultBytes;
    if (!small) {
        // An error in the arguments is worth more than "no memory" for a result of a nonsensical shape.
        make_problem(params, false);
        if (!shaped) {
            raise(PyExc_RuntimeError, "fastattn: make_problem accepted arrays that have no result shape");
        }
        check_result_bytes(params);
    }
    Results results;
    allocate_results(q, call, with_out, results);
    const AttentionProblem problem = make_problem(params);
    compute(problem, call);
    finish(call);
    if (given_out != nullptr) {
        call.arrays.write_back();
        mark_written(given_out);
    }
    return pack(q, given_out, call, results);
}

// dq, dk, dv, dbias, dalibi_slopes, dsinks: each like its argument.
class Gradients {
public:
    Gradients(PyObject* q, Call& call, BackwardParams& params, bool need_dbias) : q_(q), call_(call) {
        const AttentionParams& f = params.forward;
        add("dq", f.q, params.dq);
        add("dk", f.k, params.dk);
        add("dv", f.v, params.dv);
        add("dbias", need_dbias ? f.bias : TensorView{}, params.dbias);
        add("dalibi_slopes", f.alibi_slopes, params.dalibi_slopes);
        add("dsinks", f.sinks, params.dsinks);
    }

    void allocate() {
        for (Entry& entry : entries_) {
            const TensorView wanted = *entry.view;
            if (!wanted.given()) {
                continue;
            }
            entry.result.allocate(q_, call_.params.q.device, entry.name, wanted.dtype, wanted.rank,
                                  wanted.shape, *entry.view, call_.arrays.cuda());
        }
    }

    PyRef take() {
        PyRef tuple = PyRef::checked(PyTuple_New(kCount));
        for (int i = 0; i < kCount; ++i) {
            PyRef item = entries_[i].view->given() ? entries_[i].result.take(q_) : PyRef::borrow(Py_None);
            PyTuple_SET_ITEM(tuple.get(), i, item.release());
        }
        // Looked up per call: a class kept here would outlive its interpreter.
        const PyRef module = PyRef::checked(PyImport_ImportModule("fastattn._attention"));
        const PyRef type = PyRef::checked(PyObject_GetAttrString(module.get(), "Gradients"));
        return PyRef::checked(PyObject_CallObject(type.get(), tuple.get()));
    }

private:
    static constexpr int kCount = 6;
    struct Entry {
        const char* name;
        TensorView* view;
        Result result;
    };

    void add(const char* name, const TensorView& like, TensorView& view) {
        if (like.given()) {
            set_shape(view, like.dtype, like.rank > kMaxRank ? 0 : like.rank, like.shape);
        }
        Entry& entry = entries_[count_++];
        entry.name = name;
        entry.view = &view;
    }

    PyObject* q_;
    Call& call_;
    Entry entries_[kCount];
    int count_ = 0;
};

template <const Signature& signature>
PyRef run_backward(PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    const Arguments arguments = parse_arguments(signature, args, count, keywords);
    check_bounds(signature, arguments);
    Call call;
    read_arguments(arguments, call);
    BackwardParams params;
    params.dout = call.arrays.input(arguments[kDout], "dout");
    call.params.out = call.arrays.input(arguments[kOut], "out");
    call.params.lse = call.arrays.input(arguments[kLse], "lse");
    if (arguments.given(kDlse)) {
        params.dlse = call.arrays.input(arguments[kDlse], "dlse");
    }
    params.forward = call.params;
    Gradients gradients(arguments[kQ], call, params, to_bool(arguments, kNeedDbias, true));
    make_backward_problem(params, false);  // an error in the arguments is worth more than "no memory"
    gradients.allocate();
    compute(make_backward_problem(params), call);
    finish(call);
    return gradients.take();
}

PyRef run_explain(PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    const Arguments arguments = parse_arguments(kExplainSignature, args, count, keywords);
    Call call;
    read_arguments(arguments, call);
    read_out(arguments, call);
    shape_results(call, !arguments.given(kOut));
    const AttentionProblem problem = make_problem(call.params, false);
    check_result_bytes(call.params);
    prepare_cuda();
    call.options.stream = call.arrays.cuda().stream();
    const Explanation plan = explain(problem, call.options);
    const PyRef refused = PyRef::checked(PyDict_New());
    for (const Refusal& refusal : plan.refused) {
        const PyRef reason = PyRef::checked(PyUnicode_FromString(refusal.reason.c_str()));
        if (PyDict_SetItemString(refused.get(), refusal.kernel.c_str(), reason.get()) != 0) {
            throw PythonError{};
        }
    }
    const PyRef keyword_arguments = PyRef::checked(
        Py_BuildValue("{s:s,s:s,s:s,s:s,s:L,s:L,s:i,s:d,s:d,s:O}", "kernel", plan.kernel.c_str(), "device",
                      plan.device.c_str(), "device_choice", plan.device_choice.c_str(), "algorithm",
                      plan.algorithm.c_str(), "workspace_bytes", static_cast<long long>(plan.workspace_bytes),
                      "work_items", static_cast<long long>(plan.work_items), "threads", plan.threads, "flops",
                      plan.flops, "bytes", plan.bytes, "refused", refused.get()));
    // Looked up per call: a class kept here would outlive its interpreter.
    const PyRef module = PyRef::checked(PyImport_ImportModule("fastattn._attention"));
    const PyRef type = PyRef::checked(PyObject_GetAttrString(module.get(), "Explanation"));
    const PyRef none = PyRef::checked(PyTuple_New(0));
    return PyRef::checked(PyObject_Call(type.get(), none.get(), keyword_arguments.get()));
}

// merge_states(outs, lses, layout, out): tuples, a str, an array or None, all by position.
PyRef run_merge(PyObject* const* args, Py_ssize_t count, PyObject*) {
    if (count != 4 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) {
        raise(PyExc_TypeError, "merge_states: expected (tuple, tuple, layout, out)");
    }
    Call call;
    MergeParams params;
    Arguments layout;
    layout.values[kLayout] = args[2];
    params.layout = to_layout(layout);
    std::vector<std::string> names;
    names.reserve(static_cast<std::size_t>(PyTuple_GET_SIZE(args[0]) + PyTuple_GET_SIZE(args[1])));
    const auto read = [&](PyObject* parts, const char* name, std::vector<TensorView>& views) {
        for (Py_ssize_t p = 0; p < PyTuple_GET_SIZE(parts); ++p) {
            names.push_back(std::string(name) + "[" + std::to_string(p) + "]");
            views.push_back(call.arrays.input(PyTuple_GET_ITEM(parts, p), names.back().c_str()));
        }
    };
    read(args[0], "outs", params.outs);
    read(args[1], "lses", params.lses);
    PyObject* const given_out = args[3] == Py_None ? nullptr : args[3];
    Results results;
    PyObject* const like = params.outs.empty() ? nullptr : PyTuple_GET_ITEM(args[0], 0);
    if (given_out != nullptr) {
        params.out = call.arrays.output(given_out, "out");
        call.arrays.check_overlap_of_copies(params.out);
    }
    const auto allocate = [&](Result& result, const char* name, const TensorView& of, TensorView& view) {
        result.allocate(like, of.device, name, of.dtype, std::min(of.rank, kMaxRank), of.shape, view,
                        call.arrays.cuda());
    };
    // Else merge_states() says what is wrong, which is worth more than "no memory" for a result.
    const auto elements_of = [](const TensorView& view) {
        double elements = 1.0;
        for (int axis = 0; axis < std::min(view.rank, kMaxRank); ++axis) {
            elements *= static_cast<double>(view.shape[axis]);
        }
        return elements;
    };
    if (like != nullptr && params.lses.size() == params.outs.size() && params.outs[0].rank >= 2 &&
        params.outs[0].rank <= kMaxRank && params.lses[0].rank == params.outs[0].rank - 1 &&
        elements_of(params.lses[0]) * static_cast<double>(params.outs[0].shape[params.outs[0].rank - 1]) ==
            elements_of(params.outs[0])) {
        if (given_out == nullptr) {
            allocate(results.out, "out", params.outs[0], params.out);
        }
        allocate(results.lse, "lse", params.lses[0], params.lse);
    }
    call.options.max_threads = thread_limit;
    const CudaUse::Wait wait(call.arrays.cuda());
    if (may_release_gil()) {
        WithoutGil detached;
        call.options.poll = &WithoutGil::poll;
        call.options.poll_context = &detached;
        merge_states(params, call.options);
    } else {
        merge_states(params, call.options);
    }
    finish(call);
    if (given_out != nullptr) {
        call.arrays.write_back();
        mark_written(given_out);
    }
    PyRef tuple = PyRef::checked(PyTuple_New(2));
    PyTuple_SET_ITEM(
        tuple.get(), 0,
        given_out != nullptr ? PyRef::borrow(given_out).release() : results.out.take(like).release());
    PyTuple_SET_ITEM(tuple.get(), 1, results.lse.take(like).release());
    return tuple;
}

const char* taken_text(Taken taken) noexcept {
    return taken == Taken::none ? "none" : taken == Taken::position ? "position" : "name";
}

// One row per argument; fastattn._arguments makes Argument of it.
py::tuple argument_rows() {
    py::tuple rows(std::size(kArguments));
    for (int slot = 0; slot < kSlots; ++slot) {
        const ArgumentRow& row = kArguments[slot];
        rows[slot] = py::make_tuple(row.name, kind_of(slot), row.fallback, taken_text(row.forward),
                                    taken_text(row.backward));
    }
    return rows;
}

using Run = PyRef (*)(PyObject* const*, Py_ssize_t, PyObject*);

// Not noexcept: a thread that is cancelled unwinds through it.
template <Run run>
PyObject* entry(PyObject* module, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    try {
        return run(args, count, keywords).release();
    } catch (...) {
        set_python_error(module);
        return nullptr;
    }
}

template <Run run>
PyCFunction c_function() noexcept {
    // Through a type without a prototype, as CPython's documentation asks for (-Wcast-function-type).
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<run>));
}

}  // namespace

void register_attention(py::module_& m) {
    // CPython keeps pointers to these; they hold no Python objects.
    static const std::string docs[] = {
        signature_text(kForwardSignature) + kMhaDoc, signature_text(kExplainSignature) + kExplainDoc,
        signature_text(kBackwardSignature) + kBackwardDoc, signature_text(kVarlenSignature) + kVarlenDoc,
        signature_text(kVarlenBackwardSignature) + kVarlenBackwardDoc};
    static PyMethodDef methods[] = {
        {"mha", c_function<run_forward<kForwardSignature>>(), METH_FASTCALL | METH_KEYWORDS, docs[0].c_str()},
        {"explain", c_function<run_explain>(), METH_FASTCALL | METH_KEYWORDS, docs[1].c_str()},
        {"mha_backward", c_function<run_backward<kBackwardSignature>>(), METH_FASTCALL | METH_KEYWORDS,
         docs[2].c_str()},
        {"mha_varlen", c_function<run_forward<kVarlenSignature>>(), METH_FASTCALL | METH_KEYWORDS,
         docs[3].c_str()},
        {"mha_varlen_backward", c_function<run_backward<kVarlenBackwardSignature>>(),
         METH_FASTCALL | METH_KEYWORDS, docs[4].c_str()},
        {"merge_states", c_function<run_merge>(), METH_FASTCALL | METH_KEYWORDS,
         "merge_states($module, outs, lses, layout, out, /)\n--\n\nSee fastattn.merge_states."},
        {nullptr, nullptr, 0, nullptr},
    };
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) {
        throw py::error_already_set();
    }
    m.def("argument_rows", &argument_rows,
          "argument_rows()\n--\n\n(name, kind, default as Python writes it or '', how mha takes it, how "
          "mha_backward "
          "takes it) of each argument.");
    m.def(
        "limit_threads", [](int n) { return std::exchange(thread_limit, std::max(n, 0)); }, py::arg("n"),
        "limit_threads(n)\n--\n\nAt most n CPU threads in calls of this Python thread, 0: no limit but "
        "`get_num_threads`. Returns the limit before.");
}

}  // namespace fastattn::bindings
