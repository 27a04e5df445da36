"""Models of every kind with attn_implementation="fastattn": as "eager", or refused by name."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import fastattn.torch as ft  # noqa: E402
from fastattn.torch import _transformers  # noqa: E402

Tensor = torch.Tensor
TOLERANCE = 5e-6

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # of tiny sizes that no real model has
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on tiny tensors only wait for each other
    ft.register()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(level)


# ---- a sample of tools/walk_models.py, which walks all of them -----------------------------------------

# By model type, with what must come out. "equal" has called fastattn, "own" has no attention that could.
SAMPLE = {
    "albert": "equal", "bart": "equal", "bert": "equal", "bloom": "refused", "clip": "equal",
    "csm_depth_decoder_model": "equal", "deepseek_v32": "equal", "doge": "equal", "dpt": "equal",
    "falcon": "refused", "fuyu": "equal", "gemma2": "equal", "gemma3_text": "equal", "gemma4_text": "equal",
    "git": "refused", "glm_moe_dsa": "equal", "gpt2": "equal", "gpt_neo": "refused", "gpt_oss": "equal",
    "granite_swa": "equal", "hy_v4": "equal", "llama": "equal", "mamba": "own", "megatron-bert": "refused",
    "minimax_m3_vl": "equal", "modernbert": "equal", "mpnet": "refused", "mpt": "refused", "opt": "equal",
    "owlvit": "equal", "persimmon": "equal", "roformer": "refused", "t5": "equal", "vit": "equal",
}  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_walk(model_type):
    import walk_models
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    torch.manual_seed(0)
    results = walk_models.walk_type(model_type, all_heads=False)
    assert results
    expected = SAMPLE[model_type]
    for name, result in results.items():
        if name == "T5Stack":  # not a model of its own
            continue
        assert result["status"] == expected.replace("own", "equal"), (name, result)
        if expected == "refused":
            assert result["when"] == "construction"
            assert name in result["reason"]
            assert '"eager"' in result["reason"]
        else:
            assert "forward" in result["checks"]
            assert (result["calls"] > 0) == (expected == "equal"), name


def test_the_walk_finds_what_is_wrong(monkeypatch):
    """One number off, and one keyword too many."""
    import walk_models

    from fastattn.torch import _transformers

    attention = _transformers.attention

    def off(*args: Any, **keywords: Any) -> Any:
        out, weights = attention(*args, **keywords)
        out = out.clone()
        out[0, -1] *= 1.01
        return out, weights

    monkeypatch.setattr(_transformers, "attention", off)
    result = walk_models.walk_type("llama", all_heads=False, only={"LlamaModel"})["LlamaModel"]
    assert result["status"] == "wrong"
    assert result["reason"].startswith("forward: .last_hidden_state: off by")
    monkeypatch.setattr(_transformers, "attention", lambda *a, **k: attention(*a, **k, theta=1))
    result = walk_models.walk_type("llama", all_heads=False, only={"LlamaModel"})["LlamaModel"]
    assert (result["status"], result["when"]) == ("refused", "forward")


# ---- models with an attention of their own -------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "MPNet": SMALL,
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "Mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    "Falcon": SMALL | {"alibi": False},
    "GPTNeo": {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
}  # fmt: skip


def config_of(name: str) -> Any:
    return getattr(transformers, f"{name}Config")(**OWN[name])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "way", ["_from_config", "from_config", "constructor", "from_pretrained", "set", "dict"]
)
def test_own_attention_is_refused(name, way, tmp_path):
    config, model_class = config_of(name), getattr(transformers, f"{name}Model")
    if way == "set":
        model = model_class._from_config(config, attn_implementation="eager").eval()
        ids = torch.arange(3, 15)[None]
        want = model(ids)[0]
        model.set_attn_implementation("fastattn")  # a warning, as for every other name
        assert model.config._attn_implementation == "eager"
        assert torch.equal(model(ids)[0], want)
        return
    if way == "from_pretrained":
        model_class._from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    make = {
        "_from_config": lambda: model_class._from_config(config, attn_implementation="fastattn"),
        "from_config": lambda: transformers.AutoModel.from_config(config, attn_implementation="fastattn"),
        "constructor": lambda: model_class(type(config)(**OWN[name], attn_implementation="fastattn")),
        "from_pretrained": lambda: model_class.from_pretrained(tmp_path, attn_implementation="fastattn"),
        "dict": lambda: model_class._from_config(config, attn_implementation={"": "fastattn"}),
    }[way]
    with pytest.raises(
        ValueError, match=f'{name}Model .*would never call "fastattn".*attn_implementation="eager"'
    ):
        make()


def test_a_part_with_its_own_attention():
    """The part is named, and the whole; the other part may be ours. Another name is refused alike."""
    ft.register("another")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**SMALL), transformers.MegatronBertConfig(**SMALL)
    )
    model_class = transformers.EncoderDecoderModel
    for name in ("fastattn", "another"):
        with pytest.raises(ValueError, match=f'MegatronBert.* of EncoderDecoderModel .*never call "{name}"'):
            model_class._from_config(copy.deepcopy(config), attn_implementation=name)
    parts = {"": "eager", "encoder": "fastattn", "decoder": "eager"}
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=parts).eval()
    assert model.encoder.config._attn_implementation == "fastattn"
    assert model.decoder.config._attn_implementation == "eager"
    with pytest.raises(KeyError, match="unknown"):
        transformers.models.gpt_neo.modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES["unknown"]


def test_tables_of_attention_classes():
    """Where only the layer's lookup tells whose config decides."""
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8, mlp_dim=48,
        output_channels=8, global_attn_indexes=[0],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Sam.* has SamVisionAttention for eager, sdpa only.*never call"):
        transformers.SamVisionModel._from_config(config, attn_implementation="fastattn")
    for name in ("eager", "sdpa"):
        transformers.SamVisionModel._from_config(config, attn_implementation=name)


