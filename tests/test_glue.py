"""The GLUE benchmark: its metrics, its reading of files, and its runs with a tiny encoder."""

import importlib
import json
import lzma
import re
import statistics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.test_benchmarks import FOLDER, run_script
from tests.tiny import save_tiny

WORDS = ["the", "a", "cat", "dog", "eats", "sees", "big", "small", "well", "never"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a BERT of two layers and a tokenizer of single words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=14, max_position_embeddings=32, pad_token_id=0, **sizes))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return save_tiny(tmp_path_factory.mktemp("encoder"), model, fast)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    texts = [" ".join((WORDS * 3)[i : i + 3 + i % 4]) for i in range(20)]
    files = {
        "CoLA": [f"gj04\t{i % 2}\t\t{text}" for i, text in enumerate(texts)],
        "SST-2": ["sentence\tlabel"] + [f"{text} \t{i % 2}" for i, text in enumerate(texts)],
        "MRPC": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        + [f'{i % 2}\t1\t2\t{text}\t" {text[::-1]}' for i, text in enumerate(texts)],
    }
    for task, lines in files.items():
        (folder / task).mkdir()
        (folder / task / "dev.tsv").write_text("\r\n".join(lines), encoding="utf-8")
        (folder / task / "train.tsv.xz").write_bytes(lzma.compress(("\n".join(lines) + "\n").encode()))
    return folder


def test_metrics(module):
    tasks = module("glue_tasks")
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.rand(2, 200, generator=generator) < torch.tensor([[0.7], [0.6]])).long()
    arguments = predicted.tolist(), labels.tolist()
    # Matthews's is Pearson's correlation of binary variables
    pearson = torch.corrcoef(torch.stack([predicted, labels]).double())[0, 1]
    assert tasks.matthews(*arguments) == pytest.approx(float(pearson))
    assert tasks.accuracy(*arguments) == pytest.approx(float((predicted == labels).double().mean()))
    precision, recall = labels[predicted == 1].double().mean(), predicted[labels == 1].double().mean()
    assert tasks.f1(*arguments) == pytest.approx(float(2 * precision * recall / (precision + recall)))
    assert tasks.matthews([1, 1], [0, 1]) == 0 and tasks.f1([0, 0], [0, 0]) == 0


def test_files(module, data, encoder):
    tasks, sources = module("glue_tasks"), module("flexdistill.sources")
    for split in ("train", "dev"):
        for name, first in {
            "CoLA": ["the a cat"],
            "SST-2": ["the a cat "],
            "MRPC": ["the a cat", '" tac a eht'],
        }.items():
            texts, labels = tasks.read_examples(data, tasks.TASKS[name], split)
            assert texts[0] == first and labels == [0, 1] * 10
    tokenizer = sources.load_tokenizer(sources.resolve_model(str(encoder)))
    parts = tasks.load_rows(data, tasks.TASKS["MRPC"], tokenizer, 16, held_out=True)
    whole = tasks.load_rows(data, tasks.TASKS["MRPC"], tokenizer, 16, held_out=False)
    everything = whole["train"]
    assert everything.shape == (20, 17) and everything.equal(whole["dev"]) and everything.equal(parts["dev"])
    assert parts["held_out"].equal(everything[[0, 10]]) and len(parts["train"]) == 18 and "held_out" not in whole
    # label, [CLS] the a cat [SEP] " of unknown words [SEP]
    assert everything[0].tolist() == [0, 1, 4, 5, 6, 2, 3, 3, 5, 3, 2] + [0] * 6


def test_padding_by_tokens(module, data, encoder):
    stage = module("glue_stage")
    model = BertModel.from_pretrained(encoder).eval()
    sources = module("flexdistill.sources")
    tokenizer = sources.load_tokenizer(sources.resolve_model(str(encoder)))
    texts = ["the cat", "a big dog sees"], ["dog sees well", "never"]
    inputs = tokenizer(*texts, padding=True, return_tensors="pt")
    inputs["token_type_ids"] = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        wider = torch.nn.functional.pad(inputs["input_ids"], (0, 24 - 8))
        with stage.padding_by_tokens(model, tokenizer):
            for found in (model(wider).last_hidden_state, model(input_ids=wider).last_hidden_state):
                assert found.shape[1] == 16
                torch.testing.assert_close(found[:, :8][seen], expected[seen])
        assert model(wider).last_hidden_state.shape[1] == 24


