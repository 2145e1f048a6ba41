"""TRL's DPOTrainer and KTOTrainer at their best, on the token ids that this project's ways read.

Its `train()` runs as it is, with its own collator and optimizer (fused AdamW). Switched on beyond its defaults: the
head on response tokens only, which TRL has for GPUs alone (`trl.trainer.utils._use_triton`), also on a CPU; and Liger's
kernels on a GPU where liger-kernel is installed. Switched off: activation checkpointing, as on all sides, and logging.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.throughput.ways import Batch, Numbers, Settings, load_lm, perturb
from benchmarks.throughput.work import mismatched
from halos.errors import UserError
from halos.tokens import Role


def import_trl():
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl is not installed; pip install -e '.[bench]', or name the --ways without it")
    import trl

    return trl


def pair_rows(batch: Batch) -> list[dict[str, Any]]:
    """Return a batch of pairs as rows of TRL's tokenized dataset."""
    rows = []
    for one in batch:
        ids = dict(zip(one.roles, one.responses, strict=True))
        sides = {f"{role}_ids": ids[role].tolist() for role in (Role.CHOSEN, Role.REJECTED)}
        rows.append({"prompt_ids": one.prompt.tolist(), **sides})
    return rows


def response_rows(batch: Batch) -> list[dict[str, Any]]:
    """Return a batch of single responses as rows of TRL's tokenized dataset, with the unrelated ones of its KL."""
    return [
        {
            "prompt_ids": one.prompt.tolist(),
            "completion_ids": one.responses[0].tolist(),
            "KL_completion_ids": one.responses[1].tolist(),
            "label": one.roles[0] is Role.CHOSEN,
        }
        for one in mismatched(batch)
    ]


ROWS = {"dpo": pair_rows, "kto": response_rows}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has only what TRL asks for: a token to pad with."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<eos>": 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def recording(trainer_class: type) -> type:
    """Return TRL's trainer class for rows that are tokens already; it keeps the loss of each step."""

    class Recording(trainer_class):
        losses: list[torch.Tensor]

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    return Recording


class AfterStep(TrainerCallback):
    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


class TRL:
    """A trainer of TRL.

    is_precomputed: reference log-probs are computed before training; else in every step
    """

    def __init__(self, settings: Settings, batches: list[Batch], *, is_precomputed: bool):
        from datasets import Dataset

        trl = import_trl()
        if settings.device.type == "cpu":
            trl.trainer.utils._use_triton = lambda device: True  # the head reads response tokens only
        trainer_class, config_class = {
            "dpo": (trl.DPOTrainer, trl.DPOConfig),
            "kto": (trl.KTOTrainer, trl.KTOConfig),
        }[settings.loss]
        self.batches = batches
        lm = load_lm(settings)
        self.trainer = recording(trainer_class)(
            model=lm,
            ref_model=None if is_precomputed else load_lm(settings),
            args=config_class(**arguments(settings, batches), precompute_ref_log_probs=is_precomputed),
            train_dataset=Dataset.from_list([row for batch in batches for row in ROWS[settings.loss](batch)]),
            processing_class=tokenizer(),
        )
        self.trainer.losses = []
        perturb(lm)

    @torch.no_grad()
    def numbers(self, batch: Batch) -> Numbers:
        """Compute one of the batches that the trainer was made for."""
        trainer, size = self.trainer, len(batch)
        start = next(i for i, own in enumerate(self.batches) if own is batch) * size
        rows = [trainer.train_dataset[start + i] for i in range(size)]
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
        metrics = trainer._metrics["train"]
        sides = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
        return {"loss": loss.item(), **{name: float(metrics[name][-1]) for name in sides}}

    def train(self, batches: list[Batch], after_step: Callable[[], None]) -> list[float]:
        """Make a step for each of the batches that the trainer was made for, in their order."""
        assert len(batches) == len(self.batches)
        self.trainer.losses = []
        self.trainer.add_callback(AfterStep(after_step))
        self.trainer.train()
        return [loss.item() for loss in self.trainer.losses]


def arguments(settings: Settings, batches: list[Batch]) -> dict[str, Any]:
    on_gpu = settings.device.type == "cuda"
    return {
        "output_dir": settings.folder,
        "max_steps": len(batches),
        "per_device_train_batch_size": len(batches[0]),
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "beta": 0.1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 10.0,
        "gradient_checkpointing": False,
        "bf16": settings.dtype == torch.bfloat16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "use_liger_kernel": on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
