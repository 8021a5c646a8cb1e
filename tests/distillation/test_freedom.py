import pytest
import torch
from accelerate import Accelerator

from flexdistill.attention_modes import AttentionCall, record_attention
from flexdistill.distillation.freedom import check_shareable, degrees_of_freedom, shared_frequencies
from flexdistill.errors import FlexdistillError
from tests.distillation.stages import MAKERS, sequences, teacher

NAMES = {
    "llama": ["layers.0.self_attn", "layers.1.self_attn"],
    "gpt2": ["h.0.attn", "h.1.attn"],
    "bert": ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"],
}


@pytest.mark.parametrize("length", [24, 25])
@pytest.mark.parametrize("name", MAKERS)
def test_degrees_of_freedom_are_those_of_singular_values(name, length):
    model, tokens = teacher(name), sequences(length=length)
    found = degrees_of_freedom(model, NAMES[name], tokens, Accelerator(cpu=True))
    assert list(found) == NAMES[name]
    calls = record_attention(model, AttentionCall.softmax, tokens)
    for call, figure in zip(calls, found.values(), strict=True):
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        weights = (call.query @ key.mT * call.scaling).softmax(-1).double()
        squares = torch.linalg.svdvals(weights).square()
        assert figure == pytest.approx(float((squares / (squares + 0.1)).sum(-1).mean()), rel=1e-4)
        assert 1 < figure < length


def test_only_the_modules_that_are_named_are_measured():
    model, tokens = teacher(), sequences()
    both = degrees_of_freedom(model, NAMES["llama"], tokens, Accelerator(cpu=True))
    last = degrees_of_freedom(model, NAMES["llama"][1:], tokens, Accelerator(cpu=True))
    assert last == {NAMES["llama"][1]: both[NAMES["llama"][1]]}
    longer = torch.cat([tokens.repeat(1, 22), tokens], 1)[:, :520]  # what comes after 512 tokens does not count
    cut = degrees_of_freedom(model, NAMES["llama"], longer[:, :512], Accelerator(cpu=True))
    model.config.max_position_embeddings = 1024
    assert degrees_of_freedom(model, NAMES["llama"], longer, Accelerator(cpu=True)) == cut


@pytest.mark.parametrize(
    ("freedom", "even", "expected"),
    [
        ([5.0, 5.0, 5.0], 64, [64, 64, 64]),
        ([9.0, 1.0], 64, [96, 32]),
        ([900.0, 1.0], 64, [120, 8]),
        ([900.0, 1.0, 1.0], 64, [128, 32, 32]),  # twice its own at most
        ([4.0, 1.0], 8, [8, 8]),
        ([4.0, 1.0, 1.0], 20, [24, 16, 16]),  # 60 is seven eights
    ],
)
def test_shares(freedom, even, expected):
    names = [str(index) for index in range(len(freedom))]
    found = shared_frequencies(dict(zip(names, freedom, strict=True)), dict.fromkeys(names, even))
    assert list(found.values()) == expected


def test_shares_are_near_the_roots():
    generator = torch.Generator().manual_seed(0)
    freedom = {str(index): float(value) for index, value in enumerate(torch.rand(30, generator=generator) * 60 + 10)}
    found = shared_frequencies(freedom, dict.fromkeys(freedom, 64))
    assert sum(found.values()) == 30 * 64
    roots = {name: value**0.5 for name, value in freedom.items()}
    for name, size in found.items():
        assert abs(size - 30 * 64 * roots[name] / sum(roots.values())) <= 8


def test_too_few_to_share():
    check_shareable({"a": 8})
    with pytest.raises(FlexdistillError, match="7 frequencies are too few to be shared out in 8s; set more kernel.f"):
        check_shareable({"a": 7, "b": 100})
