import json
import shutil

import pytest
from evaluate_models import WORDS, plain_logits, plain_model, rows_of
from tiny.rows import write_rows
from typer.testing import CliRunner

from ckptq.cli import app
from ckptq.errors import SourceError, UsageError
from ckptq.evaluate.text import read_questions


def run(*words) -> tuple[int, str]:
    """Exit code and stdout; errors that `main` would show are raised."""
    found = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "text.jsonl", rows_of((20, 15)))


@pytest.fixture
def task(saved, tmp_path):
    """Three questions that the source answers, by greedy decoding, and one that it gets wrong."""
    model = plain_model(saved("llama").path)
    lines = []
    for number, row in enumerate(rows_of((5, 6, 7, 8), seed=5)):
        ids = [1, *row]
        for _ in range(3):
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
        if number == 3:
            ids[-1] = 4 + (ids[-1] + 1) % 50
        words = [WORDS[i] for i in ids[1:]]
        split = len(row)
        lines.append({"prompt": " ".join(words[:split]), "answer": " ".join(words[split:])})
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_good_checkpoint_passes_and_a_bad_number_is_named(saved, data):
    words = (saved("llama", "fp8-dynamic").path, "--source", saved("llama").path, "--data", data)
    code, text = run(*words, "--max-kl", 1, "--min-agreement", 0.5, "--max-ppl-ratio", 2)
    assert code == 0
    assert "good enough" in text
    code, text = run(*words, "--max-kl", 1e-9)
    assert code == 1
    assert "KL divergence is" in text
    assert "expected at most 1e-09" in text


def test_json_is_data_with_zero_and_control(saved, data):
    code, text = run(
        *(saved("llama", "fp8-dynamic").path, "--source", saved("llama").path, "--data", data),
        *("--kv-cache", "fp8-per-head,int2-per-token-head", "--json", "--max-kl", "1e-9"),
    )
    found = json.loads(text)
    assert code == 1
    assert (found["ok"], len(found["failures"])) == (False, 3)
    assert (found["zero"]["kl"], found["source"]["kl"]) == (0.0, 0.0)
    kl = {row["kv_cache"]: row["kl"] for row in found["rows"]}
    assert list(kl) == ["bf16", "fp8-per-head", "int2-per-token-head"]
    assert kl["bf16"] < kl["fp8-per-head"] < kl["int2-per-token-head"]
    assert found["control"]["kl"] > kl["bf16"]
    assert found["rows"][0]["tokens"] == 19 + 14
    assert found["rows"][0]["bytes"] < found["source"]["bytes"]


def test_a_scheme_that_is_named_twice_is_measured_once(saved, data):
    _, text = run(saved("llama").path, "--data", data, "--schemes", "W4A16,w4a16", "--json")
    assert [row["weights"] for row in json.loads(text)["rows"]] == ["w4a16"]


def test_schemes_are_compared_and_the_smallest_good_one_is_named(saved, data):
    code, text = run(
        *(saved("llama").path, "--data", data, "--schemes", "w4a16,fp8-dynamic"),
        *("--schemes", "w8a16", "--max-kl", 0.5),
    )
    assert "w4a16" in text
    assert "w8a16" in text
    assert "smallest within the thresholds: " in text
    assert code == (1 if "FAIL" in text else 0)


def test_exact_match_is_asked_for_by_name(saved, task):
    words = (saved("llama").path, "--kv-cache", "bf16", "--task", task, "--json")
    code, text = run(*words, "--min-accuracy", 0.75)
    found = json.loads(text)
    assert code == 0
    assert found["source"]["accuracy"] == found["rows"][0]["accuracy"] == 0.75
    assert found["rows"][0]["tokens"] == 12
    code, text = run(*words, "--min-accuracy", 0.8)
    assert code == 1
    assert "accuracy is 0.75, expected at least 0.8" in json.loads(text)["failures"][0]


