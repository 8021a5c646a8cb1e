"""What tests of training share: converted tiny models whose attention is not uniform, and tokens to train them on."""

import json

import torch
from accelerate import Accelerator

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.distillation.labels import LabelTraining
from flexdistill.distillation.logits import LogitDistillation
from flexdistill.recipe import AttentionTransferRecipe, KernelRecipe, LabelTrainingRecipe, LogitDistillationRecipe
from tests.tiny import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}


def teacher(name: str = "llama"):
    """A tiny model with larger weights, so that its attention has peaks and its logits differ."""
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                parameter *= 12
            elif "c_attn.weight" in parameter_name:
                parameter[:, :128] *= 12
            elif parameter.ndim == 2:
                parameter *= 3
    return model


def student(name: str = "llama", **kernel):
    model = teacher(name)
    torch.manual_seed(3)
    return apply_plan(model, make_plan(model, KernelRecipe(**kernel)))


def sequences(count: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(6))


def attention_transfer(model, **settings) -> AttentionTransfer:
    recipe = AttentionTransferRecipe(**{"steps": 6, "batch_size": 4, "warmup_steps": 2} | settings)
    return AttentionTransfer(model, recipe, Accelerator(cpu=True))


def logit_distillation(model, **settings) -> LogitDistillation:
    recipe = LogitDistillationRecipe(**{"steps": 6, "batch_size": 4, "warmup_steps": 2} | settings)
    return LogitDistillation(model, recipe, Accelerator(cpu=True))


def label_training(model, **settings) -> LabelTraining:
    recipe = LabelTrainingRecipe(**{"steps": 6, "batch_size": 4, "warmup_steps": 2} | settings)
    return LabelTraining(model, recipe, Accelerator(cpu=True))


# by name; logit distillations by what they train
STAGES = {
    "attention transfer": attention_transfer,
    "labels": label_training,
    "full": lambda model, **settings: logit_distillation(model, train="full", **settings),
    "lora": lambda model, **settings: logit_distillation(model, train="lora", **settings),
    "kernels": lambda model, **settings: logit_distillation(model, train="kernels", **settings),
}


def make_stage(name: str, **settings):
    """A stage that trains a student of its own, the same at every call."""
    torch.manual_seed(1)
    return STAGES[name](student(), **settings)


def train(stage, steps: int | None = None, **options):
    """Runs a stage over tokens in a fixed order; returns the summary."""
    from flexdistill.distillation.loop import run_stage

    recipe = stage.recipe if steps is None else stage.recipe.model_copy(update={"steps": steps})
    stage.recipe = recipe
    order = torch.arange(recipe.steps * recipe.batch_size).remainder(8).view(recipe.steps, recipe.batch_size)
    return run_stage(stage, recipe, sequences(), order, stage.accelerator, **options)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def log_entries(file) -> list[dict]:
    """A log without what differs from run to run."""
    measured = ("tokens_per_s", "elapsed_s", "peak_memory_bytes")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in measured} for entry in entries]


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
