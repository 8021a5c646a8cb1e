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


def test_statistics_are_of_what_kernels_see():
    model = student("llama", variant="spectraformer", component="oprf", matrix="orf", longest_wavelength=0)
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    calls = [call for call in record_attention(model, AttentionCall.softmax, sequences()) if call.feature_map]
    for call, statistic in zip(calls, statistics(model), strict=True):
        seen = [kernel_side(x, call.rotation, call.feature_map.spec) for x in (call.query, call.key)]
        torch.testing.assert_close(statistic, call.feature_map.measure(*seen))
        assert not torch.allclose(statistic, call.feature_map.measure(call.query, call.key), rtol=1e-3)


def test_other_kernels_are_left_alone(monkeypatch):
    model = student("llama", variant="performer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(type(model.base_model), "forward", lambda *args, **kwargs: 1 / 0)
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("variant", ["stationary", "nonstationary"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_long_keys_are_made_shorter(variant, tied):
    model = student("llama", variant=variant, tied=tied)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight *= 400
    short, long = feature_maps(model).values()
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure_kernels(model, sequences(), Accelerator(cpu=True))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all((unit == 1).all() for unit in (short.query_unit, short.key_unit))
    calls = [call for call in record_attention(model, AttentionCall.softmax, sequences()) if call.feature_map]
    lengths = calls[1].key.norm(dim=-1).mean((0, 2)).repeat_interleave(2)
    assert lengths.min() > 40
    torch.testing.assert_close(long.key_unit * lengths, torch.full_like(lengths, 20.0))
    assert torch.equal(long.query_unit, long.key_unit if tied else torch.ones_like(long.query_unit))
