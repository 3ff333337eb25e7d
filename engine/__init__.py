"""The engine: what an edit is and how it is computed. Facts go in at the left, weights come out at the right:

facts, anatomy, model, hparams, prompts, passes, datasets, keys, values, solve, delta, evaluation, editors, session.
Each module imports only what stands left of it.
"""
