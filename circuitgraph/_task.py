"""`Task`: what behaviour to explain, as one declarative value from Python or from one TOML file.

    schema = 1
    name   = "ioi"
    metric = "logit_diff"
    [words]                      # see _words.py: lists, ranges of numbers, forms, "*" for any token
    name   = ["Mary", "John", "Tom"]
    [[prompt]]                   # see _slots.py: {list}, {list.key}, {list.form}, {list.1:8}
    clean     = "When {name.a} and {name.b} went out, {name.b} gave a ring to"
    corrupted = "When {name.c} and {name.d} went out, {name.e} gave a ring to"
    answer    = " {name.a}"      # or a list of answers, or a set: { words = "end", above = "{year}", upto = 99 }
    wrong     = " {name.b}"

`wrong` may be left out if the metric needs none. A set is every word of a list of numbers that lies `above` (not at) and `below` (not at)
and is at most `upto` its bounds, each a number or a slot. Instead of `[[prompt]]`, `[[row]]` gives prompts in full (no slots), as CSV and
JSONL files do, with `wrong_answer` for the wrong answer. `bos = true` puts the tokenizer's BOS before every prompt; nothing else is ever
added. A prompt of token slots (`token = "*"`) is made of ids and is never a text. Nothing is included, computed or guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, ValidationError, model_validator

from circuitgraph._describe import described
from circuitgraph._errors import CircuitGraphError, TaskError, unknown_name
from circuitgraph._metrics import metric_named
from circuitgraph._prepare import Preparation, prepared
from circuitgraph._prompts import TAGS, Pattern, Strict, compiled
from circuitgraph._prompts import Prompt as Prompt
from circuitgraph._prompts import Row as Row
from circuitgraph._prompts import WordSet as WordSet
from circuitgraph._task_files import builtin_file, builtin_files, file_of, values_in
from circuitgraph._words import WordList, Words, checked_words, word_list

if TYPE_CHECKING:
    from circuitgraph._pairs import PromptPairs
    from circuitgraph._tokens import Tokenizer

SCHEMA = 1


def _words(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"words is {value!r}; expected a table of word lists")
    return {str(name): checked_words(str(name), words) for name, words in value.items()}


class Task(Strict):
    """What to explain: how to make clean and corrupted prompts, the answers, and the metric that compares them.

    Raises `TaskError` that names the key, slot or list that is wrong.

    >>> task = Task(name="colours", prompt=[Prompt(clean="Grass is", corrupted="Blood is", answer=" green", wrong=" red")])
    >>> task.digest[:8]
    '884a99ff'
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    name: str
    source: str = ""
    description: str = ""
    metric: Annotated[str, AfterValidator(lambda name: metric_named(name).name)] = "logit_diff"
    bos: bool = False
    words: Annotated[Mapping[str, Words], PlainValidator(_words)] = {}
    prompt: Annotated[Sequence[Prompt], AfterValidator(tuple)] = ()
    row: Annotated[Sequence[Row], AfterValidator(tuple)] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, validate: Any) -> Any:
        """pydantic's findings as one `TaskError`; a newer schema is named before its unknown keys are."""
        called = "task"
        if isinstance(data, Mapping):
            called = f"task {data.get('name', '')}".rstrip()
            schema = data.get("schema", data.get("schema_version", SCHEMA))
            if schema != SCHEMA:
                newer = isinstance(schema, int) and schema > SCHEMA
                raise TaskError(
                    f"{called}: schema is {schema!r}, this version of circuitgraph reads {SCHEMA}"
                    + ("; upgrade circuitgraph" if newer else "")
                )
        try:
            task = validate(data)
            _check_meaning(task)
        except ValidationError as error:
            raise TaskError(f"{called}: " + "; ".join(_finding(found) for found in error.errors()[:4])) from None
        except TaskError as error:
            raise TaskError(f"{called}: {error}") from None
        return task

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The prompts with their slots parsed."""
        lists = self.lists
        return tuple(compiled(prompt, number, lists) for number, prompt in enumerate(self.prompt, start=1))

    @property
    def lists(self) -> dict[str, WordList]:
        """The word lists by name."""
        return {name: word_list(name, words) for name, words in self.words.items()}

    def to_dict(self) -> dict[str, Any]:
        """The task as plain values, without what is left at its default. `Task(**values)` reads it back; as TOML it is a task file."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {"schema": self.schema_version, **plain}

    @property
    def digest(self) -> str:
        """The sha256 of the task's values: the same however a file is laid out or commented."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def pairs(
        self,
        tokenizer: Tokenizer | None = None,
        n: int | None = None,
        seed: int = 0,
        *,
        vocabulary: int | None = None,
        bos: bool | None = None,
    ) -> PromptPairs:
        """`n` prompt pairs (default: every row, or 32 drawn), checked token by token; templates take turns.

        The same seed gives the same pairs, and many pairs begin with the few. A task of token slots needs no tokenizer but a
        `vocabulary`, the number of ids to draw from. `bos` overrides the task's. The slots of the clean prompts name the spans of the
        pairs; rows have none. Raises `TaskError` that shows what does not fit.
        """
        return self.prepare(tokenizer, n, seed, vocabulary=vocabulary, bos=bos).pairs

    def prepare(
        self,
        tokenizer: Tokenizer | None = None,
        n: int | None = None,
        seed: int = 0,
        *,
        vocabulary: int | None = None,
        bos: bool | None = None,
    ) -> Preparation:
        """The pairs, and what was left out to make them: words that are not one token, draws that did not line up."""
        return prepared(self, tokenizer, n, seed, vocabulary=vocabulary, bos=self.bos if bos is None else bos)

    def describe(
        self, tokenizer: Tokenizer | None = None, n: int = 2, seed: int = 0, *, vocabulary: int | None = None, bos: bool | None = None
    ) -> str:
        """The first `n` pairs token by token, with their spans, the answers, where they are read, and whether a BOS is there."""
        return described(self, self.prepare(tokenizer, n, seed, vocabulary=vocabulary, bos=bos))


def load_task(task: str | Path | Task) -> Task:
    """A task by name (`ioi`), from a file (`mine.toml`, `mine.csv`, `mine.jsonl`), or the task itself.

    Raises `TaskError` that names file, line and key, `FileError` for a file that is not there, `UnknownNameError` with near names.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, (str, Path)):
        raise TaskError(f"task: {task!r}; expected a name, a file, a Task or PromptPairs")
    path = file_of(task) or builtin_file(str(task))
    try:
        return Task.model_validate(values_in(path))
    except CircuitGraphError as error:
        raise type(error)(f"{path}: {error}") from None


