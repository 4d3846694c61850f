"""Tasks: what a task and a task file may say, and what is refused and how."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_tasks import BUILT_IN, NAMES, WORDS, Greedy, rows, simple

import circuitgraph._task_files as task_files
from circuitgraph._errors import FileError, TaskError, UnknownNameError
from circuitgraph._task import Prompt, Task, WordSet, list_tasks, load_task, task_names

# --- what a task may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"promt": []}, r"task simple: unknown key 'promt'; did you mean 'prompt'"),
        ({"schema": 2, "new": 1}, "schema is 2, this version of circuitgraph reads 1; upgrade"),
        ({"schema": "1"}, "schema is '1', this version of circuitgraph reads 1$"),
        ({"name": " "}, "the name is empty"),
        ({"prompt": []}, r"no \[\[prompt\]\]"),
        ({"bos": 1}, "bos: input should be a valid boolean"),
        ({"prompt": [{"clean": "a", "corupted": "b", "answer": "c"}]}, "prompt 1, unknown key 'corupted'; did you mean 'corrupted'"),
        ({"prompt": [{"corrupted": "b", "answer": "c"}]}, "prompt 1, the key 'clean' is missing"),
        ({"prompt": [{"clean": "a", "corrupted": "b", "answer": 5}]}, "prompt 1, answer: expected a text, a list of texts, or a set"),
        (
            {"prompt": [{"clean": "a", "corrupted": "b", "answer": {"words": "name", "abov": 5}}]},
            "unknown key 'abov'; did you mean 'above'",
        ),
        ({"prompt": [{"clean": "a", "corrupted": "b", "answer": {"words": "nam", "above": 5}}]}, "unknown list 'nam'; did you mean 'name'"),
        ({"prompt": [{"clean": "a", "corrupted": "b", "answer": {"words": "name", "above": 5}}]}, "is not one of numbers"),
        ({"prompt": [{"clean": "a", "corrupted": "b", "answer": "c", "name": "N"}]}, "no slot uses the words 'name'"),
        ({"prompt": [{"clean": "{name}", "corrupted": "b", "answer": "c"}]}, "prompt 1 has no wrong, which metric logit_diff needs"),
        ({"prompt": [{"clean": "{nam.a}", "corrupted": "b", "answer": "c", "name": "N"}]}, r"prompt 1 \(N\), clean: slot \{nam.a\}"),
        ({"prompt": [{"clean": "{name.1:7}", "corrupted": "b", "answer": "c"}]}, "draws 7 different words of 'name' .* but the list has 6"),
        ({"prompt": [{"clean": "", "corrupted": "b", "answer": "c"}]}, "prompt 1, clean: the text is empty"),
        ({"words": {}, "prompt": [{"clean": "b", "corrupted": "b", "answer": "c"}]}, "the corrupted prompt equals the clean one"),
        ({"words": {"name": "Mary"}}, "words 'name' is 'Mary'; expected a list of words"),
        ({"words": {"name": []}}, "words 'name' is empty"),
        ({"words": {"name": ["a", 5]}}, "words 'name' has 5"),
        ({"words": {"name": ["a", "b", "a"]}}, "words 'name' has 'a' twice"),
        ({"words": {"name": {"from": 5, "to": 3}}}, "no number is from 5 to 3"),
        ({"words": {"name": {"from": 5}}}, "a range of numbers is"),
        ({"words": {"name": {"one": ["a"], "many": ["b", "c"]}}}, r"different numbers of words \(one 1, many 2\)"),
        ({"words": ["a"]}, "expected a table of word lists"),
    ],
)
def test_refuses_and_names_the_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        simple(**changes)


def test_an_unknown_metric_and_two_prompts_of_one_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown metric 'logitdif'; did you mean 'logit_diff'"):
        simple(metric="logitdif")
    prompt = simple().prompt[0].model_copy(update={"name": "N"})
    with pytest.raises(TaskError, match="two prompts have the same name"):
        simple(prompt=[prompt, prompt])


def test_a_bound_must_be_a_number() -> None:
    prompt = Prompt(clean="{d} {name}", corrupted="0", answer=WordSet(words="d", above="{name}"), wrong="1")
    with pytest.raises(TaskError, match=r"the bound above = '\{name\}' is no number"):
        simple(words={"d": {"from": 1, "to": 5}, "name": NAMES}, prompt=[prompt])
    with pytest.raises(TaskError, match="the set has no bound"):
        simple(words={"d": {"from": 1, "to": 5}}, prompt=[Prompt(clean="{d}", corrupted="0", answer=WordSet(words="d"), wrong="1")])


def test_forms_stay_together() -> None:
    words = {"noun": {"one": ["key", "boy"], "many": ["keys", "boys"]}}
    prompt = Prompt(clean="{noun.a.one} {noun.b.one}", corrupted="{noun.a.many} {noun.b.one}", answer="x", wrong="y")
    tokenizer = Greedy("key", "boy", "keys", "boys", " key", " boy", "x", "y")
    for drawn in Task(name="forms", words=words, prompt=[prompt]).prepare(tokenizer, 2).drawn:
        (a, b), (c, d) = drawn.clean.text.split(" "), drawn.corrupted.text.split(" ")
        assert (c, d) == (a + "s", b)
        assert a != b


@pytest.mark.parametrize("name", BUILT_IN)
def test_round_trip_and_digest(name: str) -> None:
    task = load_task(name)
    again = Task(**json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert again.digest == task.digest == load_task(name).digest
    assert hash(again) == hash(task)
    assert re.fullmatch("[0-9a-f]{64}", task.digest)
    assert task.model_copy(update={"bos": True}).digest != task.digest


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        simple().name = "other"  # type: ignore[misc]


# --- files ----------------------------------------------------------------------------------------------------------


def test_built_in_tasks_are_listed_and_load() -> None:
    assert task_names() == BUILT_IN
    for listed in list_tasks():
        assert listed.error == ""
        assert listed.task is not None
        assert listed.task.name == listed.name
        assert listed.task.source
        assert listed.task.description


def test_a_broken_file_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "circuitgraph"
    shutil.copytree(Path(__file__).parents[1] / "tasks", package / "tasks")  # as in a wheel
    (package / "tasks" / "broken.toml").write_text("schema = 1\nname = ")
    (package / "tasks" / "future.toml").write_text("schema = 9\nname = 'future'")
    monkeypatch.setattr(task_files, "__file__", str(package / "_task_files.py"))
    listed = {item.name: item for item in list_tasks()}
    assert set(listed) == {*BUILT_IN, "broken", "future"}
    assert [name for name, item in listed.items() if item.task is None] == ["broken", "future"]
    assert "not valid TOML" in listed["broken"].error
    assert "upgrade circuitgraph" in listed["future"].error


def test_unknown_names_and_files() -> None:
    for near in ("iio", "IOI"):
        with pytest.raises(UnknownNameError, match=f"unknown task '{near}'; did you mean 'ioi'"):
            load_task(near)
    with pytest.raises(TaskError, match="task: None; expected a name"):
        load_task(None)  # type: ignore[arg-type]
    for missing in ("nowhere.csv", "./ioi", Path("ioi")):
        with pytest.raises((FileError, TaskError), match=r"no such file; built-in tasks are greater-than|does not end in .toml"):
            load_task(missing)
    task = simple()
    assert load_task(task) is task


def test_a_csv_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    path.write_text('clean,corrupted,answer,wrong_answer\n"When, Mary","When, Tom", to, and\n\nWhen John,When Anna, and, to\n')
    task = load_task(path)
    assert (task.name, task.source, task.metric, len(task.row)) == ("my", "my.csv", "logit_diff", 2)
    pairs = task.pairs(WORDS)
    assert [WORDS.convert_ids_to_tokens(ids.tolist()) for ids in pairs.clean] == [["When", ",", " Mary"], ["When", " John"]]
    assert WORDS.convert_ids_to_tokens(pairs.answers[0].tolist()) == [" to"]
    assert load_task(str(path)).digest == task.digest
    assert rows(task.pairs(WORDS, 1, seed=3)) == [column[:1] for column in rows(task.pairs(WORDS, 2, seed=3))]


def test_a_jsonl_may_have_several_answers_and_no_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"clean": "When {x}", "corrupted": "When {y}", "answer": [" to", " and"], "template": "braces"}\n')
    task = load_task(path)
    pairs = task.pairs(WORDS)
    assert task.metric == "nll"
    assert pairs.templates == ("braces",)
    assert [len(ids) for ids in (*pairs.answers, *pairs.wrong_answers)] == [2, 0]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "clean,corupted,answer\n", r"a\.csv: line 1: unknown column 'corupted'; did you mean 'corrupted'"),
        ("a.csv", "clean,answer\n", "line 1: the column 'corrupted' is missing"),
        ("a.csv", "clean,corrupted,answer,answer\n", "line 1: the column 'answer' stands 2 times"),
        ("a.csv", "", "line 1: the column 'clean' is missing"),
        ("a.csv", "clean,corrupted,answer\n", "there is no row"),
        ("a.csv", "clean,corrupted,answer\na,b\n", "line 2: 2 cells for 3 columns"),
        ("a.csv", 'clean,corrupted,answer\n"a\nb",c,d\ne,,f\n', "line 4, column corrupted: it is empty"),
        ("a.csv", 'clean,corrupted,answer\n"a,b,c\n', "line 2: unexpected end of data"),
        ("a.csv", "clean,corrupted,answer,wrong_answer\na,b,c,d\ne,f,g,\n", "row 2 has no wrong_answer, others have"),
        ("a.jsonl", '{"clean": "a",\n', "line 1, column 15: not valid JSON"),
        ("a.jsonl", "\n[1]\n", r"line 2: '\[1\]' is not an object"),
        ("a.jsonl", '{"clean": "a", "corrupted": "b"}', "line 1, column answer: it is missing"),
        ("a.jsonl", '{"clean": "a", "corrupted": 5, "answer": "c"}', "line 1, column corrupted: 5 is no text"),
        ("a.jsonl", '{"clean": "a", "corrupted": "b", "answer": ["c", ""]}', "line 1, column answer: .* is no text"),
        (
            "a.jsonl",
            '{"clean": "a", "corrupted": "b", "answer": "c", "wrong": "d"}',
            "line 1: unknown column 'wrong'; did you mean 'wrong_answer'",
        ),
        ("a.toml", "schema = 1\nschema = 1\n", "not valid TOML: Cannot overwrite a value"),
        ("a.toml", "schema = 1\nname = 'x'\nmetrik = 'nll'\n", "task x: unknown key 'metrik'; did you mean 'metric'"),
        ("a.txt", "x", "does not end in .toml, .csv, .jsonl"),
    ],
)
def test_bad_files_name_file_line_and_column(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TaskError, match=says) as caught:
        load_task(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00clean")
    with pytest.raises(FileError, match="cannot be read as UTF-8"):
        load_task(path)
