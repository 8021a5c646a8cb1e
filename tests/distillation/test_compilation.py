"""Compiled stages give the losses and gradients of plain ones, and all layers share one compilation."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import make_accelerator
from flexdistill.distillation.compilation import layers_compiled
from flexdistill.distillation.stage import backward_counting_guards
from flexdistill.pipeline import STAGE_CLASSES
from flexdistill.recipe import STAGES, Recipe

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def backend(monkeypatch):
    """Dynamo alone, which counts what it gives to be compiled."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return backend


def run(name, compile, layers=2, device="cpu", repeats=1, **settings):
    torch.manual_seed(0)
    settings = {f"{name}.{key}": value for key, value in settings.items() if key != "kernel"} | settings["kernel"]
    recipe = Recipe().override(settings | {f"{name}.compile": compile, "precision": "fp32"})
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape)).to(device)
    # attention whose gradients are not rounding alone
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim == 2 else 1)
    student = apply_plan(model, make_plan(model, recipe.kernel)).to(device)
    tokens = torch.randint(0, 128, (2, 48), device=device)
    stage = STAGE_CLASSES[name](student, getattr(recipe, name), make_accelerator("fp32"))
    with stage.active():
        for _ in range(repeats):
            stage.optimizer.zero_grad()
            losses = backward_counting_guards(stage, tokens)
    gradients = {name: p.grad for name, p in stage.trained().items() if p.grad is not None}
    forwards = [module for module in student.modules() if "forward" in vars(module)]
    return losses, gradients, forwards


def assert_equal(plain, compiled, tolerance):
    assert set(plain[1]) == set(compiled[1]) and plain[1]
    for name, gradient in plain[1].items():
        assert (compiled[1][name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert set(plain[0].parts) == set(compiled[0].parts)
    for name, part in plain[0].parts.items():
        assert torch.allclose(part.float(), compiled[0].parts[name].float(), rtol=tolerance, atol=tolerance), name
    assert not compiled[2]  # layers are as they were


CASES = [
    *((name, {"kernel": {"kernel.window": 8}}) for name in STAGES),
    ("attention_transfer", {"kernel": {"kernel.component": "trigonometric"}}),
    ("logit_distillation", {"kernel": {}, "gradient_checkpointing": True}),
    ("logit_distillation", {"kernel": {"kernel.variant": "hedgehog"}, "train": "kernels"}),
    ("logit_distillation", {"kernel": {"kernel.keep_layers": "1"}, "train": "lora", "hidden_state_weight": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_compiled_stages_equal_plain_ones(name, settings, backend):
    assert_equal(run(name, False, **settings), run(name, True, **settings), 1e-4)
    assert backend.frame_count


@pytest.mark.parametrize("name", ["attention_transfer", "logit_distillation"])
def test_layers_and_steps_share_one_compilation(name, backend):
    settings = {"kernel": {}}
    run(name, True, layers=2, **settings)
    compiled = backend.frame_count
    run(name, True, layers=4, repeats=3, **settings)
    assert compiled == backend.frame_count > 0


def test_many_forms_of_a_layer_are_compiled(backend):
    """Layers with and without kernels, of teacher and student, stage after stage, are more than Dynamo's own limit."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, _: module.form and None)  # Dynamo guards what is read
    with layers_compiled(model, True):
        for form in range(12):
            attention.form = str(form)
            model(torch.zeros(1, 3, dtype=torch.long))
    assert backend.frame_count >= 12


@pytest.mark.parametrize(("name", "settings"), [pytest.param(*case, marks=on_gpu) for case in CASES])
def test_inductor_on_gpu_equals_plain(name, settings, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.compiler.reset()
    runs = [run(name, compile, device="cuda", repeats=2, **settings) for compile in (False, True)]
    assert_equal(*runs, 1e-3)


def test_caches_of_kernels_are_not_warned_of(backend, recwarn):
    torch._dynamo.utils.warn_once_cache.clear()
    run("logit_distillation", True, kernel={"kernel.window": 8})
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