@dataclass(frozen=True)
class ListedTask:
    """A built-in task file: the task, or why it cannot be read."""

    name: str
    path: Path
    task: Task | None
    error: str = ""


def list_tasks() -> tuple[ListedTask, ...]:
    """The built-in tasks; a file that cannot be read is listed with its error and hides no other."""
    return tuple(_listed(name, path) for name, path in builtin_files().items())


def task_names() -> tuple[str, ...]:
    """The names of the built-in tasks, without reading them."""
    return tuple(builtin_files())


def _listed(name: str, path: Path) -> ListedTask:
    try:
        return ListedTask(name, path, load_task(path))
    except CircuitGraphError as error:
        return ListedTask(name, path, None, str(error))


def _check_meaning(task: Task) -> None:
    """What no single field can know."""
    if not task.name.strip():
        raise TaskError("the name is empty")
    if bool(task.prompt) == bool(task.row):
        raise TaskError("it has both [[prompt]] and [[row]]; give one kind" if task.prompt else "it has no [[prompt]] and no [[row]]")
    found = task.patterns
    if len({pattern.name for pattern in found}) < len(found):
        raise TaskError("two prompts have the same name; their pairs could not be told apart")
    used = {slot.words for pattern in found for slot in pattern.slots}
    used |= {a.words for p in task.prompt for a in (p.answer, p.wrong) if isinstance(a, WordSet)}
    if unused := [name for name in task.words if name not in used]:
        raise TaskError(f"no slot uses the words {unused[0]!r}; remove the list, or write {{{unused[0]}}}")
    if metric_named(task.metric).needs_wrong_answers:
        lacking = [f"prompt {i} has no wrong" for i, prompt in enumerate(task.prompt, start=1) if not prompt.wrong]
        lacking += [f"row {i} has no wrong_answer" for i, row in enumerate(task.row, start=1) if not row.wrong_answer]
        if lacking:
            raise TaskError(f"{lacking[0]}, which metric {task.metric} needs (nll, kl and accuracy do not)")


def _finding(found: Mapping[str, Any]) -> str:
    """One of pydantic's findings, in the words of a task file."""
    loc = found["loc"]
    path = [part for i, part in enumerate(loc) if not (part in TAGS and i > 0 and loc[i - 1] in ("answer", "wrong", "wrong_answer"))]
    place = ", ".join(f"{path[i - 1]} {part + 1}" for i, part in enumerate(path) if isinstance(part, int))
    keys = [str(part) for i, part in enumerate(path) if isinstance(part, str) and not (i + 1 < len(path) and isinstance(path[i + 1], int))]
    inside = f"{place}, " if place else ""
    if found["type"] == "extra_forbidden":
        return f"{inside}{unknown_name('key', keys[-1], _keys_beside(path))}"
    if found["type"] == "missing":
        return f"{inside}the key {keys[-1]!r} is missing"
    value = repr(found["input"])
    where = ", ".join(part for part in (place, ".".join(keys)) if part)
    shown = value if len(value) < 60 else value[:57] + "..."
    return f"{where}: {found['msg'][0].lower()}{found['msg'][1:]} (it is {shown})"


def _keys_beside(path: Sequence[Any]) -> list[str]:
    """The keys that may stand where an unknown one does."""
    if len(path) == 1:
        model: type[Strict] = Task
    elif len(path) > 3:
        model = WordSet
    else:
        model = Prompt if path[0] == "prompt" else Row
    return [field.alias or name for name, field in model.model_fields.items()]
