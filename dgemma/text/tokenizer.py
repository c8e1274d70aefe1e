"""A checkpoint's tokenizer: text to ids, ids to text, ids to printable cells.

Reads `tokenizer.json` with the `tokenizers` library. Which ids are special, and the name of `<bos>`, come
from the file's added tokens and from `tokenizer_config.json`. Knows no model and no chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Fast

from dgemma.errors import CheckpointError, RequestError

BROKEN = "\ufffd"
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_LONGEST_PARTIAL = 3  # bytes of a UTF-8 character that lacks its last one, so at most as many tokens


class Tokenizer:
    """Text to token ids and back. `encode` adds no begin-of-sequence token: templates and callers do."""

    def __init__(self, fast: _Fast, special_names: Mapping[str, str]) -> None:
        """`special_names` maps roles to tokens, as in `{"bos_token": "<bos>"}`."""
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self.special_names = dict(special_names)
        added = fast.get_added_tokens_decoder()
        named = (fast.token_to_id(token) for token in self.special_names.values())
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | {
            i for i in named if i is not None
        }
        bos = fast.token_to_id(self.special_names.get("bos_token", "<bos>"))
        if bos is None:
            raise CheckpointError("there is no begin-of-sequence token; tokenizer_config.json names none")
        self.bos: int = bos
        # An ordinary token, decoded before others, shields them from decoders that drop a text's first space.
        self._anchor: list[int] = fast.encode("a", add_special_tokens=False).ids[:1]
        self._anchor_text = self._decode(self._anchor, False)

    def alike(self, other: Tokenizer) -> bool:
        """Whether ids stand for the same tokens."""
        return self._fast.get_vocab() == other._fast.get_vocab()

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, if present, `tokenizer_config.json` of a checkpoint folder."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint has no tokenizer")
        try:
            fast = _Fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from None
        try:
            return Tokenizer(fast, special_names(read_tokenizer_config(folder)))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; a model may have more rows than that."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids."""
        try:
            return list(self._fast.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            raise RequestError(f"the text cannot be encoded as UTF-8: {text[:40]!r}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that form no character become U+FFFD; unknown ids become nothing."""
        return self._decode(list(ids), skip_special)

    def decode_after(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids` where they continue a text: a leading space stays, whatever the decoder is."""
        return self._decode([*self._anchor, *ids], skip_special)[len(self._anchor_text) :]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as `<|channel>`."""
        return self._fast.token_to_id(token)

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id adds to a text, by id; None for special tokens and for ids without any.

        `RequestError` for a decoder whose tokens have no bytes of their own.
        """
        state = self._fast.decoder.__getstate__() if self._fast.decoder else b"{}"
        spell = token_speller(json.loads(state))
        pieces: list[bytes | None] = [None] * (1 + max(self._fast.get_vocab(with_added_tokens=True).values()))
        for token, number in self._fast.get_vocab(with_added_tokens=True).items():
            if number not in self.special_ids:
                pieces[number] = spell(token) or None
        return pieces

    def piece(self, token: int) -> str:
        """One token as the text of one cell: printable, on one line, never empty (`↵` is a newline)."""
        if token in self.special_ids:
            text = self._fast.id_to_token(token) or ""
        else:
            text = self.decode_after([token], skip_special=False)
        shown = (_VISIBLE.get(c, c if c.isprintable() else BROKEN) for c in text)
        return "".join(shown) or BROKEN

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=skip_special))


def token_speller(decoder: Mapping[str, Any]) -> Callable[[str], bytes]:
    """From a token as the vocabulary writes it to its bytes, for the `decoder` of a `tokenizer.json`."""
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder] if decoder else []
    kinds = [step["type"] for step in steps]
    if not {*kinds} <= {"ByteLevel", "Replace", "ByteFallback", "Fuse"}:
        raise RequestError(f"a constraint needs the bytes of each token; a decoder of {', '.join(kinds)} has none")
    table = _byte_level_table() if "ByteLevel" in kinds else {}
    replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    fallback = "ByteFallback" in kinds

    def spell(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new) if old else token
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if table and all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode()

    return spell


def _byte_level_table() -> dict[str, int]:
    """The printable stand-ins of the 256 bytes (GPT-2): itself where printable, else the next from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class StreamDecoder:
    """Text of ids that arrive bit by bit, holding back the bytes of a character that is not complete yet.

    What `push` and `flush` return, joined, equals `decode` of all ids wherever those spell valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._held: list[int] = []
        self._begun = False

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; the text that is certain now."""
        self._held += ids
        text = self._text(self._held)
        if text.endswith(BROKEN):
            for count in range(1, min(_LONGEST_PARTIAL, len(self._held)) + 1):
                head = self._text(self._held[:-count])
                if not head.endswith(BROKEN):
                    return self._emit(head, self._held[-count:])
        return self._emit(text, [])

    def flush(self) -> str:
        """The end: whatever was held back, as U+FFFD if it is no character."""
        return self._emit(self._text(self._held), [])

    def _text(self, ids: list[int]) -> str:
        decode = self._tokenizer.decode_after if self._begun else self._tokenizer.decode
        return decode(ids, self._skip_special)

    def _emit(self, text: str, held: list[int]) -> str:
        self._held = held
        self._begun = self._begun or bool(text)
        return text


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """`tokenizer_config.json` of a folder; empty where there is none."""
    path = Path(folder) / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Role to token, `{"bos_token": "<bos>", ...}`; a token is a string or an object with `content`."""
    extra = config.get("extra_special_tokens")
    entries = {**config, **(extra if isinstance(extra, Mapping) else {})}
    names = {}
    for role, token in entries.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if role.endswith("_token") and isinstance(text, str):
            names[role] = text
    return names
