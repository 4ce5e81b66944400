"""Hugging Face models and the batches their trainers take: mappings with `labels`.

Each function makes the objective that the model's own training minimises, with model and loss apart, so that the
Gauss-Newton matrix exists, and with every batch counted by its labels that are not -100. The last layer of a language
model works in blocks where its logits are large (`head=` of `Objective`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvature.errors import DataError
from curvature.objective.objective import Objective

__all__ = [
    "causal_lm_forward",
    "causal_lm_objective",
    "classification_forward",
    "classification_objective",
    "masked_lm_forward",
    "masked_lm_objective",
    "seq2seq_forward",
    "seq2seq_objective",
]

IGNORED = -100


def causal_lm_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits (tokens, vocabulary), next tokens (tokens,)) of a batch with `input_ids` and `labels`.

    Labels are those of Hugging Face: the tokens themselves, with -100 where a token does not count; the model's output
    at one place is compared with the label of the next.

    Raises:
        DataError: if the batch is no mapping with `input_ids` and `labels`.
    """
    inputs, labels = _parted(batch)
    logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)


def masked_lm_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits (tokens, vocabulary), labels (tokens,)), compared place by place; -100 where nothing is masked.

    Raises:
        DataError: if the batch is no mapping with `input_ids` and `labels`.
    """
    inputs, labels = _parted(batch)
    logits = model(**inputs).logits
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def seq2seq_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits (tokens, vocabulary), labels (tokens,)) of a decoder that is fed the labels before each place.

    `decoder_input_ids` are made of the labels by the model where the batch has none.

    Raises:
        DataError: if the batch is no mapping with `input_ids` and `labels`.
    """
    inputs, labels = _parted(batch)
    if "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator] # a method
    logits = model(**inputs, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def classification_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits (examples, classes), labels (examples,)), or of tokens where each token has a label.

    Raises:
        DataError: if the batch is no mapping with `labels`.
    """
    inputs, labels = _parted(batch, "labels")
    logits = model(**inputs).logits
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def causal_lm_objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    """Return the mean next-token cross-entropy of a Hugging Face causal language model as an objective.

    A mixture of experts whose configuration asks for router logits trains with an auxiliary loss besides. It is then
    part of the objective: the model computes the whole loss, and matrices that need model and loss apart do not exist.

    Args:
        model: e.g. `GPT2LMHeadModel`; any attention implementation.
        data: mappings with `input_ids` and `labels` (and `attention_mask` where there is padding): one, a list, or a
            loader.
        **settings: further arguments of `Objective`.
    """
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return Objective(model, None, data, forward=_own_loss, weight=_next_tokens, **settings)
    return _objective(model, data, causal_lm_forward, settings)


def masked_lm_objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    """Return the mean cross-entropy of a masked language model over the masked tokens, as `causal_lm_objective`."""
    return _objective(model, data, masked_lm_forward, settings)


def seq2seq_objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    """Return the mean cross-entropy of an encoder-decoder over its labels, as `causal_lm_objective`."""
    return _objective(model, data, seq2seq_forward, settings)


def classification_objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    """Return the mean cross-entropy of a classifier of texts, images or tokens, as `causal_lm_objective`.

    The labels are class indices; a regression or a multi-label model needs its loss said: `Objective(model, loss, ...)`
    with `classification_forward`.
    """
    return _objective(model, data, classification_forward, settings)


def _objective(model: nn.Module, data: Any, forward: Any, settings: dict[str, Any]) -> Objective:
    return Objective(model, nn.CrossEntropyLoss(ignore_index=IGNORED), data, **{"forward": forward, **settings})


def _parted(batch: Any, *needed: str) -> tuple[dict[str, Any], Tensor]:
    """Return the inputs of a model and the labels."""
    needed = needed or ("input_ids", "labels")
    if not isinstance(batch, Mapping) or not set(needed) <= set(batch):
        raise DataError(
            f"a batch must be a mapping with {' and '.join(map(repr, needed))}; set labels = input_ids, -100 where "
            "padded, for a language model."
        )
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def _own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs, labels = _parted(batch)
    loss: Tensor = model(**inputs, labels=labels, use_cache=False).loss
    return loss


def _next_tokens(batch: Mapping[str, Tensor]) -> float:
    return float((_parted(batch)[1][:, 1:] != IGNORED).sum())
