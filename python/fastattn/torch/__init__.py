"""fastattn for PyTorch: attention that autograd, torch.compile, autocast and Transformers know.

`mha` and `mha_varlen` are those of `fastattn` with gradients, `scaled_dot_product_attention` is PyTorch's function
of that name, and `register` makes both available to Transformers as ``attn_implementation="fastattn"``.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "fastattn.torch needs PyTorch, which is not installed: pip install 'fastattn[torch]'"
    raise ModuleNotFoundError(message, name="torch") from None

from fastattn.torch._mha import mha, mha_varlen
from fastattn.torch._sdpa import scaled_dot_product_attention

__all__ = ["mha", "mha_varlen", "register", "scaled_dot_product_attention"]


def register(name: str = "fastattn") -> None:
    """Make fastattn an attention implementation of Transformers 5, for ``attn_implementation=name``.

    A model that computes attention by itself, and so would never call it, is refused by a ValueError when it
    is constructed; this takes a check in front of ``PreTrainedModel.get_correct_attn_implementation``.

    Parameters
    ----------
    name : str
        Under which ``AttentionInterface`` and ``AttentionMaskInterface`` find it.

    Raises
    ------
    ImportError
        Transformers is not installed, or older than 5.

    Examples
    --------
    >>> import fastattn.torch
    >>> fastattn.torch.register()
    >>> model = AutoModel.from_pretrained(path, attn_implementation="fastattn")  # doctest: +SKIP
    """
    from fastattn.torch import _transformers

    _transformers.register(name)
