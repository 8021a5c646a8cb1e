import pytest
import yaml

from flexdistill.conversion import make_plan
from flexdistill.errors import FlexdistillError
from flexdistill.inputs import check_lengths, check_trainable
from flexdistill.recipe import RECIPES_FOLDER, Recipe, shipped_recipes
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama


def test_defaults_are_those_of_an_empty_file(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert Recipe.load(empty) == Recipe()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads_and_says_what_it_is_for(name):
    recipe = Recipe.load(name)
    purpose = (RECIPES_FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert purpose.startswith("# ")
    stages = (recipe.attention_transfer, recipe.logit_distillation)
    tokens = sum(stage.steps * stage.batch_size for stage in stages) * recipe.data.sequence_length
    budget = f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"
    assert f"{budget} tokens" in purpose


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_fits_a_model(name):
    recipe = Recipe.load(name)
    layers = 2 + recipe.kernel.keep_softmax
    model = {"bert-glue": tiny_bert, "gpt2": tiny_gpt2}.get(name, lambda: tiny_llama(layers))()
    plan = make_plan(model, recipe.kernel)
    assert len(plan.converted) == layers
    check_lengths(recipe)
    check_trainable(recipe, plan, model)


def test_recipes_expected_by_the_documentation_are_shipped():
    expected = ["bert-glue", "default", "demo", "gemma", "gpt2", "llama", "qwen"]
    expected += ["smollm2", "smollm2-100m", "smollm2-20m", "smollm2-long"]
    assert shipped_recipes() == expected


@pytest.mark.parametrize("name", shipped_recipes())
def test_yaml_round_trip(name, tmp_path):
    recipe = Recipe.load(name).override({"model": "gpt2", "kernel.window": 32})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_distillation.train": "kernels"},
        {"logit_distillation.train": "lora"},
        {"attention_transfer.schedule": "constant", "logit_distillation.schedule": "constant"},
        {"data.sources": [{"source": "a", "weight": 2}, {"source": "b", "column": "c"}]},
    ],
    ids=str,
)
def test_yaml_round_trip_where_a_setting_would_be_ignored(settings, tmp_path):
    recipe = Recipe.load("smollm2").override(settings)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel.windw": 3}, "unknown key 'kernel.windw'; did you mean 'window'?"),
        ({"sed": 3}, "did you mean 'seed'?"),
        ({"logit_distillation.lora.rnak": 3, "logit_distillation.train": "lora"}, "did you mean 'rank'?"),
        ({"zzz": 1}, "known are: model, seed"),
        ({"seed.value": 1}, "Setting 'seed.value' is unknown"),
        ({"kernel.window": -1}, "kernel.window"),
        ({"kernel.sinks": 4}, "sinks are tokens beside a softmax window; set a window or remove sinks"),
        ({"kernel.key_heads": "all"}, "'query' or 'kv'"),
        ({"logit_distillation.lora": {"rank": 4}}, "lora is ignored with train: full"),
        (
            {"logit_distillation.train": "kernels", "logit_distillation.lora.rank": 4},
            "lora is ignored with train: kernels",
        ),
        ({"logit_distillation.parallel": "fsdp", "logit_distillation.train": "lora"}, "train is 'lora'; set ddp"),
        ({"logit_distillation.cpu_offload": True}, "cpu_offload is ignored with parallel: ddp"),
        ({"attention_transfer.max_memory": "lots"}, "attention_transfer.max_memory"),
        ({"attention_transfer.max_memory": 0}, "attention_transfer.max_memory"),
        (
            {"attention_transfer.max_memory": "2GiB", "attention_transfer.micro_batch_size": 2},
            "max_memory picks the micro_batch_size that is set too",
        ),
        (
            {"logit_distillation.train": "kernels", "logit_distillation.learning_rate": 1e-3},
            "learning_rate is ignored with train: kernels",
        ),
        (
            {"logit_distillation.train": "lora", "logit_distillation.norm_learning_rate": 1e-3},
            "norm_learning_rate is ignored with train: lora",
        ),
        ({"data.sources": [{"source": "a"}], "data.column": "b"}, "column is set but sources would replace it"),
        ({"data.sources": []}, "data.sources"),
        ({"data.sources": [{"source": "a", "weight": 0}]}, "data.sources.0.weight"),
        (
            {"data.sources": [{"source": "a", "wieght": 2}]},
            "unknown key 'data.sources.0.wieght'; did you mean 'weight'?",
        ),
        (
            {"label_training.schedule": "constant", "label_training.final_learning_rate_ratio": 0.1},
            "final_learning_rate_ratio is ignored with schedule: constant",
        ),
        ({"attention_transfer.patience": 2}, "patience is ignored without validation"),
        (
            {"logit_distillation.optimizer": "adam", "logit_distillation.weight_decay": 0.1},
            "weight_decay is ignored with optimizer: adam",
        ),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(FlexdistillError) as raised:
        Recipe(seed=1).override(settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"), [("kernel: [", "not valid YAML"), ("- 1", "not a list"), ("kernel:\n  windo: 1", "'window'")]
)
def test_bad_files_are_explained(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(FlexdistillError, match=message):
        Recipe.load(file)


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(FlexdistillError, match="default, demo"):
        Recipe.load("defualt")


@pytest.mark.parametrize("section", ["kernel", "data"])
def test_a_section_is_no_setting(section):
    settings = {section: "stationary", "kernel.window": 0, "kernel.variant": "hedgehog", "data.source": "text.txt"}
    with pytest.raises(FlexdistillError):
        Recipe().override(settings)
    with pytest.raises(FlexdistillError):
        Recipe().override(dict(reversed(settings.items())))


def test_override_leaves_the_original_alone():
    recipe = Recipe()
    changed = recipe.override({"kernel.window": 64})
    assert (recipe.kernel.window, changed.kernel.window) == (0, 64)


def test_sinks_go_with_the_window():
    recipe = Recipe().override({"kernel.window": 64, "kernel.sinks": 4})
    assert recipe.override({"kernel.window": 32}).kernel.sinks == 4
    assert recipe.override({"kernel.window": 0}).kernel.sinks is None
    assert recipe.kernel.near == "softmax window of 64 tokens and 4 sinks"
    for none in (recipe.override({"kernel.sinks": 0}), Recipe().override({"kernel.window": 64})):
        assert (none.kernel.num_sinks, none.kernel.near) == (0, "softmax window of 64 tokens")


def test_a_text_replaces_a_mixture_and_the_reverse():
    mixture = [{"source": "a"}, {"source": "b", "weight": 3}]
    recipe = Recipe.load("default").override({"data.sources": mixture})
    assert [(text.source, text.weight) for text in recipe.data.texts] == [("a", 1), ("b", 3)]
    assert recipe.data.name == "a + b"
    single = recipe.override({"data.source": "c", "data.split": "test"})
    assert single.data.sources is None
    assert [(text.source, text.split, text.weight) for text in single.data.texts] == [("c", "test", 1)]


def test_to_yaml_holds_every_setting():
    assert set(yaml.safe_load(Recipe().to_yaml())) == set(Recipe.model_fields)


def test_a_budget_is_shared_out_like_the_recipe():
    recipe = Recipe.load("smollm2")
    planned = (260 + 150) * 8 * 512
    assert recipe.with_budget(planned) == recipe.override({"seed": recipe.seed})
    ten = recipe.with_budget(10 * planned + 1)
    assert (ten.attention_transfer.steps, ten.attention_transfer.warmup_steps) == (2600, 300)
    assert (ten.logit_distillation.steps, ten.logit_distillation.warmup_steps) == (1500, 200)
    half = recipe.with_budget(planned // 2)
    assert (half.attention_transfer.steps, half.logit_distillation.steps) == (130, 75)
    kernels = Recipe.load("demo").with_budget(10 * 256)
    assert (kernels.attention_transfer.steps, kernels.logit_distillation.steps) == (10, 0)
    with pytest.raises(FlexdistillError, match="has no training steps"):
        recipe.override({"attention_transfer.steps": 0, "logit_distillation.steps": 0}).with_budget(100)


def test_memory_is_written_as_people_do(tmp_path):
    recipe = Recipe().override({"logit_distillation.max_memory": "20GiB", "attention_transfer.max_memory": "1.5 GB"})
    assert recipe.logit_distillation.max_memory == 20 * 2**30
    assert recipe.attention_transfer.max_memory == 1_500_000_000
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file).model_dump() == recipe.model_dump()


def test_one_setting_of_the_micro_batch_size_replaces_the_other():
    sizes = Recipe().override({"attention_transfer.micro_batch_size": 2})
    memory = sizes.override({"attention_transfer.max_memory": "1GiB"})
    assert memory.attention_transfer.micro_batch_size is None
    assert memory.override({"attention_transfer.micro_batch_size": 4}).attention_transfer.max_memory is None


@pytest.mark.parametrize("setting", [{"kernel.component": "trigonometric"}, {"kernel.variant": "hedgehog"}])
def test_another_kernel_forgets_the_scale_of_frequencies(setting):
    recipe = Recipe().override({"kernel.frequency_scale": 0.5})
    assert recipe.override(setting).kernel.frequency_scale is None
    assert recipe.override(setting | {"kernel.frequency_scale": 0.3}).kernel.frequency_scale == 0.3
    assert recipe.override({"kernel.component": "hyperbolic"}).kernel.frequency_scale == 0.5


def test_another_way_of_training_forgets_what_it_ignores(tmp_path):
    """Also where the recipe is that of a result, which has every setting."""
    adapters = Recipe().override({"logit_distillation.train": "lora", "logit_distillation.lora.rank": 4})
    (tmp_path / "recipe.yaml").write_text(adapters.to_yaml())
    for recipe in (adapters, Recipe.load(tmp_path / "recipe.yaml")):
        assert recipe.override({"logit_distillation.train": "full"}).logit_distillation.lora is None
    norms = Recipe().override({"logit_distillation.norm_learning_rate": 1e-3})
    assert norms.override({"logit_distillation.train": "lora"}).logit_distillation.norm_learning_rate is None


def test_adapters_that_are_not_described_have_defaults():
    default, described = ({"logit_distillation.train": "lora"} | lora for lora in ({}, {"logit_distillation.lora": {}}))
    assert Recipe().override(default) == Recipe().override(described)
    assert Recipe().override(default | {"logit_distillation.lora": None}).logit_distillation.lora.rank == 8
    assert Recipe().logit_distillation.lora is None
