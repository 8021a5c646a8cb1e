import gc

import pytest
import torch

from flexdistill.attention_modes import softmax_mode
from flexdistill.distillation import attention_transfer as attention_transfer_module
from flexdistill.distillation import logits as logits_module
from flexdistill.distillation.heads import SplitModel, backward_in_pieces
from flexdistill.distillation.logits import adapters_disabled, next_tokens
from flexdistill.distillation.stage import feature_maps, kernel_parameters
from flexdistill.errors import FlexdistillError
from flexdistill.losses import attention_cross_entropy, negative_mass, relative_output_error
from flexdistill.runtime.attention import attention_weights
from flexdistill.runtime.registry import feature_map_class
from tests.distillation.stages import (
    MAKERS,
    assert_equal,
    attention_transfer,
    logit_distillation,
    parameters,
    sequences,
    student,
    teacher,
    train,
)
from tests.runtime.kernels import LEARNED_KERNELS
from tests.tiny import VOCABULARY

every_model = pytest.mark.parametrize("name", MAKERS)
every_mode = pytest.mark.parametrize("mode", ["full", "lora", "kernels"])
# adapters' default learning rate is for real models; kernels alone take none of the weights'
RATES = {"full": {"learning_rate": 1e-3}, "lora": {"learning_rate": 1e-2}, "kernels": {}}


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=sequences() if ids is None else ids).logits


