"""ONNX Runtime: Attention of opset 23, and MultiHeadAttention and GroupQueryAttention of com.microsoft."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from attnbench import dense
from attnbench.cases import Case
from attnbench.peers.base import Inputs, Maker, NotApplicable, Runner, refuse_large_scores
from attnbench.peers.onnx_model import Tensor, one_node_model
from fastattn._check.shapes import Array


class OnnxRuntime:
    """The operators that have the case are compared, and the fastest is timed."""

    name = "onnxruntime"
    limited_by = "SessionOptions.intra_op_num_threads"

    def __init__(self, threads: int) -> None:
        self.ort = importlib.import_module("onnxruntime")
        self.threads = threads

    def candidates(self, case: Case) -> list[Maker]:
        if case.kind == "backward":
            raise NotApplicable("it computes no gradients")
        if case.dtype not in ("float32", "float16"):
            raise NotApplicable(f"no CPU attention in {case.dtype}")
        makers: list[Maker] = []
        if case.feature != "sinks":
            makers.append(self._attention)
            if case.dtype == "float32" and case.q_heads == case.kv_heads and case.softcap is None:
                makers.append(self._multi_head)
        always_causal = case.causal or (case.q_size == 1 and case.window is None)
        if always_causal and case.v_dim == case.head_dim and _one_sided(case):
            makers.append(self._group_query)
        if not makers:
            raise NotApplicable("sinks only in GroupQueryAttention, which is causal")
        return makers

    def _attention(self, inputs: Inputs) -> Runner:
        case = inputs.case
        refuse_large_scores(case)
        feeds = _packed(inputs)
        added = dense.bias(case, inputs.options)
        own_causal = dense.square_causal(case) and case.window is None and case.feature != "mask"
        if added is not None and (own_causal or not dense.hides_pairs(case)):
            feeds["attn_mask"] = added.astype(inputs.q.dtype)
        elif added is not None:
            feeds["attn_mask"] = _not_none(dense.additive(case, inputs.options, inputs.q.dtype))
        elif dense.hides_pairs(case) and not own_causal:
            feeds["attn_mask"] = dense.allowed(case, inputs.options)
        attributes: dict[str, int | float] = {
            "q_num_heads": case.q_heads,
            "kv_num_heads": case.kv_heads,
            "is_causal": int(own_causal),
        }
        if case.softcap is not None:
            attributes["softcap"] = case.softcap
        return self._runner(inputs, "Attention", "", feeds, attributes)

    def _multi_head(self, inputs: Inputs) -> Runner:
        case = inputs.case
        refuse_large_scores(case)
        feeds: dict[str, Array | None] = dict(_packed(inputs))
        own_causal = dense.square_causal(case) and case.window is None and case.feature is None
        added = None if own_causal else dense.additive(case, inputs.options, inputs.q.dtype)
        if added is not None:
            feeds |= {"bias": None, "key_padding_mask": None, "attention_bias": added}
        attributes = {"num_heads": case.q_heads, "unidirectional": int(own_causal)}
        return self._runner(inputs, "MultiHeadAttention", "com.microsoft", feeds, attributes)

    def _group_query(self, inputs: Inputs) -> Runner:
        """Earlier keys are its past: for decode it appends one key, in place, as a generating model does."""
        case = inputs.case
        if not _fused(case):
            refuse_large_scores(case)
        past = case.kv_size - case.q_size
        feeds: dict[str, Array | None] = {"q": _packed(inputs)["q"]}
        new = {"k": inputs.k[:, past:], "v": inputs.v[:, past:]}
        feeds |= {name: x.reshape(*x.shape[:2], -1) for name, x in new.items()}
        cache = {
            f"past_{name}": np.ascontiguousarray(x.swapaxes(1, 2)) if past else None
            for name, x in (("k", inputs.k), ("v", inputs.v))
        }
        feeds |= cache
        feeds["seqlens_k"] = np.full(case.batch, case.kv_size - 1, np.int32)
        feeds["total"] = np.array(case.kv_size, np.int32)
        feeds |= {"cos": None, "sin": None, "positions": None}
        added = None
        if case.feature in ("mask", "bias", "alibi"):
            if case.feature == "mask":
                added = np.where(inputs.options["mask"], np.float32(0), np.float32(-np.inf))
                added = np.broadcast_to(added, (case.batch, 1, case.q_size, case.kv_size))
            else:
                added = dense.bias(case, inputs.options)
            added = np.ascontiguousarray(added, inputs.q.dtype)
        feeds["attention_bias"] = added
        feeds["sinks"] = inputs.options["sinks"].astype(inputs.q.dtype) if case.feature == "sinks" else None
        attributes: dict[str, int | float] = {"num_heads": case.q_heads, "kv_num_heads": case.kv_heads}
        if case.window is not None:
            attributes["local_window_size"] = int(case.window[0] or 0) + 1  # counts the row's own key
        if case.softcap is not None:
            attributes["softcap"] = case.softcap
        return self._runner(inputs, "GroupQueryAttention", "com.microsoft", feeds, attributes)

    def _runner(
        self,
        inputs: Inputs,
        operator: str,
        domain: str,
        feeds: Any,
        attributes: dict[str, Any],
    ) -> Runner:
        """A session of one node, its arrays bound; a feed of None is an optional input that is left out."""
        case, name = inputs.case, inputs.q.dtype.name
        while feeds and list(feeds.values())[-1] is None:
            feeds.popitem()
        out_shape = (case.batch, case.q_size, case.q_heads * case.v_dim)
        outputs = [Tensor("out", name, out_shape)]
        if operator == "GroupQueryAttention":
            present = (case.batch, case.kv_heads, case.kv_size, case.head_dim)
            outputs += [Tensor("present_k", name, present), Tensor("present_v", name, present)]
        model = one_node_model(
            operator,
            domain=domain,
            opset=1 if domain else 23,
            inputs=[
                Tensor("", "", ()) if x is None else Tensor(key, x.dtype.name, x.shape)
                for key, x in feeds.items()
            ],
            outputs=outputs,
            attributes=attributes,
        )
        session = self._session(model)
        binding = session.io_binding()
        value = self.ort.OrtValue.ortvalue_from_numpy
        values = {key: value(x) for key, x in feeds.items() if x is not None}
        for key, x in values.items():
            binding.bind_ortvalue_input(key, x)
        out = value(np.empty(out_shape, inputs.q.dtype))
        binding.bind_ortvalue_output("out", out)
        for tensor in outputs[1:]:
            past = values.get(tensor.name.replace("present", "past"))
            buffer = value(np.empty(tensor.shape, inputs.q.dtype)) if past is None else past
            values[tensor.name] = buffer
            binding.bind_ortvalue_output(tensor.name, buffer)

        def run() -> Any:
            session.run_with_iobinding(binding)
            return values, out  # the binding itself does not keep its arrays alive

        def to_numpy(result: Any) -> Array:
            return np.asarray(result[1].numpy()).reshape(*inputs.q.shape[:3], case.v_dim)

        fused = operator == "GroupQueryAttention" and _fused(case)
        return Runner(run, to_numpy, operator, case.flops if fused else case.dense_flops)

    def _session(self, model: bytes) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Its threads spin on after a call otherwise, and take CPU from whoever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return self.ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise NotApplicable(str(error).splitlines()[0]) from error


def _fused(case: Case) -> bool:
    """Whether GroupQueryAttention does without all scores at once (seen in version 1.31)."""
    return case.dtype == "float32" and case.softcap is None and case.feature != "sinks"


def _one_sided(case: Case) -> bool:
    return case.window is None or (case.window[0] is not None and case.window[1] is None)


def _packed(inputs: Inputs) -> dict[str, Array]:
    """(B,S,H,D) as the operators' (B,S,H*D)."""
    arrays = zip("qkv", (inputs.q, inputs.k, inputs.v), strict=True)
    return {name: x.reshape(*x.shape[:2], -1) for name, x in arrays}


def _not_none(x: Array | None) -> Array:
    assert x is not None
    return x
