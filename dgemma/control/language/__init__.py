"""Which texts an answer may be: a schema, expression, list or grammar as an automaton over tokens, and its solver."""
