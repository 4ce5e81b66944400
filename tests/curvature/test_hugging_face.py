"""Hugging Face language models with padded labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, Objective
from curvature.adapters import hugging_face
from curvature.adapters.hugging_face import causal_lm_forward, causal_lm_objective
from curvature.errors import DataError
from tests.checks import assert_close, assert_untouched, check_operator
from tests.memory_meter import PeakBytes
from tests.references import CROSS_ENTROPY, dense_ggn, dense_hessian, total_loss

transformers = pytest.importorskip("transformers")

VOCABULARY = 7
# The last blocks only, to keep the references small; every parameter before them is in the graph all the same.
CHOSEN: dict[str, str] = {"GPT-2": "*.ln_*", "Llama": "*norm*"}
# Llama's RMSNorm computes in float32 whatever the model's dtype, so its derivatives are right to that.
RTOL: dict[str, float] = {"GPT-2": 1e-8, "Llama": 1e-5}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=6,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"GPT-2": gpt2, "Llama": llama}


def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model


def batch_of(lengths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (len(lengths), 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens.where(mask, -100)}


DATA = [batch_of((6, 3, 4), 1), batch_of((2,), 2)]  # 10 and 1 tokens that are predicted
ALL = {key: torch.cat([batch[key] for batch in DATA]) for key in DATA[0]}


def chosen_parameters(model: nn.Module, objective: Objective) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name in objective.space.names]


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_hugging_faces_own(name: str) -> None:
    model = model_of(name)
    expected = model(**ALL).loss.detach().double()
    objective = causal_lm_objective(model, DATA)
    assert objective.total_weight == 11
    assert_close(objective.loss(), expected, 1e-6)  # Hugging Face upcasts (here: rounds) logits to float32
    assert_close(objective.loss(), causal_lm_objective(model, ALL).loss(), RTOL[name])


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_products_agree_with_dense_matrices(name: str, keep_graphs: bool, generator: torch.Generator) -> None:
    model = model_of(name)
    objective = causal_lm_objective(model, DATA, params=CHOSEN[name], keep_graphs=keep_graphs)
    params = chosen_parameters(model, objective)
    assert 12 <= objective.num_params <= 60

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, attention_mask=ALL["attention_mask"]).logits[:, :-1].movedim(-1, 1)

    whole = [(ALL["input_ids"], ALL["labels"][:, 1:])]
    hessian = dense_hessian(lambda: total_loss(logits, whole, CROSS_ENTROPY), params)
    ggn = dense_ggn(logits, whole, CROSS_ENTROPY, params)
    with assert_untouched(model):
        check_operator(HessianOperator(objective), hessian, generator, RTOL[name])
        check_operator(GGNOperator(objective), ggn, generator, RTOL[name])


def test_check_and_tied_embedding() -> None:
    model = model_of("GPT-2")
    objective = causal_lm_objective(model, DATA)
    assert objective.check().passed
    assert objective.space.aliases == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("batch", [(ALL["input_ids"], ALL["labels"]), {"input_ids": ALL["input_ids"]}])
def test_batch_of_another_kind(batch: Any) -> None:
    with pytest.raises(DataError, match="'input_ids' and 'labels'"):
        causal_lm_forward(model_of("GPT-2"), batch)


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def masked_lm() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **SMALL))


def seq2seq() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL)
    )


def experts() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=1,
            num_local_experts=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
            **SMALL,
        )
    )


OWN = {"masked_lm": masked_lm, "seq2seq": seq2seq, "classification": classifier, "causal_lm": experts}


@pytest.mark.parametrize("kind", OWN)
def test_losses_of_other_kinds_are_hugging_faces_own(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OWN[kind]().eval()
    batch = batch_of((6, 3, 4), 1)
    if kind == "classification":
        batch["labels"] = torch.tensor([2, 0, 1])
    objective = getattr(hugging_face, f"{kind}_objective")(model, batch)
    assert_close(objective.loss(), model(**batch).loss.detach(), 1e-5)
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(**batch).loss, params, allow_unused=True, materialize_grads=True)
    assert_close(objective.gradient(), torch.cat([g.flatten() for g in expected]), 1e-4)
    assert objective.has_split == (kind != "causal_lm")


def test_texts_taken_one_by_one_give_the_same_products_in_less_memory() -> None:
    """Pieces count by their labels; a product holds at most 4 times what a gradient of the same pieces does."""
    model, g = model_of("GPT-2"), torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (8, 6), generator=g)
    labels = ids.where(torch.rand(ids.shape, generator=g) > torch.linspace(0, 0.9, 8)[:, None], -100)
    found, peaks = [], []
    for micro_batch in (None, 1):
        batches = [{"input_ids": ids, "labels": labels}]
        objective = causal_lm_objective(model, batches, keep_graphs=False, micro_batch=micro_batch)
        v = torch.randn(objective.num_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        H, G = HessianOperator(objective), GGNOperator(objective)
        for work in (objective.gradient, lambda H=H, v=v: H @ v, lambda G=G, v=v: G @ v):
            work()
            with PeakBytes() as meter:
                found.append(work())
            peaks.append(meter.peak)
    for whole, cut in zip(found[:3], found[3:], strict=True):
        assert_close(cut, whole, RTOL["GPT-2"])
    for gradient, hessian, ggn in (peaks[:3], peaks[3:]):
        assert hessian <= 4 * gradient
        assert ggn <= 2.4 * gradient
    assert all(cut < 0.6 * whole for whole, cut in zip(peaks[:3], peaks[3:], strict=True))