def test_text_and_task_are_measured_side_by_side(saved, data, task):
    code, text = run(
        *(saved("llama").path, "--kv-cache", "bf16", "--task", task, "--data", data, "--json"),
        *("--batch-size", 4),
    )
    found = json.loads(text)
    assert code == 0
    assert (found["samples"], found["source"]["tokens"]) == (2 + 4, 19 + 14)
    assert found["source"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{q}",), "--source names the checkpoint"),
        (("{s}",), "nothing to compare with"),
        (("{s}", "--source", "{s}"), "is not quantized"),
        (("{s}", "--kv-cache", "fp9"), "--kv-cache 'fp9'"),
        (("{s}", "--schemes", "w99"), "unknown scheme 'w99'"),
        (("{q}", "--source", "{s}", "--min-accuracy", "0.5"), "--task FILE"),
    ],
)
def test_what_does_not_go_together_is_refused(saved, data, words, message):
    paths = {"{q}": saved("llama", "fp8-dynamic").path, "{s}": saved("llama").path}
    with pytest.raises(UsageError, match=message):
        run(*(paths.get(word, word) for word in words), "--data", data)


def test_questions_are_split_where_the_answer_begins(saved, tmp_path):
    file = tmp_path / "task.jsonl"
    rows = [{"prompt": "w1 w2", "answer": "w3"}, {"prompt": "w1 w2 ", "answer": "w3 w4"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(file, saved("llama").path)
    assert [(line.token_ids, line.answer) for line in found] == [
        ((1, 5, 6, 7), 3),
        ((1, 5, 6, 7, 8), 3),
    ]
    drawn = read_questions(file, saved("llama").path, limit=1, seed=0)
    assert len(drawn) == 1
    assert drawn[0] in found


@pytest.mark.parametrize("row", [{"prompt": "w1"}, {"prompt": "w1", "answer": " "}, {"text": "w1"}])
def test_a_question_without_an_answer_is_refused(saved, tmp_path, row):
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(SourceError, match="question 1 needs a prompt and an answer"):
        read_questions(file, saved("llama").path)


LIMITS = [
    ("--max-kl", "nan", "a number from 0 on"),
    ("--max-kl", "-1", "a number from 0 on"),
    ("--max-ppl-ratio", "inf", "a number from 0 on"),
    ("--min-agreement", "95", "a share, from 0 to 1"),
]


@pytest.mark.parametrize(("option", "limit", "wanted"), LIMITS)
def test_a_limit_that_means_nothing_is_refused(saved, data, option, limit, wanted):
    words = (saved("llama", "fp8-dynamic").path, "--source", saved("llama").path, "--data", data)
    with pytest.raises(UsageError, match=f"{option} .*: expected {wanted}"):
        run(*words, option, limit)
    code, _ = run(*words, option, "0" if option.startswith("--min") else "1e9")
    assert code == 0


BAD_TASKS = {
    '{"prompt": "w1", "answer": "w2"}\n{"prompt": "w1", answer}\n': "line 2: not valid JSON",
    '{"prompt": "w1", "answer": "w2"}\n{"prompt": "w1"}\n': "question 2 needs a prompt",
    '{"prompt": "w1", "answer": "w2"}\n[1]\n': "line 2: not a JSON object",
    "\n": "no question in it",
}


@pytest.mark.parametrize("text", BAD_TASKS)
def test_a_bad_task_is_named_with_its_line(saved, tmp_path, text):
    file = tmp_path / "task.jsonl"
    file.write_text(text)
    with pytest.raises(SourceError, match=f"task.jsonl.*{BAD_TASKS[text]}"):
        read_questions(file, saved("llama").path)
    with pytest.raises(SourceError, match=r"gone.jsonl: no such file"):
        read_questions(tmp_path / "gone.jsonl", saved("llama").path)


def test_questions_that_are_drawn_keep_their_numbers(saved, tmp_path):
    good = '{"prompt": "w1", "answer": "w2"}\n'
    file = tmp_path / "task.jsonl"
    file.write_text(4 * good + '{"prompt": "w1"}\n')
    assert len(read_questions(file, saved("llama").path, limit=2, seed=1)) == 2
    with pytest.raises(SourceError, match="question 5"):
        read_questions(file, saved("llama").path, limit=4)


def test_a_source_with_another_vocabulary_is_refused(saved, data, tmp_path):
    """Both have the same names; one tensor has other rows than the config of the other asks for."""
    source = tmp_path / "source"
    shutil.copytree(saved("llama").path, source)
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] += 8
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"embed_tokens.*on disk, config.json asks for"):
        run(saved("llama", "w4a16").path, "--source", source, "--data", data)