def test_runs(module, data, encoder, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "glue"
    fixed = ["--model", encoder, "--data", data, "--folder", folder, "--transfer-steps", "2", "--seeds", "0", "1"]
    fixed += ["--methods", "softmax", "nonstationary", "performer", "--moved", "nonstationary"]
    few = ["--epochs", "0.5"]
    run_script("glue.py", monkeypatch, capsys, *fixed, *few, "--tasks", "CoLA")
    assert len(list(folder.glob("runs/*.json"))) == 6
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.name != "results.json"}
    printed = run_script("glue.py", monkeypatch, capsys, *fixed, *few)
    assert {file: file.read_bytes() for file in before} == before

    results = json.loads((folder / "results.json").read_text())
    runs = {tuple(run[name] for name in ("task", "method", "kernel_task", "seed")): run for run in results["runs"]}
    assert len(runs) == len(results["runs"]) == 3 * 3 * 2 + 6 * 2
    moved = runs["CoLA", "nonstationary", "MRPC", 0]
    assert moved["attention_kl"] == runs["MRPC", "nonstationary", None, 0]["attention_kl"]
    assert moved["attention_kl"]["last"] > 0 and runs["CoLA", "performer", None, 0]["transfer_steps"] == 0

    lines = [re.split(r" *\| *", line.strip("| ")) for line in printed.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines] == [
        *("attention", "---", "softmax", "nonstationary", "performer"),
        *("attention", "---", "softmax", "nonstationary"),
    ]
    for table, sources in ((lines[3], [None]), (lines[8], ["SST-2", "MRPC"])):
        values = [
            statistics.fmean(runs["CoLA", "nonstationary", source, seed]["metrics"]["Matthews"] for source in sources)
            for seed in (0, 1)
        ]
        assert table[1] == f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"
    with pytest.raises(SystemExit, match="other settings"):
        run_script("glue.py", monkeypatch, capsys, *fixed, "--epochs", "1")


@pytest.fixture
def benchmark(module, data, encoder, tmp_path):
    glue_models = module("glue_models")
    settings = glue_models.Settings(
        **{"model": str(encoder), "data": data, "folder": tmp_path, "precision": "fp32", "held_out": False},
        **{"longest": 16, "epochs": 1, "learning_rate": 1e-2, "kernel_learning_rate": 1e-2},
        **{"features": 24, "transfer_steps": 2, "transfer_batch": 4, "transfer_rate": 1e-2},
        **{"label_weight": 0.5, "hidden_state_weight": 1.0},
    )
    settings.begin()
    return glue_models.Benchmark(settings)


def test_distillation(module, benchmark):
    """Losses are 0 in softmax mode and fall by training; those of a batch are the sum of its rows'."""
    modes, recipes = module("flexdistill.attention_modes"), module("flexdistill.recipe")
    task = module("glue_tasks").TASKS["MRPC"]
    teacher, rows = benchmark.fine_tuned(task, 0), benchmark.rows("MRPC")["train"]
    model = benchmark.converted(benchmark.fine_tuned(task, 0), "nonstationary")
    stage = module("glue_stage").Classification(
        model,
        recipes.LogitDistillationRecipe(label_weight=0.25, hidden_state_weight=2),
        benchmark.accelerator,
        benchmark.tokenizer,
        teacher,
    )
    with stage.active():
        assert not model.training
        with modes.softmax_mode(model):
            alike = stage.backward(rows)
        assert alike.parts["kl"] == 0 and alike.parts["hidden_state_error"] == 0
        # a model as small as this one hardly attends, so it is harmed otherwise
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
        before = stage.backward(rows)
        parts = [stage.backward(row) for row in rows.split(1)]
    assert before.parts["hidden_state_error"] > 0 and float(before.count) == len(rows)
    assert float(sum(part.total for part in parts)) == pytest.approx(float(before.total), rel=1e-5)
    weights = {"label_loss": 0.25, "kl": 0.75, "hidden_state_error": 2}
    expected = sum(weight * float(before.parts[name]) for name, weight in weights.items())
    assert float(before.total) == pytest.approx(expected, rel=1e-5)
    benchmark.tune(model, task, 20, 0, teacher)
    with stage.active():
        assert stage.backward(rows).parts["hidden_state_error"] < before.parts["hidden_state_error"]


def test_batches_by_length(module):
    order, lengths = torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.tensor([9, 5, 7, 1])
    assert module("glue_models").by_length(order, lengths).tolist() == [[1, 2, 0], [3, 1, 0]]


def test_moved_kernels_stay_as_they_were_learned(module, benchmark):
    glue_models, glue_tasks = module("glue_models"), module("glue_tasks")
    kernel, facts = benchmark.kernel("MRPC", "hedgehog", 0)
    assert {weight.shape[-1] for weight in kernel.values()} == {24}
    task = glue_tasks.TASKS["CoLA"]
    for train_kernels in (False, True):
        model = benchmark.converted(benchmark.fine_tuned(task, 0), "hedgehog")
        glue_models.put_kernel(model, kernel)
        weight = model.classifier.weight.clone()
        benchmark.tune(model, task, 1, 0, benchmark.fine_tuned(task, 0), train_kernels=train_kernels)
        state = glue_models.kernel_state(model)
        assert all(state[name].equal(kernel[name]) for name in kernel) != train_kernels
        assert not model.classifier.weight.equal(weight)
