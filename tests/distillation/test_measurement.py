import pytest
import torch
from accelerate import Accelerator

from flexdistill.attention_modes import AttentionCall, record_attention
from flexdistill.distillation.measurement import measure_kernels
from flexdistill.distillation.stage import feature_maps
from flexdistill.runtime.rotary import kernel_side
from tests.distillation.stages import MAKERS, sequences, student


def statistics(model):
    return [feature_map.statistic.clone() for feature_map in feature_maps(model).values()]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("layers", ["all", "1"])
def test_statistics_are_those_of_softmax_activations(name, layers):
    model = student(name, variant="spectraformer", component="oprf", matrix="orf", layers=layers)
    before = statistics(model)
    implementation = model.config._attn_implementation
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    after = statistics(model)
    assert model.config._attn_implementation == implementation
    calls = [call for call in record_attention(model, AttentionCall.softmax, sequences()) if call.feature_map]
    assert len(calls) == len(after) == (2 if layers == "all" else 1)
    for call, old, new in zip(calls, before, after, strict=True):
        assert not torch.equal(new, old)
        # the models scale by 1 / sqrt(d), so queries are as they come
        torch.testing.assert_close(new, call.feature_map.measure(call.query, call.key))


def test_other_kernels_are_left_alone(monkeypatch):
    model = student("llama", variant="performer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(type(model.base_model), "forward", lambda *args, **kwargs: 1 / 0)
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("variant", ["stationary", "nonstationary"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_frequencies_fit_the_spread_of_queries_and_keys(variant, tied):
    model = student("llama", variant=variant, tied=tied)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight *= 400
    fine, spread = feature_maps(model).values()
    before = [{name: p.clone() for name, p in each.named_parameters()} for each in (fine, spread)]
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    for name, parameter in fine.named_parameters():
        assert torch.equal(parameter, before[0][name]), name
    for name, parameter in spread.named_parameters():
        if name.endswith("w1"):
            assert parameter.norm() < 0.5 * before[1][name].norm(), name
        else:
            assert torch.equal(parameter, before[1][name]), name
    calls = [call for call in record_attention(model, AttentionCall.softmax, sequences()) if call.feature_map]
    query, key = (kernel_side(x, calls[1].rotation, spread.spec) for x in (calls[1].query, calls[1].key))
    phases = spread.measure(query, key).sqrt()
    torch.testing.assert_close(phases, torch.full_like(phases, 1.5))
