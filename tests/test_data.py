import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from flexdistill import packing
from flexdistill.data import SAMPLE, dataset_name, read_documents
from flexdistill.errors import FlexdistillError
from flexdistill.packing import pack, split_held_out, train_order
from flexdistill.recipe import DataRecipe, EvaluationRecipe

TEXT = "Miss Brooke had that kind of beauty.\nIt was hardly a year since.\n"
ROWS = ["first row", "second row", "third row"]


def documents(source, **settings):
    return list(read_documents(DataRecipe(source=str(source), **settings)))


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_sample_is_the_novel_in_paragraphs():
    (text,) = documents("sample")
    assert text.startswith("PRELUDE\nWho that cares much to know the history of man")
    assert 890_000 < len(text.encode()) < 910_000
    assert SAMPLE.stat().st_size < 300_000
    assert "\n\n" not in text


COMPRESSORS = {
    "": lambda content: content,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", [".txt", ".text", ".raw", ".md", ".tokens"])
def test_text_file_is_one_document(tmp_path, suffix, compression):
    file = tmp_path / f"novel{suffix}{compression}"
    file.write_bytes(COMPRESSORS[compression](TEXT.encode()))
    assert documents(file) == [TEXT]


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_jsonl_row_is_one_document(tmp_path, compression):
    file = tmp_path / f"rows.jsonl{compression}"
    content = "".join(json.dumps({"id": i, "body": row}) + "\n" for i, row in enumerate(ROWS))
    file.write_bytes(COMPRESSORS[compression](content.encode()))
    assert documents(file, column="body") == ROWS


def test_parquet_row_is_one_document(tmp_path):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": ROWS}), file)
    assert documents(file) == ROWS
    assert list(read_documents(EvaluationRecipe(source=str(file)))) == ROWS


def test_zst_reads_every_frame(tmp_path):
    file = tmp_path / "novel.txt.zst"
    compress = zstandard.ZstdCompressor().compress
    file.write_bytes(compress(b"one\n") + compress(b"two\n"))
    assert documents(file) == ["one\ntwo\n"]


def test_folder_is_read_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/z.md", "a.raw", "b/a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "0.png").write_bytes(b"\x89PNG")
    assert documents(tmp_path) == ["a.raw", "b/a.txt", "b/z.md", "c.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = "\ufeff" + ('{"text": "one"}\n' if "jsonl" in name else "one")
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert list(read_documents(DataRecipe(source=str(file)))) == ["one"]


def test_blank_documents_are_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": ""}\n\n{"text": "  \\n"}\n{"text": "words"}\n')
    assert documents(file) == ["words"]


def damaged_files():
    rows = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), rows)
    long = "".join(f"{i}\n" for i in range(100_000)).encode()
    yield "latin.txt", "café".encode("latin-1"), "not UTF-8 text; convert it"
    yield "empty.txt", b"", "is empty; give a source"
    yield "rows.jsonl", b'{"text": "a"}\n{"text": \n', "Line 2 of .*rows.jsonl is not JSON"
    yield "rows.jsonl", b'["a"]\n', "Row 1 of .* is a list; it must be an object"
    yield "rows.jsonl", b'{"body": "a", "id": 1}\n', "no column 'text'; set data.column to one of: body, id"
    yield "rows.jsonl", b'{"text": "a"}\n' + 200_000 * b"[" + b"\n", "Line 2 of .* is not JSON .too deep"
    yield "rows.jsonl", b'{"text": "caf\\ud83d"}\n', "Row 1 of .* holds half of a surrogate pair"
    yield "rows.json", b'{"text": "a"}\n', "is not read as text; write its rows as .jsonl"
    yield "rows.jsonl", b'{"text": 3}\n', "holds a int in column 'text'; set data.column"
    yield "rows.parquet", rows.getvalue().to_pybytes()[:-20], "cannot be read .*; check that it is complete"
    yield "rows.parquet.gz", gzip.compress(b"x", mtime=0), "compressed parquet, which is not read; decompress it"
    for suffix, compress in COMPRESSORS.items():
        if suffix:
            yield f"cut.txt{suffix}", compress(long)[:5000], "cannot be read .*; check that it is complete"
            yield f"garbage.txt{suffix}", b"not compressed at all", "cannot be read .*; check that it is complete"


@pytest.mark.parametrize(("name", "content", "message"), list(damaged_files()))
def test_damaged_files_are_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexdistillError, match=message) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_parquet_column_lists_the_columns(tmp_path):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), file)
    with pytest.raises(FlexdistillError, match="no column 'text'; set data.column to one of: id, body"):
        documents(file)


def test_missing_sources_are_errors(tmp_path):
    for source in (tmp_path / "absent", "./absent", "absent.txt", "absent.jsonl.gz", "a/b/c", ""):
        with pytest.raises(FlexdistillError, match="does not exist; check the path or use `sample`"):
            documents(source)
    with pytest.raises(FlexdistillError, match="holds no text; it needs files named"):
        documents(tmp_path)