def test_subclasses_of_ones_own():
    """The class that brought the attention decides."""

    class MyBert(transformers.BertModel):
        pass

    class MyMPNet(transformers.MPNetModel):
        pass

    MyBert._from_config(transformers.BertConfig(**SMALL), attn_implementation="fastattn")
    with pytest.raises(ValueError, match="MyMPNet computes attention by itself"):
        MyMPNet._from_config(transformers.MPNetConfig(**SMALL), attn_implementation="fastattn")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["MPNet", "Bloom", "Mpt"])
def test_a_mask_that_is_added_to_scores(name, side):
    """Past the check, as in a model with attention of both kinds: the mask means what it means in "eager"."""
    torch.manual_seed(0)
    model = (
        getattr(transformers, f"{name}Model")
        ._from_config(config_of(name), attn_implementation="eager")
        .eval()
    )
    real = torch.arange(12) < torch.tensor([[12], [7]])
    real = real.flip(1) if side == "left" else real
    given = {} if side is None else {"attention_mask": real.long()}
    ids = torch.randint(3, 97, (2, 12)) * real
    with torch.no_grad():
        want = model(ids, **given)[0]
        model.config._attn_implementation = "fastattn"
        got = model(ids, **given)[0]
    assert torch.equal(got, want)


# ---- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_queries", [1, 5, 9])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "window"])
def test_a_mask_is_never_none(kind, n_queries, compiled, monkeypatch):
    from transformers import masking_utils

    from fastattn.torch import _transformers

    function, local = {
        "causal": (masking_utils.causal_mask_function, None),
        "bidirectional": (masking_utils.bidirectional_mask_function, None),
        "window": (masking_utils.sliding_window_causal_mask_function(4), 4),
    }[kind]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    keywords: dict[str, Any] = {
        "batch_size": 2, "q_length": n_queries, "kv_length": 9, "q_offset": 9 - n_queries, "kv_offset": 0,
        "mask_function": function, "local_size": local, "allow_is_causal_skip": True,
        "allow_is_bidirectional_skip": True, "config": transformers.MistralConfig(sliding_window=4),
    }  # fmt: skip
    made = _transformers.mask(**keywords)
    want = masking_utils.eager_mask(**keywords | {"allow_is_bidirectional_skip": False})
    assert made.dtype == torch.float32
    assert torch.equal(made, want)
    if not compiled:  # computed without it
        assert "mask" not in _transformers._structure_of(made)


@pytest.mark.parametrize("n_kept", [1, 3, 0])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_queries_that_are_fewer_than_the_mask_was_made_for(n_kept, side):
    """Gemma 4 with shared keys computes its last layers for the last queries alone."""
    config = transformers.Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, sliding_window=5,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, initializer_range=0.2, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    eager, ours = models(transformers.Gemma4ForCausalLM, config)
    real = torch.arange(12) < torch.tensor([[12], [7]])
    real = real.flip(1) if side == "left" else real
    given = {} if side is None else {"attention_mask": real.long()}
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0)) * real
    with torch.no_grad():
        want, got = (model(ids, **given, logits_to_keep=n_kept).logits for model in (eager, ours))
    rows = real[:, -n_kept:] if side else torch.ones(want.shape[:2], dtype=torch.bool)
    assert (got - want)[rows].abs().max() <= TOLERANCE * want.abs().max()


