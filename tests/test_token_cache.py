import json
import sys
from pathlib import Path

import numpy
import pytest
import torch

from flexdistill import token_cache
from flexdistill.errors import FlexdistillError
from flexdistill.packing import pack
from flexdistill.recipe import DataRecipe
from flexdistill.recipe_sections import WeightedTextRecipe
from flexdistill.token_cache import cache_folder, read_tokens
from tests import tiny
from tests.forked import Forked

ROWS = [f"Row {number} is about {number * number}.\n" for number in range(40)]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row, "other": row[::-1]}) + "\n" for row in ROWS))
    return WeightedTextRecipe(source=str(file))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def all_tokens(tokenizer, rows=ROWS):
    return pack(rows, tokenizer, 1).flatten()


def files(folder):
    return sorted(file.name for file in folder.glob("*.npy"))


@pytest.mark.parametrize("count", [1, 100, 10**6])
@pytest.mark.parametrize("cached", [False, True])
def test_tokens_are_those_of_pack(text, folder, tiny_tokenizer, count, cached):
    tokens = read_tokens(text, tiny_tokenizer, count, folder if cached else None)
    expected = all_tokens(tiny_tokenizer)
    assert tokens.dtype == torch.uint16 and len(tokens) >= min(count, len(expected))
    assert torch.equal(tokens.long(), expected[: len(tokens)])
    assert len(tokens) == len(expected) or count < len(expected)


def test_settings_that_do_not_apply_are_errors_from_the_cache_too(text, folder, tiny_tokenizer):
    read_tokens(text, tiny_tokenizer, 10, folder)
    with pytest.raises(FlexdistillError, match="Setting 'split' applies to `datasets` names only"):
        read_tokens(text.model_copy(update={"split": "train"}), tiny_tokenizer, 10, folder)


def test_text_is_tokenised_once(text, folder, tiny_tokenizer, monkeypatch, capsys):
    first = read_tokens(text, tiny_tokenizer, 10**6, folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(token_cache, "token_pieces", None)  # would fail if it were called
    again = read_tokens(text, tiny_tokenizer, 10**6, folder)
    assert torch.equal(first, again)
    (name,) = files(folder)
    assert capsys.readouterr().err == f"Tokens of {text.source} come from the cache: {folder / name}\n"
    assert isinstance(numpy.load(folder / name, mmap_mode="r"), numpy.memmap)


def test_another_text_or_tokenizer_is_another_file(text, folder, tiny_tokenizer, tmp_path):
    read_tokens(text, tiny_tokenizer, 10**6, folder)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(text.source).read_bytes())
    read_tokens(WeightedTextRecipe(source=str(copy)), tiny_tokenizer, 10**6, folder)
    assert len(files(folder)) == 1  # the same content
    read_tokens(text.model_copy(update={"column": "other"}), tiny_tokenizer, 10**6, folder)
    copy.write_text(copy.read_text().replace("Row 3 ", "Row 4 "))
    changed = read_tokens(WeightedTextRecipe(source=str(copy)), tiny_tokenizer, 10**6, folder)
    assert torch.equal(changed.long(), all_tokens(tiny_tokenizer, [row.replace("Row 3 ", "Row 4 ") for row in ROWS]))
    other = tiny.tiny_tokenizer()
    other.add_tokens(["about"])
    assert 256 in read_tokens(text, other, 10**6, folder).long()
    assert len(files(folder)) == 4


def test_a_beginning_is_replaced_by_a_longer_one(text, folder, tiny_tokenizer):
    lengths = [len(read_tokens(text, tiny_tokenizer, count, folder)) for count in (50, 20, 200, 10**6, 50)]
    (name,) = files(folder)
    assert not name.endswith(".beginning.npy")
    assert 50 <= lengths[0] == lengths[1] < 200 <= lengths[2] < lengths[3] == lengths[4]


