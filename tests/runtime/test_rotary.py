"""Rotary embedding taken out of what kernels see."""

import importlib

import pytest
import torch

from flexdistill.runtime.attention import attend, attention_weights
from flexdistill.runtime.registry import build_feature_map
from flexdistill.runtime.rotary import part_of, rotation_among, turned_back

from .kernels import HEAD_DIM, SCALING, kernel, kernel_spec, query_key_value, relative_error, rotation

# model types whose modelling files pair coordinates so
MODELS = {"halves": "llama", "interleaved": "cohere", "interleaved_of_halves": "glm"}


def turned(name: str, query, key, size: int, start: int = 0, scale: float = 1.0):
    """Queries and keys turned by a model's own function, and the rotation as that model makes it."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    cos, sin = (scale * x for x in rotation(query.shape[2], size=size, start=start))
    if name == "cohere":
        cos, sin = (x[..., : size // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
    return module.apply_rotary_pos_emb(query, key, cos, sin), (cos, sin)


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_models_own_turns_are_taken_back(layout, scale):
    query, key, _ = (x.detach() for x in query_key_value(50))
    (turned_query, turned_key), made = turned(MODELS[layout], query, key, HEAD_DIM, start=70, scale=scale)
    assert relative_error(turned_query, query) > 0.1
    for after, before in ((turned_query, query), (turned_key, key)):
        assert relative_error(turned_back(after, made, layout, 0), scale * before) <= 1e-5
        assert torch.equal(turned_back(after, made, layout, HEAD_DIM // 2), after)


@pytest.mark.parametrize("layout", MODELS)
def test_the_first_pairs_stay_turned(layout):
    query, key, _ = (x.detach() for x in query_key_value(50))
    (after, _), made = turned(MODELS[layout], query, key, HEAD_DIM)
    first = [0, HEAD_DIM // 2] if layout == "halves" else [0, 1]
    rest = [place for place in range(HEAD_DIM) if place not in first]
    back = turned_back(after, made, layout, 1)
    assert torch.equal(back[..., first], after[..., first])
    assert relative_error(back[..., rest], query[..., rest]) <= 1e-5


def test_coordinates_that_were_not_turned_stay():
    query, key, _ = (x.detach() for x in query_key_value(50))
    size = HEAD_DIM // 2
    (turned_part, _), made = turned("llama", query[..., :size], key[..., :size], size)
    after = torch.cat([turned_part, query[..., size:]], dim=-1)
    assert relative_error(turned_back(after, made, "halves", 0), query) <= 1e-5


def test_half_precision_stays():
    query, key, _ = (x.detach().bfloat16() for x in query_key_value(50))
    cos, sin = (x.bfloat16() for x in rotation(50))
    back = turned_back(query, (cos, sin), "halves", 1)
    assert back.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [0, 5])
def test_a_kernel_does_not_see_where_a_sequence_starts(window):
    query, key, value = (x.detach() for x in query_key_value(60))
    outputs = {}
    for rotary in ("halves", None):
        settings = {} if rotary is None else {"rotary": rotary}
        feature_map = kernel("nonstationary+decay", "hyperbolic", window=window, **settings)
        for start in (0, 3000):
            (q, k), made = turned("llama", query, key, HEAD_DIM, start=start)
            outputs[rotary, start], _ = attend(feature_map, q, k, value, scaling=SCALING, rotation=made)
    assert relative_error(outputs["halves", 3000], outputs["halves", 0]) <= 1e-3
    assert relative_error(outputs[None, 3000], outputs[None, 0]) > 1e-2


@pytest.mark.parametrize("window", [0, 5])
def test_gradients_are_the_references(window):
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=window, rotary="halves", rotary_pairs=1)
    leaves, made = query_key_value(70), rotation(70)
    every = [*leaves, *feature_map.parameters()]
    query, key, value = leaves
    weights = attention_weights(feature_map, query, key, scaling=SCALING, rotation=made)
    expected = weights @ value.repeat_interleave(2, dim=1)
    actual, _ = attend(feature_map, *leaves, scaling=SCALING, rotation=made)
    direction = torch.randn_like(actual)
    for ours, theirs in zip(
        torch.autograd.grad((actual * direction).sum(), every),
        torch.autograd.grad((expected * direction).sum(), every),
        strict=True,
    ):
        assert relative_error(ours, theirs) <= 1e-4


def test_packed_sequences_are_run_as_if_alone():
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=3, rotary="halves")
    inputs, made = query_key_value(60, batch=1), rotation(60)
    packed, _ = attend(feature_map, *inputs, scaling=SCALING, keep_memory=False, boundaries=[0, 25, 60], rotation=made)
    part = slice(25, 60)
    alone, _ = attend(feature_map, *(x[:, :, part] for x in inputs), scaling=SCALING, rotation=part_of(made, 0, part))
    assert relative_error(packed[:, :, part], alone) <= 1e-5


def test_a_kernel_that_needs_the_rotation_says_so():
    feature_map = kernel("nonstationary+decay", "hyperbolic", rotary="halves")
    inputs = query_key_value(5)
    with pytest.raises(ValueError, match="takes rotary embedding out .* was not given any"):
        attend(feature_map, *inputs, scaling=SCALING)
    for other in (rotation(5, size=4), rotation(4), [x.repeat(3, 1, 1) for x in rotation(5)]):
        with pytest.raises(ValueError, match="rotary embedding of 8 coordinates .* was given one of shape"):
            attend(feature_map, *inputs, scaling=SCALING, rotation=other)


def test_rotations_of_other_forms_are_not_taken():
    cos, sin = rotation(5)
    for given in (((), {"position_embeddings": (cos, sin)}), ((cos, (cos, sin)), {})):
        assert rotation_among(*given) == (cos, sin)
    for other in (None, cos, (cos,), (cos, None), (cos[0], sin[0]), (cos, sin[:, :3])):
        assert rotation_among((other,), {"position_embeddings": other}) is None
    assert rotation_among((), {}) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rotary": "spiral"}, "'spiral' is unknown; choose one of: halves, interleaved"),
        ({"rotary_dim": 7}, "of 7 coordinates"),
        ({"rotary_dim": 2 * HEAD_DIM}, "does not fit heads of size 8"),
        ({"rotary_pairs": -1}, "with -1 pairs kept does not fit"),
        ({"rotary_pairs": HEAD_DIM}, "with 8 pairs kept does not fit"),
    ],
)
def test_what_cannot_be_rotary_embedding_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        build_feature_map(kernel_spec("nonstationary", "hyperbolic", **{"rotary": "halves"} | changes))
