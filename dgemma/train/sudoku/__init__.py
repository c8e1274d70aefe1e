"""Sudoku as a training task: rules, symmetries, puzzles with exactly one solution, examples for the trainer."""
