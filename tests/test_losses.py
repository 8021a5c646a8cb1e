import math

import pytest
import torch

from flexdistill import losses

SEED = torch.Generator().manual_seed(0)
B, H, T, D, N, V = 3, 2, 5, 4, 12, 7


def rows(signed=False):
    """Attention rows (B, H, T, T), causal."""
    weights = torch.randn(B, H, T, T, generator=SEED).exp().tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights - 0.3 * torch.rand(B, H, T, T, generator=SEED).tril() if signed else weights


def visible_mask():
    visible = torch.ones(B, T, dtype=torch.bool)
    visible[0, :2] = False
    visible[1, 4] = False
    return visible


def attention_losses():
    teacher, student = rows(), rows()
    outputs = torch.randn(B, H, T, D, generator=SEED), torch.randn(B, H, T, D, generator=SEED)
    yield "attention_cross_entropy", (teacher, student)
    yield "attention_entropy", (teacher,)
    yield "negative_mass", (rows(signed=True),)
    yield "relative_output_error", outputs


def logit_losses():
    student, teacher = torch.randn(N, V, generator=SEED) * 2, torch.randn(N, V, generator=SEED) * 2
    mask = torch.rand(N, generator=SEED) > 0.4
    labels = torch.randint(V, (N,), generator=SEED).masked_fill(~mask, -100)
    yield "kl_divergence", (student, teacher, mask)
    yield "label_loss", (student, labels)
    yield "top1_agreement", (student, teacher, mask)


def plain(name, b, i, *tensors):
    """One query's loss by its formula; what `relative_output_error` divides by is that of its sequence."""
    values = [tensor[b, :, i] for tensor in tensors]
    if name == "attention_cross_entropy":
        return (
            sum(-t * math.log(max(s, 1e-8)) for t, s in zip(*(x.flatten().tolist() for x in values), strict=True)) / H
        )
    if name == "attention_entropy":
        return sum(-t * math.log(t) for t in values[0].flatten().tolist() if t > 0) / H
    return sum(min(sum(-x for x in row if x < 0), 10) for row in values[0].tolist()) / H


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "tensors"), list(attention_losses())[:3], ids=lambda x: x if isinstance(x, str) else ""
)
def test_attention_losses_are_their_formula(name, tensors, masked):
    visible = visible_mask() if masked else None
    total, count = getattr(losses, name)(*tensors, visible)
    counted = [(b, i) for b in range(B) for i in range(T) if visible is None or visible[b, i]]
    assert count == len(counted)
    expected = sum(plain(name, b, i, *tensors) for b, i in counted)
    assert float(total) == pytest.approx(expected, rel=1e-5) and expected > 0


def test_negative_mass_is_capped():
    student = torch.full((1, 1, 2, 2), -100.0)
    student[..., 1, :] = 3.0
    assert losses.negative_mass(student)[0] == 10


@pytest.mark.parametrize("masked", [False, True])
def test_relative_output_error_is_its_formula(masked):
    teacher, student = dict(attention_losses())["relative_output_error"]
    visible = visible_mask() if masked else torch.ones(B, T, dtype=torch.bool)
    expected = 0.0
    for b in range(B):
        t, s = teacher[b][:, visible[b]], student[b][:, visible[b]]
        expected += float((t - s).square().mean() / t.square().mean() * visible[b].sum())
    total, count = losses.relative_output_error(teacher, student, visible if masked else None)
    assert float(total) == pytest.approx(expected, rel=1e-5) and count == visible.sum()


def test_relative_output_error_of_zeros_is_finite():
    zeros = torch.zeros(1, 1, 2, 2, requires_grad=True)
    total, _ = losses.relative_output_error(zeros.detach(), zeros)
    total.backward()
    assert total == 0 and zeros.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_divergence_is_its_formula(temperature):
    student, teacher, mask = dict(logit_losses())["kl_divergence"]
    total, count = losses.kl_divergence(student, teacher, mask, temperature)
    expected = 0.0
    for row in mask.nonzero().flatten().tolist():
        p, q = ((x[row].double() / temperature).exp() for x in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        expected += temperature**2 * float((p * (p / q).log()).sum())
    assert float(total) == pytest.approx(expected, rel=1e-4) and count == mask.sum()


def test_label_loss_is_its_formula():
    logits, labels = dict(logit_losses())["label_loss"]
    total, count = losses.label_loss(logits, labels)
    counted = [(row, int(label)) for row, label in zip(logits.double(), labels, strict=True) if label != -100]
    expected = sum(float(row.logsumexp(-1) - row[label]) for row, label in counted)
    assert float(total) == pytest.approx(expected, rel=1e-5) and count == len(counted)


def test_top1_agreement_is_its_formula():
    student, teacher, mask = dict(logit_losses())["top1_agreement"]
    student[::2] = teacher[::2] * 3
    total, count = losses.top1_agreement(student, teacher, mask)
    expected = sum(int(student[i].argmax() == teacher[i].argmax()) for i in range(N) if mask[i])
    assert total == expected >= mask[::2].sum() and count == mask.sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "tensors"), list(attention_losses()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]], ids=str)