def test_a_damaged_file_is_written_again(text, folder, tiny_tokenizer):
    read_tokens(text, tiny_tokenizer, 10**6, folder)
    (name,) = files(folder)
    for content in (b"", b"garbage", (folder / name).read_bytes()[:-10]):
        (folder / name).write_bytes(content)
        tokens = read_tokens(text, tiny_tokenizer, 10**6, folder)
        assert torch.equal(tokens.long(), all_tokens(tiny_tokenizer))


def test_an_interrupted_writer_leaves_nothing(text, folder, tiny_tokenizer, monkeypatch):
    def broken(*args):
        yield [1, 2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "token_pieces", broken)
        read_tokens(text, tiny_tokenizer, 10**6, folder)
    assert [file.suffix for file in folder.iterdir()] in ([], [".lock"])
    assert len(read_tokens(text, tiny_tokenizer, 10**6, folder)) > 2


def test_a_folder_that_cannot_be_written_is_explained(text, tiny_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexdistillError, match=r"Token cache .*file.cache cannot be used .*; set data.cache to"):
        read_tokens(text, tiny_tokenizer, 5, tmp_path / "file" / "cache")


def test_bad_text_is_told_as_without_a_cache(folder, tiny_tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FlexdistillError, match="is empty; give a source"):
        read_tokens(WeightedTextRecipe(source=str(tmp_path / "empty.txt")), tiny_tokenizer, 5, folder)
    with pytest.raises(FlexdistillError, match="'nobody/nothing' cannot be read"):
        read_tokens(WeightedTextRecipe(source="nobody/nothing"), tiny_tokenizer, 5, folder)
    assert files(folder) == []


def test_streamed_datasets_are_cached_by_revision(folder, tiny_tokenizer, monkeypatch):
    import datasets

    revision, streamed = ["one"], []

    def load_dataset(*args, **settings):
        streamed.append(settings)
        return datasets.IterableDataset.from_generator(lambda: ({"text": row} for row in ROWS))

    class Builder:
        @property
        def cache_dir(self):
            return f"/anywhere/some___corpus/default-0123/0.0.0/{revision[0]}"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: Builder())
    text = WeightedTextRecipe(source="some/corpus")
    for _ in range(2):
        assert torch.equal(read_tokens(text, tiny_tokenizer, 10**6, folder).long(), all_tokens(tiny_tokenizer))
    assert len(streamed) == 1 and streamed[0]["streaming"]
    revision[0] = "two"
    read_tokens(text, tiny_tokenizer, 10**6, folder)
    assert len(streamed) == 2 and len(files(folder)) == 2


def test_large_vocabularies_take_four_bytes(text, folder):
    class Large:
        def __init__(self):
            self._tokenizer = tiny.tiny_tokenizer()

        def __len__(self):
            return 2**16 + 1

        def __call__(self, *args, **settings):
            return self._tokenizer(*args, **settings)

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

    for cached in (folder, None):
        tokens = read_tokens(text, Large(), 10**6, cached)
        assert tokens.dtype == torch.int32
        assert torch.equal(tokens.long(), all_tokens(tiny.tiny_tokenizer()))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert cache_folder(DataRecipe().cache) == tmp_path / "flexdistill" / "tokens"
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    assert cache_folder(False) is None


def reader():
    """A process that says how often it tokenised, and what it read."""
    calls, original = [], token_cache.token_pieces
    token_cache.token_pieces = lambda *args: calls.append(args) or original(*args)
    source, folder = sys.argv[1:]
    tokens = token_cache.read_tokens(WeightedTextRecipe(source=source), tiny.tiny_tokenizer(), 10**6, Path(folder))
    print(len(calls), len(tokens), int(tokens.long().sum()))


def test_two_processes_at_once_tokenise_once(text, folder, tmp_path, tiny_tokenizer):
    processes = [Forked([text.source, str(folder)], tmp_path, program=reader, rank=rank) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
    results = [list(map(int, process.stdout.split())) for process in processes]
    expected = all_tokens(tiny_tokenizer)
    assert sorted(calls for calls, _, _ in results) == [0, 1]
    assert all(rest == [len(expected), int(expected.sum())] for _, *rest in results)
    assert len(files(folder)) == 1
