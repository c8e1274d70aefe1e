"""A user's own files: every format, every kind of bad row by its line, target spans, the cache of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.errors import ConfigError, DataError
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data.documents import Source
from dgemma.train.data.mixture import Mixture, Phase
from dgemma.train.data.reading import Rows
from dgemma.train.data.rows import SourceSpec, load_sources

MODEL = Path(__file__).resolve().parent.parent / "dgemma" / "models" / "default"
TOKENIZER = Tokenizer.load(MODEL)
TEMPLATE = ChatTemplate.load(MODEL)
BOS, EOS, TURN_END = 2, 1, 6
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who lived by the river?"},
    {"role": "assistant", "content": "Lily did."},
    {"role": "user", "content": "And who\nvisited?"},
    {"role": "assistant", "content": "  Tom, her friend.\n\nHe came at noon. "},
    {"role": "user", "content": "Thanks!"},
]


def write(path: Path, rows: Sequence[Any]) -> Path:
    """JSON Lines; bytes are written as they are."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def load(path: Path | str, cache: Path | None = None, **options: Any) -> tuple[Source, list[str]]:
    said: list[str] = []
    cache = cache or Path(path).parent / "cache"
    (source,) = load_sources([SourceSpec(path=str(path), **options)], TOKENIZER, TEMPLATE, cache, said.append)
    return source, said


def words(source: Source) -> list[str]:
    """Documents as text, special tokens shown."""
    return [TOKENIZER.decode(source.document(index).tolist(), False) for index in range(len(source))]


def answers(source: Source, index: int = 0) -> list[str]:
    targets = source.targets(index)
    assert targets is not None
    return [TOKENIZER.decode(source.document(index)[begin:end].tolist(), False) for begin, end in targets]


# -- formats -------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfLily saw a caf\xc3\xa9.\r\nShe went in.\n")
    source, said = load(tmp_path / "one.txt")
    assert words(source) == ["<bos>Lily saw a café.\r\nShe went in.\n"] and source.spans is None
    assert source.whole and source.end_token == EOS and said == [f"one: 1 documents, {len(source.ids)} tokens"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.TXT", ".hidden/x.txt", "a/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write(tmp_path / "c.jsonl", [{"text": "first"}, {"text": "second", "other": 1}])
    source, _ = load(tmp_path, tmp_path.parent / "cache")
    assert words(source) == [f"<bos>{text}" for text in ("a/c.TXT", "a/z.md", "b.txt", "first", "second")]


def test_a_completion_is_the_target_and_ends_once(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "Lily saw", "completion": " a cat."}, b"", b"  "])
    source, _ = load(path)
    assert words(source) == ["<bos>Lily saw a cat.<eos>"] and answers(source) == [" a cat.<eos>"]
    assert source.answer_only and source.whole