def test_attention_losses_add_up_over_any_split(name, tensors, masked, sizes):
    visible = visible_mask() if masked else None
    whole = getattr(losses, name)(*tensors, visible)
    masks = visible.split(sizes) if masked else [None] * len(sizes)
    parts = [
        getattr(losses, name)(*part, mask)
        for *part, mask in zip(*(x.split(sizes) for x in tensors), masks, strict=True)
    ]
    for index in range(2):
        assert float(sum(part[index] for part in parts)) == pytest.approx(float(whole[index]), rel=1e-5)


@pytest.mark.parametrize(("name", "tensors"), list(logit_losses()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("sizes", [[5, 7], [1, 11], [4, 4, 4]], ids=str)
def test_logit_losses_add_up_over_any_split(name, tensors, sizes):
    whole = getattr(losses, name)(*tensors)
    parts = [getattr(losses, name)(*part) for part in zip(*(x.split(sizes) for x in tensors), strict=True)]
    for index in range(2):
        assert float(sum(part[index] for part in parts)) == pytest.approx(float(whole[index]), rel=1e-5)


@pytest.mark.parametrize(("name", "tensors"), list(attention_losses()), ids=lambda x: x if isinstance(x, str) else "")
def test_padded_queries_do_not_count(name, tensors):
    expected = getattr(losses, name)(*tensors, visible_mask())
    garbage = [torch.where(visible_mask()[:, None, :, None], x, 0.5) for x in tensors]
    actual = getattr(losses, name)(*garbage, visible_mask())
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def test_masked_logits_do_not_count_even_when_they_are_not_finite():
    student, teacher, mask = dict(logit_losses())["kl_divergence"]
    expected = losses.kl_divergence(student, teacher, mask)[0]
    student[~mask] = torch.nan
    assert losses.kl_divergence(student, teacher, mask)[0] == expected
    student.requires_grad_()
    losses.kl_divergence(student, teacher, mask)[0].backward()
    assert student.grad[mask].isfinite().all() and student.grad[mask].abs().sum() > 0


def test_kl_is_zero_at_equality_only():
    student, teacher, _ = dict(logit_losses())["kl_divergence"]
    everything = torch.ones(N, dtype=torch.bool)
    assert losses.kl_divergence(teacher, teacher.clone(), everything)[0].abs() < 1e-6
    assert losses.kl_divergence(teacher + 3, teacher, everything)[0].abs() < 1e-5  # a shift is no difference
    assert losses.kl_divergence(student, teacher, everything)[0] > 0.1
    maps = rows()
    kl = losses.attention_cross_entropy(maps, maps)[0] - losses.attention_entropy(maps)[0]
    assert kl.abs() < 1e-5
    assert losses.attention_cross_entropy(maps, rows())[0] - losses.attention_entropy(maps)[0] > 0.1


def test_gradients_of_the_logit_losses():
    student, teacher, mask = dict(logit_losses())["kl_divergence"]
    student.requires_grad_()
    losses.kl_divergence(student, teacher, mask, 2.0)[0].backward()
    expected = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) * mask[:, None]
    torch.testing.assert_close(student.grad, expected.detach())
    logits, labels = dict(logit_losses())["label_loss"]
    logits.requires_grad_()
    losses.label_loss(logits, labels)[0].backward()
    counted = labels != -100
    expected = (logits.softmax(-1) - torch.nn.functional.one_hot(labels.clamp_min(0), V)) * counted[:, None]
    torch.testing.assert_close(logits.grad, expected.detach())


def test_gradients_of_the_attention_losses():
    teacher, student = rows(), rows().requires_grad_()
    losses.attention_cross_entropy(teacher, student, visible_mask())[0].backward()
    weight = visible_mask()[:, None, :, None] / H
    expected = torch.where(student > 0, -teacher / student, 0) * weight
    torch.testing.assert_close(student.grad, expected.detach())
    signed = rows(signed=True).requires_grad_()
    losses.negative_mass(signed, visible_mask())[0].backward()
    causal = torch.ones(T, T, dtype=torch.bool).tril()  # at exactly 0 either slope is right
    expected = torch.where(signed < 0, -1.0, 0.0) * weight
    torch.testing.assert_close(signed.grad * causal, expected * causal)
    assert expected.abs().sum() > 0


def test_bf16_logits_are_summed_in_float32():
    student, teacher, mask = dict(logit_losses())["kl_divergence"]
    total, _ = losses.kl_divergence(student.bfloat16(), teacher.bfloat16(), mask)
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total, losses.kl_divergence(student.bfloat16().float(), teacher.bfloat16().float(), mask)[0]
    )
