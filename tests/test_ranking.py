import pytest

from flexdistill import pipeline, ranking
from flexdistill.errors import FlexdistillError
from flexdistill.pipeline import convert
from flexdistill.ranking import rank_layers
from tests.conversions import make_recipe


def test_ranking_is_what_a_conversion_chooses_by(sources, tmp_path, monkeypatch):
    recipe = make_recipe(sources, **{"kernel.keep_softmax": 1})
    ranked = rank_layers(recipe)
    gains = [layer["gain"] for layer in ranked["layers"]]
    assert gains == sorted(gains, reverse=True) and len(gains) == 2
    for layer in ranked["layers"]:
        assert layer["gain"] == pytest.approx(ranked["kl"] - layer["kl"])
    best = ranked["layers"][0]
    assert ranked["kept_softmax"] == {best["name"]: pytest.approx(best["gain"])}
    assert convert(recipe, tmp_path / "out")["kept_softmax"] == ranked["kept_softmax"]
    trained = []
    monkeypatch.setattr(pipeline.LogitDistillation, "backward", lambda *args: trained.append(args))
    assert rank_layers(make_recipe(sources))["kept_softmax"] == {}
    assert trained == []


def test_more_layers_than_there_are_is_told_before_training(sources, monkeypatch):
    monkeypatch.setattr(ranking, "load_sequences", None)  # no text has been read then
    with pytest.raises(FlexdistillError, match="Of the 2 layers that become linear, 5 are to stay softmax"):
        rank_layers(make_recipe(sources, **{"kernel.keep_softmax": 5}))
