"""A tokenizer as tasks need it: the interface of Hugging Face's, and the questions asked of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from circuitgraph._errors import TaskError


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __len__(self) -> int: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class Encoder:
    """Texts to token ids. Adds nothing but, if `bos`, the token that begins a text. Without a tokenizer it knows ids only."""

    tokenizer: Tokenizer | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        if self.bos and (self.tokenizer is None or self.tokenizer.bos_token_id is None):
            what = "there is no tokenizer" if self.tokenizer is None else "the tokenizer has none"
            raise TaskError(f"the task asks for a BOS token (bos = true), but {what}; set bos = false")

    @property
    def prefix(self) -> list[int]:
        """What is put before every prompt."""
        return [int(self.tokenizer.bos_token_id)] if self.bos and self.tokenizer and self.tokenizer.bos_token_id is not None else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, and none but those of the text."""
        assert self.tokenizer is not None, "a task of texts is refused without a tokenizer"
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]] | None:
        """For each token of each text the characters, from and up to, that it stands for; None where only Hugging Face's fast ones know."""
        fast: Any = self.tokenizer
        if not texts or not getattr(fast, "is_fast", False):
            return None
        return [list(row) for row in fast(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]

    @cached_property
    def unknown(self) -> int | None:
        """The id that stands for an unknown word. GPT-2 calls its end of text that too, but never writes it for a word."""
        if self.tokenizer is None or self.tokenizer.unk_token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            return None
        return self.tokenizer.unk_token_id

    @cached_property
    def special(self) -> Collection[int]:
        """Ids that are no part of any text."""
        if self.tokenizer is None:
            return frozenset()
        added: Mapping[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))}

    def adds_bos_by_default(self) -> bool:
        """Whether the tokenizer, left alone, begins texts with its BOS: a sign that the model was trained with it."""
        if self.tokenizer is None or self.tokenizer.bos_token_id is None:
            return False
        ids = self.tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
        return len(ids) > 0 and ids[0] == self.tokenizer.bos_token_id

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each token in quotes, for people; spaces as spaces. Ids as they are where there is no tokenizer."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        found = self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])
        return [repr(str(token).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")) for token in found]

    def shown(self, ids: Sequence[int]) -> str:
        """The tokens in a row."""
        return " ".join(self.tokens(ids)) or "nothing"

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the tokenizer does not know."""
        words = list(dict.fromkeys(text.split()))
        return [word for word, ids in zip(words, self.encode(words), strict=True) if self.unknown in ids]
