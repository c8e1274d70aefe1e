"""How good a model is: likelihood (autoregressive and diffusion), samples, an independent judge. Trains nothing."""
