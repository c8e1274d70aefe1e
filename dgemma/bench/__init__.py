"""Benchmarks with a peer beside us: same machine, same process, same weights, taking turns."""
