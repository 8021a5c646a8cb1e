import math

import pytest
import torch
from accelerate import Accelerator

from flexdistill.conversion import restore_softmax
from flexdistill.distillation.layer_selection import converted_modules
from flexdistill.errors import FlexdistillError
from flexdistill.positions import evaluate_by_position, perplexity_by_position, token_losses
from flexdistill.recipe import EvaluationRecipe
from tests.distillation.stages import sequences, student, teacher
from tests.tiny import save_tiny

CPU = Accelerator(cpu=True)


def mixed():
    model = student("llama", window=8)
    restore_softmax(model, dict.fromkeys(list(converted_modules(model))[:1], 0.0))
    return model


MAKERS = {
    "teacher": lambda: teacher("llama"),
    "learned positions": lambda: student("gpt2"),
    "linear": lambda: student("llama"),
    "window": lambda: student("llama", window=8),
    "mixed": mixed,
}


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(name):
    model, tokens = MAKERS[name](), sequences(2, 150)
    logits = model(input_ids=tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    for chunk in (64, 150, 1000, 13):
        torch.testing.assert_close(token_losses(model, tokens, CPU, chunk), expected, rtol=1e-3, atol=1e-4)


def test_spans():
    model, tokens = teacher("llama"), sequences(3, 1100).remainder(200)
    model.config.max_position_embeddings = 2048
    losses = token_losses(model, tokens, CPU).double()
    spans = perplexity_by_position(model, tokens, CPU, batch_size=2, chunk=300)
    assert [(span["from"], span["to"]) for span in spans] == [(0, 512), (512, 1024), (1024, 1100)]
    # the first loss is that of the token with one before it
    parts = [losses[:, :511], losses[:, 511:1023], losses[:, 1023:]]
    for span, part in zip(spans, parts, strict=True):
        assert span["losses"] == pytest.approx(part.mean(1).tolist(), rel=1e-4)
        assert span["perplexity"] == pytest.approx(math.exp(part.mean()), rel=1e-4)
    assert [(span["from"], span["to"]) for span in perplexity_by_position(model, tokens[:, :512], CPU)] == [(0, 512)]


def test_a_checkpoint_by_position(tmp_path, tiny_tokenizer):
    save_tiny(tmp_path / "teacher", teacher("llama"), tiny_tokenizer)
    save_tiny(tmp_path / "student", student("llama"), tiny_tokenizer)
    recipe = EvaluationRecipe(source="sample", sequence_length=40, sequences=3, batch_size=2)
    spans = evaluate_by_position(tmp_path / "student", str(tmp_path / "teacher"), recipe)
    assert list(spans) == ["teacher", "student"] and len(spans["student"][0]["losses"]) == 3
    assert spans["student"][0]["perplexity"] != spans["teacher"][0]["perplexity"]
    save_tiny(tmp_path / "bert", student("bert"), tiny_tokenizer)
    with pytest.raises(
        FlexdistillError, match="attends in both directions, so it cannot continue text; give a causal model"
    ):
        evaluate_by_position(tmp_path / "bert", str(tmp_path / "teacher"), recipe)
    with pytest.raises(FlexdistillError, match="longer than the 512 positions"):
        longer = recipe.model_copy(update={"sequence_length": 600})
        evaluate_by_position(tmp_path / "student", str(tmp_path / "teacher"), longer)