def test_every_answer_of_a_chat_is_a_span(tmp_path: Path) -> None:
    source, _ = load(write(tmp_path / "chats.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}]))
    assert answers(source) == ["Lily did.<turn|>", "Tom, her friend.\n\nHe came at noon.<turn|>"]
    assert answers(source, 1) == ["Lily did.<turn|>"]
    # What precedes an answer is the prompt that a user would send, token for token.
    assert TEMPLATE is not None
    for index, at in ((0, 2), (1, 4)):
        targets = source.targets(0)
        assert targets is not None
        prompt = TOKENIZER.encode(TEMPLATE.render(TALK[:at], add_generation_prompt=True))
        assert source.document(0)[: targets[index][0]].tolist() == prompt


def test_rows_of_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    rows = datasets.Dataset.from_list([{"messages": TALK[1:3]}, {"messages": TALK[1:2]}, {"messages": TALK}])
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    for name in ("saved", "splits"):
        source, said = load(tmp_path / name, bad_rows="skip")
        assert len(source) == 2 and answers(source, 1)[0] == "Lily did.<turn|>"
        assert f"{tmp_path / name}[1]: no assistant turn" in "".join(said)
        assert "tokenised before" in load(tmp_path / name, bad_rows="skip")[1][-1]
    (tmp_path / "named").mkdir()
    write(tmp_path / "named" / "test.jsonl", [{"text": "A test."}])
    write(tmp_path / "named" / "train.jsonl", [{"text": "A lesson."}])
    for split, text in (("", "A lesson."), (":test", "A test.")):
        assert words(load(f"hf:{tmp_path / 'named'}{split}", tmp_path / "cache")[0]) == [f"<bos>{text}"]
    with pytest.raises(DataError, match="nowhere"):
        load(f"hf:{tmp_path / 'nowhere'}", tmp_path / "cache")


def test_token_files_are_sources_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "old.npz", ids=np.arange(2, 12), offsets=np.array([0, 4, 10]), prompt_len=np.array([1, 2]))
    source, _ = load(tmp_path / "old.npz")
    assert source.spans is not None and source.spans.tolist() == [[1, 4], [6, 10]]
    assert not source.answer_only and source.end_token is None and not (tmp_path / "cache").exists()


def test_what_is_not_there_or_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").write_text("x")
    for name, reason in (("folder", "no file in this folder"), ("no.txt", "no such file"), ("a.csv", "must end with")):
        with pytest.raises(DataError, match=f"{name}: .*{reason}"):
            load(tmp_path / name)
    for options in ({"kind": "prose"}, {"bad_rows": "ignore"}, {"weight": -1.0}, {"whole": False, "pack": True}):
        with pytest.raises(ConfigError, match=rf"source x\.txt: {next(iter(options))}"):
            SourceSpec(path="x.txt", **options)  # type: ignore[arg-type]


# -- bad rows ------------------------------------------------------------------------------

GOOD = {"messages": TALK[1:3]}
BAD: list[tuple[Any, str]] = [
    (b'{"messages": [', "not JSON: Expecting value at column"),
    (b'{"messages": "\xff"}', "not UTF-8: byte 14 is 0xff"),
    ([1, 2], "a row must be an object with fields, got list [1, 2]"),
    ({"text": "x"}, "field 'messages' is missing (this is a source of kind chat)"),
    ({"messages": "hello"}, "must be a list of objects with role and content, got str 'hello'"),
    ({"messages": []}, "must be a list of objects"),
    ({"messages": TALK[1:2]}, "no assistant turn"),
    ({"messages": TALK[2:5]}, "the first turn is the assistant's"),
    ({"messages": [TALK[1], {"role": "assistant", "content": " \n"}]}, "an assistant turn is empty"),
    ({"messages": [{"role": "human", "content": "Hi"}, TALK[2]]}, "message 0: role must be one of"),
    ({"messages": [{"role": "user", "content": 5}, TALK[2]]}, "message 0: content must be a text"),
    ({"messages": [TALK[1], TALK[0], TALK[2]]}, "a system turn must come first"),
    ({"messages": [{"role": "user", "content": "\ud800"}, TALK[2]]}, "cannot be encoded as UTF-8"),
]


def test_bad_rows_are_skipped_and_reported_or_stop_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *(row for row, _ in BAD), GOOD])
    source, said = load(path, bad_rows="skip")
    assert len(source) == 2 and said[0] == f"rows: skipped {len(BAD)} bad rows, among them:"
    assert [line.split(": ")[0].strip() for line in said[1:6]] == [f"{path}:{number}" for number in range(2, 7)]
    for number, (row, reason) in enumerate(BAD):
        write(path, [GOOD] * number + [row] + [GOOD])
        with pytest.raises(DataError) as error:
            load(path, kind="chat")
        assert str(error.value).startswith(f"{path}:{number + 1}: ") and reason in str(error.value)


def test_bad_texts_and_pairs(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": 5}, {"text": "  "}, {"txt": "x"}, b"null", {"text": "good"}])
    source, said = load(texts, bad_rows="skip")
    assert words(source) == ["<bos>good"]
    for number, reason in enumerate(
        ("field 'text' must be a text, got int 5", "field 'text' is empty", "a row needs 'messages' or 'prompt' and "
         "'completion' or 'text'; it has 'txt'", "got NoneType None"), start=1
    ):  # fmt: skip
        assert f"texts.jsonl:{number}: " in said[number] and reason in said[number]
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "x", "completion": ""}])
    with pytest.raises(DataError, match=r"no row can be used; .*pairs\.jsonl:1: field 'completion' is empty"):
        load(pairs, bad_rows="skip")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes" / "good.txt").write_text("good")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8: byte 3 is 0xe9 \(bad_rows: skip"):
        load(tmp_path / "notes", tmp_path / "cache")
    assert words(load(tmp_path / "notes", tmp_path / "cache", bad_rows="skip")[0]) == ["<bos>good"]


