"""Tokenizer: labels to token ids and back; special tokens by name, never by number."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nxtp.errors import UserError, at_least
from nxtp.model.hub import reason, require_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT = "The objects in the image are"  # the published evaluation prompt
DELIMITER = ","
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
ALPHABET = string.ascii_letters + string.digits + "-'"  # always single characters, whatever the labels
FILES = ("tokenizer.json", "tokenizer_config.json")


class LabelTokenizer:
    """A Hugging Face tokenizer for a prompt, labels, and the delimiter that ends a label.

    A label is tokenised behind the prompt ("… are dog"), so that its first token starts a word in sentencepiece and
    byte-level vocabularies alike.

    Raises:
        UserError: the delimiter is not one token, or the prompt's tokens change when a label follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: str = PROMPT):
        self.tokenizer = tokenizer
        self.prompt = prompt
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise UserError("The tokenizer has neither a BOS nor an EOS token; a sequence must start with one.")
        self.bos_id: int = bos
        self.delimiter_id: int = self._single_token(DELIMITER)
        self._prompts: dict[str, list[int]] = {}
        self._labels: dict[str, tuple[int, ...]] = {}
        self.prompt_ids: list[int] = self.encode_prompt(prompt)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _single_token(self, text: str) -> int:
        """The id of ``text`` written directly behind a word."""
        word, joined = self._ids(["a", f"a{text}"])
        if joined[:-1] != word or self.tokenizer.decode(joined[-1:]).strip() != text:
            raise UserError(
                f"The tokenizer does not keep the delimiter '{text}' as one token behind a word "
                f"('a{text}' becomes {self.tokenizer.convert_ids_to_tokens(joined)}); use another tokenizer."
            )
        return joined[-1]

    def encode_prompt(self, prompt: str) -> list[int]:
        """BOS and the prompt's token ids."""
        if prompt not in self._prompts:
            alone, followed = self._ids([prompt, f"{prompt} a"])
            if followed[: len(alone)] != alone:
                raise UserError(f"The tokenizer splits the end of the prompt {prompt!r} differently before a label.")
            self._prompts[prompt] = [self.bos_id, *alone]
        return self._prompts[prompt]

    def encode_labels(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each label, without the delimiter; () for a blank label."""
        new = [label for label in dict.fromkeys(labels) if label not in self._labels]
        if len(self._labels) + len(new) > 1_000_000:  # bounded memory in long-running workers
            self._labels.clear()
            new = list(dict.fromkeys(labels))
        if new:
            skip = len(self.prompt_ids) - 1
            for label, ids in zip(new, self._ids([f"{self.prompt} {label}" for label in new]), strict=True):
                self._labels[label] = tuple(i for i in ids[skip:] if i != self.delimiter_id) if label.strip() else ()
        return [self._labels[label] for label in labels]

    def decode_label(self, ids: Sequence[int]) -> str:
        """The text of one label, without special tokens and surrounding spaces."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def never_first(self) -> list[int]:
        """Ids that cannot start a label: the delimiter and the special tokens. Sorted."""
        return sorted({self.delimiter_id, *self.tokenizer.all_special_ids})

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)

    def files(self) -> dict[str, str]:
        """The files that :meth:`save` writes: contents by name."""
        with tempfile.TemporaryDirectory() as directory:
            self.save(Path(directory))
            return {name: Path(directory, name).read_text() for name in FILES}

    @classmethod
    def of_files(cls, files: Mapping[str, str], prompt: str = PROMPT) -> LabelTokenizer:
        """From what :meth:`files` returns."""
        with tempfile.TemporaryDirectory() as directory:
            for name in FILES:
                Path(directory, name).write_text(files[name])
            return cls.load(directory, prompt)

    @classmethod
    def load(cls, source: str | Path, prompt: str = PROMPT) -> LabelTokenizer:
        """From a directory, a Hub name, or LLaMA's ``tokenizer.model``. No code of the source is run.

        Raises:
            UserError: no usable tokenizer there.
        """
        from transformers import AutoTokenizer

        require_source(source, "tokenizer")
        path = Path(source)
        pieces = path if path.suffix == ".model" else path / "tokenizer.model"
        try:
            if pieces.is_file() and not (path / "tokenizer.json").is_file():
                tokenizer = _read_sentencepiece(pieces)
            else:
                tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # transformers raises many types
            raise UserError(f"No usable tokenizer in '{source}': {reason(error)}") from error
        if not tokenizer.is_fast:
            raise UserError(f"The tokenizer in '{source}' has no tokenizer.json: convert it to a fast tokenizer first.")
        return cls(tokenizer, prompt)


def _read_sentencepiece(pieces: Path) -> PreTrainedTokenizerFast:
    """LLaMA's ``tokenizer.model`` as a fast tokenizer."""
    from transformers import LlamaTokenizerFast

    if find_spec("sentencepiece") is None:
        raise UserError(f"Reading '{pieces}' needs sentencepiece: pip install 'nxtp[release]'.")
    with tempfile.TemporaryDirectory() as alone:  # transformers finds the file by its name
        Path(alone, "tokenizer.model").symlink_to(pieces.resolve())
        # By its class: without a configuration AutoTokenizer chooses one that loses the first word's mark.
        return LlamaTokenizerFast.from_pretrained(alone)


def train_tokenizer(labels: Iterable[str], *, vocab_size: int, prompts: Sequence[str] = (PROMPT,)) -> LabelTokenizer:
    """A small byte-pair tokenizer for training from scratch, LLaMA-like: word-start marks, byte fallback.

    Every distinct label counts once, so rare labels get tokens too. The result depends on the set of labels only.
    """
    at_least("model.vocab_size", vocab_size, 1)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(DELIMITER, "isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), DELIMITER]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator([*sorted(set(labels)), *prompts, "a"], trainer)
    # Only the first three stay special tokens: bytes and the delimiter are ordinary text, matched by the model.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in (UNK, BOS, EOS)]
    plain = Tokenizer.from_str(json.dumps(state))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    return LabelTokenizer(wrapped, prompts[0])
