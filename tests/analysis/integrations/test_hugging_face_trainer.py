"""`transformers.Trainer`, run for real: tracked without a trace, resumed, and with this toolkit's optimizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis import accumulate_in, hugging_face_callback
from curvature.adapters.hugging_face import causal_lm_objective
from curvature.errors import CheckFailedError, InputError
from optimizers import AdaHessian

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROWS = torch.randint(0, 11, (24, 6), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
PROBE = [{"input_ids": ROWS[:8], "labels": ROWS[:8], "attention_mask": torch.ones(8, 6, dtype=torch.int64)}]


def gpt2(dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **{"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2},
        **{"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout},
    )
    return transformers.GPT2LMHeadModel(config)


def trainer_of(model: Any, folder: Path, optimizer: Any = None, callbacks: Any = (), **settings: Any) -> Any:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 2,
        "seed": 0,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **settings}),
        train_dataset=DATA,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def tracking(model: Any, **settings: Any) -> Any:
    objective = causal_lm_objective(model, PROBE)
    return hugging_face_callback(objective, **{"budget": None, "generator": 0, **settings})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_training_is_not_disturbed_and_readings_are_logged(tmp_path: Path) -> None:
    plain, model = gpt2(), gpt2()
    trainer_of(plain, tmp_path / "plain").train()
    callback = tracking(model)
    trainer = trainer_of(model, tmp_path / "tracked", callbacks=[callback])
    trainer.train()
    assert same(plain, model)
    record = callback.tracker.record
    assert (record.steps, record.optimizer) == (tuple(range(6)), "AdamW")
    assert all(r.preconditioned > 0 and math.isfinite(r.threshold) for r in record.readings)
    logged = [entry for entry in trainer.state.log_history if "curvature/sharpness" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5, 6]
    assert [entry["curvature/sharpness"] for entry in logged] == [r.sharpness for r in record.readings]
    json.dumps(trainer.state.log_history)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    model = gpt2()
    callback = tracking(model, every=2, quantities=("sharpness", "critical"))
    trainer_of(model, tmp_path, callbacks=[callback], gradient_accumulation_steps=2, max_steps=4).train()
    assert callback.tracker.record.steps == (0, 2)
    assert callback.tracker.record.num_steps == 4


def test_a_resumed_training_goes_on_with_its_readings(tmp_path: Path) -> None:
    model = gpt2()
    callback = tracking(model)
    trainer_of(model, tmp_path, callbacks=[callback], save_strategy="steps", save_steps=4, logging_steps=1).train()
    again = gpt2()
    resumed = tracking(again)
    trainer = trainer_of(again, tmp_path, callbacks=[resumed], save_strategy="steps", save_steps=4, logging_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole, continued = callback.tracker.record, resumed.tracker.record
    assert continued.steps == whole.steps
    for a, b in zip(whole.readings, continued.readings, strict=True):
        assert b.sharpness == pytest.approx(a.sharpness, rel=2e-2)


def test_an_optimizer_that_measures_curvature_says_what_to_do_and_then_trains(tmp_path: Path) -> None:
    model = gpt2(dropout=0.0)
    optimizer = AdaHessian(model.parameters(), lr=0.05)
    trainer = trainer_of(model, tmp_path, optimizer, max_grad_norm=0.0, max_steps=3, lr_scheduler_type="constant")
    with pytest.raises(CheckFailedError, match=r"analysis\.accumulate_in\(trainer\)"):
        trainer.train()
    model, twin = gpt2(dropout=0.0).double(), gpt2(dropout=0.0).double()
    optimizer = AdaHessian(model.parameters(), lr=0.05)
    trainer = trainer_of(model, tmp_path, optimizer, max_grad_norm=0.0, max_steps=3, lr_scheduler_type="constant")
    batches: list[Any] = []
    loss_of = trainer.compute_loss

    def seen(model: Any, inputs: Any, **others: Any) -> Any:
        batches.append({**{name: t.clone() for name, t in inputs.items()}, **others})  # the number of tokens is one
        return loss_of(model, inputs, **others)

    trainer.compute_loss = seen
    accumulate_in(trainer).train()
    own = AdaHessian(twin.parameters(), lr=0.05)
    twin.train()
    for batch in batches:
        own.step(lambda batch=batch: twin(**batch).loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match="others need no accumulate_in"):
        accumulate_in(trainer_of(gpt2(), tmp_path, torch.optim.SGD(gpt2().parameters(), lr=0.1)))