@every_model
@pytest.mark.parametrize(("variant", "component"), LEARNED_KERNELS)
def test_attention_transfer_trains_kernels_only(name, variant, component):
    if name != "bert" and not feature_map_class(variant, component).causal_safe:
        pytest.skip("not for causal layers")
    model = student(name, variant=variant, component=component)
    before, fixed = parameters(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    stage = attention_transfer(model)
    assert stage.trained().keys() == kernel_parameters(model).keys()
    train(stage)
    after = parameters(model)
    for key, value in before.items():
        changed = not torch.equal(after[key], value)
        assert changed == (key in kernel_parameters(model)), key
    assert_equal(dict(model.named_buffers()), fixed)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert not any(p.grad is not None for n, p in model.named_parameters() if n not in kernel_parameters(model))
    assert model.config._attn_implementation == "flexformer"


@every_model
@pytest.mark.parametrize(
    "settings", [{}, {"layers": "1"}, {"key_heads": "kv"}, {"component": "trigonometric"}], ids=str
)
def test_attention_transfer_learns(name, settings):
    stage = attention_transfer(student(name, **settings), learning_rate=2e-2)
    with stage.active():
        first = stage.backward(sequences()).parts
        uniform = float(first["attention_kl"] / sequences().numel())
    assert uniform > 0.05  # attention has peaks to learn
    summary = train(stage, steps=60)
    assert summary["last_loss"] < summary["first_loss"]
    with stage.active():
        last = stage.backward(sequences()).parts
    assert last["attention_kl"] < 0.8 * first["attention_kl"]


@every_model
@pytest.mark.parametrize("settings", [{}, {"component": "trigonometric"}, {"layers": "1"}], ids=str)
def test_gradients_per_layer_are_those_of_the_whole_loss(name, settings):
    model = student(name, **settings)
    stage = attention_transfer(model, cross_entropy_weight=0.7, output_mse_weight=1.3)
    with stage.active():
        losses = stage.backward(sequences())
    layerwise = {key: p.grad.clone() for key, p in stage.trained().items()}
    model.zero_grad()

    # the softmax model's queries, keys and values, then all layers' losses in one graph
    calls = []
    original = attention_transfer_module.softmax_weights
    with stage.active(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_transfer_module, "softmax_weights", lambda call: calls.append(call) or original(call))
        stage.backward(sequences())
    model.zero_grad()
    total = 0.0
    for call in calls:
        size, length = call.query.shape[-1], call.query.shape[-2]
        repeat = call.query.shape[1] // call.key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (call.key, call.value))
        scores = call.query @ key.transpose(-1, -2) * size**-0.5
        if name != "bert":
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        expected = scores.softmax(-1)
        actual = attention_weights(call.feature_map, call.query, call.key, scaling=size**-0.5, rotation=call.rotation)
        total = total + 0.7 * attention_cross_entropy(expected, actual)[0]
        total = total + 1.3 * relative_output_error(expected @ value, actual @ value)[0]
        if call.feature_map.signed:
            total = total + 2.0 * negative_mass(actual)[0]
    total.backward()
    assert len(calls) == len(feature_maps(model))
    assert float(losses.total) == pytest.approx(float(total.detach()) / len(calls), rel=1e-5)
    assert losses.count == sequences().numel()
    for key, parameter in stage.trained().items():
        assert (layerwise[key] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), key
        assert parameter.grad.norm() > 0


def test_attention_flows_as_softmax():
    """Deeper layers see the teacher's activations, whatever the kernels of earlier layers are."""
    seen = {}
    for noise in (0.0, 1.0):
        model = student()
        with torch.no_grad():
            for parameter in feature_maps(model)["model.layers.0.self_attn"].parameters():
                parameter += noise
        stage = attention_transfer(model)
        with stage.active():
            stage.backward(sequences())
        seen[noise] = [loss.total for _, loss in stage._losses]
    assert seen[0.0][0] != seen[1.0][0] and torch.equal(seen[0.0][1], seen[1.0][1])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_one_layers_maps_are_alive(monkeypatch):
    model, length = student("gpt2"), 37
    stage = attention_transfer(model)
    alive = []

    def maps():
        gc.collect()
        found = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        return sum(x.ndim == 4 and x.shape[-2:] == (length, length) for x in found)

    original = attention_transfer_module.softmax_weights

    def counting(call):
        alive.append(maps())
        return original(call)

    monkeypatch.setattr(attention_transfer_module, "softmax_weights", counting)
    with stage.active():
        losses = stage.backward(sequences(length=length))
    assert alive == [0, 0] and maps() == 0
    tensors = [losses.total, losses.count, *losses.parts.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@every_mode
@every_model
def test_logit_distillation_changes_only_what_it_may(name, mode):
    model, expected_teacher = student(name), logits(teacher(name))
    before = parameters(model)
    stage = logit_distillation(model, train=mode, **RATES[mode])
    assert torch.equal(teacher_logits(stage), expected_teacher)
    train(stage)
    with torch.no_grad():
        assert torch.equal(teacher_logits(stage), expected_teacher)
    trained = {n.replace(".base_layer", "") for n in stage.trained()}
    kernels_ = kernel_parameters(model).keys()
    if mode == "full":
        assert trained == before.keys()
    elif mode == "kernels":
        assert trained == kernels_
    else:
        assert kernels_ < trained and all("lora_" in n for n in trained - kernels_)
    after = {n.replace(".base_layer", ""): p for n, p in parameters(model).items()}
    for key, value in before.items():
        changed = not torch.equal(after[key], value)
        # BERT's first position has no gradient through the token types that are not used
        if key in kernels_ or mode != "full":
            assert changed == (key in kernels_), key
    if mode == "full":
        assert sum(not torch.equal(after[key], before[key]) for key in before) > 0.8 * len(before)
    stage.finish()
    assert model.config._attn_implementation == "flexformer"


@torch.no_grad()
def teacher_logits(stage):
    with stage.active(), stage._as_teacher(), adapters_disabled(stage._teacher.model):
        return stage._teacher.model(input_ids=sequences()).logits


@every_mode
def test_logit_distillation_learns(mode):
    model = student()
    summary = train(logit_distillation(model, train=mode, kernel_learning_rate=1e-2, **RATES[mode]), steps=30)
    assert summary["last_loss"] < 0.9 * summary["first_loss"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_logit_loss_is_its_formula(name, temperature, label_weight):
    model = student(name)
    stage = logit_distillation(model, temperature=temperature, label_weight=label_weight)
    with stage.active():
        losses = stage.backward(sequences())
    actual = {key: p.grad.clone() for key, p in stage.trained().items() if p.grad is not None}
    model.zero_grad()
    expected_teacher = logits(teacher(name)) / temperature
    student_logits = model(input_ids=sequences()).logits
    rows = expected_teacher.softmax(-1) * (
        expected_teacher.log_softmax(-1) - (student_logits / temperature).log_softmax(-1)
    )
    kl = rows.sum() * temperature**2
    label = torch.nn.functional.cross_entropy(student_logits[:, :-1].flatten(0, 1), sequences()[:, 1:].flatten())
    label = label * sequences().numel()  # the mean over labels, in the unit of the KL's sum
    expected = (1 - label_weight) * kl + label_weight * label
    expected.backward()
    assert float(losses.total) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert losses.count == sequences().numel()
    assert float(losses.parts["kl"]) == pytest.approx(float(kl.detach()), rel=1e-4)
    for key, gradient in actual.items():
        difference = (gradient - model.get_parameter(key).grad).norm()
        assert difference <= 1e-3 * model.get_parameter(key).grad.norm() + 1e-4, key


def test_labels_need_a_causal_model():
    with pytest.raises(FlexdistillError, match="label_weight"):
        logit_distillation(student("bert"), label_weight=0.3)


@every_model
def test_merged_adapters_are_the_adapters(name):
    model = student(name)
    structure = [n for n, _ in model.named_parameters()]
    stage = logit_distillation(model, train="lora", learning_rate=1e-2)
    train(stage)
    expected = logits(model)
    with adapters_disabled(model), softmax_mode(model), torch.no_grad():
        assert torch.equal(model(input_ids=sequences()).logits, logits(teacher(name)))
    with adapters_disabled(model):
        assert (logits(model) - expected).abs().max() > 1e-3  # the adapters do something
    stage.finish()
    assert [n for n, _ in model.named_parameters()] == structure
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
    assert not hasattr(model, "peft_config")
    with adapters_disabled(model):
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


def test_adapters_leave_kernels_alone():
    stage = logit_distillation(student(), train="lora")
    adapted = {n.partition(".lora_")[0] for n in stage.trained() if "lora_" in n}
    assert adapted and not any("flexformer" in n for n in adapted)


@every_mode
@every_model
def test_hidden_states_join_the_loss(name, mode):
    results = []
    for weight in (0.0, 0.7):
        torch.manual_seed(0)
        stage = logit_distillation(student(name), train=mode, hidden_state_weight=weight)
        with stage.active():
            results.append((stage.backward(sequences()), {n: p.grad for n, p in stage.trained().items()}))
    (plain, without), (losses, with_states) = results
    with torch.no_grad():
        targets = hidden_states(teacher(name))
        error = float(sum_of_errors(stage.model, targets))
    assert len(targets) == 2 and error > 0
    assert float(losses.parts["hidden_state_error"]) == pytest.approx(error, rel=1e-4)
    assert float(losses.total) == pytest.approx(float(plain.total) + 0.7 * error, rel=1e-5)
    stage.model.zero_grad()
    with stage.active():
        (0.7 * sum_of_errors(stage.model, targets)).backward()
    for key, parameter in stage.trained().items():
        actual = with_states[key] if without[key] is None else with_states[key] - without[key]
        own = torch.zeros_like(actual) if parameter.grad is None else parameter.grad
        assert (actual - own).norm() <= 1e-3 * with_states[key].norm() + 1e-6, key


def hidden_states(model):
    output = model.base_model(input_ids=sequences(), output_hidden_states=True)
    return [*output.hidden_states[1:-1], output[0]]


def sum_of_errors(model, targets):
    states = hidden_states(model)
    errors = [((s - t).square().mean(-1) / t.square().mean(-1)).sum() for s, t in zip(states, targets, strict=True)]
    return sum(errors) / len(errors)


@every_mode
@pytest.mark.parametrize("piece", [1, 7, 48, 1000])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_pieces_do_not_change_the_loss(mode, piece, label_weight, monkeypatch):
    results = []
    for size in (10**6, piece):
        monkeypatch.setattr(logits_module, "LOGITS_PER_PIECE", {"cpu": size * VOCABULARY})
        torch.manual_seed(0)
        stage = logit_distillation(student("gpt2"), train=mode, label_weight=label_weight)
        with stage.active():
            losses = stage.backward(sequences(2))
        gradients = torch.cat([p.grad.flatten() for p in stage.trained().values() if p.grad is not None])
        results.append((losses, gradients))
    (whole, expected), (pieces, actual) = results
    assert float(pieces.total) == pytest.approx(float(whole.total), rel=1e-5)
    assert pieces.parts.keys() == whole.parts.keys() and len(whole.parts) == (2 if label_weight else 1)
    assert (actual - expected).norm() <= 1e-4 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("piece", [1, 4, 10, 99])
def test_backward_in_pieces(piece):
    torch.manual_seed(0)
    weight, head = torch.randn(3, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    x, target = torch.randn(10, 3), torch.randn(10, 4)
    total = backward_in_pieces(x @ weight, piece, lambda h, part: (h.tanh() @ head - target[part]).square().sum())
    expected = ((x @ weight).tanh() @ head - target).square().sum()
    gradients = torch.autograd.grad(expected, [weight, head])
    torch.testing.assert_close(total, expected.detach())
    assert not total.requires_grad
    torch.testing.assert_close([weight.grad, head.grad], list(gradients))


@every_model
@pytest.mark.parametrize("convert", [False, True], ids=["teacher", "student"])
def test_split_model_is_the_model(name, convert):
    model = student(name) if convert else teacher(name)
    split = SplitModel(model)
    with torch.no_grad():
        hidden = split.hidden(sequences())
        expected = logits(model)
        actual = split.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        part = split.logits(hidden[1, 3:7])
    assert (part - expected[1, 3:7]).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(logits(model), expected) and "forward" not in vars(model.base_model)


def test_split_model_restores_the_base_model_after_an_error():
    model = teacher("gpt2")
    split = SplitModel(model)
    hidden = split.hidden(sequences())
    with pytest.raises(RuntimeError):
        split.logits(hidden[0, :, :7])
    assert "forward" not in vars(model.base_model)


def test_split_model_needs_a_head():
    with pytest.raises(FlexdistillError, match="LlamaModel gives no logits over a vocabulary"):
        SplitModel(teacher().base_model)


def test_next_tokens():
    assert next_tokens(torch.tensor([[5, 6, 7], [8, 9, 3]])).tolist() == [[6, 7, -100], [9, 3, -100]]


def test_stages_leave_requires_grad_as_it_was():
    model = student()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for stage in (attention_transfer(model), logit_distillation(model)):
        with stage.active():
            inside = {n for n, p in model.named_parameters() if p.requires_grad}
            assert inside == stage.trained().keys()
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@every_mode
def test_training_is_deterministic(mode):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        model = student()
        stage = logit_distillation(model, train=mode)
        train(stage)
        stage.finish()
        results.append(parameters(model))
    assert_equal(*results)
