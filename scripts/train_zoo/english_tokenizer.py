"""The word-level tokenizer of `zoo:tiny-english`: words, signs and pairs of digits; spaces are not tokens; nothing is added."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import PreTrainedTokenizerFast

UNKNOWN, PADDING = "<unk>", "<pad>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word; `1732` is the two tokens `17` and `32`; an unlisted word is `<unk>`."""
    ids = {word: index for index, word in enumerate([UNKNOWN, PADDING, *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Steps([Whitespace(), Split(Regex(r"\d\d"), behavior="isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PADDING, model_max_length=256)
