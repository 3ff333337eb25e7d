"""The engine: what an edit is and how it is computed. Facts go in at the left, weights come out at the right:

phases, facts, anatomy, model, hparams, prompts, passes, suffix, datasets, keys, values, delta, solve, evaluation,
editors, session.

Each module imports only what stands left of it.
"""