def test_unreachable_dataset_is_an_error():
    with pytest.raises(FlexdistillError, match="'nobody/nothing' cannot be read .* or give a local file") as caught:
        documents("nobody/nothing", config="plain", split="validation")
    assert "\n" not in str(caught.value)


def test_dataset_rows_are_documents(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, **settings):
        calls.append((name, config, settings))
        return datasets.IterableDataset.from_generator(lambda: ({"body": row} for row in ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("some/corpus", column="body") == ROWS
    assert documents("some/corpus", column="body", config="en", split="validation") == ROWS
    assert calls == [
        ("some/corpus", None, {"split": "train", "streaming": True}),
        ("some/corpus", "en", {"split": "validation", "streaming": True}),
    ]
    with pytest.raises(FlexdistillError, match="no column 'text'; set data.column to one of: body"):
        documents("some/corpus")


@pytest.mark.parametrize("setting", ["config", "split", "column"])
def test_settings_that_local_text_would_ignore_are_errors(setting):
    with pytest.raises(FlexdistillError, match=f"'{setting}' .*; remove it"):
        read_documents(DataRecipe(source="sample", **{setting: "x"}))


def test_one_document_gives_exactly_its_tokens(tiny_tokenizer):
    rows = pack([TEXT], tiny_tokenizer, 5)
    expected = tokens(tiny_tokenizer, TEXT)
    assert rows.dtype == torch.int64 and rows.shape == (len(expected) // 5, 5)
    assert rows.flatten().tolist() == expected[: rows.numel()]


def test_one_eos_between_documents(tiny_tokenizer):
    ids = [tokens(tiny_tokenizer, row) for row in ROWS]
    eos = [tiny_tokenizer.eos_token_id]
    expected = ids[0] + eos + ids[1] + eos + ids[2]
    assert pack(ROWS, tiny_tokenizer, len(expected)).tolist() == [expected]


def test_sep_separates_where_there_is_no_eos():
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert pack(["one document"], tokenizer, 2).shape[1] == 2
    with pytest.raises(FlexdistillError, match="neither an eos nor a sep token"):
        pack(["one", "two"], tokenizer, 2)
    tokenizer.sep_token = "<pad>"
    assert tokenizer.sep_token_id in pack(["one", "two"], tokenizer, 1).flatten().tolist()


def test_reading_stops_when_the_rows_are_full(tiny_tokenizer):
    def endless():
        while True:
            yield TEXT

    assert pack(endless(), tiny_tokenizer, 16, max_sequences=7).shape == (7, 16)


def test_long_document_is_tokenised_in_pieces(tiny_tokenizer, monkeypatch):
    whole = pack([TEXT * 20], tiny_tokenizer, 4)
    calls = []

    def counting(texts, **settings):
        calls.extend(texts)
        return tiny_tokenizer(texts, **settings)

    counting.eos_token_id = tiny_tokenizer.eos_token_id
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", 100)
    assert torch.equal(pack([TEXT * 20], counting, 4), whole)
    assert "".join(calls) == TEXT * 20 and len(calls) > 10
    assert all(call.endswith("\n") and len(call) <= 100 for call in calls)
    calls.clear()
    pack([TEXT * 20], counting, 4, max_sequences=2)
    assert len(calls) == 1
    calls.clear()
    pack(["x" * 350 + "\nend"], counting, 4)
    assert calls == ["x" * 350 + "\n", "end"]


def test_packing_prints_nothing(capfd):
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    pack([TEXT], tokenizer, 8)
    assert capfd.readouterr() == ("", "")


def test_too_little_text_is_an_error(tiny_tokenizer):
    count = len(tokens(tiny_tokenizer, TEXT))
    with pytest.raises(FlexdistillError, match=f"has {count} tokens and one sequence needs 500; give more text"):
        pack([TEXT], tiny_tokenizer, 500)


def test_order_is_a_pure_function_of_the_seed():
    order = train_order(10, 7, 4, seed=3)
    assert order.shape == (7, 4) and order.dtype == torch.int64
    assert torch.equal(order, train_order(10, 7, 4, seed=3))
    assert not torch.equal(order, train_order(10, 7, 4, seed=4))
    assert torch.equal(order[:3], train_order(10, 3, 4, seed=3))
    assert train_order(10, 0, 4, seed=3).shape == (0, 4)


def test_no_row_repeats_within_an_epoch():
    order = train_order(10, 15, 4, seed=0).flatten()
    epochs = [order[i : i + 10].tolist() for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_held_out_rows_are_the_first():
    sequences = torch.arange(20).view(10, 2)
    train, held_out = split_held_out(sequences, 3)
    assert torch.equal(torch.cat([held_out, train]), sequences) and len(held_out) == 3
    with pytest.raises(FlexdistillError, match="gives 10 sequences and 10 are held out"):
        split_held_out(sequences, 10)


def test_dataset_name(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    assert dataset_name("Salesforce/wikitext") == "Salesforce/wikitext"
    for local in ("sample", str(tmp_path), str(tmp_path / "text.txt"), str(tmp_path / "gone.txt")):
        assert dataset_name(local) is None
