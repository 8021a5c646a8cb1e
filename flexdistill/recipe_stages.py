"""The sections of a recipe about training stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

from .recipe_sections import Section

# such as 20GiB; a plain int afterwards, which YAML can hold
Bytes = Annotated[int, BeforeValidator(lambda value: int(TypeAdapter(ByteSize).validate_python(value)))]


class StageRecipe(Section):
    """What all training stages have in common."""

    steps: int = Field(ge=0, description="optimiser steps; 0 skips the stage")
    batch_size: int = Field(8, ge=1, description="sequences per optimiser step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass and process; null: as many as the batch gives"
    )
    max_memory: Bytes | None = Field(
        None, gt=0, description="bytes of a GPU, such as 20GiB, that micro-batches are made to fit; null: no trial"
    )
    compile: bool = Field(
        False, description="compile the model's layers with Inductor: steps are shorter, the first by far longer"
    )
    cuda_graphs: bool = Field(
        False, description="replay micro-batches as CUDA graphs: steps that wait for the processor are shorter"
    )
    optimizer: Literal["adam", "adamw"]
    learning_rate: float = Field(gt=0, description="of what the stage trains, which warm-up and schedule scale down")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="course over all steps, from the first on, that the warm-up multiplies"
    )
    warmup_steps: int = Field(ge=0, description="steps in which a factor on the schedule rises from 0 to 1")
    final_learning_rate_ratio: float = Field(
        0.05, ge=0, le=1, description="what cosine and linear schedules fall towards, as a share of learning_rate"
    )
    clip_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="the stage ends with an exponential average of its weights; null: with the last"
    )
    validation_every: int = Field(0, ge=0, description="steps between losses on held-out sequences; 0: never")
    patience: int | None = Field(
        None, ge=1, description="validations without a new best after which the stage ends, with its best weights"
    )

    @model_validator(mode="after")
    def _used_stage_settings_only(self) -> StageRecipe:
        if self.schedule == "constant" and "final_learning_rate_ratio" in self.model_fields_set:
            raise ValueError("final_learning_rate_ratio is ignored with schedule: constant; remove it")
        if self.patience is not None and not self.validation_every:
            raise ValueError("patience is ignored without validation; set validation_every or remove patience")
        return self

    @model_validator(mode="after")
    def _one_micro_batch_size(self) -> StageRecipe:
        if self.max_memory is not None and self.micro_batch_size is not None:
            raise ValueError("max_memory picks the micro_batch_size that is set too; set one of them")
        return self


class AttentionTransferRecipe(StageRecipe):
    """Stage 1: each kernel learns the softmax attention of its own layer; the model is frozen."""

    steps: int = Field(260, ge=0)
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(5e-3, gt=0)
    warmup_steps: int = Field(30, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy between attention rows")
    output_mse_weight: float = Field(1.0, ge=0, description="weight of the relative error of the attention output")
    negative_mass_weight: float | None = Field(
        None, ge=0, description="weight of the negative mass of a signed kernel; null: 2 where the kernel is signed"
    )


class LoraRecipe(Section):
    """Adapters of `train: lora`, merged into the weights before export."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    target_modules: str | list[str] = "all-linear"


class ModelStageRecipe(StageRecipe):
    """What the stages that train more than kernels have in common."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0, description="for the model's weights or adapters")
    norm_learning_rate: float | None = Field(None, gt=0, description="for the weights of norms; null: learning_rate")
    kernel_learning_rate: float = Field(1e-3, gt=0, description="for the kernels")
    weight_decay: float = Field(
        0.0, ge=0, description="of the weights, not of kernels and norms; only with optimizer: adamw"
    )
    warmup_steps: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _used_optimizer_settings_only(self) -> ModelStageRecipe:
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError("weight_decay is ignored with optimizer: adam; set optimizer: adamw or remove it")
        return self


class LogitDistillationRecipe(ModelStageRecipe):
    """Stage 2: the converted model learns the teacher's distribution over the next token."""

    steps: int = Field(150, ge=0)
    kernel_learning_rate: float = Field(2e-3, gt=0)
    train: Literal["full", "lora", "kernels"] = Field("full", description="what is trained beside the kernels")
    temperature: float = Field(1.0, gt=0, description="that teacher's and student's logits are divided by")
    label_weight: float = Field(
        0.0, ge=0, le=1, description="share of the label loss; the rest is the KL to the teacher"
    )
    hidden_state_weight: float = Field(
        0.0, ge=0, description="weight of the relative error of each layer's hidden states, added to the loss"
    )
    lora: LoraRecipe | None = Field(
        None, validate_default=True, description="only with train: lora; null: its defaults there"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="whole models in every process, or (only with train: full) sharded over them by FSDP2"
    )
    cpu_offload: bool = Field(False, description="with fsdp, keep shards and the optimiser's state in host memory")
    gradient_checkpointing: bool = Field(
        False, description="keep layers' inputs only, and run layers again in the backward pass"
    )

    @field_validator("lora")
    @classmethod
    def _defaults_where_used(cls, value: LoraRecipe | None, info: ValidationInfo) -> LoraRecipe | None:
        return LoraRecipe() if value is None and info.data.get("train") == "lora" else value

    @model_validator(mode="after")
    def _used_settings_only(self) -> LogitDistillationRecipe:
        if self.parallel == "fsdp" and self.train != "full":
            raise ValueError(f"parallel: fsdp shards what train: full trains, and train is {self.train!r}; set ddp")
        if self.parallel == "fsdp" and self.cuda_graphs:
            raise ValueError("cuda_graphs cannot be recorded with parallel: fsdp; leave one of them out")
        if self.cpu_offload and self.parallel != "fsdp":
            raise ValueError("cpu_offload is ignored with parallel: ddp; set parallel: fsdp or remove cpu_offload")
        for name in IGNORED_BY_TRAIN[self.train]:
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise ValueError(f"{name} is ignored with train: {self.train}; set another train or remove it")
        return self


# what means nothing where all weights, or only adapters or kernels, are trained
IGNORED_BY_TRAIN = {
    "full": ("lora",),
    "lora": ("norm_learning_rate",),
    "kernels": ("lora", "learning_rate", "norm_learning_rate", "weight_decay"),
}


class LabelTrainingRecipe(ModelStageRecipe):
    """Stage 3, or training from scratch: all weights learn the next token of the text itself, without a teacher."""

    steps: int = Field(0, ge=0)
    sequence_length: int | None = Field(None, ge=2, description="tokens per sequence; null: data.sequence_length")


# in the order in which they run
STAGES = ("attention_transfer", "logit_distillation", "label_training")