def test_templates_that_cannot_be_rendered_turn_by_turn_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD, {"messages": TALK}])
    counting = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ m.content }}<turn|>{% endfor %}")
    for template, reason in ((counting, "chats.jsonl:1: the chat template writes"), (None, "this one has none")):
        with pytest.raises(DataError, match=reason):
            load_sources([SourceSpec(path=str(path))], TOKENIZER, template, tmp_path / "cache", print)
    # Without an end-of-turn token in the template an answer ends with the end token.
    plain = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    (source,) = load_sources([SourceSpec(path=str(path))], TOKENIZER, plain, tmp_path / "cache", print)
    assert answers(source) == ["Lily did.\n<eos>"]


# -- the cache -----------------------------------------------------------------------------


def test_tokens_are_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, {"messages": []}, {"messages": TALK}])
    reads = []
    read = Rows.read
    monkeypatch.setattr(Rows, "read", lambda *args: reads.append(1) or read(*args))
    first, said = load(path, bad_rows="skip")
    again, said_again = load(path, bad_rows="skip")
    assert len(reads) == 1 and said_again == [*said[:-1], f"{said[-1]}, tokenised before"] and len(said) == 3
    for name in ("ids", "offsets", "spans"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for name in ("name", "whole", "end_token", "answer_only", "pack"):
        assert getattr(first, name) == getattr(again, name)

    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        load(path)  # another wish about bad rows does not find the old answer
    kept = next((tmp_path / "cache").iterdir())
    data = bytearray(kept.read_bytes())
    for damage in (data[:100], b"", bytes(data[: len(data) // 2]) + b"\0\0\0\0" + bytes(data[len(data) // 2 + 4 :])):
        kept.write_bytes(damage)
        mended, told = load(path, bad_rows="skip")
        assert np.array_equal(mended.ids, first.ids) and "damaged and made again" in told[0]
    before = len(reads)
    load(path, bad_rows="skip")
    assert len(reads) == before
    other = ChatTemplate("<bos>{% for m in messages %}{{ m.role }}<turn|>{{ m.content }}<turn|>{% endfor %}"
                         "{% if add_generation_prompt %}assistant<turn|>{% endif %}")  # fmt: skip
    spec = SourceSpec(path=str(path), bad_rows="skip")
    (changed,) = load_sources([spec], TOKENIZER, other, tmp_path / "cache", print)
    assert len(reads) == before + 1 and len(changed.ids) != len(first.ids)
    write(path, [GOOD])
    assert len(load(path, bad_rows="skip")[0]) == 1
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".npz"]


# -- as batches ----------------------------------------------------------------------------


def test_short_texts_are_trained_whole_and_long_ones_in_windows(tmp_path: Path) -> None:
    short, long = {"text": "Lily saw a cat. " * 20}, {"text": "Lily saw a cat. " * 2000}
    short_path, long_path = write(tmp_path / "a.jsonl", [short] * 3), write(tmp_path / "b.jsonl", [long, short])
    assert load(short_path)[0].whole and not load(short_path, whole=False)[0].whole
    assert not load(long_path)[0].whole and load(long_path, whole=True)[0].whole and load(long_path, pack=True)[0].whole
    with pytest.raises(ConfigError, match="whole: false is for texts only"):
        load(write(tmp_path / "c.jsonl", [GOOD]), whole=False)


def test_a_batch_of_a_users_chats_supervises_the_answers_only(tmp_path: Path) -> None:
    source, _ = load(write(tmp_path / "chats.jsonl", [{"messages": TALK}, GOOD]))
    drawn = Mixture((source,), (8,), (Phase(0, (1,), (1,)),), tokens=256, max_prefix=8, eos=EOS, pad=0, seed=0)
    seen: set[str] = set()
    for step in range(10):
        batch = drawn.batch(step)
        assert batch.encoder_valid is not None
        for ids, valid, encoder in zip(batch.ids, batch.valid, batch.encoder_valid, strict=True):
            answer, end, fill = TOKENIZER.decode(ids[valid].tolist(), False).partition("<turn|>")
            assert end and not fill.replace("<eos>", "")
            seen.add(answer)
            assert TOKENIZER.decode(ids[encoder].tolist(), False).count("<turn|>") in (1, 2)
    assert seen == {"Lily did.", "Tom, her friend.\n\nHe came at noon."}
