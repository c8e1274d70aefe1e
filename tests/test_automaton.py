"""From regular expressions, choices, JSON Schemas and grammars to automata over bytes and over tokens."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_kit import byte_fallback, byte_level, config_json

from dgemma.config import GenerationConfig
from dgemma.control.language.automaton import TokenEdges, compile_tokens
from dgemma.control.language.grammar import grammar_regex
from dgemma.control.language.json_schema import json_object_regex, schema_regex
from dgemma.control.language.languages import Compiler, expression
from dgemma.control.language.machine import Machine
from dgemma.control.language.regex import compile_regex
from dgemma.control.language.vocabulary import Vocabulary
from dgemma.errors import RequestError
from dgemma.text.tokenizer import Tokenizer, special_names

WORDS = ["a", "b", "ab", "ba", "1", "11", "é", "aé", "]", ".", "\n", " a", "日", "日本"]
PIECES: list[bytes | None] = [None, *(word.encode() for word in WORDS), b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5"]
SMALL = Vocabulary.of(PIECES)
STRINGS = ["".join(parts) for size in range(4) for parts in itertools.product("ab1é]\n.", repeat=size)]


def accepts(edges: TokenEdges, tokens: list[int]) -> bool:
    state = 0
    for token in tokens:
        found = np.flatnonzero((edges.source == state) & (edges.by == edges.of[token]))
        if not len(found):
            return False
        state = int(edges.target[found[0]])
    return bool(edges.accepting[state])


@pytest.mark.parametrize(
    "pattern",
    ["a|ab", "(ab)*", "(ab)*?", "a?", "(a|ab)(b|1)", "(?i)AB", ".{0,2}", "[^a]*", "[^]a]+", r"\D+", r"[\D]\W?", "(|a)b",
     "a{2}", "a{1,}", r"\.", "[a-b1]+", "(?P<x>a)b", "(a|b)*a(a|b){2}", "é+", "[é]|a", ""],
)  # fmt: skip
def test_bytes_as_python_matches(pattern: str) -> None:
    made, python = compile_regex(pattern), re.compile(pattern)
    for text in STRINGS:
        assert made.matches(text.encode()) == bool(python.fullmatch(text)), text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "brackets that do not match"), ("a)|(?:b", "brackets that do not match"), ("[a", "brackets"),
        ("(?=a)", "cannot be compiled"), ("^a", "has ^ inside"), ("(?s).", "flag"), ("[a&&b]", "matches no text"),
        ("\ud800", "cannot be encoded"), ("a" * 200_001, "200000 characters, this one has 200001"),
        ("(a|b)*a(a|b){17}", "at most 40000 are allowed"),
    ],
)  # fmt: skip
def test_what_is_no_regular_expression_or_too_large(pattern: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        compile_regex(pattern)


def test_a_compiler_without_end_is_stopped() -> None:
    with pytest.raises(RequestError, match="more than 1 s to compile"):
        compile_regex("(a|b)*a(a|b){40}", seconds=1)


@pytest.mark.parametrize("pattern", ["a*", "(a|ab|日本)*", "[^a]{0,3}", "é|aé", "(?:11|1a?)+", "日?.", "(ab|ba){2,3}"])
def test_tokens_as_bytes(pattern: str) -> None:
    """Every sequence of up to three tokens, whether its bytes are characters or not."""
    text = compile_regex(pattern)
    edges = compile_tokens(text, SMALL)
    found = 0
    for size in range(4):
        for tokens in itertools.product(range(len(PIECES)), repeat=size):
            spelled = b"".join(PIECES[token] or b"\xff" for token in tokens)
            assert accepts(edges, list(tokens)) == text.matches(spelled), spelled
            found += text.matches(spelled)
    assert found > 1


def test_classes_are_as_few_as_can_be_and_in_order_of_their_lowest_token() -> None:
    edges = compile_tokens(compile_regex("[ab]*1"), SMALL)
    columns = {}
    for token in range(len(PIECES)):
        moves = sorted(
            (int(s), int(t))
            for s, t, k in zip(edges.source, edges.target, edges.by, strict=True)
            if k == edges.of[token]
        )
        columns.setdefault(int(edges.of[token]), set()).add(tuple(moves))
    assert all(len(moves) == 1 for moves in columns.values())
    alive = [next(iter(moves)) for kind, moves in columns.items() if kind]
    assert len(set(alive)) == len(alive) == edges.count - 1 and () not in alive
    lowest = [int(np.flatnonzero(edges.of == kind)[0]) for kind in range(1, edges.count)]
    assert lowest == sorted(lowest)


def test_distance_is_the_fewest_tokens() -> None:
    assert compile_tokens(compile_regex("aé"), SMALL).distance[0] == 1  # one token spells both
    assert compile_tokens(compile_regex("1{5}"), SMALL).distance[0] == 3
    machine = Machine.of(compile_tokens(compile_regex("1{5}"), SMALL), [0], 0)
    assert machine.least == 4 and machine.distance[machine.ended] == 0


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_paths_decode_to_what_the_expression_matches(make: Any) -> None:
    """Random walks through the automaton, decoded by the tokenizer itself, with characters of several bytes."""
    tokenizer = Tokenizer(make(), special_names(config_json()))
    pattern = r"(The |naïve |“[a-zé€日]{1,5}” |\n|12 € )+"
    pieces = tokenizer.token_bytes()
    assert not any(pieces[token] for token in tokenizer.special_ids)
    machine = Machine.of(compile_tokens(compile_regex(pattern), Vocabulary.of(pieces)), [1], 0)
    chance, several = random.Random(1), 0
    for _ in range(200):
        state, ids = 0, []
        while state != machine.ended:
            begin, end = np.searchsorted(machine.edges.source, [state, state + 1])
            steps = list(range(begin, end))
            if len(ids) > 12:  # home by the shortest way
                steps = [s for s in steps if machine.distance[machine.edges.target[s]] < machine.distance[state]]
            step = chance.choice(steps)
            ids.append(int(chance.choice(np.flatnonzero(machine.edges.of == machine.edges.by[step]))))
            state = int(machine.edges.target[step])
        text = tokenizer.decode(ids[:-1])
        assert re.fullmatch(pattern, text), text
        several += any(len(character.encode()) > 1 for character in text)
    assert several > 50


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "é", "1", "[ab]", "[^a]", ".", r"\d", "日本"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: two[0] + two[1]),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,3}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, seed=st.integers(0, 2**32 - 1))
def test_a_solved_path_of_any_expression_matches(pattern: str, seed: int) -> None:
    """Random expressions, random probabilities: both the most likely path and the draw are texts that match."""
    from dgemma.control.language.solve import solve

    try:
        machine = Machine.of(compile_tokens(compile_regex(pattern), SMALL), [0], 0)
    except RequestError:
        return
    chance = np.random.default_rng(seed)
    n = machine.least + int(chance.integers(0, 6))
    logsum = np.log(chance.dirichlet(np.full(machine.edges.count, 0.3), n) + 1e-12)
    got = solve(machine.arcs, logsum, logsum, 0, machine.distance <= 0, chance.random(n))
    for classes in (got.path, got.drawn):
        tokens = [int(chance.choice(np.flatnonzero(machine.edges.of == kind))) for kind in classes]
        text = b"".join(PIECES[token] or b"" for token in tokens[: tokens.index(0)]).decode()
        assert re.fullmatch(pattern, text), text


GOOD: list[Any] = [
    True, {}, {"type": "integer"}, {"type": "number", "minimum": -1.5, "exclusiveMaximum": 3}, {"type": "boolean"},
    {"enum": [1, "a", None, [1, 2], {"a": "é\n\""}]}, {"const": {"x": [True]}}, {"type": ["string", "null"]},
    {"type": "string", "minLength": 2, "maxLength": 4}, {"type": "string", "pattern": "^[a-z]{2,3}-[^x]?$"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}, {"type": "string", "pattern": "ab"},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {}}, "required": ["a", "z"], "additionalProperties": {"type": "null"}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}, "minProperties": 1},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "minProperties": 2},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 3}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 120}]},
    {"type": "integer", "anyOf": [{"minimum": 5, "maximum": 7}, {"maximum": -2}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {
        "anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["v", "next"]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", GOOD, ids=lambda schema: json.dumps(schema)[:40])
def test_random_texts_of_a_schema_are_valid(schema: Any) -> None:
    tokenizer = Tokenizer(byte_level(), special_names(config_json()))
    compiler = Compiler(tokenizer.token_bytes, tokenizer.vocab_size)
    machine = compiler.machine(schema_regex(schema), GenerationConfig(stop_tokens=(1,), max_new_tokens=512))
    chance, seen = random.Random(2), set()
    for _ in range(40):
        state, ids = 0, []
        while state != machine.ended:
            begin, end = np.searchsorted(machine.edges.source, [state, state + 1])
            steps = list(range(begin, end))
            if len(ids) > 40:
                steps = [s for s in steps if machine.distance[machine.edges.target[s]] < machine.distance[state]]
            step = chance.choice(steps)
            ids.append(int(chance.choice(np.flatnonzero(machine.edges.of == machine.edges.by[step]))))
            state = int(machine.edges.target[step])
        text = tokenizer.decode(ids[:-1])
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)
        seen.add(text)
    assert seen


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (False, "allows no value"), ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no value"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "allows no value"),
        ({"not": {}}, "'not' is not supported"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "allows no value"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "allows no value"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "allows no value"), ({"enum": []}, "at least one"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"type": "x"}, "type must be one of"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "may hold for one value at once"),
        ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, "may hold for one value at once"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf may only be 1"), ({"$ref": "#/a"}, "points to nothing"),
        ({"$ref": "http://x"}, "must point into the schema"), ({"$ref": "#a"}, "must point"),
        ({"type": "string", "format": "zz"}, "format must be one of"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}}},
         "no value"),
        ({"type": "string", "pattern": "(?=a)"}, "is not supported"), (3, "must be an object or a boolean"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        schema_regex(schema)


def test_whole_number_ranges() -> None:
    for low, high in ((0, 0), (7, 123), (99, 1001), (-120, 35), (-7, -3), (10, 99), (1, 10)):
        made = re.compile(schema_regex({"type": "integer", "minimum": low, "maximum": high}))
        for number in range(-1300, 1300):
            assert bool(made.fullmatch(str(number))) == (low <= number <= high), (low, high, number)


def test_numbers_are_within_their_bounds() -> None:
    for low, high in ((0, 1), (0.2, 0.8), (1.2, 1.25), (-0.75, -0.2), (-5.5, 3.25), (-3, -1), (0.05, 0.06)):
        for names in (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")):
            made = schema_regex({"type": "number", names[0]: low, names[1]: high})
            python, seen = re.compile(made), 0
            for thousandth in range(-6000, 6000):
                number = thousandth / 1000
                if python.fullmatch(f"{number:g}"):
                    seen += 1
                    assert low < number < high or (names[0] == "minimum" and low <= number <= high), (made, number)
            assert seen, (low, high, names)


def test_optional_properties_may_be_left_out() -> None:
    names = ("a", "b", "c")
    for required in ([], ["a"], ["b"], ["c"], ["a", "c"], list(names)):
        properties = {name: {"const": 1} for name in names}
        made = re.compile(schema_regex({"type": "object", "properties": properties, "required": required}))
        for size in range(4):
            for chosen in itertools.combinations(names, size):
                text = json.dumps(dict.fromkeys(chosen, 1))
                assert bool(made.fullmatch(text)) == (set(required) <= set(chosen)), (required, chosen)


def test_any_object_is_nested_to_its_depth() -> None:
    made = re.compile(json_object_regex(2))
    for text in ('{"a": [1, {"b": null}]}', "{}", '{"a": 1.5, "b": "x"}'):
        assert bool(made.fullmatch(text)) == (text.count("{") + text.count("[") <= 2), text


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('a: "x" a | "y"  # twice "y"', ["y", "xy", "xxxy"], ["x", "xx", "x" * 9 + "y"]),
        ('s: n ("+" n)*\nn: /[0-9]{1,2}/\n  | "(" s ")"', ["1", "12+(3+4)", "((1))"], ["", "123", "(1", "1+"]),
        ('a: "\\n" ("b"{2,3})? | b\nb: "#" /a\\/b/', ["\n", "\nbb", "#a/b"], ["b", "\nb", "#"]),
    ],
)
def test_grammars(grammar: str, good: list[str], bad: list[str]) -> None:
    made = compile_regex(grammar_regex(grammar))
    assert all(made.matches(text.encode()) for text in good)
    assert not any(made.matches(text.encode()) for text in bad)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [("", "has no rule"), ("a: a", "goes on for ever"), ("a: b", "no rule 'b'"), ('a: "x', "cannot be read from"),
     ('a: "x"\na: "y"', "defines the rule 'a' again"), ("x", "is no rule"), ('a: ("x"', "cannot be read"),
     ('a: a a a a a "x"? | "y"{2}', "when written out")],
)  # fmt: skip
def test_what_is_no_grammar(grammar: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        grammar_regex(grammar, depth=8)


def test_choices_and_the_one_language() -> None:
    made = compile_regex(expression(choices=["a", "ab", "a.b", "(é)"]) or "")
    assert [made.matches(text.encode()) for text in ("a", "ab", "a.b", "axb", "(é)", "")] == [1, 1, 1, 0, 1, 0]
    assert expression() is None and expression(regex="^a+$") == "a+"
    for wrong in (
        {"choices": []},
        {"choices": "ab"},
        {"choices": [""]},
        {"regex": "a", "choices": ["b"]},
        {"regex": 3},
    ):
        with pytest.raises(RequestError):
            expression(**wrong)


def test_a_compiler_keeps_the_last_few() -> None:
    compiler = Compiler(lambda: PIECES, len(PIECES), keep=2)
    first = compiler.edges("a+")
    assert compiler.edges("a+") is first
    compiler.edges("b+"), compiler.edges("1+")
    assert len(compiler) == 2 and compiler.edges("a+") is not first


def test_a_vocabulary_may_be_smaller_than_the_model() -> None:
    edges = compile_tokens(compile_regex("a"), Vocabulary.of(PIECES, 50))
    assert len(edges.of) == 50 and not edges.of[len(PIECES) :].any()
