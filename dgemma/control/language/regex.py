"""A regular expression as a deterministic automaton over bytes. Knows no tokens.

`outlines_core` compiles (Rust's `regex` syntax: no look-around, no back-references). It does so in a process of its
own, because some short expressions have automata without bound and its compiler cannot be told to stop.

That compiler is for searching: of `a|ab` it keeps `a`, the alternative that matches first, of `(ab)*` only the empty
text, and it follows matches from every place of a text, whose number grows exponentially for some counted repeats. So
it gets zero bytes around an expression in which nothing else can be a zero byte: no match before the second, no start
but at the first.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgemma.errors import RequestError

MOST_CHARACTERS = 200_000
MOST_STATES = 40_000
SECONDS = 20
_BYTES = 2 << 30  # of memory that the compiler may take
_SHOWN = 60
_CHILD = """
import resource, sys
from array import array
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]),) * 2)
from outlines_core import Index, Vocabulary
vocabulary = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
try:
    index = Index(sys.stdin.buffer.read().decode(), vocabulary)
except ValueError as error:
    sys.exit(str(error))
table, final = index.get_transitions(), index.get_final_states()
if len(table) > int(sys.argv[2]):
    sys.exit("states " + str(len(table)))
names = {state: number for number, state in enumerate(dict.fromkeys([index.get_initial_state(), *table, *final]))}
flat = array("i", [len(names), len(final), *(names[state] for state in final)])
for state, row in table.items():
    for byte, target in row.items():
        if byte < 256:
            flat.extend((names[state], byte, names[target]))
sys.stdout.buffer.write(flat.tobytes())
"""


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """State 0 is the start. `next [S, 256]` is the state after a byte, -1 for none; `accepting [S]`.

    No text has a zero byte.
    """

    next: NDArray[np.int32]
    accepting: NDArray[np.bool_]

    def matches(self, text: bytes) -> bool:
        """Whether it accepts a whole text; by walking it, for tests and small things."""
        state = 0
        for byte in text:
            state = int(self.next[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


def compile_regex(pattern: str, seconds: int = SECONDS) -> ByteAutomaton:
    """The automaton of all texts that `pattern` matches as a whole; `RequestError` for one that is none or too large.

    `seconds` are of the processor's time, at least 1.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise RequestError(f"a regular expression may have {MOST_CHARACTERS} characters, this one has {len(pattern)}")
    shown = repr(pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "…")
    try:
        text = _marked(pattern, shown).encode()
    except UnicodeEncodeError:
        raise RequestError(f"the regular expression {shown} cannot be encoded as UTF-8") from None
    command = [sys.executable, "-I", "-c", _CHILD, str(_BYTES), str(MOST_STATES), str(seconds)]
    done = subprocess.run(command, input=text, capture_output=True)
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise RequestError(
            f"the regular expression {shown} takes more than {seconds} s to compile; use smaller or fewer repeats"
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        if "No module named" in said:
            raise RequestError("constraints need the package outlines_core; install it with: pip install outlines_core")
        if said.startswith("states "):
            raise RequestError(
                f"the automaton of the regular expression {shown} has {said[7:]} states, at most {MOST_STATES} are "
                "allowed; use smaller repeats"
            )
        if done.returncode < 0 or "memory" in said.lower():
            raise RequestError(
                f"the automaton of the regular expression {shown} needs more than {_BYTES >> 30} GiB to compile; use "
                "smaller or fewer repeats"
            )
        reason = said.splitlines()[-1] if said else "unknown"
        reason = "it matches no text" if "incompatible" in reason else reason.removeprefix("Failed to build DFA ")
        raise RequestError(f"the regular expression {shown} cannot be compiled: {reason}")
    numbers = np.frombuffer(array("i", done.stdout), dtype=np.int32)
    count, finals = int(numbers[0]), int(numbers[1])
    source, byte, target = numbers[2 + finals :].reshape(-1, 3).T
    table = np.full((count, 256), -1, dtype=np.int32)
    table[source, byte] = target
    final = np.zeros(count + 1, dtype=np.bool_)  # the last is for "no state" (-1)
    final[numbers[2 : 2 + finals]] = True
    accepting, start = final[table[:, 0]], int(table[0, 0])
    table[:, 0] = -1
    # The true start, behind the first zero byte, takes number 0 from the state that waited for it.
    table[0], accepting[0] = table[start], accepting[start]
    table[table == start] = 0
    table[start], accepting[start] = -1, False
    return ByteAutomaton(table, accepting)


def _marked(pattern: str, shown: str) -> str:
    """`pattern` between zero bytes, with every class in it less the zero byte."""
    out, depth, classes, at = [], 0, 0, 0
    while at < len(pattern):
        c, after = pattern[at], pattern[at + 1 : at + 2]
        size = 1
        if c == "\\" and after:
            size = 2
            if after in "pP" and (found := re.match(r"\{[^}]*\}|.", pattern[at + 2 :], re.DOTALL)):
                size += found.end()
            part = pattern[at : at + size]
            out.append(rf"[{part}--\x00]" if after in "DWSPp" else part)
        elif c == "[":
            found = re.match(r"\[(\^?)(\]?)", pattern[at:])
            named = re.match(r"\[:\^?[a-z]+:\]", pattern[at:]) if classes else None
            assert found
            size = named.end() if named else found.end()
            classes += named is None
            out.append(named.group() if named else "[" + ("^\\x00" if found[1] else "") + ("\\]" if found[2] else ""))
        elif c == "]" and classes:
            classes -= 1
            out.append(c)
        elif c in "^$" and not classes:
            raise RequestError(f"the regular expression {shown} has {c} inside; anchors may only be around the whole")
        elif c == "." and not classes:
            out.append(r"[^\n\x00]")
        elif c == "(" and not classes and (found := re.match(r"\(\?[a-zA-Z-]*[sRx]", pattern[at:])):
            raise RequestError(f"the regular expression {shown} has the flag {found.group()!r}, which is not supported")
        else:
            depth += 0 if classes else (c == "(") - (c == ")")
            out.append(c)
        if depth < 0:
            break
        at += size
    if depth or classes:
        raise RequestError(f"the regular expression {shown} has brackets that do not match")
    return rf"\x00(?:{''.join(out)})\x00"
