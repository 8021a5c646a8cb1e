import pytest

from flexdistill import pipeline
from flexdistill.pipeline import convert
from flexdistill.ranking import rank_layers
from tests.conversions import make_recipe


def test_ranking_is_what_a_conversion_chooses_by(sources, tmp_path, monkeypatch):
    recipe = make_recipe(sources, **{"kernel.keep_softmax": 1})
    ranking = rank_layers(recipe)
    gains = [layer["gain"] for layer in ranking["layers"]]
    assert gains == sorted(gains, reverse=True) and len(gains) == 2
    for layer in ranking["layers"]:
        assert layer["gain"] == pytest.approx(ranking["kl"] - layer["kl"])
    best = ranking["layers"][0]
    assert ranking["kept_softmax"] == {best["name"]: pytest.approx(best["gain"])}
    assert convert(recipe, tmp_path / "out")["kept_softmax"] == ranking["kept_softmax"]
    trained = []
    monkeypatch.setattr(pipeline.LogitDistillation, "backward", lambda *args: trained.append(args))
    assert rank_layers(make_recipe(sources))["kept_softmax"] == {}
    assert trained == []
