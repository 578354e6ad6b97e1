"""Every kind of calibration text becomes the token ids that it should."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny.words import word_tokenizer

from ckptq.errors import SourceError, UsageError
from ckptq.text.samples import Samples, read_samples

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 60)), "user", "assistant"]
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word-level tokenizer that puts <s> before a text; word i is token i."""
    tokenizer = word_tokenizer(WORDS, "<pad>", begin="<s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_text_is_cut_into_pieces_that_each_begin_as_a_text_does(checkpoint, tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("w3 w4 w5\nw6 w7 w8\n\nw9 w10")
    found = read_samples(file, checkpoint, samples=9, seq_len=4)
    assert found.token_ids == ((1, 3, 4, 5), (1, 6, 7, 8))


def test_short_plain_text_is_one_sample(checkpoint, tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("w3 w4")
    assert read_samples(file, checkpoint, seq_len=9).token_ids == ((1, 3, 4),)


def test_jsonl_rows_are_samples_cut_to_length(checkpoint, tmp_path):
    file = write(
        tmp_path / "rows.jsonl",
        {"text": "w3 w4 w5 w6", "label": "ignored"},
        {"input_ids": [9, 8]},
        {"messages": [{"role": "user", "content": "w5"}]},
        {"conversations": [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]},
    )
    found = read_samples(file, checkpoint, seq_len=4)
    assert found.token_ids == ((1, 3, 4, 5), (9, 8), (1, 60, 5), (1, 60, 5, 1))


def test_a_byte_order_mark_is_no_text(checkpoint, tmp_path):
    """As Windows' editors write files."""
    file = write(tmp_path / "rows.jsonl", {"text": "w3 w4"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_samples(file, checkpoint).token_ids == ((1, 3, 4),)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfw3 w4")
    assert read_samples(tmp_path / "a.txt", checkpoint).token_ids == ((1, 3, 4),)


def test_blank_rows_are_no_samples(checkpoint, tmp_path):
    """They would be taken as samples of the beginning alone."""
    file = write(
        tmp_path / "wiki.jsonl", {"text": ""}, {"text": "w3"}, {"text": " \n"}, {"text": "w4"}
    )
    assert read_samples(file, checkpoint, samples=2).token_ids == ((1, 3), (1, 4))
    with pytest.raises(SourceError, match=r"blank\.jsonl: no calibration text in it"):
        read_samples(write(tmp_path / "blank.jsonl", {"text": ""}), checkpoint)


def test_a_conversation_that_the_template_does_not_take_is_named(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'] + ' w5' }}")
    file = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": 5}]})
    with pytest.raises(SourceError, match=r"a\.jsonl: sample 1: the chat template in .*broken"):
        read_samples(file, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no tools here') }}")
    with pytest.raises(SourceError, match=r"a\.jsonl: sample 1: .*no tools here"):
        read_samples(file, broken)


def test_parquet_rows_are_samples(checkpoint, tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w3 w4", "w5"]}), file)
    assert read_samples(file, checkpoint).token_ids == ((1, 3, 4), (1, 5))


def test_data_set_rows_are_samples(checkpoint, tmp_path):
    """A folder that `datasets` can load stands for a hub id: both go through `load_dataset`."""
    write(tmp_path / "train.jsonl", {"text": "w3 w4"}, {"text": "w5"})
    assert read_samples(tmp_path, checkpoint).token_ids == ((1, 3, 4), (1, 5))


def test_no_text_means_the_built_in_corpus_and_says_so(checkpoint):
    found = read_samples(None, checkpoint, samples=3, seq_len=16)
    assert [len(row) for row in found.token_ids] == [16, 16, 16]
    assert "built-in corpus" in found.source


def test_seed_decides_which_rows_and_order_is_kept(checkpoint, tmp_path):
    file = write(tmp_path / "rows.jsonl", *({"input_ids": [i]} for i in range(3, 53)))
    one = read_samples(file, checkpoint, samples=10, seed=1)
    again = read_samples(file, checkpoint, samples=10, seed=1)
    other = read_samples(file, checkpoint, samples=10, seed=2)
    assert one.token_ids == again.token_ids != other.token_ids
    assert list(one.token_ids) == sorted(one.token_ids)
    assert len(one.token_ids) == 10


def test_batches_are_padded_on_the_right_and_masked():
    samples = Samples(((5, 6, 7), (8,), (9, 9)), "here", 3, 0)
    first, second = samples.batches(2)
    assert first.input_ids_BS.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert first.mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first.lengths == (3, 1)
    assert torch.equal(second.input_ids_BS, torch.tensor([[9, 9]]))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n"), ("a.jsonl", ""), ("b.jsonl", "\n")]
)
def test_empty_text_names_the_file(checkpoint, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=rf"{name}: no calibration text"):
        read_samples(tmp_path / name, checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w3"}\n{"text": ', "line 2: not valid JSON"),
        ("[1, 2]", "line 1: not a JSON object"),
        ('{"prompt": "w3"}', "sample 1 has the fields prompt; expected text"),
        ('{"text": 3}', "sample 1: text is int, expected a string"),
        ('{"input_ids": [3, "x"]}', "sample 1: input_ids must be a list of integers"),
        ('{"messages": [{"content_": "w3"}]}', "a turn needs role and content"),
    ],
)
def test_bad_rows_are_named(checkpoint, tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(SourceError, match=message):
        read_samples(file, checkpoint)


def test_missing_file_and_unknown_kind_are_named(checkpoint, tmp_path):
    with pytest.raises(SourceError, match=r"gone\.jsonl: cannot be read"):
        read_samples(tmp_path / "gone.jsonl", checkpoint)
    (tmp_path / "rows.csv").write_text("text\nw3\n")
    with pytest.raises(SourceError, match=r"rows\.csv: unknown kind of text"):
        read_samples(tmp_path / "rows.csv", checkpoint)


def test_not_a_parquet_file_is_named(checkpoint, tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(SourceError, match=r"rows\.parquet: cannot be read as parquet"):
        read_samples(tmp_path / "rows.parquet", checkpoint)


def test_checkpoint_without_tokenizer_is_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"text": "w3"})
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match="no tokenizer"):
        read_samples(file, tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", "{", "no tokenizer that transformers can load: "),
        ("tokenizer.json", '{"version": 3}', "no tokenizer that transformers can load: "),
        ("tokenizer_config.json", '{"bos_token": 1.5}', "no tokenizer that transformers can load"),
        (
            "tokenizer_config.json",
            '{"model_max_length": "x"}',
            "its tokenizer does not accept text",
        ),
    ],
)
def test_a_broken_tokenizer_is_named(checkpoint, tmp_path, file, text, said):
    """Whatever the libraries raise: tokenizers' errors are bare exceptions."""
    rows = write(tmp_path / "rows.jsonl", {"text": "w3"})
    shutil.copytree(checkpoint, tmp_path / "model")
    assert read_samples(rows, tmp_path / "model").token_ids
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(SourceError, match=f"model: {said}"):
        read_samples(rows, tmp_path / "model")


@pytest.mark.parametrize("how", [{"strategy": {"Fixed": 1 << 60}}, {"pad_to_multiple_of": 1 << 60}])
def test_a_tokenizer_that_pads_without_end_is_refused(checkpoint, tmp_path, how):
    """Loading it took all memory there was."""
    rows = write(tmp_path / "rows.jsonl", {"text": "w3"})
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"padding": how}))
    with pytest.raises(SourceError, match=r"tokenizer\.json: padding to 1,152,921,504,606,846,976"):
        read_samples(rows, tmp_path / "model")


def test_a_tokenizer_without_end_is_not_read(checkpoint, tmp_path):
    rows = write(tmp_path / "rows.jsonl", {"text": "w3"})
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(SourceError, match=r"tokenizer\.json: is a pipe, expected a file"):
        read_samples(rows, tmp_path / "model")


def test_token_ids_need_no_tokenizer(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"input_ids": [3, 4]})
    assert read_samples(file, tmp_path).token_ids == ((3, 4),)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seq_len": 0}])
def test_numbers_that_make_no_sense_are_refused(checkpoint, wrong):
    with pytest.raises(UsageError, match="at least 1"):
        read_samples(None, checkpoint, **wrong)


@pytest.mark.parametrize("name", ["nosuch.txt", "nosuch.csv", "../nosuch", "a/b/nosuch", "/nosuch"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(checkpoint, monkeypatch, name):
    def reached(*args: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", reached)
    with pytest.raises(SourceError, match=r"nosuch.*[Nn]o such file"):
        read_samples(name, checkpoint)
    with pytest.raises(AssertionError, match="the hub was asked"):
        read_samples("owner/name.v2", checkpoint)
