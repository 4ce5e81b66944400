"""Hugging Face causal language models.

Their batches are mappings and their loss averages over unmasked, shifted tokens. `causal_lm_objective` says so to the
objective: model and loss stay apart (so that the Gauss-Newton matrix exists) and every batch counts by its unmasked
    tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvature.errors import DataError
from curvature.objective.objective import Objective

__all__ = ["causal_lm_forward", "causal_lm_objective"]

IGNORED = -100


def causal_lm_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits (tokens, vocabulary), next tokens (tokens,)) of a batch with `input_ids` and `labels`.

    Labels are those of Hugging Face: the tokens themselves, with -100 where a token does not count; the model's output
    at one place is compared with the label of the next.

    Raises:
        DataError: if the batch is no mapping with `input_ids` and `labels`.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise DataError(
            "a language-model batch must be a mapping with 'input_ids' and 'labels'; set labels = input_ids, -100 "
            "where padded."
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)


def causal_lm_objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    """Return the mean next-token cross-entropy of a Hugging Face causal language model as an objective.

    Args:
        model: e.g. `GPT2LMHeadModel`; any attention implementation.
        data: mappings with `input_ids` and `labels` (and `attention_mask` where there is padding): one, a list, or a
            loader.
        **settings: further arguments of `Objective`.
    """
    return Objective(model, nn.CrossEntropyLoss(ignore_index=IGNORED), data, forward=causal_lm_forward, **settings)
