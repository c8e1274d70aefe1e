"""Diffusion by its mathematics: noise, schedule, samplers, stop rules, losses. Knows no network and no cache."""