def models(model_class: Any, config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    eager = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = model_class._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1


def heads(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, length, 8, generator=torch.Generator().manual_seed(seed))


def test_no_mask_for_fewer_queries_than_keys():
    from fastattn.torch import _transformers

    q, k = heads(2, 3), heads(2, 7, seed=1)
    with pytest.raises(ValueError, match=r"attention_mask: Module is causal .* 3 queries and 7 keys"):
        _transformers.attention(Module(), q, k, k, None)
    _transformers.attention(Module(), q[:, :, :1], k, k, None)
    _transformers.attention(Module(), q, k, k, None, is_causal=False)
    _transformers.attention(Module(), k, k, k, None)


@pytest.mark.parametrize("q_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masks_of_another_dtype(q_dtype, mask_dtype):
    from fastattn.torch import _transformers

    q = heads(2, 5).to(q_dtype)
    mask = torch.zeros(2, 1, 5, 5, dtype=mask_dtype)
    mask[..., 2] = torch.finfo(mask_dtype).min
    got = _transformers.attention(Module(), q, q, q, mask)[0]
    want = _transformers.attention(Module(), q, q, q, mask == 0)[0]
    assert torch.equal(got, want)


# ---- keywords ----------------------------------------------------------------------------------------------


def test_unknown_keywords():
    from fastattn.torch import _transformers

    q = heads(1, 3)
    for name in ("theta", "head_mask", "indexes"):
        with pytest.raises(ValueError, match=f"{name}: Module or its caller hands this keyword"):
            _transformers.attention(Module(), q, q, q, None, **{name: torch.ones(1)})
        _transformers.attention(Module(), q, q, q, None, **{name: None})  # as if it were not there
    want = _transformers.attention(Module(), q, q, q, None)[0]
    for name, why in _transformers._IGNORED.items():
        assert why
        assert torch.equal(_transformers.attention(Module(), q, q, q, None, **{name: 4})[0], want)
    with pytest.raises(ValueError, match="block_indices: Module has no indexer"):
        _transformers.attention(Module(), q, q, q, None, block_indices=torch.zeros(1, 1, 3, 1))
    with pytest.raises(ValueError, match=r"indices: expected .* got \(1, 2, 1\)"):
        _transformers.attention(Module(), q, q, q, None, indices=torch.zeros(1, 2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"sinks: expected \(B, Hq, Sq, 1\).* got \(4,\)"):
        _transformers.attention(Module(), q, q, q, None, sinks=torch.zeros(4))


@pytest.mark.parametrize("side", [None, "left"])
def test_indices(side):
    """Sparse attention: the indexer of DeepSeek V3.2 lets every query see four keys."""
    config = transformers.DeepseekV32Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, index_topk=4, index_n_heads=2, index_head_dim=16,
        initializer_range=0.2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    eager, ours = models(transformers.DeepseekV32ForCausalLM, config)
    real = (torch.arange(24) < torch.tensor([[24], [17]])).flip(1)
    given = {} if side is None else {"attention_mask": real.long()}
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    rows = real if side else torch.ones_like(real)
    with torch.no_grad():
        want, got = (model(ids, **given).logits for model in (eager, ours))
    assert (got - want)[rows].abs().max() <= TOLERANCE * want.abs().max()
    options = {"max_new_tokens": 6, "do_sample": False}
    want, got = (model.generate(ids, **given, **options) for model in (eager, ours))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sinks_of_every_query(dropout):
    """As one more logit: the output, the weights, and the gradients, the sinks' among them."""
    from fastattn.torch import _transformers

    q, k, v = (heads(2, 5, seed).requires_grad_() for seed in range(3))
    sinks = heads(2, 5, 3)[..., :1].requires_grad_()
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e30)
    torch.manual_seed(0)
    got, weights = _transformers.attention(
        Module(), q, k, v, mask, sinks=sinks, dropout=dropout, output_attentions=True
    )
    scores = q @ k.transpose(2, 3) / 8**0.5 + mask
    want_weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    assert (weights - want_weights).abs().max() < 1e-6
    if dropout:
        torch.manual_seed(0)
        bare = _transformers.attention(Module(), q, k, v, mask, dropout=dropout)[0]
        share = want_weights.sum(-1).transpose(1, 2)[..., None]
        assert (got - bare * share).abs().max() < 1e-5
        return
    want = (want_weights @ v).transpose(1, 2)
    assert (got - want).abs().max() < 1e-5
    away = heads(2, 5, 4).transpose(1, 2)
    for x, y in zip(
        torch.autograd.grad(got, (q, k, v, sinks), away),
        torch.autograd.grad(want, (q, k, v, sinks), away),
        strict=True,
    ):
        assert (x - y).abs().max() < 1e-5


# ---- a batch of one beside a batch -------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(1, 3, 3), (3, 1, 1), (3, 3, 1), (1, 3, 1)])
def test_a_batch_of_one_is_expanded(batches):
    from fastattn.torch import _transformers

    q, k, v = (
        heads(b, n, seed).requires_grad_() for seed, (b, n) in enumerate(zip(batches, (4, 6, 6), strict=True))
    )
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5]]))[:, None, None]
    got, weights = _transformers.attention(Module(), q, k, v, mask, is_causal=False, output_attentions=True)
    want_weights = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    want = (want_weights @ v).transpose(1, 2)
    assert got.shape == (3, 4, 4, 8)
    assert (got - want).abs().max() < 1e-5
    assert (weights - want_weights).abs().max() < 1e-6
    for x, y in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v)),
        torch.autograd.grad(want.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert (x - y).abs().max() < 1e-4


def test_learned_queries():
    """Q-Former: the queries are parameters, the same for the whole batch."""
    config = transformers.Blip2QFormerConfig(
        **SMALL, encoder_hidden_size=32, cross_attention_frequency=1, max_position_embeddings=32
    )
    eager, ours = models(transformers.Blip2QFormerModel, config)
    queries = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = (
            model(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
            for model in (eager, ours)
        )
    assert got.shape == (2, 3, 32)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_weights_that_a_model_records():
    """GPT-2 does not hand output_attentions on; a recorder of its modules' outputs keeps the weights."""
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    eager, ours = models(transformers.GPT2Model, config)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want, got = (model(ids, output_attentions=True).attentions for model in (eager, ours))
        assert ours(ids).attentions is None
    assert len(got) == len(want) == 2
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() < 1e-6


def test_registering_twice_checks_once():
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    ft.register()
    ft.register("one_more")
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before
    with warnings.catch_warnings(), pytest.raises(ValueError, match="one_more"):
        transformers.MPNetModel._from_config(config_of("MPNet"), attn_implementation="one_more")


# ---- what callers hand through a model ---------------------------------------------------------------


def test_keywords_that_transformers_documents_are_known():
    from transformers.utils import TransformersKwargs

    known = {*_transformers._IGNORED, *inspect.signature(_transformers.attention).parameters}
    assert set(TransformersKwargs.__annotations__) <= known


@pytest.mark.parametrize(
    "name",
    [
        "seq_idx",
        "token_type_ids",
        "mm_token_type_ids",
        "shift_labels",
        "cache_position",
        "special_tokens_mask",
        "length",
    ],
)
def test_batches_of_collators_and_tokenizers(name):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="fastattn").eval()
    ids = torch.randint(99, (2, 7))
    value = torch.zeros_like(ids)
    with torch.no_grad():
        assert torch.equal(model(ids, **{name: value}).logits, model(ids).logits)


class AttentionPooling(torch.nn.Module):
    """A module beside the models below that has nothing to do with their attention."""


class OwnLlama(LlamaModel):
    pass


class Wrapper(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = LlamaModel._from_config(config, attn_implementation=config._attn_implementation)


@pytest.mark.parametrize("kind", [OwnLlama, Wrapper])
def test_models_of_users_with_other_modules_beside_them(kind):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    model = kind._from_config(config, attn_implementation="fastattn")
    assert getattr(model, "inner", model).config._attn_implementation == "fastattn"


def test_a_padding_mask_may_be_written_to_afterwards():
    config = BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    grads = []
    for implementation in ("fastattn", "eager"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=implementation).eval()
        padding = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
        out = model(torch.arange(14).view(2, 7), attention_mask=padding).last_hidden_state
        padding.fill_(True)
        out[:, :5].sum().backward()
        grads.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_the_advice_for_a_model_of_parts_whose_outermost_is_refused():
    text = _transformers._refusal("Outer", "fastattn", "computes attention by itself")
    assert '{"": "eager", "<the key of another part>": "fastattn"}' in text
